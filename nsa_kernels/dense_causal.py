"""Dense causal attention through torch's fastest kernel, for packed sequences that one call of it can take.

Where every token selects every block, selection is dense causal attention (triton_attention.py). torch's
scaled_dot_product_attention then brings kernels that were tuned for years, cuDNN's or FlashAttention's: which of the
two is torch's own choice. Sequences of one length, a single one above all, are a batch of one such call. Others are
not: the diagonal of its causal mask starts at the first key, and a call for each of many short sequences is bound by
launches. They stay with triton_rows.py, one launch for any lengths, with queries at the end of their keys.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from . import utils


def is_one_call(q: Tensor, lengths: utils.SequenceLengths) -> bool:
    """Whether `dense_causal_attention` takes these sequences, and does so without forming queries x keys scores.

    In float32 and for odd head dimensions torch may use reduced precision, or a kernel with memory quadratic in tokens.
    """
    num_sequences, total = len(lengths.offsets_q) - 1, lengths.offsets_q[-1]
    return (
        q.dtype in (torch.float16, torch.bfloat16)
        and q.shape[2] % 8 == 0
        and total > 0
        and lengths.offsets_k == lengths.offsets_q == tuple(range(0, total + 1, max(1, total // num_sequences)))
    )


def dense_causal_attention(
    q: Tensor, k: Tensor, v: Tensor, lengths: utils.SequenceLengths, softmax_scale: float
) -> Tensor:
    """Causal attention of every query over the keys of its sequence up to itself; differentiable.

    Args:
        q: (total, num_heads, head_dim); k, v: (total, num_kv_heads, head_dim), like q.
        lengths: for which `is_one_call` holds.
    Returns:
        o: like q, contiguous.
    """
    batch = len(lengths.offsets_q) - 1
    q, k, v = (x.unflatten(0, (batch, -1)).transpose(1, 2) for x in (q, k, v))  # [batch, heads, tokens, head_dim]
    o = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=softmax_scale, enable_gqa=True)
    return o.transpose(1, 2).flatten(0, 1).contiguous()
