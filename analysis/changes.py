"""Changes of a model for as long as a `with` block, such as other settings, fewer branches, or a method of `baselines`.

Each is a context manager whose first argument is the model; a row of an accuracy table names what follows it:

    rows = {"as trained": nullcontext, "dense": densely, "one block": partial(settings, block_counts=1)}

What was before is there again after the block, also where the block raises.
"""

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

import baselines

from .observe import BRANCHES

Change = Callable[[Any], AbstractContextManager]


@contextmanager
def settings(model, **values) -> Iterator[None]:
    """Inside, the model's configuration has these values, such as block_counts=16 or nsa_mode="dense".

    Raises:
        ValueError: a name that the configuration does not have, or a value that it does not take.
    """
    config = model.config
    for name, value in values.items():
        if not hasattr(config, name):
            raise ValueError(f"`{name}` = {value!r} is no setting of {type(config).__name__}")
    with ExitStack() as stack:  # undone in reverse, since a configuration may take some values only together
        for name, value in values.items():
            stack.callback(setattr, config, name, getattr(config, name))
            setattr(config, name, value)
        yield


def densely(model) -> AbstractContextManager:
    """Inside, attention is dense, whatever the model."""
    return settings(model, nsa_mode="dense") if hasattr(model.config, "nsa_mode") else nullcontext()


@contextmanager
def without_branches(model, branches: Sequence[str]) -> Iterator[None]:
    """Inside, the gates of these branches are zero. The branches are computed all the same.

    Args:
        branches: of `BRANCHES`.
    Raises:
        ValueError: another branch, or a model without gates.
    """
    for branch in branches:
        if branch not in BRANCHES:
            raise ValueError(f"`branches` must be of {', '.join(BRANCHES)}, got {branch!r}")
    columns = [BRANCHES.index(branch) for branch in branches]

    def shut(module, inputs, logits):
        logits = logits.unflatten(-1, (-1, 3)).clone()
        logits[..., columns] = -torch.inf
        return logits.flatten(-2)

    with _hooked(model, [shut] * len(_attentions(model))):
        yield


@contextmanager
def static_gates(model, values: Sequence[Mapping[str, float]]) -> Iterator[None]:
    """Inside, the gates are these numbers, for every token and head alike (arXiv 2510.02295, table 34).

    The paper replaces "each layer's gate with a static value averaged from a 1K training subset". They pass through the
    model's own sigmoid, as the logits that give them, so that they are right to the rounding of its dtype.

    Args:
        values: for each layer, in [0, 1] by branch, such as `mean_gates` returns.
    Raises:
        ValueError: not as many layers as the model has, other branches, a number outside of [0, 1], or no gates.
    """
    attentions = _attentions(model)
    if len(values) != len(attentions):
        raise ValueError(f"`values` must be of {len(attentions)} layers, got {len(values)}")
    for index, layer in enumerate(values):
        if set(layer) != set(BRANCHES) or not all(0 <= value <= 1 for value in layer.values()):
            raise ValueError(f"`values` of layer {index} must be in [0, 1] for {', '.join(BRANCHES)}, got {layer!r}")
    temperature = model.config.gate_temperature

    def replace(logits: Tensor, module, inputs, output: Tensor) -> Tensor:
        return logits.to(output).repeat(output.shape[-1] // 3).expand_as(output)

    by_layer = [torch.tensor([layer[branch] for branch in BRANCHES]).double() for layer in values]
    with _hooked(model, [functools.partial(replace, gates.logit() * temperature) for gates in by_layer]):
        yield


def mean_gates(layers: Sequence[Mapping[str, Mapping]]) -> list[dict[str, float]]:
    """For `static_gates`, of one kind of what `gates.run` returns: for each layer the branches' means."""
    return [{branch: float(layer[branch]["mean"]) for branch in BRANCHES} for layer in layers]


@contextmanager
def method(model, name: str, **options) -> Iterator[None]:
    """Inside, prompts are read with a method of `baselines`, in the place of dense attention; sparse mode is off.

    Raises:
        ValueError: a method is at work already, or as `baselines.configure`.
    """
    text = model.config.get_text_config()
    before = text._attn_implementation
    if runs_method(model):
        raise ValueError(f"`name` = {name!r}: the model runs with a method already")
    baselines.check(name, **options)
    has_parts = getattr(model.config, "text_config", None) is not None
    with ExitStack() as stack:
        stack.enter_context(densely(model))
        # `configure` leaves sdpa behind, which need not be what was there.
        stack.callback(model.set_attn_implementation, {"text_config": before} if has_parts else before)
        stack.callback(baselines.configure, model, None)
        baselines.configure(model, name, **options)
        yield


def runs_method(model) -> bool:
    """Whether prompts are read with a method of `baselines`."""
    is_sparse_prefill = model.config.get_text_config()._attn_implementation in baselines.SPARSE_PREFILL
    return is_sparse_prefill or vars(model).get("token_reducer") is not None


def _attentions(model) -> list[nn.Module]:
    """The layers' attention, by layer.

    Raises:
        ValueError: a model without gates.
    """
    layers = [layer.self_attn for layer in model.model.language_model.layers]
    if not all(hasattr(attention, "g_proj_2") for attention in layers):
        raise ValueError(f"`model` has no gates: it is of {type(model).__name__}")
    return layers


@contextmanager
def _hooked(model, hooks: Sequence[Callable]) -> Iterator[None]:
    """Inside, what `g_proj_2` returns passes through a hook, one for each layer."""
    with ExitStack() as stack:
        for attention, hook in zip(_attentions(model), hooks, strict=True):
            stack.callback(attention.g_proj_2.register_forward_hook(hook).remove)
        yield
