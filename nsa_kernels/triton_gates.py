"""Gates and sums of gradients: one walk over memory each (Triton backend).

    o = g_cmp * o_cmp + g_slc * o_slc + g_swa * o_swa

Native Sparse Attention (arXiv:2502.11089), equation 5. The sum itself is taken where the last branch is computed
(triton_rows.py). Backward, gates fold into the lse of their branches, see triton_attention.py.
"""

from collections.abc import Iterable

import torch
from torch import Tensor

from . import triton_tiles

tl, triton = triton_tiles.tl, triton_tiles.triton

# Elements that a program handles.
_ELEMENTS = 4096


@triton.jit
def _fold_gate(o_ptr, offs, mask, do, gate, lse_ptr, lse_delta_ptr, row, mask_row):
    """delta and, if lse_ptr is not None, the gated lse of one branch."""
    o = tl.load(o_ptr + offs, mask=mask, other=0.0).to(tl.float32)
    tl.store(lse_delta_ptr + 2 * row + 1, tl.sum(o * do, 1), mask=mask_row)
    if lse_ptr is not None:
        lse = tl.load(lse_ptr + row, mask=mask_row, other=0.0)
        gate = gate.to(tl.float32)
        is_open = (gate != 0.0) & (lse != float("-inf"))
        # A closed gate leaves no probability: exp(score - inf). A row that saw nothing has none to begin with.
        gated_lse = tl.where(is_open, lse - tl.log(tl.where(is_open, gate, 1.0)), float("inf"))
        tl.store(lse_delta_ptr + 2 * row, gated_lse, mask=mask_row)


@triton.jit(do_not_specialize=["num_rows"])
def _fold_gates_kernel(
    o_cmp_ptr,
    o_slc_ptr,
    o_swa_ptr,
    g_cmp_ptr,
    g_slc_ptr,
    g_swa_ptr,
    lse_cmp_ptr,
    lse_slc_ptr,
    lse_swa_ptr,
    do_ptr,
    lse_delta_ptr,
    stride_g_cmp_t,
    stride_g_cmp_h,
    stride_g_slc_t,
    stride_g_slc_h,
    stride_g_swa_t,
    stride_g_swa_h,
    stride_dot,
    stride_doh,
    num_rows,
    num_heads,
    HEAD_DIM: tl.constexpr,
    HEAD_PAD: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Gated lse and delta, (3, num_rows, 2), from one walk over do and the outputs. Grid: (tiles,)."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    token, head = row // num_heads, row % num_heads
    offs_d = tl.arange(0, HEAD_PAD)
    mask_row = row < num_rows
    mask = mask_row[:, None] & (offs_d < HEAD_DIM)[None, :]
    offs = row[:, None] * HEAD_DIM + offs_d[None, :]
    # [ROWS, HEAD_PAD]
    offs_do = (token * stride_dot + head * stride_doh)[:, None] + offs_d[None, :]
    do = tl.load(do_ptr + offs_do, mask=mask, other=0.0).to(tl.float32)
    # [ROWS]
    g_cmp = tl.load(g_cmp_ptr + token * stride_g_cmp_t + head * stride_g_cmp_h, mask=mask_row, other=0.0)
    g_slc = tl.load(g_slc_ptr + token * stride_g_slc_t + head * stride_g_slc_h, mask=mask_row, other=0.0)
    g_swa = tl.load(g_swa_ptr + token * stride_g_swa_t + head * stride_g_swa_h, mask=mask_row, other=0.0)
    _fold_gate(o_cmp_ptr, offs, mask, do, g_cmp, lse_cmp_ptr, lse_delta_ptr, row, mask_row)
    lse_delta_ptr += 2 * num_rows.to(tl.int64)
    _fold_gate(o_slc_ptr, offs, mask, do, g_slc, lse_slc_ptr, lse_delta_ptr, row, mask_row)
    lse_delta_ptr += 2 * num_rows.to(tl.int64)
    _fold_gate(o_swa_ptr, offs, mask, do, g_swa, lse_swa_ptr, lse_delta_ptr, row, mask_row)


@triton.jit
def _add_kernel(a_ptr, b_ptr, c_ptr, sum_ptr, num_elements, ELEMENTS: tl.constexpr):
    """a + b + c in float32, rounded once; c_ptr may be None. Grid: (tiles,)."""
    offs = tl.program_id(0).to(tl.int64) * ELEMENTS + tl.arange(0, ELEMENTS)
    mask = offs < num_elements
    total = tl.load(a_ptr + offs, mask=mask, other=0.0).to(tl.float32)
    total += tl.load(b_ptr + offs, mask=mask, other=0.0).to(tl.float32)
    if c_ptr is not None:
        total += tl.load(c_ptr + offs, mask=mask, other=0.0).to(tl.float32)
    tl.store(sum_ptr + offs, total.to(sum_ptr.dtype.element_ty), mask=mask)


def gate_arguments(gates: tuple[Tensor, Tensor, Tensor]) -> dict:
    """Pointers and strides of the gates, (total_q, num_heads) each, as kernels take them."""
    arguments = {}
    for name, gate in zip(("cmp", "slc", "swa"), gates, strict=True):
        arguments |= {f"g_{name}_ptr": gate, f"stride_g_{name}_t": gate.stride(0), f"stride_g_{name}_h": gate.stride(1)}
    return arguments


def fold_gates(
    outputs: list[Tensor], lses: list[Tensor | None], gates: tuple[Tensor, Tensor, Tensor], do: Tensor
) -> Tensor:
    """(3, total_q, num_heads, 2), fp32: gated lse and delta of the three branches, for their backward kernels.

    Args:
        outputs: (total_q, num_heads, head_dim) each, contiguous, of compression, selection and window.
        lses: (total_q, num_heads), fp32, natural log; no gated lse is written where one is None.
        do: like an output, contiguous in its last dimension.
    """
    num_tokens, num_heads, head_dim = do.shape
    lse_delta = torch.empty(3, num_tokens, num_heads, 2, dtype=torch.float32, device=do.device)
    num_rows, head_pad = num_tokens * num_heads, triton_tiles.pad(head_dim)
    rows = _ELEMENTS // head_pad
    triton_tiles.launch(
        _fold_gates_kernel,
        (triton_tiles.cdiv(num_rows, rows),),
        o_cmp_ptr=outputs[0],
        o_slc_ptr=outputs[1],
        o_swa_ptr=outputs[2],
        lse_cmp_ptr=lses[0],
        lse_slc_ptr=lses[1],
        lse_swa_ptr=lses[2],
        do_ptr=do,
        lse_delta_ptr=lse_delta,
        **gate_arguments(gates),
        **triton_tiles.strides(do=do),
        num_rows=num_rows,
        num_heads=num_heads,
        HEAD_DIM=head_dim,
        HEAD_PAD=head_pad,
        ROWS=rows,
        num_warps=4,
    )
    return lse_delta


def add(parts: Iterable[Tensor | None], dtype: torch.dtype) -> Tensor:
    """The sum of two or three contiguous tensors of one shape, in dtype, rounded once; None adds nothing."""
    parts = [part for part in parts if part is not None]
    total = torch.empty(parts[0].shape, dtype=dtype, device=parts[0].device)
    triton_tiles.launch(
        _add_kernel,
        (triton_tiles.cdiv(total.numel(), _ELEMENTS),),
        a_ptr=parts[0],
        b_ptr=parts[1],
        c_ptr=parts[2] if len(parts) == 3 else None,
        sum_ptr=total,
        num_elements=total.numel(),
        ELEMENTS=_ELEMENTS,
        num_warps=4,
    )
    return total
