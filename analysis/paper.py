"""The paper's comparisons and findings in miniature: the small checkpoints, drawn videos, one page.

    python -m analysis.paper            # draws, runs every analysis, writes docs/paper.md; half an hour on two cores
    python -m analysis.paper --page     # the page alone, from the results that are there

Each analysis runs by its own command, in a process of its own; its numbers go to `analysis/results`, its plot to
`docs/pictures/paper`.
"""

import argparse
import json
import shlex
import string
import subprocess
import sys
from pathlib import Path
from typing import Any

from tqdm import tqdm

from videonsa_eval.draw_benchmark import draw_benchmark

from . import findings, latency, main_table
from .figure import write

ROOT = Path(__file__).resolve().parent.parent
RESULTS, PICTURES = Path("analysis/results"), Path("docs/pictures/paper")
SPARSE, DENSE = "checkpoints/tiny", "checkpoints/tiny_dense"
DATA = Path("build/paper")

TRAINED_SECONDS = 32
"""The longest videos of both trainings."""
SEED = 2510
"""Of the videos; training and tests draw from others."""

# What is asked: lengths of videos in seconds, and how many of each; every video gets a question of each kind.
QUESTIONS = {"short_and_long": ((32, 128), 20), "lengths": ((32, 64, 128, 256), 12)}

# A block is 16 tokens, as in the small checkpoint, where the methods have 64 or 128; numbers of keys and queries are
# cut to prompts of 156 and 540 tokens, with 40 = 2 * 16 + 8 keys, as many as VideoNSA takes. Shares and thresholds
# are the methods' own.
METHODS: dict[str, dict[str, Any]] = {
    "tri_shape": {"block_size": 16, "sink": 4, "window": 36, "last": 32},
    "minference": {"block_size": 16, "last_queries": 16, "min_vertical": 4, "min_slash": 4},
    "flexprefill": {"block_size": 16, "min_budget": 40},
    "xattention": {"block_size": 16, "stride": 4},
    "mminference": {
        "block_size": 16,
        "last_queries": 16,
        "min_vertical": 4,
        "min_slash": 4,
        "strides": [4, 8, 16, 32],
    },
    "psa": {"block_size": 16, "stride": 4},
    "fastv": {},
    "visionzip": {},
    "vscan": {},
}
METHODS_FILE = RESULTS / "methods.json"

ASKED = ["--questions", str(DATA / "short_and_long"), "--batch_size", "20"]
FEW = [*ASKED, "--limit", "8"]
ANSWERS = ["--max_new_tokens", "4"]
STEPS: dict[str, list[str]] = {
    "main_table": [
        DENSE,
        "--videonsa",
        SPARSE,
        *ASKED,
        "--methods",
        str(METHODS_FILE),
        "--search_share",
        "0.3",
        *ANSWERS,
    ],
    "ablations": [SPARSE, *ASKED, *ANSWERS],
    "allocation": [SPARSE, *ASKED, "--multiples", "1", "2", *ANSWERS],
    "context": [
        *(SPARSE, "--questions", str(DATA / "lengths"), "--batch_size", "12", "--dense_checkpoint", DENSE),
        *("--fps", "2", "--tokens_per_frame", "4", *ANSWERS),
    ],
    "gates": [SPARSE, *FEW],
    "head_similarity": [SPARSE, *FEW],
    "sinks": [SPARSE, *FEW, "--dense_checkpoint", DENSE],
    "selected_blocks": [SPARSE, *FEW],
    "latency": ["--shape", "7B", "--tokens", "1024", "4096", "16384"],
}


def run_steps(names: list[str]) -> None:
    """Draw what is asked, and run the analyses one after the other; the first that fails ends all."""
    write(METHODS, ROOT / METHODS_FILE)
    for name, (lengths, videos) in QUESTIONS.items():
        draw_benchmark(ROOT / DATA / name, lengths=lengths, videos=videos, seed=SEED, overwrite=True)
    for name in (progress := tqdm(names, desc="Analyses", disable=None)):
        progress.set_postfix_str(name)
        subprocess.run([sys.executable, *command_of(name)], cwd=ROOT, check=True)


def command_of(name: str) -> list[str]:
    outputs = ["--output", str(RESULTS / f"{name}.json"), "--plot", str(PICTURES / f"{name}.png")]
    return ["-m", f"analysis.{name}", *STEPS[name], *outputs]


def read_results() -> dict[str, dict]:
    """Records by step.

    Raises:
        ValueError: one is missing.
    """
    for name in STEPS:
        if not (ROOT / RESULTS / f"{name}.json").is_file():
            raise ValueError(f"{RESULTS / name}.json is missing: run `python -m analysis.paper` first")
    return {name: json.loads((ROOT / RESULTS / f"{name}.json").read_text()) for name in STEPS}


