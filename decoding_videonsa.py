"""The wanted frames of a video file, decoded in the order in which they are shown, in memory that does not grow.

`read_in_order` gives them out while it decodes. A frame is settled when so much has come out of the decoder behind it
that no error can concern it any more; until then it is held back. Memory holds this look-ahead, however long the video
and its groups of pictures are.

**Speed.** Groups of pictures without a wanted frame are not decoded, nor is what follows the last wanted frame of a
group; of H.264, pictures that no other refers to are decoded only if they are wanted (`_Quick`). Whatever this leaves
in doubt (a frame that does not come, an error, a group that does not begin with a key frame) is decoded again, without
short cuts, in a second pass that follows the first (`_Careful`); what that does not find either, in a third, from the
beginning of the file on. So a file is gone through three times at most, unless its times lead back and forth.

**Damage.** A group of pictures is damaged from the packet on in which the container or the decoder finds an error, up
to its end. What is shown then is the last frame before the damage, with a warning that names the seconds. If more than
a tenth of the wanted frames (and more than one) are damaged, that is a `DamagedVideoError`, once all frames before this
damage are given out. Overwritten bytes that still are a valid stream are invisible to this: video codecs carry no
checksums. So are packets that the container leaves out without a word (Matroska does); the plan notes the hole in the
times.
"""

import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Set
from contextlib import ExitStack, closing
from typing import Any

import numpy as np
import torch
from transformers.utils import logging

try:
    from .listing_videonsa import CHANGED, DamagedVideoError, Listing, VideoFile, av
except ImportError:  # `import processing_videonsa` from a checkout, without a package
    if __package__:
        raise
    from listing_videonsa import CHANGED, DamagedVideoError, Listing, VideoFile, av

logger = logging.get_logger(__name__)

MAX_DAMAGED_SHARE = 0.1
"""Of the wanted frames; see the top of this file."""

WAITING_BYTES = 16 << 20
"""Of pictures that wait to be resized together."""

_MAX_THREADS = 32  # libavcodec takes 16 at most by itself
_MAX_REORDERED = 32  # H.264 and HEVC hold back 16 frames, decoders of AV1 8 more

# Codecs whose decoders are seeked by every player: they may use a thread for each frame, and be drained and reused.
# Elsewhere, libavcodec can crash on it (Theora does).
_WELL_TRODDEN = {"h264", "hevc", "vp8", "vp9", "av1", "mpeg1video", "mpeg2video", "mpeg4"}

Outcomes = list[tuple[int, Any]]
"""What comes out of a decoder: (number, frame), or (number of the packet decoded last, None) for an error."""


class Picture:
    """A converted frame, which waits to be resized together with others until one of them is asked for."""

    def __init__(self, pictures: "Pictures", rgb: np.ndarray):
        self._pictures = pictures
        self.rgb: np.ndarray | None = rgb
        self.resized: np.ndarray | None = None

    def array(self) -> np.ndarray:
        """(3, height, width) uint8."""
        if self.resized is None:
            self._pictures.finish()
        return self.resized


class Pictures:
    """Makes pictures of frames, several at a time and in numpy: waking torch's threads costs more than resizing one.

    Args:
        to_rgb: of a frame of PyAV, (H, W, 3) uint8.
        resize: (T, 3, H, W) uint8 to the size wanted.
    """

    def __init__(self, to_rgb: Callable[[Any], np.ndarray], resize: Callable[[torch.Tensor], torch.Tensor]):
        self._to_rgb, self._resize = to_rgb, resize
        self._waiting: list[Picture] = []

    def take(self, frame: Any) -> Picture:
        """A picture of a frame, which is not kept: decoders fill what is lost with what is in the memory they reuse."""
        picture = Picture(self, self._to_rgb(frame))
        if self._waiting and self._waiting[0].rgb.shape != picture.rgb.shape:
            self.finish()
        self._waiting.append(picture)
        if len(self._waiting) * picture.rgb.size >= WAITING_BYTES:
            self.finish()
        return picture

    def finish(self) -> None:
        """Resize what waits."""
        if self._waiting:
            stacked = torch.from_numpy(np.stack([picture.rgb for picture in self._waiting]))
            resized = self._resize(stacked.permute(0, 3, 1, 2)).numpy()
            for picture, array in zip(self._waiting, resized, strict=True):
                picture.rgb, picture.resized = None, array
            self._waiting = []


class NoKeyFrameError(Exception):
    """A group of pictures does not begin with the key frame that the container promises."""


