"""`train.py` from its arguments to the result: equal losses and weights whatever the way, resuming, LoRA, bad data."""

import gc
import json
import shutil
from functools import partial
from pathlib import Path

import pytest
import torch
import yaml
from conftest import build_released
from safetensors.torch import load_file, save_file
from training_data import as_messages, make_checkpoint, write_records
from training_runs import (
    GRADIENT_ROUNDING,
    SGD,
    assert_same_run,
    assert_same_to_the_bit,
    history,
    make_arguments,
    make_data,
    weights,
)

import train
from modeling_videonsa import VideoNSAForConditionalGeneration
from training.arguments import parse_arguments
from training.parts import PARTS, parameter_groups, part_of
from training.trainer import VideoNSATrainer, last_whole_checkpoint

ROOT = Path(__file__).parent.parent
TEXT_FILES = ("tokenizer.json", "tokenizer_config.json", "processor_config.json", "chat_template.jinja")


@pytest.fixture(scope="module", autouse=True)
def little_garbage():
    """Every run collects garbage, which takes as long as the run itself where all of transformers is looked through."""
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("checkpoint"))


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> list[str]:
    return make_data(tmp_path_factory.mktemp("data"))


@pytest.fixture
def run(checkpoint, data, tmp_path):
    """Runs `train.py` into a new folder; returns that."""

    def run(name: str, *extra: str, data=data, model=checkpoint, steps: int = 3) -> Path:
        train.main([*make_arguments(model, data, tmp_path / name, steps), *extra])
        return tmp_path / name

    return run


@pytest.fixture
def assert_same(checkpoint):
    return partial(assert_same_run, checkpoint)


def test_the_loss_falls_and_the_result_is_a_checkpoint(run, checkpoint):
    output = run(
        "out", "--per_device_train_batch_size", "4", "--report_to", "tensorboard", "--nsa_backend", "torch", steps=12
    )
    losses = history(output)
    assert len(losses) == 12 and sum(losses[-3:]) < 0.7 * sum(losses[:3])
    trained = VideoNSAForConditionalGeneration.from_pretrained(output)
    before, after = weights(checkpoint), weights(output)
    assert before.keys() == after.keys()
    for part in PARTS:
        assert any(not torch.equal(before[name], after[name]) for name in before if part_of(name) == part), part
    source = VideoNSAForConditionalGeneration.from_pretrained(checkpoint)
    assert trained.config.to_diff_dict() | {"_name_or_path": ""} == source.config.to_diff_dict() | {"_name_or_path": ""}
    assert json.loads((output / "tokenizer_config.json").read_text())["padding_side"] == "left"
    processor = json.loads((output / "processor_config.json").read_text())
    assert (processor["fps"], processor["max_pixels_per_frame"], processor["min_pixels_per_frame"]) == (4, 50176, 3136)
    code = {path.relative_to(checkpoint) for path in checkpoint.rglob("*.py")}
    assert code == {path.relative_to(output) for path in output.rglob("*.py") if "checkpoint" not in str(path.parent)}

    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    (events,) = (output / "runs").iterdir()
    events = EventAccumulator(str(events)).Reload()
    tags = set(events.Tags()["scalars"])
    expected = {"loss", "grad_norm", "learning_rate", "tokens_per_second", "memory_gib", "undecodable_samples"}
    expected |= {f"gates/{branch}/layer_{i:02}" for branch in ("compression", "selection", "window") for i in range(2)}
    assert {f"train/{name}" for name in expected} <= tags
    assert [event.value for event in events.Scalars("train/loss")] == pytest.approx(losses)


def test_padded_packed_and_accumulated_steps_are_the_same(run, assert_same):
    """Every step sees all eight samples, in other batches."""
    rows = run("rows", "--per_device_train_batch_size", "8", *SGD)
    single = run("single", "--gradient_accumulation_steps", "8", *SGD)
    packs = run("packs", "--packing", "true", "--gradient_accumulation_steps", "3", *SGD)
    assert len((packs / "_data" / "train.jsonl").read_text().splitlines()) == 8
    assert_same(rows, single)
    assert_same(rows, packs)


