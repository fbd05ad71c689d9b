"""XAttention: blocks by the sums of their antidiagonals (arXiv 2503.16428, section 2 and algorithm 1)."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from .method import SparsePrefill
from .pattern import Pattern
from .scores import accurate, causal_softmax, own_blocks, smallest_mass


@dataclass(frozen=True)
class XAttention(SparsePrefill):
    """Each block of queries takes the fewest blocks of keys that hold `threshold` of its estimated attention.

    Queries and keys are cut into groups of `stride`. Of a group of queries and one of keys, the estimate sees the
    products of the i-th key and the i-th query from the end, an antidiagonal: their sum, over stride * sqrt(head_dim),
    is the logit of a causal softmax over groups of keys, and a block's score is what falls into it. The block of the
    queries themselves is always taken, so that no query is without keys; the paper does not say so. Groups that lie
    wholly before the queries of the call, or behind its end, count for nothing.

    Args:
        stride: positions per group; divides block_size. 8 or 16 in the paper.
        threshold: share of the estimated attention. 0.9 in the paper.
    Raises:
        ValueError: an option out of its range.
    """

    name: ClassVar[str] = "xattention"
    source: ClassVar[str] = "arXiv 2503.16428, algorithm 1"
    block_size: int = 128
    stride: int = 16
    threshold: float = 0.9

    def __post_init__(self):
        super().__post_init__()
        self._check_integer("stride", 1)
        self._check_share("threshold")
        if self.block_size % self.stride:
            raise ValueError(f"`stride` of {self.name} must divide `block_size` = {self.block_size}, got {self.stride}")

    def select(self, query: Tensor, key: Tensor, softmax_scale: float, layer: int) -> Pattern:
        length, start = key.shape[1], key.shape[1] - query.shape[1]
        before, after = start % self.block_size, -length % self.block_size
        blocks = []
        # Head by head: at 128K tokens, the estimate of one has 8K x 8K entries.
        for head in range(query.shape[0]):
            queries = torch.nn.functional.pad(accurate(query[head]), (0, 0, before, after))
            keys = torch.nn.functional.pad(accurate(key[head * len(key) // len(query)]), (0, 0, 0, after))
            queries = queries.unflatten(0, (-1, self.stride)).flip(1).flatten(1)  # [groups, stride * head_dim]
            keys = keys.unflatten(0, (-1, self.stride)).flatten(1)
            attention = causal_softmax(queries @ keys.T * (softmax_scale / self.stride))
            first = torch.arange(len(queries), device=query.device) * self.stride - before  # of each group's queries
            is_there = (first > -self.stride) & (first < query.shape[1])
            per_block = self.block_size // self.stride
            attention = attention * is_there[:, None]
            scores = attention.unflatten(1, (-1, per_block)).sum(2).unflatten(0, (-1, per_block)).sum(1)
            blocks.append(smallest_mass(scores, self.threshold) | own_blocks(*scores.shape, scores.device))
        return self._pattern(query, key, blocks=torch.stack(blocks))
