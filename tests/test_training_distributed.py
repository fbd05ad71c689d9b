"""Two processes train as one does: side by side (DDP), sharded (FSDP2), and sharing the tokens of a sample.

On CPUs, over gloo. `distributed_training.py` makes all runs of a test in one pair of processes.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from accelerate.commands.launch import _validate_launch_command as complete_launch_command
from accelerate.commands.launch import launch_command_parser
from accelerate.utils import prepare_multi_gpu_env
from distributed_training import FSDP
from training_data import make_checkpoint
from training_runs import (
    GRADIENT_ROUNDING,
    SGD,
    assert_same_run,
    assert_same_to_the_bit,
    history,
    make_arguments,
    make_data,
)

import train
from modeling_videonsa import VideoNSAForConditionalGeneration
from training.sequence_parallel import SequenceParallel

TESTS = Path(__file__).parent
SAVE = ["--save_steps", "2"]
EVALUATE = ["--eval_share", "0.25", "--eval_strategy", "steps", "--eval_steps", "3"]
SHARED = ["--sequence_parallel_size", "2"]
ROWS = ["--per_device_train_batch_size", "2", "--per_device_eval_batch_size", "2"]
TWICE = ["--gradient_accumulation_steps", "2"]
CHECKPOINTING = ["--gradient_checkpointing", "true"]


@pytest.fixture(scope="module")
def setting(tmp_path_factory) -> tuple[Path, list[str]]:
    folder = tmp_path_factory.mktemp("setting")
    return make_checkpoint(folder), make_data(folder)


@pytest.fixture
def in_processes(setting, tmp_path):
    """Makes runs, by name: arguments, and whether with FSDP."""

    def run(runs: dict[str, tuple[list[str], bool]], steps: int, processes: int = 2, setting=setting) -> None:
        file = tmp_path / "runs.json"
        lines = [
            {"arguments": [*make_arguments(*setting, tmp_path / name, steps), *SGD, *extra], "fsdp": fsdp}
            for name, (extra, fsdp) in runs.items()
        ]
        file.write_text(json.dumps(lines))
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        result = subprocess.run(
            [*command, str(TESTS / "distributed_training.py"), str(file)],
            env=environment, capture_output=True, text=True, timeout=600,
        )  # fmt: skip
        assert result.returncode == 0, f"{result.stdout}\n{result.stderr}"

    return run


@pytest.fixture
def in_one(setting, tmp_path):
    def run(name: str, *extra: str, steps: int, setting=setting) -> Path:
        train.main([*make_arguments(*setting, tmp_path / name, steps), *SGD, *extra])
        return tmp_path / name

    return run


def test_two_processes_train_as_one(setting, in_processes, in_one, tmp_path):
    """Loss, gradient norm, evaluation and weights; FSDP also resumed."""
    runs = {
        "data-parallel": (EVALUATE, False),
        "shared": ([*SHARED, *ROWS, *EVALUATE, *CHECKPOINTING], False),
        "shared-dense": ([*SHARED, *ROWS, "--attention", "dense"], False),
        "sharded": ([*CHECKPOINTING, *SAVE], True),
        "sharded-resumed": (["--resume_from_checkpoint", str(tmp_path / "sharded" / "checkpoint-2")], True),
        "sharded-shared-packed": ([*SHARED, "--packing", "true"], True),
    }
    in_processes(runs, steps=3)
    one = {
        "data-parallel": in_one("one", *TWICE, *EVALUATE, steps=3),
        "shared": in_one("one-rows", *ROWS, *EVALUATE, steps=3),
        "shared-dense": in_one("one-dense", *ROWS, "--attention", "dense", steps=3),
        "sharded": in_one("one-twice", *TWICE, steps=3),
        "sharded-shared-packed": in_one("one-packed", "--packing", "true", steps=3),
    }
    for name, alone in one.items():
        assert_same_run(setting[0], alone, tmp_path / name)
    assert_same_to_the_bit(tmp_path / "sharded", tmp_path / "sharded-resumed")
    for name in ("data-parallel", "shared"):
        for key in ("eval_loss", "eval_answer_accuracy", "gates/selection"):
            assert history(tmp_path / name, key) == pytest.approx(history(one[name], key), rel=GRADIENT_ROUNDING)


def test_the_launch_configurations_are_what_was_tested():
    def launch(name: str):
        config = str(TESTS.parent / "configs" / name)
        return complete_launch_command(launch_command_parser().parse_args(["--config_file", config, "train.py"]))[0]

    environment = prepare_multi_gpu_env(launch("accelerate_fsdp2.yaml"))
    assert {name: environment[name] for name in FSDP} == FSDP
    assert environment["ACCELERATE_MIXED_PRECISION"] == "bf16"
    deepspeed = json.loads((TESTS.parent / launch("accelerate_deepspeed.yaml").deepspeed_config_file).read_text())
    assert deepspeed["zero_optimization"]["stage"] == 2


@pytest.mark.slow
def test_sharded_lora_and_bf16(setting, in_processes, in_one, tmp_path):
    lora = ["--lora_rank", "2", *SAVE]
    runs = {
        "lora": (lora, True),
        "lora-resumed": ([*lora, "--resume_from_checkpoint", str(tmp_path / "lora" / "checkpoint-2")], True),
        "bf16": (["--bf16", "true", *SHARED], True),
    }
    in_processes(runs, steps=3)
    assert_same_run(setting[0], in_one("one-lora", *TWICE, *lora, steps=3), tmp_path / "lora")
    assert_same_to_the_bit(tmp_path / "lora", tmp_path / "lora-resumed")
    exact = in_one("one", steps=3)
    assert history(tmp_path / "bf16") == pytest.approx(history(exact), rel=2e-2)


@pytest.mark.slow
def test_four_processes(setting, in_processes, in_one, tmp_path):
    """Two groups of two; and one of four, with fewer temporal steps in a batch than processes."""
    four_heads = make_checkpoint(tmp_path, num_key_value_heads=4), setting[1]
    short = ["--fps", "0.25"]
    runs = {"groups": ([*SHARED, *EVALUATE], False), "short": ([*short, "--sequence_parallel_size", "4"], True)}
    in_processes(runs, steps=3, processes=4, setting=four_heads)
    pairs = {
        "groups": in_one("one-twice", *TWICE, *EVALUATE, steps=3, setting=four_heads),
        "short": in_one("one-short", *short, steps=3, setting=four_heads),
    }
    for name, alone in pairs.items():
        assert_same_run(four_heads[0], alone, tmp_path / name)


def test_key_value_heads_are_not_split(setting):
    """Refused before anything is exchanged."""
    model = VideoNSAForConditionalGeneration.from_pretrained(setting[0])  # two of them
    group = SequenceParallel.__new__(SequenceParallel)
    group.size = 4
    with pytest.raises(ValueError, match="`sequence_parallel_size` = 4 must divide the 2 key/value heads"):
        group.attach(model)
