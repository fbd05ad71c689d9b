"""VideoNSA: Qwen2.5-VL whose decoder layers run Native Sparse Attention on vision tokens (arXiv 2510.02295).

Written as a difference from transformers' Qwen2.5-VL. What is new:

- `VideoNSAAttention` sends vision rows, packed over the batch, through `nsa_kernels`, and text rows through
  Qwen2.5-VL's own attention over all earlier keys;
- `VideoNSAModel` decides once per forward call which rows are which (`routing_videonsa.py`), and computes the M-RoPE
  positions that Qwen2.5-VL was trained with (`positions_videonsa.py`);
- every class loads checkpoints under published names as well (`names_videonsa.py`);
- `VideoNSAForConditionalGeneration` generates (`generation_videonsa.py`), and saves `nsa_kernels/` with the weights.

A call without vision tokens (a text prompt, a decoding step) and `nsa_mode="dense"` are Qwen2.5-VL's computation.
"""

import torch
from torch import nn
from transformers import initialization as init
from transformers.conversion_mapping import get_checkpoint_conversion_mapping
from transformers.core_model_loading import PrefixChange
from transformers.generation import GenerationMixin
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import (
    Qwen2_5_VisionTransformerPretrainedModel,
    Qwen2_5_VLAttention,
    Qwen2_5_VLDecoderLayer,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLModel,
    Qwen2_5_VLPreTrainedModel,
    Qwen2_5_VLRMSNorm,
    Qwen2_5_VLRotaryEmbedding,
    Qwen2_5_VLTextModel,
    apply_rotary_pos_emb,
)

try:
    from .cache_videonsa import RoomyCache
    from .configuration_videonsa import AUTO_MAP, NSA_FIELDS, VideoNSAConfig, VideoNSATextConfig
    from .generation_videonsa import CACHE_NAME, VideoGenerationMixin, takes_either_cache_name
    from .hub_videonsa import PushMixin, save_kernel_folder
    from .kernels_videonsa import KERNEL_NAMES, kernel_module
    from .kv_budget_videonsa import mask_of_layer
    from .layer_videonsa import (
        attend_all_text,
        attention_operator,
        place_rows,
        released_operator,
        released_plan,
        released_routing_of,
        released_rows,
        routing_of,
        vision_inputs,
        vision_plan,
    )
    from .names_videonsa import CheckpointNamesMixin
    from .positions_videonsa import check_media, mrope_position_ids, mrope_position_ids_operator
    from .reading_videonsa import ReadingMixin
    from .released_videonsa import ReleasedRouting, check_token_types, may_hold_vision, text_ids_operator
    from .routing_videonsa import VisionRouting, check_sparse_call, first_columns, is_2d, refuse_export, sample_starts
    from .token_types_videonsa import TokenTypesMixin
except ImportError:  # `import modeling_videonsa` from a checkout, without a package
    if __package__:
        raise
    from cache_videonsa import RoomyCache
    from configuration_videonsa import AUTO_MAP, NSA_FIELDS, VideoNSAConfig, VideoNSATextConfig
    from generation_videonsa import CACHE_NAME, VideoGenerationMixin, takes_either_cache_name
    from hub_videonsa import PushMixin, save_kernel_folder
    from kernels_videonsa import KERNEL_NAMES, kernel_module
    from kv_budget_videonsa import mask_of_layer
    from layer_videonsa import (
        attend_all_text,
        attention_operator,
        place_rows,
        released_operator,
        released_plan,
        released_routing_of,
        released_rows,
        routing_of,
        vision_inputs,
        vision_plan,
    )
    from names_videonsa import CheckpointNamesMixin
    from positions_videonsa import check_media, mrope_position_ids, mrope_position_ids_operator
    from reading_videonsa import ReadingMixin
    from released_videonsa import ReleasedRouting, check_token_types, may_hold_vision, text_ids_operator
    from routing_videonsa import VisionRouting, check_sparse_call, first_columns, is_2d, refuse_export, sample_starts
    from token_types_videonsa import TokenTypesMixin


nsa_attention = kernel_module("attention").nsa_attention
records_grad = kernel_module("operators").records_grad

# From `model.layers.*` and `visual.*` to `model.language_model.layers.*` and `model.visual.*`.
_PUBLISHED_NAMES = get_checkpoint_conversion_mapping("Qwen2_5_VLForConditionalGeneration")