class Decoder:
    """One way through the packets of a file, forwards, in a container of its own, which `close` closes.

    Args:
        wanted: numbers of frames; others may be left out. None: all are wanted.
        careful: one frame at a time, so that an error belongs to the packet it comes at.
    Attributes:
        first: the packet with which this run through consecutive packets begins.
        fed: the packet that was decoded last, -1 before.
        through: of the packets up to this one, nothing is left in the decoder.
    Raises:
        ValueError: the file cannot be opened.
    """

    def __init__(self, file: VideoFile, listing: Listing, wanted: Set[int] | None = None, careful: bool = False):
        self.first, self.fed, self.through = 0, -1, -1
        self._has_begun = True  # with its first frame, which was looked at
        self._file, self._listing, self._wanted = file, listing, wanted
        with ExitStack() as stack:
            container, stream = stack.enter_context(file.open())
            self._decoder, codec = file.decoder(stream)
            self._packets = enumerate(file.packets(container, stream))
            self.close = stack.pop_all().close
        self._may_flush = codec in _WELL_TRODDEN
        self._may_skip = wanted is not None and codec == "h264"
        has_threads = self._may_flush and not careful
        self._decoder.thread_type = "AUTO" if has_threads else "SLICE"
        # Counted in frames that come out, not in packets: pictures that are left out and errors push nothing out.
        self._delay = _MAX_REORDERED + (_MAX_THREADS if has_threads else 0)
        self._came_out = 0
        self._inside: deque[tuple[int, int]] = deque()  # packets, and what had come out when they went in

    def jump(self, first: int) -> Outcomes:
        """Go on at a packet ahead that begins a group of pictures."""
        outcomes = []
        if self.fed >= 0 and self._may_flush:
            outcomes = self.drain()
            self._decoder.flush_buffers()
        self.first = first
        self._has_begun = first == 0
        return outcomes

    def feed(self) -> Outcomes:
        """Decode the next packet.

        Raises:
            DamagedVideoError: the file is another one than it was when it was listed.
            NoKeyFrameError: this run does not begin with a key frame.
        """
        listing = self._listing
        number = -1
        while number < self.first or number == -1:
            number, packet = next(self._packets, (None, None))
            if packet is None:
                raise DamagedVideoError(f"{self._file.name}: {CHANGED}")
            if number >= len(listing.pts) or (packet.pts, packet.dts) != (listing.pts[number], listing.dts[number]):
                raise DamagedVideoError(f"{self._file.name}: {CHANGED}")
        self.fed = packet.pts = packet.dts = number
        if self._may_skip:
            self._decoder.skip_frame = "DEFAULT" if number in self._wanted else "NONREF"
        self._inside.append((number, self._came_out))
        return self._decode(packet)

    def _check_beginning(self, number: int, frame: Any) -> None:
        """Whether this run begins with a key frame; what was to be the first may also be left out without a word."""
        if frame is not None and (number < self.first or (number > self.first and self._listing.is_leading(number))):
            return  # left over from the run before, or shown before the key frame
        self._has_begun = True
        is_lost = frame is None or frame.is_corrupt
        if not is_lost and not (number == self.first and (frame.key_frame or self._file.intra_only)):
            raise NoKeyFrameError

    def drain(self) -> Outcomes:
        """What is left in the decoder; after it comes `jump` or nothing."""
        outcomes = self._decode(None)
        self._inside.clear()
        self.through = self.fed
        return outcomes

    def all(self) -> Iterator[tuple[int, Any]]:
        """What becomes of the whole file."""
        for _ in self._listing.pts:
            yield from self.feed()
        yield from self.drain()

    def _decode(self, packet: Any) -> Outcomes:
        try:
            frames = self._decoder.decode(packet)
        except av.FFmpegError:
            outcomes = [(self.fed, None)]
        else:
            self._came_out += len(frames)
            outcomes = [(frame.pts, frame) for frame in frames if frame.pts is not None]  # else hidden in its packet
        for number, frame in outcomes:
            if not self._has_begun:
                self._check_beginning(number, frame)
        while self._inside and self._came_out - self._inside[0][1] >= self._delay:
            self.through, _ = self._inside.popleft()
        return outcomes

    def __enter__(self) -> "Decoder":
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()


