"""Run lmms_eval with the paper's settings for a benchmark (`presets/*.yaml`).

    python -m videonsa_eval.run_preset longvideobench path/or/hub-id
    python -m videonsa_eval.run_preset timescope path/or/hub-id --model_args nsa_mode=dense,fps=2 --limit 8
    accelerate launch --num_processes 8 -m videonsa_eval.run_preset mlvu path/or/hub-id

`--model_args` adds to the preset's and replaces them one by one. All further options are lmms_eval's. The exit status
is 1 where no results were written; lmms_eval's own is 0 after most errors.
"""

import argparse
import sys
from pathlib import Path

import yaml
from accelerate import PartialState
from lmms_eval.__main__ import cli_evaluate
from lmms_eval.utils import simple_parse_args_string

PRESETS = Path(__file__).resolve().parent / "presets"
# What lmms_eval calls its result files.
RESULTS = "*_results.json"


def preset_names() -> list[str]:
    return sorted(path.stem for path in PRESETS.glob("*.yaml"))


def read_preset(name: str) -> dict:
    """A benchmark's `tasks` and `model_args`; its main `metric`, whether that is `in_percent`, `published` scores.

    Raises:
        ValueError: there is no such preset.
    """
    path = PRESETS / f"{name}.yaml"
    if not path.is_file():
        raise ValueError(f"`preset` must be one of {', '.join(preset_names())}, got {name!r}")
    return yaml.safe_load(path.read_text())


def command_line(name: str, pretrained: str, output: Path, model_args: str = "", further: list[str] = ()) -> list[str]:
    """The arguments of lmms_eval."""
    preset = read_preset(name)
    arguments = {"pretrained": pretrained, **preset["model_args"], **simple_parse_args_string(model_args)}
    return [
        "--model=videonsa",
        "--model_args=" + ",".join(f"{key}={value}" for key, value in arguments.items()),
        f"--tasks={preset['tasks']}",
        "--log_samples",
        f"--output_path={output}",
        *further,
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description="Run lmms_eval with the paper's settings.", allow_abbrev=False)
    parser.add_argument("preset", help="a file name in eval/presets, without .yaml")
    parser.add_argument("pretrained", help="checkpoint folder or Hub id")
    parser.add_argument("--model_args", default="", help="to add to the preset's, or to replace them")
    parser.add_argument("--output_path", type=Path, help="folder; default: eval/results/PRESET")
    arguments, further = parser.parse_known_args()
    output = arguments.output_path or Path("eval/results") / arguments.preset
    try:
        command = command_line(arguments.preset, arguments.pretrained, output, arguments.model_args, further)
    except ValueError as error:
        parser.error(str(error))
    print("lmms_eval", *command, flush=True)
    sys.argv = ["lmms_eval", *command]
    before = set(output.rglob(RESULTS))
    cli_evaluate()
    if PartialState().is_main_process and set(output.rglob(RESULTS)) <= before:
        raise SystemExit(f"run_preset.py: error: lmms_eval wrote no results to {output}; its error is above")


if __name__ == "__main__":
    main()
