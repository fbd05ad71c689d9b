"""The analyses of accuracy and cost: scoring by hand-made answers, changes of a model, splits, counts, the commands."""

import importlib
import json
import math
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, build_model
from tiny_random import save_tiny_qwen2_5_vl
from transformers import Qwen2_5_VLForConditionalGeneration

import baselines
from analysis import ablations, accuracy, allocation, context, figure, gates, latency
from analysis.changes import mean_gates, method, runs_method, settings, static_gates, without_branches
from analysis.observe import BRANCHES
from analysis.questions import Question, load, prepare
from attention_budget_videonsa import attention_budget, paper_fraction
from benchmarks.published_sizes import PUBLISHED
from nsa_kernels import reference, utils
from videonsa_eval.draw_benchmark import draw_benchmark

TINY = ROOT / "checkpoints" / "tiny"
VIDEO, PAD = 7, 0
LAYOUT = [5, ("video", 4, 4, 6), 4]


def ask(kind: str, answer: str | None, video: str = "a", seconds: float | None = None) -> Question:
    return Question(kind, ({"role": "user", "content": f"{kind} {video}"},), video, answer, ("red", "blue"), seconds)


class FakeProcessor:
    """Prompt number n is n + 1 tokens of video between two of text, padded on the left."""

    def __init__(self, answers: dict[str, list[str]]):
        self.answers, self.prepared = answers, 0
        self.tokenizer = SimpleNamespace(pad_token_id=PAD, padding_side="right", batch_decode=self.decode)

    def apply_chat_template(self, conversations, **options):
        self.prepared += 1
        numbers = [self.numbers[conversation[0]["content"]] for conversation in conversations]
        length = max(numbers) + 3
        rows = [[PAD] * (length - n - 3) + [100 + n] + [VIDEO] * (n + 1) + [99] for n in numbers]
        ids = torch.tensor(rows)
        return {"input_ids": ids, "attention_mask": (ids != PAD).long()}

    def decode(self, rows, skip_special_tokens):
        return [self.answers[self.row_of(int(code))][int(number)] for code, number in rows]

    def row_of(self, code: int) -> str:
        return list(self.answers)[code]


class FakeModel:
    """Says which row is asked by the setting `row`."""

    device = torch.device("cpu")

    def __init__(self):
        nsa = {"nsa_mode": "sparse", "nsa_variant": "paper", "block_size": 2, "block_counts": 2, "window_size": 3}
        self.config = SimpleNamespace(image_token_id=8, video_token_id=VIDEO, row=0, _attn_implementation="sdpa", **nsa)
        self.config.get_text_config = lambda: self.config

    def generate(self, input_ids, attention_mask, max_new_tokens, do_sample, **options):
        assert not do_sample
        numbers = input_ids.masked_fill(input_ids < 100, 100).amax(1) - 100
        answers = torch.stack([torch.full_like(numbers, self.config.row), numbers], 1)
        return torch.cat([input_ids, answers], 1)


def fake_setting(questions: list[Question], answers: dict[str, list[str]], batch_size: int = 2) -> figure.Setting:
    processor = FakeProcessor(answers)
    processor.numbers = {question.messages[0]["content"]: number for number, question in enumerate(questions)}
    return figure.Setting(FakeModel(), processor, questions, {}, batch_size)


QUESTIONS = [
    ask("colour", "red", "a"),
    ask("colour", "blue", "b"),
    ask("colour", "red", "c"),
    ask("other", "blue", "a"),
]
ANSWERS = {"first": ["Red.", "red, not blue", "It is red", "blue"], "second": ["blue", "blue", "purple", ""]}


