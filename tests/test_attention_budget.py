"""The attention budget against a count of the pairs that the oracle's masks let through."""

import pytest
import torch

from attention_budget_videonsa import attention_budget, paper_fraction


@pytest.mark.parametrize(
    ("block_size", "block_counts", "window_size"), [(4, 2, 5), (3, 1, 1), (8, 4, 100), (64, 32, 256)]
)
def test_counts_equal_the_pairs_of_the_definition(block_size, block_counts, window_size):
    types = torch.tensor([0] * 3 + [2] * 37 + [0] * 2 + [1] * 11 + [0] * 5)
    budget = attention_budget(types, block_size=block_size, block_counts=block_counts, window_size=window_size)
    compression = selection = window = text = 0
    num_vision = 0
    for row, kind in enumerate(types.tolist()):
        if kind == 0:
            text += row + 1
            continue
        t = num_vision
        num_vision += 1
        compression += sum((block + 1) * block_size <= t + 1 for block in range(t + 1))
        num_blocks = min(block_counts, t // block_size + 1)
        selection += (num_blocks - 1) * block_size + t % block_size + 1
        window += t - max(0, t - window_size + 1) + 1
    assert (budget.compression, budget.selection, budget.window) == (compression, selection, window)
    assert (budget.text, budget.dense) == (text, 58 * 59 // 2)
    assert budget.fraction == pytest.approx((compression + selection + window + text) / budget.dense, rel=1e-15)
    assert budget.without_compression == (selection + window + text) / budget.dense


def test_text_only_is_dense():
    assert attention_budget(torch.zeros(9)).fraction == 1
    assert attention_budget(torch.zeros(0)).fraction == 0


def test_what_the_paper_states():
    """3.6 % at 128K: keys that are selected and in the window, of all pairs; what compression adds is not in it."""
    assert round(100 * paper_fraction(128_000), 1) == 3.6
    budget = attention_budget(torch.ones(128_000))
    # The formula gives the first queries as many keys as the others, at most 2,304 each too many, and every query the
    # whole of its own block, 63 keys too many at most.
    too_many = (2304 * 2304 + 63 * 128_000) / (128_000 * 127_999 / 2)
    assert 0 < paper_fraction(128_000) - budget.without_compression < too_many
    assert round(100 * budget.fraction, 1) == 5.1
    with pytest.raises(ValueError, match="`seq_len` must be at least 2, got 1"):
        paper_fraction(1)


def test_batches_are_refused():
    with pytest.raises(ValueError, match=r"`token_types` must have shape \(seq_len,\), got \(1, 9\)"):
        attention_budget(torch.zeros(1, 9))
