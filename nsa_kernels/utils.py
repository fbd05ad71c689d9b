"""Packed sequences, argument checks and backend names shared by every branch.

Sequences are packed one after another along the first dimension, as in flash-attention's varlen interface: sequence i
owns rows ``cu_seqlens[i] : cu_seqlens[i + 1]``. When it has fewer queries than keys, its queries are its last tokens.
"""

import functools
import importlib.util
import logging
import math
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import NamedTuple

import torch
from torch import Tensor

logger = logging.getLogger(__name__)

BACKENDS = ("auto", "reference", "torch", "triton")

# Query tokens of one sequence that are taken through a branch at a time; see also `selection.chunk_tokens`.
CHUNK_TOKENS = 2048

# Softmax takes scores in units of log 2, where exp2, which is faster than exp, does the rest.
LOG2_E, LN_2 = math.log2(math.e), math.log(2)

# Temporaries of this many elements stay near a CPU's core; a GPU wants fewer, larger launches.
_TILE_ELEMENTS = {"cpu": 1 << 19}
_TILE_ELEMENTS_ACCELERATOR = 1 << 25


class Span(NamedTuple):
    """Rows of one sequence: queries ``q_start:q_end`` of the packed q, keys ``k_start:k_end`` of the packed k."""

    q_start: int
    q_end: int
    k_start: int
    k_end: int

    @property
    def num_queries(self) -> int:
        return self.q_end - self.q_start

    @property
    def num_keys(self) -> int:
        return self.k_end - self.k_start

    @property
    def first(self) -> int:
        """Position, among the sequence's keys, of its first query."""
        return self.num_keys - self.num_queries


@dataclass
class SequenceLengths:
    """Sequence boundaries known on the host as well as on the device.

    Reading ``cu_seqlens`` back from a GPU waits for everything queued before it. A model that calls the attention once
    per layer builds one of these per forward pass, and hands it over in place of ``cu_seqlens_q``: no layer waits.

    Attributes:
        cu_seqlens_q, cu_seqlens_k: (batch + 1,), int32, on the device of q.
        offsets_q, offsets_k: the same numbers as Python integers.

    (Not frozen: transformers' exporters set the tensors of a module's arguments anew.)
    """

    cu_seqlens_q: Tensor
    cu_seqlens_k: Tensor
    offsets_q: tuple[int, ...]
    offsets_k: tuple[int, ...]

    @classmethod
    def from_lengths(
        cls,
        lengths_q: Sequence[int],
        lengths_k: Sequence[int] | None = None,
        device: torch.device | str | None = None,
    ) -> "SequenceLengths":
        """From lengths the host already knows: nothing is read back from the device.

        Args:
            lengths_q: tokens of each sequence.
            lengths_k: keys of each sequence, defaults to ``lengths_q``.
            device: where to put the int32 tensors, the CPU by default.
        Raises:
            ValueError: a negative length, different batch sizes, or more queries than keys.
        """
        lengths_k = lengths_q if lengths_k is None else lengths_k
        if min([*lengths_q, *lengths_k], default=0) < 0:
            raise ValueError(f"lengths must not be negative, got {list(lengths_q)} and {list(lengths_k)}")
        offsets_q = tuple(accumulate(lengths_q, initial=0))
        offsets_k = tuple(accumulate(lengths_k, initial=0))
        _check_offsets(offsets_q, offsets_k)
        tensors = (torch.tensor(offsets, dtype=torch.int32) for offsets in (offsets_q, offsets_k))
        return cls(*(tensor.to(device or "cpu", non_blocking=True) for tensor in tensors), offsets_q, offsets_k)

    @classmethod
    def from_cu_seqlens(cls, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor | None = None) -> "SequenceLengths":
        """From int32 tensors of shape (batch + 1,); waits for the device once.

        Raises:
            ValueError: wrong shape or dtype, not starting at 0, decreasing, or more queries than keys.
        """
        cu_seqlens_k = cu_seqlens_q if cu_seqlens_k is None else cu_seqlens_k
        for name, tensor in (("cu_seqlens_q", cu_seqlens_q), ("cu_seqlens_k", cu_seqlens_k)):
            if not isinstance(tensor, Tensor) or tensor.dtype != torch.int32 or tensor.dim() != 1 or not len(tensor):
                raise ValueError(f"{name} must be an int32 tensor of shape (batch + 1,), got {_describe(tensor)}")
        if len(cu_seqlens_q) != len(cu_seqlens_k):
            raise ValueError(
                f"cu_seqlens_k must have as many entries as cu_seqlens_q ({len(cu_seqlens_q)}), got {len(cu_seqlens_k)}"
            )
        if cu_seqlens_k is cu_seqlens_q:
            offsets_q = offsets_k = tuple(cu_seqlens_q.tolist())
        else:
            offsets_q, offsets_k = map(tuple, torch.stack([cu_seqlens_q, cu_seqlens_k]).tolist())
        _check_offsets(offsets_q, offsets_k)
        return cls(cu_seqlens_q.contiguous(), cu_seqlens_k.contiguous(), offsets_q, offsets_k)

    def spans(self) -> Iterator[Span]:
        """The sequences that have at least one query."""
        for queries, keys in zip(pairwise(self.offsets_q), pairwise(self.offsets_k), strict=True):
            if queries[1] > queries[0]:
                yield Span(*queries, *keys)


