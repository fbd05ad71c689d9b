"""Latency and peak memory of the Triton kernels against dense attention and other implementations, on one GPU.

    python benchmarks/bench_kernels.py --output kernels.json --plot kernels.png [--peers DIR] [--seconds 230]
    TRITON_INTERPRET=1 python benchmarks/bench_kernels.py --dry-run        # tiny sizes on a CPU; times mean nothing

Shapes are those of a 7B layer: 28 query heads, 4 key/value heads, head_dim 128, bf16, one sequence. Per length: all of
Native Sparse Attention forward and forward+backward, each branch forward and backward, 512 text rows over all keys, and
dense causal attention (torch's FlashAttention and cuDNN kernels, flex attention). With `--peers`, other public
implementations (benchmarks/peers.py), each in a process of its own. Ratios are taken within this one run. The report is
written after every length, so that what was measured survives a run that is cut off.
"""

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

DRY_RUN = "--dry-run" in sys.argv
if DRY_RUN:  # the interpreter has to be chosen before Triton is imported, which torch may do
    os.environ["TRITON_INTERPRET"] = "1"

import torch  # noqa: E402

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

import peers  # noqa: E402
import timing  # noqa: E402

from nsa_kernels import attention, utils  # noqa: E402

# The lengths that matter most come first: time may run out.
TOKENS = [131072, 32768, 8192, 65536, 16384, 4096, 2048, 1024]
FLEX_TOKENS = (8192, 32768, 131072)  # each one is compiled anew
HEADS, HEAD_DIM, TEXT_ROWS = (28, 4), 128, 512
NSA = {"block_size": 64, "block_counts": 32, "window_size": 256}
if DRY_RUN:
    TOKENS, FLEX_TOKENS = [80, 48], (48,)
    HEADS, HEAD_DIM, TEXT_ROWS = (7, 1), 32, 8
    NSA = {"block_size": 16, "block_counts": 3, "window_size": 24}


def heads_first(x: torch.Tensor) -> torch.Tensor:
    """(tokens, heads, head_dim) -> (1, heads, tokens, head_dim), a view."""
    return x.transpose(0, 1)[None]


def forward_backward(function: Callable, inputs: list[torch.Tensor]) -> Callable[[], object]:
    """A call that also computes the gradients of all inputs."""
    leaves = [x.detach().requires_grad_() for x in inputs]
    do = torch.randn_like(inputs[0])
    return lambda: torch.autograd.grad(function(*leaves), leaves, do)


def both_directions(watch: timing.Stopwatch, name: str, function: Callable, inputs: list[torch.Tensor]) -> dict:
    with torch.no_grad():
        results = {f"{name} forward": watch.measure(lambda: function(*inputs))}
    if "ms" in results[f"{name} forward"]:
        results[f"{name} forward+backward"] = watch.measure(forward_backward(function, inputs))
    return results


def sdpa(backend: str) -> Callable:
    from torch.nn.attention import SDPBackend, sdpa_kernel

    def function(q, k, v):
        with sdpa_kernel([getattr(SDPBackend, backend)]):
            o = torch.nn.functional.scaled_dot_product_attention(
                *map(heads_first, (q, k, v)), is_causal=True, enable_gqa=True
            )
        return o[0].transpose(0, 1)

    return function


def flex(tokens: int, device: torch.device) -> Callable:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    def causal(batch, head, query, key):
        return query >= key

    compiled = not DRY_RUN  # on a CPU it would need a C++ compiler
    mask = create_block_mask(causal, None, None, tokens, tokens, device=device, _compile=compiled)
    attend = torch.compile(flex_attention, dynamic=False) if compiled else flex_attention
    return lambda q, k, v: attend(*map(heads_first, (q, k, v)), block_mask=mask, enable_gqa=True)[0].transpose(0, 1)


def text_by_flash(q, k, v):
    """Text rows by torch's FlashAttention 2 kernel, which alone of its kernels aligns the diagonal to the last key."""
    from torch.nn.attention.bias import causal_lower_right

    bias = causal_lower_right(q.shape[0], k.shape[0])
    o = torch.nn.functional.scaled_dot_product_attention(*map(heads_first, (q, k, v)), attn_mask=bias, enable_gqa=True)
    return o[0].transpose(0, 1)


def nsa(lengths: utils.SequenceLengths) -> Callable:
    return lambda q, k, v, *gates: attention.nsa_attention(q, k, v, *gates, lengths, **NSA, backend="triton")


