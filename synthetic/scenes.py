"""Scenes: what a drawn video shows, second by second, and the questions that have one right answer in it.

A scene is a row of cards, each on screen for one second. Among plain filler (shapes, blank cards) every scene hides

- flashes, each of its own colour, each with a digit after it: at once, or after a gap of filler;
- loose digits, one of which makes a digit of the scene come twice; every other digit comes once;
- one ball that moves; before it and after it, some shape of the filler is favoured;
- one to three stars of random colours, one in scenes of less than 12 seconds.

Everything is random but the answers follow from the cards alone, so that a scene of any length can be asked the same
questions, and none can be answered without looking: every answer of a kind is equally likely, or nearly so. The same
digit or star is never shown in two seconds on end, since that would look like once, for longer.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

COLOURS = ("red", "green", "blue", "yellow")
DIGITS = tuple("0123456789")
DIRECTIONS = ("left", "right", "up", "down")
FILLER_SHAPES = ("circle", "square", "triangle")
MAJORITY_SHAPES = ("circle", "square")
NUMBER_WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
ORDINALS = ("first", "second", "third")

MIN_CARDS = 8
# From this gap on, a digit is "later" than its flash.
LATER_GAP = 6
# A scene with questions of the kinds asked for is found by drawing scenes.
MAX_TRIES = 200_000
# Kinds of question for which `MIN_CARDS` are too few, and twice as many are enough.
LONG_KINDS = ("count", "later", "majority")


@dataclass(frozen=True)
class Card:
    """What is on screen for one second.

    Attributes:
        what: "digit", "flash", "ball", "star", one of `FILLER_SHAPES` or "blank".
        value: the digit, the colour, or the direction of the ball; "" for a blank card.
    """

    what: str
    value: str = ""


@dataclass(frozen=True)
class Question:
    """A question about a scene.

    Attributes:
        kind: a key of `KINDS`.
        text: as put to the model.
        answer: one word or digit.
        choices: what the answer is one of.
        seconds: at which the cards are that the answer follows from, ascending.
    """

    kind: str
    text: str
    answer: str
    choices: tuple[str, ...]
    seconds: tuple[int, ...]


@dataclass(frozen=True)
class Scene:
    """A row of cards, one a second."""

    cards: tuple[Card, ...]

    def where(self, what: str) -> list[int]:
        """The seconds at which such a card is on screen, ascending."""
        return [second for second, card in enumerate(self.cards) if card.what == what]

    def questions(self, kind: str | None = None) -> list[Question]:
        """All questions of a kind, or of every kind, that have one right answer in this scene.

        Raises:
            ValueError: unknown kind.
        """
        if kind is not None and kind not in KINDS:
            raise ValueError(f"`kind` must be one of {', '.join(KINDS)}, got {kind!r}")
        return [question for name in KINDS if kind in (None, name) for question in KINDS[name](self)]

    def one_question_of_each_kind(self, rng: np.random.Generator) -> list[Question]:
        """Of each kind that this scene allows, any question."""
        kinds = (self.questions(kind) for kind in KINDS)
        return [questions[int(rng.integers(len(questions)))] for questions in kinds if questions]


def make_scene(rng: np.random.Generator, num_cards: int, *kinds: str) -> Scene:
    """A random scene.

    Args:
        rng: the only source of chance.
        num_cards: seconds, at least `MIN_CARDS`; for `LONG_KINDS` at least twice as many.
        kinds: make sure that a question of each of these can be asked. (All of `KINDS` fit into 16 seconds.)
    Raises:
        ValueError: too few cards, or an unknown kind.
    """
    if unknown := [kind for kind in kinds if kind not in KINDS]:
        raise ValueError(f"`kinds` must be of {', '.join(KINDS)}, got {unknown[0]!r}")
    least = 2 * MIN_CARDS if any(kind in LONG_KINDS for kind in kinds) else MIN_CARDS
    if num_cards < least:
        raise ValueError(f"`num_cards` must be at least {least} for {', '.join(kinds) or 'any kind'}, got {num_cards}")
    num_stars = int(rng.integers(1, _most_stars(num_cards) + 1))  # once, so that all numbers are equally likely
    for _ in range(MAX_TRIES):
        scene = _random_scene(rng, num_cards, num_stars)
        if not _repeats_itself(scene) and all(scene.questions(kind) for kind in kinds):
            return scene
    raise ValueError(f"`num_cards`={num_cards} are too few for all of `kinds` at once: {', '.join(kinds)}")


def _most_stars(num_cards: int) -> int:
    return 1 if num_cards < 12 else len(ORDINALS)


def _repeats_itself(scene: Scene) -> bool:
    return any(card == after and card.what in ("digit", "star") for card, after in pairwise(scene.cards))


def _random_scene(rng: np.random.Generator, num_cards: int, num_stars: int) -> Scene:
    most_flashes, most_loose = (2, 1) if num_cards < 12 else (3, 1) if num_cards < 24 else (4, 3)
    num_flashes = int(rng.integers(2, most_flashes + 1))
    num_loose = int(rng.integers(1, most_loose + 1))

    digits = iter(rng.permutation(DIGITS).tolist())
    flash_digits = [next(digits) for _ in range(num_flashes)]
    loose = [next(digits) for _ in range(num_loose - 1)]
    loose.append(str(rng.choice(flash_digits + loose)))

    # Units stay together. What they leave of the time is filler, in the gaps of half of the flashes and between units.
    slack = num_cards - 2 * num_flashes - num_loose - num_stars - 1
    units = [[Card("digit", digit)] for digit in loose]
    for colour, digit in zip(rng.permutation(COLOURS)[:num_flashes].tolist(), flash_digits, strict=True):
        gap = int(rng.integers(slack + 1)) if rng.random() < 0.5 else 0
        slack -= gap
        units.append([Card("flash", colour), *[None] * gap, Card("digit", digit)])
    units += [[None]] * slack
    cards: list[Card | None] = [card for index in rng.permutation(len(units)) for card in units[index]]

    # The ball and the stars may lie in a gap too, but make none where there was none.
    hidden = [Card("ball", str(rng.choice(DIRECTIONS)))]
    hidden += [Card("star", str(rng.choice(COLOURS))) for _ in range(num_stars)]
    for card in hidden:
        places = [place for place in range(len(cards) + 1) if place == 0 or not _is_flash(cards[place - 1])]
        cards.insert(int(rng.choice(places)), card)
    ball = cards.index(hidden[0])
    favourites = rng.choice(FILLER_SHAPES, size=2)
    filled = [card or _filler(rng, favourites[int(second > ball)]) for second, card in enumerate(cards)]
    return Scene(tuple(filled))


def _is_flash(card: Card | None) -> bool:
    return card is not None and card.what == "flash"


def _filler(rng: np.random.Generator, favourite: str) -> Card:
    what = str(rng.choice((*FILLER_SHAPES, *[favourite] * 2, "blank")))
    return Card(what) if what == "blank" else Card(what, str(rng.choice(COLOURS)))


def _needle(scene: Scene) -> list[Question]:
    (second,) = scene.where("ball")
    return [Question("needle", "Which way does the ball move?", scene.cards[second].value, DIRECTIONS, (second,))]


def _order(scene: Scene) -> list[Question]:
    flashes = {scene.cards[second].value: second for second in scene.where("flash")}
    pairs = [(a, b) for a in flashes for b in flashes if a != b]
    questions = []
    for a, b in pairs:
        text, seconds = f"Which flash comes first, {a} or {b}?", sorted((flashes[a], flashes[b]))
        questions.append(Question("order", text, min(a, b, key=flashes.get), (a, b), tuple(seconds)))
    return questions


def _count(scene: Scene) -> list[Question]:
    if _most_stars(len(scene.cards)) == 1:
        return []
    choices, stars = tuple(str(number + 1) for number in range(len(ORDINALS))), scene.where("star")
    return [Question("count", "How many stars are there?", str(len(stars)), choices, tuple(stars))]


def _ordinal(scene: Scene) -> list[Question]:
    stars = scene.where("star")
    return [
        Question("ordinal", f"What colour is the {name} star?", scene.cards[second].value, COLOURS, (second,))
        for name, second in zip(ORDINALS, stars, strict=False)
    ]


def _repetition(scene: Scene) -> list[Question]:
    first, second = _shown_twice(scene)
    return [Question("repetition", "Which digit is shown twice?", scene.cards[first].value, DIGITS, (first, second))]


def _shown_twice(scene: Scene) -> tuple[int, int]:
    """The seconds of the digit that is."""
    digits = scene.where("digit")
    values = [scene.cards[second].value for second in digits]
    first, second = (second for second, value in zip(digits, values, strict=True) if values.count(value) == 2)
    return first, second


def _digits_after_flashes(scene: Scene, kind: str, is_kind: Callable[[int], bool]) -> list[Question]:
    questions = []
    digits = scene.where("digit")
    for flash in scene.where("flash"):
        second = next(second for second in digits if second > flash)
        if is_kind(second - flash - 1):
            text = f"Which digit comes after the {scene.cards[flash].value} flash?"
            questions.append(Question(kind, text, scene.cards[second].value, DIGITS, (flash, second)))
    return questions


def _after(scene: Scene) -> list[Question]:
    return _digits_after_flashes(scene, "after", lambda gap: gap < LATER_GAP)


def _later(scene: Scene) -> list[Question]:
    return _digits_after_flashes(scene, "later", lambda gap: gap >= LATER_GAP)


def _recall(scene: Scene) -> list[Question]:
    first, again = _shown_twice(scene)
    if first == 0 or scene.cards[first - 1].value not in COLOURS:
        return []
    text = "What colour comes right before the digit that is shown twice, the first time?"
    return [Question("recall", text, scene.cards[first - 1].value, COLOURS, (first - 1, first, again))]


def _before(scene: Scene) -> list[Question]:
    (second,) = scene.where("ball")
    if second == 0 or scene.cards[second - 1].what not in FILLER_SHAPES:
        return []
    text, seconds = "What colour is the shape right before the ball?", (second - 1, second)
    return [Question("before", text, scene.cards[second - 1].value, COLOURS, seconds)]


def _majority(scene: Scene) -> list[Question]:
    (second,) = scene.where("ball")
    past, future = scene.cards[:second], scene.cards[second:]
    # Else the shapes of the whole video would mostly tell, and nobody need care where the ball is.
    is_early = 2 * _count_shapes(past) <= _count_shapes(future)
    shape = clear_majority(past) if is_early else None
    text = "Are there more circles or squares before the ball?"
    if shape is None:
        return []
    shapes = (at for at, card in enumerate(past) if card.what in MAJORITY_SHAPES)
    return [Question("majority", text, shape, MAJORITY_SHAPES, (*shapes, second))]


def _count_shapes(cards: Sequence[Card]) -> int:
    return sum(card.what in MAJORITY_SHAPES for card in cards)


def clear_majority(cards: Sequence[Card]) -> str | None:
    """The one of `MAJORITY_SHAPES` that is there more than twice as often as the other, and by two at least."""
    first, second = (sum(card.what == shape for card in cards) for shape in MAJORITY_SHAPES)
    if max(first, second) < 2 * min(first, second) + 2:
        return None
    return MAJORITY_SHAPES[int(second > first)]


def parse_answer(response: str, choices: Sequence[str]) -> str:
    """The choice that a response names first, as a word of its own; digits may be spelt out. "" if it names none."""
    words = re.findall(r"[a-z]+|\d+", response.lower())
    words = [str(NUMBER_WORDS.index(word)) if word in NUMBER_WORDS else word for word in words]
    return next((word for word in words if word in choices), "")


# What each asks for:
KINDS: dict[str, Callable[[Scene], list[Question]]] = {
    "needle": _needle,  # one moving card in a haystack of still ones
    "order": _order,  # two events, anywhere
    "count": _count,  # how often something happens
    "ordinal": _ordinal,  # an event by its number
    "repetition": _repetition,  # an event that comes back
    "after": _after,  # two events side by side, or nearly
    "later": _later,  # two events far apart
    "recall": _recall,  # a detail of an event that comes back
    "before": _before,  # what is next to an event, exactly
    "majority": _majority,  # what most of the past of an event was
}
