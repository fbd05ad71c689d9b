"""Selection branch: causal attention over the tokens of the selected key blocks (Triton backend).

    o[t,h] = softmax attention of q[t,h] over { s <= t : s // B in block_indices[t, h // R] }

Native Sparse Attention (arXiv:2502.11089), equations 11 and 12.

Reading 2 * B rows of k and v for every (token, block) pair is bound by the L2 cache. Neighbouring tokens choose nearly
the same blocks, so a tile of up to 32 tokens times the heads of a group walks the union of their blocks, each block
once; a bit per token says which rows take part. Forward pass and dq work this way. The union may be any size: a tile
whose tokens agree on nothing costs what its pairs cost one by one. Where dq is wanted of the whole attention, the same
program then walks the window (triton_rows.py), as `takes_window` says.

dk and dv turn the lists around: every block gets its tokens in order, by counting, from the same unions. Runs of at
most so many pairs, times the heads of a group, fill tiles of rows without padding; a popular block has many runs. Each
run leaves one partial sum in float32, and the runs of a block are added in order. There are no atomics, nothing is
counted on the host, and memory is linear: the partial sums take about twice the rows of the blocks themselves.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from . import triton_rows, triton_tiles, utils

tl, triton = triton_tiles.tl, triton_tiles.triton

# What comes after every block, and what every number of a missing block becomes: the largest integer, and its bits.
_NO_BLOCK = tl.constexpr(0x7FFFFFFF)

# A tile's membership of a block is one int32.
_MAX_TILE_TOKENS = 32
# Programs that count and place the pairs of a key/value head: each walks its tiles one after the other.
_MAX_CHUNKS = 256
# Entries of a tile's union that they take at a time.
_ENTRIES = 32


@triton.jit
def _union_kernel(
    block_indices_ptr,
    sorted_ptr,
    union_ptr,
    members_ptr,
    counts_ptr,
    cu_seqlens_q_ptr,
    cu_seqlens_k_ptr,
    num_kv_heads,
    block_counts,
    TOKENS: tl.constexpr,
    TOKENS_PAD: tl.constexpr,
    COUNTS_PAD: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
):
    """The union of the blocks of TOKENS tokens, ascending. Grid: (most tiles of a sequence, num_kv_heads, batch).

    Writes, per tile and key/value head, the blocks (union), which tokens selected each (members, a bit per token), and
    two counts: blocks, and those of them that lie wholly before every token of the tile. The list of a tile starts
    where the tile's own pairs start: it cannot be longer than they are. Each token's blocks are merged in ascending
    order, a step takes the smallest next block of all tokens. The choice of blocks emits them like that; with a
    sorted_ptr, like block_indices, they may be in any order, and are sorted into it first.
    """
    tile, kv_head, sequence = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    start_q, _, num_queries, num_keys = triton_tiles.sequence_bounds(cu_seqlens_q_ptr, cu_seqlens_k_ptr, sequence)
    num_tokens = tl.minimum(num_queries - tile * TOKENS, TOKENS)
    if num_tokens > 0:
        first = num_keys - num_queries + tile * TOKENS
        token = (start_q + tile * TOKENS).to(tl.int64)
        offs_t = tl.arange(0, TOKENS_PAD)
        rows = ((token + offs_t) * num_kv_heads + kv_head) * block_counts
        mask_t = offs_t < num_tokens
        list_ptr = block_indices_ptr
        if sorted_ptr is not None:
            offs_n = tl.arange(0, COUNTS_PAD)
            mask = mask_t[:, None] & (offs_n < block_counts)[None, :]
            # [TOKENS_PAD, COUNTS_PAD]
            block = tl.load(block_indices_ptr + rows[:, None] + offs_n[None, :], mask=mask, other=-1).to(tl.int32)
            own = (first + offs_t) // BLOCK_SIZE
            block = tl.sort(tl.where((block >= 0) & (block <= own[:, None]), block, _NO_BLOCK), 1)
            tl.store(sorted_ptr + rows[:, None] + offs_n[None, :], block, mask=mask)
            tl.debug_barrier()
            list_ptr = sorted_ptr

        start = (token * num_kv_heads + kv_head * num_tokens) * block_counts
        count = 0
        num_past = 0
        place = tl.zeros([TOKENS_PAD], tl.int32)
        # [TOKENS_PAD]; missing ones, -1, become _NO_BLOCK
        block = tl.load(list_ptr + rows, mask=mask_t, other=_NO_BLOCK) & _NO_BLOCK
        smallest = tl.min(block, 0)
        while smallest != _NO_BLOCK:
            selects = block == smallest
            tl.store(union_ptr + start + count, smallest)
            tl.store(members_ptr + start + count, tl.sum(selects.to(tl.int32) << offs_t, 0))
            count += 1
            num_past += ((smallest + 1) * BLOCK_SIZE <= first + 1).to(tl.int32)
            place += selects.to(tl.int32)
            following = tl.load(list_ptr + rows + place, mask=selects & (place < block_counts), other=_NO_BLOCK)
            block = tl.where(selects, following & _NO_BLOCK, block)
            smallest = tl.min(block, 0)
        # Sequences cannot overlap: tile i of the sequence that starts at row c is number c // TOKENS + sequence + i.
        slot = ((start_q // TOKENS + sequence + tile) * num_kv_heads + kv_head) * 2
        tl.store(counts_ptr + slot, count)
        tl.store(counts_ptr + slot + 1, num_past)


@triton.jit
def _tile_of_tokens(
    union_ptr, members_ptr, counts_ptr, start_q, num_queries, num_keys, num_kv_heads, block_counts,
    GROUP_SIZE: tl.constexpr, TOKENS: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """The tile of this program: TOKENS tokens of a sequence x the heads of a group.

    Returns:
        token, head: [ROWS], rows of the packed q. mask_m: [ROWS], whether there is such a row. offs_t: [ROWS], its
            token's place in the tile, and last: [ROWS], the last key it sees.
        union_base, members_base: the tile's lists. count, num_past: how many blocks are in them, and how many of these
            lie before every token.
    """
    tile, kv_head, sequence = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    num_tokens = tl.minimum(num_queries - tile * TOKENS, TOKENS)
    first_token = (start_q + tile * TOKENS).to(tl.int64)
    start = (first_token * num_kv_heads + kv_head * num_tokens) * block_counts
    slot = ((start_q // TOKENS + sequence + tile) * num_kv_heads + kv_head) * 2
    count = tl.load(counts_ptr + slot)
    num_past = tl.load(counts_ptr + slot + 1)
    offs_m = tl.arange(0, ROWS)
    mask_m = offs_m < num_tokens * GROUP_SIZE
    offs_t = tl.minimum(offs_m // GROUP_SIZE, TOKENS - 1)
    head = kv_head * GROUP_SIZE + offs_m % GROUP_SIZE
    last = num_keys - num_queries + tile * TOKENS + offs_t
    return first_token + offs_t, head, mask_m, offs_t, last, union_ptr + start, members_ptr + start, count, num_past


@triton.jit
def _entry_or_0(list_base, entry, count):
    """An entry of one of a tile's lists, or 0 after the last."""
    return tl.load(list_base + entry, mask=entry < count, other=0)


