"""Seconds and floating-point operations of each branch of one layer, by length (arXiv 2510.02295, figure 6, table 35).

    python -m analysis.latency --tokens 1024 4096 16384 --output latency.json --plot latency.png

One sequence of vision tokens in the shape of a checkpoint's layers (`--checkpoint`), or of a published size of
Qwen2.5-VL (`--shape 7B`). Queries, keys and values are random, so that neighbouring tokens choose unrelated blocks,
the hardest case for selection. Seconds are the medians of some calls, forward alone, on a CPU of the torch backend,
on a GPU of the Triton kernels (waited for; beside dense attention by whichever kernel torch takes). "block choice"
computes the scores of compression once more; in "nsa", which also has the gated sum, both have them in common.

Operations are counted by definition: 4 * pairs * num_heads * head_dim, where pairs are those of query and key of one
head, exactly (attention_budget_videonsa.py), 2 for the score and 2 for the weighted value; 2 in the place of 4 for
the block choice, which has no values, and which adds nothing to "nsa". Pooling, softmax and the gates are left out. A
backend may compute more, as where it masks tiles, or selects densely as long as every block is chosen.

The paper's figures are in `PAPER`, and figure 6, which seems to be of whole prompts in all layers, is drawn by layer
for the 7B's shape. Table 35 is of another quantity: its 8.40 PFLOP of dense attention are, to 0.2 %, those of the 7B's
language model, weights included, for 128,000 tokens, with scores of all pairs, not of the causal half. Nothing of
table 36 is drawn: it has no unit, and at 128K it is five times figure 6 in seconds, and a seventh in milliseconds a
layer.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from matplotlib.figure import Figure
from tqdm import tqdm
from transformers.utils import cached_file

from attention_budget_videonsa import attention_budget
from benchmarks.published_sizes import PUBLISHED, published_config
from benchmarks.timing import synchronize
from configuration_videonsa import VideoNSATextConfig
from nsa_kernels import attention, compression, selection, sliding_window
from nsa_kernels.utils import SequenceLengths

from .figure import BRANCH_COLOURS, measurement

TOKENS = (1024, 4096, 16384)
PARTS = ("compression", "block choice", "selection", "window", "nsa", "dense")
COLOURS = BRANCH_COLOURS | {"block choice": "tab:cyan", "nsa": "tab:red"}
NSA_DEFAULTS = {name: getattr(VideoNSATextConfig, name) for name in ("block_size", "block_counts", "window_size")}
WARM_UP_TOKENS = 512
LONG_SECONDS = 5.0
"""Of a call that is not repeated."""

FIGURE_6 = "figure 6, seconds by tokens, read off"
PAPER = {
    FIGURE_6: {
        "compression": [[65536, 0.88], [131072, 1.68]],
        "selection": [[65536, 0.2], [131072, 0.45]],
        "window": [[131072, 0.03]],
    },
    "table 35, PFLOP": {
        "FlashAttention": 8.40,
        "Tri-Shape": 7.07,
        "MInference": 4.13,
        "FlexPrefill": 7.75,
        "XAttention": 1.94,
        "VideoNSA (ideal)": 2.05,
        "VideoNSA (query heads padded to 64)": 4.68,
    },
    "table 36, compression with blocks of 64, no unit, by tokens": [
        [4096, 0.882],
        [8192, 1.036],
        [16384, 1.322],
        [32768, 1.997],
        [65536, 3.687],
        [131072, 8.323],
    ],
}
"""arXiv 2510.02295 v2; 4k in a table is taken for 4096 tokens."""


@dataclass(frozen=True)
class Shape:
    """Of a layer's attention, and how many layers the model has."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    num_layers: int
    block_size: int
    block_counts: int
    window_size: int

    @property
    def sizes(self) -> dict[str, int]:
        return {name: getattr(self, name) for name in ("block_size", "block_counts", "window_size")}


