"""Oracles: every branch one token at a time, as close to the written definition as code can be.

Nothing here is fast and nothing is shared with the torch backend. Arithmetic runs in the dtype of the inputs, autograd
does the gradients. Arguments are those of the public functions, already checked: `lengths` is a `SequenceLengths`,
`softmax_scale` a number.
"""

import torch
from torch import Tensor


def _attend(q: Tensor, k: Tensor, v: Tensor, softmax_scale: float) -> tuple[Tensor, Tensor]:
    """Softmax attention of the heads of one group at one token: q (group, D), k and v (keys, D), at least one key."""
    scores = q @ k.mT * softmax_scale
    return scores.softmax(-1) @ v, scores.detach().to(_lse_dtype(q)).logsumexp(-1)


def _see_nothing(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """`_attend` without a visible key: zeros, whose gradients are zero rather than missing."""
    return q * (k[:0].sum() + v[:0].sum()), q.new_full(q.shape[:1], -torch.inf, dtype=_lse_dtype(q))


def _lse_dtype(q: Tensor) -> torch.dtype:
    return torch.float64 if q.dtype == torch.float64 else torch.float32


def _over_tokens(q: Tensor, k: Tensor, v: Tensor, lengths, keys_of) -> tuple[Tensor, Tensor]:
    """Stack `keys_of` over all tokens and key/value heads.

    keys_of(row, t, g, q_tg, k_g, v_g) -> o (group, D) and lse (group,), where row is the token's row in the packed q,
    t its position in its sequence, and k_g, v_g (keys, D) that sequence's keys and values of head g.
    """
    group_size = q.shape[1] // k.shape[1]
    o, lse = [q[:0]], [q.new_empty(0, q.shape[1], dtype=_lse_dtype(q))]
    for span in lengths.spans():
        keys, values = k[span.k_start : span.k_end], v[span.k_start : span.k_end]
        for row in range(span.q_start, span.q_end):
            t = span.first + row - span.q_start
            q_t = q[row].unflatten(0, (-1, group_size))
            heads = [keys_of(row, t, g, q_t[g], keys[:, g], values[:, g]) for g in range(k.shape[1])]
            o.append(torch.cat([head[0] for head in heads])[None])
            lse.append(torch.cat([head[1] for head in heads])[None])
    return torch.cat(o), torch.cat(lse)


def _pool(x: Tensor, num_blocks: int, block_size: int) -> Tensor:
    """Means of the first num_blocks blocks of x (keys, D)."""
    return x[: num_blocks * block_size].unflatten(0, (num_blocks, block_size)).mean(1)


def compression_attention_ref(q, k, v, lengths, block_size, softmax_scale):
    """Oracle of `compression.compression_attention`."""

    def attend(row, t, g, q_tg, k_g, v_g):
        visible = (t + 1) // block_size
        if visible == 0:
            return _see_nothing(q_tg, k_g, v_g)
        return _attend(q_tg, _pool(k_g, visible, block_size), _pool(v_g, visible, block_size), softmax_scale)

    return _over_tokens(q, k, v, lengths, attend)


@torch.no_grad()
def select_blocks_ref(q, k, lengths, block_size, block_counts, softmax_scale):
    """Oracle of `compression.select_blocks`."""
    group_size = q.shape[1] // k.shape[1]
    indices = torch.full((q.shape[0], k.shape[1], block_counts), -1, dtype=torch.int32)
    for span in lengths.spans():
        for row in range(span.q_start, span.q_end):
            t = span.first + row - span.q_start
            own, visible = t // block_size, (t + 1) // block_size
            for g in range(k.shape[1]):
                q_tg = q[row, g * group_size : (g + 1) * group_size]
                k_cmp = _pool(k[span.k_start : span.k_end, g], visible, block_size)
                importance = (q_tg @ k_cmp.mT * softmax_scale).softmax(-1).sum(0).tolist()
                ranked = sorted(range(own), key=lambda j, importance=importance: (-importance[j], j))
                chosen = sorted([*ranked[: block_counts - 1], own])
                indices[row, g, : len(chosen)] = torch.tensor(chosen, dtype=torch.int32)
    return indices.to(q.device)


def selection_attention_ref(q, k, v, block_indices, lengths, block_size, softmax_scale):
    """Oracle of `selection.selection_attention`."""

    def attend(row, t, g, q_tg, k_g, v_g):
        chosen = set(block_indices[row, g].tolist())
        positions = [s for s in range(t + 1) if s // block_size in chosen]
        if not positions:
            return _see_nothing(q_tg, k_g, v_g)
        return _attend(q_tg, k_g[positions], v_g[positions], softmax_scale)

    return _over_tokens(q, k, v, lengths, attend)


def sliding_window_attention_ref(q, k, v, lengths, window_size, softmax_scale):
    """Oracle of `sliding_window.sliding_window_attention`."""

    def attend(row, t, g, q_tg, k_g, v_g):
        window = slice(max(0, t - window_size + 1), t + 1)
        return _attend(q_tg, k_g[window], v_g[window], softmax_scale)

    return _over_tokens(q, k, v, lengths, attend)


def nsa_attention_ref(
    q, k, v, g_cmp, g_slc, g_swa, lengths, block_size, block_counts, window_size, softmax_scale, block_indices=None
):
    """Oracle of `attention.nsa_attention`; block_indices replaces the choice of blocks, for tests in low precision."""
    if block_indices is None:
        block_indices = select_blocks_ref(q, k, lengths, block_size, block_counts, softmax_scale)
    o_cmp, _ = compression_attention_ref(q, k, v, lengths, block_size, softmax_scale)
    o_slc, _ = selection_attention_ref(q, k, v, block_indices, lengths, block_size, softmax_scale)
    o_swa, _ = sliding_window_attention_ref(q, k, v, lengths, window_size, softmax_scale)
    gated = g_cmp[..., None] * o_cmp + g_slc[..., None] * o_slc + g_swa[..., None] * o_swa
    return gated.to(q.dtype)
