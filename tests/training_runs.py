"""Runs of `train.py` on tiny data, and what they have in common."""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file
from training_data import write_records, write_videos

from training.trainer import last_whole_checkpoint

ROUNDING = 2**-24  # relative, of a float32 operation
# There are about 160 of them on the way from a pixel to a gradient: two vision and two text blocks, twenty operations
# each, and back.
GRADIENT_ROUNDING = 160 * ROUNDING
# An optimizer whose steps are proportional to the gradients. Adam divides by their size: where a gradient is nothing
# but rounding, as that of a key's bias in dense attention, it makes a whole step of it.
SGD = ["--optim", "sgd", "--optim_args", "momentum=0.9", "--learning_rate", "0.3"]


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


def assert_same_to_the_bit(first: Path, second: Path) -> None:
    """Two runs made the same steps in the same order: losses, gradient norms and weights are equal."""
    for key in ("loss", "grad_norm"):
        assert history(first, key) == history(second, key)
    ours, theirs = weights(first), weights(second)
    assert ours.keys() == theirs.keys()
    assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == []


def assert_same_run(start: Path, first: Path, second: Path) -> None:
    """Two runs of `SGD` from one checkpoint sum the same gradients, in another order.

    Losses and gradient norms of all steps, and what they made of the weights, differ by no more than float32 rounds.
    """
    for key in ("loss", "grad_norm"):
        torch.testing.assert_close(history(first, key), history(second, key), rtol=GRADIENT_ROUNDING, atol=0)
    before, *after = (weights(folder) for folder in (start, first, second))
    a, b = (torch.cat([(end[name].double() - before[name]).flatten() for name in before]) for end in after)
    # Each run rounds every weight once a step, and once where adapters are merged.
    size = torch.cat([weight.double().flatten() for weight in before.values()]).norm()
    stored = 2 * (len(history(first)) + 1) * ROUNDING * size
    assert (a - b).norm() <= GRADIENT_ROUNDING * a.norm() + stored
