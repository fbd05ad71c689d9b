"""Which tokens of a forward call are text, images and videos, with what a cache holds before them."""

import torch
from transformers.utils import logging

logger = logging.get_logger(__name__)


class TokenTypesMixin:
    """For a model with `config.image_token_id` and `config.video_token_id`."""

    @property
    def _placeholders(self) -> dict[str, int]:
        return {"image": self.config.image_token_id, "video": self.config.video_token_id}

    def token_types(self, input_ids: torch.LongTensor) -> torch.LongTensor:
        """0 for text, 1 for image, 2 for video tokens, by their placeholders."""
        return (input_ids == self.config.image_token_id) + 2 * (input_ids == self.config.video_token_id)

    def _resolve_token_types(self, input_ids, inputs_embeds, token_types, past_key_values, kwargs):
        """Types of all cached and new tokens, or `None` where the new ones are known to be text; and the cache length.

        Decoding steps come without types and leave at the first test: no tensor is looked at on the host.
        """
        tokens = input_ids if input_ids is not None else inputs_embeds
        batch, q_len = tokens.shape[:2]
        has_features = any(kwargs.get(key) is not None for key in ("pixel_values", "pixel_values_videos")) or bool(
            kwargs.get("mm_encoder_outputs")
        )
        is_step = past_key_values is not None and q_len == 1
        # A graph that is exported without pixels has no other input that could bring vision tokens.
        if token_types is None and not has_features and (is_step or torch.compiler.is_exporting()):
            return None, 0
        past = 0 if past_key_values is None else int(past_key_values.get_seq_length())
        if token_types is None:
            if past and not has_features:
                return None, past
            if input_ids is None and has_features:
                raise ValueError(
                    "`mm_token_type_ids` is needed with `inputs_embeds`: 0 for text, 1 for image, 2 for video tokens"
                )
            if input_ids is None:
                logger.warning_once("`inputs_embeds` came without `mm_token_type_ids`: every token is taken for text")
                return None, past
            token_types = self.token_types(input_ids)
        return self._complete_token_types(token_types, input_ids, (batch, q_len), past, has_features), past

    def _complete_token_types(self, token_types, input_ids, shape, past: int, has_features: bool):
        """Types of all cached and new tokens, or `None` where the new ones are text.

        `token_types` may be those of the new tokens alone, or of the first cached ones, as a conversation's first call
        had them.
        """
        batch, q_len = shape
        given = token_types.shape[1] if token_types.ndim == 2 and len(token_types) == batch else -1
        if given == past + q_len:
            return token_types
        if given != q_len and not 0 <= given <= past:
            raise ValueError(
                f"`mm_token_type_ids` must have shape {(batch, past + q_len)} (cached and new tokens), "
                f"{(batch, q_len)} (new tokens), or at most {past} columns (cached tokens), "
                f"got {tuple(token_types.shape)}"
            )
        if input_ids is not None:
            new_types = self.token_types(input_ids)
        elif given == q_len or has_features:
            new_types = token_types  # of the new tokens, or too few
        else:
            return None
        if not new_types.any():
            return None
        if given != past or given == q_len:
            raise ValueError(
                f"`mm_token_type_ids` must cover the {past} cached tokens too where vision tokens join a cache: "
                f"expected shape {(batch, past + q_len)}, got {tuple(token_types.shape)}"
            )
        return torch.cat([token_types, new_types.to(token_types)], dim=1)
