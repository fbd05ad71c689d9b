"""What several methods compute to choose pairs. Shapes: query (num_heads, num_queries, head_dim), key (num_kv_heads,
length, head_dim), of one sample; the queries are the last ones. Scores are in float32, or in the inputs' float64.
"""

import torch
from torch import Tensor


def for_heads(key: Tensor, num_heads: int) -> Tensor:
    """Keys of each query head: (num_heads, length, head_dim)."""
    return key.repeat_interleave(num_heads // key.shape[0], 0)


def accurate(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def block_means(x: Tensor, start: int, block_size: int) -> Tensor:
    """Mean of what each block has, of vectors at the positions from `start` on: (heads, num_blocks, head_dim)."""
    x = accurate(x)
    before, after = start % block_size, -(start + x.shape[1]) % block_size
    sums = torch.nn.functional.pad(x, (0, 0, before, after)).unflatten(1, (-1, block_size)).sum(2)
    there = torch.nn.functional.pad(x.new_ones(x.shape[1]), (before, after)).unflatten(0, (-1, block_size)).sum(1)
    return sums / there[:, None]


def block_attention(query: Tensor, key: Tensor, block_size: int, softmax_scale: float) -> Tensor:
    """Attention of mean queries over mean keys, block on block and causal: (num_heads, query blocks, key blocks)."""
    start = key.shape[1] - query.shape[1]
    queries = block_means(query, start, block_size)
    keys = for_heads(block_means(key, 0, block_size), query.shape[0])
    scores = queries @ keys.transpose(1, 2) * softmax_scale
    return causal_softmax(scores)


def causal_softmax(scores: Tensor) -> Tensor:
    """Softmax over (..., queries, keys), of which the queries are the last: later keys get nothing."""
    num_queries, num_keys = scores.shape[-2:]
    later = torch.ones(num_queries, num_keys, dtype=torch.bool, device=scores.device).triu(num_keys - num_queries + 1)
    return scores.masked_fill(later, -torch.inf).softmax(-1)


def last_attention(query: Tensor, key: Tensor, count: int, softmax_scale: float) -> Tensor:
    """Attention of the last `count` queries over all keys: (num_heads, count, length)."""
    last = accurate(query[:, -count:])
    return causal_softmax(last @ for_heads(accurate(key), query.shape[0]).transpose(1, 2) * softmax_scale)


def by_diagonal(attention: Tensor) -> Tensor:
    """Sums over q - k of the attention of last queries: (..., num_queries, length) to (..., length)."""
    num_queries, length = attention.shape[-2:]
    sums = torch.zeros_like(attention[..., 0, :])
    for row in range(num_queries):
        position = length - num_queries + row
        sums[..., : position + 1] += attention[..., row, : position + 1].flip(-1)
    return sums


def largest(scores: Tensor, counts: Tensor | int) -> Tensor:
    """Where the `counts` largest of the last axis are; of equal ones, the first. `counts`: (...,) or a number."""
    ranks = scores.argsort(dim=-1, descending=True, stable=True).argsort(dim=-1)
    return ranks < (counts if isinstance(counts, int) else counts[..., None])


def smallest_mass(scores: Tensor, share: float) -> Tensor:
    """Where the fewest of the last axis are whose sum is at least `share` of the sum of all, the largest first."""
    values, order = scores.sort(dim=-1, descending=True, stable=True)
    before = values.cumsum(-1) - values  # what the larger ones sum up to
    is_needed = before < share * scores.sum(-1, keepdim=True)
    return torch.zeros_like(scores, dtype=torch.bool).scatter(-1, order, is_needed) & (scores > 0)


def own_blocks(num_query_blocks: int, num_key_blocks: int, device=None) -> Tensor:
    """(num_query_blocks, num_key_blocks), true where a block of queries meets its own keys."""
    keys = torch.arange(num_key_blocks, device=device)
    return keys[None] == keys[num_key_blocks - num_query_blocks :, None]


def antidiagonal_attention(query: Tensor, key: Tensor, block_size: int, stride: int, softmax_scale: float) -> Tensor:
    """XAttention's estimate for one head, summed over blocks: (num_query_blocks, num_key_blocks).

    Args:
        query: (num_queries, head_dim); key: (length, head_dim).
        stride: positions per group, see `XAttention`; divides block_size.
    """
    start = len(key) - len(query)
    before, after = start % block_size, -len(key) % block_size
    queries = torch.nn.functional.pad(accurate(query), (0, 0, before, after))
    keys = torch.nn.functional.pad(accurate(key), (0, 0, 0, after))
    queries = queries.unflatten(0, (-1, stride)).flip(1).flatten(1)  # [groups, stride * head_dim]
    keys = keys.unflatten(0, (-1, stride)).flatten(1)
    attention = causal_softmax(queries @ keys.T * (softmax_scale / stride))
    first = torch.arange(len(queries), device=query.device) * stride - before  # of each group's queries
    attention = attention * ((first > -stride) & (first < len(query)))[:, None]
    per_block = block_size // stride
    return attention.unflatten(1, (-1, per_block)).sum(2).unflatten(0, (-1, per_block)).sum(1)
