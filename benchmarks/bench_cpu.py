"""Forward time and memory of Native Sparse Attention (torch backend) against dense causal attention, on a CPU.

    python benchmarks/bench_cpu.py --threads 2 --output benchmarks/results/<date>_cpu_<what>.json

Dense attention is torch's scaled_dot_product_attention(is_causal=True, enable_gqa=True). Shapes are those of a 7B
layer: 28 query heads, 4 key/value heads, head_dim 128, float32, one sequence of random tokens. For random tokens the
selected blocks of neighbouring tokens have nothing in common, which is the hardest case for the selection branch.

Every measurement runs in a process of its own, so that none inherits another's memory. Ratios are dense over NSA, of
wall time and of CPU time; the second is the one to look at where `load_average` shows that the machine did other work.
Extra memory is the largest resident set during the call, minus the resident set before it, when the inputs exist: it
includes the output.
"""

import argparse
import datetime
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from nsa_kernels import attention, compression, selection, sliding_window, topk, utils

NUM_HEADS, NUM_KV_HEADS, HEAD_DIM = 28, 4, 128
NSA = {"block_size": 64, "block_counts": 32, "window_size": 256}
MEASUREMENTS = ("nsa", "dense", "compression", "block_choice", "selection", "window")

# Dense attention is measured once beyond this length, where one call takes a minute or more.
DENSE_REPEAT_TOKENS = 16384


def make_call(name: str, tokens: int) -> Callable[[], object]:
    """The function to time; what it needs exists when this returns."""
    torch.manual_seed(0)
    q = torch.randn(tokens, NUM_HEADS, HEAD_DIM)
    k, v = torch.randn(2, tokens, NUM_KV_HEADS, HEAD_DIM)
    lengths = utils.SequenceLengths.from_lengths([tokens])
    if name == "dense":
        q, k, v = (x.transpose(0, 1)[None].contiguous() for x in (q, k, v))
        sdpa = torch.nn.functional.scaled_dot_product_attention
        return lambda: sdpa(q, k, v, is_causal=True, enable_gqa=True)
    if name == "nsa":
        gates = torch.rand(3, tokens, NUM_HEADS)
        return lambda: attention.nsa_attention(q, k, v, *gates, lengths, **NSA, backend="torch")
    if name == "compression":
        return lambda: compression.compression_attention(q, k, v, lengths, backend="torch")
    if name == "window":
        return lambda: sliding_window.sliding_window_attention(q, k, v, lengths, backend="torch")
    if name == "block_choice":
        return lambda: topk.select_blocks(q, k, lengths, backend="torch")
    indices = topk.select_blocks(q, k, lengths, backend="torch")
    return lambda: selection.selection_attention(q, k, v, indices, lengths, backend="torch")


def resident_bytes(field: str) -> int:
    """VmRSS (now) or VmHWM (the largest so far) of this process."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {field}")


@torch.no_grad()
def measure(name: str, tokens: int, repeats: int, threads: int) -> dict:
    """Wall and CPU seconds of each repeat, and extra memory of the first, in this process."""
    torch.set_num_threads(threads)
    make_call(name, 512)()
    call = make_call(name, tokens)
    Path("/proc/self/clear_refs").write_text("5")  # forget the largest resident set so far
    before = resident_bytes("VmRSS")
    seconds, cpu_seconds, extra = [], [], 0
    for repeat in range(repeats):
        start, cpu_start = time.perf_counter(), time.process_time()
        call()
        seconds.append(time.perf_counter() - start)
        cpu_seconds.append(time.process_time() - cpu_start)
        if repeat == 0:
            extra = resident_bytes("VmHWM") - before
    return {"seconds": seconds, "cpu_seconds": cpu_seconds, "extra_bytes": extra}


def measure_apart(name: str, tokens: int, repeats: int, threads: int) -> dict:
    """`measure` in a fresh process."""
    command = [sys.executable, __file__, "--measure", name, "--tokens", str(tokens)]
    command += ["--repeats", str(repeats), "--threads", str(threads)]
    # Threads that spin at the end of every small parallel region are lost to whatever else runs on the machine.
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "OMP_WAIT_POLICY": "passive"}
    result = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(result.stdout)


def cpu_model() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor()


def describe_cpu(*packages: str) -> dict:
    """This machine, and versions of packages, for files of results."""
    machine = {"cpu": cpu_model(), "cores": os.cpu_count(), "python": platform.python_version()}
    return machine | {name: version(name) for name in packages}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, nargs="+", default=[4096, 8192, 16384, 32768, 65536])
    parser.add_argument("--repeats", type=int, default=3, help="calls per measurement; the median counts")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--output", type=Path, help="JSON file to write")
    parser.add_argument("--measure", choices=MEASUREMENTS, help="one measurement in this process, as JSON to stdout")
    args = parser.parse_args()
    if args.measure:
        print(json.dumps(measure(args.measure, args.tokens[0], args.repeats, args.threads)))
        return

    report = {
        "date": datetime.date.today().isoformat(),
        "command": " ".join(["python", *sys.argv]),
        "cpu": cpu_model(),
        "cores": os.cpu_count(),
        "threads": args.threads,
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "shapes": {"heads": NUM_HEADS, "kv_heads": NUM_KV_HEADS, "head_dim": HEAD_DIM, "dtype": "float32", **NSA},
        "load_average_before": os.getloadavg(),
        "lengths": [],
    }
    print(f"{report['cpu']}, {args.threads} threads, torch {report['torch']}, load {report['load_average_before'][0]}")
    print(
        f"{'tokens':>7} {'dense s':>9} {'nsa s':>9} {'ratio':>6} {'cpu ratio':>9} {'nsa MB':>7}   branches, alone (s)"
    )
    for tokens in args.tokens:
        row = {"tokens": tokens}
        for name in MEASUREMENTS:
            repeats = 1 if name == "dense" and tokens > DENSE_REPEAT_TOKENS else args.repeats
            row[name] = measure_apart(name, tokens, repeats, args.threads)
            row[name]["median_seconds"] = statistics.median(row[name]["seconds"])
            row[name]["median_cpu_seconds"] = statistics.median(row[name]["cpu_seconds"])
            row[name]["load_average_after"] = os.getloadavg()[0]  # above the number of threads: disturbed
        row["dense_over_nsa"] = row["dense"]["median_seconds"] / row["nsa"]["median_seconds"]
        row["dense_over_nsa_cpu"] = row["dense"]["median_cpu_seconds"] / row["nsa"]["median_cpu_seconds"]
        report["lengths"].append(row)
        report["load_average_after"] = os.getloadavg()
        if args.output:
            args.output.parent.mkdir(parents=True, exist_ok=True)
            args.output.write_text(json.dumps(report, indent=2) + "\n")
        branches = "  ".join(f"{name} {row[name]['median_seconds']:.2f}" for name in MEASUREMENTS[2:])
        print(
            f"{tokens:7} {row['dense']['median_seconds']:9.2f} {row['nsa']['median_seconds']:9.2f} "
            f"{row['dense_over_nsa']:6.2f} {row['dense_over_nsa_cpu']:9.2f} "
            f"{row['nsa']['extra_bytes'] / 1e6:7.0f}   {branches}",
            flush=True,
        )


if __name__ == "__main__":
    main()
