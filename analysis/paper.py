"""The paper's comparisons and findings in miniature: the small checkpoints, drawn videos, one page.

    python -m analysis.paper            # draws videos, runs every analysis, writes docs/paper.md
    python -m analysis.paper --page     # the page alone, from the results that are there

Each analysis runs by its own command, in a process of its own; its numbers go to `analysis/results`, its plot to
`docs/pictures/paper`.
"""

import argparse
import json
import os
import shlex
import string
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from tqdm import tqdm

from videonsa_eval.draw_benchmark import draw_benchmark

from . import findings, latency, main_table
from .allocation import is_trained
from .figure import to_table, write

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
RUN_FILE = RESULTS / "run.json"
TIMED = ("latency",)

# The weights are saved in bfloat16, which a CPU without instructions for it computes several times slower.
PRECISION = ["--dtype", "float32", "--device", "cpu"]
ASKED = ["--questions", str(DATA / "short_and_long"), "--batch_size", "20", *PRECISION]
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
        *(*PRECISION, "--fps", "2", "--tokens_per_frame", "4", *ANSWERS),
    ],
    "gates": [SPARSE, *FEW],
    "head_similarity": [SPARSE, *FEW],
    "sinks": [SPARSE, *FEW, "--dense_checkpoint", DENSE],
    "selected_blocks": [SPARSE, *FEW],
    "latency": [*PRECISION, "--shape", "7B", "--tokens", "1024", "4096", "16384"],
}


def run_steps(names: list[str], processes: int) -> None:
    """Draw what is asked, and run the analyses, so many at a time; what is timed by the clock comes last, alone.

    Raises:
        RuntimeError: one failed, with what it printed; the others are stopped.
    """
    start = time.perf_counter()
    write(METHODS, ROOT / METHODS_FILE)
    for name, (lengths, videos) in QUESTIONS.items():
        draw_benchmark(ROOT / DATA / name, lengths=lengths, videos=videos, seed=SEED, overwrite=True)
    waiting = sorted(names, key=TIMED.__contains__)
    running: dict[str, subprocess.Popen] = {}
    with tqdm(total=len(names), desc="Analyses") as progress, tempfile.TemporaryDirectory() as logs:
        try:
            while waiting or running:
                while waiting and len(running) < (processes if waiting[0] not in TIMED else 1):
                    name = waiting.pop(0)
                    running[name] = _start(name, Path(logs) / name)
                progress.set_postfix_str(", ".join(running))
                time.sleep(0.5)
                for name in [name for name, process in running.items() if process.poll() is not None]:
                    if running.pop(name).returncode:
                        raise RuntimeError(f"analysis.{name} failed:\n{(Path(logs) / name).read_text()}")
                    progress.update()
        finally:
            for process in running.values():
                process.terminate()
                process.wait()
    if set(names) == set(STEPS):
        write({"minutes": round((time.perf_counter() - start) / 60, 1), "processes": processes}, ROOT / RUN_FILE)


def _start(name: str, log: Path) -> subprocess.Popen:
    threads = {} if name in TIMED else {"OMP_NUM_THREADS": "1"}
    with log.open("w") as file:
        return subprocess.Popen(
            [sys.executable, *command_of(name)], cwd=ROOT, env=os.environ | threads, stdout=file, stderr=file
        )


def command_of(name: str) -> list[str]:
    outputs = ["--output", str(RESULTS / f"{name}.json"), "--plot", str(PICTURES / f"{name}.png")]
    return ["-m", f"analysis.{name}", *STEPS[name], *outputs]


def read_results() -> dict[str, dict]:
    """Records by step, and that of the `run`.

    Raises:
        ValueError: one is missing.
    """
    names = (*STEPS, RUN_FILE.stem)
    for name in names:
        if not (ROOT / RESULTS / f"{name}.json").is_file():
            raise ValueError(f"{RESULTS / name}.json is missing: run `python -m analysis.paper` first")
    return {name: json.loads((ROOT / RESULTS / f"{name}.json").read_text()) for name in names}


