"""Dense causal attention of few query rows over many keys: a prompt's text rows.

    o[t,h] = softmax attention of q[t,h] over keys 0 .. position of t, with key/value head h // group_size

Through torch's own kernels, here, or through triton_rows.py. The heads of a group become rows of one matrix, so that
torch needs no copy of every key for each head of its group, and rows go in chunks, so that the mask stays small
whatever the prompt's length.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from . import operators, utils

# Elements of a mask: 32 MB, and 128 MB where torch turns it into float32.
_MASK_ELEMENTS = 1 << 25


def text_rows_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    softmax_scale: float | None = None,
    *,
    positions: Tensor | None = None,
    backend: str = "torch",
) -> Tensor:
    """Attention of some tokens of one sample, each over itself and everything before it; differentiable.

    Args:
        q: (rows, num_heads, head_dim), without `positions` the sample's last tokens.
        k, v: (keys, num_kv_heads, head_dim), like q; query head h reads key/value head h // group_size.
        softmax_scale: defaults to head_dim**-0.5.
        positions: (rows,), int32 or int64, strictly ascending, where the rows are among the keys. The values
            are not checked: reading them would wait for the device.
        backend: as in `nsa_attention`. "triton" splits the keys of few rows over a GPU, and leaves shapes that torch
            handles as well to torch.
    Returns:
        o: like q.
    Raises:
        ValueError: an argument has a wrong shape or dtype, or there are more rows than keys.
    """
    if torch.compiler.is_compiling():
        return _operator(q, k, v, positions, softmax_scale, backend)
    num_rows, num_keys = q.shape[0], k.shape[0]
    utils.check_qkv(q, k, v, utils.SequenceLengths.from_lengths([num_rows], [num_keys]))
    if positions is not None and (positions.shape != q.shape[:1] or positions.dtype not in (torch.int32, torch.int64)):
        raise ValueError(
            f"positions must be int32 or int64 of shape (rows,) = ({num_rows},), "
            f"got {positions.dtype} {tuple(positions.shape)}"
        )
    scale = utils.resolve_scale(softmax_scale, q.shape[2])
    if utils.resolve_backend(backend, q.device) == "triton":
        from . import triton_rows

        if not triton_rows.torch_is_as_good(num_rows, num_keys):
            return triton_rows.text_rows_attention(q, k, v, scale, positions)
    q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))  # [1, heads, tokens, head_dim]
    if num_rows == num_keys:
        o = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=True)
        return o[0].transpose(0, 1)
    group_size = q.shape[1] // k.shape[1]
    q = q.unflatten(1, (-1, group_size))  # [1, kv_heads, group, rows, head_dim]
    outputs, step = [], max(1, _MASK_ELEMENTS // (group_size * num_keys))
    for start, rows in zip(range(0, num_rows, step), q.split(step, dim=3), strict=True):
        if positions is None:
            seen = num_keys - num_rows + start + rows.shape[3]
            row_positions = torch.arange(seen - rows.shape[3], seen, device=q.device)
        else:  # the host does not know which keys the rows can do without
            seen, row_positions = num_keys, positions[start : start + step]
        mask = None
        if rows.shape[3] > 1 or positions is not None:
            row_positions = row_positions.repeat(group_size)
            mask = torch.arange(seen, device=q.device) <= row_positions[:, None]  # [group * rows, keys]
        o = F.scaled_dot_product_attention(
            rows.flatten(2, 3), k[:, :, :seen], v[:, :, :seen], attn_mask=mask, scale=scale
        )
        outputs.append(o.unflatten(2, (group_size, -1)))
    return torch.cat(outputs, dim=3).flatten(1, 2)[0].transpose(0, 1)


_operator = operators.define_differentiable(
    "text_rows_attention",
    "Tensor q, Tensor k, Tensor v, Tensor? positions, float? softmax_scale, str backend",
    "Tensor",
    lambda q, k, v, positions, scale, backend: text_rows_attention(
        q, k, v, scale, positions=positions, backend=backend
    ).contiguous(),
    lambda q, *_: operators.like(q),
    num_inputs=3,
)
