"""Block choice (Triton backend).

    p[h,t,j] = exp(scale * q[t,h] . k~_j - lse[t,h]), with k~ and lse from triton_compression.py
    I[t,g,j] = sum over the query heads h of group g of p[h,t,j],  j < t // B;  the block t // B is always chosen

Native Sparse Attention (arXiv:2502.11089), equations 9 to 12. A kernel recomputes the scores of all heads of a group
with the final lse, sums them into importance, and ranks it with a bisection on its bits. Importance goes to a scratch
row per token of a tile; the scratch belongs to the program, not to the tile, and programs walk many tiles, so that it
never leaves the L2 cache. The choice is a kernel of its own because attention then needs no padding of the group,
because it leaves registers for two programs of the choice per multiprocessor, one ranking while the other multiplies,
and because short sequences need no choice at all; it costs one more read of q.
"""

import torch
from torch import Tensor

from . import triton_tiles, utils

try:
    import triton
    import triton.language as tl
except ImportError as error:
    raise ImportError("backend='triton' needs triton 3.6 or later: pip install 'triton>=3.6'") from error

_LOG2_E = tl.constexpr(1.4426950408889634)

# Rows of a tile in block choice, tokens x heads of a group, and the most tokens in it: each has a row in the scratch.
_TILE_ROWS, _TILE_TOKENS = 128, 64
# Scores that a program ranks at a time: they stay in registers during the bisection.
_CHOICE_ELEMENTS = 8192
# Programs of block choice per multiprocessor, and in the interpreter, where a few make tiles share a scratch.
_PROGRAMS_PER_SM, _PROGRAMS_INTERPRETED = 2, 3


@triton.jit
def _keys(row_scores, column, own):
    """Scores as integers that rank like them: the bits before column own, the highest there, -1 after it."""
    score = tl.load(row_scores + column, mask=column < own, other=0.0)
    return tl.where(column < own, score.to(tl.int32, bitcast=True), tl.where(column == own, 0x7FFFFFFF, -1))


