"""How the flat files of the model find `nsa_kernels/`, which is a folder: from a checkout, a checkpoint, or the Hub."""

import importlib
from types import ModuleType

# transformers copies the files that a remote-code module imports by scanning its text, and only knows flat files. It
# takes these lines for imports and so brings the folder along, at the same commit, locally and from the Hub.
_KERNEL_FILES = """
from .nsa_kernels/attention import *
from .nsa_kernels/compression import *
from .nsa_kernels/dense import *
from .nsa_kernels/head_threads import *
from .nsa_kernels/operators import *
from .nsa_kernels/reference import *
from .nsa_kernels/selection import *
from .nsa_kernels/sliding_window import *
from .nsa_kernels/triton_attention import *
from .nsa_kernels/triton_compression import *
from .nsa_kernels/triton_gates import *
from .nsa_kernels/triton_rows import *
from .nsa_kernels/triton_selection import *
from .nsa_kernels/triton_tiles import *
from .nsa_kernels/utils import *
"""
KERNEL_NAMES = [line.split()[1].removeprefix(".nsa_kernels/") for line in _KERNEL_FILES.strip().splitlines()]


def kernel_module(name: str) -> ModuleType:
    """The module `name` of the `nsa_kernels/` that lies beside this file."""
    return importlib.import_module(f".nsa_kernels.{name}" if __package__ else f"nsa_kernels.{name}", __package__)
