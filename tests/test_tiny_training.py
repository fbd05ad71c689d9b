"""The training of the small checkpoint: its shortcuts compute what the model computes, and its targets are right."""

import subprocess
import sys
from functools import partial

import evaluate_tiny
import make_tiny
import numpy as np
import pytest
import tiny_training
import torch
from conftest import ROOT
from make_tiny import Settings, build_model, build_tokenizer
from masked_attention import masked_attention
from tiny_training import CARDS, IGNORED, QUESTIONS, SIZE, Conversations, FeatureBank, to_patches
from transformers import Qwen2VLVideoProcessor

from synthetic.drawing import draw_scene
from synthetic.scenes import MAJORITY_SHAPES, Card, make_scene


@pytest.fixture(scope="module")
def tokenizer():
    return build_tokenizer()


@pytest.fixture
def model(tokenizer):
    torch.manual_seed(0)
    model = build_model(tokenizer, Settings(block_counts=2, window_size=7)).eval()
    for parameter in model.parameters():  # the usual initialisation leaves attention flat and gates at one half
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=parameter.shape[-1] ** -0.5)
    return model


@pytest.mark.parametrize("nsa_mode", ["sparse", "dense"])
@pytest.mark.parametrize("num_cards", [8, 21])  # 84 tokens: the last block is not complete
def test_masks_compute_the_models_attention(model, tokenizer, nsa_mode, num_cards):
    model.config.nsa_mode = nsa_mode
    rng = np.random.default_rng(0)
    batch = Conversations(tokenizer, rng, num_questions=2).batch(num_cards, 3, interval=2)
    lengths = [int((row != tokenizer.pad_token_id).sum()) for row in batch.input_ids]
    assert len(set(lengths)) > 1  # there is padding
    embeddings = model.get_input_embeddings()(batch.input_ids)
    embeddings[:, batch.start : batch.stop] = FeatureBank(model.model.visual, rng, drawings=2)(batch.scenes)

    model, embeddings = model.double(), embeddings.double()  # rounding is far below any other difference
    types = torch.zeros_like(batch.input_ids)
    types[:, batch.start : batch.stop] = 2
    inputs = {"inputs_embeds": embeddings, "position_ids": batch.position_ids}
    with torch.no_grad():
        mask = (batch.input_ids != tokenizer.pad_token_id).int()
        own = model.model(**inputs, attention_mask=mask, mm_token_type_ids=types, use_cache=False).last_hidden_state
        text_model = model.model.language_model
        with masked_attention(model, batch.start, batch.stop):
            masked = text_model(**inputs, attention_mask={"full_attention": None}, use_cache=False).last_hidden_state
        again = model.model(**inputs, attention_mask=mask, mm_token_type_ids=types, use_cache=False).last_hidden_state
    assert torch.equal(again, own)  # nothing stays behind
    for row, length in enumerate(lengths):
        torch.testing.assert_close(masked[row, :length], own[row, :length], rtol=0, atol=1e-9)


def test_patches_are_those_of_the_processor():
    pictures = draw_scene(make_scene(np.random.default_rng(0), 8), np.random.default_rng(1), size=SIZE)
    processor = Qwen2VLVideoProcessor(min_pixels=SIZE * SIZE, max_pixels=SIZE * SIZE)
    frames = torch.from_numpy(pictures).permute(0, 3, 1, 2)
    expected = processor([frames], return_tensors="pt", do_sample_frames=False)
    assert expected["video_grid_thw"].tolist() == [[8, 4, 4]]
    torch.testing.assert_close(to_patches(pictures), expected["pixel_values_videos"], rtol=0, atol=1e-5)


def test_notes_of_a_scene_written_by_hand():
    cards = (
        Card("star", "red"),
        Card("flash", "blue"),
        Card("digit", "7"),
        Card("digit", "7"),
        Card("star", "green"),
        *[Card("square", "red")] * 3,
        Card("circle", "red"),
    )
    notes = [tiny_training._notes_of(cards[: second + 1]) for second in range(len(cards))]
    blue = 1 + tiny_training.COLOURS.index("blue")
    squares = MAJORITY_SHAPES.index("square")
    assert [note["flash"] for note in notes] == [0] + [blue] * 8
    assert [note["reply"] for note in notes] == [0, 0, blue] + [0] * 6
    assert [note["again"] for note in notes] == [IGNORED, IGNORED, 0, 1] + [IGNORED] * 5
    assert [note["stars"] for note in notes] == [0, 1, 1, 1, 1, 2, 2, 2, 2]
    assert [note["majority"] for note in notes] == [IGNORED] * 7 + [squares] * 2
    assert [CARDS[note["card"]] for note in notes] == list(cards)
    colours = tiny_training.COLOURS
    assert [note["recall"] for note in notes] == [IGNORED] * 3 + [colours.index("blue")] + [IGNORED] * 5
    assert [note["seen blue"] for note in notes] == [0, 0] + [1] * 7
    assert [note["seen red"] for note in notes] == [0] * 9
    assert notes[0]["before"] == IGNORED
    assert [CARDS[note["before"]] for note in notes[1:]] == list(cards[:-1])


