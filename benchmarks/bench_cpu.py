"""Forward time and memory of Native Sparse Attention (torch backend) against dense causal attention, on a CPU.

    python benchmarks/bench_cpu.py --threads 2 --output benchmarks/results/<date>_cpu_<what>.json

The calls are those of `analysis/latency.py` in the shape of a 7B layer: 28 query and 4 key/value heads, head_dim 128,
float32, one sequence of random tokens. For random tokens the selected blocks of neighbouring tokens have nothing in
common, which is the hardest case for the selection branch. Dense attention is torch's
scaled_dot_product_attention(is_causal=True, enable_gqa=True). Then, for `--layer-tokens`, a whole decoder layer of the
7B, projections and MLP included, ours on vision tokens and Qwen2.5-VL's with that dense attention.

The calls of one length take turns in one process, as a machine's speed changes from minute to minute; layers and single
branches are measured once. Ratios are dense over NSA in one turn, of wall time and of CPU time: their median, and the
lowest and highest of wall time. The second is the one to look at where `load_average` shows that the machine did other
work. "pairs" is what the ratio would be if all pairs of query and key cost the same. Extra memory is the largest
resident set during the first call, minus the resident set before it, when the inputs exist: it includes the output.
Only that of NSA, which comes first, inherits no memory from others. With `--before`, a commit of this repository, that
version's NSA is measured after each length, again in turn with dense attention.
"""

import argparse
import datetime
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

BRANCHES = ("compression", "block choice", "selection", "window")
LAYERS = ("layer", "dense layer")
# Enough for every way that attention takes.
WARM_UP_TOKENS = 2560


def make_calls(names: list[str], tokens: int) -> dict[str, Callable[[], object]]:
    """The functions to time, layers or not; what they need exists when this returns."""
    from analysis import latency  # which describes this machine by what is below

    if set(names) <= set(LAYERS):
        return {name: make_layer(name, tokens) for name in names}
    calls = latency.calls(latency.shape_of("7B"), tokens, torch.float32, torch.device("cpu"))
    return {name: calls[name] for name in names}


def make_layer(name: str, tokens: int) -> Callable[[], object]:
    """A decoder layer of the 7B on random states of one video without text."""
    from published_sizes import published_config
    from transformers.models.qwen2_5_vl import modeling_qwen2_5_vl as qwen

    import modeling_videonsa
    from configuration_videonsa import VideoNSAConfig
    from routing_videonsa import VisionRouting

    fields = published_config("7B") | {"num_hidden_layers": 1, "vocab_size": 8}
    config = VideoNSAConfig(text_config=fields, attn_implementation="sdpa").text_config
    config._attn_implementation = "sdpa"
    torch.manual_seed(0)
    states = torch.randn(1, tokens, config.hidden_size)
    positions = torch.arange(tokens).expand(3, 1, -1)
    rotary = qwen.Qwen2_5_VLRotaryEmbedding(config=config)(states, positions)
    if name == "layer":
        routing = VisionRouting.build(torch.full((1, tokens), 2), None, 0)
        layer = modeling_videonsa.VideoNSADecoderLayer(config, 0).eval()
        return lambda: layer(states, position_embeddings=rotary, vision_routing=routing)
    layer = qwen.Qwen2_5_VLDecoderLayer(config, 0).eval()
    return lambda: layer(states, position_embeddings=rotary)


def pairs_ratio(tokens: int) -> float:
    """Pairs of query and key of dense causal attention over those of NSA."""
    from analysis import latency

    counted = latency.operations(latency.shape_of("7B"), tokens)
    return counted["dense"] / counted["nsa"]


