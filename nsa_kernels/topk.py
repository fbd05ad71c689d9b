"""Block choice: the blocks that each token and key/value head attends to in the selection branch (torch backend).

    I[t,g,j] = sum over the query heads h of group g of p[h,t,j],  j < t // B
    The token's own block t // B comes first, then the most important blocks, up to min(n, t // B + 1) in all.

Native Sparse Attention (arXiv:2502.11089), equations 10 to 12. Ties go to the lower block. No gradient.
"""

import torch
from torch import Tensor

from . import compression, operators, reference, utils


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
    column = torch.arange(num_blocks, device=importance.device)
    if importance.dtype == torch.float32:
        # A non-negative float and its bits order alike. With the reversed column in the low half, keys are unique,
        # so that top-k, whose ties are arbitrary, has none left to break.
        key = (importance.view(torch.int32).long() << 32) + (num_blocks - column)
        best = key.masked_fill_(column >= own, -1).topk(count, sorted=False).indices
    else:
        importance = importance.masked_fill(column >= own, -1.0)
        best = importance.sort(descending=True, stable=True).indices[:, :count]
    # Where fewer than block_counts exist, top-k returned blocks that are not before the token's own.
    absent = torch.iinfo(torch.int32).max
    chosen = torch.cat([best.masked_fill(best >= own, absent), own], dim=1).sort(dim=1).values
    indices = torch.full((tokens, block_counts), -1, dtype=torch.int32, device=importance.device)
    indices[:, : count + 1] = chosen.masked_fill_(chosen == absent, -1)
    return indices


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
        return _operator(q.detach(), k.detach(), *boundaries, block_size, block_counts, softmax_scale, backend)
    utils.check_positive(block_size=block_size, block_counts=block_counts)
    lengths = utils.resolve_lengths(cu_seqlens_q, cu_seqlens_k)
    utils.check_qkv(q, k, None, lengths)
    softmax_scale = utils.resolve_scale(softmax_scale, q.shape[2])
    backend = utils.resolve_backend(backend, q.device)
    with utils.no_autocast(q.device):
        if backend == "reference":
            return reference.select_blocks_ref(q, k, lengths, block_size, block_counts, softmax_scale)
        if backend == "triton":
            from . import triton_attention

            return triton_attention.select_blocks(q, k, lengths, block_size, block_counts, softmax_scale)
        return _select_blocks(q, k, lengths, block_size, block_counts, softmax_scale)


@torch.no_grad()
def _select_blocks(q, k, lengths, block_size, block_counts, softmax_scale):
    group_size = q.shape[1] // k.shape[1]
    acc = utils.accumulate_dtype(q.dtype)
    indices = torch.empty(q.shape[0], k.shape[1], block_counts, dtype=torch.int32, device=q.device)
    for span in lengths.spans():
        for head in range(k.shape[1]):
            k_cmp = compression.pool_blocks(utils.kv_head(k, span, head), block_size)
            for chunk, first in utils.query_chunks(span, utils.CHUNK_TOKENS):
                q_chunk = q[chunk, utils.head_slice(head, group_size)].to(acc)
                out = indices[chunk, head]
                for rows, probs, _ in compression.probability_tiles(q_chunk, k_cmp, first, block_size, softmax_scale):
                    out[rows] = choose_blocks(probs.sum(1), first + rows.start, block_size, block_counts)
    return indices


_operator = operators.define(
    "select_blocks",
    "(Tensor q, Tensor k, Tensor cu_seqlens_q, Tensor cu_seqlens_k, int block_size, int block_counts, "
    "float? softmax_scale, str backend) -> Tensor",
    lambda *args: select_blocks(
        *args[:4], block_size=args[4], block_counts=args[5], softmax_scale=args[6], backend=args[7]
    ),
    lambda q, k, *args: q.new_empty(q.shape[0], k.shape[1], args[3], dtype=torch.int32),
)