def test_gradient_checkpointing_changes_nothing(run):
    rows = ["--per_device_train_batch_size", "2"]
    assert_same_to_the_bit(run("off", *rows), run("on", "--gradient_checkpointing", "true", *rows))


@pytest.mark.parametrize("lora", [[], ["--lora_rank", "2", "--lora_dropout", "0.1"]], ids=["full", "lora"])
def test_a_run_that_ends_early_goes_on_as_if_it_had_not(lora, run, monkeypatch, tmp_path):
    # Four steps an epoch: the run ends in the second.
    arguments = ["--gradient_accumulation_steps", "2", "--save_steps", "2", *lora]
    whole = run("whole", *arguments, steps=8)

    step, calls = VideoNSATrainer.training_step, []

    def step_until_the_eighth(*args):
        calls.append(1)
        if len(calls) == 15:
            raise KeyboardInterrupt
        return step(*args)

    monkeypatch.setattr(VideoNSATrainer, "training_step", step_until_the_eighth)
    with pytest.raises(KeyboardInterrupt):
        run("ended", *arguments, steps=8)
    monkeypatch.undo()
    assert Path(last_whole_checkpoint(tmp_path / "ended")).name == "checkpoint-6"
    # As if it had been killed while it wrote its last checkpoint.
    (tmp_path / "ended" / "checkpoint-6" / "complete").unlink()
    (tmp_path / "ended" / "checkpoint-6" / "of-the-killed-run").touch()
    with pytest.raises(ValueError, match="holds checkpoints: go on with --resume_from_checkpoint auto"):
        run("ended", *arguments, steps=8)

    ended = run("ended", *arguments, "--resume_from_checkpoint", "auto", steps=8)
    assert not (ended / "checkpoint-6" / "of-the-killed-run").exists()
    assert (ended / "_unfinished-checkpoint-6" / "of-the-killed-run").exists()
    assert_same_to_the_bit(whole, ended)
    assert history(whole, "epoch") == history(ended, "epoch")


def test_a_finished_run_takes_no_step_more(run):
    arguments = ["--save_steps", "2", "--lr_scheduler_type", "constant", "--resume_from_checkpoint", "auto"]
    first = weights(run("out", *arguments, steps=2))
    second = weights(run("out", *arguments, steps=2))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_resuming_needs_the_checkpoints_weights(run, tmp_path, checkpoint):
    """A checkpoint under the tensor names of the Hub is resumed, one that fits in part is not."""
    old = shutil.copytree(checkpoint, tmp_path / "old")
    names = [("model.language_model.", "model."), ("model.visual.", "visual.")]
    tensors = weights(checkpoint)
    for new, published in names:
        tensors = {name.replace(new, published): tensor for name, tensor in tensors.items()}
    save_file(tensors, old / "model.safetensors", metadata={"format": "pt"})
    whole = run("whole", "--save_steps", "2", model=old, steps=4)
    shutil.copytree(whole, tmp_path / "again")
    shutil.rmtree(tmp_path / "again" / "checkpoint-4")
    shutil.copytree(tmp_path / "again", tmp_path / "partly")
    again = run("again", "--save_steps", "2", "--resume_from_checkpoint", "auto", model=old, steps=4)
    assert_same_to_the_bit(whole, again)

    path = tmp_path / "partly" / "checkpoint-2" / "model.safetensors"
    save_file(dict(list(load_file(path).items())[1:]), path, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"has not the weights of this model: lm_head.weight missing, none unexpected"):
        run("partly", "--save_steps", "2", "--resume_from_checkpoint", "auto", model=old, steps=4)