def measure_branches(watch: timing.Stopwatch, inputs: list[torch.Tensor], lengths: utils.SequenceLengths) -> dict:
    """Each branch's kernels alone, forward and backward, and how many different blocks neighbouring tokens select."""
    from nsa_kernels import triton_compression as compression
    from nsa_kernels import triton_selection as selection
    from nsa_kernels import triton_window as window

    q, k, v, *_ = inputs
    size, counts, width, scale = *NSA.values(), q.shape[2] ** -0.5
    o, lse, indices = compression.compress_and_choose(q, k, v, lengths, size, counts, scale)
    do = torch.randn_like(o)
    delta = (o.float() * do.float()).sum(-1)
    # Any lse does for timing the other branches' backward, but a branch's own keeps its probabilities at most 1.
    lse_slc = selection.selection_fwd(q, k, v, indices, lengths, size, scale)[1]
    lse_swa = window.window_fwd(q, k, v, lengths, width, scale)[1]
    calls = {
        "compression forward": lambda: compression.compress(q, k, v, lengths, size, scale),
        "compression and choice forward": lambda: compression.compress_and_choose(
            q, k, v, lengths, size, counts, scale
        ),
        "selection forward": lambda: selection.selection_fwd(q, k, v, indices, lengths, size, scale),
        "window forward": lambda: window.window_fwd(q, k, v, lengths, width, scale),
        "compression backward": lambda: compression.compression_bwd(q, k, v, lse, do, delta, lengths, size, scale),
        "selection backward": lambda: selection.selection_bwd(
            q, k, v, indices, lse_slc, do, delta, lengths, size, scale
        ),
        "window backward": lambda: window.window_bwd(q, k, v, lse_swa, do, delta, lengths, width, scale),
    }
    results = {name: watch.measure(call) for name, call in calls.items()}
    results["union"] = {"blocks_per_18_tokens_over_selected": union_ratio(indices, 18)}
    return results


def union_ratio(indices: torch.Tensor, tile: int) -> float:
    """Distinct blocks that `tile` neighbouring tokens select, over the number that one of them does; 1 is best."""
    tiles = len(indices) // tile
    indices = (
        indices[: tiles * tile].unflatten(0, (tiles, tile)).transpose(1, 2).flatten(2).long()
    )  # [tiles, G, blocks]
    num_blocks = int(indices.max()) + 1
    total = 0
    for part in indices.split(512):  # the table of all tiles would be large
        seen = torch.zeros(*part.shape[:2], num_blocks + 1, dtype=torch.bool, device=indices.device)
        total += int(seen.scatter_(-1, part + 1, True)[..., 1:].sum())
    return total * tile / int((indices >= 0).sum())


def measure_length(watch: timing.Stopwatch, tokens: int, device: torch.device, dtype: torch.dtype) -> dict:
    lengths = utils.SequenceLengths.from_lengths([tokens], device=device)
    results = {}
    for kind in ("video", "random"):
        inputs = timing.make_inputs(tokens, HEADS, HEAD_DIM, dtype, device, kind)
        results |= both_directions(watch, f"nsa ({kind})", nsa(lengths), inputs)
        try:
            branches = measure_branches(watch, inputs, lengths)
            results |= {f"{name} ({kind})": result for name, result in branches.items()}
        except Exception as error:  # the other measurements go on
            results[f"branches ({kind})"] = {"error": f"{type(error).__name__}: {str(error)[:300]}"}
    q, k, v, *_ = inputs
    for name, backend in (("dense flash", "FLASH_ATTENTION"), ("dense cudnn", "CUDNN_ATTENTION")):
        results |= both_directions(watch, name, sdpa(backend), [q, k, v])
    from nsa_kernels import triton_text

    rows = min(TEXT_ROWS, tokens // 2)
    text = [q[-rows:], k, v]
    results |= both_directions(watch, f"{TEXT_ROWS} text rows", triton_text.text_rows_attention, text)
    results |= both_directions(watch, f"{TEXT_ROWS} text rows, torch flash", text_by_flash, text)
    if tokens in FLEX_TOKENS and not watch.is_over():
        try:
            results |= both_directions(watch, "dense flex", flex(tokens, device), [q, k, v])
        except Exception as error:
            results["dense flex forward"] = {"error": f"{type(error).__name__}: {str(error)[:300]}"}
    return results


def add_ratios(results: dict) -> dict:
    """How many times faster than dense attention, per direction and kind of data, within this run."""
    ratios = {}
    for direction in ("forward", "forward+backward"):
        for kind in ("video", "random"):
            ours = results.get(f"nsa ({kind}) {direction}", {}).get("ms")
            for name in [n for n in results if n.startswith(("dense", "peer")) and n.endswith(f" {direction}")]:
                if ours and results[name].get("ms"):
                    ratios[f"{name.removesuffix(' ' + direction)} / nsa ({kind}), {direction}"] = (
                        results[name]["ms"] / ours
                    )
    return ratios


def measure_peer(args: argparse.Namespace, device: torch.device, dtype: torch.dtype) -> None:
    """In a process of its own: one peer at all lengths, a line per result."""
    import json

    watch = timing.Stopwatch(device, args.seconds)
    function = peers.build(args.peer, args.peers, NSA, device)
    for tokens in args.tokens:
        inputs = timing.make_inputs(tokens, HEADS, HEAD_DIM, dtype, device, "video")
        results = both_directions(watch, f"peer {args.peer}", function, inputs)
        print("RESULT " + json.dumps({"tokens": tokens, "results": results}), flush=True)
        if any("error" in result for result in results.values()):
            break  # a CUDA error leaves nothing usable behind, and larger lengths fail likewise


def run_peer(name: str, args: argparse.Namespace, seconds: float) -> list[dict]:
    import json

    command = [sys.executable, __file__, "--peer", name, "--seconds", str(seconds - 5), "--tokens"]
    command += [str(tokens) for tokens in sorted(args.tokens)]
    command += ["--peers", str(args.peers)] if args.peers else []
    command += ["--dry-run"] if DRY_RUN else []
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=seconds)
        output, reason = done.stdout, done.stderr[-300:]
    except subprocess.TimeoutExpired as error:
        output, reason = (error.stdout or b"").decode(), f"stopped after {seconds:.0f} s"
    found = [json.loads(line.removeprefix("RESULT ")) for line in output.splitlines() if line.startswith("RESULT ")]
    if not found:
        found = [{"tokens": tokens, "results": {f"peer {name} forward": {"error": reason}}} for tokens in args.tokens]
    return found


