"""Accuracy by frames and tokens a frame, and so by length of context (arXiv 2510.02295, figure 2 and appendix J).

    python -m analysis.context path/or/hub-id --questions folder --frames 64 128 256 --tokens_per_frame 64 128 \\
        --output context.json --plot context.png

Each cell of the grid reads every video anew: `num_frames` of them, all of the size that has so many tokens, by
`min_pixels_per_frame` = `max_pixels_per_frame` = tokens * 28 * 28. The paper calls frames x tokens a frame the length
of context, and so does `--max_context`; as two frames become one step, a prompt has half of that in tokens. `tokens`
of a cell are those that were read: a short video has fewer frames, and sizes are rounded to whole patches. `--fps`
takes rates in the place of numbers of frames, as the paper does for Tomato.

A sparse model runs densely beside, with the same weights; `--dense_checkpoint` adds a model that was trained densely,
and gets the same prompts. Where lengths of videos are known, each cell has its accuracy by length too.
"""

import argparse
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

from matplotlib.figure import Figure

from .accuracy import MAX_NEW_TOKENS, score, shares
from .changes import Change, densely
from .figure import Setting, command, load_dense, reach
from .observe import is_sparse

FRAMES = (64, 128, 256, 512)
TOKENS = (64, 128, 256, 512)
MAX_CONTEXT = 128 * 1024
PIXELS_PER_TOKEN = 28 * 28
SPARSE, RUN_DENSE, DENSE, TRAINED_DENSE = "sparse", "sparse, run dense", "dense", "trained dense"


def video_options(tokens_per_frame: int, num_frames: int | None = None, fps: float | None = None) -> dict[str, Any]:
    """Keywords of `processor.apply_chat_template` for a cell; either num_frames or fps."""
    pixels = tokens_per_frame * PIXELS_PER_TOKEN
    sampling = {"fps": fps} if num_frames is None else {"num_frames": num_frames}
    return sampling | {"min_pixels_per_frame": pixels, "max_pixels_per_frame": pixels}


def run(
    setting: Setting,
    frames: Sequence[int] | None = None,
    tokens_per_frame: Sequence[int] = TOKENS,
    fps: Sequence[float] | None = None,
    max_context: int = MAX_CONTEXT,
    dense_checkpoint: str | None = None,
    max_new_tokens: int = MAX_NEW_TOKENS,
) -> dict:
    """A list of cells with frames or fps, tokens_per_frame, and `tokens` and `rows` of `accuracy.score`.

    Each row has `by_seconds` beside: right, total, share, low and high for each length of a video.

    Args:
        setting: its video options hold too, but for those that a cell sets.
        max_context: larger cells, by the paper's measure, are left out; rates have no such limit.
    Raises:
        ValueError: frames and rates at once, a number that is not positive, no cell within max_context, or as
            `accuracy.score`.
    """
    if frames is not None and fps is not None:
        raise ValueError(f"`frames` and `fps` exclude each other, got {list(frames)} and {list(fps)}")
    sampled = ("fps", fps) if fps is not None else ("frames", FRAMES if frames is None else frames)
    for name, values in (sampled, ("tokens_per_frame", tokens_per_frame)):
        if not values or min(values) <= 0:
            raise ValueError(f"`{name}` must be positive, got {list(values)}")
    grid = [
        {sampled[0]: value, "tokens_per_frame": tokens}
        for tokens in tokens_per_frame
        for value in sampled[1]
        if fps is not None or value * tokens <= max_context
    ]
    if not grid:
        raise ValueError(f"`max_context` = {max_context} is under frames x tokens a frame of every cell")
    parts = [(setting, _rows(setting.model))]
    if dense_checkpoint is not None:
        model = load_dense(dense_checkpoint, setting.model)
        parts.append((replace(setting, model=model), {TRAINED_DENSE: nullcontext}))
    cells = []
    for cell in grid:
        options = setting.video_options | video_options(
            cell["tokens_per_frame"], num_frames=cell.get("frames"), fps=cell.get("fps")
        )
        scored = [score(replace(part, video_options=options), rows, max_new_tokens) for part, rows in parts]
        rows = {name: row for of_part in scored for name, row in of_part["rows"].items()}
        for row in rows.values():
            row["by_seconds"] = _by_seconds(setting, row["scores"])
        cells.append(cell | {"tokens": scored[0]["tokens"], "rows": rows})
    return {"questions": scored[0]["questions"], "cells": cells}


def _rows(model) -> dict[str, Change]:
    if is_sparse(model):
        return {SPARSE: nullcontext, RUN_DENSE: densely}
    return {DENSE: nullcontext}


