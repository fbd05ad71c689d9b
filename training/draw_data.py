"""Draw training data: videos with questions that have one answer (`synthetic/scenes.py`), to try training anywhere.

python -m training.draw_data drawn --videos 40
python train.py configs/tiny.yaml --train_data drawn/train.jsonl --video_folder drawn/videos ...
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from conversion.staging import staged
from synthetic.drawing import write_scene
from synthetic.scenes import MIN_CARDS, make_scene


def draw_records(
    folder: Path, lengths: Sequence[int], *, seed: int = 0, questions: int = 2, size: int = 56, fps: int = 4
) -> list[dict[str, Any]]:
    """Draw a video of each length into a folder.

    Args:
        folder: of the videos; it must be there.
        lengths: seconds, each at least `MIN_CARDS`.
        questions: asked about each video, one after another in one conversation.
        size: height and width in pixels.
        fps: pictures a second.
    Returns:
        A chat record for each; see `records.py`.
    """
    records = []
    for number, seconds in enumerate(lengths):
        rng = np.random.default_rng([seed, number])
        scene = make_scene(rng, seconds)
        name = f"{number:05}.mp4"
        write_scene(folder / name, scene, rng, size=size, fps=fps)
        possible = scene.questions()
        messages = []
        for index in rng.permutation(len(possible))[:questions].tolist():
            content = [{"type": "text", "text": possible[index].text}]
            messages += [{"role": "user", "content": content}, {"role": "assistant", "content": possible[index].answer}]
        messages[0]["content"].insert(0, {"type": "video", "video": name})
        records.append({"id": name.removesuffix(".mp4"), "messages": messages})
    return records


def draw_data(folder: Path, *, videos: int, longest: int, seed: int = 0, overwrite: bool = False) -> None:
    """Write `videos/*.mp4` and `train.jsonl`.

    Args:
        folder: appears when it is complete.
        longest: seconds of the longest videos; the shortest have `MIN_CARDS`.
    Raises:
        ValueError: no videos, too short ones, or a folder that is there and not to be replaced.
    """
    if videos < 1:
        raise ValueError(f"`videos` must be at least 1, got {videos}")
    if longest < MIN_CARDS:
        raise ValueError(f"`longest` must be at least {MIN_CARDS} seconds, got {longest}")
    lengths = np.random.default_rng(seed).integers(MIN_CARDS, longest + 1, size=videos).tolist()
    with staged(folder, overwrite, marker="train.jsonl", what="training data") as staging:
        (staging.folder / "videos").mkdir()
        records = draw_records(staging.folder / "videos", lengths, seed=seed)
        (staging.folder / "train.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))


def main() -> None:
    parser = argparse.ArgumentParser(description="Draw videos and questions to train on.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--videos", type=int, default=40)
    parser.add_argument("--longest", type=int, default=16, help="seconds")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--overwrite", action="store_true")
    arguments = parser.parse_args()
    draw_data(**vars(arguments))
    print(f"{arguments.folder}: {arguments.videos} videos, two questions each")


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:
        raise SystemExit(f"draw_data.py: error: {error}") from error
