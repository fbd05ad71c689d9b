"""Tasks end to end: the paper's benchmarks on stand-in data, the local one from the command line, and the report."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import av
import numpy as np
import pytest
from eval_testing import (
    TASKS,
    answers,
    evaluate,
    folder_of_benchmark,
    make_model,
    make_task_manager,
    read_logged,
    save_checkpoint,
)
from lmms_eval.api.task import ConfigurableMessagesTask
from lmms_eval.tasks import TaskManager
from lmms_eval.utils import load_yaml_config

from budget_videonsa import VideoSource
from synthetic.scenes import KINDS
from videonsa_eval import report, run_preset
from videonsa_eval.draw_benchmark import draw_benchmark

# Documents with the fields of the published data sets that lmms-eval's tasks read, and the right answers to them; where
# the task expects its video, relative to $HF_HOME.
LVB_OPTIONS = {f"option{i}": option for i, option in enumerate(["a cat", "a dog", "a cow", "N/A", "N/A"])}
STAND_INS = {
    "longvideobench_val_v": {
        "video": "datasets/longvideobench/videos/a.mp4",
        "docs": [
            {"id": f"a_{i}", "video_id": "a", "video_path": "a.mp4", "question": "What runs?", "correct_choice": i}
            | {"duration": 16.0, "duration_group": 15, "question_category": "S2E", "subtitle_path": "a.json"}
            | LVB_OPTIONS
            for i in (1, 2)
        ],
        "answers": ["B", "C"],
        "prompt": "What runs?\nA. a cat\nB. a dog\nC. a cow\nAnswer with the option's letter",
    },
    "mlvu_dev": {
        "video": "mlvu/a.mp4",
        "docs": [
            {"video_name": "a.mp4", "duration": 16.0, "question": "What is it?\n(A) one\n(B) two", "answer": answer}
            | {"task_type": task}
            for task, answer in (("needle", "A"), ("count", "B"))
        ],
        "answers": ["A", "B"],
        "prompt": "(B) two\nOnly give the best option.\nBest option: (",
    },
    "mlvu_test": {
        "video": "mlvu_test/a.mp4",
        "docs": [
            {"video_name": "a.mp4", "duration": 16.0, "question": "What is it?\n(A) one\n(B) two", "answer": answer}
            | {"task_type": task}
            for task, answer in (("needleQA", "A"), ("sportsQA", "B"))
        ],
        "answers": ["A", "B"],
        "prompt": "What is it?\n(A) one\n(B) two",
    },
    "timescope": {
        "video": "timescope/videos/a.mp4",
        "docs": [
            {"id": i, "video": "videos/a.mp4", "length": 60 * i, "type": "OCR", "answer": "C"}
            | {"input": "Which word?\nA. one\nB. two\nC. three", "question": "Which word?"}
            for i in (1, 2)
        ],
        "answers": ["C", "C"],
        "prompt": "Which word?\nA. one\nB. two\nC. three",
    },
    "longtimescope": {
        "video": "longtimescope/videos/a.mp4",
        "docs": [
            {"id": i, "video": "videos/a.mp4", "length": 36000 * i, "type": "temporal", "answer": "A"}
            | {"input": "Which word?\nA. one\nB. two", "question": "Which word?"}
            for i in (1, 2)
        ],
        "answers": ["A", "A"],
        "prompt": "Which word?\nA. one\nB. two",
    },
    "tomato": {
        "video": "TOMATO/videos/human/a.mp4",
        "docs": [
            {"id": str(i), "question": "Which way?", "options": ["left", "right"], "answer": i}
            | {"video_path": "videos/human/a.mp4", "reason_type": "direction", "demonstration_type": "human"}
            for i in (0, 1)
        ],
        "answers": ["A", "B"],
        "prompt": "{'A': 'left', 'B': 'right'}",
    },
    "vsibench": {
        "video": "vsibench/scannet/a.mp4",
        "docs": [
            {"id": i, "dataset": "scannet", "scene_name": "a", "question_type": kind, "question": f"{kind}?"}
            | {"options": options, "ground_truth": answer, "pruned": False}
            for i, (kind, options, answer) in enumerate(
                [
                    *(
                        (kind, ["A. left", "B. right"], "B")
                        for kind in (
                            "object_rel_direction_easy",
                            "object_rel_direction_medium",
                            "object_rel_direction_hard",
                            "object_rel_distance",
                            "route_planning",
                            "obj_appearance_order",
                        )
                    ),
                    *(
                        (kind, None, "4")
                        for kind in (
                            "object_abs_distance",
                            "object_counting",
                            "object_size_estimation",
                            "room_size_estimation",
                        )
                    ),
                ]
            )
        ],
        "answers": ["B"] * 6 + ["4"] * 4,
        "prompt": "These are frames of a video.\nobject_rel_direction_easy?\nOptions:\nA. left\nB. right\nAnswer with",
    },
    "videomme": {
        "video": "videomme/data/a.mp4",
        "docs": [
            {"video_id": "001", "duration": "short", "domain": "Knowledge", "sub_category": "Astronomy", "url": ""}
            | {"videoID": "a", "question_id": f"001-{i}", "task_type": "OCR Problems", "question": "Which word?"}
            | {"options": ["A. one", "B. two", "C. three", "D. four"], "answer": "D"}
            for i in (1, 2)
        ],
        "answers": ["D", "D"],
        "prompt": "Which word?\nA. one\nB. two\nC. three\nD. four\n\nAnswer with the option's letter",
    },
}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return save_checkpoint(tmp_path_factory.mktemp("checkpoint"))


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    with folder_of_benchmark(tmp_path_factory.mktemp("drawn")) as folder:
        yield folder


@pytest.fixture(scope="module")
def task_manager(drawn):
    return make_task_manager()


def stand_in(task: str, task_manager: TaskManager, folder) -> ConfigurableMessagesTask:
    """lmms-eval's task as it is, but for where its documents and videos come from."""
    if task.startswith("longvideobench"):
        pytest.importorskip("decord", reason="lmms-eval's LongVideoBench task imports decord")
    data = STAND_INS[task]
    video = folder / data["video"]
    video.parent.mkdir(parents=True, exist_ok=True)
    shutil.copy(folder / "eval/data/videos/00016_0000.mp4", video)
    documents = folder / f"{task}.jsonl"
    documents.write_text("".join(json.dumps(doc) + "\n" for doc in data["docs"]))
    config = task_manager._get_config(task)
    config |= {"dataset_path": "json", "dataset_name": None}
    config["dataset_kwargs"] = {"data_files": {config["test_split"]: str(documents)}}
    return ConfigurableMessagesTask(config=config, model_name="videonsa")


