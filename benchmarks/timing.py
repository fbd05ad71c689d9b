"""Clocks, inputs and reports that the GPU benchmarks share."""

import contextlib
import datetime
import gc
import json
import platform
import statistics
import time
import traceback
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

FRAME_TOKENS = 256


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


class Stopwatch:
    """Times calls on one device, and stops starting new ones when the time is over."""

    def __init__(self, device: torch.device, seconds: float, seconds_per_measurement: float = 0.6):
        self.device = device
        self.deadline = time.monotonic() + seconds
        self.seconds_per_measurement = seconds_per_measurement
        # Writing this between calls drops the last call's operands from the L2 cache.
        self.flush = torch.empty((256 << 20) if device.type == "cuda" else 0, dtype=torch.uint8, device=device)

    def is_over(self) -> bool:
        return time.monotonic() > self.deadline

    def measure(self, call: Callable[[], object], repeats: tuple[int, int] = (3, 30)) -> dict:
        """Median milliseconds of `call` and what it allocates at most; "error" or "skipped" in place of them.

        The first call compiles and warms up; it is not timed. The second, by the host's clock, says how often there is
        time to repeat it; where there is none, it is the result.
        """
        if self.is_over():
            return {"skipped": "out of time"}
        try:
            return self._measure(call, repeats)
        except Exception as error:  # one failure must not cost the other results
            traceback.print_exc()
            return {"error": f"{type(error).__name__}: {str(error)[:300]}"}
        finally:
            gc.collect()
            if self.device.type == "cuda":
                with contextlib.suppress(RuntimeError):  # after a kernel that failed, this fails as well
                    torch.cuda.empty_cache()

    def _measure(self, call, repeats):
        call()
        synchronize(self.device)
        on_gpu = self.device.type == "cuda"
        if on_gpu:
            before = torch.cuda.memory_allocated(self.device)
            torch.cuda.reset_peak_memory_stats(self.device)
        start = time.perf_counter()
        call()
        synchronize(self.device)
        once = time.perf_counter() - start
        if not on_gpu or once > self.seconds_per_measurement:
            result = {"ms": once * 1e3, "runs": 1}
            return result | {"peak_bytes": torch.cuda.max_memory_allocated(self.device) - before} if on_gpu else result
        runs = max(repeats[0], min(repeats[1], int(self.seconds_per_measurement / max(once, 1e-6))))
        events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(runs)]
        for begin, end in events:
            self.flush.zero_()
            begin.record()
            call()
            end.record()
        synchronize(self.device)
        milliseconds = [begin.elapsed_time(end) for begin, end in events]
        return {
            "ms": statistics.median(milliseconds),
            "fastest_ms": min(milliseconds),
            "slowest_ms": max(milliseconds),
            "runs": runs,
            "peak_bytes": torch.cuda.max_memory_allocated(self.device) - before,
        }


def make_inputs(
    tokens: int, heads: tuple[int, int], head_dim: int, dtype: torch.dtype, device: torch.device, kind: str
) -> list[Tensor]:
    """q, k, v and three gates.

    "random" tokens have nothing in common: neighbours select unrelated blocks, the hardest case for selection. "video"
    tokens have what a video has: a content that drifts from frame to frame, one that stays in its place, and noise, so
    that neighbours select similar blocks. Real videos may lie on either side of it.
    """
    generator = torch.Generator(device=device).manual_seed(0)
    num_heads, num_kv_heads = heads

    def normal(*shape):
        return torch.randn(*shape, device=device, generator=generator)

    def content(num):
        return video_content(tokens, (num, head_dim), generator)

    if kind == "random":
        q, k, v = normal(tokens, num_heads, head_dim), *normal(2, tokens, num_kv_heads, head_dim)
    else:
        topic = content(num_kv_heads)
        q = 1.5 * (topic.repeat_interleave(num_heads // num_kv_heads, 1) + 0.5 * content(num_heads))
        k, v = topic + 0.2 * normal(tokens, num_kv_heads, head_dim), content(num_kv_heads)
    gates = torch.sigmoid(normal(tokens, num_heads, 3)).to(dtype).unbind(-1)
    return [q.to(dtype), k.to(dtype), v.to(dtype), *gates]


def video_content(tokens: int, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """(tokens, *shape): a drift from frame to frame, something that stays in its place, and noise."""

    def normal(count):
        return torch.randn(count, *shape, device=generator.device, generator=generator)

    index = torch.arange(tokens, device=generator.device)
    frame, place = index // FRAME_TOKENS, index % FRAME_TOKENS
    steps = normal(-(-tokens // FRAME_TOKENS))
    lengths = torch.arange(1, len(steps) + 1, device=generator.device).sqrt()
    drift = steps.cumsum(0) / lengths.view(-1, *[1] * len(shape))
    places = normal(FRAME_TOKENS)
    places = (places + places.roll(1, 0) + places.roll(16, 0)) / 3**0.5
    return 0.8 * drift[frame] + 0.6 * places[place] + 0.4 * normal(tokens)


def describe_machine(device: torch.device) -> dict:
    machine = {
        "date": datetime.date.today().isoformat(),
        "torch": torch.__version__,
        "python": platform.python_version(),
    }
    try:
        import triton

        machine["triton"] = triton.__version__
    except ImportError:
        machine["triton"] = None
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        machine |= {"device": properties.name, "multiprocessors": properties.multi_processor_count}
    else:
        machine |= {"device": "cpu", "note": "a dry run in Triton's interpreter: its times mean nothing"}
    return machine


def write_report(path: Path, report: dict) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(report, indent=1, default=str) + "\n")


def choose_device(dry_run: bool) -> torch.device:
    if torch.cuda.is_available():
        return torch.device("cuda")
    if not dry_run:
        raise SystemExit("no CUDA device here: --dry-run goes through everything on the CPU, in Triton's interpreter")
    return torch.device("cpu")
