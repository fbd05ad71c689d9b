"""How many frames of a video, at which resolution: the token budget of `VideoNSAProcessor`, as arithmetic alone.

A video of `n` frames resized to `h` x `w` pixels becomes `ceil(n / 2) * h / 28 * w / 28` tokens. Frame counts and sizes
follow qwen-vl-utils 0.0.14 (`smart_nframes`, `smart_resize`,
https://github.com/QwenLM/Qwen2.5-VL/tree/main/qwen-vl-utils) as long as they fit in the budget.
"""

import math
import numbers
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from decimal import Decimal
from typing import Any

import numpy as np
import torch
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize  # videos' needs torchvision

MIN_SAMPLED_FRAMES = 4
"""Frames that sampling by `fps` takes at least, if the video has them (qwen-vl-utils' FPS_MIN_FRAMES)."""


def check_positive(name: str, value: Any, types: tuple[type, ...] = (int,)) -> int | float | None:
    """The value as a number of Python's.

    Args:
        value: None, or a number of Python, `fractions`, `decimal`, numpy or torch (an array or tensor without axes).
        types: (int,) or (int, float).
    Raises:
        ValueError: not a positive, finite number of one of `types`; the argument is named. Booleans are no numbers.
    """
    if value is None:
        return None
    number = _plain_number(value)
    if not isinstance(number, types) or not math.isfinite(number) or number <= 0:
        kind = "integer" if types == (int,) else "number"
        raise ValueError(f"`{name}` must be a positive {kind}, got {value!r}")
    return number


def _plain_number(value: Any) -> int | float | None:
    if getattr(value, "shape", None) == () and callable(getattr(value, "item", None)):
        value = value.item()  # numpy's scalars too
    if isinstance(value, numbers.Integral):
        return None if isinstance(value, bool) else int(value)
    return float(value) if isinstance(value, (numbers.Real, Decimal)) else None


@dataclass(frozen=True)
class VideoOptions:
    """Sampling and resolution of one video; None where nothing is asked.

    Args:
        fps: frames per second to take; excludes `num_frames`.
        num_frames: frames to take.
        max_frames: limit on the frames that `fps` takes.
        min_pixels_per_frame, max_pixels_per_frame: pixels of a resized frame.
        resized_height, resized_width: taken for the size of the frames, of which the resized one is made; both or none.
    Raises:
        ValueError: a value that is not positive, or options that contradict each other.
    """

    fps: float | None = None
    num_frames: int | None = None
    max_frames: int | None = None
    min_pixels_per_frame: int | None = None
    max_pixels_per_frame: int | None = None
    resized_height: int | None = None
    resized_width: int | None = None

    def __post_init__(self):
        if self.fps is not None and self.num_frames is not None:
            raise ValueError(
                f"`fps` and `num_frames` exclude each other, got fps={self.fps!r} and num_frames={self.num_frames!r}"
            )
        for name, value in vars(self).items():
            object.__setattr__(self, name, check_positive(name, value, (int, float) if name == "fps" else (int,)))
        if self.num_frames is not None and self.num_frames > (self.max_frames or self.num_frames):
            raise ValueError(f"`num_frames`={self.num_frames} exceeds `max_frames`={self.max_frames}")
        if (self.resized_height is None) != (self.resized_width is None):
            raise ValueError(
                f"`resized_height`={self.resized_height} and `resized_width`={self.resized_width} go together"
            )

    def over(self, default: "VideoOptions") -> "VideoOptions":
        """These options, completed from `default`; `fps` here replaces `num_frames` there and the reverse.

        A limit on the frames holds for a number of frames that comes from `default`, not for one that is asked here.
        """
        chosen = {name: value for name, value in vars(self).items() if value is not None}
        if "fps" in chosen or "num_frames" in chosen:
            default = replace(default, fps=None, num_frames=None)
        if "num_frames" in chosen:
            default = replace(default, max_frames=None)
        elif "max_frames" in chosen and default.num_frames is not None:
            even = self.max_frames - self.max_frames % 2 or 1  # numbers of frames are rounded to even ones, up too
            default = replace(default, num_frames=min(default.num_frames, even), max_frames=None)
        return replace(default, **chosen)

    def check_pixels(self) -> None:
        """Raise a ValueError if the pixel limits contradict each other."""
        if self.min_pixels_per_frame > self.max_pixels_per_frame:
            raise ValueError(
                f"`min_pixels_per_frame` ({self.min_pixels_per_frame}) must not exceed "
                f"`max_pixels_per_frame` ({self.max_pixels_per_frame})"
            )


