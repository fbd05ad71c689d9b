"""Video files, read through PyAV: listed first, so that frames can be chosen, then decoded where they are needed.

`FileClip` lists the packets of a file (`listing_videonsa.py`) and looks at one frame; `FileClip.read` returns the
chosen frames, resized. Memory holds resized frames only, however long the video.

**Speed.** Groups of pictures without a wanted frame are not decoded, nor is what follows the last wanted frame of a
group; of H.264, pictures that no other refers to are decoded only if they are wanted. Whatever this leaves in doubt (a
frame that does not come, an error, a group that does not begin with a key frame) is decoded again, without short cuts.

**Damage.** A group of pictures is damaged from the packet on in which the container or the decoder finds an error, up
to its end. What is shown then is the last frame before the damage, with a warning that names the seconds. A video of
which more than a tenth of the wanted frames (and more than one) is damaged raises a ValueError. Overwritten bytes that
still are a valid stream are invisible to this: video codecs carry no checksums. So are packets that the container
leaves out without a word (Matroska does); the plan notes the hole in the times.
"""

import bisect
import importlib
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from transformers.utils import logging
from transformers.video_utils import VideoMetadata

try:
    from .budget_videonsa import VideoPlan, VideoSource
    from .listing_videonsa import VideoFile, av
    from .rgb_videonsa import RgbConverter, shown_size
    from .sources_videonsa import resolve_source
except ImportError:  # `import processing_videonsa` from a checkout, without a package
    if __package__:
        raise
    from budget_videonsa import VideoPlan, VideoSource
    from listing_videonsa import VideoFile, av
    from rgb_videonsa import RgbConverter, shown_size
    from sources_videonsa import resolve_source

logger = logging.get_logger(__name__)

MAX_DAMAGED_SHARE = 0.1
"""Of the wanted frames; see the top of this file."""

_WAITING_BYTES = 16 << 20
_MAX_THREADS = 32  # libavcodec takes 16 at most by itself

# Codecs whose decoders are seeked by every player: they may use a thread for each frame, and be drained and reused.
# Elsewhere, libavcodec can crash on it (Theora does).
_WELL_TRODDEN = {"h264", "hevc", "vp8", "vp9", "av1", "mpeg1video", "mpeg2video", "mpeg4"}

Resize = Callable[[torch.Tensor, VideoPlan], torch.Tensor]
"""(T, 3, H, W) frames to the height and width of a plan."""


