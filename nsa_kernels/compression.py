"""Compression branch, attention over the means of complete key blocks, and the choice of blocks (torch backend).

    k~_j = mean of k[jB : (j+1)B], v~_j likewise;  token t sees block j iff (j+1)B <= t+1
    p[h,t,j] = softmax_j(scale * q[t,h] . k~_j);   o[t,h] = sum_j p[h,t,j] v~_j

Native Sparse Attention (arXiv:2502.11089), equations 7 to 9, with mean pooling. The probabilities are computed a tile
of query tokens at a time by `probability_tiles`; backward recomputes them from lse. The same probabilities choose the
blocks that each token and key/value head attends to in the selection branch, equations 10 to 12:

    I[t,g,j] = sum over the query heads h of group g of p[h,t,j],  j < t // B
    The token's own block t // B comes first, then the most important blocks, up to min(n, t // B + 1) in all.

Ties go to the lower block. The choice has no gradient.
"""

from collections.abc import Iterator
from itertools import pairwise

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import head_threads, operators, reference, utils


def pool_blocks(x: Tensor, block_size: int) -> Tensor:
    """Means of the complete blocks of one sequence: (tokens, ...) -> (tokens // block_size, ...)."""
    num_blocks = x.shape[0] // block_size
    return x[: num_blocks * block_size].unflatten(0, (num_blocks, block_size)).mean(1)


def unpool_blocks_(dx: Tensor, d_pooled: Tensor, block_size: int) -> None:
    """Add the gradient of `pool_blocks` to dx, in place: every token of a block gets 1/block_size of its gradient."""
    num_blocks = d_pooled.shape[0]
    dx[: num_blocks * block_size].unflatten(0, (num_blocks, block_size)).add_(d_pooled[:, None] / block_size)


