"""What each branch is good for: accuracy with one branch, two, all, and none (arXiv 2510.02295, tables 2, 3 and 34).

    python -m analysis.ablations path/or/hub-id --questions folder --output ablations.json --plot ablations.png

Branches that a row does not name have gates of zero; those that it names keep the gates that were learned. "static
gates" are numbers, of each layer and branch the mean over all tokens and heads of one prompt about each video (the
paper: of 1,000 samples of its training). `--gates` takes them from a result of `analysis.gates` instead, so that they
can be of other prompts. "dense" are the same weights with dense attention, the paper's Dense-NSA.
"""

import argparse
import json
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from itertools import combinations
from pathlib import Path

from matplotlib.figure import Figure

from . import gates as gates_of
from .accuracy import AS_TRAINED, MAX_NEW_TOKENS, difference, score
from .changes import Change, densely, mean_gates, static_gates, without_branches
from .figure import BRANCH_COLOURS, Setting, command, reach
from .observe import BRANCHES
from .questions import one_per_video

STATIC, DENSE, NONE = "static gates", "dense", "none"


def rows_of(values: list[dict[str, float]]) -> dict[str, Change]:
    """The rows by name. values: of the static gates, for each layer by branch."""
    rows: dict[str, Change] = {}
    for count in (1, 2):
        for kept in combinations(BRANCHES, count):
            dropped = [branch for branch in BRANCHES if branch not in kept]
            rows[" + ".join(kept)] = partial(without_branches, branches=dropped)
    return rows | {
        AS_TRAINED: nullcontext,
        NONE: partial(without_branches, branches=BRANCHES),
        STATIC: partial(static_gates, values=values),
        DENSE: densely,
    }


def run(setting: Setting, gates: Path | None = None, max_new_tokens: int = MAX_NEW_TOKENS) -> dict:
    """What `accuracy.score` returns, with `difference` to "as trained" in each row, and the `static_gates`.

    Raises:
        ValueError: a model without gates or in dense mode, a file of gates that is none, or as `accuracy.score`.
    """
    for question in setting.questions:
        question.check()  # before prompts are read for the gates
    if gates is None:
        layers = gates_of.run(replace(setting, questions=one_per_video(setting.questions)))["all"]
    else:
        try:
            layers = json.loads(gates.read_text())["results"]["all"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ValueError(f"`gates` = {str(gates)!r} is no result of analysis.gates") from error
    values = mean_gates(layers)
    scored = score(setting, rows_of(values), max_new_tokens)
    for name, row in scored["rows"].items():
        row["difference"] = difference(scored, name, AS_TRAINED)
    return scored | {"static_gates": values}


def plot(results: dict) -> Figure:
    """A bar for each row, with its interval; single kinds are ticks on it."""
    rows = results["rows"]
    figure = Figure(figsize=(7, 0.32 * len(rows) + 1))
    axes = figure.subplots()
    for place, (name, row) in enumerate(rows.items()):
        mean = row["mean"]
        colour = BRANCH_COLOURS.get(name, "tab:red" if name == AS_TRAINED else "silver")
        axes.barh(
            place, mean["share"], color=colour, xerr=reach([mean]), ecolor="black", capsize=2, height=0.7, alpha=0.8
        )
        shares = [kind["share"] for kind in row["kinds"].values()]
        if len(shares) > 1:
            axes.plot(shares, [place] * len(shares), "|", color="black", markersize=6, alpha=0.5)
    axes.set(yticks=range(len(rows)), yticklabels=list(rows), xlim=(0, 1), xlabel="right answers, mean over kinds")
    axes.invert_yaxis()
    return figure


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--gates", type=Path, help="JSON file of analysis.gates, of which the static gates are")
    parser.add_argument("--max_new_tokens", type=int, default=MAX_NEW_TOKENS, help="of an answer (%(default)s)")


if __name__ == "__main__":
    command(run, plot, __doc__, add_arguments)
