"""Native Sparse Attention with the Triton kernels: the branches, their gated sum, and the gradients of all of it.

    o = g_cmp * o_cmp + g_slc * o_slc + g_swa * o_swa

Backward never forms the gradient of a branch, gate * do. A gate enters the gradients of its branch only as gate * p,
and gate * exp(score - lse) = exp(score - (lse - log gate)): the kernels get do as it is, the row sum of o * do, which
is also the gradient of the gate, and an lse from which log gate is taken. So gates must not be negative.

Where no sequence has more keys than block_counts * block_size, every block is selected: then selection is dense causal
attention and no blocks are chosen. torch computes it where it can in one call (dense.py), and its autograd the
gradients; otherwise it runs as a window that reaches the first token.
"""

import functools
from collections.abc import Callable

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import (
    dense,
    operators,
    triton_compression,
    triton_gates,
    triton_rows,
    triton_selection,
    triton_tiles,
    utils,
)

# Programs along the second and third dimension of a grid, which are heads and sequences.
_MAX_GRID = 65535


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
) -> tuple[Tensor, Tensor | None, triton_selection.Lists | None, list[Tensor], list[Tensor | None]]:
    """The output, and what `backward` wants besides the inputs: memory linear in the tokens.

    Args:
        o_dense: the output of selection where torch has computed it (`dense_selection`), or None.
    Returns:
        o; block indices and their lists, None where none were chosen; [o_cmp, o_slc, o_swa]; [lse_cmp, lse_slc,
        lse_swa], lse_slc None with o_dense. With the last goes the gradient of selection: torch's own, or that of the
        kernels here. Nothing but o unless it is to be saved.
    """
    reach, gates = block_size * block_counts, (g_cmp, g_slc, g_swa)
    if selects_all(lengths, reach):
        o_cmp, lse_cmp = triton_compression.compress(q, k, v, lengths, block_size, softmax_scale)
        indices = lists = None
        if o_dense is None:
            o_slc, lse_slc = triton_rows.window_fwd(q, k, v, lengths, reach, softmax_scale)
        else:
            o_slc, lse_slc = o_dense, None
    else:
        o_cmp, lse_cmp, indices = triton_compression.compress_and_choose(
            q, k, v, lengths, block_size, block_counts, softmax_scale
        )
        lists = triton_selection.list_blocks(indices, q, lengths, block_size, is_sorted=True)
        o_slc, lse_slc = triton_selection.selection_fwd(q, k, v, lists, lengths, block_size, softmax_scale)
    o, o_swa, lse_swa = triton_rows.window_and_sum(
        q, k, v, o_cmp, o_slc, gates, lengths, window_size, softmax_scale, save
    )
    if save:
        return o, indices, lists, [o_cmp, o_slc, o_swa], [lse_cmp, lse_slc, lse_swa]
    return o, None, None, [], []


def backward(
    do, q, k, v, g_cmp, g_slc, g_swa, lists, outputs, lses, lengths, block_size, block_counts, window_size,
    softmax_scale,
) -> tuple[Tensor | None, ...]:  # fmt: skip
    """Gradients of q, k, v, the gates and o_dense, from do, the inputs of `forward` and what it returned."""
    gates, reach = (g_cmp, g_slc, g_swa), block_size * block_counts
    lse_delta = triton_gates.fold_gates(outputs, lses, gates, do)
    of_cmp = triton_compression.compression_bwd(q, k, v, lse_delta[0], do, lengths, block_size, softmax_scale)
    do_dense = window = None
    if lses[1] is None:
        of_slc = None, None, None
        do_dense = (do * g_slc[..., None]).to(do.dtype)
    elif lists is None:
        of_slc = triton_rows.window_bwd(q, k, v, lse_delta[1], do, lengths, reach, softmax_scale)
    else:
        window = (window_size, lse_delta[2]) if triton_selection.takes_window(q) else None
        of_slc = triton_selection.selection_bwd(
            q, k, v, lists, lse_delta[1], do, lengths, block_size, softmax_scale, window
        )
    of_swa = triton_rows.window_bwd(
        q, k, v, lse_delta[2], do, lengths, window_size, softmax_scale, wants_dq=window is None
    )
    dq, dk, dv = (triton_gates.add(parts, q.dtype) for parts in zip(of_cmp, of_swa, of_slc, strict=True))
    dgates = (delta.to(gate.dtype) for delta, gate in zip(lse_delta[..., 1], gates, strict=True))
    return dq, dk, dv, *dgates, do_dense