def test_dense_sft_trains_qwens_attention(run, assert_same, checkpoint):
    dense = ["--attention", "dense", *SGD]
    output = run("rows", *dense, "--per_device_train_batch_size", "8")
    packs = run("packs", *dense, "--packing", "true", "--gradient_accumulation_steps", "3")
    assert VideoNSAForConditionalGeneration.from_pretrained(output).config.nsa_mode == "dense"
    before, after = weights(checkpoint), weights(output)
    changed = {part_of(name) for name in before if not torch.equal(before[name], after[name])}
    assert changed == {"vision", "merger", "language"}
    assert_same(output, packs)


def test_the_released_variant_is_fine_tuned(run, checkpoint, tmp_path):
    """Losses fall, and are those of another order of the same sums."""
    released = tmp_path / "released"
    build_released(torch.float32).save_pretrained(released, save_original_format=False)  # as `train.py` saves
    for file in TEXT_FILES:
        shutil.copy(checkpoint / file, released)
    rows = run("rows", "--per_device_train_batch_size", "8", *SGD, model=released)
    assert history(rows)[-1] < history(rows)[0]
    assert_same_run(released, rows, run("single", "--gradient_accumulation_steps", "8", *SGD, model=released))
    with pytest.raises(ValueError, match="`packing` = True needs a checkpoint with nsa_variant='paper'"):
        run("packs", "--packing", "true", model=released)


def test_lora_is_merged_into_a_checkpoint(run, checkpoint):
    output = run("lora", "--lora_rank", "2", "--per_device_train_batch_size", "4")
    before, after = weights(checkpoint), weights(output)
    assert before.keys() == after.keys()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert {part_of(name) for name in changed} == {"language", "gates"}
    assert {name.split(".")[-2] for name in changed if part_of(name) == "language"} == {
        f"{name}_proj" for name in ("q", "k", "v", "o", "gate", "up", "down")
    }
    from peft import PeftModel

    base = VideoNSAForConditionalGeneration.from_pretrained(checkpoint)
    adapted = PeftModel.from_pretrained(base, output / "adapter").eval()
    merged = VideoNSAForConditionalGeneration.from_pretrained(output).eval()
    tokens = torch.arange(40)[None]
    with torch.no_grad():
        expected, logits = adapted(input_ids=tokens).logits, merged(input_ids=tokens).logits
        assert (logits - expected).norm() <= GRADIENT_ROUNDING * expected.norm()


def test_results_keep_the_dtype_of_the_checkpoint(run, checkpoint, tmp_path):
    """bf16: computed in bfloat16, kept in float32 while training, saved as the checkpoint came."""
    VideoNSAForConditionalGeneration.from_pretrained(checkpoint, dtype=torch.bfloat16).save_pretrained(
        tmp_path / "half"
    )
    for file in TEXT_FILES:
        shutil.copy(checkpoint / file, tmp_path / "half")
    for name, lora in (("full", "0"), ("lora", "2")):
        output = run(
            name,
            "--bf16",
            "true",
            "--use_cpu",
            "true",
            "--lora_rank",
            lora,
            "--save_steps",
            "3",
            model=tmp_path / "half",
        )
        assert {tensor.dtype for tensor in weights(output).values()} == {torch.bfloat16}
        assert json.loads((output / "config.json").read_text())["dtype"] == "bfloat16"
        file = "adapter_model.safetensors" if lora == "2" else "model.safetensors"
        assert {tensor.dtype for tensor in load_file(output / "checkpoint-3" / file).values()} == {torch.float32}


def test_frozen_parts_stay(run, checkpoint):
    output = run("frozen", "--freeze", "vision", "language")
    before, after = weights(checkpoint), weights(output)
    changed = {part_of(name) for name in before if not torch.equal(before[name], after[name])}
    assert changed == {"merger", "gates"}


