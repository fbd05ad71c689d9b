"""What an hour of video needs, by arithmetic (nothing is run): a table in Markdown.

    python benchmarks/memory_table.py

3600 frames at one a second, 64 tokens for two of them, read in chunks of 1024 tokens with bfloat16 activations.
Quantised weights leave out what `docs/quantisation.md` says. GB are 10**9 bytes, of everything on one device: weights,
cache, and what is worked on; a device fits where half a gigabyte is left for the process.
"""

import sys
from pathlib import Path

from published_sizes import published_config

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from configuration_videonsa import VideoNSAConfig
from memory_videonsa import MemoryEstimate, estimate_memory, weight_bytes

STEP, CHUNK = 64, 1024
TOKENS = 1800 * STEP
WEIGHTS = {"bf16": 16, "int8": 8, "int4": 4}
# Tokens that the cache holds at most, bits of a number. With 12 %, what is read waits beside it for its chunk to end.
CACHES = {"full": (TOKENS, 0), "4-bit": (TOKENS, 4), "12 %": (TOKENS * 12 // 100 + CHUNK + STEP, 0)}
DEVICES = (8, 12, 24, 80)
PROCESS = 0.5e9  # the process, the CUDA context, the allocator


def estimate(size: str, weights: str, cache: str) -> MemoryEstimate:
    config = VideoNSAConfig.from_dict(published_config(size) | {"model_type": "videonsa"})
    tokens, bits = CACHES[cache]
    loaded = weight_bytes(config, WEIGHTS[weights])
    return estimate_memory(config, tokens, chunk_tokens=CHUNK, step_tokens=STEP, weights=loaded, cache_bits=bits)


def main() -> None:
    columns = "model", "weights", "cache", "weights GB", "cache GB", "work GB", "total GB", "fits"
    print(f"| {' | '.join(columns)} |")
    print("|---" * len(columns) + "|")
    for size in ("3B", "7B", "32B"):
        for weights in WEIGHTS:
            for cache in CACHES:
                need = estimate(size, weights, cache)
                fits = ", ".join(f"{device}" for device in DEVICES if need.total + PROCESS <= device * 10**9)
                parts = " | ".join(f"{part / 1e9:.1f}" for part in (need.weights, need.cache, need.working, need.total))
                print(f"| {size} | {weights} | {cache} | {parts} | {f'{fits} GB' if fits else 'none'} |")


if __name__ == "__main__":
    main()
