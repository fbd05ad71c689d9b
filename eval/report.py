"""Tables and plots from result folders of lmms_eval.

    python -m videonsa_eval.report eval/results --output eval/report

reads every `*_results.json` in the folders and the `*_samples_*.jsonl` beside it (`--log_samples`), and writes
`report.md`, with the paper's main table where there are runs of its rows, and

- `context.png`: accuracy against vision tokens;
- `frames.png`: accuracy against frames and tokens per frame, where runs differ in them;
- `attention.png`: accuracy against block_counts and window_size, where runs differ in them;
- `sparse_dense.png`: the same weights and settings with `nsa_mode=sparse` and `nsa_mode=dense`, where there are both.

Percentages beside tokens and points are pairs of query and key that the prompts cost, of those of dense causal
attention (`attention_budget_videonsa.py`), a mean over the samples.
"""

import argparse
import json
import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
from lmms_eval.utils import simple_parse_args_string

from .run_preset import BENCHMARKS, RESULTS, preset_names, read_preset, read_row, row_names


@dataclass(frozen=True)
class Sample:
    """One scored document.

    Attributes:
        score: from 0 to 1; `None` if the task gives none to a single document.
        vision_tokens, attention_share, attention: as in `PromptTokenCounts`; `None` and empty if not logged.
    """

    score: float | None
    vision_tokens: int | None
    attention_share: float | None
    attention: dict[str, Any]


@dataclass
class Run:
    """One task of one call of lmms_eval.

    Attributes:
        arguments: `--model_args`.
        score: of the task's main metric, in percent.
    """

    file: Path
    task: str
    arguments: dict[str, Any]
    metric: str
    score: float
    samples: list[Sample] = field(default_factory=list)

    def setting(self, name: str) -> Any:
        """Of the attention: nsa_mode, block_size, block_counts or window_size."""
        logged = self.samples[0].attention if self.samples else {}
        return logged.get(name, self.arguments.get(name))

    @property
    def frames(self) -> int | None:
        return self.arguments.get("num_frames") or self.arguments.get("max_num_frames")

    @property
    def tokens_per_frame(self) -> float | None:
        pixels = self.arguments.get("max_pixels")
        return self.arguments.get("tokens_per_frame") or (pixels and pixels / 28**2)

    def mean(self, name: str) -> float | None:
        return _mean(self.samples, name)


def _mean(samples: Iterable[Sample], name: str) -> float | None:
    values = [getattr(sample, name) for sample in samples if getattr(sample, name) is not None]
    return sum(values) / len(values) if values else None


def read_runs(folders: Iterable[Path]) -> list[Run]:
    """All runs in these folders.

    Raises:
        ValueError: there are none, or a file is not one of lmms_eval's results.
    """
    folders = list(folders)
    runs = []
    for file in sorted(path for folder in folders for path in folder.rglob(RESULTS)):
        try:
            content = json.loads(file.read_text())
            arguments = simple_parse_args_string(content["config"]["model_args"])
            for task, config in content["configs"].items():
                metric, in_percent = main_metric(task, config)
                value = float(content["results"][task][f"{metric},none"])
                samples = file.with_name(file.name.replace("_results.json", f"_samples_{task}.jsonl"))
                lines = samples.read_text().splitlines() if samples.is_file() else []
                if in_percent is None:
                    in_percent = value > 1
                score = value if in_percent else 100 * value
                samples = [_sample(json.loads(line), metric) for line in lines]
                runs.append(Run(file, task, arguments, metric, score, samples))
        except (KeyError, TypeError, AttributeError, json.JSONDecodeError) as error:
            raise ValueError(f"{file} is not a result file of lmms_eval --model videonsa: {error!r}") from error
    if not runs:
        raise ValueError(f"no {RESULTS} in {', '.join(map(str, folders))}")
    return runs


def _presets_by_task() -> dict[str, dict]:
    presets = [read_preset(name) for name in preset_names()]
    return {preset["tasks"]: preset for preset in presets}


def main_metric(task: str, config: dict) -> tuple[str, bool | None]:
    """Name of the metric that counts, and whether it is in percent, not a share; `None` where no preset tells."""
    preset = _presets_by_task().get(task) or _presets_by_task().get(task.replace("mlvu_dev", "mlvu_test"))
    if preset:
        return preset["metric"], preset["in_percent"]
    return config["metric_list"][0]["metric"], None


def _sample(line: dict, metric: str) -> Sample:
    counts = next((entry for entry in line.get("token_counts") or [] if entry and "vision_tokens" in entry), {})
    return Sample(
        score_of(line.get(metric)),
        counts.get("vision_tokens"),
        counts.get("attention_share"),
        counts.get("attention", {}),
    )


