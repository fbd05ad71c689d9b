"""Native Sparse Attention over packed sequences: o = g_cmp * o_cmp + g_slc * o_slc + g_swa * o_swa.

Native Sparse Attention (arXiv:2502.11089), equation 5; the branches are defined in compression.py,
selection.py and sliding_window.py. The torch backend takes a sequence one key/value head and one chunk of queries at a
time, on a CPU some heads side by side, and adds the gated branches up before it goes on, so that no branch's output
exists for the whole sequence.
"""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import compression, head_threads, operators, reference, selection, sliding_window, utils

BACKENDS = utils.BACKENDS
SequenceLengths = utils.SequenceLengths
resolve_backend = utils.resolve_backend


def forward(
    q, k, v, g_cmp, g_slc, g_swa, lengths, block_size, block_counts, window_size, softmax_scale, save: bool
) -> tuple[Tensor, Tensor | None, list[Tensor], list[Tensor]]:
    """The torch backend's output, and what `backward` wants besides the inputs: the rest it recomputes.

    Returns:
        o; block indices, [o_slc], [lse_cmp, lse_slc, lse_swa], or nothing in them unless they are to be saved.
    """
    group_size, num_kv_heads = q.shape[1] // k.shape[1], k.shape[1]
    acc = utils.accumulate_dtype(q.dtype)
    size, scratch = selection.chunk_tokens(q.device, block_counts, group_size, q.shape[2]), selection.Scratch()
    o = torch.empty_like(q, memory_format=torch.contiguous_format)
    if save:
        o_slc_all = torch.empty_like(o)
        lse_all = torch.empty(3, *q.shape[:2], dtype=acc, device=q.device)
        indices_all = torch.empty(q.shape[0], num_kv_heads, block_counts, dtype=torch.int32, device=q.device)

    def of_head(span: utils.Span, head: int) -> None:
        k_head, v_head = utils.kv_head(k, span, head), utils.kv_head(v, span, head)
        k_cmp, v_cmp = (compression.pool_blocks(x, block_size) for x in (k_head, v_head))
        k_blocks, v_blocks = (selection.Blocks(x, block_size) for x in (k_head, v_head))
        for chunk, first in _chunks(span, block_size * block_counts, size):
            index = chunk, utils.head_slice(head, group_size)
            q_chunk = q[index].to(acc).contiguous()
            o_cmp, lse_cmp, indices = _compress_and_choose(
                q_chunk, k_cmp, v_cmp, first, block_size, block_counts, softmax_scale
            )
            if _selects_all(first, block_size, block_counts):
                o_slc, lse_slc = sliding_window.window_forward(
                    q_chunk, k_head, v_head, first, block_size * block_counts, softmax_scale
                )
            else:
                o_slc, lse_slc = selection.selection_forward(
                    q_chunk, k_blocks, v_blocks, indices, first, softmax_scale, scratch
                )
            o_swa, lse_swa = sliding_window.window_forward(q_chunk, k_head, v_head, first, window_size, softmax_scale)
            if save:
                o_slc_all[index], indices_all[chunk, head] = o_slc, indices
                for branch, lse in enumerate((lse_cmp, lse_slc, lse_swa)):
                    lse_all[branch][index] = lse
            gate_cmp, gate_slc, gate_swa = (gate[index].to(acc)[..., None] for gate in (g_cmp, g_slc, g_swa))
            o[index] = o_cmp.mul_(gate_cmp).addcmul_(o_slc, gate_slc).addcmul_(o_swa, gate_swa)

    head_threads.for_each_head(of_head, q, num_kv_heads, lengths)
    if save:
        return o, indices_all, [o_slc_all], list(lse_all)
    return o, None, [], []


