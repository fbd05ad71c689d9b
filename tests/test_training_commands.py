"""Fine-tuning as a user does it, from the shell: killed, started again, pushed, and loaded from the Hub by others."""

import os
import signal
import subprocess
import sys
from pathlib import Path

from fake_hub import FakeHub
from hub_client import write_reference
from training_data import as_messages, make_checkpoint, write_records, write_videos
from training_runs import SGD, assert_same_run, history

import train
from modeling_videonsa import VideoNSAForConditionalGeneration
from processing_videonsa import VideoNSAProcessor

TESTS = Path(__file__).parent
# The process kills itself, so that it is not a matter of time how far it came.
KILL_AFTER_STEP_4 = """
import os, signal, sys
import train
from training.trainer import VideoNSATrainer

save = VideoNSATrainer._save_checkpoint

def save_and_die(self, *args):
    save(self, *args)
    if self.state.global_step == 4:
        os.kill(os.getpid(), signal.SIGKILL)

VideoNSATrainer._save_checkpoint = save_and_die
train.main(sys.argv[1:])
"""


def test_a_killed_run_goes_on_and_is_pushed(tmp_path):
    records = [as_messages(record) for record in write_videos(tmp_path / "videos", [8, 12, 9, 8, 16, 8])]
    write_records(tmp_path / "my.jsonl", records)
    checkpoint = make_checkpoint(tmp_path)
    command = [str(TESTS.parent / "configs" / "tiny.yaml"), "--model", str(checkpoint)]
    command += ["--train_data", str(tmp_path / "my.jsonl"), "--video_folder", str(tmp_path / "videos")]
    command += ["--max_steps", "8", "--save_steps", "2", "--dataloader_num_workers", "1"]
    command += SGD
    in_a_shell = [sys.executable, str(TESTS.parent / "train.py"), *command, "--output_dir", str(tmp_path / "tuned")]

    with FakeHub() as hub:
        environment = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
        environment |= hub.environment(tmp_path / "cache") | {"OMP_NUM_THREADS": "1"}
        killed = [sys.executable, "-c", KILL_AFTER_STEP_4, *in_a_shell[2:]]
        result = subprocess.run(killed, env=environment, cwd=TESTS.parent, capture_output=True, text=True, timeout=900)
        assert result.returncode == -signal.SIGKILL, f"{result.stdout}\n{result.stderr}"
        assert (tmp_path / "tuned" / "checkpoint-4" / "complete").exists()
        assert not (tmp_path / "tuned" / "model.safetensors").exists()

        push = ["--push_to_hub", "true", "--hub_model_id", "org/Tuned"]
        result = subprocess.run([*in_a_shell, *push], env=environment, capture_output=True, text=True, timeout=900)
        assert result.returncode == 0, f"{result.stdout}\n{result.stderr}"
        train.main([*command, "--output_dir", str(tmp_path / "whole")])
        assert len(history(tmp_path / "tuned")) == 8
        assert_same_run(checkpoint, tmp_path / "whole", tmp_path / "tuned")

        files = set(hub.files("org/Tuned"))
        assert {"README.md", "model.safetensors", "tokenizer.json", "nsa_kernels/attention.py"} <= files
        assert any(name.startswith("runs/") for name in files)
        assert not [name for name in files if name.startswith(("_", "checkpoint-"))]

        model = VideoNSAForConditionalGeneration.from_pretrained(tmp_path / "tuned")
        processor = VideoNSAProcessor.from_pretrained(tmp_path / "tuned", trust_remote_code=True)
        write_reference(model, processor, tmp_path / "reference.safetensors")
        environment |= {"VIDEONSA_REFERENCE": str(tmp_path / "reference.safetensors"), "PYTHONPATH": str(TESTS)}
        load = [sys.executable, "-c", "from hub_client import *; check('org/Tuned')"]
        result = subprocess.run(load, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=900)
        assert result.returncode == 0, f"{result.stdout}\n{result.stderr}"
