"""Where a model looked for an answer: the moments of a video that the text attended to, and what stood behind them.

    answer = reading.ask("What does she carry?", evidence=True)
    answer.evidence.moments          # each step of the video: its seconds, and its share of the attention
    answer.evidence.frames(5)        # the strongest, as pictures
    answer.evidence.storyboard()     # the same on one picture

**First hop.** Text rows attend to every token before them. What row t takes from the tokens i of a moment M, which is
one temporal step of a video, in layer l is measured by the attention, times the length of the values that it brings:

    c[l, t, M] = sum over heads h and i in M of  softmax_i(q[l, t, h] . k[l, i] / sqrt(head_dim)) * |v[l, i]|,  i <= t.

It takes from rows r of question and answer, too, c[l, t, r], which have taken from the video in the layers before. What
it takes from such a row is handed on to where that row has taken from until then:

    C[l, r, M] = sum over k < l of  c[k, r, M],  and as a share of all that r has taken,  H[l, r, M]

    share[t, M] ~ sum over layers l of  (c[l, t, M] + sum over r <= t of  c[l, t, r] * H[l, r, M]),

scaled so that the shares of all moments, of images, for which the same is computed, and of text make 1. What is handed
on to rows of question and answer, and in layer 0 what is taken from them at all, counts as text. The row of an answer's
token is the one that predicted it; the answer as a whole is the mean over its tokens, special ones (such as its end)
aside. Weights by the length of values are those of arXiv 2004.10102. docs/evidence.md has measured this rule beside
others.

Shares are computed anew from the queries of question and answer, which are kept while the model answers, and from the
cached keys and values, a tile at a time.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image
from torch import Tensor
from transformers.cache_utils import DynamicLayer

try:
    from .cache_videonsa import RoomyLayer
    from .kv_budget_videonsa import observed_queries, precise
    from .second_hop_videonsa import Block, Place, selected_blocks
    from .storyboard_videonsa import SHOWN_BLOCKS, SHOWN_PLACES, BlockPicture, draw_plot, draw_storyboard
except ImportError:  # `import modeling_videonsa` from a checkout, without a package
    if __package__:
        raise
    from cache_videonsa import RoomyLayer
    from kv_budget_videonsa import observed_queries, precise
    from second_hop_videonsa import Block, Place, selected_blocks
    from storyboard_videonsa import SHOWN_BLOCKS, SHOWN_PLACES, BlockPicture, draw_plot, draw_storyboard

if TYPE_CHECKING:
    from .reading_videonsa import Reading

# Numbers in a tile of scores, and in the sums of a tile of rows: 64 MB each in float32.
_TILE = 1 << 24


@dataclass(frozen=True)
class Moment:
    """One temporal step of a video.

    Attributes:
        index: among all moments of the reading.
        video: its number among the videos of the reading, from 0.
        step: its number in the video.
        start, end: seconds in the video.
        share: of the attention, 0 to 1.
    """

    index: int
    video: int
    step: int
    start: float
    end: float
    share: float


@dataclass(frozen=True)
class Frame:
    """The first frame of a moment, in the size in which the model saw it.

    Attributes:
        image: RGB.
        time: seconds in the video.
        share, video: of the moment.
        moment: the moment itself.
    """

    image: Image.Image = field(repr=False)
    time: float
    share: float
    video: int
    moment: Moment


@dataclass(frozen=True)
class SecondHop:
    """What stood behind a moment: the blocks that its tokens selected.

    Attributes:
        moment: the moment.
        blocks: `Block`s, the largest weight first.
    """

    moment: Moment
    blocks: tuple[Block, ...]


@dataclass(frozen=True)
class TokenEvidence:
    """What one token of the answer was predicted from.

    Attributes:
        token_id, token: it, and as text.
        shares: of each moment.
        images, text: shares of all images and of all text.
    """

    token_id: int
    token: str
    shares: tuple[float, ...] = field(repr=False)
    images: float
    text: float


class Evidence:
    """Where the attention of a question and its answer went; see the top of this file.

    Attributes:
        question, answer: texts; the question is "" where it was not given as a text.
        moments: `Moment` of each temporal step of each video, in their order, for the answer as a whole.
        images, text: shares of all images and of all text. With those of the moments they make 1.
        tokens: `TokenEvidence` of each token of the answer, special tokens included.
    """

    def __init__(self, reading: "Reading", shares: Tensor, token_ids: Sequence[int], question: str, answer: str):
        """shares: (rows, moments + 2), of the rows that predicted the answer's tokens, those of the whole first."""
        self.question, self.answer = question, answer
        self._reading = reading
        steps = reading.model.config.vision_config.temporal_patch_size
        whole, *of_tokens = shares.tolist()
        moments = []
        for number, video in enumerate(reading.videos):
            for step, (start, end) in enumerate(video.spans(steps)):
                moments.append(Moment(len(moments), number, step, start, end, whole[len(moments)]))
        self.moments: tuple[Moment, ...] = tuple(moments)
        self.images, self.text = whole[-2:]
        decode = reading.processor.tokenizer.decode
        self.tokens = tuple(
            TokenEvidence(token, decode([token]), tuple(row[:-2]), *row[-2:])
            for token, row in zip(token_ids, of_tokens, strict=True)
        )

    @classmethod
    @torch.no_grad()
    def of(cls, reading: "Reading", queries, rest, new, question: Any, answer: str) -> "Evidence":
        """Of an answer whose tokens are still in the cache.

        Args:
            queries: from `evidence_observer`.
            rest, new: tokens of the question and of the answer.
        Raises:
            ValueError: `generate` fed other tokens than these.
        """
        segments, count = segments_of(reading)
        first, total = len(reading.types), reading.cache.get_seq_length()
        rows = len(rest) + len(new) - 1
        if total != first + rows or queries.rows != rows:
            raise ValueError(
                f"`evidence`: `generation` fed {total - first} tokens in {queries.rows} rows, and question and answer "
                f"have {rows}"
            )
        shares = text_shares(reading.model, queries.joined(), reading.cache.layers, segments, count, first)
        predicting = shares[len(rest) - 1 :]
        special = set(reading.processor.tokenizer.all_special_ids)
        is_said = torch.tensor([token not in special for token in new])
        whole = (predicting[is_said] if is_said.any() else predicting).mean(0, keepdim=True)
        question = question if isinstance(question, str) else ""
        return cls(reading, torch.cat([whole, predicting]), new, question, answer)

    def strongest(self, n: int) -> list[Moment]:
        """The `n` moments of the largest shares, the largest first."""
        if not isinstance(n, int) or isinstance(n, bool) or n < 1:
            raise ValueError(f"`n` must be a positive integer, got {n!r}")
        return sorted(self.moments, key=lambda moment: -moment.share)[:n]

    def frames(self, n: int = 5, *, video: Any = None) -> list[Frame]:
        """The strongest moments as pictures, in the order of time.

        Args:
            n: how many.
            video: what to decode, where what was read is not there any more or was not kept; of several videos a list
                with one for each. Frames are found by their time in it.
        Returns:
            a `Frame` of each moment, decoded now.
        Raises:
            ValueError: there is no video, `n` is not positive, or a frame cannot be had.
        """
        chosen = sorted(self.strongest(n), key=lambda moment: moment.index)
        if not chosen:
            raise ValueError("no video was read, so that there are no frames to show")
        pictures = self.pictures(chosen, video)
        return [
            Frame(picture, moment.start, moment.share, moment.video, moment)
            for moment, picture in zip(chosen, pictures, strict=True)
        ]

    def pictures(self, moments: Sequence[Moment], video: Any = None) -> list[Image.Image]:
        """The first frame of each moment; `moments` in ascending order, `video` as in `frames`."""
        reading, pictures = self._reading, []
        step = reading.model.config.vision_config.temporal_patch_size
        for number, read in enumerate(reading.videos):
            numbers = [step * moment.step for moment in moments if moment.video == number]
            if numbers:
                frames = read.frames(reading.processor, numbers, self._given(number, video))
                pictures += [Image.fromarray(frame.permute(1, 2, 0).numpy()) for frame in frames]
        return pictures

    def second_hop(self, n: int = 3, *, video: Any = None) -> list[SecondHop]:
        """The blocks that NSA's selection branch chose for the tokens of the strongest moments, in the order of time.

        These moments are decoded, encoded and run through the decoder once more; the reading stays as it is. Their own
        blocks, which tokens always select, are not told. There are none in dense mode.

        Args:
            n: how many moments.
            video: as in `frames`.
        Raises:
            ValueError: as `frames`; the video was prepared with options of its own; or the reading or its model have
                changed since.
        """
        reading, found = self._reading, []
        per_step = reading.model.config.vision_config.temporal_patch_size
        chosen = sorted(self.strongest(n), key=lambda moment: moment.index)
        with reading.exclusive(), torch.no_grad():
            for number, read in enumerate(reading.videos):
                moments = [moment for moment in chosen if moment.video == number]
                spans = dict(enumerate(read.spans(per_step)))
                for one in moments:
                    start, end = spans.get(one.step, (-1.0, -1.0))
                    if max(abs(start - one.start), abs(end - one.end)) > 0.5 / read.shape.fps:
                        raise ValueError(f"the reading has changed at second {one.start:.2f} since then: ask anew")
                if moments:
                    steps = [moment.step for moment in moments]
                    blocks = selected_blocks(reading, number, steps, self._given(number, video))
                    found += [SecondHop(*pair) for pair in zip(moments, map(tuple, blocks), strict=True)]
        return found

    def _given(self, number: int, video: Any) -> Any:
        count = len(self._reading.videos)
        if video is None or count == 1:
            return video
        if not isinstance(video, (list, tuple)) or len(video) != count:
            raise ValueError(f"`video` must be a list of {count}, as many as were read, got {type(video).__name__}")
        return video[number]

    def storyboard(self, n: int = 5, *, second_hop: bool = True, video: Any = None) -> Image.Image:
        """The strongest moments on one picture, in the order of time, with their times and shares.

        Args:
            n, video: as in `frames`.
            second_hop: show under each moment the two blocks of the largest weight that its tokens selected.
        Raises:
            ValueError: as `frames` and `second_hop`.
        """
        frames, behind = self.frames(n, video=video), []
        if second_hop:
            blocks = [hop.blocks[:SHOWN_BLOCKS] for hop in self.second_hop(n, video=video)]
            behind = self._pictures_of(blocks, video)
        return draw_storyboard(frames, self.moments, self.question, self.answer, behind)

    def _pictures_of(self, groups: Sequence[Sequence[Block]], video: Any) -> list[list[BlockPicture]]:
        """For each block, pictures of the steps in which most of its tokens are."""
        places = {
            block.index: sorted(sorted(block.places, key=lambda place: -place.tokens)[:SHOWN_PLACES], key=_when)
            for blocks in groups
            for block in blocks
        }
        by_step = {(moment.video, moment.step): moment for moment in self.moments}
        moments = {by_step[_when(place)].index: by_step[_when(place)] for of in places.values() for place in of}
        ordered = [moments[index] for index in sorted(moments)]
        pictures = dict(zip(sorted(moments), self.pictures(ordered, video), strict=True))
        return [
            [
                BlockPicture(
                    [(pictures[by_step[_when(place)].index], place.box) for place in places[block.index]],
                    block.places[0].video,
                    block.places[0].start,
                    [place.end for place in block.places if place.video == block.places[0].video][-1],
                    block.weight,
                )
                for block in blocks
                if block.places
            ]
            for blocks in groups
        ]

    def plot(self) -> Image.Image:
        """The shares over time, a picture.

        Raises:
            ValueError: there is no video.
        """
        if not self.moments:
            raise ValueError("no video was read, so that there is nothing to plot")
        return draw_plot(self.moments, self.question, self.answer)

    def to_dict(self, second_hop: int = 0, *, video: Any = None) -> dict[str, Any]:
        """Numbers, texts, lists and dicts, as JSON has them.

        Args:
            second_hop: of how many of the strongest moments the second hop is told; video: as there.
        Raises:
            ValueError: as `second_hop`, where it is not 0.
        """
        values = {
            "question": self.question,
            "answer": self.answer,
            "text": self.text,
            "images": self.images,
            "moments": [asdict(moment) for moment in self.moments],
            "tokens": [asdict(token) | {"shares": list(token.shares)} for token in self.tokens],
        }
        if second_hop:
            hops = [asdict(hop) for hop in self.second_hop(second_hop, video=video)]
            values["second_hop"] = [
                {"moment": hop["moment"]["index"], "blocks": _as_lists(hop["blocks"])} for hop in hops
            ]
        return values

    def __repr__(self) -> str:
        return f"Evidence({len(self.moments)} moments, {sum(moment.share for moment in self.moments):.1%} of attention)"


