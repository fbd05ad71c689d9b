"""Example videos, drawn when the page starts, with questions that have a right answer in them.

They are the videos that the small checkpoint was trained for: a row of cards, one a second (`synthetic/scenes.py`).
"""

from pathlib import Path

import numpy as np

from synthetic.drawing import write_scene
from synthetic.scenes import KINDS, Question, make_scene

from .visitors import Video

SECONDS = 32
SIZE = 224
QUESTIONS = 6


def draw_examples(folder: Path, number: int = 3, seed: int = 0) -> list[tuple[Video, list[Question]]]:
    """Draw videos and choose questions of different kinds about each.

    Args:
        folder: to draw into; it exists.
        number: of videos.
        seed: other seeds draw other videos.
    """
    examples = []
    for index in range(number):
        rng = np.random.default_rng([seed, index])
        scene = make_scene(rng, SECONDS, *KINDS)
        path = write_scene(folder / f"cards-{index + 1}.mp4", scene, rng, size=SIZE)
        asked = scene.one_question_of_each_kind(rng)
        # Other kinds for each video, so that together they show them all.
        asked = [asked[(index * QUESTIONS + place) % len(asked)] for place in range(QUESTIONS)]
        texts = tuple(question.text for question in asked)
        examples.append((Video(path, f"Cards {index + 1}", texts), asked))
    return examples
