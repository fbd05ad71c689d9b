"""Native Sparse Attention with the Triton kernels: the branches, their gated sum, and the gradients of all of it.

    o = g_cmp * o_cmp + g_slc * o_slc + g_swa * o_swa

Backward never forms the gradient of a branch, gate * do. A gate enters the gradients of its branch only as gate * p,
and gate * exp(score - lse) = exp(score - (lse - log gate)): the kernels get do as it is, the row sum of o * do, which
is also the gradient of the gate, and an lse from which log gate is taken. So gates must not be negative.

Where no sequence has more keys than block_counts * block_size, every block is selected: then selection is dense causal
attention and no blocks are chosen. torch computes it where it can in one call (dense_causal.py), and its autograd the
gradients; otherwise it runs as a window that reaches the first token.
"""

import functools
from collections.abc import Callable

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import dense_causal, operators, triton_compression, triton_selection, triton_tiles, triton_window, utils

try:
    import triton
    import triton.language as tl
except ImportError as error:
    raise ImportError("backend='triton' needs triton 3.6 or later: pip install 'triton>=3.6'") from error

# Programs along the second and third dimension of a grid, which are heads and sequences.
_MAX_GRID = 65535
# Elements that a program of the elementwise kernels handles.
_ELEMENTS = 4096


@triton.jit(do_not_specialize=["num_rows"])
def _gated_sum_kernel(
    o_cmp_ptr,
    o_slc_ptr,
    o_swa_ptr,
    g_cmp_ptr,
    g_slc_ptr,
    g_swa_ptr,
    o_ptr,
    stride_g_cmp_t,
    stride_g_cmp_h,
    stride_g_slc_t,
    stride_g_slc_h,
    stride_g_swa_t,
    stride_g_swa_h,
    num_rows,
    num_heads,
    HEAD_DIM: tl.constexpr,
    HEAD_PAD: tl.constexpr,
    ROWS: tl.constexpr,
):
    """o of ROWS rows, a row being one head of one token. Grid: (tiles,). Reads three outputs, writes one."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    token, head = row // num_heads, row % num_heads
    offs_d = tl.arange(0, HEAD_PAD)
    mask_row = row < num_rows
    mask = mask_row[:, None] & (offs_d < HEAD_DIM)[None, :]
    offs = row[:, None] * HEAD_DIM + offs_d[None, :]
    # [ROWS]
    g_cmp = tl.load(g_cmp_ptr + token * stride_g_cmp_t + head * stride_g_cmp_h, mask=mask_row, other=0.0)
    g_slc = tl.load(g_slc_ptr + token * stride_g_slc_t + head * stride_g_slc_h, mask=mask_row, other=0.0)
    g_swa = tl.load(g_swa_ptr + token * stride_g_swa_t + head * stride_g_swa_h, mask=mask_row, other=0.0)
    # [ROWS, HEAD_PAD]
    o = g_cmp.to(tl.float32)[:, None] * tl.load(o_cmp_ptr + offs, mask=mask, other=0.0).to(tl.float32)
    o += g_slc.to(tl.float32)[:, None] * tl.load(o_slc_ptr + offs, mask=mask, other=0.0).to(tl.float32)
    o += g_swa.to(tl.float32)[:, None] * tl.load(o_swa_ptr + offs, mask=mask, other=0.0).to(tl.float32)
    tl.store(o_ptr + offs, o.to(o_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _fold_gate(o_ptr, offs, mask, do, gate, lse_ptr, delta_ptr, gated_lse_ptr, row, mask_row):
    """delta and, if lse_ptr is not None, the gated lse of one branch."""
    o = tl.load(o_ptr + offs, mask=mask, other=0.0).to(tl.float32)
    tl.store(delta_ptr + row, tl.sum(o * do, 1), mask=mask_row)
    if lse_ptr is not None:
        lse = tl.load(lse_ptr + row, mask=mask_row, other=0.0)
        gate = gate.to(tl.float32)
        is_open = (gate != 0.0) & (lse != float("-inf"))
        # A closed gate leaves no probability: exp(score - inf). A row that saw nothing has none to begin with.
        gated_lse = tl.where(is_open, lse - tl.log(tl.where(is_open, gate, 1.0)), float("inf"))
        tl.store(gated_lse_ptr + row, gated_lse, mask=mask_row)


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
    delta_ptr,
    gated_lse_ptr,
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
    """delta and gated lse, (3, num_rows) each, from one walk over do and the outputs. Grid: (tiles,)."""
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
    _fold_gate(o_cmp_ptr, offs, mask, do, g_cmp, lse_cmp_ptr, delta_ptr, gated_lse_ptr, row, mask_row)
    delta_ptr += num_rows
    gated_lse_ptr += num_rows
    _fold_gate(o_slc_ptr, offs, mask, do, g_slc, lse_slc_ptr, delta_ptr, gated_lse_ptr, row, mask_row)
    delta_ptr += num_rows
    gated_lse_ptr += num_rows
    _fold_gate(o_swa_ptr, offs, mask, do, g_swa, lse_swa_ptr, delta_ptr, gated_lse_ptr, row, mask_row)


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


def _rows_config(head_dim: int) -> dict:
    head_pad = triton_tiles.pad(head_dim)
    return {"HEAD_DIM": head_dim, "HEAD_PAD": head_pad, "ROWS": _ELEMENTS // head_pad, "num_warps": 4}


def _gate_arguments(gates: tuple[Tensor, Tensor, Tensor]) -> dict:
    arguments = {}
    for name, gate in zip(("cmp", "slc", "swa"), gates, strict=True):
        arguments |= {f"g_{name}_ptr": gate, f"stride_g_{name}_t": gate.stride(0), f"stride_g_{name}_h": gate.stride(1)}
    return arguments


def _gated_sum(outputs: list[Tensor], gates: tuple[Tensor, Tensor, Tensor]) -> Tensor:
    o = torch.empty_like(outputs[0])
    num_rows, config = o.shape[0] * o.shape[1], _rows_config(o.shape[2])
    if num_rows:
        _gated_sum_kernel[(triton.cdiv(num_rows, config["ROWS"]),)](
            o_cmp_ptr=outputs[0],
            o_slc_ptr=outputs[1],
            o_swa_ptr=outputs[2],
            o_ptr=o,
            num_rows=num_rows,
            num_heads=o.shape[1],
            **_gate_arguments(gates),
            **config,
        )
    return o


def _fold_gates(outputs: list[Tensor], lses: list[Tensor | None], gates: tuple, do: Tensor) -> tuple[Tensor, Tensor]:
    """delta and gated lse of the three branches, (3, total_q, num_heads) each; no gated lse where lse is None."""
    delta, gated_lse = (torch.empty(3, *do.shape[:2], dtype=torch.float32, device=do.device) for _ in range(2))
    num_rows, config = do.shape[0] * do.shape[1], _rows_config(do.shape[2])
    if num_rows:
        _fold_gates_kernel[(triton.cdiv(num_rows, config["ROWS"]),)](
            o_cmp_ptr=outputs[0],
            o_slc_ptr=outputs[1],
            o_swa_ptr=outputs[2],
            lse_cmp_ptr=lses[0],
            lse_slc_ptr=lses[1],
            lse_swa_ptr=lses[2],
            do_ptr=do,
            delta_ptr=delta,
            gated_lse_ptr=gated_lse,
            **triton_tiles.strides(do=do),
            num_rows=num_rows,
            num_heads=do.shape[1],
            **_gate_arguments(gates),
            **config,
        )
    return delta, gated_lse


def _add(parts: tuple[Tensor, Tensor, Tensor | None], dtype: torch.dtype) -> Tensor:
    total = torch.empty(parts[0].shape, dtype=dtype, device=parts[0].device)
    if total.numel():
        _add_kernel[(triton.cdiv(total.numel(), _ELEMENTS),)](
            a_ptr=parts[0],
            b_ptr=parts[1],
            c_ptr=parts[2],
            sum_ptr=total,
            num_elements=total.numel(),
            ELEMENTS=_ELEMENTS,
            num_warps=4,
        )
    return total


def _check(q: Tensor, lengths: utils.SequenceLengths) -> None:
    triton_tiles.check_supported(q)
    for name, tensor in (("cu_seqlens_q", lengths.cu_seqlens_q), ("cu_seqlens_k", lengths.cu_seqlens_k)):
        if tensor.device != q.device:
            raise ValueError(f"{name} must be on {q.device}, like q, for backend='triton', got {tensor.device}")
    programs = q.shape[1] * (len(lengths.offsets_q) - 1)
    if programs > _MAX_GRID:
        raise ValueError(f"sequences x num_heads must be at most {_MAX_GRID} for backend='triton', got {programs}")


def _prepared(function: Callable) -> Callable:
    """Kernels index the last dimension of q, k and v without a stride, and run on the current device."""

    @functools.wraps(function)
    def wrapped(q, k, v, *args):
        with triton_tiles.current_device(q):
            return function(*map(triton_tiles.addressable, (q, k, v)), *args)

    return wrapped


def _prepared_backward(backward: Callable) -> Callable:
    """The same for do. Autograd itself makes the device of do the current one."""

    @functools.wraps(backward)
    def wrapped(ctx, do, *args):
        return backward(ctx, triton_tiles.addressable(do), *args)

    return once_differentiable(utils.backward_without_autocast(wrapped))


def selects_all(lengths: utils.SequenceLengths, reach: int) -> bool:
    """Whether every token selects every block it could, with block_counts * block_size = reach: then choice is void.

    The switch is where the two are equal, not where one is faster: the dense branch reads the same keys as selection
    would, a tile of keys per tile of queries, without lists of blocks and without the kernel that chooses them.
    """
    return triton_tiles.longest(lengths.offsets_k) <= reach


def forward(
    q, k, v, g_cmp, g_slc, g_swa, o_dense, lengths, block_size, block_counts, window_size, softmax_scale, save: bool
) -> tuple[Tensor, Tensor | None, list[Tensor], list[Tensor | None]]:
    """The output, and what `backward` wants besides the inputs: memory linear in the tokens.

    Args:
        o_dense: the output of selection where torch has computed it (`dense_selection`), or None.
    Returns:
        o; block indices, None where none were chosen; [o_cmp, o_slc, o_swa]; [lse_cmp, lse_slc, lse_swa], lse_slc None
        with o_dense. With the last goes the gradient of selection: torch's own, or that of the kernels here.
    """
    reach = block_size * block_counts
    if selects_all(lengths, reach):
        o_cmp, lse_cmp = triton_compression.compress(q, k, v, lengths, block_size, softmax_scale)
        indices = None
        if o_dense is None:
            o_slc, lse_slc = triton_window.window_fwd(q, k, v, lengths, reach, softmax_scale)
        else:
            o_slc, lse_slc = o_dense, None
    else:
        o_cmp, lse_cmp, indices = triton_compression.compress_and_choose(
            q, k, v, lengths, block_size, block_counts, softmax_scale
        )
        o_slc, lse_slc = triton_selection.selection_fwd(q, k, v, indices, lengths, block_size, softmax_scale)
    o_swa, lse_swa = triton_window.window_fwd(q, k, v, lengths, window_size, softmax_scale)
    o = _gated_sum([o_cmp, o_slc, o_swa], (g_cmp, g_slc, g_swa))
    if save:
        return o, indices, [o_cmp, o_slc, o_swa], [lse_cmp, lse_slc, lse_swa]
    return o, None, [], []


def backward(
    do, q, k, v, g_cmp, g_slc, g_swa, indices, outputs, lses, lengths, block_size, block_counts, window_size,
    softmax_scale,
) -> tuple[Tensor | None, ...]:  # fmt: skip
    """Gradients of q, k, v, the gates and o_dense, from do, the inputs of `forward` and what it returned."""
    gates, reach = (g_cmp, g_slc, g_swa), block_size * block_counts
    delta, lse = _fold_gates(outputs, lses, gates, do)
    of_cmp = triton_compression.compression_bwd(q, k, v, lse[0], do, delta[0], lengths, block_size, softmax_scale)
    do_dense = None
    if lses[1] is None:
        of_slc = None, None, None
        do_dense = (do * g_slc[..., None]).to(do.dtype)
    elif indices is None:
        of_slc = triton_window.window_bwd(q, k, v, lse[1], do, delta[1], lengths, reach, softmax_scale)
    else:
        of_slc = triton_selection.selection_bwd(
            q, k, v, indices, lse[1], do, delta[1], lengths, block_size, softmax_scale
        )
    of_swa = triton_window.window_bwd(q, k, v, lse[2], do, delta[2], lengths, window_size, softmax_scale)
    dq, dk, dv = (_add(parts, q.dtype) for parts in zip(of_cmp, of_swa, of_slc, strict=True))
    dgates = (d.to(gate.dtype) for d, gate in zip(delta, gates, strict=True))
    return dq, dk, dv, *dgates, do_dense


class _NSAFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx, *args):
        o, indices, outputs, lses = forward(*args, save=any(ctx.needs_input_grad))
        if outputs:
            ctx.save_for_backward(*args[:6], indices, *outputs, *lses)
            ctx.args = args[7:]
        return o

    @staticmethod
    @_prepared_backward
    def backward(ctx, do):
        *inputs, indices, o_cmp, o_slc, o_swa, lse_cmp, lse_slc, lse_swa = ctx.saved_tensors
        saved = indices, [o_cmp, o_slc, o_swa], [lse_cmp, lse_slc, lse_swa]
        return *backward(do, *inputs, *saved, *ctx.args), *[None] * 5


def dense_selection(q, k, v, lengths, block_size, block_counts, _window_size, softmax_scale) -> Tensor | None:
    """The output of selection where it is dense and torch computes it in one call, which autograd sees; else None."""
    if selects_all(lengths, block_size * block_counts) and dense_causal.is_one_call(q, lengths):
        return dense_causal.dense_causal_attention(q, k, v, lengths, softmax_scale)
    return None


def forward_of_checked(q, k, v, g_cmp, g_slc, g_swa, *args, save: bool):
    """`nsa_attention` without autograd; returns what `forward` does."""
    _check(q, args[0])
    with triton_tiles.current_device(q):
        q, k, v = map(triton_tiles.addressable, (q, k, v))
        return forward(q, k, v, g_cmp, g_slc, g_swa, dense_selection(q, k, v, *args), *args, save=save)


def backward_of_checked(do, q, k, v, g_cmp, g_slc, g_swa, indices, outputs, lses, *args) -> tuple[Tensor, ...]:
    """Gradients of q, k, v and the gates from what `forward_of_checked` got and returned, None replaced by memory."""
    lengths, block_size, block_counts = args[:3]
    if selects_all(lengths, block_size * block_counts):
        indices = None
        if dense_causal.is_one_call(q, lengths):
            lses = [lses[0], None, lses[2]]
    with triton_tiles.current_device(q):
        do, q, k, v = map(triton_tiles.addressable, (do, q, k, v))
        *gradients, do_dense = backward(do, q, k, v, g_cmp, g_slc, g_swa, indices, outputs, lses, *args)
        if do_dense is not None:
            dense = operators.vjp(lambda *x: dense_selection(*x, *args), (q, k, v), do_dense)
            gradients[:3] = (gradient.add_(part) for gradient, part in zip(gradients[:3], dense, strict=True))
        gradients[3:] = (gradient.clone() for gradient in gradients[3:])  # they are parts of one tensor
        return tuple(gradients)


class _BranchFunction(torch.autograd.Function):
    """One branch by itself: forward (q, k, v) -> o, lse, and backward (q, k, v, lse, do, delta) -> dq, dk, dv."""

    @staticmethod
    def forward(ctx, q, k, v, branch_forward, branch_backward):
        o, lse = branch_forward(q, k, v)
        ctx.save_for_backward(q, k, v, o, lse)
        ctx.branch_backward = branch_backward
        ctx.mark_non_differentiable(lse)
        return o, lse

    @staticmethod
    @_prepared_backward
    def backward(ctx, do, _dlse):
        q, k, v, o, lse = ctx.saved_tensors
        delta = (o.float() * do.float()).sum(-1)
        dq, dk, dv = ctx.branch_backward(q, k, v, lse, do, delta)
        return dq, dk.to(k.dtype), dv.to(v.dtype), None, None


@_prepared
def nsa_attention(
    q, k, v, g_cmp, g_slc, g_swa, lengths, block_size, block_counts, window_size, softmax_scale
) -> Tensor:
    """`attention.nsa_attention` with checked arguments; gates must not be negative.

    Raises:
        ValueError: what the kernels do not support.
    """
    _check(q, lengths)
    args = lengths, block_size, block_counts, window_size, softmax_scale
    return _NSAFunction.apply(q, k, v, g_cmp, g_slc, g_swa, dense_selection(q, k, v, *args), *args)


@_prepared
def compression_attention(q, k, v, lengths, block_size, softmax_scale) -> tuple[Tensor, Tensor]:
    """`compression.compression_attention` with checked arguments."""
    _check(q, lengths)
    settings = {"lengths": lengths, "block_size": block_size, "softmax_scale": softmax_scale}
    return _BranchFunction.apply(
        q,
        k,
        v,
        functools.partial(triton_compression.compress, **settings),
        functools.partial(triton_compression.compression_bwd, **settings),
    )


_compress_and_choose = _prepared(triton_compression.compress_and_choose)


@torch.no_grad()
def select_blocks(q, k, lengths, block_size, block_counts, softmax_scale) -> Tensor:
    """`topk.select_blocks` with checked arguments."""
    _check(q, lengths)
    # The choice needs the lse of compression, whose output costs little beside it: k stands in for v.
    return _compress_and_choose(q, k, k, lengths, block_size, block_counts, softmax_scale)[2]


@_prepared
def selection_attention(q, k, v, block_indices, lengths, block_size, softmax_scale) -> tuple[Tensor, Tensor]:
    """`selection.selection_attention` with checked arguments."""
    _check(q, lengths)
    if block_indices.dtype == torch.int64:  # what int32 cannot hold is after every token
        block_indices = block_indices.clamp(-1, 2**31 - 1).to(torch.int32)
    settings = {"lengths": lengths, "block_size": block_size, "softmax_scale": softmax_scale}

    def forward(q, k, v):
        return triton_selection.selection_fwd(q, k, v, block_indices, **settings)

    def backward(q, k, v, lse, do, delta):
        return triton_selection.selection_bwd(q, k, v, block_indices, lse, do, delta, **settings)

    return _BranchFunction.apply(q, k, v, forward, backward)


@_prepared
def sliding_window_attention(q, k, v, lengths, window_size, softmax_scale) -> tuple[Tensor, Tensor]:
    """`sliding_window.sliding_window_attention` with checked arguments."""
    _check(q, lengths)
    settings = {"lengths": lengths, "window_size": window_size, "softmax_scale": softmax_scale}
    return _BranchFunction.apply(
        q,
        k,
        v,
        functools.partial(triton_window.window_fwd, **settings),
        functools.partial(triton_window.window_bwd, **settings),
    )
