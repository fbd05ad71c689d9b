"""Whether selection should take the queries of a frame patch by patch: distinct blocks of a tile, by order of queries.

    python benchmarks/query_order.py --output benchmarks/results/<date>_query_order.json

The selection kernels, forward and for dq, walk every block that some token of a tile selected. A tile is 18 tokens of
the 7B, so far consecutive ones. This measures r (benchmarks/unions.py), which that walk's time is proportional to, for
other orders: tiles of 18 tokens that lie side by side in height and width, or in time as well, in frames of several
widths. Blocks are chosen as the 7B does, 32 of 64 tokens, by the queries and keys of the small checkpoint, which was
trained with other blocks and on pictures much smaller than these: the scene of demo/, and two that ffmpeg draws, which
has to be there.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

import bench_cpu  # noqa: E402
import unions  # noqa: E402

from nsa_kernels.compression import select_blocks  # noqa: E402
from nsa_kernels.utils import SequenceLengths  # noqa: E402

BLOCK_SIZE, BLOCK_COUNTS, TILE = 64, 32, 18
# Frames, rows and columns that a tile covers; None is the order of the sequence.
ORDERS = {"sequence": None, "3 x 6": (1, 3, 6), "6 x 3": (1, 6, 3), "2 frames, 3 x 3": (2, 3, 3)}
SECONDS, FPS = 24, 4
SIDES = (12, 18, 24)  # of a frame, in tokens: multiples of what orders need
DRAWN = ("mandelbrot", "testsrc2")


def in_order(grid: tuple[int, int, int], tile: tuple[int, int, int]) -> torch.Tensor:
    """(tokens,): the tokens of frames x rows x columns, tile by tile, of so many frames, rows and columns.

    Raises:
        ValueError: a tile does not divide the grid.
    """
    if any(size % part for size, part in zip(grid, tile, strict=True)):
        raise ValueError(f"`tile` = {tile} must divide `grid` = {grid}")
    (frames, rows, columns), (t, h, w) = grid, tile
    tokens = torch.arange(frames * rows * columns).view(frames // t, t, rows // h, h, columns // w, w)
    return tokens.permute(0, 2, 4, 1, 3, 5).flatten()


def by_order(q: torch.Tensor, k: torch.Tensor, grid: tuple[int, int, int], scale: float | None = None) -> dict:
    """r for each of `ORDERS`; q and k: (tokens, heads, head_dim) of one video."""
    lengths = SequenceLengths.from_lengths([len(q)])
    sizes = {"block_size": BLOCK_SIZE, "block_counts": BLOCK_COUNTS, "softmax_scale": scale}
    indices = select_blocks(q, k, lengths, **sizes, backend="torch")
    ordered = {name: indices if tile is None else indices[in_order(grid, tile)] for name, tile in ORDERS.items()}
    return {name: round(unions.union_statistics(x, TILE)["r"], 3) for name, x in ordered.items()}


def draw(name: str, folder: Path) -> Path:
    """A video of one of ffmpeg's sources."""
    path = folder / f"{name}.mp4"
    source = f"{name}=size=672x672:rate={2 * FPS}"
    command = ["ffmpeg", "-v", "error", "-f", "lavfi", "-i", source, "-t", str(SECONDS), "-pix_fmt", "yuv420p"]
    subprocess.run([*command, str(path)], check=True)
    return path


def read(model, processor, video: Path, side: int) -> dict:
    """`by_order`, of every layer and their mean, while the model reads a video in frames of side x side tokens."""
    from analysis.observe import read_prompt

    content = [{"type": "video", "video": str(video)}, {"type": "text", "text": "What happens?"}]
    pixels = (28 * side) ** 2
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": content}], tokenize=True, return_dict=True, return_tensors="pt",
        fps=FPS, min_pixels_per_frame=pixels, max_pixels_per_frame=pixels,
    )  # fmt: skip
    frames, height, width = inputs["video_grid_thw"][0].tolist()
    grid, layers = (frames, height // 2, width // 2), []

    def look(layer) -> None:
        q, k = (layer.vision(x).transpose(0, 1).float().contiguous() for x in (layer.query, layer.key))
        layers.append(by_order(q, k, grid, layer.scale))

    read_prompt(model, inputs, look)
    found = {name: round(statistics.mean(layer[name] for layer in layers), 3) for name in ORDERS}
    print(f"{video.stem:12} {side} x {side}  {found}", flush=True)
    return {"frames": frames, "mean": found, "layers": layers}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default=str(ROOT / "checkpoints" / "tiny"))
    parser.add_argument("--output", type=Path, help="JSON file to write")
    args = parser.parse_args()
    from transformers import AutoModel, AutoProcessor

    model = AutoModel.from_pretrained(args.model, trust_remote_code=True, dtype=torch.float32).eval()
    processor = AutoProcessor.from_pretrained(args.model, trust_remote_code=True)
    report = {
        "command": " ".join(["python", *sys.argv]),
        **bench_cpu.describe_cpu("torch", "transformers"),
        "tile": TILE,
        "orders": ORDERS,
        "videos": {},
    }
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        for video in (ROOT / "demo" / "scene.mp4", *(draw(name, Path(folder)) for name in DRAWN)):
            report["videos"][video.stem] = {side: read(model, processor, video, side) for side in SIDES}
    if args.output:
        args.output.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
