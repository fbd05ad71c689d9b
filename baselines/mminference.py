"""MMInference: MInference with grid heads for video (arXiv 2504.16083, section 3.1, and the grid head's algorithm)."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from .minference import MInference
from .scores import last_attention


@dataclass(frozen=True)
class MMInference(MInference):
    """MInference's kinds of heads, and one more, `grid`: every stride-th key and query, and a window.

    Of a grid head, the keys at the positions phase, phase + stride, ... are taken by every query, the queries at these
    positions take every key, and all take the `window` keys before them. Stride and phase are found for each prompt
    from the attention of the last `last_queries` queries: those whose keys get the most, on average. (The paper's
    algorithm takes the largest of sums; of sums, the smallest stride would have nearly always the largest.)

    The paper permutes tokens so that a grid becomes blocks; the pairs are the same, and what is computed here.

    Not here: its heads for boundaries between modalities, which split a grid into those of video and of text tokens.
    Transformers does not tell an attention function which tokens are which.

    Args:
        strides: among which the stride is found; one, or several. The strides of a video are its tokens per row, per
            frame, and their multiples.
        heads: as in `MInference`; without, every head is a grid head.
    Raises:
        ValueError: an option out of its range.
    """

    name: ClassVar[str] = "mminference"
    source: ClassVar[str] = "arXiv 2504.16083, section 3.1"
    fallback: ClassVar[dict[str, Any]] = {"kind": "grid", "window": 1024}
    sizes: ClassVar[dict[str, tuple[str, ...]]] = MInference.sizes | {"grid": ("window",)}
    candidates: ClassVar[tuple[dict[str, Any], ...]] = (*MInference.candidates, {"kind": "grid", "window": 1024})
    strides: int | Sequence[int] = (8, 16, 32, 64, 128, 256)

    def __post_init__(self):
        super().__post_init__()
        given = (self.strides,) if isinstance(self.strides, int) else self.strides
        is_list = isinstance(given, Sequence) and not isinstance(given, str) and len(given)
        if not is_list or not all(isinstance(x, int) and not isinstance(x, bool) and x > 1 for x in given):
            raise ValueError(f"`strides` of {self.name} must be integers from 2 on, got {self.strides!r}")
        object.__setattr__(self, "strides", tuple(given))

    def _choose(self, choice: dict[str, Any], query: Tensor, key: Tensor, softmax_scale: float) -> dict[str, Tensor]:
        if choice["kind"] != "grid":
            return super()._choose(choice, query, key, softmax_scale)
        stride, phase = self.grid(query, key, softmax_scale)
        places = torch.arange(key.shape[1], device=key.device)
        is_on = places % stride == phase
        return {"columns": is_on, "rows": is_on[-query.shape[1] :], "diagonals": places < choice["window"]}

    def grid(self, query: Tensor, key: Tensor, softmax_scale: float) -> tuple[int, int]:
        """Stride and phase of one head."""
        received = last_attention(query, key, self.last_queries, softmax_scale)[0].sum(0)
        best = (-1.0, self.strides[0], 0)
        for stride in self.strides:
            after = -len(received) % stride
            sums = torch.nn.functional.pad(received, (0, after)).unflatten(0, (-1, stride)).sum(0)
            counts = torch.nn.functional.pad(torch.ones_like(received), (0, after)).unflatten(0, (-1, stride)).sum(0)
            means = sums / counts.clamp(min=1)
            phase = int(means.argmax())
            best = max(best, (float(means[phase]), stride, phase), key=lambda found: found[0])
        return best[1], best[2]
