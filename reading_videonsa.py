"""A long video, read once in bounded memory, and asked as often as one likes.

`model.read(processor, "film.mp4", fps=1)` goes through the video bit by bit: a thread decodes frames and cuts patches
while the model encodes those before and runs its decoder layers over them. Nothing grows with the video but the
key-value cache. `reading.ask("...")` answers from that cache, again and again; `extend` adds footage to it, `save` keeps
it (`reading_files_videonsa.py`).

The cache holds the prompt up to its last vision token. What ends the video and asks the question is fed by `ask`, and
taken back after the answer; so footage that arrives later continues the video where it ended. Answers are those of
`generate` with the whole prompt: vision tokens see only vision tokens before them, and text all tokens before it,
however a prompt is cut into chunks.
"""

import importlib
import itertools
import os
import queue
import re
import threading
import time
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from tqdm import tqdm
from transformers.utils import logging

try:
    from .cache_videonsa import RoomyCache, restore_, state_of
    from .configuration_videonsa import NSA_FIELDS
    from .memory_videonsa import MemoryEstimate, estimate_memory
    from .positions_videonsa import mrope_position_ids
    from .reading_files_videonsa import load_reading, media_fingerprint, save_reading
except ImportError:  # `import modeling_videonsa` from a checkout, without a package
    if __package__:
        raise
    from cache_videonsa import RoomyCache, restore_, state_of
    from configuration_videonsa import NSA_FIELDS
    from memory_videonsa import MemoryEstimate, estimate_memory
    from positions_videonsa import mrope_position_ids
    from reading_files_videonsa import load_reading, media_fingerprint, save_reading

logger = logging.get_logger(__name__)

CHUNK_TOKENS = 1024
_SPARE_TOKENS = 1024  # room in the cache for a question and its answer
_MEDIA = ("image", "image_url", "video")


@dataclass(frozen=True)
class ReadingPlan:
    """What reading a prompt means, known before anything is decoded.

    Attributes:
        videos: frames, resolution and tokens of each video (`VideoPlan`).
        images: their number.
        seconds: of video, all videos together.
        tokens: of the prompt up to its last image or video; those of text between and before them are among them.
        vision_tokens: of images and videos.
        attention_pairs: (query, key) pairs per head and layer that reading computes, a compressed block as one key.
        attention_share: the same as a share of dense causal attention's.
        chunk_tokens: tokens that go through the model at a time.
        kept_tokens: tokens that the cache keeps when all is read, mean over the layers.
        memory: bytes of weights, of the cache, and of what is worked on (`MemoryEstimate`).
    """

    videos: tuple[Any, ...]
    images: int
    seconds: float
    tokens: int
    vision_tokens: int
    attention_pairs: int
    attention_share: float
    chunk_tokens: int
    kept_tokens: int
    memory: MemoryEstimate

    def __str__(self) -> str:
        lines = [str(video) for video in self.videos]
        if self.images:
            lines.append(f"{self.images} image{'s' if self.images > 1 else ''}")
        lines.append(
            f"{self.tokens:,} tokens, {self.vision_tokens:,} of them of images and video, in chunks of "
            f"{self.chunk_tokens:,}; attention {self.attention_share:.1%} of dense"
        )
        lines.append(f"{self.kept_tokens:,} tokens kept in the cache; {self.memory}")
        return "\n".join(lines)


@dataclass(frozen=True)
class ReadingProgress:
    """How far a reading is: frames and tokens of how many, seconds it took, and seconds expected for the rest."""

    frames: int
    total_frames: int
    tokens: int
    total_tokens: int
    seconds: float
    remaining: float


@dataclass(frozen=True)
class Answer:
    """What the model said.

    Attributes:
        text: without special tokens.
        token_ids: as generated.
        prompt_tokens: tokens that were fed for it: the question, not the video.
        seconds: it took.
    """

    text: str
    token_ids: tuple[int, ...] = field(repr=False)
    prompt_tokens: int
    seconds: float

    def __str__(self) -> str:
        return self.text


