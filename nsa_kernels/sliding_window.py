"""Window branch: attention over the last window_size tokens, the query itself included (torch backend).

    o[t,h] = softmax attention of q[t,h] over tokens max(0, t-w+1) .. t

Native Sparse Attention (arXiv:2502.11089), section 3.3.3. A tile of consecutive query tokens meets one contiguous
range of keys, so each tile is two plain matrix products and nothing is gathered. With a window as long as the sequence
this is dense causal attention, which is how the selection branch handles tokens that select every block.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import dense, head_threads, operators, reference, utils

# Query tokens per tile. A tile computes window_size + tile - 1 columns for window_size useful ones.
_TILE_TOKENS = {"cpu": 32}
_TILE_TOKENS_ACCELERATOR = 256


class _Tile(NamedTuple):
    """A tile of queries, or some consecutive ones of equal shape, each with its own range of keys."""

    rows: slice  # of all of them
    keys: slice  # of the first
    number: int
    band: Tensor  # (rows of one, 1, keys of one): 0 inside the window and -inf outside

    def keys_of(self, x: Tensor) -> Tensor:
        """Keys or values (num_keys, head_dim) -> (number, keys of one, head_dim), a view whose parts overlap."""
        step, size = self.band.shape[0], self.band.shape[2]
        return x[self.keys.start : self.keys.stop + (self.number - 1) * step].unfold(0, size, step).mT


def _tiles(q: Tensor, first: int, window_size: int, together: bool = False) -> Iterator[_Tile]:
    """Tiles of the queries at positions first, first + 1, ...; those of equal shape at once, if `together`."""
    tokens, group_size, _ = q.shape
    step = _TILE_TOKENS.get(q.device.type, _TILE_TOKENS_ACCELERATOR)
    step = min(step, utils.tile_tokens(group_size * min(window_size + step, first + tokens), q.device))
    band, start = q.new_empty(0, 1, 0), 0
    while start < tokens:
        stop = min(start + step, tokens)
        keys = slice(max(0, first + start - window_size + 1), first + stop)
        shape = stop - start, 1, keys.stop - keys.start
        if band.shape != shape:  # the band looks the same from tile to tile, once past the start of the sequence
            band = _band(shape[0], shape[2], window_size, q)
        number = (tokens - start) // step if together and keys.start > 0 and stop - start == step else 1
        yield _Tile(slice(start, start + number * (stop - start)), keys, number, band)
        start += number * (stop - start)


def _band(rows: int, keys: int, window_size: int, like: Tensor) -> Tensor:
    """(rows, 1, keys) of 0 inside the window and -inf outside, where the last row and the last key are one token."""
    row = torch.arange(keys - rows, keys, device=like.device)[:, None]
    key = torch.arange(keys, device=like.device)
    outside = (key > row) | (key <= row - window_size)
    return torch.zeros(rows, keys, dtype=like.dtype, device=like.device).masked_fill_(outside, -torch.inf)[:, None]


def window_forward(
    q: Tensor, k: Tensor, v: Tensor, first: int, window_size: int, softmax_scale: float
) -> tuple[Tensor, Tensor]:
    """o (tokens, group_size, head_dim) and lse (tokens, group_size) for one key/value head.

    Args:
        q: (tokens, group_size, head_dim), the tokens at positions first, first + 1, ...; k, v: (num_keys, head_dim).
    """
    tokens, group_size, head_dim = q.shape
    if first == 0 and window_size >= tokens and dense.is_fused(q):
        o, lse = dense.attend(
            q.transpose(0, 1)[None], k[None, None, :tokens], v[None, None, :tokens], softmax_scale, is_causal=True
        )
        return o[0].transpose(0, 1), lse[0].T
    parts = [
        dense.attend(
            q[tile.rows].reshape(tile.number, 1, -1, head_dim), tile.keys_of(k)[:, None], tile.keys_of(v)[:, None],
            softmax_scale, tile.band.expand(-1, group_size, -1).flatten(0, 1),
        )
        for tile in _tiles(q, first, window_size, together=dense.is_fused(q))
    ]  # fmt: skip
    if len(parts) == 1:
        ((o, lse),) = parts
    else:
        o, lse = (torch.cat([x.flatten(0, 2) for x in side]) for side in zip(*parts, strict=True))
    return o.view_as(q), lse.reshape(q.shape[:2])


def window_backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    do: Tensor,
    lse: Tensor,
    dk: Tensor,
    dv: Tensor,
    first: int,
    window_size: int,
    softmax_scale: float,
    gate: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Gradients of ``gate * o`` for one key/value head; dk and dv (num_keys, head_dim) are added to in place.

    Returns:
        dq like q; delta (tokens, group_size), the sum of o * do over head_dim, which is also the gradient of the gate.
    """
    dq = torch.empty_like(q)
    delta = torch.empty_like(lse)
    for rows, keys, _, band in _tiles(q, first, window_size):
        q_rows, do_rows = q[rows].flatten(0, 1), do[rows].flatten(0, 1)
        scores = (q_rows @ (k[keys] * softmax_scale).mT).view(-1, q.shape[1], band.shape[2])
        probs = scores.add_(band).sub_(lse[rows, :, None]).exp_()
        dscores = (do_rows @ v[keys].mT).view_as(probs)
        delta[rows] = (probs * dscores).sum(-1)
        if gate is not None:
            probs.mul_(gate[rows, :, None])
        dv[keys].addmm_(probs.flatten(0, 1).mT, do_rows)
        dscores = dscores.sub_(delta[rows, :, None]).mul_(probs).mul_(softmax_scale).flatten(0, 1)
        dk[keys].addmm_(dscores.mT, q_rows)
        dq[rows] = (dscores @ k[keys]).view(dq[rows].shape)
    return dq, delta


