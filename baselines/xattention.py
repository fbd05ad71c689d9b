"""XAttention: blocks by the sums of their antidiagonals (arXiv 2503.16428, section 2 and algorithm 1)."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from .method import SparsePrefill
from .pattern import Pattern
from .scores import antidiagonal_attention, own_blocks, smallest_mass


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
        blocks = []
        # Head by head: at 128K tokens, the estimate of one has 8K x 8K entries.
        for head in range(query.shape[0]):
            own = query[head], key[head * len(key) // len(query)]
            scores = antidiagonal_attention(*own, self.block_size, self.stride, softmax_scale)
            blocks.append(smallest_mass(scores, self.threshold) | own_blocks(*scores.shape, scores.device))
        return self._pattern(query, key, blocks=torch.stack(blocks))
