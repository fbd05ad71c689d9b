"""Expected times of the Triton kernels, from arithmetic: writes docs/kernel_model.md. Nothing is measured here.

    python benchmarks/kernel_model.py            # write the page
    python benchmarks/kernel_model.py --print    # show it

Every kernel gets three times: its operations at the rate that kernels of its kind are assumed to reach, the bytes that
cross between the L2 cache and the multiprocessors, and the bytes of device memory that must be read and written once.
The largest of the three is the model's time. docs/kernels.md says where the measurements are.
"""

import argparse
import sys
import textwrap
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

PAGE = ROOT / "docs" / "kernel_model.md"
TOKENS = (1024, 2048, 4096, 8192, 16384, 32768, 65536, 131072)


@dataclass(frozen=True)
class Machine:
    """What is assumed of an H200. Rates in operations or bytes per second."""

    peak_matmul: float = 780e12  # bf16 products of large random matrices
    hbm: float = 4.3e12  # a large copy, bytes read and written
    l2: float = 5.6e12
    alu: float = 132 * 128 * 1.83e9  # one instruction per lane and clock
    triton: float = 450e12  # attention in Triton, wgmma
    flash2: float = 400e12  # FlashAttention 2 forward (mma.sync)
    flash2_backward: float = 340e12
    cudnn: float = 600e12
    cudnn_backward: float = 500e12
    linear: float = 680e12
    launch: float = 5e-6
    multiprocessors: int = 132


@dataclass(frozen=True)
class Model:
    """Attention shapes, and what of the rest of the model counts for prefill."""

    heads: int = 28
    kv_heads: int = 4
    dim: int = 128
    hidden: int = 3584
    intermediate: int = 18944
    layers: int = 28
    block: int = 64
    counts: int = 32
    window: int = 256

    @property
    def group(self) -> int:
        return self.heads // self.kv_heads

    @property
    def tile_tokens(self) -> int:
        """Tokens whose packed heads fill a tile of 128 rows."""
        return 128 // self.group


def pairs(tokens: int, model: Model) -> dict[str, int]:
    """(query, key) pairs per head, as `attention_budget_videonsa.py` counts them, but not token by token."""

    def arithmetic(first: int, last: int) -> int:
        return (first + last) * max(0, last - first + 1) // 2

    full, rest = divmod(tokens, model.block)
    # Token t (from 1) sees t // block complete blocks.
    compression = arithmetic(0, full - 1) * model.block + full * (rest + 1)
    own = full * arithmetic(1, model.block) + arithmetic(1, rest)
    chosen = sum(min(j, model.counts - 1) for j in range(full)) * model.block + min(full, model.counts - 1) * rest
    window = min(model.window, tokens)
    return {
        "compression": compression,
        "selection": chosen * model.block + own,
        "blocks": chosen + tokens,  # (token, selected block) pairs
        "window": arithmetic(1, window) + (tokens - window) * window,
        "dense": arithmetic(1, tokens),
    }


@dataclass
class Cost:
    """One kernel: seconds by operations, by the L2 cache and by device memory."""

    name: str
    operations: float
    compute: float
    l2: float = 0.0
    hbm: float = 0.0
    launches: int = 1

    def seconds(self, machine: Machine) -> float:
        return max(self.compute, self.l2, self.hbm) + self.launches * machine.launch

    def bound_by(self) -> str:
        return max(("operations", self.compute), ("L2", self.l2), ("memory", self.hbm), key=lambda x: x[1])[0]