class _Quick:
    """The pass that suffices where nothing is wrong: with short cuts, and with threads that decode ahead.

    Args:
        pending: numbers of the frames that are still wanted; the owner takes them out.
    """

    def __init__(self, file: VideoFile, listing: Listing, pending: Set[int], pictures: Pictures):
        self._listing, self._pending, self._store = listing, pending, pictures
        self._runs = iter(_shortest_runs(listing, pending))
        first, self._last = next(self._runs)
        self._suspects = {listing.group_of(number) for number in listing.corrupt}
        self.pictures: dict[int, Picture] = {}
        self._decoder = Decoder(file, listing, pending)
        self._decoder.jump(first)
        self.close = self._decoder.close

    def is_sure_of(self, number: int) -> bool:
        """Whether `pictures` has the frame and nothing is in doubt about it; decodes until that is known."""
        needed = self._listing.depends_on(number)
        while needed.isdisjoint(self._suspects):
            if self._decoder.through >= number:
                if number in self.pictures:
                    return True
                self._suspects.add(self._listing.group_of(number))
            else:
                self._advance()
        return False

    def _advance(self) -> None:
        decoder = self._decoder
        if decoder.fed < self._last:
            outcomes = decoder.feed()
        elif (following := next(self._runs, None)) is None:
            outcomes = decoder.drain()
        else:
            first, self._last = following
            outcomes = decoder.jump(first)
        group_of = self._listing.group_of
        for number, frame in outcomes:
            if frame is None or frame.is_corrupt:
                # Where threads decode ahead, an error comes late by as many packets.
                earliest = max(number - _MAX_THREADS, 0) if frame is None else number
                self._suspects.update(range(group_of(earliest), group_of(number) + 1))
            elif number in self._pending and group_of(number) not in self._suspects:
                self.pictures[number] = self._store.take(frame)


class _Careful:
    """A pass without short cuts, through the groups of pictures that are in doubt, each with the one before.

    Args:
        pending: numbers of the frames that are still wanted; the owner takes them out.
        whole: through all groups from the beginning on.
        shown: position of the good frame that was shown last.
    """

    def __init__(
        self,
        file: VideoFile,
        listing: Listing,
        pending: Set[int],
        pictures: Pictures,
        whole: bool = False,
        shown: int = -1,
    ):
        self._file, self._listing, self._pending, self._store = file, listing, pending, pictures
        self.whole = whole
        starts = {*listing.starts, len(listing.pts)}
        # A transport stream also marks what comes right before a joint of two recordings, of which nothing is missing.
        self._at_joints = {number for number in listing.corrupt if {number + 1, number + 2} & starts}
        self._corrupt: dict[int, list[int]] = {}  # by group, ascending
        for number in sorted(listing.corrupt):
            self._corrupt.setdefault(listing.group_of(number), []).append(number)
        self._decoder: Decoder | None = None
        self.shown = shown
        self._wanted = -1  # position of the frame that is looked for
        self._forget()

    def _forget(self) -> None:
        self.close()
        self._groups: set[int] = set()  # that are gone through on purpose, not to look ahead
        self._last_group = -1  # of them
        self._marks: set[int] = set()  # packets with errors
        self._first_marks: dict[int, int] = {}  # by group
        self._seen_at_joints: set[int] = set()
        self._spares: dict[int, Picture] = {}  # frames that nobody wanted, yet
        self.pictures: dict[int, Picture] = {}

    def close(self) -> None:
        if self._decoder is not None:
            self._decoder.close()

    def look(self, number: int) -> bool:
        """Decode until it is known what became of a frame: whether it is damaged; if not, `pictures` may have it."""
        self._wanted = self._listing.position[number]
        self._aim(number)
        while not self._is_known(number):
            self._advance()
        return self._is_damaged(number)

    def _is_known(self, number: int) -> bool:
        if self._file.intra_only and (number in self.pictures or self._is_damaged(number)):
            return True
        mark = self._first_mark(self._listing.group_of(number))
        return self._decoder.through >= (number if mark is None else min(number, mark))

    def _aim(self, number: int) -> None:
        """Have the decoder go through the groups that a frame needs, and the ones before them."""
        listing = self._listing
        needed = listing.depends_on(number)
        needed |= {max(group - 1, 0) for group in needed}
        if self.whole:
            needed = set(range(self._last_group + 1, max(needed) + 1))
        if needed <= self._groups:
            return
        first = 0 if self.whole else listing.group(min(needed))[0]
        if self._decoder is None or first < self._decoder.first:
            self._forget()
            self._decoder = Decoder(self._file, listing, careful=True)
            self._decoder.jump(first)
        elif first > self._decoder.fed + 1:
            _, last = listing.group(self._last_group)
            while self._decoder.fed < last:
                self._advance()
            self._take(self._decoder.jump(first))
        self._groups |= needed
        self._last_group = max(needed)

    def _advance(self) -> None:
        at_end = self._decoder.fed + 1 == len(self._listing.pts)
        self._take(self._decoder.drain() if at_end else self._decoder.feed())

    def _take(self, outcomes: Outcomes) -> None:
        listing = self._listing
        for number, frame in outcomes:
            if frame is None or frame.is_corrupt:
                group = listing.group_of(number)
                self._marks.add(number)
                self._first_marks[group] = min(number, self._first_marks.get(group, number))
                continue
            if number in self._at_joints:
                self._seen_at_joints.add(number)
            if number in self._pending:
                self.pictures[number] = self._store.take(frame)
            elif listing.position.get(number, -1) > self.shown:
                self._spares[number] = self._store.take(frame)
        if len(self._spares) > 2 * _MAX_REORDERED:
            self._drop_spares()

    def _first_mark(self, group: int) -> int | None:
        flagged = next((number for number in self._corrupt.get(group, ()) if number not in self._seen_at_joints), None)
        found = self._first_marks.get(group)
        return found if flagged is None else flagged if found is None else min(flagged, found)

    def _is_damaged(self, number: int) -> bool:
        """Damage goes on to the end of its group, and to frames of the next that are shown before its key frame."""
        if self._file.intra_only:
            is_flagged = number in self._listing.corrupt and number not in self._seen_at_joints
            return is_flagged or number in self._marks
        group = self._listing.group_of(number)
        if self._listing.is_leading(number) and group and self._first_mark(group - 1) is not None:
            return True
        mark = self._first_mark(group)
        return mark is not None and number >= mark

    def show(self, number: int) -> None:
        """Say that a good frame is shown."""
        position = self._listing.position
        self.shown = position[number]
        self._spares = {n: spare for n, spare in self._spares.items() if position[n] > self.shown}

    def spare(self, number: int, choose: Callable[..., int]) -> Picture | None:
        """Of good frames that nobody wanted, between the one shown and this one, the first or the last (min, max)."""
        position = self._listing.position
        while spares := [n for n in self._spares if position[n] < position[number] and self._may_stand_in(n)]:
            chosen = choose(spares, key=position.__getitem__)
            if self._decoder.through >= chosen:
                return self._spares[chosen]
            self._advance()
        return None

    def _may_stand_in(self, number: int) -> bool:
        return self._listing.group_of(number) in self._groups and not self._is_damaged(number)

    def _drop_spares(self) -> None:
        """Of those before the frame that is looked for, only the first and the last can still be asked for."""
        position = self._listing.position
        behind = [n for n in self._spares if position[n] < self._wanted and self._decoder.through >= n]
        good = sorted(filter(self._may_stand_in, behind), key=position.__getitem__)
        for number in set(behind) - {*good[-1:], *(good[:1] if self.shown < 0 else ())}:
            del self._spares[number]


