"""VideoNSA processor: Qwen2.5-VL's, with a frame and pixel budget and videos read through PyAV.

Tokens, grids and timing are those of Qwen2.5-VL: a video of `n` frames resized to `h` x `w` becomes
`ceil(n / 2) * h / 28 * w / 28` tokens, and `second_per_grid_ts` is 2 / (frames per second after sampling). What is
added is the choice of `n`, `h` and `w`, made by arithmetic alone (`VideoNSAProcessor.plan_videos`) before anything is
decoded, and a reader that keeps only the chosen frames.

Frame sampling and resizing follow qwen-vl-utils 0.0.14 (`smart_nframes`, `smart_resize`,
https://github.com/QwenLM/Qwen2.5-VL/tree/main/qwen-vl-utils), so that both ways of feeding a video agree.
"""

import difflib
import itertools
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from transformers.image_utils import ChannelDimension, ImageInput, SizeDict
from transformers.models.qwen2_5_vl.processing_qwen2_5_vl import Qwen2_5_VLProcessor
from transformers.models.qwen2_vl.video_processing_qwen2_vl import smart_resize
from transformers.processing_utils import ImagesKwargs, ProcessingKwargs, TextKwargs, Unpack, VideosKwargs
from transformers.utils import logging
from transformers.video_processing_utils import BaseVideoProcessor
from transformers.video_utils import VideoInput, VideoMetadata

try:
    import av
except ImportError:  # text, images and decoded frames work without it; a file then raises in `_open`
    av = None

logger = logging.get_logger(__name__)

MIN_SAMPLED_FRAMES = 4
"""Frames that sampling by `fps` takes at least, if the video has them (qwen-vl-utils' FPS_MIN_FRAMES)."""

# Options of a video in a message, as qwen-vl-utils spells them, and what they are called here.
_MESSAGE_OPTIONS = {
    "fps": "fps",
    "sample_fps": "fps",
    "num_frames": "num_frames",
    "nframes": "num_frames",
    "max_frames": "max_frames",
    "min_pixels": "min_pixels_per_frame",
    "min_pixels_per_frame": "min_pixels_per_frame",
    "max_pixels": "max_pixels_per_frame",
    "max_pixels_per_frame": "max_pixels_per_frame",
}
# Valid keywords of Qwen2VLVideoProcessor that would contradict the plan or have no effect on it.
_REFUSED_OPTIONS = {
    "cap_pixels_per_frame": "`max_pixels_per_frame` and `max_total_tokens` do its work",
    "max_video_tokens": "use `max_total_tokens`",
    "min_frames": f"sampling by `fps` takes at least {MIN_SAMPLED_FRAMES} frames, as Qwen2.5-VL does",
    "patch_size": "it belongs to the model",
    "merge_size": "it belongs to the model",
    "temporal_patch_size": "it belongs to the model",
}
_IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm")
# AVI stores decoding times only: with B-frames the presentation times of its packets are made up.
_FORMATS_WITHOUT_PRESENTATION_TIMES = {"avi"}


def _check_positive(name: str, value: Any, types: tuple[type, ...]) -> None:
    if value is None:
        return
    if isinstance(value, bool) or not isinstance(value, types) or not math.isfinite(value) or value <= 0:
        kind = "integer" if types == (int,) else "number"
        raise ValueError(f"`{name}` must be a positive {kind}, got {value!r}")


@dataclass(frozen=True)
class VideoSource:
    """What a plan needs to know about a video.

    Args:
        num_frames: frames it has.
        fps: their average rate, frames per second.
        height, width: pixels of a frame, as shown (after rotation).
        timestamps: seconds of every frame, increasing; only for a variable frame rate.
        presampled: its frames were already sampled; `fps` is the rate they were sampled at and is not lowered again.
        may_drop_frames: False forbids the plan to leave out frames.
        name: for messages.
    """

    num_frames: int
    fps: float
    height: int
    width: int
    timestamps: tuple[float, ...] | None = field(default=None, repr=False)
    presampled: bool = False
    may_drop_frames: bool = True
    name: str = "video"


