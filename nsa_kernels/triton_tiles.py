"""What the selection and window kernels share: shapes of tiles, and one step of an online softmax."""

import itertools

import torch
from torch import Tensor

try:
    import triton
    import triton.language as tl
except ImportError as error:
    raise ImportError("backend='triton' needs triton 3.6 or later: pip install 'triton>=3.6'") from error


@triton.jit
def softmax_step(score, scale_log2, row_max, row_sum, acc, v, member):
    """Add one block of keys to the softmax state of the rows for which ``member`` holds.

    The maximum starts at a finite number below every score, so a row that has seen nothing needs no case of its own.

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


def positive_scale(q: Tensor, softmax_scale: float) -> tuple[Tensor, float]:
    """q and scale with the same products, and a positive scale: the largest product is then the largest score."""
    return (q if softmax_scale >= 0 else -q), max(abs(softmax_scale), 1e-30)


def pad(size: int) -> int:
    """Extent of a tile dimension for ``size`` elements: a power of two that tl.dot accepts."""
    return max(16, triton.next_power_of_2(size))


def longest(offsets: tuple[int, ...]) -> int:
    """Length of the longest sequence."""
    return max((end - start for start, end in itertools.pairwise(offsets)), default=0)


def unit_stride(x: Tensor) -> Tensor:
    """x, or a copy of it whose last dimension is contiguous."""
    return x if x.stride(-1) == 1 else x.contiguous()


def extents(dtype: torch.dtype, head_dim: int, rows: int, keys: int, num_warps: int, num_stages: int) -> dict:
    """Constexprs of a tile of rows x keys and its launch options.

    In float32, which is there to check results with rather than to be fast, products are sums of single multiply-adds
    that fill the registers: tiles shrink until they fit.
    """
    wide = is_wide(dtype)
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


def is_wide(dtype: torch.dtype) -> bool:
    """Whether operands are so wide that tiles must be smaller to fit into shared memory."""
    return dtype.itemsize > 2
