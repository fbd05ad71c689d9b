"""The methods that arXiv 2510.02295 compares with, for Qwen2.5-VL and for VideoNSA in dense mode.

    import baselines
    baselines.configure(model, "xattention", threshold=0.9)
    model.generate(...)
    print(baselines.pairs(model).fraction)

Importing this package registers every sparse prefill method as an attention implementation of transformers, so that
`from_pretrained(..., attn_implementation="xattention")` works too, with the method's defaults. Token reduction is no
attention implementation: `configure` sets it up, and `generate` and `forward` run it.
"""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

from torch import nn

from .attention import register
from .fastv import FastV
from .flexprefill import FlexPrefill
from .method import SparsePrefill, build
from .minference import MInference
from .mminference import MMInference
from .psa import PSA
from .reduction import Reducer, TokenReduction
from .tri_shape import TriShape
from .visionzip import VisionZip
from .vscan import VScan
from .xattention import XAttention

SPARSE_PREFILL = {method.name: method for method in (TriShape, MInference, FlexPrefill, XAttention, MMInference, PSA)}
TOKEN_REDUCTION = {method.name: method for method in (FastV, VisionZip, VScan)}
METHODS = SPARSE_PREFILL | TOKEN_REDUCTION
for _method in SPARSE_PREFILL.values():
    register(_method)


@dataclass(frozen=True)
class Pairs:
    """Pairs of query and key, of all layers, heads and samples, decoding steps of single tokens left out.

    Attributes:
        taken: by the method.
        dense: by dense causal attention over the same tokens.
    """

    taken: int
    dense: int

    @property
    def fraction(self) -> float:
        return self.taken / max(1, self.dense)


def configure(model: nn.Module, method: str | None, **options) -> None:
    """Let a model's prompts be read with a method; `None` gives it its dense attention (sdpa) back.

    Args:
        model: of Qwen2.5-VL, or of VideoNSA with `nsa_mode="dense"`.
        method: a name in `METHODS`.
        options: fields of the method's class.
    Raises:
        ValueError: an unknown method or option, an option out of its range, or a model in sparse mode.
    """
    built = check(method, **options)
    if built is not None and getattr(model.config.get_text_config(), "nsa_mode", "dense") != "dense":
        raise ValueError(f"`method` = {method!r} runs in the place of dense attention: set `nsa_mode` = 'dense'")
    reducer = Reducer(model, built) if isinstance(built, TokenReduction) else None
    if (before := vars(model).get("token_reducer")) is not None:
        before.remove()
    model.token_reducer = reducer
    name = method if isinstance(built, SparsePrefill) else "sdpa"
    has_parts = getattr(model.config, "text_config", None) is not None
    model.set_attn_implementation({"text_config": name} if has_parts else name)
    for attention in _attentions(model):
        attention.sparse_prefill = built
    reset_pairs(model)


def check(method: str | None, **options) -> SparsePrefill | TokenReduction | None:
    """The method with its options, without a model.

    Raises:
        ValueError: an unknown method or option, or an option out of its range.
    """
    if method is None:
        if options:
            raise ValueError(f"`{next(iter(options))}` is an option of no method")
        return None
    if method not in METHODS:
        raise ValueError(f"`method` must be one of {', '.join(METHODS)}, got {method!r}")
    return build(METHODS[method], options)


def pairs(model: nn.Module) -> Pairs:
    """What the model's prompts took since `configure` or `reset_pairs`."""
    samples = pairs_by_sample(model)
    return Pairs(sum(sample.taken for sample in samples), sum(sample.dense for sample in samples))


def pairs_by_sample(model: nn.Module) -> list[Pairs]:
    """The same for each row of the batches."""
    counts = [vars(attention).get("sparse_pairs", ()) for attention in _attentions(model)]
    rows = itertools.zip_longest(*counts, fillvalue=(0, 0))
    return [Pairs(sum(taken for taken, _ in row), sum(dense for _, dense in row)) for row in rows]


def reset_pairs(model: nn.Module) -> None:
    for attention in _attentions(model):
        attention.sparse_pairs = []


def _attentions(model: nn.Module) -> Iterator[nn.Module]:
    """The decoder layers' attention."""
    for module in model.modules():
        if getattr(module, "is_causal", False) and hasattr(module, "layer_idx"):
            yield module


__all__ = [
    "METHODS",
    "SPARSE_PREFILL",
    "TOKEN_REDUCTION",
    "Pairs",
    "SparsePrefill",
    "TokenReduction",
    "check",
    "configure",
    "pairs",
    "pairs_by_sample",
    "reset_pairs",
]