def test_parts_have_their_own_learning_rates(checkpoint):
    model = VideoNSAForConditionalGeneration.from_pretrained(checkpoint)
    rates = {"vision": 1.0, "merger": 2.0, "gates": 3.0, "language": 4.0}
    decayed = {name for name, _ in model.named_parameters() if name.endswith("proj.weight")}
    groups = parameter_groups(model, decayed, weight_decay=0.1, learning_rates=rates)
    by_parameter = {id(parameter): group for group in groups for parameter in group["params"]}
    named = dict(model.named_parameters())
    assert len(by_parameter) == len(named)
    for name, rate, decay in [
        ("model.visual.blocks.0.attn.proj.weight", 1.0, 0.1),
        ("model.visual.merger.mlp.0.weight", 2.0, 0.0),
        ("model.language_model.layers.1.self_attn.g_proj_2.bias", 3.0, 0.0),
        ("model.language_model.layers.0.self_attn.q_proj.weight", 4.0, 0.1),
        ("lm_head.weight", 4.0, 0.0),
    ]:
        group = by_parameter[id(named[name])]
        assert (group["lr"], group["weight_decay"], group["part"]) == (rate, decay, part_of(name)), name


def test_evaluation_counts_every_sample_once(run, data, tmp_path):
    records = json.loads(Path(data[1]).read_text())
    path = write_records(tmp_path / "eval.jsonl", [as_messages(record) for record in records[:5]])
    arguments = ["--eval_data", str(path), "--eval_strategy", "steps", "--eval_steps", "3", "--eval_on_start", "true"]
    runs = [run(f"by-{n}", "--per_device_eval_batch_size", str(n), *arguments) for n in (1, 3)]
    first, last = history(runs[0], "eval_loss")
    assert last < first
    assert history(runs[1], "eval_loss") == pytest.approx([first, last], rel=1e-5)
    assert all(0 <= share <= 1 for share in history(runs[0], "eval_answer_accuracy"))


# ---- Bad data during training ----


@pytest.fixture
def fading(data, tmp_path, monkeypatch):
    """Arguments for data of which two videos go away once the manifest is made."""
    folder = tmp_path / "fading"
    shutil.copytree(data[3], folder)
    prepare = train.prepare_data

    def prepare_and_lose(*args, **kwargs):
        result = prepare(*args, **kwargs)
        for number in (1, 4):
            (folder / f"{number:05}.mp4").unlink(missing_ok=True)
        return result

    monkeypatch.setattr(train, "prepare_data", prepare_and_lose)
    return [*data[:3], str(folder)]


def test_undecodable_samples_do_not_end_a_run(run, fading, caplog):
    output = run("out", "--max_bad_share", "0.3", "--save_steps", "4", data=fading, steps=16)
    assert history(output, "undecodable_samples")[-1] == 2  # in two epochs
    assert sum("there is no such video file" in message for message in caplog.messages) == 2

    # A resumed run remembers them.
    shutil.rmtree(output / "checkpoint-16")
    caplog.clear()
    run("out", "--max_bad_share", "0.3", "--save_steps", "4", "--resume_from_checkpoint", "auto", data=fading, steps=16)
    assert history(output, "undecodable_samples")[-1] == 2
    assert not any("there is no such video file" in message for message in caplog.messages)


def test_too_many_undecodable_samples_end_it(run, fading):
    with pytest.raises(
        RuntimeError, match=r"2 samples could not be decoded .* of 8 records .*max_bad_share=0\.2\..*scene-"
    ):
        run("out", "--max_bad_share", "0.2", data=fading, steps=8)


# ---- Arguments ----


@pytest.mark.parametrize("preset", sorted((ROOT / "configs").glob("*_7b.yaml")), ids=lambda path: path.stem)
def test_presets_are_arguments(preset, data, tmp_path):
    here = ["--use_cpu", "true", "--sequence_parallel_size", "1"]
    arguments = parse_arguments([str(preset), "--model", "m", *data, "--output_dir", str(tmp_path), *here])
    if preset.stem == "paper_7b":
        assert (arguments.learning_rate, arguments.get_warmup_steps(1000)) == (1e-6, 100)
        assert (arguments.adam_beta1, arguments.adam_beta2, arguments.weight_decay) == (0.9, 0.999, 0.01)
        # Of 8 GPUs, `sequence_parallel_size` share each sample. (Above, one does, for want of others.)
        shared = yaml.safe_load(preset.read_text())["sequence_parallel_size"]
        assert 8 // shared * arguments.per_device_train_batch_size * arguments.gradient_accumulation_steps == 32
        options = arguments.data_options()
        assert (options.fps, options.min_frames, options.max_frames, options.max_tokens) == (4, 350, 550, 36 * 1024)


