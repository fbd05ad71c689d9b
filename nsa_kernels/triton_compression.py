"""Compression branch and the choice of blocks (Triton backend).

    k~_j = mean of k[jB : (j+1)B], v~_j likewise;  token t sees block j iff (j+1)B <= t+1
    p[h,t,j] = softmax_j(scale * q[t,h] . k~_j);   o[t,h] = sum_j p[h,t,j] v~_j
    I[t,g,j] = sum over the query heads h of group g of p[h,t,j],  j < t // B;  the block t // B is always chosen

Native Sparse Attention (arXiv:2502.11089), equations 7 to 12, with mean pooling. In attention, each program takes
tokens of one query head, so that a group of any size needs no padding.

The pooled rows of the sequence whose keys start at row c are kept at row c // B: sequences cannot overlap there, and
nothing has to be counted on the device or waited for.

The choice recomputes the scores of all heads of a group with the final lse, sums them into importance, and ranks it
with a bisection on its bits. Importance goes to a scratch row per token of a tile; the scratch belongs to the program,
not to the tile, and programs walk many tiles, so that it never leaves the L2 cache. It is a kernel of its own because
attention then needs no padding of the group, because it leaves registers for two programs of the choice per
multiprocessor, one ranking while the other multiplies, and because short sequences need no choice at all; it costs one
more read of q.
"""

import torch
from torch import Tensor

from . import triton_tiles, utils

tl, triton = triton_tiles.tl, triton_tiles.triton

# Programs that the dk, dv kernel aims for: it splits the queries until there are so many.
_DKV_PROGRAMS, _DKV_MAX_SPLITS = 1024, 32

# Rows of a tile in block choice, tokens x heads of a group, and the most tokens in it: each has a row in the scratch.
_TILE_ROWS, _TILE_TOKENS = 128, 64
# Scores that a program ranks at a time: they stay in registers during the bisection.
_CHOICE_ELEMENTS = 8192
# Programs of block choice per multiprocessor, and in the interpreter, where a few make tiles share a scratch.
_PROGRAMS_PER_SM, _PROGRAMS_INTERPRETED = 2, 3

# The key of a token's own block in the ranking, above that of any number.
_OWN = tl.constexpr(0x7FFFFFFF)


