"""Accuracy by how a budget is split between selected blocks and the window (arXiv 2510.02295, finding 3, figure 3).

    python -m analysis.allocation path/or/hub-id --questions folder --output allocation.json --plot allocation.png

A token attends to K = block_counts * block_size + window_size others, compressed blocks not counted, of which
alpha = window_size / K are local. At fixed K and block_size, `block_counts` goes from one block to all that leave a
window of one token; the checkpoint's own K is the default, and `--multiples` scale it. Where there are more splits than
`--splits`, so many are taken, evenly between the fewest blocks and the most, and the trained setting beside them.

Beside the paper's share of dense attention, 2 K / (length - 1), stands the share that is counted exactly, with
compression and without (attention_budget_videonsa.py). On prompts that are not much longer than K the formula
overstates it, up to above 1: every token is taken to have K others before it.
"""

import argparse
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from matplotlib.figure import Figure

from .accuracy import MAX_NEW_TOKENS, score
from .changes import settings
from .figure import Setting, command, reach
from .observe import is_sparse

SPLITS = 6


def allocations(budget: int, block_size: int, most: int, trained: int | None = None) -> list[tuple[int, int]]:
    """(block_counts, window_size) whose sum of tokens is the budget, by rising block_counts.

    Args:
        budget: K, tokens.
        most: so many of the possible ones, evenly by block_counts, the extremes among them.
        trained: block_counts that is added to them, where it is possible.
    Raises:
        ValueError: the budget has no room for a block and a window, or most is under 2.
    """
    largest = (budget - 1) // block_size
    if largest < 1:
        raise ValueError(f"`budget` = {budget}: it must be over `block_size` = {block_size}, for a block and a window")
    if most < 2:
        raise ValueError(f"`splits` must be at least 2, got {most!r}")
    counts = range(1, largest + 1)
    if largest > most:
        counts = {1 + round(step * (largest - 1) / (most - 1)) for step in range(most)}
        counts |= {trained} & set(range(1, largest + 1))
    return [(count, budget - count * block_size) for count in sorted(counts)]


def run(
    setting: Setting,
    budget: int | None = None,
    multiples: Sequence[float] = (1.0,),
    splits: int = SPLITS,
    max_new_tokens: int = MAX_NEW_TOKENS,
) -> dict:
    """For each budget its splits, and accuracy and shares of dense attention of each.

    Returns:
        questions and tokens as `accuracy.score`; trained: block_counts, window_size; budgets: a list of budget,
        multiple and splits, each of these a row of `accuracy.score` with block_counts, window_size and alpha.
    Raises:
        ValueError: a model that is not sparse, a budget without room for a block and a window, or as
            `accuracy.score`.
    """
    config = setting.model.config.get_text_config()
    if not is_sparse(setting.model):
        raise ValueError("`checkpoint` has no blocks to choose, or runs with `nsa_mode` = 'dense'")
    trained = {name: getattr(config, name) for name in ("block_counts", "window_size")}
    own = trained["block_counts"] * config.block_size + trained["window_size"]
    budget = own if budget is None else budget
    found = {}
    for multiple in multiples:
        tokens = round(multiple * budget)
        keep = trained["block_counts"] if tokens == own else None
        found[multiple] = tokens, allocations(tokens, config.block_size, splits, keep)
    pairs = {pair for _, of_budget in found.values() for pair in of_budget}
    rows = {
        (counts, window): partial(settings, block_counts=counts, window_size=window) for counts, window in sorted(pairs)
    }
    scored = score(setting, rows, max_new_tokens)
    rows = scored.pop("rows")
    return scored | {
        "trained": trained,
        "block_size": config.block_size,
        "budgets": [
            {
                "budget": tokens,
                "multiple": multiple,
                "splits": [
                    {"block_counts": counts, "window_size": window, "alpha": round(window / tokens, 6)}
                    | rows[counts, window]
                    for counts, window in of_budget
                ],
            }
            for multiple, (tokens, of_budget) in found.items()
        ],
    }


def is_trained(results: Mapping[str, Any], split: Mapping[str, Any]) -> bool:
    """Whether a split is the checkpoint's own."""
    return all(split[name] == value for name, value in results["trained"].items())


def plot(results: dict) -> Figure:
    """Accuracy against alpha, a line for each budget; the trained setting is circled."""
    figure = Figure(figsize=(6.5, 3.8))
    axes = figure.subplots()
    for number, of_budget in enumerate(results["budgets"]):
        splits = of_budget["splits"]
        alphas = [split["alpha"] for split in splits]
        means = [split["mean"] for split in splits]
        label = f"K = {of_budget['budget']}"
        if splits[0]["attention"]:  # not of the variant "released"
            counted = [split["attention"]["exact"] for split in splits]
            label += f": {min(counted):.1%} to {max(counted):.1%} of dense, formula "
            label += f"{splits[0]['attention']['formula']:.1%}"
        values = [mean["share"] for mean in means]
        axes.errorbar(alphas, values, reach(means), marker="o", capsize=2, color=f"C{number}", label=label)
        for split in splits:
            if is_trained(results, split):
                place = split["alpha"], split["mean"]["share"]
                axes.plot(*place, "o", markersize=13, fillstyle="none", color="black", label="as trained")
    axes.set(xlabel="alpha: window's share of the budget", ylabel="right answers, mean over kinds", xlim=(0, 1))
    axes.set_ylim(0, 1.05)
    axes.legend(frameon=False, fontsize="small")
    return figure


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--budget", type=int, help="K, tokens (default: the checkpoint's own)")
    parser.add_argument("--multiples", type=float, nargs="+", default=[1.0], metavar="M", help="of K (%(default)s)")
    parser.add_argument("--splits", type=int, default=SPLITS, help="of each budget at most (%(default)s)")
    parser.add_argument("--max_new_tokens", type=int, default=MAX_NEW_TOKENS, help="of an answer (%(default)s)")


if __name__ == "__main__":
    command(run, plot, __doc__, add_arguments)
