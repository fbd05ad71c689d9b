"""Videos as their callers give them: files read through PyAV, lists of images, arrays.

`open_clip` looks at a video without decoding it, so that `budget_videonsa` can choose what to read; `Clip.read` then
returns the chosen frames, resized. Memory holds resized frames only, however long the video.
"""

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from transformers.image_utils import ChannelDimension
from transformers.video_utils import VideoMetadata

try:
    import av
except ImportError:  # text, images and decoded frames work without it; a file then raises in `_open`
    av = None

try:
    from .budget_videonsa import VideoOptions, VideoPlan, VideoSource
except ImportError:  # `import processing_videonsa` from a checkout, without a package
    if __package__:
        raise
    from budget_videonsa import VideoOptions, VideoPlan, VideoSource

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".ppm")

# AVI stores decoding times only: with B-frames the presentation times of its packets are made up.
_FORMATS_WITHOUT_PRESENTATION_TIMES = {"avi"}

Resize = Callable[[torch.Tensor, VideoPlan], torch.Tensor]
"""(T, 3, H, W) frames to the height and width of a plan."""


@dataclass(frozen=True)
class VideoRequest:
    """A video as the caller gave it, with the options and the metadata that came with it."""

    video: Any
    options: VideoOptions = field(default_factory=VideoOptions)
    metadata: VideoMetadata | None = None


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
    if not isinstance(request.video, (str, os.PathLike)):
        return FrameClip(request, rate, every_frame, data_format)
    if every_frame and request.options.fps is not None:
        raise ValueError(f"`fps`={request.options.fps} contradicts `do_sample_frames`=False for a file")
    if request.metadata is not None:
        raise ValueError(f"`video_metadata` is for frames; {os.fspath(request.video)} brings its own")
    return FileClip(request.video, every_frame)


def flatten_videos(videos: Any) -> Iterator[Any]:
    """Single videos out of whatever nesting; a list of images, image paths or 3D arrays is one video.

    Raises:
        ValueError: something that cannot be a video.
    """
    if isinstance(videos, (str, os.PathLike, VideoRequest, VideoSource)):
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
    if isinstance(value, (str, os.PathLike)):
        return os.fspath(value).lower().endswith(IMAGE_SUFFIXES)
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
        return _metadata_of(self.source, plan, backend=None)

    def read(self, plan: VideoPlan, resize: Resize) -> torch.Tensor:
        frames = self.frames
        if plan.num_frames < len(frames):
            frames = frames[list(plan.frame_indices)]
        return resize(frames, plan)


def _metadata_of(source: VideoSource, plan: VideoPlan, backend: str | None) -> VideoMetadata:
    return VideoMetadata(
        total_num_frames=source.num_frames,
        fps=source.fps,
        width=source.width,
        height=source.height,
        duration=source.num_frames / source.fps,
        video_backend=backend,
        frames_indices=list(plan.frame_indices),
    )


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


