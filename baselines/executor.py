"""Attention over the pairs of a `Pattern`: a loop over blocks of queries on a CPU, flex attention on a GPU."""

import functools
import math

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from .pattern import Pattern


def attend(query: Tensor, key: Tensor, value: Tensor, pattern: Pattern, softmax_scale: float) -> tuple[Tensor, int]:
    """Softmax attention of each query over the keys that its head takes.

    Args:
        query: (num_heads, num_queries, head_dim).
        key, value: (num_kv_heads, length, head_dim); query head h reads h // (num_heads // num_kv_heads).
        pattern: for these shapes.
    Returns:
        (num_heads, num_queries, head_dim), and the number of pairs.
    Raises:
        ValueError: shapes that do not go together.
    """
    heads, rows, _ = query.shape
    if heads % key.shape[0] or key.shape[:2] != value.shape[:2]:
        raise ValueError(f"`key` {tuple(key.shape)} and `value` {tuple(value.shape)} do not serve {heads} query heads")
    if (heads, rows, key.shape[1]) != (pattern.num_heads, pattern.length - pattern.start, pattern.length):
        raise ValueError(
            f"`pattern` is for {pattern.num_heads} heads, {pattern.length - pattern.start} queries and "
            f"{pattern.length} keys, got `query` {tuple(query.shape)} and `key` {tuple(key.shape)}"
        )
    if query.device.type == "cuda" and pattern.pooled is None:
        return _attend_flex(query, key, value, pattern, softmax_scale), pattern.count()
    return _attend_blocks(query, key, value, pattern, softmax_scale)


