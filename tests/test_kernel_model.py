"""The page of expected times is what its formulas give, and the formulas count what the attention does."""

import sys
from pathlib import Path

import pytest
import torch

from attention_budget_videonsa import attention_budget

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))

import kernel_model  # noqa: E402


def test_page_is_current():
    expected = kernel_model.page(kernel_model.Model(), kernel_model.Machine())
    assert kernel_model.PAGE.read_text() == expected, "run: python benchmarks/kernel_model.py"


@pytest.mark.parametrize("tokens", [1, 63, 64, 65, 200, 2048, 5000])
@pytest.mark.parametrize("settings", [(64, 32, 256), (16, 3, 20)], ids=str)
def test_pairs_are_exact(tokens, settings):
    block, counts, window = settings
    model = kernel_model.Model(block=block, counts=counts, window=window)
    counted = attention_budget(torch.ones(tokens), block_size=block, block_counts=counts, window_size=window)
    found = kernel_model.pairs(tokens, model)
    assert {name: found[name] for name in ("compression", "selection", "window", "dense")} == {
        name: getattr(counted, name) for name in ("compression", "selection", "window", "dense")
    }