def resident_bytes(field: str) -> int:
    """VmRSS (now) or VmHWM (the largest so far) of this process."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {field}")


@torch.no_grad()
def measure(names: list[str], tokens: int, repeats: int, threads: int) -> dict[str, dict]:
    """Wall and CPU seconds of calls that take turns in this process, and extra memory of the first of each.

    The first two names, NSA and dense, take part in every turn, others in the first.
    """
    torch.set_num_threads(threads)
    for call in make_calls(names, WARM_UP_TOKENS).values():
        call()
    calls = make_calls(names, tokens)
    results = {name: {"seconds": [], "cpu_seconds": []} for name in names}
    for repeat in range(repeats):
        for name in names if repeat == 0 else names[:2]:
            result = results[name]
            Path("/proc/self/clear_refs").write_text("5")  # forget the largest resident set so far
            before = resident_bytes("VmRSS")
            start, cpu_start = time.perf_counter(), time.process_time()
            calls[name]()
            result["seconds"].append(time.perf_counter() - start)
            result["cpu_seconds"].append(time.process_time() - cpu_start)
            if repeat == 0:
                result["extra_bytes"] = resident_bytes("VmHWM") - before
    for result in results.values():
        result["median_seconds"] = statistics.median(result["seconds"])
        result["median_cpu_seconds"] = statistics.median(result["cpu_seconds"])
    return results


def measure_apart(names: list[str], tokens: int, repeats: int, threads: int, root: Path = ROOT) -> dict:
    """`measure` in a fresh process, of the code in a folder."""
    command = [sys.executable, __file__, "--measure", *names, "--tokens", str(tokens), "--root", str(root)]
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
    parser.add_argument("--tokens", type=int, nargs="*", default=[4096, 8192, 16384, 32768, 65536])
    parser.add_argument("--layer-tokens", type=int, nargs="*", default=[4096, 16384, 32768])
    parser.add_argument("--repeats", type=int, default=3, help="turns; layers and single branches have one")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--output", type=Path, help="JSON file to write")
    parser.add_argument("--before", help="commit of an older version, to be measured too")
    parser.add_argument("--measure", nargs="+", help="these calls in this process, as JSON to stdout")
    parser.add_argument("--root", default=str(ROOT), help="with --measure: folder of the code")
    args = parser.parse_args()
    if args.measure:
        sys.path.insert(0, args.root)
        print(json.dumps(measure(args.measure, args.tokens[0], args.repeats, args.threads)))
        return

    with tempfile.TemporaryDirectory() as older:
        if args.before:
            archive = ["git", "-C", str(ROOT), "archive", args.before]
            packed = subprocess.run(archive, stdout=subprocess.PIPE, check=True).stdout
            subprocess.run(["tar", "-x", "-C", older], input=packed, check=True)
        report_all(args, Path(older))


def turns(dense: list[float], sparse: list[float]) -> list[float]:
    """Ratios of seconds, turn by turn."""
    return [x / y for x, y in zip(dense, sparse, strict=True)]


def report_all(args: argparse.Namespace, older: Path) -> None:
    """Measure, print and write what was asked for; older is the folder of the version before."""
    report = {
        "date": datetime.date.today().isoformat(),
        "command": " ".join(["python", *sys.argv]),
        **describe_cpu("torch", "transformers"),
        "threads": args.threads,
        "before": args.before,
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "load_average_before": os.getloadavg(),
        "rows": [],
    }
    print(f"{report['cpu']}, {args.threads} threads, torch {report['torch']}, load {report['load_average_before'][0]}")
    print(
        f"{'':11} {'tokens':>6} {'dense s':>8} {'nsa s':>8} {'ratio':>6} {'cpu ratio':>9} {'pairs':>6} {'nsa MB':>7}"
        "   ratios, branches alone"
    )
    wanted = [("attention", "nsa", "dense", BRANCHES, tokens) for tokens in args.tokens]
    wanted += [("layer", *LAYERS, (), tokens) for tokens in args.layer_tokens]
    for what, sparse, dense, others, tokens in wanted:
        row = {"what": what, "tokens": tokens, "pairs": pairs_ratio(tokens)}
        repeats = args.repeats if what == "attention" else 1
        row |= measure_apart([sparse, dense, *others], tokens, repeats, args.threads)
        if args.before and what == "attention":
            result = measure_apart([sparse, dense], tokens, repeats, args.threads, older)
            row["before"], row["dense beside before"] = result[sparse], result[dense]
        row["load_average_after"] = os.getloadavg()[0]  # above the number of threads: disturbed
        row["ratios"] = turns(row[dense]["seconds"], row[sparse]["seconds"])
        row["ratio"] = statistics.median(row["ratios"])
        row["cpu_ratio"] = statistics.median(turns(row[dense]["cpu_seconds"], row[sparse]["cpu_seconds"]))
        report["rows"].append(row)
        if args.output:
            args.output.parent.mkdir(parents=True, exist_ok=True)
            args.output.write_text(json.dumps(report, indent=2) + "\n")
        alone = "  ".join(f"{name} {row[name]['median_seconds']:.2f}" for name in others)
        print(
            f"{what:11} {tokens:6} {row[dense]['median_seconds']:8.2f} {row[sparse]['median_seconds']:8.2f} "
            f"{row['ratio']:6.2f} {row['cpu_ratio']:9.2f} {row['pairs']:6.2f} {row[sparse]['extra_bytes'] / 1e6:7.0f}"
            f"   {min(row['ratios']):.2f} to {max(row['ratios']):.2f}  {alone}",
            flush=True,
        )


if __name__ == "__main__":
    main()
