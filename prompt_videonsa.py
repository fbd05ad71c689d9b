"""A prompt that is opened and not read: its tokens, and the images and videos in it piece by piece.

`reading_videonsa.py` runs the model over them.
"""

import itertools
import queue
import re
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch

try:
    from .attention_budget_videonsa import attention_budget
    from .budget_videonsa import VideoPlan
    from .memory_videonsa import MemoryEstimate, estimate_memory
    from .positions_videonsa import mrope_position_ids
except ImportError:  # `import modeling_videonsa` from a checkout, without a package
    if __package__:
        raise
    from attention_budget_videonsa import attention_budget
    from budget_videonsa import VideoPlan
    from memory_videonsa import MemoryEstimate, estimate_memory
    from positions_videonsa import mrope_position_ids

_MEDIA = ("image", "image_url", "video")
# Keywords of `apply_chat_template` that a reading needs as it gives them, now and for each question.
_OWN_KEYWORDS = {
    "add_generation_prompt",
    "add_vision_id",
    "chat_template",
    "continue_final_message",
    "conversation",
    "documents",
    "return_dict",
    "return_metadata",
    "return_tensors",
    "stream_videos",
    "tokenize",
    "tools",
}
# Options that choose frames and their size; others say how they are prepared.
_SAMPLING = {
    "do_sample_frames",
    "fps",
    "max_frames",
    "max_pixels",
    "max_pixels_per_frame",
    "max_total_tokens",
    "min_pixels",
    "min_pixels_per_frame",
    "num_frames",
    "size",
    "video_metadata",
}
# A chunk is prepared and encoded in so many pieces: smaller ones take less memory, and are as fast.
PIECES_PER_CHUNK = 4


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
        cached_tokens: tokens that it holds at most while it is read.
        memory: bytes of weights, of the cache, and of what is worked on (`MemoryEstimate`).
    """

    videos: tuple[VideoPlan, ...]
    images: int
    seconds: float
    tokens: int
    vision_tokens: int
    attention_pairs: int
    attention_share: float
    chunk_tokens: int
    kept_tokens: int
    cached_tokens: int
    memory: MemoryEstimate

    def to_dict(self) -> dict[str, Any]:
        """Numbers, texts, lists and dicts."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "ReadingPlan":
        videos = tuple(
            VideoPlan(**video | {"frame_indices": tuple(video["frame_indices"]), "notes": tuple(video["notes"])})
            for video in values["videos"]
        )
        return cls(**values | {"videos": videos, "memory": MemoryEstimate(**values["memory"])})

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