class ReadingMixin:
    """`read`, `plan_reading` and `load_reading` of a model."""

    def read(
        self,
        processor,
        messages_or_video: Any,
        *,
        chunk_tokens: int = CHUNK_TOKENS,
        cache=None,
        progress: bool = True,
        callback: Callable[[ReadingProgress], Any] | None = None,
        **options,
    ) -> "Reading":
        """Read a prompt up to its last image or video, in memory that does not grow with it but for the cache.

        Args:
            processor: the `VideoNSAProcessor` of the checkpoint.
            messages_or_video: a conversation, whose text behind the last image or video is what `ask()` asks; or one
                video in any form that the processor takes: a path, the bytes of a file, frames, an array.
            chunk_tokens: tokens that go through the model at a time. More are faster on a GPU and take more memory.
            cache: an empty cache of transformers' to use, such as a `QuantizedCache`.
            progress: show a progress bar where it takes longer than two seconds.
            callback: called after each chunk with a `ReadingProgress`. To stop, it raises an error.
            options: of the processor: `fps`, `num_frames`, `max_frames`, `max_pixels_per_frame`, `max_total_tokens`, ...
        Returns:
            the `Reading`.
        Raises:
            ValueError: bad options; no image or video; a video that cannot be read; a prompt longer than the model's
                positions; a model with nsa_variant="released", which reads prompts whole.

        Whatever stops it on the way (an error in a file, Ctrl-C, the callback), the exception has what was read until
        then as its attribute `reading`, if that is anything.
        """
        prompt = _Prompt(self, processor, messages_or_video, chunk_tokens, options)
        if cache is None:
            cache = RoomyCache(self.config.text_config.num_hidden_layers, prompt.length + _SPARE_TOKENS)
        elif cache.get_seq_length() or cache.is_compileable:
            raise ValueError(f"`cache` must be empty and grow, got {type(cache).__name__} of {cache.get_seq_length()}")
        reading = Reading(self, processor, prompt.plan(), prompt, cache)
        reading._read(prompt, progress, callback)
        return reading

    def plan_reading(
        self, processor, messages_or_video: Any, *, chunk_tokens: int = CHUNK_TOKENS, **options
    ) -> ReadingPlan:
        """What `read` with these arguments would do; lists the packets of video files, and decodes one frame of each."""
        return _Prompt(self, processor, messages_or_video, chunk_tokens, options).plan()

    def load_reading(self, folder: str | os.PathLike, processor=None, messages_or_video: Any = None) -> "Reading":
        """What `Reading.save` wrote, to be asked on.

        Args:
            folder: as given to `save`.
            processor: of the checkpoint; by default it is loaded from where this model came from.
            messages_or_video: where given, it is checked that these media were read.
        Raises:
            ValueError: not a folder that `save` wrote; or it was read with other weights, settings or media.
        """
        return load_reading(Reading, self, folder, processor, messages_or_video)


def _attention_budget(model, types: torch.Tensor) -> tuple[int, int]:
    """(pairs, pairs of dense causal attention)"""
    module = "nsa_kernels.attention_budget"
    module = importlib.import_module(f".{module}" if __package__ else module, __package__)
    sizes = {name: getattr(model.config, name) for name in ("block_size", "block_counts", "window_size")}
    budget = module.attention_budget(types, **sizes)
    if model.config.nsa_mode == "dense":
        return budget.dense, budget.dense
    return budget.compression + budget.selection + budget.window + budget.text, budget.dense


def attention_settings(model) -> dict[str, Any]:
    """What of a model's configuration decides the numbers in a cache."""
    return {name: getattr(model.config, name) for name in sorted(NSA_FIELDS) if name != "nsa_backend"}


def as_messages(messages_or_video: Any) -> list[dict[str, Any]]:
    """One conversation: the one given, or a user's message of the video given."""
    given = messages_or_video
    if isinstance(given, (list, tuple)) and len(given) == 1 and isinstance(given[0], (list, tuple)):
        if given[0] and isinstance(given[0][0], Mapping):
            given = given[0]  # a batch of one
    if isinstance(given, Mapping) and "role" in given:
        given = [given]
    if isinstance(given, (list, tuple)) and given and all(isinstance(one, Mapping) for one in given):
        return [dict(message) for message in given]
    if isinstance(given, (list, tuple)) and given and isinstance(given[0], (list, tuple)) and given[0]:
        if isinstance(given[0][0], Mapping):
            raise ValueError(f"`messages_or_video` holds {len(given)} conversations; a reading is of one")
    return [{"role": "user", "content": [{"type": "video", "video": given}]}]


def _kind(part: Any) -> str | None:
    """Whether a part of a message is an image or a video."""
    if not isinstance(part, Mapping):
        return None
    kind = part.get("type") or next((name for name in _MEDIA if part.get(name) is not None), None)
    return {"image_url": "image"}.get(kind, kind) if kind in _MEDIA else None


def _split(messages: Sequence[Mapping], media: int | None = None) -> tuple[list[dict], list[dict]]:
    """A conversation up to its last image or video, or so many of them, and all of it, without the media themselves."""
    bare, end, seen = [], None, 0
    for message in messages:
        content = message.get("content")
        if isinstance(content, (list, tuple)):
            parts = []
            for part in content:
                kind = _kind(part)
                parts.append(part if kind is None else {"type": kind})
                seen += kind is not None
                if kind is not None and seen <= (media or seen):
                    end = len(bare), len(parts)
            message = {**message, "content": parts}
        bare.append(dict(message))
    if end is None:
        raise ValueError("`messages_or_video` has neither image nor video to read")
    number, parts = end
    return [*bare[:number], {**bare[number], "content": bare[number]["content"][:parts]}], bare


