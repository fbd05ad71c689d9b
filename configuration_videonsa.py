"""Configuration of VideoNSA: Qwen2.5-VL's, and in its text part the fields of Native Sparse Attention.

Every NSA field is validated whenever it is set, also on a loaded model, where a new value takes effect at the next
forward call. The attention itself is described in arXiv 2510.02295.
"""

import dataclasses
import math
import re
from typing import Any, Literal

from transformers.configuration_utils import SubConfigSpec
from transformers.models.qwen2_5_vl.configuration_qwen2_5_vl import (
    Qwen2_5_VLConfig,
    Qwen2_5_VLTextConfig,
    Qwen2_5_VLVisionConfig,
)

# What a checkpoint's config.json tells transformers' Auto classes. AutoModel maps to the class that can `generate`,
# since that is what its callers expect. AutoModelForCausalLM is left out: with it, `pipeline("text-generation")`
# would accept a video and ignore it.
AUTO_MAP = {
    "AutoConfig": "configuration_videonsa.VideoNSAConfig",
    "AutoModel": "modeling_videonsa.VideoNSAForConditionalGeneration",
    "AutoModelForImageTextToText": "modeling_videonsa.VideoNSAForConditionalGeneration",
    "AutoModelForMultimodalLM": "modeling_videonsa.VideoNSAForConditionalGeneration",
}


def _check_choice(name: str, value: Any, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"`{name}` must be one of {', '.join(map(repr, choices))}, got {value!r}")


def _check_positive_int(name: str, value: Any) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"`{name}` must be a positive integer, got {value!r}")


def _check_nsa_field(name: str, value: Any) -> None:
    """Raise for a value that the NSA field `name` cannot take."""
    if name == "nsa_variant":
        _check_choice(name, value, ("paper", "released"))
    elif name == "nsa_mode":
        _check_choice(name, value, ("sparse", "dense"))
    elif name == "nsa_backend":
        _check_choice(name, value, ("auto", "reference", "torch", "triton"))
    elif name in ("block_size", "block_counts", "window_size"):
        _check_positive_int(name, value)
    elif name == "gate_temperature":
        is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if not is_number or not math.isfinite(value) or value <= 0:
            raise ValueError(f"`gate_temperature` must be a positive number, got {value!r}")


# What `nsa_variant="released"` constrains: the head layout and the sorting network of the published code.
_RELEASED_FIELDS = ("nsa_variant", "num_attention_heads", "num_key_value_heads", "block_size", "block_counts")


def _check_released(variant: str, heads: int, kv_heads: int, block_size: int, block_counts: int) -> None:
    """Raise for a configuration that the published code does not support."""
    if variant != "released":
        return
    for name, value, expected in (("num_attention_heads", heads, 28), ("num_key_value_heads", kv_heads, 4)):
        if value != expected:
            raise ValueError(f"`{name}` must be {expected} with nsa_variant='released', got {value!r}")
    if block_size & (block_size - 1):
        raise ValueError(f"`block_size` must be a power of two with nsa_variant='released', got {block_size!r}")
    if 2 * block_counts > block_size:
        raise ValueError(
            f"`block_counts` must be at most half of `block_size` ({block_size}) with nsa_variant='released', "
            f"got {block_counts!r}"
        )


def _differs_by_a_slip(a: str, b: str) -> bool:
    """Whether at most one letter is missing, surplus or wrong, or two neighbours are swapped."""
    while a and b and a[0] == b[0]:
        a, b = a[1:], b[1:]
    while a and b and a[-1] == b[-1]:
        a, b = a[:-1], b[:-1]
    return max(len(a), len(b)) <= 1 or (len(a) == 2 and a == b[::-1])


def _misspelt_field(key: str) -> str | None:
    """The NSA field that `key` is a slip of the pen away from, or an abbreviation of; `None` for any other name.

    Names that differ in a whole word (`batch_size`, `vocab_size`, `sliding_window_size`, `temperature`) are somebody
    else's: transformers, its users and other libraries set what they like on a configuration.
    """
    words = re.split(r"[_\W]+", key.lower())
    for field in NSA_FIELDS:
        of_field = field.split("_")
        singular = ("".join(word.removesuffix("s") for word in name) for name in (words, of_field))
        if _differs_by_a_slip("".join(words), "".join(of_field)) or _differs_by_a_slip(*singular):
            return field
        is_short = len(words) == len(of_field) and all(len(word) > 2 for word in words)
        if is_short and all(full.startswith(word) for full, word in zip(of_field, words, strict=True)):
            return field
    return None