def page(records: dict[str, dict]) -> str:
    """The text of docs/paper.md."""
    run = records["run"]
    results = {name: records[name]["results"] for name in STEPS}
    found = [
        findings.comparison(results["main_table"]),
        findings.together(results["ablations"]),
        findings.dense_weights(results["main_table"]),
        findings.scaling(results["context"], TRAINED_SECONDS),
        findings.allocation(results["allocation"]),
        findings.branch_usage(results["ablations"]),
        findings.by_depth(results["gates"]),
        findings.bottleneck(results["latency"]),
        findings.sinks(results["sinks"]),
    ]
    machine = records["main_table"]["machine"]
    versions = f"torch {machine['torch']}, transformers {machine['transformers']}"
    ((short, long), videos), (lengths, videos_of_each) = QUESTIONS.values()
    verdicts = [(finding.claim, f"**{finding.verdict}**") for finding in found]
    values = {
        "minutes": f"{run['minutes']:.0f}",
        "processes": run["processes"],
        "note": f" ({run['note']})" if "note" in run else "",
        "machine": f"{machine['cores']} cores of an {machine['cpu']} ({versions})",
        "asked": len(results["main_table"]["questions"]["kinds"]),
        "videos": videos,
        "short": short,
        "long": long,
        "videos_of_each": videos_of_each,
        "lengths": ", ".join(map(str, lengths)),
        "trained": TRAINED_SECONDS,
        "resolution": f"{_resolution(results['main_table']):.0f}",
        "summary": to_table(["the paper", "the miniature"], verdicts),
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
    widths = [row["difference"]["high"] - row["difference"]["low"] for row in results["rows"].values()]
    return 100 * sorted(widths)[len(widths) // 2] / 2


def _ablations(results: dict) -> str:
    kinds = list(next(iter(results["rows"].values()))["kinds"])
    rows = []
    for name, row in results["rows"].items():
        shares = [f"{row['kinds'][kind]['share']:.0%}" for kind in kinds]
        less = "" if name == "as trained" else findings.points(row["difference"])
        rows.append([name, *shares, f"{row['mean']['share']:.1%}", less])
    return to_table(["branches", *kinds, "mean", "less all"], rows)


def _allocation(results: dict) -> str:
    rows = []
    for of_budget in results["budgets"]:
        for split in of_budget["splits"]:
            shares = (split["attention"][name] for name in ("exact", "without_compression", "formula"))
            rows.append(
                [
                    str(of_budget["budget"]) + (" (trained)" if is_trained(results, split) else ""),
                    *(str(split[name]) for name in ("block_counts", "window_size")),
                    f"{split['alpha']:.2f}",
                    *(f"{share:.0%}" for share in shares),
                    findings.percent(split["mean"]),
                ]
            )
    return to_table(["K", "blocks", "window", "alpha", "pairs", "without compression", "formula", "right"], rows)


def _sinks(results: dict) -> str:
    rows = []
    for branch, numbers in results["total"].items():
        shares = [numbers["small_values"]]
        shares += [numbers[alpha][what] for alpha in ("sum", "mean") for what in ("sinks", "above")]
        cells = ["-" if share is None else f"{share:.2%}" for share in shares]
        rows.append([branch.replace("_", " "), f"{numbers['keys']:,}", *cells])
    of_alpha = [f"{what} ({alpha})" for alpha in ("sum", "mean") for what in ("sinks", "alpha over 0.1")]
    return to_table(["", "keys", "small values", *of_alpha], rows)


def _latency(results: dict) -> str:
    rows = []
    for length in results["lengths"]:
        seconds = [f"{length[part]['seconds']:.3f}" for part in latency.PARTS]
        ratio = length["dense"]["seconds"] / length["nsa"]["seconds"]
        rows.append([f"{length['tokens']:,}", *seconds, f"{ratio:.2f}"])
    return to_table(["tokens", *(f"{part}, s" for part in latency.PARTS), "dense / nsa"], rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--page", action="store_true", help="write the page alone")
    parser.add_argument("--steps", nargs="+", choices=STEPS, default=list(STEPS), help="run these alone")
    parser.add_argument("--processes", type=int, default=min(2, os.cpu_count() or 1), help="at a time (%(default)s)")
    arguments = parser.parse_args()
    if arguments.processes < 1:
        parser.error(f"--processes must be positive, got {arguments.processes}")
    if not arguments.page:
        run_steps(arguments.steps, arguments.processes)
    try:
        text = page(read_results())
    except ValueError as error:
        parser.error(str(error))
    (ROOT / "docs" / "paper.md").write_text(text)
    print("docs/paper.md")


if __name__ == "__main__":
    main()