class _Prompt:
    """A prompt that is opened and not read: its tokens up to the last vision token, and where its pixels come from."""

    def __init__(self, model, processor, messages_or_video: Any, chunk_tokens: int, options: Mapping[str, Any]):
        if not isinstance(chunk_tokens, int) or isinstance(chunk_tokens, bool) or chunk_tokens < 1:
            raise ValueError(f"`chunk_tokens` must be a positive integer, got {chunk_tokens!r}")
        if model.config.nsa_variant == "released" and model.config.nsa_mode == "sparse":
            raise ValueError(
                "`read` goes bit by bit, and with nsa_variant='released' images and videos need their whole prompt in "
                "one call, since its compression looks ahead: use `generate`"
            )
        self.model, self.processor, self.chunk_tokens = model, processor, chunk_tokens
        messages = as_messages(messages_or_video)
        self.base, self.whole = _split(messages)
        self.media = [
            part
            for message in messages
            if isinstance(message.get("content"), (list, tuple))
            for part in message["content"]
            if _kind(part)
        ]
        inputs = processor.apply_chat_template(
            messages,
            tokenize=True,
            add_generation_prompt=True,
            return_dict=True,
            return_tensors="pt",
            return_metadata=True,
            stream_videos=True,
            **options,
        )
        self.text = up_to_media(processor, processor.apply_chat_template(self.whole, tokenize=False))
        self.length = int(inputs["mm_token_type_ids"][0].nonzero()[-1]) + 1
        self.ids, self.types = (inputs[name][0, : self.length] for name in ("input_ids", "mm_token_type_ids"))
        self.image_grid, self.video_grid = (inputs.get(f"{kind}_grid_thw") for kind in ("image", "video"))
        self.pixel_values = inputs.get("pixel_values")
        self.seconds = torch.as_tensor(inputs.get("second_per_grid_ts", [])).tolist()
        self.streams = inputs.get("video_streams", [])
        vision = model.config.vision_config
        self.merge = vision.spatial_merge_size
        positions, _ = mrope_position_ids(
            self.types[None],
            self.image_grid,
            self.video_grid,
            self.seconds if self.streams else None,
            spatial_merge_size=self.merge,
            tokens_per_second=vision.tokens_per_second,
        )
        self.positions = positions  # [3, 1, length]
        check_length(model, int(positions.max()) + 1)

    @property
    def num_frames(self) -> int:
        return sum(len(stream.plan.frame_indices) for stream in self.streams)

    def plan(self) -> ReadingPlan:
        pairs, dense = _attention_budget(self.model, self.types)
        return ReadingPlan(
            videos=tuple(stream.plan for stream in self.streams),
            images=0 if self.image_grid is None else len(self.image_grid),
            seconds=sum(stream.plan.num_frames / stream.plan.fps for stream in self.streams),
            tokens=self.length,
            vision_tokens=int((self.types != 0).sum()),
            attention_pairs=pairs,
            attention_share=pairs / dense,
            chunk_tokens=self.chunk_tokens,
            kept_tokens=self.length,
            memory=estimate_memory(self.model, self.length, chunk_tokens=self.chunk_tokens),
        )

    def spans(self) -> "list[_Span]":
        """Images and videos in the order of their tokens."""
        spans: list[_Span] = []
        grids = {1: iter(self.image_grid.tolist() if self.image_grid is not None else ())}
        grids[2] = iter(self.video_grid.tolist() if self.video_grid is not None else ())
        starts = [0, *((self.types.diff() != 0).nonzero().squeeze(-1) + 1).tolist(), self.length]
        for start, stop in itertools.pairwise(starts):
            kind = int(self.types[start])
            while kind and start < stop:
                grid = next(grids[kind])
                span = _Span(kind, start, grid, self.merge)
                spans.append(span)
                start += span.tokens
        return spans

    def pieces(self) -> "Iterator[_Piece]":
        """Patches of all images and videos in the order of their tokens."""
        streams, patch = iter(self.streams), 0
        for span in self.spans():
            if span.kind == 1:
                count = span.tokens * self.merge**2
                yield _Piece(self.pixel_values[patch : patch + count], torch.tensor([span.grid]), 0, None)
                patch += count
            else:
                yield from stream_pieces(next(streams), span.grid[1:], self.chunk_tokens * self.merge**2)


@dataclass(frozen=True)
class _Span:
    """The tokens of an image (kind 1) or a video (2), from `start` on; grid: in patches."""

    kind: int
    start: int
    grid: list[int]
    merge: int

    @property
    def step_tokens(self) -> int:
        return self.grid[1] * self.grid[2] // self.merge**2

    @property
    def tokens(self) -> int:
        return self.grid[0] * self.step_tokens