def plot(report: dict, path: Path) -> None:
    """Latency over length: all of it against dense attention, and the branches."""
    try:
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot
    except ImportError:
        print("no plot: matplotlib is not installed")
        return
    rows = sorted(report["lengths"], key=lambda row: row["tokens"])
    figure, axes = pyplot.subplots(1, 3, figsize=(18, 5.5))
    names = {name for row in rows for name, result in row["results"].items() if "ms" in result}
    whole = ("nsa", "dense", "peer")
    panels = [
        ("forward", [n for n in names if n.startswith(whole) and n.endswith(" forward")]),
        ("forward + backward", [n for n in names if n.startswith(whole) and n.endswith("forward+backward")]),
        ("branches, video data, and text rows", [n for n in names if "(video)" in n and not n.startswith("nsa")]),
    ]
    panels[2][1].extend(n for n in names if "text rows" in n and n.endswith(" forward"))
    for axis, (title, lines) in zip(axes, panels, strict=True):
        for name in sorted(lines):
            points = [(r["tokens"], r["results"][name]["ms"]) for r in rows if "ms" in r["results"].get(name, {})]
            axis.plot(*zip(*points, strict=True), marker="o", label=name)
        axis.set(title=title, xlabel="tokens", ylabel="milliseconds", yscale="log")
        axis.set_xscale("log", base=2)
        axis.grid(True, which="both", alpha=0.3)
        if lines:
            axis.legend(fontsize=7)
    machine = report["machine"]
    figure.suptitle(f"{machine['device']}, torch {machine['torch']}, triton {machine['triton']}, {report['shapes']}")
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def print_length(row: dict) -> None:
    print(f"\n{row['tokens']} tokens")
    for name, result in row["results"].items():
        if "ms" in result:
            peak = f"{result['peak_bytes'] / 2**30:8.2f} GiB" if "peak_bytes" in result else ""
            print(f"  {name:48} {result['ms']:10.3f} ms {peak}")
        else:
            print(f"  {name:48} {result}")
    for name, ratio in row["ratios"].items():
        print(f"  {ratio:8.2f} x  {name}")
    sys.stdout.flush()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, nargs="+", default=TOKENS)
    parser.add_argument("--output", type=Path, help="JSON file to write")
    parser.add_argument("--plot", type=Path, help="PNG file to write")
    parser.add_argument("--seconds", type=float, default=600, help="stop starting measurements after this long")
    parser.add_argument("--peers", type=Path, help="folder with other implementations, laid out as in peers.py")
    parser.add_argument("--peer", choices=peers.NAMES, help="measure this one alone (how --peers runs them)")
    parser.add_argument("--dry-run", action="store_true", help="tiny sizes, on the CPU where there is no GPU")
    args = parser.parse_args()
    device = timing.choose_device(args.dry_run)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float16
    if args.peer:
        measure_peer(args, device, dtype)
        return

    report = {
        "command": " ".join(["python", *sys.argv]),
        "machine": timing.describe_machine(device),
        "shapes": {"heads": HEADS, "head_dim": HEAD_DIM, "dtype": str(dtype), **NSA},
        "lengths": [],
    }
    end = time.monotonic() + args.seconds
    available = [name for name in peers.NAMES if peers.is_available(name, args.peers)]
    report["peers"] = {name: "measured" if name in available else "not here" for name in peers.NAMES}
    # Peers take their share at the end, in processes that need the GPU for themselves.
    watch = timing.Stopwatch(device, args.seconds - min(45 * len(available), args.seconds / 2))
    for tokens in args.tokens:
        row = {"tokens": tokens, "results": measure_length(watch, tokens, device, dtype)}
        row["ratios"] = add_ratios(row["results"])
        report["lengths"].append(row)
        print_length(row)
        if args.output:
            timing.write_report(args.output, report)
    for index, name in enumerate(available):
        share = (end - time.monotonic()) / (len(available) - index)
        for found in run_peer(name, args, max(share, 10)):
            row = next(row for row in report["lengths"] if row["tokens"] == found["tokens"])
            row["results"] |= found["results"]
    for row in report["lengths"]:
        row["ratios"] = add_ratios(row["results"])
        if available:
            print_length(row)
    if args.output:
        timing.write_report(args.output, report)
    if args.plot:
        plot(report, args.plot)


if __name__ == "__main__":
    main()
