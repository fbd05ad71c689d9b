"""A budget for the key-value cache: which entries each layer keeps of a prompt that is read once and asked often.

A method is made by `kv_method`, told by `expect` how long the prompt will be, and called while the prompt is read:

    method = kv_method("pyramidkv", kv_budget=0.12, num_layers=len(cache.layers))
    method.expect(num_tokens, num_text, frames)
    with method.observer(model) as queries:
        for chunk in chunks:
            model(**chunk, past_key_values=cache)
            types = method.during(cache.layers, types_of_all_cached)
    types = method.finish(cache.layers, types, queries)

No method knows the questions. Every method keeps, of a layer, as many entries for each key/value head, and replaces the
layer's `keys` and `values`, (1, num_kv_heads, length, head_dim), by the kept ones in their order. Keys are rotated
already, so an entry keeps its true position wherever it comes to lie; the caller gives `position_ids` from then on.
Prompts are a batch of one, without padding. Layers may end up with different lengths, the first has the most
(`mask_of_layer`).

Scores are computed in float32 at least. Of equal scores, the earlier entry goes first.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from fractions import Fraction

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import apply_rotary_pos_emb

try:
    from .budget_videonsa import check_positive
except ImportError:  # `import kv_budget_videonsa` from a checkout, without a package
    if __package__:
        raise
    from budget_videonsa import check_positive


class KvMethod:
    """What the methods have in common. This one keeps everything.

    Args:
        kv_budget: a share of the prompt's tokens, a float in (0, 1], or a number of entries, an int; of every layer, or
            of the layers' mean where they differ.
        num_layers: of the cache.
    Raises:
        ValueError: `kv_budget` is neither.
    Attributes:
        takes_new_vision: whether images and videos may join the cache after its compression. They need one token type
            for each place in the cache, so that no layer or head may keep a text token where another keeps vision.
        keeps_while_reading: whether the cache never holds much more than its budget.
    """

    name = ""
    takes_new_vision = True
    keeps_while_reading = False

    def __init__(self, kv_budget: int | float, num_layers: int):
        self.kv_budget = check_positive("kv_budget", kv_budget, (int, float))
        if self.kv_budget is None or (isinstance(self.kv_budget, float) and self.kv_budget > 1):
            raise ValueError(
                f"`kv_budget` must be a share of the prompt's tokens, at most 1.0, or an integer, got {kv_budget!r}"
            )
        self.num_layers = num_layers
        self.num_tokens = 0

    def expect(self, num_tokens: int, num_text: int = 0, frames: Sequence[tuple[int, int]] = ()) -> None:
        """Say what will have been read at the end; again, before more is read.

        Args:
            num_tokens: of the whole prompt, from its beginning.
            num_text: text tokens among them.
            frames: (height, width) in tokens of every image and of every grid step of every video, in their order.
        Raises:
            ValueError: the budget is less than the method needs; nothing has changed then.
        """
        entries, least = self._entries(num_tokens), self._least(num_text, frames)
        if entries < min(least, num_tokens):
            share = math.ceil(1e4 * least / num_tokens) / 1e4
            enough = f"{least} or {share}" if least < num_tokens else "1.0, which keeps all"
            raise ValueError(
                f"`kv_budget` = {self.kv_budget} keeps {entries} of {num_tokens} tokens, too few for "
                f"kv_method={self.name!r}: the least that works here is {enough}"
            )
        self.num_tokens = num_tokens

    @property
    def entries(self) -> int:
        """What a layer may keep of the prompt that is expected."""
        return self._entries(self.num_tokens)

    def _entries(self, num_tokens: int) -> int:
        return self.kv_budget if isinstance(self.kv_budget, int) else round(self.kv_budget * num_tokens)

    def _least(self, num_text: int, frames: Sequence[tuple[int, int]]) -> int:
        return 1

    def observer(self, model) -> AbstractContextManager[list[Tensor]]:
        """A context to read the prompt in; it gives what `finish` takes as `queries`."""
        return nullcontext([])

    def during(self, layers: Sequence, types: Tensor) -> Tensor:
        """Called after every chunk.

        Args:
            layers: of the cache; each has `keys` and `values`.
            types: (1, length), token types of the cached entries: 0 text, 1 image, 2 video.
        Returns:
            Types of what is cached now, (1, length).
        """
        return types

    def finish(self, layers: Sequence, types: Tensor, queries: list[Tensor]) -> Tensor | None:
        """Called once all is read; arguments and result are those of `during`.

        Args:
            queries: from `observer`.
        Returns:
            `None` where entries have no common type any more, so that new vision tokens must be refused.
        """
        return self.during(layers, types)

    @property
    def state(self) -> dict[str, Tensor]:
        """What must be kept with the cache for more to be read later; `load_state` takes it back."""
        return {}

    def load_state(self, state: dict[str, Tensor]) -> None:
        pass


class StreamingLLM(KvMethod):
    """The first `sinks` entries and the most recent ones (arXiv 2309.17453, section 3.2), in every layer and head.

    The paper counts positions inside the cache; here entries keep the positions that they have in the video.
    """

    name = "streamingllm"

    def __init__(self, kv_budget: int | float, num_layers: int, sinks: int = 4):
        super().__init__(kv_budget, num_layers)
        self.sinks = sinks

    def _least(self, num_text, frames):
        return self.sinks + 1

    def finish(self, layers, types, queries):
        length = types.shape[1]
        if self.entries >= length:
            return types
        index = torch.arange(length)
        kept = torch.cat([index[: self.sinks], index[length - self.entries + self.sinks :]])
        for layer in layers:
            keep_entries(layer, kept.expand(layer.keys.shape[1], -1))
        return types[:, kept.to(types.device)]


class SnapKV(KvMethod):
    """The last `window` entries, and what their queries attend to most before them (arXiv 2404.14469, section 4).

    With L entries, W = `window`, a query head h of key/value head g, and its softmax attention over all entries

        a[h, w, i] = softmax_i(q[h, w] . k[g, i] / sqrt(head_dim)),   i <= L - W + w,

    an entry before the window, i < L - W, scores

        s[g, i] = mean over the heads h of g of  max over |j - i| <= kernel // 2 of  mean over w of  a[h, w, j].

    Of each head g, the C - W entries of highest score are kept, and the window; C is `kv_budget`. The paper has no
    grouped heads; their mean, after the pooling, is how SnapKV is commonly done for them. The paper's window ends with
    the question; here it is the last that was read. What a sparse layer attends to itself is not asked: the scores are
    those of dense attention, text included.
    """

    name = "snapkv"
    takes_new_vision = False

    def __init__(self, kv_budget: int | float, num_layers: int, window: int = 64, kernel: int = 5):
        super().__init__(kv_budget, num_layers)
        self.window, self.kernel = window, kernel

    def _least(self, num_text, frames):
        return self.window + 1

    def observer(self, model):
        return last_queries(model, self.window)

    def lengths(self, length: int) -> list[int]:
        """What each layer keeps of `length` entries."""
        return [self.entries] * self.num_layers

    def finish(self, layers, types, queries):
        length = types.shape[1]
        if self.entries >= length:
            return types
        window = torch.arange(length - self.window, length)
        for layer, query, size in zip(layers, queries, self.lengths(length), strict=True):
            scores = window_scores(query, layer.keys, self.kernel)
            kept = highest(scores, size - self.window)
            keep_entries(layer, torch.cat([kept, window.to(kept).expand(len(kept), -1)], dim=1))
        return None


class PyramidKV(SnapKV):
    """SnapKV with most entries in the first layer and fewest in the last (arXiv 2406.02069, section 4.2).

    Besides the window, with C' = C - W (C is `kv_budget`, the layers' mean), the last layer keeps C' / beta, the first
    2 C' - C' / beta, and those between lie on a line. Where the first would keep more than there is, L - W, it keeps
    all, and the last 2 C' - (L - W). Fractions are rounded so that the layers keep num_layers * C together.
    """

    name = "pyramidkv"

    def __init__(self, kv_budget, num_layers, window: int = 64, kernel: int = 5, beta: int = 20):
        super().__init__(kv_budget, num_layers, window, kernel)
        self.beta = beta

    def lengths(self, length):
        if self.num_layers == 1:
            return [self.entries]
        rest = self.entries - self.window
        last = Fraction(rest, self.beta)
        first = 2 * rest - last
        if first > length - self.window:
            first = Fraction(length - self.window)
            last = 2 * rest - first
        step = (first - last) / (self.num_layers - 1)
        exact = [first - layer * step for layer in range(self.num_layers)]
        sizes = [math.floor(size) for size in exact]
        # To the largest fractions; of equal ones, to the earlier layer, so that no layer gets more than the one before.
        by_fraction = sorted(range(self.num_layers), key=lambda layer: sizes[layer] - exact[layer])
        for layer in by_fraction[: self.num_layers * rest - sum(sizes)]:
            sizes[layer] += 1
        return [self.window + size for size in sizes]


class InfiniPotV(KvMethod):
    """All text, and of vision what is new and what stands out (arXiv 2506.15745), compressed while the video is read.

    Whenever more than C vision entries are cached (`kv_budget` less the text), each head keeps C of them. (A frame that
    has been read in part is left alone until all of it is there.) "Recent" are the newest frames, one at least, that
    hold at most a quarter of the cached vision entries, and at most C / 2. In the paper's order:

    1. *Temporal redundancy* (equation 4), of the entry at place p of frame t, over the r recent frames t':
       -1/r * sum over t' of cos(k[t, p], k[t', p]). The recent frames and the highest of the others are kept, C / 2
       together (or the newest frame, where that is more).
    2. *Value norm* (equation 7): |v|, averaged over the n x n places around it; n is 7, 5, 3 and 1 in the four quarters
       of the layers. The highest of the entries that are not kept yet fill the other half.

    From the authors' code where the paper leaves it open: half and half, a quarter, the rotated keys, and n by layer
    (in the paper by each model's spread of norms). Different from both: places are true ones in later compressions
    too, where frames have holes. A hole or the outside of a frame counts in no average of norms, and in the first score
    as a cosine of 0, as do frames of another size.

    Afterwards the text comes first, then vision, with types 0 and 2. New vision tokens attend to the kept ones as if
    there had been no others: blocks of consecutive kept entries, a window of the last ones.
    """

    name = "infinipot-v"
    keeps_while_reading = True
    recent_share = 0.25
    temporal_share = 0.5
    pooling = (7, 5, 3, 1)

    def __init__(self, kv_budget: int | float, num_layers: int):
        super().__init__(kv_budget, num_layers)
        self.frames: list[tuple[int, int]] = []
        self.num_read = 0  # vision tokens that were compressed
        self.kept: Tensor | None = None  # (num_layers, num_kv_heads, C): which of all the vision tokens read

    def _least(self, num_text, frames):
        return num_text + max((height * width for height, width in frames), default=1)

    def expect(self, num_tokens, num_text=0, frames=()):
        super().expect(num_tokens, num_text, frames)
        self.frames = list(frames)

    @property
    def state(self):
        return {} if self.kept is None else {"kept": self.kept, "num_read": torch.tensor(self.num_read)}

    def load_state(self, state):
        if state:
            self.kept, self.num_read = state["kept"], int(state["num_read"])

    def during(self, layers, types):
        is_vision = types[0].cpu() != 0
        text, vision = ((~is_vision).nonzero()[:, 0], is_vision.nonzero()[:, 0])
        size = self.entries - len(text)
        assert size >= self._least(0, self.frames), "`expect` was told less text than is cached"
        num_kept = 0 if self.kept is None else self.kept.shape[-1]
        frames = FrameTable(self.frames, self.num_read + len(vision) - num_kept)
        vision, part = vision[: len(vision) - frames.rest], vision[len(vision) - frames.rest :]
        if len(vision) <= size:
            return types
        first_recent = frames.first_of_newest(min(self.recent_share * len(vision), self.temporal_share * size))
        new = torch.arange(self.num_read, self.num_read + len(vision) - num_kept, dtype=torch.int32)
        all_kept = []
        for number, layer in enumerate(layers):
            num_heads = layer.keys.shape[1]
            old = new.new_empty(num_heads, 0) if self.kept is None else self.kept[number]
            tokens = torch.cat([old, new.expand(num_heads, -1)], dim=1).to(layer.keys.device)
            keys, values = (states[0][:, vision.to(states.device)] for states in (layer.keys, layer.values))
            kernel = self.pooling[len(self.pooling) * number // self.num_layers]
            chosen = self._choose(keys, values, tokens, frames, first_recent, kernel, size)  # [num_kv_heads, C]
            all_kept.append(tokens.gather(1, chosen).cpu())
            parts = text.expand(num_heads, -1), vision[chosen.cpu()], part.expand(num_heads, -1)
            keep_entries(layer, torch.cat(parts, dim=1))
        self.kept, self.num_read = torch.stack(all_kept), self.num_read + len(new)
        return torch.cat([types.new_zeros(1, len(text)), types.new_full((1, size + len(part)), 2)], dim=1)

    def _choose(self, keys, values, tokens, frames: "FrameTable", first_recent: int, kernel: int, size: int):
        """(num_kv_heads, size), ascending."""
        redundancy = temporal_redundancy(keys, tokens, frames, first_recent)
        norms = pooled_norms(values, tokens, frames, kernel)
        is_recent = frames.frame_of(tokens) >= first_recent
        num_temporal = max(round(self.temporal_share * size), int(is_recent.sum(1).max()))
        temporal = highest((-redundancy).masked_fill(is_recent, torch.inf), num_temporal)
        return highest(norms.scatter(1, temporal, torch.inf), size)


class FrameTable:
    """Where vision tokens lie: `frames` are (height, width) in tokens, `num_read` tokens of them have been read."""

    def __init__(self, frames: Sequence[tuple[int, int]], num_read: int):
        self.grids = list(dict.fromkeys(frames))
        self.grid_numbers = torch.tensor([self.grids.index(frame) for frame in frames])
        self.sizes = [height * width for height, width in frames]
        self.ends = torch.tensor(self.sizes).cumsum(0, dtype=torch.int32)
        self.num_frames = int((self.ends <= num_read).sum())  # complete ones
        self.rest = num_read - sum(self.sizes[: self.num_frames])  # tokens of one that is not complete

    def first_of_newest(self, most: float) -> int:
        """The first of the newest frames that have at most so many tokens together; of the newest, if it has more."""
        first, total = self.num_frames - 1, self.sizes[self.num_frames - 1]
        while first and total + self.sizes[first - 1] <= most:
            first -= 1
            total += self.sizes[first]
        return first

    def frame_of(self, tokens: Tensor) -> Tensor:
        return torch.searchsorted(self.ends.to(tokens.device), tokens, right=True)

    def by_grid(self, tokens: Tensor) -> Iterator[tuple[int, int, tuple[Tensor, Tensor], Tensor, Tensor]]:
        """For each size of frame among `tokens` (num_kv_heads, V): its height and width, the (head, entry) indices of
        its tokens, their frames, and their places, 0 to height * width - 1."""
        frame = self.frame_of(tokens)
        grid = self.grid_numbers.to(frame.device)[frame]
        for number in grid.unique().tolist():
            height, width = self.grids[number]
            where = (grid == number).nonzero(as_tuple=True)
            frames = frame[where]
            starts = self.ends.to(frames.device)[frames] - height * width
            yield height, width, where, frames, (tokens[where] - starts).long()


def temporal_redundancy(keys: Tensor, tokens: Tensor, frames: FrameTable, first_recent: int) -> Tensor:
    """Mean over the frames from `first_recent` on of the cosine with the key at the same place there.

    Args:
        keys: (num_kv_heads, V, head_dim).
        tokens: (num_kv_heads, V), numbers of the entries among all vision tokens.
    Returns:
        (num_kv_heads, V), float32 or more.
    """
    units = F.normalize(keys.to(precise(keys)), dim=-1)
    scores = units.new_zeros(units.shape[:2])
    for height, width, where, frame, place in frames.by_grid(tokens):
        cells = where[0] * height * width + place
        recent = frame >= first_recent
        # The mean of the cosines is the cosine's numerator with the sum of the recent unit keys at that place.
        sums = units.new_zeros(len(keys) * height * width, keys.shape[-1])
        sums.index_add_(0, cells[recent], units[where][recent])
        scores[where] = (units[where] * sums[cells]).sum(-1)
    return scores / (frames.num_frames - first_recent)


def pooled_norms(values: Tensor, tokens: Tensor, frames: FrameTable, kernel: int) -> Tensor:
    """Norms of the values, each averaged over those `kernel` x `kernel` places around it in its frame that are there.

    Args and result as in `temporal_redundancy`.
    """
    norms = values.to(precise(values)).norm(dim=-1)
    if kernel == 1:
        return norms
    pooled = torch.empty_like(norms)
    for height, width, where, frame, place in frames.by_grid(tokens):
        _, picture = (where[0] * len(frames.sizes) + frame).unique(return_inverse=True)
        cells = picture, place // width, place % width
        maps = norms.new_zeros(2, int(picture.max()) + 1, height, width)
        maps[0][cells], maps[1][cells] = norms[where], 1
        sums, counts = F.avg_pool2d(maps, kernel, 1, kernel // 2, divisor_override=1)
        pooled[where] = sums[cells] / counts[cells]
    return pooled


def window_scores(query: Tensor, keys: Tensor, kernel: int) -> Tensor:
    """SnapKV's scores of the entries before the window; memory is (window, length) at a time.

    Args:
        query: (1, num_heads, window, head_dim), rotated, of the last tokens.
        keys: (1, num_kv_heads, length, head_dim), theirs included.
    Returns:
        (num_kv_heads, length - window), float32 or more.
    """
    window, dtype = query.shape[2], precise(keys)
    query = query.to(keys.device).unflatten(1, (keys.shape[1], -1))[0]  # [num_kv_heads, group, window, head_dim]
    ahead = torch.ones(window, window, dtype=torch.bool, device=keys.device).triu(1)
    scores = []
    for heads, key in zip(query, keys[0], strict=True):
        key, pooled = key.to(dtype), 0
        for head in heads:
            logits = head.to(dtype) @ key.T * keys.shape[-1] ** -0.5  # [window, length]
            logits[:, -window:].masked_fill_(ahead, -torch.inf)
            received = logits.softmax(-1)[:, :-window].mean(0)
            pooled = pooled + F.max_pool1d(received[None], kernel, 1, kernel // 2)[0]
        scores.append(pooled / len(heads))
    return torch.stack(scores)


def highest(scores: Tensor, count: int) -> Tensor:
    """Indices of the `count` highest of each row, ascending; of equal scores the lower index."""
    return scores.sort(dim=-1, descending=True, stable=True).indices[..., :count].sort(dim=-1).values


def keep_entries(layer, index: Tensor) -> None:
    """Replace a layer's keys and values by those at `index`, (num_kv_heads, kept)."""
    index = index[None, :, :, None].to(layer.keys.device).expand(-1, -1, -1, layer.keys.shape[-1])
    # Both are made before either is set: a layer's length may go by its keys.
    layer.keys, layer.values = layer.keys.gather(2, index), layer.values.gather(2, index)


def mask_of_layer(attention_mask: Tensor | None, num_keys: int) -> Tensor | None:
    """A layer's part of the mask that was made for the longest layer.

    All new rows see all cached entries, and one another causally, in the last columns.

    Args:
        attention_mask: (batch, 1, q_len, longest), (batch, longest) or None.
        num_keys: cached and new ones of this layer.
    """
    if not isinstance(attention_mask, Tensor) or attention_mask.shape[-1] == num_keys:
        return attention_mask
    return attention_mask[..., -num_keys:]


@contextmanager
def last_queries(model, window: int) -> Iterator[list[Tensor]]:
    """Inside, the rotated queries of the last `window` tokens that `model` has read are collected.

    Gives a list that holds, once the model has run, (1, num_heads, <= window, head_dim) for each decoder layer. A call
    may bring fewer tokens than the window.
    """
    queries: list[Tensor] = []

    def join(of_call: list[Tensor]) -> None:
        joined = [torch.cat(pair, dim=2) for pair in zip(queries, of_call, strict=True)] if queries else of_call
        queries[:] = [query[:, :, -window:] for query in joined]

    with observed_queries(model, join, window):
        yield queries


@contextmanager
def observed_queries(model, take: Callable[[list[Tensor]], None], window: int | None = None) -> Iterator[None]:
    """Inside, `take` is called after each call of the decoder that ends well.

    It gets the rotated queries of the call's last `window` tokens, or of all: (1, num_heads, <= window, head_dim) for
    each layer.
    """
    text_model = model.model.language_model
    last = slice(None if window is None else -window, None)
    of_call: list[Tensor] = []

    def collect(attention: nn.Module, args: tuple, kwargs: dict) -> None:
        hidden_states = (args[0] if args else kwargs["hidden_states"])[:, last]
        query = attention.q_proj(hidden_states).unflatten(-1, (-1, attention.head_dim)).transpose(1, 2)
        cos, sin = (part[:, last].to(query.device) for part in kwargs["position_embeddings"])
        of_call.append(apply_rotary_pos_emb(query, query, cos, sin)[0].detach())

    def begin(*_) -> None:
        of_call.clear()  # an interrupted call has read nothing

    def end(*_) -> None:
        take(list(of_call))

    handles = [text_model.register_forward_pre_hook(begin), text_model.register_forward_hook(end)]
    handles += [layer.self_attn.register_forward_pre_hook(collect, with_kwargs=True) for layer in text_model.layers]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def precise(states: Tensor) -> torch.dtype:
    """float32, or more where the states have more."""
    return torch.promote_types(states.dtype, torch.float32)


KV_METHODS: dict[str, type[KvMethod]] = {
    method.name: method for method in (PyramidKV, SnapKV, StreamingLLM, InfiniPotV)
}


def budget_method(kv_budget: int | float | None, name: str | None, num_layers: int) -> KvMethod:
    """The method of a call: PyramidKV where only a budget is given, and where none is, the one that keeps everything.

    Raises:
        ValueError: as `kv_method`; or a method is named and no budget given.
    """
    if kv_budget is None:
        if name is not None:
            raise ValueError(f"`kv_method` = {name!r} needs a `kv_budget`, such as 0.12")
        return KvMethod(1.0, num_layers)
    return kv_method(PyramidKV.name if name is None else name, kv_budget, num_layers)


def kv_method(name: str, kv_budget: int | float, num_layers: int, **options) -> KvMethod:
    """The method of this name, see the classes here.

    Args:
        name: a key of `KV_METHODS`.
        kv_budget: a share of the prompt's tokens, a float in (0, 1], or a number of entries for each layer, an int.
        num_layers: of the model.
        options: of the method.
    Raises:
        ValueError: unknown name, or no such budget.
    """
    if not isinstance(name, str) or name not in KV_METHODS:
        raise ValueError(f"`kv_method` must be one of {', '.join(KV_METHODS)}, got {name!r}")
    return KV_METHODS[name](kv_budget, num_layers, **options)