class FileClip:
    """A video file, listed and not decoded; see `frames_videonsa.open_clip`.

    Args:
        source: path, or a seekable binary file.
        every_frame: no frame may be left out.
        name: of the file in messages; a path by default.
    Raises:
        ValueError: there is no video to read, or the file is cut short.
    """

    def __init__(self, source: Any, every_frame: bool, name: str | None = None):
        self.file = VideoFile(source, name)
        self.name = self.file.name
        self.listing = self.file.list()
        if self.listing.needs_decoding:
            self.listing.order_by([number for number, frame in self._decoded() if frame is not None])
        first = next((frame for _, frame in self._decoded(careful=True) if frame is not None), None)
        if first is None:
            raise ValueError(f"{self.name}: no frame can be decoded; damaged, or its codec is not supported")
        self.listing.start_at(first.pts)
        if first.format.has_palette:
            # A palette is stored once, when it changes: no later frame can be decoded by itself.
            self.listing.starts = [0]
        fps, timestamps, notes = self.listing.timing()
        height, width = shown_size(first, self.file.pixel_aspect)
        self.source = VideoSource(
            num_frames=len(self.listing.numbers),
            fps=fps,
            height=height,
            width=width,
            timestamps=timestamps,
            presampled=every_frame,
            may_drop_frames=not every_frame,
            name=self.name,
            notes=notes,
        )

    def metadata(self, plan: VideoPlan) -> VideoMetadata:
        return metadata_of(self.source, plan, backend="pyav")

    def read(self, plan: VideoPlan, resize: Resize) -> torch.Tensor:
        """The planned frames, (T, 3, plan.height, plan.width) uint8.

        Raises:
            ValueError: too much of them is damaged.
        """

        return self._read(plan.frame_indices, (plan.height, plan.width), None, lambda frames: resize(frames, plan))

    def stream(self, plan, resize, batch):
        yield from self.read(plan, resize).split(batch)

    def read_unresized(self, indices: Sequence[int]) -> torch.Tensor:
        """The frames with these numbers in the size in which the first is shown, (T, 3, H, W) uint8."""
        size = self.source.height, self.source.width
        return self._read(indices, size, size, lambda frames: frames)

    def _read(
        self,
        indices: Sequence[int],
        size: tuple[int, int],
        converted_size: tuple[int, int] | None,
        resize: Callable[[torch.Tensor], torch.Tensor],
    ) -> torch.Tensor:
        """Frames of a size, made from frames of `converted_size`, None for the size as stored, by `resize`."""
        frames = torch.empty((len(indices), 3, *size), dtype=torch.uint8)
        convert = RgbConverter(self.name)
        places: dict[int, list[int]] = {}
        for place, index in enumerate(indices):
            places.setdefault(self.listing.numbers[index], []).append(place)
        # Several at a time, and copied by numpy: waking torch's threads for a frame costs more than resizing it.
        waiting: list[tuple[list[int], np.ndarray]] = []

        def finish() -> None:
            if waiting:
                pictures = np.stack([picture for _, picture in waiting])
                resized = resize(torch.from_numpy(pictures).permute(0, 3, 1, 2)).numpy()
                for (slots, _), picture in zip(waiting, resized, strict=True):
                    frames.numpy()[slots] = picture
                waiting.clear()

        def take(number: int, frame: Any) -> None:
            picture = convert(frame, converted_size)
            if waiting and waiting[0][1].shape != picture.shape:
                finish()
            waiting.append((places[number], picture))
            if len(waiting) * picture.size >= _WAITING_BYTES:
                finish()

        reading = self._decode_wanted(set(places), take)
        finish()
        lost = places.keys() - reading.good
        if not lost:
            return frames
        self._check_damage(reading, places, len(indices))
        # What was on the screen when each got lost: the frame before it, or at the beginning the first that is good.
        position = self.listing.position
        shown = sorted(position[number] for number in reading.good | reading.spare)
        held: dict[int, list[int]] = {}
        for number in lost:
            before = max(bisect.bisect_left(shown, position[number]) - 1, 0)
            held.setdefault(self.listing.numbers[shown[before]], []).extend(places.pop(number))
        for number in held.keys() & reading.good:
            frames[held[number]] = frames[places[number][0]].clone()
        places = {number: held[number] for number in held.keys() - reading.good}
        missing = places.keys() - self._decode_wanted(places.keys(), take).good if places else ()
        finish()
        if missing:
            raise ValueError(f"{self.name}: does not read twice alike; is it being written?")
        return frames

    def _check_damage(self, reading: "_Reading", places: Mapping[int, Sequence[int]], total: int) -> None:
        """Warn of damage to wanted frames.

        Raises:
            ValueError: there is too much of it.
        """
        count = sum(len(places[number]) for number in reading.damaged)
        if not count and reading.good:
            return  # packets that have no picture of their own: the one before stays on the screen
        spans: list[list[float]] = []
        previous_is_damaged = False
        for number in sorted(places, key=self.listing.position.__getitem__):
            second = self.source.second(self.listing.position[number])
            if is_damaged := number in reading.damaged:
                spans = [*spans[:-1], [spans[-1][0], second]] if previous_is_damaged else [*spans, [second, second]]
            previous_is_damaged = is_damaged
        where = ", ".join(f"{first:.2f} to {last:.2f} s" for first, last in spans)
        text = f"{self.name}: damaged at {where}: {count} of the {total} frames needed cannot be decoded"
        if not reading.good or count > max(1, math.ceil(total * MAX_DAMAGED_SHARE)):
            raise ValueError(text)
        logger.warning(f"{text}; the last good frame before is shown there")

    def _decode_wanted(self, wanted: Set[int], take: Callable[[int, Any], None]) -> "_Reading":
        """Decode the wanted frames and hand each to `take(number, frame)`; the last call for a number counts."""
        try:
            return self._decode_quickly(wanted, take)
        except _NoKeyFrameError:
            return self._decode_carefully(wanted, take, from_the_beginning=True)

    def _decode_quickly(self, wanted: Set[int], take: Callable[[int, Any], None]) -> "_Reading":
        suspects, seen = set(), set()
        for number, frame in self._decoded(self._shortest_runs(wanted), wanted):
            if frame is None or frame.is_corrupt:
                # Where threads decode ahead, an error comes late by as many packets.
                earliest = max(number - _MAX_THREADS, 0) if frame is None else number
                suspects.update(range(self.listing.group_of(earliest), self.listing.group_of(number) + 1))
            elif number in wanted:
                take(number, frame)
                seen.add(number)
        suspects.update(self.listing.group_of(number) for number in (wanted - seen) | self.listing.corrupt)
        doubtful = {n for n in wanted if self._depends_on(n) & suspects}
        if not doubtful:
            return _Reading(good=seen)
        careful = self._decode_carefully(doubtful, take)
        if doubtful - careful.good - careful.damaged:
            # Missed without an error: the marked key frame may need what comes before it.
            careful = self._decode_carefully(doubtful, take, from_the_beginning=True)
        return replace(careful, good=careful.good | (seen - doubtful))

    def _decode_carefully(
        self, wanted: Set[int], take: Callable[[int, Any], None], from_the_beginning: bool = False
    ) -> "_Reading":
        """As `_decode_wanted`, one frame at a time, without short cuts, and with an eye on errors."""
        listing = self.listing
        groups = {group for number in wanted for group in self._depends_on(number)}
        groups |= {max(group - 1, 0) for group in groups}
        if from_the_beginning:
            groups = set(range(max(groups) + 1))
        marks, seen = set(), set()
        for number, frame in self._decoded(_merged(listing.group(group) for group in sorted(groups)), careful=True):
            if frame is None or frame.is_corrupt:
                marks.add(number)
            else:
                seen.add(number)
            if frame is not None and number in wanted:
                take(number, frame)
        # A transport stream also marks what comes right before a joint of two recordings, of which nothing is missing.
        starts = set(listing.starts) | {len(listing.pts)}
        at_joints = {number for number in seen if not starts.isdisjoint((number + 1, number + 2))}
        marks |= {number for number in listing.corrupt - at_joints if listing.group_of(number) in groups}
        # Damage goes on to the end of its group, and to frames of the next that are shown before its key frame.
        first_mark: dict[int, int] = {}
        for number in sorted(marks, reverse=True):
            first_mark[listing.group_of(number)] = number

        def is_damaged(number: int) -> bool:
            if self.file.intra_only:
                return number in marks
            group = listing.group_of(number)
            before = group - 1 in first_mark and listing.is_leading(number)
            return before or number >= first_mark.get(group, number + 1)

        damaged = {number for number in wanted if is_damaged(number)}
        clean = {number for number in seen & listing.position.keys() if not is_damaged(number)}
        return _Reading(good=clean & wanted, spare=clean - wanted, damaged=damaged)

    def _depends_on(self, number: int) -> set[int]:
        """The groups of pictures that must be decoded for a frame."""
        group = self.listing.group_of(number)
        return {group, group - 1} if group and self.listing.is_leading(number) else {group}

    def _shortest_runs(self, wanted: Set[int]) -> list[tuple[int, int]]:
        """(first, last) packets to decode: each group with a wanted frame up to the last wanted one."""
        last: dict[int, int] = {}
        for number in wanted:
            own = self.listing.group_of(number)
            last[own] = max(last.get(own, -1), number)
            for group in self._depends_on(number) - {own}:
                last[group] = self.listing.group(group)[1]
        return _merged((self.listing.group(group)[0], last[group]) for group in sorted(last))

    def _decoded(
        self,
        runs: Iterable[tuple[int, int]] | None = None,
        wanted: Set[int] | None = None,
        careful: bool = False,
    ) -> Iterator[tuple[int, Any]]:
        """(number, frame) of every frame that comes out of the decoder; (number, None) where it fails.

        Args:
            runs: (first, last) packets to decode, each run from the beginning of a group; everything if None.
            wanted: other frames may be left out.
            careful: one frame at a time, so that an error belongs to the packet it comes at.
        """
        runs = iter([(0, len(self.listing.pts) - 1)] if runs is None else runs)
        first, last = next(runs)
        with self.file.open() as (container, stream):
            decoder, codec = self.file.decoder(stream)
            may_flush = codec in _WELL_TRODDEN
            decoder.thread_type = "AUTO" if may_flush and not careful else "SLICE"
            may_skip = wanted is not None and codec == "h264"

            def decode(packet: Any, number: int) -> Iterator[tuple[int, Any]]:
                try:
                    frames = decoder.decode(packet)
                except av.FFmpegError:
                    yield number, None
                    return
                for frame in frames:
                    if frame.pts is None:
                        continue  # hidden in its packet
                    if frame.pts == first > 0 and not (frame.key_frame or self.file.intra_only):
                        raise _NoKeyFrameError
                    yield frame.pts, frame

            for number, packet in enumerate(self.file.packets(container, stream)):
                if number < first:
                    continue
                packet.pts = packet.dts = number
                if may_skip:
                    decoder.skip_frame = "DEFAULT" if number in wanted else "NONREF"
                yield from decode(packet, number)
                if number == last:
                    following = next(runs, None)
                    if following is None:
                        break
                    if may_flush:
                        yield from decode(None, number)
                        decoder.flush_buffers()
                    first, last = following
            yield from decode(None, last)