def score_of(value: Any) -> float | None:
    """The score in what a task says of a document, in the forms that lmms-eval's video tasks have."""
    if isinstance(value, (int, float)):
        return float(value)
    if not isinstance(value, dict):
        return None
    for key in ("score", "accuracy", "MRA:.5:.95:.05"):
        if isinstance(value.get(key), (int, float)):
            return float(value[key])
    for key in ("pred_answer", "parsed_pred"):
        if key in value and "answer" in value:
            return float(str(value[key]).lower() == str(value["answer"]).lower())
    return None


def labels(runs: Sequence[Run]) -> list[str]:
    """For each run the arguments in which runs differ."""
    names = [name for run in runs for name in run.arguments]
    names = [name for name in dict.fromkeys(names) if name != "preset"]  # the task says it
    differing = [name for name in names if len({str(run.arguments.get(name)) for run in runs}) > 1]
    return [", ".join(f"{name}={run.arguments[name]}" for name in differing if name in run.arguments) for run in runs]


def table(runs: Sequence[Run]) -> str:
    """Markdown: score of each run beside the published ones, and what its prompts cost."""
    presets = _presets_by_task()
    beside = ("Qwen2.5-VL-7B", "VideoNSA v1", "VideoNSA v2")
    head = ("task", "run", "samples", "metric", "score", f"published: {beside[0]}", *beside[1:], "vision tokens")
    rows = [(*head, "of dense attention"), ("---",) * (len(head) + 1)]
    for run, label in sorted(zip(runs, labels(runs), strict=True), key=lambda pair: (pair[0].task, pair[1])):
        published = presets.get(run.task, {}).get("published", {})
        rows.append(
            (
                run.task,
                label or "-",
                len(run.samples) or "-",
                run.metric,
                f"{run.score:.1f}",
                *(published.get(name, "-") for name in beside),
                _text(run.mean("vision_tokens"), ",.0f"),
                _text(run.mean("attention_share"), ".1%"),
            )
        )
    return _markdown(rows)


def main_table(runs: Sequence[Run]) -> str | None:
    """Markdown: the paper's main table, what was measured beside what was published; `None` without runs of its rows.

    A run is of a row and a column by its arguments `row` and `preset`, which `run_preset --row` gives. Of several, the
    mean counts. Scores on other data than the column's are in brackets: they cannot be compared.
    """
    cells = defaultdict(list)
    for run in runs:
        if run.arguments.get("row") is not None:
            cells[run.arguments["row"], run.arguments.get("preset")].append(run)
    if not cells:
        return None
    tasks = {name: read_preset(name)["tasks"] for name in BENCHMARKS}
    rows = [("row", *BENCHMARKS, "of dense attention"), ("---",) * (len(BENCHMARKS) + 2)]
    for name in sorted(row_names(), key=_place_in_table):
        row, line, of_row = read_row(name), [], []
        for column in BENCHMARKS:
            found = cells.get((name, column), [])
            measured = "-"
            if found:
                measured = f"{sum(run.score for run in found) / len(found):.1f}"
                if any(run.task != tasks[column] for run in found):
                    measured = f"[{measured}]"
            of_row += found
            line.append(f"{measured} / {row['published'].get(column, '-')}")
        shares = [share for run in of_row if (share := run.mean("attention_share")) is not None]
        rows.append((row["row"], *line, _text(sum(shares) / len(shares) if shares else None, ".1%")))
    return (
        "Measured / published. In brackets: on other data than the benchmark's, which compares with nothing "
        "published.\n\n" + _markdown(rows)
    )


def _place_in_table(name: str) -> tuple:
    """The paper's order, new rows after its own."""
    order = (
        "qwen",
        "awq",
        "sft",
        "fastv",
        "vscan",
        "visionzip",
        "tri_shape",
        "minference",
        "flexprefill",
        "xattention",
    )
    order += ("videonsa_v1", "videonsa_v2", "dense_nsa")
    return (order.index(name) if name in order else len(order), name)


def _markdown(rows: Iterable[Sequence]) -> str:
    return "\n".join("| " + " | ".join(map(str, row)) + " |" for row in rows) + "\n"


