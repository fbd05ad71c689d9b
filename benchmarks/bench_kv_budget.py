"""What a budget for the key-value cache costs the tiny checkpoint: right answers against the share kept, by method.

    python benchmarks/bench_kv_budget.py checkpoints/tiny --output benchmarks/results/DATE_kv_budget.json

Every video is drawn afresh, encoded with h264 and read once for each method and share, up to its last token; then it is
asked one question of every kind over what is left of the cache. An answer is right where the most likely next token is
the right word. Methods are told nothing of the questions, but for the rows "after the question": there it is read with
the video, as in the papers of SnapKV and PyramidKV, and its last token asks.

The observation window is 8 tokens here, two seconds; the methods' own, 64, would be all of the smaller budgets. Where a
method needs more than a share has, the table has a dash.
"""

import argparse
import datetime
import json
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "checkpoints"), str(ROOT / "benchmarks")]

import numpy as np  # noqa: E402
import torch  # noqa: E402
from bench_cpu import describe_cpu  # noqa: E402
from evaluate_tiny import load  # noqa: E402
from tqdm import tqdm  # noqa: E402

from cache_videonsa import RoomyCache, restored_after  # noqa: E402
from generation_videonsa import CACHE_NAME  # noqa: E402
from kv_budget_videonsa import KV_METHODS, KvMethod, kv_method  # noqa: E402
from prefill_videonsa import Prefilled, Reporter  # noqa: E402
from processing_videonsa import VideoNSAProcessor  # noqa: E402
from prompt_videonsa import Piece  # noqa: E402
from synthetic.drawing import write_scene  # noqa: E402
from synthetic.scenes import KINDS, make_scene  # noqa: E402

SHARES = (1.0, 0.5, 0.25, 0.12, 0.06, 0.03)
# The only method that looks at chunks reads the video in chunks of so many tokens, 16 seconds.
CHUNK = 64
WITH_WINDOW = ("pyramidkv", "snapkv")
AFTER_QUESTION = ", after the question"