@pytest.mark.parametrize("task", STAND_INS)
def test_the_papers_tasks(task, task_manager, checkpoint, drawn, monkeypatch):
    """lmms-eval's own prompts, answers' post-processing and scores, around our model."""
    assert task_manager.match_tasks([task]) == [task]
    data = STAND_INS[task]
    config = stand_in(task, task_manager, drawn)
    model = make_model(checkpoint)
    prompts, generate = [], model.inference.generate

    def answer_rightly(inputs, settings, cache=None):
        """What the model says is noise: put the right answers in its mouth, after it spoke."""
        results = generate(inputs, settings, cache)
        tokens = inputs["input_ids"][0]
        text = model.inference.own_processor.tokenizer.decode(tokens[tokens != model.model.config.video_token_id])
        assert len(results) == 1 and int((tokens == model.model.config.video_token_id).sum()) == 32
        prompts.append(text)
        results[0].text = data["answers"][len(prompts) - 1]
        return results

    monkeypatch.setattr(model.inference, "generate", answer_rightly)
    results = evaluate(model, [config], task_manager, gen_kwargs="max_new_tokens=4")
    preset = {run_preset.read_preset(name)["tasks"]: run_preset.read_preset(name) for name in run_preset.preset_names()}
    metric = preset[task.replace("_dev", "_test")]
    # MLVU's score is a mean over all its kinds of question, of which there are two here.
    full = {"mlvu_dev": 2 / 7, "mlvu_test": 2 / 9}.get(task, 1)
    score = results["results"][task][f"{metric['metric']},none"]
    assert score == pytest.approx(full * (100 if metric["in_percent"] else 1))
    scores = [report._sample(sample, metric["metric"]).score for sample in results["samples"][task]]
    assert scores == [1] * len(data["docs"])
    assert data["prompt"] in prompts[0] and "<|vision_start|><|vision_end|>" in prompts[0]

    # The model's own words: scored, and lower.
    results = evaluate(make_model(checkpoint), [config], task_manager, gen_kwargs="max_new_tokens=4")
    assert results["results"][task][f"{metric['metric']},none"] < score
    assert all(len(text) > 0 for [text], _ in answers(results).values())


