"""VideoNSA processor: Qwen2.5-VL's, with a frame, pixel and token budget for videos that are read through PyAV.

Tokens, grids and timing are those of Qwen2.5-VL. What is added: the choice of frames and resolution
(`budget_videonsa.py`), made before anything is decoded, and a reader that keeps only the chosen frames
(`frames_videonsa.py`, `files_videonsa.py`).
"""

import difflib
import importlib
import inspect
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from transformers import AutoImageProcessor, AutoTokenizer
from transformers.image_utils import ChannelDimension, ImageInput, SizeDict
from transformers.models.qwen2_5_vl.processing_qwen2_5_vl import Qwen2_5_VLProcessor
from transformers.processing_utils import ProcessingKwargs, Unpack
from transformers.utils import is_torchvision_available, logging
from transformers.video_processing_utils import BaseVideoProcessor
from transformers.video_utils import VideoInput

try:
    from .budget_videonsa import (
        PatchSizes,
        VideoOptions,
        VideoPlan,
        VideoSource,
        check_positive,
        plan_videos,
    )
    from .files_videonsa import read_for_qwen_vl_utils
    from .frames_videonsa import Clip, VideoRequest, flatten_metadata, flatten_videos, open_clip
    from .hub_videonsa import PushMixin
    from .messages_videonsa import ImageRequest, parse_conversation, refuse_media
    from .options_videonsa import (
        OWN_OPTIONS,
        REFUSED_OPTIONS,
        SAMPLING_OPTIONS,
        call_keywords,
        image_limits,
        image_size,
        is_refused,
        options_of,
        refuse_unknown,
        reset_options,
        sort_options,
        warn_of_overridden,
        white_of,
    )
    from .pictures_videonsa import WHITE, as_array, check_values, flatten_images, read_picture
    from .pixels_videonsa import PlainVideoProcessor
    from .serving_videonsa import bad_request, drop_guesses, is_server_call, register
    from .streams_videonsa import UnreadFrames, VideoStream
except ImportError:  # `import processing_videonsa` from a checkout, without a package
    if __package__:
        raise
    from budget_videonsa import (
        PatchSizes,
        VideoOptions,
        VideoPlan,
        VideoSource,
        check_positive,
        plan_videos,
    )
    from files_videonsa import read_for_qwen_vl_utils
    from frames_videonsa import Clip, VideoRequest, flatten_metadata, flatten_videos, open_clip
    from hub_videonsa import PushMixin
    from messages_videonsa import ImageRequest, parse_conversation, refuse_media
    from options_videonsa import (
        OWN_OPTIONS,
        REFUSED_OPTIONS,
        SAMPLING_OPTIONS,
        call_keywords,
        image_limits,
        image_size,
        is_refused,
        options_of,
        refuse_unknown,
        reset_options,
        sort_options,
        warn_of_overridden,
        white_of,
    )
    from pictures_videonsa import WHITE, as_array, check_values, flatten_images, read_picture
    from pixels_videonsa import PlainVideoProcessor
    from serving_videonsa import bad_request, drop_guesses, is_server_call, register
    from streams_videonsa import UnreadFrames, VideoStream

logger = logging.get_logger(__name__)


