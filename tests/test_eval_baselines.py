"""The paper's other rows in lmms-eval: methods as arguments, presets of rows, and the main table of the report."""

import json
import sys

import pytest
import torch
from eval_testing import (
    TASKS,
    about,
    answers,
    evaluate,
    folder_of_benchmark,
    make_model,
    make_task_manager,
    request,
    save_checkpoint,
)
from test_eval_tasks import STAND_INS, stand_in
from tiny_random import save_tiny_qwen2_5_vl

import baselines
from videonsa_eval import report, run_preset
from videonsa_eval.lmms_videonsa import VideoNSA
from videonsa_eval.prompts import to_messages

SMALL = {
    "tri_shape": {"block_size": 8, "sink": 2, "window": 9, "last": 3},
    "minference": {"block_size": 8, "last_queries": 6},
    "flexprefill": {"block_size": 8, "min_budget": 8, "gamma": 0.5},
    "xattention": {"block_size": 8, "stride": 4, "threshold": 0.5},
    "fastv": {"layer": 1, "ratio": 0.5},
    "visionzip": {"dominant": 0.5, "contextual": 0.25},
    "vscan": {"keep": 0.5, "layer": 1},
}
TASK_OF = {name: run_preset.read_preset(name)["tasks"] for name in run_preset.BENCHMARKS}


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


@pytest.mark.parametrize("method", SMALL)
def test_answers_do_not_depend_on_batches(checkpoint, drawn, task_manager, method):
    """With the share of the pairs that each prompt took, which is what it takes alone."""
    tasks, found = ["synthetic_needle", "synthetic_order"], []
    for batch_size in (1, 3):
        model = make_model(checkpoint, method=method, batch_size=batch_size, **SMALL[method])
        assert model.model.config.nsa_mode == "dense"
        found.append(answers(evaluate(model, tasks, task_manager)))
    assert found[0] == found[1]
    for _, [counts] in found[0].values():
        assert counts["attention"] == {"nsa_mode": "dense", "method": method, **SMALL[method]}
        assert 0 < counts["attention_share"] <= 1
        # MInference's fallback takes all of short prompts.
        assert (counts["attention_share"] < 1) == (method != "minference")


@pytest.mark.parametrize("method", ["xattention", "fastv", "visionzip"])
def test_choices_are_judged_after_the_whole_prompt(checkpoint, drawn, method):
    """The loss of a continuation is that of steps after the prompt, which the method read without it."""
    model = make_model(checkpoint, method=method, **SMALL[method])
    video = next((drawn / "eval" / "data" / "videos").glob("*.mp4"))
    prompt = model.inference.prepare([to_messages(about(video, "Which way does the ball move?"))])
    [result] = model.inference.loss(dict(prompt), [[5, 6, 7]])
    share = result.token_counts.attention_share
    baselines.reset_pairs(model.model)
    with torch.no_grad():
        step = model.model(**prompt, use_cache=True)
        assert baselines.pairs(model.model).fraction == share < 0.95
        loss = 0.0
        for token in (5, 6, 7):
            loss -= float(step.logits[0, -1].log_softmax(-1)[token])
            step = model.model(input_ids=torch.tensor([[token]]), past_key_values=step.past_key_values)
    assert result.text[0] == pytest.approx(loss, abs=1e-4)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"method": "xatention"}, "`method` must be one of .*, got 'xatention'"),
        ({"method": "xattention", "treshold": 0.5}, "`treshold` = 0.5 is no option of xattention"),
        ({"threshold": 0.5}, "`threshold` = 0.5 is not an argument of --model videonsa"),
        ({"method": "xattention", "nsa_mode": "sparse"}, "`method` = 'xattention' runs in the place of dense"),
        ({"method": "xattention", "attn_implementation": "eager"}, "`attn_implementation` = 'eager' contradicts"),
        ({"method": "xattention", "kv_budget": 0.5}, "`kv_budget` = 0.5: with `method` = 'xattention'"),
    ],
)
def test_wrong_arguments(checkpoint, arguments, message):
    with pytest.raises(ValueError, match=message):
        VideoNSA(pretrained=checkpoint, **arguments)


def test_qwen_as_it_is(drawn, tmp_path):
    """Methods need no gates."""
    save_tiny_qwen2_5_vl(tmp_path)
    model = make_model(tmp_path, method="xattention", **SMALL["xattention"])
    video = next((drawn / "eval" / "data" / "videos").glob("*.mp4"))
    [result] = model.generate_until([request(model, about(video, "What?"), max_new_tokens=3)])
    assert 0 < result.token_counts.attention_share < 0.9


# ---- The main table ----


def model_arguments(command: list[str]) -> str:
    (arguments,) = [part for part in command if part.startswith("--model_args=")]
    return arguments.removeprefix("--model_args=")


CELLS = [
    # One benchmark a row in `make test`, another one each; the others are slow for their number alone.
    pytest.param(row, benchmark, marks=[] if number % len(run_preset.BENCHMARKS) == place else pytest.mark.slow)
    for number, row in enumerate(run_preset.row_names())
    for place, benchmark in enumerate(run_preset.BENCHMARKS)
]


