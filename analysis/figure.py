"""What the analyses' commands have in common: a checkpoint and questions in, a JSON file and a plot out."""

import argparse
import datetime
import json
import math
import re
import shlex
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

import numpy as np
import torch
from lmms_eval.utils import simple_parse_args_string
from matplotlib.figure import Figure
from transformers import AutoModelForImageTextToText
from transformers.utils import cached_file

from benchmarks.bench_cpu import describe_cpu
from modeling_videonsa import VideoNSAForConditionalGeneration
from processing_videonsa import VideoNSAProcessor

from .questions import Question, load

Z = 1.96
"""Of a two-sided interval of 95 %."""
BRANCH_COLOURS = {"compression": "tab:blue", "selection": "tab:orange", "window": "tab:green", "dense": "tab:gray"}


@dataclass
class Setting:
    """What every analysis runs on.

    Attributes:
        model, processor: as `load_model` returns them.
        questions: what is asked.
        video_options: keywords of `processor.apply_chat_template`, such as fps.
        batch_size: of prompts that are answered together.
    """

    model: Any
    processor: Any
    questions: Sequence[Question]
    video_options: dict[str, Any]
    batch_size: int = 1


def load_model(checkpoint: str | Path, dtype: str = "auto", device: str = "cpu", **settings) -> tuple[Any, Any]:
    """A model of VideoNSA or Qwen2.5-VL, and our processor, so that both read the same frames.

    Args:
        settings: of the configuration, such as nsa_mode="dense".
    Raises:
        ValueError: a checkpoint of another kind, or one with gates that are lost on loading.
    """
    checkpoint = str(checkpoint)
    kind = json.loads(Path(cached_file(checkpoint, "config.json")).read_text()).get("model_type")
    if kind not in ("videonsa", "qwen2_5_vl"):
        raise ValueError(f"`checkpoint` = {checkpoint!r} must be of VideoNSA or Qwen2.5-VL, got {kind!r}")
    model_class = VideoNSAForConditionalGeneration if kind == "videonsa" else AutoModelForImageTextToText
    model, loaded = model_class.from_pretrained(
        checkpoint, dtype=dtype, device_map=device, output_loading_info=True, **settings
    )
    if any("g_proj" in key for key in loaded["unexpected_keys"]):
        raise ValueError(f"`checkpoint` = {checkpoint!r} has gates that Qwen2.5-VL does not: see convert_weights.py")
    return model.eval(), VideoNSAProcessor.from_pretrained(checkpoint, trust_remote_code=False)


def load_dense(checkpoint: str | Path, like) -> Any:
    """A model to compare with, run densely, in the dtype and on the device of another one.

    Raises:
        ValueError: it has another vocabulary, or as `load_model`.
    """
    model, _ = load_model(checkpoint, like.dtype, like.device)
    if hasattr(model.config, "nsa_mode"):
        model.config.nsa_mode = "dense"
    if like.config.get_text_config().vocab_size != model.config.get_text_config().vocab_size:
        raise ValueError(f"`dense_checkpoint` = {str(checkpoint)!r} has another vocabulary than `checkpoint`")
    return model


def wilson(right: float, total: float) -> tuple[float, float]:
    """Wilson's interval of 95 % of a share (Wilson 1927)."""
    if total < 1:
        raise ValueError(f"`total` must be positive, got {total!r}")
    share, square = right / total, Z * Z / total
    centre, half = share + square / 2, Z * math.sqrt(share * (1 - share) / total + square / (4 * total))
    return max(0.0, (centre - half) / (1 + square)), min(1.0, (centre + half) / (1 + square))


def paired_difference(first: Sequence[float], second: Sequence[float], groups: Sequence[Any]) -> dict[str, float]:
    """The mean of `first - second`, and its interval of 95 %, where values of one group may hang together.

    The interval is a normal one from the sums of groups (the sandwich estimator for a mean of clusters), which takes
    some tens of groups; of a single group nothing is known, and it is all that scores from 0 to 1 allow.

    Args:
        first, second: scores of the same questions.
        groups: for each question, such as its video.
    """
    if not len(first) == len(second) == len(groups) or not len(first):
        raise ValueError(
            f"`first`, `second`, `groups` must be of one length, got {[len(first), len(second), len(groups)]}"
        )
    differences = np.asarray(first, float) - np.asarray(second, float)
    mean, sums = float(differences.mean()), {}
    for group, difference in zip(groups, differences, strict=True):
        sums[group] = sums.get(group, 0.0) + difference - mean
    count = len(sums)
    if count < 2:
        return {"mean": mean, "low": -1.0, "high": 1.0, "groups": count}
    spread = math.sqrt(sum(value * value for value in sums.values()) * count / (count - 1)) / len(differences)
    return {"mean": mean, "low": mean - Z * spread, "high": mean + Z * spread, "groups": count}


