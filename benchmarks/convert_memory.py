"""Memory and time of a conversion at the size of a published checkpoint.

    python benchmarks/convert_memory.py --output benchmarks/results/<date>_convert_memory.json

Makes a checkpoint of random bf16 weights in the shape of Qwen2.5-VL-3B (or of another size), in as many shards as the
published one has, and converts it with `convert_weights.py` in a process of its own; with `--verify`, it runs the same
conversion again with that option. Needs twice the size of the weights on the disk (3B: 16 GB), in a temporary folder
that is removed at the end.
"""

import argparse
import datetime
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import torch
import transformers
from published_sizes import PUBLISHED, published_config
from tqdm import tqdm
from transformers import Qwen2_5_VLConfig

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from conversion.safetensors_io import (  # noqa: E402
    CHUNK_BYTES,
    INDEX,
    PlannedTensor,
    read_headers,
    split_into_shards,
    to_bytes,
    write_tensors,
)
from convert_weights import expected_shapes, published_key  # noqa: E402

# Bytes of data in a shard of the published checkpoints.
SHARD_BYTES = 4 * 10**9

# The whole program, and what the process has needed at most. VmHWM starts anew with the process.
CHILD = """
import json, sys, time
from pathlib import Path

sys.path.insert(0, sys.argv[1])
import convert_weights

def status(name):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))

before = status("VmRSS")
start = time.perf_counter()
sys.argv = ["convert_weights.py", *sys.argv[2:]]
convert_weights.main()
seconds = time.perf_counter() - start
print(json.dumps({"seconds": seconds, "rss_after_imports": before, "rss_peak": status("VmHWM")}))
"""


def write_source(folder: Path, size: str, shard_bytes: int) -> None:
    """A checkpoint of random weights, written piece by piece, with the configuration and key names of the Hub."""
    folder.mkdir()
    config = published_config(size)
    (folder / "config.json").write_text(json.dumps(config))
    shapes = expected_shapes(Qwen2_5_VLConfig.from_dict(dict(config)))
    dtype = torch.bfloat16
    tensors = [PlannedTensor(published_key(name), dtype, shape, None, folder) for name, shape in shapes.items()]
    generator = torch.Generator().manual_seed(0)

    def random_chunks(tensor: PlannedTensor) -> Iterator[bytes]:
        left = tensor.nbytes // 2
        while left:
            values = torch.randn(min(left, CHUNK_BYTES // 2), generator=generator)
            left -= values.numel()
            yield to_bytes((0.02 * values).bfloat16())

    shards = split_into_shards(tensors, shard_bytes)
    total = sum(tensor.nbytes for tensor in tensors)
    with tqdm(total=total, desc="Random weights", unit="B", unit_scale=True, disable=None) as bar:
        for name, members in shards.items():
            write_tensors(folder / name, members, random_chunks, bar.update)
    weight_map = {tensor.name: name for name, members in shards.items() for tensor in members}
    (folder / INDEX).write_text(json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map}))


def weights(folder: Path) -> dict:
    sizes = [file.stat().st_size for file in sorted(folder.glob("*.safetensors"))]
    return {"tensors": len(read_headers(folder)), "bytes": sum(sizes), "shards": len(sizes), "largest": max(sizes)}


def run(arguments: list[str]) -> dict:
    """`convert_weights.py` in a fresh process."""
    program = [sys.executable, "-c", CHILD, str(ROOT), *arguments]
    done = subprocess.run(program, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--size", choices=PUBLISHED, default="3B")
    parser.add_argument("--folder", type=Path, help="where the temporary folder goes (default: the system's)")
    parser.add_argument("--verify", action="store_true", help="also time --verify, which loads the models")
    parser.add_argument("--output", type=Path, help="JSON file of the results")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        source, target = Path(folder) / "source", Path(folder) / "target"
        start = time.perf_counter()
        write_source(source, arguments.size, SHARD_BYTES)
        print(f"Made {source} in {time.perf_counter() - start:.0f} s", file=sys.stderr)
        load = os.getloadavg()
        measured = run([str(source), str(target)])
        result = {
            "date": datetime.date.today().isoformat(),
            "command": " ".join(["python", "benchmarks/convert_memory.py", *sys.argv[1:]]),
            "size": arguments.size,
            "cores": os.cpu_count(),
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "load_average_before": load,
            "source": weights(source),
            "target": weights(target),
            "conversion": measured,
            "peak_over_largest_shard": measured["rss_peak"] / weights(target)["largest"],
            "bytes_per_second": weights(target)["bytes"] / measured["seconds"],
        }
        if arguments.verify:
            result["verification"] = run([str(source), str(target), "--verify"])
    text = json.dumps(result, indent=2)
    print(text)
    if arguments.output:
        arguments.output.write_text(f"{text}\n")


if __name__ == "__main__":
    main()
