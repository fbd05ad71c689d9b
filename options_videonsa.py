"""Options of a call: sorted, and refused where they are unknown, contradict each other or would have no effect."""

import difflib
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
from transformers.image_utils import SizeDict
from transformers.processing_utils import ImagesKwargs, ProcessingKwargs, TextKwargs, VideosKwargs
from transformers.utils import logging

try:
    from .budget_videonsa import MIN_SAMPLED_FRAMES, VideoOptions, check_positive, smart_resize
    from .pictures_videonsa import WHITE
except ImportError:  # `import processing_videonsa` from a checkout, without a package
    if __package__:
        raise
    from budget_videonsa import MIN_SAMPLED_FRAMES, VideoOptions, check_positive, smart_resize
    from pictures_videonsa import WHITE

logger = logging.get_logger(__name__)

SAMPLING_OPTIONS = ("fps", "num_frames", "max_frames", "min_pixels_per_frame", "max_pixels_per_frame")
OWN_OPTIONS = (*SAMPLING_OPTIONS, "max_total_tokens")
# Keywords of Qwen2VLVideoProcessor and Qwen2VLImageProcessor that would contradict the plan or have no effect on it.
REFUSED_OPTIONS = {
    "do_convert_rgb": "the model takes RGB",
    "do_center_crop": "what a picture shows is not cut",
    "crop_size": "what a picture shows is not cut",
    "do_pad": "pictures are resized, not padded",
    "pad_size": "pictures are resized, not padded",
    "default_to_square": "pictures keep their shape",
    "image_seq_length": "it follows from the size of the image",
    "cap_pixels_per_frame": "`max_pixels_per_frame` and `max_total_tokens` do its work",
    "max_video_tokens": "use `max_total_tokens`",
    "min_frames": f"sampling by `fps` takes at least {MIN_SAMPLED_FRAMES} frames, as Qwen2.5-VL does",
    "patch_size": "it belongs to the model",
    "merge_size": "it belongs to the model",
    "temporal_patch_size": "it belongs to the model",
}


def refuse_unknown(given: Iterable[str], known: Iterable[str], place: str = "") -> None:
    """Raise a ValueError that names the first of `given` that is not in `known`, and what is like it."""
    known = set(known)
    for name in given:
        if name not in known:
            close = difflib.get_close_matches(str(name), sorted(known), n=1)
            hint = f"; did you mean `{close[0]}`?" if close else ""
            where = f" in {place}" if place else ""
            raise ValueError(f"`{name}`{where} is not an option of VideoNSAProcessor{hint}")


def is_refused(name: str, value: Any) -> bool:
    """Whether an option is among those refused, and asks for something else than what is done anyway."""
    return name in REFUSED_OPTIONS and value is not None and value is not (name == "do_convert_rgb")


def call_keywords(processor: Any) -> set[str]:
    """What a call of the processor takes besides texts, images and videos."""
    keywords = {
        *OWN_OPTIONS,
        "stream_videos",
        "return_mm_token_type_ids",
        "return_text_replacement_offsets",
        "common_kwargs",
    }
    for kwargs in (TextKwargs, ProcessingKwargs, ImagesKwargs, VideosKwargs):
        keywords |= set(kwargs.__annotations__)
    return keywords | _valid(processor.image_processor, ImagesKwargs) | _valid(processor.video_processor, VideosKwargs)


def _valid(part: Any, base: type) -> set[str]:
    return set(base.__annotations__) | set(part.valid_kwargs.__annotations__)


