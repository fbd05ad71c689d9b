"""Ask a VideoNSA model about a video, on a CPU if need be.

    python demo/run_demo.py
    python demo/run_demo.py --video my.mp4 --question "What happens at the end?" --model path/or/hub-id

Without `--model`, a tiny Qwen2.5-VL-shaped checkpoint with random weights is made and converted first, so that the
whole way is walked: checkpoint, `convert_weights.py`, AutoModel and AutoProcessor with `trust_remote_code=True`, video
file, streamed answer. Its answers are noise.
"""

import argparse
import subprocess
import sys
import time
from pathlib import Path

import torch
from tqdm import tqdm
from transformers import AutoModel, AutoProcessor, TextStreamer

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from nsa_kernels.attention_budget import attention_budget  # noqa: E402

OUTPUT = ROOT / "demo" / "output"
BRANCHES = ("compression", "selection", "sliding window")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Ask a VideoNSA model about a video.")
    parser.add_argument("--model", help="checkpoint folder or Hub id; default: a tiny random one, made here")
    parser.add_argument("--video", default=ROOT / "demo" / "shapes.mp4", type=Path, help="a video file")
    parser.add_argument("--question", default="What happens in this video?")
    parser.add_argument("--fps", type=float, help="frames per second to sample; default: the processor's")
    parser.add_argument("--block-counts", type=int, help="blocks that each token selects; default: the checkpoint's")
    parser.add_argument("--window-size", type=int, help="tokens of the sliding window; default: the checkpoint's")
    parser.add_argument("--max-new-tokens", type=int, default=48)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", default="auto", choices=("auto", "float32", "bfloat16", "float16"))
    arguments = parser.parse_args()
    if arguments.model is None:
        # The paper's 32 blocks of 64 tokens would cover all of the demo's short video.
        arguments.block_counts = 4 if arguments.block_counts is None else arguments.block_counts
        arguments.window_size = 64 if arguments.window_size is None else arguments.window_size
    if not arguments.video.is_file():
        parser.error(f"--video: no such file: {arguments.video}")
    if arguments.max_new_tokens < 1:
        parser.error(f"--max-new-tokens must be positive, got {arguments.max_new_tokens}")
    return arguments


def make_tiny_checkpoint() -> Path:
    """Random Qwen2.5-VL-shaped weights, converted by the command that users run."""
    source, target = OUTPUT / "qwen2_5_vl_tiny", OUTPUT / "videonsa_tiny"
    print("Making a tiny Qwen2.5-VL-shaped checkpoint with RANDOM weights: expect noise for an answer.\n")
    run = [sys.executable, str(ROOT / "demo" / "tiny_checkpoint.py"), str(source)]
    subprocess.run(run, check=True, stdout=subprocess.DEVNULL)
    run = [sys.executable, str(ROOT / "convert_weights.py"), str(source), str(target), "--overwrite"]
    print("$", " ".join(["python", *(str(Path(part).relative_to(ROOT)) for part in run[1:4]), *run[4:]]))
    subprocess.run(run, check=True)
    print()
    return target


class PrefillMonitor:
    """Watches the pass over the prompt: a progress bar over the layers, the mean gates, when it ends."""

    def __init__(self, model):
        layers = model.model.language_model.layers
        self.temperature = model.config.gate_temperature
        self.gates = []
        self.start = time.perf_counter()
        self.bar = tqdm(total=len(layers), desc="Reading the video", unit="layer", leave=False)
        self.handles = [layer.register_forward_hook(self.after_layer) for layer in layers]
        self.handles += [layer.self_attn.g_proj_2.register_forward_hook(self.after_gates) for layer in layers]

    def after_gates(self, module, inputs, logits):
        gates = torch.sigmoid(logits.float() / self.temperature)
        self.gates.append(gates.unflatten(-1, (-1, 3)).flatten(0, -2).mean(0).cpu())

    def after_layer(self, module, inputs, output):
        self.bar.update()
        if self.bar.n == self.bar.total:
            self.close()

    def close(self):
        self.end = time.perf_counter()
        self.bar.close()
        print("Answer    ", end="", flush=True)
        for handle in self.handles:
            handle.remove()


class CountingStreamer(TextStreamer):
    """Prints the answer as it comes, and counts its tokens."""

    num_tokens = -1  # the first call brings the prompt

    def put(self, value):
        super().put(value)
        self.num_tokens += 1


def main() -> None:
    arguments = parse_arguments()
    name = arguments.model or make_tiny_checkpoint()
    processor = AutoProcessor.from_pretrained(name, trust_remote_code=True)
    settings = {"block_counts": arguments.block_counts, "window_size": arguments.window_size}
    settings = {key: value for key, value in settings.items() if value is not None}
    model = AutoModel.from_pretrained(name, trust_remote_code=True, dtype=arguments.dtype, **settings)
    model.to(arguments.device).eval()

    content = [{"type": "video", "video": str(arguments.video)}, {"type": "text", "text": arguments.question}]
    options = {} if arguments.fps is None else {"fps": arguments.fps}
    start = time.perf_counter()
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": content}],
        tokenize=True,
        add_generation_prompt=True,
        return_dict=True,
        return_tensors="pt",
        **options,
    ).to(arguments.device)
    load_seconds = time.perf_counter() - start

    frames, height, width = inputs["video_grid_thw"][0].tolist()
    print(
        f"Video     {arguments.video.name}: {2 * frames} frames of {14 * width}x{14 * height} in {load_seconds:.1f} s"
    )
    print(f"Question  {arguments.question}")
    monitor = PrefillMonitor(model)
    streamer = CountingStreamer(processor.tokenizer, skip_prompt=True, skip_special_tokens=True)
    with torch.inference_mode():
        model.generate(**inputs, max_new_tokens=arguments.max_new_tokens, do_sample=False, streamer=streamer)
    decode_seconds = time.perf_counter() - monitor.end

    types = inputs["mm_token_type_ids"][0]
    settings = {key: getattr(model.config, key) for key in ("block_size", "block_counts", "window_size")}
    budget = attention_budget(types, **settings)
    num_vision = int((types != 0).sum())
    read_seconds, rate = monitor.end - monitor.start, (streamer.num_tokens - 1) / decode_seconds  # the first is read
    print(f"\nTokens    {num_vision} video + {len(types) - num_vision} text, {streamer.num_tokens} generated")
    print(f"Seconds   {read_seconds:.1f} to read the prompt, then {rate:.1f} tokens a second")
    if monitor.gates:
        gates = torch.stack(monitor.gates).mean(0)
        shares = ", ".join(f"{name} {share:.0%}" for name, share in zip(BRANCHES, gates / gates.sum(), strict=True))
        print(f"Gates     {shares}")
    if model.config.nsa_variant == "released":
        return  # the budget counts what the paper's attention computes
    print(f"Attention {budget.fraction:.1%} of the dense pairs of query and key ({', '.join(pairs(budget))})")
    if budget.fraction > 1:
        print(
            f"          (a video of {num_vision} tokens is shorter than the {settings['block_counts']} blocks of "
            f"{settings['block_size']} that each token selects: savings begin beyond that)"
        )


def pairs(budget) -> list[str]:
    parts = {"compression": budget.compression, "selection": budget.selection}
    parts |= {"window": budget.window, "text": budget.text}
    return [f"{name} {count / budget.dense:.1%}" for name, count in parts.items()]


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError, ImportError) as error:
        raise SystemExit(f"run_demo.py: error: {error}") from error
