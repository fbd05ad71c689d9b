"""What belongs to each visitor of the page, for how long, and how much of it there may be."""

import contextlib
import os
import secrets
import shutil
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .model_room import Settings

BUSY = "One thing at a time: something is still running for you."


@dataclass(frozen=True)
class Limits:
    """What visitors may use.

    Attributes:
        upload_bytes: of one file.
        all_upload_bytes: of the files of all visitors.
        seconds: of one video.
        pixels: of one of its pictures.
        readings: that are kept of one visitor.
        all_reading_bytes: of the caches of all visitors' readings.
        visitors: that may be there at once.
        idle_seconds: after which a visitor who does nothing is forgotten.
        waiting: visitors that may wait for the model.
        question_letters, new_tokens: of one question and its answer.
    """

    upload_bytes: int = 200 << 20
    all_upload_bytes: int = 4 << 30
    seconds: float = 600.0
    pixels: int = 4096 * 2304
    readings: int = 3
    all_reading_bytes: int = 8 << 30
    visitors: int = 500
    idle_seconds: float = 1800.0
    waiting: int = 16
    question_letters: int = 1000
    new_tokens: int = 512


class Refused(Exception):
    """Something that a visitor cannot do, with the reason as its text, made to be shown."""


@dataclass(frozen=True)
class Video:
    """A video on the page.

    Attributes:
        path: of the file.
        name: as its visitor calls it.
        questions: to suggest.
        is_upload: it is the visitor's, and removed with the visitor.
    """

    path: Path
    name: str
    questions: tuple[str, ...] = ()
    is_upload: bool = False


@dataclass
class KeptReading:
    """A reading of the visitor's video.

    Attributes:
        label: for people.
        reading: `None` where it was dropped.
        bytes: that are held for its cache, with the room that it has to grow.
        seconds: it took.
        tokens, attention_share, cache_bytes: for people, also when it is dropped.
        answer_seconds: that the last answer took.
    """

    reading: Any
    settings: Settings
    label: str
    bytes: int
    seconds: float
    tokens: int = 0
    attention_share: float = 0.0
    cache_bytes: int = 0
    answer_seconds: float | None = None
    answer: str = ""

    @classmethod
    def of(cls, reading: Any, settings: Settings, label: str, seconds: float) -> "KeptReading":
        states = [states for layer in reading.cache.layers for states in (layer.keys, layer.values)]
        return cls(
            reading,
            settings,
            label,
            bytes=sum(one.untyped_storage().nbytes() for one in states),
            seconds=seconds,
            tokens=reading.num_tokens,
            attention_share=reading.plan.attention_share,
            cache_bytes=sum(one.nbytes for one in states),
        )


@dataclass
class Visitor:
    """Somebody with the page open.

    Attributes:
        key: a secret in the addresses of this visitor's files.
        folder: of the files.
        video: that is chosen.
        readings: of it, the oldest first.
        messages: of the conversation, as the page shows them.
        stop: set to end what is computed for this visitor.
        uploads: that have begun; only the last one goes on.
        reserved: bytes that it may have.
        busy: held while something is computed for this visitor.
        pending: held by the one who waits for that to end, and by nobody else.
    """

    key: str
    folder: Path
    last_seen: float
    video: Video | None = None
    upload: Video | None = None
    uploads: int = 0
    reserved: int = 0
    readings: list[KeptReading] = field(default_factory=list)
    messages: list[dict] = field(default_factory=list)
    stop: threading.Event = field(default_factory=threading.Event)
    busy: threading.Lock = field(default_factory=threading.Lock)
    pending: threading.Lock = field(default_factory=threading.Lock)
    is_gone: bool = False


