"""What the Triton kernels share: steps of attention, forward and backward, sizes of tiles, and how to launch.

Addresses are made of tokens in 64 bits, and of heads in 32, which `addressable` tensors allow. The kernels' modules
take `triton` and `tl` from here: where Triton is missing, the error that says so is raised in one place.
"""

import contextlib
import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

try:
    import triton
    import triton.language as tl
except ImportError as error:
    raise ImportError("backend='triton' needs triton 3.6 or later: pip install 'triton>=3.6'") from error

from . import utils

LOG2_E = tl.constexpr(utils.LOG2_E)
LN_2 = tl.constexpr(utils.LN_2)
# A maximum below every score: a row that has seen nothing needs no case of its own.
_LOWEST = tl.constexpr(-3.0e38)
# What `load_lse_delta` gives for rows that are not there: an lse of infinity in the lower half, a delta of 0.
_NO_ROW = tl.constexpr(0x7F800000)

_MAX_HEAD_DIM = 128


@triton.jit
def sequence_bounds(cu_seqlens_q_ptr, cu_seqlens_k_ptr, sequence):
    """The first row of a sequence in the packed q and k, and how many queries and keys it has."""
    start_q = tl.load(cu_seqlens_q_ptr + sequence)
    start_k = tl.load(cu_seqlens_k_ptr + sequence)
    num_queries = tl.load(cu_seqlens_q_ptr + sequence + 1) - start_q
    num_keys = tl.load(cu_seqlens_k_ptr + sequence + 1) - start_k
    return start_q, start_k, num_queries, num_keys


@triton.jit
def load_tile(ptr, offs_row, mask_row, HEAD_DIM: tl.constexpr, HEAD_PAD: tl.constexpr):
    """[rows, HEAD_PAD] from the offsets of rows, zero past HEAD_DIM and where mask_row does not hold; it may be None.

    Loops take the last row in place of those that are not there, which costs less than a mask: whatever such a row adds
    is multiplied by a probability of 0.
    """
    offs_d = tl.arange(0, HEAD_PAD)
    ptrs = ptr + offs_row[:, None] + offs_d[None, :]
    mask_d = (offs_d < HEAD_DIM)[None, :]
    if mask_row is not None:
        x = tl.load(ptrs, mask=mask_row[:, None] & mask_d, other=0.0)
    elif HEAD_DIM < HEAD_PAD:
        x = tl.load(ptrs, mask=mask_d, other=0.0)
    else:
        x = tl.load(ptrs)
    return x


@triton.jit
def store_tile(ptr, offs_row, mask_row, x, HEAD_DIM: tl.constexpr, HEAD_PAD: tl.constexpr):
    """Write the rows of x for which mask_row holds, in the dtype of what ptr points to."""
    offs_d = tl.arange(0, HEAD_PAD)
    mask = mask_row[:, None] & (offs_d < HEAD_DIM)[None, :]
    tl.store(ptr + offs_row[:, None] + offs_d[None, :], x.to(ptr.dtype.element_ty), mask=mask)


@triton.jit
def load_lse_delta(ptr, row, mask_row):
    """lse in units of log 2 and delta, [rows] each, from what `lse_and_delta` has put side by side: one load for both.

    With the infinite lse of rows that are not there, probabilities are 0.
    """
    pair = tl.load(ptr + row, mask=mask_row, other=_NO_ROW)
    lse = pair.to(tl.int32).to(tl.float32, bitcast=True)
    return lse * LOG2_E, (pair >> 32).to(tl.int32).to(tl.float32, bitcast=True)


@triton.jit
def softmax_start(ROWS: tl.constexpr, HEAD_PAD: tl.constexpr):
    """The state of rows that have seen nothing: maximum and sum [ROWS], accumulator [ROWS, HEAD_PAD]."""
    row_max = tl.full([ROWS], _LOWEST, tl.float32)
    return row_max, tl.zeros([ROWS], tl.float32), tl.zeros([ROWS, HEAD_PAD], tl.float32)


