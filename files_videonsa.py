"""Video files, read through PyAV: listed first, so that frames can be chosen, then decoded where they are needed.

`FileClip` finds the frames of a file and their times without decoding them; `FileClip.read` returns the chosen frames,
resized. Memory holds resized frames only, however long the video.
"""

import importlib
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from transformers.video_utils import VideoMetadata

try:
    import av
except ImportError:  # text, images and decoded frames work without it; a file then raises in `_open`
    av = None

try:
    from .budget_videonsa import VideoPlan, VideoSource
    from .sources_videonsa import resolve_source
except ImportError:  # `import processing_videonsa` from a checkout, without a package
    if __package__:
        raise
    from budget_videonsa import VideoPlan, VideoSource
    from sources_videonsa import resolve_source

# AVI stores decoding times only: with B-frames the presentation times of its packets are made up.
_FORMATS_WITHOUT_PRESENTATION_TIMES = {"avi"}

Resize = Callable[[torch.Tensor, VideoPlan], torch.Tensor]
"""(T, 3, H, W) frames to the height and width of a plan."""


def read_for_qwen_vl_utils(part: Mapping[str, Any]) -> tuple[torch.Tensor, dict[str, Any], float]:
    """A reader in the form of `qwen_vl_utils.vision_process.VIDEO_READER_BACKENDS`.

    Args:
        part: a video of a message, with qwen-vl-utils' options.
    Returns:
        frames (T, 3, H, W) uint8; metadata; frames per second after sampling.
    """
    # Not an import statement: transformers would demand the package of everyone who loads this file from the Hub.
    vision_process = importlib.import_module("qwen_vl_utils.vision_process")
    source = resolve_source(part["video"], argument="video")
    clip = FileClip(source.readable, False, source.name)
    source = clip.source
    first, last, total = vision_process.calculate_video_frame_range(part, source.num_frames, source.fps)
    count = vision_process.smart_nframes(part, total_frames=total, video_fps=source.fps)
    indices = torch.linspace(first, last, count).round().long().tolist()
    frames = clip.decode(indices, (source.height, source.width), lambda frame: frame)
    metadata = {
        "fps": source.fps,
        "frames_indices": indices,
        "total_num_frames": total,
        "video_backend": "pyav",
    }
    return frames, metadata, count / total * source.fps


class FileClip:
    """A video file, listed and not decoded; see `open_clip`.

    A frame is known by its key: its presentation time where the container has true ones, else its number in decoding
    order. `gops` lists the keys of each group of pictures, in file order, so that `_decode` can skip groups.
    """

    def __init__(self, source: Any, every_frame: bool, name: str | None = None):
        self.file = source if hasattr(source, "read") else os.fspath(source)
        self.path = name or (self.file if isinstance(self.file, str) else "video in memory")
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
        return metadata_of(self.source, plan, backend="pyav")

    def read(self, plan: VideoPlan, resize: Resize) -> torch.Tensor:
        return self.decode(plan.frame_indices, (plan.height, plan.width), lambda frame: resize(frame, plan))

    def decode(
        self, indices: Sequence[int], size: tuple[int, int], resize: Callable[[torch.Tensor], torch.Tensor]
    ) -> torch.Tensor:
        """The frames with these numbers, (T, 3, *size) uint8, of which one at a time is held before `resize`."""
        places: dict[int, list[int]] = {}
        for place, index in enumerate(indices):
            places.setdefault(self.keys[index], []).append(place)
        frames = torch.empty((len(indices), 3, *size), dtype=torch.uint8)
        found = 0
        for key, frame in self._decode(set(places)):
            picture = np.ascontiguousarray(np.rot90(frame.to_ndarray(format="rgb24"), self.quarter_turns))
            frames[places[key]] = resize(torch.from_numpy(picture).permute(2, 0, 1)[None])
            found += len(places[key])
        if found < len(indices):
            raise ValueError(
                f"{self.path}: only {found} of the {len(indices)} frames needed can be decoded; the file is damaged"
            )
        return frames

    def _list_frames(self) -> tuple[float, tuple[float, ...] | None]:
        """Fill `keys`, `gops` and `size`; returns the frame rate and, if it varies, the time of every frame."""
        times: list[int | None] = []
        gops: list[list[int | None]] = []
        end_of_video = end_of_file = last_duration = 0.0
        cut_packet = joined_late = False
        with _open(self.file, self.path) as container:
            stream = _video_stream(container, self.path)
            for packet in _packets(container, self.path):
                if packet.pts is not None and packet.time_base:
                    end_of_file = max(end_of_file, float((packet.pts + (packet.duration or 0)) * packet.time_base))
                if packet.stream.index != stream.index:
                    continue
                if packet.pts is not None:
                    end_of_video = max(end_of_video, float((packet.pts + (packet.duration or 0)) * packet.time_base))
                cut_packet = packet.is_corrupt
                joined_late |= not gops and not packet.is_keyframe
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
        key, frame = next(self._decode(None), (None, None))
        if joined_late and frame is not None:
            # A recording that begins inside a group of pictures: what comes before the first key frame is no loss.
            self.keys = [later for later in self.keys if later >= key]
        if frame is None or key != self.keys[0]:
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
        """(key, frame) of the wanted frames; of all if `wanted` is None.

        Groups of pictures without a wanted frame are read and not decoded. Frames that cannot be decoded are left
        out; the caller counts.
        """
        missing = None if wanted is None else set(wanted)
        needed = None if self.gops is None or wanted is None else _needed_gops(self.gops, wanted)
        with _open(self.file, self.path) as container:
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


def metadata_of(source: VideoSource, plan: VideoPlan, backend: str | None) -> VideoMetadata:
    """transformers' metadata of the planned frames of a source."""
    return VideoMetadata(
        total_num_frames=source.num_frames,
        fps=source.fps,
        width=source.width,
        height=source.height,
        duration=source.num_frames / source.fps,
        video_backend=backend,
        frames_indices=list(plan.frame_indices),
    )


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


def _open(file: Any, path: str):
    """An opened container, for `with`."""
    if av is None:
        raise ImportError("reading video files needs PyAV: pip install av")
    in_memory = not isinstance(file, str)
    if in_memory:
        file.seek(0)
    elif not os.path.exists(file):
        raise ValueError(f"{path}: there is no such video file")
    elif not os.path.isfile(file) or os.path.getsize(file) == 0:
        raise ValueError(f"{path}: not a video file, or an empty one")
    try:
        # A playlist must not make the reader open anything else than files, and from memory, nothing.
        whitelist = "none" if in_memory else "file"
        return av.open(file if in_memory else f"file:{file}", container_options={"protocol_whitelist": whitelist})
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