def backward(
    do,
    q,
    k,
    v,
    g_cmp,
    g_slc,
    g_swa,
    indices,
    outputs,
    lses,
    lengths,
    block_size,
    block_counts,
    window_size,
    softmax_scale,
) -> tuple[Tensor, ...]:
    """Gradients of q, k, v and the gates, from do, the inputs of `forward` and what it returned."""
    (o_slc,), (lse_cmp, lse_slc, lse_swa) = outputs, lses
    group_size = q.shape[1] // k.shape[1]
    acc = utils.accumulate_dtype(q.dtype)
    size, scratch = selection.chunk_tokens(q.device, block_counts, group_size, q.shape[2]), selection.Scratch()
    dq, dk, dv, dg_cmp, dg_slc, dg_swa = (
        torch.zeros_like(x, memory_format=torch.contiguous_format) for x in (q, k, v, g_cmp, g_slc, g_swa)
    )

    def of_head(span: utils.Span, head: int) -> None:
        k_head, v_head = utils.kv_head(k, span, head), utils.kv_head(v, span, head)
        k_cmp, v_cmp = (compression.pool_blocks(x, block_size) for x in (k_head, v_head))
        dk_cmp, dv_cmp = torch.zeros_like(k_cmp), torch.zeros_like(v_cmp)
        k_blocks, v_blocks = (selection.Blocks(x, block_size) for x in (k_head, v_head))
        dk_blocks, dv_blocks = k_blocks.zeros(), v_blocks.zeros()
        # The branches add into the same memory; a window never reaches the padding of the last block.
        dk_head, dv_head = (x.flatten(0, 1)[: span.num_keys] for x in (dk_blocks, dv_blocks))
        for chunk, first in _chunks(span, block_size * block_counts, size):
            index = chunk, utils.head_slice(head, group_size)
            q_chunk, do_chunk = q[index].to(acc), do[index].to(acc)
            gate_cmp, gate_slc, gate_swa = (gate[index].to(acc) for gate in (g_cmp, g_slc, g_swa))
            dq_cmp, dg_cmp[index] = compression.compression_backward(
                q_chunk, k_cmp, v_cmp, do_chunk, lse_cmp[index], dk_cmp, dv_cmp,
                first, block_size, softmax_scale, gate_cmp,
            )  # fmt: skip
            if _selects_all(first, block_size, block_counts):
                dq_slc, dg_slc[index] = sliding_window.window_backward(
                    q_chunk, k_head, v_head, do_chunk, lse_slc[index], dk_head, dv_head,
                    first, block_size * block_counts, softmax_scale, gate_slc,
                )  # fmt: skip
            else:
                delta = (o_slc[index] * do_chunk).sum(-1)
                dg_slc[index] = delta
                dq_slc = selection.selection_backward(
                    q_chunk, k_blocks, v_blocks, indices[chunk, head], do_chunk, lse_slc[index], delta,
                    dk_blocks, dv_blocks, first, softmax_scale, scratch, gate_slc,
                )  # fmt: skip
            dq_swa, dg_swa[index] = sliding_window.window_backward(
                q_chunk, k_head, v_head, do_chunk, lse_swa[index], dk_head, dv_head,
                first, window_size, softmax_scale, gate_swa,
            )  # fmt: skip
            dq[index] = dq_cmp.add_(dq_slc).add_(dq_swa)
        compression.unpool_blocks_(dk_head, dk_cmp, block_size)
        compression.unpool_blocks_(dv_head, dv_cmp, block_size)
        dk[span.k_start : span.k_end, head] = dk_head
        dv[span.k_start : span.k_end, head] = dv_head

    head_threads.for_each_head(of_head, q, k.shape[1], lengths)
    return dq, dk, dv, dg_cmp, dg_slc, dg_swa


class _NSAFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx, *args):
        o, indices, outputs, lses = forward(*args, save=any(ctx.needs_input_grad))
        if indices is not None:
            ctx.save_for_backward(*args[:6], indices, *outputs, *lses)
            ctx.args = args[6:]
        return o

    @staticmethod
    @once_differentiable
    @utils.backward_without_autocast
    def backward(ctx, do):
        *inputs, indices, o_slc, lse_cmp, lse_slc, lse_swa = ctx.saved_tensors
        return *backward(do, *inputs, indices, [o_slc], [lse_cmp, lse_slc, lse_swa], *ctx.args), *[None] * 5


def _selects_all(first: int, block_size: int, block_counts: int) -> bool:
    """Whether the chunk that starts at position ``first`` selects every block: then selection is dense and causal."""
    return first < block_size * block_counts


def _chunks(span: utils.Span, dense_until: int, size: int):
    """`utils.query_chunks`, with a cut at position dense_until, so that `_selects_all` holds for a chunk or not."""
    cut = span.q_start + max(0, min(dense_until - span.first, span.num_queries))
    dense = span._replace(q_end=cut, k_end=span.k_end - (span.q_end - cut))
    yield from utils.query_chunks(dense, utils.CHUNK_TOKENS)
    yield from utils.query_chunks(span._replace(q_start=cut), size)