def _reject_misspelt(keys: dict[str, Any], where: str) -> None:
    """Raise for unknown keys that look like an NSA field; transformers would carry them along and ignore them."""
    for key, value in keys.items():
        if key in NSA_FIELDS:
            raise ValueError(f"`{key}` = {value!r} is misplaced in {where}: it belongs in `text_config`")
        meant = _misspelt_field(key)
        if meant or key.startswith("nsa_"):
            hint = f"; did you mean `{meant}`?" if meant else f"; the NSA fields are {', '.join(NSA_FIELDS)}"
            raise ValueError(f"unknown key `{key}` = {value!r} in {where}{hint}")


def _reject_misspelt_attribute(config: Any, name: str, value: Any) -> None:
    if not name.startswith("_") and not hasattr(type(config), name) and name not in vars(config):
        _reject_misspelt({name: value}, f"{type(config).__name__}")


class VideoNSATextConfig(Qwen2_5_VLTextConfig):
    r"""
    Configuration of the language model. The fields that NSA adds to [`Qwen2_5_VLTextConfig`]:

    nsa_variant (`str`, *optional*, defaults to `"paper"`):
        `"paper"` computes the attention of arXiv 2510.02295; `"released"` reproduces the code published with the
        VideoNSA weights, which computes something else: 28 query and 4 key/value heads, a `block_size` that is a
        power of two, and `block_counts` up to half of it.
    nsa_mode (`str`, *optional*, defaults to `"sparse"`):
        `"sparse"` runs NSA on the vision tokens; `"dense"` runs Qwen2.5-VL's dense attention on every token.
    nsa_backend (`str`, *optional*, defaults to `"auto"`):
        `"reference"`, `"torch"`, `"triton"`, or `"auto"`, which picks one and logs its choice once.
    block_size (`int`, *optional*, defaults to 64):
        Vision tokens per key block, of the compression and the selection branch.
    block_counts (`int`, *optional*, defaults to 32):
        Key blocks that each query token selects, its own included.
    window_size (`int`, *optional*, defaults to 256):
        Vision tokens that the sliding window spans, the query token included.
    gate_temperature (`float`, *optional*, defaults to 0.3):
        Divides the gate logits before the sigmoid.

    Raises:
        ValueError: an NSA field has a value that it or the variant cannot take, a key looks like a misspelt NSA field,
            the attention heads do not divide the hidden size or do not fall into groups of equal size, or a layer has
            dropout or sliding-window attention, which NSA does not.
    """

    model_type = "videonsa_text"
    # The gates are three numbers for each head, ordered by head: they split over devices as the query heads do.
    base_model_tp_plan = Qwen2_5_VLTextConfig.base_model_tp_plan | {"layers.*.self_attn.g_proj_2": "colwise"}

    nsa_variant: Literal["paper", "released"] = "paper"
    nsa_mode: Literal["sparse", "dense"] = "sparse"
    nsa_backend: Literal["auto", "reference", "torch", "triton"] = "auto"
    block_size: int = 64
    block_counts: int = 32
    window_size: int = 256
    gate_temperature: float = 0.3

    def __post_init__(self, **kwargs):
        _reject_misspelt(kwargs, "the text configuration")
        super().__post_init__(**kwargs)
        heads, kv_heads = self.num_attention_heads, self.num_key_value_heads
        _check_positive_int("num_attention_heads", heads)
        _check_positive_int("num_key_value_heads", kv_heads)
        if self.hidden_size % heads:
            raise ValueError(f"`num_attention_heads` ({heads}) must divide `hidden_size` ({self.hidden_size})")
        if heads % kv_heads:
            raise ValueError(f"`num_key_value_heads` ({kv_heads}) must divide `num_attention_heads` ({heads})")
        if "sliding_attention" in self.layer_types:
            raise ValueError(
                f"`layer_types` ({self.layer_types}) must all be 'full_attention': a sliding-window cache drops the "
                "keys that NSA selects from"
            )
        if self.attention_dropout:
            raise ValueError(f"`attention_dropout` must be 0, got {self.attention_dropout!r}: NSA has no dropout")

    # transformers validates typed fields with an exception that is not a ValueError, and only by type.
    def __setattr__(self, name, value):
        _check_nsa_field(name, value)
        _reject_misspelt_attribute(self, name, value)
        state = vars(self) | {name: value}
        if name in _RELEASED_FIELDS and all(field in state for field in _RELEASED_FIELDS):  # not while it is built
            _check_released(*(state[field] for field in _RELEASED_FIELDS))
        super().__setattr__(name, value)


