"""The one model behind the page, and the line in front of it.

Readings and answers are computed one after the other, each in a thread of its own that first waits for its turn. What
comes of it on the way (the place in the line, progress, pieces of an answer) reaches the caller through an iterator.
Settings of the attention belong to the model, so that they are set for a turn and not beyond it.
"""

import copy
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModel, AutoProcessor, StoppingCriteria, TextStreamer

CHUNK_STEPS = 32
"""Steps of a video, of two frames each, that are read at most before somebody who wants to stop is heard."""
REPORT_SECONDS = 0.2
"""Between two reports of progress: to show one costs the page more than the small checkpoint needs for a chunk."""


@dataclass(frozen=True)
class Settings:
    """How a video is read.

    Attributes:
        fps: frames a second.
        step_tokens: tokens of two frames, at most.
        nsa_mode: "sparse" or "dense".
        block_counts: blocks that a token selects, its own included; of no meaning in dense mode.
    """

    fps: float
    step_tokens: int
    nsa_mode: str
    block_counts: int

    @property
    def attention(self) -> str:
        """For people."""
        if self.nsa_mode == "dense":
            return "Dense"
        return f"Sparse, {self.block_counts} block{'s' if self.block_counts > 1 else ''}"


@dataclass(frozen=True)
class Waiting:
    """Others are served before."""

    before: int


@dataclass(frozen=True)
class Done:
    """The last item: a `Reading` or an `Answer`."""

    result: Any


class Stopped(Exception):
    """By the visitor. While a video is read, the attribute `reading` has what was read, if that is anything."""


class LineFull(Exception):
    """Too many wait."""


class Line:
    """First come, first served.

    Args:
        limit: who may wait besides the one that is served.
    """

    def __init__(self, limit: int):
        self.limit = limit
        self._tickets: deque[object] = deque()
        self._moved = threading.Condition()

    @contextmanager
    def turn(self, stop: threading.Event, report: Callable[[Waiting], Any]) -> Iterator[None]:
        """Inside, nobody else is served.

        Args:
            stop: set by those who do not want to wait any more.
            report: called at first, and whenever the line has moved.
        Raises:
            Stopped, LineFull.
        """
        ticket, before = object(), None
        with self._moved:
            if len(self._tickets) > self.limit:
                raise LineFull
            self._tickets.append(ticket)
        try:
            with self._moved:
                while (place := self._tickets.index(ticket)) and not stop.is_set():
                    if place != before:
                        before = place
                        report(Waiting(place))
                    self._moved.wait(0.2)  # `stop` wakes nobody
            if stop.is_set():
                raise Stopped
            yield
        finally:
            with self._moved:
                self._tickets.remove(ticket)
                self._moved.notify_all()


