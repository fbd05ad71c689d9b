"""The plug-in in vLLM against transformers: `make test-vllm`, in an environment of its own.

The reference comes from the main environment, since vLLM's has another transformers: `VIDEONSA_REFERENCE_PYTHON` is its
Python. `VIDEONSA_REFERENCE` names a folder that keeps it.
"""

import json
import os
import random
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from videonsa_vllm.routing import VisionFlags

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
SECONDS = 900  # for one engine; 30 to 60 on two idle cores

# What vLLM reads when it is imported, here and in the processes that are started.
os.environ |= {
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
    "OMP_WAIT_POLICY": "passive",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # otherwise two ranks want two NUMA nodes
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_LOGGING_LEVEL": "WARNING",
    "VLLM_NO_USAGE_STATS": "1",
}


class Reference:
    """What `reference.py` wrote."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.answers: dict[str, list[dict]] = json.loads((folder / "reference.json").read_text())

    def cases(self, checkpoint: str, *names: str) -> list[int]:
        """The numbers of the cases with these names; of all, without names."""
        cases = self.answers[checkpoint]
        return [number for number, case in enumerate(cases) if not names or case["name"] in names]


@pytest.fixture(scope="session")
def reference(tmp_path_factory) -> Reference:
    kept = os.environ.get("VIDEONSA_REFERENCE")
    folder = Path(kept) if kept else tmp_path_factory.mktemp("reference")
    if not (folder / "reference.json").exists():
        python = os.environ.get("VIDEONSA_REFERENCE_PYTHON", ROOT / ".venv" / "bin" / "python")
        subprocess.run([python, HERE / "reference.py", folder], check=True, timeout=SECONDS)
    return Reference(folder)


@pytest.fixture(scope="session")
def ask(reference, tmp_path_factory):
    """A function that starts an engine and asks it cases of the reference; see `engine.py`."""

    def run(
        checkpoint: str, calls: list[list[int]], new_tokens: int = 8, sabotage: str | None = None, **engine
    ) -> dict:
        folder = tmp_path_factory.mktemp("engine")
        task = {
            "model": str(reference.folder / checkpoint),
            "cases": reference.answers[checkpoint],
            "calls": calls,
            "new_tokens": new_tokens,
            "engine": engine,
            **({"sabotage": sabotage} if sabotage else {}),
        }
        (folder / "task.json").write_text(json.dumps(task))
        is_parallel = engine.get("tensor_parallel_size", 1) > 1
        environment = {
            "VLLM_ENABLE_V1_MULTIPROCESSING": str(int(is_parallel)),
            "VLLM_ALLOW_INSECURE_SERIALIZATION": "1",  # `read_counters` is sent to the workers
            "VLLM_CACHE_ROOT": str(tmp_path_factory.getbasetemp() / "vllm_cache"),
        }
        process = subprocess.run(
            [sys.executable, HERE / "engine.py", folder / "task.json", folder / "result.json"],
            env=os.environ | environment,
            capture_output=True,
            text=True,
            timeout=SECONDS,
        )
        if process.returncode:
            raise RuntimeError(process.stdout + process.stderr)
        return json.loads((folder / "result.json").read_text())

    return run


@dataclass
class RandomStep:
    """A step of vLLM, as `Routing.build` is told of it, and `kinds`: of every token of every request, vision or not."""

    kinds: list[list[bool]]
    starts: list[int]
    is_vision: torch.Tensor
    block_table: torch.Tensor
    flags: VisionFlags

    @property
    def num_keys(self) -> list[int]:
        return list(map(len, self.kinds))

    def slot(self, request: int, position: int) -> int:
        """Where a token's key is in the cache."""
        size = self.flags.block_size
        return int(self.block_table[request, position // size]) * size + position % size


def random_step(seed: int) -> RandomStep:
    """One to four requests, each new, continued or generating; blocks of four slots, in no order."""
    rng = random.Random(seed)
    kinds, starts, new = [], [0], []
    for _ in range(rng.randint(1, 4)):
        runs = [(rng.random() < 0.5, rng.randint(1, 6)) for _ in range(rng.randint(1, 4))]
        kinds.append([kind for kind, length in runs for _ in range(length)])
        count = rng.choice([1, rng.randint(1, len(kinds[-1])), len(kinds[-1])])
        new += kinds[-1][-count:]
        starts.append(starts[-1] + count)
    blocks = rng.sample(range(1, 40), 6 * len(kinds))
    table = torch.tensor(blocks).view(len(kinds), 6)
    step = RandomStep(kinds, starts, torch.tensor(new), table, VisionFlags(160, 4, "cpu"))
    step.flags.flags[:] = torch.rand(161, generator=torch.Generator().manual_seed(seed)) < 0.5  # of other requests
    for request, of_request in enumerate(kinds):
        past = len(of_request) - (starts[request + 1] - starts[request])
        for position in range(past):
            step.flags.flags[step.slot(request, position)] = of_request[position]
    return step