def test_scores_are_those_of_the_answers():
    setting = fake_setting(QUESTIONS, ANSWERS)
    rows = {"first": nullcontext, "second": partial(settings, row=1, block_counts=1, window_size=1)}
    scored = accuracy.score(setting, rows, max_new_tokens=2)
    assert setting.processor.prepared == 3  # two batches of the first kind, one of the second, for both rows
    first, second = scored["rows"]["first"], scored["rows"]["second"]
    assert first["scores"] == [1, 0, 1, 1] and second["scores"] == [0, 1, 0, 0]
    assert scored["questions"] == {
        "kinds": ["colour", "colour", "colour", "other"],
        "videos": ["a", "b", "c", "a"],
        "seconds": [None] * 4,
    }
    low, high = figure.wilson(2, 3)
    assert first["kinds"] == {
        "colour": {"right": 2, "total": 3, "share": 0.666667, "low": round(low, 6), "high": round(high, 6)},
        "other": {"right": 1, "total": 1, "share": 1.0, "low": round(figure.wilson(1, 1)[0], 6), "high": 1.0},
    }
    # Kinds weigh the same, whatever their number; 2 kinds of 3 and 1 questions vary as 4 / (1/3 + 1) = 3 questions.
    low, high = figure.wilson(3 * 5 / 6, 3)
    mean = {"right": 3, "total": 4, "share": 0.833333, "low": round(low, 6), "high": round(high, 6)}
    assert first["mean"] == mean
    assert second["mean"]["share"] == round(1 / 6, 6)
    assert accuracy.difference(scored, "first", "second") == figure.paired_difference(
        [1, 0, 1, 1], [0, 1, 0, 0], ["a", "b", "c", "a"]
    )


def test_equally_many_questions_of_each_kind_give_the_interval_of_all():
    questions = [ask(kind, "red", str(number)) for kind in ("one", "two") for number in range(5)]
    mean = accuracy.shares(questions, [1, 1, 0, 1, 0, 0, 1, 1, 1, 1])["mean"]
    assert (mean["low"], mean["high"]) == tuple(round(value, 6) for value in figure.wilson(7, 10))


def test_tokens_and_shares_are_counted_without_padding_by_the_rows_settings():
    setting = fake_setting(QUESTIONS, ANSWERS, batch_size=3)
    changed = {"block_size": 2, "block_counts": 1, "window_size": 1}
    scored = accuracy.score(setting, {"as it is": nullcontext, "changed": partial(settings, row=1, **changed)})
    prompts = [torch.tensor([0, *[1] * (number + 1), 0]) for number in range(4)]
    assert scored["tokens"] == {"prompt": 4.5, "vision": 2.5}
    for row, sizes in (
        ("as it is", {"block_size": 2, "block_counts": 2, "window_size": 3}),
        ("changed", changed),
    ):
        budgets = [attention_budget(types, **sizes) for types in prompts]
        assert scored["rows"][row]["attention"] == {
            "exact": round(sum(budget.fraction for budget in budgets) / 4, 6),
            "without_compression": round(sum(budget.without_compression for budget in budgets) / 4, 6),
            "formula": round(sum(paper_fraction(len(types), **sizes) for types in prompts) / 4, 6),
        }
    assert accuracy.score(setting, {"dense": partial(settings, nsa_mode="dense")})["rows"]["dense"]["attention"] == {
        "exact": 1.0
    }
    released = accuracy.score(setting, {"released": partial(settings, nsa_variant="released")})
    assert released["rows"]["released"]["attention"] == {}


def test_scoring_refuses_before_it_reads():
    unanswered = fake_setting([*QUESTIONS, ask("other", None, "d")], ANSWERS)
    with pytest.raises(ValueError, match="`answer` of a question about d is missing"):
        accuracy.score(unanswered)
    setting = fake_setting(QUESTIONS, ANSWERS)
    with pytest.raises(ValueError, match="`max_new_tokens` must be positive, got 0"):
        accuracy.score(setting, max_new_tokens=0)
    with pytest.raises(ValueError, match="`rows`"):
        accuracy.score(setting, {})
    assert unanswered.processor.prepared == setting.processor.prepared == 0


GATES = [
    {"compression": 0.25, "selection": 0.5, "window": 0.875},
    {"compression": 0.0, "selection": 1.0, "window": 0.1},
]
CHANGES = {
    "settings": partial(settings, block_counts=1, window_size=2),
    "dense": partial(settings, nsa_mode="dense"),
    "without two branches": partial(without_branches, branches=("selection", "window")),
    "static gates": partial(static_gates, values=GATES),
    "sparse prefill": partial(method, name="tri_shape", block_size=16, sink=2, window=4, last=4),
    "token reduction": partial(method, name="fastv", layer=1),
}


