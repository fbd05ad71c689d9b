"""dk and dv of the selection branch (Triton backend).

The gradients of triton_selection.py's o[t,h] with respect to the keys and values of the selected blocks. A stable sort
of the (token, block) pairs by block gives every block its tokens in order; runs of at most so many pairs, times the
heads of a group, fill tiles of rows without padding; a popular block has many runs. Each run leaves one partial sum in
float32, and the runs of a block are added in order. There are no atomics, nothing is counted on the host, and memory is
linear: the partial sums take about twice the rows of the blocks themselves.
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

# Pairs that are sorted at a time; more heads than that take several passes.
_MAX_SORTED_PAIRS = 1 << 23


@triton.jit(do_not_specialize=["total_q", "head_start", "num_slots"])
def _pair_keys_kernel(
    block_indices_ptr,
    key_ptr,
    cu_seqlens_q_ptr,
    cu_seqlens_k_ptr,
    total_q,
    head_start,
    num_kv_heads,
    num_slots,
    block_counts,
    TOKENS: tl.constexpr,
    COUNTS_PAD: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
):
    """What pairs are sorted by: the number of their block. Grid: (most tiles of a sequence, heads of the pass, batch).

    key_ptr: (heads of the pass, total_q, block_counts), int32. Block j of the sequence whose keys start at row c is
    number c // BLOCK_SIZE + sequence + j of num_slots per head. Missing and future blocks come after all.
    """
    head, sequence = tl.program_id(1), tl.program_id(2)
    start_q, start_k, num_queries, num_keys = triton_tiles.sequence_bounds(cu_seqlens_q_ptr, cu_seqlens_k_ptr, sequence)
    offs_t = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    offs_n = tl.arange(0, COUNTS_PAD)
    mask = (offs_t < num_queries)[:, None] & (offs_n < block_counts)[None, :]
    token = (start_q + offs_t).to(tl.int64)
    rows = (token * num_kv_heads + head_start + head) * block_counts
    # [TOKENS, COUNTS_PAD]
    block = tl.load(block_indices_ptr + rows[:, None] + offs_n[None, :], mask=mask, other=-1).to(tl.int32)
    own = (num_keys - num_queries + offs_t) // BLOCK_SIZE
    number = head * num_slots + start_k // BLOCK_SIZE + sequence + block
    number = tl.where((block >= 0) & (block <= own[:, None]), number, tl.num_programs(1) * num_slots)
    out = (head.to(tl.int64) * total_q + token) * block_counts
    tl.store(key_ptr + out[:, None] + offs_n[None, :], number, mask=mask)


@triton.jit(do_not_specialize=["head_start", "num_slots", "num_numbers", "batch"])
def _selection_bwd_dkv_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    do_ptr,
    lse_ptr,
    delta_ptr,
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
    head_start,
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
        kv_head = head_start + number // num_slots
        sequence = 0
        for i in range(1, batch):
            sequence = tl.where(slot >= tl.load(cu_seqlens_k_ptr + i) // BLOCK_SIZE + i, i, sequence)
        start_k = tl.load(cu_seqlens_k_ptr + sequence)
        num_keys = tl.load(cu_seqlens_k_ptr + sequence + 1) - start_k
        # The position of a token is its row of the packed q plus this.
        shift = num_keys - tl.load(cu_seqlens_q_ptr + sequence + 1)
        offs_n = tl.program_id(1) * KEYS + tl.arange(0, KEYS)
        offs_d = tl.arange(0, HEAD_PAD)
        mask_d = offs_d < HEAD_DIM
        key = (slot - start_k // BLOCK_SIZE - sequence) * BLOCK_SIZE + offs_n
        mask_n = ((offs_n < BLOCK_SIZE) & (key < num_keys))[:, None] & mask_d[None, :]
        row_k = (start_k + key).to(tl.int64)
        # [KEYS, HEAD_PAD]
        k = tl.load(k_ptr + row_k[:, None] * stride_kt + kv_head * stride_kh + offs_d[None, :], mask=mask_n, other=0.0)
        v = tl.load(v_ptr + row_k[:, None] * stride_vt + kv_head * stride_vh + offs_d[None, :], mask=mask_n, other=0.0)
        num_heads = num_kv_heads * GROUP_SIZE
        q_base = q_ptr + kv_head * GROUP_SIZE * stride_qh
        do_base = do_ptr + kv_head * GROUP_SIZE * stride_doh
        scale_log2 = softmax_scale * _LOG2_E

        pair_end = tl.load(pair_start_ptr + number + 1)
        pair = tl.load(pair_start_ptr + number) + (run - tl.load(run_start_ptr + number)) * run_pairs
        num_rows = tl.minimum(pair_end - pair, run_pairs).to(tl.int32) * GROUP_SIZE
        dk = tl.zeros([KEYS, HEAD_PAD], tl.float32)
        dv = tl.zeros([KEYS, HEAD_PAD], tl.float32)
        for row in range(0, num_rows, ROWS):
            offs_m = row + tl.arange(0, ROWS)
            mask_m = offs_m < num_rows
            mask_q = mask_m[:, None] & mask_d[None, :]
            token = tl.load(token_ptr + pair + offs_m // GROUP_SIZE, mask=mask_m, other=0)
            head = offs_m % GROUP_SIZE
            offs_q = token.to(tl.int64) * stride_qt + head * stride_qh
            offs_do = token.to(tl.int64) * stride_dot + head * stride_doh
            offs_lse = token.to(tl.int64) * num_heads + kv_head * GROUP_SIZE + head
            # [ROWS, HEAD_PAD]
            q = tl.load(q_base + offs_q[:, None] + offs_d[None, :], mask=mask_q, other=0.0)
            do = tl.load(do_base + offs_do[:, None] + offs_d[None, :], mask=mask_q, other=0.0)
            # With an infinite lse the probabilities of rows past the end are 0.
            lse_log2 = tl.load(lse_ptr + offs_lse, mask=mask_m, other=float("inf")) * _LOG2_E
            delta = tl.load(delta_ptr + offs_lse, mask=mask_m, other=0.0)
            # [KEYS, ROWS]
            seen = key[:, None] <= (token + shift)[None, :]
            dk, dv = triton_tiles.dkv_step(q, k, v, do, lse_log2, delta, dk, dv, scale_log2, seen)
        offs_part = (run.to(tl.int64) * BLOCK_SIZE + offs_n)[:, None] * HEAD_DIM + offs_d[None, :]
        mask_part = (offs_n < BLOCK_SIZE)[:, None] & mask_d[None, :]
        tl.store(dk_part_ptr + offs_part, dk * softmax_scale, mask=mask_part)
        tl.store(dv_part_ptr + offs_part, dv, mask=mask_part)


@triton.jit(do_not_specialize=["head_start", "num_slots"])
def _sum_runs_kernel(
    dk_part_ptr,
    dv_part_ptr,
    dk_ptr,
    dv_ptr,
    run_start_ptr,
    cu_seqlens_k_ptr,
    head_start,
    num_kv_heads,
    num_slots,
    KEYS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HEAD_PAD: tl.constexpr,
):
    """dk and dv of KEYS keys: the sum over the block's runs, in order.

    Grid: (most key tiles of a sequence, heads of the pass, batch); a block has cdiv(BLOCK_SIZE, KEYS) tiles.
    """
    PARTS: tl.constexpr = (BLOCK_SIZE + KEYS - 1) // KEYS
    block, part = tl.program_id(0) // PARTS, tl.program_id(0) % PARTS
    head, sequence = tl.program_id(1), tl.program_id(2)
    start_k = tl.load(cu_seqlens_k_ptr + sequence)
    num_keys = tl.load(cu_seqlens_k_ptr + sequence + 1) - start_k
    offs_n = part * KEYS + tl.arange(0, KEYS)
    if block * BLOCK_SIZE + part * KEYS < num_keys:
        number = head * num_slots + start_k // BLOCK_SIZE + sequence + block
        offs_d = tl.arange(0, HEAD_PAD)
        mask_d = offs_d < HEAD_DIM
        mask = ((offs_n < BLOCK_SIZE) & (block * BLOCK_SIZE + offs_n < num_keys))[:, None] & mask_d[None, :]
        # [KEYS, HEAD_PAD]
        dk = tl.zeros([KEYS, HEAD_PAD], tl.float32)
        dv = tl.zeros([KEYS, HEAD_PAD], tl.float32)
        run = tl.load(run_start_ptr + number)
        offs_part = (run * BLOCK_SIZE + offs_n)[:, None] * HEAD_DIM + offs_d[None, :]
        for _ in range(run, tl.load(run_start_ptr + number + 1)):
            dk += tl.load(dk_part_ptr + offs_part, mask=mask, other=0.0)
            dv += tl.load(dv_part_ptr + offs_part, mask=mask, other=0.0)
            offs_part += BLOCK_SIZE * HEAD_DIM
        row_k = (start_k + block * BLOCK_SIZE + offs_n).to(tl.int64)
        offs_out = (row_k * num_kv_heads + head_start + head)[:, None] * HEAD_DIM + offs_d[None, :]
        tl.store(dk_ptr + offs_out, dk, mask=mask)
        tl.store(dv_ptr + offs_out, dv, mask=mask)


def pairs_config(block_counts: int) -> dict:
    """Constexprs and launch options of the kernel that numbers the pairs."""
    counts_pad = triton.next_power_of_2(block_counts)
    return {"TOKENS": max(1, 1024 // counts_pad), "COUNTS_PAD": counts_pad, "num_warps": 4}


def dkv_config(q: Tensor, group_size: int, block_size: int) -> dict:
    """Constexprs and launch options of the dk, dv kernel.

    Hopper's MMA gives 16 rows of keys to a warp: with more than four warps for 64 keys, warps would repeat each other.
    """
    config = triton_tiles.extents(q, 32, 64, num_warps=4, num_stages=3)
    return {**config, "GROUP_SIZE": group_size, "KEYS": min(config["KEYS"], triton_tiles.pad(block_size))}


def write_dkv(
    dk: Tensor, dv: Tensor, block_indices: Tensor, lengths: utils.SequenceLengths, block_size: int, shared: dict
) -> None:
    """Fill dk and dv, (total_k, num_kv_heads, head_dim), fp32.

    Args:
        block_indices: (total_q, num_kv_heads, block_counts), contiguous.
        shared: the tensors, strides and scale that the dq kernel takes too.
    """
    total_q, num_kv_heads, block_counts = block_indices.shape
    heads = max(1, min(num_kv_heads, _MAX_SORTED_PAIRS // (total_q * block_counts)))
    for head_start in range(0, num_kv_heads, heads):
        num_passed = min(heads, num_kv_heads - head_start)
        _dkv_of_heads(dk, dv, block_indices, lengths, block_size, head_start, num_passed, shared)


def _dkv_of_heads(dk, dv, block_indices, lengths, block_size, head_start, num_passed, shared):
    """Write dk and dv of num_passed key/value heads from head_start on."""
    total_q, num_kv_heads, block_counts = block_indices.shape
    q, device = shared["q_ptr"], block_indices.device
    config = dkv_config(q, q.shape[1] // num_kv_heads, block_size)
    batch = len(lengths.offsets_q) - 1
    max_q, max_k = triton_tiles.longest(lengths.offsets_q), triton_tiles.longest(lengths.offsets_k)
    num_slots = dk.shape[0] // block_size + batch
    num_numbers = num_passed * num_slots
    # A block is selected by block_counts * block_size tokens on average.
    run_pairs = block_counts * block_size
    max_runs = num_numbers + num_passed * total_q * block_counts // run_pairs

    numbers = torch.empty(num_passed * total_q * block_counts, dtype=torch.int32, device=device)
    pairs_shapes = pairs_config(block_counts)
    _pair_keys_kernel[(triton.cdiv(max_q, pairs_shapes["TOKENS"]), num_passed, batch)](
        block_indices_ptr=block_indices,
        key_ptr=numbers,
        cu_seqlens_q_ptr=lengths.cu_seqlens_q,
        cu_seqlens_k_ptr=lengths.cu_seqlens_k,
        total_q=total_q,
        head_start=head_start,
        num_kv_heads=num_kv_heads,
        num_slots=num_slots,
        block_counts=block_counts,
        BLOCK_SIZE=block_size,
        **pairs_shapes,
    )
    numbers, pairs = numbers.sort(stable=True)
    # Pairs are in the order of (head, token, slot).
    tokens = pairs.div_(block_counts, rounding_mode="floor").remainder_(total_q).int()
    del pairs
    pair_start = torch.searchsorted(numbers, torch.arange(num_numbers + 1, dtype=torch.int32, device=device))
    run_start = torch.zeros_like(pair_start)
    torch.cumsum(pair_start.diff().add_(run_pairs - 1).div_(run_pairs, rounding_mode="floor"), 0, out=run_start[1:])
    run_block = torch.searchsorted(run_start[1:], torch.arange(max_runs, device=device), right=True)

    dk_part, dv_part = (dk.new_empty(max_runs, block_size, dk.shape[2]) for _ in range(2))
    shapes = {name: config[name] for name in ("KEYS", "HEAD_DIM", "HEAD_PAD")}
    parts = triton.cdiv(block_size, config["KEYS"])
    _selection_bwd_dkv_kernel[(max_runs, parts)](
        dk_part_ptr=dk_part,
        dv_part_ptr=dv_part,
        token_ptr=tokens,
        pair_start_ptr=pair_start,
        run_start_ptr=run_start,
        run_block_ptr=run_block,
        cu_seqlens_q_ptr=lengths.cu_seqlens_q,
        cu_seqlens_k_ptr=lengths.cu_seqlens_k,
        head_start=head_start,
        num_kv_heads=num_kv_heads,
        num_slots=num_slots,
        num_numbers=num_numbers,
        batch=batch,
        run_pairs=run_pairs,
        BLOCK_SIZE=block_size,
        **shared,
        **config,
    )
    _sum_runs_kernel[(triton.cdiv(max_k, block_size) * parts, num_passed, batch)](
        dk_part_ptr=dk_part,
        dv_part_ptr=dv_part,
        dk_ptr=dk,
        dv_ptr=dv,
        run_start_ptr=run_start,
        cu_seqlens_k_ptr=lengths.cu_seqlens_k,
        head_start=head_start,
        num_kv_heads=num_kv_heads,
        num_slots=num_slots,
        BLOCK_SIZE=block_size,
        num_warps=8,
        **shapes,
    )