class Prompt:
    """A prompt that is opened and not read: its tokens up to the last vision token, and where its pixels come from."""

    def __init__(self, model, processor, messages_or_video: Any, chunk_tokens: int, options: Mapping[str, Any]):
        check_chunk(chunk_tokens)
        check_mode(model)
        for name in _OWN_KEYWORDS & options.keys():
            raise ValueError(f"`{name}` = {options[name]!r} is no option of a reading, which sets it itself")
        self.preparation = sorted(options.keys() - _SAMPLING)
        if model.config.nsa_variant == "released" and model.config.nsa_mode == "sparse":
            raise ValueError(
                "`read` goes bit by bit, and with nsa_variant='released' images and videos need their whole prompt in "
                "one call, since its compression looks ahead: use `generate`"
            )
        self.model, self.processor, self.chunk_tokens = model, processor, chunk_tokens
        messages = as_messages(messages_or_video)
        self.base, self.whole = split(messages)
        self.media = media_of(messages)
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

    @cached_property
    def frames(self) -> list[tuple[int, int]]:
        """(height, width) in tokens of every image and every step of a video, in order."""
        grids = (span.grid for span in self.spans)
        return [(height // self.merge, width // self.merge) for steps, height, width in grids for _ in range(steps)]

    def plan(self, method) -> ReadingPlan:
        """With the method that keeps the cache to its budget (`KvMethod`)."""
        entries = min(self.length, method.entries)
        largest = max((height * width for height, width in self.frames), default=0)
        # One method compresses while it reads; a frame that was read in part waits.
        cached = min(self.length, entries + self.chunk_tokens + largest) if method.keeps_while_reading else self.length
        pairs, dense = _attention_pairs(self.model, self.types)
        return ReadingPlan(
            videos=tuple(stream.plan for stream in self.streams),
            images=0 if self.image_grid is None else len(self.image_grid),
            seconds=sum(stream.plan.num_frames / stream.plan.fps for stream in self.streams),
            tokens=self.length,
            vision_tokens=int((self.types != 0).sum()),
            attention_pairs=pairs,
            attention_share=pairs / dense,
            chunk_tokens=self.chunk_tokens,
            kept_tokens=entries,
            cached_tokens=cached,
            memory=estimate_memory(
                self.model.config,
                cached,
                chunk_tokens=self.chunk_tokens,
                step_tokens=largest,
                is_one_run=int((self.types != 0).int().diff(prepend=torch.zeros(1)).eq(1).sum()) == 1,
                itemsize=self.model.dtype.itemsize,
                weights=sum(one.numel() * one.element_size() for one in self.model.parameters()),
            ),
        )

    @cached_property
    def spans(self) -> "list[Span]":
        """Images and videos in the order of their tokens."""
        spans: list[Span] = []
        grids = {1: iter(self.image_grid.tolist() if self.image_grid is not None else ())}
        grids[2] = iter(self.video_grid.tolist() if self.video_grid is not None else ())
        starts = [0, *((self.types.diff() != 0).nonzero().squeeze(-1) + 1).tolist(), self.length]
        for start, stop in itertools.pairwise(starts):
            kind = int(self.types[start])
            while kind and start < stop:
                grid = next(grids[kind])
                span = Span(kind, start, grid, self.merge)
                spans.append(span)
                start += span.tokens
        return spans

    def pieces(self) -> "Iterator[Piece]":
        """Patches of all images and videos in the order of their tokens."""
        streams, patch = iter(self.streams), 0
        for span in self.spans:
            if span.kind == 1:
                count = span.tokens * self.merge**2
                yield Piece(self.pixel_values[patch : patch + count], torch.tensor([span.grid]), 0, None)
                patch += count
            else:
                yield from stream_pieces(next(streams), span.grid[1:], self.chunk_tokens * self.merge**2)


@dataclass(frozen=True)
class Span:
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
class Piece:
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


def stream_pieces(stream, size: Sequence[int], patches: int, before: torch.Tensor | None = None) -> Iterator[Piece]:
    """A video in pieces, `PIECES_PER_CHUNK` of which have about so many patches as a chunk.

    Args:
        stream: a `VideoStream`.
        size: height and width of its frames in patches.
        patches: in a chunk.
        before: (3, H, W), a frame before the first of the stream.
    """
    step = stream.temporal_patch_size
    batch = step * max(1, patches // PIECES_PER_CHUNK // (size[0] * size[1]))
    parts = stream.frames(batch)
    if before is not None:
        parts = _rebatched(itertools.chain([before[None]], parts), batch)
    for frames in parts:
        rows = stream.cut(frames)
        steps = len(rows) // (size[0] * size[1])
        tail = frames[-1].clone() if len(frames) % step else None
        yield Piece(rows, torch.tensor([[steps, *size]]), len(frames), tail)


def _rebatched(parts: Iterable[torch.Tensor], batch: int) -> Iterator[torch.Tensor]:
    waiting = None
    for part in parts:
        waiting = part if waiting is None else torch.cat([waiting, part])
        while len(waiting) >= batch:
            yield waiting[:batch]
            waiting = waiting[batch:]
    if waiting is not None and len(waiting):
        yield waiting


@dataclass
class OpenVideo:
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

    def next_position(self, model, steps: int) -> int:
        """Of text behind so many of its steps."""
        return int(self.positions(model, 0, steps).max()) + 1 if steps else self.start

    def stream(self, processor, video: Any):
        """A `VideoStream` of footage in the size and at the rate of this video."""
        part = {"type": "video", "video": video}
        return open_stream(processor, part, self.height, self.width, self.fps)


def open_stream(processor, part: Mapping[str, Any], height: int, width: int, fps: float):
    """A `VideoStream` of a part of a conversation, in this size and at this rate, whatever it takes."""
    pixels = height * width
    content = [{**part, "fps": fps, "resized_height": height, "resized_width": width}]
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


class Ahead:
    """An iterator that a thread goes through, a chunk ahead of whoever takes its pieces."""

    _END = object()

    def __init__(self, iterator: Iterator):
        self._items: queue.Queue = queue.Queue(maxsize=PIECES_PER_CHUNK)
        self._is_closed, self._is_started = threading.Event(), threading.Event()
        threads = torch.get_num_threads()
        self._thread = threading.Thread(target=self._run, args=(iterator,), name="videonsa-decode", daemon=True)
        self._thread.start()
        # Two pools of threads would take the cores away from one another, waiting in loops: that thread has none. But
        # what it sets is also what threads get that start later.
        self._is_started.wait()
        torch.set_num_threads(threads)

    def _run(self, iterator: Iterator) -> None:
        error = self._END
        torch.get_num_threads()  # lets this thread take over the default, once
        torch.set_num_threads(1)
        self._is_started.set()
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


def as_messages(messages_or_video: Any) -> list[dict[str, Any]]:
    """One conversation: the one given, or a user's message of the video given."""
    given = messages_or_video
    if isinstance(given, np.ndarray) and given.dtype == object:
        given = given.tolist()
    if isinstance(given, Mapping) and "role" not in given and kind_of(given):
        given = [given]
    if isinstance(given, (list, tuple)) and given and all(isinstance(one, Mapping) for one in given):
        is_parts = any(map(kind_of, given)) and not any("role" in one for one in given)
        return [{"role": "user", "content": list(given)}] if is_parts else [dict(message) for message in given]
    if isinstance(given, (list, tuple)) and given and isinstance(given[0], (list, tuple)) and given[0]:
        if isinstance(given[0][0], Mapping) and len(given) > 1:
            raise ValueError(f"`messages_or_video` holds {len(given)} conversations; a reading is of one")
        given = given[0] if isinstance(given[0][0], Mapping) else given
    if isinstance(given, Mapping) and "role" in given:
        given = [given]
    if isinstance(given, (list, tuple)) and given and all(isinstance(one, Mapping) for one in given):
        return [dict(message) for message in given]
    return [{"role": "user", "content": [{"type": "video", "video": given}]}]


def media_of(messages: Sequence[Mapping]) -> list[Mapping[str, Any]]:
    """The parts of a conversation that are images or videos."""
    contents = (message.get("content") for message in messages)
    parts = [part for content in contents if isinstance(content, (list, tuple)) for part in content]
    return [part for part in parts if kind_of(part)]


def kind_of(part: Any) -> str | None:
    """Whether a part of a message is an image or a video."""
    if not isinstance(part, Mapping):
        return None
    kind = part.get("type") or next((name for name in _MEDIA if part.get(name) is not None), None)
    return {"image_url": "image"}.get(kind, kind) if kind in _MEDIA else None


def split(messages: Sequence[Mapping], media: int | None = None) -> tuple[list[dict], list[dict]]:
    """A conversation up to its last image or video, or so many of them, and all of it, without the media themselves."""
    bare, end, seen = [], None, 0
    for message in messages:
        content = message.get("content")
        if isinstance(content, (list, tuple)):
            parts = []
            for part in content:
                kind = kind_of(part)
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


def up_to_media(processor, text: str, media: int | None = None) -> str:
    """A rendered prompt up to its last placeholder, or up to so many of them; all of it where it has none."""
    pattern = "|".join(map(re.escape, (processor.image_token, processor.video_token)))
    ends = [match.end() for match in re.finditer(pattern, text)]
    return text[: ends[(media or len(ends)) - 1]] if ends else text


def check_chunk(chunk_tokens: Any) -> None:
    if not isinstance(chunk_tokens, int) or isinstance(chunk_tokens, bool) or chunk_tokens < 1:
        raise ValueError(f"`chunk_tokens` must be a positive integer, got {chunk_tokens!r}")


def check_mode(model) -> None:
    names = ("is_activation_checkpointing", "is_gradient_checkpointing")  # the second is the older name
    name = next((name for name in names if hasattr(type(model), name)), None)
    if model.training and name and getattr(model, name):
        raise ValueError("a model that trains with gradient checkpointing keeps no cache: call `model.eval()` first")


def check_length(model, positions: int) -> None:
    limit = model.config.text_config.max_position_embeddings
    if positions > limit:
        raise ValueError(
            f"the prompt reaches position {positions:,}, and the model has positions up to {limit:,} "
            "(`max_position_embeddings`): read fewer seconds, or ask less"
        )


def _attention_pairs(model, types: torch.Tensor) -> tuple[int, int]:
    """(pairs, pairs of dense causal attention)"""
    sizes = {name: getattr(model.config, name) for name in ("block_size", "block_counts", "window_size")}
    budget = attention_budget(types, **sizes)
    if model.config.nsa_mode == "dense":
        return budget.dense, budget.dense
    return budget.compression + budget.selection + budget.window + budget.text, budget.dense
