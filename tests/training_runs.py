"""Runs of `train.py` on tiny data, and what they have in common."""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file
from training_data import write_records, write_videos

from training.trainer import last_whole_checkpoint


def make_data(folder: Path) -> list[str]:
    """Eight videos with two questions each; arguments of `train.py` that name them."""
    records = write_records(folder / "records.json", write_videos(folder / "videos", [8, 12, 9, 8, 16, 8, 11, 8]))
    return ["--train_data", str(records), "--video_folder", str(folder / "videos")]


def make_arguments(model: Path, data: list[str], output: Path, steps: int) -> list[str]:
    """A run that logs every step and saves nothing before its end."""
    settings = (
        f"--learning_rate 1e-3 --max_tokens 1000 --max_steps {steps} --logging_steps 1 --save_steps 1000 --seed 7"
    )
    return ["--model", str(model), *data, "--output_dir", str(output), *settings.split(), "--disable_tqdm", "true"]


def history(folder: Path, key: str = "loss") -> list[float]:
    """What was logged step by step, of the last checkpoint."""
    state = json.loads((Path(last_whole_checkpoint(folder)) / "trainer_state.json").read_text())
    return [entry[key] for entry in state["log_history"] if key in entry]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def assert_same_run(start: Path, first: Path, second: Path, tolerance: float = 1e-5) -> None:
    """Two runs from one checkpoint agree: losses and gradient norms of all steps, and what they made of the weights.

    (Of the weights as a whole: Adam divides by the size of the gradient, so that single weights with hardly any may
    differ by more.)
    """
    for key in ("loss", "grad_norm"):
        torch.testing.assert_close(history(first, key), history(second, key), rtol=tolerance, atol=0)
    before, *after = (weights(folder) for folder in (start, first, second))
    a, b = (torch.cat([(end[name] - before[name]).flatten() for name in before]) for end in after)
    assert (a - b).norm() <= 10 * tolerance * a.norm()
