"""Draw the local benchmark: videos of growing length with questions that have one answer (`synthetic/scenes.py`).

    python -m videonsa_eval.draw_benchmark
    lmms-eval --model videonsa --model_args pretrained=... --include_path eval/tasks --tasks synthetic_videos

The tasks look for the videos in `eval/data`, seen from the folder in which lmms_eval is started. The seed decides
every scene and picture; a longer list of lengths, or more videos of each, leaves the videos that were there as they
were.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from conversion.staging import staged
from synthetic.drawing import write_scene
from synthetic.scenes import KINDS, MIN_CARDS, make_scene

# The folder that eval/tasks/*.yaml names.
DATA = Path("eval/data")
LENGTHS = (16, 32, 64, 128)


def draw_benchmark(
    output: Path,
    *,
    lengths: Sequence[int] = LENGTHS,
    videos: int = 7,
    seed: int = 0,
    size: int = 56,
    fps: int = 4,
    overwrite: bool = False,
) -> int:
    """Write `videos/*.mp4`, for each kind of question `<kind>.jsonl`, and all of them in `all.jsonl`.

    Each video is asked one question of every kind. A line has the fields id, video (relative to
    `output`), seconds, kind, question, answer and choices. Lengths alternate, so that the first lines have them all.

    Args:
        output: folder; appears when it is complete.
        lengths: of the videos in seconds, one card a second.
        videos: of each length.
        size: of the pictures, pixels.
        fps: pictures a second in the files.
    Returns:
        the number of questions; every kind has an equal share of them.
    Raises:
        ValueError: lengths or numbers that make no benchmark, or a folder that is there and not to be replaced.
    """
    if videos < 1:
        raise ValueError(f"`videos` must be at least 1, got {videos}")
    if not lengths or min(lengths) < 2 * MIN_CARDS or len(set(lengths)) < len(lengths):
        raise ValueError(f"`lengths` must be different, each at least {2 * MIN_CARDS} seconds, got {list(lengths)}")
    if seed < 0:
        raise ValueError(f"`seed` must not be negative, got {seed}")
    lines: list[dict] = []
    with staged(output, overwrite, marker="all.jsonl", what="benchmark") as staging:
        (staging.folder / "videos").mkdir()
        for number in range(videos):
            for seconds in lengths:
                rng = np.random.default_rng([seed, seconds, number])
                scene = make_scene(rng, seconds, *KINDS)
                name = f"{seconds:05d}_{number:04d}"
                write_scene(staging.folder / "videos" / f"{name}.mp4", scene, rng, size=size, fps=fps)
                lines += [
                    {
                        "id": f"{name}_{question.kind}",
                        "video": f"videos/{name}.mp4",
                        "seconds": seconds,
                        "kind": question.kind,
                        "question": question.text,
                        "answer": question.answer,
                        "choices": list(question.choices),
                    }
                    for question in scene.one_question_of_each_kind(rng)
                ]
        for kind in KINDS:
            _write_lines(staging.folder / f"{kind}.jsonl", [line for line in lines if line["kind"] == kind])
        _write_lines(staging.folder / "all.jsonl", lines)
    return len(lines)


def _write_lines(path: Path, lines: Sequence[dict]) -> None:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def main() -> None:
    parser = argparse.ArgumentParser(description="Draw the local benchmark.")
    parser.add_argument("output", type=Path, nargs="?", default=DATA, help="default: eval/data, where the tasks look")
    parser.add_argument("--lengths", type=int, nargs="+", default=LENGTHS, metavar="SECONDS")
    parser.add_argument("--videos", type=int, default=7, help="of each length")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--size", type=int, default=56, help="pixels, even")
    parser.add_argument("--fps", type=int, default=4, help="pictures a second")
    parser.add_argument("--overwrite", action="store_true")
    arguments = vars(parser.parse_args())
    output = arguments.pop("output")
    count = draw_benchmark(output, **arguments)
    print(f"{output}: {count} questions, {count // len(KINDS)} of each kind: {', '.join(KINDS)}")


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:
        raise SystemExit(f"draw_benchmark.py: error: {error}") from error
