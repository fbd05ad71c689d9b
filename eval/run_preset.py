"""Run lmms_eval with the paper's settings for a benchmark (`presets/*.yaml`), or for a row of its main table.

    python -m videonsa_eval.run_preset longvideobench path/or/hub-id
    python -m videonsa_eval.run_preset all path/or/hub-id --row xattention
    python -m videonsa_eval.run_preset timescope path/or/hub-id --row videonsa_v2 --model_args fps=2 --limit 8
    accelerate launch --num_processes 8 -m videonsa_eval.run_preset mlvu path/or/hub-id

`all` runs the six benchmarks of the main table one after the other. A row (`presets/rows/*.yaml`) says what runs in the
place of the model's own attention. `--model_args` adds to both and replaces them one by one. All further options are
lmms_eval's, `--tasks` among them, which puts other data in the benchmark's place. The exit status is 1 where no results
were written; lmms_eval's own is 0 after most errors.
"""

import argparse
import sys
from pathlib import Path

import yaml
from accelerate import PartialState
from lmms_eval.__main__ import cli_evaluate
from lmms_eval.utils import simple_parse_args_string

PRESETS = Path(__file__).resolve().parent / "presets"
BENCHMARKS = ("longvideobench", "mlvu", "timescope", "longtimescope", "tomato", "vsibench")
"""The columns of the paper's main table."""
# What lmms_eval calls its result files.
RESULTS = "*_results.json"


def preset_names() -> list[str]:
    return sorted(path.stem for path in PRESETS.glob("*.yaml"))


def row_names() -> list[str]:
    return sorted(path.stem for path in (PRESETS / "rows").glob("*.yaml"))


def read_preset(name: str) -> dict:
    """A benchmark's `tasks` and `model_args`; its main `metric`, whether that is `in_percent`, and `published` scores.

    The scores are by the name of their row.

    Raises:
        ValueError: there is no such preset.
    """
    path = PRESETS / f"{name}.yaml"
    if not path.is_file():
        raise ValueError(f"`preset` must be one of {', '.join(preset_names())}, got {name!r}")
    rows = map(read_row, row_names())
    return yaml.safe_load(path.read_text()) | {
        "published": {row["row"]: row["published"][name] for row in rows if name in row["published"]}
    }


def read_row(name: str) -> dict:
    """A row of the main table: its name there (`row`), the `checkpoint` it is of, `model_args`, `published` scores.

    `benchmark_args` are further arguments for single benchmarks; `published` is by the name of the preset.

    Raises:
        ValueError: there is no such row.
    """
    path = PRESETS / "rows" / f"{name}.yaml"
    if not path.is_file():
        raise ValueError(f"`row` must be one of {', '.join(row_names())}, got {name!r}")
    return {"model_args": {}, "benchmark_args": {}} | yaml.safe_load(path.read_text())


def command_line(
    name: str, pretrained: str, output: Path, model_args: str = "", further: list[str] = (), row: str | None = None
) -> list[str]:
    """The arguments of lmms_eval."""
    preset = read_preset(name)
    arguments = {"pretrained": pretrained, **preset["model_args"]}
    if row is not None:
        of_row = read_row(row)
        if "nsa_mode" in of_row["model_args"] and of_row["model_args"]["nsa_mode"] != "sparse":
            for setting in ("block_counts", "window_size"):  # they would say nothing
                arguments.pop(setting, None)
        arguments |= of_row["model_args"] | of_row["benchmark_args"].get(name, {}) | {"row": row, "preset": name}
    arguments |= simple_parse_args_string(model_args)
    has_tasks = any(option.split("=")[0] == "--tasks" for option in further)
    return [
        "--model=videonsa",
        "--model_args=" + ",".join(f"{key}={value}" for key, value in arguments.items()),
        *([] if has_tasks else [f"--tasks={preset['tasks']}"]),
        "--log_samples",
        f"--output_path={output}",
        *further,
    ]


def run(command: list[str], output: Path) -> None:
    """Run lmms_eval in this process; exits where it wrote no results."""
    print("lmms_eval", *command, flush=True)
    sys.argv = ["lmms_eval", *command]
    before = set(output.rglob(RESULTS))
    cli_evaluate()
    if PartialState().is_main_process and set(output.rglob(RESULTS)) <= before:
        raise SystemExit(f"run_preset.py: error: lmms_eval wrote no results to {output}; its error is above")


def main() -> None:
    parser = argparse.ArgumentParser(description="Run lmms_eval with the paper's settings.", allow_abbrev=False)
    parser.add_argument("preset", help="a file name in eval/presets, without .yaml, or `all` of the main table")
    parser.add_argument("pretrained", help="checkpoint folder or Hub id")
    parser.add_argument("--row", help="a file name in eval/presets/rows, without .yaml")
    parser.add_argument("--model_args", default="", help="to add to the preset's, or to replace them")
    parser.add_argument("--output_path", type=Path, help="folder; default: eval/results/PRESET or .../ROW/PRESET")
    arguments, further = parser.parse_known_args()
    names = BENCHMARKS if arguments.preset == "all" else (arguments.preset,)
    folder = Path("eval/results") if arguments.row is None else Path("eval/results") / arguments.row
    commands = []
    try:
        for name in names:
            output = arguments.output_path or folder / name
            if len(names) > 1 and arguments.output_path is not None:
                output = arguments.output_path / name
            line = command_line(name, arguments.pretrained, output, arguments.model_args, further, row=arguments.row)
            commands.append((line, output))
    except ValueError as error:
        parser.error(str(error))
    for command, output in commands:
        run(command, output)


if __name__ == "__main__":
    main()
