"""FastV: vision tokens that get little attention in a first layer are dropped (arXiv 2403.06764, section 4)."""

from dataclasses import dataclass
from typing import ClassVar

from .reduction import Choice, TokenReduction, most_attended


@dataclass(frozen=True)
class FastV(TokenReduction):
    """After `layer` layers, a share `ratio` of the vision tokens is dropped, those with the least attention.

    Args:
        layer: the K of the paper, from 1 on.
        ratio: the R of the paper.
        queries: whose attention counts, in the last of these layers: "all" (the paper: what a token gets of all others,
            on average) or "last" (the authors' code: of the prompt's last token).
    Raises:
        ValueError: an option out of its range.
    """

    name: ClassVar[str] = "fastv"
    source: ClassVar[str] = "arXiv 2403.06764, section 4.1"
    layer: int = 2
    ratio: float = 0.5
    queries: str = "all"

    def __post_init__(self):
        self._check_layer("layer", 1)
        self._check_share("ratio")
        if self.queries not in ("all", "last"):
            raise ValueError(f"`queries` of {self.name} must be 'all' or 'last', got {self.queries!r}")

    def stages(self, num_layers):
        return {self.layer: self._choose}

    def _choose(self, prompt, layer) -> Choice:
        received = prompt.received(layer, self.queries == "last")
        return most_attended(prompt, received, lambda number: number - int(self.ratio * number))