class VideoNSAAttention(Qwen2_5_VLAttention):
    """Qwen2.5-VL's attention with gated sparse branches for vision rows.

    The gates are `sigmoid(g_proj_2(gelu(g_proj_1(x))) / gate_temperature)`, three for each head: compression,
    selection, sliding window.
    """

    def __init__(self, config: VideoNSATextConfig, layer_idx: int | None = None):
        super().__init__(config, layer_idx)
        self.g_proj_1 = nn.Linear(config.hidden_size, config.hidden_size, bias=True)
        self.g_proj_2 = nn.Linear(config.hidden_size, 3 * config.num_attention_heads, bias=True)
        # It starts at zero, where every gate is one half. Not told by a type of its own: quantisers go by types.
        self.g_proj_2.starts_at_zero = True

    @takes_either_cache_name
    def forward(
        self,
        hidden_states: torch.Tensor,  # [batch, q_len, hidden_size]
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values=None,
        position_embeddings: tuple[torch.Tensor, torch.Tensor] | None = None,
        vision_routing: VisionRouting | ReleasedRouting | torch.Tensor | None = None,
        **kwargs,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        if vision_routing is None:
            if isinstance(past_key_values, RoomyCache):  # a budget may have left less of this layer than of the first
                num_keys = past_key_values.get_seq_length(self.layer_idx) + hidden_states.shape[1]
                attention_mask = mask_of_layer(attention_mask, num_keys)
            kwargs |= {CACHE_NAME: past_key_values, "position_embeddings": position_embeddings}
            return super().forward(hidden_states, attention_mask, position_ids, **kwargs)

        heads = (*hidden_states.shape[:2], -1, self.head_dim)
        query = self.q_proj(hidden_states).view(heads).transpose(1, 2)  # [batch, num_heads, q_len, head_dim]
        key = self.k_proj(hidden_states).view(heads).transpose(1, 2)  # [batch, num_kv_heads, q_len, head_dim]
        value = self.v_proj(hidden_states).view(heads).transpose(1, 2)
        query, key = apply_rotary_pos_emb(query, key, *position_embeddings)
        dtype = value.dtype
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, self.layer_idx)
        # Under autocast the rotation, and with it what the cache holds, may be in float32.
        query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
        if self.config.nsa_variant == "released":
            output = self._attend_as_released(hidden_states, query, key, value, vision_routing)
        else:
            output = self._attend(hidden_states, query, key, value, vision_routing, **kwargs)
        return self.o_proj(output.flatten(2)), None

    def _gate_logits(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """(..., hidden_size) -> (..., num_heads, 3)."""
        logits = self.g_proj_2(nn.functional.gelu(self.g_proj_1(hidden_states)))
        return logits.unflatten(-1, (-1, 3)) / self.config.gate_temperature

    def _attend(self, hidden_states, query, key, value, routing, **kwargs) -> torch.Tensor:
        """What the routing says of every row. Returns (batch, q_len, num_heads, head_dim)."""
        if torch.compiler.is_compiling():
            return self._attend_in_graph(hidden_states, query, key, value, routing)
        if isinstance(routing, torch.Tensor):  # the model is compiled, but not this layer
            routing = routing_of(routing, query)
        gates = torch.sigmoid(self._gate_logits(hidden_states[routing.vision_rows]))
        return self._attend_rows(query, key, value, gates, routing, **kwargs)

    def _attend_rows(self, query, key, value, gates, routing: VisionRouting, **kwargs) -> torch.Tensor:
        """`_attend` of any share of the heads; gates: (total_q, num_heads, 3)."""
        vision = nsa_attention(*vision_inputs(query, key, value, gates, routing), **self._settings)
        options = self.config._attn_implementation, self.scaling, self.config.nsa_backend
        text = attend_all_text(query, key, value, routing, *options, self, **kwargs)
        return place_rows(query, vision, text, routing)

    def _attend_in_graph(self, hidden_states, query, key, value, routing) -> torch.Tensor:
        """`_attend` in compiled code: gates of every row, and one node for the attention, see layer_videonsa.py."""
        plan = routing if isinstance(routing, torch.Tensor) else routing.plan
        gates, settings = self._gate_logits(hidden_states), tuple(self._settings.values())
        if self.config.nsa_variant == "released":
            return released_operator(query, key, value, gates, plan, *settings)
        inputs = query, key, value, torch.sigmoid(gates)
        options = self.config._attn_implementation or "eager", records_grad(*inputs)
        return attention_operator(*inputs, plan, *settings, *options)[0]

    @property
    def _settings(self) -> dict:
        return {
            "block_size": self.config.block_size,
            "block_counts": self.config.block_counts,
            "window_size": self.config.window_size,
            "softmax_scale": self.scaling,
            "backend": self.config.nsa_backend,
        }

    def _attend_as_released(self, hidden_states, query, key, value, routing) -> torch.Tensor:
        """The published code's attention of whole prompts. Returns (batch, q_len, num_heads, head_dim)."""
        if torch.compiler.is_compiling():
            return self._attend_in_graph(hidden_states, query, key, value, routing)
        if isinstance(routing, torch.Tensor):
            routing = released_routing_of(routing, query)
        return released_rows(
            query, key, value, lambda *rows: self._gate_logits(hidden_states[rows]), routing, **self._settings
        )


class VideoNSADecoderLayer(Qwen2_5_VLDecoderLayer):
    def __init__(self, config: VideoNSATextConfig, layer_idx: int):
        super().__init__(config, layer_idx)
        self.self_attn = VideoNSAAttention(config, layer_idx)


class VideoNSAPreTrainedModel(CheckpointNamesMixin, Qwen2_5_VLPreTrainedModel):
    config: VideoNSAConfig
    config_class = VideoNSAConfig
    _no_split_modules = ["VideoNSADecoderLayer", "Qwen2_5_VLVisionBlock"]

    @torch.no_grad()
    def _init_weights(self, module):
        if getattr(module, "starts_at_zero", False):
            init.zeros_(module.weight)
            init.zeros_(module.bias)
        else:
            super()._init_weights(module)


class VideoNSATextModel(VideoNSAPreTrainedModel, Qwen2_5_VLTextModel):
    config: VideoNSATextConfig
    config_class = VideoNSATextConfig
    _can_record_outputs = {"hidden_states": VideoNSADecoderLayer, "attentions": VideoNSAAttention}
    _checkpoint_renamings = [PrefixChange(prefix_to_remove="language_model", model_prefix="model")]

    def __init__(self, config: VideoNSATextConfig):
        # Not Qwen2_5_VLTextModel.__init__, which would build all its decoder layers first.
        super(Qwen2_5_VLTextModel, self).__init__(config)
        self.padding_idx = config.pad_token_id
        self.vocab_size = config.vocab_size
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, self.padding_idx)
        self.layers = nn.ModuleList([VideoNSADecoderLayer(config, index) for index in range(config.num_hidden_layers)])
        self.norm = Qwen2_5_VLRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.rotary_emb = Qwen2_5_VLRotaryEmbedding(config=config)
        self.has_sliding_layers = False
        self.gradient_checkpointing = False
        self.post_init()

    @takes_either_cache_name
    def forward(self, input_ids=None, attention_mask=None, vision_routing: VisionRouting | None = None, **kwargs):
        tokens = input_ids if input_ids is not None else kwargs.get("inputs_embeds")
        if self.config.nsa_variant == "released" and self.config.nsa_mode == "sparse" and tokens is not None:
            vision_routing = self._route_as_released(tokens, attention_mask, kwargs)
        if vision_routing is not None:
            # The routing says what each row sees. A mapping stops the parent from building an S x S mask.
            attention_mask = {"full_attention": None}
        kwargs[CACHE_NAME] = kwargs.pop("past_key_values", None)
        return super().forward(input_ids, attention_mask, vision_routing=vision_routing, **kwargs)

    def _route_as_released(self, tokens, attention_mask, kwargs) -> ReleasedRouting | torch.Tensor | None:
        if not may_hold_vision(tokens, kwargs):
            return None
        if torch.compiler.is_compiling():
            plan = released_plan(tokens, attention_mask, kwargs, self.config)
            if plan is not None:
                return plan
        refuse_export()
        return ReleasedRouting.build(tokens, attention_mask, kwargs, self.config)