class _Passes:
    """The passes through a file, of which each is begun when the one before leaves something in doubt."""

    def __init__(self, file: VideoFile, listing: Listing, wanted: Set[int], pictures: Pictures):
        self._pending = set(wanted)
        self._arguments = file, listing, self._pending, pictures
        self._careful = _Careful(*self._arguments)
        self._quick: _Quick | None = _Quick(*self._arguments)

    def close(self) -> None:
        self._careful.close()
        if self._quick is not None:
            self._quick.close()

    def look(self, number: int) -> tuple[Picture | None, bool]:
        """The picture of a frame, and whether it is damaged; None then, and also if its packet has no picture."""
        picture, is_damaged = None, False
        try:
            if self._quick is not None and self._quick.is_sure_of(number):
                picture = self._quick.pictures[number]
        except NoKeyFrameError:
            self._quick.close()
            self._quick = None
            self._begin_again()
        if picture is None:
            is_damaged = self._look_carefully(number)
            picture = None if is_damaged else self._careful.pictures.get(number)
        return picture, is_damaged

    def forget(self, number: int) -> None:
        """Say that a frame is not wanted any more."""
        self._pending.discard(number)
        self._careful.pictures.pop(number, None)
        if self._quick is not None:
            self._quick.pictures.pop(number, None)

    def _look_carefully(self, number: int) -> bool:
        try:
            is_damaged = self._careful.look(number)
            is_missed = not is_damaged and number not in self._careful.pictures
        except NoKeyFrameError:
            is_missed = True
        if is_missed and not self._careful.whole:
            # A group that is marked to begin with a key frame may need what comes before it.
            self._begin_again()
            is_damaged = self._careful.look(number)
        return is_damaged

    def _begin_again(self) -> None:
        if not self._careful.whole:
            self._careful.close()
            self._careful = _Careful(*self._arguments, whole=True, shown=self._careful.shown)

    def show(self, number: int) -> None:
        """Say that a frame is shown that is good: nothing before it is needed any more."""
        self._careful.show(number)

    def spare_before(self, number: int) -> Picture | None:
        """The last good frame that nobody wanted, of those in doubt after the one shown and before this one."""
        return self._careful.spare(number, max)

    def first_spare(self, number: int) -> Picture | None:
        """The first of them."""
        return self._careful.spare(number, min)