def test_a_missing_video_is_not_scored(task_manager, checkpoint, drawn):
    """TOMATO's task logs it and would ask the question without the video."""
    task = stand_in("tomato", task_manager, drawn)
    (drawn / STAND_INS["tomato"]["video"]).unlink()
    with pytest.raises(RuntimeError, match="tomato, document 0: the prompt has neither image nor video"):
        evaluate(make_model(checkpoint), [task], task_manager)


@pytest.mark.parametrize("name", run_preset.preset_names())
def test_presets(name, task_manager, checkpoint):
    preset = run_preset.read_preset(name)
    assert task_manager.match_tasks([preset["tasks"]]) == [preset["tasks"]]
    model = make_model(checkpoint, **preset["model_args"])
    assert (model.model.config.block_counts, model.model.config.window_size) == (32, 256)
    # Of an hour the most frames are taken, and their tokens fit in the default budget.
    hour = VideoSource(num_frames=30 * 3600, fps=30.0, height=1080, width=1920)
    plan = model.inference.own_processor.plan_video(hour, **model.inference.video_options)
    assert plan.num_frames == preset["model_args"]["max_num_frames"] and not plan.notes
    assert plan.tokens == pytest.approx(plan.num_frames / 2 * preset["model_args"]["tokens_per_frame"], rel=0.15)


def test_command_line_of_a_preset():
    command = run_preset.command_line("tomato", "org/name", Path("out"), "fps=2,nsa_mode=dense", ["--limit", "8"])
    assert "--tasks=tomato" in command and "--output_path=out" in command and command[-2:] == ["--limit", "8"]
    (arguments,) = [part for part in command if part.startswith("--model_args=")]
    assert arguments == (
        "--model_args=pretrained=org/name,fps=2,max_num_frames=128,tokens_per_frame=256,block_counts=32,"
        "window_size=256,nsa_mode=dense"
    )
    with pytest.raises(ValueError, match=r"`preset` must be one of .*, got 'tomatoe'"):
        run_preset.read_preset("tomatoe")


@pytest.mark.parametrize("writes", [True, False])
def test_a_preset_without_results_is_an_error(tmp_path, monkeypatch, writes):
    """lmms_eval prints most errors and returns. What an earlier run left counts for nothing."""
    output = tmp_path / "results"

    def write():
        output.mkdir(exist_ok=True)
        (output / f"{len(list(output.iterdir()))}_results.json").write_text("{}")

    write()
    monkeypatch.setattr(sys, "argv", ["run_preset.py", "mlvu", "org/name", "--output_path", str(output), "--limit=8"])
    monkeypatch.setattr(run_preset, "cli_evaluate", write if writes else lambda: None)
    if writes:
        run_preset.main()
        assert f"--output_path={output}" in sys.argv and "--limit=8" in sys.argv
    else:
        with pytest.raises(SystemExit, match="wrote no results") as stopped:
            run_preset.main()
        assert stopped.value.code