class VideoNSAModel(TokenTypesMixin, VideoNSAPreTrainedModel, Qwen2_5_VLModel):
    # Not Qwen2_5_VLModel's, which would take `model.visual.*` for a part of the language model.
    _checkpoint_renamings = _PUBLISHED_NAMES

    def __init__(self, config: VideoNSAConfig):
        super(Qwen2_5_VLModel, self).__init__(config)  # skip building the dense language model
        self.visual = Qwen2_5_VisionTransformerPretrainedModel._from_config(config.vision_config)
        self.language_model = VideoNSATextModel._from_config(config.text_config)
        self.rope_deltas = None
        self.post_init()

    @takes_either_cache_name
    def forward(
        self,
        input_ids=None,
        attention_mask=None,
        position_ids=None,
        past_key_values=None,
        inputs_embeds=None,
        mm_token_type_ids=None,
        **kwargs,
    ):
        r"""Qwen2.5-VL's forward.

        Args:
            mm_token_type_ids (`torch.IntTensor` of shape `(batch, past + q_len)` or `(batch, q_len)`):
                0 for text, 1 for image, 2 for video tokens, as the processor returns them. Read off `input_ids` where
                missing. Where vision tokens join a cache, the types of the cached tokens are needed too.
        Raises:
            ValueError: the token types have another shape, are missing where they cannot be read off, attention
                weights are asked for of a call that computes none, or pixels and their grid do not come together.
        """
        for name in kwargs.keys() & set(NSA_FIELDS):
            raise ValueError(f"`{name}` = {kwargs[name]!r} is no argument of a call: set model.config.{name}")
        check_media(kwargs, self._placeholders, input_ids)
        tokens = input_ids if input_ids is not None else inputs_embeds
        if past_key_values is not None and hasattr(past_key_values, "mrope_deltas"):
            self.rope_deltas = past_key_values.mrope_deltas  # not those of whatever prompt ran last
        routing = None
        is_released = self.config.nsa_variant == "released"
        # The released variant needs token types to compute positions; from there on, it goes by the positions.
        needs_types = not is_released or position_ids is None or mm_token_type_ids is not None
        if tokens is not None and self.config.nsa_mode == "sparse" and needs_types:
            types, past = self._resolve_token_types(
                input_ids, inputs_embeds, mm_token_type_ids, past_key_values, kwargs
            )
            mm_token_type_ids = types
            grids = (kwargs.get(name) for name in ("image_grid_thw", "video_grid_thw"))
            is_new_text = input_ids is not None and not past and all(x is None for x in (position_ids, *grids))
            if types is not None and is_released and is_new_text and torch.compiler.is_compiling():
                input_ids = text_ids_operator(input_ids, types)
            elif types is not None and is_released:
                check_token_types(types, past, attention_mask, position_ids, kwargs, self.config)
            elif types is not None:
                routing = self._route(types, attention_mask, position_ids, past, kwargs)
        if mm_token_type_ids is not None and tokens is not None:
            mm_token_type_ids = mm_token_type_ids[:, -tokens.shape[1] :]
        outputs = super().forward(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            mm_token_type_ids=mm_token_type_ids,
            vision_routing=routing,
            **{CACHE_NAME: past_key_values},
            **kwargs,
        )
        cache = past_key_values if past_key_values is not None else getattr(outputs, CACHE_NAME, None)
        if cache is not None:
            cache.mrope_deltas = self.rope_deltas
        return outputs

    def _route(self, token_types, attention_mask, position_ids, past, kwargs) -> VisionRouting | None:
        if torch.compiler.is_compiling():
            configs = self.config, self.config.text_config
            plan = vision_plan(token_types, attention_mask, position_ids, past, kwargs, *configs)
            if plan is not None:
                return plan
        refuse_export()
        if not is_2d(attention_mask) and not token_types[:, past:].any():
            return None
        attention_mask = first_columns(attention_mask, token_types.shape[1])
        starts = None if past or attention_mask is not None else sample_starts(position_ids)
        routing = VisionRouting.build(token_types, attention_mask, past, starts)
        if routing is not None:
            configs = self.config, self.config.text_config
            check_sparse_call(attention_mask, position_ids if starts is None else None, past, kwargs, *configs)
        return routing

    # The two below: Qwen2_5_VLModel.forward hands its keyword arguments to the vision tower too.
    def get_video_features(self, pixel_values_videos, video_grid_thw=None, vision_routing=None, **kwargs):
        return super().get_video_features(pixel_values_videos, video_grid_thw, **kwargs)

    def get_image_features(self, pixel_values, image_grid_thw=None, vision_routing=None, **kwargs):
        return super().get_image_features(pixel_values, image_grid_thw, **kwargs)

    def get_rope_index(
        self,
        input_ids,
        mm_token_type_ids,
        image_grid_thw=None,
        video_grid_thw=None,
        second_per_grid_ts=None,
        attention_mask=None,
        **kwargs,
    ):
        """Override: the positions that Qwen2.5-VL was trained with, see `mrope_position_ids`."""
        if torch.compiler.is_compiling():
            seconds = None if second_per_grid_ts is None else torch.as_tensor(second_per_grid_ts)
            return mrope_position_ids_operator(
                mm_token_type_ids,
                image_grid_thw,
                video_grid_thw,
                seconds,
                attention_mask,
                self.config.vision_config.spatial_merge_size,
                float(self.config.vision_config.tokens_per_second),
                self.config.nsa_variant == "released",
            )
        return mrope_position_ids(
            mm_token_type_ids,
            image_grid_thw,
            video_grid_thw,
            second_per_grid_ts,
            attention_mask,
            spatial_merge_size=self.config.vision_config.spatial_merge_size,
            tokens_per_second=self.config.vision_config.tokens_per_second,
            truncate_seconds=self.config.nsa_variant == "released",
        )

    @takes_either_cache_name
    def compute_3d_position_ids(
        self,
        input_ids,
        image_grid_thw,
        video_grid_thw,
        inputs_embeds,
        attention_mask,
        past_key_values,
        second_per_grid_ts=None,
        mm_token_type_ids=None,
    ):
        """Override: vision tokens that join a cache continue from its positions, and a text prompt starts at zero."""
        past = 0 if past_key_values is None else int(past_key_values.get_seq_length())
        if mm_token_type_ids is not None and (image_grid_thw is not None or video_grid_thw is not None):
            length = mm_token_type_ids.shape[1]
            new_mask = None if attention_mask is None else attention_mask[:, past : past + length]
            position_ids, deltas = self.get_rope_index(
                input_ids, mm_token_type_ids, image_grid_thw, video_grid_thw, second_per_grid_ts, new_mask
            )
            cached = past if attention_mask is None else attention_mask[:, :past].sum(-1, keepdim=True)
            # A text prompt, which leaves no deltas behind, has counted its padding.
            old_deltas = self.rope_deltas if past and self.rope_deltas is not None else past - cached
            self.rope_deltas = deltas + old_deltas
            return position_ids + cached + old_deltas
        if not past:
            self.rope_deltas = None  # an earlier prompt's
            return None
        position_ids = super().compute_3d_position_ids(
            input_ids=input_ids,
            image_grid_thw=image_grid_thw,
            video_grid_thw=video_grid_thw,
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            **{CACHE_NAME: past_key_values},
        )
        # transformers counts from the whole mask where there is one; only the new tokens are asked for.
        return None if position_ids is None else position_ids[..., -inputs_embeds.shape[1] :]


