"""Where tests run the Triton kernels: on a CUDA device if there is one, else on the CPU in Triton's interpreter.

`conftest.py` imports this module first. Triton decides when a function is decorated whether it will be interpreted, and
its own library is decorated when it is imported, which transformers does: the variable must be set before that. Nothing
else in the suite is affected: with backend "auto" the CPU never runs Triton.

A Triton test module imports `DEVICE` and `DTYPES` from here before it imports a kernel module, and sets
`pytestmark = needs_triton`. Ahead-of-time compilation needs kernels that are not interpreted: it runs in a process of
its own, with `compiling_environment()`.
"""

import importlib.util
import os

import pytest
import torch

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
if DEVICE.type == "cpu":
    os.environ["TRITON_INTERPRET"] = "1"

HAS_TRITON = importlib.util.find_spec("triton") is not None
needs_triton = pytest.mark.skipif(not HAS_TRITON, reason="triton is not installed")

# The interpreter multiplies bfloat16 matrices wrongly (triton 3.6 and 3.9).
DTYPES = [torch.float32, torch.float16] + [torch.bfloat16] * (DEVICE.type == "cuda")


def compiling_environment() -> dict[str, str]:
    """The environment of a process in which kernels are compiled rather than interpreted."""
    return {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