def _compress_and_choose(q, k_cmp, v_cmp, first, block_size, block_counts, softmax_scale):
    """o_cmp, lse and block indices of one chunk from a single computation of the block probabilities."""
    o = torch.empty_like(q)
    lse = q.new_empty(q.shape[:2])
    indices = torch.empty(q.shape[0], block_counts, dtype=torch.int32, device=q.device)
    for rows, probs, tile_lse in compression.probability_tiles(q, k_cmp, first, block_size, softmax_scale):
        o[rows] = probs @ v_cmp[: probs.shape[-1]]
        lse[rows] = tile_lse
        indices[rows] = compression.choose_blocks(probs.sum(1), first + rows.start, block_size, block_counts)
    return o, lse, indices


def nsa_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g_cmp: Tensor,
    g_slc: Tensor,
    g_swa: Tensor,
    cu_seqlens_q: Tensor | utils.SequenceLengths,
    cu_seqlens_k: Tensor | None = None,
    *,
    block_size: int = 64,
    block_counts: int = 32,
    window_size: int = 256,
    softmax_scale: float | None = None,
    backend: str = "auto",
) -> Tensor:
    """Native Sparse Attention: the gated sum of the compression, selection and window branches.

    Every token attends, causally and within its own sequence, to the means of complete key blocks, to the tokens of the
    blocks that matter most to it, and to its last tokens. The choice of blocks carries no gradient.

    Args:
        q: (total_q, num_heads, head_dim), fp16, bf16, fp32 or fp64. Where a sequence has fewer queries than keys, its
            queries are its last tokens.
        k, v: (total_k, num_kv_heads, head_dim), like q; query head h reads key/value head h // group_size.
        g_cmp, g_slc, g_swa: (total_q, num_heads), floating point: the gates, already in [0, 1]. The triton backend
            gives NaN gradients for negative ones.
        cu_seqlens_q, cu_seqlens_k: (batch + 1,), int32; k's defaults to q's. Reading them waits for a GPU: callers with
            many layers pass one `SequenceLengths` as cu_seqlens_q instead. Sequences may be empty.
        block_size: tokens per key block, of compression and selection.
        block_counts: blocks per token and key/value head in selection, the token's own included.
        window_size: tokens in the window, the query itself included.
        softmax_scale: defaults to head_dim**-0.5.
        backend: one of `BACKENDS`; "triton" takes no fp64, head_dim up to 128, and all tensors on a CUDA device.
    Returns:
        o: like q.
    Raises:
        ValueError: an argument has a wrong value, shape or dtype. ImportError: triton is not installed.
    """
    inputs = q, k, v, g_cmp, g_slc, g_swa
    settings = block_size, block_counts, window_size, softmax_scale
    if torch.compiler.is_compiling():
        boundaries = operators.boundaries(cu_seqlens_q, cu_seqlens_k)
        return _operator(*inputs, *boundaries, *settings, backend, operators.records_grad(*inputs))[0]
    args, backend = _checked(*inputs, cu_seqlens_q, cu_seqlens_k, *settings, backend)
    with utils.no_autocast(q.device):
        if backend == "reference":
            return reference.nsa_attention_ref(*args)
        if backend == "triton":
            from . import triton_attention

            return triton_attention.nsa_attention(*args)
        return _NSAFunction.apply(*args)


def _checked(
    q, k, v, g_cmp, g_slc, g_swa, cu_seqlens_q, cu_seqlens_k, block_size, block_counts, window_size, softmax_scale,
    backend,
) -> tuple[tuple, str]:  # fmt: skip
    """The arguments of `forward` without save, and the backend, resolved.

    Raises:
        ValueError, ImportError: as `nsa_attention`.
    """
    sizes = {"block_size": block_size, "block_counts": block_counts, "window_size": window_size}
    lengths, softmax_scale, backend = utils.check_call(
        q, k, v, cu_seqlens_q, cu_seqlens_k, softmax_scale, backend, **sizes
    )
    for name, gate in (("g_cmp", g_cmp), ("g_slc", g_slc), ("g_swa", g_swa)):
        if gate.shape != q.shape[:2] or not gate.is_floating_point() or gate.device != q.device:
            raise ValueError(
                f"{name} must be floating point of shape (total_q, num_heads) = {tuple(q.shape[:2])} on {q.device}, "
                f"got {gate.dtype} {tuple(gate.shape)} on {gate.device}"
            )
    return (q, k, v, g_cmp, g_slc, g_swa, lengths, block_size, block_counts, window_size, softmax_scale), backend


