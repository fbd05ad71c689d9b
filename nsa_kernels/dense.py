"""Plain softmax attention with its log-sum-exp, which the torch backend's branches are made of."""

import torch
from torch import Tensor


def skips_the_future(q: Tensor) -> bool:
    """Whether `attend` leaves out the keys that a causal mask hides, and forms no queries x keys scores, for this q."""
    return q.device.type == "cpu"


def attend(
    q: Tensor, k: Tensor, v: Tensor, softmax_scale: float, mask: Tensor | None = None, is_causal: bool = False
) -> tuple[Tensor, Tensor]:
    """o like q, and lse (batch, heads, rows); of rows that the mask hides from every key, both are arbitrary.

    Args:
        q: (batch, heads, rows, head_dim), at least one row; k, v: (batch, heads or 1, keys, head_dim); all float32, or
            all float64.
        mask: added to the scores, of two or four dimensions that broadcast to (batch, heads, rows, keys).
        is_causal: row i sees keys 0 to i; instead of a mask.
    """
    if q.device.type == "cpu":
        # What torch's scaled_dot_product_attention calls on a CPU; itself it does not return the log-sum-exp.
        k, v = (x.expand(-1, q.shape[1], -1, -1) for x in (k, v))
        return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            q, k, v, 0.0, is_causal, attn_mask=mask, scale=softmax_scale
        )
    scores = q @ (k * softmax_scale).mT
    if is_causal:
        mask = torch.full(scores.shape[2:], -torch.inf, dtype=q.dtype, device=q.device).triu_(1)
    if mask is not None:
        scores = scores.add_(mask)
    # A finite maximum keeps nan out of rows that are hidden from all keys.
    row_max = scores.amax(-1, keepdim=True).clamp_min_(torch.finfo(q.dtype).min)
    probs = scores.sub_(row_max).exp_()
    row_sum = probs.sum(-1, keepdim=True)
    return (probs @ v).div_(row_sum), (row_sum.log() + row_max).squeeze(-1)
