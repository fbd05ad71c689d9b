"""Conversations as their callers write them, checked and brought to the one form that the chat template and
transformers read: every part has a type, and nothing that is None is left.

Keys whose value is None are absent, at every level: messages that went through Arrow, as those of `datasets` do, carry
every key of every other part.
"""

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import transformers
from transformers.processing_utils import ProcessorMixin

try:
    from .budget_videonsa import VideoOptions, check_positive
    from .frames_videonsa import VideoRequest
    from .options_videonsa import refuse_unknown
except ImportError:  # `import processing_videonsa` from a checkout, without a package
    if __package__:
        raise
    from budget_videonsa import VideoOptions, check_positive
    from frames_videonsa import VideoRequest
    from options_videonsa import refuse_unknown

_CONTENT_TYPES = ("text", "image", "image_url", "video")
# Where a part may hold its image or video; a type is needed for those that do not tell it.
_PLACES = {"image": ("image", "image_url", "url", "path", "base64"), "video": ("video", "url", "path")}
_IMAGE_OPTIONS = ("min_pixels", "max_pixels", "resized_height", "resized_width")
# Options of a video in a message: ours, and how qwen-vl-utils spells them.
_VIDEO_OPTIONS = {
    "fps": "fps",
    "sample_fps": "fps",
    "num_frames": "num_frames",
    "nframes": "num_frames",
    "max_frames": "max_frames",
    "min_pixels_per_frame": "min_pixels_per_frame",
    "min_pixels": "min_pixels_per_frame",
    "max_pixels_per_frame": "max_pixels_per_frame",
    "max_pixels": "max_pixels_per_frame",
    "resized_height": "resized_height",
    "resized_width": "resized_width",
}
# Options of qwen-vl-utils that are refused, and what to do.
_REFUSED_VIDEO_OPTIONS = {
    "total_pixels": "give the call `max_total_tokens`, or this video `max_pixels` or `max_frames`",
    "video_start": "cut the file, or give the frames of that part with `sample_fps`",
    "video_end": "cut the file, or give the frames of that part with `sample_fps`",
    "min_frames": "give `num_frames`",
    "raw_fps": "give the call `video_metadata`",
}


class ImageRequest:
    """An image as the caller gave it, with the options of its message.

    No dataclass: transformers makes dicts of those that it finds in a conversation.

    Args:
        options: any of `min_pixels`, `max_pixels`, and `resized_height` with `resized_width`, positive integers.
    """

    def __init__(self, image: Any, options: Mapping[str, int] | None = None):
        self.image, self.options = image, dict(options or {})


def parse_conversation(conversation: Any, templates: str, *, is_read: bool) -> Any:
    """A checked copy of one conversation, or of a batch of them.

    Args:
        conversation: a sequence of messages, or of such sequences.
        templates: text of the chat templates, which tell the keys of messages that have a meaning.
        is_read: its images and videos are to be read: they become an `ImageRequest` or a `VideoRequest` with their
            options, which are checked. Otherwise they stay as they are, for whoever reads them.
    Raises:
        ValueError: something in it that would be ignored, or contradicts itself.
    """
    items = _as_list(conversation)
    if not items:
        raise ValueError(f"a conversation must be a list of messages, got {_shown(conversation)}")
    if any(_as_list(single) is not None for single in items):
        return [parse_conversation(single, templates, is_read=is_read) for single in items]
    return [_parse_message(message, templates, is_read) for message in items if not _is_absent(message)]


def refuse_media(keywords: dict[str, Any], conversation: Any) -> None:
    """Refuse media of a call beside messages, which hold theirs; None and empty lists are taken out of the keywords.

    transformers 5.23 and later takes images for templates that have no place for them in messages.

    Args:
        conversation: as `parse_conversation` returned it.
    Raises:
        ValueError: there are any others.
    """
    for name in ("text", "images", "videos", "audio"):
        media = keywords.get(name)
        if media is None or (isinstance(media, (list, tuple)) and not media):
            keywords.pop(name, None)
        elif name != "images" or _holds_images(conversation):
            raise ValueError(f"`{name}` cannot be given beside messages, which hold theirs")
        elif not hasattr(ProcessorMixin, "_multimodal_inputs_from_conversations"):  # transformers 5.23 and later
            raise ValueError(
                "`images` for messages that only mark their places needs transformers 5.23 or later, this is "
                f"{transformers.__version__}: put them into the messages"
            )


def _holds_images(conversation: Any) -> bool:
    """Whether an `ImageRequest` is in what `parse_conversation` returned."""
    if isinstance(conversation, Mapping):
        return isinstance(conversation.get("image"), ImageRequest) or _holds_images(conversation.get("content"))
    return isinstance(conversation, list) and any(map(_holds_images, conversation))


def without_none(value: Any) -> Any:
    """The same mappings and lists, without keys and items that are None or mappings of nothing but None."""
    if isinstance(value, Mapping):
        return {key: without_none(item) for key, item in value.items() if not _is_absent(item)}
    if isinstance(value, (list, tuple)):
        return [without_none(item) for item in value if not _is_absent(item)]
    return value


def _is_absent(value: Any) -> bool:
    return value is None or (isinstance(value, Mapping) and bool(value) and all(map(_is_absent, value.values())))