@dataclass(frozen=True)
class _Piece:
    """Some temporal steps of a video, or an image.

    Attributes:
        patches: (patches, pixels), float32.
        grid: (1, 3), in patches.
        num_frames: of a video.
        tail: (3, H, W) uint8, where the number of frames is odd: the last, which fills its step alone.
    """

    patches: torch.Tensor
    grid: torch.Tensor
    num_frames: int
    tail: torch.Tensor | None


def stream_pieces(stream, size: Sequence[int], patches: int, before: torch.Tensor | None = None) -> Iterator[_Piece]:
    """A video in pieces of about so many patches.

    Args:
        stream: a `VideoStream`.
        size: height and width of its frames in patches.
        before: (3, H, W), a frame before the first of the stream.
    """
    step = stream.temporal_patch_size
    batch = step * max(1, patches // (size[0] * size[1]))
    parts = stream.frames(batch)
    if before is not None:
        parts = _rebatched(itertools.chain([before[None]], parts), batch)
    for frames in parts:
        rows = stream.cut(frames)
        steps = len(rows) // (size[0] * size[1])
        tail = frames[-1].clone() if len(frames) % step else None
        yield _Piece(rows, torch.tensor([[steps, *size]]), len(frames), tail)


def _rebatched(parts: Iterable[torch.Tensor], batch: int) -> Iterator[torch.Tensor]:
    waiting = None
    for part in parts:
        waiting = part if waiting is None else torch.cat([waiting, part])
        while len(waiting) >= batch:
            yield waiting[:batch]
            waiting = waiting[batch:]
    if waiting is not None and len(waiting):
        yield waiting


class _Ahead:
    """An iterator that a thread goes through, one item ahead of whoever takes them."""

    _END = object()

    def __init__(self, iterator: Iterator):
        self._items: queue.Queue = queue.Queue(maxsize=1)
        self._is_closed = threading.Event()
        self._thread = threading.Thread(target=self._run, args=(iterator,), name="videonsa-decode", daemon=True)
        self._thread.start()

    def _run(self, iterator: Iterator) -> None:
        error = self._END
        try:
            with closing(iterator):
                for item in iterator:
                    if not self._put(item):
                        return
                    del item
        except BaseException as caught:  # whatever it is, it belongs to the thread that waits
            error = caught
        self._put(error)

    def _put(self, item: Any) -> bool:
        while not self._is_closed.is_set():
            try:
                self._items.put(item, timeout=0.1)
                return True
            except queue.Full:
                continue
        return False

    def __iter__(self) -> Iterator:
        while True:
            item = self._items.get()
            if item is self._END:
                return
            if isinstance(item, BaseException):
                raise item
            yield item

    def close(self) -> None:
        """Stop the thread, and wait until it has let go of its files."""
        self._is_closed.set()
        self._thread.join()


def check_length(model, positions: int) -> None:
    limit = model.config.text_config.max_position_embeddings
    if positions > limit:
        raise ValueError(
            f"the prompt reaches position {positions:,}, and the model has positions up to {limit:,} "
            "(`max_position_embeddings`): read fewer seconds, or ask less"
        )


def up_to_media(processor, text: str, media: int | None = None) -> str:
    """A rendered prompt up to its last placeholder, or up to so many of them; all of it where it has none."""
    pattern = "|".join(map(re.escape, (processor.image_token, processor.video_token)))
    ends = [match.end() for match in re.finditer(pattern, text)]
    return text[: ends[(media or len(ends)) - 1]] if ends else text


# One answer or reading at a time on a model, which keeps the positions of the prompt it works on.
_LOCKS: "weakref.WeakKeyDictionary" = weakref.WeakKeyDictionary()
_LOCKS_LOCK = threading.Lock()


class Reading:
    """What a model has read; made by `model.read`.

    Threads may share a reading, and readings of one model: whatever they ask is answered one after the other. (A
    `model.generate` of somebody else at the same time is not kept apart.)

    Attributes:
        model, processor: that read it.
        plan: `ReadingPlan`.
        cache: the key-value cache.
        ids, types: (tokens,), the tokens that were read and said, and 0 for text, 1 for image, 2 for video tokens.
        seconds: of the last video that were read.
    """

    def __init__(self, model, processor, plan: ReadingPlan, prompt: "_Prompt | None", cache):
        self.model, self.processor, self.plan, self.cache = model, processor, plan, cache
        self.settings, self._weights = attention_settings(model), _versions(model)
        self.ids = torch.empty(0, dtype=torch.long)
        self.types = torch.empty(0, dtype=torch.long)
        self._cache_types = self.types  # of the entries of the cache, of which there may be fewer
        self.next_position = 0
        self.video: _OpenVideo | None = None
        if prompt is not None:
            self.text, self.base, self.whole = prompt.text, prompt.base, prompt.whole
            self.media = [media_fingerprint(part) for part in prompt.media]
        self._said: list[dict] | None = None  # the conversation that `ask(keep=True)` went on with
        self._pending: list[int] = []  # its last tokens, if they are not in the cache
        self._before_turns: tuple | None = None
        self._is_busy = self._is_broken = False

    @property
    def num_tokens(self) -> int:
        """Tokens that were read and said."""
        return len(self.ids)

    @property
    def seconds(self) -> float:
        return 0.0 if self.video is None else self.video.steps * self.video.seconds_per_step

    def __repr__(self) -> str:
        return f"Reading({self.num_tokens:,} tokens, {self.cache.get_seq_length():,} in the cache)"

    def ask(
        self,
        question: Any = None,
        *,
        keep: bool = False,
        streamer=None,
        max_new_tokens: int = 256,
        **generation,
    ) -> Answer:
        """Answer a question about what was read.

        Args:
            question: a text; or a list of text parts; or a whole conversation that begins with what was read; or
                nothing, for what the prompt itself asked.
            keep: go on from this turn: later questions see it and its answer, until `forget()`.
            streamer: of transformers, gets tokens as they come.
            max_new_tokens, generation: of `model.generate`; what its generation config does not say is greedy.
        Raises:
            ValueError: nothing is asked; something new is shown (`extend` takes footage); a setting of the model, its
                weights or its device are not those of the reading; more than one answer is asked for.

        After an error, and after Ctrl-C, the reading is as it was before.
        """
        start = time.perf_counter()
        for name in ("num_beams", "num_return_sequences"):
            if generation.get(name) not in (None, 1):
                raise ValueError(f"`{name}` = {generation[name]!r}: a reading gives one answer at a time")
        with self._exclusive():
            messages, text, rest = self._continue(question)
            state = state_of(self.cache)
            is_kept = False
            try:
                inputs = self._inputs(rest)
                if generation.get("stop_strings"):
                    generation.setdefault("tokenizer", self.processor.tokenizer)
                rows = self.model.generate(**inputs, max_new_tokens=max_new_tokens, streamer=streamer, **generation)
                if not isinstance(rows, torch.Tensor):
                    raise ValueError("`return_dict_in_generate` = True: use `reading.prompt` with `model.generate`")
                new = rows[0, inputs["input_ids"].shape[1] :].tolist()
                answer = self.processor.tokenizer.decode(new, skip_special_tokens=True)
                if keep:
                    self._keep(messages, text, rest, new, answer, state)
                    is_kept = True
            finally:
                if not is_kept:
                    restore_(self.cache, state)
        return Answer(answer, tuple(new), len(rest), time.perf_counter() - start)

    @contextmanager
    def prompt(self, question: Any = None) -> Iterator[dict[str, Any]]:
        """Inside, keywords for `model.generate` or `model` to go on from the cache with a question.

        Args:
            question: as in `ask`.
        Returns:
            `input_ids` and `attention_mask` (1, length), those of the cache included, and the cache.
        """
        with self._exclusive():
            _, _, rest = self._continue(question)
            state = state_of(self.cache)
            try:
                yield self._inputs(rest)
            finally:
                restore_(self.cache, state)

    def forget(self) -> None:
        """Go back to before the first question that was kept."""
        with self._exclusive():
            if self._before_turns is not None:
                state, self.text, length, self.next_position = self._before_turns
                restore_(self.cache, state)
                self.ids, self.types = self.ids[:length], self.types[:length]
                self._cache_types = self._cache_types[: self.cache.get_seq_length()]
                self._said, self._pending, self._before_turns = None, [], None

    def extend(
        self,
        video: Any,
        *,
        chunk_tokens: int | None = None,
        progress: bool = True,
        callback: Callable[[ReadingProgress], Any] | None = None,
    ) -> None:
        """Read on: footage that follows the last video where it ended, as from a camera.

        Frames are brought to the size of that video. Files, and frames with `video_metadata`, are sampled at its rate;
        other frames are taken as sampled at it.

        Args:
            video: as a video of `read`.
            chunk_tokens, progress, callback: as in `read`; the first is that of `read` where it is not given.
        Raises:
            ValueError: nothing to go on from: the reading ends with an image, or with a conversation (`forget()` ends
                it); the footage cannot be read. What was read of it until then stays.
        """
        with self._exclusive():
            if self.video is None:
                raise ValueError("the reading ends with an image: there is no video to extend")
            if self._said is not None:
                raise ValueError("the reading ends with a conversation that was kept: `forget()` it, then extend")
            open_video, chunk = self.video, chunk_tokens or self.plan.chunk_tokens
            stream = open_video.stream(self.processor, video)
            before = open_video.tail
            frames = len(stream.plan.frame_indices) + (before is not None)
            steps = -(-frames // stream.temporal_patch_size)
            first = open_video.steps - (before is not None)
            tokens = open_video.step_tokens(self.model.config.vision_config.spatial_merge_size)
            check_length(self.model, int(open_video.positions(self.model, 0, first + steps).max()) + 1)
            if before is not None:
                self._cut(self.num_tokens - tokens)
                open_video.steps, open_video.tail = first, None
            ids = torch.full((steps * tokens,), self.model.config.video_token_id)
            positions = open_video.positions(self.model, first, first + steps)
            merge = self.model.config.vision_config.spatial_merge_size**2
            report = _Reporter(frames, len(ids), progress, callback)
            pieces = stream_pieces(stream, open_video.size, chunk * merge, before)
            start = self.num_tokens
            try:
                self._prefill(ids, torch.full_like(ids, 2), positions, pieces, chunk, report)
            finally:
                whole = (self.num_tokens - start) // tokens
                self._cut(start + whole * tokens)
                open_video.steps = first + whole
                if whole == steps:
                    open_video.tail = self._tail

    def save(self, folder: str | os.PathLike, *, overwrite: bool = False) -> None:
        """Keep the reading on disk; `model.load_reading(folder)` brings it back, next week or on another machine.

        The folder holds `cache.safetensors` and `reading.json`, and appears when both are whole.

        Args:
            folder: to be made.
            overwrite: replace a folder that `save` made before.
        Raises:
            ValueError: the folder exists, or the cache is one of transformers' that cannot be saved.
        """
        with self._exclusive():
            save_reading(self, folder, overwrite)

    # What follows is done under the model's lock.

    @contextmanager
    def _exclusive(self) -> Iterator[None]:
        with _LOCKS_LOCK:
            lock = _LOCKS.setdefault(self.model, threading.RLock())
        with lock:
            if self._is_busy:
                raise ValueError("the reading is in use: it was called from its own callback or streamer")
            self._is_busy = True
            try:
                self._check_unchanged()
                yield
            finally:
                self._is_busy = False

    def _check_unchanged(self) -> None:
        now = attention_settings(self.model)
        for name, value in self.settings.items():
            if now[name] != value:
                raise ValueError(
                    f"model.config.{name} is {now[name]!r}, and this was read with {value!r}: set it back, or read anew"
                )
        if _versions(self.model) != self._weights:
            raise ValueError("the model's weights have changed since this was read: read anew")
        if isinstance(self.cache, RoomyCache):
            layers = self.model.model.language_model.layers
            for index, (own, layer) in enumerate(zip(self.cache.layers, layers, strict=True)):
                device = next(layer.parameters()).device
                if own.keys is not None and device.type != "meta" and own.keys.device != device:
                    raise ValueError(
                        f"the reading's layer {index} is on {own.keys.device}, and the model's on {device}: move the "
                        "model back, or save the reading and load it again"
                    )

    def _continue(self, question: Any) -> tuple[list[dict], str, list[int]]:
        """(the conversation with this question, its text, its token ids from the end of the cache on)"""
        messages = self._conversation(question)
        text = self.processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        if not text.startswith(self.text):
            raise ValueError(f"the prompt {text[:200]!r} does not begin with what was read, {self.text[-200:]!r}")
        rest = text[len(self.text) :]
        for token in (self.processor.image_token, self.processor.video_token):
            if token in rest:
                raise ValueError(f"`question` shows something new, {token}: `extend` takes footage, `read` anything")
        # A special token ends what was read, so that the rest is tokenised as it would be in place.
        return messages, text, self._pending + self.processor.tokenizer(rest, add_special_tokens=False)["input_ids"]

    def _conversation(self, question: Any) -> list[dict]:
        if question is None:
            if self._said is not None or self.whole == self.base:
                raise ValueError("`question` is missing: the prompt that was read asks nothing itself")
            return self.whole
        if isinstance(question, str):
            question = [{"type": "text", "text": question}]
        if not isinstance(question, (list, tuple)) or not question:
            raise ValueError(f"`question` must be a text, parts of a message, or a conversation, got {question!r}")
        if all(isinstance(part, Mapping) and "role" in part for part in question):
            return _split(question)[1]
        if any(_kind(part) for part in question):
            raise ValueError("`question` shows an image or a video: `extend` takes footage, `read` anything")
        if self._said is not None:
            return [*self._said, {"role": "user", "content": list(question)}]
        *before, last = self.base
        return [*before, {**last, "content": [*last["content"], *question]}]

    def _inputs(self, rest: Sequence[int]) -> dict[str, Any]:
        check_length(self.model, self.next_position + len(rest))
        device, length = self.model.get_input_embeddings().weight.device, self.cache.get_seq_length()
        # Positions are counted from the cache's length, which a budget may have made smaller.
        delta = self.next_position - length
        self.cache.mrope_deltas = torch.tensor([[delta]], device=device)
        ids = torch.cat([self._ids_in_cache(length), torch.tensor(rest, dtype=torch.long)])[None].to(device)
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "past_key_values": self.cache}

    def _ids_in_cache(self, length: int) -> torch.Tensor:
        """Token ids for the entries of the cache, which only repetition penalties look at."""
        if length == len(self.ids):
            return self.ids
        order = torch.cat([(self.types == 0).nonzero(), (self.types != 0).nonzero()]).squeeze(-1)
        return self.ids[order[:length].sort().values]

    def _keep(self, messages, text, rest, new, answer, state) -> None:
        """Go on from an answer."""
        if self._before_turns is None:
            self._before_turns = state, self.text, len(self.ids), self.next_position
        said = [*rest, *new][: self.cache.get_seq_length() - len(self._cache_types)]
        ends = self.model.generation_config.eos_token_id
        ends = ends if isinstance(ends, (list, tuple)) else [ends]
        self._pending = [token for token in [*rest, *new][len(said) :] if token not in ends]
        self._append(torch.tensor(said), torch.zeros(len(said), dtype=torch.long))
        self.next_position += len(said)
        self.text = text + answer
        self._said = [*messages, {"role": "assistant", "content": [{"type": "text", "text": answer}]}]

    def _append(self, ids: torch.Tensor, types: torch.Tensor) -> None:
        self.ids, self.types = torch.cat([self.ids, ids]), torch.cat([self.types, types])
        self._cache_types = torch.cat([self._cache_types, types])

    def _read(self, prompt: _Prompt, progress: bool, callback) -> None:
        report = _Reporter(prompt.num_frames, prompt.length, progress, callback)
        with self._exclusive():
            try:
                self._prefill(prompt.ids, prompt.types, prompt.positions, prompt.pieces(), prompt.chunk_tokens, report)
            except BaseException as error:
                if self._keep_whole_media(prompt):
                    error.reading = self
                    if isinstance(error, ValueError):
                        text = f"{error}; read until second {self.seconds:.2f}, see the error's `reading`"
                        error.args = (text, *error.args[1:])
                raise
            self._open_last(prompt)

    def _keep_whole_media(self, prompt: _Prompt) -> bool:
        """After an interruption, drop images and steps of a video that were read in part; whether anything is left."""
        whole, end = [], 0
        for span in prompt.spans():
            done = min(span.tokens, self.num_tokens - span.start)
            done -= done % (span.tokens if span.kind == 1 else span.step_tokens)
            if done > 0:
                whole.append(span)
                end = span.start + done
        if not whole or self._is_broken:
            return False
        self._cut(end)
        self.text = up_to_media(self.processor, self.text, len(whole))
        self.base, _ = _split(self.whole, len(whole))
        self.whole = self.base
        self._open_last(prompt)
        return True

    def _open_last(self, prompt: _Prompt) -> None:
        """Remember the last video that was read, so that it can be extended."""
        videos = [span for span in prompt.spans() if span.kind == 2 and span.start < self.num_tokens]
        if self.types[-1] != 2 or (self.num_tokens - videos[-1].start) % videos[-1].step_tokens:
            return
        span, number = videos[-1], len(videos) - 1
        plan = prompt.streams[number].plan
        steps = (self.num_tokens - span.start) // span.step_tokens
        self.video = _OpenVideo(
            start=int(prompt.positions[0, 0, span.start]),
            size=tuple(span.grid[1:]),
            height=plan.height,
            width=plan.width,
            steps=steps,
            seconds_per_step=prompt.seconds[number],
            fps=plan.fps,
            tail=self._tail if steps == span.grid[0] else None,
        )

    def _prefill(self, ids, types, positions, pieces: Iterator[_Piece], chunk_tokens: int, report: "_Reporter") -> None:
        """Run the model over new tokens. After an error, what came before the chunk that failed is there.

        Args:
            ids, types: (tokens,); positions: (3, 1, tokens).
            pieces: of their images and videos.
        """
        device = self.model.get_input_embeddings().weight.device
        self._tail = None
        ahead = _Ahead(pieces)
        with closing(ahead), closing(report), torch.no_grad():
            arriving, features = iter(ahead), None
            for start in range(0, len(ids), chunk_tokens):
                part = slice(start, start + chunk_tokens)
                embeds = self.model.get_input_embeddings()(ids[None, part].to(device))
                is_vision = types[part] != 0
                needed, frames = int(is_vision.sum()), 0
                while needed > (0 if features is None else len(features)):
                    piece = next(arriving)
                    encoded = self._encode(piece)
                    features = encoded if features is None else torch.cat([features, encoded])
                    frames, self._tail = frames + piece.num_frames, piece.tail
                if needed:
                    embeds[0, is_vision.to(device)] = features[:needed].to(embeds)
                    features = features[needed:]
                self._run(embeds, positions[:, :, part], types[part])
                self._append(ids[part], types[part])
                self.next_position = max(self.next_position, int(positions[:, :, part].max()) + 1)
                report(frames, len(types[part]))

    def _encode(self, piece: _Piece) -> torch.Tensor:
        """(tokens, hidden_size)"""
        tower = self.model.model.visual
        device = next(tower.parameters()).device
        outputs = self.model.model.get_video_features(piece.patches.to(device), piece.grid.to(device), return_dict=True)
        return torch.cat(outputs.pooler_output)

    def _run(self, embeds: torch.Tensor, positions: torch.Tensor, types: torch.Tensor) -> None:
        state = state_of(self.cache) if isinstance(self.cache, RoomyCache) else None
        length = self.cache.get_seq_length()
        self.cache.mrope_deltas = torch.zeros(1, 1, dtype=torch.long, device=embeds.device)
        try:
            self.model.model(
                inputs_embeds=embeds,
                position_ids=positions.to(embeds.device),
                mm_token_type_ids=torch.cat([self._cache_types, types])[None].to(embeds.device),
                past_key_values=self.cache,
                use_cache=True,
            )
        except BaseException:
            self._is_broken = state is None and not _crop_(self.cache, length)
            if state is not None:
                restore_(self.cache, state)
            raise

    def _cut(self, length: int) -> None:
        """Forget the tokens from `length` on, where the cache has them as they came."""
        if length < self.num_tokens == len(self._cache_types):
            if not _crop_(self.cache, length):
                raise ValueError(f"{type(self.cache).__name__} cannot be cut to {length} of its {self.num_tokens} tokens")
            self.ids, self.types = self.ids[:length], self.types[:length]
            self._cache_types = self._cache_types[:length]


@dataclass
class _OpenVideo:
    """The video that a reading ends with.

    Attributes:
        start: temporal position of its first step.
        size: height and width of its frames in patches; height, width: in pixels.
        steps: that were read; seconds_per_step: between them.
        fps: frames per second.
        tail: (3, H, W) uint8, the last frame, where it fills its step alone.
    """

    start: int
    size: tuple[int, int]
    height: int
    width: int
    steps: int
    seconds_per_step: float
    fps: float
    tail: torch.Tensor | None

    def step_tokens(self, merge: int) -> int:
        return self.size[0] * self.size[1] // merge**2

    def positions(self, model, first: int, last: int) -> torch.Tensor:
        """M-RoPE positions of its steps `first` to `last` - 1, (3, 1, tokens)."""
        vision = model.config.vision_config
        tokens = self.step_tokens(vision.spatial_merge_size)
        positions, _ = mrope_position_ids(
            torch.full((1, last * tokens), 2),
            video_grid_thw=torch.tensor([[last, *self.size]]),
            second_per_grid_ts=[self.seconds_per_step],
            spatial_merge_size=vision.spatial_merge_size,
            tokens_per_second=vision.tokens_per_second,
        )
        return positions[:, :, first * tokens :] + self.start

    def stream(self, processor, video: Any):
        """A `VideoStream` of footage in the size and at the rate of this video."""
        pixels = self.height * self.width
        size = {"resized_height": self.height, "resized_width": self.width}
        content = [{"type": "video", "video": video, "fps": self.fps, **size}]
        inputs = processor.apply_chat_template(
            [{"role": "user", "content": content}],
            tokenize=True,
            return_dict=True,
            stream_videos=True,
            min_pixels_per_frame=pixels,
            max_pixels_per_frame=pixels,
            max_total_tokens=1 << 40,
        )
        return inputs["video_streams"][0]


def _crop_(cache, length: int) -> bool:
    """Cut every layer of a cache to a length; whether that could be done."""
    added = [layer.get_seq_length() - length for layer in cache.layers]
    if any(number > 0 and not hasattr(layer, "crop") for number, layer in zip(added, cache.layers, strict=True)):
        return False
    for number, layer in zip(added, cache.layers, strict=True):
        if number > 0:
            layer.crop(-number)
    return all(layer.get_seq_length() <= length for layer in cache.layers)


def _versions(model) -> tuple:
    """Changes when a weight does: torch counts writes to a tensor, except to those of inference mode."""
    return tuple((id(one), 0 if one.is_inference() else one._version) for one in model.parameters())


class _Reporter:
    """Progress of a reading: a bar, which appears after two seconds, and a callback."""

    def __init__(self, frames: int, tokens: int, progress: bool, callback):
        self._frames, self._tokens, self._callback = [0, frames], [0, tokens], callback
        self._start = time.perf_counter()
        self._bar = tqdm(total=tokens, desc="Reading", unit=" tokens", unit_scale=True, delay=2, disable=not progress)

    def __call__(self, frames: int, tokens: int) -> None:
        self._frames[0] += frames
        self._tokens[0] += tokens
        self._bar.update(tokens)
        if self._callback is not None:
            seconds = time.perf_counter() - self._start
            done, total = self._tokens
            self._callback(ReadingProgress(*self._frames, done, total, seconds, seconds / done * (total - done)))

    def close(self) -> None:
        self._bar.close()
