"""What the tests of the baselines share: tiny models, attention over a dense mask, and random vectors."""

import torch
from conftest import build_model
from tiny_random import random_qwen2_5_vl, tiny_config, tiny_tokenizer

FLOAT64 = {"atol": 1e-11, "rtol": 1e-11}
"""Sums of at most a thousand terms of size one, a few after another: 1000 * 2**-52, times their number."""


def build_qwen(seed=0, dtype=torch.float64, attn_implementation="sdpa", **text):
    """A random tiny Qwen2.5-VL of transformers, whose weights are wide enough for every attention error to show."""
    config = tiny_config(tiny_tokenizer(), **text)
    config._attn_implementation = attn_implementation
    model = random_qwen2_5_vl(config, seed)
    model.generation_config.eos_token_id = None
    return model.to(dtype).eval()


def build_ours(**options):
    return build_model(nsa_mode="dense", **options)


def vectors(num_heads=4, num_kv_heads=2, num_queries=50, length=50, head_dim=8, seed=0, dtype=torch.float64):
    """Queries, keys and values of one sample, large enough for attention to differ much from the mean."""
    generator = torch.Generator().manual_seed(seed)
    shapes = (num_heads, num_queries), (num_kv_heads, length), (num_kv_heads, length)
    return [2 * torch.randn(*shape, head_dim, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes]


def mask_of(pattern) -> torch.Tensor:
    """(num_heads, num_queries, length), by the definition in `Pattern`, pair by pair."""
    size, start, length = pattern.block_size, pattern.start, pattern.length
    names = ("blocks", "rows", "columns", "diagonals", "slashes")
    heads = []
    for head in range(pattern.num_heads):
        lists = [getattr(pattern, name) for name in names]
        blocks, rows, columns, diagonals, slashes = (None if x is None else x[head].tolist() for x in lists)

        def takes(query, key, blocks=blocks, rows=rows, columns=columns, diagonals=diagonals, slashes=slashes):
            if key >= query:
                return key == query
            if blocks and blocks[query // size - start // size][key // size]:
                return True
            if (rows and rows[query - start]) or (columns and columns[key]) or (diagonals and diagonals[query - key]):
                return True
            first = max(start, query // size * size)
            block = range(first, min(length, (query // size + 1) * size))
            return bool(slashes) and any(slashes[other - key] for other in block if other >= key)

        heads.append([[takes(query, key) for key in range(length)] for query in range(start, length)])
    return torch.tensor(heads)


def masked_attention(query, key, value, mask, softmax_scale) -> torch.Tensor:
    """Softmax over all keys where the mask is true, as one matrix; of a query with none, zero."""
    group_size = query.shape[0] // key.shape[0]
    key, value = key.repeat_interleave(group_size, 0), value.repeat_interleave(group_size, 0)
    scores = (query @ key.transpose(1, 2) * softmax_scale).masked_fill(~mask, -torch.inf)
    return torch.nan_to_num(scores.softmax(-1)) @ value


def pooled_attention(query, key, value, pattern, softmax_scale) -> torch.Tensor:
    """`masked_attention` of a pattern with means: each mean as its keys, all with the mean's key and value.

    So often as there are keys is what the logarithm in the logit stands for.
    """
    mask, size = mask_of(pattern), pattern.block_size
    output = torch.zeros(*query.shape[:2], value.shape[-1], dtype=value.dtype)
    for head in range(len(query)):
        keys, values = (x[head // (len(query) // len(key))] for x in (key, value))
        for row in range(query.shape[1]):
            seen = [(keys[k], values[k]) for k in range(pattern.length) if mask[head, row, k]]
            block = (pattern.start + row) // size
            for other, count in enumerate(pattern.pooled[head, block - pattern.start // size, :block].tolist()):
                for first in range(other * size, (other + 1) * size, count) if count else ():
                    part = slice(first, first + count)
                    seen += [(keys[part].mean(0), values[part].mean(0))] * count
            weights = (torch.stack([k for k, _ in seen]) @ query[head, row] * softmax_scale).softmax(0)
            output[head, row] = weights @ torch.stack([v for _, v in seen])
    return output
