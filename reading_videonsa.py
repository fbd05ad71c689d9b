"""A long video, read once in bounded memory, and asked as often as one likes.

`model.read(processor, "film.mp4", fps=1)` goes through the video bit by bit: a thread decodes frames and cuts patches
while the model encodes those before and runs its decoder layers over them. Nothing grows with the video but the
key-value cache. `reading.ask("...")` answers from that cache, again and again; `extend` adds footage to it, and `save`
keeps it (`reading_files_videonsa.py`).

The cache holds the prompt up to its last vision token. What ends the video and asks the question is fed by `ask`, and
taken back after the answer; so footage that arrives later continues the video where it ended. Answers are those of
`generate` with the whole prompt: vision tokens see only vision tokens before them, and text all tokens before it,
however a prompt is cut into chunks.
"""

import copy
import json
import os
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

try:
    from .cache_videonsa import SPARE_TOKENS, RoomyCache, restore_, restored_after, state_of
    from .configuration_videonsa import NSA_FIELDS
    from .evidence_videonsa import Evidence, check_evidence, evidence_observer
    from .footage_videonsa import Footage, ReadVideo, videos_of
    from .generation_videonsa import CACHE_NAME
    from .kv_budget_videonsa import KvMethod, budget_method
    from .prefill_videonsa import Prefilled, ReadingProgress, Reporter, crop_
    from .prompt_videonsa import (
        OpenVideo,
        Prompt,
        ReadingPlan,
        check_chunk,
        check_length,
        check_mode,
        kind_of,
        media_of,
        split,
        stream_pieces,
        up_to_media,
    )
    from .reading_files_videonsa import load_reading, media_fingerprint, save_reading
except ImportError:  # `import modeling_videonsa` from a checkout, without a package
    if __package__:
        raise
    from cache_videonsa import SPARE_TOKENS, RoomyCache, restore_, restored_after, state_of
    from configuration_videonsa import NSA_FIELDS
    from evidence_videonsa import Evidence, check_evidence, evidence_observer
    from footage_videonsa import Footage, ReadVideo, videos_of
    from generation_videonsa import CACHE_NAME
    from kv_budget_videonsa import KvMethod, budget_method
    from prefill_videonsa import Prefilled, ReadingProgress, Reporter, crop_
    from prompt_videonsa import (
        OpenVideo,
        Prompt,
        ReadingPlan,
        check_chunk,
        check_length,
        check_mode,
        kind_of,
        media_of,
        split,
        stream_pieces,
        up_to_media,
    )
    from reading_files_videonsa import load_reading, media_fingerprint, save_reading

CHUNK_TOKENS = 1024


