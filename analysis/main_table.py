"""The paper's comparison (arXiv 2510.02295, table 1) on one set of questions: dense attention, its baselines, VideoNSA.

    python -m analysis.main_table QWEN --videonsa VIDEONSA --questions folder --output main_table.json

As in the paper, the baselines run on a checkpoint that was trained densely, which is the first row. `--methods` is a
JSON file of options by method (docs/baselines.md has the defaults); `--search_share` searches MInference's and
MMInference's heads on the first prompt, as `python -m baselines.search` does. Three rows are of VIDEONSA: as it was
trained, with its gates replaced by their means over one prompt about each video, and run dense. `difference` is a row's
score less the first row's, over the same questions.
"""

import argparse
import json
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

import baselines
from baselines.search import search

from . import gates
from .accuracy import MAX_NEW_TOKENS, difference, score
from .changes import densely, mean_gates, method, static_gates
from .figure import Setting, command, load_model
from .figure import to_table as table
from .questions import one_per_video, prepare

DENSE, VIDEONSA = "dense", "VideoNSA"
STATIC, RUN_DENSE = "VideoNSA, static gates", "VideoNSA, run dense"
SEARCHED = ("minference", "mminference")


def run(
    setting: Setting,
    videonsa: str,
    methods: Mapping[str, Mapping[str, Any]] | None = None,
    search_share: float | None = None,
    max_new_tokens: int = MAX_NEW_TOKENS,
) -> dict:
    """What `accuracy.score` returns, with `difference` to the first row and `options` in each row.

    Args:
        setting: of the checkpoint that was trained densely.
        videonsa: the other checkpoint.
        methods: options by method of `baselines`; by default of all methods their defaults.
        search_share: of the dense pairs, for the heads of `SEARCHED`; without, what the options say.
    Raises:
        ValueError: an unknown method or option, or as `accuracy.score`.
    """
    methods = {name: {} for name in baselines.METHODS} if methods is None else dict(methods)
    for name, options in methods.items():
        baselines.check(name, **options)
    for question in setting.questions:
        question.check()
    model = setting.model
    ours, processor = load_model(videonsa, model.dtype, model.device)
    own = replace(setting, model=ours, processor=processor)
    means = mean_gates(gates.run(replace(own, questions=one_per_video(setting.questions)))["all"])
    found = {}
    if search_share is not None:
        inputs = prepare(setting.processor, setting.questions[:1], **setting.video_options)
        inputs = {name: value.to(model.device) for name, value in inputs.items() if name != "attention_mask"}
        with densely(model):
            for name in methods.keys() & set(SEARCHED):
                options = {key: value for key, value in methods[name].items() if key != "heads"}
                found[name] = search(model, inputs, share=search_share, method=name, **options)["layers"]
    rows = {DENSE: densely}
    for name, options in methods.items():
        heads = {"heads": found[name]} if name in found else {}
        rows[name] = partial(method, name=name, **{**options, **heads})
    scored = score(setting, rows, max_new_tokens)
    rows = {
        VIDEONSA: nullcontext,
        STATIC: partial(static_gates, values=means),
        RUN_DENSE: densely,
    }
    of_ours = score(own, rows, max_new_tokens)
    if of_ours["tokens"] != scored["tokens"]:
        counts = scored["tokens"], of_ours["tokens"]
        raise ValueError(f"`videonsa` = {videonsa!r} reads other prompts than `checkpoint`: tokens {counts}")
    scored["rows"] |= of_ours["rows"]
    for name, row in scored["rows"].items():
        row["difference"] = difference(scored, name, DENSE)
        row["options"] = dict(methods.get(name, {})) | ({"search_share": search_share} if name in found else {})
    return scored | {"heads": found, "static_gates": means}


def to_table(results: dict) -> str:
    """Markdown: accuracy by kind in percent, pairs of attention in percent of dense, seconds."""
    rows = results["rows"]
    kinds = list(next(iter(rows.values()))["kinds"])
    cells = []
    for name, row in rows.items():
        shares = [f"{row['kinds'][kind]['share']:.0%}" for kind in kinds]
        gap = row["difference"]
        less = (
            "" if name == DENSE else f"{100 * gap['mean']:+.1f} ({100 * gap['low']:+.1f} to {100 * gap['high']:+.1f})"
        )
        label = f"`{name}`" if name in baselines.METHODS else name
        costs = f"{row['attention']['exact']:.0%}", f"{row['cpu_seconds']:.0f}"
        cells.append([label, *shares, f"{row['mean']['share']:.1%}", less, *costs])
    return table(["", *kinds, "mean", "less dense", "pairs", "CPU s"], cells)


def plot(results: dict) -> Figure:
    """Mean accuracy, with its interval, against the share of dense attention's pairs."""
    figure = Figure(figsize=(7, 4.2))
    axes = figure.subplots()
    for name, row in results["rows"].items():
        x, mean = 100 * row["attention"]["exact"], row["mean"]
        y, low, high = (100 * mean[key] for key in ("share", "low", "high"))
        colour = "tab:red" if name == VIDEONSA else "tab:gray" if name == DENSE else "tab:blue"
        axes.errorbar(x, y, yerr=[[y - low], [high - y]], fmt="o", color=colour, capsize=2)
        axes.annotate(name, (x, y), textcoords="offset points", xytext=(5, 4), fontsize=7)
    axes.set(xlabel="pairs of query and key, % of dense attention's", ylabel="right answers, %", xlim=(0, 112))
    return figure


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--videonsa", required=True, help="checkpoint that was trained with sparse attention")
    parser.add_argument("--methods", type=lambda path: json.loads(Path(path).read_text()), help="JSON file of options")
    parser.add_argument("--search_share", type=float, help="of the dense pairs, for MInference's heads")
    parser.add_argument("--max_new_tokens", type=int, default=MAX_NEW_TOKENS)


if __name__ == "__main__":
    command(run, plot, __doc__, add_arguments)
