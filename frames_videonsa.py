"""Videos as their callers give them: files (`files_videonsa.py`), lists of images, arrays.

`open_clip` looks at a video without decoding it, so that `budget_videonsa` can choose what to read; `Clip.read` then
returns the chosen frames, resized, and `Clip.stream` gives them out piece by piece.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, Protocol

import numpy as np
import torch
from PIL import Image
from transformers.video_utils import VideoMetadata

try:
    from .budget_videonsa import VideoOptions, VideoPlan, VideoSource, check_positive
    from .files_videonsa import FileClip, Resize, check_batch, metadata_of
    from .pictures_videonsa import WHITE, as_array, check_values, read_picture, to_rgb_frames
    from .sources_videonsa import is_image_reference, is_reference, resolve_source
except ImportError:  # `import processing_videonsa` from a checkout, without a package
    if __package__:
        raise
    from budget_videonsa import VideoOptions, VideoPlan, VideoSource, check_positive
    from files_videonsa import FileClip, Resize, check_batch, metadata_of
    from pictures_videonsa import WHITE, as_array, check_values, read_picture, to_rgb_frames
    from sources_videonsa import is_image_reference, is_reference, resolve_source


class VideoRequest:
    """A video as the caller gave it, with the options and the metadata that came with it.

    No dataclass: transformers 5.24 makes dicts of those that it finds in a conversation.
    """

    def __init__(self, video: Any, options: VideoOptions | None = None, metadata: VideoMetadata | None = None):
        self.video, self.metadata = video, _metadata_of_batch(video) if metadata is None else metadata
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
        """The planned frames, (T, 3, plan.height, plan.width)."""

    def stream(self, plan: VideoPlan, resize: Resize, batch: int) -> Iterator[torch.Tensor]:
        """The planned frames in their order, (n, 3, plan.height, plan.width), n == `batch` except for the last."""


def open_clip(
    request: VideoRequest,
    *,
    rate: float,
    do_sample_frames: bool | None = None,
    data_format: Any = None,
    white: float = WHITE,
) -> Clip:
    """Look at a video.

    Args:
        rate: frames per second of frames that come without timing.
        do_sample_frames: False forbids to leave out a frame; True samples frames too that were sampled before.
        data_format: of arrays, "channels_first" or "channels_last"; found out if None.
        white: value of white in arrays of floats.
    Raises:
        ValueError: a file that is missing, unreadable, without video frames or cut short; frames that are no video;
            metadata or options that contradict the video.
    """
    every_frame = do_sample_frames is False
    if every_frame and request.options.num_frames is not None:
        raise ValueError(f"`num_frames`={request.options.num_frames} contradicts `do_sample_frames`=False")
    if not is_reference(request.video):
        return FrameClip(request, rate, do_sample_frames, data_format, white)
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
    if isinstance(videos, VideoRequest):
        yield _only_video(videos)
    elif is_reference(videos):
        yield [videos] if _is_picture(videos) else videos
    elif isinstance(videos, VideoSource):
        yield videos
    elif isinstance(videos, Image.Image):
        yield [videos]
    elif isinstance(videos, tuple) and len(videos) == 2 and isinstance(videos[1], Mapping):
        yield _only_video(VideoRequest(videos[0], metadata=_metadata(videos[1])))
    elif isinstance(videos, (list, tuple)):
        if videos and all(_is_frame(item) for item in videos):
            yield list(videos)
        else:
            for item in videos:
                yield from flatten_videos(item)
    else:
        yield from _flatten_array(videos)


def _only_video(request: VideoRequest) -> VideoRequest:
    """The request for a path or for frames, out of whatever nesting."""
    videos = list(flatten_videos(request.video))
    if not videos:
        raise ValueError("a video given as frames has no frames")
    if len(videos) > 1:
        raise ValueError(
            f"`videos` holds {len(videos)} videos where one is meant, in a message or a pair with metadata"
        )
    if isinstance(videos[0], VideoRequest):
        return VideoRequest(videos[0].video, request.options, request.metadata or videos[0].metadata)
    return VideoRequest(videos[0], request.options, request.metadata)


def _flatten_array(videos: Any) -> Iterator[Any]:
    array = as_array(videos)
    if array is None:
        raise ValueError(f"`videos` holds a {type(videos).__name__}, which is not a path, frames or an array")
    if array.ndim not in (3, 4, 5):
        raise ValueError(f"`videos` must have 3 to 5 dimensions as an array, got shape {tuple(array.shape)}")
    if array.ndim == 5:
        yield from array
    elif array.ndim == 3:
        if array.shape[0] in (2, 4) and array.shape[2] not in (1, 2, 3, 4):
            raise ValueError(
                f"`videos`: cannot tell whether shape {tuple(array.shape)} is of {array.shape[0]} grey frames, which "
                "need an axis of one channel, or of one picture with alpha, which needs its channels last"
            )
        yield array[None]
    else:
        yield videos


def _metadata_of_batch(video: Any) -> VideoMetadata | None:
    """torchcodec's batches tell when their frames are shown."""
    seconds = getattr(video, "pts_seconds", None)
    seconds = np.asarray([] if seconds is None else seconds, dtype=float).reshape(-1)
    if len(seconds) < 2 or seconds[-1] <= seconds[0]:
        return None
    rate = float((len(seconds) - 1) / (seconds[-1] - seconds[0]))
    return VideoMetadata(total_num_frames=len(seconds), fps=rate, frames_indices=list(range(len(seconds))))


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