@pytest.mark.parametrize(("row", "benchmark"), CELLS)
def test_every_row_runs_every_benchmark(row, benchmark, checkpoint, drawn, task_manager):
    """lmms-eval's own tasks with documents that stand in for theirs, and the row's arguments but for shorter videos."""
    small = "fps=1,tokens_per_frame=4,max_num_frames=16"
    small += ",layer=1" if row == "fastv" else ""  # the model has two
    command = run_preset.command_line(benchmark, str(checkpoint), drawn, small, row=row)
    assert f"--tasks={TASK_OF[benchmark]}" in command
    model = VideoNSA.create_from_arg_string(model_arguments(command), {"batch_size": 1, "device": None})
    arguments = run_preset.read_row(row)["model_args"]
    assert model.model.config.nsa_mode == arguments["nsa_mode"]
    assert (model.inference.method or {}).get("method") == arguments.get("method")
    task = stand_in(TASK_OF[benchmark], task_manager, drawn)
    results = evaluate(model, [task], task_manager, gen_kwargs="max_new_tokens=2")
    metric = run_preset.read_preset(benchmark)["metric"]
    assert f"{metric},none" in results["results"][TASK_OF[benchmark]]
    assert len(answers(results)) == len(STAND_INS[TASK_OF[benchmark]]["docs"])


def test_settings_of_single_benchmarks():
    v1, v2 = (
        {name: model_arguments(run_preset.command_line(name, "m", "out", row=row)) for name in run_preset.BENCHMARKS}
        for row in ("videonsa_v1", "videonsa_v2")
    )
    assert "block_counts=40,window_size=1024" in v2["timescope"] and "tokens_per_frame=512" in v2["tomato"]
    assert "block_counts=32,window_size=256" in v1["timescope"] and "tokens_per_frame=256" in v1["tomato"]
    same = ("longvideobench", "mlvu", "longtimescope", "vsibench")
    assert all(v1[name].replace("v1", "v2") == v2[name] for name in same)
    with pytest.raises(ValueError, match=r"`row` must be one of .*xattention.*, got 'xatention'"):
        run_preset.command_line("mlvu", "m", "out", row="xatention")


def test_the_published_table():
    """A few cells, and the order of the paper's rows."""
    published = run_preset.read_preset("timescope")["published"]
    assert published["XAttention"] == 83.1 and published["VideoNSA v2"] == 83.7 and "AWQ" not in published
    assert run_preset.read_preset("videomme")["published"] == {}
    assert all(
        set(run_preset.read_row(row)["published"]) <= set(run_preset.BENCHMARKS) for row in run_preset.row_names()
    )


def write_run(folder, row, preset, score, task=None):
    run = folder / row / preset
    run.mkdir(parents=True)
    metric, task = run_preset.read_preset(preset)["metric"], task or TASK_OF[preset]
    score = score if run_preset.read_preset(preset)["in_percent"] else score / 100
    results = {"config": {"model_args": f"pretrained=a,row={row},preset={preset}"}}
    results |= {"configs": {task: {"metric_list": [{"metric": metric}]}}, "results": {task: {f"{metric},none": score}}}
    (run / "x_results.json").write_text(json.dumps(results))
    sample = {metric: 1.0, "token_counts": [{"vision_tokens": 8, "attention_share": 0.25, "attention": {}}]}
    (run / f"x_samples_{task}.jsonl").write_text(json.dumps(sample) + "\n")


def test_measured_beside_published(tmp_path):
    write_run(tmp_path, "xattention", "timescope", 83.25)
    write_run(tmp_path, "xattention", "tomato", 50.0, task="synthetic_needle")
    write_run(tmp_path, "videonsa_v2", "longvideobench", 61.0)
    lines = report.main_table(report.read_runs([tmp_path])).splitlines()
    (found,) = [line for line in lines if line.startswith("| XAttention ")]
    assert found == "| XAttention | - / 59.1 | - / 50.2 | 83.2 / 83.1 | - / 41.1 | [50.0] / 21.4 | - / 36.6 | 25.0% |"
    (ours,) = [line for line in lines if line.startswith("| VideoNSA v2 ")]
    assert ours.startswith("| VideoNSA v2 | 61.0 / 60.0 | - / 51.8 |")
    (awq,) = [line for line in lines if line.startswith("| AWQ ")]
    assert awq.startswith("| AWQ | - / 59.0 | - / 46.0 | - / - |") and awq.endswith("| - |")
    names = [line.split(" | ")[0] for line in lines if line.startswith("| ")]
    assert names.index("| Qwen2.5-VL-7B") < names.index("| XAttention") < names.index("| VideoNSA v1")
    report.write_report([tmp_path], tmp_path / "report")
    assert found in (tmp_path / "report" / "report.md").read_text()


def test_runs_of_no_row_make_no_table(tmp_path):
    write_run(tmp_path, "xattention", "timescope", 83.25)
    (file,) = tmp_path.rglob("*_results.json")
    file.write_text(file.read_text().replace(",row=xattention,preset=timescope", ""))
    assert report.main_table(report.read_runs([tmp_path])) is None


@pytest.mark.slow
def test_one_command_a_row(checkpoint, drawn, tmp_path, monkeypatch):
    """As a user runs it, on drawn videos in the place of the benchmarks, and the report of it."""
    options = [
        "--row",
        "xattention",
        "--output_path",
        str(tmp_path / "results"),
        "--tasks=synthetic_needle",
        "--limit=1",
    ]
    small = ["--model_args", "fps=1,tokens_per_frame=4,block_size=8,stride=4", f"--include_path={TASKS}"]
    monkeypatch.setattr(sys, "argv", ["run_preset.py", "all", str(checkpoint), *options, *small])
    run_preset.main()
    runs = report.read_runs([tmp_path / "results"])
    assert sorted(run.arguments["preset"] for run in runs) == sorted(run_preset.BENCHMARKS)
    (line,) = [line for line in report.main_table(runs).splitlines() if line.startswith("| XAttention ")]
    assert line.count("[") == 6 and not line.endswith("| - |")