class _NoKeyFrameError(Exception):
    """A group of pictures does not begin with the key frame that the container promises."""


@dataclass(frozen=True)
class _Reading:
    """Numbers of frames: wanted ones that are good, other good ones, wanted ones that are damaged."""

    good: set[int] = field(default_factory=set)
    spare: set[int] = field(default_factory=set)
    damaged: set[int] = field(default_factory=set)


def _merged(runs: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
    """Ascending (first, last) runs, those that follow each other without a gap as one."""
    merged: list[tuple[int, int]] = []
    for first, last in runs:
        if merged and merged[-1][1] == first - 1:
            merged[-1] = merged[-1][0], last
        else:
            merged.append((first, last))
    return merged


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


def read_for_qwen_vl_utils(part: Mapping[str, Any]) -> tuple[torch.Tensor, dict[str, Any], float]:
    """A reader in the form of `qwen_vl_utils.vision_process.VIDEO_READER_BACKENDS`.

    Args:
        part: a video of a message, with qwen-vl-utils' options.
    Returns:
        frames (T, 3, H, W) uint8; metadata; frames per second after sampling.
    """
    # Not an import statement: transformers' scan of remote code would demand the package of everyone.
    vision_process = importlib.import_module("qwen_vl_utils.vision_process")
    given = resolve_source(part["video"], argument="video")
    clip = FileClip(given.readable, False, given.name)
    source = clip.source
    first, last, total = vision_process.calculate_video_frame_range(part, source.num_frames, source.fps)
    count = vision_process.smart_nframes(part, total_frames=total, video_fps=source.fps)
    indices = torch.linspace(first, last, count).round().long().tolist()
    frames = clip.read_unresized(source.frames_at([index / source.fps for index in indices]))
    metadata = {
        "fps": source.fps,
        "frames_indices": indices,
        "total_num_frames": total,
        "video_backend": "pyav",
    }
    return frames, metadata, count / total * source.fps