class _WindowFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, lengths, window_size, softmax_scale):
        group_size = q.shape[1] // k.shape[1]
        acc = utils.accumulate_dtype(q.dtype)
        o = torch.empty_like(q, memory_format=torch.contiguous_format)
        lse = torch.empty(q.shape[:2], dtype=acc, device=q.device)

        def of_head(span: utils.Span, head: int) -> None:
            k_head, v_head = utils.kv_head(k, span, head), utils.kv_head(v, span, head)
            for chunk, first in utils.query_chunks(span, utils.CHUNK_TOKENS):
                index = chunk, utils.head_slice(head, group_size)
                o[index], lse[index] = window_forward(
                    q[index].to(acc), k_head, v_head, first, window_size, softmax_scale
                )

        head_threads.for_each_head(of_head, q, k.shape[1], lengths)
        ctx.save_for_backward(q, k, v, lse)
        ctx.args = lengths, window_size, softmax_scale
        ctx.mark_non_differentiable(lse)
        return o, lse

    @staticmethod
    @once_differentiable
    @utils.backward_without_autocast
    def backward(ctx, do, _dlse):
        q, k, v, lse = ctx.saved_tensors
        lengths, window_size, softmax_scale = ctx.args
        group_size = q.shape[1] // k.shape[1]
        acc = utils.accumulate_dtype(q.dtype)
        dq, dk, dv = (torch.zeros_like(x, memory_format=torch.contiguous_format) for x in (q, k, v))

        def of_head(span: utils.Span, head: int) -> None:
            k_head, v_head = utils.kv_head(k, span, head), utils.kv_head(v, span, head)
            dk_head, dv_head = torch.zeros_like(k_head), torch.zeros_like(v_head)
            for chunk, first in utils.query_chunks(span, utils.CHUNK_TOKENS):
                index = chunk, utils.head_slice(head, group_size)
                dq[index], _ = window_backward(
                    q[index].to(acc), k_head, v_head, do[index].to(acc), lse[index], dk_head, dv_head,
                    first, window_size, softmax_scale,
                )  # fmt: skip
            dk[span.k_start : span.k_end, head] = dk_head
            dv[span.k_start : span.k_end, head] = dv_head

        head_threads.for_each_head(of_head, q, k.shape[1], lengths)
        return dq, dk, dv, None, None, None


def sliding_window_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor | utils.SequenceLengths,
    cu_seqlens_k: Tensor | None = None,
    *,
    window_size: int = 256,
    softmax_scale: float | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Causal attention of every query over its last window_size tokens, itself included.

    Args:
        q: (total_q, num_heads, head_dim), fp16, bf16, fp32 or fp64.
        k, v: (total_k, num_kv_heads, head_dim), like q; query head h reads key/value head h // group_size.
        cu_seqlens_q, cu_seqlens_k: (batch + 1,), int32; k's defaults to q's. Or one `utils.SequenceLengths`.
        softmax_scale: defaults to head_dim**-0.5.
        backend: one of `utils.BACKENDS`.
    Returns:
        o: like q. lse: (total_q, num_heads), fp32 (fp64 for fp64), natural log; no gradient.
    Raises:
        ValueError: an argument has a wrong value, shape or dtype. ImportError: triton is not installed.
    """
    if torch.compiler.is_compiling():
        boundaries = operators.boundaries(cu_seqlens_q, cu_seqlens_k)
        return _operator(q, k, v, *boundaries, window_size, softmax_scale, backend)
    lengths, softmax_scale, backend = utils.check_call(
        q, k, v, cu_seqlens_q, cu_seqlens_k, softmax_scale, backend, window_size=window_size
    )
    with utils.no_autocast(q.device):
        if backend == "reference":
            return reference.sliding_window_attention_ref(q, k, v, lengths, window_size, softmax_scale)
        if backend == "triton":
            from . import triton_attention

            return triton_attention.sliding_window_attention(q, k, v, lengths, window_size, softmax_scale)
        return _WindowFunction.apply(q, k, v, lengths, window_size, softmax_scale)


_operator = operators.define_differentiable(
    "sliding_window_attention",
    f"{operators.BRANCH_INPUTS}, int window_size, float? softmax_scale, str backend",
    "(Tensor, Tensor)",
    lambda *args: sliding_window_attention(*args[:5], window_size=args[5], softmax_scale=args[6], backend=args[7]),
    operators.fake_branch,
    num_inputs=3,
)