def _attend_blocks(query, key, value, pattern, softmax_scale) -> tuple[Tensor, int]:
    """One matrix product over the listed keys for each head and block of queries; nothing else is computed."""
    group_size = query.shape[0] // key.shape[0]
    # The precision of the sum over keys, as in eager attention.
    accumulate = torch.promote_types(query.dtype, torch.float32)
    output = query.new_empty(*query.shape[:2], value.shape[-1])
    on_cpu, device, pairs = pattern.to("cpu"), query.device, 0
    for head in range(query.shape[0]):
        keys, values = key[head // group_size], value[head // group_size]
        queries = query[head] * softmax_scale
        for tile in on_cpu.tiles(head):
            own, places = queries[tile.rows], tile.keys.to(device)
            taken = values.index_select(0, places)
            scores = own @ keys.index_select(0, places).T  # [num_rows, num_keys]
            scores[:, tile.num_whole :].masked_fill_(~tile.mask.to(device), -torch.inf)
            for size, blocks in tile.pooled.items():
                means = own @ _means(keys, blocks.to(device), pattern.block_size, size).T + math.log(size)
                scores = torch.cat([scores, means], 1)
                taken = torch.cat([taken, _means(values, blocks.to(device), pattern.block_size, size)])
            weights = scores.softmax(-1, dtype=accumulate).to(value.dtype)
            output[head, tile.rows] = weights @ taken
            pairs += tile.pairs
    return output, pairs


def _means(x: Tensor, blocks: Tensor, block_size: int, size: int) -> Tensor:
    """Means of `size` neighbours in some blocks of (length, head_dim): (len(blocks) * block_size // size, head_dim)."""
    rows = blocks[:, None] * block_size + torch.arange(block_size, device=x.device)
    return x[rows.flatten()].unflatten(0, (-1, size)).mean(1)


@functools.cache
def _compiled_flex():
    # Not dynamic=True: the first call's code is for its shapes, later ones' for any.
    return torch.compile(flex_attention)


def _attend_flex(query, key, value, pattern, softmax_scale, flex=None) -> Tensor:
    """flex attention on the grid of the pattern's blocks. `flex`: in the place of the compiled one."""
    missing = pattern.start % pattern.block_size
    query = torch.nn.functional.pad(query, (0, 0, missing, 0))
    flex = flex or _compiled_flex()
    output = flex(
        query[None],
        key[None],
        value[None],
        block_mask=block_mask(pattern, query.device),
        scale=softmax_scale,
        enable_gqa=query.shape[0] != key.shape[0],
    )
    return output[0, :, missing:]


def block_mask(pattern: Pattern, device: torch.device | str) -> BlockMask:
    """The pattern for flex attention; its queries start where their first block does, at a multiple of block_size.

    Which blocks are empty, and which need no mask, is read off the lists, not off a dense mask, which at 128K tokens
    would have 16G entries a head.
    """
    size, first = pattern.block_size, pattern.first_query_block
    queries = torch.arange(pattern.num_query_blocks, device=device)[:, None] + first
    keys = torch.arange(pattern.num_key_blocks, device=device)[None]
    shape = pattern.num_heads, pattern.num_query_blocks, pattern.num_key_blocks
    some = (queries == keys).expand(shape)
    every = torch.zeros(shape, dtype=torch.bool, device=device)
    before, after = pattern.start % size, -pattern.length % size

    if pattern.blocks is not None:
        some, every = some | pattern.blocks.to(device), every | pattern.blocks.to(device)
    if pattern.rows is not None:
        rows = torch.nn.functional.pad(pattern.rows.to(device), (before, after)).unflatten(-1, (-1, 1, size))
        some, every = some | rows.any(-1), every | rows.all(-1)
    if pattern.columns is not None:
        columns = torch.nn.functional.pad(pattern.columns.to(device), (0, after)).unflatten(-1, (-1, size))[:, None]
        some, every = some | columns.any(-1), every | columns.all(-1)
    if pattern.diagonals is not None:
        counts = torch.nn.functional.pad(pattern.diagonals.to(device).cumsum(-1), (1, 0))
        # The diagonals of a pair of blocks: from that of the first query and the last key on, 2 * size - 1 of them.
        lowest = ((queries - keys) * size - size + 1).clamp(0, pattern.length)
        highest = ((queries - keys) * size + size).clamp(0, pattern.length)
        found = counts[:, highest] - counts[:, lowest]
        some, every = some | (found > 0), every | (found == 2 * size - 1)
    if pattern.slashes is not None:
        met = torch.stack([_met(pattern, head, device) for head in range(pattern.num_heads)])
        some, every = some | met[:, 0], every | met[:, 1]
    some = some & (keys <= queries)
    every = every & (keys < queries)  # on the diagonal, causality is a mask
    start = first * size
    on_device = pattern.to(device)
    last = pattern.length - 1

    def mask_mod(batch, head, query, key):
        # Of the rows that fill the first block, and the last, nothing is read.
        position = (query + start).clamp(pattern.start, last)
        return on_device.contains(head, position, key.clamp(max=last)) & (key <= query + start)

    return BlockMask.from_kv_blocks(
        *_lists(some & ~every),
        *_lists(every),
        BLOCK_SIZE=size,
        mask_mod=mask_mod,
        seq_lengths=(pattern.length - start, pattern.length),
    )


def _met(pattern: Pattern, head: int, device) -> Tensor:
    """(2, query blocks, key blocks): where a block of queries meets any, and every, key of a block on a slash.

    Head by head: for all at once, 128K tokens would take 4 GB.
    """
    size = pattern.block_size
    counts = pattern.slash_counts[head].to(device)
    keys = torch.arange(pattern.length, device=device)
    first = (torch.arange(pattern.num_query_blocks, device=device)[:, None] + pattern.first_query_block) * size
    end = (first + size).clamp(max=pattern.length)
    met = counts[(end - keys).clamp(min=0)] > counts[(first.clamp(min=pattern.start) - keys).clamp(min=0)]
    after = -pattern.length % size
    some = torch.nn.functional.pad(met, (0, after)).unflatten(-1, (-1, size)).any(-1)
    every = torch.nn.functional.pad(met, (0, after), value=True).unflatten(-1, (-1, size)).all(-1)
    return torch.stack([some, every])


def _lists(table: Tensor) -> tuple[Tensor, Tensor]:
    """Numbers and indices of the blocks in each row of (num_heads, num_query_blocks, num_key_blocks)."""
    indices = table.to(torch.int8).argsort(dim=-1, descending=True, stable=True)
    return table.sum(-1, dtype=torch.int32)[None], indices.to(torch.int32)[None]
