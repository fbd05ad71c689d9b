"""Dense attention: the softmax that branches are made of, whole prompts, and a prompt's text rows.

    o[t,h] = softmax attention of q[t,h] over keys 0 .. position of t, with key/value head h // group_size

Text rows are few rows over many keys. Through torch's own kernels, here, or through triton_rows.py. The heads of a
group become rows of one matrix, so that torch needs no copy of every key for each head of its group, and rows go in
chunks, so that the mask stays small whatever the prompt's length.

Where every token selects every block, selection is dense causal attention (triton_attention.py). torch's
scaled_dot_product_attention then brings kernels that were tuned for years, cuDNN's or FlashAttention's: which of the
two is torch's own choice. Sequences of one length, a single one above all, are a batch of one such call. Others are
not: the diagonal of its causal mask starts at the first key, and a call for each of many short sequences is bound by
launches. They stay with triton_rows.py, one launch for any lengths, with queries at the end of their keys.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from . import operators, utils

# Elements of a mask: 32 MB, and 128 MB where torch turns it into float32.
_MASK_ELEMENTS = 1 << 25


def is_fused(q: Tensor) -> bool:
    """Whether `attend` takes this q through one kernel, which forms no queries x keys scores."""
    return q.device.type == "cpu"


def attend(
    q: Tensor, k: Tensor, v: Tensor, softmax_scale: float, mask: Tensor | None = None, is_causal: bool = False
) -> tuple[Tensor, Tensor]:
    """o like q, and lse (batch, heads, rows); where the mask hides every key from a row, o is 0 and lse arbitrary.

    Args:
        q: (batch, heads, rows, head_dim), at least one row; k, v: (batch, heads or 1, keys, head_dim); all float32, or
            all float64.
        mask: added to the scores, of two or four dimensions that broadcast to (batch, heads, rows, keys).
        is_causal: row i sees keys 0 to i; instead of a mask, and only where `is_fused`.
    """
    if is_fused(q):
        # What torch's scaled_dot_product_attention calls on a CPU; itself it does not return the log-sum-exp. It hides
        # scores before it scales them, and takes numbers of a row to lie side by side.
        q, softmax_scale = utils.positive_scale(q, softmax_scale)
        q = q if q.stride(-1) == 1 else q.contiguous()
        k, v = (x.expand(-1, q.shape[1], -1, -1) for x in (k, v))
        return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            q, k, v, 0.0, is_causal, attn_mask=mask, scale=softmax_scale
        )
    assert not is_causal
    scores = q @ (k * softmax_scale).mT
    if mask is not None:
        scores = scores.add_(mask)
    # A finite maximum keeps nan out of rows that are hidden from all keys.
    row_max = scores.amax(-1, keepdim=True).clamp_min_(torch.finfo(q.dtype).min)
    probs = scores.sub_(row_max).exp_()
    row_sum = probs.sum(-1, keepdim=True)
    lse = (row_sum.log() + row_max).squeeze(-1)
    # The largest term is exp(0), so the sum is at least 1 wherever there is a term at all.
    return (probs @ v).div_(row_sum.clamp_min_(1.0)), lse


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
    q, softmax_scale = utils.positive_scale(q, softmax_scale)  # torch's kernels may hide scores before they scale them
    q, k, v = (x.unflatten(0, (batch, -1)).transpose(1, 2) for x in (q, k, v))  # [batch, heads, tokens, head_dim]
    o = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=softmax_scale, enable_gqa=True)
    return o.transpose(1, 2).flatten(0, 1).contiguous()


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
        ValueError: an argument has a wrong shape, dtype or device, or there are more rows than keys.
    """
    if torch.compiler.is_compiling():
        return _operator(q, k, v, positions, softmax_scale, backend)
    num_rows, num_keys = q.shape[0], k.shape[0]
    utils.check_qkv(q, k, v, utils.SequenceLengths.from_lengths([num_rows], [num_keys]))
    utils.check_positions(positions, q)
    scale = utils.resolve_scale(softmax_scale, q.shape[2])
    if not num_rows:
        return q.clone()
    if utils.resolve_backend(backend, q.device) == "triton":
        from . import triton_rows

        if not triton_rows.torch_is_as_good(num_rows, num_keys):
            return triton_rows.text_rows_of_checked(q, k, v, scale, positions)
    q, scale = utils.positive_scale(q, scale)
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