def page(records: dict[str, dict]) -> str:
    """The text of docs/paper.md."""
    results = {name: record["results"] for name, record in records.items()}
    found = [
        findings.comparison(results["main_table"]),
        findings.scaling(results["context"], TRAINED_SECONDS),
        findings.allocation(results["allocation"]),
        findings.branch_usage(results["ablations"]),
        findings.sinks(results["sinks"]),
        findings.dense_weights(results["main_table"]),
        findings.bottleneck(results["latency"]),
    ]
    machine = records["main_table"]["machine"]
    versions = f"torch {machine['torch']}, transformers {machine['transformers']}"
    ((short, long), videos), (lengths, videos_of_each) = QUESTIONS.values()
    summary = ["| the paper | the miniature |", "|---|---|"]
    summary += [f"| {finding.claim} | **{finding.verdict}** |" for finding in found]
    values = {
        "minutes": f"{sum(record['wall_seconds'] for record in records.values()) / 60:.0f}",
        "machine": f"{machine['cores']} cores of an {machine['cpu']} ({versions})",
        "asked": len(results["main_table"]["questions"]["kinds"]),
        "videos": videos,
        "short": short,
        "long": long,
        "videos_of_each": videos_of_each,
        "lengths": ", ".join(map(str, lengths)),
        "trained": TRAINED_SECONDS,
        "resolution": f"{_resolution(results['main_table']):.0f}",
        "summary": "\n".join(summary),
        "findings": "\n\n".join(map(_text, found)),
        "main_table": main_table.to_table(results["main_table"]),
        "ablations": _ablations(results["ablations"]),
        "allocation": _allocation(results["allocation"]),
        "sinks": _sinks(results["sinks"]),
        "latency": _latency(results["latency"]),
    }
    for name in STEPS:
        values[f"command_{name}"] = f"```bash\n{shlex.join(['.venv/bin/python', *command_of(name)])}\n```"
    return string.Template((ROOT / "analysis" / "page.md").read_text()).substitute(values)


def _text(finding: findings.Finding) -> str:
    evidence = "\n".join(f"- {sentence}" for sentence in finding.evidence)
    return f"**{finding.claim}** Rule: {finding.rule}\n\n{evidence}\n\nThe miniature **{finding.verdict}**."


def _resolution(results: dict) -> float:
    """Half the interval of a typical row's difference, in points."""
    widths = [row["difference"]["high"] - row["difference"]["low"] for name, row in results["rows"].items()]
    widths = sorted(width for width in widths if width)
    return 100 * widths[len(widths) // 2] / 2


def _ablations(results: dict) -> str:
    kinds = list(next(iter(results["rows"].values()))["kinds"])
    lines = ["| branches | " + " | ".join(kinds) + " | mean | less all |", "|---" * (len(kinds) + 3) + "|"]
    for name, row in results["rows"].items():
        shares = [f"{row['kinds'][kind]['share']:.0%}" for kind in kinds]
        less = "" if name == "as trained" else findings.points(row["difference"])
        lines.append(f"| {name} | " + " | ".join([*shares, f"{row['mean']['share']:.1%}", less]) + " |")
    return "\n".join(lines)


def _allocation(results: dict) -> str:
    lines = [
        "| K | blocks | window | alpha | pairs | without compression | formula | right |",
        "|---" * 8 + "|",
    ]
    for of_budget in results["budgets"]:
        for split in of_budget["splits"]:
            counted = split["attention"]
            is_trained = all(split[name] == value for name, value in results["trained"].items())
            cells = [
                str(of_budget["budget"]) + (" (trained)" if is_trained else ""),
                str(split["block_counts"]),
                str(split["window_size"]),
                f"{split['alpha']:.2f}",
                *(f"{counted[name]:.0%}" for name in ("exact", "without_compression", "formula")),
                findings.percent(split["mean"]),
            ]
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _sinks(results: dict) -> str:
    lines = [
        "| | keys | small values | sinks (sum) | alpha over 0.1 (sum) | sinks (mean) | alpha over 0.1 (mean) |",
        "|---" * 7 + "|",
    ]
    for branch, numbers in results["total"].items():
        shares = [numbers["small_values"]]
        shares += [numbers[alpha][what] for alpha in ("sum", "mean") for what in ("sinks", "above")]
        cells = ["-" if share is None else f"{share:.2%}" for share in shares]
        lines.append(f"| {branch.replace('_', ' ')} | {numbers['keys']:,} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _latency(results: dict) -> str:
    lines = ["| tokens | " + " | ".join(f"{part}, s" for part in latency.PARTS) + " | dense / nsa |"]
    lines.append("|---" * (len(latency.PARTS) + 2) + "|")
    for length in results["lengths"]:
        seconds = [length[part]["seconds"] for part in latency.PARTS]
        ratio = length["dense"]["seconds"] / length["nsa"]["seconds"]
        cells = [f"{length['tokens']:,}", *(f"{value:.3f}" for value in seconds), f"{ratio:.2f}"]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--page", action="store_true", help="write the page alone")
    parser.add_argument("--steps", nargs="+", choices=STEPS, default=list(STEPS), help="run these alone")
    arguments = parser.parse_args()
    if not arguments.page:
        run_steps(arguments.steps)
    try:
        text = page(read_results())
    except ValueError as error:
        parser.error(str(error))
    (ROOT / "docs" / "paper.md").write_text(text)
    print("docs/paper.md")


if __name__ == "__main__":
    main()