@triton.jit
def _choose_rows(
    scratch_ptr,
    indices_ptr,
    stride_scratch,
    stride_it,
    first,
    num_tokens,
    num_columns,
    block_counts,
    TOKENS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    WRITE_COLUMNS: tl.constexpr,
    LANES: tl.constexpr,
    COUNTS_PAD: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
):
    """The block_counts best blocks of TOKENS tokens, ROWS at a time, from the first COLUMNS scores of their rows.

    The bits of non-negative floats order as the floats do. Bisection over these 31 bits finds the largest threshold
    that block_counts scores reach, and stops when exactly so many do; equal scores at the threshold are taken from the
    left. The token's own block has the highest key, blocks after it the lowest. No sort, no atomics, ascending output.

    Column 128 i + j of a row is element [i, row, j]: a row then lies in one warp, j over the lanes and i over the
    registers, and counting needs neither shared memory nor barriers.
    """
    offs_i = tl.arange(0, COLUMNS // LANES)[:, None, None] * LANES
    offs_j = tl.arange(0, LANES)[None, None, :]
    offs_n = tl.arange(0, COUNTS_PAD)
    for row in tl.range(0, TOKENS, ROWS, disable_licm=True):
        offs_t = row + tl.arange(0, ROWS)
        mask_t = offs_t < num_tokens
        own = (first + offs_t) // BLOCK_SIZE
        row_scores = (scratch_ptr + offs_t * stride_scratch)[None, :, None]
        # [COLUMNS // LANES, ROWS, LANES]
        key = _keys(row_scores, offs_i + offs_j, own[None, :, None])
        threshold = tl.zeros([ROWS], tl.int32)
        reached = tl.where(mask_t, own + 1, 0)
        step = 1 << 30
        while (step > 0) & (tl.max(reached, 0) > block_counts):
            # Whether to go on is decided by all warps together, once per eight bits. Steps of 0 change nothing.
            for _ in range(8):
                candidate = threshold + step
                count = tl.sum(tl.sum((key >= candidate[None, :, None]).to(tl.int32), 0), 1)
                threshold = tl.where(count >= block_counts, candidate, threshold)
                reached = tl.where(count >= block_counts, count, reached)
                step = step >> 1
        num_equal = block_counts - tl.sum(tl.sum((key > threshold[None, :, None]).to(tl.int32), 0), 1)

        # The keys are read again, a few at a time, so that they and their running counts are not all held at once.
        row_indices = indices_ptr + offs_t.to(tl.int64) * stride_it
        found_larger = tl.zeros([ROWS], tl.int32)
        found_equal = tl.zeros([ROWS], tl.int32)
        for start in range(0, num_columns + 1, WRITE_COLUMNS):
            column = start + tl.arange(0, WRITE_COLUMNS // LANES)[:, None, None] * LANES + offs_j
            some = _keys(row_scores, column, own[None, :, None])
            larger = (some > threshold[None, :, None]).to(tl.int32)
            equal = (some == threshold[None, :, None]).to(tl.int32)
            # Both counts fit into one integer: there are at most WRITE_COLUMNS of each.
            both = (larger << 16) + equal
            by_register = tl.sum(both, 2)
            running = tl.cumsum(both, 2) + (tl.cumsum(by_register, 0) - by_register)[:, :, None]
            rank_larger = found_larger[None, :, None] + (running >> 16)
            rank_equal = found_equal[None, :, None] + (running & 0xFFFF)
            allowed = num_equal[None, :, None]
            chosen = (larger > 0) | ((equal > 0) & (rank_equal <= allowed))
            place = rank_larger + tl.minimum(rank_equal, allowed) - 1
            value = tl.broadcast_to(column, [WRITE_COLUMNS // LANES, ROWS, LANES])
            tl.store(row_indices[None, :, None] + place, value, mask=chosen & mask_t[None, :, None])
            found = tl.sum(by_register, 0)
            found_larger += found >> 16
            found_equal += found & 0xFFFF
        absent = (offs_n[None, :] > own[:, None]) & (offs_n < block_counts)[None, :] & mask_t[:, None]
        tl.store(row_indices[:, None] + offs_n[None, :], tl.full([ROWS, COUNTS_PAD], -1, tl.int32), mask=absent)


@triton.jit(do_not_specialize=["num_tiles", "batch"])
def _choose_blocks_kernel(
    q_ptr,
    k_cmp_ptr,
    lse_ptr,
    indices_ptr,
    scratch_ptr,
    cu_seqlens_q_ptr,
    cu_seqlens_k_ptr,
    stride_qt,
    stride_qh,
    num_tiles,
    batch,
    num_kv_heads,
    block_counts,
    softmax_scale,
    GROUP_SIZE: tl.constexpr,
    GROUP_PAD: tl.constexpr,
    TOKENS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HEAD_PAD: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCKS: tl.constexpr,
    NUM_BLOCKS_PAD: tl.constexpr,
    ROWS: tl.constexpr,
    ROWS_QUARTER: tl.constexpr,
    WRITE_COLUMNS: tl.constexpr,
    LANES: tl.constexpr,
    COUNTS_PAD: tl.constexpr,
):
    """The chosen blocks of every token and key/value head. Grid: (programs,); each takes every programs-th tile.

    A tile is TOKENS tokens x the heads of one group: column h * TOKENS + t of scores that are computed transposed,
    [BLOCKS, GROUP_PAD * TOKENS]. An MMA accumulator then has all heads of a token in one thread, and the sum over the
    group adds registers. Importance goes to the program's scratch, TOKENS rows that stay in the L2 cache, and is ranked
    from there. Tiles are taken from the end of the sequences, the longest first; the key/value heads of one tile run
    side by side. Groups are padded to a power of two in the tile only.
    """
    tile_rows: tl.constexpr = GROUP_PAD * TOKENS
    scratch_ptr += tl.program_id(0).to(tl.int64) * TOKENS * NUM_BLOCKS_PAD
    # Values kept across tiles would cost registers that the ranking needs.
    num_work = num_tiles * batch * num_kv_heads
    for work in tl.range(tl.program_id(0), num_work, tl.num_programs(0), disable_licm=True):
        kv_head = work % num_kv_heads
        sequence = work // num_kv_heads % batch
        tile_start = (num_tiles - 1 - work // (num_kv_heads * batch)) * TOKENS
        start_q, start_k, num_queries, num_keys = triton_tiles.sequence_bounds(
            cu_seqlens_q_ptr, cu_seqlens_k_ptr, sequence
        )
        num_tokens = tl.minimum(num_queries - tile_start, TOKENS)
        if num_tokens > 0:
            first = num_keys - num_queries + tile_start
            # Columns that are ranked: the blocks before a token's own.
            num_columns = (first + num_tokens - 1) // BLOCK_SIZE
            stride_it = num_kv_heads * block_counts
            tile_token = (start_q + tile_start).to(tl.int64)
            tile_indices_ptr = indices_ptr + (tile_token * num_kv_heads + kv_head) * block_counts
            if num_columns < block_counts:
                offs_t = tl.arange(0, TOKENS)
                offs_n = tl.arange(0, COUNTS_PAD)
                own = (first + offs_t) // BLOCK_SIZE
                index = tl.where(offs_n[None, :] <= own[:, None], offs_n[None, :], -1)
                mask_n = (offs_t < num_tokens)[:, None] & (offs_n < block_counts)[None, :]
                row_ptr = tile_indices_ptr + offs_t.to(tl.int64) * stride_it
                tl.store(row_ptr[:, None] + offs_n[None, :], index, mask=mask_n)
            else:
                offs_m = tl.arange(0, tile_rows)
                offs_d = tl.arange(0, HEAD_PAD)
                mask_d = offs_d < HEAD_DIM
                head = kv_head * GROUP_SIZE + offs_m // TOKENS
                mask_m = (offs_m // TOKENS < GROUP_SIZE) & (offs_m % TOKENS < num_tokens)
                token = tile_token + offs_m % TOKENS
                offs_q = (token * stride_qt + head * stride_qh)[:, None] + offs_d[None, :]
                # [tile_rows, HEAD_PAD]
                q = tl.load(q_ptr + offs_q, mask=mask_m[:, None] & mask_d[None, :], other=0.0)
                lse = tl.load(lse_ptr + token * (num_kv_heads * GROUP_SIZE) + head, mask=mask_m, other=float("inf"))
                # Rows that see no block rank none either: what is written for them is not read.
                lse_log2 = lse * _LOG2_E
                scale_log2 = softmax_scale * _LOG2_E
                offs_cmp = ((start_k // BLOCK_SIZE).to(tl.int64) * num_kv_heads + kv_head) * HEAD_DIM
                stride_j = num_kv_heads * HEAD_DIM
                for block in range(0, num_columns, BLOCKS):
                    offs_j = block + tl.arange(0, BLOCKS)
                    mask_j = (offs_j < num_columns)[:, None] & mask_d[None, :]
                    offs_k = offs_cmp + offs_j.to(tl.int64)[:, None] * stride_j + offs_d[None, :]
                    # [BLOCKS, HEAD_PAD]
                    k = tl.load(k_cmp_ptr + offs_k, mask=mask_j, other=0.0)
                    # [BLOCKS, tile_rows]
                    score = tl.dot(k, tl.trans(q), input_precision="ieee") * scale_log2
                    p = tl.exp2(score - lse_log2[None, :])
                    importance = tl.sum(tl.reshape(p, [BLOCKS, GROUP_PAD, TOKENS]), 1)
                    offs_s = tl.arange(0, TOKENS)[None, :] * NUM_BLOCKS_PAD + offs_j[:, None]
                    tl.store(scratch_ptr + offs_s, importance)
                # Ranking reads what other threads wrote, and then the next tile overwrites it.
                tl.debug_barrier()
                # Early tiles have few columns to rank, and are ranked more rows at a time.
                if num_columns < NUM_BLOCKS_PAD // 4:
                    _choose_rows(
                        scratch_ptr, tile_indices_ptr, NUM_BLOCKS_PAD, stride_it, first, num_tokens, num_columns,
                        block_counts, TOKENS, ROWS_QUARTER, NUM_BLOCKS_PAD // 4, WRITE_COLUMNS, LANES, COUNTS_PAD,
                        BLOCK_SIZE,
                    )  # fmt: skip
                else:
                    _choose_rows(
                        scratch_ptr, tile_indices_ptr, NUM_BLOCKS_PAD, stride_it, first, num_tokens, num_columns,
                        block_counts, TOKENS, ROWS, NUM_BLOCKS_PAD, WRITE_COLUMNS, LANES, COUNTS_PAD, BLOCK_SIZE,
                    )  # fmt: skip
                tl.debug_barrier()


def choice_config(dtype: torch.dtype, group_size: int, head_dim: int, max_blocks: int, block_counts: int) -> dict:
    """Constexprs and launch options of the kernel that chooses blocks.

    Args:
        max_blocks: blocks of the longest sequence's keys, an incomplete one included.
    """
    wide = triton_tiles.is_wide(dtype)
    heads = triton.next_power_of_2(group_size)
    tokens = max(16 // heads, min(_TILE_TOKENS, (_TILE_ROWS // 4 if wide else _TILE_ROWS) // heads), 1)
    blocks = 16 if wide else 64
    columns = max(64, triton.next_power_of_2(max_blocks))
    lanes = min(128, columns // 4)
    return {
        "GROUP_SIZE": group_size,
        "GROUP_PAD": heads,
        "TOKENS": tokens,
        "HEAD_DIM": head_dim,
        "HEAD_PAD": triton_tiles.pad(head_dim),
        "BLOCKS": blocks,
        "NUM_BLOCKS_PAD": columns,
        "ROWS": max(1, min(tokens, _CHOICE_ELEMENTS // columns)),
        "ROWS_QUARTER": max(1, min(tokens, _CHOICE_ELEMENTS // (columns // 4))),
        "WRITE_COLUMNS": min(256, columns // 4),
        "LANES": lanes,
        "COUNTS_PAD": triton.next_power_of_2(block_counts),
        "num_warps": 8 if wide else 4,
        "num_stages": 1 if wide else 2,
    }


def _num_programs(device: torch.device) -> int:
    if device.type != "cuda":
        return _PROGRAMS_INTERPRETED
    return _PROGRAMS_PER_SM * torch.cuda.get_device_properties(device).multi_processor_count


def choose(
    q: Tensor,
    k_cmp: Tensor,
    lse: Tensor,
    lengths: utils.SequenceLengths,
    block_size: int,
    block_counts: int,
    softmax_scale: float,
) -> Tensor:
    """(total_q, num_kv_heads, block_counts), int32: the chosen blocks, ascending, -1 at the end.

    Args:
        k_cmp: the pooled keys of triton_compression.py.
        lse: (total_q, num_heads), fp32, of the compression branch.
    """
    total_q, num_heads, head_dim = q.shape
    num_kv_heads, batch = k_cmp.shape[1], len(lengths.offsets_q) - 1
    indices = torch.empty(total_q, num_kv_heads, block_counts, dtype=torch.int32, device=q.device)
    max_blocks = triton.cdiv(triton_tiles.longest(lengths.offsets_k), block_size)
    config = choice_config(q.dtype, num_heads // num_kv_heads, head_dim, max_blocks, block_counts)
    num_tiles = triton.cdiv(triton_tiles.longest(lengths.offsets_q), config["TOKENS"])
    programs = min(_num_programs(q.device), num_tiles * batch * num_kv_heads)
    if programs:
        scratch_shape = programs * config["TOKENS"], config["NUM_BLOCKS_PAD"]
        _choose_blocks_kernel[(programs,)](
            q_ptr=q,
            k_cmp_ptr=k_cmp,
            lse_ptr=lse,
            indices_ptr=indices,
            scratch_ptr=torch.empty(scratch_shape, dtype=torch.float32, device=q.device),
            cu_seqlens_q_ptr=lengths.cu_seqlens_q,
            cu_seqlens_k_ptr=lengths.cu_seqlens_k,
            **triton_tiles.strides(q=q),
            num_tiles=num_tiles,
            batch=batch,
            num_kv_heads=num_kv_heads,
            block_counts=block_counts,
            softmax_scale=softmax_scale,
            BLOCK_SIZE=block_size,
            **config,
        )
    return indices
