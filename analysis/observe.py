"""Looking at every layer's attention while a prompt is read, one layer in memory at a time.

Sparse layers are those of VideoNSA; dense ones are VideoNSA's with `nsa_mode="dense"` and any other decoder's whose
attention goes through transformers' `AttentionInterface`, such as Qwen2.5-VL's.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from nsa_kernels import compression

BRANCHES = ("compression", "selection", "window")
OBSERVED = "videonsa_observed"
# Probabilities that are in memory at once.
MAX_SCORES = 1 << 24


@dataclass(frozen=True)
class Layer:
    """A layer's attention over one prompt, a batch of one without padding and without a cache.

    Attributes:
        index: of the layer.
        query: (num_heads, length, head_dim), rotated; key, value: (num_kv_heads, length, head_dim).
        is_vision: (length,), bool.
        gates: (vision tokens, num_heads, 3) in the order of `BRANCHES`; `None` for dense layers.
        scale: of the scores.
        config: the text model's.
    """

    index: int
    query: Tensor
    key: Tensor
    value: Tensor
    is_vision: Tensor
    gates: Tensor | None
    scale: float
    config: object

    @property
    def group_size(self) -> int:
        return len(self.query) // len(self.key)

    def vision(self, states: Tensor) -> Tensor:
        """The vision tokens of query, key or value: (heads, vision tokens, head_dim)."""
        return states[:, self.is_vision]

    def branch_probabilities(self, branch: str, head: int) -> Iterator[tuple[slice, Tensor]]:
        """What the vision queries of a key/value head give to each key of a branch.

        Args:
            branch: of `BRANCHES`.
            head: key/value head.
        Yields:
            queries, of the vision tokens; (queries, group_size, keys), float32: keys are vision tokens, of compression
            their complete blocks. Rows that see no block are zero.
        """
        config = self.config
        query, key = self._of_head(self.vision(self.query), head), self.vision(self.key)[head].float()
        if branch == "compression":
            yield from self._compressed(query, key)
            return
        length, size = len(key), config.block_size
        columns = torch.arange(length, device=key.device)
        if branch == "selection":
            blocks = torch.cat([chosen for _, chosen in self.selected_blocks(head)]).long()
        for rows in _chunks(length, self.group_size * length):
            positions = columns[rows][:, None]
            if branch == "window":
                seen = columns > positions - config.window_size
            else:
                is_chosen = torch.zeros(len(positions), -(-length // size) + 1, dtype=torch.bool, device=key.device)
                is_chosen.scatter_(1, blocks[rows] + 1, True)  # column 0 takes the -1 of what does not exist
                seen = is_chosen[:, 1:][:, columns // size]
            seen = seen & (columns <= positions)
            scores = (query[rows] @ key.mT) * self.scale  # [queries, group_size, keys]
            yield rows, scores.masked_fill_(~seen[:, None], -torch.inf).softmax(-1)

    def dense_probabilities(self, head: int) -> Iterator[tuple[slice, Tensor]]:
        """What all queries of a key/value head give to all keys: (queries, group_size, length), causally."""
        query, key = self._of_head(self.query, head), self.key[head].float()
        columns = torch.arange(len(key), device=key.device)
        for rows in _chunks(len(key), self.group_size * len(key)):
            scores = (query[rows] @ key.mT) * self.scale
            yield rows, scores.masked_fill_((columns > columns[rows][:, None])[:, None], -torch.inf).softmax(-1)

    def selected_blocks(self, head: int) -> Iterator[tuple[slice, Tensor]]:
        """The blocks that vision queries choose: (queries, block_counts), int32, ascending, -1 at the end."""
        query, key = self._of_head(self.vision(self.query), head), self.vision(self.key)[head].float()
        for rows, probabilities in self._compressed(query, key):
            importance = probabilities.sum(1)
            sizes = self.config.block_size, self.config.block_counts
            yield rows, compression.choose_blocks(importance, rows.start, *sizes)

    def _of_head(self, query: Tensor, head: int) -> Tensor:
        """(num_heads, length, head_dim) -> (length, group_size, head_dim), float32."""
        return query[head * self.group_size : (head + 1) * self.group_size].transpose(0, 1).float()

    def _compressed(self, query: Tensor, key: Tensor) -> Iterator[tuple[slice, Tensor]]:
        pooled = compression.pool_blocks(key, self.config.block_size)
        for rows in _chunks(len(key), self.group_size * max(1, len(pooled))):
            tiles = compression.probability_tiles(query[rows], pooled, rows.start, self.config.block_size, self.scale)
            for tile, probabilities, _ in tiles:
                missing = len(pooled) - probabilities.shape[-1]
                where = slice(rows.start + tile.start, rows.start + tile.stop)
                yield where, torch.nn.functional.pad(probabilities, (0, missing))


def _chunks(length: int, scores_per_row: int) -> Iterator[slice]:
    step = max(1, MAX_SCORES // max(1, scores_per_row))
    for start in range(0, length, step):
        yield slice(start, min(start + step, length))


@contextmanager
def observed(model, look: Callable[[Layer], None]) -> Iterator[None]:
    """Inside, every layer of a forward call of one prompt is shown to `look`, before it computes its output.

    Raises:
        ValueError: in the call, for batches, padding, a cache that is not empty, or the variant "released".
    """
    core = next(module for module in model.modules() if hasattr(module, "language_model"))
    types: list[Tensor | None] = []

    def note_types(module, args, kwargs):
        given = kwargs.get("mm_token_type_ids")
        ids = kwargs.get("input_ids", args[0] if args else None)
        if given is None and ids is not None:
            placeholders = [model.config.image_token_id, model.config.video_token_id]
            given = torch.isin(ids, torch.tensor(placeholders, device=ids.device))
        cache = kwargs.get("past_key_values")
        if cache is not None and cache.get_seq_length():
            raise ValueError(f"`past_key_values` must be empty, got {cache.get_seq_length()} cached tokens")
        if ids is not None and len(ids) != 1:
            raise ValueError(f"`input_ids` must be of one prompt, got a batch of {len(ids)}")
        mask = kwargs.get("attention_mask")
        if isinstance(mask, Tensor) and not mask.all():
            raise ValueError("`attention_mask` has padding: a single prompt needs none")
        types[:] = [None if given is None else given[0] != 0]

    def attend_sparsely(module, attend, hidden_states, query, key, value, routing, **kwargs):
        _check_whole(query, key)
        is_vision = torch.zeros(query.shape[2], dtype=torch.bool, device=query.device)
        is_vision[routing.vision_rows[1]] = True
        gates = torch.sigmoid(module._gate_logits(hidden_states[routing.vision_rows])).float()
        look(Layer(module.layer_idx, query[0], key[0], value[0], is_vision, gates, module.scaling, module.config))
        return attend(hidden_states, query, key, value, routing, **kwargs)

    def attend_densely(module, query, key, value, attention_mask, scaling=None, **kwargs):
        if getattr(module, "is_causal", True) and hasattr(module, "layer_idx"):
            _check_whole(query, key)
            is_vision = types[0]
            if is_vision is None:
                is_vision = torch.zeros(query.shape[2], dtype=torch.bool)
            scale = query.shape[-1] ** -0.5 if scaling is None else scaling
            states = query[0], key[0], value[0], is_vision.to(query.device)
            look(Layer(module.layer_idx, *states, None, scale, module.config))
        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **kwargs)

    text = model.config.get_text_config()
    if is_sparse(model) and text.nsa_variant == "released":
        raise ValueError("`nsa_variant` = 'released' cannot be observed: its branches are defined otherwise")
    before = text._attn_implementation
    AttentionInterface.register(OBSERVED, attend_densely)
    AttentionMaskInterface.register(OBSERVED, sdpa_mask)
    with ExitStack() as stack:
        stack.callback(core.register_forward_pre_hook(note_types, with_kwargs=True).remove)
        if is_sparse(model):
            for layer in core.language_model.layers:
                layer.self_attn._attend = partial(attend_sparsely, layer.self_attn, layer.self_attn._attend)
                stack.callback(delattr, layer.self_attn, "_attend")
        else:
            stack.callback(model.set_attn_implementation, {"text_config": before})
            model.set_attn_implementation({"text_config": OBSERVED})
        yield


def read_prompt(model, inputs: dict[str, Tensor], look: Callable[[Layer], None]) -> None:
    """Shows every layer's attention over one prompt to `look`.

    Args:
        inputs: of `forward`, of one prompt with a picture or a video.
    Raises:
        ValueError: as `observed`; or a prompt that is all text, whose attention has no branches.
    """
    placeholders = torch.tensor([model.config.image_token_id, model.config.video_token_id])
    if not torch.isin(inputs["input_ids"].cpu(), placeholders).any():
        raise ValueError("`questions` has a prompt without a picture or video")
    with observed(model, look):
        inputs = {name: value.to(model.device) for name, value in inputs.items()}
        model(**inputs, logits_to_keep=1, use_cache=False)


def is_sparse(model) -> bool:
    """Whether it is VideoNSA, and not in dense mode."""
    return getattr(model.config.get_text_config(), "nsa_mode", "dense") == "sparse"


def check_sparse(model) -> None:
    """ValueError where layers have no gates, or do not use them."""
    if not is_sparse(model):
        raise ValueError("`checkpoint` has no gates, or runs with `nsa_mode` = 'dense'")


def _check_whole(query: Tensor, key: Tensor) -> None:
    if len(query) != 1 or query.shape[2] != key.shape[2]:
        raise ValueError(
            f"`input_ids` must be one whole prompt, got {len(query)} of {query.shape[2]} tokens on "
            f"{key.shape[2] - query.shape[2]} cached ones"
        )