@torch.no_grad()
def logits_of(model, inputs) -> torch.Tensor:
    return model(**inputs).logits


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("name", CHANGES)
def test_changes_are_undone_after_the_block_and_after_an_exception(prompts, name, implementation):
    model, inputs = build_model(attn_implementation=implementation), prompts.one(LAYOUT)
    before = logits_of(model, inputs)
    with CHANGES[name](model):
        assert not torch.equal(logits_of(model, inputs), before)
    assert torch.equal(logits_of(model, inputs), before)
    with pytest.raises(RuntimeError, match="inside"), CHANGES[name](model):
        logits_of(model, inputs)
        raise RuntimeError("inside")
    assert torch.equal(logits_of(model, inputs), before)
    assert model.config.text_config._attn_implementation == implementation and not runs_method(model)


def test_settings_that_a_configuration_refuses_leave_none_behind(model):
    with pytest.raises(ValueError, match="`window_size` must be a positive integer, got 0"):
        settings(model, block_counts=7, window_size=0).__enter__()
    assert (model.config.block_counts, model.config.window_size) == (2, 5)
    with pytest.raises(ValueError, match="`blocks` = 3 is no setting of VideoNSAConfig"):
        settings(model, blocks=3).__enter__()


def test_refusals_of_changes(model):
    for change, message in (
        (
            partial(without_branches, branches=("dense",)),
            "`branches` must be of compression, selection, window, got 'd",
        ),
        (partial(static_gates, values=GATES[:1]), "`values` must be of 2 layers, got 1"),
        (partial(static_gates, values=[GATES[0], {**GATES[1], "window": 1.5}]), "`values` of layer 1 must be in"),
        (partial(static_gates, values=[GATES[0], {"window": 0.5}]), "`values` of layer 1 must be in"),
        (partial(method, name="xattn"), "`method` must be one of"),
        (partial(method, name="xattention", treshold=1), "treshold"),
    ):
        with pytest.raises(ValueError, match=message):
            change(model).__enter__()
        assert model.config.nsa_mode == "sparse" and not runs_method(model)
    running = pytest.raises(ValueError, match="`name` = 'xattention': the model runs with a method")
    with method(model, "fastv", layer=1), running:
        method(model, "xattention").__enter__()


class Spy:
    """In the place of the layers' `nsa_attention`: notes the gates, and can replace them."""

    def __init__(self, monkeypatch, model, replace=lambda gates: gates):
        module = importlib.import_module(type(model.model.language_model.layers[0].self_attn).__module__)
        self.attend, self.replace, self.seen = module.nsa_attention, replace, []
        monkeypatch.setattr(module, "nsa_attention", self)

    def __call__(self, q, k, v, *rest, **options):
        gates = self.replace(torch.stack(rest[:3], -1))
        self.seen.append(gates)
        return self.attend(q, k, v, *gates.unbind(-1), *rest[3:], **options)


@pytest.mark.parametrize("row", ["compression", "window", "compression + selection", "selection + window", "none"])
def test_rows_of_branches_are_the_attention_with_gates_of_zero(model, prompts, row, monkeypatch):
    inputs = prompts.one(LAYOUT)
    with ablations.rows_of(GATES)[row](model):
        found = logits_of(model, inputs)
    kept = torch.tensor([branch in row.split(" + ") for branch in BRANCHES], dtype=torch.float64)
    Spy(monkeypatch, model, lambda gates: gates * kept)
    assert torch.equal(found, logits_of(model, inputs))
    assert ablations.rows_of(GATES).keys() >= {
        "selection",
        "compression + window",
        "static gates",
        "dense",
        "as trained",
    }


