"""PSA, pyramid sparse attention: the less a block matters, the coarser its keys (arXiv 2512.04025, section 3)."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from .method import SparsePrefill
from .pattern import Pattern
from .scores import antidiagonal_attention, own_blocks


@dataclass(frozen=True)
class PSA(SparsePrefill):
    """Blocks of keys are taken as they are, as means of 2, 4 or 8 keys, or not at all.

    For each block of queries, blocks of keys are sorted by their estimated attention. Those within the first `full` of
    its sum are taken as they are, those up to `by_2`, `by_4` and `by_8` as means of so many keys and values, the others
    left out. A mean of n keys counts n times: log(n) is added to its logit. The first block and the queries' own are
    taken as they are, as in the authors' code. The estimate is XAttention's, as in their example for Qwen2.5-VL
    (github.com/ziplab/Pyramid-Sparse-Attention).

    Not here: their limits on pooling where neighbouring keys differ, and dense blocks for text.

    A mean counts as one key in the pairs. Flex attention's masks know of no means: the block loop computes them on
    every device.

    Args:
        full, by_2, by_4, by_8: ends of the ranges of the cumulative sum, ascending; equal ends leave a range empty. The
            defaults are the paper's example for video.
        stride: as in XAttention.
    Raises:
        ValueError: an option out of its range, or a block_size that is no multiple of 8.
    """

    name: ClassVar[str] = "psa"
    source: ClassVar[str] = "arXiv 2512.04025, section 3"
    block_size: int = 128
    full: float = 0.7
    by_2: float = 0.8
    by_4: float = 0.9
    by_8: float = 0.9
    stride: int = 16

    def __post_init__(self):
        super().__post_init__()
        for name in ("full", "by_2", "by_4", "by_8"):
            self._check_share(name)
        self._check_integer("stride", 1)
        if list(self._ends) != sorted(self._ends):
            raise ValueError(f"`full`, `by_2`, `by_4`, `by_8` of {self.name} must ascend, got {self._ends}")
        if self.block_size % 8 or self.block_size % self.stride:
            raise ValueError(
                f"`block_size` of {self.name} must be a multiple of 8 and of `stride` = {self.stride}, "
                f"got {self.block_size}"
            )

    @property
    def _ends(self) -> Sequence[float]:
        return self.full, self.by_2, self.by_4, self.by_8

    def select(self, query: Tensor, key: Tensor, softmax_scale: float, layer: int) -> Pattern:
        pooled = []
        for head in range(query.shape[0]):
            own = query[head], key[head * len(key) // len(query)]
            pooled.append(self._levels(antidiagonal_attention(*own, self.block_size, self.stride, softmax_scale)))
        pooled = torch.stack(pooled)
        return self._pattern(query, key, blocks=pooled == 1, pooled=pooled.masked_fill(pooled == 1, 0))

    def _levels(self, scores: Tensor) -> Tensor:
        """How many keys make one: 1, 2, 4, 8, or 0 for those that are left out; (query blocks, key blocks), uint8."""
        values, order = scores.sort(dim=-1, descending=True, stable=True)
        before = (values.cumsum(-1) - values) / scores.sum(-1, keepdim=True)
        ranked = torch.zeros_like(order, dtype=torch.uint8)
        for level, end in reversed(list(zip((1, 2, 4, 8), self._ends, strict=True))):
            ranked[before < end] = level
        levels = torch.zeros_like(ranked).scatter(-1, order, ranked)
        levels[scores <= 0] = 0
        levels[:, 0] = 1
        levels[own_blocks(*scores.shape, scores.device)] = 1
        return levels
