"""FlexPrefill: a pattern for each head and prompt, chosen by a divergence (arXiv 2502.20766, algorithms 1 to 4)."""

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from .method import SparsePrefill
from .pattern import Pattern
from .scores import block_attention, block_means, by_diagonal, largest, last_attention, own_blocks, smallest_mass


@dataclass(frozen=True)
class FlexPrefill(SparsePrefill):
    """Query-aware blocks where mean vectors tell what the last queries attend to, vertical and slash lines elsewhere.

    For the last `block_size` queries, a head's attention to blocks of keys is compared with that of their mean over
    mean keys. With a square root of the Jensen-Shannon divergence (natural logarithm) under tau, the head takes blocks:
    the fewest of the whole map of mean queries and keys that hold `gamma` of it. Otherwise it takes columns, and
    diagonals: the fewest of each that hold `gamma` of the last queries' attention. What a block of queries meets on a
    diagonal, all of the block take.

    As in the paper's experiments, the first and the own block of keys are always taken (with lines: the first
    `block_size` columns and diagonals), and no less than `min_budget` keys: columns and diagonals each, or blocks of
    each block of queries.

    Args:
        gamma: share of the attention.
        tau: largest divergence of a query-aware head. 0 makes none of them query-aware.
        min_budget: keys at least.
    Raises:
        ValueError: an option out of its range.
    """

    name: ClassVar[str] = "flexprefill"
    source: ClassVar[str] = "arXiv 2502.20766, algorithms 1 to 4"
    block_size: int = 128
    gamma: float = 0.9
    tau: float = 0.1
    min_budget: int = 512

    def __post_init__(self):
        super().__post_init__()
        self._check_share("gamma")
        self._check_share("tau")
        self._check_integer("min_budget", 0)

    def select(self, query: Tensor, key: Tensor, softmax_scale: float, layer: int) -> Pattern:
        last = last_attention(query, key, self.block_size, softmax_scale)  # [heads, last queries, length]
        lines = self._lines(last)
        blocks = self._blocks(query, key, softmax_scale)
        is_query_aware = self.divergence(last, query, key, softmax_scale) < self.tau
        return self._pattern(
            query,
            key,
            blocks=blocks & is_query_aware[:, None, None],
            columns=lines[0] & ~is_query_aware[:, None],
            slashes=lines[1] & ~is_query_aware[:, None],
        )

    def divergence(self, last: Tensor, query: Tensor, key: Tensor, softmax_scale: float) -> Tensor:
        """Square root of the Jensen-Shannon divergence of estimated and true attention to blocks: (num_heads,)."""
        after = -key.shape[1] % self.block_size
        true = torch.nn.functional.pad(last.mean(1), (0, after)).unflatten(1, (-1, self.block_size)).sum(2)
        # The last `block_size` queries as one block, with every block of keys before it.
        queries = query[:, -self.block_size :].to(last.dtype).mean(1, keepdim=True)
        means = block_means(key, 0, self.block_size).repeat_interleave(len(query) // len(key), 0)
        estimated = (queries @ means.transpose(1, 2) * softmax_scale).softmax(-1)[:, 0]
        middle = (true + estimated) / 2
        divergence = (torch.special.xlogy(true, true / middle) + torch.special.xlogy(estimated, estimated / middle)) / 2
        return divergence.sum(-1).clamp(min=0).sqrt()

    def _blocks(self, query, key, softmax_scale) -> Tensor:
        attention = block_attention(query, key, self.block_size, softmax_scale)
        chosen = smallest_mass(attention.flatten(1), self.gamma).view_as(attention)
        least = math.ceil(self.min_budget / self.block_size)
        chosen = chosen | (largest(attention, least) & (attention > 0))
        chosen[:, :, 0] = True
        return chosen | own_blocks(*attention.shape[1:], attention.device)

    def _lines(self, last: Tensor) -> tuple[Tensor, Tensor]:
        chosen = []
        for scores in (last.sum(1), by_diagonal(last)):
            lines = smallest_mass(scores, self.gamma) | largest(scores, self.min_budget)
            lines[:, : self.block_size] = True
            chosen.append(lines)
        return chosen[0], chosen[1]
