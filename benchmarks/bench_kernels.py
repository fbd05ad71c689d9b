"""Latency and peak memory of the Triton kernels against dense attention and other implementations, on one GPU.

    python benchmarks/bench_kernels.py --output kernels.json --plot kernels.png [--peers DIR] [--seconds 230]
    TRITON_INTERPRET=1 python benchmarks/bench_kernels.py --dry-run        # tiny sizes on a CPU; times mean nothing

Shapes are those of a 7B layer: 28 query heads, 4 key/value heads, head_dim 128, bf16, one sequence. Per length: all of
Native Sparse Attention forward and forward+backward, each branch forward and backward, 512 text rows over all keys, and
dense causal attention (torch's FlashAttention and cuDNN kernels, flex attention). With `--peers`, other public
implementations (benchmarks/peers.py). Ratios are taken within this one run. Each of these parts has a process of its
own and a share of the time, and goes through the lengths in order of importance. The report is written after every
length, so that what was measured survives whatever comes after it.
"""

import argparse
import dataclasses
import functools
import json
import os
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from unittest import mock

DRY_RUN = "--dry-run" in sys.argv
if DRY_RUN:  # the interpreter has to be chosen before Triton is imported, which torch may do
    os.environ["TRITON_INTERPRET"] = "1"

import torch  # noqa: E402

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

import peers  # noqa: E402
import timing  # noqa: E402
import unions  # noqa: E402

from nsa_kernels import attention, utils  # noqa: E402

# The lengths that matter most come first, time may run out, after one that takes little of it.
TOKENS = [32768, 131072, 8192, 65536, 16384, 4096, 2048, 1024]
FLEX_TOKENS = (8192, 32768, 131072)  # each one is compiled anew
HEADS, HEAD_DIM, TEXT_ROWS = (28, 4), 128, 512
NSA = {"block_size": 64, "block_counts": 32, "window_size": 256}
# What `triton_tiles.tuning` could be instead.
SWEEP = ({}, {"selection_span": 2}, {"window_rows": 64}, {"stages": 2}, {"stages": 4}, {"one_dq": False})
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


def measure_each_branch(watch: timing.Stopwatch, inputs: list[torch.Tensor], lengths: utils.SequenceLengths) -> dict:
    """Each branch's kernels alone, forward and backward, and which blocks neighbouring tokens select together."""
    from nsa_kernels import triton_compression as compression
    from nsa_kernels import triton_rows as rows
    from nsa_kernels import triton_selection as selection
    from nsa_kernels import triton_tiles

    q, k, v, *_ = inputs
    size, counts, width, scale = *NSA.values(), q.shape[2] ** -0.5
    o, lse, indices = compression.compress_and_choose(q, k, v, lengths, size, counts, scale)
    do = torch.randn_like(o)
    delta = (o.float() * do.float()).sum(-1)
    lists = selection.list_blocks(indices, q, lengths, size, is_sorted=True)
    # Any lse does for timing the other branches' backward, but a branch's own keeps its probabilities at most 1.
    lse_slc = selection.selection_fwd(q, k, v, lists, lengths, size, scale)[1]
    lse_swa = rows.window_fwd(q, k, v, lengths, width, scale)[1]
    of_cmp, of_slc, of_swa = (triton_tiles.lse_and_delta(x, delta) for x in (lse, lse_slc, lse_swa))
    # As the whole attention does it: where selection's dq kernel takes the window too, the window has none.
    is_one = selection.takes_window(q)
    window = (width, of_swa) if is_one else None
    calls = {
        "compression forward": lambda: compression.compress(q, k, v, lengths, size, scale),
        "compression and choice forward": lambda: compression.compress_and_choose(
            q, k, v, lengths, size, counts, scale
        ),
        "lists of blocks": lambda: selection.list_blocks(indices, q, lengths, size, is_sorted=True),
        "selection forward": lambda: selection.selection_fwd(q, k, v, lists, lengths, size, scale),
        "window forward": lambda: rows.window_fwd(q, k, v, lengths, width, scale),
        "compression backward": lambda: compression.compression_bwd(q, k, v, of_cmp, do, lengths, size, scale),
        "selection backward": lambda: selection.selection_bwd(q, k, v, lists, of_slc, do, lengths, size, scale, window),
        "window backward": lambda: rows.window_bwd(q, k, v, of_swa, do, lengths, width, scale, wants_dq=not is_one),
    }
    results = {name: watch.measure(call) for name, call in calls.items()}
    results["union"] = unions.union_statistics(indices)
    return results


def measure_nsa(watch: timing.Stopwatch, tokens: int, device: torch.device, dtype: torch.dtype) -> dict:
    lengths, results = utils.SequenceLengths.from_lengths([tokens], device=device), {}
    for kind in ("video", "random"):
        inputs = timing.make_inputs(tokens, HEADS, HEAD_DIM, dtype, device, kind)
        results |= both_directions(watch, f"nsa ({kind})", nsa(lengths), inputs)
    return results