class VideoNSAProcessor(PushMixin, Qwen2_5_VLProcessor):
    r"""
    Qwen2.5-VL's processor with a frame, pixel and token budget for videos.

    Every option below is a default that a call can override: `processor(..., fps=4)`,
    `processor.apply_chat_template(..., fps=4)`, or, for one video, `{"type": "video", "video": ..., "fps": 4}`. What a
    message asks goes before what the call asks, with a warning where they differ, and that before the defaults; `fps`
    in one place replaces `num_frames` in a later one, and the reverse. Pixel limits hold on every path: a message can
    ask for less than `max_pixels_per_frame`, not for more, and an image for less than the call or `image_processor`
    allows: `{"type": "image", "image": ..., "max_pixels": 50176}`.

    When the videos of a prompt exceed `max_total_tokens`, all their frames are first shrunk by one common pixel
    limit, down to a quarter of `max_pixels_per_frame`; if that is not enough, frames are left out evenly over each
    video, the same share of each. What was chosen is logged, as a warning if anything was reduced, and returned by
    [`~VideoNSAProcessor.plan_video`] and by calls with `return_metadata=True`.

    Args:
        image_processor (`Qwen2VLImageProcessor`): for images; their size is its own matter, and is kept.
        tokenizer (`Qwen2TokenizerFast`): pads on the left unless it was saved with another `padding_side`.
        video_processor (`Qwen2VLVideoProcessor`): rescales, normalises and cuts patches. Its `size`, `fps`,
            `num_frames` and `max_frames`, where they are not those of its class, are the defaults of the options below;
            a contradiction is an error. From then on, and in a saved processor, the options count, and its `size`
            follows them.
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
        min_pixels_per_frame: int | None = None,
        max_pixels_per_frame: int | None = None,
        max_total_tokens: int = 128 * 1024,
    ):
        given = VideoOptions(fps, num_frames, max_frames, min_pixels_per_frame, max_pixels_per_frame)
        brought = options_of(video_processor)
        for name, value in brought.items():
            if name in REFUSED_OPTIONS:
                raise ValueError(f"`video_processor` has {name}={value}: {REFUSED_OPTIONS[name]}")
            if getattr(given, name) not in (None, value):
                raise ValueError(f"`{name}`={getattr(given, name)} contradicts `video_processor`, which has {value}")
        given = replace(given, **brought)
        self.fps = 2.0 if given.fps is None and given.num_frames is None else given.fps
        self.num_frames = given.num_frames
        self.max_frames = given.max_frames
        self.min_pixels_per_frame = given.min_pixels_per_frame or 4 * 28 * 28
        self.max_pixels_per_frame = given.max_pixels_per_frame or 64 * 28 * 28
        self.max_total_tokens = check_positive("max_total_tokens", max_total_tokens)
        self._default_options().check_pixels()
        super().__init__(image_processor, tokenizer, video_processor, chat_template=chat_template)
        if "padding_side" not in tokenizer.init_kwargs:
            tokenizer.padding_side = "left"
        self._sync_video_processor()

    def _default_options(self) -> VideoOptions:
        return VideoOptions(**{name: getattr(self, name) for name in SAMPLING_OPTIONS})

    def _patch_sizes(self) -> PatchSizes:
        processor = self.video_processor
        return PatchSizes(processor.temporal_patch_size, processor.patch_size * processor.merge_size)

    def _sync_video_processor(self) -> None:
        """Give the video processor the same pixel limits, for tools that use it alone."""
        size = SizeDict(shortest_edge=self.min_pixels_per_frame, longest_edge=self.max_pixels_per_frame)
        self.video_processor.size = size
        self.video_processor.cap_pixels_per_frame = False  # unset, it warns in every call
        for name in options_of(self.video_processor).keys() & {"fps", "num_frames", "max_frames"}:
            value, stock = getattr(self, name), getattr(type(self.video_processor), name, None)
            setattr(self.video_processor, name, stock if value is None else value)

    def to_dict(self) -> dict[str, Any]:
        self._sync_video_processor()
        return super().to_dict()

    _pushed_kind = "processor"

    def save_pretrained(self, save_directory, push_to_hub: bool = False, **kwargs):
        if push_to_hub:
            with self._pushing_what_changes(save_directory, kwargs):
                return self.save_pretrained(save_directory, **kwargs)
        return super().save_pretrained(save_directory, **kwargs)

    def _card_arguments(self, repo_id):
        return {"config": None}

    @classmethod
    def _get_arguments_from_pretrained(cls, pretrained_model_name_or_path, processor_dict=None, **kwargs):
        if is_torchvision_available():
            return super()._get_arguments_from_pretrained(pretrained_model_name_or_path, processor_dict, **kwargs)
        parts = (AutoImageProcessor, AutoTokenizer, PlainVideoProcessor)  # in the order of `__init__`
        return [part.from_pretrained(pretrained_model_name_or_path, **kwargs) for part in parts]

    def check_argument_for_proper_class(self, argument_name, argument):
        if isinstance(argument, PlainVideoProcessor):
            return PlainVideoProcessor  # transformers looks the class it expects up among those of torchvision
        return super().check_argument_for_proper_class(argument_name, argument)

    @classmethod
    def from_args_and_dict(cls, args, processor_dict: dict[str, Any], **kwargs):
        for name in kwargs:
            close = difflib.get_close_matches(name, OWN_OPTIONS, n=1, cutoff=0.85)
            if close and name not in OWN_OPTIONS:
                raise ValueError(f"`{name}` is not an option of {cls.__name__}; did you mean `{close[0]}`?")
            if is_refused(name, kwargs[name]) and "patch" not in name and name != "merge_size":
                raise ValueError(f"`{name}` is not an option of {cls.__name__}: {REFUSED_OPTIONS[name]}")
        stored = processor_dict
        # An explicit `fps` replaces a stored `num_frames` and the reverse.
        if kwargs.get("fps") is not None or kwargs.get("num_frames") is not None:
            processor_dict = processor_dict | {"fps": None, "num_frames": None}
        # Qwen's names, which transformers hands to both the image and the video processor.
        size = kwargs.get("size") or {}
        for name, edge in (("min_pixels", "shortest_edge"), ("max_pixels", "longest_edge")):
            value = kwargs.get(name) or size.get(edge)
            if value is not None:
                kwargs.setdefault(f"{name}_per_frame", value)
        found: dict[str, Any] = {}
        for part in args:
            if hasattr(part, "temporal_patch_size") and hasattr(part, "min_frames"):  # the video processor
                found = options_of(part)
                reset_options(part)
        loaded = super().from_args_and_dict(args, processor_dict, **kwargs)
        processor = loaded[0] if isinstance(loaded, tuple) else loaded  # with `return_unused_kwargs`
        counts = {name: (stored.get(name), kwargs.get(name), getattr(processor, name, None)) for name in found}
        unused = {name: value for name, value in found.items() if value not in counts[name]}
        if unused:
            logger.warning_once(
                f"Of the saved video processor {unused} is not used: the options of {cls.__name__} count"
            )
        return loaded

    @staticmethod
    def register_qwen_vl_utils_reader() -> None:
        """Let `qwen_vl_utils.process_vision_info` read files through PyAV, for all its users in this process.

        Its own readers need decord, torchcodec, or a torchvision that still has `torchvision.io.read_video`.
        """
        # Not an import statement: transformers would demand the package of everyone who loads this file from the Hub.
        vision_process = importlib.import_module("qwen_vl_utils.vision_process")
        # "torchvision" is also what it falls back to, with another error than the reader's own.
        for name in ("pyav", "torchvision"):
            vision_process.VIDEO_READER_BACKENDS[name] = read_for_qwen_vl_utils
        vision_process.FORCE_QWENVL_VIDEO_READER = "pyav"
        vision_process.get_video_reader_backend.cache_clear()

    def plan_video(self, video: "VideoSource | VideoInput | str | os.PathLike", **options) -> VideoPlan:
        """What a call would choose for `video` if it were alone in its prompt.

        Args:
            video: a `VideoSource` (nothing is read), a path (its packets are listed, one frame is decoded), or frames.
            options: `fps`, `num_frames`, `max_frames`, `min_pixels_per_frame`, `max_pixels_per_frame`,
                `max_total_tokens`, `video_metadata`, `do_sample_frames`, as in a call.
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
        **options,
    ) -> list[VideoPlan]:
        """What a call would choose for the videos of one prompt; see `plan_video`."""
        refuse_unknown(options, SAMPLING_OPTIONS)
        sources, chosen = [], []
        for request in self._requests(videos, video_metadata, options):
            known = isinstance(request.video, VideoSource)
            sources.append(request.video if known else self._open(request, do_sample_frames).source)
            chosen.append(self._complete(request.options, sources[-1]))
        budget = self.max_total_tokens if max_total_tokens is None else max_total_tokens
        return plan_videos(sources, chosen, budget, self._patch_sizes())

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
        stream_videos: bool = False,
        **kwargs: Unpack[ProcessingKwargs],
    ):
        """Tokenise prompts and prepare their images and videos for `model.generate(**inputs)`.

        Args:
            text: prompt(s) with one `<|image_pad|>` or `<|video_pad|>` for each image or video.
            images: PIL images, arrays (H, W), (H, W, C) or (C, H, W), or what `sources_videonsa.resolve_source` takes
                (a path, URI, the bytes of a file or a binary file), in whatever nesting.
            videos: for each video what `resolve_source` takes, a list of frames (as `images`), an array
                (T, H, W, C) or (T, C, H, W), or a pair (array, metadata). Arrays, here and in `images`, are numpy's,
                torch's, decord's, torchcodec's or others with `__array__` or `__dlpack__`, have 1 to 4 channels (grey
                or RGB, without or with alpha) and values 0 to 255 of any type; `pictures_videonsa.py` tells more.
            fps: as in the class; or one number per video, as in qwen-vl-utils' `video_kwargs`. For arrays and frame
                lists without `video_metadata` it is the rate at which they were sampled.
            num_frames, max_frames, min_pixels_per_frame, max_pixels_per_frame, max_total_tokens: as in the class.
            video_metadata: `VideoMetadata` or dict per video of frames. With `frames_indices` the frames are taken as
                sampled; without, as the whole video, from which `fps` or `num_frames` samples.
            do_sample_frames: False takes every frame of every video, and never leaves one out. True samples frames that
                were sampled before once more, by their `video_metadata`.
            return_metadata: add `video_metadata` and `video_plans` (lists) to the result; remove them for `generate`.
            stream_videos: decode nothing yet. The result has `video_streams`, a list of `VideoStream`, in the place of
                `pixel_values_videos`; `model.read` goes through them bit by bit.
            kwargs: transformers' keywords for text, images and videos. For videos, `size`, `min_pixels` and
                `max_pixels` are other names of the pixel limits.
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
        named, resizing, kwargs = sort_options(self, named, kwargs)
        if images is not None:
            images = self._read_images(images, resizing["resample"], kwargs)
        if videos is None:
            return super().__call__(images=images, text=text, **kwargs)

        budget, metadata, sample = (
            named.pop(key) for key in ("max_total_tokens", "video_metadata", "do_sample_frames")
        )
        requests = self._requests(videos, metadata, named)
        if any(request.is_untimed for request in requests):
            rate = self.fps or 2.0
            logger.warning_once(
                f"Frames came without timing and are taken as sampled at {rate} per second. Say what it was: `fps`, or "
                "`video_metadata` with the `fps` of the whole video and the `frames_indices` taken from it."
            )
        white = white_of(self.video_processor, kwargs, "videos_kwargs")
        clips = [self._open(request, sample, resizing["input_data_format"], white) for request in requests]
        options = [self._complete(request.options, clip.source) for request, clip in zip(requests, clips, strict=True)]
        if not resizing["do_resize"]:
            options = [self._unresized(clip.source, option) for clip, option in zip(clips, options, strict=True)]
        plans: list[VideoPlan] = []
        for group in self._by_prompt(text, len(clips), kwargs):
            sources = [clips[i].source for i in group]
            budget = self.max_total_tokens if budget is None else budget
            plans += plan_videos(sources, [options[i] for i in group], budget, self._patch_sizes())
        for plan in plans:
            (logger.warning if plan.notes else logger.info)(str(plan))

        def resize(frames: torch.Tensor, plan: VideoPlan) -> torch.Tensor:
            # What the video processor would do, but frame by frame where a file is read.
            return self._resize(frames, plan.height, plan.width, resizing["resample"])

        streams = [VideoStream(clip, plan, resize) for clip, plan in zip(clips, plans, strict=True)]
        if stream_videos:
            frames = [stream.unread() for stream in streams]
        else:
            frames = [clip.read(plan, resize) for clip, plan in zip(clips, plans, strict=True)]
        metadata = [clip.metadata(plan) for clip, plan in zip(clips, plans, strict=True)]
        kwargs["videos_kwargs"] |= {
            "do_resize": False,
            "do_sample_frames": False,
            "input_data_format": ChannelDimension.FIRST,
            "video_metadata": metadata,
        }
        outputs = super().__call__(images=images, text=text, videos=frames, **kwargs)
        if stream_videos:
            outputs["video_streams"] = streams
        if return_metadata:
            outputs["video_metadata"] = metadata
            outputs["video_plans"] = plans
        return outputs

    def _resize(self, frames: torch.Tensor, height: int, width: int, resample: Any) -> torch.Tensor:
        if frames.shape[-2:] == (height, width):
            return frames
        if isinstance(self.video_processor, PlainVideoProcessor):
            return self.video_processor.resize_frames(frames, height, width, resample)
        size = SizeDict(height=height, width=width)
        return BaseVideoProcessor.resize(self.video_processor, frames, size=size, resample=resample)

    def _read_images(self, images: Any, resample: Any, kwargs: dict[str, Any]) -> list[torch.Tensor] | None:
        """Images as (3, H, W), resized if any of them has options of its own; sets their keywords in `kwargs`."""
        requests = [
            image if isinstance(image, ImageRequest) else ImageRequest(image) for image in flatten_images(images)
        ]
        options = kwargs.setdefault("images_kwargs", {})
        low, high = image_limits(self.image_processor, options)
        white = white_of(self.image_processor, kwargs, "images_kwargs")
        data_format = options.pop("input_data_format", None)
        pictures = []
        for request in requests:
            picture = read_picture(request.image, argument="images", data_format=data_format, white=white)
            check_values(picture, "images", white)
            pictures.append(picture)
        options["input_data_format"] = ChannelDimension.FIRST
        asked = [request.options for request in requests]
        if any(asked):
            do_resize = options.get("do_resize")
            if not (self.image_processor.do_resize if do_resize is None else do_resize):
                raise ValueError(f"`do_resize`=False contradicts the options of an image in a message: {asked}")
            resample = options.get("resample", self.image_processor.resample)
            for i, (picture, own) in enumerate(zip(pictures, asked, strict=True)):
                size = image_size(self.image_processor, tuple(picture.shape[-2:]), own, low, high)
                pictures[i] = self._resize(picture[None], *size, resample)[0]
            options["do_resize"] = False
        return pictures or None

    def _process_videos(self, videos: Sequence[torch.Tensor], **kwargs) -> tuple[dict[str, Any], list[str]]:
        """Patches of resized (T, 3, H, W) videos, as in Qwen2.5-VL, but cut from a few frames at a time.

        Whole videos take three times the memory of their patches, which are 2.3 GB for the default token budget.
        """
        metadata = kwargs.pop("video_metadata")
        kwargs |= {"return_metadata": False, "return_tensors": "pt"}
        patches, processor = self._patch_sizes(), self.video_processor
        grid = [
            [
                math.ceil(len(frames) / patches.temporal),
                frames.shape[2] // processor.patch_size,
                frames.shape[3] // processor.patch_size,
            ]
            for frames in videos
        ]
        is_streamed = isinstance(videos[0], UnreadFrames)
        pixels, done = None, 0
        for frames in videos:
            if is_streamed:
                frames.stream.temporal_patch_size = patches.temporal
                frames.stream.cut = lambda part: processor([part], **kwargs)["pixel_values_videos"]
                continue
            for part in frames.split(32 * patches.temporal):
                rows = processor([part], **kwargs)["pixel_values_videos"]
                if pixels is None:
                    pixels = rows.new_empty((sum(map(math.prod, grid)), rows.shape[1]))
                pixels[done : done + len(rows)] = rows
                done += len(rows)
        processed = {
            **({} if is_streamed else {"pixel_values_videos": pixels}),
            "video_grid_thw": torch.tensor(grid),
            "second_per_grid_ts": [patches.temporal / entry.sampled_fps for entry in metadata],
        }
        return processed, [self.replace_video_token(processed, i) for i in range(len(videos))]

    def apply_chat_template(self, conversation, chat_template: str | None = None, **kwargs):
        """As in transformers. Options of an image or a video (`fps`, `max_pixels`, ...) in its message apply to it.

        Keys whose value is None are absent, in messages and in their parts. With `tokenize=True` the keywords of a call
        are taken both directly and inside `processor_kwargs`. `load_audio_from_video`, which transformers' server sends
        with every call, has no effect (`serving_videonsa.py`).

        Raises:
            ValueError: as a call; or something in the conversation, or `tools` or `documents`, would be ignored.
        """
        if is_server_call(kwargs):
            try:
                return self.apply_chat_template(conversation, chat_template, **drop_guesses(kwargs))
            except ValueError as error:
                raise bad_request(error) from error
        templates = f"{self.chat_template} {chat_template}"
        for name in ("tools", "documents"):
            if kwargs.get(name) and name not in templates:
                raise ValueError(f"`{name}` would be ignored: the chat template does not use it")
        is_read = bool(kwargs.get("tokenize"))
        conversation = parse_conversation(conversation, templates, is_read=is_read)
        if is_read:
            own = inspect.signature(super().apply_chat_template).parameters
            mine = {name: kwargs.pop(name) for name in call_keywords(self) if name in kwargs and name not in own}
            inner = dict(kwargs.get("processor_kwargs") or {})
            for name in mine.keys() & inner.keys():
                raise ValueError(f"`{name}` was given twice: as a keyword and in `processor_kwargs`")
            for given in (kwargs, inner):
                refuse_media(given, conversation)
            # transformers asks to sample wherever a rate is given, which may also say how frames were sampled.
            kwargs["processor_kwargs"] = {"do_sample_frames": None, **inner, **mine}
        return super().apply_chat_template(conversation, chat_template, **kwargs)

    def _requests(self, videos: Any, video_metadata: Any, options: Mapping[str, Any]) -> list[VideoRequest]:
        """Flatten `videos` and give each its options: those of its message, completed by those of the call."""
        flat = list(flatten_videos(videos))
        if not flat:
            raise ValueError(f"`videos` holds no video, got {videos!r}")
        metadata = [None] * len(flat) if video_metadata is None else list(flatten_metadata(video_metadata))
        rates = options.get("fps")
        array = as_array(rates)
        if isinstance(rates, (list, tuple)) or (array is not None and array.ndim):
            rates = list(rates if array is None else array.reshape(-1))
        else:
            rates = [rates] * len(flat)
        for name, values in (("video_metadata", metadata), ("fps", rates)):
            if len(values) != len(flat):
                raise ValueError(f"`{name}` has {len(values)} entries for {len(flat)} videos")
        requests = []
        for video, entry, rate in zip(flat, metadata, rates, strict=True):
            request = video if isinstance(video, VideoRequest) else VideoRequest(video)
            asked = VideoOptions(**{**options, "fps": rate})
            warn_of_overridden(request.options, asked)
            mine = self._within_limit(request.options, asked.max_pixels_per_frame or self.max_pixels_per_frame)
            requests.append(VideoRequest(request.video, mine.over(asked), request.metadata or entry))
        return requests

    @staticmethod
    def _within_limit(options: VideoOptions, limit: int) -> VideoOptions:
        """The options of a message with pixel limits that do not exceed the processor's."""
        lowered = {
            name: limit
            for name in ("min_pixels_per_frame", "max_pixels_per_frame")
            if (getattr(options, name) or 0) > limit
        }
        asked = {name: getattr(options, name) for name in lowered}
        if (options.resized_height or 0) * (options.resized_width or 0) > limit:
            asked |= {"resized_height": options.resized_height, "resized_width": options.resized_width}
        if asked:
            logger.warning_once(
                f"A video in a message asks for {', '.join(f'{name}={value}' for name, value in asked.items())}; "
                f"the limit of {limit} applies. Raise `max_pixels_per_frame` in the call to allow more."
            )
        return replace(options, **lowered)

    def _open(
        self, request: VideoRequest, do_sample_frames: bool | None, data_format: Any = None, white: float = WHITE
    ) -> Clip:
        rate = request.options.fps or self.fps or 2.0
        return open_clip(request, rate=rate, do_sample_frames=do_sample_frames, data_format=data_format, white=white)

    def _complete(self, asked: VideoOptions, source: VideoSource) -> VideoOptions:
        """Options completed by the defaults; a default minimum of pixels gives way to a lower maximum."""
        options = asked.over(self._default_options())
        if asked.min_pixels_per_frame is None and options.max_pixels_per_frame < options.min_pixels_per_frame:
            options = replace(options, min_pixels_per_frame=options.max_pixels_per_frame)
        if source.presampled and asked.num_frames is None and source.num_frames > (asked.max_frames or math.inf):
            # Not sampled by a rate, but there is a limit.
            if not source.may_drop_frames:
                raise ValueError(
                    f"`max_frames`={asked.max_frames} contradicts `do_sample_frames`=False: {source.name} has "
                    f"{source.num_frames} frames"
                )
            step = self._patch_sizes().temporal
            frames = max(step, asked.max_frames // step * step)
            options = replace(options, fps=None, num_frames=frames, max_frames=None)
        return options

    def _unresized(self, source: VideoSource, options: VideoOptions) -> VideoOptions:
        """Options under which a plan keeps the size of the frames."""
        if options.resized_height:
            raise ValueError(f"`do_resize`=False contradicts `resized_height`={options.resized_height} of a video")
        factor = self._patch_sizes().spatial
        if source.height % factor or source.width % factor:
            raise ValueError(
                f"`do_resize`=False needs frames whose sides are multiples of {factor}; {source.name} has "
                f"{source.height}x{source.width} pixels"
            )
        pixels = source.height * source.width
        return replace(options, min_pixels_per_frame=pixels, max_pixels_per_frame=pixels)

    def _by_prompt(self, text: str | list[str] | None, num_videos: int, kwargs: Mapping) -> list[range]:
        """The videos of each prompt, as ranges of their numbers."""
        # Where user text was marked, placeholders in it are no placeholders: let transformers count.
        if text is None or kwargs.get("sanitize_control_tokens"):
            return [range(num_videos)]
        counts = [prompt.count(self.video_token) for prompt in ([text] if isinstance(text, str) else text)]
        if sum(counts) != num_videos:
            raise ValueError(f"`text` has {sum(counts)} {self.video_token}, and `videos` has {num_videos} videos")
        starts = np.cumsum([0, *counts]).tolist()
        return [range(start, start + count) for start, count in zip(starts, counts, strict=False) if count]


register()
VideoNSAProcessor.register_for_auto_class()

__all__ = ["VideoNSAProcessor", "VideoPlan", "VideoSource"]
