"""A decoder layer's attention for compiled code: rows are sorted, attended to and put back behind one operator.

Which rows are vision rows, and how many, is different in every prompt. Compiled code has to be the same for all of
them, so it sees whole rows of the batch only, and a plan: what the routing is computed from, on the host, in a shape
that the prompt's tells (`VisionRouting.plan`, `ReleasedRouting.plan`). A call that is all text takes the same way.

Eager code does the same with the parts that are here too, and keeps more for backward (see nsa_kernels/operators.py).
"""

from collections.abc import Callable
from functools import partial
from itertools import groupby
from operator import itemgetter
from types import SimpleNamespace
from typing import NamedTuple

import torch
from torch import Tensor, nn
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, causal_mask_function
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import eager_attention_forward
from transformers.utils.generic import is_flash_attention_requested

try:
    from .kernels_videonsa import kernel_module
    from .released_videonsa import ReleasedRouting, released_attention
    from .routing_videonsa import (
        TextRun,
        VisionRouting,
        check_sparse_call,
        first_columns,
        is_2d,
        sample_starts,
        wants_weights,
    )
except ImportError:  # `import modeling_videonsa` from a checkout, without a package
    if __package__:
        raise
    from kernels_videonsa import kernel_module
    from released_videonsa import ReleasedRouting, released_attention
    from routing_videonsa import (
        TextRun,
        VisionRouting,
        check_sparse_call,
        first_columns,
        is_2d,
        sample_starts,
        wants_weights,
    )

attention, dense, operators, utils = map(kernel_module, ("attention", "dense", "operators", "utils"))

# Attention implementations that need a mask get as many text rows at a time as make this many scores.
MAX_SCORES = 1 << 26


def vision_inputs(query: Tensor, key: Tensor, value: Tensor, gates: Tensor, where: VisionRouting) -> tuple:
    """The arguments of `nsa_attention` for the new vision tokens over all of their sample's.

    Args:
        query: (batch, num_heads, q_len, head_dim); key, value: (batch, num_kv_heads, keys, head_dim).
        gates: (total_q, num_heads, 3).
    """
    rows, keys = where.vision_rows, where.vision_keys
    states = query.transpose(1, 2)[rows], key.transpose(1, 2)[keys], value.transpose(1, 2)[keys]
    return *states, *gates.unbind(-1), where.lengths


class TextCall(NamedTuple):
    """Text rows of one sample that are attended to at once."""

    sample: int
    rows: slice | Tensor  # among the call's tokens; (rows,)
    keys: slice | Tensor  # of the sample
    num_keys: int  # that the last row sees
    positions: Tensor | None  # (rows,), of the rows among the keys; None: the last ones
    lengths: list[int]  # rows of each run


def text_calls(where: VisionRouting, implementation: str, backend: str, device: torch.device) -> list[TextCall]:
    """All text rows, in the order of `text_runs`: a call for each run.

    The Triton kernel takes rows from anywhere in a sample, and a launch costs more than a few rows. It gets those of a
    sample at once, but for a run at the sample's start, which torch does as well.
    """
    takes_any = implementation == "sdpa" and utils.resolve_backend(backend, device) == "triton"

    def sample_of(numbered: tuple[int, TextRun]):
        number, run = numbered
        # Only where a sample's keys have no padding between them are rows as far from each other as their positions.
        is_alone = not takes_any or isinstance(run.keys, Tensor) or run.num_keys == run.stop - run.start
        return number if is_alone else (run.sample, run.keys.start, run.keys.stop)

    calls, end = [], 0
    for _, numbered in groupby(enumerate(where.text_runs), sample_of):
        runs = [run for _, run in numbered]
        lengths = [run.stop - run.start for run in runs]
        last, start, end = runs[-1], end, end + sum(lengths)
        rows, positions = slice(last.start, last.stop), None
        if len(runs) > 1:
            rows = where.text_rows[1][start:end]
            positions = rows + (last.num_keys - last.stop)
        calls.append(TextCall(last.sample, rows, last.keys, last.num_keys, positions, lengths))
    return calls


def text_inputs(query: Tensor, key: Tensor, value: Tensor, call: TextCall) -> tuple[Tensor, Tensor, Tensor]:
    """Of a call: query (num_heads, rows, head_dim), and the keys and values that its last row sees."""
    key, value = (states[call.sample][:, call.keys][:, : call.num_keys] for states in (key, value))
    return query[call.sample, :, call.rows], key, value


