"""How much of dense attention a prompt costs: (query, key) pairs per head, counted exactly from its token types.

Of the variant "paper"; "released" attends to more, and in part twice.

A compressed block counts as one key.

arXiv 2510.02295 states 3.6 % of the dense budget at 128K tokens, by `paper_fraction`: what a query selects and its
window, without compression, as if every query had that many keys before it. `without_compression` counts the same
branches exactly, and `fraction` all that is computed.
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
        return self.without_compression + self.compression / max(1, self.dense)

    @property
    def without_compression(self) -> float:
        """The same without the pairs of queries and compressed blocks, which the paper leaves out."""
        return (self.selection + self.window + self.text) / max(1, self.dense)


def paper_fraction(seq_len: int, *, block_size: int = 64, block_counts: int = 32, window_size: int = 256) -> float:
    """The paper's share of the dense pairs, 2 (block_counts * block_size + window_size) / (seq_len - 1).

    Raises:
        ValueError: seq_len is under 2.
    """
    if seq_len < 2:
        raise ValueError(f"`seq_len` must be at least 2, got {seq_len!r}")
    return 2 * (block_counts * block_size + window_size) / (seq_len - 1)


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
    print("   tokens   all branches   without compression   the paper's formula")
    for argument in sys.argv[1:]:
        length = int(argument)
        budget = attention_budget(torch.ones(length))
        shares = budget.fraction, budget.without_compression, paper_fraction(length)
        print("{:>9,} {:>14.1%} {:>21.1%} {:>21.1%}".format(length, *shares))


if __name__ == "__main__":
    main()
