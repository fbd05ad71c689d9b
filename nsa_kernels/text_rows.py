"""Dense causal attention of few query rows over many keys: a prompt's text rows.

    o[t,h] = softmax attention of q[t,h] over keys 0 .. position of t, with key/value head h // group_size

Through torch's own kernels, here, or through triton_text.py. The heads of a group become rows of one matrix, so that
torch needs no copy of every key for each head of its group, and
rows go in chunks, so that the mask stays small whatever the prompt's length.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from . import utils

# Elements of a mask: 32 MB, and 128 MB where torch turns it into float32.
_MASK_ELEMENTS = 1 << 25


def text_rows_attention(
    q: Tensor, k: Tensor, v: Tensor, softmax_scale: float | None = None, *, backend: str = "torch"
) -> Tensor:
    """Attention of the last tokens of one sample, each over itself and everything before it; differentiable.

    Args:
        q: (rows, num_heads, head_dim), the sample's last tokens.
        k, v: (keys, num_kv_heads, head_dim), like q; query head h reads key/value head h // group_size.
        softmax_scale: defaults to head_dim**-0.5.
        backend: as in `nsa_attention`. "triton" splits the keys of few rows over a GPU, and leaves shapes that torch
            handles as well to torch.
    Returns:
        o: like q.
    Raises:
        ValueError: an argument has a wrong shape or dtype, or there are more rows than keys.
    """
    num_rows, num_keys = q.shape[0], k.shape[0]
    utils.check_qkv(q, k, v, utils.SequenceLengths.from_lengths([num_rows], [num_keys]))
    scale = utils.resolve_scale(softmax_scale, q.shape[2])
    if utils.resolve_backend(backend, q.device) == "triton":
        from . import triton_text

        if not triton_text.torch_is_as_good(num_rows, num_keys):
            return triton_text.text_rows_attention(q, k, v, scale)
    q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))  # [1, heads, tokens, head_dim]
    if num_rows == num_keys:
        o = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=True)
        return o[0].transpose(0, 1)
    group_size = q.shape[1] // k.shape[1]
    q = q.unflatten(1, (-1, group_size))  # [1, kv_heads, group, rows, head_dim]
    outputs, seen = [], num_keys - num_rows
    for rows in q.split(max(1, _MASK_ELEMENTS // (group_size * num_keys)), dim=3):
        first, seen = seen, seen + rows.shape[3]
        mask = None
        if rows.shape[3] > 1:
            positions = torch.arange(first, seen, device=q.device).repeat(group_size)
            mask = torch.arange(seen, device=q.device) <= positions[:, None]  # [group * rows, keys]
        o = F.scaled_dot_product_attention(
            rows.flatten(2, 3), k[:, :, :seen], v[:, :, :seen], attn_mask=mask, scale=scale
        )
        outputs.append(o.unflatten(2, (group_size, -1)))
    return torch.cat(outputs, dim=3).flatten(1, 2)[0].transpose(0, 1)
