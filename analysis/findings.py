"""What the paper finds (arXiv 2510.02295, abstract and introduction), and what an experiment says of it.

Each function reads results of the analyses and returns a `Finding`. A verdict follows from numbers by the rule that the
function states: an interval of 95 % on one side of zero decides, one with zero in it does not.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from .context import SPARSE, TRAINED_DENSE
from .figure import Z, paired_difference
from .main_table import DENSE, RUN_DENSE, STATIC, VIDEONSA
from .observe import BRANCHES

SHOWS, CONTRARY, OPEN = "shows it", "shows the contrary", "cannot tell"
PERMUTATIONS = 5000
LEVEL = 0.05


@dataclass(frozen=True)
class Finding:
    """
    Attributes:
        claim: the paper's, with where it is.
        rule: when the experiment shows it.
        verdict: `SHOWS`, `CONTRARY` or `OPEN`.
        evidence: sentences with the numbers.
    """

    claim: str
    rule: str
    verdict: str
    evidence: tuple[str, ...]


def verdict_of(difference: Mapping[str, float]) -> str:
    """Of a difference that the claim wants above zero."""
    return SHOWS if difference["low"] > 0 else CONTRARY if difference["high"] < 0 else OPEN


def points(difference: Mapping[str, float]) -> str:
    """In percentage points, with the interval."""
    mean, low, high = (100 * difference[name] for name in ("mean", "low", "high"))
    return f"{mean:+.1f} points ({low:+.1f} to {high:+.1f})"


def percent(numbers: Mapping[str, float]) -> str:
    return f"{numbers['share']:.1%} ({numbers['low']:.1%} to {numbers['high']:.1%})"


def comparison(main_table: Mapping[str, Any]) -> Finding:
    """The table as a whole: VideoNSA against the best of the training-free rows."""
    rows = main_table["rows"]
    others = [name for name in rows if name not in (DENSE, VIDEONSA, STATIC, RUN_DENSE)]
    best = max(others, key=lambda name: rows[name]["mean"]["share"])
    videos = main_table["questions"]["videos"]
    over_best = paired_difference(rows[VIDEONSA]["scores"], rows[best]["scores"], videos)
    over_dense = rows[VIDEONSA]["difference"]
    verdicts = {verdict_of(over_best), verdict_of(over_dense)}
    return Finding(
        "VideoNSA is better than the baselines, and than the dense model, on average (section 3.1, table 1).",
        "Right answers, paired by question, less those of the best baseline and less those of the dense model.",
        verdicts.pop() if len(verdicts) == 1 else OPEN,
        (
            f"VideoNSA less the best baseline, `{best}`: {points(over_best)}.",
            f"VideoNSA less the model that was trained densely: {points(over_dense)}.",
        ),
    )


def scaling(context: Mapping[str, Any], trained_seconds: float) -> Finding:
    """Length of video: sparse and dense training, within the lengths of the training and beyond."""
    (cell,) = context["cells"]
    rows, videos = cell["rows"], context["questions"]["videos"]
    seconds = context["questions"]["seconds"]
    lengths = [length for length in sorted(set(seconds)) if length > trained_seconds]
    taken = [index for index, length in enumerate(seconds) if length in lengths]
    beyond = paired_difference(
        *([rows[name]["scores"][index] for index in taken] for name in (SPARSE, TRAINED_DENSE)),
        [videos[index] for index in taken],
    )
    evidence = []
    for length in sorted(set(seconds)):
        sparse, dense = (rows[name]["by_seconds"][f"{length:g}"] for name in (SPARSE, TRAINED_DENSE))
        evidence.append(f"{length:g} s: sparse {percent(sparse)}, dense {percent(dense)}.")
    evidence.append(f"Sparse less dense, all lengths beyond the training's: {points(beyond)}.")
    return Finding(
        "Finding 1: it scales reliably beyond the length of its training, where dense attention does not (abstract; "
        "section 4, scaling of context).",
        f"Sparse less dense training on videos longer than the training's {trained_seconds:g} seconds.",
        verdict_of(beyond),
        tuple(evidence),
    )


def allocation(results: Mapping[str, Any]) -> Finding:
    """Of the trained budget, the trained split against the others."""
    videos, trained = results["questions"]["videos"], results["trained"]
    evidence, verdicts = [], set()
    for of_budget in results["budgets"]:
        splits = of_budget["splits"]
        at = [split for split in splits if all(split[name] == value for name, value in trained.items())]
        best = max(splits, key=lambda split: split["mean"]["share"])
        worst = min(splits, key=lambda split: split["mean"]["share"])
        spread = paired_difference(best["scores"], worst["scores"], videos)
        evidence.append(
            f"K = {of_budget['budget']}: most right with {_split(best)}, {percent(best['mean'])}; fewest with "
            f"{_split(worst)}, {percent(worst['mean'])}; between them {points(spread)}."
        )
        for split in at:
            for other in splits:
                if other is not split:
                    gap = paired_difference(split["scores"], other["scores"], videos)
                    verdicts.add(verdict_of(gap))
                    evidence.append(f"The trained split, {_split(split)}, less {_split(other)}: {points(gap)}.")
    return Finding(
        "Finding 2: at a fixed budget there is an optimal split between selected blocks and the window, near that of "
        "the training (abstract; section 4, attention allocation).",
        "At the trained budget, the trained split less every other one.",
        verdicts.pop() if len(verdicts) == 1 else OPEN,
        tuple(evidence),
    )


def _split(split: Mapping[str, Any]) -> str:
    counts = split["block_counts"]
    return f"{counts} block{'s' if counts > 1 else ''} and a window of {split['window_size']}"


def branch_usage(ablations: Mapping[str, Any]) -> Finding:
    """Whether what a branch is worth hangs on the kind of question."""
    rows, kinds = ablations["rows"], np.asarray(ablations["questions"]["kinds"])
    whole = np.asarray(rows["as trained"]["scores"])
    evidence, smallest = [], 1.0
    for branch in BRANCHES:
        rest = " + ".join(other for other in BRANCHES if other != branch)
        loss = whole - np.asarray(rows[rest]["scores"])
        chance = heterogeneity(loss, kinds)
        smallest = min(smallest, chance)
        losses = {kind: loss[kinds == kind].mean() for kind in dict.fromkeys(kinds.tolist())}
        most, least = max(losses, key=losses.get), min(losses, key=losses.get)
        evidence.append(
            f"Without {branch}: {100 * losses[most]:.0f} points fewer of `{most}`, {100 * losses[least]:.0f} of "
            f"`{least}`; that kinds do not differ has p {_chance(chance)}."
        )
    return Finding(
        "Finding 3: which branch is used depends on the task (abstract; table 2).",
        f"Losses without a branch differ between kinds of question (permutation test of {PERMUTATIONS:,} draws, level "
        f"{LEVEL} over {len(BRANCHES)} branches). The gates of video tokens themselves cannot depend on the question, "
        "which comes after them.",
        SHOWS if smallest < LEVEL / len(BRANCHES) else OPEN,
        tuple(evidence),
    )


def _chance(chance: float) -> str:
    least = 1 / (PERMUTATIONS + 1)
    return f"below {1.5 * least:.4f}" if chance <= least else f"= {chance:.4f}"


def heterogeneity(values: Sequence[float], kinds: Sequence[str], seed: int = 0) -> float:
    """The chance that means of kinds differ as much as here, or more, if kinds mean nothing: by permutation.

    The statistic is the sum of squares between kinds. The share of permutations, this one among them, is never zero
    (Phipson and Smyth 2010).
    """
    values, kinds = np.asarray(values, float), np.asarray(kinds)
    members = [kinds == kind for kind in np.unique(kinds)]

    def between(sample: np.ndarray) -> float:
        return sum(sample[member].sum() ** 2 / member.sum() for member in members)

    rng, found = np.random.default_rng(seed), between(values)
    # Equal sums may differ in their last digits.
    as_large = sum(between(rng.permutation(values)) >= found * (1 - 1e-9) for _ in range(PERMUTATIONS))
    return (1 + as_large) / (1 + PERMUTATIONS)


def sinks(results: Mapping[str, Any], normalisation: str = "sum") -> Finding:
    """Shares of keys that are sinks: all branches together against the dense model, and branch by branch."""
    total = results["total"]
    shares = {branch: numbers[normalisation]["sinks"] for branch, numbers in total.items()}
    sizes = {branch: numbers["keys"] for branch, numbers in total.items()}
    named = {branch: f"{shares[branch]:.2%} of {sizes[branch]:,}" for branch in shares if shares[branch] is not None}
    evidence = [f"Sinks, alpha as a {normalisation}: " + ", ".join(f"{b} {text}" for b, text in named.items()) + "."]
    gap = _difference_of_shares(shares["dense"], sizes["dense"], shares["all"], sizes["all"])
    evidence.append(
        f"Dense less all branches together: {points(gap)}; tokens are taken for independent, as they are not."
    )
    order = shares["compression"] > shares["window"] > shares["selection"]
    evidence.append(
        f"The paper's order, compression, window, selection: {'the same' if order else 'another one'} here."
    )
    none = not any(shares[branch] for branch in ("all", "dense"))
    verdict = OPEN if none else verdict_of(gap)
    if verdict == SHOWS and not order:
        verdict = OPEN
    return Finding(
        "Finding 4: learned sparse attention makes for few sinks, of which compression has the most (1.2 %, selection "
        "0.1, window 0.3, all together 0.3; section 4, sinks).",
        "By the paper's rule, fewer keys are sinks than in the model that was trained densely, and branches are in its "
        "order.",
        verdict,
        tuple(evidence),
    )


def _difference_of_shares(first: float, first_size: int, second: float, second_size: int) -> dict[str, float]:
    spread = Z * math.sqrt(first * (1 - first) / first_size + second * (1 - second) / second_size)
    return {"mean": first - second, "low": first - second - spread, "high": first - second + spread}


def dense_weights(main_table: Mapping[str, Any]) -> Finding:
    """The sparse model's weights with dense attention, against dense training."""
    rows = main_table["rows"]
    gap = rows[RUN_DENSE]["difference"]
    static = paired_difference(rows[VIDEONSA]["scores"], rows[STATIC]["scores"], main_table["questions"]["videos"])
    return Finding(
        "Weights of sparse training remain beneficial in dense attention (introduction, 5; Dense-NSA).",
        "VideoNSA's weights run densely, less the model that was trained densely.",
        verdict_of(gap),
        (
            f"Run densely, less dense training: {points(gap)}.",
            f"Beside it, learned gates less static ones: {points(static)}.",
        ),
    )


def bottleneck(latency: Mapping[str, Any]) -> Finding:
    """Which branch takes the most of the time, at the greatest length."""
    longest = max(latency["lengths"], key=lambda length: length["tokens"])
    seconds = {part: longest[part]["seconds"] for part in (*BRANCHES, "block choice")}
    of_scores = seconds["compression"] + seconds["block choice"]
    others = seconds["selection"] + seconds["window"]
    named = ", ".join(f"{part} {value:.2f} s" for part, value in seconds.items())
    return Finding(
        "The compression branch is the main computational bottleneck (introduction, 4; figure 6).",
        "At the greatest length, compression and the choice of blocks take longer than selection and window together. "
        "(Measured on a CPU; the paper's is of a GPU.)",
        SHOWS if of_scores > others else CONTRARY,
        (
            f"{longest['tokens']:,} tokens, one layer of the 7B's shape, threads: {latency['threads']}. {named}; all "
            f"of NSA {longest['nsa']['seconds']:.2f} s, dense attention {longest['dense']['seconds']:.2f} s.",
        ),
    )