def _text(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def by_context(samples: Iterable[Sample]) -> list[tuple[float, float, float, float | None]]:
    """Samples of similar length together, half a doubling apart.

    Returns:
        (mean vision tokens, mean score in percent, its standard error, mean attention share), ascending.
    """
    bins = defaultdict(list)
    for sample in samples:
        if sample.score is not None and sample.vision_tokens:
            bins[round(2 * math.log2(sample.vision_tokens))].append(sample)
    points = []
    for _, group in sorted(bins.items()):
        scores = [100 * sample.score for sample in group]
        mean = sum(scores) / len(scores)
        spread = sum((score - mean) ** 2 for score in scores) / max(1, len(scores) - 1)
        tokens, share = _mean(group, "vision_tokens"), _mean(group, "attention_share")
        points.append((tokens, mean, math.sqrt(spread / len(group)), share))
    return points


def _panels(tasks: Sequence):
    """A figure with one plot for each task, by task."""
    columns = min(3, len(tasks))
    rows = math.ceil(len(tasks) / columns)
    figure, axes = plt.subplots(rows, columns, figsize=(5 * columns, 4 * rows), squeeze=False, layout="constrained")
    for axis in axes.flat[len(tasks) :]:
        axis.remove()
    return figure, dict(zip(tasks, axes.flat, strict=False))


def _by_task(runs: Iterable[Run]) -> dict[str, list[Run]]:
    groups = defaultdict(list)
    for run in runs:
        groups[run.task].append(run)
    return dict(sorted(groups.items()))


def plot_context(runs: Sequence[Run]):
    """Accuracy against vision tokens, a line for each run; `None` without samples."""
    lines = {id(run): by_context(run.samples) for run in runs}
    groups = _by_task(run for run in runs if lines[id(run)])
    if not groups:
        return None
    names = dict(zip(map(id, runs), labels(runs), strict=True))
    figure, panels = _panels(list(groups))
    for task, axis in panels.items():
        ticks = {}
        for run in groups[task]:
            tokens, scores, errors, shares = zip(*lines[id(run)], strict=True)
            axis.errorbar(tokens, scores, errors, marker="o", capsize=3, label=names[id(run)])
            if run.setting("nsa_mode") != "dense":
                ticks = dict(zip(tokens, shares, strict=True)) if len(tokens) > len(ticks) else ticks
        axis.set_xscale("log", base=2)
        if ticks:
            axis.set_xticks(list(ticks), [f"{tokens:,.0f}\n{_text(share, '.1%')}" for tokens, share in ticks.items()])
            axis.minorticks_off()
        axis.set(title=task, xlabel="vision tokens, share of dense attention", ylabel="accuracy, %", ylim=(-3, 103))
        if any(names.values()):
            axis.legend(fontsize=7)
    return figure


def _plot_grid(runs: Sequence[Run], x: str, y: str, varied: set[str], budget, log_y: bool):
    """Accuracy as colour over two settings, with lines of equal budget, a plot for each task and choice of the other
    arguments; `None` where runs do not differ in these two.
    """
    groups: dict[tuple, list[Run]] = defaultdict(list)
    for run in runs:
        if None not in (_value(run, x), _value(run, y)) and budget.is_for(run):
            others = tuple(f"{name}={value}" for name, value in run.arguments.items() if name not in varied)
            groups[(run.task, *sorted(others))].append(run)
    places = {key: [(_value(run, x), _value(run, y)) for run in group] for key, group in groups.items()}
    groups = {key: group for key, group in sorted(groups.items()) if len(set(places[key])) > 1}
    if not groups:
        return None
    common = set.intersection(*map(set, groups))
    figure, panels = _panels(list(groups))
    for key, axis in panels.items():
        axis.set_title("\n".join([key[0], *(other for other in key[1:] if other not in common)]), fontsize=9)
        scores = [run.score for run in groups[key]]
        points = axis.scatter(*zip(*places[key], strict=True), c=scores, s=250, cmap="Oranges", edgecolors="black")
        figure.colorbar(points, ax=axis, label="accuracy, %")
        for run, place in zip(groups[key], places[key], strict=True):
            text = f"{run.score:.1f}\n({_text(run.mean('attention_share'), '.1%')})"
            axis.annotate(text, place, textcoords="offset points", xytext=(10, 6), fontsize=7)
        axis.set_xscale("log", base=2)
        if log_y:
            axis.set_yscale("log", base=2)
        axis.set(xlabel=x, ylabel=y)
        axis.margins(0.3)
        axis.autoscale_view()
        axis.autoscale(False)
        low, high = axis.get_ylim()
        left, right = axis.get_xlim()
        steps = [left * (right / left) ** (step / 200) for step in range(201)]
        for amount in sorted({round(budget.of(*place, groups[key][0])) for place in places[key]}):
            line = [(step, budget.y(step, amount, groups[key][0])) for step in steps]
            line = [(step, value) for step, value in line if max(low, 0) < value < high]
            if line:  # a steep one passes the plot between two steps
                axis.plot(*zip(*line, strict=True), "--", color="navy", linewidth=0.8)
                axis.annotate(f"{amount:,} {budget.unit}", line[-1], fontsize=6, color="navy", ha="right")
    return figure


def _value(run: Run, name: str) -> float | None:
    return getattr(run, name) if hasattr(run, name) else run.setting(name)


class _VideoBudget:
    """Tokens of a video: two frames share theirs."""

    unit = "video tokens"

    @staticmethod
    def is_for(run: Run) -> bool:
        return True

    @staticmethod
    def of(frames: float, tokens_per_frame: float, run: Run) -> float:
        return frames / 2 * tokens_per_frame

    @staticmethod
    def y(frames: float, amount: float, run: Run) -> float:
        return 2 * amount / frames


class _AttentionBudget:
    """Keys that a vision token selects and those in its window, which the paper's plots hold constant."""

    unit = "keys"

    @staticmethod
    def is_for(run: Run) -> bool:
        return run.setting("nsa_mode") != "dense" and run.setting("block_size") is not None

    @staticmethod
    def of(window_size: float, block_counts: float, run: Run) -> float:
        return block_counts * run.setting("block_size") + window_size

    @staticmethod
    def y(window_size: float, amount: float, run: Run) -> float:
        return (amount - window_size) / run.setting("block_size")


def plot_frames(runs: Sequence[Run]):
    """Accuracy over frames and tokens per frame."""
    varied = {"num_frames", "max_num_frames", "tokens_per_frame", "min_pixels", "max_pixels"}
    return _plot_grid(runs, "frames", "tokens_per_frame", varied, _VideoBudget, log_y=True)


def plot_attention(runs: Sequence[Run]):
    """Accuracy over window_size and block_counts."""
    varied = {"window_size", "block_counts"}
    return _plot_grid(runs, "window_size", "block_counts", varied, _AttentionBudget, log_y=False)


def pairs_sparse_dense(runs: Sequence[Run]) -> list[tuple[Run, Run]]:
    """Runs of equal task and arguments but for `nsa_mode` and what dense attention does not look at."""
    ignored = {"nsa_mode", "block_size", "block_counts", "window_size", "nsa_backend", "row", "preset"}

    def key(run: Run) -> tuple:
        return run.task, *sorted((name, str(value)) for name, value in run.arguments.items() if name not in ignored)

    dense = {key(run): run for run in runs if run.setting("nsa_mode") == "dense"}
    return [(run, dense[key(run)]) for run in runs if run.setting("nsa_mode") != "dense" and key(run) in dense]


def plot_sparse_dense(runs: Sequence[Run]):
    """Bars of sparse and dense attention with the same weights; `None` where a run has no counterpart."""
    pairs = pairs_sparse_dense(runs)
    if not pairs:
        return None
    names = dict(zip(map(id, runs), labels(runs), strict=True))
    figure, axis = plt.subplots(figsize=(2 + 1.6 * len(pairs), 4.5), layout="constrained")
    for side, name in enumerate(("sparse", "dense")):
        places = [number + 0.4 * side for number in range(len(pairs))]
        bars = axis.bar(places, [pair[side].score for pair in pairs], width=0.38, label=name)
        shares = [pair[side].mean("attention_share") for pair in pairs]
        axis.bar_label(bars, [f"{_text(share, '.1%')}" for share in shares], fontsize=7)
    ticks = [f"{sparse.task}\n{names[id(sparse)]}".replace(", ", "\n") for sparse, _ in pairs]
    axis.set_xticks([number + 0.2 for number in range(len(pairs))], ticks, fontsize=7)
    axis.set_ylabel("accuracy, % (above: share of dense attention)")
    axis.legend()
    return figure


PLOTS = {
    "context": plot_context,
    "frames": plot_frames,
    "attention": plot_attention,
    "sparse_dense": plot_sparse_dense,
}


def write_report(folders: Sequence[Path], output: Path) -> list[Path]:
    """Read result folders, write `report.md` and the plots that they have data for; returns what was written."""
    runs = read_runs(folders)
    output.mkdir(parents=True, exist_ok=True)
    text, written = ["# Evaluation\n", table(runs)], []
    if (rows := main_table(runs)) is not None:
        text += ["## The paper's main table\n", rows]
    for name, plot in PLOTS.items():
        figure = plot(runs)
        path = output / f"{name}.png"
        path.unlink(missing_ok=True)  # an earlier report's
        if figure is not None:
            figure.savefig(path, dpi=150)
            plt.close(figure)
            text.append(f"![{name}]({path.name})\n")
            written.append(path)
    (output / "report.md").write_text("\n".join(text))
    return [output / "report.md", *written]


def main() -> None:
    parser = argparse.ArgumentParser(description="Tables and plots from result folders of lmms_eval.")
    parser.add_argument("folders", type=Path, nargs="+")
    parser.add_argument("--output", type=Path, default=Path("eval/report"), help="folder; default: eval/report")
    arguments = parser.parse_args()
    for path in write_report(arguments.folders, arguments.output):
        print(path)


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:
        raise SystemExit(f"report.py: error: {error}") from error
