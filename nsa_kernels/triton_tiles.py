"""What the Triton kernels share: steps of attention, forward and backward, shapes of tiles, and how to launch.

Addresses are made of tokens in 64 bits, and of heads in 32, which `addressable` tensors allow.
"""

import contextlib
import itertools

import torch
from torch import Tensor

try:
    import triton
    import triton.language as tl
except ImportError as error:
    raise ImportError("backend='triton' needs triton 3.6 or later: pip install 'triton>=3.6'") from error

_MAX_HEAD_DIM = 128

_LN_2 = tl.constexpr(0.6931471805599453)
# A maximum below every score: a row that has seen nothing needs no case of its own.
_LOWEST = tl.constexpr(-3.0e38)


@triton.jit
def sequence_bounds(cu_seqlens_q_ptr, cu_seqlens_k_ptr, sequence):
    """The first row of a sequence in the packed q and k, and how many queries and keys it has."""
    start_q = tl.load(cu_seqlens_q_ptr + sequence)
    start_k = tl.load(cu_seqlens_k_ptr + sequence)
    num_queries = tl.load(cu_seqlens_q_ptr + sequence + 1) - start_q
    num_keys = tl.load(cu_seqlens_k_ptr + sequence + 1) - start_k
    return start_q, start_k, num_queries, num_keys


@triton.jit
def softmax_start(ROWS: tl.constexpr, HEAD_PAD: tl.constexpr):
    """The state of rows that have seen nothing: maximum and sum [ROWS], accumulator [ROWS, HEAD_PAD]."""
    row_max = tl.full([ROWS], _LOWEST, tl.float32)
    return row_max, tl.zeros([ROWS], tl.float32), tl.zeros([ROWS, HEAD_PAD], tl.float32)


@triton.jit
def softmax_step(score, scale_log2, row_max, row_sum, acc, v, member):
    """Add one block of keys to the softmax state of the rows for which ``member`` holds.

    Args:
        score: [rows, keys], products of queries and keys, -inf where a row does not see a key.
        scale_log2: positive; scaling takes no instruction of its own.
        row_max, row_sum: [rows], of scaled scores. acc: [rows, HEAD_PAD]. v: [keys, HEAD_PAD].
        member: [rows], bool. Masking whole rows this way costs nothing per score.
    """
    new_max = tl.where(member, tl.maximum(row_max, tl.max(score, 1) * scale_log2), row_max)
    p = tl.exp2(score * scale_log2 - tl.where(member, new_max, float("inf"))[:, None])
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
    return acc / row_sum[:, None], tl.where(seen, (row_max + tl.log2(row_sum)) * _LN_2, float("-inf"))


@triton.jit
def dq_step(q, k, v, do, lse_log2, delta, dq, scale_log2, seen, MASKED: tl.constexpr):
    """dq / softmax_scale with one block of keys added; lse_log2 is inf for rows that see none of them.

    Args:
        q, do, dq: [rows, HEAD_PAD]. k, v: [keys, HEAD_PAD]. lse_log2, delta: [rows].
        seen: [rows, keys], looked at where MASKED.
    """
    score = tl.dot(q, tl.trans(k), input_precision="ieee")
    p = tl.exp2(score * scale_log2 - lse_log2[:, None])
    if MASKED:
        p = tl.where(seen, p, 0.0)
    dp = tl.dot(do, tl.trans(v), input_precision="ieee")
    ds = p * (dp - delta[:, None])
    return tl.dot(ds.to(k.dtype), k, dq, input_precision="ieee")


@triton.jit
def dkv_step(q, k, v, do, lse_log2, delta, dk, dv, scale_log2, seen):
    """dk / softmax_scale and dv with one tile of query rows added.

    Scores are computed transposed: the accumulators of the products are then the operands of the next ones.

    Args:
        q, do: [rows, HEAD_PAD]. k, v, dk, dv: [keys, HEAD_PAD]. lse_log2, delta: [rows]. seen: [keys, rows].
    """
    # [keys, rows]
    score = tl.dot(k, tl.trans(q), input_precision="ieee")
    p = tl.where(seen, tl.exp2(score * scale_log2 - lse_log2[None, :]), 0.0)
    dv = tl.dot(p.to(do.dtype), do, dv, input_precision="ieee")
    dp = tl.dot(v, tl.trans(do), input_precision="ieee")
    ds = p * (dp - delta[None, :])
    dk = tl.dot(ds.to(q.dtype), q, dk, input_precision="ieee")
    return dk, dv


def check_supported(q: Tensor) -> None:
    """Raise ValueError for what no tile is made for."""
    if q.dtype not in (torch.float16, torch.bfloat16, torch.float32):
        raise ValueError(f"q must be float16, bfloat16 or float32 for backend='triton', got {q.dtype}")
    if q.shape[2] > _MAX_HEAD_DIM:
        raise ValueError(f"head_dim must be at most {_MAX_HEAD_DIM} for backend='triton', got {q.shape[2]}")


def positive_scale(q: Tensor, softmax_scale: float) -> tuple[Tensor, float]:
    """q and scale with the same products, and a positive scale: the largest product is then the largest score."""
    return (q if softmax_scale >= 0 else -q), max(abs(softmax_scale), 1e-30)


def pad(size: int) -> int:
    """Extent of a tile dimension for ``size`` elements: a power of two that tl.dot accepts."""
    return max(16, triton.next_power_of_2(size))


def longest(offsets: tuple[int, ...]) -> int:
    """Length of the longest sequence."""
    return max((end - start for start, end in itertools.pairwise(offsets)), default=0)


def addressable(x: Tensor) -> Tensor:
    """x, or a copy of it, contiguous in its last dimension and with heads less than 2**31 elements from each other."""
    return x if x.stride(-1) == 1 and x.shape[1] * x.stride(1) < 2**31 else x.contiguous()


def strides(**tensors: Tensor) -> dict[str, int]:
    """The kernels' arguments stride_NAMEt and stride_NAMEh: of tokens and of heads."""
    return {f"stride_{name}{axis}": x.stride(i) for name, x in tensors.items() for i, axis in enumerate("th")}


def current_device(x: Tensor) -> contextlib.AbstractContextManager:
    """Context in which kernels are launched on the device of x: Triton looks at the current device, not at tensors."""
    return torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext()


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


def walk_extents(q: Tensor) -> dict:
    """`extents` where a tile of query rows walks keys, forward and for dq."""
    return extents(q, 128, 32 if is_small(q.device) else 64, num_warps=8, num_stages=3)
