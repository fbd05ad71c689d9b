"""What transformers answers, for the tests of the vLLM plug-in; runs in the main environment.

    python vllm_plugin/tests/reference.py FOLDER

writes into FOLDER

- `tiny/` and `noisy/`: the small checkpoint, and a copy with noise on every weight, so that heads differ and it says
  something else of every prompt;
- `videos/`, `images/`: drawn on the spot;
- `reference.json`: for every case the messages, the tokens of the prompt, the greedy answer in float32, its
  log-probabilities in float32 and float64, and the answer of the same weights with dense attention.
"""

import argparse
import json
import sys
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from transformers import AutoModel, AutoProcessor, LogitsProcessor

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from synthetic.drawing import write_scene  # noqa: E402
from synthetic.scenes import make_scene  # noqa: E402

TINY = ROOT / "checkpoints" / "tiny"
NEW_TOKENS = 8
# Steps at which the two best tokens are nearer to each other than this say nothing about equality: such a case is bad.
MARGIN = 1e-3


def draw_videos(folder: Path) -> dict[str, Path]:
    """Videos of several lengths, and two sizes; the name says the seconds."""
    folder.mkdir(exist_ok=True)
    videos = {"scene": ROOT / "demo" / "scene.mp4"}
    for seconds, size in ((8, 56), (13, 56), (21, 56), (40, 84), (300, 56)):
        rng = np.random.default_rng(seconds)
        videos[str(seconds)] = write_scene(folder / f"{seconds}.mp4", make_scene(rng, seconds), rng, size=size)
    return videos


