"""Ask a VideoNSA model about a video, on a CPU if need be.

    python demo/run_demo.py
    python demo/run_demo.py --model path/or/hub-id --video my.mp4 --question "What happens at the end?"

Without a video, the model is asked one question of each kind about `demo/scene.mp4` and about a video drawn on the spot
(`synthetic/scenes.py` says what they show), and its answers are printed beside the right ones. Without `--model`, it is
the small checkpoint that comes with this repository, which knows drawn videos only. Where the model looked for one of
its answers is drawn into `demo/output/storyboard.png`.
"""

import argparse
import json
import secrets
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from draw_scene import draw
from transformers import AutoModel, AutoProcessor, TextStreamer

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from attention_budget_videonsa import attention_budget  # noqa: E402
from synthetic.scenes import parse_answer  # noqa: E402

STORYBOARD = ROOT / "demo" / "output" / "storyboard.png"
# Of the questions about demo/scene.mp4, one whose answer lies in several places.
DRAWN_KIND = "count"
BRANCHES = ("compression", "selection", "sliding window")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Ask a VideoNSA model about a video.")
    parser.add_argument("--model", default=ROOT / "checkpoints" / "tiny", help="checkpoint folder or Hub id")
    parser.add_argument("--video", type=Path, help="a video file; default: drawn videos, with a question of each kind")
    parser.add_argument("--question", help="about --video")
    parser.add_argument("--seed", type=int, help="of the video drawn on the spot; default: another one every time")
    parser.add_argument("--fps", type=float, help="frames per second to sample; default: the processor's")
    parser.add_argument("--block-counts", type=int, help="blocks that each token selects; default: the checkpoint's")
    parser.add_argument("--window-size", type=int, help="tokens of the sliding window; default: the checkpoint's")
    parser.add_argument("--max-new-tokens", type=int, default=48)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", default="auto", choices=("auto", "float32", "bfloat16", "float16"))
    arguments = parser.parse_args()
    if (arguments.video is None) != (arguments.question is None):
        parser.error("--video and --question go together")
    if arguments.video is not None and not arguments.video.is_file():
        parser.error(f"--video: no such file: {arguments.video}")
    if arguments.seed is not None and arguments.video is not None:
        parser.error("--seed is of the video drawn on the spot, and goes without --video")
    if arguments.seed is not None and arguments.seed < 0:
        parser.error(f"--seed must not be negative, got {arguments.seed}")
    if arguments.max_new_tokens < 1:
        parser.error(f"--max-new-tokens must be positive, got {arguments.max_new_tokens}")
    return arguments


class Reader:
    """A model with its processor, and the video that it has read last."""

    def __init__(self, arguments: argparse.Namespace):
        name = arguments.model
        self.processor = AutoProcessor.from_pretrained(name, trust_remote_code=True)
        settings = {"block_counts": arguments.block_counts, "window_size": arguments.window_size}
        settings = {key: value for key, value in settings.items() if value is not None}
        self.model = AutoModel.from_pretrained(name, trust_remote_code=True, dtype=arguments.dtype, **settings)
        self.model.to(arguments.device).eval()
        self.sampling = {} if arguments.fps is None else {"fps": arguments.fps}
        self.max_new_tokens = arguments.max_new_tokens

    def read(self, video: Path):
        """A `Reading`, which questions are asked of; `None` where the variant needs a question to read at all."""
        if self.model.config.nsa_variant == "released" and self.model.config.nsa_mode == "sparse":
            return None
        return self.model.read(self.processor, str(video), **self.sampling)

    def ask(
        self, reading, video: Path, question: str, streamer=None, evidence: bool = False
    ) -> tuple[str, torch.Tensor, Any]:
        """The answer, the token types of its prompt, and where the model looked, if that is wanted and there is one."""
        options = {"max_new_tokens": self.max_new_tokens, "do_sample": False, "streamer": streamer}
        if reading is not None:
            answer = reading.ask(question, evidence=evidence, **options)
            types = torch.nn.functional.pad(reading.types, (0, answer.prompt_tokens))
            return answer.text, types, answer.evidence
        content = [{"type": "video", "video": str(video)}, {"type": "text", "text": question}]
        inputs = self.processor.apply_chat_template(
            [{"role": "user", "content": content}],
            tokenize=True,
            add_generation_prompt=True,
            return_dict=True,
            return_tensors="pt",
            **self.sampling,
        ).to(self.model.device)
        with torch.inference_mode():
            output = self.model.generate(**inputs, **options)
        text = self.processor.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        return text, inputs["mm_token_type_ids"][0].cpu(), None


class GateMonitor:
    """Mean gates of the vision tokens that the model reads."""

    def __init__(self, model):
        self.temperature = model.config.gate_temperature
        self.sum, self.count = torch.zeros(3, dtype=torch.float64), 0
        for layer in model.model.language_model.layers:
            layer.self_attn.g_proj_2.register_forward_hook(self.add)

    def add(self, module, inputs, logits):
        gates = torch.sigmoid(logits.double() / self.temperature).unflatten(-1, (-1, 3)).flatten(0, -2)
        self.sum += gates.sum(0).cpu()
        self.count += len(gates)

    def __str__(self) -> str:
        shares = self.sum / self.sum.sum()
        return ", ".join(f"{name} {share:.0%}" for name, share in zip(BRANCHES, shares, strict=True))


