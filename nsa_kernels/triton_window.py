"""Window branch: attention over the last window_size tokens, the query itself included (Triton backend).

    o[t,h] = softmax attention of q[t,h] over tokens max(0, t-w+1) .. t

Native Sparse Attention (arXiv:2502.11089), section 3.3.3. Query rows are (token, head) pairs in that order: row
t * group_size + h of a key/value head. Tiles of rows are cut without regard to tokens, so any group size fills them,
and the heads of a group read every key once. The backward pass computes the scores twice: dq walks keys as the
forward pass does, and dk, dv walk the rows that see a tile of keys. Each output element has one writer.
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

# No position is further away than this; longer windows would overflow int32 sums.
_LONGEST_WINDOW = 1 << 30


@triton.jit
def _window_fwd_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    o_ptr,
    lse_ptr,
    cu_seqlens_q_ptr,
    cu_seqlens_k_ptr,
    stride_qt,
    stride_qh,
    stride_kt,
    stride_kh,
    stride_vt,
    stride_vh,
    num_heads,
    window_size,
    softmax_scale,
    GROUP_SIZE: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HEAD_PAD: tl.constexpr,
):
    """o and lse of ROWS query rows. Grid: (most row tiles of a sequence, num_kv_heads, batch).

    Walks window_size + ROWS / GROUP_SIZE keys, each read from the L2 cache.
    """
    kv_head, sequence = tl.program_id(1), tl.program_id(2)
    start_row = tl.program_id(0) * ROWS
    start_q, start_k, num_queries, num_keys = triton_tiles.sequence_bounds(cu_seqlens_q_ptr, cu_seqlens_k_ptr, sequence)
    if start_row < num_queries * GROUP_SIZE:
        first = num_keys - num_queries
        offs_m = start_row + tl.arange(0, ROWS)
        offs_d = tl.arange(0, HEAD_PAD)
        mask_d = offs_d < HEAD_DIM
        mask_m = offs_m < num_queries * GROUP_SIZE
        mask_q = mask_m[:, None] & mask_d[None, :]
        position = first + offs_m // GROUP_SIZE
        head = kv_head * GROUP_SIZE + offs_m % GROUP_SIZE
        token = (start_q + offs_m // GROUP_SIZE).to(tl.int64)
        offs_q = token * stride_qt + head * stride_qh
        # [ROWS, HEAD_PAD]
        q = tl.load(q_ptr + offs_q[:, None] + offs_d[None, :], mask=mask_q, other=0.0)
        scale_log2 = softmax_scale * _LOG2_E
        k_base = k_ptr + start_k.to(tl.int64) * stride_kt + kv_head * stride_kh
        v_base = v_ptr + start_k.to(tl.int64) * stride_vt + kv_head * stride_vh

        row_max, row_sum, acc = triton_tiles.softmax_start(ROWS, HEAD_PAD)
        end = first + tl.minimum((start_row + ROWS - 1) // GROUP_SIZE + 1, num_queries)
        for key in range(tl.maximum(first + start_row // GROUP_SIZE - window_size + 1, 0), end, KEYS):
            offs_n = key + tl.arange(0, KEYS)
            mask_n = (offs_n < end)[:, None] & mask_d[None, :]
            offs_row = offs_n.to(tl.int64)[:, None]
            # [KEYS, HEAD_PAD]
            k = tl.load(k_base + offs_row * stride_kt + offs_d[None, :], mask=mask_n, other=0.0)
            v = tl.load(v_base + offs_row * stride_vt + offs_d[None, :], mask=mask_n, other=0.0)
            score = tl.dot(q, tl.trans(k), input_precision="ieee")
            inside = (offs_n[None, :] <= position[:, None]) & (offs_n[None, :] > (position - window_size)[:, None])
            score = tl.where(inside, score, float("-inf"))
            row_max, row_sum, acc = triton_tiles.softmax_step(score, scale_log2, row_max, row_sum, acc, v, mask_m)
        row_o = token * num_heads + head
        o, lse = triton_tiles.softmax_result(row_max, row_sum, acc)
        tl.store(o_ptr + row_o[:, None] * HEAD_DIM + offs_d[None, :], o.to(o_ptr.dtype.element_ty), mask=mask_q)
        tl.store(lse_ptr + row_o, lse, mask=mask_m)


@triton.jit
def _window_bwd_dq_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    do_ptr,
    lse_ptr,
    delta_ptr,
    dq_ptr,
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
    num_heads,
    window_size,
    softmax_scale,
    GROUP_SIZE: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HEAD_PAD: tl.constexpr,
):
    """dq of ROWS query rows. Grid and walk: those of the forward kernel."""
    kv_head, sequence = tl.program_id(1), tl.program_id(2)
    start_row = tl.program_id(0) * ROWS
    start_q, start_k, num_queries, num_keys = triton_tiles.sequence_bounds(cu_seqlens_q_ptr, cu_seqlens_k_ptr, sequence)
    if start_row < num_queries * GROUP_SIZE:
        first = num_keys - num_queries
        offs_m = start_row + tl.arange(0, ROWS)
        offs_d = tl.arange(0, HEAD_PAD)
        mask_d = offs_d < HEAD_DIM
        mask_m = offs_m < num_queries * GROUP_SIZE
        mask_q = mask_m[:, None] & mask_d[None, :]
        position = first + offs_m // GROUP_SIZE
        head = kv_head * GROUP_SIZE + offs_m % GROUP_SIZE
        token = (start_q + offs_m // GROUP_SIZE).to(tl.int64)
        offs_q = token * stride_qt + head * stride_qh
        offs_do = token * stride_dot + head * stride_doh
        row_o = token * num_heads + head
        # [ROWS, HEAD_PAD]
        q = tl.load(q_ptr + offs_q[:, None] + offs_d[None, :], mask=mask_q, other=0.0)
        do = tl.load(do_ptr + offs_do[:, None] + offs_d[None, :], mask=mask_q, other=0.0)
        lse_log2 = tl.load(lse_ptr + row_o, mask=mask_m, other=float("inf")) * _LOG2_E
        delta = tl.load(delta_ptr + row_o, mask=mask_m, other=0.0)
        k_base = k_ptr + start_k.to(tl.int64) * stride_kt + kv_head * stride_kh
        v_base = v_ptr + start_k.to(tl.int64) * stride_vt + kv_head * stride_vh
        scale_log2 = softmax_scale * _LOG2_E

        dq = tl.zeros([ROWS, HEAD_PAD], tl.float32)
        end = first + tl.minimum((start_row + ROWS - 1) // GROUP_SIZE + 1, num_queries)
        for key in range(tl.maximum(first + start_row // GROUP_SIZE - window_size + 1, 0), end, KEYS):
            offs_n = key + tl.arange(0, KEYS)
            mask_n = (offs_n < end)[:, None] & mask_d[None, :]
            offs_row = offs_n.to(tl.int64)[:, None]
            # [KEYS, HEAD_PAD]
            k = tl.load(k_base + offs_row * stride_kt + offs_d[None, :], mask=mask_n, other=0.0)
            v = tl.load(v_base + offs_row * stride_vt + offs_d[None, :], mask=mask_n, other=0.0)
            inside = (offs_n[None, :] <= position[:, None]) & (offs_n[None, :] > (position - window_size)[:, None])
            dq = triton_tiles.dq_step(q, k, v, do, lse_log2, delta, dq, scale_log2, inside, MASKED=True)
        dq *= softmax_scale
        tl.store(dq_ptr + row_o[:, None] * HEAD_DIM + offs_d[None, :], dq.to(dq_ptr.dtype.element_ty), mask=mask_q)


@triton.jit
def _window_bwd_dkv_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    do_ptr,
    lse_ptr,
    delta_ptr,
    dk_ptr,
    dv_ptr,
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
    num_heads,
    num_kv_heads,
    window_size,
    softmax_scale,
    GROUP_SIZE: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HEAD_PAD: tl.constexpr,
):
    """dk and dv of KEYS keys. Grid: (most key tiles of a sequence, num_kv_heads, batch).

    Walks the (KEYS + window_size - 1) * GROUP_SIZE query rows that see one of the keys; each is read by
    1 + window_size / KEYS programs.
    """
    kv_head, sequence = tl.program_id(1), tl.program_id(2)
    start_key = tl.program_id(0) * KEYS
    start_q, start_k, num_queries, num_keys = triton_tiles.sequence_bounds(cu_seqlens_q_ptr, cu_seqlens_k_ptr, sequence)
    if start_key < num_keys:
        first = num_keys - num_queries
        offs_n = start_key + tl.arange(0, KEYS)
        offs_d = tl.arange(0, HEAD_PAD)
        mask_d = offs_d < HEAD_DIM
        mask_n = (offs_n < num_keys)[:, None] & mask_d[None, :]
        row_k = (start_k + offs_n).to(tl.int64)
        # [KEYS, HEAD_PAD]
        k = tl.load(k_ptr + row_k[:, None] * stride_kt + kv_head * stride_kh + offs_d[None, :], mask=mask_n, other=0.0)
        v = tl.load(v_ptr + row_k[:, None] * stride_vt + kv_head * stride_vh + offs_d[None, :], mask=mask_n, other=0.0)
        q_base = q_ptr + start_q.to(tl.int64) * stride_qt + kv_head * GROUP_SIZE * stride_qh
        do_base = do_ptr + start_q.to(tl.int64) * stride_dot + kv_head * GROUP_SIZE * stride_doh
        lse_base = lse_ptr + start_q.to(tl.int64) * num_heads + kv_head * GROUP_SIZE
        delta_base = delta_ptr + start_q.to(tl.int64) * num_heads + kv_head * GROUP_SIZE
        scale_log2 = softmax_scale * _LOG2_E

        dk = tl.zeros([KEYS, HEAD_PAD], tl.float32)
        dv = tl.zeros([KEYS, HEAD_PAD], tl.float32)
        first_row = tl.maximum(start_key - first, 0) * GROUP_SIZE
        end_row = tl.maximum(tl.minimum(start_key + KEYS - 1 + window_size - first, num_queries), 0) * GROUP_SIZE
        for row in range(first_row, end_row, ROWS):
            offs_m = row + tl.arange(0, ROWS)
            mask_m = offs_m < end_row
            mask_q = mask_m[:, None] & mask_d[None, :]
            query = offs_m // GROUP_SIZE
            head = offs_m % GROUP_SIZE
            offs_q = query.to(tl.int64) * stride_qt + head * stride_qh
            offs_do = query.to(tl.int64) * stride_dot + head * stride_doh
            offs_lse = query.to(tl.int64) * num_heads + head
            # [ROWS, HEAD_PAD]
            q = tl.load(q_base + offs_q[:, None] + offs_d[None, :], mask=mask_q, other=0.0)
            do = tl.load(do_base + offs_do[:, None] + offs_d[None, :], mask=mask_q, other=0.0)
            # With an infinite lse the probabilities of rows past the end are 0.
            lse_log2 = tl.load(lse_base + offs_lse, mask=mask_m, other=float("inf")) * _LOG2_E
            delta = tl.load(delta_base + offs_lse, mask=mask_m, other=0.0)
            position = first + query
            # [KEYS, ROWS]
            inside = (offs_n[:, None] <= position[None, :]) & (offs_n[:, None] > (position - window_size)[None, :])
            dk, dv = triton_tiles.dkv_step(q, k, v, do, lse_log2, delta, dk, dv, scale_log2, inside)
        offs_out = (row_k * num_kv_heads + kv_head)[:, None] * HEAD_DIM + offs_d[None, :]
        tl.store(dk_ptr + offs_out, dk * softmax_scale, mask=mask_n)
        tl.store(dv_ptr + offs_out, dv, mask=mask_n)


def forward_config(q: Tensor, group_size: int) -> dict:
    """Constexprs and launch options of the forward kernel."""
    return {"GROUP_SIZE": group_size, **triton_tiles.walk_extents(q)}


def backward_config(q: Tensor, group_size: int) -> tuple[dict, dict]:
    """Constexprs and launch options of the dq kernel and of the dk, dv kernel."""
    # Hopper's MMA gives 16 rows of keys to a warp: with more than four for 64 keys, warps would repeat each other.
    dkv = triton_tiles.extents(q, 32, 64, num_warps=4, num_stages=2)
    return {"GROUP_SIZE": group_size, **triton_tiles.walk_extents(q)}, {"GROUP_SIZE": group_size, **dkv}


def _arguments(q: Tensor, k: Tensor, v: Tensor, lengths: utils.SequenceLengths, window_size: int) -> dict:
    return {
        "q_ptr": q,
        "k_ptr": k,
        "v_ptr": v,
        "cu_seqlens_q_ptr": lengths.cu_seqlens_q,
        "cu_seqlens_k_ptr": lengths.cu_seqlens_k,
        **triton_tiles.strides(q=q, k=k, v=v),
        "num_heads": q.shape[1],
        "window_size": min(window_size, _LONGEST_WINDOW),
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
    q, k, v = (triton_tiles.addressable(x) for x in (q, k, v))
    q, softmax_scale = triton_tiles.positive_scale(q, softmax_scale)
    o = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    lse = torch.empty(q.shape[:2], dtype=torch.float32, device=q.device)
    config = forward_config(q, q.shape[1] // k.shape[1])
    num_rows = triton_tiles.longest(lengths.offsets_q) * config["GROUP_SIZE"]
    if num_rows:
        _window_fwd_kernel[(triton.cdiv(num_rows, config["ROWS"]), k.shape[1], len(lengths.offsets_q) - 1)](
            o_ptr=o,
            lse_ptr=lse,
            softmax_scale=softmax_scale,
            **_arguments(q, k, v, lengths, window_size),
            **config,
        )
    return o, lse


def window_bwd(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lse: Tensor,
    do: Tensor,
    delta: Tensor,
    lengths: utils.SequenceLengths,
    window_size: int,
    softmax_scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of the window branch; the same inputs give the same bits.

    Args:
        lse, delta: (total_q, num_heads), fp32; delta is the sum of o * do over head_dim.
        do: like q.
    Returns:
        dq: like q, contiguous; dk, dv: (total_k, num_kv_heads, head_dim), fp32.
    """
    q, k, v, do = (triton_tiles.addressable(x) for x in (q, k, v, do))
    lse, delta = lse.contiguous(), delta.contiguous()
    num_kv_heads, batch = k.shape[1], len(lengths.offsets_q) - 1
    dq = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    dk, dv = (torch.empty(k.shape, dtype=torch.float32, device=k.device) for _ in range(2))
    dq_config, dkv_config = backward_config(q, q.shape[1] // num_kv_heads)
    shared = {
        "do_ptr": do,
        "lse_ptr": lse,
        "delta_ptr": delta,
        **triton_tiles.strides(do=do),
        "softmax_scale": softmax_scale,
        **_arguments(q, k, v, lengths, window_size),
    }
    num_rows = triton_tiles.longest(lengths.offsets_q) * dq_config["GROUP_SIZE"]
    if num_rows:
        _window_bwd_dq_kernel[(triton.cdiv(num_rows, dq_config["ROWS"]), num_kv_heads, batch)](
            dq_ptr=dq, **shared, **dq_config
        )
    num_keys = triton_tiles.longest(lengths.offsets_k)
    if num_keys:
        _window_bwd_dkv_kernel[(triton.cdiv(num_keys, dkv_config["KEYS"]), num_kv_heads, batch)](
            dk_ptr=dk, dv_ptr=dv, num_kv_heads=num_kv_heads, **shared, **dkv_config
        )
    return dq, dk, dv