def _is_frame(value: Any) -> bool:
    if is_reference(value):
        return is_image_reference(value)
    array = as_array(value)
    return isinstance(value, Image.Image) or (array is not None and array.ndim in (2, 3))


def _is_picture(reference: Any) -> bool:
    """Whether this is the file of one still picture, which is read as frames are; some formats hold films too."""
    if not is_image_reference(reference):
        return False
    try:
        source = resolve_source(reference, argument="videos", kind="image")
        with Image.open(source.readable) as image:
            return getattr(image, "n_frames", 1) == 1
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError):
        return False  # the reader of videos will say what is wrong with it


class FrameClip:
    """A video given as frames; see `open_clip`."""

    def __init__(
        self, request: VideoRequest, rate: float, do_sample_frames: bool | None, data_format: Any, white: float
    ):
        self.frames = _read_frames(request.video, data_format, white)
        count, _, height, width = self.frames.shape
        every_frame = do_sample_frames is False
        self.known, presampled = request.metadata, True
        if self.known is not None:
            presampled = self.known.frames_indices is not None
            self.known = _complete(self.known, count, rate)
            rate = self.known.sampled_fps
            # Frames whose timing is known can be sampled once more by asking for a rate.
            presampled = presampled and request.options.fps is None and not do_sample_frames
        elif do_sample_frames and request.options.num_frames is None and count > 1:
            raise ValueError(
                "`do_sample_frames`=True needs `num_frames`, or the timing of the frames: `video_metadata` with `fps` "
                f"and `total_num_frames`; a video of {count} frames has none (`fps` alone says how they were sampled)"
            )
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
        return resize(self._planned(plan.frame_indices), plan)

    def stream(self, plan: VideoPlan, resize: Resize, batch: int) -> Iterator[torch.Tensor]:
        batch, indices = check_batch(batch), plan.frame_indices
        starts = range(0, len(indices), batch)
        return (resize(self._planned(indices[start : start + batch]), plan) for start in starts)

    def _planned(self, indices: Sequence[int]) -> torch.Tensor:
        """A view where frames follow each other, as all of them do."""
        first, end = indices[0], indices[0] + len(indices)
        return self.frames[first:end] if list(indices) == list(range(first, end)) else self.frames[list(indices)]


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
    number = (int, float)
    total = check_positive("total_num_frames` of `video_metadata", metadata.total_num_frames, number)
    if total is None:
        raise ValueError("`video_metadata` has frames_indices and needs `total_num_frames`")
    fps = check_positive("fps` of `video_metadata", metadata.fps, number) or rate
    return replace(metadata, total_num_frames=total, fps=fps, frames_indices=[int(i) for i in indices])


def _read_frames(video: Any, data_format: Any, white: float) -> torch.Tensor:
    """(T, 3, H, W) from an array or from a list of images, image paths or arrays."""
    array = as_array(video)
    if array is not None:
        frames = to_rgb_frames(array, argument="videos", data_format=data_format, white=white)
    elif not isinstance(video, (list, tuple)):
        raise ValueError(f"a video must be a path, frames or an array, got {type(video).__name__}")
    elif len(video) == 0:
        raise ValueError("a video given as frames has no frames")
    else:
        pictures = [read_picture(frame, argument="videos", data_format=data_format, white=white) for frame in video]
        shapes = {tuple(picture.shape[1:]) for picture in pictures}
        if len(shapes) > 1:
            raise ValueError(f"the frames of a video must have one size, got {sorted(shapes)}")
        frames = torch.stack(pictures)
    check_values(frames, "videos", white)
    return frames
