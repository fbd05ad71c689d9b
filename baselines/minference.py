"""MInference: A-shape, vertical-slash or block-sparse, chosen for each head offline (arXiv 2407.02490, algorithms 1-3).

`python -m baselines.search` chooses (algorithm 1). Numbers that the paper leaves open are those of the authors' code
(github.com/microsoft/MInference, minference/modules/minference_forward.py and mminference.py).
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from .method import SparsePrefill
from .pattern import Pattern
from .scores import block_attention, by_diagonal, largest, last_attention, own_blocks


@dataclass(frozen=True)
class MInference(SparsePrefill):
    """Every head takes one of three kinds of pairs, always the same kind and as many.

    - `a_shape`: the first `sink` keys and the `window` before the query, its own included;
    - `vertical_slash` (algorithm 2): the `vertical` columns and `slash` diagonals that get the most attention of the
      last `last_queries` queries, at least `min_vertical` and `min_slash` of them; what a block of queries meets on a
      diagonal, all of the block take, as in the paper's kernel;
    - `block_top_k` (algorithm 3): of each block of queries, the `blocks` blocks of keys with the largest products of
      mean vectors. The block of the queries themselves is always one of them.

    Args:
        heads: file of `baselines.search`, or its lists: for each layer, for each head `{"kind": ..., sizes}`. Without,
            every head is `fallback`, as in the authors' code.

    Class attributes:
        fallback: of heads for which nothing was searched.
        sizes: what a head's choice has beside its `kind`.
        candidates: the paper's search space, with the A-shape of the authors' code.
    Raises:
        ValueError: an option out of its range, or a file that holds something else.
    """

    name: ClassVar[str] = "minference"
    source: ClassVar[str] = "arXiv 2407.02490, algorithms 1 to 3"
    fallback: ClassVar[dict[str, Any]] = {"kind": "vertical_slash", "vertical": 1000, "slash": 6096}
    sizes: ClassVar[dict[str, tuple[str, ...]]] = {
        "a_shape": ("sink", "window"),
        "vertical_slash": ("vertical", "slash"),
        "block_top_k": ("blocks",),
    }
    candidates: ClassVar[tuple[dict[str, Any], ...]] = (
        {"kind": "a_shape", "sink": 128, "window": 4096},
        {"kind": "vertical_slash", "vertical": 30, "slash": 2048},
        {"kind": "vertical_slash", "vertical": 100, "slash": 1800},
        {"kind": "vertical_slash", "vertical": 500, "slash": 1500},
        {"kind": "vertical_slash", "vertical": 3000, "slash": 200},
        {"kind": "block_top_k", "blocks": 100},
    )
    block_size: int = 64
    heads: str | Path | Sequence[Sequence[dict[str, Any]]] | None = None
    last_queries: int = 64
    min_vertical: int = 30
    min_slash: int = 50

    def __post_init__(self):
        super().__post_init__()
        self._check_integer("last_queries", 1)
        self._check_integer("min_vertical", 0)
        self._check_integer("min_slash", 0)
        if self.heads is not None:
            object.__setattr__(self, "heads", read_heads(self.heads, self.sizes))

    def select(self, query: Tensor, key: Tensor, softmax_scale: float, layer: int) -> Pattern:
        return self.pattern_of(self._choices(layer, query.shape[0]), query, key, softmax_scale)

    def _choices(self, layer: int, num_heads: int) -> Sequence[dict[str, Any]]:
        if self.heads is None:
            return [self.fallback] * num_heads
        if layer >= len(self.heads) or len(self.heads[layer]) != num_heads:
            there = len(self.heads[layer]) if layer < len(self.heads) else 0
            raise ValueError(f"`heads` of {self.name} has {there} heads for layer {layer}, the model {num_heads}")
        return self.heads[layer]

    def pattern_of(self, choices: Sequence[dict[str, Any]], query, key, softmax_scale) -> Pattern:
        """The pairs of heads with these choices."""
        shapes = self._pattern(query, key)
        heads, length = shapes.num_heads, shapes.length
        lists = {
            "blocks": (heads, shapes.num_query_blocks, shapes.num_key_blocks),
            "rows": (heads, length - shapes.start),
            "columns": (heads, length),
            "diagonals": (heads, length),
            "slashes": (heads, length),
        }
        lists = {name: torch.zeros(shape, dtype=torch.bool, device=key.device) for name, shape in lists.items()}
        group_size = len(query) // len(key)
        for head, choice in enumerate(choices):
            own = query[head][None], key[head // group_size][None]
            for name, listed in self._choose(choice, *own, softmax_scale).items():
                lists[name][head] = listed
        return self._pattern(query, key, **{name: listed for name, listed in lists.items() if listed.any()})

    def _choose(self, choice: dict[str, Any], query: Tensor, key: Tensor, softmax_scale: float) -> dict[str, Tensor]:
        """Lists of a `Pattern` for one head; query (1, num_queries, head_dim), key (1, length, head_dim)."""
        places = torch.arange(key.shape[1], device=key.device)
        if choice["kind"] == "a_shape":
            return {"columns": places < choice["sink"], "diagonals": places < choice["window"]}
        if choice["kind"] == "vertical_slash":
            last = last_attention(query, key, self.last_queries, softmax_scale)
            return {
                "columns": largest(last.sum(1), max(self.min_vertical, choice["vertical"]))[0],
                "slashes": largest(by_diagonal(last), max(self.min_slash, choice["slash"]))[0],
            }
        attention = block_attention(query, key, self.block_size, softmax_scale)[0]
        is_own = own_blocks(*attention.shape, attention.device)
        # Ahead of all others, which are at most 1; later blocks have none.
        return {"blocks": largest(attention.masked_fill(is_own, 2.0), choice["blocks"]) & (attention > 0)}


def read_heads(heads: Any, sizes: dict[str, tuple[str, ...]]) -> list[list[dict[str, Any]]]:
    """Choices for each layer and head, from a file or as they are.

    Raises:
        ValueError: they are something else.
    """
    if isinstance(heads, (str, Path)):
        path = Path(heads)
        if not path.is_file():
            raise ValueError(f"`heads` = {str(heads)!r} is no file; `python -m baselines.search` writes one")
        try:
            heads = json.loads(path.read_text())["layers"]
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise ValueError(f"`heads` = {str(path)!r} is not of `python -m baselines.search`: {error!r}") from error
    try:
        layers = [[dict(choice) for choice in layer] for layer in heads]
    except (TypeError, ValueError) as error:
        raise ValueError(f"`heads` must list a choice for each layer and head, got {heads!r}") from error
    for number, layer in enumerate(layers):
        for head, choice in enumerate(layer):
            check_choice(choice, sizes, f"`heads` of layer {number}, head {head}")
    return layers


def check_choice(choice: dict[str, Any], sizes: dict[str, tuple[str, ...]], where: str) -> None:
    """Raise a ValueError that begins with `where` if this is no choice."""
    kind = choice.get("kind")
    if kind not in sizes:
        raise ValueError(f"{where}: `kind` must be one of {', '.join(sizes)}, got {kind!r}")
    for name in sizes[kind]:
        value = choice.get(name)
        if not isinstance(value, int) or isinstance(value, bool) or value < 0:
            raise ValueError(f"{where}: `{name}` must be an integer from 0 on, got {value!r}")
