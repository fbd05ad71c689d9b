"""Generation: what `generate` does for VideoNSA otherwise than for Qwen2.5-VL.

`VideoGenerationMixin` tells `forward` the token types and positions of the whole prompt, also where it continues a kept
cache, and refuses the ways to generate that the model cannot follow. What the cache is called depends on the version
of transformers: `CACHE_NAME` and `takes_either_cache_name`.
"""

import functools
import inspect

import torch
import transformers
from torch import nn
from transformers.generation import utils as generation_utils
from transformers.masking_utils import create_masks_for_generate
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VLAttention, Qwen2_5_VLForConditionalGeneration

try:
    from .positions_videonsa import check_media
except ImportError:  # imported from a checkout, without a package
    if __package__:
        raise
    from positions_videonsa import check_media

# What Qwen2.5-VL calls the key-value cache: `past_key_values`, and `cache` from transformers 5.24 on.
CACHE_NAME = "cache" if "cache" in inspect.signature(Qwen2_5_VLAttention.forward).parameters else "past_key_values"


def takes_either_cache_name(method):
    """Let a method's `past_key_values` be given as `cache` as well, in every transformers; given both, `cache` counts.

    What the method calls of Qwen2.5-VL gets it as `CACHE_NAME`.
    """

    @functools.wraps(method)
    def renamed(*args, **kwargs):
        if "cache" in kwargs:
            kwargs["past_key_values"] = kwargs.pop("cache")
        return method(*args, **kwargs)

    return renamed


class VideoGenerationMixin:
    """Overrides of `GenerationMixin` and of Qwen2.5-VL's; goes before transformers' class."""

    @takes_either_cache_name
    def prepare_inputs_for_generation(
        self,
        input_ids,
        next_sequence_length=None,
        past_key_values=None,
        inputs_embeds=None,
        mm_token_type_ids=None,
        is_first_iteration=False,
        **kwargs,
    ):
        inputs = super().prepare_inputs_for_generation(
            input_ids,
            next_sequence_length=next_sequence_length,
            inputs_embeds=inputs_embeds,
            is_first_iteration=is_first_iteration,
            **{CACHE_NAME: past_key_values},
            **kwargs,
        )
        # `generate` feeds the prompt in its first iteration, in one or several calls, and generated tokens, which are
        # text, after that. Only the prompt gets token types, so that decoding steps need not look at them.
        has_cache = past_key_values is not None and kwargs.get("use_cache", True)
        if not has_cache and not is_first_iteration:
            self._check_released_prompt("`use_cache` = False", mm_token_type_ids)
        if mm_token_type_ids is not None and (is_first_iteration or not has_cache or _is_empty(past_key_values)):
            tokens = inputs["inputs_embeds"] if inputs.get("input_ids") is None else inputs["input_ids"]
            total = tokens.shape[1] + (int(past_key_values.get_seq_length()) if has_cache else 0)
            types = mm_token_type_ids[:, :total].to(tokens.device)
            # Assisted decoding appends candidates without extending the types.
            inputs["mm_token_type_ids"] = nn.functional.pad(types, (0, total - types.shape[1]))
        return inputs

    @staticmethod
    def create_masks_for_generate(config, inputs_embeds, attention_mask, *args, is_first_iteration=False, **kwargs):
        """Override: the prompt keeps its 2D mask, from which its own rows' masks are made where they are needed."""
        if is_first_iteration:
            return attention_mask
        return create_masks_for_generate(config, inputs_embeds, attention_mask, *args, **kwargs)

    def _prepare_position_ids_for_generation(self, inputs_tensor, model_kwargs):
        """Override: (4, batch, length), text and M-RoPE positions of the whole prompt, also on a kept cache."""
        cache = model_kwargs.get(CACHE_NAME)
        past = 0 if cache is None else int(cache.get_seq_length())
        is_ids = not inputs_tensor.is_floating_point()
        check_media(model_kwargs, self.model._placeholders, inputs_tensor[:, past:] if is_ids else None)
        names = ("image_grid_thw", "video_grid_thw", "second_per_grid_ts", "attention_mask")
        image_grid, video_grid, seconds, mask = (model_kwargs.get(name) for name in names)
        if image_grid is None and video_grid is None:
            self.model.rope_deltas = getattr(cache, "mrope_deltas", self.model.rope_deltas)
            return super()._prepare_position_ids_for_generation(inputs_tensor, model_kwargs)
        types = model_kwargs.get("mm_token_type_ids")
        if not inputs_tensor.is_floating_point():
            # Missing, or those of a conversation's first call, which do not reach to its end.
            read = self.model.token_types(inputs_tensor)
            is_short = types is not None and types.ndim == 2 and types.shape[1] < read.shape[1]
            if types is None or (is_short and torch.equal(types.to(read), read[:, : types.shape[1]])):
                types = model_kwargs["mm_token_type_ids"] = read
        if types is None or types.shape != inputs_tensor.shape[:2]:
            got = None if types is None else tuple(types.shape)
            raise ValueError(
                f"`mm_token_type_ids` must have shape {tuple(inputs_tensor.shape[:2])}, or be the types of the first "
                f"`input_ids`, got {got}; on a kept cache `generate` takes the whole conversation"
            )
        text_positions = super(Qwen2_5_VLForConditionalGeneration, self)._prepare_position_ids_for_generation(
            inputs_tensor, model_kwargs
        )
        positions, self.model.rope_deltas = self.model.get_rope_index(
            inputs_tensor, types, image_grid, video_grid, seconds, mask
        )
        return torch.cat([text_positions[None], positions])

    def _prepare_multimodal_encoder_kwargs_for_generation(self, model_kwargs):
        """Override: on a kept cache, the vision tower sees the images and videos that are not in it yet."""
        cache, types = model_kwargs.get(CACHE_NAME), model_kwargs.get("mm_token_type_ids")
        past = 0 if cache is None else int(cache.get_seq_length())
        if past and types is not None:
            _drop_cached_media_(model_kwargs, types, past, self.model.visual.spatial_merge_size)
        return super()._prepare_multimodal_encoder_kwargs_for_generation(model_kwargs)

    def _prefill(self, input_ids, generation_config, model_kwargs, *args, **kwargs):
        types, chunk_size = model_kwargs.get("mm_token_type_ids"), generation_config.prefill_chunk_size
        if chunk_size and types is not None and chunk_size < types.shape[1]:
            self._check_released_prompt(f"`prefill_chunk_size` = {chunk_size}", **model_kwargs)
        can_split_media = hasattr(generation_utils, "_slice_mm_encoder_output")  # transformers 5.23 and later
        if chunk_size and model_kwargs.get("mm_encoder_outputs") and not can_split_media:
            raise ValueError(
                f"`prefill_chunk_size` = {chunk_size} with images or videos needs transformers 5.23 or later, which "
                f"splits them over the chunks; this is {transformers.__version__}"
            )
        return super()._prefill(input_ids, generation_config, model_kwargs, *args, **kwargs)

    def _assisted_decoding(self, *args, **kwargs):
        self._check_released_prompt("assisted decoding", **kwargs)
        return super()._assisted_decoding(*args, **kwargs)

    def _validate_generation_mode(self, generation_mode, generation_config, generation_mode_kwargs):
        for name in ("assistant_early_exit", "use_mtp"):
            if (value := getattr(generation_config, name, None)) not in (None, False):
                raise ValueError(
                    f"`{name}` = {value!r}: this model has no layers that were trained to predict tokens before the "
                    "last; draft them with `prompt_lookup_num_tokens`, or with another VideoNSA as `assistant_model`"
                )
        super()._validate_generation_mode(generation_mode, generation_config, generation_mode_kwargs)

    def _get_candidate_generator(
        self,
        generation_config,
        input_ids,
        inputs_tensor,
        logits_processor,
        model_kwargs,
        assistant_model=None,
        **kwargs,
    ):
        """Override: a model for text alone drafts for text prompts, without arguments that it does not know."""
        if assistant_model is not None and not hasattr(assistant_model.config, "vision_config"):
            if self.model.token_types(input_ids).any():
                raise ValueError(
                    f"`assistant_model` = {type(assistant_model).__name__} takes no images or videos, and the prompt "
                    "has some: draft with another VideoNSA, or with `prompt_lookup_num_tokens`"
                )
            own = ("mm_token_type_ids", "mm_encoder_outputs", "position_ids")
            model_kwargs = {name: value for name, value in model_kwargs.items() if name not in own}
        return super()._get_candidate_generator(
            generation_config, input_ids, inputs_tensor, logits_processor, model_kwargs, assistant_model, **kwargs
        )

    @takes_either_cache_name
    def _check_released_prompt(self, argument: str, mm_token_type_ids=None, past_key_values=None, **kwargs) -> None:
        """Raise where new vision tokens of the released variant would meet a part of their prompt, or more than it."""
        is_released = self.config.nsa_variant == "released" and self.config.nsa_mode == "sparse"
        if is_released and mm_token_type_ids is not None:
            past = 0 if past_key_values is None else int(past_key_values.get_seq_length())
            if mm_token_type_ids[:, past:].any():
                raise ValueError(
                    f"{argument}: with nsa_variant='released', images and videos need their whole prompt, and nothing "
                    "after it, in one call, since its compression looks ahead"
                )