class ModelRoom:
    """A model with its processor, used by one at a time.

    Args:
        name: a folder or a Hub id of a VideoNSA checkpoint.
        device, dtype: of the model.
        chunk_tokens: that are read at a time, between two reports of progress.
        waiting: who may wait.
    Raises:
        ValueError, OSError: the checkpoint cannot be loaded.
    """

    def __init__(self, name: str | Path, device: str, dtype: str, chunk_tokens: int, waiting: int):
        self.name = str(name)
        self.processor = AutoProcessor.from_pretrained(name, trust_remote_code=True)
        self.model = AutoModel.from_pretrained(name, trust_remote_code=True, dtype=dtype).to(device).eval()
        self.chunk_tokens, self.line = chunk_tokens, Line(waiting)
        size = self.processor.video_processor.patch_size * self.processor.video_processor.merge_size
        self.pixels_per_token = size**2
        config = self.model.config
        # That variant cannot read bit by bit while it is sparse.
        self.modes = ("dense",) if config.nsa_variant == "released" else ("sparse", "dense")
        self.default = Settings(
            fps=self.processor.fps or 2.0,
            step_tokens=self.processor.max_pixels_per_frame // self.pixels_per_token,
            nsa_mode=config.nsa_mode if config.nsa_mode in self.modes else self.modes[0],
            block_counts=config.block_counts,
        )

    @property
    def least_step_tokens(self) -> int:
        return max(1, -(-self.processor.min_pixels_per_frame // self.pixels_per_token))

    def plan(self, video: Path, settings: Settings) -> Any:
        """The `ReadingPlan`. Nobody waits for it: packets are listed and one frame is decoded, and no model runs.

        Raises:
            ValueError: the video cannot be read, or not with these settings.
        """
        # Plans look at the configuration alone, and that of the model may be set for another's turn.
        model = copy.copy(self.model)
        model.config = copy.deepcopy(self.model.config)
        _set(model, settings)
        return model.plan_reading(self.processor, str(video), chunk_tokens=self.chunk_tokens, **self._options(settings))

    def read(
        self, video: Path, settings: Settings, stop: threading.Event, prepare: Callable[[], Any] | None = None
    ) -> Iterator[Any]:
        """Gives `Waiting`, then `ReadingProgress` after chunks, and `Done` with the `Reading`.

        Args:
            stop: when it is set, reading ends after a chunk, of at most `CHUNK_STEPS` steps.
            prepare: called when the turn has come.
        Raises:
            Stopped: `stop` was set; LineFull.
            ValueError: the video cannot be read.
        """

        def work(put):
            def callback(progress):
                nonlocal last
                if (now := time.monotonic()) - last > REPORT_SECONDS:
                    last = now
                    put(progress)
                if stop.is_set():
                    raise Stopped

            last = -REPORT_SECONDS

            with self._turn(settings, stop, put):
                if prepare is not None:
                    prepare()
                return self.model.read(
                    self.processor,
                    str(video),
                    chunk_tokens=min(self.chunk_tokens, CHUNK_STEPS * settings.step_tokens),
                    progress=False,
                    callback=callback,
                    **self._options(settings),
                )

        return _in_thread(work, stop)

    def ask(
        self, find: Callable[[], Any], settings: Settings, question: str, max_new_tokens: int, stop: threading.Event
    ) -> Iterator[Any]:
        """Gives `Waiting`, then pieces of the answer, and `Done` with the `Answer` and its evidence.

        Args:
            find: gives the reading when the turn has come; it may have been dropped until then.
            settings: with which it was read.
            stop: when it is set, the answer ends where it is.
        Raises:
            Stopped: before there was an answer; LineFull.
        """

        def work(put):
            with self._turn(settings, stop, put):
                return find().ask(
                    question,
                    max_new_tokens=max_new_tokens,
                    do_sample=False,
                    evidence=True,
                    streamer=_Pieces(self.processor.tokenizer, put),
                    stopping_criteria=[_StopWhenSet(stop)],
                )

        return _in_thread(work, stop)

    @contextmanager
    def _turn(self, settings: Settings, stop: threading.Event, put: Callable[[Any], None]) -> Iterator[None]:
        with self.line.turn(stop, put):
            before = {name: getattr(self.model.config, name) for name in ("nsa_mode", "block_counts")}
            try:
                _set(self.model, settings)
                yield
            finally:
                for name, value in before.items():
                    setattr(self.model.config, name, value)

    def _options(self, settings: Settings) -> dict[str, Any]:
        return {"fps": settings.fps, "max_pixels_per_frame": settings.step_tokens * self.pixels_per_token}


def _set(model: Any, settings: Settings) -> None:
    model.config.nsa_mode = settings.nsa_mode
    if settings.nsa_mode == "sparse":
        model.config.block_counts = settings.block_counts


class _Pieces(TextStreamer):
    """Hands an answer on, word by word."""

    def __init__(self, tokenizer: Any, put: Callable[[str], None]):
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self._put = put

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        if text:
            self._put(text)


class _StopWhenSet(StoppingCriteria):
    def __init__(self, stop: threading.Event):
        self._stop = stop

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor, **kwargs) -> torch.BoolTensor:
        return torch.full((len(input_ids),), self._stop.is_set(), device=input_ids.device)


def _in_thread(work: Callable[[Callable[[Any], None]], Any], stop: threading.Event) -> Iterator[Any]:
    """What `work` puts, and `Done` with its result. Whoever stops iterating stops the work too.

    Of what was put while nobody took it, texts are joined, and of other things the last one is given.
    """
    items: queue.SimpleQueue = queue.SimpleQueue()

    def run():
        try:
            items.put(Done(work(items.put)))
        except BaseException as error:  # raised where it is waited for
            items.put(error)

    threading.Thread(target=run, name="page-work", daemon=True).start()
    try:
        while True:
            item = items.get()
            while not isinstance(item, (Done, BaseException)) and not items.empty():
                following = items.get()
                if isinstance(item, str) and not isinstance(following, str):
                    yield item
                item = item + following if isinstance(item, str) and isinstance(following, str) else following
            if isinstance(item, BaseException):
                raise item
            yield item
            if isinstance(item, Done):
                return
    except GeneratorExit:
        stop.set()
        raise