# What `_NSAFunction` saves: inputs, outputs, lses, and the lists of blocks if there are any.
_SAVED = slice(0, 6), slice(6, 9), slice(9, 12), slice(12, None)


class _NSAFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx, *args):
        o, _, lists, outputs, lses = forward(*args, save=any(ctx.needs_input_grad))
        if outputs:
            ctx.save_for_backward(*args[:6], *outputs, *lses, *(lists or ()))
            ctx.args = args[7:]
        return o

    @staticmethod
    @_prepared_backward
    def backward(ctx, do):
        inputs, outputs, lses, lists = (ctx.saved_tensors[part] for part in _SAVED)
        lists = triton_selection.Lists(*lists) if lists else None
        return *backward(do, *inputs, lists, outputs, lses, *ctx.args), *[None] * 5


def dense_selection(q, k, v, lengths, block_size, block_counts, _window_size, softmax_scale) -> Tensor | None:
    """The output of selection where it is dense and torch computes it in one call, which autograd sees; else None."""
    if selects_all(lengths, block_size * block_counts) and dense.is_one_call(q, lengths):
        return dense.dense_causal_attention(q, k, v, lengths, softmax_scale)
    return None


def forward_of_checked(q, k, v, g_cmp, g_slc, g_swa, *args, save: bool):
    """`nsa_attention` without autograd; returns what `forward` does but the lists, which indices tell."""
    _check(q, args[0])
    with triton_tiles.current_device(q):
        q, k, v = map(triton_tiles.addressable, (q, k, v))
        o, indices, _, outputs, lses = forward(
            q, k, v, g_cmp, g_slc, g_swa, dense_selection(q, k, v, *args), *args, save=save
        )
        return o, indices, outputs, lses


def backward_of_checked(do, q, k, v, g_cmp, g_slc, g_swa, indices, outputs, lses, *args) -> tuple[Tensor, ...]:
    """Gradients of q, k, v and the gates from what `forward_of_checked` got and returned, None replaced by memory."""
    lengths, block_size, block_counts = args[:3]
    with triton_tiles.current_device(q):
        do, q, k, v = map(triton_tiles.addressable, (do, q, k, v))
        lists = None
        if not selects_all(lengths, block_size * block_counts):
            lists = triton_selection.list_blocks(indices, q, lengths, block_size, is_sorted=True)
        elif dense.is_one_call(q, lengths):
            lses = [lses[0], None, lses[2]]
        *gradients, do_dense = backward(do, q, k, v, g_cmp, g_slc, g_swa, lists, outputs, lses, *args)
        if do_dense is not None:
            parts = operators.vjp(lambda *x: dense_selection(*x, *args), (q, k, v), do_dense)
            gradients[:3] = (gradient.add_(part) for gradient, part in zip(gradients[:3], parts, strict=True))
        gradients[3:] = (gradient.clone() for gradient in gradients[3:])  # they are parts of one tensor
        return tuple(gradients)


class _BranchFunction(torch.autograd.Function):
    """One branch by itself: forward (q, k, v) -> o, lse, and backward (q, k, v, lse_delta, do) -> dq, dk, dv."""

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
        lse_delta = triton_tiles.lse_and_delta(lse, (o.float() * do.float()).sum(-1))
        dq, dk, dv = ctx.branch_backward(q, k, v, lse_delta, do)
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
    """`compression.select_blocks` with checked arguments."""
    _check(q, lengths)
    # The choice needs the lse of compression, whose output costs little beside it: k stands in for v.
    return _compress_and_choose(q, k, k, lengths, block_size, block_counts, softmax_scale)[2]


@_prepared
def selection_attention(q, k, v, block_indices, lengths, block_size, softmax_scale) -> tuple[Tensor, Tensor]:
    """`selection.selection_attention` with checked arguments."""
    _check(q, lengths)
    if block_indices.dtype == torch.int64:  # what int32 cannot hold is after every token
        block_indices = block_indices.clamp(-1, 2**31 - 1).to(torch.int32)
    lists = triton_selection.list_blocks(block_indices, q, lengths, block_size, is_sorted=False)
    settings = {"lengths": lengths, "block_size": block_size, "softmax_scale": softmax_scale}

    def forward(q, k, v):
        return triton_selection.selection_fwd(q, k, v, lists, **settings)

    def backward(q, k, v, lse_delta, do):
        return triton_selection.selection_bwd(q, k, v, lists, lse_delta, do, **settings)

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
        functools.partial(triton_rows.window_fwd, **settings),
        functools.partial(triton_rows.window_bwd, **settings),
    )