class CountingStreamer(TextStreamer):
    """Prints the answer as it comes, and counts its tokens."""

    num_tokens = -1  # the first call brings the prompt
    first = last = 0.0

    def put(self, value):
        super().put(value)
        self.num_tokens += 1
        self.last = time.perf_counter()
        if self.num_tokens == 1:
            self.first = self.last


def ask(reader: Reader, video: Path, question: str) -> None:
    """One question: the answer as it comes, and what it cost."""
    plan = reader.processor.plan_video(str(video), **reader.sampling)
    print(f"Video     {video.name}: {plan.num_frames} frames of {plan.height}x{plan.width}")
    print(f"Question  {question}")
    monitor, start = GateMonitor(reader.model), time.perf_counter()
    reading = reader.read(video)
    streamer = CountingStreamer(reader.processor.tokenizer, skip_prompt=True, skip_special_tokens=True)
    print("Answer    ", end="", flush=True)
    _, types, evidence = reader.ask(reading, video, question, streamer, evidence=True)
    rate = (streamer.num_tokens - 1) / max(streamer.last - streamer.first, 1e-9)
    num_vision, num_text = count_tokens(types)
    print(f"\nTokens    {num_vision} video + {num_text} text, {streamer.num_tokens} generated")
    print(f"Seconds   {streamer.first - start:.1f} to read video and question, then {rate:.1f} tokens a second")
    if monitor.count:
        print(f"Gates     {monitor}")
    print_attention_budget(reader.model.config, types)
    if evidence is not None:
        draw_storyboard(evidence)


def draw_storyboard(evidence) -> None:
    """Where the model looked for an answer, as a picture."""
    STORYBOARD.parent.mkdir(parents=True, exist_ok=True)
    evidence.storyboard(5).save(STORYBOARD)
    print(f"Evidence  {STORYBOARD} shows where the model looked for {evidence.answer.strip()!r}")


def ask_all(reader: Reader, title: str, video: Path, questions: list[dict], drawn: str | None = None):
    """Questions with known answers: a line each. The video is read once. Returns where the model looked for one of the
    kind `drawn`, if there is one."""
    print(f"\n{title}")
    width = max(len(asked["question"]) for asked in questions)
    right, reading, looked = 0, reader.read(video), None
    for asked in questions:
        is_drawn = asked["kind"] == drawn
        answer, types, evidence = reader.ask(reading, video, asked["question"], evidence=is_drawn)
        looked = evidence if is_drawn else looked
        answer = " ".join(answer.split())
        is_right = parse_answer(answer, asked["choices"]) == asked["answer"]
        right += is_right
        verdict = "right" if is_right else f"wrong, it is {asked['answer']}"
        print(f"  {asked['kind']:<10}  {asked['question']:<{width}}  {answer:<7} {verdict}", flush=True)
    print(f"  {right} of {len(questions)} right; {' + '.join(map(str, count_tokens(types)))} video and text tokens")
    return looked


def count_tokens(types: torch.Tensor) -> tuple[int, int]:
    """Video and text tokens of the prompt."""
    return int((types != 0).sum()), int((types == 0).sum())


def print_attention_budget(config, types: torch.Tensor) -> None:
    if config.nsa_variant == "released":
        return  # the budget counts what the paper's attention computes
    settings = {key: getattr(config, key) for key in ("block_size", "block_counts", "window_size")}
    budget = attention_budget(types, **settings)
    print(f"Attention {budget.fraction:.1%} of the dense pairs of query and key ({', '.join(pairs(budget))})")
    if budget.fraction > 1:
        selected = f"{settings['block_counts']} blocks of {settings['block_size']}"
        print(f"          (a video of {count_tokens(types)[0]} tokens is shorter than the {selected} that each token")
        print("          selects: savings begin beyond that)")


def pairs(budget) -> list[str]:
    parts = {"compression": budget.compression, "selection": budget.selection}
    parts |= {"window": budget.window, "text": budget.text}
    return [f"{name} {count / budget.dense:.1%}" for name, count in parts.items()]


def main() -> None:
    arguments = parse_arguments()
    reader = Reader(arguments)
    if arguments.video is not None:
        ask(reader, arguments.video, arguments.question)
        return
    questions = json.loads((ROOT / "demo" / "scene.json").read_text())
    looked = ask_all(reader, "demo/scene.mp4", ROOT / "demo" / "scene.mp4", questions, DRAWN_KIND)
    seed = secrets.randbelow(1_000_000) if arguments.seed is None else arguments.seed
    with tempfile.TemporaryDirectory() as folder:
        video = Path(folder) / "scene.mp4"
        questions = draw(video, seed)
        ask_all(reader, f"A video drawn just now (`--seed {seed}` draws it again)", video, questions)
    if looked is not None:
        print()
        draw_storyboard(looked)


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError, ImportError) as error:
        raise SystemExit(f"run_demo.py: error: {error}") from error