NSA_FIELDS = (
    "nsa_variant",
    "nsa_mode",
    "nsa_backend",
    "block_size",
    "block_counts",
    "window_size",
    "gate_temperature",
)


class _TextField:
    """An NSA field seen from the top-level configuration: reads and writes the text configuration's."""

    def __set_name__(self, owner, name):
        self.name = name

    def __get__(self, config, owner=None):
        if config is None:
            return self
        return getattr(config.text_config, self.name)

    def __set__(self, config, value):
        setattr(config.text_config, self.name, value)


class VideoNSAConfig(Qwen2_5_VLConfig):
    r"""
    Configuration of the whole model: [`Qwen2_5_VLConfig`] with a [`VideoNSATextConfig`] inside.

    The NSA fields live in `text_config`. They may also be given, read and set here, so that
    `VideoNSAConfig(block_counts=16)`, `from_pretrained(repo, block_counts=16)` and
    `model.config.block_counts = 16` all work.

    Raises:
        ValueError: as [`VideoNSATextConfig`]; an NSA field is given here and in `text_config` with different values,
            or is misplaced in `vision_config`.
    """

    model_type = "videonsa"
    sub_configs_defaults = {
        "vision_config": SubConfigSpec(config_class=Qwen2_5_VLVisionConfig),
        "text_config": SubConfigSpec(config_class=VideoNSATextConfig),
    }

    nsa_variant = _TextField()
    nsa_mode = _TextField()
    nsa_backend = _TextField()
    block_size = _TextField()
    block_counts = _TextField()
    window_size = _TextField()
    gate_temperature = _TextField()

    def __post_init__(self, **kwargs):
        given = {name: kwargs.pop(name) for name in NSA_FIELDS if name in kwargs}
        _reject_misspelt(kwargs, "the configuration")
        if isinstance(self.vision_config, dict):
            # `window_size` is a field of the vision tower too, with a meaning of its own.
            known = {field.name for field in dataclasses.fields(Qwen2_5_VLVisionConfig)}
            unknown = {name: value for name, value in self.vision_config.items() if name not in known}
            _reject_misspelt(unknown, "`vision_config`")
        text = self.text_config
        if text is not None and not isinstance(text, dict):
            if not hasattr(text, "nsa_mode"):
                raise ValueError(f"`text_config` must be a dict or a VideoNSATextConfig, got {type(text).__name__}")
            text = {name: getattr(text, name) for name in NSA_FIELDS}
        for name in given.keys() & (text or {}).keys():
            if given[name] != text[name]:
                raise ValueError(f"`{name}` is {given[name]!r} at the top level but {text[name]!r} in `text_config`")
        # All at once, since a variant may take some values only together.
        if text is None:
            kwargs |= given  # with the flat fields of a text configuration, where there are any
        elif isinstance(self.text_config, dict):
            self.text_config = self.text_config | given
        super().__post_init__(**kwargs)

    def __setattr__(self, name, value):
        _reject_misspelt_attribute(self, name, value)
        super().__setattr__(name, value)

    @classmethod
    def from_dict(cls, config_dict, **kwargs):
        # These are `from_pretrained`'s keywords; what matches no field would reach the model's constructor.
        _reject_misspelt({key: value for key, value in kwargs.items() if key not in NSA_FIELDS}, "from_pretrained")
        # With the file's other fields at once, since a variant may take some values only together.
        given = {name: kwargs.pop(name) for name in NSA_FIELDS if name in kwargs}
        text = config_dict.get("text_config")
        config_dict = config_dict | ({"text_config": text | given} if isinstance(text, dict) else given)
        return super().from_dict(config_dict, **kwargs)


VideoNSAConfig.register_for_auto_class()

__all__ = ["VideoNSAConfig", "VideoNSATextConfig"]