def shape_of(name: str | None = None, checkpoint: str | None = None) -> Shape:
    """The layers of a published size of Qwen2.5-VL, or of a checkpoint; NSA's defaults where it has none of its own.

    Raises:
        ValueError: both or none are given, or no such size.
    """
    if (name is None) == (checkpoint is None):
        raise ValueError(f"give `shape` or `checkpoint`, got {name!r} and {checkpoint!r}")
    if name is not None and name not in PUBLISHED:
        raise ValueError(f"`shape` must be one of {', '.join(PUBLISHED)}, got {name!r}")
    fields = published_config(name) if name is not None else _config_of(checkpoint)
    num_heads = fields["num_attention_heads"]
    return Shape(
        num_heads,
        fields["num_key_value_heads"],
        fields.get("head_dim") or fields["hidden_size"] // num_heads,
        fields["num_hidden_layers"],
        *(fields.get(name) or default for name, default in NSA_DEFAULTS.items()),
    )


def _config_of(checkpoint: str) -> dict:
    """The fields of its text model."""
    fields = json.loads(Path(cached_file(checkpoint, "config.json")).read_text())
    return fields | fields.get("text_config", {})


def operations(shape: Shape, tokens: int) -> dict[str, int]:
    """Floating-point operations of each of `PARTS`, of one layer and one sequence; see the module.

    Raises:
        ValueError: tokens is not positive.
    """
    if tokens < 1:
        raise ValueError(f"`tokens` must be positive, got {tokens!r}")
    pairs = attention_budget(torch.ones(tokens), **shape.sizes)
    of_pair = 2 * shape.num_heads * shape.head_dim
    counted = {
        "compression": 2 * of_pair * pairs.compression,
        "block choice": of_pair * pairs.compression,
        "selection": 2 * of_pair * pairs.selection,
        "window": 2 * of_pair * pairs.window,
    }
    whole = counted["compression"] + counted["selection"] + counted["window"]
    return counted | {"nsa": whole, "dense": 2 * of_pair * pairs.dense}


def calls(shape: Shape, tokens: int, dtype: torch.dtype, device: torch.device) -> dict[str, Callable[[], object]]:
    """For each of `PARTS` what computes it; what it needs exists already."""
    generator = torch.Generator(device=device).manual_seed(0)

    def normal(heads: int) -> torch.Tensor:
        return torch.randn(tokens, heads, shape.head_dim, device=device, generator=generator).to(dtype)

    q, k, v = normal(shape.num_heads), normal(shape.num_kv_heads), normal(shape.num_kv_heads)
    gates = torch.rand(3, tokens, shape.num_heads, device=device, generator=generator).to(dtype)
    lengths = SequenceLengths.from_lengths([tokens], device=device)
    size, counts, width = shape.sizes.values()
    indices = compression.select_blocks(q, k, lengths, block_size=size, block_counts=counts)
    # As transformers hands them over.
    dense = [x.transpose(0, 1)[None].contiguous() for x in (q, k, v)]
    attend = torch.nn.functional.scaled_dot_product_attention
    return {
        "compression": lambda: compression.compression_attention(q, k, v, lengths, block_size=size),
        "block choice": lambda: compression.select_blocks(q, k, lengths, block_size=size, block_counts=counts),
        "selection": lambda: selection.selection_attention(q, k, v, indices, lengths, block_size=size),
        "window": lambda: sliding_window.sliding_window_attention(q, k, v, lengths, window_size=width),
        "nsa": lambda: attention.nsa_attention(q, k, v, *gates, lengths, **shape.sizes),
        "dense": lambda: attend(*dense, is_causal=True, enable_gqa=True),
    }


def seconds_of(call: Callable[[], object], device: torch.device, repeats: int) -> dict[str, float]:
    """Medians of wall and CPU seconds; a call of `LONG_SECONDS` or more is not repeated."""
    wall, cpu = [], []
    while len(wall) < repeats and (not wall or wall[-1] < LONG_SECONDS):
        synchronize(device)
        start, cpu_start = time.perf_counter(), time.process_time()
        call()
        synchronize(device)
        wall.append(time.perf_counter() - start)
        cpu.append(time.process_time() - cpu_start)
    return {"seconds": statistics.median(wall), "cpu_seconds": statistics.median(cpu), "runs": len(wall)}


