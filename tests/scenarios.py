"""Runs scenarios that need a Hub of their own, all in one process, since importing transformers takes longer than any.

A module of scenarios has functions decorated with `scenario`, which take a folder of their own, and a global `hub`.
`outcomes` runs them in a fresh process, where huggingface_hub finds that Hub.
"""

import contextlib
import importlib
import json
import os
import shutil
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

from fake_hub import FakeHub

TESTS = Path(__file__).resolve().parent
SCENARIOS: dict[str, Callable[[Path], None]] = {}


def scenario(function: Callable[[Path], None]) -> Callable[[Path], None]:
    SCENARIOS[f"{function.__module__}.{function.__name__}"] = function
    return function


def names(module: ModuleType) -> list[str]:
    return [name.rpartition(".")[2] for name in SCENARIOS if name.startswith(f"{module.__name__}.")]


def outcomes(module: ModuleType, folder: Path) -> dict[str, str | None]:
    """Run all scenarios of a module in a fresh process: a traceback for each, None where it went well."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
    # Not this process's sys.path: a test before may have put another cache of remote code on it.
    paths = [TESTS, TESTS.parent, TESTS.parent / "checkpoints", *filter(None, [os.environ.get("PYTHONPATH")])]
    environment |= {
        "PYTHONPATH": os.pathsep.join(map(str, paths)),
        "OMP_NUM_THREADS": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    }
    program = [sys.executable, "-c", "import scenarios; scenarios.main()", module.__name__, str(folder)]
    result = subprocess.run(program, env=environment, capture_output=True, text=True, timeout=900)
    assert result.returncode == 0, result.stdout + result.stderr
    return json.loads(result.stdout.splitlines()[-1])


def main() -> None:
    """In the fresh process: `sys.argv` holds the module's name and a folder."""
    folder = Path(sys.argv[2])
    hub = FakeHub().start()
    os.environ.update(hub.environment(folder / "cache"))  # read when huggingface_hub is imported
    module = importlib.import_module(sys.argv[1])
    module.hub = hub
    time.sleep = lambda seconds: None  # huggingface_hub's between two attempts
    results = {}
    for name in names(module):
        hub.is_down = False
        for state in (hub.repos, hub.lfs, hub.faults, hub.requests):
            state.clear()
        shutil.rmtree(folder / "cache" / "hub", ignore_errors=True)
        (folder / name).mkdir()
        start = time.perf_counter()
        try:
            with contextlib.redirect_stdout(sys.stderr):
                SCENARIOS[f"{module.__name__}.{name}"](folder / name)
            results[name] = None
        except BaseException:
            results[name] = traceback.format_exc()
        print(f"{name}: {time.perf_counter() - start:.1f} s", file=sys.stderr)
    print(json.dumps(results))