def draw_images(folder: Path) -> dict[str, Path]:
    folder.mkdir(exist_ok=True)
    paths = {}
    for seed in range(2):
        paths[str(seed)] = folder / f"{seed}.png"
        pixels = np.random.default_rng(seed).integers(0, 256, (56, 84, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(paths[str(seed)])
    return paths


def make_cases(videos: dict[str, Path], images: dict[str, Path]) -> list[dict]:
    """Content of one message of the user each, in the form of the OpenAI API, and options of the processor."""

    def video(name):
        return {"type": "video_url", "video_url": {"url": videos[name].as_uri()}}

    def image(name):
        return {"type": "image_url", "image_url": {"url": images[name].as_uri()}}

    def text(words):
        return {"type": "text", "text": words}

    demo = json.loads((ROOT / "demo" / "scene.json").read_text())
    cases = [
        {
            "name": f"demo {asked['kind']}",
            "content": [video("scene"), text(asked["question"])],
            "answer": asked["answer"],
        }
        for asked in demo
    ]
    ask = text("How many stars are there?")
    shapes = {
        "text": [text("hello")],
        "image": [image("0"), ask],
        "short video": [video("8"), ask],
        "two videos": [video("8"), text("and"), video("13"), ask],
        "side by side": [video("13"), video("8"), ask],
        "videos and images": [image("1"), video("21"), image("0"), text("then"), video("8"), video("40"), ask],
        "text before": [text("Look at this with care, please. " * 12), video("40"), ask],
        "long": [video("300"), ask],
    }
    cases += [{"name": name, "content": content} for name, content in shapes.items()]
    for options in ({"fps": 1}, {"fps": 3.7}, {"num_frames": 10}, {"max_pixels_per_frame": 3136 * 4}):
        cases.append({"name": f"options {options}", "content": [video("21"), ask], "options": options})
    cases.append({"name": "longest", "content": [video("300"), ask], "options": {"fps": 4}})
    # A placeholder that the model generates is text, whatever it stands for in prompts.
    cases.append({"name": "generated video tokens", "content": [video("21"), ask], "forced": "<|video_pad|>"})
    cases.append(
        {"name": "budget", "content": [video("40"), video("21"), video("13"), ask], "options": {"max_total_tokens": 60}}
    )
    return cases


def for_transformers(content: list[dict]) -> list[dict]:
    """The content with the paths where the API has file URIs, since transformers reads these from "video"."""
    parts = []
    for part in content:
        if part["type"] == "text":
            parts.append(part)
        else:
            kind = part["type"].removesuffix("_url")
            parts.append({"type": kind, kind: part[part["type"]]["url"]})
    return parts


def save_checkpoints(folder: Path) -> None:
    """`tiny/` as it is in the repository, and `noisy/`, both in float32."""
    processor = AutoProcessor.from_pretrained(TINY, trust_remote_code=True)
    model = AutoModel.from_pretrained(TINY, trust_remote_code=True, dtype=torch.float32)
    for name in ("tiny", "noisy"):
        if name == "noisy":
            generator = torch.Generator().manual_seed(0)
            with torch.no_grad():
                for weight in model.parameters():
                    weight.add_(torch.randn(weight.shape, generator=generator) * weight.std(), alpha=0.3)
        model.save_pretrained(folder / name)
        processor.save_pretrained(folder / name)


class Forced(LogitsProcessor):
    """Lets nothing but one token be generated; `output_logits` are those before it."""

    def __init__(self, token: int):
        self.token = token

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        return torch.full_like(scores, -torch.inf).index_fill_(1, torch.tensor([self.token]), 0.0)


class Reference:
    """One checkpoint in float32 and float64."""

    def __init__(self, folder: Path):
        self.processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
        self.models = {
            dtype: AutoModel.from_pretrained(folder, trust_remote_code=True, dtype=dtype).eval()
            for dtype in (torch.float32, torch.float64)
        }
        for model in self.models.values():
            model.generation_config.eos_token_id = 10**6  # `ignore_eos`

    def generate(self, inputs, dtype, mode: str, forced: int | None) -> tuple[list[int], torch.Tensor]:
        """The new tokens, all `forced` if that is one, and the log-probabilities of every step, (NEW_TOKENS,
        vocab_size)."""
        model = self.models[dtype]
        model.config.nsa_mode = mode
        options = {"max_new_tokens": NEW_TOKENS, "do_sample": False}
        if forced is not None:
            options["logits_processor"] = [Forced(forced)]
        with torch.inference_mode():
            output = model.generate(**inputs, **options, return_dict_in_generate=True, output_logits=True)
        logits = torch.cat(output.logits)
        tokens = output.sequences[0, inputs["input_ids"].shape[1] :].tolist()
        return tokens, torch.log_softmax(logits, -1)

    def until_end(self, tokens: list[int]) -> list[int]:
        """What is said where the end of an answer counts."""
        ends = {self.processor.tokenizer.eos_token_id, self.processor.tokenizer.pad_token_id}
        return tokens[: next((index for index, token in enumerate(tokens) if token in ends), len(tokens))]

    def answer(self, case: dict) -> dict:
        inputs = self.processor.apply_chat_template(
            [{"role": "user", "content": for_transformers(case["content"])}],
            tokenize=True,
            add_generation_prompt=True,
            return_dict=True,
            return_tensors="pt",
            **case.get("options", {}),
        )
        forced = self.processor.tokenizer.convert_tokens_to_ids(case["forced"]) if "forced" in case else None
        tokens, narrow = self.generate(inputs, torch.float32, "sparse", forced)
        exact_tokens, exact = self.generate(inputs, torch.float64, "sparse", forced)
        best = narrow.topk(2).values
        if (forced is None and (best[:, 0] - best[:, 1]).min() < MARGIN) or tokens != exact_tokens:
            raise ValueError(f"case {case['name']!r}: two tokens are nearly equal, so that it decides nothing")
        dense, dense_narrow = self.generate(inputs, torch.float32, "dense", forced)
        steps = range(NEW_TOKENS)
        return case | {
            "prompt": inputs["input_ids"][0].tolist(),
            "grids": inputs["video_grid_thw"].tolist() if "video_grid_thw" in inputs else [],
            "tokens": tokens,
            "text": self.processor.decode(self.until_end(tokens)),
            "logprobs": narrow[steps, tokens].tolist(),
            "exact_logprobs": exact[steps, tokens].tolist(),
            "dense_tokens": dense,
            "dense_logprobs": dense_narrow[steps, dense].tolist(),
            "forced": forced,
        }


def main() -> None:
    parser = argparse.ArgumentParser(description="Write what transformers answers.")
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    save_checkpoints(folder)
    cases = make_cases(draw_videos(folder / "videos"), draw_images(folder / "images"))
    answers = {name: list(map(Reference(folder / name).answer, cases)) for name in ("tiny", "noisy")}
    (folder / "reference.json").write_text(json.dumps(answers, indent=1) + "\n")


if __name__ == "__main__":
    main()