def test_two_processes_from_the_command_line(checkpoint, drawn, task_manager, tmp_path):
    """`accelerate launch` with two processes gives the answers of one; the report reads what they write."""
    local = ["synthetic_needle", "synthetic_order", "synthetic_later"]
    command = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes=2"]
    command += ["--main_process_port=0", "-m", "lmms_eval", "--model=videonsa", "--batch_size=2", "--limit=3"]
    command += [f"--model_args=pretrained={checkpoint},fps=1,tokens_per_frame=4", f"--include_path={TASKS}"]
    command += [f"--tasks={','.join(local)}", "--log_samples", f"--output_path={tmp_path / 'results'}"]
    environment = os.environ | {"ACCELERATE_USE_CPU": "true", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    run = subprocess.run(command, env=environment, cwd=drawn, capture_output=True, text=True, timeout=900)
    assert run.returncode == 0, run.stdout + run.stderr
    assert "Running on rank 1" in run.stdout

    expected = evaluate(make_model(checkpoint), local, task_manager, limit=3)
    assert read_logged(tmp_path / "results") == answers(expected)
    written = report.write_report([tmp_path / "results"], tmp_path / "report")
    assert [path.name for path in written] == ["report.md", "context.png"]
    lines = written[0].read_text().splitlines()
    (head,) = [line.strip("| ").split(" | ") for line in lines if line.startswith("| task")]
    rows = [line.split(" | ") for line in lines if line.startswith("| synthetic")]
    assert [row[0].strip("| ") for row in rows] == sorted(local)
    for row in rows:
        task = row[0].strip("| ")
        assert float(row[head.index("score")]) == pytest.approx(
            100 * expected["results"][task]["accuracy,none"], abs=0.05
        )
        counts = [tokens[0] for (name, _), (_, tokens) in answers(expected).items() if name == task]
        tokens = float(row[head.index("vision tokens")])
        assert tokens == pytest.approx(sum(c["vision_tokens"] for c in counts) / len(counts), abs=0.5)


def write_results(folder, name: str, model_args: str, scores: list[float], tokens: list[int], **attention) -> None:
    """Files as lmms_eval writes them for the local benchmark's task `synthetic_needle`."""
    attention = {"nsa_mode": "sparse", "block_size": 64, "block_counts": 32, "window_size": 256} | attention
    folder = folder / name / "model"
    folder.mkdir(parents=True)
    metrics = {"synthetic_needle": {"metric_list": [{"metric": "accuracy"}]}}
    value = {"synthetic_needle": {"alias": "synthetic_needle", "accuracy,none": sum(scores) / len(scores)}}
    results = {"config": {"model_args": model_args}, "configs": metrics, "results": value}
    (folder / "20261121_results.json").write_text(json.dumps(results))
    share = 1.0 if attention["nsa_mode"] == "dense" else 0.25
    lines = [
        {"doc_id": i, "accuracy": score, "parsed_answer": "x", "filtered_resps": ["x"]}
        | {"token_counts": [{"vision_tokens": count, "attention_share": share, "attention": attention}]}
        for i, (score, count) in enumerate(zip(scores, tokens, strict=True))
    ]
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (folder / "20261121_samples_synthetic_needle.jsonl").write_text(text)


def test_report_of_many_runs(tmp_path):
    tokens = [100, 100, 1000, 1000]
    for frames, per_frame, score in ((64, 4, 1.0), (16, 16, 0.0), (32, 16, 1.0)):
        args = f"pretrained=a,max_num_frames={frames},tokens_per_frame={per_frame}"
        write_results(tmp_path, f"frames_{frames}_{per_frame}", args, [score] * 4, tokens)
    for block_counts, window_size in ((32, 256), (28, 512)):
        args = f"pretrained=a,block_counts={block_counts},window_size={window_size}"
        attention = {"block_counts": block_counts, "window_size": window_size}
        write_results(tmp_path, f"blocks_{block_counts}", args, [1.0, 1.0, 0.0, 1.0], tokens, **attention)
    write_results(tmp_path, "dense", "pretrained=a,nsa_mode=dense", [0.0, 1.0, 0.0, 0.0], tokens, nsa_mode="dense")
    runs = report.read_runs([tmp_path])
    assert len(runs) == 6
    sparse = next(run for run in runs if run.setting("block_counts") == 28)
    assert report.by_context(sparse.samples) == [(100, 100, 0, 0.25), (1000, 50, 50, 0.25)]
    dense = next(run for run in runs if run.setting("nsa_mode") == "dense")
    assert {(a.setting("block_counts"), b is dense) for a, b in report.pairs_sparse_dense(runs)} == {
        (32, True),
        (28, True),
    }
    names = dict(zip(map(id, runs), report.labels(runs), strict=True))
    assert names[id(dense)] == "nsa_mode=dense" and names[id(sparse)] == "block_counts=28, window_size=512"
    assert report.table(runs).count("| 75.0 |") == 2 and report.table(runs).count("| 25.0 |") == 1

    written = report.write_report([tmp_path], tmp_path / "report")
    assert [path.stem for path in written] == ["report", "context", "frames", "attention", "sparse_dense"]
    figure = report.plot_attention(runs)
    (axis,) = [axis for axis in figure.axes if axis.get_xlabel() == "window_size"]
    assert sorted(axis.collections[0].get_offsets().tolist()) == [[256, 32], [512, 28]]
    assert any("2,304 keys" in text.get_text() for text in axis.texts)  # the same budget, by the paper's measure
    figure = report.plot_frames(runs)
    assert {text.get_text() for axis in figure.axes for text in axis.texts} >= {"128 video tokens", "256 video tokens"}
    figure = report.plot_context(runs)
    assert [label.get_text() for label in figure.axes[0].get_xticklabels()] == ["100\n25.0%", "1,000\n25.0%"]


def test_published_scores_in_the_table(tmp_path):
    metric = {"mlvu_test": {"metric_list": [{"metric": "mlvu_percetion_score"}]}}
    values = {"mlvu_test": {"mlvu_percetion_score,none": 51.25}}
    results = {"config": {"model_args": "pretrained=a"}, "configs": metric, "results": values}
    (tmp_path / "x_results.json").write_text(json.dumps(results))
    (row,) = [line for line in report.table(report.read_runs([tmp_path])).splitlines() if "mlvu_test" in line]
    assert "| 51.2 | 51.2 | 51.8 | 51.8 |" in row


@pytest.mark.parametrize("value", [0.5125, 51.25])
def test_scores_of_tasks_without_a_preset(tmp_path, value):
    """lmms-eval's tasks report shares or percent, and say nowhere which."""
    task, metric = "videomme_w_subtitle", "videomme_perception_score"
    results = {"config": {"model_args": "pretrained=a"}, "results": {task: {f"{metric},none": value}}}
    results["configs"] = {task: {"metric_list": [{"metric": metric}]}}
    (tmp_path / "x_results.json").write_text(json.dumps(results))
    sample = {"doc": {"score": 7, "answer": "A"}, metric: {"pred_answer": "A", "answer": "A"}, "token_counts": None}
    (tmp_path / f"x_samples_{task}.jsonl").write_text(json.dumps(sample))
    (run,) = report.read_runs([tmp_path])
    assert run.score == pytest.approx(51.25) and run.samples[0].score == 1


def test_plots_of_runs_without_samples_and_of_steep_budgets(tmp_path):
    for window_size in (32, 65536):  # between two steps, the line of equal budget falls from above the plot to below
        args = f"pretrained=a,window_size={window_size}"
        write_results(tmp_path, f"window_{window_size}", args, [1.0], [100], window_size=window_size)
    figure = report.plot_attention(report.read_runs([tmp_path]))
    assert figure.axes[0].collections[0].get_offsets().tolist() == [[32, 32], [65536, 32]]
    for samples in tmp_path.rglob("*.jsonl"):
        samples.unlink()
    assert [path.name for path in report.write_report([tmp_path], tmp_path / "report")] == ["report.md"]


def test_plots_of_runs_whose_attention_is_not_counted(tmp_path):
    write_results(tmp_path, "released", "pretrained=a", [1.0, 0.0], [100, 1000])
    (file,) = tmp_path.rglob("*.jsonl")
    file.write_text(file.read_text().replace('"attention_share": 0.25', '"attention_share": null'))
    runs = report.read_runs([tmp_path])
    assert report.by_context(runs[0].samples) == [(100, 100, 0, None), (1000, 0, 0, None)]
    figure = report.plot_context(runs)
    assert [label.get_text() for label in figure.axes[0].get_xticklabels()] == ["100\n-", "1,000\n-"]


def test_dense_runs_have_frames_too(tmp_path):
    for frames in (16, 32):
        args = f"pretrained=a,nsa_mode=dense,max_num_frames={frames},tokens_per_frame=4"
        write_results(tmp_path, f"frames_{frames}", args, [1.0], [100], nsa_mode="dense")
    runs = report.read_runs([tmp_path])
    assert report.plot_frames(runs).axes[0].get_xlabel() == "frames" and report.plot_attention(runs) is None


def test_no_results(tmp_path):
    with pytest.raises(ValueError, match=r"no \*_results\.json in"):
        report.read_runs([tmp_path])
    (tmp_path / "x_results.json").write_text('{"results": {}}')
    with pytest.raises(ValueError, match=r"x_results\.json is not a result file"):
        report.read_runs([tmp_path])


def pictures(path: Path) -> np.ndarray:
    with av.open(str(path)) as container:
        return np.stack([frame.to_ndarray(format="rgb24").astype(int) for frame in container.decode(video=0)])


def test_drawn_benchmark(drawn):
    """The seed decides it, and more lengths leave the videos that were there as they were."""
    data = drawn / "eval" / "data"
    lines = [json.loads(line) for line in (data / "all.jsonl").read_text().splitlines()]
    assert len({line["id"] for line in lines}) == len(lines)
    for kind in KINDS:
        of_kind = [json.loads(line) for line in (data / f"{kind}.jsonl").read_text().splitlines()]
        assert of_kind == [line for line in lines if line["kind"] == kind]
    assert [line["seconds"] for line in lines if line["kind"] == "needle"] == [16, 32, 16, 32]
    assert draw_benchmark(drawn / "more", lengths=(32, 16, 48), videos=2, fps=2) == 6 * len(KINDS)
    more = {line["id"]: line for line in map(json.loads, (drawn / "more" / "all.jsonl").read_text().splitlines())}
    assert all(more[line["id"]] == line for line in lines)
    for video in (data / "videos").iterdir():
        # Pictures, not bytes: now and then x264 encodes equal pictures a little differently.
        first, second = (pictures(path) for path in (video, drawn / "more" / "videos" / video.name))
        assert np.abs(first - second).mean() < 1


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"videos": 0}, "`videos`"),
        ({"lengths": ()}, "`lengths`"),
        ({"lengths": (15,)}, "`lengths`"),
        ({"lengths": (16, 16)}, "`lengths`"),
        ({"seed": -1}, "`seed`"),
        ({"size": 57}, "`size`"),
    ],
)
def test_a_benchmark_that_cannot_be_drawn(tmp_path, options, name):
    with pytest.raises(ValueError, match=name):
        draw_benchmark(tmp_path / "data", **options)
    assert not list(tmp_path.iterdir())