def _as_lists(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _as_lists(one) for name, one in value.items()}
    return [_as_lists(one) for one in value] if isinstance(value, (list, tuple)) else value


def _when(place: Place) -> tuple[int, int]:
    return place.video, place.step


class Queries:
    """Rotated queries of consecutive rows, as they come."""

    def __init__(self) -> None:
        self._calls: list[list[Tensor]] = []

    def take(self, of_call: list[Tensor]) -> None:
        self._calls.append(of_call)

    @property
    def rows(self) -> int:
        return sum(call[0].shape[2] for call in self._calls)

    def joined(self) -> list[Tensor]:
        """(1, num_heads, rows, head_dim) for each layer."""
        return [torch.cat(of_layer, dim=2) for of_layer in zip(*self._calls, strict=True)]


@contextmanager
def evidence_observer(model, wanted: bool) -> Iterator[Queries]:
    """Inside, the queries of everything that the decoder reads are kept, if wanted."""
    queries = Queries()
    if not wanted:
        yield queries
        return
    with observed_queries(model, queries.take):
        yield queries


def check_evidence(reading: "Reading") -> None:
    """Raise a ValueError where the cache cannot tell where attention went."""
    if len(reading.cache_types) < reading.num_tokens:
        raise ValueError(
            f"`evidence` = True needs the whole cache, and kv_method={reading.method.name!r} has left "
            f"{len(reading.cache_types):,} of {reading.num_tokens:,} entries: read without `kv_budget`"
        )
    kinds = {type(layer) for layer in reading.cache.layers} - {RoomyLayer, DynamicLayer}
    if kinds:
        raise ValueError(
            f"`evidence` = True needs keys as they were computed, and `cache` = {type(reading.cache).__name__} holds "
            "them otherwise: read without `cache`"
        )
    steps = sum(video.shape.steps for video in reading.videos)
    if (reading.types == 2).any() and not steps:
        raise ValueError("`evidence` = True: this reading was saved without the times of its frames: read anew")