def nsa_costs(tokens: int, model: Model, machine: Machine, union: float, backward: bool) -> list[Cost]:
    """The kernels of one layer's Native Sparse Attention.

    Args:
        union: distinct blocks that a tile's tokens select, over the number that one of them does; no more than there
            are.
    """
    n, heads, groups, dim, byte = pairs(tokens, model), model.heads, model.kv_heads, model.dim, 2
    matmul = 2 * heads * dim  # operations of one product (of two matrices) per pair of query and key
    q_bytes, kv_bytes = tokens * heads * dim * byte, tokens * groups * dim * byte
    tile, block = model.tile_tokens, model.block
    selects_all = tokens <= model.block * model.counts
    union = min(union, n["dense"] / n["selection"])

    def matrix(name, pairs_, products, l2=0.0, hbm=0.0, wasted=1.0):
        operations = matmul * products * pairs_
        return Cost(name, operations, operations * wasted / machine.triton, l2 / machine.l2, hbm / machine.hbm)

    def walk(pairs_, rows):
        """Bytes of keys and values that tiles of so many rows (token x head) read."""
        return pairs_ * heads / rows * 2 * dim * byte

    def choose():
        compared = n["compression"] * groups * 31 * 2  # per score and bit: compare, count
        operations = matmul * n["compression"]
        seconds = operations / machine.triton + compared / machine.alu
        return Cost(
            "block choice", operations, seconds, 0, (q_bytes + tokens * groups * model.counts * 4) / machine.hbm
        )

    def dense():
        """Selection by torch, which is dense attention; backward with the gate times do, and sums of gradients."""
        operations = matmul * n["selection"] * (5 if backward else 2)
        extra = [Cost("gate x do", 0, 0, 0, 2 * q_bytes / machine.hbm)] if backward else []
        extra += [Cost("autograd's sums", 0, 0, 0, 3 * (q_bytes + 2 * kv_bytes) / machine.hbm, 3)] if backward else []
        rate = machine.cudnn_backward if backward else machine.cudnn
        return [Cost("selection by torch", operations, operations / rate), *extra]

    io = 2 * q_bytes + 2 * kv_bytes
    if not backward:
        selection = matrix("selection", n["selection"] * union, 2, walk(n["selection"] * union, tile * model.group), io)
        selection.launches = 2  # the union of each tile's blocks comes first
        return [
            Cost("pooling", 0, 0, 0, 2 * kv_bytes / machine.hbm),
            matrix("compression", n["compression"], 2, walk(n["compression"], 128), 2 * q_bytes),
            *(dense() if selects_all else [choose(), selection]),
            # It also reads the other branches, and writes the gated sum in place of its own output.
            matrix(
                "window and sum",
                n["window"],
                2,
                walk(n["window"], 126),
                io + 2 * q_bytes,
                wasted=1 + (block + tile) / model.window,
            ),
        ]
    io = 3 * q_bytes + 2 * kv_bytes
    gradients = 2 * 2 * kv_bytes  # float32
    partials = 2 * 2 * gradients  # written and read, about two rows per row
    gathered = n["blocks"] * groups * model.group * dim * byte * 2  # rows of q and do
    slc_dkv = matrix("selection dk, dv", n["selection"], 4, gathered, gradients + partials)
    # The pairs are counted and placed: the lists are read twice, and a token is written for each.
    slc_dkv.launches, slc_dkv.hbm = 9, slc_dkv.hbm + n["blocks"] * groups * 4 * 5 / machine.hbm
    slc_dq = matrix("selection dq", n["selection"] * union, 3, walk(n["selection"] * union, 126), io)
    wasted = 1 + (block + tile) / model.window
    swa_dq = matrix("window dq", n["window"], 3, walk(n["window"], 126), io, wasted)
    dq_parts = 3
    if not selects_all:  # one kernel goes on to the window where its walk over the selected blocks ends
        swa_dq.name += ", in the same kernel"
        swa_dq.hbm, swa_dq.launches, dq_parts = 0.0, 0, 2
    return [
        Cost("deltas and gates", 0, 0, 0, 4 * q_bytes / machine.hbm),
        matrix("compression dq", n["compression"], 3, walk(n["compression"], 128), io),
        matrix("compression dk, dv", n["compression"], 4, walk(n["compression"], 64), 2 * q_bytes),
        *([*dense(), swa_dq] if selects_all else [slc_dq, swa_dq, slc_dkv]),
        matrix("window dk, dv", n["window"], 4, walk(n["window"], 64), io + gradients, wasted),
        Cost("sums of gradients", 0, 0, 0, ((dq_parts + 1) * q_bytes + 3 * gradients + 2 * kv_bytes) / machine.hbm, 3),
    ]


def dense_seconds(tokens: int, model: Model, machine: Machine, kernel: str, backward: bool) -> float:
    """torch's dense causal attention; backward counts five products against two."""
    operations = 4 * model.heads * model.dim * pairs(tokens, model)["dense"] * (2.5 if backward else 1)
    return operations / getattr(machine, kernel + ("_backward" if backward else "")) + machine.launch


def total(costs: list[Cost], machine: Machine) -> float:
    return sum(cost.seconds(machine) for cost in costs)