class _Damage:
    """Which of the wanted frames are damaged, as it becomes known.

    Args:
        name: of the file.
        total: how many are wanted.
    """

    def __init__(self, name: str, total: int):
        self._name, self._total = name, total
        self._spans: list[tuple[float, float]] = []
        self._goes_on = False
        self.count = 0

    def add(self, second: float, times: int, is_damaged: bool) -> None:
        """The next frame, wanted so often."""
        if is_damaged:
            first = self._spans.pop()[0] if self._goes_on else second
            self._spans.append((first, second))
            self.count += times
        self._goes_on = is_damaged

    @property
    def is_too_much(self) -> bool:
        return self.count > max(1, math.ceil(self._total * MAX_DAMAGED_SHARE))

    def __str__(self) -> str:
        if not self.count:
            return f"{self._name}: none of the {self._total} frames needed can be decoded"
        where = ", ".join(f"{first:.2f} to {last:.2f} s" for first, last in self._spans)
        return f"{self._name}: damaged at {where}: {self.count} of the {self._total} frames needed cannot be decoded"

    def warn(self) -> None:
        if self.count:
            logger.warning(f"{self}; the last good frame before is shown there")


def read_in_order(
    file: VideoFile, listing: Listing, places: Mapping[int, int], second: Callable[[int], float], pictures: Pictures
) -> Iterator[tuple[int, Picture]]:
    """What to show at the wanted places, in their order: (for how many of them, own or held picture).

    It belongs to no thread. Closing it closes the containers. Damage is warned of at the end, early or not.

    Args:
        places: at how many places a frame is wanted, by its position in the order shown, ascending.
        second: when the frame of a position is shown.
        pictures: makes pictures of the frames.
    Raises:
        DamagedVideoError: the rest cannot be read; what comes before its `second` was given out.
        ValueError: the colours of a frame cannot be converted.
    """
    damage = _Damage(file.name, sum(places.values()))
    shown: Picture | None = None
    position = min(places)
    # What is lost waits for the next good frame, so that nothing of it is given out if there is too much. None: to be
    # held there is the first good frame, what comes before it being lost.
    withheld: list[tuple[int, int, Picture | None]] = []
    try:
        with closing(_Passes(file, listing, {listing.numbers[place] for place in places}, pictures)) as passes:
            for position, count in places.items():
                number = listing.numbers[position]
                picture, is_damaged = passes.look(number)
                if position == listing.position[number]:  # the last of several in the rare packet of two frames
                    passes.forget(number)
                file.check_unchanged()
                damage.add(second(position), count, is_damaged)
                if damage.is_too_much:
                    raise DamagedVideoError(str(damage))
                if picture is None:
                    withheld.append((position, count, passes.spare_before(number) or shown))
                    continue
                first = picture if shown is not None or not withheld else passes.first_spare(number) or picture
                for _, times, held in withheld:
                    yield times, held or first
                withheld = []
                passes.show(number)
                shown = picture
                yield count, picture
            if shown is None:
                raise DamagedVideoError(str(damage))
            for _, times, held in withheld:
                yield times, held
    except DamagedVideoError as error:
        error.second = second(withheld[0][0] if withheld else position)
        raise
    except GeneratorExit:
        damage.warn()
        raise
    damage.warn()


def _shortest_runs(listing: Listing, wanted: Set[int]) -> list[tuple[int, int]]:
    """(first, last) packets to decode: each group with a wanted frame up to the last wanted one."""
    last: dict[int, int] = {}
    for number in wanted:
        own = listing.group_of(number)
        last[own] = max(last.get(own, -1), number)
        for group in listing.depends_on(number) - {own}:
            last[group] = listing.group(group)[1]
    return _merged((listing.group(group)[0], last[group]) for group in sorted(last))


def _merged(runs: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
    """Ascending (first, last) runs, those that follow each other without a gap as one."""
    merged: list[tuple[int, int]] = []
    for first, last in runs:
        if merged and merged[-1][1] == first - 1:
            merged[-1] = merged[-1][0], last
        else:
            merged.append((first, last))
    return merged