class FileClip:
    """A video file, listed and not decoded; see `open_clip`.

    A frame is known by its key: its presentation time where the container has true ones, else its number in decoding
    order. `gops` lists the keys of each group of pictures, in file order, so that `_decode` can skip groups.
    """

    def __init__(self, path: str | os.PathLike, every_frame: bool):
        self.path = os.fspath(path).removeprefix("file://")
        self.keys: list[int] = []
        self.gops: list[list[int]] | None = None
        self.quarter_turns, self.size = 0, (0, 0)
        fps, timestamps = self._list_frames()
        self.source = VideoSource(
            num_frames=len(self.keys),
            fps=fps,
            height=self.size[0],
            width=self.size[1],
            timestamps=timestamps,
            presampled=every_frame,
            may_drop_frames=not every_frame,
            name=self.path,
        )

    def metadata(self, plan: VideoPlan) -> VideoMetadata:
        return _metadata_of(self.source, plan, backend="pyav")

    def read(self, plan: VideoPlan, resize: Resize) -> torch.Tensor:
        places: dict[int, list[int]] = {}
        for place, index in enumerate(plan.frame_indices):
            places.setdefault(self.keys[index], []).append(place)
        frames = torch.empty((plan.num_frames, 3, plan.height, plan.width), dtype=torch.uint8)
        found = 0
        for key, frame in self._decode(set(places)):
            picture = np.ascontiguousarray(np.rot90(frame.to_ndarray(format="rgb24"), self.quarter_turns))
            frames[places[key]] = resize(torch.from_numpy(picture).permute(2, 0, 1)[None], plan)
            found += len(places[key])
        if found < plan.num_frames:
            raise ValueError(
                f"{self.path}: only {found} of the {plan.num_frames} frames needed can be decoded; the file is damaged"
            )
        return frames

    def _list_frames(self) -> tuple[float, tuple[float, ...] | None]:
        """Fill `keys`, `gops` and `size`; returns the frame rate and, if it varies, the time of every frame."""
        times: list[int | None] = []
        gops: list[list[int | None]] = []
        end_of_video = end_of_file = last_duration = 0.0
        cut_packet = False
        with _open(self.path) as container:
            stream = _video_stream(container, self.path)
            for packet in _packets(container, self.path):
                if packet.pts is not None and packet.time_base:
                    end_of_file = max(end_of_file, float((packet.pts + (packet.duration or 0)) * packet.time_base))
                if packet.stream.index != stream.index:
                    continue
                if packet.pts is not None:
                    end_of_video = max(end_of_video, float((packet.pts + (packet.duration or 0)) * packet.time_base))
                cut_packet = packet.is_corrupt
                if packet.is_keyframe or not gops:
                    gops.append([])
                if not packet.is_discard:
                    times.append(packet.pts)
                    gops[-1].append(packet.pts)
                    last_duration = float((packet.duration or 0) * packet.time_base) or last_duration
            formats = set(container.format.name.split(","))
            rate = float(stream.average_rate or stream.guessed_rate or 0)
            time_base = float(stream.time_base or 0)
            promised, read = 0.0, end_of_file
            if "mp4" in formats and stream.duration is not None:
                promised = float(stream.duration) * time_base
                read = end_of_video - float(stream.start_time or 0) * time_base
            elif "matroska" in formats and container.duration is not None:
                promised = container.duration / 1e6
        if not times:
            raise ValueError(f"{self.path}: the video has no frames")
        # The transport stream of a broadcast has damaged packets of its own; elsewhere the last one tells of a cut.
        cut_packet = cut_packet and "mpegts" not in formats
        if cut_packet or promised - read > max(0.5, 3 / rate if rate else 0):
            raise ValueError(
                f"{self.path}: the file is cut short: only {len(times) - cut_packet} frames, {read:.2f} s, can be read"
                + (f" of the {promised:.2f} s that its header promises" if promised else "")
            )

        if None in times or len(set(times)) < len(times) or formats & _FORMATS_WITHOUT_PRESENTATION_TIMES:
            self._number_frames()
            if not rate:
                raise ValueError(f"{self.path}: the file tells neither the times of its frames nor their rate")
            return rate, None
        self.keys, self.gops = sorted(times), gops
        frame = next((frame for _, frame in self._decode({self.keys[0]})), None)
        if frame is None:
            raise ValueError(f"{self.path}: the first frame cannot be decoded; the file is damaged")
        self._set_size(frame)
        return _rate_and_times([time * time_base for time in self.keys], rate, last_duration)

    def _number_frames(self) -> None:
        """Decode everything once, for files that do not time their frames."""
        count = 0
        for count, (_, frame) in enumerate(self._decode(None), start=1):
            if count == 1:
                self._set_size(frame)
        if not count:
            raise ValueError(f"{self.path}: no frame can be decoded; the file is damaged")
        self.keys = list(range(count))

    def _set_size(self, frame: Any) -> None:
        # `rotation` counts counterclockwise, as np.rot90 does.
        self.quarter_turns = round(frame.rotation / 90) % 4
        self.size = (frame.width, frame.height) if self.quarter_turns % 2 else (frame.height, frame.width)

    def _decode(self, wanted: set[int] | None) -> Iterator[tuple[int, Any]]:
        """(key, frame) of the wanted frames; of all, numbered, if `wanted` is None.

        Groups of pictures without a wanted frame are read and not decoded. Frames that cannot be decoded are left
        out; the caller counts.
        """
        missing = None if wanted is None else set(wanted)
        needed = None if self.gops is None else _needed_gops(self.gops, wanted)
        with _open(self.path) as container:
            stream = _video_stream(container, self.path)
            stream.thread_type = "AUTO"
            decoder = stream.codec_context
            count = 0

            def decode(packet: Any) -> Iterator[tuple[int, Any]]:
                nonlocal count
                try:
                    frames = decoder.decode(packet)
                except av.FFmpegError:
                    return
                for frame in frames:
                    key = count if self.gops is None else frame.pts
                    count += 1
                    if missing is None:
                        yield key, frame
                    elif key in missing and not frame.is_corrupt:
                        missing.remove(key)
                        yield key, frame

            group, decoding = -1, False
            for packet in _packets(container, self.path, stream):
                if packet.is_keyframe or group < 0:
                    group += 1
                    need = needed is None or needed[group]
                    if decoding and not need:
                        yield from decode(None)
                        decoder.flush_buffers()
                    decoding = need
                if decoding:
                    yield from decode(packet)
                if missing is not None and not missing:
                    return
            if decoding:
                yield from decode(None)


def _rate_and_times(
    seconds: Sequence[float], rate: float, last_duration: float
) -> tuple[float, tuple[float, ...] | None]:
    """The header's rate where it places every frame, else the average rate and the times."""
    if len(seconds) == 1:
        return rate or 1.0, None
    seconds = [second - seconds[0] for second in seconds]
    if rate and all(abs(second - i / rate) < 0.5 / rate for i, second in enumerate(seconds)):
        return rate, None
    gap = last_duration or seconds[-1] / (len(seconds) - 1)
    return len(seconds) / (seconds[-1] + gap), tuple(seconds)


def _needed_gops(gops: Sequence[Sequence[int]], wanted: set[int]) -> list[bool]:
    """Which groups of pictures must be decoded: those with a wanted frame, and those that such a group refers to."""
    needed = [any(key in wanted for key in gop) for gop in gops]
    for i in range(1, len(gops)):
        # In an open group, frames shown before the key frame refer to the group before.
        if any(key in wanted and key < gops[i][0] for key in gops[i]):
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


def _video_stream(container: Any, path: str) -> Any:
    for stream in container.streams.video:
        if not stream.disposition & av.stream.Disposition.attached_pic:
            return stream
    kinds = ", ".join(sorted({stream.type for stream in container.streams})) or "nothing"
    raise ValueError(f"{path}: no video stream (the file holds: {kinds}); an audio file, or cut before its index")


def _packets(container: Any, path: str, *streams: Any) -> Iterator[Any]:
    try:
        for packet in container.demux(*streams):
            if packet.size:
                yield packet
    except av.FFmpegError as error:
        raise ValueError(f"{path}: cannot be read to its end: {error}") from error
