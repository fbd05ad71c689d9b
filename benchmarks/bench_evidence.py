"""Whether evidence points at what an answer came from, measured with the tiny checkpoint on drawn videos.

    python benchmarks/bench_evidence.py checkpoints/tiny --output benchmarks/results/DATE_evidence.json

Every video is drawn afresh, encoded with h264, read once, and asked one question of every kind. `synthetic/scenes.py`
says at which seconds the cards are that the answer follows from; a moment is a second here.

- **Pointing**: how often the strongest moment is one of these seconds, and how often one of the three strongest is; by
  chance, and by several rules of averaging. The rule is chosen on one set of videos and reported on another one. Only
  questions that are answered right count.
- **Second hop**: where the strongest moment is a right one, and others lie before the blocks of its own tokens: how
  often the block of the largest weight holds one of them, and how often any earlier block would.
- **Faithfulness**: a tenth of the moments is replaced by blank cards, so that the length and all times stay, and the
  question is asked again: how often the answer is another one, for the strongest moments, the weakest, and random ones.
- **Cost**: CPU seconds of `ask` with and without evidence, and of the second hop, with the tiny checkpoint; and of the
  shares of one layer in the shape of Qwen2.5-VL-7B.
"""

import argparse
import datetime
import json
import math
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "checkpoints"), str(ROOT / "benchmarks")]

import numpy as np  # noqa: E402
import torch  # noqa: E402
from bench_cpu import describe_cpu  # noqa: E402
from evaluate_tiny import BATCH, load  # noqa: E402
from tqdm import tqdm  # noqa: E402

from evidence_videonsa import evidence_observer, head_tiles, segments_of, text_shares  # noqa: E402
from generation_videonsa import CACHE_NAME  # noqa: E402
from kv_budget_videonsa import precise  # noqa: E402
from processing_videonsa import VideoNSAProcessor  # noqa: E402
from second_hop_videonsa import selected_blocks  # noqa: E402
from synthetic.drawing import draw_card, write_scene  # noqa: E402
from synthetic.scenes import KINDS, Card, Question, make_scene  # noqa: E402

FPS = 2
REMOVED = 0.1
OURS, ROW, LAST = "by values, handed on", "answer's row", "last layer"
RANDOM_DRAWS = 3


@dataclass
class Seen:
    """What a question's rows attended to.

    Attributes:
        heads: (layers, heads, rows, moments + 2 + rows), shares of attention: each moment, images, text before, and
            each of the rows.
        by_value: the same, where each key counts by the length of its value.
        shares: (rows, moments + 2), by the rule of `evidence_videonsa`.
        answer: the most likely token.
    """

    heads: np.ndarray
    by_value: np.ndarray
    shares: np.ndarray
    answer: int

    @property
    def moments(self) -> int:
        return self.shares.shape[1] - 2


