"""Sparse prefill as attention implementations of transformers: `attn_implementation="xattention"`.

For every method, a function is registered with transformers' `AttentionInterface`, and one with its
`AttentionMaskInterface`: without the second, transformers makes no mask, and padding would count as tokens.

Each sample is computed by itself and without its padding, so that its pairs are those that it would have alone.
"""

import functools
import itertools
from collections.abc import Callable

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import causal_mask_function

from .executor import attend
from .method import SparsePrefill


def register(method_class: type[SparsePrefill]) -> None:
    """Make a method an attention implementation under its name."""
    AttentionInterface.register(method_class.name, functools.partial(forward, method_class))
    AttentionMaskInterface.register(method_class.name, padding_mask)


def padding_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int = 0,
    kv_offset: int = 0,
    mask_function: Callable = causal_mask_function,
    attention_mask: Tensor | None = None,
    device: torch.device | str = "cpu",
    **kwargs,
) -> Tensor | None:
    """What transformers hands the attention as its mask: (batch, filled), false where a key is padding.

    `None` where none is. `filled` are the cached and new keys; what a static cache has behind them is cut off.

    Raises:
        ValueError: the mask is another one than causal with padding, as of several samples packed into one row.
    """
    if mask_function is not causal_mask_function:
        raise ValueError("`mask_function` must be causal: sparse prefill takes no samples packed into one row")
    filled = int(q_offset) + q_length - kv_offset
    valid = None if attention_mask is None else attention_mask[:, kv_offset : kv_offset + filled].bool()
    if filled == kv_length and (valid is None or bool(valid.all())):
        return None
    if valid is None:
        valid = torch.ones(batch_size, filled, dtype=torch.bool, device=device)
    if valid.shape[1] < filled:  # masks that end with the prompt: what follows is no padding
        valid = torch.nn.functional.pad(valid, (0, filled - valid.shape[1]), value=True)
    return valid


def forward(
    method_class: type[SparsePrefill],
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    is_causal: bool | None = None,
    **kwargs,
) -> tuple[Tensor, None]:
    """An attention function of transformers.

    Fewer queries than a block of the method has, such as decoding steps, are dense, and so is the vision tower. What
    was taken is added to `module.sparse_pairs`, sample by sample, but for calls of one query.

    Args:
        module: its `sparse_prefill` is the method with its options; without, the defaults.
        query: (batch, num_heads, num_queries, head_dim); key, value: (batch, num_kv_heads, length, head_dim).
        attention_mask: of `padding_mask`.
    Returns:
        (batch, num_queries, num_heads, head_dim); zero for queries that are padding.
    Raises:
        ValueError: dropout, a mask of another kind, or VideoNSA's sparse mode, which is a sparse attention itself.
    """
    is_causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    if not is_causal:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, is_causal=False, **kwargs
        )
    if dropout:
        raise ValueError(f"`dropout` = {dropout!r}: {method_class.name} has none")
    if getattr(module.config, "nsa_mode", "dense") != "dense":
        raise ValueError(f"{method_class.name} runs in the place of dense attention: set `nsa_mode` = 'dense'")
    if attention_mask is not None and attention_mask.ndim != 2:
        shape = tuple(attention_mask.shape)
        raise ValueError(f"`attention_mask` of {method_class.name} must have shape (batch, length), got {shape}")
    method = vars(module).get("sparse_prefill")
    method = method if isinstance(method, method_class) else method_class()
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    if attention_mask is not None:
        filled = attention_mask.shape[1]
        key, value = key[:, :, :filled], value[:, :, :filled]
    num_queries = query.shape[2]
    if num_queries < method.block_size:
        output = _dense(query, key, value, attention_mask, scale)
    else:
        output = torch.zeros(*query.shape[:3], value.shape[-1], dtype=value.dtype, device=value.device)
    counts = []
    for sample in range(len(query)):
        keys, rows = slice(None), slice(None)
        if attention_mask is not None and not attention_mask[sample].all():
            keys = attention_mask[sample].nonzero()[:, 0]
            rows = attention_mask[sample, -num_queries:].nonzero()[:, 0]
        own = query[sample][:, rows], key[sample][:, keys], value[sample][:, keys]
        length, start = own[1].shape[1], own[1].shape[1] - own[0].shape[1]
        dense = query.shape[1] * (length * (length + 1) - start * (start + 1)) // 2
        taken = dense
        if num_queries >= method.block_size and own[0].shape[1]:
            pattern = method.select(own[0], own[1], scale, module.layer_idx)
            output[sample, :, rows], taken = attend(*own, pattern, scale)
        counts.append((taken, dense))
    if num_queries > 1:
        before = vars(module).get("sparse_pairs", ())
        module.sparse_pairs = [
            (old[0] + new[0], old[1] + new[1]) for old, new in itertools.zip_longest(before, counts, fillvalue=(0, 0))
        ]
    return output.transpose(1, 2).contiguous(), None


def _dense(query: Tensor, key: Tensor, value: Tensor, valid: Tensor | None, scale: float) -> Tensor:
    """Causal attention of the last queries: (batch, num_heads, num_queries, head_dim)."""
    num_queries, length = query.shape[2], key.shape[2]
    mask = None
    if valid is not None or 1 < num_queries < length:
        mask = torch.ones(num_queries, length, dtype=torch.bool, device=query.device).tril(length - num_queries)
        if valid is not None:
            own = torch.eye(length, dtype=torch.bool, device=query.device)[-num_queries:]
            mask = (mask & valid[:, None, None]) | own  # queries that are padding see themselves, not nothing
    return torch.nn.functional.scaled_dot_product_attention(
        query,
        key,
        value,
        attn_mask=mask,
        is_causal=mask is None and num_queries > 1,
        scale=scale,
        enable_gqa=query.shape[1] != key.shape[1],
    )