def command(
    run: Callable[..., dict],
    plot: Callable[[dict], Figure],
    doc: str,
    add_arguments: Callable[[argparse.ArgumentParser], None] = lambda parser: None,
    arguments: Sequence[str] | None = None,
) -> dict:
    """The command line of an analysis; writes and returns the record.

    Args:
        run: (setting, **what add_arguments added) -> results, of what JSON has.
        plot: results -> figure.
        doc: of the module.
    """
    parser = _parser(doc)
    parser.add_argument("checkpoint", help="folder or Hub id, of VideoNSA or Qwen2.5-VL")
    parser.add_argument("--questions", required=True, help="folder with all.jsonl, a .jsonl file, or lmms-eval's task")
    parser.add_argument("--limit", type=int, help="questions of each kind")
    parser.add_argument("--seed", type=int, default=0, help="of what the limit takes (%(default)s)")
    parser.add_argument("--batch_size", type=int, default=1, help="prompts answered together (%(default)s)")
    parser.add_argument("--video_args", default="", help="for the processor, such as fps=2,max_total_tokens=8192")
    parser.add_argument("--config_args", default="", help="for the configuration, such as nsa_mode=dense")
    common = {action.dest for action in parser._actions}
    add_arguments(parser)

    def answer(given: dict[str, Any]) -> dict[str, Any]:
        if given["batch_size"] < 1:
            raise ValueError(f"`batch_size` must be positive, got {given['batch_size']}")
        questions = load(given["questions"], given["limit"], given["seed"])
        settings = simple_parse_args_string(given["config_args"])
        model, processor = load_model(given["checkpoint"], given["dtype"], given["device"], **settings)
        video_options = simple_parse_args_string(given["video_args"])
        setting = Setting(model, processor, questions, video_options, given["batch_size"])
        results = run(setting, **{name: value for name, value in given.items() if name not in common})
        return {"questions": len(questions), "results": results}

    return _execute(parser, answer, plot, arguments)


def measurement(
    run: Callable[..., dict],
    plot: Callable[[dict], Figure],
    doc: str,
    add_arguments: Callable[[argparse.ArgumentParser], None] = lambda parser: None,
    arguments: Sequence[str] | None = None,
) -> dict:
    """The command line of an analysis that asks no model; writes and returns the record.

    Args:
        run: (device=, dtype=, **what add_arguments added) -> results, of what JSON has.
        plot, doc: as in `command`.
    """
    parser = _parser(doc)
    add_arguments(parser)
    own = {action.dest for action in parser._actions} - {"help", "output", "plot"}
    return _execute(parser, lambda given: {"results": run(**{name: given[name] for name in own})}, plot, arguments)


def _parser(doc: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--output", type=Path, help="JSON file")
    parser.add_argument("--plot", type=Path, help="picture: .png, .svg or .pdf")
    return parser


def _execute(
    parser: argparse.ArgumentParser,
    run: Callable[[dict[str, Any]], dict[str, Any]],
    plot: Callable[[dict], Figure],
    arguments: Sequence[str] | None,
) -> dict:
    """Parse, run, and write. run: what was given, by name -> fields of the record, `results` among them."""
    given = vars(parser.parse_args(arguments))
    start = time.perf_counter()
    try:
        found = run(given)
    except (ValueError, OSError) as error:
        parser.error(str(error))
    record = {
        "date": datetime.date.today().isoformat(),
        "command": shlex.join(["python", "-m", f"analysis.{Path(sys.argv[0]).stem}", *(arguments or sys.argv[1:])]),
        "machine": describe_cpu("torch", "transformers"),
        "device": torch.cuda.get_device_name(given["device"]) if given["device"].startswith("cuda") else "cpu",
        "wall_seconds": round(time.perf_counter() - start, 1),
        **found,
    }
    if given["output"]:
        write(record, given["output"])
    else:
        print(json.dumps(record["results"], indent=1))
    if given["plot"]:
        save(plot(record["results"]), given["plot"])
    return record


def to_table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Markdown."""
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    return "\n".join(lines + ["| " + " | ".join(row) + " |" for row in rows])


def reach(shares: Sequence[Mapping[str, float]]) -> list[list[float]]:
    """How far intervals reach below and above their shares, as `errorbar` wants it."""
    return [[mean["share"] - mean["low"] for mean in shares], [mean["high"] - mean["share"] for mean in shares]]


def drawn(values: Iterable[float | None]) -> list[float]:
    """Values for a plot, which leaves out what is not there."""
    return [float("nan") if value is None else value for value in values]


def write(record: dict, path: Path) -> None:
    """As JSON; a list of plain values is one line."""
    text = json.dumps(record, indent=1, allow_nan=False)
    text = re.sub(r"\[[^\[\]{}]*\]", lambda values: re.sub(r"\s*\n\s*", " ", values[0]), text)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text + "\n")


def save(figure: Figure, path: Path) -> None:
    """The same numbers give the same file: neither the time nor a random name is in it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    metadata = {".svg": {"Date": None}, ".pdf": {"CreationDate": None}}.get(path.suffix)
    with matplotlib.rc_context({"svg.hashsalt": "videonsa"}):
        figure.savefig(path, dpi=110, bbox_inches="tight", metadata=metadata)