def test_later_arguments_win(data, tmp_path):
    (tmp_path / "a.yaml").write_text("learning_rate: 1e-6\nfps: 3\nfreeze: [vision]\n")
    (tmp_path / "b.yaml").write_text("fps: 5\n")
    rest = ["--model", "m", *data, "--output_dir", str(tmp_path), "--max-tokens", "77"]
    arguments = parse_arguments([str(tmp_path / "a.yaml"), str(tmp_path / "b.yaml"), *rest])
    found = arguments.learning_rate, arguments.fps, arguments.freeze, arguments.max_tokens
    assert found == (1e-6, 5, ["vision"], 77)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--attention", "linear"], "`attention` must be 'sparse' or 'dense', got 'linear'"),
        (["--freeze", "head"], "`freeze` takes merger, vision, gates, language, got 'head'"),
        (["--packing", "true", "--per_device_train_batch_size", "2"], "`packing` fills one row"),
        (["--save_total_limit", "1"], "`save_total_limit` must be at least 2"),
        (["--eval_strategy", "steps"], "needs `eval_data` or `eval_share`"),
        (["--eval_share", "0.1", "--eval_data", "a.json"], "exclude each other"),
        (["--sequence_parallel_size", "2"], "`sequence_parallel_size` must divide the number of processes"),
        (["--hub_token", "secret"], "`hub_token` would be saved"),
        (["--fps", "0"], "`fps` must be positive, got 0"),
        (["--train_data", "nothing.json"], "nothing.json: there is no such file of records"),
        (["--resume_from_checkpoint", "nowhere"], "`resume_from_checkpoint` must be 'auto' or the folder of a whole"),
        (["--lora_rank", "2", "--freeze", "vision"], "`lora_rank` freezes all but"),
        (["--freeze", *PARTS], "leaves nothing to train"),
    ],
    ids=lambda value: value[0].removeprefix("--") if isinstance(value, list) else "",
)
def test_wrong_arguments_are_named(arguments, message, run, tmp_path):
    with pytest.raises(ValueError, match=message):
        run("out", *arguments)
    assert not list(tmp_path.glob("out/*.safetensors"))


@pytest.mark.parametrize("name", ["model", "train_data", "output_dir"])
def test_needed_arguments_are_named(name, tmp_path):
    given = {"model": "m", "train_data": "a.json", "output_dir": str(tmp_path)}
    del given[name]
    with pytest.raises(ValueError, match=f"`{name}` is needed"):
        parse_arguments([part for key, value in given.items() for part in (f"--{key}", value)])


def test_misspelt_presets_are_named(tmp_path):
    (tmp_path / "a.yaml").write_text("learning_rat: 1e-6\n")
    with pytest.raises(ValueError, match="unknown argument `learning_rat`; did you mean `learning_rate`"):
        parse_arguments([str(tmp_path / "a.yaml")])
    with pytest.raises(ValueError, match=r"b\.yaml: there is no such file"):
        parse_arguments([str(tmp_path / "b.yaml")])


def test_a_checkpoint_must_be_converted_first(run, checkpoint):
    with pytest.raises(ValueError, match=r"is a qwen2_5_vl checkpoint: convert it with convert_weights\.py"):
        run("out", model=checkpoint.parent / "qwen")


def test_the_start_and_the_code_are_not_overwritten(checkpoint, data):
    for output, name in ((f"{checkpoint}/../VideoNSA", "`model`"), (str(ROOT), r"the folder of train\.py")):
        with pytest.raises(ValueError, match=f"is {name}, where files would be overwritten"):
            train.main(["--model", str(checkpoint), *data, "--output_dir", output])