def _check_offsets(offsets_q: tuple[int, ...], offsets_k: tuple[int, ...]) -> None:
    for name, offsets in (("cu_seqlens_q", offsets_q), ("cu_seqlens_k", offsets_k)):
        if offsets[0] != 0 or any(end < start for start, end in pairwise(offsets)):
            raise ValueError(f"{name} must start at 0 and never decrease, got {list(offsets)}")
    if len(offsets_q) != len(offsets_k):
        raise ValueError(f"q has {len(offsets_q) - 1} sequences and k has {len(offsets_k) - 1}: they must match")
    for i in range(len(offsets_q) - 1):
        queries, keys = offsets_q[i + 1] - offsets_q[i], offsets_k[i + 1] - offsets_k[i]
        if queries > keys:
            raise ValueError(f"sequence {i} has {queries} queries (cu_seqlens_q) but only {keys} keys (cu_seqlens_k)")


def resolve_lengths(cu_seqlens_q: Tensor | SequenceLengths, cu_seqlens_k: Tensor | None) -> SequenceLengths:
    """Either form of the public argument ``cu_seqlens_q`` as a `SequenceLengths`."""
    if not isinstance(cu_seqlens_q, SequenceLengths):
        return SequenceLengths.from_cu_seqlens(cu_seqlens_q, cu_seqlens_k)
    if cu_seqlens_k is not None:
        raise ValueError("cu_seqlens_k must be None when cu_seqlens_q is a SequenceLengths, which holds both")
    return cu_seqlens_q


def resolve_backend(name: str, device: torch.device | str) -> str:
    """The backend that ``name`` stands for on ``device``: "reference", "torch" or "triton".

    "auto" is "torch" everywhere so far, and says so once.

    Raises:
        ValueError: an unknown name, or "triton" without a CUDA device and without TRITON_INTERPRET=1.
        ImportError: "triton" is not installed.
    """
    if name not in BACKENDS:
        raise ValueError(f"backend must be one of {BACKENDS}, got {name!r}")
    device_type = torch.device(device).type
    if name == "auto":
        return _choose(device_type)
    if name == "triton":
        if not _has_triton():
            raise ImportError("backend='triton' needs triton 3.6 or later: pip install 'triton>=3.6'")
        if device_type != "cuda" and not (device_type == "cpu" and os.environ.get("TRITON_INTERPRET") == "1"):
            raise ValueError(
                f"backend='triton' needs q on a CUDA device, got {device_type}: use 'torch', 'reference' or 'auto' "
                "(for tests, TRITON_INTERPRET=1 set before triton is imported runs it on a CPU)"
            )
    return name


def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


@functools.cache
def _choose(device_type: str) -> str:
    """What "auto" means on a kind of device; cached, so it is said once."""
    hint = ""
    if device_type == "cuda":
        # A wrong answer costs more than a slow one: this changes when the kernels have passed their tests on a GPU.
        hint = "; 'triton' is there and faster, but has not been run on a GPU yet (benchmarks/run_gpu.sh tests it)"
    logger.warning("backend='auto' chose 'torch' on %s%s", device_type, hint)
    return "torch"


def check_qkv(q: Tensor, k: Tensor, v: Tensor | None, lengths: SequenceLengths) -> None:
    """Raise ValueError unless q, k and v fit each other and the lengths; v is None where it is not needed."""
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x is None:
            continue
        if x.dim() != 3:
            raise ValueError(f"{name} must have shape (total, heads, head_dim), got {_describe(x)}")
        if x.dtype not in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
            raise ValueError(f"{name} must be float16, bfloat16, float32 or float64, got {x.dtype}")
        if x.dtype != q.dtype or x.device != q.device:
            raise ValueError(f"{name} must have the dtype and device of q, {_describe(q)}, got {_describe(x)}")
    if v is not None and v.shape != k.shape:
        raise ValueError(f"v must have the shape of k, {tuple(k.shape)}, got {tuple(v.shape)}")
    if q.shape[2] != k.shape[2] or q.shape[2] == 0:
        raise ValueError(f"head_dim of q and k must be equal and positive, got {q.shape[2]} and {k.shape[2]}")
    if k.shape[1] == 0 or q.shape[1] == 0 or q.shape[1] % k.shape[1]:
        raise ValueError(f"num_heads of q must be a multiple of num_kv_heads of k, got {q.shape[1]} and {k.shape[1]}")
    for name, x, offsets in (("q", q, lengths.offsets_q), ("k", k, lengths.offsets_k)):
        if x.shape[0] != offsets[-1]:
            raise ValueError(f"{name} has {x.shape[0]} rows, but cu_seqlens_{name} ends at {offsets[-1]}")