def test_drawing_does_not_replace_other_folders(tmp_path):
    (tmp_path / "diary.txt").write_text("dear diary")
    with pytest.raises(ValueError, match="`overwrite`"):
        draw_benchmark(tmp_path)
    with pytest.raises(ValueError, match="is not a benchmark folder"):
        draw_benchmark(tmp_path, overwrite=True)
    assert (tmp_path / "diary.txt").read_text() == "dear diary"


@pytest.mark.parametrize(
    ("response", "answer"),
    [
        ("left", "left"),
        ("Left.", "left"),
        ("The ball moves to the right", "right"),
        ("first up, then left", "up"),
        ("upwards", ""),
        ("", ""),
    ],
)
def test_parsed_answers(response, answer):
    assert parse(response, ["left", "right", "up", "down"]) == answer


def test_parsed_numbers():
    choices = [str(number) for number in range(10)]
    assert parse("There are three stars", choices) == "3"
    assert parse("12", choices) == ""


def parse(response, choices):
    process_results = load_yaml_config(str(TASKS / "synthetic_needle.yaml"))["process_results"]
    return process_results.__globals__["parse_answer"](response, choices)


def test_local_tasks_cover_every_kind_of_question():
    names = {path.stem.removeprefix("synthetic_") for path in TASKS.glob("synthetic_*.yaml")}
    assert names == {*KINDS, "likelihood", "videos"}