@triton.jit
def softmax_step(score, scale_log2, row_max, row_sum, acc, v, member):
    """Add keys to the softmax state of the rows for which ``member`` holds.

    Args:
        score: [rows, keys], products of queries and keys, -inf where a row does not see a key.
        scale_log2: positive; scaling takes no instruction of its own.
        row_max, row_sum: [rows], of scaled scores. acc: [rows, HEAD_PAD]. v: [keys, HEAD_PAD].
        member: [rows], bool, or [rows, blocks] where the keys are those of several blocks, of one size, and a row may
            take part in some. Masking whole rows this way costs nothing per score.
    """
    if len(member.shape) == 1:
        new_max = tl.where(member, tl.maximum(row_max, tl.max(score, 1) * scale_log2), row_max)
        p = tl.exp2(score * scale_log2 - tl.where(member, new_max, float("inf"))[:, None])
    else:
        # [rows, blocks, keys of a block]
        by_block = tl.reshape(score, [member.shape[0], member.shape[1], score.shape[1] // member.shape[1]])
        largest = tl.where(member, tl.max(by_block, 2) * scale_log2, _LOWEST)
        new_max = tl.maximum(row_max, tl.max(largest, 1))
        p = tl.exp2(by_block * scale_log2 - tl.where(member, new_max[:, None], float("inf"))[:, :, None])
        p = tl.reshape(p, score.shape)
    shrink = tl.exp2(row_max - new_max)
    row_sum = row_sum * shrink + tl.sum(p, 1)
    acc = tl.dot(p.to(v.dtype), v, acc * shrink[:, None], input_precision="ieee")
    return new_max, row_sum, acc


@triton.jit
def softmax_result(row_max, row_sum, acc):
    """o [rows, HEAD_PAD] and lse [rows], natural log, of a softmax state; 0 and -inf for rows that saw nothing."""
    # Not row_sum > 0: the lse of a row with nan has to be nan.
    seen = row_sum != 0.0
    row_sum = tl.where(seen, row_sum, 1.0)
    return acc / row_sum[:, None], tl.where(seen, (row_max + tl.log2(row_sum)) * LN_2, float("-inf"))


@triton.jit
def _sees(key, last, window):
    """Whether a row sees a key: it sees the ``window`` keys up to ``last``, or all of those if that is None."""
    seen = key <= last
    if window is not None:
        seen = seen & (key > last - window)
    return seen


@triton.jit
def masked_score(q, k, hides, key, last, window=None):
    """[rows, keys]: products of queries and keys, -inf where a row does not see a key.

    Most tiles see all of most blocks. Comparing only where they do not costs a branch, which does not break the
    pipeline of loads, as a loop of its own would.

    Args:
        q: [rows, HEAD_PAD]. k: [keys, HEAD_PAD].
        hides: scalar, whether there may be a row here that does not see a key.
        key: [keys]. last: [rows]. window: scalar or None. What a row sees, see `_sees`; looked at where ``hides``.
    """
    score = tl.dot(q, tl.trans(k), input_precision="ieee")
    if hides:
        score = tl.where(_sees(key[None, :], last[:, None], window), score, float("-inf"))
    return score


@triton.jit
def dq_step(q, k, v, do, lse_log2, delta, dq, scale_log2, hides, key, last, window=None):
    """dq / softmax_scale with one block of keys added; lse_log2 is inf for rows that see none of them.

    Args:
        q, do, dq: [rows, HEAD_PAD]. k, v: [keys, HEAD_PAD]. lse_log2, delta: [rows].
        hides, key, last, window: as in `masked_score`.
    """
    score = tl.dot(q, tl.trans(k), input_precision="ieee")
    p = tl.exp2(score * scale_log2 - lse_log2[:, None])
    if hides:
        p = tl.where(_sees(key[None, :], last[:, None], window), p, 0.0)
    dp = tl.dot(do, tl.trans(v), input_precision="ieee")
    ds = p * (dp - delta[:, None])
    return tl.dot(ds.to(k.dtype), k, dq, input_precision="ieee")


@triton.jit
def dkv_step(q, k, v, do, lse_log2, delta, dk, dv, scale_log2, hides, key, last, window=None):
    """dk / softmax_scale and dv with one tile of query rows added.

    Scores are computed transposed: the accumulators of the products are then the operands of the next ones.

    Args:
        q, do: [rows, HEAD_PAD]. k, v, dk, dv: [keys, HEAD_PAD]. lse_log2, delta: [rows].
        hides, key, last, window: as in `masked_score`.
    """
    # [keys, rows]
    score = tl.dot(k, tl.trans(q), input_precision="ieee")
    p = tl.exp2(score * scale_log2 - lse_log2[None, :])
    if hides:
        p = tl.where(_sees(key[:, None], last[None, :], window), p, 0.0)
    dv = tl.dot(p.to(do.dtype), do, dv, input_precision="ieee")
    dp = tl.dot(v, tl.trans(do), input_precision="ieee")
    ds = p * (dp - delta[None, :])
    dk = tl.dot(ds.to(q.dtype), q, dk, input_precision="ieee")
    return dk, dv


def check_supported(q: Tensor) -> None:
    """Raise ValueError for what no tile is made for, and for GPUs that the kernels do not run on."""
    if q.dtype not in (torch.float16, torch.bfloat16, torch.float32):
        raise ValueError(f"q must be float16, bfloat16 or float32 for backend='triton', got {q.dtype}")
    if q.shape[2] > _MAX_HEAD_DIM:
        raise ValueError(f"head_dim must be at most {_MAX_HEAD_DIM} for backend='triton', got {q.shape[2]}")
    if q.is_cuda:
        if torch.version.hip is not None:
            raise ValueError("backend='triton' is for NVIDIA GPUs, got a build of torch for ROCm: use backend='torch'")
        properties = torch.cuda.get_device_properties(q.device)
        if properties.major < 8:
            raise ValueError(
                f"backend='triton' needs compute capability 8.0 or later, got {properties.major}.{properties.minor} "
                f"({properties.name}): use backend='torch'"
            )


# Not Triton's functions of these names: outside of a kernel, each call of those costs as much as a small launch.


def cdiv(a: int, b: int) -> int:
    """a / b, rounded up."""
    return -(-a // b)


def next_power_of_2(n: int) -> int:
    """The smallest power of two that is at least n; 1 for n below 1."""
    return 1 << max(0, n - 1).bit_length()


def pad(size: int) -> int:
    """Extent of a tile dimension for ``size`` elements: a power of two that tl.dot accepts."""
    return max(16, next_power_of_2(size))


def longest(offsets: tuple[int, ...]) -> int:
    """Length of the longest sequence."""
    return max((end - start for start, end in itertools.pairwise(offsets)), default=0)


def addressable(x: Tensor) -> Tensor:
    """x, or a copy of it, contiguous in its last dimension and with heads less than 2**31 elements from each other."""
    return x if x.stride(-1) == 1 and x.shape[1] * x.stride(1) < 2**31 else x.contiguous()


def strides(**tensors: Tensor) -> dict[str, int]:
    """The kernels' arguments stride_NAMEt and stride_NAMEh: of tokens and of heads."""
    return {f"stride_{name}{axis}": x.stride(i) for name, x in tensors.items() for i, axis in enumerate("th")}


def lse_and_delta(lse: Tensor, delta: Tensor) -> Tensor:
    """(.., 2), fp32: both numbers of a row side by side, as the backward kernels load them.

    Args:
        lse: (total_q, num_heads), fp32, natural log. delta: likewise, the sum of o * do over head_dim.
    """
    return torch.stack([lse, delta], -1)


def pairs(lse_delta: Tensor) -> Tensor:
    """The same memory as 64 bits a row, for `load_lse_delta`."""
    return lse_delta.contiguous().view(torch.int64)


def current_device(x: Tensor) -> contextlib.AbstractContextManager:
    """Context in which kernels are launched on the device of x: Triton looks at the current device, not at tensors."""
    return torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext()


def launch(kernel: "triton.JITFunction", grid: Sequence[int], **arguments) -> None:
    """Run a kernel over a grid, which may be empty, with arguments by name.

    Multiplications and additions are fused: Triton's default until 3.9, and what the kernels' bounds on errors and
    times count on.
    """
    if all(grid):
        kernel[tuple(grid)](**arguments, enable_fp_fusion=True)


# Sizes of tiles, numbers of warps and of pipeline stages.


@dataclass(frozen=True)
class Tuning:
    """What is chosen by what compiled code looks like, until a GPU decides. It changes nothing but rounding.

    `benchmarks/bench_kernels.py --parts sweep` measures every other value against these.

    Attributes:
        stages: pipeline stages of the loads of walks over keys, forward and for dq.
        selection_span: blocks that a step of selection's forward walk takes together, 1 or 2.
        window_rows: rows of a tile of the window branch, forward: 128 by eight warps, or 64 by four, of which two
            programs share a multiprocessor.
        one_dq: whether the kernel that walks selected blocks for dq walks the window too, and one output less is added.
    """

    stages: int = 3
    selection_span: int = 1
    window_rows: int = 128
    one_dq: bool = True


tuning = Tuning()


def is_wide(dtype: torch.dtype) -> bool:
    """Whether operands are so wide that tiles must be smaller to fit into shared memory."""
    return dtype.itemsize > 2


def is_small(device: torch.device) -> bool:
    """Whether tiles must be those of GPUs that have less shared memory than Hopper: compute capability 8.x and 12.x.

    Their matrix instructions are those of single warps, which leave fewer registers, too.
    """
    return device.type == "cuda" and torch.cuda.get_device_properties(device).shared_memory_per_block_optin < 200 << 10


def extents(q: Tensor, rows: int, keys: int, num_warps: int, num_stages: int) -> dict:
    """Constexprs of a tile of rows x keys and its launch options, for operands like q.

    In float32, which is there to check results with rather than to be fast, products are sums of single multiply-adds
    that fill the registers: tiles shrink until they fit.
    """
    head_dim, wide = q.shape[-1], is_wide(q.dtype)
    if wide:
        rows, keys = (16, 16) if head_dim > 64 else (min(rows, 64), min(keys, 32))
        num_warps = 8
    return {
        "ROWS": rows,
        "KEYS": keys,
        "HEAD_DIM": head_dim,
        "HEAD_PAD": pad(head_dim),
        "num_warps": num_warps,
        "num_stages": 1 if wide else num_stages,
    }


def walk_extents(q: Tensor, rows: int = 128, num_stages: int | None = None) -> dict:
    """`extents` where a tile of query rows walks keys, forward and for dq: 16 rows a warp, and four warps at least.

    Args:
        num_stages: defaults to `tuning.stages`.
    """
    keys = 32 if is_small(q.device) else 64
    return extents(q, rows, keys, max(4, rows // 16), tuning.stages if num_stages is None else num_stages)


def dkv_extents(q: Tensor, num_stages: int) -> dict:
    """`extents` where a tile of keys walks query rows, for dk and dv.

    Hopper's MMA gives 16 rows of keys to a warp: with more than four warps for 64 keys, warps would repeat each other.
    """
    return extents(q, 32, 64, num_warps=4, num_stages=num_stages)
