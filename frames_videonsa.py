"""Videos as their callers give them: files (`files_videonsa.py`), lists of images, arrays.

`open_clip` looks at a video without decoding it, so that `budget_videonsa` can choose what to read; `Clip.read` then
returns the chosen frames, resized.
"""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any, Protocol

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from transformers.image_utils import ChannelDimension
from transformers.video_utils import VideoMetadata

try:
    from .budget_videonsa import VideoOptions, VideoPlan, VideoSource
    from .files_videonsa import FileClip, Resize, metadata_of
    from .sources_videonsa import is_image_reference, is_reference, resolve_source
except ImportError:  # `import processing_videonsa` from a checkout, without a package
    if __package__:
        raise
    from budget_videonsa import VideoOptions, VideoPlan, VideoSource
    from files_videonsa import FileClip, Resize, metadata_of
    from sources_videonsa import is_image_reference, is_reference, resolve_source


class VideoRequest:
    """A video as the caller gave it, with the options and the metadata that came with it.

    No dataclass: transformers 5.24 makes dicts of those that it finds in a conversation.
    """

    def __init__(self, video: Any, options: VideoOptions | None = None, metadata: VideoMetadata | None = None):
        self.video, self.metadata = video, metadata
        self.options = VideoOptions() if options is None else options

    @property
    def is_untimed(self) -> bool:
        """Whether these are frames of which nobody said when they were taken."""
        return not is_reference(self.video) and self.metadata is None and self.options.fps is None


class Clip(Protocol):
    """A video that is known and not yet read."""

    source: VideoSource

    def metadata(self, plan: VideoPlan) -> VideoMetadata:
        """transformers' metadata of the planned frames; its `sampled_fps` is the plan's."""

    def read(self, plan: VideoPlan, resize: Resize) -> torch.Tensor:
        """The planned frames, (T, 3, height, width)."""


def open_clip(request: VideoRequest, *, rate: float, every_frame: bool = False, data_format: Any = None) -> Clip:
    """Look at a video.

    Args:
        rate: frames per second of frames that come without timing.
        every_frame: no frame may be left out.
        data_format: of arrays, "channels_first" or "channels_last"; found out if None.
    Raises:
        ValueError: a file that is missing, unreadable, without video frames or cut short; frames that are no video;
            metadata or options that contradict the video.
    """
    if every_frame and request.options.num_frames is not None:
        raise ValueError(f"`num_frames`={request.options.num_frames} contradicts `do_sample_frames`=False")
    if not is_reference(request.video):
        return FrameClip(request, rate, every_frame, data_format)
    if every_frame and request.options.fps is not None:
        raise ValueError(f"`fps`={request.options.fps} contradicts `do_sample_frames`=False for a file")
    if request.metadata is not None:
        raise ValueError("`video_metadata` is for frames; a video file brings its own")
    source = resolve_source(request.video, argument="videos")
    return FileClip(source.readable, every_frame, source.name)


def flatten_videos(videos: Any) -> Iterator[Any]:
    """Single videos out of whatever nesting; a list of images, image paths or 3D arrays is one video.

    Raises:
        ValueError: something that cannot be a video.
    """
    if is_reference(videos) or isinstance(videos, (VideoRequest, VideoSource)):
        yield videos
    elif isinstance(videos, Image.Image):
        yield [videos]
    elif _is_array(videos):
        if videos.ndim not in (3, 4, 5):
            raise ValueError(f"`videos` must have 3 to 5 dimensions as an array, got shape {tuple(videos.shape)}")
        if videos.ndim == 5:
            yield from videos
        else:
            yield videos[None] if videos.ndim == 3 else videos
    elif isinstance(videos, tuple) and len(videos) == 2 and isinstance(videos[1], Mapping):
        yield VideoRequest(videos[0], metadata=_metadata(videos[1]))
    elif isinstance(videos, (list, tuple)):
        if videos and all(_is_frame(item) for item in videos):
            yield list(videos)
        else:
            for item in videos:
                yield from flatten_videos(item)
    else:
        raise ValueError(f"`videos` holds a {type(videos).__name__}, which is not a path, frames or an array")


def flatten_metadata(metadata: Any) -> Iterator[VideoMetadata | None]:
    """Single entries out of whatever nesting, as `VideoMetadata`."""
    if metadata is None or isinstance(metadata, Mapping):
        yield _metadata(metadata)
    else:
        for entry in metadata:
            yield from flatten_metadata(entry)


def _metadata(entry: Mapping | None) -> VideoMetadata | None:
    if entry is None or isinstance(entry, VideoMetadata):
        return entry
    try:
        return VideoMetadata(**entry)
    except TypeError as error:
        raise ValueError(f"`video_metadata` {dict(entry)!r}: {error}") from error