@dataclass(frozen=True)
class VideoSource:
    """What a plan needs to know about a video.

    Args:
        num_frames: frames it has.
        fps: their average rate, frames per second.
        height, width: pixels of a frame, as shown (after rotation).
        timestamps: seconds of every frame, increasing; only for a variable frame rate.
        presampled: the frames were sampled already, at `fps`, and are not sampled by rate again.
        may_drop_frames: False forbids leaving out any frame.
        name: for messages.
        notes: what a user should know of its times, a sentence each.
    """

    num_frames: int
    fps: float
    height: int
    width: int
    timestamps: tuple[float, ...] | None = field(default=None, repr=False)
    presampled: bool = False
    may_drop_frames: bool = True
    name: str = "video"
    notes: tuple[str, ...] = ()

    @property
    def duration(self) -> float:
        """Seconds."""
        return self.num_frames / self.fps

    def second(self, index: int) -> float:
        """When a frame appears."""
        return index / self.fps if self.timestamps is None else self.timestamps[index]

    def frames_at(self, seconds: Sequence[float]) -> tuple[int, ...]:
        """The frame on the screen at each time."""
        if self.timestamps is None:
            shown = np.round(np.asarray(seconds) * self.fps)
        else:
            shown = np.searchsorted(self.timestamps, np.asarray(seconds) + 1e-6, side="right") - 1
        return tuple(np.clip(shown, 0, self.num_frames - 1).astype(int).tolist())


@dataclass(frozen=True)
class VideoPlan:
    """Frames, resolution and tokens chosen for one video.

    Args:
        name: of the video.
        num_frames: frames that are used; an odd number is completed by repeating the last.
        fps: rate of the used frames, frames per second; `second_per_grid_ts` is `temporal_patch_size / fps`.
        height, width: of the used frames after resizing, pixels.
        tokens: placeholder tokens of the video.
        frame_indices: which frames of the source are used.
        requested_frames, requested_height, requested_width, requested_tokens: the same without the token budget.
        notes: what differs from what was asked and why, a sentence each; empty if nothing does.
    """

    name: str
    num_frames: int
    fps: float
    height: int
    width: int
    tokens: int
    frame_indices: tuple[int, ...] = field(repr=False)
    requested_frames: int
    requested_height: int
    requested_width: int
    requested_tokens: int
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        text = (
            f"{self.name}: {self.num_frames} frames at {self.fps:.4g} per second, {self.height}x{self.width} pixels, "
            f"{self.tokens} tokens"
        )
        return "; ".join([text, *self.notes])