def sort_options(processor: Any, named: dict[str, Any], kwargs: dict[str, Any]) -> tuple[dict, dict, dict]:
    """Split the keywords of a call.

    Args:
        named: our options by name, None where nothing was given.
        kwargs: all other keywords, of which `common_kwargs`, `videos_kwargs` and `images_kwargs` may hold more.
    Returns:
        our options by name; how frames are resized here; the keywords that transformers is to handle.
    Raises:
        ValueError: one that is unknown, given twice, has no effect, or contradicts another.
    """
    kwargs = {key: dict(value) if isinstance(value, Mapping) else value for key, value in kwargs.items()}
    kwargs = {key: value for key, value in kwargs.items() if value is not None or not key.endswith("_kwargs")}
    for name, value in (kwargs.pop("common_kwargs", None) or {}).items():
        place = named if name in named else kwargs
        if place.get(name) is not None:
            raise ValueError(f"`{name}` was given twice: as a keyword and in `common_kwargs`")
        place[name] = value
    videos_kwargs = kwargs.setdefault("videos_kwargs", {})
    images_kwargs = kwargs.setdefault("images_kwargs", {})
    for name, value in named.items():
        inner = videos_kwargs.pop(name, None)
        if inner is not None and value is not None:
            raise ValueError(f"`{name}` was given twice: as a keyword and in `videos_kwargs`")
        named[name] = value if inner is None else inner
    sample = named["do_sample_frames"]
    if sample is not None and not isinstance(sample, (bool, np.bool_)):
        raise ValueError(f"`do_sample_frames` must be True, False or None, got {sample!r}")
    named["do_sample_frames"] = None if sample is None else bool(sample)
    refuse_unknown(kwargs, call_keywords(processor))
    known = {*_valid(processor.video_processor, VideosKwargs), *named}
    refuse_unknown(videos_kwargs, known, "`videos_kwargs`")
    refuse_unknown(images_kwargs, _valid(processor.image_processor, ImagesKwargs), "`images_kwargs`")
    refuse_unknown(kwargs.get("text_kwargs") or {}, TextKwargs.__annotations__, "`text_kwargs`")
    refuse_unknown(kwargs.get("audio_kwargs") or {}, (), "`audio_kwargs`")
    for name, value in (*kwargs.items(), *videos_kwargs.items(), *images_kwargs.items()):
        if is_refused(name, value):
            raise ValueError(f"`{name}` cannot be set in a call: {REFUSED_OPTIONS[name]}")

    # Keywords that transformers handles for images, and that are handled here for videos.
    videos = {}
    for name in ("do_resize", "resample", "input_data_format", "do_convert_rgb", "size", "min_pixels", "max_pixels"):
        value = kwargs.pop(name, None)
        inner = videos_kwargs.pop(name, None)
        if value is not None:
            for place, other in (("videos_kwargs", inner), ("images_kwargs", images_kwargs.get(name))):
                if other is not None:
                    raise ValueError(f"`{name}` was given twice: as a keyword and in `{place}`")
            images_kwargs[name] = value
        videos[name] = value if inner is None else inner
    size = videos["size"] or {}
    if not isinstance(size, Mapping) or set(size) - {"shortest_edge", "longest_edge"}:
        raise ValueError(f"`size` must hold shortest_edge and longest_edge, got {size!r}")
    for limit, edge in (("min_pixels", "shortest_edge"), ("max_pixels", "longest_edge")):
        values = [named[f"{limit}_per_frame"], videos[limit], size.get(edge)]
        if None not in values[1:] and values[1] != values[2]:
            raise ValueError(f"`{limit}`={values[1]} contradicts `size`, which has {edge}={values[2]}")
        named[f"{limit}_per_frame"] = next((value for value in values if value is not None), None)
    resizing = {
        "do_resize": processor.video_processor.do_resize if videos["do_resize"] is None else videos["do_resize"],
        "resample": processor.video_processor.resample if videos["resample"] is None else videos["resample"],
        "input_data_format": videos["input_data_format"],
    }
    return named, resizing, kwargs


def image_limits(image_processor: Any, options: dict[str, Any]) -> tuple[int, int]:
    """Least and most pixels of an image; `min_pixels` and `max_pixels` in `options` become its `size`."""
    size = options.get("size")
    size = dict(size) if isinstance(size, (Mapping, SizeDict)) else {}
    limits = dict(image_processor.size) | size
    for name, edge in (("min_pixels", "shortest_edge"), ("max_pixels", "longest_edge")):
        value = check_positive(name, options.pop(name, None))
        if value is not None:
            if size.get(edge, value) != value:
                raise ValueError(f"`{name}`={value} contradicts `size`, which has {edge}={size[edge]}")
            limits[edge] = size[edge] = value
    low, high = limits.get("shortest_edge"), limits.get("longest_edge")
    if size and "shortest_edge" not in size and low is not None:
        low = limits["shortest_edge"] = min(low, high)  # a default gives way
    if size.keys() & {"shortest_edge", "longest_edge"}:
        options["size"] = limits
    return low, high


