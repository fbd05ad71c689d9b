"""Attention of query rows over a range of keys that ends at each: the window branch, and a prompt's text rows (Triton).

    window    o[t,h] = softmax attention of q[t,h] over tokens max(0, t-w+1) .. t
    text      o[t,h] = softmax attention of q[t,h] over keys 0 .. position(t), with key/value head h // group_size

The window is section 3.3.3 of Native Sparse Attention (arXiv:2502.11089); text rows attend densely. Query rows are
(token, head) pairs in that order: row t * group_size + h of a key/value head. Tiles of rows are cut without regard to
tokens, so any group size fills them, and the heads of a group read every key once. The backward pass computes the
scores twice: dq walks keys as the forward pass does, and dk, dv walk the rows that see a tile of keys. Each output
element has one writer. The window's dq may be taken by selection's kernel (triton_selection.py) instead.

A question of 100 tokens after a video of 128K is 100 rows over 128K keys: one program per tile of rows would be too few
to fill a GPU. There the keys are split between programs, whose partial outputs are merged by their lse (the split of
FlashAttention's decoding, https://crfm.stanford.edu/2023/10/12/flashdecoding.html). Rows may lie anywhere: with
positions, all text rows of a sample, between its images too, are one call. Where torch's own kernel is as good,
`torch_is_as_good` says so; docs/kernel_model.md has the arithmetic. Ahead-of-time compilation: docs/aot.md.
"""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import triton_gates, triton_tiles, utils

tl, triton = triton_tiles.tl, triton_tiles.triton

# No position is further away than this; longer windows would overflow int32 sums.
LONGEST_WINDOW = 1 << 30
# A program that walks fewer keys than this spends more on its partial output than on its keys.
_MIN_KEYS_PER_SPLIT = 512
# Most waves of programs that a split may make of one, to fill the last of them.
_MAX_WAVES = 8
# Programs to aim for without a GPU to ask, in the interpreter: tiny inputs get split as well.
_PROGRAMS_INTERPRETED, _MIN_KEYS_PER_SPLIT_INTERPRETED = 16, 32


@triton.jit
def _bounds(cu_seqlens_q_ptr, cu_seqlens_k_ptr, sequence, total_q, total_k):
    """`sequence_bounds`, or those of all rows and keys where there is one sequence alone and no pointer."""
    if cu_seqlens_q_ptr is None:
        return 0, 0, total_q, total_k
    else:
        return triton_tiles.sequence_bounds(cu_seqlens_q_ptr, cu_seqlens_k_ptr, sequence)