@triton.jit
def _is_member(members, offs_t, mask_m):
    """Whether the rows' tokens are among the members of a block."""
    return mask_m & (((members >> offs_t) & 1) != 0)


@triton.jit
def _selection_fwd_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    o_ptr,
    lse_ptr,
    union_ptr,
    members_ptr,
    counts_ptr,
    cu_seqlens_q_ptr,
    cu_seqlens_k_ptr,
    stride_qt,
    stride_qh,
    stride_kt,
    stride_kh,
    stride_vt,
    stride_vh,
    num_kv_heads,
    block_counts,
    softmax_scale,
    GROUP_SIZE: tl.constexpr,
    TOKENS: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    PARTS: tl.constexpr,
    SPAN: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HEAD_PAD: tl.constexpr,
):
    """o and lse of TOKENS tokens x the heads of a group. Grid: (most tiles of a sequence, num_kv_heads, batch).

    Walks the tile's union, one PARTS-th of a block or SPAN = 2 whole blocks a step. Neighbouring programs share a
    key/value head and most blocks, so k and v come from the L2 cache. Blocks before all of the tile's tokens need no
    causal mask.
    """
    kv_head, sequence = tl.program_id(1), tl.program_id(2)
    start_q, start_k, num_queries, num_keys = triton_tiles.sequence_bounds(cu_seqlens_q_ptr, cu_seqlens_k_ptr, sequence)
    if tl.program_id(0) * TOKENS < num_queries:
        token, head, mask_m, offs_t, last, union_base, members_base, count, num_past = _tile_of_tokens(
            union_ptr, members_ptr, counts_ptr, start_q, num_queries, num_keys, num_kv_heads, block_counts,
            GROUP_SIZE, TOKENS, ROWS,
        )  # fmt: skip
        k_base = k_ptr + start_k.to(tl.int64) * stride_kt + kv_head * stride_kh
        v_base = v_ptr + start_k.to(tl.int64) * stride_vt + kv_head * stride_vh
        # [ROWS, HEAD_PAD]
        q = triton_tiles.load_tile(q_ptr, token * stride_qt + head * stride_qh, mask_m, HEAD_DIM, HEAD_PAD)
        scale_log2 = softmax_scale * triton_tiles.LOG2_E
        row_max, row_sum, acc = triton_tiles.softmax_start(ROWS, HEAD_PAD)
        # Loaded a step early, the blocks are there when the loads that they address are issued ahead of their use.
        block = _entry_or_0(union_base, 0, count)
        second = _entry_or_0(union_base, 1, count)
        for step in range(tl.cdiv(count * PARTS, SPAN)):
            entry = step * SPAN // PARTS
            member = _is_member(tl.load(members_base + entry), offs_t, mask_m)
            offs_n = step % PARTS * KEYS + tl.arange(0, KEYS)
            key = block * BLOCK_SIZE + offs_n
            if SPAN == 2:
                members = _entry_or_0(members_base, entry + 1, count)
                member = tl.join(member, _is_member(members, offs_t, mask_m))
                key = tl.where(offs_n < BLOCK_SIZE, key, (second - 1) * BLOCK_SIZE + offs_n)
            elif KEYS * PARTS > BLOCK_SIZE:
                key = tl.where(offs_n < BLOCK_SIZE, key, _NO_BLOCK)
            offs_row = tl.minimum(key, num_keys - 1).to(tl.int64)
            # [KEYS, HEAD_PAD]
            k = triton_tiles.load_tile(k_base, offs_row * stride_kt, None, HEAD_DIM, HEAD_PAD)
            v = triton_tiles.load_tile(v_base, offs_row * stride_vt, None, HEAD_DIM, HEAD_PAD)
            hides = (KEYS * PARTS != BLOCK_SIZE * SPAN) | (entry + SPAN > num_past)
            score = triton_tiles.masked_score(q, k, hides, key, last)
            row_max, row_sum, acc = triton_tiles.softmax_step(score, scale_log2, row_max, row_sum, acc, v, member)
            block = _entry_or_0(union_base, (step + 1) * SPAN // PARTS, count)
            second = _entry_or_0(union_base, (step + 1) * SPAN // PARTS + 1, count)
        o, lse = triton_tiles.softmax_result(row_max, row_sum, acc)
        row_o = token * (num_kv_heads * GROUP_SIZE) + head
        triton_tiles.store_tile(o_ptr, row_o * HEAD_DIM, mask_m, o, HEAD_DIM, HEAD_PAD)
        tl.store(lse_ptr + row_o, lse, mask=mask_m)


@triton.jit
def _selection_bwd_dq_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    do_ptr,
    lse_delta_ptr,
    window_lse_delta_ptr,
    dq_ptr,
    union_ptr,
    members_ptr,
    counts_ptr,
    cu_seqlens_q_ptr,
    cu_seqlens_k_ptr,
    stride_qt,
    stride_qh,
    stride_kt,
    stride_kh,
    stride_vt,
    stride_vh,
    stride_dot,
    stride_doh,
    num_kv_heads,
    block_counts,
    window_size,
    softmax_scale,
    GROUP_SIZE: tl.constexpr,
    TOKENS: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    PARTS: tl.constexpr,
    WINDOW_KEYS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HEAD_PAD: tl.constexpr,
):
    """dq of TOKENS tokens x the heads of a group. Grid and walk as in the forward kernel, with SPAN = 1.

    Unless window_lse_delta_ptr is None, that of the window branch is added, WINDOW_KEYS keys a step.
    """
    kv_head, sequence = tl.program_id(1), tl.program_id(2)
    start_q, start_k, num_queries, num_keys = triton_tiles.sequence_bounds(cu_seqlens_q_ptr, cu_seqlens_k_ptr, sequence)
    if tl.program_id(0) * TOKENS < num_queries:
        token, head, mask_m, offs_t, last, union_base, members_base, count, num_past = _tile_of_tokens(
            union_ptr, members_ptr, counts_ptr, start_q, num_queries, num_keys, num_kv_heads, block_counts,
            GROUP_SIZE, TOKENS, ROWS,
        )  # fmt: skip
        k_base = k_ptr + start_k.to(tl.int64) * stride_kt + kv_head * stride_kh
        v_base = v_ptr + start_k.to(tl.int64) * stride_vt + kv_head * stride_vh
        row = token * (num_kv_heads * GROUP_SIZE) + head
        # [ROWS, HEAD_PAD]
        q = triton_tiles.load_tile(q_ptr, token * stride_qt + head * stride_qh, mask_m, HEAD_DIM, HEAD_PAD)
        do = triton_tiles.load_tile(do_ptr, token * stride_dot + head * stride_doh, mask_m, HEAD_DIM, HEAD_PAD)
        lse_log2, delta = triton_tiles.load_lse_delta(lse_delta_ptr, row, mask_m)
        scale_log2 = softmax_scale * triton_tiles.LOG2_E
        dq = tl.zeros([ROWS, HEAD_PAD], tl.float32)
        block = _entry_or_0(union_base, 0, count)
        for step in range(count * PARTS):
            entry = step // PARTS
            member = _is_member(tl.load(members_base + entry), offs_t, mask_m)
            offs_n = step % PARTS * KEYS + tl.arange(0, KEYS)
            key = block * BLOCK_SIZE + offs_n
            if KEYS * PARTS > BLOCK_SIZE:
                key = tl.where(offs_n < BLOCK_SIZE, key, _NO_BLOCK)
            offs_row = tl.minimum(key, num_keys - 1).to(tl.int64)
            # [KEYS, HEAD_PAD]
            k = triton_tiles.load_tile(k_base, offs_row * stride_kt, None, HEAD_DIM, HEAD_PAD)
            v = triton_tiles.load_tile(v_base, offs_row * stride_vt, None, HEAD_DIM, HEAD_PAD)
            hides = (KEYS * PARTS != BLOCK_SIZE) | (entry >= num_past)
            lse_of_members = tl.where(member, lse_log2, float("inf"))
            dq = triton_tiles.dq_step(q, k, v, do, lse_of_members, delta, dq, scale_log2, hides, key, last)
            block = _entry_or_0(union_base, (step + 1) // PARTS, count)
        if window_lse_delta_ptr is not None:
            lse_log2, delta = triton_tiles.load_lse_delta(window_lse_delta_ptr, row, mask_m)
            done = tl.program_id(0) * TOKENS
            lowest = num_keys - num_queries + done
            highest = lowest + tl.minimum(num_queries - done, TOKENS) - 1
            dq = triton_rows.add_dq_of_keys(
                q, do, lse_log2, delta, dq, scale_log2, k_base, v_base, stride_kt, stride_vt,
                tl.maximum(lowest - window_size + 1, 0), highest + 1, last, lowest, highest, window_size,
                WINDOW_KEYS, HEAD_DIM, HEAD_PAD,
            )  # fmt: skip
        triton_tiles.store_tile(dq_ptr, row * HEAD_DIM, mask_m, dq * softmax_scale, HEAD_DIM, HEAD_PAD)


@triton.jit(do_not_specialize=["num_slots", "tiles_per_chunk"])
def _pairs_kernel(
    union_ptr,
    members_ptr,
    counts_ptr,
    place_ptr,
    token_ptr,
    cu_seqlens_q_ptr,
    cu_seqlens_k_ptr,
    num_kv_heads,
    block_counts,
    num_slots,
    tiles_per_chunk,
    TOKENS: tl.constexpr,
    TOKENS_PAD: tl.constexpr,
    ENTRIES: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
):
    """Count the pairs of every block, or write their tokens in order. Grid: (chunks, num_kv_heads, batch).

    A chunk is so many tiles, one after the other. place_ptr: (num_kv_heads, num_slots, chunks), int64, where block j of
    the sequence whose keys start at row c has slot c // BLOCK_SIZE + sequence + j. Without token_ptr, the chunk's pairs
    of each block are added to it. With it, it holds where the chunk's pairs of each block begin, and is counted up
    while their tokens are written there.
    """
    chunk, kv_head, sequence = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    num_chunks = tl.num_programs(0)
    start_q, start_k, num_queries, _ = triton_tiles.sequence_bounds(cu_seqlens_q_ptr, cu_seqlens_k_ptr, sequence)
    slot = (kv_head * num_slots + start_k // BLOCK_SIZE + sequence).to(tl.int64)
    offs_t = tl.arange(0, TOKENS_PAD)
    num_tiles = tl.cdiv(num_queries, TOKENS)
    for tile in range(chunk * tiles_per_chunk, tl.minimum((chunk + 1) * tiles_per_chunk, num_tiles)):
        num_tokens = tl.minimum(num_queries - tile * TOKENS, TOKENS)
        token = start_q + tile * TOKENS
        start = (token.to(tl.int64) * num_kv_heads + kv_head * num_tokens) * block_counts
        count = tl.load(counts_ptr + ((start_q // TOKENS + sequence + tile) * num_kv_heads + kv_head) * 2)
        for entry in range(0, count, ENTRIES):
            offs_e = entry + tl.arange(0, ENTRIES)
            mask_e = offs_e < count
            block = tl.load(union_ptr + start + offs_e, mask=mask_e, other=0)
            members = tl.load(members_ptr + start + offs_e, mask=mask_e, other=0)
            # [ENTRIES, TOKENS_PAD]
            bits = (members[:, None] >> offs_t[None, :]) & 1
            ptrs = place_ptr + (slot + block) * num_chunks + chunk
            place = tl.load(ptrs, mask=mask_e, other=0)
            if token_ptr is not None:
                rank = place[:, None] + tl.cumsum(bits, 1) - 1
                tokens = tl.broadcast_to((token + offs_t)[None, :], [ENTRIES, TOKENS_PAD])
                tl.store(token_ptr + rank, tokens, mask=mask_e[:, None] & (bits > 0))
            # Blocks of a union are distinct, but those of the next tile are the same, and so may be other threads'.
            tl.debug_barrier()
            tl.store(ptrs, place + tl.sum(bits, 1), mask=mask_e)
            tl.debug_barrier()


@triton.jit(do_not_specialize=["num_slots", "num_numbers", "batch"])
def _selection_bwd_dkv_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    do_ptr,
    lse_delta_ptr,
    dk_part_ptr,
    dv_part_ptr,
    token_ptr,
    pair_start_ptr,
    run_start_ptr,
    run_block_ptr,
    cu_seqlens_q_ptr,
    cu_seqlens_k_ptr,
    stride_qt,
    stride_qh,
    stride_kt,
    stride_kh,
    stride_vt,
    stride_vh,
    stride_dot,
    stride_doh,
    num_kv_heads,
    num_slots,
    num_numbers,
    batch,
    run_pairs,
    softmax_scale,
    GROUP_SIZE: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HEAD_PAD: tl.constexpr,
):
    """dk and dv of KEYS keys of a block from one run of its pairs. Grid: (most runs, parts of a block).

    Gathers q and do of the run's tokens, all heads of the group together: 2 * GROUP_SIZE * HEAD_DIM elements a pair,
    each fetched about block_counts times in all, from the L2 cache where neighbouring blocks share tokens.
    """
    run = tl.program_id(0)
    number = tl.load(run_block_ptr + run).to(tl.int32)
    if number < num_numbers:
        slot = number % num_slots
        kv_head = number // num_slots
        sequence = 0
        for i in range(1, batch):
            sequence = tl.where(slot >= tl.load(cu_seqlens_k_ptr + i) // BLOCK_SIZE + i, i, sequence)
        start_k = tl.load(cu_seqlens_k_ptr + sequence)
        num_keys = tl.load(cu_seqlens_k_ptr + sequence + 1) - start_k
        # The position of a token is its row of the packed q plus this.
        shift = num_keys - tl.load(cu_seqlens_q_ptr + sequence + 1)
        offs_n = tl.program_id(1) * KEYS + tl.arange(0, KEYS)
        key = (slot - start_k // BLOCK_SIZE - sequence) * BLOCK_SIZE + offs_n
        mask_n = (offs_n < BLOCK_SIZE) & (key < num_keys)
        row_k = (start_k + key).to(tl.int64)
        # [KEYS, HEAD_PAD]
        k = triton_tiles.load_tile(k_ptr, row_k * stride_kt + kv_head * stride_kh, mask_n, HEAD_DIM, HEAD_PAD)
        v = triton_tiles.load_tile(v_ptr, row_k * stride_vt + kv_head * stride_vh, mask_n, HEAD_DIM, HEAD_PAD)
        q_base = q_ptr + kv_head * GROUP_SIZE * stride_qh
        do_base = do_ptr + kv_head * GROUP_SIZE * stride_doh
        scale_log2 = softmax_scale * triton_tiles.LOG2_E

        pair_end = tl.load(pair_start_ptr + number + 1)
        first_pair = (run - tl.load(run_start_ptr + number)) * run_pairs
        pair = tl.load(pair_start_ptr + number) + first_pair
        num_rows = tl.minimum(pair_end - pair, run_pairs).to(tl.int32) * GROUP_SIZE
        # Tokens inside of the block do not see all of it. They come first, and there are at most BLOCK_SIZE.
        num_partial = tl.maximum(BLOCK_SIZE - first_pair, 0).to(tl.int32) * GROUP_SIZE
        dk = tl.zeros([KEYS, HEAD_PAD], tl.float32)
        dv = tl.zeros([KEYS, HEAD_PAD], tl.float32)
        for row in range(0, num_rows, ROWS):
            offs_m = row + tl.arange(0, ROWS)
            mask_m = offs_m < num_rows
            token = tl.load(token_ptr + pair + offs_m // GROUP_SIZE, mask=mask_m, other=0)
            head = offs_m % GROUP_SIZE
            offs_q = token.to(tl.int64) * stride_qt + head * stride_qh
            offs_do = token.to(tl.int64) * stride_dot + head * stride_doh
            # [ROWS, HEAD_PAD]
            q = triton_tiles.load_tile(q_base, offs_q, None, HEAD_DIM, HEAD_PAD)
            do = triton_tiles.load_tile(do_base, offs_do, None, HEAD_DIM, HEAD_PAD)
            row_lse = (token.to(tl.int64) * num_kv_heads + kv_head) * GROUP_SIZE + head
            lse_log2, delta = triton_tiles.load_lse_delta(lse_delta_ptr, row_lse, mask_m)
            dk, dv = triton_tiles.dkv_step(
                q, k, v, do, lse_log2, delta, dk, dv, scale_log2, row < num_partial, key, token + shift
            )
        offs_part = (run.to(tl.int64) * BLOCK_SIZE + offs_n) * HEAD_DIM
        mask_part = offs_n < BLOCK_SIZE
        triton_tiles.store_tile(dk_part_ptr, offs_part, mask_part, dk * softmax_scale, HEAD_DIM, HEAD_PAD)
        triton_tiles.store_tile(dv_part_ptr, offs_part, mask_part, dv, HEAD_DIM, HEAD_PAD)


@triton.jit(do_not_specialize=["num_slots"])
def _sum_runs_kernel(
    dk_part_ptr,
    dv_part_ptr,
    dk_ptr,
    dv_ptr,
    run_start_ptr,
    cu_seqlens_k_ptr,
    num_kv_heads,
    num_slots,
    KEYS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HEAD_PAD: tl.constexpr,
):
    """dk and dv of KEYS keys: the sum over the block's runs, in order.

    Grid: (most key tiles of a sequence, num_kv_heads, batch); a block has cdiv(BLOCK_SIZE, KEYS) tiles.
    """
    PARTS: tl.constexpr = (BLOCK_SIZE + KEYS - 1) // KEYS
    block, part = tl.program_id(0) // PARTS, tl.program_id(0) % PARTS
    head, sequence = tl.program_id(1), tl.program_id(2)
    start_k = tl.load(cu_seqlens_k_ptr + sequence)
    num_keys = tl.load(cu_seqlens_k_ptr + sequence + 1) - start_k
    offs_n = part * KEYS + tl.arange(0, KEYS)
    if block * BLOCK_SIZE + part * KEYS < num_keys:
        number = head * num_slots + start_k // BLOCK_SIZE + sequence + block
        mask_n = (offs_n < BLOCK_SIZE) & (block * BLOCK_SIZE + offs_n < num_keys)
        # [KEYS, HEAD_PAD]
        dk = tl.zeros([KEYS, HEAD_PAD], tl.float32)
        dv = tl.zeros([KEYS, HEAD_PAD], tl.float32)
        run = tl.load(run_start_ptr + number)
        offs_part = (run * BLOCK_SIZE + offs_n) * HEAD_DIM
        for _ in range(run, tl.load(run_start_ptr + number + 1)):
            dk += triton_tiles.load_tile(dk_part_ptr, offs_part, mask_n, HEAD_DIM, HEAD_PAD)
            dv += triton_tiles.load_tile(dv_part_ptr, offs_part, mask_n, HEAD_DIM, HEAD_PAD)
            offs_part += BLOCK_SIZE * HEAD_DIM
        row_k = (start_k + block * BLOCK_SIZE + offs_n).to(tl.int64)
        offs_out = (row_k * num_kv_heads + head) * HEAD_DIM
        triton_tiles.store_tile(dk_ptr, offs_out, mask_n, dk, HEAD_DIM, HEAD_PAD)
        triton_tiles.store_tile(dv_ptr, offs_out, mask_n, dv, HEAD_DIM, HEAD_PAD)


def tile_config(q: Tensor, group_size: int, block_size: int) -> dict:
    """Constexprs and launch options of the dq kernel: a tile of tokens x the heads of a group, over parts of blocks."""
    config = triton_tiles.walk_extents(q)
    tokens = max(1, min(_MAX_TILE_TOKENS, config["ROWS"] // group_size))
    rows, keys = triton_tiles.pad(tokens * group_size), min(config["KEYS"], triton_tiles.pad(block_size))
    return {
        **config,
        "GROUP_SIZE": group_size,
        "TOKENS": tokens,
        "ROWS": rows,
        "KEYS": keys,
        "PARTS": triton_tiles.cdiv(block_size, keys),
        "num_warps": max(4, config["num_warps"] * rows // config["ROWS"]),
    }


def forward_config(q: Tensor, group_size: int, block_size: int) -> dict:
    """Constexprs and launch options of the forward kernel: the same, or two whole blocks a step."""
    config = {**tile_config(q, group_size, block_size), "SPAN": 1}
    fits = config["KEYS"] == block_size and not triton_tiles.is_small(q.device) and not triton_tiles.is_wide(q.dtype)
    if fits and triton_tiles.tuning.selection_span == 2:
        config |= {"SPAN": 2, "KEYS": 2 * block_size, "num_stages": 2}
    return config


def dkv_config(q: Tensor, group_size: int, block_size: int) -> dict:
    """Constexprs and launch options of the dk, dv kernel."""
    config = triton_tiles.dkv_extents(q, num_stages=3)
    return {**config, "GROUP_SIZE": group_size, "KEYS": min(config["KEYS"], triton_tiles.pad(block_size))}


class Lists(NamedTuple):
    """The blocks of all tiles of neighbouring tokens, as `_union_kernel` describes them.

    Attributes:
        union, members: (total_q, num_kv_heads, block_counts), int32, in an order of their own.
        counts: (tiles, num_kv_heads, 2), int32.
    """

    union: Tensor
    members: Tensor
    counts: Tensor


def list_blocks(
    block_indices: Tensor, q: Tensor, lengths: utils.SequenceLengths, block_size: int, is_sorted: bool
) -> Lists:
    """What the other functions here walk.

    Args:
        block_indices: (total_q, num_kv_heads, block_counts), int32 or int64, distinct within a token, in any order.
            Negative ones and blocks that start after the token are ignored.
        q: (total_q, num_heads, head_dim): how many tokens share a tile depends on its shape.
        is_sorted: promises that block_indices are int32 and ascend, -1 at the end, without blocks after the token.
    """
    block_indices = block_indices.contiguous()
    total_q, num_kv_heads, block_counts = block_indices.shape
    batch = len(lengths.offsets_q) - 1
    tokens = tile_config(q, q.shape[1] // num_kv_heads, block_size)["TOKENS"]
    union = torch.empty(block_indices.shape, dtype=torch.int32, device=block_indices.device)
    members = torch.empty_like(union)
    counts = union.new_empty(total_q // tokens + batch, num_kv_heads, 2)
    tokens_pad, counts_pad = triton_tiles.next_power_of_2(tokens), triton_tiles.next_power_of_2(block_counts)
    triton_tiles.launch(
        _union_kernel,
        (triton_tiles.cdiv(triton_tiles.longest(lengths.offsets_q), tokens), num_kv_heads, batch),
        block_indices_ptr=block_indices,
        sorted_ptr=None if is_sorted else torch.empty_like(union),
        union_ptr=union,
        members_ptr=members,
        counts_ptr=counts,
        cu_seqlens_q_ptr=lengths.cu_seqlens_q,
        cu_seqlens_k_ptr=lengths.cu_seqlens_k,
        num_kv_heads=num_kv_heads,
        block_counts=block_counts,
        TOKENS=tokens,
        TOKENS_PAD=tokens_pad,
        COUNTS_PAD=counts_pad,
        BLOCK_SIZE=block_size,
        num_warps=1 if is_sorted else max(1, min(16, tokens_pad * counts_pad // 1024)),
    )
    return Lists(union, members, counts)


def _list_arguments(lists: Lists, lengths: utils.SequenceLengths, block_size: int) -> dict:
    _, num_kv_heads, block_counts = lists.union.shape
    return {
        "union_ptr": lists.union,
        "members_ptr": lists.members,
        "counts_ptr": lists.counts,
        "cu_seqlens_q_ptr": lengths.cu_seqlens_q,
        "cu_seqlens_k_ptr": lengths.cu_seqlens_k,
        "num_kv_heads": num_kv_heads,
        "block_counts": block_counts,
        "BLOCK_SIZE": block_size,
    }


def selection_fwd(
    q: Tensor, k: Tensor, v: Tensor, lists: Lists, lengths: utils.SequenceLengths, block_size: int, softmax_scale: float
) -> tuple[Tensor, Tensor]:
    """Causal attention of every query over the tokens of its selected key blocks.

    Args:
        q: (total_q, num_heads, head_dim), fp16, bf16 or fp32.
        k, v: (total_k, num_kv_heads, head_dim), like q.
        lists: of `list_blocks`.
    Returns:
        o: like q, contiguous; 0 for a token without blocks.
        lse: (total_q, num_heads), fp32, natural log; -inf for a token without blocks.
    """
    q, k, v = (triton_tiles.addressable(x) for x in (q, k, v))
    q, softmax_scale = utils.positive_scale(q, softmax_scale)
    o = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    lse = torch.empty(q.shape[:2], dtype=torch.float32, device=q.device)
    config = forward_config(q, q.shape[1] // k.shape[1], block_size)
    num_tiles = triton_tiles.cdiv(triton_tiles.longest(lengths.offsets_q), config["TOKENS"])
    triton_tiles.launch(
        _selection_fwd_kernel,
        (num_tiles, k.shape[1], len(lengths.offsets_q) - 1),
        q_ptr=q,
        k_ptr=k,
        v_ptr=v,
        o_ptr=o,
        lse_ptr=lse,
        softmax_scale=softmax_scale,
        **triton_tiles.strides(q=q, k=k, v=v),
        **_list_arguments(lists, lengths, block_size),
        **config,
    )
    return o, lse


def takes_window(q: Tensor) -> bool:
    """Whether the dq kernel should go on to the window: not with the shared memory of smaller GPUs."""
    return triton_tiles.tuning.one_dq and not triton_tiles.is_small(q.device)


def selection_bwd(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lists: Lists,
    lse_delta: Tensor,
    do: Tensor,
    lengths: utils.SequenceLengths,
    block_size: int,
    softmax_scale: float,
    window: tuple[int, Tensor] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of the selection branch; the same inputs give the same bits.

    Args:
        lists: of `list_blocks`, those of the forward pass.
        lse_delta: (total_q, num_heads, 2), fp32, as of `triton_tiles.lse_and_delta`.
        do: like q.
        window: window_size and lse_delta of the window branch, whose dq is then part of this one.
    Returns:
        dq: like q, contiguous; dk, dv: (total_k, num_kv_heads, head_dim), fp32.
    """
    q, k, v, do = (triton_tiles.addressable(x) for x in (q, k, v, do))
    dq = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    shared = {
        "q_ptr": q,
        "k_ptr": k,
        "v_ptr": v,
        "do_ptr": do,
        "lse_delta_ptr": triton_tiles.pairs(lse_delta),
        "softmax_scale": softmax_scale,
        **triton_tiles.strides(q=q, k=k, v=v, do=do),
    }
    config = tile_config(q, q.shape[1] // k.shape[1], block_size)
    num_tiles = triton_tiles.cdiv(triton_tiles.longest(lengths.offsets_q), config["TOKENS"])
    window_size, window_lse_delta = window or (None, None)
    triton_tiles.launch(
        _selection_bwd_dq_kernel,
        (num_tiles, k.shape[1], len(lengths.offsets_q) - 1),
        dq_ptr=dq,
        window_lse_delta_ptr=window and triton_tiles.pairs(window_lse_delta),
        window_size=window and min(window_size, triton_rows.LONGEST_WINDOW),
        WINDOW_KEYS=triton_tiles.walk_extents(q)["KEYS"],
        **shared,
        **_list_arguments(lists, lengths, block_size),
        **config,
    )
    return dq, *_dk_and_dv(lists, lengths, block_size, config["TOKENS"], shared)


def _tokens_of_blocks(lists, lengths, block_size, tokens, num_slots) -> tuple[Tensor, Tensor]:
    """Every block's tokens in order, int32, and where in that list the num_slots blocks of each head begin, int64."""
    num_pairs, num_kv_heads = lists.union.numel(), lists.union.shape[1]
    num_tiles = triton_tiles.cdiv(triton_tiles.longest(lengths.offsets_q), tokens)
    tiles_per_chunk = max(1, triton_tiles.cdiv(num_tiles, _MAX_CHUNKS))
    num_chunks = max(1, triton_tiles.cdiv(num_tiles, tiles_per_chunk))
    place = torch.zeros(num_kv_heads * num_slots * num_chunks + 1, dtype=torch.int64, device=lists.union.device)
    arguments = {
        **_list_arguments(lists, lengths, block_size),
        "num_slots": num_slots,
        "tiles_per_chunk": tiles_per_chunk,
        "TOKENS": tokens,
        "TOKENS_PAD": triton_tiles.next_power_of_2(tokens),
        "ENTRIES": _ENTRIES,
        "num_warps": 1,
    }
    grid = num_chunks, num_kv_heads, len(lengths.offsets_q) - 1
    # Counts one place further become, summed up, where each begins.
    triton_tiles.launch(_pairs_kernel, grid, place_ptr=place[1:], token_ptr=None, **arguments)
    place = place.cumsum(0)
    pair_start = place[::num_chunks].clone()
    pair_tokens = torch.empty(num_pairs, dtype=torch.int32, device=place.device)
    triton_tiles.launch(_pairs_kernel, grid, place_ptr=place, token_ptr=pair_tokens, **arguments)
    return pair_tokens, pair_start


def _dk_and_dv(lists, lengths, block_size, tokens, shared) -> tuple[Tensor, Tensor]:
    """dk and dv, (total_k, num_kv_heads, head_dim), fp32; shared: what the dq kernel takes too."""
    q, k = shared["q_ptr"], shared["k_ptr"]
    (total_k, num_kv_heads, _), batch, device = k.shape, len(lengths.offsets_q) - 1, k.device
    config = dkv_config(q, q.shape[1] // num_kv_heads, block_size)
    num_slots = total_k // block_size + batch
    num_numbers = num_kv_heads * num_slots
    pair_tokens, pair_start = _tokens_of_blocks(lists, lengths, block_size, tokens, num_slots)
    # A block is selected by block_counts * block_size tokens on average.
    run_pairs = lists.union.shape[2] * block_size
    max_runs = num_numbers + len(pair_tokens) // run_pairs
    run_start = torch.zeros_like(pair_start)
    torch.cumsum(pair_start.diff().add_(run_pairs - 1).div_(run_pairs, rounding_mode="floor"), 0, out=run_start[1:])
    run_block = torch.searchsorted(run_start[1:], torch.arange(max_runs, device=device), right=True)

    dk, dv = (torch.empty(k.shape, dtype=torch.float32, device=device) for _ in range(2))
    dk_part, dv_part = (dk.new_empty(max_runs, block_size, k.shape[2]) for _ in range(2))
    parts = triton_tiles.cdiv(block_size, config["KEYS"])
    triton_tiles.launch(
        _selection_bwd_dkv_kernel,
        (max_runs if len(q) else 0, parts),
        dk_part_ptr=dk_part,
        dv_part_ptr=dv_part,
        token_ptr=pair_tokens,
        pair_start_ptr=pair_start,
        run_start_ptr=run_start,
        run_block_ptr=run_block,
        cu_seqlens_q_ptr=lengths.cu_seqlens_q,
        cu_seqlens_k_ptr=lengths.cu_seqlens_k,
        num_kv_heads=num_kv_heads,
        num_slots=num_slots,
        num_numbers=num_numbers,
        batch=batch,
        run_pairs=run_pairs,
        BLOCK_SIZE=block_size,
        **shared,
        **config,
    )
    triton_tiles.launch(
        _sum_runs_kernel,
        (triton_tiles.cdiv(triton_tiles.longest(lengths.offsets_k), block_size) * parts, num_kv_heads, batch),
        dk_part_ptr=dk_part,
        dv_part_ptr=dv_part,
        dk_ptr=dk,
        dv_ptr=dv,
        run_start_ptr=run_start,
        cu_seqlens_k_ptr=lengths.cu_seqlens_k,
        num_kv_heads=num_kv_heads,
        num_slots=num_slots,
        KEYS=config["KEYS"],
        BLOCK_SIZE=block_size,
        HEAD_DIM=config["HEAD_DIM"],
        HEAD_PAD=config["HEAD_PAD"],
        num_warps=8,
    )
    return dk, dv