def head_sums(query: torch.Tensor, keys: torch.Tensor, segments: torch.Tensor, count: int, *rest) -> torch.Tensor:
    """All that `head_tiles` gives: (num_heads, rows, count)."""
    num_heads, rows = query.shape[1:3]
    result = torch.empty(keys.shape[1], num_heads // keys.shape[1], rows, count, dtype=precise(keys))
    for head, part, sums in head_tiles(query, keys, segments, count, *rest):
        result[head, :, part] = sums.cpu()
    return result.flatten(0, 1)


@torch.no_grad()
def look(reading, question: str) -> Seen:
    with reading.prompt(question) as inputs, evidence_observer(reading.model, True) as queries:
        first = inputs[CACHE_NAME].get_seq_length()
        inputs["input_ids"] = inputs["input_ids"][:, first:]
        logits = reading.model(**inputs, logits_to_keep=1).logits[0, -1]
        segments, count = segments_of(reading)
        layers, joined = reading.cache.layers, queries.joined()
        shares = text_shares(reading.model, joined, layers, segments, count, first)
        segments = segments.clone()
        segments[first:] = torch.arange(count, count + len(shares))
        sizes = segments, count + len(shares), first, joined[0].shape[-1] ** -0.5
        pairs = [*zip(joined, layers, strict=True)]
        heads = torch.stack([head_sums(query, layer.keys, *sizes) for query, layer in pairs])
        by_value = torch.stack([head_sums(query, layer.keys, *sizes, layer.values) for query, layer in pairs])
    return Seen(heads.numpy(), by_value.numpy(), shares.numpy(), int(logits.argmax()))


def handed_on(seen: Seen) -> np.ndarray:
    """The rule without values: every head and layer counts as much as another."""
    layers, count = seen.heads.mean(1), seen.shares.shape[1]
    total = layers[0, -1, : seen.moments].copy()
    for layer in range(1, len(layers)):
        total += layers[layer, -1, : seen.moments]
        total += layers[layer, -1, count:] @ layers[:layer, :, : seen.moments].mean(0)
    return total


def rollout(seen: Seen) -> np.ndarray:
    """Attention rollout (arXiv 2005.00928): each layer's row is half of what it was and half of what it attends to."""
    count, rows = seen.shares.shape[1], len(seen.shares)
    states = np.eye(count + rows)[count:]
    for attention in seen.heads.mean(1):
        new = attention[:, count:] @ states
        new[:, :count] += attention[:, :count]
        states = 0.5 * states + 0.5 * new
    return states[-1, : seen.moments]


RULES: dict[str, Callable[[Seen], np.ndarray]] = {
    OURS: lambda seen: seen.shares[-1, : seen.moments],
    ROW: lambda seen: seen.heads[:, :, -1, : seen.moments].mean((0, 1)),
    "all rows": lambda seen: seen.heads[..., : seen.moments].mean((0, 1, 2)),
    "highest head": lambda seen: seen.heads[:, :, -1, : seen.moments].max(1).mean(0),
    "highest layer": lambda seen: seen.heads[:, :, -1, : seen.moments].mean(1).max(0),
    "middle layers": lambda seen: seen.heads[1:-1, :, -1, : seen.moments].mean((0, 1)),
    LAST: lambda seen: seen.heads[-1, :, -1, : seen.moments].mean(0),
    "by values": lambda seen: seen.by_value[:, :, -1, : seen.moments].mean((0, 1)),
    "handed on": handed_on,
    "rollout": rollout,
}


def strongest(scores: np.ndarray, count: int) -> list[int]:
    return np.argsort(-scores, kind="stable")[:count].tolist()


class Tally:
    """Successes of tries."""

    def __init__(self):
        self.hits = self.tries = self.expected = 0.0

    def add(self, hit: bool | float, expected: float = 0.0) -> None:
        self.hits, self.tries, self.expected = self.hits + hit, self.tries + 1, self.expected + expected

    def to_dict(self) -> dict:
        """share, its 95 % Wilson interval, tries, and what chance would give."""
        if not self.tries:
            return {"share": None, "low": None, "high": None, "tries": 0, "chance": None}
        share, n, z = self.hits / self.tries, self.tries, 1.96
        middle = (share + z * z / (2 * n)) / (1 + z * z / n)
        reach = z * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n)) / (1 + z * z / n)
        return {
            "share": round(share, 4),
            "low": round(max(0.0, middle - reach), 4),
            "high": round(middle + reach, 4),
            "tries": int(n),
            "chance": round(self.expected / n, 4),
        }


