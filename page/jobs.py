"""What the model does for visitors: plans, readings and answers, within the limits.

Readings and answers are iterators of updates, dicts with some of

- `status`: HTML that says how it stands, "" for nothing;
- `messages`: the conversation;
- `readings`: those that the visitor has;
- `evidence`: HTML that says where an answer comes from;
- `is_reading`: True when a reading begins;
- `has_begun`: True, first of all: nothing else is computed for the visitor now.

What goes wrong is a `Refused` with a text to be shown; no path of the server and no traceback is in it.
"""

import logging
import re
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import av
import torch

from . import views
from .model_room import Done, LineFull, ModelRoom, Settings, Stopped, Waiting
from .visitors import BUSY, KeptReading, Refused, Video, Visitor, Visitors

logger = logging.getLogger("videonsa.page")
STOPPING_SECONDS = 60
WENT_WRONG = "Something went wrong on the server. Please try again."


class Jobs:
    """See the top of this file."""

    def __init__(self, room: ModelRoom, visitors: Visitors):
        self.room, self.visitors, self.limits = room, visitors, visitors.limits

    def settings(self, fps: Any, step_tokens: Any, nsa_mode: Any, block_counts: Any) -> Settings:
        """Of what a visitor has sent.

        Raises:
            Refused.
        """
        numbers = {"Frames a second": fps, "Tokens for two frames": step_tokens, "Blocks a token selects": block_counts}
        for name, value in numbers.items():
            if not isinstance(value, (int, float)) or isinstance(value, bool) or not 0 < value < 1e6:
                raise Refused(f"{name}: a number above zero, please.")
        if nsa_mode not in self.room.modes:
            raise Refused("There is no such attention.")
        return Settings(float(fps), max(1, int(step_tokens)), nsa_mode, max(1, int(block_counts)))

    def plan(self, video: Video, settings: Settings) -> Any:
        """The `ReadingPlan` of a video that may be read.

        Raises:
            Refused: it cannot be read, or is beyond the limits.
        """
        check_pixels(video.path, self.limits.pixels)
        try:
            plan = self.room.plan(video.path, settings)
        except ValueError as error:
            raise Refused(for_visitors(error, video)) from error
        except Exception as error:
            logger.exception("a plan failed")
            raise Refused(WENT_WRONG) from error
        if plan.seconds > self.limits.seconds:
            most = views.clock(self.limits.seconds)
            raise Refused(f"This video is {views.clock(plan.seconds)} long, and the limit here is {most}.")
        if plan.memory.cache > self.limits.all_reading_bytes:
            size, most = views.size(plan.memory.cache), views.size(self.limits.all_reading_bytes)
            raise Refused(f"Its cache would take {size}, and the limit here is {most}: fewer frames or tokens fit.")
        return plan

    def read(self, visitor: Visitor, settings: Settings) -> Iterator[dict[str, Any]]:
        """Read the visitor's video; one job at a time for each."""
        return self._one_at_a_time(visitor, lambda stop: self._read(visitor, settings, stop))

    def ask(
        self, visitor: Visitor, settings: Settings, question: str, labels: Sequence[str], length: Any
    ) -> Iterator[dict[str, Any]]:
        """Answer a question, from the readings with these labels, or all; where there are none, read first."""
        return self._one_at_a_time(visitor, lambda stop: self._ask(visitor, settings, question, labels, length, stop))

    def _read(self, visitor: Visitor, settings: Settings, stop: threading.Event) -> Iterator[dict[str, Any]]:
        video, label = visitor.video, settings.attention
        if video is None:
            raise Refused("Choose a video first.")
        yield {"is_reading": True, "status": views.progress_bar(None, "Opening the video")}
        plan = self.plan(video, settings)  # the settings may be ahead of the plan that is shown
        start, end = time.perf_counter(), ""
        try:
            make_room = partial(self.visitors.make_room, plan.memory.cache)
            for item in self.room.read(video.path, settings, stop, make_room):
                if isinstance(item, Waiting):
                    yield {"status": views.waiting(item)}
                    start = time.perf_counter()
                elif not isinstance(item, Done):
                    yield {"status": views.reading_progress(item)}
            reading = item.result
        except (Stopped, ValueError) as error:
            reading = getattr(error, "reading", None)
            if reading is None or visitor.video is not video:
                raise
            until = views.clock(reading.seconds)
            label = f"{label}, until {until}"
            why = f"Stopped at {until}." if isinstance(error, Stopped) else for_visitors(error, video)
            end = f"{why} You can ask about what was read until then."
        if visitor.video is not video:
            raise Stopped
        seconds = time.perf_counter() - start
        self.visitors.keep(visitor, KeptReading.of(reading, settings, label, seconds))
        text = end or f"Read in {views.seconds(seconds)}. Ask away."
        yield {"status": views.done(text), "readings": visitor.readings}

    def _ask(
        self,
        visitor: Visitor,
        settings: Settings,
        question: str,
        labels: Sequence[str],
        length: Any,
        stop: threading.Event,
    ) -> Iterator[dict[str, Any]]:
        question = (question or "").strip()
        if not question:
            raise Refused("Type a question first.")
        if len(question) > self.limits.question_letters:
            raise Refused(f"A question has {self.limits.question_letters:,} letters at most.")
        if not isinstance(length, (int, float)) or not 1 <= length <= self.limits.new_tokens:
            raise Refused(f"An answer has 1 to {self.limits.new_tokens} tokens.")
        if not visitor.readings:
            if visitor.messages:
                text = "The reading was dropped to make room for others: reading it again"
                yield {"status": views.progress_bar(None, text)}
            yield from self._read(visitor, settings, stop)
            if stop.is_set():
                return
        video, messages = visitor.video, visitor.messages
        chosen = [kept for kept in visitor.readings if kept.label in (labels or ())] or list(visitor.readings)
        messages.append({"role": "user", "content": question})
        for kept in chosen:
            heading = f"**{kept.label}:** " if len(chosen) > 1 else ""
            message = {"role": "assistant", "content": heading}
            messages.append(message)
            yield {"messages": [*messages], "status": ""}
            try:
                total = _there(kept).seconds
                for item in self.room.ask(partial(_there, kept), kept.settings, question, int(length), stop):
                    if isinstance(item, Waiting):
                        yield {"status": views.waiting(item)}
                    elif not isinstance(item, Done):
                        message["content"] += item
                        yield {"messages": [*messages], "status": ""}
            except Exception:
                if message["content"] == heading and visitor.video is video:  # no answer has begun
                    messages.remove(message)
                    if kept is chosen[0]:
                        messages.pop()
                    yield {"messages": [*messages]}
                raise
            if visitor.video is not video:
                raise Stopped
            answer = item.result
            message["content"] = heading + (answer.text.strip() or "(no words)")
            kept.answer, kept.answer_seconds = answer.text.strip(), answer.seconds
            yield {"messages": [*messages], "readings": visitor.readings}
            if kept is chosen[0]:
                whose = kept.label if len(chosen) > 1 else ""
                yield {"evidence": views.evidence(answer.evidence, total, whose)}

    def _one_at_a_time(
        self, visitor: Visitor, job: Callable[[threading.Event], Iterator[dict[str, Any]]]
    ) -> Iterator[dict[str, Any]]:
        video = visitor.video
        try:
            with self._busy(visitor) as stop:
                yield {"has_begun": True}
                for update in job(stop):
                    self.visitors.touch(visitor)
                    yield update
        except LineFull as error:
            raise Refused("Too many visitors are waiting. Please try again in a minute.") from error
        except Stopped:
            yield {"status": views.done("Stopped.") if visitor.video is video else ""}
        except Refused:
            raise
        except ValueError as error:
            if visitor.video is not video:  # whose file is gone
                yield {"status": ""}
                return
            raise Refused(for_visitors(error, video)) from error
        except (MemoryError, torch.OutOfMemoryError) as error:
            self.visitors.make_room(self.limits.all_reading_bytes)
            raise Refused("There was not enough memory. Please try again, with fewer frames or tokens.") from error
        except Exception as error:
            logger.exception("a job failed")
            raise Refused(WENT_WRONG) from error

    @contextmanager
    def _busy(self, visitor: Visitor) -> Iterator[threading.Event]:
        """Inside, nothing else is done for the visitor. Gives what stops it.

        What was stopped may need a moment to end. One may wait for that: each that waits holds a thread of the server.
        """
        if not visitor.pending.acquire(blocking=False):
            raise Refused(BUSY)
        try:
            stop = self.visitors.begin(visitor)
            if not visitor.busy.acquire(timeout=STOPPING_SECONDS):
                raise Refused(BUSY)
        finally:
            visitor.pending.release()
        try:
            if visitor.is_gone or stop.is_set():
                raise Stopped
            yield stop
        finally:
            visitor.busy.release()


