"""How much of dense attention a prompt costs: (query, key) pairs per head, counted exactly from its token types.

Of the variant "paper"; "released" attends to more, and in part twice.

arXiv 2510.02295 states 3.6 % of the dense budget at 128K tokens. A compressed block counts as one key.
"""

import sys
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class AttentionBudget:
    """(query, key) pairs per head and layer: of the three branches, of the text rows, and of dense causal attention."""

    compression: int
    selection: int
    window: int
    text: int
    dense: int

    @property
    def fraction(self) -> float:
        """Share of the dense pairs that VideoNSA computes; above 1 where the prompt is too short for it to save."""
        return (self.compression + self.selection + self.window + self.text) / max(1, self.dense)


def attention_budget(
    token_types: torch.Tensor, *, block_size: int = 64, block_counts: int = 32, window_size: int = 256
) -> AttentionBudget:
    """Count the pairs of one sample.

    Args:
        token_types: (seq_len,), 0 for text and anything else for vision tokens, without padding.
        block_size, block_counts, window_size: as in `nsa_attention`.
    Raises:
        ValueError: token_types is not one-dimensional.
    """
    if token_types.ndim != 1:
        raise ValueError(f"`token_types` must have shape (seq_len,), got {tuple(token_types.shape)}")
    is_vision = token_types.cpu() != 0
    rows = torch.arange(len(is_vision)) + 1  # keys that a dense row sees
    seen = torch.arange(int(is_vision.sum())) + 1  # vision keys that a vision row could see
    own_block = (seen - 1) // block_size
    # The selected blocks are complete but for the token's own, of which it sees what lies behind it.
    chosen_before = own_block.clamp(max=block_counts - 1)
    return AttentionBudget(
        compression=int((seen // block_size).sum()),
        selection=int((chosen_before * block_size + seen - own_block * block_size).sum()),
        window=int(seen.clamp(max=window_size).sum()),
        text=int(rows[~is_vision].sum()),
        dense=int(rows.sum()),
    )


def main() -> None:
    """Print the shares for prompts of that many vision tokens, at the default settings."""
    for argument in sys.argv[1:]:
        budget = attention_budget(torch.ones(int(argument)))
        print(f"{int(argument):>9,} vision tokens: {budget.fraction:.1%} of the dense pairs")


if __name__ == "__main__":
    main()
