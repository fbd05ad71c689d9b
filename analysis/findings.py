"""What the paper finds (arXiv 2510.02295, abstract and introduction), and what an experiment says of it.

Each function reads results of the analyses and returns a `Finding`. A verdict follows from numbers by the rule that is
in it: as a rule, an interval of 95 % on one side of zero decides, and one with zero in it does not.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from .accuracy import AS_TRAINED, difference
from .allocation import is_trained
from .context import SPARSE, TRAINED_DENSE
from .figure import paired_difference
from .main_table import RUN_DENSE, STATIC, VIDEONSA
from .observe import BRANCHES

SHOWS, CONTRARY, OPEN = "shows it", "shows the contrary", "cannot tell"
PERMUTATIONS = 5000
LEVEL = 0.05
LEAST_LOSS = 0.05
"""Of accuracy, that counts as one."""


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
    """The table as a whole: VideoNSA against each of the training-free rows, and against dense training."""
    others = [name for name in main_table["rows"] if name not in (VIDEONSA, STATIC, RUN_DENSE)]
    return Finding(
        "Sparse attention that is learned does at least as well as dense attention and as methods without training "
        "(section 3.1; of table 1 the means, which we took, are 50.4 for VideoNSA, 49.2 for the best other row).",
        "VideoNSA's right answers, paired by question, less those of every other row: each difference above zero.",
        *_against(main_table, VIDEONSA, others),
    )


def _against(scored: Mapping[str, Any], first: str, others: Iterable[str]) -> tuple[str, tuple[str, ...]]:
    """The verdict that a row of `accuracy.score` is better than every one of others, and its evidence."""
    gaps = {name: difference(scored, first, name) for name in others}
    name_of_first = first[0].upper() + first[1:]
    return _of_all(gaps.values()), tuple(f"{name_of_first} less {name}: {points(gap)}." for name, gap in gaps.items())


def _of_all(differences: Iterable[Mapping[str, float]]) -> str:
    """All above zero, or one below it."""
    verdicts = {verdict_of(difference) for difference in differences}
    return CONTRARY if CONTRARY in verdicts else SHOWS if verdicts == {SHOWS} else OPEN


def scaling(context: Mapping[str, Any], trained_seconds: float) -> Finding:
    """Length of video: within the lengths of the training and beyond."""
    (cell,) = context["cells"]
    rows, videos = cell["rows"], context["questions"]["videos"]
    seconds = np.asarray(context["questions"]["seconds"])
    beyond = seconds > trained_seconds
    loss = {}
    for name in (SPARSE, TRAINED_DENSE):
        scores = np.asarray(rows[name]["scores"], float)
        loss[name] = unpaired_difference(scores[beyond], scores[~beyond], *_split_by(videos, beyond))
    evidence = []
    for length in sorted(set(seconds.tolist())):
        sparse, dense = (rows[name]["by_seconds"][f"{length:g}"] for name in (SPARSE, TRAINED_DENSE))
        evidence.append(f"{length:g} s: sparse {percent(sparse)}, trained densely {percent(dense)}.")
    evidence.append(f"Beyond the training's lengths less within them, sparse: {points(loss[SPARSE])}.")
    evidence.append(f"The same, trained densely: {points(loss[TRAINED_DENSE])}.")
    held = {name: loss[SPARSE][name] + LEAST_LOSS for name in ("mean", "low", "high")}
    return Finding(
        "It scales reliably to contexts beyond the training's (abstract, 1; section 4, finding 2).",
        f"Sparse, on videos longer than the training's {trained_seconds:g} seconds: less than {100 * LEAST_LOSS:.0f} "
        "points fewer are right than within them.",
        verdict_of(held),
        tuple(evidence),
    )


def _split_by(groups: Sequence[Any], is_first: np.ndarray) -> tuple[list, list]:
    pairs = list(zip(groups, is_first.tolist(), strict=True))
    return [group for group, first in pairs if first], [group for group, first in pairs if not first]


def unpaired_difference(first, second, first_groups, second_groups) -> dict[str, float]:
    """The difference of two means of other questions, with its interval of 95 %; groups as in `paired_difference`."""
    means = [
        paired_difference(scores, np.zeros(len(scores)), groups)
        for scores, groups in ((first, first_groups), (second, second_groups))
    ]
    mean = means[0]["mean"] - means[1]["mean"]
    spread = math.hypot(*(numbers["high"] - numbers["mean"] for numbers in means))
    return {"mean": mean, "low": mean - spread, "high": mean + spread}


def allocation(results: Mapping[str, Any]) -> Finding:
    """Of the trained budget, the trained split against the others."""
    videos = results["questions"]["videos"]
    evidence, gaps, splits_of_trained = [], [], 0
    for of_budget in results["budgets"]:
        splits = of_budget["splits"]
        shares = "; ".join(f"{_split(split)}: {percent(split['mean'])}" for split in splits)
        evidence.append(f"K = {of_budget['budget']}: {shares}.")
        for split in splits:
            if is_trained(results, split):
                splits_of_trained = len(splits)
                for other in splits:
                    if other is not split:
                        gaps.append(paired_difference(split["scores"], other["scores"], videos))
                        evidence.append(f"As trained, {_split(split)}, less {_split(other)}: {points(gaps[-1])}.")
    verdict = _of_all(gaps)
    if verdict == SHOWS and splits_of_trained < 3:
        verdict = OPEN
        evidence.append("Two splits are too few to see an optimum between extremes.")
    return Finding(
        "At a fixed budget there is an optimal split between selected blocks and the window, near the training's "
        "(abstract, 2; section 4, finding 3).",
        "At the trained budget, the trained split is better than every other one, of three at least.",
        verdict,
        tuple(evidence),
    )


def _split(split: Mapping[str, Any]) -> str:
    counts = split["block_counts"]
    return f"{counts} block{'s' if counts > 1 else ''} and a window of {split['window_size']}"


def branch_usage(ablations: Mapping[str, Any]) -> Finding:
    """Whether which branch a question misses the most hangs on its kind."""
    rows, asked = ablations["rows"], ablations["questions"]
    kinds, whole = np.asarray(asked["kinds"]), np.asarray(rows[AS_TRAINED]["scores"], float)
    rests = [" + ".join(other for other in BRANCHES if other != branch) for branch in BRANCHES]
    losses = np.stack([whole - np.asarray(rows[rest]["scores"], float) for rest in rests], 1)
    chance = interaction(losses, kinds, asked["videos"])
    evidence = []
    for branch, loss in zip(BRANCHES, losses.T, strict=True):
        of_kind = {kind: loss[kinds == kind].mean() for kind in dict.fromkeys(kinds.tolist())}
        most, least = max(of_kind, key=of_kind.get), min(of_kind, key=of_kind.get)
        evidence.append(
            f"Without {branch}: {100 * of_kind[most]:.0f} points fewer of `{most}`, {100 * of_kind[least]:.0f} fewer "
            f"of `{least}`."
        )
    below = chance <= 1 / (PERMUTATIONS + 1)
    evidence.append(f"If kinds missed the same branches: p {'<=' if below else '='} {chance:.4f}.")
    evidence.append("The gates of video tokens themselves cannot depend on the question, which comes after them.")
    return Finding(
        "Which branch is used depends on the task (abstract, 3; section 3.2).",
        "The branches whose absence costs the most differ between kinds of question: a permutation test of branch and "
        f"kind, level {LEVEL}. (It can show a difference, not that there is none.)",
        SHOWS if chance <= LEVEL else OPEN,
        tuple(evidence),
    )


def interaction(losses: np.ndarray, kinds: Sequence[str], groups: Sequence[Any], seed: int = 0) -> float:
    """The chance of as much interaction of branch and kind, or more, where kinds miss the same branches.

    What a question loses without each branch, less its mean over branches, less the branches' means: how these sum up
    by kind is compared with permutations of the kinds among the questions of a video. A kind that loses more of
    everything, as one that is harder to guess does, does not count. The share of permutations, this one among them, is
    never zero (Phipson and Smyth 2010).

    Args:
        losses: (questions, branches).
        groups: for each question, such as its video.
    """
    relative = losses - losses.mean(1, keepdims=True)
    relative = relative - relative.mean(0)
    codes, groups = (np.unique(np.asarray(values), return_inverse=True)[1] for values in (kinds, groups))
    counts = np.bincount(codes)

    def between(labels: np.ndarray) -> float:
        sums = np.zeros((len(counts), relative.shape[1]))
        np.add.at(sums, labels, relative)
        return float((sums**2).sum(1) @ (1 / counts))

    rng, found = np.random.default_rng(seed), between(codes)
    in_order, as_large = np.lexsort((np.arange(len(codes)), groups)), 0
    for _ in range(PERMUTATIONS):
        labels = np.empty_like(codes)
        labels[in_order] = codes[np.lexsort((rng.random(len(codes)), groups))]
        as_large += between(labels) >= found * (1 - 1e-9)  # equal sums may differ in their last digits
    return (1 + as_large) / (1 + PERMUTATIONS)


def together(ablations: Mapping[str, Any]) -> Finding:
    """All branches and learned gates against fewer and static ones."""
    others = [name for name in ablations["rows"] if set(name.split(" + ")) <= set(BRANCHES)] + ["static gates"]
    return Finding(
        "All three branches under learned gates are better than one or two of them, and than static gates (section "
        "3.2, tables 2 and 34).",
        "As trained, less each of these: every difference above zero.",
        *_against(ablations, AS_TRAINED, others),
    )


def by_depth(gates: Mapping[str, Any]) -> Finding:
    """Gates of selection and window from the first layer to the last but one."""
    layers = gates["all"][:-1]
    slopes = {
        branch: float(np.polyfit(np.arange(len(layers)), [layer[branch]["mean"] for layer in layers], 1)[0])
        for branch in BRANCHES
    }
    fall = slopes["selection"] < 0 and slopes["window"] < 0
    rise = slopes["selection"] > 0 and slopes["window"] > 0
    named = ", ".join(f"{branch} {slope:+.3f} a layer" for branch, slope in slopes.items())
    means = "; ".join(
        f"{branch} " + " ".join(f"{layer[branch]['mean']:.2f}" for layer in gates["all"]) for branch in BRANCHES
    )
    return Finding(
        "Selection and the window lose importance in deeper layers (introduction, 3; section 4, finding 4).",
        "Straight lines through the layers' mean gates fall for both; without the last layer, of whose video tokens "
        "nothing reads the output, so that its gates are not trained.",
        SHOWS if fall else CONTRARY if rise else OPEN,
        (f"Mean gates by layer: {means}.", f"Lines: {named}.", "One model of few layers: nothing is known of others."),
    )


def sinks(results: Mapping[str, Any]) -> Finding:
    """Shares of keys that are sinks: all branches together against the dense model, and branch by branch."""
    evidence, verdicts = [], set()
    for name in ("sum", "mean"):
        shares = {branch: numbers[name]["sinks"] for branch, numbers in results["total"].items()}
        given = ", ".join(
            f"{branch.replace('_', ' ')} {share:.2%}" for branch, share in shares.items() if share is not None
        )
        evidence.append(f"alpha as a {name}: {given}.")
        of_prompts = [results["prompts"][branch][name] for branch in ("dense", "all")]
        if any(share is None for share in (*shares.values(), *of_prompts[0], *of_prompts[1])):
            verdicts.add(OPEN)
            continue
        gap = paired_difference(*of_prompts, results["videos"])
        evidence.append(f"Dense less all branches together, a mean over prompts: {points(gap)}.")
        in_order = shares["compression"] > shares["window"] > shares["selection"]
        evidence.append(f"Compression, window, selection: {'this order' if in_order else 'another order'}.")
        verdict = verdict_of(gap)
        verdicts.add(OPEN if verdict == SHOWS and not in_order else verdict)
    return Finding(
        "Learned sparse attention has few sinks, most of them in compression, fewest in selection (introduction, 6; "
        "section 4, finding 6: 1.2 %, window 0.3, selection 0.1, all together 0.3).",
        "By the paper's rule, in both normalisations: fewer keys are sinks than in the model that was trained densely, "
        "and branches are in the paper's order.",
        verdicts.pop() if len(verdicts) == 1 else OPEN,
        tuple(evidence),
    )


def dense_weights(main_table: Mapping[str, Any]) -> Finding:
    """The sparse model's weights with dense attention, against dense training."""
    gap = main_table["rows"][RUN_DENSE]["difference"]
    return Finding(
        "Weights of sparse training remain beneficial in dense attention (introduction, 5; section 4, finding 1).",
        "VideoNSA's weights run densely, less the model that was trained densely.",
        verdict_of(gap),
        (f"Run densely, less dense training: {points(gap)}.",),
    )


def bottleneck(latency: Mapping[str, Any]) -> Finding:
    """Which branch takes the most of the time, at the greatest length."""
    longest = max(latency["lengths"], key=lambda length: length["tokens"])
    seconds = {part: longest[part]["seconds"] for part in (*BRANCHES, "block choice")}
    # Compression and the choice of blocks share their scores: their sum is too much, and one of them too little.
    least, others = seconds["compression"], seconds["selection"] + seconds["window"]
    most = least + seconds["block choice"]
    named = ", ".join(f"{part} {value:.2f} s" for part, value in seconds.items())
    return Finding(
        "Compression is the main computational bottleneck (introduction, 4; section 4, finding 5).",
        "At the greatest length, compression alone takes longer than selection and window together; the contrary, if "
        "it does not with the choice of blocks either. (Measured on a CPU; the paper's is of a GPU.)",
        SHOWS if least > others else CONTRARY if most < others else OPEN,
        (
            f"{longest['tokens']:,} tokens, one layer of the 7B's shape, threads: {latency['threads']}. {named}; all "
            f"of NSA {longest['nsa']['seconds']:.2f} s, dense attention {longest['dense']['seconds']:.2f} s.",
        ),
    )
