"""Time of the sparse prefill methods against dense causal attention, on a CPU.

    python benchmarks/bench_baselines.py --output benchmarks/results/<date>_baselines_cpu.json

Dense attention is torch's scaled_dot_product_attention(is_causal=True, enable_gqa=True). Shapes are those of one
key/value head of a 7B layer with its 7 query heads, head_dim 128, float32. The vectors are drawn, not a model's: what
methods leave out depends on what attention looks like, and random vectors, which all look alike, would have them take
everything. These have what the papers find in models: a first token that every query attends to, attention to what lies
near, and attention to the same place in other frames (256 tokens each), in another mixture for each head.

CPU seconds of one process, the fastest of the repeats: wall time on a machine that does other work says little.
"""

import argparse
import datetime
import json
import sys
import time
from pathlib import Path

import torch
from bench_cpu import describe_cpu

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import baselines
from baselines.executor import attend

HEADS, HEAD_DIM, FRAME = 7, 128, 256
SCALE = HEAD_DIM**-0.5
METHODS = [
    ("tri_shape", {}),
    ("minference", {}),
    ("minference", {"heads": [[{"kind": "a_shape", "sink": 128, "window": 1024}] * HEADS]}),
    ("minference", {"heads": [[{"kind": "vertical_slash", "vertical": 500, "slash": 100}] * HEADS]}),
    ("minference", {"heads": [[{"kind": "block_top_k", "blocks": 20}] * HEADS]}),
    ("flexprefill", {}),
    ("xattention", {}),
    ("xattention", {"stride": 8}),
    ("mminference", {"strides": FRAME}),
    ("psa", {}),
]


def draw(tokens: int, seed: int = 0) -> list[torch.Tensor]:
    """Queries (7, tokens, 128), keys and values (1, tokens, 128)."""
    generator = torch.Generator().manual_seed(seed)

    def unit(*shape):
        return torch.nn.functional.normalize(torch.randn(*shape, HEAD_DIM, generator=generator), dim=-1)

    sink, places = unit(1)[0], unit(FRAME)[torch.arange(tokens) % FRAME]
    steps, near = unit(tokens), torch.zeros(tokens, HEAD_DIM)
    for token in range(tokens):  # vectors that turn slowly: about 60 tokens are alike
        near[token] = (
            steps[token] if not token else torch.nn.functional.normalize(near[token - 1] + 0.18 * steps[token], dim=-1)
        )
    key = near + places + 0.3 * unit(tokens)
    key[0] += sink
    # The logits that full likeness gives: of the first token, of tokens near, of the same place.
    weights = torch.tensor([[9.0, 11, 3], [9, 7, 7], [11, 9, 5], [5, 12, 3], [9, 3, 10], [12, 7, 3], [7, 10, 8]])
    query = weights[:, :1, None] * sink + weights[:, 1:2, None] * near + weights[:, 2:, None] * places
    return [query / SCALE, key[None], torch.randn(1, tokens, HEAD_DIM, generator=generator)]


def seconds(call, repeats: int):
    """The fastest CPU seconds of `call`, and what it returns."""
    found = []
    for _ in range(repeats):
        start = time.process_time()
        result = call()
        found.append(time.process_time() - start)
    return min(found), result


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description="Sparse prefill methods against dense attention, on a CPU.")
    parser.add_argument("--tokens", type=int, nargs="+", default=[4096, 16384])
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    result = {
        "command": " ".join(sys.argv),
        "date": datetime.date.today().isoformat(),
        "machine": describe_cpu("torch"),
        "threads": arguments.threads,
        "shapes": {"heads": HEADS, "kv_heads": 1, "head_dim": HEAD_DIM, "dtype": "float32"},
        "runs": [],
    }
    print("| tokens | method | pairs | choice, s | attention, s | dense, s | dense / both |")
    print("|---|---|---|---|---|---|---|")
    for tokens in arguments.tokens:
        query, key, value = draw(tokens)
        sdpa = torch.nn.functional.scaled_dot_product_attention
        options = {"is_causal": True, "enable_gqa": True, "scale": SCALE}
        dense, _ = seconds(lambda: sdpa(query[None], key[None], value[None], **options), arguments.repeats)  # noqa: B023
        for name, settings in METHODS:
            method = baselines.check(name, **settings)
            choice, pattern = seconds(lambda: method.select(query, key, SCALE, 0), arguments.repeats)  # noqa: B023
            attention, (_, pairs) = seconds(
                lambda: attend(query, key, value, pattern, SCALE),  # noqa: B023
                arguments.repeats,
            )
            label = settings["heads"][0][0] if "heads" in settings else settings
            run = {"tokens": tokens, "method": name, "options": label, "pairs": pairs / pattern.dense_pairs}
            run |= {"choice_s": choice, "attention_s": attention, "dense_s": dense}
            result["runs"].append(run)
            text = ", ".join(f"{key} {value}" for key, value in label.items())
            print(
                f"| {tokens:,} | {name}{f' ({text})' if text else ''} | {run['pairs']:.1%} | {choice:.2f} | "
                f"{attention:.2f} | {dense:.2f} | {dense / (choice + attention):.2f} |",
                flush=True,
            )
    if arguments.output:
        arguments.output.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