@dataclass(frozen=True)
class Answer:
    """What the model said.

    Attributes:
        text: without special tokens.
        token_ids: as generated.
        prompt_tokens: tokens that were fed for it: the question, not the video.
        seconds: it took.
        evidence: where the model looked for it, where that was asked for.
    """

    text: str
    token_ids: tuple[int, ...] = field(repr=False)
    prompt_tokens: int
    seconds: float
    evidence: Evidence | None = field(default=None, repr=False, compare=False)

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
        kv_budget: float | int | None = None,
        kv_method: str | None = None,
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
            kv_budget: what the cache keeps of the prompt, a share (0.12) or a number of tokens for each layer.
            kv_method: which tokens these are: "pyramidkv" (the default), "snapkv", "streamingllm" or "infinipot-v"
                (`kv_budget_videonsa.py`). The last keeps to the budget while it reads, the others after it.
            cache: an empty cache of transformers' to use, such as a `QuantizedCache`.
            progress: show a progress bar where it takes longer than two seconds.
            callback: called after each chunk with a `ReadingProgress`. To stop, it raises an error.
            options: of the processor: `fps`, `num_frames`, `max_frames`, `max_pixels_per_frame`, and so on.
        Returns:
            the `Reading`.
        Raises:
            ValueError: bad options; no image or video; a video that cannot be read; a prompt longer than the model's
                positions; a model with nsa_variant="released", which reads prompts whole.

        Whatever stops it on the way (an error in a file, Ctrl-C, the callback), the exception has what was read until
        then as its attribute `reading`, if that is anything.
        """
        prompt = Prompt(self, processor, messages_or_video, chunk_tokens, options)
        method = _method(self, prompt, kv_budget, kv_method, cache)
        plan = prompt.plan(method)
        if cache is None:
            cache = RoomyCache(self.config.text_config.num_hidden_layers, plan.cached_tokens + SPARE_TOKENS)
        elif cache.get_seq_length() or cache.is_compileable:
            raise ValueError(f"`cache` must be empty and grow, got {type(cache).__name__} of {cache.get_seq_length()}")
        reading = Reading(self, processor, plan, prompt, cache, method)
        reading._read(prompt, progress, callback)
        return reading

    def plan_reading(
        self,
        processor,
        messages_or_video: Any,
        *,
        chunk_tokens: int = CHUNK_TOKENS,
        kv_budget: float | int | None = None,
        kv_method: str | None = None,
        **options,
    ) -> ReadingPlan:
        """What `read` with these arguments would do. Of video files, packets are listed and one frame is decoded."""
        prompt = Prompt(self, processor, messages_or_video, chunk_tokens, options)
        return prompt.plan(_method(self, prompt, kv_budget, kv_method, None))

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


def _method(model, prompt: Prompt, kv_budget, kv_method, cache) -> KvMethod:
    """The method that keeps a prompt to its budget; the one that keeps everything where there is none."""
    num_layers = model.config.text_config.num_hidden_layers
    if kv_budget is not None and cache is not None:
        raise ValueError(f"`kv_budget` = {kv_budget!r} goes without `cache` = {type(cache).__name__}")
    method = budget_method(kv_budget, kv_method, num_layers)
    method.expect(prompt.length, int((prompt.types == 0).sum()), prompt.frames)
    return method


_TEXT_SETTINGS = ("hidden_act", "rms_norm_eps", "rope_parameters")
_VISION_SETTINGS = (
    "fullatt_block_indexes",
    "patch_size",
    "spatial_merge_size",
    "temporal_patch_size",
    "tokens_per_second",
    "window_size",
)


def reading_settings(model) -> dict[str, Any]:
    """What of a model decides the numbers in a cache, besides its weights; as JSON has it."""
    config = model.config
    settings = {name: getattr(config, name) for name in sorted(NSA_FIELDS) if name != "nsa_backend"}
    settings |= {f"text_config.{name}": getattr(config.text_config, name, None) for name in _TEXT_SETTINGS}
    settings |= {f"vision_config.{name}": getattr(config.vision_config, name, None) for name in _VISION_SETTINGS}
    settings |= {"image_token_id": config.image_token_id, "video_token_id": config.video_token_id}
    return json.loads(json.dumps(settings | {"dtype": str(model.dtype)}, default=str))


# One answer or reading at a time on a model, which keeps the positions of the prompt it works on.
_LOCKS: "weakref.WeakKeyDictionary" = weakref.WeakKeyDictionary()
_LOCKS_LOCK = threading.Lock()


class Reading(Prefilled):
    """What a model has read; made by `model.read`.

    Threads may share a reading, and readings of one model: whatever they ask is answered one after the other. (A
    `model.generate` of somebody else at the same time is not kept apart.)

    Attributes, besides those of `Prefilled`:
        processor: of the model.
        plan: `ReadingPlan`.
        frames: (height, width) in tokens of every image and every step of a video.
        videos: `ReadVideo` of each video: where its tokens are, the times of its frames, and what they were read from.
        media: what was read, a description and a digest of each image and video.
        seconds: of the last video that were read.
    """

    def __init__(self, model, processor, plan: ReadingPlan, prompt: "Prompt | None", cache, method: KvMethod):
        super().__init__(model, cache, method)
        self.processor, self.plan = processor, plan
        self.frames = [] if prompt is None else prompt.frames
        self.settings, self._weights = reading_settings(model), _versions(model)
        self.video: OpenVideo | None = None
        self.videos: list[ReadVideo] = []
        if prompt is not None:
            self.text, self.base, self.whole = prompt.text, prompt.base, prompt.whole
            self.media = [media_fingerprint(part) for part in prompt.media]
            self.preparation = prompt.preparation
        self._said: list[dict] | None = None  # the conversation that `ask(keep=True)` went on with
        self._pending: list[int] = []  # its last tokens, if they are not in the cache
        self._before_turns: tuple | None = None
        self._state: tuple | None = None  # of a cache that cannot be cut, before the first question that was kept
        self._is_busy = self._is_cut = False

    @property
    def seconds(self) -> float:
        return 0.0 if self.video is None else self.video.steps * self.video.seconds_per_step

    def __deepcopy__(self, memo: dict) -> "Reading":
        """A reading of the same model and processor, with a cache and a conversation of its own."""
        media = (part.part for video in self.videos for part in video.footage)
        memo |= {id(one): one for one in (self.model, self.processor, *media)}
        new = object.__new__(type(self))
        memo[id(self)] = new
        with self.exclusive():
            vars(new).update(copy.deepcopy(vars(self), memo), _is_busy=False)
        return new

    def __repr__(self) -> str:
        return f"Reading({self.num_tokens:,} tokens, {self.cache.get_seq_length():,} in the cache)"

    def ask(
        self,
        question: Any = None,
        *,
        keep: bool = False,
        streamer=None,
        max_new_tokens: int | None = None,
        evidence: bool = False,
        **generation,
    ) -> Answer:
        """Answer a question about what was read.

        Args:
            question: a text; or a list of text parts; or a whole conversation that begins with what was read; or
                nothing, for what the prompt itself asked.
            keep: go on from this turn: later questions see it and its answer, until `forget()`.
            streamer: of transformers, gets tokens as they come.
            max_new_tokens: at most; 256 where neither this nor `generation` says how many.
            evidence: find out where the model looked; it is the answer's `evidence`.
            generation: keywords of `model.generate`.
        Raises:
            ValueError: nothing is asked; something new is shown (`extend` takes footage); a setting of the model, its
                weights or its device are not those of the reading; a way to generate that cannot go on from a cache
                (beams, several answers, drafts, `use_cache=False`); `evidence` of a cache that a budget has made
                smaller, or of another one than the reading's own.

        After an error, and after Ctrl-C, the reading is as it was before.
        """
        start = time.perf_counter()
        _check_generation(self.model, generation)
        if max_new_tokens is None and not {"generation_config", "max_length"} & generation.keys():
            max_new_tokens = 256
        if max_new_tokens is not None:
            generation["max_new_tokens"] = max_new_tokens
        with self.exclusive():
            if evidence:
                check_evidence(self)
            messages, text, rest = self._continue(question)
            state = state_of(self.cache)
            is_kept, found = False, None
            try:
                inputs = self._inputs(rest)
                if generation.get("stop_strings"):
                    generation.setdefault("tokenizer", self.processor.tokenizer)
                with evidence_observer(self.model, evidence) as queries:
                    rows = self.model.generate(**inputs, streamer=streamer, **generation)
                if not isinstance(rows, torch.Tensor):
                    raise ValueError("`return_dict_in_generate` = True: use `reading.prompt` with `model.generate`")
                new = rows[0, inputs["input_ids"].shape[1] :].tolist()
                answer = self.processor.tokenizer.decode(new, skip_special_tokens=True)
                if evidence:
                    found = Evidence.of(self, queries, rest, new, question, answer)
                if keep:
                    self._keep(messages, text, rest, new, answer, state)
                    is_kept = True
            finally:
                if not is_kept:
                    restore_(self.cache, state)
        return Answer(answer, tuple(new), len(rest), time.perf_counter() - start, found)

    @contextmanager
    def prompt(self, question: Any = None) -> Iterator[dict[str, Any]]:
        """Inside, keywords for `model.generate` or `model` to go on from the cache with a question.

        Args:
            question: as in `ask`.
        Returns:
            `input_ids` and `attention_mask` (1, length), those of the cache included, and the cache.
        """
        with self.exclusive():
            _, _, rest = self._continue(question)
            with restored_after(self.cache):
                yield self._inputs(rest)

    def forget(self) -> None:
        """Go back to before the first question that was kept."""
        with self.exclusive():
            if self._said is None:
                return
            length, self.text, self.next_position = self._before_turns
            added = self.num_tokens - length
            if self._state is not None:
                restore_(self.cache, self._state)
            else:
                crop_(self.cache, [layer.get_seq_length() - added for layer in self.cache.layers])
            self.ids, self.types = self.ids[:length], self.types[:length]
            self.cache_types = self.cache_types[: len(self.cache_types) - added]
            self._said, self._pending, self._before_turns, self._state = None, [], None, None

    def conversation_state(self) -> dict[str, Any]:
        """What of the conversation is kept on disk."""
        return {name: getattr(self, name) for name in self.conversation_state_names}

    conversation_state_names = ("text", "base", "whole", "_said", "_pending", "_before_turns")

    def set_conversation_state(self, state: Mapping[str, Any]) -> None:
        if not isinstance(state["text"], str) or not state["text"]:
            raise TypeError("no text")
        for name in self.conversation_state_names:
            setattr(self, name, state[name])

    def footage_state(self) -> list[dict[str, Any]]:
        """What of the videos is kept on disk."""
        return [video.to_dict() for video in self.videos]

    def set_footage_state(self, state: Sequence[Mapping[str, Any]], parts: Sequence[Mapping[str, Any]]) -> None:
        """From disk; parts: of a conversation that shows the same videos, or none."""
        self.videos = [
            ReadVideo.from_dict(video, parts[number] if parts else None) for number, video in enumerate(state)
        ]
        if self.video is not None and self.videos:
            self.videos[-1].shape = self.video

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
        if chunk_tokens is not None:
            check_chunk(chunk_tokens)
        with self.exclusive():
            if self.preparation:
                raise ValueError(
                    f"footage cannot be prepared as this was, with {', '.join(self.preparation)}: read anew"
                )
            if self.video is None or self._is_cut:
                where = "inside a frame, in a compressed cache" if self._is_cut else "with an image"
                raise ValueError(f"there is no video to extend: the reading ends {where}")
            if self._said is not None:
                raise ValueError("the reading ends with a conversation that was kept: `forget()` it, then extend")
            if self.is_kept:
                raise ValueError(f"`kv_method` = {self.method.name!r} takes no new footage after its compression")
            if self.video.tail is not None and len(self.cache_types) < self.num_tokens:
                raise ValueError(
                    f"`kv_method` = {self.method.name!r}: the video ended with half a step, an odd number of frames, "
                    "which cannot be completed in a compressed cache: read an even number"
                )
            open_video, chunk = self.video, chunk_tokens or self.plan.chunk_tokens
            stream = open_video.stream(self.processor, video)
            before = open_video.tail
            frames = len(stream.plan.frame_indices) + (before is not None)
            steps = -(-frames // stream.temporal_patch_size)
            first = open_video.steps - (before is not None)
            tokens = open_video.step_tokens(self.model.config.vision_config.spatial_merge_size)
            check_length(self.model, open_video.next_position(self.model, first + steps))
            merge = self.model.config.vision_config.spatial_merge_size
            added = [(open_video.size[0] // merge, open_video.size[1] // merge)] * steps
            frames_then = self.frames[: len(self.frames) - (before is not None)] + added
            total = self.num_tokens + (steps - (before is not None)) * tokens
            self.method.expect(total, int((self.types == 0).sum()), frames_then)
            self.frames = frames_then
            half_step = []
            if before is not None:
                half_step = [
                    (layer.keys[..., -tokens:, :], layer.values[..., -tokens:, :]) for layer in self.cache.layers
                ]
                half_step = [(keys.clone(), values.clone()) for keys, values in half_step]
                if not self.cut(self.num_tokens - tokens):
                    name = type(self.cache).__name__
                    raise ValueError(f"`cache` = {name} cannot be cut, and the video ended with half a step")
                self.next_position = open_video.next_position(self.model, first)
                open_video.steps, open_video.tail = first, None
            ids = torch.full((steps * tokens,), self.model.config.video_token_id)
            positions = open_video.positions(self.model, first, first + steps)
            report = Reporter(frames, len(ids), progress, callback)
            pieces = stream_pieces(stream, open_video.size, chunk * merge**2, before)
            start = self.num_tokens
            frames_before, shown = len(self.videos[-1].times), video if isinstance(video, (str, os.PathLike)) else None
            part = None if shown is None else {"type": "video", "video": shown}
            digest = "" if part is None else media_fingerprint(part)["digest"]
            self.videos[-1].footage.append(Footage.of(stream, part, digest, frames_before / open_video.fps))
            try:
                self.prefill(ids, torch.full_like(ids, 2), positions, pieces, chunk, report)
            finally:
                whole, rest = divmod(self.num_tokens - start, tokens)
                self._is_cut = not self.cut(self.num_tokens - rest)
                if not whole and before is not None:  # nothing has come to complete the half step: as it was
                    for layer, states in zip(self.cache.layers, half_step, strict=True):
                        layer.update(*states)
                    self.append(ids[:tokens], torch.full_like(ids[:tokens], 2))
                    open_video.tail, whole = before, 1
                elif whole == steps:
                    open_video.tail = self.tail
                open_video.steps = first + whole
                frames_read = open_video.steps * stream.temporal_patch_size
                self.videos[-1].cut(frames_read - (open_video.tail is not None))
                self.next_position = open_video.next_position(self.model, first + whole)
                self.frames = self.frames[: len(self.frames) - (steps - whole)]

    def save(self, folder: str | os.PathLike, *, overwrite: bool = False) -> None:
        """Keep the reading on disk; `model.load_reading(folder)` brings it back, next week or on another machine.

        The folder holds safetensors files and `reading.json`, and appears when all are whole.

        Args:
            folder: to be made.
            overwrite: replace a folder that `save` made before.
        Raises:
            ValueError: the folder exists, or the cache is one of transformers' that cannot be saved.
        """
        with self.exclusive():
            save_reading(self, folder, overwrite)

    @contextmanager
    def exclusive(self) -> Iterator[None]:
        """Inside, the model works for nobody else; a ValueError where it has changed since this was read."""
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

    # What follows is done under the model's lock.

    def _check_unchanged(self) -> None:
        check_mode(self.model)
        now = reading_settings(self.model)
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
                        "model back; a reading that is saved before can be loaded after"
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
            given = [media_fingerprint(part)["digest"] for part in media_of(question)]
            if given and given != [one["digest"] for one in self.media]:
                raise ValueError("`question` is a conversation about other images or videos than were read")
            return split(question)[1]
        if any(kind_of(part) for part in question):
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
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), CACHE_NAME: self.cache}

    def _ids_in_cache(self, length: int) -> torch.Tensor:
        """Token ids for the entries of the cache, which only repetition penalties look at."""
        if length == len(self.ids):
            return self.ids
        order = torch.cat([(self.types == 0).nonzero(), (self.types != 0).nonzero()]).squeeze(-1)
        return self.ids[order[:length].sort().values]

    def _keep(self, messages, text, rest, new, answer, state) -> None:
        """Go on from an answer."""
        if self.cache.get_seq_length() - len(self.cache_types) > len(rest) + len(new):
            raise ValueError("`generation` fed more than the question and its answer: it cannot be kept")
        if self._said is None:
            self._before_turns = len(self.ids), self.text, self.next_position
            self._state = None if isinstance(self.cache, RoomyCache) else state
        said = [*rest, *new][: self.cache.get_seq_length() - len(self.cache_types)]
        ends = self.model.generation_config.eos_token_id
        ends = ends if isinstance(ends, (list, tuple)) else [ends]
        self._pending = [token for token in [*rest, *new][len(said) :] if token not in ends]
        self.append(torch.tensor(said), torch.zeros(len(said), dtype=torch.long))
        self.next_position += len(said)
        self.text = text + answer
        self._said = [*messages, {"role": "assistant", "content": [{"type": "text", "text": answer}]}]

    def _read(self, prompt: Prompt, progress: bool, callback) -> None:
        report = Reporter(prompt.num_frames, prompt.length, progress, callback)
        with self.exclusive():
            try:
                self.prefill(prompt.ids, prompt.types, prompt.positions, prompt.pieces(), prompt.chunk_tokens, report)
            except BaseException as error:
                if self._keep_whole_media(prompt):
                    error.reading = self
                    if isinstance(error, ValueError):
                        text = f"{error}; read until second {self.seconds:.2f}, see the error's `reading`"
                        error.args = (text, *error.args[1:])
                raise
            self._open_last(prompt)

    def _keep_whole_media(self, prompt: Prompt) -> bool:
        """After an interruption, drop images and steps of a video that were read in part; whether anything is left."""
        whole, end, frames = [], 0, 0
        for span in prompt.spans:
            done = min(span.tokens, self.num_tokens - span.start)
            done -= done % (span.tokens if span.kind == 1 else span.step_tokens)
            if done > 0:
                whole.append(span)
                end, frames = span.start + done, frames + done // span.step_tokens
        if not whole or self.is_broken or not self.cut(end):
            return False
        self.frames, self.media = self.frames[:frames], self.media[: len(whole)]
        self.next_position = int(prompt.positions[:, :, : self.num_tokens].max()) + 1
        self.text = up_to_media(self.processor, self.text, len(whole))
        self.base, _ = split(self.whole, len(whole))
        self.whole = self.base
        self._open_last(prompt)
        return True

    def _open_last(self, prompt: Prompt) -> None:
        """Remember the videos that were read, and the last of them so that it can be extended."""
        self.videos = videos_of(prompt, self.num_tokens, self.media)
        videos = [span for span in prompt.spans if span.kind == 2 and span.start < self.num_tokens]
        if self.types[-1] != 2 or (self.num_tokens - videos[-1].start) % videos[-1].step_tokens:
            return
        self.video = self.videos[-1].shape
        self.video.tail = self.tail if self.video.steps == videos[-1].grid[0] else None


def _check_generation(model, generation: Mapping[str, Any]) -> None:
    """Refuse what `generate` cannot do from a cache that it has not made, and what a reading sets itself."""
    for name in ("input_ids", "inputs_embeds", "attention_mask", "past_key_values", "cache", "position_ids"):
        if name in generation:
            raise ValueError(f"`{name}` is no keyword of `ask`, which sets it itself; see `reading.prompt`")
    config = generation.get("generation_config") or model.generation_config
    usual = {"num_beams": (None, 1), "num_return_sequences": (None, 1), "use_cache": (None, True)}
    for name in ("num_beams", "num_return_sequences", "use_cache", "prompt_lookup_num_tokens", "assistant_model"):
        value = generation.get(name, getattr(config, name, None))
        if value not in usual.get(name, (None,)):
            raise ValueError(
                f"`{name}` = {value!r}: a reading gives one answer at a time, token by token from its cache"
            )


def _versions(model) -> tuple:
    """Changes when a weight does: torch counts writes to it, but those through `.data` or in inference mode."""
    versions = [(id(one), 0 if one.is_inference() else one._version) for one in model.parameters()]
    # Of adapters, whether they are merged or switched off.
    flags = (getattr(module, name, None) for module in model.modules() for name in ("merged", "disable_adapters"))
    return tuple(versions), tuple(flag for flag in flags if isinstance(flag, bool))