def _is_empty(cache) -> bool:
    """Whether nothing is cached, where that is known without a device synchronisation; static caches count as full."""
    return not cache.is_compileable and cache.get_seq_length() == 0


def _drop_cached_media_(inputs: dict, types: torch.Tensor, past: int, spatial_merge_size: int) -> None:
    """Take the pixels and grids of those images and videos out of `inputs` whose tokens are among the first `past`.

    Raises:
        ValueError: an image or a video lies across the end of the cache.
    """
    media = ((1, "pixel_values", "image_grid_thw"), (2, "pixel_values_videos", "video_grid_thw"))
    for kind, pixels_name, grid_name in media:
        pixels, grid = inputs.get(pixels_name), inputs.get(grid_name)
        if pixels is None or grid is None:
            continue
        num_patches = grid.prod(-1).cpu()
        # Media and their tokens come in the same order, so cutting the tokens into lengths gives each medium its own.
        is_kind = (types == kind).cpu()
        is_cached = (is_kind & (torch.arange(types.shape[1]) < past))[is_kind]
        is_cached = is_cached.split((num_patches // spatial_merge_size**2).tolist())
        if any(flags.any() and not flags.all() for flags in is_cached):
            raise ValueError(f"`past_key_values` ends inside an image or a video, after {past} tokens")
        is_new = torch.tensor([not flags.any() for flags in is_cached])
        if is_new.any():
            inputs[grid_name] = grid[is_new.to(grid.device)]
            inputs[pixels_name] = pixels[is_new.repeat_interleave(num_patches).to(pixels.device)]
        else:
            del inputs[grid_name], inputs[pixels_name]
