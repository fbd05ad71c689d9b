"""What a video file holds, without decoding it: which packets, in which groups of pictures, shown when.

A frame is known by its number, that of its packet in the file. The number travels through the decoder in place of the
packet's time, so that a frame tells which packet it came from in every container, whatever the times in it are worth.
"""

import bisect
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from fractions import Fraction
from itertools import pairwise
from threading import Lock
from typing import Any

import numpy as np

try:
    import av
except ImportError:  # text, images and decoded frames work without it; a file then raises in `VideoFile`
    av = None

ASSUMED_RATE = 25.0
"""Frames per second where neither the container nor the codec tells times or a rate, as players assume."""

CHANGED = "the file changed while it was read; is it being written?"

# Flags of AVInputFormat: the demuxer makes times up; times may jump.
_NO_TIMESTAMPS, _MAY_JUMP = 0x0080, 0x0200
# Seconds between packets that are a jump of the clock, as in ffmpeg (`-dts_delta_threshold`, `-dts_error_threshold`).
_JUMP_BACK, _JUMP_AHEAD, _JUMP_ANYWHERE = 0.1, 10.0, 30 * 3600.0


@dataclass
class Listing:
    """The packets of a video stream, by number, and its frames in the order in which they are shown.

    Args:
        pts, dts: times of every packet in units of `time_base` seconds; None where there is none.
        starts: numbers of the packets that begin a group of pictures; the first is 0.
        shown: whether a packet's frame is shown; an edit list can hide it.
        corrupt: numbers of the packets that the container knows to be damaged.
        begins_with_key: whether the first packet is a key frame.
        time_base: seconds.
        duration: of the last packet that has one, seconds; 0 if none has.
        rate: frames per second by the header, 0 if it does not tell.
        has_times: False where the times are made up by the demuxer.
        has_presentation_times: False where the container stores decoding times only.
        may_jump: the clock of this container may start anew.
        reorders: the codec can show frames in another order than that of the file.
    """

    pts: list[int | None] = field(default_factory=list)
    dts: list[int | None] = field(default_factory=list)
    starts: list[int] = field(default_factory=list)
    shown: list[bool] = field(default_factory=list)
    corrupt: set[int] = field(default_factory=set)
    begins_with_key: bool = True
    time_base: float = 1.0
    duration: float = 0.0
    rate: float = 0.0
    has_times: bool = True
    has_presentation_times: bool = True
    may_jump: bool = False
    reorders: bool = True

    numbers: list[int] = field(default_factory=list, init=False)
    """Frames in the order in which they are shown."""
    position: dict[int, int] = field(default_factory=dict, init=False)
    """Of each frame in `numbers`."""
    _seconds: list[float] | None = field(default=None, init=False)
    _rank: dict[int, float] = field(default_factory=dict, init=False)  # of every packet, to compare when it is shown
    _notes: list[str] = field(default_factory=list, init=False)

    def __post_init__(self):
        frames = [number for number, shown in enumerate(self.shown) if shown]
        self.needs_decoding = False
        if self.has_times and self.has_presentation_times and None not in self.pts:
            clock = self._clock(self.pts)
            self._rank = dict(enumerate(clock))
            frames.sort(key=lambda number: (clock[number], number))
            self._set_order(frames, [clock[number] for number in frames])
        elif self.reorders:
            self.needs_decoding = True  # see `order_by`
        else:
            times = self.dts if None not in self.dts else self.pts
            self._set_order(frames, self._known_times(frames, times))

    def order_by(self, displayed: Sequence[int]) -> None:
        """Take the order of the frames from a decoder, where the container does not tell it."""
        times: list[int | None] = self.pts
        stored = self.dts if None not in self.dts else self.pts
        if not self.has_presentation_times and None not in stored:
            # Frames are shown at the times at which they are stored, in another order.
            times = [None] * len(stored)
            for number, time in zip(displayed, sorted(stored[number] for number in displayed), strict=True):
                times[number] = time
        self._set_order(displayed, self._known_times(displayed, times))

    def _known_times(self, frames: Sequence[int], times: Sequence[int | None]) -> list[float] | None:
        """Seconds of frames in the order shown, those between interpolated; None if they are worth nothing."""
        if not self.has_times:
            return None
        clock = self._clock(times)
        known = [place for place, number in enumerate(frames) if times[number] is not None]
        seconds = [clock[frames[place]] for place in known]
        if len(known) < 2 or any(later <= earlier for earlier, later in pairwise(seconds)):
            return None
        places, step = np.arange(len(frames)), (seconds[-1] - seconds[0]) / (known[-1] - known[0])
        outside = np.minimum(places - known[0], 0) + np.maximum(places - known[-1], 0)
        return (np.interp(places, known, seconds) + step * outside).tolist()

    def _set_order(self, frames: Sequence[int], seconds: list[float] | None) -> None:
        self.numbers, self._seconds = list(frames), seconds
        self.position = {number: place for place, number in enumerate(self.numbers)}
        self._rank = self._rank or dict(self.position)

    def _clock(self, times: Sequence[int | None]) -> list[float]:
        """Seconds of every packet, 0 where unknown, without the jumps of a clock that starts anew."""
        seconds, shift, last, step = [], 0.0, None, self.duration
        for time, stored in zip(times, self.dts, strict=True):
            now = stored if stored is not None else time
            if now is not None:
                now *= self.time_base
                ahead = 0.0 if last is None else now - last
                jumps = self.may_jump and not -_JUMP_BACK <= ahead <= _JUMP_AHEAD
                if jumps or abs(ahead) > _JUMP_ANYWHERE:
                    shift -= ahead - step
                    note = "its clock jumps, and is taken to go on where it was"
                    self._notes += [note] if note not in self._notes else []
                else:
                    step = ahead or step
                last = now
            seconds.append(0.0 if time is None else time * self.time_base + shift)
        return seconds

    def start_at(self, first: int) -> None:
        """Leave out what a player cannot show either: frames before the first that can be decoded at all.

        Args:
            first: the first frame that comes out of the decoder.
        """
        # Where the file begins with a key frame that is damaged, that damage is no reason to begin later.
        anchor = 0 if self.begins_with_key and 0 in self.position else first
        start = self.position.get(anchor, 0)
        self._set_order(self.numbers[start:], None if self._seconds is None else self._seconds[start:])

    def group_of(self, number: int) -> int:
        """The group of pictures of a packet."""
        return bisect.bisect_right(self.starts, number) - 1

    def group(self, index: int) -> tuple[int, int]:
        """Numbers of the first and the last packet of a group."""
        return self.starts[index], (self.starts[index + 1] if index + 1 < len(self.starts) else len(self.pts)) - 1

    def depends_on(self, number: int) -> set[int]:
        """The groups of pictures that must be decoded for a frame."""
        group = self.group_of(number)
        return {group, group - 1} if group and self.is_leading(number) else {group}

    def is_leading(self, number: int) -> bool:
        """Whether a frame is shown before the key frame of its group: it may refer to the group before."""
        start = self.starts[self.group_of(number)]
        return self._rank.get(number, 0.0) < self._rank.get(start, -1.0)

    def timing(self) -> tuple[float, tuple[float, ...] | None, tuple[str, ...]]:
        """Frames per second; if it varies, seconds of every frame from the first; what a user should know of it."""
        notes = list(self._notes)
        if self._seconds is None:
            if not self.rate:
                notes.append(f"the file tells no times and no frame rate; {ASSUMED_RATE:.0f} a second are assumed")
            return self.rate or ASSUMED_RATE, None, tuple(notes)
        seconds = [second - self._seconds[0] for second in self._seconds]
        if len(seconds) == 1:
            return self.rate or 1.0, None, tuple(notes)
        measured = round((len(seconds) - 1) / seconds[-1], 6) if seconds[-1] > 0 else 0.0
        for rate in (self.rate, measured):
            if rate and all(abs(second - i / rate) < 0.5 / rate for i, second in enumerate(seconds)):
                return rate, None, tuple(notes)
        gaps = np.diff(seconds)
        self._note_holes(gaps, seconds, notes)
        # How long the last frame is held is a guess of most containers; it is no flash.
        last = self.duration if self.duration >= gaps.min() else float(np.median(gaps))
        return len(seconds) / (seconds[-1] + last), tuple(seconds), tuple(notes)

    def _note_holes(self, gaps: np.ndarray, seconds: Sequence[float], notes: list[str]) -> None:
        """Say where frames seem to be lost: some containers leave out what they cannot read without an error."""
        usual = float(np.median(gaps))
        holes = np.flatnonzero(gaps > 2.5 * usual)
        if len(holes) and np.mean(np.abs(gaps - usual) < 0.2 * usual) > 0.9:
            spans = ", ".join(f"{seconds[i]:.2f} to {seconds[i + 1]:.2f} s" for i in holes[:3])
            more = f" and {len(holes) - 3} times more" if len(holes) > 3 else ""
            notes.append(f"no frames from {spans}{more}, where the one before is held; damaged, or a pause")