def image_size(
    image_processor: Any, size: tuple[int, int], asked: Mapping[str, int], low: int, high: int
) -> tuple[int, int]:
    """Height and width of a resized image whose message asks for something, within the limits of the call.

    Args:
        size: height and width as they are.
        asked: any of `min_pixels`, `max_pixels`, and `resized_height` with `resized_width`.
        low, high: least and most pixels, of `image_limits`.
    Raises:
        ValueError: sides that differ more than 200 times.
    """
    height, width = asked.get("resized_height", size[0]), asked.get("resized_width", size[1])
    pixels = max(asked.get("min_pixels", 0), asked.get("max_pixels", 0), asked.get("resized_height", 0) * width)
    if pixels > high:
        logger.warning_once(
            f"An image in a message asks for {dict(asked)}; the limit of {high} pixels applies. Raise `max_pixels` in "
            "the call to allow more."
        )
    high = min(high, asked.get("max_pixels", high))
    factor = image_processor.patch_size * image_processor.merge_size
    low = min(high, asked.get("min_pixels", low))
    return smart_resize(height, width, factor=factor, min_pixels=low, max_pixels=high)


def options_of(video_processor: Any) -> dict[str, Any]:
    """Options of a processor that a video processor brings: those that are not the defaults of its class."""
    stock, found = type(video_processor), {}
    for name in ("fps", "num_frames", "max_frames", "min_frames", "max_video_tokens", "cap_pixels_per_frame"):
        value = getattr(video_processor, name, None)
        if value not in (None, False, getattr(stock, name, None)):
            found[name] = value
    size, default = (dict(getattr(owner, "size", None) or {}) for owner in (video_processor, stock))
    for name, edge in (("min_pixels_per_frame", "shortest_edge"), ("max_pixels_per_frame", "longest_edge")):
        if size.get(edge) not in (None, default.get(edge)):
            found[name] = size[edge]
    return found


def reset_options(video_processor: Any) -> None:
    """Leave the defaults of its class, so that `options_of` finds nothing."""
    stock = type(video_processor)
    for name in options_of(video_processor):
        if hasattr(stock, name):
            setattr(video_processor, name, getattr(stock, name))
        elif not name.endswith("_per_frame"):
            setattr(video_processor, name, None)
    video_processor.size = SizeDict(**dict(stock.size))


def white_of(processor: Any, kwargs: Mapping[str, Any], group: str) -> float:
    """Which value of a float a processor makes the white of."""

    def option(name: str) -> Any:
        given = (kwargs.get(name), kwargs.get(group, {}).get(name), getattr(processor, name))
        return next((value for value in given if value is not None), None)

    factor = option("rescale_factor") if option("do_rescale") else 1.0
    return WHITE if abs(factor * WHITE - 1) < 1e-6 else 1 / (factor or 1.0)


def warn_of_overridden(mine: VideoOptions, asked: VideoOptions) -> None:
    """Say what a call asks in vain of a video, since its message asks for something else."""
    lost = []
    for name in ("fps", "num_frames", "max_frames", "min_pixels_per_frame"):
        value = getattr(asked, name)
        rivals = ("fps", "num_frames") if name in ("fps", "num_frames") else (name,)
        rivals = ("max_frames", "num_frames") if name == "max_frames" else rivals
        for rival in rivals if value is not None else ():
            own = getattr(mine, rival)
            agrees = own is None or (own <= value if name == "max_frames" else (rival, own) == (name, value))
            if not agrees:
                lost.append(f"{name}={value} of the call gives way to {rival}={own} of a video in a message")
    if lost:
        logger.warning_once("; ".join(lost))
