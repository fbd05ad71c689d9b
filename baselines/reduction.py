"""Token reduction: layers of the language model that go on with fewer vision tokens.

A method says at which layers, and which tokens; `Reducer` does the rest with hooks on the layers. From a stage on, the
layers see the tokens that are left, with the positions that they had, and their cache holds these alone. What
`generate` asks the cache for is the length of the prompt as it was given, so that positions go on from there.
"""

import itertools
import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, causal_mask_function
from transformers.models.qwen2_5_vl import modeling_qwen2_5_vl as qwen

from .scores import accurate


@dataclass(frozen=True)
class TokenReduction:
    """A training-free choice of vision tokens; subclasses are dataclasses whose fields are the method's options.

    Attributes:
        name: of the method.
        source: paper, with the place in it.
    """

    name: ClassVar[str]
    source: ClassVar[str]

    def stages(self, num_layers: int) -> dict[int, Callable[["Prompt", nn.Module], "Choice"]]:
        """What is chosen before which layer; a function of the prompt and of the layer before (`None` before 0)."""
        raise NotImplementedError

    def vision_blocks(self, full_attention: list[int]) -> list[int]:
        """Blocks of the vision tower whose attention it looks at; `full_attention`: those that have no windows."""
        return []

    def _check_share(self, name: str, least_open: bool = False) -> None:
        value = getattr(self, name)
        is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if not is_number or not 0 <= value <= 1 or (least_open and not value):
            raise ValueError(f"`{name}` of {self.name} must be a number from 0 to 1, got {value!r}")

    def _check_layer(self, name: str, least: int) -> None:
        value = getattr(self, name)
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            raise ValueError(f"`{name}` of {self.name} must be a layer from {least} on, got {value!r}")


@dataclass
class Choice:
    """Which rows go on.

    Attributes:
        keep: (batch, length), bool.
        into: (batch, length), int64: the row that each one's vector is averaged into, its own for those that are not
            merged; or None.
    """

    keep: Tensor
    into: Tensor | None = None