def _by_seconds(setting: Setting, scores: Sequence[int]) -> dict[str, dict]:
    groups: dict[float, list[tuple]] = {}
    for question, is_right in zip(setting.questions, scores, strict=True):
        if question.seconds is not None:
            groups.setdefault(question.seconds, []).append((question, is_right))
    return {f"{seconds:g}": shares(*zip(*group, strict=True))["mean"] for seconds, group in sorted(groups.items())}


def plot(results: dict) -> Figure:
    """For each row a map of the grid with share and tokens; below, by length of video, accuracy against tokens.

    Of a single cell, accuracy against the length of the video, where it is known.
    """
    cells = results["cells"]
    if len(cells) == 1 and next(iter(cells[0]["rows"].values()))["by_seconds"]:
        return _plot_lengths(cells[0])
    sampled = "fps" if "fps" in cells[0] else "frames"
    columns = sorted({cell[sampled] for cell in cells})
    lines = sorted({cell["tokens_per_frame"] for cell in cells})
    names = list(cells[0]["rows"])
    lengths = list(cells[0]["rows"][names[0]]["by_seconds"])
    height = 1 + 0.45 * len(lines) + (2.4 if lengths else 0)
    figure = Figure(figsize=(max(3, 1 + 0.75 * len(columns)) * len(names), height), layout="constrained")
    ratios = [0.6 + 0.45 * len(lines), 2.4] if lengths else [1]
    panels = figure.subplots(len(ratios), len(names), squeeze=False, height_ratios=ratios)
    for column, name in enumerate(names):
        axes = panels[0][column]
        for cell in cells:
            share, tokens = cell["rows"][name]["mean"]["share"], cell["tokens"]["vision"]
            place = columns.index(cell[sampled]), lines.index(cell["tokens_per_frame"])
            colour = "white" if share < 0.5 else "black"
            axes.text(*place, f"{share:.0%}\n{tokens:,.0f}", ha="center", va="center", fontsize=7, color=colour)
        shown = [[_share(cells, name, {sampled: c, "tokens_per_frame": t}) for c in columns] for t in lines]
        axes.imshow(shown, vmin=0, vmax=1, cmap="viridis", origin="lower", aspect="auto")
        axes.set(xticks=range(len(columns)), xticklabels=[f"{c:g}" for c in columns], title=name, xlabel=sampled)
        axes.set(yticks=range(len(lines)), yticklabels=lines, ylabel="tokens a frame" if not column else "")
        for length in lengths:
            axes = panels[1][column]
            by_tokens: dict[float, list[float]] = {}
            for cell in cells:
                share = cell["rows"][name]["by_seconds"][length]["share"]
                by_tokens.setdefault(cell["tokens"]["vision"], []).append(share)
            points = [(tokens, sum(of) / len(of)) for tokens, of in sorted(by_tokens.items())]
            axes.plot(*zip(*points, strict=True), marker="o", markersize=3, label=f"{length} s")
            axes.set(xscale="log", ylim=(0, 1.05), xlabel="vision tokens", ylabel="right answers" if not column else "")
            axes.legend(frameon=False, fontsize="small")
    return figure


def _plot_lengths(cell: dict) -> Figure:
    figure = Figure(figsize=(6.5, 3.6))
    axes = figure.subplots()
    for number, (name, row) in enumerate(cell["rows"].items()):
        # A little apart, so that intervals do not hide each other.
        seconds = [float(length) * 1.03**number for length in row["by_seconds"]]
        means = list(row["by_seconds"].values())
        axes.errorbar(seconds, [mean["share"] for mean in means], reach(means), marker="o", capsize=2, label=name)
    axes.set_xscale("log", base=2)
    axes.set_xticks([float(length) for length in row["by_seconds"]], list(row["by_seconds"]))
    axes.minorticks_off()
    axes.set(xlabel="length of the video, seconds", ylabel="right answers, mean over kinds", ylim=(0, 1.05))
    axes.legend(frameon=False)
    return figure


def _share(cells: Sequence[dict], row: str, place: dict) -> float:
    """Not a number where there is no such cell."""
    found = (cell["rows"][row]["mean"]["share"] for cell in cells if place.items() <= cell.items())
    return next(found, float("nan"))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--frames", type=int, nargs="+", metavar="N", help=f"of a video (default: {FRAMES})")
    parser.add_argument("--fps", type=float, nargs="+", metavar="RATE", help="in the place of numbers of frames")
    parser.add_argument("--tokens_per_frame", type=int, nargs="+", default=list(TOKENS), metavar="N")
    parser.add_argument("--max_context", type=int, default=MAX_CONTEXT, help="frames x tokens a frame (%(default)s)")
    parser.add_argument("--dense_checkpoint", help="folder or Hub id of a model that was trained densely")
    parser.add_argument("--max_new_tokens", type=int, default=MAX_NEW_TOKENS, help="of an answer (%(default)s)")


if __name__ == "__main__":
    command(run, plot, __doc__, add_arguments)
