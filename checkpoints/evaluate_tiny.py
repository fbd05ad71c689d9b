"""What the tiny checkpoint can do, and what each part of its attention is good for.

    python checkpoints/evaluate_tiny.py checkpoints/tiny --output checkpoints/results/ablations.json

Every video is drawn afresh, encoded with h264, read by the processor and asked one question. An answer is right where
the most likely next token is the right word. Rows of the table: the checkpoint as it is; without one branch, or all
(their gates set to zero); with dense attention instead; with half and double `block_counts` and `window_size`; and on
videos longer than in training (32 seconds at most).

    python checkpoints/evaluate_tiny.py DENSE SPARSE --compare --output checkpoints/results/dense_and_sparse.json

compares two trainings instead, as the paper does: a model trained and run densely, one trained and run sparsely, and
the sparse one's weights run densely.
"""

import argparse
import json
import sys
import tempfile
from contextlib import nullcontext
from functools import partial
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import numpy as np  # noqa: E402
import torch  # noqa: E402
from tqdm import tqdm  # noqa: E402

from analysis.changes import Change, settings  # noqa: E402
from analysis.changes import without_branches as without  # noqa: E402
from analysis.observe import BRANCHES  # noqa: E402
from modeling_videonsa import VideoNSAForConditionalGeneration  # noqa: E402
from processing_videonsa import VideoNSAProcessor  # noqa: E402
from synthetic.drawing import write_scene  # noqa: E402
from synthetic.scenes import KINDS, make_scene  # noqa: E402

SECONDS = 32  # the longest videos of the training
BATCH = 20
ROWS: dict[str, Change] = {"as trained": nullcontext}


class HeldOut:
    """Freshly drawn videos with one question each, as the processor hands them to a model.

    Args:
        processor: of the checkpoint.
        seed: of videos and questions; the training has drawn from another one.
        seconds: length of the videos.
        num_samples: per kind of question.
        folder: for the files.
    """

    def __init__(self, processor, seed: int, seconds: int, num_samples: int, folder: Path):
        self.processor = processor
        self.samples: dict[str, list[tuple[list[dict], int]]] = {}
        rng = np.random.default_rng([seed, seconds])
        for kind in KINDS:
            for number in range(num_samples):
                scene = make_scene(rng, seconds, kind)
                questions = scene.questions(kind)
                question = questions[rng.integers(len(questions))]
                path = write_scene(folder / f"{kind}-{seconds}-{number}.mp4", scene, rng)
                content = [{"type": "video", "video": str(path)}, {"type": "text", "text": question.text}]
                (answer,) = processor.tokenizer(question.answer)["input_ids"]
                self.samples.setdefault(kind, []).append(([{"role": "user", "content": content}], answer))

    @torch.inference_mode()
    def accuracy(self, model, rows: dict[str, Change] = ROWS) -> dict[str, dict[str, float]]:
        """For each row, with the model changed so: the share of right answers for each kind, and their mean."""
        right = {row: dict.fromkeys(self.samples, 0) for row in rows}
        for kind, samples in self.samples.items():
            for start in range(0, len(samples), BATCH):
                messages, answers = zip(*samples[start : start + BATCH], strict=True)
                inputs = self.processor.apply_chat_template(
                    list(messages),
                    tokenize=True,
                    add_generation_prompt=True,
                    return_dict=True,
                    return_tensors="pt",
                    padding=True,
                )
                for row, change in rows.items():
                    with change(model):
                        logits = model(**inputs, logits_to_keep=1).logits[:, -1]
                    right[row][kind] += int((logits.argmax(-1) == torch.tensor(answers)).sum())
        shares = {
            row: {kind: count / len(self.samples[kind]) for kind, count in counts.items()}
            for row, counts in right.items()
        }
        return {row: of_row | {"mean": float(np.mean(list(of_row.values())))} for row, of_row in shares.items()}


def load(folder: Path) -> VideoNSAForConditionalGeneration:
    return VideoNSAForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()


def ablations(folder: Path, seed: int, num_samples: int, scratch: Path) -> dict[str, dict[str, float]]:
    """The rows of the table, by name."""
    model, processor = load(folder), VideoNSAProcessor.from_pretrained(folder, trust_remote_code=True)
    rows = ROWS | {f"without {branch}": partial(without, branches=(branch,)) for branch in BRANCHES}
    rows |= {"without all three": partial(without, branches=BRANCHES), "dense": partial(settings, nsa_mode="dense")}
    for name in ("block_counts", "window_size"):
        trained = getattr(model.config, name)
        for value in (max(1, trained // 2), 2 * trained):
            rows[f"{name} {value} (trained {trained})"] = partial(settings, **{name: value})
    results = {}
    for factor in tqdm((1, 2, 4, 8), desc="Lengths"):
        held_out = HeldOut(processor, seed, factor * SECONDS, num_samples, scratch)
        some = rows if factor == 1 else {f"{factor}x longer videos": nullcontext}
        results |= held_out.accuracy(model, some)
    return results


def comparison(dense: Path, sparse: Path, seed: int, num_samples: int, scratch: Path) -> dict[str, dict[str, float]]:
    """Trained densely, trained sparsely, and the latter's weights run densely."""
    processor = VideoNSAProcessor.from_pretrained(sparse, trust_remote_code=True)
    held_out = HeldOut(processor, seed, SECONDS, num_samples, scratch)
    results = {}
    for name, folder, mode in (
        ("trained dense, run dense", dense, "dense"),
        ("trained sparse, run sparse", sparse, "sparse"),
        ("trained sparse, run dense", sparse, "dense"),
    ):
        results |= held_out.accuracy(load(folder), {name: partial(settings, nsa_mode=mode)})
    return results


def to_table(results: dict[str, dict[str, float]]) -> str:
    """Markdown."""
    columns = list(next(iter(results.values())))
    lines = ["| | " + " | ".join(columns) + " |", "|---" * (1 + len(columns)) + "|"]
    for name, shares in results.items():
        lines.append(f"| {name} | " + " | ".join(f"{shares[column]:.0%}" for column in columns) + " |")
    return "\n".join(lines)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description="Measure the tiny checkpoint on drawn videos.")
    parser.add_argument("checkpoints", type=Path, nargs="+")
    parser.add_argument("--compare", action="store_true", help="the two checkpoints: trained dense, trained sparse")
    parser.add_argument("--samples", type=int, default=100, help="videos for each kind of question (%(default)s)")
    parser.add_argument("--seed", type=int, default=1, help="of the videos (%(default)s)")
    parser.add_argument("--output", type=Path, help="JSON file")
    arguments = parser.parse_args()
    if len(arguments.checkpoints) != 1 + arguments.compare:
        parser.error(f"give one checkpoint, or two with --compare, got {len(arguments.checkpoints)}")
    for folder in arguments.checkpoints:
        if not (folder / "config.json").is_file():
            parser.error(f"no checkpoint: {folder}")
    if arguments.samples < 1:
        parser.error(f"--samples must be positive, got {arguments.samples}")
    if arguments.seed < 0:
        parser.error(f"--seed must not be negative, got {arguments.seed}")
    measure = comparison if arguments.compare else ablations
    with tempfile.TemporaryDirectory() as scratch:
        results = measure(*arguments.checkpoints, arguments.seed, arguments.samples, Path(scratch))
    print(to_table(results))
    if arguments.output:
        record = {"seed": arguments.seed, "samples_per_kind": arguments.samples, "torch": torch.__version__}
        record["accuracy"] = results
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        arguments.output.write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main()
