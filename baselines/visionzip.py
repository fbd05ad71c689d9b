"""VisionZip: tokens that the vision tower attends to, and means of the others (arXiv 2412.04467, section 3)."""

from dataclasses import dataclass
from typing import ClassVar

import torch

from .reduction import Choice, TokenReduction, most_similar, top


@dataclass(frozen=True)
class VisionZip(TokenReduction):
    """The language model gets `dominant` of the vision tokens, and `contextual` of them with others merged in.

    Of each image and each step of a video: dominant tokens are those whose patches get the most attention. Qwen2.5-VL's
    vision tower has no class token, so it is the attention of all patches of the frame; and most of its blocks attend
    in windows, so it is that of the last block that does not. Of the rest, evenly spaced ones are targets, each other
    one goes to the target with the most similar key (cosine; a mean over heads), and a target becomes the mean of what
    it got, itself included. Tokens keep their positions, targets those of theirs.

    Args:
        dominant, contextual: shares. 162 and 30 of 576 tokens are the paper's largest setting.
    Raises:
        ValueError: an option out of its range, or more than all tokens.
    """

    name: ClassVar[str] = "visionzip"
    source: ClassVar[str] = "arXiv 2412.04467, sections 3.2 and 3.3"
    dominant: float = 162 / 576
    contextual: float = 30 / 576

    def __post_init__(self):
        self._check_share("dominant")
        self._check_share("contextual")
        if not 0 < self.dominant + self.contextual <= 1:
            raise ValueError(
                f"`dominant` + `contextual` of {self.name} must be over 0 and at most 1, got "
                f"{self.dominant!r} + {self.contextual!r}"
            )

    def vision_blocks(self, full_attention):
        return full_attention[-1:]

    def stages(self, num_layers):
        return {0: self._choose}

    def _choose(self, prompt, layer) -> Choice:
        (seen,) = prompt.seen.values()
        keep = prompt.valid & ~prompt.is_vision
        into = torch.arange(keep.shape[1], device=keep.device).expand_as(keep).clone()
        for sample, rows in prompt.units():
            of_unit = seen.take(prompt.number[sample, rows])
            is_dominant = top(of_unit.received, max(1, round(self.dominant * len(rows))) if self.dominant else 0)
            rest = (~is_dominant).nonzero()[:, 0]
            count = min(len(rest), round(self.contextual * len(rows)))
            keep[sample, rows[is_dominant]] = True
            if count:
                targets = rest[torch.arange(count, device=rest.device) * len(rest) // count]
                keep[sample, rows[targets]] = True
                chosen = targets[most_similar(of_unit.keys[rest], of_unit.keys[targets])]
                chosen[(rest[:, None] == targets).any(1)] = targets  # a target is its own
                into[sample, rows[rest]] = rows[chosen]
        return Choice(keep, into)