def segments_of(reading: "Reading") -> tuple[Tensor, int]:
    """The segment of every cached token, and their number: one for each moment, then all images, then all text."""
    count = sum(video.shape.steps for video in reading.videos)
    segments = torch.full((reading.cache.get_seq_length(),), count + 1)
    segments[: len(reading.types)][reading.types == 1] = count
    merge, first = reading.model.config.vision_config.spatial_merge_size, 0
    for video in reading.videos:
        tokens, steps = video.shape.step_tokens(merge), video.shape.steps
        numbers = torch.arange(first, first + steps).repeat_interleave(tokens)
        segments[video.first_token : video.first_token + len(numbers)] = numbers
        first += steps
    return segments, count + 2


def text_shares(model, queries: Sequence[Tensor], layers, segments: Tensor, count: int, first: int) -> Tensor:
    """The shares of every row of question and answer, by the rule at the top of this file.

    Args:
        queries: of each layer, (1, num_heads, rows, head_dim), rotated, of the tokens from position `first` on.
        layers: of the cache.
        segments, count: as `segments_of` returns them; the last one is text.
    Returns:
        (rows, count), float32 or more, on the CPU; every row makes 1.
    """
    rows = len(segments) - first
    segments = segments.clone()
    segments[first:] = torch.arange(count, count + rows)
    total = before = None
    for module, query, layer in zip(model.model.language_model.layers, queries, layers, strict=True):
        scaling = module.self_attn.scaling
        taken = torch.zeros(rows, count + rows, dtype=precise(layer.keys), device=layer.keys.device)
        for _, part, sums in head_tiles(query, layer.keys, segments, count + rows, first, scaling, layer.values):
            taken[part] += sums.sum(0)
        taken = taken.cpu()
        direct, from_rows = taken.split([count, rows], dim=1)
        plain = direct.clone()
        plain[:, -1] += from_rows.sum(1)
        if before is None:
            total, before = plain, plain.clone()
        else:
            total += direct + from_rows @ (before / before.sum(1, keepdim=True))
            before += plain
    return total / total.sum(1, keepdim=True)


