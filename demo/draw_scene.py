"""Draw a video of half a minute with a question of every kind, and the right answers beside it.

    python demo/draw_scene.py demo/scene.mp4 --seed 0

made the two files that the demo reads. `synthetic/scenes.py` says what such a video shows.
"""

import argparse
import json
import sys
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from synthetic.drawing import write_scene  # noqa: E402
from synthetic.scenes import KINDS, make_scene  # noqa: E402

SECONDS = 32


def draw(path: Path, seed: int) -> list[dict]:
    """Write the video; of each kind one question, with its answer and what that is one of."""
    rng = np.random.default_rng(seed)
    scene = make_scene(rng, SECONDS, *KINDS)
    write_scene(path, scene, rng)
    return [
        {"kind": asked.kind, "question": asked.text, "answer": asked.answer, "choices": list(asked.choices)}
        for asked in scene.one_question_of_each_kind(rng)
    ]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Draw a video with a question of every kind.")
    parser.add_argument("path", type=Path, help="of the .mp4 file; the questions become a .json file beside it")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    if arguments.path.suffix != ".mp4":
        parser.error(f"path must end in .mp4, got {arguments.path}")
    if arguments.seed < 0:
        parser.error(f"--seed must not be negative, got {arguments.seed}")
    questions = draw(arguments.path, arguments.seed)
    arguments.path.with_suffix(".json").write_text(json.dumps(questions, indent=2) + "\n")