@torch.no_grad()
def probability_tiles(
    q: Tensor, k_cmp: Tensor, first: int, block_size: int, softmax_scale: float
) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """Block probabilities of consecutive tiles of query tokens, for one key/value head.

    Args:
        q: (tokens, group_size, head_dim), the tokens at positions first, first + 1, ...
        k_cmp: (num_blocks, head_dim).
    Yields:
        rows of the tile; probs (rows, group_size, visible), where visible counts the blocks that the last row sees and
        blocks hidden from a row have probability 0, in memory that the next tile takes; lse (rows, group_size), -inf
        where a row sees no block.
    """
    tokens, group_size, _ = q.shape
    lowest = torch.finfo(q.dtype).min
    step = utils.tile_tokens(group_size * (first + tokens) // block_size, q.device)
    scratch = q.new_empty(min(step, tokens) * group_size * ((first + tokens) // block_size))
    for start in range(0, tokens, step):
        rows = slice(start, min(start + step, tokens))
        scores = _scores(q[rows], k_cmp, first + start, block_size, softmax_scale, scratch)
        if scores.shape[-1] == 0:
            yield rows, scores, scores.new_full(scores.shape[:-1], -torch.inf)
            continue
        # A row that sees nothing is all -inf: a finite maximum makes its exponentials 0 instead of nan.
        row_max = scores.amax(-1, keepdim=True).clamp_min_(lowest)
        probs = scores.sub_(row_max).exp2_()
        row_sum = probs.sum(-1, keepdim=True)
        lse = row_sum.log2().add_(row_max).squeeze(-1).mul_(utils.LN_2)
        # The largest term is exp(0), so the sum is at least 1 wherever there is a term at all.
        yield rows, probs.div_(row_sum.clamp_min_(1.0)), lse


def _scores(q: Tensor, k_cmp: Tensor, first: int, block_size: int, softmax_scale: float, scratch: Tensor) -> Tensor:
    """(rows, group_size, visible) scaled scores in units of log 2, in scratch; -inf where a row sees no such block."""
    rows, group_size, head_dim = q.shape
    visible = (first + rows) // block_size
    scores = scratch[: rows * group_size * visible].view(rows * group_size, visible)
    scale = softmax_scale * utils.LOG2_E
    torch.addmm(scores, q.reshape(-1, head_dim), k_cmp[:visible].mT, beta=0, alpha=scale, out=scores)
    scores = scores.view(rows, group_size, visible)
    seen_by_all = (first + 1) // block_size
    if seen_by_all < visible:  # only the last columns of a tile can be hidden from some of its rows
        position = torch.arange(first, first + rows, device=q.device)
        block = torch.arange(seen_by_all, visible, device=q.device)
        hidden = block >= (position[:, None] + 1) // block_size
        scores[..., seen_by_all:].masked_fill_(hidden[:, None], -torch.inf)
    return scores


def compression_backward(
    q: Tensor,
    k_cmp: Tensor,
    v_cmp: Tensor,
    do: Tensor,
    lse: Tensor,
    dk_cmp: Tensor,
    dv_cmp: Tensor,
    first: int,
    block_size: int,
    softmax_scale: float,
    gate: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Gradients of ``gate * o`` for one key/value head; dk_cmp and dv_cmp are added to in place.

    Args:
        q, do: (tokens, group_size, head_dim); lse, gate: (tokens, group_size); gate None means 1.
    Returns:
        dq like q; delta (tokens, group_size), the sum of o * do over head_dim, which is also the gradient of the gate.
    """
    tokens, group_size, head_dim = q.shape
    dq = torch.zeros_like(q)
    delta = torch.zeros_like(lse)
    step = utils.tile_tokens(2 * group_size * (first + tokens) // block_size, q.device)
    scratch = q.new_empty(min(step, tokens) * group_size * ((first + tokens) // block_size))
    for start in range(0, tokens, step):
        rows = slice(start, min(start + step, tokens))
        scores = _scores(q[rows], k_cmp, first + start, block_size, softmax_scale, scratch)
        visible = scores.shape[-1]
        if visible == 0:
            continue
        finite_lse = lse[rows].masked_fill(lse[rows].isneginf(), 0.0)  # exp(-inf - 0) = 0 on rows that see nothing
        probs = scores.sub_(finite_lse.mul_(utils.LOG2_E)[..., None]).exp2_()
        q_rows, do_rows = q[rows].reshape(-1, head_dim), do[rows].reshape(-1, head_dim)
        dscores = (do_rows @ v_cmp[:visible].mT).view_as(probs)
        delta[rows] = (probs * dscores).sum(-1)
        if gate is not None:
            probs.mul_(gate[rows, :, None])
        dv_cmp[:visible].addmm_(probs.view(-1, visible).mT, do_rows)
        dscores = dscores.sub_(delta[rows, :, None]).mul_(probs).mul_(softmax_scale).view(-1, visible)
        dk_cmp[:visible].addmm_(dscores.mT, q_rows)
        dq[rows] = (dscores @ k_cmp[:visible]).view(-1, group_size, head_dim)
    return dq, delta


def choose_blocks(importance: Tensor, first: int, block_size: int, block_counts: int) -> Tensor:
    """The blocks of consecutive tokens, for one key/value head.

    Args:
        importance: (tokens, blocks), not negative, of the tokens at positions first, first + 1, ...; columns from the
            token's own block on are ignored, and columns may stop at the last complete block.
    Returns:
        (tokens, block_counts), int32, ascending, -1 at the end.
    """
    tokens, num_blocks = importance.shape
    own = torch.arange(first, first + tokens, device=importance.device)[:, None] // block_size
    count = min(block_counts - 1, num_blocks)
    before = min(first // block_size, num_blocks)  # columns that are before the own block of every token
    column = torch.arange(num_blocks, device=importance.device)
    if importance.dtype == torch.float32:
        # A non-negative float and its bits order alike. With the reversed column in the low half, keys are unique,
        # so that top-k, whose ties are arbitrary, has none left to break.
        key = importance.view(torch.int32).long().bitwise_left_shift_(32).add_(num_blocks - column)
        key[:, before:].masked_fill_(column[before:] >= own, -1)
        best = key.topk(count, sorted=False).indices
    else:
        importance = importance.masked_fill(column >= own, -1.0)
        best = importance.sort(descending=True, stable=True).indices[:, :count]
    # Where fewer than block_counts exist, top-k returned blocks that are not before the token's own.
    absent = torch.iinfo(torch.int32).max
    chosen = torch.cat([best.masked_fill(best >= own, absent), own], dim=1).sort(dim=1).values
    indices = torch.full((tokens, block_counts), -1, dtype=torch.int32, device=importance.device)
    indices[:, : count + 1] = chosen.masked_fill_(chosen == absent, -1)
    return indices


class _CompressionFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, lengths, block_size, softmax_scale):
        group_size = q.shape[1] // k.shape[1]
        acc = utils.accumulate_dtype(q.dtype)
        o = torch.zeros_like(q, memory_format=torch.contiguous_format)
        lse = torch.empty(q.shape[:2], dtype=acc, device=q.device)

        def of_head(span: utils.Span, head: int) -> None:
            k_cmp, v_cmp = (pool_blocks(utils.kv_head(x, span, head), block_size) for x in (k, v))
            for chunk, first in utils.query_chunks(span, utils.CHUNK_TOKENS):
                index = chunk, utils.head_slice(head, group_size)
                o_chunk, lse_chunk = o[index], lse[index]
                tiles = probability_tiles(q[index].to(acc), k_cmp, first, block_size, softmax_scale)
                for rows, probs, tile_lse in tiles:
                    o_chunk[rows] = probs @ v_cmp[: probs.shape[-1]]
                    lse_chunk[rows] = tile_lse

        head_threads.for_each_head(of_head, q, k.shape[1], lengths)
        ctx.save_for_backward(q, k, v, lse)
        ctx.args = lengths, block_size, softmax_scale
        ctx.mark_non_differentiable(lse)
        return o, lse

    @staticmethod
    @once_differentiable
    @utils.backward_without_autocast
    def backward(ctx, do, _dlse):
        q, k, v, lse = ctx.saved_tensors
        lengths, block_size, softmax_scale = ctx.args
        group_size = q.shape[1] // k.shape[1]
        acc = utils.accumulate_dtype(q.dtype)
        dq, dk, dv = (torch.zeros_like(x, memory_format=torch.contiguous_format) for x in (q, k, v))

        def of_head(span: utils.Span, head: int) -> None:
            k_head, v_head = utils.kv_head(k, span, head), utils.kv_head(v, span, head)
            k_cmp, v_cmp = pool_blocks(k_head, block_size), pool_blocks(v_head, block_size)
            dk_cmp, dv_cmp = torch.zeros_like(k_cmp), torch.zeros_like(v_cmp)
            for chunk, first in utils.query_chunks(span, utils.CHUNK_TOKENS):
                index = chunk, utils.head_slice(head, group_size)
                dq[index], _ = compression_backward(
                    q[index].to(acc), k_cmp, v_cmp, do[index].to(acc), lse[index], dk_cmp, dv_cmp,
                    first, block_size, softmax_scale,
                )  # fmt: skip
            for dx, d_pooled in ((dk, dk_cmp), (dv, dv_cmp)):
                d_head = torch.zeros_like(k_head)
                unpool_blocks_(d_head, d_pooled, block_size)
                dx[span.k_start : span.k_end, head] = d_head

        head_threads.for_each_head(of_head, q, k.shape[1], lengths)
        return dq, dk, dv, None, None, None


def mean_pool(x: Tensor, cu_seqlens: Tensor | utils.SequenceLengths, *, block_size: int = 64) -> tuple[Tensor, Tensor]:
    """Means of the complete blocks of packed keys or values; an incomplete last block has none. Differentiable.

    Args:
        x: (total_k, num_kv_heads, head_dim), floating point.
        cu_seqlens: (batch + 1,), int32, the key boundaries, or a `utils.SequenceLengths`.
    Returns:
        pooled: (total_blocks, num_kv_heads, head_dim), float32, or float64 for float64, so that nothing is rounded
            before the softmax.
        cu_blocks: (batch + 1,), int32, the boundaries of the pooled sequences.
    Raises:
        ValueError: block_size is not positive, or x does not fit cu_seqlens.
    """
    utils.check_positive(block_size=block_size)
    offsets = utils.resolve_lengths(cu_seqlens, None).offsets_k
    if x.dim() != 3 or x.shape[0] != offsets[-1] or not x.is_floating_point():
        raise ValueError(
            f"x must be floating point of shape ({offsets[-1]}, num_kv_heads, head_dim), got {x.dtype} {tuple(x.shape)}"
        )
    x = x.to(utils.accumulate_dtype(x.dtype))
    pooled = [pool_blocks(x[start:end], block_size) for start, end in pairwise(offsets)]
    blocks = utils.SequenceLengths.from_lengths([len(p) for p in pooled], device=x.device)
    return torch.cat([x[:0], *pooled]), blocks.cu_seqlens_k


def compression_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor | utils.SequenceLengths,
    cu_seqlens_k: Tensor | None = None,
    *,
    block_size: int = 64,
    softmax_scale: float | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Attention of every query over the mean key and value of each complete block it can see.

    Args:
        q: (total_q, num_heads, head_dim), fp16, bf16, fp32 or fp64.
        k, v: (total_k, num_kv_heads, head_dim), like q; query head h reads key/value head h // group_size.
        cu_seqlens_q, cu_seqlens_k: (batch + 1,), int32; k's defaults to q's. Or one `utils.SequenceLengths`.
        softmax_scale: defaults to head_dim**-0.5.
        backend: one of `utils.BACKENDS`.
    Returns:
        o: like q, 0 with zero gradient where no block is visible.
        lse: (total_q, num_heads), fp32 (fp64 for fp64), natural log, -inf where no block is visible; no gradient.
    Raises:
        ValueError: an argument has a wrong value, shape or dtype. ImportError: triton is not installed.
    """
    if torch.compiler.is_compiling():
        boundaries = operators.boundaries(cu_seqlens_q, cu_seqlens_k)
        return _operator(q, k, v, *boundaries, block_size, softmax_scale, backend)
    lengths, softmax_scale, backend = utils.check_call(
        q, k, v, cu_seqlens_q, cu_seqlens_k, softmax_scale, backend, block_size=block_size
    )
    with utils.no_autocast(q.device):
        if backend == "reference":
            return reference.compression_attention_ref(q, k, v, lengths, block_size, softmax_scale)
        if backend == "triton":
            from . import triton_attention

            return triton_attention.compression_attention(q, k, v, lengths, block_size, softmax_scale)
        return _CompressionFunction.apply(q, k, v, lengths, block_size, softmax_scale)


_operator = operators.define_differentiable(
    "compression_attention",
    f"{operators.BRANCH_INPUTS}, int block_size, float? softmax_scale, str backend",
    "(Tensor, Tensor)",
    lambda *args: compression_attention(*args[:5], block_size=args[5], softmax_scale=args[6], backend=args[7]),
    operators.fake_branch,
    num_inputs=3,
)


def select_blocks(
    q: Tensor,
    k: Tensor,
    cu_seqlens_q: Tensor | utils.SequenceLengths,
    cu_seqlens_k: Tensor | None = None,
    *,
    block_size: int = 64,
    block_counts: int = 32,
    softmax_scale: float | None = None,
    backend: str = "auto",
) -> Tensor:
    """The blocks that every token and key/value head selects. Carries no gradient.

    Args:
        q: (total_q, num_heads, head_dim), fp16, bf16, fp32 or fp64.
        k: (total_k, num_kv_heads, head_dim), like q.
        cu_seqlens_q, cu_seqlens_k: (batch + 1,), int32; k's defaults to q's. Or one `utils.SequenceLengths`.
        block_counts: blocks per token and key/value head, the token's own included.
        softmax_scale: defaults to head_dim**-0.5.
        backend: one of `utils.BACKENDS`.
    Returns:
        block_indices: (total_q, num_kv_heads, block_counts), int32, counted from the start of the sequence's keys,
            ascending, -1 at the end where fewer blocks exist.
    Raises:
        ValueError: an argument has a wrong value, shape or dtype. ImportError: triton is not installed.
    """
    if torch.compiler.is_compiling():
        boundaries = operators.boundaries(cu_seqlens_q, cu_seqlens_k)
        return _choice_operator(q.detach(), k.detach(), *boundaries, block_size, block_counts, softmax_scale, backend)
    lengths, softmax_scale, backend = utils.check_call(
        q, k, None, cu_seqlens_q, cu_seqlens_k, softmax_scale, backend, block_size=block_size, block_counts=block_counts
    )
    with utils.no_autocast(q.device):
        if backend == "reference":
            return reference.select_blocks_ref(q, k, lengths, block_size, block_counts, softmax_scale)
        if backend == "triton":
            from . import triton_attention

            return triton_attention.select_blocks(q, k, lengths, block_size, block_counts, softmax_scale)
        return _select_blocks(q, k, lengths, block_size, block_counts, softmax_scale)


def _select_blocks(q, k, lengths, block_size, block_counts, softmax_scale):
    group_size = q.shape[1] // k.shape[1]
    acc = utils.accumulate_dtype(q.dtype)
    indices = torch.empty(q.shape[0], k.shape[1], block_counts, dtype=torch.int32, device=q.device)

    def of_head(span: utils.Span, head: int) -> None:
        k_cmp = pool_blocks(utils.kv_head(k, span, head), block_size)
        for chunk, first in utils.query_chunks(span, utils.CHUNK_TOKENS):
            q_chunk, out = q[chunk, utils.head_slice(head, group_size)].to(acc), indices[chunk, head]
            for rows, probs, _ in probability_tiles(q_chunk, k_cmp, first, block_size, softmax_scale):
                out[rows] = choose_blocks(probs.sum(1), first + rows.start, block_size, block_counts)

    head_threads.for_each_head(of_head, q, k.shape[1], lengths)
    return indices


_choice_operator = operators.define(
    "select_blocks",
    "(Tensor q, Tensor k, Tensor cu_seqlens_q, Tensor cu_seqlens_k, int block_size, int block_counts, "
    "float? softmax_scale, str backend) -> Tensor",
    lambda *args: select_blocks(
        *args[:4], block_size=args[4], block_counts=args[5], softmax_scale=args[6], backend=args[7]
    ),
    lambda q, k, *args: q.new_empty(q.shape[0], k.shape[1], args[3], dtype=torch.int32),
)