def head_tiles(
    query: Tensor,
    keys: Tensor,
    segments: Tensor,
    count: int,
    first: int,
    scaling: float,
    values: Tensor | None = None,
) -> Iterator[tuple[int, slice, Tensor]]:
    """Sums over segments of the causal softmax attention of a layer's text rows, some rows of some heads at a time.

    Memory is that of a tile, however many rows and keys there are.

    Args:
        query: (1, num_heads, rows, head_dim), rotated, of the tokens at positions first, first + 1, ...
        keys: (1, num_kv_heads, length, head_dim); query head h reads key/value head h // group_size.
        segments: (length,), int64, less than `count`.
        values: like keys. Each key counts by the length of its value; without them by 1, so that every row makes 1.
    Yields:
        a key/value head; rows; of these the sums, (group_size, rows, count), on the device of the keys.
    """
    num_kv_heads, length, head_dim = keys.shape[1:]
    dtype, device = precise(keys), keys.device
    query, segments = query.to(device).unflatten(1, (num_kv_heads, -1))[0], segments.to(device)
    group_size, rows = query.shape[1:3]
    some = max(1, _TILE // (group_size * count))
    for head, (heads, key) in enumerate(zip(query, keys[0], strict=True)):
        for start in range(0, rows, some):
            part = heads[:, start : start + some]
            position = torch.arange(first + start, first + start + part.shape[1], device=device).repeat(group_size)
            columns = (part.to(dtype) * scaling).reshape(-1, head_dim).T  # [head_dim, group_size * rows]
            sums = torch.zeros(count, columns.shape[1], dtype=dtype, device=device)
            total = torch.zeros_like(sums[0])
            highest = torch.full_like(total, -torch.inf)
            step = max(1, _TILE // columns.shape[1])
            for low in range(0, length, step):
                tile = slice(low, min(low + step, length))
                scores = key[tile].to(dtype) @ columns  # [keys, group_size * rows]
                if tile.stop > first:
                    at = torch.arange(low, tile.stop, device=device)
                    scores.masked_fill_(at[:, None] > position, -torch.inf)
                # The first tile holds token 0, which every row sees: from there on the maximum is finite.
                higher = torch.maximum(highest, scores.amax(0))
                weights, shrink = scores.sub_(higher).exp_(), (highest - higher).exp_()
                total = total * shrink + weights.sum(0)
                if values is not None:
                    weights *= values[0, head, tile].to(dtype).norm(dim=-1, keepdim=True)
                sums.mul_(shrink).index_add_(0, segments[tile], weights)
                highest = higher
            sums /= total
            yield head, slice(start, start + part.shape[1]), sums.view(count, group_size, -1).permute(1, 2, 0)