@triton.jit
def _walk_of_rows(
    positions_ptr, start_q, start_row, num_queries, num_keys, window_size, GROUP_SIZE: tl.constexpr, ROWS: tl.constexpr
):
    """What the rows from start_row on see.

    Returns:
        query: [ROWS], their tokens. mask_m: [ROWS], whether there is such a row. last: [ROWS], the last key it sees.
        begin, end: the keys that some row sees. lowest, highest: the least and the greatest `last`.
    """
    query = (start_row + tl.arange(0, ROWS)) // GROUP_SIZE
    mask_m = query < num_queries
    if positions_ptr is None:
        first = num_keys - num_queries
        last = first + query
        lowest = first + start_row // GROUP_SIZE
        highest = first + tl.minimum((start_row + ROWS - 1) // GROUP_SIZE, num_queries - 1)
    else:
        last = tl.load(positions_ptr + start_q + query, mask=mask_m, other=-1).to(tl.int32)
        lowest = tl.min(tl.where(mask_m, last, num_keys), 0)
        highest = tl.max(last, 0)
    begin = 0
    if window_size is not None:
        begin = tl.maximum(lowest - window_size + 1, 0)
    return query, mask_m, last, begin, highest + 1, lowest, highest


@triton.jit
def _hides(key, KEYS: tl.constexpr, lowest, highest, window_size):
    """Whether rows with `last` between lowest and highest include one that does not see all of key .. key + KEYS."""
    hides = key + KEYS > lowest + 1
    if window_size is not None:
        hides = hides | (key <= highest - window_size)
    return hides


@triton.jit(do_not_specialize=["total_q", "total_k"])
def _rows_fwd_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    o_ptr,
    lse_ptr,
    o_cmp_ptr,
    o_slc_ptr,
    g_cmp_ptr,
    g_slc_ptr,
    g_swa_ptr,
    sum_ptr,
    positions_ptr,
    cu_seqlens_q_ptr,
    cu_seqlens_k_ptr,
    stride_qt,
    stride_qh,
    stride_kt,
    stride_kh,
    stride_vt,
    stride_vh,
    stride_g_cmp_t,
    stride_g_cmp_h,
    stride_g_slc_t,
    stride_g_slc_h,
    stride_g_swa_t,
    stride_g_swa_h,
    total_q,
    total_k,
    num_kv_heads,
    window_size,
    softmax_scale,
    GROUP_SIZE: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HEAD_PAD: tl.constexpr,
):
    """o and lse of ROWS query rows over one share of their keys, and the gated sum of all branches.

    Grid: (most row tiles of a sequence, num_kv_heads * batch, splits). Tiles run fastest, so that programs side by side
    walk the same keys. o and lse are (splits, total_q, num_heads, ..).

    Args:
        o_ptr: None where the branch by itself is not needed. sum_ptr: None where there are no other branches; else the
            kernel has the last of them at hand, and adds o_cmp and o_slc to it, each times its gate.
        positions_ptr: None where queries are the last tokens of their sequence.
        window_size: None where rows see everything up to their position.
    """
    kv_head, sequence, split = tl.program_id(1) % num_kv_heads, tl.program_id(1) // num_kv_heads, tl.program_id(2)
    start_row = tl.program_id(0) * ROWS
    start_q, start_k, num_queries, num_keys = _bounds(cu_seqlens_q_ptr, cu_seqlens_k_ptr, sequence, total_q, total_k)
    if start_row < num_queries * GROUP_SIZE:
        query, mask_m, last, begin, end, lowest, highest = _walk_of_rows(
            positions_ptr, start_q, start_row, num_queries, num_keys, window_size, GROUP_SIZE, ROWS
        )
        head = kv_head * GROUP_SIZE + (start_row + tl.arange(0, ROWS)) % GROUP_SIZE
        token = (start_q + query).to(tl.int64)
        # [ROWS, HEAD_PAD]
        q = triton_tiles.load_tile(q_ptr, token * stride_qt + head * stride_qh, mask_m, HEAD_DIM, HEAD_PAD)
        scale_log2 = softmax_scale * triton_tiles.LOG2_E
        k_base = k_ptr + tl.cast(start_k, tl.int64) * stride_kt + kv_head * stride_kh
        v_base = v_ptr + tl.cast(start_k, tl.int64) * stride_vt + kv_head * stride_vh

        # Shares are whole blocks: the next one begins where the last block of this one ends.
        share = tl.cdiv(tl.cdiv(end - begin, tl.num_programs(2)), KEYS) * KEYS
        begin += split * share
        end = tl.minimum(begin + share, end)
        row_max, row_sum, acc = triton_tiles.softmax_start(ROWS, HEAD_PAD)
        for key in range(begin, end, KEYS):
            offs_n = key + tl.arange(0, KEYS)
            offs_row = tl.minimum(offs_n, end - 1).to(tl.int64)
            # [KEYS, HEAD_PAD]
            k = triton_tiles.load_tile(k_base, offs_row * stride_kt, None, HEAD_DIM, HEAD_PAD)
            v = triton_tiles.load_tile(v_base, offs_row * stride_vt, None, HEAD_DIM, HEAD_PAD)
            hides = _hides(key, KEYS, lowest, highest, window_size)
            score = triton_tiles.masked_score(q, k, hides, offs_n, last, window_size)
            row_max, row_sum, acc = triton_tiles.softmax_step(score, scale_log2, row_max, row_sum, acc, v, mask_m)
        o, lse = triton_tiles.softmax_result(row_max, row_sum, acc)
        num_heads = num_kv_heads * GROUP_SIZE
        row_o = (split.to(tl.int64) * total_q + token) * num_heads + head
        tl.store(lse_ptr + row_o, lse, mask=mask_m)
        if o_ptr is not None:
            triton_tiles.store_tile(o_ptr, row_o * HEAD_DIM, mask_m, o, HEAD_DIM, HEAD_PAD)
        if sum_ptr is not None:
            g_cmp = tl.load(g_cmp_ptr + token * stride_g_cmp_t + head * stride_g_cmp_h, mask=mask_m, other=0.0)
            g_slc = tl.load(g_slc_ptr + token * stride_g_slc_t + head * stride_g_slc_h, mask=mask_m, other=0.0)
            g_swa = tl.load(g_swa_ptr + token * stride_g_swa_t + head * stride_g_swa_h, mask=mask_m, other=0.0)
            o_cmp = triton_tiles.load_tile(o_cmp_ptr, row_o * HEAD_DIM, mask_m, HEAD_DIM, HEAD_PAD)
            o_slc = triton_tiles.load_tile(o_slc_ptr, row_o * HEAD_DIM, mask_m, HEAD_DIM, HEAD_PAD)
            total = g_cmp.to(tl.float32)[:, None] * o_cmp.to(tl.float32)
            total += g_slc.to(tl.float32)[:, None] * o_slc.to(tl.float32)
            # Rounded like the other two, whether it is kept or not: gradients or none, the sum is the same.
            total += g_swa.to(tl.float32)[:, None] * o.to(sum_ptr.dtype.element_ty).to(tl.float32)
            triton_tiles.store_tile(sum_ptr, row_o * HEAD_DIM, mask_m, total, HEAD_DIM, HEAD_PAD)