def place_rows(query: Tensor, vision: Tensor, text: list[Tensor], where: VisionRouting) -> Tensor:
    """Both kinds of rows where they came from: (batch, q_len, num_heads, head_dim). Padding rows are zero."""
    is_whole = len(vision) + sum(map(len, text)) == query.shape[0] * query.shape[2]
    if is_whole and isinstance(where.vision_rows[1], slice):  # one prompt without padding: its rows are in runs
        starts = where.vision_rows[1].start, *(run.start for run in where.text_runs)
        parts = sorted(zip(starts, (vision, *text), strict=True), key=itemgetter(0))
        return torch.cat([rows for _, rows in parts])[None]
    output = query.new_zeros(query.shape[0], query.shape[2], *vision.shape[1:])
    output[where.vision_rows] = vision
    if text:
        output[where.text_rows] = torch.cat(text)
    return output


def attend_all_text(
    query, key, value, where: VisionRouting, implementation: str, scaling: float, backend: str, module=None, **kwargs
) -> list[Tensor]:
    """Dense causal attention of all samples' text rows: (rows, num_heads, head_dim) of each of `text_runs`.

    Args:
        query, key, value: (batch, heads, tokens, head_dim); the others: of `attend_text`.
    """
    text = []
    for call in text_calls(where, implementation, backend, query.device):
        inputs = text_inputs(query, key, value, call)
        rows = attend_text(*inputs, implementation, scaling, backend, call.positions, module, **kwargs)
        text += rows.split(call.lengths)
    return text


