"""Drawn videos: every question has the one answer that the cards give, and the pictures show the cards."""

from collections import Counter
from itertools import pairwise

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
        *[Card("square", "red")] * 14,
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
        ("recall", "What colour comes right before the digit that is shown twice, the first time?"): "red",
        ("before", "What colour is the shape right before the ball?"): "yellow",
        ("majority", "Are there more circles or squares before the ball?"): "circle",
    }


def test_seconds_that_answers_of_this_scene_follow_from():
    seconds = [(question.kind, question.seconds) for question in SCENE.questions()]
    assert seconds == [
        ("needle", (13,)),
        ("order", (1, 3)),
        ("order", (1, 3)),
        ("count", (0, 11)),
        ("ordinal", (0,)),
        ("ordinal", (11,)),
        ("repetition", (2, 28)),
        ("after", (1, 2)),
        ("later", (3, 10)),
        ("recall", (1, 2, 28)),
        ("before", (12, 13)),
        ("majority", (*range(4, 10), 12, 13)),
    ]


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
    sevens = [Card("blank"), Card("digit", "7"), Card("star", "red"), Card("digit", "7")]
    assert not Scene(tuple(sevens)).questions("recall") and not Scene(tuple(sevens[1:])).questions("recall")
    assert clear_majority([*circles, *squares]) is None
    assert clear_majority([*squares, Card("triangle", "red")]) == "square"


def test_all_kinds_at_once():
    scene = make_scene(np.random.default_rng(0), 32, *KINDS)
    assert {question.kind for question in scene.questions()} == set(KINDS)


def test_a_scene_that_does_not_exist_is_an_error(monkeypatch):
    monkeypatch.setattr("synthetic.scenes.MAX_TRIES", 10)
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


GUESSES = [
    ("needle", DIRECTIONS),
    ("order", (True, False)),
    ("count", ("1", "2", "3")),
    ("ordinal", COLOURS),
    ("repetition", DIGITS),
    ("after", DIGITS),
    ("later", DIGITS),
    ("recall", COLOURS),
    ("before", COLOURS),
    ("majority", MAJORITY_SHAPES),
]


@pytest.mark.parametrize("num_cards", [16, 32])
def test_answers_cannot_be_guessed(num_cards):
    """All answers of a kind are equally frequent: the limits are five standard deviations."""
    rng = np.random.default_rng(1)
    kinds = [kind for kind in KINDS if kind != "majority" or num_cards > 16]  # rare there, so slow to draw
    samples = 150
    answers = {kind: Counter() for kind in KINDS}
    for _ in range(samples):
        for question in make_scene(rng, num_cards, *kinds).one_question_of_each_kind(rng):
            answer = question.answer
            # The flash that is named first comes first as often as not.
            answers[question.kind][answer == question.choices[0] if question.kind == "order" else answer] += 1
    assert [kind for kind, _ in GUESSES] == list(KINDS)
    for kind, choices in GUESSES:
        if kind in kinds:
            assert answers[kind].total() == samples
            share = 1 / len(choices)
            limit = 5 * (samples * share * (1 - share)) ** 0.5
            assert all(abs(answers[kind][choice] - samples * share) < limit for choice in choices), answers[kind]


def test_the_whole_video_mostly_does_not_tell_what_was_most_before_the_ball():
    """Whoever does not care where the ball is, is right two times of three rather than one of two."""
    rng = np.random.default_rng(1)
    right, samples = 0.0, 150
    for _ in range(samples):
        scene = make_scene(rng, 32, "majority")
        first, second = (len(scene.where(shape)) for shape in MAJORITY_SHAPES)
        (question,) = scene.questions("majority")
        right += 0.5 if first == second else question.answer == MAJORITY_SHAPES[int(second > first)]
    assert right / samples < 0.75


def test_nothing_is_shown_twice_on_end():
    rng = np.random.default_rng(1)
    for _ in range(300):
        for card, after in pairwise(make_scene(rng, 16).cards):
            assert card != after or card.what not in ("digit", "star")


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