class Visitors:
    """All of them.

    Args:
        folder: for their files; a folder in it for each.
        limits: on what they use.
        clock: seconds.
    """

    def __init__(self, folder: Path, limits: Limits, clock: Callable[[], float] = time.monotonic):
        self.folder, self.limits, self._clock = folder, limits, clock
        self._lock = threading.RLock()
        self._by_session: dict[str, Visitor] = {}

    def __len__(self) -> int:
        return len(self._by_session)

    def arrive(self, session: str) -> Visitor:
        """A new visitor; one that was there in the same session is forgotten.

        Raises:
            Refused: too many are there.
        """
        with self._lock:
            self.leave(session)
            if len(self) >= self.limits.visitors:
                raise Refused("Too many visitors are here. Please come back in a few minutes.")
            key = secrets.token_urlsafe(24)
            visitor = Visitor(key, self.folder / key, self._clock())
            visitor.folder.mkdir(parents=True)
            self._by_session[session] = visitor
            return visitor

    def of(self, session: str | None) -> Visitor:
        """The visitor of a session.

        Raises:
            Refused: there is none (any more).
        """
        with self._lock:
            visitor = self._by_session.get(session or "")
            if visitor is None:
                raise Refused("This page was left alone for so long that its video is gone. Please reload the page.")
            self.touch(visitor)
            return visitor

    def touch(self, visitor: Visitor) -> None:
        """Something is done for a visitor."""
        visitor.last_seen = self._clock()

    def by_key(self, key: str) -> Visitor | None:
        with self._lock:
            asked = key.encode(errors="replace")  # texts are compared of ASCII alone
            found = [one for one in self._by_session.values() if secrets.compare_digest(one.key.encode(), asked)]
            if not found:
                return None
            self.touch(found[0])
            return found[0]

    def leave(self, session: str) -> None:
        """Forget a visitor: stop what is computed, drop the readings, remove the files."""
        with self._lock:
            visitor = self._by_session.pop(session, None)
            if visitor is None:
                return
            visitor.is_gone = True
            visitor.stop.set()
            visitor.readings.clear()
            visitor.messages.clear()
        shutil.rmtree(visitor.folder, ignore_errors=True)

    def leave_all(self) -> None:
        for session in list(self._by_session):
            self.leave(session)

    def sweep(self) -> None:
        """Forget those who have done nothing for too long; waiting in line is something."""
        with self._lock:
            oldest = self._clock() - self.limits.idle_seconds
            there = self._by_session.items()
            idle = [session for session, one in there if one.last_seen < oldest and not one.busy.locked()]
        for session in idle:
            self.leave(session)

    def reserve_upload(self, visitor: Visitor) -> int:
        """Bytes that a new file of a visitor may have.

        Raises:
            Refused: the files of all, the visitor's own included, take too much of the room that there is.
        """
        with self._lock:
            # The visitor's new file takes the place of one that was reserved for before.
            used = sum(one.reserved for one in self._by_session.values() if one is not visitor)
            used += sum(_stored_bytes(one.folder) for one in self._by_session.values())
            if self.limits.all_upload_bytes - used < self.limits.upload_bytes:
                raise Refused("There is no room for another file at the moment. Please try again in a few minutes.")
            visitor.reserved = self.limits.upload_bytes
            return visitor.reserved

    def choose(self, visitor: Visitor, video: Video) -> None:
        """Show another video; readings, answers and the file of the one before are gone."""
        with self._lock:
            visitor.stop.set()
            visitor.video = video
            visitor.readings.clear()
            visitor.messages.clear()
            keep = {video.path, *([visitor.upload.path] if visitor.upload else ())}
            for file in _files(visitor.folder):
                if file not in keep and file.suffix != ".part":
                    file.unlink(missing_ok=True)

    def keep(self, visitor: Visitor, kept: KeptReading) -> None:
        """Keep a reading, in the place of one with the same label; the oldest go where there are too many.

        Raises:
            Refused: the visitor has left, or it alone is more than all readings may take.
        """
        with self._lock:
            if visitor.is_gone:
                raise Refused("You have left.")
            if kept.bytes > self.limits.all_reading_bytes:
                raise Refused("This reading takes more memory than there is. Take fewer frames or fewer tokens.")
            others = [one for one in visitor.readings if one.label != kept.label]
            dropped = [one for one in visitor.readings if one.label == kept.label]
            while len(others) >= self.limits.readings:
                dropped.append(others.pop(0))
            _drop(dropped)
            visitor.readings[:] = others
            self.make_room(kept.bytes)
            visitor.readings.append(kept)

    def begin(self, visitor: Visitor) -> threading.Event:
        """What stops the next job of a visitor; it is heard also while that waits for the one before to end.

        Raises:
            Refused: the visitor has left, or something runs that nobody has told to stop.
        """
        with self._lock:
            if visitor.is_gone:
                raise Refused("You have left.")
            if visitor.busy.locked() and not visitor.stop.is_set():
                raise Refused(BUSY)
            visitor.stop = threading.Event()
            return visitor.stop

    def make_room(self, size: int) -> None:
        """Drop readings, those of whoever was seen last longest ago first, so that one of `size` bytes has room.

        What waits to be asked is dropped too: `KeptReading.reading` is `None` then. Whoever is answered goes on.
        """
        with self._lock:
            excess = self.reading_bytes + size - self.limits.all_reading_bytes
            for one in sorted(self._by_session.values(), key=lambda one: one.last_seen):
                while excess > 0 and one.readings:
                    oldest = one.readings.pop(0)
                    _drop([oldest])
                    excess -= oldest.bytes

    @property
    def reading_bytes(self) -> int:
        with self._lock:
            return sum(kept.bytes for one in self._by_session.values() for kept in one.readings)


def _drop(readings: Iterable[KeptReading]) -> None:
    """Let go of the caches, whoever waits to ask them."""
    for one in readings:
        one.reading = None


def _files(folder: Path) -> Iterator[Path]:
    return (file for file in folder.glob("*") if file.is_file())


def _stored_bytes(folder: Path) -> int:
    """Of the files in a folder, without those that room is reserved for; they may go while this counts."""
    total = 0
    with contextlib.suppress(FileNotFoundError), os.scandir(folder) as entries:
        for entry in entries:
            if not entry.name.endswith(".part"):
                with contextlib.suppress(FileNotFoundError):
                    total += entry.stat().st_size
    return total
