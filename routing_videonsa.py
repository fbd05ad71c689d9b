"""Which rows of a forward call are vision rows, which are text rows, and which keys each may see."""

from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from itertools import pairwise

import torch
from torch.utils import _pytree as pytree

try:
    from .kernels_videonsa import kernel_module
except ImportError:  # `import modeling_videonsa` from a checkout, without a package
    if __package__:
        raise
    from kernels_videonsa import kernel_module

utils = kernel_module("utils")


@dataclass
class TextRun:
    """Consecutive text rows of one sample: rows `start` to `stop` see the sample's first `num_keys` keys, causally."""

    sample: int  # row of the batch; a packed row holds runs of several samples
    start: int
    stop: int
    num_keys: int
    # Where the sample's keys are in the cache: a slice, or an index tensor where padding lies between them.
    keys: slice | torch.Tensor


@dataclass
class VisionRouting:
    """Which rows of a forward call are vision rows, which are text rows, and what each may see.

    Built once per forward call and handed to every layer. "Rows" are the call's new tokens (`q_len` of them), "keys"
    the cached and the new ones (`past + q_len`).

    Attributes:
        vision_rows: an index of (batch, q_len) for the new vision tokens, ordered by sample: two tensors, (total_q,)
            each. Where a single prompt without padding has them side by side, as those of one video are, it is
            (0, slice), which copies nothing.
        vision_keys: an index of (batch, past + q_len) for all vision tokens of the samples: two tensors, (total_k,)
            each, or (sample, slice) where they are side by side.
        lengths: the samples' boundaries in the two.
        text_runs: the text rows.
        text_rows: (sample, row) index tensors of the text rows, in the order of `text_runs`.
        plan: (3, batch, past + q_len), on the CPU: what all this was computed from. It is the same for the compiler
            whatever the prompt, so this is what compiled layers take (layer_videonsa.py).
    """

    vision_rows: tuple[int, slice] | tuple[torch.Tensor, torch.Tensor]
    vision_keys: tuple[int, slice] | tuple[torch.Tensor, torch.Tensor]
    lengths: utils.SequenceLengths
    text_rows: tuple[torch.Tensor, torch.Tensor]
    text_runs: list[TextRun]
    plan: torch.Tensor

    @classmethod
    @torch.compiler.disable
    def build(
        cls,
        token_types: torch.Tensor,
        attention_mask: torch.Tensor | None,
        past: int,
        starts: torch.Tensor | None = None,
        *,
        needs_vision: bool = True,
    ) -> "VisionRouting | None":
        """Route the new tokens; `None` where no vision token is among them.

        Args:
            token_types: (batch, past + q_len); 0 text, 1 image, 2 video.
            attention_mask: (batch, past + q_len), nonzero for tokens that take part; all do where it is `None`.
            past: number of cached tokens.
            starts: (batch, q_len), nonzero at the first token of every sample, for rows that pack several; then
                attention_mask is `None` and past 0.
            needs_vision: False routes calls that are all text, too.
        """
        # One transfer to the host; everything after it is arithmetic there.
        is_valid = torch.ones_like(token_types) if attention_mask is None else attention_mask
        starts = torch.zeros_like(token_types) if starts is None else starts
        plan = torch.stack([x.to(token_types.dtype) for x in (token_types, is_valid, starts)]).cpu()
        if needs_vision and not ((plan[0] != 0) & (plan[1] != 0))[:, past:].any():
            return None
        return cls.from_plan(plan, past, token_types.device)

    @classmethod
    def from_plan(cls, plan: torch.Tensor, past: int, device: torch.device) -> "VisionRouting":
        """Of a plan, calls that are all text included; index tensors are put on `device`."""
        token_types, is_valid, starts = plan.cpu()
        is_valid = is_valid.bool()
        is_vision = (token_types != 0) & is_valid
        text_runs, lengths_q, lengths_k = [], [], []
        for row, (valid, vision) in enumerate(zip(is_valid, is_vision, strict=True)):
            firsts = {0, *starts[row].nonzero().squeeze(-1).tolist()}
            for first, end in pairwise([*sorted(firsts), len(valid)]):
                new = max(past, first)  # from where on its tokens are queries
                text_runs += _text_runs(row, valid[first:end], vision[first:end], first, past)
                lengths_q.append(int(vision[new:end].sum()))
                lengths_k.append(int(vision[first:end].sum()))
        return cls(
            vision_rows=_index(is_vision[:, past:], len(is_valid) == 1 and bool(is_valid[0, past:].all())),
            vision_keys=_index(is_vision),
            lengths=utils.SequenceLengths.from_lengths(lengths_q, lengths_k),
            text_rows=(is_valid & ~is_vision)[:, past:].nonzero(as_tuple=True),
            text_runs=text_runs,
            plan=plan,
        ).to(device)

    def to(self, device: torch.device, non_blocking: bool = False) -> "VisionRouting":
        """A copy on `device`. accelerate calls this for layers that live on another device than their inputs."""

        def move(value):
            if isinstance(value, torch.Tensor):
                return value.to(device, non_blocking=non_blocking)
            if isinstance(value, tuple):
                return tuple(map(move, value))
            if isinstance(value, list):
                return [move(item) for item in value]
            if isinstance(value, TextRun):
                return replace(value, keys=move(value.keys))
            if isinstance(value, utils.SequenceLengths):
                return replace(value, cu_seqlens_q=move(value.cu_seqlens_q), cu_seqlens_k=move(value.cu_seqlens_k))
            return value

        moved = {field.name: move(getattr(self, field.name)) for field in fields(self)}
        return replace(self, **(moved | {"plan": self.plan}))


