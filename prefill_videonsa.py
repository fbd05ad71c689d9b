"""Running the model over a prompt chunk by chunk, with the cache that this fills.

`reading_videonsa.py` says what is read and asked; here is what holds the tokens that went through the model, adds to
them, and takes the last of them back.
"""

import time
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass

import torch
from tqdm import tqdm
from transformers.cache_utils import Cache, DynamicLayer

try:
    from .cache_videonsa import SPARE_TOKENS, RoomyCache, RoomyLayer, restore_, state_of
    from .generation_videonsa import CACHE_NAME
    from .kv_budget_videonsa import KvMethod
    from .prompt_videonsa import Ahead, Piece
except ImportError:  # `import modeling_videonsa` from a checkout, without a package
    if __package__:
        raise
    from cache_videonsa import SPARE_TOKENS, RoomyCache, RoomyLayer, restore_, state_of
    from generation_videonsa import CACHE_NAME
    from kv_budget_videonsa import KvMethod
    from prompt_videonsa import Ahead, Piece


@dataclass(frozen=True)
class ReadingProgress:
    """How far a reading is: frames and tokens of how many, seconds it took, and seconds expected for the rest."""

    frames: int
    total_frames: int
    tokens: int
    total_tokens: int
    seconds: float
    remaining: float


class Reporter:
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


class Prefilled:
    """Tokens that went through the model, and their cache.

    Attributes:
        model: `VideoNSAForConditionalGeneration`.
        cache: the key-value cache.
        method: that keeps it to a budget (`KvMethod`).
        is_kept: to a budget, in a way that takes no new vision tokens.
        is_broken: an error has left it with an unknown part of a chunk.
        ids, types: (tokens,), the tokens, and 0 for text, 1 for image, 2 for video tokens.
        cache_types: types of the entries of the cache, of which a budget may have left fewer.
        next_position: of the text token that comes next.
        tail: the last frame of the last video, if it makes half a step.
    """

    def __init__(self, model, cache: Cache | None, method: KvMethod):
        self.model, self.cache, self.method = model, cache, method
        self.is_kept = self.is_broken = False
        self.ids = torch.empty(0, dtype=torch.long)
        self.types = torch.empty(0, dtype=torch.long)
        self.cache_types = self.types
        self.next_position = 0
        self.tail: torch.Tensor | None = None

    @property
    def num_tokens(self) -> int:
        """Tokens that went through the model, also those that a budget has dropped from the cache."""
        return len(self.ids)

    def append(self, ids: torch.Tensor, types: torch.Tensor) -> None:
        self.ids, self.types = torch.cat([self.ids, ids]), torch.cat([self.types, types])
        self.cache_types = torch.cat([self.cache_types, types])

    def prefill(self, ids, types, positions, pieces: Iterator[Piece], chunk_tokens: int, report: Reporter) -> None:
        """Run the model over new tokens. After an error, what came before the chunk that failed is there.

        Args:
            ids, types: (tokens,); positions: (3, 1, tokens).
            pieces: of their images and videos.
        """
        device = self.model.get_input_embeddings().weight.device
        self.tail = None
        ahead, layers = Ahead(pieces), self.cache.layers
        with closing(ahead), closing(report), torch.no_grad(), self.method.observer(self.model) as queries:
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
                    frames, self.tail = frames + piece.num_frames, piece.tail
                if needed:
                    embeds[0, is_vision.to(device)] = features[:needed].to(embeds)
                    features = features[needed:]
                self._run(embeds, positions[:, :, part], types[part])
                self.append(ids[part], types[part])
                self.cache_types = self.method.during(layers, self.cache_types[None])[0]
                self.next_position = max(self.next_position, int(positions[:, :, part].max()) + 1)
                report(frames, len(types[part]))
            kept = self.method.finish(layers, self.cache_types[None], queries)
            self.is_kept = kept is None
            self.cache_types = torch.zeros(self.cache.get_seq_length()).long() if kept is None else kept[0]
            if len(self.cache_types) < self.num_tokens:
                for layer in layers:
                    layer.reserve(layer.get_seq_length() + SPARE_TOKENS)

    def _encode(self, piece: Piece) -> torch.Tensor:
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
                mm_token_type_ids=torch.cat([self.cache_types, types])[None].to(embeds.device),
                use_cache=True,
                **{CACHE_NAME: self.cache},
            )
        except BaseException:
            self.is_broken = state is None and not crop_(self.cache, [length] * len(self.cache.layers))
            if state is not None:
                restore_(self.cache, state)
            raise

    def cut(self, length: int) -> bool:
        """Forget the tokens from `length` on, if the cache has them as they came; whether it ends there now.

        In a compressed cache these are vision tokens of a step that is not whole: such wait at its end.
        """
        removed = self.num_tokens - length
        if not removed:
            return True
        is_compressed = len(self.cache_types) < self.num_tokens
        if is_compressed and not (self.method.takes_new_vision and self.types[length:].all()):
            return False
        if not crop_(self.cache, [layer.get_seq_length() - removed for layer in self.cache.layers]):
            return False
        self.ids, self.types = self.ids[:length], self.types[:length]
        self.cache_types = self.cache_types[: len(self.cache_types) - removed]
        return True


def crop_(cache, lengths: Sequence[int]) -> bool:
    """Cut the layers of a cache to their lengths; whether that could be done."""
    added = [layer.get_seq_length() - length for layer, length in zip(cache.layers, lengths, strict=True)]
    if not all(type(layer) in (RoomyLayer, DynamicLayer) for layer in cache.layers):
        return False  # of quantised layers, only the last tokens could be cut
    for number, layer in zip(added, cache.layers, strict=True):
        if number > 0:
            layer.crop(-number)
    return all(layer.get_seq_length() <= length for layer, length in zip(cache.layers, lengths, strict=True))
