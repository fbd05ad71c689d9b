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
from collections.abc import Iterable

import pytest
import torch

from nsa_kernels import utils

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


def lengths_on_device(case) -> utils.SequenceLengths:
    """The lengths of an `nsa_cases.Case`, on `DEVICE`: kernels read them there."""
    return utils.SequenceLengths.from_lengths(case.lengths_q, case.lengths_k, DEVICE)


def on_device(tensors: Iterable[torch.Tensor]) -> list[torch.Tensor]:
    return [x.to(DEVICE) for x in tensors]


def on_cpu(tensors: Iterable[torch.Tensor]) -> list[torch.Tensor]:
    return [x.cpu() for x in tensors]