def _there(kept: KeptReading) -> Any:
    """The reading, if it is there still."""
    if kept.reading is None:
        raise Refused("The reading was dropped to make room for others: read the video again.")
    return kept.reading


def check_pixels(path: Path, limit: int) -> None:
    """Look at the size of a video's pictures before one of them is decoded: a small file can hold huge ones.

    Raises:
        Refused: they are larger than `limit` pixels.
    """
    try:
        with av.open(str(path), container_options={"protocol_whitelist": "file"}) as container:
            sizes = [(one.codec_context.width, one.codec_context.height) for one in container.streams.video]
    except (av.error.FFmpegError, OSError):
        return  # the reader says what is wrong
    for width, height in sizes:
        if width * height > limit:
            raise Refused(f"Its pictures have {width:,} x {height:,} pixels, and the limit here is {limit:,} in all.")


def for_visitors(error: Exception, video: Video | None) -> str:
    """What an error says of a video, with the visitor's name for it, or nothing that a path is left in."""
    text = str(error).partition("; read until second")[0]
    if video is not None:
        text = text.replace(f"file:{video.path}", video.name).replace(str(video.path), video.name)
        if str(video.path.parent) in text:
            text = ""
    return re.sub(r"\[Errno -?\d+\] ", "", text) or WENT_WRONG