@torch.inference_mode()
def run(
    device: str = "cpu",
    dtype: str = "auto",
    tokens: Sequence[int] = TOKENS,
    shape: str | None = None,
    checkpoint: str | None = None,
    repeats: int = 3,
) -> dict:
    """shape, dtype, threads; lengths: a list of tokens and, for each of `PARTS`, seconds and operations; paper.

    Args:
        dtype: "auto" is float32 on a CPU and bfloat16 on a GPU.
        shape: as in `shape_of`; "7B" if there is no checkpoint either.
    Raises:
        ValueError: as `shape_of`, tokens or repeats that are not positive, or a dtype that torch does not have.
    """
    of_layer = shape_of("7B" if shape is checkpoint is None else shape, checkpoint)
    if not tokens or min(tokens) < 1:
        raise ValueError(f"`tokens` must be positive, got {list(tokens)}")
    if repeats < 1:
        raise ValueError(f"`repeats` must be positive, got {repeats!r}")
    where = torch.device(device)
    name = {"cpu": "float32"}.get(where.type, "bfloat16") if dtype == "auto" else dtype
    if not isinstance(getattr(torch, name, None), torch.dtype):
        raise ValueError(f"`dtype` = {dtype!r} is none of torch's")
    kind = getattr(torch, name)
    lengths = []
    for count in tqdm(tokens, desc="Lengths", disable=None):
        # A GPU compiles and tunes by length; a CPU needs a warm-up at all.
        for call in calls(of_layer, min(count, WARM_UP_TOKENS) if where.type == "cpu" else count, kind, where).values():
            call()
        counted = operations(of_layer, count)
        parts = {
            part: {"operations": counted[part]} | seconds_of(call, where, repeats)
            for part, call in calls(of_layer, count, kind, where).items()
        }
        lengths.append({"tokens": count, **parts})
    about = {"shape": asdict(of_layer), "dtype": name, "threads": torch.get_num_threads()}
    return about | {"lengths": lengths, "paper": PAPER}


def plot(results: dict) -> Figure:
    """Seconds, and operations, by length; for the 7B's shape the paper's figure 6, by layer, as dotted lines."""
    figure = Figure(figsize=(9, 3.8), layout="constrained")
    lengths = results["lengths"]
    tokens = [length["tokens"] for length in lengths]
    of_7b = asdict(shape_of("7B"))
    layers = results["shape"]["num_layers"]
    for axes, measure in zip(figure.subplots(1, 2), ("seconds", "operations"), strict=True):
        for part in PARTS:
            values = [length[part][measure] for length in lengths]
            axes.plot(tokens, values, marker="o", markersize=3, color=COLOURS[part], label=part)
        if measure == "seconds" and results["shape"] == of_7b:
            for part, points in PAPER[FIGURE_6].items():
                places, values = zip(*points, strict=True)
                values = [seconds / layers for seconds in values]
                axes.plot(places, values, "x:", color=COLOURS[part], label=f"{part}, paper (GPU)")
        axes.set(yscale="log", xlabel="vision tokens", ylabel=f"{measure}, one layer")
        axes.set_xscale("log", base=2)
    figure.axes[0].legend(frameon=False, fontsize="x-small")
    return figure


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--tokens", type=int, nargs="+", default=list(TOKENS), metavar="N", help="(%(default)s)")
    parser.add_argument("--shape", help=f"{', '.join(PUBLISHED)} (default: 7B)")
    parser.add_argument("--checkpoint", help="folder or Hub id, whose layers are taken instead")
    parser.add_argument("--repeats", type=int, default=3, help="of a call; the median counts (%(default)s)")


if __name__ == "__main__":
    measurement(run, plot, __doc__, add_arguments)