@triton.jit(do_not_specialize=["num_outputs", "num_splits"])
def _merge_kernel(
    o_part_ptr,
    lse_part_ptr,
    o_ptr,
    lse_ptr,
    num_outputs,
    num_splits,
    HEAD_DIM: tl.constexpr,
    HEAD_PAD: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Weighted mean of the partial outputs. Grid: (num_outputs / ROWS,), outputs being rows x heads."""
    offs_m = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    mask_m = offs_m < num_outputs
    # The first share of keys is never empty: the maximum is finite.
    lse_max = tl.full([ROWS], float("-inf"), tl.float32)
    offs = offs_m
    for _ in range(num_splits):
        lse_max = tl.maximum(lse_max, tl.load(lse_part_ptr + offs, mask=mask_m, other=0.0))
        offs += num_outputs
    total = tl.zeros([ROWS], tl.float32)
    acc = tl.zeros([ROWS, HEAD_PAD], tl.float32)
    offs = offs_m
    for _ in range(num_splits):
        weight = tl.load(lse_part_ptr + offs, mask=mask_m, other=0.0) - lse_max
        weight = tl.exp2(weight * triton_tiles.LOG2_E)
        # [ROWS, HEAD_PAD]
        acc += triton_tiles.load_tile(o_part_ptr, offs * HEAD_DIM, mask_m, HEAD_DIM, HEAD_PAD) * weight[:, None]
        total += weight
        offs += num_outputs
    triton_tiles.store_tile(o_ptr, offs_m * HEAD_DIM, mask_m, acc / total[:, None], HEAD_DIM, HEAD_PAD)
    tl.store(lse_ptr + offs_m, lse_max + tl.log2(total) * triton_tiles.LN_2, mask=mask_m)


@triton.jit
def add_dq_of_keys(
    q, do, lse_log2, delta, dq, scale_log2, k_base, v_base, stride_kt, stride_vt, begin, end, last, lowest, highest,
    window_size, KEYS: tl.constexpr, HEAD_DIM: tl.constexpr, HEAD_PAD: tl.constexpr,
):  # fmt: skip
    """dq / softmax_scale with keys begin .. end - 1 added; rows as in `triton_tiles.dq_step` and `_walk_of_rows`."""
    for key in range(begin, end, KEYS):
        offs_n = key + tl.arange(0, KEYS)
        offs_row = tl.minimum(offs_n, end - 1).to(tl.int64)
        # [KEYS, HEAD_PAD]
        k = triton_tiles.load_tile(k_base, offs_row * stride_kt, None, HEAD_DIM, HEAD_PAD)
        v = triton_tiles.load_tile(v_base, offs_row * stride_vt, None, HEAD_DIM, HEAD_PAD)
        hides = _hides(key, KEYS, lowest, highest, window_size)
        dq = triton_tiles.dq_step(
            q, k, v, do, lse_log2, delta, dq, scale_log2, hides, offs_n, last, window_size
        )  # fmt: skip
    return dq


@triton.jit(do_not_specialize=["total_q", "total_k"])
def _rows_bwd_dq_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    do_ptr,
    lse_delta_ptr,
    dq_ptr,
    positions_ptr,
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
    total_q,
    total_k,
    num_kv_heads,
    window_size,
    softmax_scale,
    GROUP_SIZE: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HEAD_PAD: tl.constexpr,
):
    """dq of ROWS query rows over one share of their keys. Grid, walk and None: those of the forward kernel."""
    kv_head, sequence, split = tl.program_id(1) % num_kv_heads, tl.program_id(1) // num_kv_heads, tl.program_id(2)
    start_row = tl.program_id(0) * ROWS
    start_q, start_k, num_queries, num_keys = _bounds(cu_seqlens_q_ptr, cu_seqlens_k_ptr, sequence, total_q, total_k)
    if start_row < num_queries * GROUP_SIZE:
        query, mask_m, last, begin, end, lowest, highest = _walk_of_rows(
            positions_ptr, start_q, start_row, num_queries, num_keys, window_size, GROUP_SIZE, ROWS
        )
        head = kv_head * GROUP_SIZE + (start_row + tl.arange(0, ROWS)) % GROUP_SIZE
        token = (start_q + query).to(tl.int64)
        num_heads = num_kv_heads * GROUP_SIZE
        # [ROWS, HEAD_PAD]
        q = triton_tiles.load_tile(q_ptr, token * stride_qt + head * stride_qh, mask_m, HEAD_DIM, HEAD_PAD)
        do = triton_tiles.load_tile(do_ptr, token * stride_dot + head * stride_doh, mask_m, HEAD_DIM, HEAD_PAD)
        lse_log2, delta = triton_tiles.load_lse_delta(lse_delta_ptr, token * num_heads + head, mask_m)
        scale_log2 = softmax_scale * triton_tiles.LOG2_E
        k_base = k_ptr + tl.cast(start_k, tl.int64) * stride_kt + kv_head * stride_kh
        v_base = v_ptr + tl.cast(start_k, tl.int64) * stride_vt + kv_head * stride_vh

        share = tl.cdiv(tl.cdiv(end - begin, tl.num_programs(2)), KEYS) * KEYS
        begin += split * share
        end = tl.minimum(begin + share, end)
        dq = add_dq_of_keys(
            q, do, lse_log2, delta, tl.zeros([ROWS, HEAD_PAD], tl.float32), scale_log2, k_base, v_base, stride_kt,
            stride_vt, begin, end, last, lowest, highest, window_size, KEYS, HEAD_DIM, HEAD_PAD,
        )  # fmt: skip
        offs_dq = ((split.to(tl.int64) * total_q + token) * num_heads + head) * HEAD_DIM
        triton_tiles.store_tile(dq_ptr, offs_dq, mask_m, dq * softmax_scale, HEAD_DIM, HEAD_PAD)


@triton.jit(do_not_specialize=["total_q", "total_k"])
def _rows_bwd_dkv_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    do_ptr,
    lse_delta_ptr,
    dk_ptr,
    dv_ptr,
    positions_ptr,
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
    total_q,
    total_k,
    num_kv_heads,
    window_size,
    softmax_scale,
    GROUP_SIZE: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HEAD_PAD: tl.constexpr,
):
    """dk and dv of KEYS keys. Grid: (most key tiles of a sequence, num_kv_heads * batch).

    Walks the query rows that see one of the keys: (KEYS + window_size - 1) * GROUP_SIZE of them, each read by
    1 + window_size / KEYS programs, or all after the keys.
    """
    kv_head, sequence = tl.program_id(1) % num_kv_heads, tl.program_id(1) // num_kv_heads
    start_key = tl.program_id(0) * KEYS
    start_q, start_k, num_queries, num_keys = _bounds(cu_seqlens_q_ptr, cu_seqlens_k_ptr, sequence, total_q, total_k)
    if start_key < num_keys:
        num_heads = num_kv_heads * GROUP_SIZE
        offs_n = start_key + tl.arange(0, KEYS)
        mask_n = offs_n < num_keys
        row_k = (start_k + offs_n).to(tl.int64)
        # [KEYS, HEAD_PAD]
        k = triton_tiles.load_tile(k_ptr, row_k * stride_kt + kv_head * stride_kh, mask_n, HEAD_DIM, HEAD_PAD)
        v = triton_tiles.load_tile(v_ptr, row_k * stride_vt + kv_head * stride_vh, mask_n, HEAD_DIM, HEAD_PAD)
        q_base = q_ptr + tl.cast(start_q, tl.int64) * stride_qt + kv_head * GROUP_SIZE * stride_qh
        do_base = do_ptr + tl.cast(start_q, tl.int64) * stride_dot + kv_head * GROUP_SIZE * stride_doh
        lse_delta_base = lse_delta_ptr + tl.cast(start_q, tl.int64) * num_heads + kv_head * GROUP_SIZE
        scale_log2 = softmax_scale * triton_tiles.LOG2_E

        # Queries are ordered by position: how many see none of the keys, and how many do not see all of them.
        if positions_ptr is None:
            num_blind = tl.maximum(start_key - (num_keys - num_queries), 0)
            num_partial = start_key + KEYS - 1 - (num_keys - num_queries)
        else:
            num_blind = 0
            num_partial = 0
            for start in range(0, num_queries, 128):
                offs_t = start + tl.arange(0, 128)
                position = tl.load(positions_ptr + start_q + offs_t, mask=offs_t < num_queries, other=0x7FFFFFFF)
                num_blind += tl.sum((position < start_key).to(tl.int32), 0)
                num_partial += tl.sum((position < start_key + KEYS - 1).to(tl.int32), 0)
        end_query = num_queries
        if window_size is not None:
            end_query = tl.minimum(num_queries, start_key + KEYS - 1 + window_size - (num_keys - num_queries))
        end_row = tl.maximum(end_query, 0) * GROUP_SIZE

        dk = tl.zeros([KEYS, HEAD_PAD], tl.float32)
        dv = tl.zeros([KEYS, HEAD_PAD], tl.float32)
        for row in range(num_blind * GROUP_SIZE, end_row, ROWS):
            offs_m = row + tl.arange(0, ROWS)
            mask_m = offs_m < end_row
            query = tl.minimum(offs_m // GROUP_SIZE, num_queries - 1)
            head = offs_m % GROUP_SIZE
            offs_t = query.to(tl.int64)
            # [ROWS, HEAD_PAD]
            q = triton_tiles.load_tile(q_base, offs_t * stride_qt + head * stride_qh, None, HEAD_DIM, HEAD_PAD)
            do = triton_tiles.load_tile(do_base, offs_t * stride_dot + head * stride_doh, None, HEAD_DIM, HEAD_PAD)
            lse_log2, delta = triton_tiles.load_lse_delta(lse_delta_base, offs_t * num_heads + head, mask_m)
            hides = row < num_partial * GROUP_SIZE
            if positions_ptr is None:
                # Of offs_m's tokens anew: kept until the mask, the numbers above would be spilled.
                last = num_keys - num_queries + (row + tl.arange(0, ROWS)) // GROUP_SIZE
            else:
                last = tl.load(positions_ptr + start_q + query, mask=mask_m, other=-1).to(tl.int32)
            if window_size is not None:
                highest = num_keys - num_queries + (row + ROWS - 1) // GROUP_SIZE
                hides = hides | (start_key <= highest - window_size)
            dk, dv = triton_tiles.dkv_step(
                q, k, v, do, lse_log2, delta, dk, dv, scale_log2, hides, offs_n, last, window_size
            )
        offs_out = (row_k * num_kv_heads + kv_head) * HEAD_DIM
        triton_tiles.store_tile(dk_ptr, offs_out, mask_n, dk * softmax_scale, HEAD_DIM, HEAD_PAD)
        triton_tiles.store_tile(dv_ptr, offs_out, mask_n, dv, HEAD_DIM, HEAD_PAD)


def backward_config(q: Tensor, group_size: int) -> tuple[dict, dict]:
    """Constexprs and launch options of the dq kernel and of the dk, dv kernel."""
    # q and do alone take two thirds of the shared memory of smaller GPUs.
    dq = triton_tiles.walk_extents(q, num_stages=2 if triton_tiles.is_small(q.device) else None)
    dkv = triton_tiles.dkv_extents(q, num_stages=2)
    return {"GROUP_SIZE": group_size, **dq}, {"GROUP_SIZE": group_size, **dkv}


def _arguments(q, k, v, cu_seqlens_q, cu_seqlens_k, positions, window_size, softmax_scale) -> dict:
    """The arguments that all kernels share."""
    return {
        "q_ptr": q,
        "k_ptr": k,
        "v_ptr": v,
        "positions_ptr": positions,
        "cu_seqlens_q_ptr": cu_seqlens_q,
        "cu_seqlens_k_ptr": cu_seqlens_k,
        **triton_tiles.strides(q=q, k=k, v=v),
        "total_q": q.shape[0],
        "total_k": k.shape[0],
        "num_kv_heads": k.shape[1],
        "window_size": window_size,
        "softmax_scale": softmax_scale,
    }


def _window_arguments(q, k, v, lengths, window_size, softmax_scale) -> dict:
    window_size = min(window_size, LONGEST_WINDOW)
    return _arguments(q, k, v, lengths.cu_seqlens_q, lengths.cu_seqlens_k, None, window_size, softmax_scale)


# The forward kernel's arguments for the gated sum, where it takes none.
_NO_SUM = dict.fromkeys(("o_cmp_ptr", "o_slc_ptr", "g_cmp_ptr", "g_slc_ptr", "g_swa_ptr", "sum_ptr")) | {
    f"stride_g_{name}_{axis}": 0 for name in ("cmp", "slc", "swa") for axis in "th"
}


def window_fwd(
    q: Tensor, k: Tensor, v: Tensor, lengths: utils.SequenceLengths, window_size: int, softmax_scale: float
) -> tuple[Tensor, Tensor]:
    """Causal attention of every query over its last window_size tokens, itself included.

    Args:
        q: (total_q, num_heads, head_dim), fp16, bf16 or fp32.
        k, v: (total_k, num_kv_heads, head_dim), like q.
    Returns:
        o: like q, contiguous. lse: (total_q, num_heads), fp32, natural log.
    """
    o = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    return o, _window(q, k, v, lengths, window_size, softmax_scale, o_ptr=o, **_NO_SUM)


def window_and_sum(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    o_cmp: Tensor,
    o_slc: Tensor,
    gates: tuple[Tensor, Tensor, Tensor],
    lengths: utils.SequenceLengths,
    window_size: int,
    softmax_scale: float,
    save: bool,
) -> tuple[Tensor, Tensor | None, Tensor]:
    """`window_fwd`, and the sum of all three branches times their gates.

    Args:
        o_cmp, o_slc: like q, contiguous: the other branches.
        gates: (total_q, num_heads) each, of compression, selection and window.
        save: whether the window branch by itself is wanted as well.
    Returns:
        o: the sum, like q, contiguous; o_swa, or None; lse of the window, (total_q, num_heads), fp32.
    """
    o = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    o_swa = torch.empty_like(o) if save else None
    others = {"o_cmp_ptr": o_cmp, "o_slc_ptr": o_slc, "sum_ptr": o, **triton_gates.gate_arguments(gates)}
    lse = _window(q, k, v, lengths, window_size, softmax_scale, o_ptr=o_swa, **others)
    return o, o_swa, lse


def _window(q, k, v, lengths, window_size, softmax_scale, **outputs) -> Tensor:
    q, k, v = (triton_tiles.addressable(x) for x in (q, k, v))
    q, softmax_scale = utils.positive_scale(q, softmax_scale)
    lse = torch.empty(q.shape[:2], dtype=torch.float32, device=q.device)
    group_size, batch = q.shape[1] // k.shape[1], len(lengths.offsets_q) - 1
    config = triton_tiles.walk_extents(q, triton_tiles.tuning.window_rows)
    num_rows = triton_tiles.longest(lengths.offsets_q) * group_size
    triton_tiles.launch(
        _rows_fwd_kernel,
        (triton_tiles.cdiv(num_rows, config["ROWS"]), k.shape[1] * batch, 1),
        lse_ptr=lse,
        **outputs,
        **_window_arguments(q, k, v, lengths, window_size, softmax_scale),
        GROUP_SIZE=group_size,
        **config,
    )
    return lse


def window_bwd(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lse_delta: Tensor,
    do: Tensor,
    lengths: utils.SequenceLengths,
    window_size: int,
    softmax_scale: float,
    wants_dq: bool = True,
) -> tuple[Tensor | None, Tensor, Tensor]:
    """Gradients of the window branch; the same inputs give the same bits.

    Args:
        lse_delta: (total_q, num_heads, 2), fp32, as of `triton_tiles.lse_and_delta`.
        do: like q.
        wants_dq: False where `triton_selection.selection_bwd` has it.
    Returns:
        dq: like q, contiguous, or None; dk, dv: (total_k, num_kv_heads, head_dim), fp32.
    """
    q, k, v, do = (triton_tiles.addressable(x) for x in (q, k, v, do))
    num_kv_heads, batch = k.shape[1], len(lengths.offsets_q) - 1
    dq = torch.empty(q.shape, dtype=q.dtype, device=q.device) if wants_dq else None
    dk, dv = (torch.empty(k.shape, dtype=torch.float32, device=k.device) for _ in range(2))
    dq_config, dkv_config = backward_config(q, q.shape[1] // num_kv_heads)
    shared = {
        "do_ptr": do,
        "lse_delta_ptr": triton_tiles.pairs(lse_delta),
        **triton_tiles.strides(do=do),
        **_window_arguments(q, k, v, lengths, window_size, softmax_scale),
    }
    if wants_dq:
        num_rows = triton_tiles.longest(lengths.offsets_q) * dq_config["GROUP_SIZE"]
        row_tiles = triton_tiles.cdiv(num_rows, dq_config["ROWS"])
        triton_tiles.launch(
            _rows_bwd_dq_kernel, (row_tiles, num_kv_heads * batch, 1), dq_ptr=dq, **shared, **dq_config
        )  # fmt: skip
    key_tiles = triton_tiles.cdiv(triton_tiles.longest(lengths.offsets_k), dkv_config["KEYS"])
    triton_tiles.launch(
        _rows_bwd_dkv_kernel, (key_tiles, num_kv_heads * batch), dk_ptr=dk, dv_ptr=dv, **shared, **dkv_config
    )
    return dq, dk, dv


def text_config(q: Tensor, num_rows: int, group_size: int) -> dict:
    """Constexprs and launch options of the forward kernel: tiles as small as the rows, up to 128."""
    rows = min(128, triton_tiles.pad(num_rows * group_size))
    return {"GROUP_SIZE": group_size, **triton_tiles.walk_extents(q, rows)}


def num_splits(num_tiles: int, num_keys: int, num_programs: int, min_keys: int = _MIN_KEYS_PER_SPLIT) -> int:
    """Into how many shares the keys of every tile are split.

    The fewest that leave at most an eighth of the last wave of programs idle, or come closest to it.

    Args:
        num_tiles: programs without a split: row tiles x key/value heads.
        num_programs: programs that run at once.
    """
    best, best_filled = 1, 0.0
    for splits in range(1, max(1, min(num_keys // min_keys, _MAX_WAVES * num_programs // num_tiles)) + 1):
        waves = num_tiles * splits / num_programs
        filled = waves / -(-num_tiles * splits // num_programs)
        if filled > best_filled + 1e-9:
            best, best_filled = splits, filled
        if filled >= 0.875:
            break
    return best


def torch_is_as_good(num_rows: int, num_keys: int) -> bool:
    """Whether torch's causal scaled_dot_product_attention does a run as fast as `text_rows_attention`.

    True for a run at the start of its sample, where rows and keys are the same tokens: there is nothing to split (the
    rows alone fill the GPU, or the whole call is a launch), and torch may take cuDNN's kernel. Every other run would
    need a mask there, which excludes its fast kernels, or FlashAttention 2 with the group's heads apart.
    """
    return num_rows == num_keys


def _splits(device: torch.device, num_tiles: int, num_keys: int, num_warps: int) -> int:
    if device.type != "cuda":
        return num_splits(num_tiles, num_keys, _PROGRAMS_INTERPRETED, _MIN_KEYS_PER_SPLIT_INTERPRETED)
    programs = torch.cuda.get_device_properties(device).multi_processor_count * (8 // num_warps)
    return num_splits(num_tiles, num_keys, programs)


def text_rows_fwd(
    q: Tensor, k: Tensor, v: Tensor, softmax_scale: float, positions: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """o like q, and lse (rows, num_heads), fp32, natural log; arguments as those of `text_rows_attention`."""
    (rows, heads, head_dim), (keys, kv_heads, _) = q.shape, k.shape
    q, softmax_scale = utils.positive_scale(q, softmax_scale)
    config = text_config(q, rows, heads // kv_heads)
    tiles = triton_tiles.cdiv(rows * (heads // kv_heads), config["ROWS"])
    splits = _splits(q.device, tiles * kv_heads, keys, config["num_warps"])
    o = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    lse = torch.empty(rows, heads, dtype=torch.float32, device=q.device)
    is_split = splits > 1
    o_part = q.new_empty(splits, *q.shape, dtype=torch.float32) if is_split else o
    lse_part = lse.new_empty(splits, *lse.shape) if is_split else lse
    triton_tiles.launch(
        _rows_fwd_kernel,
        (tiles, kv_heads, splits),
        o_ptr=o_part,
        lse_ptr=lse_part,
        **_NO_SUM,
        **_arguments(q, k, v, None, None, positions, None, softmax_scale),
        **config,
    )
    if is_split:
        triton_tiles.launch(
            _merge_kernel,
            (triton_tiles.cdiv(rows * heads, 8),),
            o_part_ptr=o_part,
            lse_part_ptr=lse_part,
            o_ptr=o,
            lse_ptr=lse,
            num_outputs=rows * heads,
            num_splits=splits,
            HEAD_DIM=head_dim,
            HEAD_PAD=config["HEAD_PAD"],
            ROWS=8,
            num_warps=4,
        )
    return o, lse


def text_rows_bwd(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    o: Tensor,
    lse: Tensor,
    do: Tensor,
    softmax_scale: float,
    positions: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """dq, dk, dv like q, k, v; do like q, contiguous in its last dimension. No atomics: repeated runs agree."""
    (rows, heads, _), (keys, kv_heads, _) = q.shape, k.shape
    config, dkv_config = backward_config(q, heads // kv_heads)
    dq = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    dk, dv = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (k, v))
    arguments = {
        **_arguments(q, k, v, None, None, positions, None, softmax_scale),
        "do_ptr": do,
        **triton_tiles.strides(do=do),
        "lse_delta_ptr": triton_tiles.pairs(triton_tiles.lse_and_delta(lse, (o.float() * do.float()).sum(-1))),
    }
    tiles = triton_tiles.cdiv(rows * (heads // kv_heads), config["ROWS"])
    splits = _splits(q.device, tiles * kv_heads, keys, config["num_warps"])
    dq_part = q.new_empty(splits, *q.shape, dtype=torch.float32) if splits > 1 else dq
    triton_tiles.launch(_rows_bwd_dq_kernel, (tiles, kv_heads, splits), dq_ptr=dq_part, **arguments, **config)
    if splits > 1:
        dq.copy_(dq_part.sum(0))
    key_tiles = triton_tiles.cdiv(keys, dkv_config["KEYS"])
    triton_tiles.launch(
        _rows_bwd_dkv_kernel, (key_tiles, kv_heads), dk_ptr=dk, dv_ptr=dv, **arguments, **dkv_config
    )  # fmt: skip
    return dq, dk, dv


class _TextRowsFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, softmax_scale, positions):
        o, lse = text_rows_fwd(q, k, v, softmax_scale, positions)
        ctx.save_for_backward(q, k, v, o, lse, positions)
        ctx.softmax_scale = softmax_scale
        return o

    @staticmethod
    @once_differentiable
    @utils.backward_without_autocast
    def backward(ctx, do):
        q, k, v, o, lse, positions = ctx.saved_tensors
        return *text_rows_bwd(q, k, v, o, lse, triton_tiles.addressable(do), ctx.softmax_scale, positions), None, None


@torch.compiler.disable
def text_rows_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    softmax_scale: float | None = None,
    positions: Tensor | None = None,
) -> Tensor:
    """Dense causal attention of some rows of a sample over its keys; differentiable in q, k and v.

    Args:
        q: (rows, num_heads, head_dim), fp16, bf16 or fp32: without `positions` the sample's last tokens.
        k, v: (keys, num_kv_heads, head_dim), like q; query head h reads key/value head h // group_size.
        softmax_scale: defaults to head_dim**-0.5.
        positions: (rows,), int32 or int64, ascending, each at least 0 and less than `keys`: row i sees keys
            0 .. positions[i]. Not checked: reading them would wait for the device.
    Returns:
        o: like q.
    Raises:
        ValueError: an argument has a wrong shape or dtype, or there are more rows than keys.
    """
    utils.check_qkv(q, k, v, utils.SequenceLengths.from_lengths([q.shape[0]], [k.shape[0]]))
    utils.check_positions(positions, q)
    return text_rows_of_checked(q, k, v, utils.resolve_scale(softmax_scale, q.shape[2]), positions)


def text_rows_of_checked(q: Tensor, k: Tensor, v: Tensor, softmax_scale: float, positions: Tensor | None) -> Tensor:
    """`text_rows_attention` of arguments that were checked, but for what no kernel here takes."""
    triton_tiles.check_supported(q)
    if not q.shape[0]:
        return torch.empty_like(q)
    positions = None if positions is None else positions.contiguous()
    q, k, v = map(triton_tiles.addressable, (q, k, v))
    with utils.no_autocast(q.device), triton_tiles.current_device(q):
        return _TextRowsFunction.apply(q, k, v, softmax_scale, positions)