# In operators: what backward needs is returned, in memory whose shape does not depend on the backend's choices.


def forward_in_operator(*args, save: bool, rows: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`nsa_attention` of arguments as it takes them, and what `backward_in_operator` needs.

    Args:
        save: whether it will be needed.
        rows: how many rows it shall have, at least as many as queries; those after the queries are zero.
    Returns:
        o; block indices (rows, num_kv_heads, block_counts), outputs (1 or 3, rows, num_heads, head_dim) and lse
        (3, rows, num_heads), all three empty where nothing is saved.
    """
    args, backend = _checked(*args)
    q, k, block_counts = args[0], args[1], args[8]
    saved = empty_saved(q, k, rows, block_counts, backend, save)
    if backend == "reference":
        return reference.nsa_attention_ref(*args).contiguous(), *saved
    if backend == "triton":
        from . import triton_attention

        o, indices, outputs, lses = triton_attention.forward_of_checked(*args, save=save)
    else:
        o, indices, outputs, lses = forward(*args, save=save)
    if save:
        parts = [indices], outputs, lses
        for target, source in zip((saved[0][None], *saved[1:]), parts, strict=True):
            for place, part in zip(target, source, strict=True):
                if part is not None:
                    place[: len(q)] = part
                place[len(q) if part is not None else 0 :] = 0  # never read, but a function has one value
    return o, *saved


def empty_saved(q: Tensor, k: Tensor, rows: int, block_counts: int, backend: str, save: bool) -> tuple[Tensor, ...]:
    """Memory for block indices, outputs and lse, whatever the first dimensions of q and k."""
    acc, backend = utils.accumulate_dtype(q.dtype), utils.resolve_backend(backend, q.device)
    if not save or backend == "reference":
        return tuple(q.new_empty(0, dtype=dtype) for dtype in (torch.int32, q.dtype, acc))
    (num_heads, head_dim), num_kv_heads = q.shape[-2:], k.shape[-2]
    return (
        q.new_empty(rows, num_kv_heads, block_counts, dtype=torch.int32),
        q.new_empty(3 if backend == "triton" else 1, rows, num_heads, head_dim),
        q.new_empty(3, rows, num_heads, dtype=acc),
    )


def backward_in_operator(do, saved, *args) -> tuple[Tensor, ...]:
    """Gradients of q, k, v and the gates; saved and args as `forward_in_operator` returned and got them."""
    args, backend = _checked(*args)
    inputs, settings, rows = args[:6], args[6:], len(do)
    if backend == "reference":
        return operators.vjp(lambda *x: reference.nsa_attention_ref(*x, *settings), inputs, do)
    indices, outputs, lse = saved
    saved = indices[:rows], list(outputs[:, :rows]), list(lse[:, :rows])
    if backend == "triton":
        from . import triton_attention

        return triton_attention.backward_of_checked(do, *inputs, *saved, *settings)
    return backward(do, *inputs, *saved, *settings)


_INPUTS = (
    "Tensor q, Tensor k, Tensor v, Tensor g_cmp, Tensor g_slc, Tensor g_swa, Tensor cu_seqlens_q, Tensor cu_seqlens_k"
)
SETTINGS = "int block_size, int block_counts, int window_size, float? softmax_scale, str backend"


def _fake(q, k, *args):
    block_counts, backend, save = args[7], args[-2], args[-1]
    return operators.like(q), *empty_saved(q, k, q.shape[0], block_counts, backend, save)


_operator = operators.define_differentiable(
    "nsa_attention",
    f"{_INPUTS}, {SETTINGS}, bool save",
    "(Tensor, Tensor, Tensor, Tensor)",
    lambda *args: forward_in_operator(*args[:-1], save=args[-1], rows=len(args[0])),
    _fake,
    num_inputs=6,
    backward=lambda do, saved, *args: backward_in_operator(do, saved, *args[:-1]),
)