@dataclass(frozen=True)
class VideoPlan:
    """Frames, resolution and tokens chosen for one video.

    Args:
        name: of the video.
        num_frames: frames that are used; an odd number is completed by repeating the last.
        fps: rate of the used frames, frames per second; `second_per_grid_ts` is `temporal_patch_size / fps`.
        height, width: of the used frames, pixels, multiples of 28.
        tokens: placeholder tokens of the video.
        frame_indices: which frames of the source are used.
        requested_frames, requested_height, requested_width, requested_tokens: the same without the token budget.
        notes: what was reduced and why, one sentence each; empty if nothing was.
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


@dataclass(frozen=True)
class _Options:
    """Sampling and resolution of one video; None where nothing was asked."""

    fps: float | None = None
    num_frames: int | None = None
    max_frames: int | None = None
    min_pixels_per_frame: int | None = None
    max_pixels_per_frame: int | None = None

    def __post_init__(self):
        if self.fps is not None and self.num_frames is not None:
            raise ValueError(
                f"`fps` and `num_frames` exclude each other, got fps={self.fps!r} and num_frames={self.num_frames!r}"
            )
        _check_positive("fps", self.fps, (int, float))
        for name in ("num_frames", "max_frames", "min_pixels_per_frame", "max_pixels_per_frame"):
            _check_positive(name, getattr(self, name), (int,))

    def over(self, default: "_Options") -> "_Options":
        """These options, completed from `default`; `fps` here replaces `num_frames` there and the reverse."""
        chosen = {name: value for name, value in vars(self).items() if value is not None}
        if "fps" in chosen or "num_frames" in chosen:
            default = replace(default, fps=None, num_frames=None)
        return replace(default, **chosen)


@dataclass(frozen=True)
class _Request:
    """A video as the caller gave it, with the options and the metadata that came with it."""

    video: Any
    options: _Options = _Options()
    metadata: VideoMetadata | None = None


class VideoNSAProcessor(Qwen2_5_VLProcessor):
    r"""
    Qwen2.5-VL's processor with a frame and pixel budget for videos.

    Every option below is a default that a call can override: `processor(..., fps=4)`,
    `processor.apply_chat_template(..., fps=4)`, or, for one video, `{"type": "video", "video": ..., "fps": 4}`.
    Budgets are upper bounds on every path: a message can ask for less than `max_pixels_per_frame`, not for more.

    When the videos of a prompt exceed `max_total_tokens`, all their frames are first shrunk by one common pixel
    limit, down to a quarter of `max_pixels_per_frame`; if that is not enough, frames are left out evenly over each
    video, by the same share for all. What was chosen is logged, and returned by [`~VideoNSAProcessor.plan_video`].

    Args:
        image_processor (`Qwen2VLImageProcessor`): for images; their size is its own matter.
        tokenizer (`Qwen2TokenizerFast`): padded on the left unless it was saved with another `padding_side`.
        video_processor (`Qwen2VLVideoProcessor`): rescales, normalises and cuts patches.
        chat_template (`str`, *optional*): Jinja template.
        fps (`float`, *optional*, defaults to 2.0):
            Frames per second taken from a video, as in Qwen2.5-VL (the VideoNSA paper trains at 4). For frames that
            come without timing, the rate they were sampled at. Excludes `num_frames`.
        num_frames (`int`, *optional*):
            Frames taken evenly from a video, instead of `fps`; rounded to a multiple of 2, as Qwen2.5-VL does.
        max_frames (`int`, *optional*): limit on the frames that `fps` takes; none by default.
        min_pixels_per_frame (`int`, *optional*, defaults to 3136):
            Smaller frames are enlarged to this many pixels: 4 tokens per two frames.
        max_pixels_per_frame (`int`, *optional*, defaults to 50176):
            Larger frames are shrunk to this many pixels: 64 tokens per two frames.
        max_total_tokens (`int`, *optional*, defaults to 131072):
            Limit on the video tokens of one prompt, shared by its videos. Text and images are not counted.
    """

    def __init__(
        self,
        image_processor=None,
        tokenizer=None,
        video_processor=None,
        chat_template=None,
        fps: float | None = None,
        num_frames: int | None = None,
        max_frames: int | None = None,
        min_pixels_per_frame: int = 4 * 28 * 28,
        max_pixels_per_frame: int = 64 * 28 * 28,
        max_total_tokens: int = 128 * 1024,
    ):
        self.fps = 2.0 if fps is None and num_frames is None else fps
        self.num_frames = num_frames
        self.max_frames = max_frames
        self.min_pixels_per_frame = min_pixels_per_frame
        self.max_pixels_per_frame = max_pixels_per_frame
        self.max_total_tokens = max_total_tokens
        self._check_options(self._defaults(), max_total_tokens)
        super().__init__(image_processor, tokenizer, video_processor, chat_template=chat_template)
        if "padding_side" not in tokenizer.init_kwargs:
            tokenizer.padding_side = "left"
        self._sync_video_processor()

    # Options

    def _defaults(self) -> _Options:
        return _Options(
            self.fps, self.num_frames, self.max_frames, self.min_pixels_per_frame, self.max_pixels_per_frame
        )

    @staticmethod
    def _check_options(options: _Options, max_total_tokens: int) -> None:
        _check_positive("max_total_tokens", max_total_tokens, (int,))
        if options.min_pixels_per_frame > options.max_pixels_per_frame:
            raise ValueError(
                f"`min_pixels_per_frame` ({options.min_pixels_per_frame}) must not exceed "
                f"`max_pixels_per_frame` ({options.max_pixels_per_frame})"
            )

    def _sync_video_processor(self) -> None:
        """Give the video processor the same pixel limits, for tools that use it alone."""
        self.video_processor.size = SizeDict(
            shortest_edge=self.min_pixels_per_frame, longest_edge=self.max_pixels_per_frame
        )
        self.video_processor.cap_pixels_per_frame = False

    def to_dict(self) -> dict[str, Any]:
        self._sync_video_processor()
        return super().to_dict()

    @classmethod
    def from_args_and_dict(cls, args, processor_dict: dict[str, Any], **kwargs):
        own = _own_option_names()
        for name in kwargs:
            close = difflib.get_close_matches(name, own, n=1, cutoff=0.85)
            if close and name not in own:
                raise ValueError(f"`{name}` is not an option of {cls.__name__}; did you mean `{close[0]}`?")
        processor_dict = dict(processor_dict)
        # An explicit `fps` replaces a stored `num_frames` and the reverse.
        if kwargs.get("fps") is not None or kwargs.get("num_frames") is not None:
            processor_dict |= {"fps": None, "num_frames": None}
        # Qwen's names, which transformers hands to the image and to the video processor.
        for qwen_name in ("min_pixels", "max_pixels"):
            if kwargs.get(qwen_name) is not None:
                kwargs.setdefault(f"{qwen_name}_per_frame", kwargs[qwen_name])
        return super().from_args_and_dict(args, processor_dict, **kwargs)

    # Planning

    def plan_video(self, video: "VideoSource | VideoInput | str | os.PathLike", **options) -> VideoPlan:
        """What a call would choose for `video` alone in a prompt.

        Args:
            video: a `VideoSource` (nothing is read), a path (its packets are listed, one frame is decoded), or frames.
            options: `fps`, `num_frames`, `max_frames`, `min_pixels_per_frame`, `max_pixels_per_frame`,
                `max_total_tokens`, `video_metadata`, `do_sample_frames`.
        Raises:
            ValueError: as a call with this video.
        """
        return self.plan_videos([video], **options)[0]

    def plan_videos(
        self,
        videos: Sequence[Any],
        *,
        max_total_tokens: int | None = None,
        video_metadata: Any = None,
        do_sample_frames: bool | None = None,
        fps: float | Sequence[float] | None = None,
        num_frames: int | None = None,
        max_frames: int | None = None,
        min_pixels_per_frame: int | None = None,
        max_pixels_per_frame: int | None = None,
    ) -> list[VideoPlan]:
        """Frames, resolution and tokens for the videos of one prompt; see `plan_video` for the arguments."""
        options = {
            "fps": fps,
            "num_frames": num_frames,
            "max_frames": max_frames,
            "min_pixels_per_frame": min_pixels_per_frame,
            "max_pixels_per_frame": max_pixels_per_frame,
        }
        requests = self._requests(videos, video_metadata, options)
        clips = [
            (r.video, r.options)
            if isinstance(r.video, VideoSource)
            else (self._clip(r, do_sample_frames).source, r.options)
            for r in requests
        ]
        return self._plan(clips, max_total_tokens)

    def _plan(self, videos: Sequence[tuple[VideoSource, _Options]], max_total_tokens: int | None) -> list[VideoPlan]:
        budget = self.max_total_tokens if max_total_tokens is None else max_total_tokens
        _check_positive("max_total_tokens", budget, (int,))
        sources = [source for source, _ in videos]
        options = [self._resolve(asked) for _, asked in videos]
        wanted = [self._frames_wanted(source, option) for source, option in zip(sources, options, strict=True)]
        highest = max(option.max_pixels_per_frame for option in options)
        lowest = min(option.max_pixels_per_frame for option in options) // 4

        def sizes(limit: int) -> list[tuple[int, int]]:
            return [self._size(source, option, limit) for source, option in zip(sources, options, strict=True)]

        def tokens(limit: int, frames: Sequence[int]) -> list[int]:
            return [self._tokens(n, *size) for n, size in zip(frames, sizes(limit), strict=True)]

        limit, frames = highest, list(wanted)
        if sum(tokens(limit, frames)) > budget:
            limit = _largest(lambda p: sum(tokens(p, frames)) <= budget, lowest, highest)
        if sum(tokens(limit, frames)) > budget:
            frames = self._fewer_frames(sources, frames, tokens(limit, frames), budget)

        plans = []
        for i, source in enumerate(sources):
            size, asked_size = sizes(limit)[i], sizes(highest)[i]
            indices = _sample_indices(source, frames[i])
            plans.append(
                VideoPlan(
                    name=source.name,
                    num_frames=frames[i],
                    fps=frames[i] / source.num_frames * source.fps,
                    height=size[0],
                    width=size[1],
                    tokens=self._tokens(frames[i], *size),
                    frame_indices=indices,
                    requested_frames=wanted[i],
                    requested_height=asked_size[0],
                    requested_width=asked_size[1],
                    requested_tokens=self._tokens(wanted[i], *asked_size),
                    notes=self._notes(source, videos[i][1], wanted[i], frames[i], asked_size, size, budget),
                )
            )
        return plans

    def _resolve(self, asked: _Options) -> _Options:
        options = asked.over(self._defaults())
        limit = options.max_pixels_per_frame
        if asked.min_pixels_per_frame is None:  # the default minimum gives way to a lower maximum
            options = replace(options, min_pixels_per_frame=min(options.min_pixels_per_frame, limit))
        self._check_options(options, self.max_total_tokens)
        return options

    def _frames_wanted(self, source: VideoSource, options: _Options) -> int:
        """Frames before the token budget: qwen-vl-utils' `smart_nframes`, without its limit of 768."""
        total, step = source.num_frames, self.video_processor.temporal_patch_size
        if options.num_frames is not None and source.may_drop_frames:
            wanted = max(step, round(options.num_frames / step) * step)
        elif source.presampled:
            return total
        else:
            wanted = max(total / source.fps * options.fps, MIN_SAMPLED_FRAMES)
            if options.max_frames is not None:
                wanted = min(wanted, options.max_frames)
        wanted = min(wanted, total)
        return max(1 if total < step else step, math.floor(wanted / step) * step)

    def _size(self, source: VideoSource, options: _Options, limit: int) -> tuple[int, int]:
        """(height, width) of resized frames when none may have more than `limit` pixels."""
        floor = max(options.min_pixels_per_frame, options.max_pixels_per_frame // 4)
        factor = self.video_processor.patch_size * self.video_processor.merge_size
        try:
            return smart_resize(
                source.height,
                source.width,
                factor=factor,
                min_pixels=options.min_pixels_per_frame,
                max_pixels=max(floor, min(limit, options.max_pixels_per_frame)),
            )
        except ValueError as error:
            raise ValueError(f"{source.name}: frames of {source.height}x{source.width} pixels: {error}") from error

    def _tokens(self, num_frames: int, height: int, width: int) -> int:
        processor = self.video_processor
        factor = processor.patch_size * processor.merge_size
        return math.ceil(num_frames / processor.temporal_patch_size) * (height // factor) * (width // factor)

    def _fewer_frames(
        self, sources: Sequence[VideoSource], frames: Sequence[int], tokens: Sequence[int], budget: int
    ) -> list[int]:
        """Leave out the same share of every video that allows it, down to one temporal patch each."""
        step = self.video_processor.temporal_patch_size
        grid = [math.ceil(n / step) for n in frames]
        per_step = [total // steps for total, steps in zip(tokens, grid, strict=True)]
        free = [i for i, source in enumerate(sources) if source.may_drop_frames and frames[i] > step]
        fixed = sum(tokens) - sum(tokens[i] for i in free)
        if fixed + sum(per_step[i] for i in free) > budget:
            named = ", ".join(f"{source.name} ({n} frames)" for source, n in zip(sources, frames, strict=True))
            raise ValueError(
                f"`max_total_tokens`={budget} is too small for {named}: at the lowest resolution "
                f"{fixed + sum(per_step[i] for i in free)} tokens are needed. Raise it, lower `max_pixels_per_frame`, "
                "or let frames be left out (`do_sample_frames=False` forbids it)."
            )
        share = (budget - fixed) / sum(tokens[i] for i in free)
        for i in free:
            grid[i] = max(1, math.floor(grid[i] * share))
        while fixed + sum(grid[i] * per_step[i] for i in free) > budget:
            grid[max(free, key=grid.__getitem__)] -= 1
        return [min(grid[i] * step, n) if i in free else n for i, n in enumerate(frames)]

    def _notes(self, source, asked, wanted, frames, asked_size, size, budget) -> tuple[str, ...]:
        notes = []
        if asked.num_frames is not None and asked.num_frames > source.num_frames:
            notes.append(f"num_frames={asked.num_frames} was asked for, but there are {source.num_frames} frames")
        if size != asked_size:
            notes.append(
                f"resolution lowered from {asked_size[0]}x{asked_size[1]} to {size[0]}x{size[1]} pixels "
                f"to keep the prompt within max_total_tokens={budget}"
            )
        if frames < wanted:
            notes.append(f"{frames} of {wanted} frames kept to keep the prompt within max_total_tokens={budget}")
        return tuple(notes)

    # Calling

    def __call__(
        self,
        images: ImageInput | None = None,
        text: str | list[str] | None = None,
        videos: VideoInput | None = None,
        audio: None = None,
        *,
        fps: float | Sequence[float] | None = None,
        num_frames: int | None = None,
        max_frames: int | None = None,
        min_pixels_per_frame: int | None = None,
        max_pixels_per_frame: int | None = None,
        max_total_tokens: int | None = None,
        video_metadata: Any = None,
        do_sample_frames: bool | None = None,
        return_metadata: bool = False,
        **kwargs: Unpack[ProcessingKwargs],
    ):
        """Tokenise prompts and prepare their images and videos for `model.generate(**inputs)`.

        Args:
            text: prompt(s) with one `<|image_pad|>` or `<|video_pad|>` for each image or video.
            videos: for each video a path, a list of frames (PIL images, image paths or arrays), an array or tensor
                (T, H, W, C) or (T, C, H, W) with values 0 to 255, or a pair (array, metadata).
            fps: as in the class; or one number per video, as in qwen-vl-utils' `video_kwargs`. For arrays and frame
                lists without `video_metadata` it is the rate at which they were sampled.
            num_frames, max_frames, min_pixels_per_frame, max_pixels_per_frame, max_total_tokens: as in the class.
            video_metadata: `VideoMetadata` or dict per video of frames. With `frames_indices` the frames are taken as
                sampled; without, as the whole video, from which `fps` or `num_frames` samples.
            do_sample_frames: False takes every frame of every video, and never leaves one out.
            return_metadata: add `video_metadata` and `video_plans` (lists) to the result; remove them for `generate`.
            kwargs: transformers' keywords for text, images and videos.
        Returns:
            `BatchFeature` with `input_ids`, `attention_mask` and `mm_token_type_ids` (batch, length); for videos
            `pixel_values_videos` (patches, 1176), `video_grid_thw` (videos, 3) and `second_per_grid_ts` (videos,)
            in seconds; for images `pixel_values` and `image_grid_thw`.
        Raises:
            ValueError: unknown or contradicting options; a video that cannot be read in full; too small a budget.
        """
        if audio is not None:
            raise ValueError("`audio` is not supported by VideoNSAProcessor")
        named = {
            "fps": fps,
            "num_frames": num_frames,
            "max_frames": max_frames,
            "min_pixels_per_frame": min_pixels_per_frame,
            "max_pixels_per_frame": max_pixels_per_frame,
            "max_total_tokens": max_total_tokens,
            "video_metadata": video_metadata,
            "do_sample_frames": do_sample_frames,
        }
        named, video_options, kwargs = self._sort_options(named, kwargs)
        if videos is None:
            return super().__call__(images=images, text=text, **kwargs)

        budget, metadata, sample = (named.pop(k) for k in ("max_total_tokens", "video_metadata", "do_sample_frames"))
        requests = self._requests(videos, metadata, named)
        clips = [self._clip(request, sample, video_options) for request in requests]
        plans = []
        for group in self._by_prompt(text, clips):
            asked = [(clips[i].source, requests[i].options) for i in group]
            if not video_options["do_resize"]:
                asked = [(source, self._unresized(source, options)) for source, options in asked]
            plans += self._plan(asked, budget)
        for plan in plans:
            log = logger.warning_once if plan.notes else logger.info
            log(_describe(plan))

        frames = [clip.read(self, plan, video_options) for clip, plan in zip(clips, plans, strict=True)]
        read_metadata = [clip.metadata(plan) for clip, plan in zip(clips, plans, strict=True)]
        kwargs["videos_kwargs"] |= {
            "do_resize": False,
            "do_sample_frames": False,
            "do_convert_rgb": False,
            "input_data_format": ChannelDimension.FIRST,
            "video_metadata": read_metadata,
        }
        outputs = super().__call__(images=images, text=text, videos=frames, **kwargs)
        if return_metadata:
            outputs["video_metadata"] = read_metadata
            outputs["video_plans"] = plans
        return outputs

    def apply_chat_template(self, conversation, chat_template: str | None = None, **kwargs):
        """As in transformers; options of a video (`fps`, `max_pixels`, ...) in its message are applied to it.

        The options of this class are taken as keywords or inside `processor_kwargs`.

        Raises:
            ValueError: as a call; a video in a message carries an option that is not known.
        """
        if kwargs.get("tokenize"):
            conversation = _with_requests(conversation)
            own = {name: kwargs.pop(name) for name in _own_option_names() if name in kwargs}
            if own:
                kwargs["processor_kwargs"] = {**(kwargs.get("processor_kwargs") or {}), **own}
        return super().apply_chat_template(conversation, chat_template, **kwargs)

    def _sort_options(self, named: dict[str, Any], kwargs: dict[str, Any]) -> tuple[dict, dict, dict]:
        """Split the keywords of a call.

        Returns:
            our options by name; the video processor's settings that are applied here; transformers' keywords.
        """
        kwargs = {key: dict(value) if isinstance(value, Mapping) else value for key, value in kwargs.items()}
        videos_kwargs = kwargs.setdefault("videos_kwargs", {})
        for name in named:
            if name in videos_kwargs:
                if named[name] is not None:
                    raise ValueError(f"`{name}` was given twice: as a keyword and in `videos_kwargs`")
                named[name] = videos_kwargs.pop(name)

        known_videos = set(VideosKwargs.__annotations__) | set(self.video_processor.valid_kwargs.__annotations__)
        known_images = set(ImagesKwargs.__annotations__) | set(self.image_processor.valid_kwargs.__annotations__)
        known = known_videos | known_images | set(TextKwargs.__annotations__) | set(ProcessingKwargs.__annotations__)
        known |= {"return_mm_token_type_ids", "return_text_replacement_offsets", "common_kwargs"}
        for place, names in ((None, known), ("videos_kwargs", known_videos), ("images_kwargs", known_images)):
            for name in kwargs if place is None else kwargs.get(place, ()):
                where = f" in `{place}`" if place else ""
                if name not in names:
                    close = difflib.get_close_matches(name, [*named, *names], n=1)
                    hint = f"; did you mean `{close[0]}`?" if close else ""
                    raise ValueError(f"`{name}`{where} is not an option of VideoNSAProcessor{hint}")
                if name in _REFUSED_OPTIONS and place != "images_kwargs":
                    raise ValueError(f"`{name}`{where} cannot be set in a call: {_REFUSED_OPTIONS[name]}")

        # These also exist for images, for which transformers keeps handling them.
        video_options = {
            "do_resize": self.video_processor.do_resize,
            "resample": self.video_processor.resample,
            "input_data_format": None,
        }
        images_kwargs = kwargs.setdefault("images_kwargs", {})
        for name in (
            "do_resize",
            "resample",
            "input_data_format",
            "do_convert_rgb",
            "size",
            "min_pixels",
            "max_pixels",
        ):
            value = videos_kwargs.pop(name, None)
            if kwargs.get(name) is not None:
                value = kwargs[name] if value is None else value
                images_kwargs.setdefault(name, kwargs[name])
            kwargs.pop(name, None)
            if value is None:
                continue
            if name in video_options:
                video_options[name] = value
            elif name == "size":
                unknown = set(value) - {"shortest_edge", "longest_edge"} if isinstance(value, Mapping) else {value}
                if unknown:
                    raise ValueError(f"`size` must have the keys shortest_edge and longest_edge only, got {value!r}")
                for edge, option in (("shortest_edge", "min"), ("longest_edge", "max")):
                    if edge in value and named[f"{option}_pixels_per_frame"] is None:
                        named[f"{option}_pixels_per_frame"] = value[edge]
            elif name in ("min_pixels", "max_pixels") and named[f"{name}_per_frame"] is None:
                named[f"{name}_per_frame"] = value
        if not images_kwargs:
            del kwargs["images_kwargs"]
        return named, video_options, kwargs

    def _requests(self, videos: Any, video_metadata: Any, options: dict[str, Any]) -> list[_Request]:
        """Flatten `videos` and give each its options: those of its message over those of the call."""
        flat = list(_flatten_videos(videos))
        if not flat:
            raise ValueError(f"`videos` holds no video, got {videos!r}")
        metadata = [None] * len(flat) if video_metadata is None else list(_flatten_metadata(video_metadata))
        rates = options.get("fps")
        rates = (
            np.ravel(rates).tolist() if isinstance(rates, (Sequence, np.ndarray, torch.Tensor)) else [rates] * len(flat)
        )
        for name, values in (("video_metadata", metadata), ("fps", rates)):
            if len(values) != len(flat):
                raise ValueError(f"`{name}` has {len(values)} entries for {len(flat)} videos")
        requests = []
        for video, entry, rate in zip(flat, metadata, rates, strict=True):
            asked = _Options(**(options | {"fps": rate}))
            request = video if isinstance(video, _Request) else _Request(video)
            limit = asked.max_pixels_per_frame or self.max_pixels_per_frame
            mine = {
                name: min(value, limit) if name.endswith("pixels_per_frame") else value
                for name, value in vars(request.options).items()
                if value is not None
            }
            if mine.get("max_pixels_per_frame", 0) < (request.options.max_pixels_per_frame or 0):
                logger.warning_once(
                    f"A message asks for {request.options.max_pixels_per_frame} pixels per frame; "
                    f"`max_pixels_per_frame`={limit} applies. Raise it in the call to allow more."
                )
            requests.append(replace(request, options=_Options(**mine).over(asked), metadata=request.metadata or entry))
        return requests

    def _clip(self, request: _Request, do_sample_frames: bool | None, video_options: dict | None = None):
        """Open one video: list a file's frames, or gather an array from frames."""
        every_frame = do_sample_frames is False
        if every_frame and request.options.num_frames is not None:
            raise ValueError(f"`num_frames`={request.options.num_frames} contradicts `do_sample_frames`=False")
        if isinstance(request.video, (str, os.PathLike)):
            if every_frame and request.options.fps is not None:
                raise ValueError(f"`fps`={request.options.fps} contradicts `do_sample_frames`=False for a file")
            if request.metadata is not None:
                raise ValueError(f"`video_metadata` is for frames; {os.fspath(request.video)} brings its own")
            return _FileClip(request.video, every_frame)
        data_format = (video_options or {}).get("input_data_format")
        rate = request.options.fps or self.fps or 2.0
        return _FrameClip(self.video_processor, request, rate, every_frame, data_format)

    def _by_prompt(self, text: str | list[str] | None, clips: Sequence[Any]) -> list[range]:
        """The videos of each prompt, as ranges into `clips`."""
        if text is None:
            return [range(len(clips))]
        counts = [prompt.count(self.video_token) for prompt in ([text] if isinstance(text, str) else text)]
        if sum(counts) != len(clips):
            raise ValueError(
                f"`text` has {sum(counts)} {self.video_token} placeholders, but `videos` has {len(clips)} videos"
            )
        starts = np.cumsum([0, *counts])
        return [range(start, start + n) for start, n in zip(starts.tolist(), counts, strict=False) if n]

    def _unresized(self, source: VideoSource, options: _Options) -> _Options:
        """Options under which a plan keeps the size of the frames."""
        factor = self.video_processor.patch_size * self.video_processor.merge_size
        if source.height % factor or source.width % factor:
            raise ValueError(
                f"`do_resize`=False needs frames whose sides are multiples of {factor}; {source.name} has "
                f"{source.height}x{source.width} pixels"
            )
        pixels = source.height * source.width
        return replace(options, min_pixels_per_frame=pixels, max_pixels_per_frame=pixels)

    def _resize(self, frames: torch.Tensor, plan: VideoPlan, resample: Any) -> torch.Tensor:
        """(T, C, H, W) frames resized as the video processor does; the same for one frame as for all."""
        if frames.shape[-2:] == (plan.height, plan.width):
            return frames
        size = SizeDict(height=plan.height, width=plan.width)
        return BaseVideoProcessor.resize(self.video_processor, frames, size=size, resample=resample)


def _own_option_names() -> tuple[str, ...]:
    return ("fps", "num_frames", "max_frames", "min_pixels_per_frame", "max_pixels_per_frame", "max_total_tokens")


def _largest(fits, low: int, high: int) -> int:
    """The largest integer in [low, high] for which the monotone `fits` holds; `low` if none."""
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    return low


def _describe(plan: VideoPlan) -> str:
    text = (
        f"{plan.name}: {plan.num_frames} frames at {plan.fps:.4g} per second, {plan.height}x{plan.width} pixels, "
        f"{plan.tokens} tokens"
    )
    return "; ".join([text, *plan.notes])


def _sample_indices(source: VideoSource, num_frames: int) -> tuple[int, ...]:
    """Evenly spaced frames: by number as in qwen-vl-utils, by time where the frame rate varies."""
    if num_frames == source.num_frames:
        return tuple(range(num_frames))
    if source.timestamps is None:
        return tuple(torch.linspace(0, source.num_frames - 1, num_frames).round().long().tolist())
    times = np.linspace(source.timestamps[0], source.timestamps[-1], num_frames)
    # The frame on screen at each time; the tolerance is for times that were rounded to the container's time base.
    shown = np.searchsorted(source.timestamps, times + 1e-4, side="right") - 1
    return tuple(np.clip(shown, 0, source.num_frames - 1).tolist())


def _with_requests(conversation: Any) -> Any:
    """A copy of the conversation(s) in which every video is a `_Request` with its message's options."""
    if not isinstance(conversation, (list, tuple)) or not conversation:
        return conversation
    if isinstance(conversation[0], (list, tuple)):
        return [_with_requests(single) for single in conversation]
    messages = []
    for message in conversation:
        if isinstance(message, Mapping) and isinstance(message.get("content"), (list, tuple)):
            message = {**message, "content": [_with_request(block) for block in message["content"]]}
        messages.append(message)
    return messages


def _with_request(block: Any) -> Any:
    if not isinstance(block, Mapping) or (block.get("type", "video") != "video" or not _video_keys(block)):
        return block
    keys = _video_keys(block)
    if len(keys) > 1:
        raise ValueError(f"a video in a message must be given once, got {', '.join(f'`{key}`' for key in keys)}")
    options: dict[str, Any] = {}
    for key, value in block.items():
        if key == "type" or key in keys or value is None:
            continue
        if key not in _MESSAGE_OPTIONS:
            close = difflib.get_close_matches(key, _MESSAGE_OPTIONS, n=1)
            hint = f"; did you mean `{close[0]}`?" if close else f"; known are {', '.join(_MESSAGE_OPTIONS)}"
            raise ValueError(f"`{key}` is not an option of a video in a message{hint}")
        if _MESSAGE_OPTIONS[key] in options:
            raise ValueError(f"`{key}` repeats another option of the same video in a message")
        options[_MESSAGE_OPTIONS[key]] = value
    return {"type": "video", "video": _Request(block[keys[0]], _Options(**options))}


def _video_keys(block: Mapping) -> list[str]:
    """Where a message's video is; `url` and `path` only count for blocks that say they are videos."""
    names = ("video", "url", "path") if block.get("type") == "video" else ("video",)
    return [name for name in names if block.get(name) is not None]


def _is_array(value: Any) -> bool:
    return isinstance(value, (np.ndarray, torch.Tensor))


def _is_frame(value: Any) -> bool:
    if isinstance(value, (str, os.PathLike)):
        return os.fspath(value).lower().endswith(_IMAGE_SUFFIXES)
    return isinstance(value, Image.Image) or (_is_array(value) and value.ndim == 3)


def _flatten_videos(videos: Any) -> Iterator[Any]:
    """Single videos out of whatever nesting; a list of images, image paths or 3D arrays is one video."""
    if isinstance(videos, (str, os.PathLike, _Request, VideoSource)):
        yield videos
    elif isinstance(videos, Image.Image):
        yield [videos]
    elif _is_array(videos):
        if videos.ndim not in (3, 4, 5):
            raise ValueError(f"`videos` must have frames of 3 dimensions, got an array of shape {tuple(videos.shape)}")
        if videos.ndim == 5:
            yield from videos
        else:
            yield videos[None] if videos.ndim == 3 else videos
    elif isinstance(videos, tuple) and len(videos) == 2 and isinstance(videos[1], Mapping):
        yield _Request(videos[0], metadata=_metadata(videos[1]))
    elif isinstance(videos, (list, tuple)):
        if videos and all(_is_frame(item) for item in videos):
            yield list(videos)
        else:
            for item in videos:
                yield from _flatten_videos(item)
    else:
        raise ValueError(f"`videos` holds a {type(videos).__name__}, which is not a path, frames or an array")


def _flatten_metadata(metadata: Any) -> Iterator[VideoMetadata | None]:
    if metadata is None or isinstance(metadata, Mapping):
        yield _metadata(metadata)
    else:
        for entry in metadata:
            yield from _flatten_metadata(entry)


def _metadata(entry: Mapping | None) -> VideoMetadata | None:
    if entry is None or isinstance(entry, VideoMetadata):
        return entry
    try:
        return VideoMetadata(**entry)
    except TypeError as error:
        raise ValueError(f"`video_metadata` {dict(entry)!r}: {error}") from error


class _FrameClip:
    """A video given as frames.

    Args:
        rate: frames per second, where the request brings no timing.
        every_frame: no frame may be left out.
        data_format: of arrays, "channels_first" or "channels_last"; found out if None.
    """

    def __init__(self, video_processor, request: _Request, rate: float, every_frame: bool, data_format: Any):
        self.frames = _frames_to_tensor(request.video, data_format)
        if self.frames.shape[1] != 3:
            self.frames = video_processor.convert_to_rgb(self.frames)
        if self.frames.is_floating_point() and self.frames.max() <= 1 and video_processor.do_rescale:
            logger.warning_once(
                "The pixels of a video are at most 1: they are divided by 255 all the same. Give values from 0 to "
                "255, or `do_rescale=False`."
            )
        count, _, height, width = self.frames.shape
        self.known = request.metadata
        presampled = True
        if self.known is not None:
            self.known, rate, presampled = self._read_metadata(self.known, count, rate)
            presampled = presampled and request.options.fps is None  # a known timing can be sampled once more
        self.source = VideoSource(
            count,
            rate,
            height,
            width,
            presampled=presampled or every_frame,
            may_drop_frames=not every_frame,
            name=f"video of {count} frames",
        )

    @staticmethod
    def _read_metadata(metadata: VideoMetadata, count: int, rate: float) -> tuple[VideoMetadata, float, bool]:
        """Metadata without gaps, frames per second of the frames at hand, and whether they were sampled already."""
        fps = metadata.fps or rate
        if metadata.frames_indices is None:
            if metadata.total_num_frames not in (None, count):
                raise ValueError(
                    f"`video_metadata` has total_num_frames={metadata.total_num_frames} and no frames_indices, but the "
                    f"video has {count} frames"
                )
            return replace(metadata, fps=fps, total_num_frames=count, frames_indices=list(range(count))), fps, False
        if len(metadata.frames_indices) != count:
            raise ValueError(
                f"`video_metadata` has {len(metadata.frames_indices)} frames_indices, but the video has {count} frames"
            )
        known = replace(metadata, fps=fps, frames_indices=[int(i) for i in metadata.frames_indices])
        return known, known.sampled_fps, True

    def metadata(self, plan: VideoPlan) -> VideoMetadata:
        indices = list(plan.frame_indices)
        if self.known is not None:
            return replace(self.known, frames_indices=[self.known.frames_indices[i] for i in indices])
        source = self.source
        return VideoMetadata(
            total_num_frames=source.num_frames,
            fps=source.fps,
            height=source.height,
            width=source.width,
            duration=source.num_frames / source.fps,
            frames_indices=indices,
        )

    def read(self, processor: VideoNSAProcessor, plan: VideoPlan, options: dict[str, Any]) -> torch.Tensor:
        frames = self.frames
        if plan.num_frames < len(frames):
            frames = frames[list(plan.frame_indices)]
        return processor._resize(frames, plan, options["resample"])


def _frames_to_tensor(video: Any, data_format: Any) -> torch.Tensor:
    """(T, C, H, W) from an array or from a list of images, image paths or arrays."""
    if not _is_array(video):
        if not isinstance(video, (list, tuple)):
            raise ValueError(f"a video must be a path, frames or an array, got {type(video).__name__}")
        if len(video) == 0:
            raise ValueError("a video given as frames has no frames")
        frames = [_load_image(frame) if not _is_array(frame) else torch.as_tensor(frame) for frame in video]
        shapes = {tuple(frame.shape) for frame in frames}
        if len(shapes) > 1:
            raise ValueError(f"the frames of a video must have one size, got {sorted(shapes)}")
        video = torch.stack(frames)
    video = torch.as_tensor(video)
    if video.ndim != 4 or 0 in video.shape:
        raise ValueError(f"a video must be (T, H, W, C) or (T, C, H, W) and not empty, got shape {tuple(video.shape)}")
    if data_format is None:
        first, last = video.shape[1] in (1, 3, 4), video.shape[3] in (1, 3, 4)
        if first == last:
            raise ValueError(
                f"cannot tell the channels of a video of shape {tuple(video.shape)}; pass `input_data_format`"
            )
        data_format = ChannelDimension.FIRST if first else ChannelDimension.LAST
    return video if ChannelDimension(data_format) == ChannelDimension.FIRST else video.permute(0, 3, 1, 2)


def _load_image(image: Any) -> torch.Tensor:
    """(H, W, 3) uint8; transparent pixels become white, as in qwen-vl-utils."""
    if isinstance(image, (str, os.PathLike)):
        path = os.fspath(image).removeprefix("file://")
        try:
            with Image.open(path) as opened:
                return _load_image(opened.copy())
        except (OSError, UnidentifiedImageError) as error:
            raise ValueError(f"frame {path} cannot be read: {error}") from error
    if not isinstance(image, Image.Image):
        raise ValueError(f"a frame must be an image, a path or an array, got {type(image).__name__}")
    if image.mode == "RGBA":
        white = Image.new("RGB", image.size, (255, 255, 255))
        white.paste(image, mask=image.getchannel("A"))
        image = white
    return torch.from_numpy(np.array(image.convert("RGB")))


class _FileClip:
    """A video file, listed but not decoded.

    Args:
        every_frame: take all its frames.
    Raises:
        ValueError: missing, unreadable, without a video stream or frames, or cut short.
    """

    def __init__(self, path: str | os.PathLike, every_frame: bool):
        self.path = os.fspath(path).removeprefix("file://")
        self._list_frames()
        self.source = VideoSource(
            len(self.keys),
            self.fps,
            *self.size,
            timestamps=self.timestamps,
            presampled=every_frame,
            may_drop_frames=not every_frame,
            name=self.path,
        )

    def metadata(self, plan: VideoPlan) -> VideoMetadata:
        return VideoMetadata(
            total_num_frames=self.source.num_frames,
            fps=self.source.fps,
            height=self.source.height,
            width=self.source.width,
            duration=self.source.num_frames / self.source.fps,
            video_backend="pyav",
            frames_indices=list(plan.frame_indices),
        )

    def read(self, processor: VideoNSAProcessor, plan: VideoPlan, options: dict[str, Any]) -> torch.Tensor:
        """Decode and resize the planned frames one at a time: memory holds resized frames only."""
        places: dict[int, list[int]] = {}
        for place, index in enumerate(plan.frame_indices):
            places.setdefault(self.keys[index], []).append(place)
        frames = torch.empty((plan.num_frames, 3, plan.height, plan.width), dtype=torch.uint8)
        found = 0
        for key, frame in self._decode(places.keys()):
            image = np.ascontiguousarray(np.rot90(frame.to_ndarray(format="rgb24"), self.quarter_turns))
            frames[places[key]] = processor._resize(
                torch.from_numpy(image).permute(2, 0, 1)[None], plan, options["resample"]
            )
            found += len(places[key])
        if found < plan.num_frames:
            raise ValueError(
                f"{self.path}: only {found} of {plan.num_frames} frames could be decoded; the file is damaged"
            )
        return frames

    # A frame is known by its key: its presentation time where the container has true ones, else its number in
    # decoding order. `gops` lists the keys between two key frames, in file order, so that `_decode` can skip.

    def _list_frames(self) -> None:
        with _open(self.path) as container:
            stream = _video_stream(container, self.path)
            times: list[int | None] = []
            last_duration, damaged, ends = 0, False, [0.0]
            gops: list[list[int]] = []
            for packet in _packets(container, self.path):
                if packet.pts is not None and packet.time_base:
                    ends.append(float((packet.pts + (packet.duration or 0)) * packet.time_base))
                if packet.stream.index != stream.index:
                    continue
                damaged |= packet.is_corrupt
                if packet.is_keyframe or not gops:
                    gops.append([])
                if not packet.is_discard:
                    times.append(packet.pts)
                    gops[-1].append(packet.pts)
                    last_duration = packet.duration or last_duration
            rate = float(stream.average_rate or stream.guessed_rate or 0)
            tick = float(stream.time_base or 0)
            promised = _promised_end(container, stream)
            start = (container.start_time or 0) / 1e6
        if not times:
            raise ValueError(f"{self.path}: the video has no frames")
        end = max(ends) - start
        if damaged or promised - end > max(0.5, 3 / rate if rate else 0):
            raise ValueError(
                f"{self.path}: the file is cut short: its header promises {promised:.2f} s, and only {end:.2f} s "
                f"({len(times) - damaged} frames) can be read"
            )
        self.gops = None
        if not (_FORMATS_WITHOUT_PRESENTATION_TIMES & set(container.format.name.split(","))) and (
            None not in times and len(set(times)) == len(times)
        ):
            self.keys, self.gops = sorted(times), gops
            seconds = [time * tick for time in self.keys]
            self._look_at_first_frame()
        else:
            seconds = self._number_frames()
        self._find_rate(seconds, rate, last_duration * tick)

    def _look_at_first_frame(self) -> None:
        for _, frame in self._decode(self.keys[:1]):
            self._set_size(frame)
            return
        raise ValueError(f"{self.path}: the first frame cannot be decoded")

    def _number_frames(self) -> list[float] | None:
        """Decode everything once, for containers that do not time their frames; seconds of the frames if known."""
        times = []
        self.keys = None
        for _, frame in self._decode(None):
            if not times:
                self._set_size(frame)
            times.append(frame.time)
        if not times:
            raise ValueError(f"{self.path}: no frame can be decoded")
        self.keys = list(range(len(times)))
        increasing = None not in times and all(a < b for a, b in itertools.pairwise(times))
        return times if increasing else None

    def _set_size(self, frame) -> None:
        # A display matrix turns the picture counterclockwise, as np.rot90 does.
        self.quarter_turns = round(getattr(frame, "rotation", 0) / 90) % 4
        self.size = (frame.width, frame.height) if self.quarter_turns % 2 else (frame.height, frame.width)

    def _find_rate(self, seconds: list[float] | None, rate: float, last_duration: float) -> None:
        """Set `fps`, and `timestamps` where the header's rate does not place every frame."""
        self.timestamps = None
        self.fps = rate
        if seconds is None or len(seconds) == 1:
            self.fps = rate or 1.0
            return
        seconds = [second - seconds[0] for second in seconds]
        if rate and all(abs(second - i / rate) < 0.5 / rate for i, second in enumerate(seconds)):
            return
        gap = last_duration or seconds[-1] / (len(seconds) - 1)
        self.fps = len(seconds) / (seconds[-1] + gap)
        self.timestamps = tuple(seconds)

    def _decode(self, wanted) -> Iterator[tuple[int, Any]]:
        """(key, frame) of the wanted frames; of all frames, numbered, if `wanted` is None.

        Groups of pictures without a wanted frame are read and not decoded. Frames that cannot be decoded are left
        out: `read` counts.
        """
        missing = None if wanted is None else set(wanted)
        needed = None if self.gops is None else _needed_gops(self.gops, missing)
        with _open(self.path) as container:
            stream = _video_stream(container, self.path)
            stream.thread_type = "AUTO"
            decoder = stream.codec_context
            group, count, was_needed = -1, 0, False

            def frames(packet) -> Iterator[tuple[int, Any]]:
                nonlocal count
                try:
                    decoded = decoder.decode(packet)
                except av.FFmpegError:
                    return
                for frame in decoded:
                    key = count if self.gops is None else frame.pts
                    count += 1
                    if not frame.is_corrupt and (missing is None or key in missing):
                        if missing is not None:
                            missing.remove(key)
                        yield key, frame

            for packet in _packets(container, self.path, stream):
                if packet.is_keyframe or group < 0:
                    group += 1
                    need = needed is None or needed[group]
                    if was_needed and not need:
                        yield from frames(None)
                        decoder.flush_buffers()
                    was_needed = need
                if was_needed:
                    yield from frames(packet)
                if missing is not None and not missing:
                    return
            if was_needed:
                yield from frames(None)


def _needed_gops(gops: Sequence[Sequence[int]], wanted: set[int]) -> list[bool]:
    """Which groups of pictures must be decoded: those with a wanted frame, and those that such a group refers to."""
    needed = [any(key in wanted for key in gop) for gop in gops]
    for i in range(1, len(gops)):
        # In an open group, frames shown before the key frame refer to the group before.
        if gops[i] and any(key in wanted and key < gops[i][0] for key in gops[i]):
            needed[i - 1] = True
    return needed


def _open(path: str):
    """An opened container, for `with`."""
    if av is None:
        raise ImportError("reading video files needs PyAV: pip install av")
    if "://" in path:
        raise ValueError(f"{path}: videos are not downloaded; save the file and give its path")
    if not os.path.exists(path):
        raise ValueError(f"{path}: there is no such video file")
    if not os.path.isfile(path) or os.path.getsize(path) == 0:
        raise ValueError(f"{path}: not a video file, or an empty one")
    try:
        # A playlist must not make the reader open anything else than files.
        return av.open(path, options={"protocol_whitelist": "file"})
    except (av.FFmpegError, OSError) as error:
        raise ValueError(f"{path}: cannot be opened as a video: {error}") from error


def _video_stream(container, path: str):
    for stream in container.streams.video:
        if not stream.disposition & av.stream.Disposition.attached_pic:
            return stream
    kinds = ", ".join(sorted({stream.type for stream in container.streams})) or "nothing"
    raise ValueError(f"{path}: no video stream (the file holds: {kinds}); an audio file, or cut before its index")


def _packets(container, path: str, *streams) -> Iterator[Any]:
    try:
        for packet in container.demux(*streams):
            if packet.size:
                yield packet
    except av.FFmpegError as error:
        raise ValueError(f"{path}: cannot be read to its end: {error}") from error


def _promised_end(container, stream) -> float:
    """Seconds, from the start, that the header promises; 0 where a header does not say or where it is an estimate."""
    names = container.format.name.split(",")
    if "mp4" in names and stream.duration is not None and stream.time_base:
        return float(stream.duration * stream.time_base)
    return container.duration / 1e6 if "matroska" in names and container.duration else 0.0


VideoNSAProcessor.register_for_auto_class()