def attend_text(
    query,
    key,
    value,
    implementation: str,
    scaling: float,
    backend: str,
    positions: Tensor | None = None,
    module=None,
    **kwargs,
):
    """Dense causal attention of some text rows of one sample, the last of which sees all keys.

    Args:
        query: (num_heads, rows, head_dim); key, value: (num_kv_heads, keys, head_dim).
        implementation: `_attn_implementation`. All but "sdpa" go through transformers' functions of that name.
        backend: `nsa_backend`, for "sdpa".
        positions: of the rows among the keys, for "sdpa"; the last ones by default.
        module: the layer, for transformers' functions; kwargs: of its call. Compiled code has neither at hand.
    Returns:
        (rows, num_heads, head_dim).
    """
    if implementation == "sdpa":
        states = (states.transpose(0, 1) for states in (query, key, value))
        return dense.text_rows_attention(*states, scaling, positions=positions, backend=backend)
    attend = ALL_ATTENTION_FUNCTIONS.get_interface(implementation, eager_attention_forward)
    if module is None:
        module = _LayerOfText(implementation, query.shape[0] // key.shape[0])
    # Flash attention aligns queries with the last keys by itself; the others need a mask, in bounded chunks.
    needs_mask = not is_flash_attention_requested(requested_attention_implementation=implementation)
    num_rows, num_keys = query.shape[1], key.shape[1]
    chunk = max(1, MAX_SCORES // (query.shape[0] * num_keys)) if needs_mask else num_rows
    outputs, seen = [], num_keys - num_rows
    for rows in query.split(chunk, dim=1):
        first, seen = seen, seen + rows.shape[1]
        mask = None
        if needs_mask:
            mask = ALL_MASK_ATTENTION_FUNCTIONS[implementation](
                batch_size=1,
                q_length=rows.shape[1],
                kv_length=seen,
                q_offset=first,
                mask_function=causal_mask_function,
                allow_is_causal_skip=False,
                dtype=query.dtype,
                device=query.device,
            )
        states = (x[None] for x in (rows, key[:, :seen], value[:, :seen]))
        output, _ = attend(module, *states, mask, scaling=scaling, **kwargs)
        outputs.append(output[0])  # [rows, num_heads, head_dim]
    return torch.cat(outputs)


class _LayerOfText(nn.Module):
    """What transformers' attention functions read of a layer, where an operator has only a layer's tensors."""

    is_causal = True

    def __init__(self, implementation: str, num_key_value_groups: int):
        super().__init__()
        self.eval()
        self.config = SimpleNamespace(_attn_implementation=implementation)
        self.num_key_value_groups = num_key_value_groups


_STATES = "Tensor query, Tensor key, Tensor value"


def _forward(query, key, value, gates, plan, *settings):
    *settings, implementation, save = settings
    where = routing_of(plan, query)
    inputs = vision_inputs(query, key, value, gates[where.vision_rows], where)
    rows = query.shape[0] * query.shape[2]
    vision, *saved = attention.forward_in_operator(*inputs, None, *settings, save=save, rows=rows)
    text = attend_all_text(query, key, value, where, implementation, *settings[3:])
    return place_rows(query, vision, text, where), *saved


def _backward(do, saved, query, key, value, gates, plan, *settings):
    *settings, implementation, _ = settings
    where = routing_of(plan, query)
    inputs = vision_inputs(query, key, value, gates[where.vision_rows], where)
    gradients = attention.backward_in_operator(do[where.vision_rows], saved, *inputs, None, *settings)
    dq, dk, dv, dgates = (
        torch.zeros_like(x, memory_format=torch.contiguous_format) for x in (query, key, value, gates)
    )
    dq.transpose(1, 2)[where.vision_rows] = gradients[0]
    for target, gradient in zip((dk, dv), gradients[1:3], strict=True):
        target.transpose(1, 2)[where.vision_keys] = gradient
    dgates[where.vision_rows] = torch.stack(gradients[3:], -1)
    scaling, backend = settings[3:]
    for call in text_calls(where, implementation, backend, query.device):
        attend = partial(attend_text, implementation=implementation, scaling=scaling, backend=backend)
        inputs, do_rows = text_inputs(query, key, value, call), do[call.sample, call.rows]
        dq_rows, *of_keys = operators.vjp(partial(attend, positions=call.positions), inputs, do_rows)
        dq[call.sample, :, call.rows] = dq_rows
        for target, gradient in zip((dk[call.sample], dv[call.sample]), of_keys, strict=True):
            if isinstance(call.keys, slice):
                target[:, call.keys][:, : call.num_keys] += gradient
            else:
                target.index_add_(1, call.keys[: call.num_keys], gradient)
    return dq, dk, dv, dgates


def _fake(query, key, value, gates, plan, *settings):
    _, block_counts, _, _, backend, _, save = settings
    rows = query.shape[0] * query.shape[2]
    q, k = query.transpose(1, 2), key.transpose(1, 2)
    return operators.like(q), *attention.empty_saved(q, k, rows, block_counts, backend, save)


# (query, key, value, gates, plan, settings as in `nsa_attention`, implementation of text rows, save) -> output and
# three tensors for backward, empty unless `save`; gates are (batch, q_len, num_heads, 3), plan a `VisionRouting.plan`.
attention_operator = operators.define_differentiable(
    "layer_attention",
    f"{_STATES}, Tensor gates, Tensor plan, {attention.SETTINGS}, str implementation, bool save",
    "(Tensor, Tensor, Tensor, Tensor)",
    _forward,
    _fake,
    num_inputs=4,
    backward=_backward,
)


def released_rows(
    query: Tensor, key: Tensor, value: Tensor, gate_logits: Callable, where: ReleasedRouting, **settings
) -> Tensor:
    """The variant "released", of whole prompts. Returns (batch, q_len, num_heads, head_dim).

    Args:
        query: (batch, num_heads, q_len, head_dim); key, value: (batch, num_kv_heads, keys, head_dim).
        gate_logits: (sample, rows) -> theirs, (rows, num_heads, 3).
        settings: of `released_attention`.
    """
    output = torch.zeros_like(query.transpose(1, 2))  # padding rows stay zero
    for sample, rows, layout in where.samples:
        # Nothing was cached before; a static cache is longer than the prompt.
        states = (x[sample].transpose(0, 1)[: query.shape[2]][rows] for x in (query, key, value))
        output[sample, rows] = released_attention(*states, gate_logits(sample, rows), layout, **settings)
    return output


def _released(query, key, value, gate_logits, plan, block_size, block_counts, window_size, softmax_scale, backend):
    return released_rows(
        query,
        key,
        value,
        lambda sample, rows: gate_logits[sample, rows],
        released_routing_of(plan, query),
        block_size=block_size,
        block_counts=block_counts,
        window_size=window_size,
        softmax_scale=softmax_scale,
        backend=backend,
    ).contiguous()


# (query, key, value, gate_logits, plan, settings as in `nsa_attention`) -> output, where gate_logits are (batch, q_len,
# num_heads, 3) and plan is a `ReleasedRouting.plan`.
released_operator = operators.define_differentiable(
    "released_layer_attention",
    f"{_STATES}, Tensor gate_logits, Tensor plan, {attention.SETTINGS}",
    "Tensor",
    _released,
    lambda query, *_: operators.like(query.transpose(1, 2)),
    num_inputs=4,
)


# Plans of calls of which the compiler knows the shapes only. What is wrong with a call is said when it runs.


def vision_plan(token_types: Tensor, attention_mask, position_ids, past: int, kwargs: dict, *configs) -> Tensor | None:
    """`VisionRouting.plan` of a call in compiled code, or `None` where a look at its tokens must decide what to do.

    Args:
        token_types: (batch, past + q_len).
        attention_mask, position_ids, kwargs: of the call; configs: what its kwargs override.
    """
    if not _is_plain(attention_mask, kwargs, *configs):
        return None
    mask = first_columns(attention_mask, token_types.shape[1])
    return _plan_operator(token_types, mask, position_ids, past)


def released_plan(tokens: Tensor, attention_mask, kwargs: dict, config) -> Tensor | None:
    """`ReleasedRouting.plan` of a call in compiled code; arguments and `None` as in `vision_plan`."""
    position_ids, past_key_values = kwargs["position_ids"], kwargs.get("past_key_values")
    batch, length = tokens.shape[:2]
    if position_ids.shape[1] not in (1, batch) or position_ids.shape[2] != length:
        return None
    has_cache = past_key_values is not None and past_key_values.get_seq_length()
    if has_cache or not _is_plain(attention_mask, kwargs, config):
        return None
    mask = first_columns(attention_mask, length)
    return _released_plan_operator(position_ids.expand(-1, batch, -1), mask)


def _is_plain(attention_mask, kwargs: dict, *configs) -> bool:
    is_packed = kwargs.get("cu_seq_lens_q") is not None
    return is_2d(attention_mask) and not is_packed and not wants_weights(kwargs, *configs)


def _plan(token_types, attention_mask, position_ids, past):
    starts = None if past or attention_mask is not None else sample_starts(position_ids)
    where = VisionRouting.build(token_types, attention_mask, past, starts, needs_vision=False)
    if where.lengths.offsets_q[-1]:
        check_sparse_call(attention_mask, position_ids if starts is None else None, past, {})
    result = where.plan
    _kept_with(result, lambda: where, past, token_types.device)
    return result


def _released_plan(position_ids, attention_mask):
    result = ReleasedRouting.plan_of(position_ids, attention_mask)
    if (result[0] & result[1]).any():
        check_sparse_call(attention_mask, position_ids, 0, {})
    return result


_plan_operator = operators.define(
    "plan",
    "(Tensor token_types, Tensor? attention_mask, Tensor? position_ids, int past) -> Tensor",
    _plan,
    lambda token_types, *_: token_types.new_empty(3, *token_types.shape, device="cpu"),
)
_released_plan_operator = operators.define(
    "released_plan",
    "(Tensor position_ids, Tensor? attention_mask) -> Tensor",
    _released_plan,
    lambda position_ids, _: position_ids.new_empty(2, *position_ids.shape[1:], dtype=torch.bool, device="cpu"),
)


def routing_of(plan: Tensor, query: Tensor) -> VisionRouting:
    """What a plan says; computed by the first layer and kept with the plan for the others."""
    past, device = plan.shape[2] - query.shape[2], query.device
    return _kept_with(plan, lambda: VisionRouting.from_plan(plan, past, device), past, device)


def released_routing_of(plan: Tensor, query: Tensor) -> ReleasedRouting:
    """The same in the variant "released"."""
    return _kept_with(plan, lambda: ReleasedRouting.from_plan(plan, query.device), query.device)


def _kept_with(plan: Tensor, build: Callable, *key):
    if getattr(plan, "videonsa_routing", (None,))[0] != key:
        where = build()
        where.plan = None  # no cycle
        plan.videonsa_routing = key, where
    return plan.videonsa_routing[1]