def measure_dense(watch: timing.Stopwatch, tokens: int, device: torch.device, dtype: torch.dtype) -> dict:
    inputs, results = timing.make_inputs(tokens, HEADS, HEAD_DIM, dtype, device, "random")[:3], {}
    for name, backend in (("dense flash", "FLASH_ATTENTION"), ("dense cudnn", "CUDNN_ATTENTION")):
        results |= both_directions(watch, name, sdpa(backend), inputs)
    return results


def measure_branches(watch: timing.Stopwatch, tokens: int, device: torch.device, dtype: torch.dtype) -> dict:
    lengths, results = utils.SequenceLengths.from_lengths([tokens], device=device), {}
    for kind in ("video", "random"):
        if not watch.is_over():
            inputs = timing.make_inputs(tokens, HEADS, HEAD_DIM, dtype, device, kind)
            branches = measure_each_branch(watch, inputs, lengths)
            results |= {f"{name} ({kind})": result for name, result in branches.items()}
    return results


def measure_text(watch: timing.Stopwatch, tokens: int, device: torch.device, dtype: torch.dtype) -> dict:
    from nsa_kernels import triton_rows

    q, k, v, *_ = timing.make_inputs(tokens, HEADS, HEAD_DIM, dtype, device, "random")
    inputs = [q[-min(TEXT_ROWS, tokens // 2) :], k, v]
    results = both_directions(watch, f"{TEXT_ROWS} text rows", triton_rows.text_rows_attention, inputs)
    return results | both_directions(watch, f"{TEXT_ROWS} text rows, torch flash", text_by_flash, inputs)


def measure_flex(watch: timing.Stopwatch, tokens: int, device: torch.device, dtype: torch.dtype) -> dict:
    if tokens not in FLEX_TOKENS:
        return {}
    inputs = timing.make_inputs(tokens, HEADS, HEAD_DIM, dtype, device, "random")[:3]
    return both_directions(watch, "dense flex", flex(tokens, device), inputs)


def measure_sweep(watch: timing.Stopwatch, tokens: int, device: torch.device, dtype: torch.dtype) -> dict:
    """All of the attention with each other value of `triton_tiles.tuning`, one at a time, and with what it is."""
    from nsa_kernels import triton_tiles

    lengths, results = utils.SequenceLengths.from_lengths([tokens], device=device), {}
    inputs = timing.make_inputs(tokens, HEADS, HEAD_DIM, dtype, device, "video")
    for change in SWEEP:
        tuning = dataclasses.replace(triton_tiles.tuning, **change)
        name = ", ".join(f"{key} = {value}" for key, value in change.items()) or "as it is"
        with mock.patch.object(triton_tiles, "tuning", tuning):
            results |= both_directions(watch, f"sweep: {name},", nsa(lengths), inputs)
    return results


def measure_profile(watch: timing.Stopwatch, tokens: int, device: torch.device, dtype: torch.dtype) -> dict:
    """What each kernel takes of one forward and backward pass, by torch's profiler."""
    from torch.profiler import ProfilerActivity, profile

    lengths = utils.SequenceLengths.from_lengths([tokens], device=device)
    call = forward_backward(nsa(lengths), timing.make_inputs(tokens, HEADS, HEAD_DIM, dtype, device, "video"))
    call()  # compiles
    timing.synchronize(device)
    on_gpu = device.type == "cuda"
    with profile(activities=[ProfilerActivity.CUDA if on_gpu else ProfilerActivity.CPU]) as profiler:
        call()
        timing.synchronize(device)
    found = [
        ((event.self_device_time_total if on_gpu else event.self_cpu_time_total) / 1e3, event.count, event.key)
        for event in profiler.key_averages()
    ]
    return {f"kernel {key[:80]}": {"ms": ms, "runs": runs} for ms, runs, key in sorted(found, reverse=True)[:40] if ms}


# What is measured, and each one's share of the time. Each has a process of its own: a kernel that fails takes down
# everything that comes after it in a process.
PARTS = {
    "nsa": (measure_nsa, 3.0),
    "dense": (measure_dense, 2.5),
    "branches": (measure_branches, 3.0),
    "text": (measure_text, 1.5),
    "flex": (measure_flex, 1.5),
    "sweep": (measure_sweep, 2.0),
    "profile": (measure_profile, 0.5),
}
# Measured unless `--parts` says otherwise: the last two answer other questions than how fast it is.
USUAL_PARTS = ("nsa", "dense", "branches", "text", "flex")


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


def measure_part(args: argparse.Namespace, device: torch.device, dtype: torch.dtype) -> int:
    """In a process of its own: one part, or one peer, at all lengths; a line per result."""
    watch = timing.Stopwatch(device, args.seconds, seconds_per_measurement=0.4)
    if args.part in PARTS:
        measure = functools.partial(PARTS[args.part][0], watch)
    else:
        function = peers.build(args.part, args.peers, NSA, device)

        def measure(tokens, device, dtype):
            inputs = timing.make_inputs(tokens, HEADS, HEAD_DIM, dtype, device, "video")
            return both_directions(watch, f"peer {args.part}", function, inputs)

    for tokens in args.tokens:
        try:
            results = {} if watch.is_over() else measure(tokens, device, dtype)
        except Exception as error:  # out of memory, say: other lengths may do
            traceback.print_exc()
            results = {f"{args.part} forward": {"error": f"{type(error).__name__}: {str(error)[:300]}"}}
        print("RESULT " + json.dumps({"tokens": tokens, "results": results}), flush=True)
        timing.synchronize(device)  # raises after a kernel that failed: nothing in this process would work any more
    return 0


def run_part(name: str, args: argparse.Namespace, seconds: float) -> Iterator[dict]:
    """Results of a part, length by length. A process that fails is followed by one for the lengths after that."""
    end, remaining = time.monotonic() + seconds, list(args.tokens)
    while remaining and end - time.monotonic() > 5:
        left = end - time.monotonic()
        command = [sys.executable, __file__, "--part", name, "--seconds", str(left - 3), "--tokens"]
        command += [str(tokens) for tokens in remaining]
        command += ["--peers", str(args.peers)] if args.peers else []
        command += ["--dry-run"] if DRY_RUN else []
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        killer = threading.Timer(left, process.kill)
        killer.start()
        for line in process.stdout:
            if line.startswith("RESULT "):
                found = json.loads(line.removeprefix("RESULT "))
                remaining.remove(found["tokens"])
                yield found
            else:
                print(line, end="", flush=True)
        status = process.wait()
        killer.cancel()
        if status and remaining and time.monotonic() < end:
            # It may have failed after its last result, on the way to the next length: that one gets another chance
            # unless nothing at all came of this process.
            print(f"{name}: the process for {remaining} ended with {status}", flush=True)
            if command[command.index("--tokens") + 1] == str(remaining[0]):
                failed = remaining.pop(0)
                yield {"tokens": failed, "results": {f"{name} forward": {"error": f"process ended with {status}"}}}
        elif status:
            for tokens in remaining:
                yield {"tokens": tokens, "results": {f"{name} forward": {"skipped": "stopped: out of time"}}}
            return


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


def print_results(row: dict) -> None:
    for name, result in row["results"].items():
        if "ms" in result:
            peak = f"{result['peak_bytes'] / 2**30:8.2f} GiB" if "peak_bytes" in result else ""
            print(f"{row['tokens']:>7} {name:48} {result['ms']:10.3f} ms {peak}")
        else:
            print(f"{row['tokens']:>7} {name:48} {result}")
    sys.stdout.flush()


def print_ratios(row: dict) -> None:
    for name, ratio in row["ratios"].items():
        print(f"{row['tokens']:>7} {ratio:8.2f} x  {name}")
    sys.stdout.flush()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, nargs="+", default=TOKENS)
    parser.add_argument("--output", type=Path, help="JSON file to write")
    parser.add_argument("--plot", type=Path, help="PNG file to write")
    parser.add_argument("--seconds", type=float, default=600, help="stop starting measurements after this long")
    parser.add_argument("--peers", type=Path, help="folder with other implementations, laid out as in peers.py")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=USUAL_PARTS, help="what to measure")
    parser.add_argument("--part", choices=[*PARTS, *peers.NAMES], help="measure this one alone, in this process")
    parser.add_argument("--dry-run", action="store_true", help="tiny sizes, on the CPU where there is no GPU")
    args = parser.parse_args()
    device = timing.choose_device(args.dry_run)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float16
    if args.part:
        return measure_part(args, device, dtype)

    available = [name for name in peers.NAMES if peers.is_available(name, args.peers)]
    report = {
        "command": " ".join(["python", *sys.argv]),
        "machine": timing.describe_machine(device),
        "shapes": {"heads": HEADS, "head_dim": HEAD_DIM, "dtype": str(dtype), **NSA},
        "peers": {name: "measured" if name in available else "not here" for name in peers.NAMES},
        "lengths": [{"tokens": tokens, "results": {}, "ratios": {}} for tokens in args.tokens],
    }
    rows = {row["tokens"]: row for row in report["lengths"]}
    end = time.monotonic() + args.seconds
    shares = {name: PARTS[name][1] for name in args.parts}
    if args.peers or set(args.parts) == set(USUAL_PARTS):
        shares |= dict.fromkeys(available, 2.5)
    for name in list(shares):
        # What a part leaves of its time goes to those after it.
        seconds = (end - time.monotonic()) * shares[name] / sum(shares.values())
        del shares[name]
        for found in run_part(name, args, seconds):
            row = rows[found["tokens"]]
            row["results"] |= found["results"]
            row["ratios"] = add_ratios(row["results"])
            print_results(found)
            if args.output:
                timing.write_report(args.output, report)
    for row in report["lengths"]:
        print_ratios(row)
    if args.plot:
        plot(report, args.plot)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