def test_every_card_and_question_has_a_number_and_every_answer_is_one_token(tokenizer):
    rng = np.random.default_rng(0)
    for _ in range(200):
        scene = make_scene(rng, 32)
        assert set(scene.cards) <= set(CARDS)
        for question in scene.questions():
            assert question.text in QUESTIONS
            assert len(tokenizer(question.answer)["input_ids"]) == 1


def test_a_shut_branch_adds_nothing(model, monkeypatch):
    gates = []
    attend = sys.modules["modeling_videonsa"].nsa_attention
    monkeypatch.setattr(
        "modeling_videonsa.nsa_attention",
        lambda q, k, v, *g, **kwargs: gates.append(g[:3]) or attend(q, k, v, *g, **kwargs),
    )
    inputs = {
        "inputs_embeds": torch.randn(1, 40, 128),
        "mm_token_type_ids": torch.full((1, 40), 2),
        "position_ids": torch.arange(40).expand(3, 1, -1),
    }
    with torch.no_grad():
        with evaluate_tiny.without(model, branches=("selection", "window")):
            model.model(**inputs)
        assert all((g[0] > 0).all() and not g[1].any() and not g[2].any() for g in gates)
        gates.clear()
        model.model(**inputs)
        assert all((gate > 0).all() for g in gates for gate in g)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--processes", "0"], "--processes must be at least 1, got 0"),
        (["--questions", "0"], "--questions must be at least 1, got 0"),
        (["--cards", "127"], "--cards must be a multiple of --processes (2), got 127"),
        (["--seed", "-1"], "--seed must be at least 0, got -1"),
        (["--learning-rate", "0"], "--learning-rate must be between 0 and 1, got 0"),
        (["--nsa-mode", "spares"], "--nsa-mode"),
    ],
)
def test_bad_settings_are_named(tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.setattr(sys, "argv", ["make_tiny.py", str(tmp_path / "tiny"), *arguments])
    with pytest.raises(SystemExit):
        make_tiny.main()
    assert message in capsys.readouterr().err


def test_what_is_there_is_not_replaced(tmp_path, monkeypatch):
    (tmp_path / "mine.txt").touch()
    monkeypatch.setattr(sys, "argv", ["make_tiny.py", str(tmp_path), "--overwrite"])
    with pytest.raises(ValueError, match="is not a checkpoint folder"):
        make_tiny.main()


def test_code_inside_the_repository_is_linked(tmp_path, monkeypatch):
    monkeypatch.setattr(make_tiny, "ROOT", tmp_path)
    code = tmp_path / "modeling.py"
    code.write_text("1")
    for folder in (tmp_path / "inside", tmp_path / "inside" / "kernels"):
        folder.mkdir()
        (folder / "modeling.py").write_text("2")
    (tmp_path / "kernels").mkdir()
    make_tiny.link_code(tmp_path / "inside")
    assert (tmp_path / "inside" / "modeling.py").resolve() == code and code.read_text() == "1"
    assert (tmp_path / "inside" / "kernels").resolve() == tmp_path / "kernels"


def test_a_few_steps_make_a_checkpoint_that_can_be_evaluated(tmp_path):
    steps = ["--vision-steps", "2", "--note-steps", "2", "--answer-steps", "2", "--cards", "32", "--conversations", "4"]
    command = [sys.executable, str(ROOT / "checkpoints" / "make_tiny.py"), str(tmp_path / "tiny"), *steps]
    subprocess.run(command, check=True, capture_output=True, timeout=900)
    model = evaluate_tiny.load(tmp_path / "tiny")
    processor = evaluate_tiny.VideoNSAProcessor.from_pretrained(tmp_path / "tiny", trust_remote_code=True)
    held_out = evaluate_tiny.HeldOut(processor, 1, 16, 1, tmp_path)
    rows = {"dense": partial(evaluate_tiny.settings, nsa_mode="dense")} | evaluate_tiny.ROWS
    results = held_out.accuracy(model, rows)
    assert list(results) == list(rows)
    shares = results["as trained"]
    assert set(shares) == {*evaluate_tiny.KINDS, "mean"} and all(0 <= share <= 1 for share in shares.values())
    with evaluate_tiny.settings(model, nsa_mode="dense"):
        assert model.config.nsa_mode == "dense"
    assert model.config.nsa_mode == "sparse"