def _as_list(value: Any) -> list | None:
    """Lists as `datasets`, pandas and numpy have them; None if it is something else."""
    if isinstance(value, np.ndarray):
        return list(value) if value.ndim == 1 and value.dtype == object else None
    is_text = isinstance(value, (str, bytes, bytearray, memoryview))
    return list(value) if isinstance(value, Sequence) and not is_text else None


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 200 else f"{text[:60]}... ({len(text):,} characters)"


def _parse_message(message: Any, templates: str, is_read: bool) -> dict[str, Any]:
    if not isinstance(message, Mapping):
        raise ValueError(f"a message must be a mapping with `role` and `content`, got {_shown(message)}")
    message = {key: value for key, value in message.items() if not _is_absent(value)}
    if not isinstance(message.get("role"), str):
        raise ValueError(f"`role` of a message must be a text, got {_shown(message.get('role'))}")
    for key in [key for key in message if key not in ("role", "content")]:
        if _is_used(str(key), templates):
            continue
        if message[key] not in ("", False) and not (hasattr(message[key], "__len__") and len(message[key]) == 0):
            raise ValueError(f"`{key}` of a message would be ignored: the chat template does not use it")
        del message[key]
    content = message.get("content")
    if content is None or isinstance(content, str):
        return message
    parts = _as_list(content)
    if parts is None:
        raise ValueError(f"`content` of a message must be a text or a list of parts, got {_shown(content)}")
    return {**message, "content": [_parse_part(part, is_read) for part in parts if not _is_absent(part)]}


def _is_used(key: str, templates: str) -> bool:
    """Whether chat templates look at a key of messages, called as the variables of loops over them are."""
    names = [*re.findall(r"for\s+(\w+)\s+in\s+\w*messages\b", templates), r"messages\s*\[[^\]]*\]"]
    message, key = f"(?:{'|'.join(names)})", re.escape(key)
    places = (
        rf"\b{message}\s*(?:\.|\[\s*['\"]|\.get\(\s*['\"]){key}\b",
        rf"['\"]{key}['\"]\s+(?:not\s+)?in\s+{message}",
    )
    return any(re.search(place, templates) for place in places)


def _parse_part(part: Any, is_read: bool) -> dict[str, Any]:
    if not isinstance(part, Mapping):
        raise ValueError(f"a part of a message must be a mapping, got {_shown(part)}")
    part = {key: value for key, value in part.items() if not _is_absent(value)}
    kind = part.pop("type", None)
    if kind is None:
        kinds = [name for name in _CONTENT_TYPES if name in part]
        if len(kinds) != 1:
            raise ValueError(f"a part of a message needs a `type`, one of {_CONTENT_TYPES}, got {', '.join(part)}")
        kind = kinds[0]
    if kind not in _CONTENT_TYPES:
        # The template would leave it out, and the model would answer about nothing.
        raise ValueError(f"`type` of a part of a message must be one of {_CONTENT_TYPES}, got {_shown(kind)}")
    if kind == "text":
        if not isinstance(part.get("text"), str):
            raise ValueError(f"a text in a message must be given as `text`, got {_shown(part.get('text'))}")
        refuse_unknown(part, ("text",), "a text in a message")
        return {"type": "text", **part}
    kind = "image" if kind == "image_url" else kind
    if not is_read:
        refuse_unknown({"text", "image", "image_url", "video"} & set(part), _PLACES[kind], f"{kind} part of a message")
        return {"type": kind, **part}
    return _read_part(kind, part)


def _read_part(kind: str, part: dict[str, Any]) -> dict[str, Any]:
    a_kind = "an image" if kind == "image" else "a video"
    places = [name for name in _PLACES[kind] if name in part]
    if not places and (kind == "video" or part):
        names = ", ".join(f"`{name}`" for name in _PLACES[kind])
        raise ValueError(f"{a_kind} in a message must be given as {names}, got {', '.join(['type', *part])}")
    if len(places) > 1:
        names = ", ".join(f"`{name}`" for name in places)
        raise ValueError(f"{a_kind} in a message must be given once, got {names}")
    if not places:
        return {"type": "image"}  # the call may bring it as `images`
    media = part.pop(places[0])
    if isinstance(media, Mapping) and kind == "image":  # as OpenAI's clients write it
        refuse_unknown(without_none(media), ("url", "detail"), f"`{places[0]}`")
        if media.get("detail") not in (None, "auto"):
            raise ValueError(f"`detail`={media['detail']!r} of an image is not supported; give `max_pixels`")
        media = media.get("url")
    where = f"{a_kind} in a message"
    if kind == "image":
        refuse_unknown(part, _IMAGE_OPTIONS, where)
        options = {name: check_positive(name, value) for name, value in part.items()}
        if ("resized_height" in options) != ("resized_width" in options):
            raise ValueError(f"`resized_height` and `resized_width` of an image go together, got {', '.join(options)}")
        if options.get("min_pixels", 0) > options.get("max_pixels", math.inf):
            raise ValueError(f"`min_pixels` of an image must not exceed its `max_pixels`, got {options}")
        return {"type": "image", "image": ImageRequest(media, options)}
    for name in part:
        if name in _REFUSED_VIDEO_OPTIONS:
            raise ValueError(f"`{name}` in {where} is not supported: {_REFUSED_VIDEO_OPTIONS[name]}")
    refuse_unknown(part, _VIDEO_OPTIONS, where)
    options = {_VIDEO_OPTIONS[name]: value for name, value in part.items()}
    if len(options) < len(part):
        raise ValueError(f"{where} has two names for one option: {', '.join(part)}")
    return {"type": "video", "video": VideoRequest(media, VideoOptions(**options))}
