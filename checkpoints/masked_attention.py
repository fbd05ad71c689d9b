"""The model's attention for training on many short videos at once: the same numbers, by masks instead of sparsity.

Where every row of a batch has its video at the same place, all rows fit into a few dense operations. The kernels, which
walk sequence by sequence, would spend their time on overhead there.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from types import MethodType

import torch
from torch.nn import functional as F
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import apply_rotary_pos_emb

from configuration_videonsa import VideoNSATextConfig
from modeling_videonsa import VideoNSAForConditionalGeneration


@contextmanager
def masked_attention(model: VideoNSAForConditionalGeneration, start: int, stop: int) -> Iterator[None]:
    """Inside, the decoder layers of `model` compute as `masked_forward` does, with vision tokens at start to stop."""
    layers = [layer.self_attn for layer in model.model.language_model.layers]
    for layer in layers:
        layer.vision_span, layer.forward = slice(start, stop), MethodType(masked_forward, layer)
    try:
        yield
    finally:
        for layer in layers:
            del layer.vision_span, layer.forward


def masked_forward(self, hidden_states: torch.Tensor, *args, position_embeddings=None, **kwargs):
    """`VideoNSAAttention.forward` of (batch, length, hidden_size) states without a cache.

    All rows start with the same number of text tokens, then have the same number of vision tokens. Padding is on the
    right; what its rows hold means nothing.
    """
    heads = (*hidden_states.shape[:2], -1, self.head_dim)
    query = self.q_proj(hidden_states).view(heads).transpose(1, 2)
    key = self.k_proj(hidden_states).view(heads).transpose(1, 2)
    value = self.v_proj(hidden_states).view(heads).transpose(1, 2)
    query, key = apply_rotary_pos_emb(query, key, *position_embeddings)
    output = F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)
    if self.config.nsa_mode == "sparse":
        rows = self.vision_span
        logits = self.g_proj_2(F.gelu(self.g_proj_1(hidden_states[:, rows]))) / self.config.gate_temperature
        gates = logits.unflatten(-1, (-1, 3)).sigmoid().transpose(1, 2)  # [batch, num_heads, T, 3]
        vision = masked_nsa(query[:, :, rows], key[:, :, rows], value[:, :, rows], gates, self.config)
        output = torch.cat([output[:, :, : rows.start], vision, output[:, :, rows.stop :]], dim=2)
    return self.o_proj(output.transpose(1, 2).flatten(2)), None


def masked_nsa(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, gates: torch.Tensor, config: VideoNSATextConfig
) -> torch.Tensor:
    """NSA of a batch of sequences of one length.

    Args:
        query: (batch, num_heads, T, head_dim); key, value: (batch, num_kv_heads, T, head_dim).
        gates: (batch, num_heads, T, 3): compression, selection, window.
        config: has `block_size`, `block_counts` and `window_size`.
    Returns:
        Like query.
    """
    num_heads, length, head_dim = query.shape[1:]
    block = config.block_size
    group = num_heads // key.shape[1]
    position = torch.arange(length, device=query.device)
    own = position // block
    num_blocks, complete = -(-length // block), length // block

    output = torch.zeros_like(query)
    importance = query.new_zeros(len(query), key.shape[1], length, num_blocks)
    if complete:
        means = (x[:, :, : complete * block].unflatten(2, (complete, block)).mean(3) for x in (key, value))
        mean_key, mean_value = (x.repeat_interleave(group, 1) for x in means)
        scores = query @ mean_key.transpose(-1, -2) * head_dim**-0.5
        is_visible = torch.arange(complete, device=query.device) < (position[:, None] + 1) // block  # [T, complete]
        weights = scores.masked_fill(~is_visible, -torch.inf).softmax(-1)
        weights = weights.masked_fill(~is_visible.any(-1)[:, None], 0)
        output = gates[..., 0:1] * (weights @ mean_value)
        importance[..., :complete] = weights.detach().unflatten(1, (-1, group)).sum(2)

    blocks = torch.arange(num_blocks, device=query.device)
    importance.masked_fill_(blocks > own[:, None], -1).masked_fill_(blocks == own[:, None], torch.inf)
    chosen = importance.topk(min(config.block_counts, num_blocks), sorted=False).indices
    is_chosen = torch.zeros_like(importance, dtype=torch.bool).scatter_(-1, chosen, True)
    is_past = position <= position[:, None]
    is_selected = is_chosen.repeat_interleave(block, -1)[..., :length].repeat_interleave(group, 1) & is_past
    in_window = is_past & (position > position[:, None] - config.window_size)
    for branch, mask in ((1, is_selected), (2, in_window)):
        attended = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, enable_gqa=True)
        output = output + gates[..., branch : branch + 1] * attended
    return output
