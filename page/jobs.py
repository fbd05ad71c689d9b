"""What the model does for visitors: plans, readings and answers, within the limits.

Readings and answers are iterators of updates, dicts with some of

- `status`: HTML that says how it stands, "" for nothing;
- `messages`: the conversation;
- `readings`: those that the visitor has;
- `evidence`: HTML that says where an answer comes from;
- `is_reading`: True when a reading begins.

What goes wrong is a `Refused` with a text to be shown; no path of the server and no traceback is in it.
"""

import logging
import re
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from . import views
from .model_room import Done, LineFull, ModelRoom, Settings, Stopped, Waiting
from .visitors import KeptReading, Refused, Video, Visitor, Visitors

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
        return self._one_at_a_time(visitor, lambda: self._read(visitor, settings))

    def ask(
        self, visitor: Visitor, settings: Settings, question: str, labels: Sequence[str], length: Any
    ) -> Iterator[dict[str, Any]]:
        """Answer a question, from the readings with these labels, or all; where there are none, read first."""
        return self._one_at_a_time(visitor, lambda: self._ask(visitor, settings, question, labels, length))

    def _read(self, visitor: Visitor, settings: Settings) -> Iterator[dict[str, Any]]:
        video, label = visitor.video, settings.attention
        if video is None:
            raise Refused("Choose a video first.")
        yield {"is_reading": True, "status": views.progress_bar(None, "Opening the video")}
        self.plan(video, settings)  # the settings may be ahead of the plan that is shown
        start, end = time.perf_counter(), ""
        try:
            for item in self.room.read(video.path, settings, visitor.stop):
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
        self.visitors.keep(visitor, KeptReading(reading, settings, label, _cache_bytes(reading), seconds))
        text = end or f"Read in {views.seconds(seconds)}. Ask away."
        yield {"status": views.done(text), "readings": visitor.readings}

    def _ask(
        self, visitor: Visitor, settings: Settings, question: str, labels: Sequence[str], length: Any
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
            yield from self._read(visitor, settings)
            if visitor.stop.is_set():
                return
        video, messages = visitor.video, visitor.messages
        chosen = [kept for kept in visitor.readings if kept.label in (labels or ())] or list(visitor.readings)
        messages.append({"role": "user", "content": question})
        for kept in chosen:
            heading = f"**{kept.label}:** " if len(chosen) > 1 else ""
            message = {"role": "assistant", "content": heading}
            messages.append(message)
            yield {"messages": [*messages], "status": ""}
            for item in self.room.ask(kept.reading, kept.settings, question, int(length), visitor.stop):
                if isinstance(item, Waiting):
                    yield {"status": views.waiting(item)}
                elif not isinstance(item, Done):
                    message["content"] += item
                    yield {"messages": [*messages], "status": ""}
            if visitor.video is not video:
                raise Stopped
            answer = item.result
            message["content"] = heading + (answer.text.strip() or "(no words)")
            kept.answer, kept.answer_seconds = answer.text.strip(), answer.seconds
            yield {"messages": [*messages], "readings": visitor.readings}
            if kept is chosen[0]:
                whose = kept.label if len(chosen) > 1 else ""
                yield {"evidence": views.evidence(answer.evidence, kept.reading.seconds, whose)}

    def _one_at_a_time(self, visitor: Visitor, job: Callable[[], Iterator[dict[str, Any]]]) -> Iterator[dict[str, Any]]:
        video = visitor.video
        try:
            with _busy(visitor):
                for update in job():
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
        except Exception as error:
            logger.exception("a job failed")
            raise Refused(WENT_WRONG) from error


@contextmanager
def _busy(visitor: Visitor) -> Iterator[None]:
    # What was stopped may need a moment to end.
    if not visitor.busy.acquire(timeout=STOPPING_SECONDS if visitor.stop.is_set() else 0):
        raise Refused("One thing at a time: something is still running for you.")
    visitor.stop = threading.Event()
    try:
        yield
    finally:
        visitor.busy.release()


def for_visitors(error: Exception, video: Video | None) -> str:
    """What an error says of a video, with the visitor's name for it, or nothing that a path is left in."""
    text = str(error).partition("; read until second")[0]
    if video is not None:
        text = text.replace(f"file:{video.path}", video.name).replace(str(video.path), video.name)
        if str(video.path.parent) in text:
            text = ""
    return re.sub(r"\[Errno -?\d+\] ", "", text) or WENT_WRONG


def _cache_bytes(reading: Any) -> int:
    states = (states for layer in reading.cache.layers for states in (layer.keys, layer.values))
    return sum(one.untyped_storage().nbytes() for one in states)