class VideoNSAForConditionalGeneration(
    PushMixin,
    ReadingMixin,
    VideoGenerationMixin,
    VideoNSAPreTrainedModel,
    Qwen2_5_VLForConditionalGeneration,
    GenerationMixin,
):
    _checkpoint_renamings = _PUBLISHED_NAMES
    # The same for adapters, where PEFT looks for it.
    _checkpoint_conversion_mapping = {
        r"^visual": "model.visual",
        r"^model(?!\.(language_model|visual))": "model.language_model",
    }

    def __init__(self, config: VideoNSAConfig):
        super(Qwen2_5_VLForConditionalGeneration, self).__init__(config)
        self.model = VideoNSAModel(config)
        self.lm_head = nn.Linear(config.text_config.hidden_size, config.text_config.vocab_size, bias=False)
        self.post_init()

    def save_pretrained(
        self, save_directory, is_main_process: bool = True, state_dict=None, push_to_hub: bool = False, **kwargs
    ):
        is_writer = getattr(self, "should_save_on_this_rank", bool)(is_main_process)  # among processes that share it
        if push_to_hub and kwargs.get("distributed_checkpoint"):
            raise ValueError("`push_to_hub` needs whole weights: not together with `distributed_checkpoint`")
        if push_to_hub and is_writer:
            with self._pushing_what_changes(save_directory, kwargs):
                return self.save_pretrained(save_directory, is_main_process, state_dict, **kwargs)
        # The folder will hold the code, so a fine-tune's references to another repository end here.
        self.config.auto_map = dict(AUTO_MAP)
        super().save_pretrained(save_directory, is_main_process, state_dict, **kwargs)
        if is_writer:
            save_kernel_folder(save_directory, KERNEL_NAMES)

    def _card_arguments(self, repo_id):
        return {"config": self.config.to_dict(), "loaded_from": self.name_or_path, "tags": self.model_tags or []}


VideoNSAForConditionalGeneration.register_for_auto_class("AutoModel")

__all__ = ["VideoNSAForConditionalGeneration", "VideoNSAModel", "VideoNSAPreTrainedModel", "VideoNSATextModel"]
