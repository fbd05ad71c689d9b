"""Whether this machine can run the GPU tests: what is installed, and whether anything works at all.

The exit code is 3 where something is missing that every test needs.
"""

import importlib
import importlib.metadata
import os
import platform
import shutil
import sys
from pathlib import Path

NEEDED = ("torch", "triton", "pytest")
USED_IF_THERE = ("transformers", "hypothesis", "xdist", "matplotlib", "fla")
ROOT = Path(__file__).resolve().parents[1]


def main() -> int:
    dry_run = "--dry-run" in sys.argv
    if dry_run:
        os.environ["TRITON_INTERPRET"] = "1"
    print(f"Python {platform.python_version()}, {os.cpu_count()} CPU cores")
    missing = []
    for name in NEEDED + USED_IF_THERE:
        try:
            version = getattr(importlib.import_module(name), "__version__", "?")
        except Exception as error:  # a broken installation is one that is not there
            version = f"not here ({type(error).__name__}: {error})"
            missing += [name] * (name in NEEDED)
        print(f"{name} {version}")
    print(f"compute-sanitizer: {shutil.which('compute-sanitizer') or 'not on the PATH'}")
    if missing:
        print(f"missing: {', '.join(missing)}")
        return 3

    import torch

    sys.path.insert(0, str(ROOT))
    from nsa_kernels import attention, triton_tiles

    if torch.cuda.is_available():
        device = torch.device("cuda")
        properties = torch.cuda.get_device_properties(device)
        print(
            f"{properties.name}, compute capability {properties.major}.{properties.minor}, "
            f"{properties.multi_processor_count} multiprocessors, {properties.shared_memory_per_block_optin} bytes of "
            f"shared memory a block, {properties.total_memory / 2**30:.0f} GiB; "
            f"small tiles: {triton_tiles.is_small(device)}"
        )
    elif dry_run:
        device = torch.device("cpu")
    else:
        print("no CUDA device")
        return 3

    # One call of everything: the summary begins with whether it works.
    tokens = 80 if dry_run else 4096
    q, k, v = (torch.randn(tokens, heads, 32, device=device).half().requires_grad_() for heads in (4, 2, 2))
    gates = [torch.rand(tokens, 4, device=device).half() for _ in range(3)]
    boundaries = torch.tensor([0, tokens], dtype=torch.int32, device=device)
    settings = {"block_size": 16, "block_counts": 3, "window_size": 20}
    outputs = {}
    for backend in ("torch", "triton"):
        o = attention.nsa_attention(q, k, v, *gates, boundaries, **settings, backend=backend)
        outputs[backend] = [o.detach(), *torch.autograd.grad(o.float().sum(), (q, k, v))]
    for name, a, b in zip(("o", "dq", "dk", "dv"), *outputs.values(), strict=True):
        # A near tie may choose another block: a few rows may differ, most may not.
        off = ((a - b).abs() > 2e-2 * (1 + a.abs())).float().mean().item()
        print(f"{name}: {off:.2%} of the elements differ between the torch and the triton backend")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