def test_static_gates_are_constant(model, prompts, monkeypatch):
    spy = Spy(monkeypatch, model)
    with static_gates(model, GATES):
        logits_of(model, prompts.one(LAYOUT))
    for gates_of_layer, values in zip(spy.seen, GATES, strict=True):
        expected = torch.tensor([values[branch] for branch in BRANCHES]).double()
        assert gates_of_layer.shape[:2] == (24, 4)
        # A logit of float64, three roundings of it, and a sigmoid whose slope is at most a quarter.
        bound = torch.finfo(torch.float64).eps * (1 + expected.logit().nan_to_num(posinf=0, neginf=0).abs())
        assert ((gates_of_layer - expected).abs() <= bound).all()


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    """Two videos, of 16 and 17 seconds, and two questions about each."""
    folder = tmp_path_factory.mktemp("drawn") / "questions"
    draw_benchmark(folder, lengths=(16, 17), videos=1, fps=2)
    lines = [json.loads(line) for line in (folder / "all.jsonl").read_text().splitlines()]
    kept = [line for line in lines if line["kind"] in ("needle", "order")]
    (folder / "all.jsonl").write_text("".join(json.dumps(line) + "\n" for line in kept))
    return folder


@pytest.fixture(scope="module")
def setting(source) -> figure.Setting:
    model, processor = figure.load_model(TINY, "float32")
    return figure.Setting(model, processor, load(source), {}, batch_size=2)


def test_static_gates_are_the_means_of_the_learned_ones(setting, monkeypatch):
    values = mean_gates(gates.run(setting)["all"])
    spy = Spy(monkeypatch, setting.model)
    with torch.no_grad():
        for question in setting.questions:
            setting.model(**prepare(setting.processor, [question]))
    for index, layer in enumerate(values):
        learned = torch.cat([gates_of.double().flatten(0, 1) for gates_of in spy.seen[index::4]]).mean(0)
        # `gates.run` rounds to four digits; gates are float32.
        assert [layer[branch] for branch in BRANCHES] == pytest.approx(learned.tolist(), abs=0.5e-4 + 1e-6)


def test_answers_in_batches_and_alone_and_a_methods_pairs(setting):
    """The small checkpoint knows these answers."""
    options = {"block_size": 16, "sink": 4, "window": 16, "last": 8}
    rows = {"as trained": nullcontext, "tri_shape": partial(method, name="tri_shape", **options)}
    together = accuracy.score(setting, rows, max_new_tokens=3)
    assert together["rows"]["as trained"]["scores"] == [1, 1, 1, 1]
    assert together["questions"]["seconds"] == [16, 17, 16, 17]
    fractions = []
    with method(setting.model, "tri_shape", **options), torch.no_grad():
        for question in setting.questions:
            baselines.reset_pairs(setting.model)
            setting.model(**prepare(setting.processor, [question]))
            fractions.append(baselines.pairs(setting.model).fraction)
    assert 0 < fractions[0] < 1
    assert together["rows"]["tri_shape"]["attention"] == {"exact": round(sum(fractions) / 4, 6)}
    one = figure.Setting(setting.model, setting.processor, setting.questions, {}, batch_size=1)
    alone = accuracy.score(one, rows, max_new_tokens=3)
    for row in rows:
        assert alone["rows"][row]["scores"] == together["rows"][row]["scores"]
        assert alone["rows"][row]["attention"] == together["rows"][row]["attention"]