class Measurement:
    """Drawn videos, each asked one question of every kind."""

    def __init__(self, model, processor, seed: int, seconds: int, num_videos: int):
        self.model, self.processor, self.seconds, self.num_videos = model, processor, seconds, num_videos
        self.rng = np.random.default_rng([seed, seconds])
        self.removed = max(1, round(REMOVED * seconds))
        self.right = {kind: Tally() for kind in KINDS}
        self.pointing = {rule: {top: {kind: Tally() for kind in KINDS} for top in ("1", "3")} for rule in RULES}
        self.second_hop = {kind: Tally() for kind in KINDS}
        names = (OURS, ROW, LAST, "weakest", "random")
        self.changed = {name: {kind: Tally() for kind in KINDS} for name in names}

    def run(self, only_pointing: bool) -> None:
        with tempfile.TemporaryDirectory() as scratch:
            for _ in tqdm(range(self.num_videos), desc="Videos"):
                scene = make_scene(self.rng, self.seconds, *KINDS)
                path = write_scene(Path(scratch) / "video.mp4", scene, self.rng)
                reading = self.model.read(self.processor, path, fps=FPS, progress=False)
                questions = scene.one_question_of_each_kind(self.rng)
                seen = [look(reading, question.text) for question in questions]
                pairs = [*zip(questions, seen, strict=True)]
                for question, one in pairs:
                    is_right = one.answer == self._token(question)
                    self.right[question.kind].add(is_right)
                    if is_right:
                        self._point(question, one)
                        if not only_pointing:
                            self._look_behind(reading, question, one)
                if not only_pointing:
                    self._remove(reading, pairs)

    def _token(self, question: Question) -> int:
        (token,) = self.processor.tokenizer(question.answer)["input_ids"]
        return token

    def _point(self, question: Question, seen: Seen) -> None:
        count, moments = len(question.seconds), seen.moments
        for top, size in (("1", 1), ("3", 3)):
            missed = math.comb(moments - count, size) / math.comb(moments, size)
            for rule, of in RULES.items():
                hit = bool(set(strongest(of(seen), size)) & set(question.seconds))
                self.pointing[rule][top][question.kind].add(hit, 1 - missed)

    @torch.no_grad()
    def _look_behind(self, reading, question: Question, seen: Seen) -> None:
        (moment,) = strongest(RULES[OURS](seen), 1)
        size, tokens = self.model.config.block_size, self._tokens_per_step(reading)
        first_own = moment * tokens // size * size // tokens
        others = {second for second in question.seconds if second < first_own}
        if moment not in question.seconds or not others:
            return
        with reading.exclusive():
            (blocks,) = selected_blocks(reading, 0, [moment])
        holds = {place.step for place in blocks[0].places} & others
        candidates = [set(range(first, first + size // tokens)) for first in range(0, first_own, size // tokens)]
        self.second_hop[question.kind].add(bool(holds), float(np.mean([bool(one & others) for one in candidates])))

    def _tokens_per_step(self, reading) -> int:
        height, width = reading.frames[0]
        return height * width

    def _remove(self, reading, pairs: list[tuple[Question, Seen]]) -> None:
        """Ask again without a tenth of the moments."""
        video = reading.videos[0]
        frames = video.frames(self.processor, range(len(video.times))).permute(0, 2, 3, 1).numpy()
        draws = [self.rng.choice(self.seconds, self.removed, replace=False) for _ in range(RANDOM_DRAWS)]
        jobs = []  # (name, question, moments)
        for question, seen in pairs:
            chosen = {name: strongest(RULES[name](seen), self.removed) for name in (OURS, ROW, LAST)}
            chosen["weakest"] = strongest(-RULES[OURS](seen), self.removed)
            jobs += [("", question, [])]  # of the decoded pictures, in whose copies nothing else changes
            jobs += [(name, question, moments) for name, moments in chosen.items()]
            jobs += [("random", question, moments.tolist()) for moments in draws]
        shown: dict[tuple[int, ...], np.ndarray] = {}
        for _, _, moments in jobs:
            key = tuple(sorted(moments))
            shown.setdefault(key, self._without(frames, key))
        cases = [*dict.fromkeys((tuple(sorted(moments)), question.text) for _, question, moments in jobs)]
        answers = {}
        for start in range(0, len(cases), BATCH):
            some = cases[start : start + BATCH]
            answers |= zip(some, self._answers([(shown[key], text) for key, text in some]), strict=True)
        for name, question, moments in jobs:
            if name:
                answer = answers[tuple(sorted(moments)), question.text]
                self.changed[name][question.kind].add(answer != answers[(), question.text])

    @torch.inference_mode()
    def _answers(self, cases: list[tuple[np.ndarray, str]]) -> list[int]:
        """The most likely tokens, of whole prompts in one call."""
        parts = [
            [{"type": "video", "video": pictures, "fps": FPS}, {"type": "text", "text": text}]
            for pictures, text in cases
        ]
        inputs = self.processor.apply_chat_template(
            [[{"role": "user", "content": content}] for content in parts],
            tokenize=True,
            add_generation_prompt=True,
            return_dict=True,
            return_tensors="pt",
            padding=True,
        )
        return self.model(**inputs, logits_to_keep=1).logits[:, -1].argmax(-1).tolist()

    def _without(self, frames: np.ndarray, moments) -> np.ndarray:
        frames = frames.copy()
        for moment in moments:
            frames[FPS * moment : FPS * (moment + 1)] = draw_card(Card("blank"), self.rng, frames.shape[1], FPS)
        return frames

    def results(self) -> dict:
        def by_kind(tallies: dict[str, Tally]) -> dict:
            of_kind = {kind: tally.to_dict() for kind, tally in tallies.items()}
            known = [one for one in of_kind.values() if one["share"] is not None]
            means = {name: round(float(np.mean([one[name] for one in known])), 4) for name in ("share", "chance")}
            return of_kind | ({"mean": means} if known else {})

        result = {
            "right_answers": by_kind(self.right),
            "pointing": {
                rule: {f"top_{top}": by_kind(tallies) for top, tallies in of_rule.items()}
                for rule, of_rule in self.pointing.items()
            },
        }
        if any(tally.tries for tally in self.changed[OURS].values()):
            result["second_hop"] = by_kind(self.second_hop)
            result["changed_answers"] = {name: by_kind(tallies) for name, tallies in self.changed.items()}
        return result


def cost(model, processor, repeats: int = 3) -> dict:
    """CPU seconds, the least of some repeats: other programs on the machine do not count."""
    found: dict = {"ask": [], "layer_of_7b": []}
    card = np.random.default_rng(0).integers(0, 256, (64, 112, 112, 3), np.uint8)  # 16 tokens a second
    for seconds in (64, 512, 4096):
        video = np.concatenate([card] * (FPS * seconds // 64))
        options = {"fps": FPS, "max_pixels_per_frame": 112 * 112, "progress": False}
        reading = model.read(processor, video, **options)
        ask = lambda evidence, reading=reading: reading.ask(  # noqa: E731
            "How many stars are there?", max_new_tokens=8, min_new_tokens=8, evidence=evidence
        )
        answer = ask(True)
        times = {
            "without": _least(lambda ask=ask: ask(False), repeats),
            "with": _least(lambda ask=ask: ask(True), repeats),
            "frames": _least(lambda answer=answer: answer.evidence.frames(5), repeats),
            "second_hop": _least(lambda answer=answer: answer.evidence.second_hop(5), repeats),
        }
        rows = answer.prompt_tokens + len(answer.token_ids) - 1
        found["ask"].append({"tokens": reading.num_tokens, "rows": rows, "cpu_seconds": times})
    for length in (8192, 65536):
        generator = torch.Generator().manual_seed(0)
        query = torch.randn(1, 28, 64, 128, generator=generator, dtype=torch.bfloat16)
        keys, values = torch.randn(2, 1, 4, length, 128, generator=generator, dtype=torch.bfloat16)
        segments = torch.arange(length) // 64
        sizes = segments, int(segments[-1]) + 1, length - 64, 128**-0.5
        run = lambda q=query, k=keys, v=values, s=sizes: head_sums(q, k, *s, v)  # noqa: E731
        found["layer_of_7b"].append({"tokens": length, "rows": 64, "cpu_seconds": _least(run, repeats)})
    return found


def _least(run: Callable, repeats: int) -> float:
    times = []
    for _ in range(repeats):
        start = time.process_time()
        run()
        times.append(time.process_time() - start)
    return round(min(times), 4)


def to_table(results: dict) -> str:
    """Markdown: the rules on both sets; then the rule by kind; then faithfulness by kind."""
    lines = ["| rule | chosen on: top 1 | top 3 | reported on: top 1 | top 3 |", "|---" * 5 + "|"]
    sets = [results[name]["pointing"] for name in ("choosing", "reporting")]
    for rule in RULES:
        cells = [f"{of[rule][top]['mean']['share']:.0%}" for of in sets for top in ("top_1", "top_3")]
        lines.append(f"| {rule} | " + " | ".join(cells) + " |")
    chances = [f"{of[OURS][top]['mean']['chance']:.0%}" for of in sets for top in ("top_1", "top_3")]
    lines.append("| chance | " + " | ".join(chances) + " |")
    report = results["reporting"]
    rows = {"answers right": report["right_answers"]}
    for rule in (OURS, LAST):
        rows |= {f"{rule}, {top}": report["pointing"][rule][f"top_{top[-1]}"] for top in ("top 1", "top 3")}
    lines += ["", *_by_kind_table(rows, report["pointing"][OURS])]
    if "changed_answers" in report:
        lines += ["", *_by_kind_table({"second hop": report["second_hop"]}, {"of": report["second_hop"]})]
        lines += ["", *_by_kind_table(report["changed_answers"], {})]
    return "\n".join(lines)


def _by_kind_table(rows: dict[str, dict], chances: dict[str, dict]) -> list[str]:
    columns = [*KINDS, "mean"]
    lines = ["| | " + " | ".join(columns) + " |", "|---" * (1 + len(columns)) + "|"]
    for name, of_kind in rows.items():
        lines.append(f"| {name} | " + " | ".join(_cell(of_kind.get(kind, {})) for kind in columns) + " |")
    for name, of_kind in chances.items():
        cells = [of_kind.get(kind, {}).get("chance") for kind in columns]
        cells = ["-" if cell is None else f"{cell:.0%}" for cell in cells]
        lines.append(f"| chance, {name.replace('_', ' ')} | " + " | ".join(cells) + " |")
    return lines


def _cell(of: dict) -> str:
    if of.get("share") is None:
        return "-"
    return f"{of['share']:.0%}" + (f" ({of['low']:.0%} to {of['high']:.0%})" if "low" in of else "")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--videos", type=int, default=60, help="each is asked a question of every kind (%(default)s)")
    parser.add_argument("--seconds", type=int, default=32, help="length of the videos (%(default)s)")
    parser.add_argument("--choosing-seed", type=int, default=11, help="of the videos that chose (%(default)s)")
    parser.add_argument("--seed", type=int, default=21, help="of the videos that are reported (%(default)s)")
    parser.add_argument("--no-cost", action="store_true", help="leave the seconds out")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--output", type=Path, help="JSON file")
    arguments = parser.parse_args()
    if not (arguments.checkpoint / "config.json").is_file():
        parser.error(f"no checkpoint: {arguments.checkpoint}")
    for name in ("videos", "threads"):
        if getattr(arguments, name) < 1:
            parser.error(f"--{name} must be positive, got {getattr(arguments, name)}")
    for name in ("seed", "choosing_seed"):
        if getattr(arguments, name) < 0:
            parser.error(f"--{name.replace('_', '-')} must not be negative, got {getattr(arguments, name)}")
    if arguments.seconds < 16:
        parser.error(f"--seconds must be at least 16, got {arguments.seconds}")
    torch.set_num_threads(arguments.threads)
    start = time.perf_counter()
    model = load(arguments.checkpoint)
    processor = VideoNSAProcessor.from_pretrained(arguments.checkpoint, trust_remote_code=True)
    results = {}
    for name, seed in (("choosing", arguments.choosing_seed), ("reporting", arguments.seed)):
        measurement = Measurement(model, processor, seed, arguments.seconds, arguments.videos)
        measurement.run(only_pointing=name == "choosing")
        results[name] = measurement.results()
    print(to_table(results))
    if not arguments.no_cost:
        results["cost"] = cost(model, processor)
        print(json.dumps(results["cost"], indent=1))
    if arguments.output:
        machine = describe_cpu("torch", "transformers")
        settings = {name: str(value) for name, value in vars(arguments).items() if name != "output"}
        record = {
            "date": datetime.date.today().isoformat(),
            "command": " ".join(["benchmarks/bench_evidence.py", *sys.argv[1:]]),
        }
        record |= {"machine": machine, "settings": settings, "wall_seconds": round(time.perf_counter() - start)}
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        arguments.output.write_text(json.dumps(record | results, indent=1) + "\n")


if __name__ == "__main__":
    main()