@dataclass(frozen=True)
class PatchSizes:
    """How the model cuts a video: one token covers `temporal` frames and `spatial` x `spatial` pixels."""

    temporal: int = 2
    spatial: int = 28

    def tokens(self, num_frames: int, height: int, width: int) -> int:
        """Tokens of a resized video."""
        return math.ceil(num_frames / self.temporal) * (height // self.spatial) * (width // self.spatial)


def plan_videos(
    sources: Sequence[VideoSource],
    options: Sequence[VideoOptions],
    max_total_tokens: int,
    patches: PatchSizes = PatchSizes(),
) -> list[VideoPlan]:
    """Choose frames and resolution of the videos of one prompt.

    What `options` ask for is kept if it fits in `max_total_tokens`. Otherwise one pixel limit for all frames of all
    videos is lowered until it fits, at most to a quarter of each video's `max_pixels_per_frame`. If that is not
    enough, frames are left out evenly over each video, the same share of each.

    Args:
        options: one per source, with both pixel limits and either `fps` or `num_frames` set.
    Raises:
        ValueError: not even that fits, or a frame has sides that differ more than 200 times.
    """
    check_positive("max_total_tokens", max_total_tokens)
    for option in options:
        option.check_pixels()
    wanted = [_frames_wanted(source, option, patches) for source, option in zip(sources, options, strict=True)]
    highest = max(option.max_pixels_per_frame for option in options)

    def sizes(limit: int) -> list[tuple[int, int]]:
        return [_size(source, option, limit, patches) for source, option in zip(sources, options, strict=True)]

    def tokens(limit: int) -> list[int]:
        return [patches.tokens(n, *size) for n, size in zip(wanted, sizes(limit), strict=True)]

    limit, frames = highest, wanted
    if sum(tokens(limit)) > max_total_tokens:
        lowest = min(option.max_pixels_per_frame for option in options) // 4
        limit = _largest(lambda pixels: sum(tokens(pixels)) <= max_total_tokens, lowest, highest)
    if sum(tokens(limit)) > max_total_tokens:
        frames = _fewer_frames(sources, wanted, tokens(limit), max_total_tokens, patches)

    plans = []
    for i, source in enumerate(sources):
        size, asked_size = sizes(limit)[i], sizes(highest)[i]
        plans.append(
            VideoPlan(
                name=source.name,
                num_frames=frames[i],
                fps=frames[i] / source.num_frames * source.fps,
                height=size[0],
                width=size[1],
                tokens=patches.tokens(frames[i], *size),
                frame_indices=_sample_indices(source, frames[i]),
                requested_frames=wanted[i],
                requested_height=asked_size[0],
                requested_width=asked_size[1],
                requested_tokens=patches.tokens(wanted[i], *asked_size),
                notes=_notes(source, options[i], wanted[i], frames[i], asked_size, size, max_total_tokens),
            )
        )
    return plans


def _frames_wanted(source: VideoSource, options: VideoOptions, patches: PatchSizes) -> int:
    """Frames before the token budget: `smart_nframes`, without its default limit of 768.

    Where the frame rate varies, frames are taken at equal distances in time, so that one that is held is repeated, and
    there may be more of them than the video has.
    """
    total, step = source.num_frames, patches.temporal
    if options.num_frames is not None and source.may_drop_frames:
        wanted = max(step, round(options.num_frames / step) * step)
    elif source.presampled:
        return total if source.timestamps is None else math.ceil(source.duration * _finest_rate(source.timestamps))
    else:
        wanted = max(source.duration * options.fps, MIN_SAMPLED_FRAMES)
        if options.max_frames is not None:
            wanted = min(wanted, options.max_frames)
    if total < step:
        return total
    if source.timestamps is None:
        wanted = min(wanted, total)
    return max(step, math.floor(wanted / step) * step)


def _finest_rate(timestamps: Sequence[float]) -> float:
    """Frames per second at which no frame is missed that a screen of 60 Hz, or most of the video, has time to show."""
    gaps = np.diff(timestamps)
    return float(1 / max(gaps.min(), min(1 / 60, np.median(gaps))))


def _size(source: VideoSource, options: VideoOptions, limit: int, patches: PatchSizes) -> tuple[int, int]:
    """(height, width) of resized frames when none may have more than `limit` pixels."""
    floor = max(options.min_pixels_per_frame, options.max_pixels_per_frame // 4)
    height, width = options.resized_height or source.height, options.resized_width or source.width
    sizes = []
    for max_pixels in (options.max_pixels_per_frame, max(floor, min(limit, options.max_pixels_per_frame))):
        try:
            size = smart_resize(
                height,
                width,
                factor=patches.spatial,
                min_pixels=options.min_pixels_per_frame,
                max_pixels=max_pixels,
            )
        except ValueError as error:
            raise ValueError(f"{source.name}: frames of {height}x{width} pixels: {error}") from error
        sizes.append(size)
    # Frames of less than a patch can grow when the limit falls: `smart_resize` enlarges them towards it.
    return min(sizes, key=math.prod)


def _largest(fits: Callable[[int], bool], low: int, high: int) -> int:
    """The largest integer in [low, high] for which the monotone `fits` holds; `low` if none."""
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    return low


def _fewer_frames(
    sources: Sequence[VideoSource], frames: Sequence[int], tokens: Sequence[int], budget: int, patches: PatchSizes
) -> list[int]:
    """Leave out the same share of every video that allows it, down to one temporal patch each."""
    steps = [math.ceil(n / patches.temporal) for n in frames]
    per_step = [total // count for total, count in zip(tokens, steps, strict=True)]
    free = [i for i, source in enumerate(sources) if source.may_drop_frames and steps[i] > 1]
    fixed = sum(tokens) - sum(tokens[i] for i in free)
    least = fixed + sum(per_step[i] for i in free)
    if least > budget:
        named = ", ".join(f"{source.name} ({n} frames)" for source, n in zip(sources, frames, strict=True))
        raise ValueError(
            f"`max_total_tokens`={budget} is too small for {named}: at the lowest resolution {least} tokens are "
            "needed. Raise it, lower `max_pixels_per_frame`, or allow frames to be left out (`do_sample_frames=False` "
            "forbids it)."
        )
    share = (budget - fixed) / sum(tokens[i] for i in free)
    for i in free:
        steps[i] = max(1, math.floor(steps[i] * share))
    while fixed + sum(steps[i] * per_step[i] for i in free) > budget:  # videos that were raised to one step
        steps[max(free, key=steps.__getitem__)] -= 1
    return [min(steps[i] * patches.temporal, n) if i in free else n for i, n in enumerate(frames)]


def _sample_indices(source: VideoSource, num_frames: int) -> tuple[int, ...]:
    """Evenly spaced frames: by number as in qwen-vl-utils, by time where the frame rate varies."""
    if source.timestamps is not None:
        return source.frames_at(np.arange(num_frames) * (source.duration / num_frames))
    if num_frames == source.num_frames:
        return tuple(range(num_frames))
    return tuple(torch.linspace(0, source.num_frames - 1, num_frames).round().long().tolist())


def _notes(
    source: VideoSource,
    options: VideoOptions,
    wanted: int,
    frames: int,
    asked_size: tuple[int, int],
    size: tuple[int, int],
    budget: int,
) -> tuple[str, ...]:
    notes = list(source.notes)
    if options.num_frames is not None and options.num_frames > source.num_frames and source.timestamps is None:
        notes.append(f"num_frames={options.num_frames} was asked for, and there are {source.num_frames} frames")
    if size != asked_size:
        notes.append(
            f"resolution lowered from {asked_size[0]}x{asked_size[1]} to {size[0]}x{size[1]} pixels to keep the prompt "
            f"within max_total_tokens={budget}"
        )
    if frames < wanted:
        notes.append(f"{frames} of {wanted} frames kept to keep the prompt within max_total_tokens={budget}")
    return tuple(notes)