class DamagedVideoError(ValueError):
    """The rest of a video cannot be read: too much of it is damaged, or the file vanished or changed meanwhile.

    Attributes:
        second: of the video; everything that is shown before it was delivered, and stays good.
    """

    second = 0.0


class VideoFile:
    """A video file that can be opened as often as needed.

    Args:
        source: path, or a seekable binary file.
        name: for messages; the path by default.
    Attributes:
        pixel_aspect: width of a stored pixel over its height, None if unknown; after `list`.
        intra_only: whether no frame of the codec refers to another; after `list`.
    Raises:
        ValueError: there is no such file, or it is empty.
    """

    def __init__(self, source: Any, name: str | None = None):
        if av is None:
            raise ImportError("reading video files needs PyAV: pip install av")
        self.source = source
        self.pixel_aspect: Fraction | None = None
        self.intra_only = False
        self._state: tuple[int, int] | None = None
        if isinstance(source, (str, os.PathLike)):
            self.source = os.fspath(source)
            self.name = name or self.source
            if not os.path.exists(self.source):
                raise ValueError(f"{self.name}: there is no such video file")
            if not os.path.isfile(self.source) or os.path.getsize(self.source) == 0:
                raise ValueError(f"{self.name}: not a video file, or an empty one")
            self._state = self._stat()
        else:
            self.name = name or "video in memory"
            self._lock = Lock()

    def _stat(self) -> tuple[int, int]:
        stat = os.stat(self.source)
        return stat.st_size, stat.st_mtime_ns

    def check_unchanged(self) -> None:
        """Look whether a path still holds the file that it held when this object was made.

        Raises:
            DamagedVideoError: it does not.
        """
        if self._state is None:
            return
        try:
            is_unchanged = self._stat() == self._state
        except OSError as error:
            raise DamagedVideoError(f"{self.name}: the file vanished while it was read: {error.strerror}") from error
        if not is_unchanged:
            raise DamagedVideoError(f"{self.name}: {CHANGED}")

    @contextmanager
    def open(self) -> Iterator[tuple[Any, Any]]:
        """The container and its video stream.

        Raises:
            ValueError: this is no video file, or it has no video.
            DamagedVideoError: it is not the file any more that it was.
        """
        self.check_unchanged()
        in_memory = not isinstance(self.source, str)
        try:
            # A playlist must not make the reader open anything else than files, and from memory, nothing.
            container = av.open(
                _OwnPlace(self.source, self._lock) if in_memory else f"file:{self.source}",
                container_options={"protocol_whitelist": "none" if in_memory else "file"},
                metadata_errors="replace",
            )
        except (av.FFmpegError, OSError, ValueError) as error:
            raise ValueError(f"{self.name}: cannot be opened as a video: {error}") from error
        with container:
            yield container, self._choose_stream(container)

    def _choose_stream(self, container: Any) -> Any:
        """The default track, among several the largest picture; never a cover or thumbnails."""
        flags = av.stream.Disposition
        still = flags.attached_pic | flags.timed_thumbnails | flags.still_image
        films = [
            stream for stream in container.streams.video if stream.codec_context and not stream.disposition & still
        ]
        if not films:
            kinds = ", ".join(sorted({stream.type for stream in container.streams})) or "nothing"
            raise ValueError(
                f"{self.name}: no video stream (the file holds: {kinds}); an audio file, or cut before its index"
            )
        return max(
            films,
            key=lambda stream: (bool(stream.disposition & flags.default), stream.width * stream.height, -stream.index),
        )

    def decoder(self, stream: Any) -> tuple[Any, str]:
        """A decoder of the stream's packets, and the name of the codec."""
        context, codec = stream.codec_context, stream.codec_context.codec.canonical_name
        library = {"vp8": "libvpx", "vp9": "libvpx-vp9"}.get(codec)
        if library in av.codecs_available and stream.metadata.get("alpha_mode") == "1":
            # libavcodec's own decoders leave the transparency of WebM out.
            alone = av.CodecContext.create(library, "r")
            alone.extradata = context.extradata
            return alone, library
        return context, codec

    def packets(self, container: Any, *streams: Any) -> Iterator[Any]:
        """Packets with content, of all streams if none is named.

        Raises:
            DamagedVideoError: the file ends in an error.
        """
        demuxed = container.demux(*streams)
        while True:
            try:
                packet = next(demuxed, None)
            except (av.FFmpegError, OSError, ValueError, IndexError) as error:
                # Python's own errors come from files in memory, and of streams that begin late.
                raise DamagedVideoError(f"{self.name}: cannot be read to its end: {error}") from error
            if packet is None:
                return
            if packet.size:
                yield packet

    def list(self) -> Listing:
        """Read the whole file once.

        Raises:
            ValueError: the video has no frames, or the file is cut short.
        """
        pts, dts, starts, shown, corrupt = [], [], [], [], set()
        begins_with_key, end_of_video, end_of_file, duration = True, 0.0, 0.0, 0.0
        cut_packet = False
        with self.open() as (container, stream):
            for packet in self.packets(container):
                end = 0.0
                if packet.pts is not None and packet.time_base:
                    end = float((packet.pts + (packet.duration or 0)) * packet.time_base)
                    end_of_file = max(end_of_file, end)
                if packet.stream_index != stream.index:
                    continue
                end_of_video = max(end_of_video, end)
                number = len(pts)
                if packet.is_keyframe or not number:
                    starts.append(number)
                    begins_with_key &= bool(number) or packet.is_keyframe
                cut_packet = packet.is_corrupt
                if packet.is_corrupt:
                    corrupt.add(number)
                pts.append(packet.pts)
                dts.append(packet.dts)
                shown.append(not packet.is_discard)
                duration = float((packet.duration or 0) * (packet.time_base or 0)) or duration
            formats, flags = set(container.format.name.split(",")), container.format.flags
            # Of raw streams, the demuxer makes the times up, and says so in flags or by the kind of its name.
            has_times = not flags & _NO_TIMESTAMPS and not container.format.name.endswith("_pipe")
            coded_rate = stream.codec_context.framerate
            rate = (stream.average_rate or stream.guessed_rate) if has_times else coded_rate
            self.pixel_aspect, self.intra_only = stream.sample_aspect_ratio, stream.codec_context.codec.intra_only
            # AVI stores decoding times only, other containers do for some codecs: the presentation times of their
            # packets are made up. B-frames, and packets that are shown one after the other, contradict each other.
            in_order = None not in pts and all(one <= later for one, later in pairwise(pts))
            is_made_up = "avi" in formats or (in_order and stream.codec_context.has_b_frames)
            promised, read = 0.0, end_of_file
            if "mp4" in formats and stream.duration is not None:
                promised = float(stream.duration * stream.time_base)
                read = end_of_video - float((stream.start_time or 0) * stream.time_base)
            elif "matroska" in formats and container.duration is not None:
                promised = container.duration / 1e6
            listing = Listing(
                pts=pts,
                dts=dts,
                starts=starts,
                shown=shown,
                corrupt=corrupt,
                begins_with_key=begins_with_key,
                time_base=float(stream.time_base or 0),
                duration=duration,
                rate=float(rate or 0),
                has_times=has_times,
                has_presentation_times=not is_made_up,
                may_jump=bool(flags & _MAY_JUMP),
                reorders=stream.codec_context.codec.reorder,
            )
        if not any(shown):
            raise ValueError(f"{self.name}: the video has no frames")
        # The transport stream of a broadcast has damaged packets of its own; elsewhere the last one tells of a cut.
        cut_packet = cut_packet and "mpegts" not in formats
        if cut_packet or promised - read > max(0.5, 3 / listing.rate if listing.rate else 0):
            raise ValueError(
                f"{self.name}: the file is cut short: only {sum(shown) - cut_packet} frames, {read:.2f} s, can be read"
                + (f" of the {promised:.2f} s that its header promises" if promised else "")
            )
        return listing


class _OwnPlace:
    """A binary file that several readers share, each at a place of its own."""

    def __init__(self, file: Any, lock: Any):
        self._file, self._lock, self._place = file, lock, 0
        if isinstance(name := getattr(file, "name", None), str):
            self.name = name  # a hint to the container's format

    def read(self, size: int = -1) -> bytes:
        with self._lock:
            self._file.seek(self._place)
            content = self._file.read(size)
        self._place += len(content)
        return content

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        if whence == os.SEEK_END:
            with self._lock:
                self._file.seek(offset, whence)
                self._place = self._file.tell()
        else:
            self._place = offset + (self._place if whence == os.SEEK_CUR else 0)
        return self._place

    def tell(self) -> int:
        return self._place
