"""Tri-Shape: sinks, a window, and dense last queries (SCBench, arXiv 2412.10319, section 3 and its figure of patterns).

The defaults are those of the authors' code (github.com/microsoft/MInference, minference/modules/mminference.py,
`tri_shape_kernel`).
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from .method import SparsePrefill
from .pattern import Pattern


@dataclass(frozen=True)
class TriShape(SparsePrefill):
    """Query q takes key k where k < sink, q - k < window, or q is one of the last `last` queries.

    Args:
        sink: first keys that every query takes.
        window: keys before a query, its own included.
        last: queries at the end that take every key.
    Raises:
        ValueError: an option out of its range.
    """

    name: ClassVar[str] = "tri_shape"
    source: ClassVar[str] = "arXiv 2412.10319, section 3"
    block_size: int = 128
    sink: int = 30
    window: int = 1024
    last: int = 100

    def __post_init__(self):
        super().__post_init__()
        self._check_integer("sink", 0)
        self._check_integer("window", 1)
        self._check_integer("last", 0)

    def select(self, query: Tensor, key: Tensor, softmax_scale: float, layer: int) -> Pattern:
        heads, num_queries = query.shape[:2]
        keys = torch.arange(key.shape[1], device=key.device)
        rows = torch.arange(num_queries, device=key.device) >= num_queries - self.last
        return self._pattern(
            query,
            key,
            columns=(keys < self.sink).expand(heads, -1),
            diagonals=(keys < self.window).expand(heads, -1),
            rows=rows.expand(heads, -1),
        )