def text_seconds(rows: int, keys: int, model: Model, machine: Machine, kernel: str) -> float:
    """A run of text rows, the last of `keys` tokens: by "triton" (heads packed, keys split) or "flash2".

    FlashAttention 2 tiles 128 rows of one head, and splits keys only where there are very few tiles; torch's copy
    decides that by itself: the model lets it split as well as it likes below one wave of tiles of 64 rows.
    """
    seen = rows * keys - rows * (rows - 1) // 2
    operations = 4 * model.heads * model.dim * seen
    kv_bytes = 2 * keys * model.kv_heads * model.dim * 2
    if kernel == "triton":
        packed = rows * model.group
        tile = max(16, min(128, 1 << (packed - 1).bit_length()))
        tiles = -(-packed // tile) * model.kv_heads
        wasted = tiles * tile / (packed * model.kv_heads)
        filled, launches = 0.95, 2  # keys are split until the last wave is full
    else:
        tile = 128 if rows > 64 else 64
        tiles = -(-rows // tile) * model.heads
        wasted = tiles * tile / (rows * model.heads)
        waves = tiles / machine.multiprocessors
        filled, launches = (waves / -(-tiles // machine.multiprocessors) if waves >= 0.8 else 0.9), 1
    l2 = tiles * keys * 2 * model.dim * 2 / machine.l2
    compute = operations * wasted / getattr(machine, kernel)
    return max(compute, l2, kv_bytes / machine.hbm) / filled + launches * machine.launch


def prefill_seconds(tokens: int, model: Model, machine: Machine, union: float | None) -> float:
    """All layers' linear and attention parts for so many video tokens; union is None for dense attention by cuDNN."""
    qkvo = 2 * model.hidden * (2 * model.heads + 2 * model.kv_heads) * model.dim
    layer = (qkvo + 6 * model.hidden * model.intermediate) * tokens / machine.linear
    if union is None:
        return model.layers * (layer + dense_seconds(tokens, model, machine, "cudnn", False))
    gates = (2 * model.hidden**2 + 6 * model.hidden * model.heads) * tokens / machine.linear
    return model.layers * (layer + gates + total(nsa_costs(tokens, model, machine, union, False), machine))


def table(header: list[str], rows: list[list[object]]) -> list[str]:
    return [
        "| " + " | ".join(header) + " |",
        "|" + "---|" * len(header),
        *("| " + " | ".join(map(str, row)) + " |" for row in rows),
        "",
    ]


def length(tokens: int) -> str:
    return f"{tokens // 1024}K" if tokens >= 1024 else str(tokens)


def ms(seconds: float) -> str:
    return f"{seconds * 1e3:.3g}"


def wrapped(text: str, prefix: str = "") -> list[str]:
    """The lines of a paragraph, or of an item of a list."""
    return textwrap.wrap(text, 112, initial_indent=prefix, subsequent_indent=" " * len(prefix))


def short_sequences(model: Model, machine: Machine) -> list[str]:
    """The part of the page that says where sparse attention is slower than dense, and what could be done about it."""
    reach = model.block * model.counts
    rows = []
    for tokens in (1024, 2048, 8192, 131072):
        costs = {cost.name: cost.seconds(machine) for cost in nsa_costs(tokens, model, machine, 1.7, False)}
        selection = costs.pop("selection by torch", None) or costs.pop("selection")
        row = [dense_seconds(tokens, model, machine, "cudnn", False), selection, costs["compression"]]
        row += [costs.get("block choice", 0.0), costs["window and sum"], costs["pooling"]]
        rows.append([length(tokens), *map(ms, row)])
    first = pairs(reach, model)["selection"] * 4 * model.heads * model.dim
    saved_by_torch = ms(first / machine.triton - first / machine.cudnn)
    q_seconds = 2 * 8192 * model.heads * model.dim / machine.hbm
    lines = ["## Where sparse is slower than dense", ""]
    lines += wrapped(
        f"Up to {length(reach)} tokens every block is selected, so selection *is* dense attention: by torch's kernel, "
        "where one call of it takes the sequences (`nsa_kernels/dense.py`), else by Triton's window kernel "
        "without an end. The switch is where the two are equal, `block_size * block_counts` tokens. Beyond it, the "
        "union of a tile's blocks is never more than all blocks before it. But three branches and their gates are "
        "computed where dense attention has one. So **the model expects sparse attention to be slower than cuDNN's "
        "dense attention on short sequences**: at every length up to where the ratio in the tables passes 1. That is "
        "between 8K and 16K tokens where neighbours agree (r = 1.7), and beyond 32K where they do not (r = 8). Forward "
        "times in milliseconds, r = 1.7:"
    )
    lines += ["", *table(["tokens", "dense", "selection", "compression", "choice", "window, sum", "pooling"], rows)]
    lines += ["What could be done, and why it is not:", ""]
    for item in (
        "*One kernel for all branches of a short sequence.* It would save launches and the branches' outputs, but its "
        "dense part would run at Triton's rate. It would still be slower than dense attention: the window's products "
        "come on top.",
        "*Window and compression in one kernel.* They have nothing in common but q: a read of it and a launch, "
        f"{ms(q_seconds + machine.launch)} ms at 8K tokens.",
        f"*torch for the first {length(reach)} tokens of a longer sequence*, which select every block too. It would "
        f"save {saved_by_torch} ms and cost three more launches, {ms(3 * machine.launch)} ms.",
        "*Rare blocks by pairs.* A tile walks a block with all of its rows, even where one token alone selected it. A "
        "kernel that takes such (token, block) pairs by themselves would be cheaper for blocks of few tokens, at the "
        "price of partial outputs for every pair and a merge. Whether it pays depends on how many of a tile's tokens "
        "share its blocks, on real q and k, which has not been measured. `bench_kernels.py` (synthetic q and k) and "
        "`bench_prefill.py` (those of a model with random weights) report it by length and layer, `unions.recording` "
        "for any model that runs inside it. It should be built if `hybrid_over_union` is below 0.75 in most layers of "
        "a trained model from 32K tokens on.",
    ):
        lines += wrapped(item, "* ")
    return [*lines, ""]


def page(model: Model, machine: Machine) -> str:
    unions = (1.7, 3.0, 8.0)
    lines = [
        "# Expected times: a model, not a measurement",
        "",
        "Written by `python benchmarks/kernel_model.py`. **Every time on this page is arithmetic.** It says what the",
        "kernels aim at and where they would be limited. Measurements come from `benchmarks/run_gpu.sh`; where the two",
        "disagree, the model is wrong.",
        "",
        "A kernel's time is the largest of: its operations at an assumed rate; bytes between L2 cache and",
        "multiprocessors; bytes of device memory, each read or written once; plus 5 microseconds per launch. One layer",
        "of a 7B model (28 query and 4 key/value heads, head_dim 128, bf16), blocks of 64, 32 selected, a window of",
        "256 tokens.",
        "",
        "## Assumptions",
        "",
        *table(
            ["quantity", "assumed", "because"],
            [
                ["device memory", f"{machine.hbm / 1e12:g} TB/s", "a large copy on an H200, counting both directions"],
                ["matrix units", f"{machine.peak_matmul / 1e12:g} TFLOP/s", "large bf16 products of random numbers"],
                [
                    "L2 cache to multiprocessors",
                    f"{machine.l2 / 1e12:g} TB/s",
                    "read backwards from the time that another project's page states for a kernel bound by it",
                ],
                ["attention in Triton", f"{machine.triton / 1e12:g} TFLOP/s", "a guess: 58% of the matrix units"],
                [
                    "FlashAttention 2, forward and backward",
                    f"{machine.flash2 / 1e12:g}, {machine.flash2_backward / 1e12:g} TFLOP/s",
                    "a guess: it does not use Hopper's matrix instructions",
                ],
                [
                    "cuDNN, forward and backward",
                    f"{machine.cudnn / 1e12:g}, {machine.cudnn_backward / 1e12:g} TFLOP/s",
                    "a guess: it does",
                ],
                ["linear layers", f"{machine.linear / 1e12:g} TFLOP/s", "a guess"],
            ],
        ),
        "**r** is the number of distinct blocks that the 18 tokens of a tile select, over the 32 that each selects. It",
        "depends on the video, lies between 1 and 18, and decides what selection costs. Random tokens have r near its",
        "largest; tokens of one frame region that look alike have it near 1. `bench_kernels.py` reports it.",
        "",
        "## Kernels at 128K tokens",
        "",
    ]
    for backward in (False, True):
        union = 3.0
        rows = [
            [
                cost.name,
                f"{cost.operations / 1e12:.3g}" if cost.operations else "",
                *(ms(x) if x else "" for x in (cost.compute, cost.l2, cost.hbm)),
                cost.bound_by(),
                ms(cost.seconds(machine)),
            ]
            for cost in nsa_costs(131072, model, machine, union, backward)
        ]
        sum_ = total(nsa_costs(131072, model, machine, union, backward), machine)
        rows.append(["**sum**", "", "", "", "", "", f"**{ms(sum_)}**"])
        lines += [f"{'Backward' if backward else 'Forward'}, r = {union:g}:", ""]
        lines += table(
            ["kernel", "TFLOP", "operations ms", "L2 ms", "memory ms", "bound by", "model ms"],
            rows,
        )
    lines += ["## Whole attention against dense", "", "Milliseconds, and how many times faster than torch's cuDNN.", ""]
    for backward in (False, True):
        rows = []
        for tokens in TOKENS:
            dense = {
                kernel: dense_seconds(tokens, model, machine, kernel, False)
                + (dense_seconds(tokens, model, machine, kernel, True) if backward else 0)
                for kernel in ("flash2", "cudnn")
            }
            row = [length(tokens), ms(dense["flash2"]), ms(dense["cudnn"])]
            for union in unions:
                ours = total(nsa_costs(tokens, model, machine, union, False), machine)
                ours += total(nsa_costs(tokens, model, machine, union, True), machine) if backward else 0
                row.append(f"{ms(ours)} ({dense['cudnn'] / ours:.2g}x)")
            rows.append(row)
        lines += ["Forward and backward:" if backward else "Forward:", ""]
        lines += table(["tokens", "dense, flash", "dense, cuDNN", *(f"sparse, r = {r:g}" for r in unions)], rows)
    lines += short_sequences(model, machine)
    lines += [
        "## Prefill of the 7B model",
        "",
        "Seconds for so many video tokens: linear layers, gates, attention. Without vision tower and text rows.",
        "",
        *table(
            ["tokens", "dense, cuDNN", *(f"sparse, r = {r:g}" for r in unions)],
            [
                [
                    length(tokens),
                    f"{(dense := prefill_seconds(tokens, model, machine, None)):.3g}",
                    *(
                        f"{(ours := prefill_seconds(tokens, model, machine, union)):.3g} ({dense / ours:.2g}x)"
                        for union in unions
                    ),
                ]
                for tokens in TOKENS[3:]
            ],
        ),
        "## Text rows",
        "",
        "Milliseconds of one run of rows over so many keys, itself included: `text_rows_attention` (the heads of a",
        "group in one tile, keys split over the GPU) / torch's FlashAttention 2 with its diagonal at the last key, the",
        "only fast kernel of torch's that needs no mask of rows x keys for such a run.",
        "",
        *table(
            ["rows", *(f"{length(keys)} keys" for keys in (1024, 8192, 32768, 131072))],
            [
                [
                    rows,
                    *(
                        f"{ms(text_seconds(rows, keys, model, machine, 'triton'))} / "
                        f"{ms(text_seconds(rows, keys, model, machine, 'flash2'))}"
                        if rows < keys
                        else "square"
                        for keys in (1024, 8192, 32768, 131072)
                    ),
                ]
                for rows in (1, 16, 100, 512, 1024, 4096)
            ],
        ),
        "Where rows and keys are the same tokens (a run at the start of its sample), dense causal attention is what",
        "torch does without a mask, in one launch, and cuDNN's kernel is assumed to be a third faster than Triton's:",
        "there `triton_rows.torch_is_as_good` says to use torch. At 1K keys the difference is a launch either way.",
        "",
        *table(
            ["rows = keys", "Triton", "torch, flash", "torch, cuDNN"],
            [
                [
                    rows,
                    ms(text_seconds(rows, rows, model, machine, "triton")),
                    *(ms(dense_seconds(rows, model, machine, kernel, False)) for kernel in ("flash2", "cudnn")),
                ]
                for rows in (32, 256, 1024, 4096)
            ],
        ),
    ]
    return "\n".join(lines).rstrip() + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--print", action="store_true", help="to the terminal instead of docs/kernel_model.md")
    text = page(Model(), Machine())
    if parser.parse_args().print:
        print(text, end="")
    else:
        PAGE.write_text(text)


if __name__ == "__main__":
    main()