@torch.inference_mode()
def read(model, inputs: dict, method: KvMethod, chunk: int = CHUNK) -> Prefilled:
    """Read a prompt with one video, `chunk` tokens at a time, and keep what the method chooses.

    Raises:
        ValueError: the method's budget is too small for this prompt.
    """
    ids, types, grid = inputs["input_ids"], inputs["mm_token_type_ids"], inputs["video_grid_thw"]
    merge = model.model.visual.spatial_merge_size
    frames = [(height // merge, width // merge) for steps, height, width in grid.tolist() for _ in range(steps)]
    method.expect(ids.shape[1], int((types == 0).sum()), frames)
    seconds = inputs.get("second_per_grid_ts")
    positions, _ = model.model.get_rope_index(ids, types, video_grid_thw=grid, second_per_grid_ts=seconds)
    prefilled = Prefilled(model, RoomyCache(model.config.text_config.num_hidden_layers), method)
    pieces = iter([Piece(inputs["pixel_values_videos"], grid, 0, None)])
    prefilled.prefill(ids[0], types[0], positions, pieces, chunk, Reporter(0, ids.shape[1], False, None))
    return prefilled


@torch.inference_mode()
def ask(model, reading: Prefilled, ids: torch.Tensor) -> torch.Tensor:
    """Logits (length, vocab_size) of the tokens `ids` (1, length) after a reading, which stays as it is."""
    positions = (reading.next_position + torch.arange(ids.shape[1])).expand(3, 1, -1)
    with restored_after(reading.cache):
        return model(input_ids=ids, position_ids=positions, **{CACHE_NAME: reading.cache}).logits[0]


class HeldOutVideo:
    """A freshly drawn video and one question of every kind.

    Attributes:
        prefix: the processor's inputs up to the last token of the video.
        questions: of each kind, the tokens after that, (1, length), and the token of the right answer.
    """

    def __init__(self, processor, rng: np.random.Generator, seconds: int, folder: Path):
        scene = make_scene(rng, seconds, *KINDS)
        video = {"type": "video", "video": str(write_scene(folder / "video.mp4", scene, rng))}
        end = processor.tokenizer.convert_tokens_to_ids("<|vision_end|>")
        self.questions = {}
        for question in scene.one_question_of_each_kind(rng):
            messages = [{"role": "user", "content": [video, {"type": "text", "text": question.text}]}]
            text = processor.apply_chat_template(messages, add_generation_prompt=True)
            ids = processor.tokenizer(text)["input_ids"]
            (answer,) = processor.tokenizer(question.answer)["input_ids"]
            self.questions[question.kind] = torch.tensor([ids[ids.index(end) :]]), answer
        options = {"tokenize": True, "return_dict": True, "return_tensors": "pt"}
        self.prefix = dict(processor.apply_chat_template([{"role": "user", "content": [video]}], **options))
        length = self.prefix["input_ids"][0].tolist().index(end)
        for name in ("input_ids", "mm_token_type_ids"):
            self.prefix[name] = self.prefix[name][:, :length]


def answers(model, video: HeldOutVideo, row: str, share: float, window: int) -> dict[str, bool] | None:
    """Which kinds of questions are answered right; `None` where the budget is refused."""
    name = row.removesuffix(AFTER_QUESTION)
    options = {"window": window} if name in WITH_WINDOW else {}
    method = kv_method(name, share, model.config.text_config.num_hidden_layers, **options)
    chunk = CHUNK if name == "infinipot-v" else video.prefix["input_ids"].shape[1] + 1000
    right = {}
    try:
        if row == name:
            reading = read(model, video.prefix, method, chunk)
        for kind, (question, answer) in video.questions.items():
            if row != name:
                longer = {"input_ids": question[:, :-1], "mm_token_type_ids": torch.zeros_like(question[:, :-1])}
                longer = {key: torch.cat([video.prefix[key], part], dim=1) for key, part in longer.items()}
                reading, question = read(model, video.prefix | longer, method, chunk), question[:, -1:]
            right[kind] = int(ask(model, reading, question)[-1].argmax()) == answer
    except ValueError as error:
        if "`kv_budget`" not in str(error):
            raise
        return None
    return right


def measure(folder: Path, seed: int, seconds: int, num_videos: int, window: int) -> dict[str, dict[str, dict | None]]:
    """Shares of right answers: method -> share kept -> kind of question, and "mean"."""
    model, processor = load(folder), VideoNSAProcessor.from_pretrained(folder, trust_remote_code=True)
    rng = np.random.default_rng([seed, seconds])
    rows = [*KV_METHODS, "pyramidkv" + AFTER_QUESTION]
    found: dict[str, dict[str, list]] = {row: {f"{share:g}": [] for share in SHARES} for row in rows}
    with tempfile.TemporaryDirectory() as scratch:
        for _ in tqdm(range(num_videos), desc="Videos"):
            video = HeldOutVideo(processor, rng, seconds, Path(scratch))
            for row in rows:
                for share in SHARES:
                    found[row][f"{share:g}"].append(answers(model, video, row, share, window))
    return {row: {share: _accuracy(of_videos) for share, of_videos in of_row.items()} for row, of_row in found.items()}


def _accuracy(of_videos: list[dict[str, bool] | None]) -> dict[str, float] | None:
    if None in of_videos:
        return None
    of_kind = {kind: float(np.mean([right[kind] for right in of_videos])) for kind in KINDS}
    return of_kind | {"mean": float(np.mean(list(of_kind.values())))}


def to_table(accuracy: dict) -> str:
    """Markdown."""
    columns = [*KINDS, "mean"]
    lines = ["| method | kept | " + " | ".join(columns) + " |", "|---" * (2 + len(columns)) + "|"]
    for row, of_row in accuracy.items():
        for share, of_kind in of_row.items():
            cells = [f"{of_kind[column]:.0%}" if of_kind else "-" for column in columns]
            lines.append(f"| {row} | {float(share):.0%} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--videos", type=int, default=50, help="each is asked a question of every kind (%(default)s)")
    parser.add_argument("--seconds", type=int, default=128, help="length of the videos (%(default)s)")
    parser.add_argument("--window", type=int, default=8, help="of SnapKV and PyramidKV, in tokens (%(default)s)")
    parser.add_argument("--seed", type=int, default=1, help="of videos and questions (%(default)s)")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--output", type=Path, help="JSON file")
    arguments = parser.parse_args()
    if not (arguments.checkpoint / "config.json").is_file():
        parser.error(f"no checkpoint: {arguments.checkpoint}")
    for name in ("videos", "window", "threads"):
        if getattr(arguments, name) < 1:
            parser.error(f"--{name} must be positive, got {getattr(arguments, name)}")
    if arguments.seed < 0:
        parser.error(f"--seed must not be negative, got {arguments.seed}")
    if arguments.seconds < 16:
        parser.error(f"--seconds must be at least 16, got {arguments.seconds}")
    torch.set_num_threads(arguments.threads)
    start = time.perf_counter()
    accuracy = measure(arguments.checkpoint, arguments.seed, arguments.seconds, arguments.videos, arguments.window)
    print(to_table(accuracy))
    if arguments.output:
        machine = describe_cpu("torch", "transformers")
        settings = {name: str(value) for name, value in vars(arguments).items() if name != "output"}
        record = {
            "date": datetime.date.today().isoformat(),
            "command": " ".join(["benchmarks/bench_kv_budget.py", *sys.argv[1:]]),
        }
        record |= {"machine": machine, "settings": settings, "wall_seconds": round(time.perf_counter() - start)}
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        arguments.output.write_text(json.dumps(record | {"accuracy": accuracy}, indent=1) + "\n")


if __name__ == "__main__":
    main()
