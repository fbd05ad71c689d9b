"""Drawn videos: every question has the one answer that the cards give, and the pictures show the cards."""

from collections import Counter

import av
import numpy as np
import pytest

from synthetic.drawing import RGB, draw_scene, write_scene
from synthetic.scenes import (
    COLOURS,
    DIGITS,
    DIRECTIONS,
    KINDS,
    LATER_GAP,
    MAJORITY_SHAPES,
    Card,
    Scene,
    clear_majority,
    make_scene,
)

SCENE = Scene(
    (
        Card("star", "blue"),
        Card("flash", "red"),
        Card("digit", "7"),
        Card("flash", "green"),
        *[Card("circle", "green")] * LATER_GAP,
        Card("digit", "3"),
        Card("star", "yellow"),
        Card("square", "yellow"),
        Card("ball", "up"),
        *[Card("square", "red")] * (LATER_GAP + 1),
        Card("digit", "7"),
    )
)


def test_answers_of_a_scene_written_by_hand():
    answers = {(question.kind, question.text): question.answer for question in SCENE.questions()}
    assert answers == {
        ("needle", "Which way does the ball move?"): "up",
        ("order", "Which flash comes first, red or green?"): "red",
        ("order", "Which flash comes first, green or red?"): "red",
        ("count", "How many stars are there?"): "2",
        ("ordinal", "What colour is the first star?"): "blue",
        ("ordinal", "What colour is the second star?"): "yellow",
        ("repetition", "Which digit is shown twice?"): "7",
        ("after", "Which digit comes after the red flash?"): "7",
        ("later", "Which digit comes after the green flash?"): "3",
        ("before", "What colour is the shape right before the ball?"): "yellow",
        ("majority", "Are there more circles or squares before the ball?"): "circle",
    }


def test_questions_that_a_scene_does_not_allow():
    """No shape right before the ball; most circles and squares before it, so that the whole video tells the majority;
    no majority at all."""
    circles, squares, ball = [Card("circle", "red")] * 3, [Card("square", "red")] * 2, Card("ball", "up")
    for cards in (
        [*circles, Card("star", "red"), ball],
        [*circles, ball],
        [*circles, *squares, ball, *circles, *squares],
    ):
        assert not Scene(tuple(cards)).questions("majority")
    assert not Scene((*circles, Card("star", "red"), ball)).questions("before")
    assert not Scene((*circles, Card("blank"), ball)).questions("before")
    assert not Scene((ball, *circles)).questions("before")
    assert clear_majority([*circles, *squares]) is None
    assert clear_majority([*squares, Card("triangle", "red")]) == "square"


def test_all_kinds_at_once():
    scene = make_scene(np.random.default_rng(0), 32, *KINDS)
    assert {question.kind for question in scene.questions()} == set(KINDS)


def test_a_scene_that_does_not_exist_is_an_error(monkeypatch):
    monkeypatch.setitem(KINDS, "never", lambda scene: [])
    with pytest.raises(ValueError, match=r"`num_cards`=8 .* never"):
        make_scene(np.random.default_rng(0), 8, "never")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("num_cards", [16, 33, 200])
def test_every_kind_can_be_asked_at_every_length(kind, num_cards):
    rng = np.random.default_rng(0)
    for _ in range(20):
        scene = make_scene(rng, num_cards, kind)
        assert len(scene.cards) == num_cards
        questions = scene.questions(kind)
        assert questions
        for question in questions:
            assert question.kind == kind and question.answer in question.choices


def test_answers_cannot_be_guessed():
    """No answer of a kind is much more frequent than chance: the limits are five standard deviations."""
    rng = np.random.default_rng(1)
    scenes = [make_scene(rng, 32) for _ in range(600)]
    kinds = {"needle": DIRECTIONS, "repetition": DIGITS, "ordinal": COLOURS, "later": DIGITS, "before": COLOURS}
    for kind, choices in (kinds | {"majority": MAJORITY_SHAPES}).items():
        # One question a scene, so that they are independent.
        answers = Counter(questions[0].answer for scene in scenes if (questions := scene.questions(kind)))
        count, share = answers.total(), 1 / len(choices)
        limit = 5 * (count * share * (1 - share)) ** 0.5
        assert all(abs(answers[choice] - count * share) < limit for choice in choices), (kind, answers)


def test_the_seed_decides_everything():
    first, second = (np.random.default_rng(3) for _ in range(2))
    scene, other = make_scene(first, 40), make_scene(second, 40)
    assert scene == other
    pictures = draw_scene(scene, first)
    assert np.array_equal(pictures, draw_scene(other, second))
    assert not np.array_equal(pictures, draw_scene(scene, first))


def test_pictures_show_the_cards():
    pictures = draw_scene(SCENE, np.random.default_rng(0), size=84, fps=4)
    assert pictures.shape == (4 * len(SCENE.cards), 84, 84, 3) and pictures.dtype == np.uint8
    cards = pictures.reshape(len(SCENE.cards), 4, 84, 84, 3)
    for second, card in enumerate(SCENE.cards):
        if card.what == "flash":
            assert (cards[second] == RGB[card.value]).all()
        if card.what in ("star", "circle"):
            is_colour = (cards[second, 0] == RGB[card.value]).all(-1)
            assert 0.02 < is_colour.mean() < 0.5
    (ball,) = SCENE.where("ball")
    heights = [np.argwhere((picture == 255).all(-1))[:, 0].mean() for picture in cards[ball]]
    assert heights == sorted(heights, reverse=True) and heights[0] - heights[-1] > 20


def test_a_written_scene_reads_back(tmp_path):
    rng = np.random.default_rng(0)
    path = write_scene(tmp_path / "scene.mp4", SCENE, rng, fps=4)
    with av.open(str(path)) as container:
        frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    assert len(frames) == 4 * len(SCENE.cards)
    assert np.abs(frames[4].astype(int) - RGB["red"]).mean() < 12  # the flash, through the codec


@pytest.mark.parametrize(
    ("call", "name"),
    [
        (lambda rng: make_scene(rng, 7), "num_cards"),
        (lambda rng: make_scene(rng, 15, "later"), "num_cards"),
        (lambda rng: make_scene(rng, 32, "needle", "nedle"), "kinds"),
        (lambda rng: SCENE.questions("nedle"), "kind"),
        (lambda rng: draw_scene(SCENE, rng, size=57), "size"),
        (lambda rng: draw_scene(SCENE, rng, fps=0), "fps"),
    ],
)
def test_bad_arguments(call, name):
    with pytest.raises(ValueError, match=f"`{name}`"):
        call(np.random.default_rng(0))