@pytest.mark.parametrize("budget, block_size", [(40, 16), (2304, 64), (2305, 64), (65, 64), (160, 16)])
@pytest.mark.parametrize("most", [2, 5, 10**6])
def test_allocations_are_all_of_the_budget(budget, block_size, most):
    possible = [
        (counts, budget - counts * block_size) for counts in range(1, budget) if budget - counts * block_size >= 1
    ]
    found = allocation.allocations(budget, block_size, most)
    assert all(counts * block_size + window == budget for counts, window in found)
    assert set(found) <= set(possible) and len(found) == min(most, len(possible)) == len(set(found))
    assert found[0] == possible[0] and found[-1] == possible[-1]
    for trained in (1, len(possible), len(possible) // 2 + 1):
        assert set(allocation.allocations(budget, block_size, most, trained)) == {*found, possible[trained - 1]}
    assert allocation.allocations(budget, block_size, most, len(possible) + 1) == found


def test_the_papers_allocations_are_of_the_trained_budget():
    """Table 31; (36, 32), which it has beside them, is of 2336 tokens."""
    assert {(32, 256), (35, 64), (34, 128), (28, 512), (20, 1024)} <= set(allocation.allocations(2304, 64, 10**6))


def test_refusals_of_allocations(setting):
    with pytest.raises(ValueError, match="`budget` = 16: it must be over `block_size` = 16"):
        allocation.allocations(16, 16, 5)
    with pytest.raises(ValueError, match="`splits` must be at least 2, got 1"):
        allocation.allocations(40, 16, 1)
    with settings(setting.model, nsa_mode="dense"), pytest.raises(ValueError, match="`nsa_mode` = 'dense'"):
        allocation.run(setting)


def test_operations_are_those_of_a_loop():
    shape = latency.Shape(6, 2, 8, 3, block_size=4, block_counts=3, window_size=6)
    tokens = 27
    q, k = torch.randn(tokens, 6, 8, dtype=torch.float64), torch.randn(tokens, 2, 8, dtype=torch.float64)
    lengths = utils.SequenceLengths.from_lengths([tokens])
    blocks = reference.select_blocks_ref(q, k, lengths, 4, 3, 8**-0.5)
    counted = dict.fromkeys(latency.PARTS, 0)
    for head in range(6):
        for token in range(tokens):
            complete = sum(1 for block in range(tokens) if 4 * block + 3 <= token)
            chosen = set(blocks[token, head // 3].tolist()) - {-1}
            selected = sum(1 for key in range(token + 1) if key // 4 in chosen)
            window = sum(1 for key in range(token + 1) if key > token - 6)
            counted["block choice"] += 2 * 8 * complete
            for part, keys in (("compression", complete), ("selection", selected), ("window", window)):
                counted[part] += 4 * 8 * keys
                counted["nsa"] += 4 * 8 * keys
            counted["dense"] += 4 * 8 * (token + 1)
    assert latency.operations(shape, tokens) == counted
    with pytest.raises(ValueError, match="`tokens` must be positive, got 0"):
        latency.operations(shape, 0)


def test_the_papers_operations_of_dense_attention():
    """Its 8.40 PFLOP: the 7B's language model on 128,000 tokens, all pairs, as the module's text says."""
    size, tokens = PUBLISHED["7B"], 128_000
    hidden, kv = size["hidden_size"], size["num_key_value_heads"] * 128
    of_layer = 2 * hidden * hidden + 2 * hidden * kv + 3 * hidden * size["intermediate_size"]
    weights = size["num_hidden_layers"] * of_layer + size["vocab_size"] * hidden
    causal = size["num_hidden_layers"] * latency.operations(latency.shape_of("7B"), tokens)["dense"]
    all_pairs = 2 * causal * tokens / (tokens + 1)
    assert (2 * tokens * weights + all_pairs) / 1e15 == pytest.approx(8.40, rel=2e-3)


def test_shapes(tmp_path):
    assert latency.shape_of("7B") == latency.Shape(28, 4, 128, 28, 64, 32, 256)
    assert latency.shape_of(checkpoint=str(TINY)) == latency.Shape(4, 2, 32, 4, 16, 2, 8)
    save_tiny_qwen2_5_vl(tmp_path / "qwen")
    config = Qwen2_5_VLForConditionalGeneration.from_pretrained(tmp_path / "qwen").config.text_config
    heads = config.num_attention_heads, config.num_key_value_heads, config.hidden_size // config.num_attention_heads
    assert latency.shape_of(checkpoint=str(tmp_path / "qwen")) == latency.Shape(
        *heads, config.num_hidden_layers, 64, 32, 256
    )
    with pytest.raises(ValueError, match="`shape` must be one of 3B, 7B, 32B, 72B, got '8B'"):
        latency.shape_of("8B")
    with pytest.raises(ValueError, match="give `shape` or `checkpoint`"):
        latency.shape_of("7B", str(TINY))


def test_calls_compute_what_they_are_named_after():
    shape = latency.Shape(4, 2, 16, 1, block_size=4, block_counts=10, window_size=40)
    calls = latency.calls(shape, 33, torch.float64, torch.device("cpu"))
    dense = calls["dense"]()[0].transpose(0, 1)
    # Ten blocks of four, or a window of forty, are all of 33 tokens: sums of that many values below 10, in float64.
    bound = 33 * 10 * torch.finfo(torch.float64).eps
    for part in ("selection", "window"):
        torch.testing.assert_close(calls[part]()[0], dense, rtol=0, atol=bound)
    assert (calls["compression"]()[0] - dense).abs().max() > 0.1
    assert (calls["block choice"]()[-1, :, 0] == 0).all() and calls["nsa"]().shape == dense.shape


def run_command(name: str, tmp_path: Path, *arguments: str) -> dict:
    """What the command of a module found; what it wrote is the same, and its picture is there."""
    module = importlib.import_module(f"analysis.{name}")
    output, picture = tmp_path / "of" / f"{name}.json", tmp_path / "of" / f"{name}.png"
    given = [*arguments, "--device", "cpu", "--output", str(output), "--plot", str(picture)]
    start = figure.measurement if name == "latency" else figure.command
    record = start(module.run, module.plot, module.__doc__, module.add_arguments, given)
    assert picture.read_bytes().startswith(b"\x89PNG") and picture.stat().st_size > 5000
    assert json.loads(output.read_text()) == record
    return record["results"]


def asked(source: Path, *more: str) -> list[str]:
    given = ["--questions", str(source), "--batch_size", "2", "--dtype", "float32", "--max_new_tokens", "2"]
    return [str(TINY), *given, *more]


def test_ablations_command(source, setting, tmp_path):
    results = run_command("ablations", tmp_path, *asked(source))
    assert len(results["rows"]) == 10
    trained = results["rows"]["as trained"]
    assert trained["scores"] == [1, 1, 1, 1] and trained["difference"]["mean"] == 0
    assert results["rows"]["dense"]["attention"] == {"exact": 1.0}
    for name in ("none", "window", "static gates"):
        row = results["rows"][name]
        assert row["attention"] == trained["attention"]
        assert row["difference"]["mean"] == sum(row["scores"]) / 4 - 1
    assert results["static_gates"] == mean_gates(gates.run(setting)["all"])

    measured = tmp_path / "gates.json"
    figure.write({"results": {"all": [{branch: {"mean": 0.5} for branch in BRANCHES}] * 4}}, measured)
    results = ablations.run(setting, measured, max_new_tokens=1)
    assert results["static_gates"] == [dict.fromkeys(BRANCHES, 0.5)] * 4
    for bad in (tmp_path / "missing.json", source / "all.jsonl"):
        with pytest.raises(ValueError, match=r"is no result of analysis\.gates"):
            ablations.run(setting, bad)


def test_allocation_command(source, setting, tmp_path):
    results = run_command("allocation", tmp_path, *asked(source, "--multiples", "1", "2", "--splits", "3"))
    found = [[(split["block_counts"], split["window_size"]) for split in of["splits"]] for of in results["budgets"]]
    assert found == [[(1, 24), (2, 8)], [(1, 64), (3, 32), (4, 16)]]
    assert [of["budget"] for of in results["budgets"]] == [40, 80]
    assert results["trained"] == {"block_counts": 2, "window_size": 8}
    types = [prepare(setting.processor, [question])["mm_token_type_ids"][0] for question in setting.questions]
    for of_budget in results["budgets"]:
        for split in of_budget["splits"]:
            assert split["alpha"] == split["window_size"] / of_budget["budget"]
            sizes = {"block_size": 16} | {name: split[name] for name in ("block_counts", "window_size")}
            exact = [attention_budget(row, **sizes).fraction for row in types]
            formula = [2 * of_budget["budget"] / (len(row) - 1) for row in types]
            assert split["attention"]["exact"] == pytest.approx(sum(exact) / 4, abs=1e-6)
            assert split["attention"]["formula"] == pytest.approx(sum(formula) / 4, abs=1e-6)
    assert results["budgets"][0]["splits"][1]["scores"] == [1, 1, 1, 1]


def test_context_command(source, tmp_path):
    grid = ["--frames", "8", "32", "--tokens_per_frame", "1", "4", "--max_context", "100", "--dense_checkpoint"]
    results = run_command("context", tmp_path, *asked(source, *grid, str(TINY)))
    cells = {(cell["frames"], cell["tokens_per_frame"]): cell for cell in results["cells"]}
    assert {place: cell["tokens"]["vision"] for place, cell in cells.items()} == {(8, 1): 4, (32, 1): 16, (8, 4): 16}
    for cell in cells.values():
        rows = cell["rows"]
        assert list(rows) == ["sparse", "sparse, run dense", "trained dense"]
        # The same weights, run densely.
        assert rows["sparse, run dense"]["scores"] == rows["trained dense"]["scores"]
        assert rows["trained dense"]["attention"] == {"exact": 1.0}
        for row in rows.values():
            assert list(row["by_seconds"]) == ["16", "17"]
            assert [of["right"] for of in row["by_seconds"].values()] == [sum(row["scores"][n::2]) for n in (0, 1)]


def test_context_takes_rates_and_refuses_what_makes_no_grid(setting):
    results = context.run(setting, tokens_per_frame=[4], fps=[1, 2], max_new_tokens=2)
    assert [(cell["fps"], cell["tokens"]["vision"]) for cell in results["cells"]] == [(1, 32), (2, 66)]
    assert results["cells"][1]["rows"]["sparse"]["scores"] == [1, 1, 1, 1]
    (axes,) = context.plot(results | {"cells": results["cells"][1:]}).axes
    assert [list(line.get_ydata()) for line in axes.containers[0].lines[:1]] == [[1, 1]]  # by length of the video
    assert len(context.plot(results).axes) == 4
    for options, message in (
        ({"frames": [8], "fps": [1]}, "`frames` and `fps` exclude each other"),
        ({"frames": [8, 0]}, r"`frames` must be positive, got \[8, 0\]"),
        ({"tokens_per_frame": []}, "`tokens_per_frame` must be positive"),
        ({"frames": [8], "tokens_per_frame": [4], "max_context": 31}, "`max_context` = 31"),
    ):
        with pytest.raises(ValueError, match=message):
            context.run(setting, **options)


def test_latency_command(tmp_path):
    arguments = ["--tokens", "64", "100", "--checkpoint", str(TINY), "--repeats", "2"]
    results = run_command("latency", tmp_path, *arguments)
    assert [length["tokens"] for length in results["lengths"]] == [64, 100] and results["dtype"] == "float32"
    for length in results["lengths"]:
        counted = latency.operations(latency.shape_of(checkpoint=str(TINY)), length["tokens"])
        for part in latency.PARTS:
            assert length[part]["operations"] == counted[part]
            assert 0 < length[part]["seconds"] < math.inf and length[part]["runs"] == 2
    for options, message in (
        ({"tokens": [64, 0]}, "`tokens` must be positive"),
        ({"repeats": 0}, "`repeats` must be positive, got 0"),
        ({"dtype": "floaty"}, "`dtype` = 'floaty'"),
    ):
        with pytest.raises(ValueError, match=message):
            latency.run(**options)


def test_plots_of_the_papers_shape(tmp_path):
    lengths = [{"tokens": 64} | {part: {"seconds": 1.0, "operations": 1} for part in latency.PARTS}]
    shape = vars(latency.shape_of("7B"))
    drawn = [latency.plot({"shape": shape | more, "lengths": lengths}) for more in ({}, {"num_layers": 27})]
    assert [len(of.axes[0].lines) for of in drawn] == [len(latency.PARTS) + 3, len(latency.PARTS)]


@pytest.mark.parametrize("arguments", [["--batch_size", "0"], ["--max_new_tokens", "0"]])
def test_commands_refuse_in_one_line(source, tmp_path, capsys, arguments):
    with pytest.raises(SystemExit):
        run_command("allocation", tmp_path, *asked(source, *arguments))
    assert f"`{arguments[0][2:]}` must be positive, got 0" in capsys.readouterr().err
