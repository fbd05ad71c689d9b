"""VScan: a global and a local scan in the vision tower, pruning in a middle layer (arXiv 2505.22654, section 4)."""

from dataclasses import dataclass
from typing import ClassVar

import torch

from .reduction import Choice, TokenReduction, most_attended, most_similar, top


@dataclass(frozen=True)
class VScan(TokenReduction):
    """The language model gets `keep` of the vision tokens, others merged in, and goes on with `keep_middle` of them.

    Of each image and each step of a video, half of the kept tokens are those whose patches get the most attention in
    the last block of the vision tower (global scan), and as many those that get the most in a first block within their
    window, the best of each window first (local scan). Every other token goes to the kept one with the most similar key
    (cosine; a mean over heads, of the last block), which becomes the mean of what it got. In the middle of the language
    model, the vision tokens stay that get the most attention of the prompt's last token.

    Qwen2.5-VL's vision tower has no class token, so attention is that of all patches; the global scan takes the last
    block without windows, and the local scan the block before the first of these, whose windows are the model's own.

    Args:
        keep, keep_middle: shares, of the vision tokens and of those that are left.
        layer: of the second stage; by default the middle.
    Raises:
        ValueError: an option out of its range.
    """

    name: ClassVar[str] = "vscan"
    source: ClassVar[str] = "arXiv 2505.22654, sections 4.1 and 4.2"
    keep: float = 1 / 3
    keep_middle: float = 1 / 3
    layer: int | None = None

    def __post_init__(self):
        self._check_share("keep", least_open=True)
        self._check_share("keep_middle")
        if self.layer is not None:
            self._check_layer("layer", 1)

    def vision_blocks(self, full_attention):
        return [max(0, full_attention[0] - 1), full_attention[-1]]

    def stages(self, num_layers):
        middle = num_layers // 2 if self.layer is None else self.layer
        return {0: self._scan, max(1, middle): self._prune}

    def _scan(self, prompt, layer) -> Choice:
        shallow, deep = prompt.seen[min(prompt.seen)], prompt.seen[max(prompt.seen)]
        keep = prompt.valid & ~prompt.is_vision
        into = torch.arange(keep.shape[1], device=keep.device).expand_as(keep).clone()
        for sample, rows in prompt.units():
            numbers = prompt.number[sample, rows]
            of_all, of_windows = deep.take(numbers), shallow.take(numbers)
            count = max(1, round(self.keep * len(rows)))
            chosen = top(of_all.received, -(-count // 2))
            chosen |= top(self._by_window(of_windows, chosen), count - int(chosen.sum()))
            rest, targets = (~chosen).nonzero()[:, 0], chosen.nonzero()[:, 0]
            keep[sample, rows[targets]] = True
            into[sample, rows[rest]] = rows[targets[most_similar(of_all.keys[rest], of_all.keys[targets])]]
        return Choice(keep, into)

    @staticmethod
    def _by_window(seen, is_taken) -> torch.Tensor:
        """A score that puts the best token of every window before all second ones; those taken come last."""
        received = seen.received.masked_fill(is_taken, -torch.inf)
        same = seen.window[:, None] == seen.window
        place = torch.arange(len(received), device=received.device)
        better = (received[None] > received[:, None]) | (
            (received[None] == received[:, None]) & (place < place[:, None])
        )
        rank = (better & same & ~is_taken).sum(1).to(received.dtype)
        # Attention of a token's patches is at most their number: under 1 when divided by more.
        return (received / (1 + seen.received.max()) - rank).masked_fill(is_taken, -torch.inf)

    def _prune(self, prompt, layer) -> Choice:
        received = prompt.received(layer, last_only=True)
        return most_attended(prompt, received, lambda number: round(self.keep_middle * number))
