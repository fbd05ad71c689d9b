"""What the tests of the lmms-eval plugin share: a checkpoint, a drawn benchmark, and tasks as Python objects."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from conftest import ROOT, build_model
from lmms_eval import evaluator
from lmms_eval.api.instance import Instance
from lmms_eval.tasks import TaskManager
from tiny_random import save_tiny_qwen2_5_vl

from processing_videonsa import VideoNSAProcessor
from videonsa_eval.draw_benchmark import draw_benchmark
from videonsa_eval.lmms_videonsa import VideoNSA, VideoNSASimple

TASKS = ROOT / "eval" / "tasks"


def save_checkpoint(folder: Path, build=build_model) -> Path:
    """Random weights with gates that differ, blocks of 4 tokens of which 2 are selected, windows of 5."""
    save_tiny_qwen2_5_vl(folder)
    VideoNSAProcessor.from_pretrained(folder, trust_remote_code=False).save_pretrained(folder)
    build(dtype=torch.float32).save_pretrained(folder)
    return folder


def draw(folder: Path) -> Path:
    """A folder to start lmms-eval in: two videos of 16 and two of 32 seconds."""
    draw_benchmark(folder / "eval" / "data", lengths=(16, 32), videos=2, fps=2)
    return folder


@contextmanager
def folder_of_benchmark(folder: Path) -> Iterator[Path]:
    """Inside, `folder` is what lmms-eval runs in, and $HF_HOME; with what `draw` draws."""
    with pytest.MonkeyPatch.context() as patch:
        draw(folder)
        patch.chdir(folder)
        patch.setenv("HF_HOME", str(folder))
        patch.setenv("LMMS_EVAL_DATASETS_CACHE", str(folder / "cache"))
        yield folder


def make_task_manager() -> TaskManager:
    """Knows all of lmms-eval's tasks, and the local ones."""
    return TaskManager("ERROR", include_path=str(TASKS), model_name="videonsa")


def make_model(checkpoint: Path, *, simple: bool = False, **arguments) -> VideoNSA:
    """The model as lmms-eval makes it, with 4 tokens for 2 frames, one frame a second."""
    arguments = {"pretrained": checkpoint, "tokens_per_frame": 4, "fps": 1} | arguments
    batch_size = arguments.pop("batch_size", 1)
    text = ",".join(f"{name}={value}" for name, value in arguments.items())
    model_class = VideoNSASimple if simple else VideoNSA
    return model_class.create_from_arg_string(text, {"batch_size": batch_size, "device": None})


def evaluate(model: VideoNSA, tasks: list, task_manager: TaskManager, **options) -> dict:
    """lmms-eval's results, with samples."""
    options = {"bootstrap_iters": 0, "verbosity": "ERROR"} | options
    return evaluator.simple_evaluate(model=model, tasks=list(tasks), task_manager=task_manager, **options)


def answers(results: dict) -> dict:
    """Answer and token counts by task and document."""
    return {
        (task, sample["doc_id"]): (sample["filtered_resps"], sample["token_counts"])
        for task, samples in results["samples"].items()
        for sample in samples
    }


def request(model: VideoNSA, raw_messages, doc_id: int = 0, **gen_kwargs) -> Instance:
    """One request of a task "made_up", whose document says nothing."""
    model.task_dict.setdefault("made_up", {"test": {}})["test"][doc_id] = {}
    gen_kwargs = {"max_new_tokens": 6, "temperature": 0, "do_sample": False, "until": ["\n\n"]} | gen_kwargs
    arguments = ("", lambda doc: raw_messages, gen_kwargs, doc_id, "made_up", "test")
    return Instance("generate_until", arguments, 0, {"task": "made_up", "doc_id": doc_id, "repeats": 1})


def about(video: str | Path, question: str) -> list[dict]:
    """Messages in the form of lmms-eval's tasks."""
    parts = [{"type": "video", "url": str(video)}, {"type": "text", "text": question}]
    return [{"role": "user", "content": parts}]


def read_logged(folder: Path) -> dict:
    """As `answers`, from the files that lmms_eval wrote, which have no lists of one answer."""
    found = {}
    for file in folder.rglob("*_samples_*.jsonl"):
        for line in map(json.loads, file.read_text().splitlines()):
            found[file.stem.split("_samples_")[1], line["doc_id"]] = ([line["filtered_resps"]], line["token_counts"])
    return found