def check_call(
    q: Tensor,
    k: Tensor,
    v: Tensor | None,
    cu_seqlens_q: Tensor | SequenceLengths,
    cu_seqlens_k: Tensor | None,
    softmax_scale: float | None,
    backend: str,
    **sizes: int,
) -> tuple[SequenceLengths, float, str]:
    """The arguments that public functions share, checked: lengths, a number for softmax_scale, and what backend means.

    Raises:
        ValueError: an argument has a wrong value, shape or dtype, or a size is not positive.
        ImportError: triton is not installed.
    """
    check_positive(**sizes)
    lengths = resolve_lengths(cu_seqlens_q, cu_seqlens_k)
    check_qkv(q, k, v, lengths)
    return lengths, resolve_scale(softmax_scale, q.shape[2]), resolve_backend(backend, q.device)


def check_positive(**values: int) -> None:
    """Raise ValueError unless every value is an int of at least 1."""
    for name, value in values.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"{name} must be a positive integer, got {value!r}")


def resolve_scale(softmax_scale: float | None, head_dim: int) -> float:
    """``softmax_scale``, or head_dim**-0.5 for None."""
    if softmax_scale is None:
        return head_dim**-0.5
    if not isinstance(softmax_scale, (int, float)) or not math.isfinite(softmax_scale):
        raise ValueError(f"softmax_scale must be a finite number, got {softmax_scale!r}")
    return float(softmax_scale)


def positive_scale(q: Tensor, softmax_scale: float) -> tuple[Tensor, float]:
    """q and scale with the same products, and a positive scale: the largest product is then the largest score."""
    return (q if softmax_scale >= 0 else -q), max(abs(softmax_scale), 1e-30)


def check_positions(positions: Tensor | None, q: Tensor) -> None:
    """Raise ValueError unless positions, if there are any, are whole numbers, one for each row of q."""
    if positions is None:
        return
    if positions.shape != q.shape[:1] or positions.dtype not in (torch.int32, torch.int64):
        raise ValueError(
            f"positions must be int32 or int64 of shape (rows,) = ({q.shape[0]},), "
            f"got {positions.dtype} {tuple(positions.shape)}"
        )
    if positions.device != q.device:
        raise ValueError(f"positions must be on {q.device}, like q, got {positions.device}")


def _describe(x: object) -> str:
    return f"{x.dtype} {tuple(x.shape)} on {x.device}" if isinstance(x, Tensor) else repr(x)


def accumulate_dtype(dtype: torch.dtype) -> torch.dtype:
    """Dtype of scores, softmax state and sums: float32, or float64 for float64 inputs."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def no_autocast(device: torch.device) -> torch.autocast:
    """Context in which autocast does not narrow the float32 arithmetic of the softmax."""
    return torch.autocast(device.type, enabled=False)


def backward_without_autocast(backward: Callable[..., tuple]) -> Callable[..., tuple]:
    """Decorator of an autograd function's backward, which may be called inside an autocast region."""

    @functools.wraps(backward)
    def wrapped(ctx, do, *args):
        with no_autocast(do.device):
            return backward(ctx, do, *args)

    return wrapped


def tile_tokens(elements_per_token: int, device: torch.device) -> int:
    """How many tokens to handle at once so that a temporary of so many elements per token stays small."""
    elements = _TILE_ELEMENTS.get(device.type, _TILE_ELEMENTS_ACCELERATOR)
    if device.type == "cpu" and (threads := torch.get_num_threads()) > 1:
        elements *= 2 * threads  # each has as much, and they wait for each other half as often
    return max(1, elements // max(1, elements_per_token))


def head_slice(head: int, group_size: int) -> slice:
    """The query heads that read key/value head ``head``."""
    return slice(head * group_size, (head + 1) * group_size)


def kv_head(x: Tensor, span: Span, head: int) -> Tensor:
    """One key/value head of one sequence as a contiguous (num_keys, head_dim) matrix in the accumulate dtype."""
    return x[span.k_start : span.k_end, head].to(accumulate_dtype(x.dtype)).contiguous()


def query_chunks(span: Span, size: int) -> Iterator[tuple[slice, int]]:
    """Consecutive runs of a sequence's queries: their rows of the packed q, and the position of the first of them."""
    for start in range(span.q_start, span.q_end, size):
        yield slice(start, min(start + size, span.q_end)), span.first + start - span.q_start


def reading_is_free(device: torch.device) -> bool:
    """Whether the host can read a number from a tensor on ``device`` without waiting for queued work."""
    return device.type == "cpu"


def add_rows_(target: Tensor, index: Tensor, rows: Tensor) -> None:
    """target[index[i]] += rows[i], repeated indices included, in a fixed order on every device."""
    if target.device.type == "cpu":
        target.index_add_(0, index, rows)  # serial over the index
    else:
        target.index_put_((index,), rows, accumulate=True)  # sorts the index on CUDA, where index_add_ uses atomics