@dataclass
class Prompt:
    """The rows of a batch of prompts between two layers, padding on the left.

    Attributes:
        hidden: (batch, length, hidden_size).
        valid: (batch, length): false where a row is padding.
        is_vision: (batch, length).
        rotation: cosine and sine, (..., batch, length, head_dim).
        before: hidden vectors that went into the layer before; `None` before the first.
        unit: (batch, length): number of the image, or of the step of a video, that a vision row is of; -1 for others.
        number: (batch, length): the place of a vision row among the tokens that the vision tower gave.
        seen: by block of the vision tower, what it says of these.
    """

    hidden: Tensor
    valid: Tensor
    is_vision: Tensor
    rotation: tuple[Tensor, Tensor]
    before: Tensor | None
    unit: Tensor
    number: Tensor
    seen: dict[int, "Seen"]

    def queries_and_keys(self, layer: nn.Module) -> tuple[Tensor, Tensor]:
        """Of the layer before: (batch, num_heads, length, head_dim) and (batch, num_kv_heads, length, head_dim)."""
        attention, vectors = layer.self_attn, layer.input_layernorm(self.before)
        shape = (*vectors.shape[:2], -1, attention.head_dim)
        query = attention.q_proj(vectors).view(shape).transpose(1, 2)
        key = attention.k_proj(vectors).view(shape).transpose(1, 2)
        return qwen.apply_rotary_pos_emb(query, key, *self.rotation)

    def units(self) -> Iterator[tuple[int, Tensor]]:
        """(sample, rows) of every image and every step of a video."""
        for sample, units in enumerate(self.unit):
            for unit in units.unique().tolist():
                if unit >= 0:
                    yield sample, (units == unit).nonzero()[:, 0]

    def received(self, layer: nn.Module, last_only: bool) -> Tensor:
        """Attention that each row gets in the layer before, a mean over heads: (batch, length).

        last_only: from the last row; otherwise the sum over all rows.
        """
        query, key = self.queries_and_keys(layer)
        query, key = accurate(query), accurate(key).repeat_interleave(query.shape[1] // key.shape[1], 1)
        length, scale = key.shape[2], layer.self_attn.scaling
        sums = query.new_zeros(len(query), length)
        places = torch.arange(length, device=query.device)
        for rows in places[-1:].split(1) if last_only else places.split(256):
            scores = query[:, :, rows] @ key.transpose(2, 3) * scale
            hidden = (places[None] > rows[:, None]) | ~self.valid[:, None, None]
            weights = torch.nan_to_num(scores.masked_fill(hidden, -torch.inf).softmax(-1))
            sums += (weights * self.valid[:, None, rows, None]).sum(2).mean(1)
        return sums


@dataclass
class Seen:
    """What one block of the vision tower says of vision tokens; by the order of the tokens.

    Attributes:
        received: (num_tokens,): attention that their patches get, a mean over heads and queries of the same window or
            frame, summed over the token's patches.
        keys: (num_tokens, head_dim): means over heads and patches.
        window: (num_tokens,): number of the window, or frame, that they attend in.
    """

    received: Tensor
    keys: Tensor
    window: Tensor

    def take(self, index: Tensor) -> "Seen":
        return Seen(self.received[index], self.keys[index], self.window[index])


def most_attended(prompt: Prompt, received: Tensor, count: Callable[[int], int]) -> Choice:
    """Of every sample's vision tokens those that received most, `count` of their number; all text stays."""
    received = received.masked_fill(~prompt.is_vision, -torch.inf)
    keep = prompt.valid & ~prompt.is_vision
    for sample, number in enumerate(prompt.is_vision.sum(1).tolist()):
        keep[sample] |= top(received[sample], count(number))
    return Choice(keep)


def top(scores: Tensor, count: int) -> Tensor:
    """Where the `count` largest of a vector are; of equal ones, the first."""
    chosen = torch.zeros_like(scores, dtype=torch.bool)
    chosen[scores.argsort(descending=True, stable=True)[:count]] = True
    return chosen


def most_similar(keys: Tensor, targets: Tensor) -> Tensor:
    """For each row of keys the number of the target, by cosine: (num_rows,)."""
    normal = torch.nn.functional.normalize
    return (normal(keys, dim=-1) @ normal(targets, dim=-1).T).argmax(-1)


class Reducer:
    """Hooks that run a method in a model; `remove` takes them away."""

    def __init__(self, model: nn.Module, method: TokenReduction):
        self.method = method
        self.inner = model.model
        self.language_model, self.visual = self.inner.language_model, self.inner.visual
        self.config = model.config
        layers = self.language_model.layers
        self.stages = method.stages(len(layers))
        for layer in self.stages:
            if layer >= len(layers):
                raise ValueError(f"{method.name} has a stage at layer {layer}; the model has {len(layers)}")
        self.first = min(self.stages)
        self.prompt: Prompt | None = None
        self.index: Tensor | None = None
        self.seen: list[dict[int, Seen]] = []
        self.blocks: dict[int, Seen] = {}
        self.valid: dict[int, Tensor] = {}
        hook, watched = {"with_kwargs": True}, method.vision_blocks(list(self.visual.fullatt_block_indexes))
        self.handles = [
            self.inner.register_forward_pre_hook(self._on_call, **hook),
            self.language_model.norm.register_forward_hook(self._on_end),
            *(layer.register_forward_pre_hook(self._on_layer(number), **hook) for number, layer in enumerate(layers)),
        ]
        if watched:
            self.handles.append(self.visual.register_forward_pre_hook(self._on_vision, **hook))
            for number in watched:
                attention = self.visual.blocks[number].attn
                self.handles.append(attention.register_forward_pre_hook(self._on_block(number), **hook))
            self.handles.append(self.visual.register_forward_hook(self._on_vision_end))

    def remove(self) -> None:
        for handle in self.handles:
            handle.remove()

    # ---- The vision tower ----

    def _on_vision(self, module, args, kwargs):
        grid = kwargs.get("grid_thw", args[1] if len(args) > 1 else None)
        options = {"spatial_merge_size": module.spatial_merge_size, "window_size": module.window_size}
        if hasattr(module, "get_window_index"):  # transformers before 5.23
            order = module.get_window_index(grid)[0]
        else:
            order = qwen.get_vision_window_index(grid, **options, patch_size=module.patch_size, kwargs={})[0]
        # Where each token is among the blocks' rows.
        self.places, self.blocks = torch.as_tensor(order).argsort(), {}

    def _on_block(self, number: int):
        def hook(module, args, kwargs):
            hidden = kwargs.get("hidden_states", args[0] if args else None)
            rotation, ends = kwargs["position_embeddings"], kwargs.get("cu_seqlens", args[1] if len(args) > 1 else None)
            query, key, _ = module.qkv(hidden).reshape(len(hidden), 3, module.num_heads, -1).unbind(1)
            query, key = qwen.apply_rotary_pos_emb_vision(query, key, *rotation)
            query, key = accurate(query).transpose(0, 1), accurate(key).transpose(0, 1)  # [heads, patches, head_dim]
            received = query.new_zeros(len(hidden))
            ends = ends.tolist()
            window = torch.zeros(len(hidden), dtype=torch.long, device=hidden.device)
            for place, (start, end) in enumerate(itertools.pairwise(ends)):
                window[start:end] = place
                for rows in torch.arange(start, end).split(1024):
                    weights = (query[:, rows] @ key[:, start:end].transpose(1, 2) * module.scaling).softmax(-1)
                    received[start:end] += weights.mean(0).sum(0) / (end - start)
            unit = self.visual.spatial_merge_unit
            seen = Seen(received.view(-1, unit).sum(1), key.mean(0).unflatten(0, (-1, unit)).mean(1), window[::unit])
            self.blocks[number] = seen.take(self.places.to(hidden.device))

        return hook

    def _on_vision_end(self, module, args, output):
        self.seen.append(self.blocks)
        self.blocks = {}

    # ---- The language model ----

    def _on_call(self, module, args, kwargs):
        """At a call of the whole model: find out whether it is a prompt with vision tokens, and where these are."""
        self.prompt = self.index = None
        self.is_prompt = False
        ids = kwargs.get("input_ids", args[0] if args else None)
        cache = kwargs.get("past_key_values", kwargs.get("cache"))
        past = 0 if cache is None else int(cache.get_seq_length())
        mask = kwargs.get("attention_mask")
        types_of_all = kwargs.get("mm_token_type_ids")
        if ids is not None:
            is_image, is_video = ids == self.config.image_token_id, ids == self.config.video_token_id
        elif types_of_all is not None:
            new = types_of_all[:, -kwargs["inputs_embeds"].shape[1] :]
            is_image, is_video = new == 1, new == 2
        else:
            is_image = is_video = torch.zeros(kwargs["inputs_embeds"].shape[:2], dtype=torch.bool)
        is_vision = is_image | is_video
        if past:
            if is_vision.any():
                raise ValueError(
                    f"{self.method.name} reduces the vision tokens of whole prompts; {int(is_vision.sum())} come to a "
                    f"cache of {past} tokens"
                )
            return
        if mask is not None and (not isinstance(mask, Tensor) or mask.ndim != 2):
            raise ValueError(f"`attention_mask` of {self.method.name} must have shape (batch, length)")
        self.is_prompt, self.valid = True, {}
        valid = torch.ones_like(is_vision) if mask is None else mask[:, : is_vision.shape[1]].bool()
        valid = valid.to(is_vision.device)
        self.given = is_image & valid, is_video & valid, valid

    def _begin(self, hidden: Tensor, rotation) -> None:
        """At the first layer: the rows of the prompt as they are."""
        is_image, is_video, valid = (given.to(hidden.device) for given in self.given)
        none = torch.full(valid.shape, -1, dtype=torch.long, device=hidden.device)
        self.prompt = Prompt(hidden, valid, is_image | is_video, rotation, None, none, none, {})
        self.index = torch.arange(valid.shape[1], device=hidden.device).expand_as(valid)
        self.length = valid.shape[1]
        if not self.method.vision_blocks([0]) or not (is_image | is_video).any():
            return
        kinds = [kind for kind in (is_image, is_video) if kind.any()]
        # Before this call, as in `generate`, or within it.
        calls, self.seen = self.seen[-len(kinds) :], []
        counts = [len(next(iter(call.values())).received) for call in calls]
        if len(calls) != len(kinds) or any(int(kind.sum()) % count for kind, count in zip(kinds, counts, strict=True)):
            raise ValueError(
                f"{self.method.name} looks at the vision tower: give `pixel_values`, not features; it saw {counts} "
                f"tokens, and the prompt has {[int(kind.sum()) for kind in kinds]}"
            )
        number = torch.zeros(valid.shape, dtype=torch.long, device=hidden.device)
        offset = 0
        for kind, count in zip(kinds, counts, strict=True):
            copies = int(kind.sum()) // count  # of each prompt, side by side: beams, or several answers
            places = torch.zeros_like(number[::copies])
            places[kind[::copies]] = torch.arange(count, device=hidden.device) + offset
            number = torch.where(kind, places.repeat_interleave(copies, 0), number)
            offset += count
        merged = {}
        for block in calls[0]:
            shift, parts = 0, []
            for call in calls:
                parts.append(Seen(call[block].received, call[block].keys, call[block].window + shift))
                shift = int(parts[-1].window.max()) + 1
            merged[block] = Seen(
                torch.cat([part.received for part in parts]),
                torch.cat([part.keys for part in parts]),
                torch.cat([part.window for part in parts]),
            )
        self.prompt.seen = merged
        self.prompt.number = number
        full = self.visual.fullatt_block_indexes[-1]
        if full in merged:  # without windows, a frame attends to itself
            self.prompt.unit = torch.where(self.prompt.is_vision, merged[full].window[number], -1)

    def _on_layer(self, number: int):
        def hook(module, args, kwargs):
            hidden = args[0] if args else kwargs["hidden_states"]
            cache = kwargs.get("past_key_values", kwargs.get("cache"))
            if self.is_prompt:
                if number == 0:
                    self._begin(hidden, kwargs["position_embeddings"])
                self.prompt.hidden = hidden
                if number in self.stages and self.prompt.is_vision.any():
                    before = self.language_model.layers[number - 1] if number else None
                    self._reduce(self.stages[number](self.prompt, before))
                    hidden = self.prompt.hidden
                self.prompt.before = hidden
                self.valid[number] = self.prompt.valid
                self._count(module.self_attn)
                if number == 0 and cache is not None:
                    self._keep_length(cache)
                if number < self.first:
                    return None
                kwargs |= {"position_embeddings": self.prompt.rotation, "position_ids": None}
            elif number < self.first:
                return None
            new = hidden.shape[1]
            if not self.is_prompt:
                added = self.valid[number].new_ones(len(hidden), new)
                self.valid[number] = torch.cat([self.valid[number], added], 1)
            kwargs["attention_mask"] = self._mask(self.valid[number], new, hidden)
            return (hidden, *args[1:]) if args else (), kwargs | ({} if args else {"hidden_states": hidden})

        return hook

    def _reduce(self, choice: Choice) -> None:
        """Leave the rows that are chosen, with padding on the left of the shorter ones."""
        prompt = self.prompt
        keep = choice.keep & prompt.valid
        hidden = prompt.hidden
        if choice.into is not None:
            sums = torch.zeros_like(hidden, dtype=torch.promote_types(hidden.dtype, torch.float32))
            index = choice.into[..., None].expand_as(hidden)
            sums = sums.scatter_add(1, index, hidden.to(sums.dtype))
            counts = torch.zeros_like(choice.into).scatter_add(1, choice.into, torch.ones_like(choice.into))
            hidden = (sums / counts.clamp(min=1)[..., None]).to(hidden.dtype)
        length = int(keep.sum(1).max())
        # Kept rows last, in their order.
        order = keep.to(torch.int8).argsort(dim=1, stable=True)[:, -length:]
        self.index = self.index.gather(1, order)
        prompt.hidden = _take(hidden, order)
        prompt.rotation = tuple(_take(x.expand(*x.shape[:-3], len(keep), -1, -1), order) for x in prompt.rotation)
        prompt.valid, prompt.is_vision = keep.gather(1, order), (prompt.is_vision & keep).gather(1, order)
        prompt.unit, prompt.number = prompt.unit.gather(1, order), prompt.number.gather(1, order)

    def _mask(self, valid: Tensor, new: int, hidden: Tensor):
        """In the form that the attention implementation takes, over all that the layer's cache has and gets."""
        implementation = self.language_model.config._attn_implementation
        length = valid.shape[1]
        return ALL_MASK_ATTENTION_FUNCTIONS[implementation](
            batch_size=len(valid),
            q_length=new,
            kv_length=length,
            q_offset=length - new,
            kv_offset=0,
            mask_function=causal_mask_function,
            attention_mask=valid,
            allow_is_causal_skip=True,
            dtype=hidden.dtype,
            device=hidden.device,
            config=self.language_model.config,
        )

    def _count(self, attention: nn.Module) -> None:
        """Pairs of this prompt in this layer, beside those of all of its tokens; as `attention.forward` counts."""
        heads = attention.q_proj.out_features // attention.head_dim
        counts = []
        for taken, all_valid in zip(self.prompt.valid.sum(1).tolist(), self.given[2].sum(1).tolist(), strict=True):
            counts.append((heads * taken * (taken + 1) // 2, heads * all_valid * (all_valid + 1) // 2))
        before = vars(attention).get("sparse_pairs", ())
        before = [*before, *[(0, 0)] * (len(counts) - len(before))]
        counts += [(0, 0)] * (len(before) - len(counts))
        attention.sparse_pairs = [(a + c, b + d) for (a, b), (c, d) in zip(before, counts, strict=True)]

    def _keep_length(self, cache) -> None:
        """Let the cache say how many tokens it was given: `generate` counts positions and new tokens by it."""
        dropped = self.length - self.prompt.valid.shape[1]
        if dropped:
            of_layers = type(cache).get_seq_length

            def get_seq_length(cache, layer_idx: int = 0) -> int:
                stored = of_layers(cache, layer_idx)
                return stored + dropped if stored and layer_idx == 0 else stored

            cache.get_seq_length = types.MethodType(get_seq_length, cache)

    def _on_end(self, module, args, output):
        """Vectors at the places of their tokens; zeros where tokens were dropped."""
        if not self.is_prompt or self.prompt is None or output.shape[1] == self.length:
            return None
        prompt, whole = self.prompt, output.new_zeros(len(output), self.length, output.shape[-1])
        vectors = output * prompt.valid[..., None]
        return whole.scatter_add(1, self.index[..., None].expand_as(vectors), vectors)


def _take(x: Tensor, order: Tensor) -> Tensor:
    """Rows of (..., batch, length, size) by (batch, new_length)."""
    index = order[..., None].expand(*x.shape[:-3], *order.shape, x.shape[-1])
    return x.gather(-2, index)