def _is_array(value: Any) -> bool:
    return isinstance(value, (np.ndarray, torch.Tensor))


def _is_frame(value: Any) -> bool:
    if is_reference(value):
        return is_image_reference(value)
    return isinstance(value, Image.Image) or (_is_array(value) and value.ndim == 3)


class FrameClip:
    """A video given as frames; see `open_clip`."""

    def __init__(self, request: VideoRequest, rate: float, every_frame: bool, data_format: Any):
        self.frames = _frames_to_tensor(request.video, data_format)
        count, _, height, width = self.frames.shape
        self.known, presampled = request.metadata, True
        if self.known is not None:
            presampled = self.known.frames_indices is not None
            self.known = _complete(self.known, count, rate)
            rate = self.known.sampled_fps
            # Frames whose timing is known can be sampled once more by asking for a rate.
            presampled = presampled and request.options.fps is None
        self.source = VideoSource(
            num_frames=count,
            fps=rate,
            height=height,
            width=width,
            presampled=presampled or every_frame,
            may_drop_frames=not every_frame,
            name=f"video of {count} frames",
        )

    def metadata(self, plan: VideoPlan) -> VideoMetadata:
        if self.known is not None:
            return replace(self.known, frames_indices=[self.known.frames_indices[i] for i in plan.frame_indices])
        return metadata_of(self.source, plan, backend=None)

    def read(self, plan: VideoPlan, resize: Resize) -> torch.Tensor:
        frames = self.frames
        if plan.num_frames < len(frames):
            frames = frames[list(plan.frame_indices)]
        return resize(frames, plan)


def _complete(metadata: VideoMetadata, count: int, rate: float) -> VideoMetadata:
    """Metadata of `count` frames with every field that `sampled_fps` needs."""
    indices = metadata.frames_indices
    if indices is None:
        if metadata.total_num_frames not in (None, count):
            raise ValueError(
                f"`video_metadata` has total_num_frames={metadata.total_num_frames} and no frames_indices, and the "
                f"video has {count} frames"
            )
        metadata, indices = replace(metadata, total_num_frames=count), range(count)
    if len(indices) != count:
        raise ValueError(f"`video_metadata` has {len(indices)} frames_indices, and the video has {count} frames")
    return replace(metadata, fps=metadata.fps or rate, frames_indices=[int(i) for i in indices])


def _frames_to_tensor(video: Any, data_format: Any) -> torch.Tensor:
    """(T, 3, H, W) from an array or from a list of images, image paths or arrays."""
    if not _is_array(video):
        if not isinstance(video, (list, tuple)):
            raise ValueError(f"a video must be a path, frames or an array, got {type(video).__name__}")
        if len(video) == 0:
            raise ValueError("a video given as frames has no frames")
        frames = [torch.as_tensor(frame) if _is_array(frame) else _load_image(frame) for frame in video]
        shapes = {tuple(frame.shape) for frame in frames}
        if len(shapes) > 1:
            raise ValueError(f"the frames of a video must have one size, got {sorted(shapes)}")
        video = torch.stack(frames)
    video = torch.as_tensor(video)
    if video.ndim != 4 or 0 in video.shape:
        raise ValueError(f"a video must be (T, H, W, C) or (T, C, H, W) and not empty, got shape {tuple(video.shape)}")
    if data_format is None:
        first, last = video.shape[1] in (1, 3), video.shape[3] in (1, 3)
        if first == last:
            raise ValueError(
                f"cannot tell the channels (1 or 3) of a video of shape {tuple(video.shape)}; pass `input_data_format`"
            )
        data_format = ChannelDimension.FIRST if first else ChannelDimension.LAST
    if ChannelDimension(data_format) == ChannelDimension.LAST:
        video = video.permute(0, 3, 1, 2)
    if video.shape[1] not in (1, 3):
        raise ValueError(f"a video must have 1 or 3 channels, got {video.shape[1]}")
    return video.expand(-1, 3, -1, -1)


def _load_image(image: Any) -> torch.Tensor:
    """(H, W, 3) uint8; transparent pixels become white, as in qwen-vl-utils."""
    if is_reference(image):
        source = resolve_source(image, argument="videos")
        try:
            with Image.open(source.readable) as opened:
                return _load_image(opened.copy())
        except (OSError, UnidentifiedImageError) as error:
            raise ValueError(f"frame {source.name} cannot be read: {error}") from error
    if not isinstance(image, Image.Image):
        raise ValueError(f"a frame must be an image, a path or an array, got {type(image).__name__}")
    if image.mode == "RGBA":
        white = Image.new("RGB", image.size, (255, 255, 255))
        white.paste(image, mask=image.getchannel("A"))
        image = white
    return torch.from_numpy(np.array(image.convert("RGB")))