# torch.export takes a routing apart, since it is an argument of the language model: its tensors are inputs of the
# graph, and everything else, which the graph is specialised on, is the structure that they are in.
_PARTS = {part.__name__: part for part in (VisionRouting, TextRun, utils.SequenceLengths)}


def _take_apart(value, tensors: list[torch.Tensor]):
    """Append the tensors in `value` to `tensors`; returns the rest, of types that JSON has."""
    if isinstance(value, torch.Tensor):
        tensors.append(value)
        return None
    if isinstance(value, slice):
        return {"slice": [value.start, value.stop]}
    if isinstance(value, (tuple, list)):
        return {type(value).__name__: [_take_apart(item, tensors) for item in value]}
    if type(value).__name__ in _PARTS:
        return {type(value).__name__: [_take_apart(getattr(value, field.name), tensors) for field in fields(value)]}
    return value


def _put_together(rest, tensors: Iterator[torch.Tensor]):
    if rest is None:
        return next(tensors)
    if not isinstance(rest, dict):
        return rest
    [(kind, items)] = rest.items()
    if kind == "slice":
        return slice(*items)
    items = [_put_together(item, tensors) for item in items]
    return _PARTS[kind](*items) if kind in _PARTS else tuple(items) if kind == "tuple" else items


def _flatten(routing: VisionRouting) -> tuple[list[torch.Tensor], dict]:
    rest = _take_apart(routing, tensors := [])
    return tensors, rest


def _flatten_with_keys(routing: VisionRouting):
    tensors, rest = _flatten(routing)
    return [(pytree.SequenceKey(index), tensor) for index, tensor in enumerate(tensors)], rest


pytree.register_pytree_node(
    VisionRouting,
    _flatten,
    lambda tensors, rest: _put_together(rest, iter(tensors)),
    serialized_type_name=f"{__name__}.VisionRouting",  # two versions of this code may be loaded in one process
    flatten_with_keys_fn=_flatten_with_keys,
)
# Where torch saves the example inputs of a graph by pickle, as 2.11 does, it reads them back by these names alone.
torch.serialization.add_safe_globals([*_PARTS.values(), slice])


def sample_starts(position_ids: torch.Tensor | None) -> torch.Tensor | None:
    """Where the samples of packed rows begin: (batch, q_len), or `None` where no row holds several.

    As in transformers, text positions that start again at 0 tell them apart.

    Args:
        position_ids: (4, batch, q_len), text and M-RoPE positions; in any other shape they pack nothing.
    """
    if position_ids is None or position_ids.ndim != 3 or len(position_ids) != 4:
        return None
    starts = position_ids[0] == 0
    return starts if starts[:, 1:].any() else None


def _index(is_taken: torch.Tensor, may_slice: bool = True) -> tuple[int, slice] | tuple[torch.Tensor, torch.Tensor]:
    """What `is_taken` (batch, length) is true of, as an index in order: consecutive columns of one row as a slice."""
    rows, columns = is_taken.nonzero(as_tuple=True)
    if may_slice and len(rows) and rows[0] == rows[-1] and columns[-1] - columns[0] + 1 == len(columns):
        return int(rows[0]), slice(int(columns[0]), int(columns[-1]) + 1)
    return rows, columns