@triton.jit
def _mean_pool_kernel(
    k_ptr,
    v_ptr,
    k_cmp_ptr,
    v_cmp_ptr,
    cu_seqlens_k_ptr,
    stride_kt,
    stride_kh,
    stride_vt,
    stride_vh,
    num_kv_heads,
    HEAD_DIM: tl.constexpr,
    HEAD_PAD: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCK_PAD: tl.constexpr,
):
    """Means of one block of keys and of values. Grid: (most blocks of a sequence, num_kv_heads, batch)."""
    block, head, sequence = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    start = tl.load(cu_seqlens_k_ptr + sequence)
    num_keys = tl.load(cu_seqlens_k_ptr + sequence + 1) - start
    if (block + 1) * BLOCK_SIZE <= num_keys:
        offs_n = tl.arange(0, BLOCK_PAD)
        offs_d = tl.arange(0, HEAD_PAD)
        mask_d = offs_d < HEAD_DIM
        mask = (offs_n < BLOCK_SIZE)[:, None] & mask_d[None, :]
        rows = (start + block * BLOCK_SIZE + offs_n).to(tl.int64)
        row_cmp = (start // BLOCK_SIZE + block).to(tl.int64) * num_kv_heads + head
        # [BLOCK_PAD, HEAD_PAD]
        k = tl.load(k_ptr + rows[:, None] * stride_kt + head * stride_kh + offs_d[None, :], mask=mask, other=0.0)
        v = tl.load(v_ptr + rows[:, None] * stride_vt + head * stride_vh + offs_d[None, :], mask=mask, other=0.0)
        k_cmp = tl.sum(k.to(tl.float32), 0) / BLOCK_SIZE
        v_cmp = tl.sum(v.to(tl.float32), 0) / BLOCK_SIZE
        tl.store(k_cmp_ptr + row_cmp * HEAD_DIM + offs_d, k_cmp.to(k_cmp_ptr.dtype.element_ty), mask=mask_d)
        tl.store(v_cmp_ptr + row_cmp * HEAD_DIM + offs_d, v_cmp.to(v_cmp_ptr.dtype.element_ty), mask=mask_d)


@triton.jit
def _compression_fwd_kernel(
    q_ptr,
    k_cmp_ptr,
    v_cmp_ptr,
    o_ptr,
    lse_ptr,
    cu_seqlens_q_ptr,
    cu_seqlens_k_ptr,
    stride_qt,
    stride_qh,
    num_heads,
    num_kv_heads,
    softmax_scale,
    HEAD_DIM: tl.constexpr,
    HEAD_PAD: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
):
    """o and lse of ROWS tokens of one query head. Grid: (tiles, num_heads, batch), the last tiles first."""
    head, sequence = tl.program_id(1), tl.program_id(2)
    tile_start = (tl.num_programs(0) - 1 - tl.program_id(0)) * ROWS
    start_q, start_k, num_queries, num_keys = triton_tiles.sequence_bounds(cu_seqlens_q_ptr, cu_seqlens_k_ptr, sequence)
    num_tokens = tl.minimum(num_queries - tile_start, ROWS)
    if num_tokens > 0:
        first = num_keys - num_queries + tile_start
        offs_t = tl.arange(0, ROWS)
        mask_t = offs_t < num_tokens
        token = (start_q + tile_start + offs_t).to(tl.int64)
        # [ROWS, HEAD_PAD]
        q = triton_tiles.load_tile(q_ptr, token * stride_qt + head * stride_qh, mask_t, HEAD_DIM, HEAD_PAD)
        last = (first + offs_t + 1) // BLOCK_SIZE - 1
        seen_by_all = (first + 1) // BLOCK_SIZE
        seen_by_any = (first + num_tokens) // BLOCK_SIZE
        scale_log2 = softmax_scale * triton_tiles.LOG2_E
        kv_head = head // (num_heads // num_kv_heads)
        row_cmp = (start_k // BLOCK_SIZE).to(tl.int64) * num_kv_heads + kv_head
        row_max, row_sum, acc = triton_tiles.softmax_start(ROWS, HEAD_PAD)
        for block in range(0, seen_by_any, KEYS):
            offs_j = block + tl.arange(0, KEYS)
            offs_row = tl.minimum(offs_j, seen_by_any - 1).to(tl.int64) * num_kv_heads
            offs_kv = (row_cmp + offs_row) * HEAD_DIM
            # [KEYS, HEAD_PAD]
            k = triton_tiles.load_tile(k_cmp_ptr, offs_kv, None, HEAD_DIM, HEAD_PAD)
            v = triton_tiles.load_tile(v_cmp_ptr, offs_kv, None, HEAD_DIM, HEAD_PAD)
            score = triton_tiles.masked_score(q, k, block + KEYS > seen_by_all, offs_j, last)
            row_max, row_sum, acc = triton_tiles.softmax_step(score, scale_log2, row_max, row_sum, acc, v, mask_t)
        o, lse = triton_tiles.softmax_result(row_max, row_sum, acc)
        row = token * num_heads + head
        triton_tiles.store_tile(o_ptr, row * HEAD_DIM, mask_t, o, HEAD_DIM, HEAD_PAD)
        tl.store(lse_ptr + row, lse, mask=mask_t)


@triton.jit
def _compression_bwd_dq_kernel(
    q_ptr,
    k_cmp_ptr,
    v_cmp_ptr,
    do_ptr,
    lse_delta_ptr,
    dq_ptr,
    cu_seqlens_q_ptr,
    cu_seqlens_k_ptr,
    stride_qt,
    stride_qh,
    stride_dot,
    stride_doh,
    num_heads,
    num_kv_heads,
    softmax_scale,
    HEAD_DIM: tl.constexpr,
    HEAD_PAD: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
):
    """dq of ROWS tokens of one query head, over the blocks they see. Grid: (tiles, num_heads, batch), last first."""
    head, sequence = tl.program_id(1), tl.program_id(2)
    tile_start = (tl.num_programs(0) - 1 - tl.program_id(0)) * ROWS
    start_q, start_k, num_queries, num_keys = triton_tiles.sequence_bounds(cu_seqlens_q_ptr, cu_seqlens_k_ptr, sequence)
    num_tokens = tl.minimum(num_queries - tile_start, ROWS)
    if num_tokens > 0:
        first = num_keys - num_queries + tile_start
        offs_t = tl.arange(0, ROWS)
        mask_t = offs_t < num_tokens
        token = (start_q + tile_start + offs_t).to(tl.int64)
        row = token * num_heads + head
        # [ROWS, HEAD_PAD]
        q = triton_tiles.load_tile(q_ptr, token * stride_qt + head * stride_qh, mask_t, HEAD_DIM, HEAD_PAD)
        do = triton_tiles.load_tile(do_ptr, token * stride_dot + head * stride_doh, mask_t, HEAD_DIM, HEAD_PAD)
        lse_log2, delta = triton_tiles.load_lse_delta(lse_delta_ptr, row, mask_t)
        last = (first + offs_t + 1) // BLOCK_SIZE - 1
        seen_by_all = (first + 1) // BLOCK_SIZE
        seen_by_any = (first + num_tokens) // BLOCK_SIZE
        scale_log2 = softmax_scale * triton_tiles.LOG2_E
        kv_head = head // (num_heads // num_kv_heads)
        row_cmp = (start_k // BLOCK_SIZE).to(tl.int64) * num_kv_heads + kv_head
        dq = tl.zeros([ROWS, HEAD_PAD], tl.float32)
        for block in range(0, seen_by_any, KEYS):
            offs_j = block + tl.arange(0, KEYS)
            offs_row = tl.minimum(offs_j, seen_by_any - 1).to(tl.int64) * num_kv_heads
            offs_kv = (row_cmp + offs_row) * HEAD_DIM
            # [KEYS, HEAD_PAD]
            k = triton_tiles.load_tile(k_cmp_ptr, offs_kv, None, HEAD_DIM, HEAD_PAD)
            v = triton_tiles.load_tile(v_cmp_ptr, offs_kv, None, HEAD_DIM, HEAD_PAD)
            # Rows that see nothing have lse -inf, but no column here either.
            hides = block + KEYS > seen_by_all
            dq = triton_tiles.dq_step(q, k, v, do, lse_log2, delta, dq, scale_log2, hides, offs_j, last)
        triton_tiles.store_tile(dq_ptr, row * HEAD_DIM, mask_t, dq * softmax_scale, HEAD_DIM, HEAD_PAD)


@triton.jit(do_not_specialize=["batch"])
def _compression_bwd_dkv_kernel(
    q_ptr,
    k_cmp_ptr,
    v_cmp_ptr,
    do_ptr,
    lse_delta_ptr,
    dk_part_ptr,
    dv_part_ptr,
    cu_seqlens_q_ptr,
    cu_seqlens_k_ptr,
    stride_qt,
    stride_qh,
    stride_dot,
    stride_doh,
    stride_split,
    batch,
    num_kv_heads,
    softmax_scale,
    GROUP_SIZE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HEAD_PAD: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
):
    """Partial sums of dk_cmp and dv_cmp of KEYS blocks. Grid: (tiles, splits, num_kv_heads * batch).

    The (token tile, query head) pairs that see the blocks are dealt out to the splits in turn, so that each has its
    share of late tokens; the first block tiles, which most tokens see, start first. Rows of a pair are tokens of one
    head: any group size fills the tile.
    """
    tile, split = tl.program_id(0), tl.program_id(1)
    kv_head, sequence = tl.program_id(2) // batch, tl.program_id(2) % batch
    start_q, start_k, num_queries, num_keys = triton_tiles.sequence_bounds(cu_seqlens_q_ptr, cu_seqlens_k_ptr, sequence)
    num_blocks = num_keys // BLOCK_SIZE
    if tile * KEYS < num_blocks:
        first = num_keys - num_queries
        num_heads = num_kv_heads * GROUP_SIZE
        offs_j = tile * KEYS + tl.arange(0, KEYS)
        mask_j = offs_j < num_blocks
        offs_kv = ((start_k // BLOCK_SIZE + offs_j).to(tl.int64) * num_kv_heads + kv_head) * HEAD_DIM
        # [KEYS, HEAD_PAD]
        k = triton_tiles.load_tile(k_cmp_ptr, offs_kv, mask_j, HEAD_DIM, HEAD_PAD)
        v = triton_tiles.load_tile(v_cmp_ptr, offs_kv, mask_j, HEAD_DIM, HEAD_PAD)
        q_base = q_ptr + start_q.to(tl.int64) * stride_qt + kv_head * GROUP_SIZE * stride_qh
        do_base = do_ptr + start_q.to(tl.int64) * stride_dot + kv_head * GROUP_SIZE * stride_doh
        lse_delta_base = lse_delta_ptr + 2 * (start_q.to(tl.int64) * num_heads + kv_head * GROUP_SIZE)
        scale_log2 = softmax_scale * triton_tiles.LOG2_E
        dk = tl.zeros([KEYS, HEAD_PAD], tl.float32)
        dv = tl.zeros([KEYS, HEAD_PAD], tl.float32)
        # The first query that sees the first of the blocks, and the first that sees all of them.
        first_tile = tl.maximum((tile * KEYS + 1) * BLOCK_SIZE - 1 - first, 0) // ROWS
        sees_all = (tile + 1) * KEYS * BLOCK_SIZE - 1 - first
        num_pairs = (tl.cdiv(num_queries, ROWS) - first_tile) * GROUP_SIZE
        for pair in range(split, num_pairs, tl.num_programs(1)):
            start = (first_tile + pair // GROUP_SIZE) * ROWS
            query = start + tl.arange(0, ROWS)
            head = pair % GROUP_SIZE
            mask_t = query < num_queries
            # All rows of a tile have one head: the tile's offset is a scalar, and rows add less than 2**31 to it.
            row = tl.minimum(tl.arange(0, ROWS), num_queries - 1 - start)
            q_tile = q_base + (start.to(tl.int64) * stride_qt + head * stride_qh)
            do_tile = do_base + (start.to(tl.int64) * stride_dot + head * stride_doh)
            # [ROWS, HEAD_PAD]
            q = triton_tiles.load_tile(q_tile, row * stride_qt, None, HEAD_DIM, HEAD_PAD)
            do = triton_tiles.load_tile(do_tile, row * stride_dot, None, HEAD_DIM, HEAD_PAD)
            # Not `load_lse_delta`: with both numbers of a row in registers from here on, some would be spilled.
            lse_delta = lse_delta_base + 2 * (start.to(tl.int64) * num_heads + head)
            lse_log2 = tl.load(lse_delta + 2 * row * num_heads, mask=mask_t, other=float("inf")) * triton_tiles.LOG2_E
            delta = tl.load(lse_delta + 2 * row * num_heads + 1, mask=mask_t, other=0.0)
            last = (first + query + 1) // BLOCK_SIZE - 1
            dk, dv = triton_tiles.dkv_step(
                q, k, v, do, lse_log2, delta, dk, dv, scale_log2, start < sees_all, offs_j, last
            )
        offs_part = split.to(tl.int64) * stride_split + offs_kv
        triton_tiles.store_tile(dk_part_ptr, offs_part, mask_j, dk * softmax_scale, HEAD_DIM, HEAD_PAD)
        triton_tiles.store_tile(dv_part_ptr, offs_part, mask_j, dv, HEAD_DIM, HEAD_PAD)


@triton.jit(do_not_specialize=["num_splits"])
def _mean_unpool_kernel(
    dk_part_ptr,
    dv_part_ptr,
    dk_ptr,
    dv_ptr,
    cu_seqlens_k_ptr,
    stride_split,
    num_splits,
    num_kv_heads,
    HEAD_DIM: tl.constexpr,
    HEAD_PAD: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCK_PAD: tl.constexpr,
):
    """dk and dv of one block of tokens: the sum of its partial sums over BLOCK_SIZE; 0 in an incomplete block.

    Grid: (most blocks of a sequence, incomplete ones included, num_kv_heads, batch).
    """
    block, head, sequence = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    start = tl.load(cu_seqlens_k_ptr + sequence)
    num_keys = tl.load(cu_seqlens_k_ptr + sequence + 1) - start
    if block * BLOCK_SIZE < num_keys:
        offs_n = tl.arange(0, BLOCK_PAD)
        offs_d = tl.arange(0, HEAD_PAD)
        mask_d = offs_d < HEAD_DIM
        dk = tl.zeros([HEAD_PAD], tl.float32)
        dv = tl.zeros([HEAD_PAD], tl.float32)
        if (block + 1) * BLOCK_SIZE <= num_keys:
            row_cmp = (start // BLOCK_SIZE + block).to(tl.int64) * num_kv_heads + head
            offs = row_cmp * HEAD_DIM + offs_d
            for _ in range(num_splits):
                dk += tl.load(dk_part_ptr + offs, mask=mask_d, other=0.0)
                dv += tl.load(dv_part_ptr + offs, mask=mask_d, other=0.0)
                offs += stride_split
        inside = (offs_n < BLOCK_SIZE) & (block * BLOCK_SIZE + offs_n < num_keys)
        mask = inside[:, None] & mask_d[None, :]
        rows = (start + block * BLOCK_SIZE + offs_n).to(tl.int64) * num_kv_heads + head
        # [BLOCK_PAD, HEAD_PAD]
        offs = rows[:, None] * HEAD_DIM + offs_d[None, :]
        tl.store(dk_ptr + offs, tl.broadcast_to((dk / BLOCK_SIZE)[None, :], [BLOCK_PAD, HEAD_PAD]), mask=mask)
        tl.store(dv_ptr + offs, tl.broadcast_to((dv / BLOCK_SIZE)[None, :], [BLOCK_PAD, HEAD_PAD]), mask=mask)


@triton.jit
def _keys(row_scores, column, own):
    """Scores as integers that rank like them: the bits before column own, the highest there, -1 after it.

    What is not a number ranks as 0: every token gets its blocks, whatever is in q.
    """
    score = tl.load(row_scores + column, mask=column < own, other=0.0)
    bits = tl.where(score >= 0.0, score.to(tl.int32, bitcast=True), 0)
    return tl.where(column < own, bits, tl.where(column == own, _OWN, -1))


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
    COLUMNS: tl.constexpr,
    ELEMENTS: tl.constexpr,
    LANES: tl.constexpr,
    COUNTS_PAD: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
):
    """The block_counts best blocks of TOKENS tokens, ELEMENTS // COLUMNS at a time, from COLUMNS scores of each.

    The bits of non-negative floats order as the floats do. Bisection between the least and the largest of them finds
    the largest threshold that block_counts scores reach, and stops when exactly so many do; equal scores at the
    threshold are taken from the left. The token's own block has the highest key, blocks after it the lowest. No sort,
    no atomics, ascending output.

    The keys are a tuple of [rows, LANES]. With 128 lanes and a row or more per warp, a row of each lies in one warp:
    counting it takes shuffles, but neither shared memory nor barriers.
    """
    ROWS: tl.constexpr = max(1, min(TOKENS, ELEMENTS // COLUMNS))
    offs_j = tl.arange(0, LANES)[None, :]
    offs_n = tl.arange(0, COUNTS_PAD)[None, :]
    for row in tl.range(0, TOKENS, ROWS, disable_licm=True):
        offs_t = row + tl.arange(0, ROWS)
        mask_t = offs_t < num_tokens
        own = (first + offs_t) // BLOCK_SIZE
        row_scores = (scratch_ptr + offs_t * stride_scratch)[:, None]
        keys = ()
        least = tl.full([ROWS, LANES], _OWN, tl.int32)
        largest = tl.full([ROWS, LANES], -1, tl.int32)
        for i in tl.static_range(COLUMNS // LANES):
            key = _keys(row_scores, i * LANES + offs_j, own[:, None])
            least = tl.minimum(least, tl.where(key < 0, _OWN, key))
            largest = tl.maximum(largest, tl.where(key == _OWN, -1, key))
            keys += (key,)
        # One more than the largest: with block_counts = 1, the own block alone reaches the threshold.
        high = tl.max(largest, 1) + 1
        threshold = tl.minimum(tl.min(least, 1), high)
        reached = tl.where(mask_t, own + 1, 0)
        while tl.max(tl.where(reached > block_counts, high - threshold, 0), 0) > 0:
            # Whether to go on is decided by all warps together, once per four steps. Others change nothing.
            for _ in range(4):
                candidate = threshold + ((high - threshold + 1) >> 1)
                counts = tl.zeros([ROWS, LANES], tl.int32)
                for i in tl.static_range(COLUMNS // LANES):
                    counts += (keys[i] >= candidate[:, None]).to(tl.int32)
                count = tl.sum(counts, 1)
                enough = count >= block_counts
                threshold = tl.where(enough, candidate, threshold)
                reached = tl.where(enough, count, reached)
                high = tl.where(enough, high, candidate - 1)
        counts = tl.zeros([ROWS, LANES], tl.int32)
        for i in tl.static_range(COLUMNS // LANES):
            counts += (keys[i] > threshold[:, None]).to(tl.int32)
        num_equal = block_counts - tl.sum(counts, 1)

        # The keys are read again, a few at a time, so that they and their running counts are not all held at once.
        row_indices = (indices_ptr + offs_t.to(tl.int64) * stride_it)[:, None]
        found_larger = tl.zeros([ROWS], tl.int32)
        found_equal = tl.zeros([ROWS], tl.int32)
        for start in range(0, num_columns + 1, LANES):
            column = start + offs_j
            key = _keys(row_scores, column, own[:, None])
            larger = (key > threshold[:, None]).to(tl.int32)
            equal = (key == threshold[:, None]).to(tl.int32)
            # Both counts fit into one integer: there are at most LANES of each.
            both = (larger << 16) + equal
            running = tl.cumsum(both, 1)
            rank_larger = found_larger[:, None] + (running >> 16)
            rank_equal = found_equal[:, None] + (running & 0xFFFF)
            allowed = num_equal[:, None]
            chosen = (larger > 0) | ((equal > 0) & (rank_equal <= allowed))
            place = rank_larger + tl.minimum(rank_equal, allowed) - 1
            value = tl.broadcast_to(column, [ROWS, LANES])
            tl.store(row_indices + place, value, mask=chosen & mask_t[:, None])
            found = tl.sum(both, 1)
            found_larger += found >> 16
            found_equal += found & 0xFFFF
        absent = (offs_n > own[:, None]) & (offs_n < block_counts) & mask_t[:, None]
        tl.store(row_indices + offs_n, tl.full([ROWS, COUNTS_PAD], -1, tl.int32), mask=absent)


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
    ELEMENTS: tl.constexpr,
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
                lse_log2 = lse * triton_tiles.LOG2_E
                scale_log2 = softmax_scale * triton_tiles.LOG2_E
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
                QUARTER: tl.constexpr = NUM_BLOCKS_PAD // 4
                if num_columns < QUARTER:
                    _choose_rows(
                        scratch_ptr, tile_indices_ptr, NUM_BLOCKS_PAD, stride_it, first, num_tokens, num_columns,
                        block_counts, TOKENS, QUARTER, ELEMENTS, LANES, COUNTS_PAD, BLOCK_SIZE,
                    )  # fmt: skip
                elif num_columns < 2 * QUARTER:
                    _choose_rows(
                        scratch_ptr, tile_indices_ptr, NUM_BLOCKS_PAD, stride_it, first, num_tokens, num_columns,
                        block_counts, TOKENS, 2 * QUARTER, ELEMENTS, LANES, COUNTS_PAD, BLOCK_SIZE,
                    )  # fmt: skip
                else:
                    _choose_rows(
                        scratch_ptr, tile_indices_ptr, NUM_BLOCKS_PAD, stride_it, first, num_tokens, num_columns,
                        block_counts, TOKENS, NUM_BLOCKS_PAD, ELEMENTS, LANES, COUNTS_PAD, BLOCK_SIZE,
                    )  # fmt: skip
                tl.debug_barrier()


def backward_config(q: Tensor) -> tuple[dict, dict]:
    """Constexprs and launch options of the dq kernel and of the dk, dv kernel."""
    dkv = triton_tiles.dkv_extents(q, num_stages=2)
    if triton_tiles.is_small(q.device) and not triton_tiles.is_wide(q.dtype):
        # Without Hopper's MMA, warps divide the columns as well: eight keep the accumulators of a larger tile.
        dkv |= {"ROWS": 64, "num_warps": 8}
    return triton_tiles.walk_extents(q, num_stages=2), dkv


def choice_config(dtype: torch.dtype, group_size: int, head_dim: int, max_blocks: int, block_counts: int) -> dict:
    """Constexprs and launch options of the kernel that chooses blocks.

    Args:
        max_blocks: blocks of the longest sequence's keys, an incomplete one included.
    """
    wide = triton_tiles.is_wide(dtype)
    heads = triton_tiles.next_power_of_2(group_size)
    tokens = max(16 // heads, min(_TILE_TOKENS, (_TILE_ROWS // 4 if wide else _TILE_ROWS) // heads), 1)
    columns = max(64, triton_tiles.next_power_of_2(max_blocks))
    return {
        "GROUP_SIZE": group_size,
        "GROUP_PAD": heads,
        "TOKENS": tokens,
        "HEAD_DIM": head_dim,
        "HEAD_PAD": triton_tiles.pad(head_dim),
        "BLOCKS": 16 if wide else 64,
        "NUM_BLOCKS_PAD": columns,
        "ELEMENTS": _CHOICE_ELEMENTS,
        "LANES": min(128, columns // 4),
        "COUNTS_PAD": triton_tiles.next_power_of_2(block_counts),
        "num_warps": 8 if wide else 4,
        "num_stages": 1 if wide else 2,
    }


def _pool(k: Tensor, v: Tensor, lengths: utils.SequenceLengths, block_size: int) -> tuple[Tensor, Tensor]:
    """Means of the complete blocks, (total_k // block_size, num_kv_heads, head_dim), in the dtype of k.

    Rows between two sequences' blocks are left unwritten, and are never read.
    """
    _, num_kv_heads, head_dim = k.shape
    pooled = [x.new_empty(x.shape[0] // block_size, num_kv_heads, head_dim) for x in (k, v)]
    triton_tiles.launch(
        _mean_pool_kernel,
        (triton_tiles.longest(lengths.offsets_k) // block_size, num_kv_heads, len(lengths.offsets_k) - 1),
        k_ptr=k,
        v_ptr=v,
        k_cmp_ptr=pooled[0],
        v_cmp_ptr=pooled[1],
        cu_seqlens_k_ptr=lengths.cu_seqlens_k,
        **triton_tiles.strides(k=k, v=v),
        num_kv_heads=num_kv_heads,
        HEAD_DIM=head_dim,
        HEAD_PAD=triton_tiles.pad(head_dim),
        BLOCK_SIZE=block_size,
        BLOCK_PAD=triton_tiles.next_power_of_2(block_size),
        num_warps=4,
    )
    return pooled[0], pooled[1]


def _attend(q, k_cmp, v_cmp, lengths, block_size, softmax_scale):
    total_q, num_heads, _ = q.shape
    q, softmax_scale = utils.positive_scale(q, softmax_scale)
    o = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    lse = torch.empty(total_q, num_heads, dtype=torch.float32, device=q.device)
    config = triton_tiles.walk_extents(q)
    num_tiles = triton_tiles.cdiv(triton_tiles.longest(lengths.offsets_q), config["ROWS"])
    triton_tiles.launch(
        _compression_fwd_kernel,
        (num_tiles, num_heads, len(lengths.offsets_q) - 1),
        q_ptr=q,
        k_cmp_ptr=k_cmp,
        v_cmp_ptr=v_cmp,
        o_ptr=o,
        lse_ptr=lse,
        cu_seqlens_q_ptr=lengths.cu_seqlens_q,
        cu_seqlens_k_ptr=lengths.cu_seqlens_k,
        **triton_tiles.strides(q=q),
        num_heads=num_heads,
        num_kv_heads=k_cmp.shape[1],
        softmax_scale=softmax_scale,
        BLOCK_SIZE=block_size,
        **config,
    )
    return o, lse


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
        k_cmp: the pooled keys.
        lse: (total_q, num_heads), fp32, of the compression branch.
    """
    total_q, num_heads, head_dim = q.shape
    num_kv_heads, batch = k_cmp.shape[1], len(lengths.offsets_q) - 1
    indices = torch.empty(total_q, num_kv_heads, block_counts, dtype=torch.int32, device=q.device)
    max_blocks = triton_tiles.cdiv(triton_tiles.longest(lengths.offsets_k), block_size)
    config = choice_config(q.dtype, num_heads // num_kv_heads, head_dim, max_blocks, block_counts)
    num_tiles = triton_tiles.cdiv(triton_tiles.longest(lengths.offsets_q), config["TOKENS"])
    programs = min(_num_programs(q.device), num_tiles * batch * num_kv_heads)
    scratch_shape = programs * config["TOKENS"], config["NUM_BLOCKS_PAD"]
    triton_tiles.launch(
        _choose_blocks_kernel,
        (programs,),
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


def compress(
    q: Tensor, k: Tensor, v: Tensor, lengths: utils.SequenceLengths, block_size: int, softmax_scale: float
) -> tuple[Tensor, Tensor]:
    """The compression branch alone: o and lse of `compress_and_choose`."""
    return _attend(q, *_pool(k, v, lengths, block_size), lengths, block_size, softmax_scale)


def compress_and_choose(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lengths: utils.SequenceLengths,
    block_size: int,
    block_counts: int,
    softmax_scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """The compression branch, and the blocks that every token and key/value head selects.

    Args:
        q: (total_q, num_heads, head_dim), fp16, bf16 or fp32, contiguous in its last dimension, like k and v.
        k, v: (total_k, num_kv_heads, head_dim), like q.
    Returns:
        o: like q; 0 where no block is visible.
        lse: (total_q, num_heads), fp32, natural log; -inf where no block is visible.
        block_indices: (total_q, num_kv_heads, block_counts), int32, ascending, -1 at the end.
    """
    k_cmp, v_cmp = _pool(k, v, lengths, block_size)
    o, lse = _attend(q, k_cmp, v_cmp, lengths, block_size, softmax_scale)
    return o, lse, choose(q, k_cmp, lse, lengths, block_size, block_counts, softmax_scale)


def num_splits(total_blocks: int, num_kv_heads: int, max_queries: int, blocks: int = 64) -> int:
    """Into how many partial sums the dk, dv kernel splits the queries.

    Splits times blocks is bounded, so the partial sums take memory linear in the tokens. Depends on shapes alone: the
    same inputs are summed in the same order on any device.
    """
    tiles = max(1, triton_tiles.cdiv(total_blocks, blocks)) * num_kv_heads
    return max(1, min(_DKV_MAX_SPLITS, _DKV_PROGRAMS // tiles, triton_tiles.cdiv(max_queries, 128)))


def compression_bwd(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lse_delta: Tensor,
    do: Tensor,
    lengths: utils.SequenceLengths,
    block_size: int,
    softmax_scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of the compression branch, through the means.

    Args:
        lse_delta: (total_q, num_heads, 2), fp32, as of `triton_tiles.lse_and_delta`.
        do: like q, contiguous in its last dimension.
    Returns:
        dq: like q; dk, dv: (total_k, num_kv_heads, head_dim), fp32.
    """
    num_heads, num_kv_heads, head_dim = q.shape[1], k.shape[1], q.shape[2]
    dq = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    dk, dv = (torch.empty(x.shape, dtype=torch.float32, device=x.device) for x in (k, v))
    k_cmp, v_cmp = _pool(k, v, lengths, block_size)
    batch = len(lengths.offsets_q) - 1
    max_q, max_k = triton_tiles.longest(lengths.offsets_q), triton_tiles.longest(lengths.offsets_k)
    dq_config, dkv_config = backward_config(q)
    shared = {
        "q_ptr": q,
        "k_cmp_ptr": k_cmp,
        "v_cmp_ptr": v_cmp,
        "do_ptr": do,
        "cu_seqlens_q_ptr": lengths.cu_seqlens_q,
        "cu_seqlens_k_ptr": lengths.cu_seqlens_k,
        **triton_tiles.strides(q=q, do=do),
        "num_kv_heads": num_kv_heads,
        "softmax_scale": softmax_scale,
        "BLOCK_SIZE": block_size,
    }
    triton_tiles.launch(
        _compression_bwd_dq_kernel,
        (triton_tiles.cdiv(max_q, dq_config["ROWS"]), num_heads, batch),
        dq_ptr=dq,
        lse_delta_ptr=triton_tiles.pairs(lse_delta),
        num_heads=num_heads,
        **shared,
        **dq_config,
    )
    splits = num_splits(k_cmp.shape[0], num_kv_heads, max_q, dkv_config["KEYS"])
    dk_part, dv_part = (x.new_empty(splits, *x.shape, dtype=torch.float32) for x in (k_cmp, v_cmp))
    triton_tiles.launch(
        _compression_bwd_dkv_kernel,
        (triton_tiles.cdiv(max_k // block_size, dkv_config["KEYS"]), splits, num_kv_heads * batch),
        dk_part_ptr=dk_part,
        dv_part_ptr=dv_part,
        lse_delta_ptr=lse_delta.contiguous(),
        stride_split=dk_part.stride(0),
        batch=batch,
        GROUP_SIZE=num_heads // num_kv_heads,
        **shared,
        **dkv_config,
    )
    triton_tiles.launch(
        _mean_unpool_kernel,
        (triton_tiles.cdiv(max_k, block_size), num_kv_heads, batch),
        dk_part_ptr=dk_part,
        dv_part_ptr=dv_part,
        dk_ptr=dk,
        dv_ptr=dv,
        cu_seqlens_k_ptr=lengths.cu_seqlens_k,
        stride_split=dk_part.stride(0),
        num_splits=splits,
        num_kv_heads=num_kv_heads,
        HEAD_DIM=head_dim,
        HEAD_PAD=triton_tiles.pad(head_dim),
        BLOCK_SIZE=block_size,
        BLOCK_PAD=triton_tiles.next_power_of_2(block_size),
        num_warps=4,
    )
    return dq, dk, dv