def _text_runs(row: int, valid: torch.Tensor, vision: torch.Tensor, first: int, past: int) -> list[TextRun]:
    """Of one sample, which lies in a row from column `first` on."""
    positions = valid.nonzero().squeeze(-1) + first
    if len(positions) and len(positions) == positions[-1] - positions[0] + 1:
        keys = slice(int(positions[0]), int(positions[-1]) + 1)
    else:
        keys = positions
    seen = valid.cumsum(0)
    rows = (valid & ~vision).nonzero().squeeze(-1)
    rows = rows[rows + first >= past]  # [num_text_rows]
    if not len(rows):
        return []
    return [
        TextRun(row, int(run[0]) + first - past, int(run[-1]) + first - past + 1, int(seen[run[-1]]), keys)
        for run in torch.tensor_split(rows, (rows.diff() > 1).nonzero().squeeze(-1) + 1)
    ]


def is_2d(attention_mask) -> bool:
    """Whether the mask of a forward call is (batch, length), or there is none."""
    return attention_mask is None or (isinstance(attention_mask, torch.Tensor) and attention_mask.ndim == 2)


def first_columns(attention_mask, length: int) -> torch.Tensor | None:
    """The mask of the first `length` tokens; that of a static cache is longer.

    Raises:
        ValueError: the mask is not 2D.
    """
    if not is_2d(attention_mask):
        shape = type(attention_mask).__name__ if isinstance(attention_mask, dict) else tuple(attention_mask.shape)
        raise ValueError(f"`attention_mask` must be 2D, (batch, past + q_len), with vision tokens, got {shape}")
    return None if attention_mask is None else attention_mask[:, :length]


def check_sparse_call(attention_mask, position_ids, past: int, kwargs: dict, *configs) -> None:
    """Raise ValueError for calls with vision tokens that NSA cannot serve.

    Args:
        attention_mask: (batch, past + q_len) or `None`.
        position_ids: those of the call, of any shape that Qwen2.5-VL takes; `None` where `sample_starts` found samples.
        kwargs: further arguments of the call, which override the configs.
    """
    if kwargs.get("cu_seq_lens_q") is not None or _restarts(position_ids, attention_mask, past):
        raise ValueError(
            "`position_ids` or `cu_seq_lens_q` packs several samples into one row in a way that NSA cannot tell apart: "
            "pass them as rows of a batch; or, with nsa_variant='paper' and neither `attention_mask` nor a cache, pass "
            "`position_ids` of shape (4, batch, q_len) whose text positions start at 0 in every sample"
        )
    if wants_weights(kwargs, *configs):
        raise ValueError(
            "`output_attentions` = True: sparse attention has no attention weights over all keys; set "
            "model.config.nsa_mode = 'dense' to look at Qwen2.5-VL's"
        )


def refuse_export() -> None:
    """Raise where a graph is being exported: what these calls do depends on values, which it has not."""
    if torch.compiler.is_exporting():
        raise ValueError(
            "nsa_mode='sparse' cannot be exported with an `attention_mask` that is not 2D, with `cu_seq_lens_q`, with "
            "`output_attentions`, or, with nsa_variant='released', on a cache. Export without them, or set "
            "model.config.nsa_mode = 'dense'"
        )


def wants_weights(kwargs: dict, *configs) -> bool:
    """Whether a call asks for attention weights."""
    return bool(kwargs.get("output_attentions", any(config.output_attentions for config in configs)))


def _restarts(position_ids: torch.Tensor | None, attention_mask: torch.Tensor | None, past: int) -> bool:
    """Whether a row's positions return to zero, as those of a packed second sample do."""
    if position_ids is None:
        return False
    axes = position_ids if position_ids.ndim == 3 else position_ids[None]
    for sample in range(axes.shape[1]):
        positions = axes[:, sample]
        if attention_mask is not None:
            positions = positions[:, attention_mask[sample, past:].bool()]
        is_zero = (positions == 0).all(0)
        if (is_zero[1:] & (positions[0, :-1] > 0)).any():
            return True
    return False
