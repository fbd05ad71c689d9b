"""Compression branch (Triton backend).

    k~_j = mean of k[jB : (j+1)B], v~_j likewise;  token t sees block j iff (j+1)B <= t+1
    p[h,t,j] = softmax_j(scale * q[t,h] . k~_j);   o[t,h] = sum_j p[h,t,j] v~_j

Native Sparse Attention (arXiv:2502.11089), equations 7 and 8, with mean pooling. Each program takes tokens of one query
head, so that a group of any size needs no padding. Which blocks a token selects is triton_choice.py's business.

The pooled rows of the sequence whose keys start at row c are kept at row c // B: sequences cannot overlap there, and
nothing has to be counted on the device or waited for.
"""

import torch
from torch import Tensor

from . import triton_choice, triton_tiles, utils

try:
    import triton
    import triton.language as tl
except ImportError as error:
    raise ImportError("backend='triton' needs triton 3.6 or later: pip install 'triton>=3.6'") from error

_LOG2_E = tl.constexpr(1.4426950408889634)

# Programs that the dk, dv kernel aims for: it splits the queries until there are so many.
_DKV_PROGRAMS, _DKV_MAX_SPLITS = 1024, 32


@triton.jit
def _mean_pool_kernel(
    k_ptr,
    v_ptr,
    k_cmp_ptr,
    v_cmp_ptr,
    cu_seqlens_k_ptr,
    stride_kt,
    stride_kh,
    stride_vt,
    stride_vh,
    num_kv_heads,
    HEAD_DIM: tl.constexpr,
    HEAD_PAD: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCK_PAD: tl.constexpr,
):
    """Means of one block of keys and of values. Grid: (most blocks of a sequence, num_kv_heads, batch)."""
    block, head, sequence = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    start = tl.load(cu_seqlens_k_ptr + sequence)
    num_keys = tl.load(cu_seqlens_k_ptr + sequence + 1) - start
    if (block + 1) * BLOCK_SIZE <= num_keys:
        offs_n = tl.arange(0, BLOCK_PAD)
        offs_d = tl.arange(0, HEAD_PAD)
        mask_d = offs_d < HEAD_DIM
        mask = (offs_n < BLOCK_SIZE)[:, None] & mask_d[None, :]
        rows = (start + block * BLOCK_SIZE + offs_n).to(tl.int64)
        row_cmp = (start // BLOCK_SIZE + block).to(tl.int64) * num_kv_heads + head
        # [BLOCK_PAD, HEAD_PAD]
        k = tl.load(k_ptr + rows[:, None] * stride_kt + head * stride_kh + offs_d[None, :], mask=mask, other=0.0)
        v = tl.load(v_ptr + rows[:, None] * stride_vt + head * stride_vh + offs_d[None, :], mask=mask, other=0.0)
        k_cmp = tl.sum(k.to(tl.float32), 0) / BLOCK_SIZE
        v_cmp = tl.sum(v.to(tl.float32), 0) / BLOCK_SIZE
        tl.store(k_cmp_ptr + row_cmp * HEAD_DIM + offs_d, k_cmp.to(k_cmp_ptr.dtype.element_ty), mask=mask_d)
        tl.store(v_cmp_ptr + row_cmp * HEAD_DIM + offs_d, v_cmp.to(v_cmp_ptr.dtype.element_ty), mask=mask_d)


@triton.jit
def _compression_fwd_kernel(
    q_ptr,
    k_cmp_ptr,
    v_cmp_ptr,
    o_ptr,
    lse_ptr,
    cu_seqlens_q_ptr,
    cu_seqlens_k_ptr,
    stride_qt,
    stride_qh,
    num_heads,
    num_kv_heads,
    softmax_scale,
    HEAD_DIM: tl.constexpr,
    HEAD_PAD: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    TOKENS: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    """o and lse of TOKENS tokens of one query head. Grid: (tiles, num_heads, batch), the last tiles first."""
    head, sequence = tl.program_id(1), tl.program_id(2)
    tile_start = (tl.num_programs(0) - 1 - tl.program_id(0)) * TOKENS
    start_q, start_k, num_queries, num_keys = triton_tiles.sequence_bounds(cu_seqlens_q_ptr, cu_seqlens_k_ptr, sequence)
    num_tokens = tl.minimum(num_queries - tile_start, TOKENS)
    if num_tokens > 0:
        first = num_keys - num_queries + tile_start
        kv_head = head // (num_heads // num_kv_heads)
        offs_t = tl.arange(0, TOKENS)
        offs_d = tl.arange(0, HEAD_PAD)
        mask_t = offs_t < num_tokens
        mask_d = offs_d < HEAD_DIM
        mask_q = mask_t[:, None] & mask_d[None, :]
        token = (start_q + tile_start + offs_t).to(tl.int64)
        # [TOKENS, HEAD_PAD]
        q = tl.load(q_ptr + token[:, None] * stride_qt + head * stride_qh + offs_d[None, :], mask=mask_q, other=0.0)
        visible = (first + offs_t + 1) // BLOCK_SIZE
        visible_to_any = (first + num_tokens) // BLOCK_SIZE
        scale_log2 = softmax_scale * _LOG2_E
        offs_cmp = ((start_k // BLOCK_SIZE).to(tl.int64) * num_kv_heads + kv_head) * HEAD_DIM
        stride_j = num_kv_heads * HEAD_DIM
        row_max, row_sum, acc = triton_tiles.softmax_start(TOKENS, HEAD_PAD)
        for block in range(0, visible_to_any, BLOCKS):
            offs_j = block + tl.arange(0, BLOCKS)
            mask_j = (offs_j < visible_to_any)[:, None] & mask_d[None, :]
            offs_kv = offs_cmp + offs_j.to(tl.int64)[:, None] * stride_j + offs_d[None, :]
            # [BLOCKS, HEAD_PAD]
            k = tl.load(k_cmp_ptr + offs_kv, mask=mask_j, other=0.0)
            v = tl.load(v_cmp_ptr + offs_kv, mask=mask_j, other=0.0)
            score = tl.dot(q, tl.trans(k), input_precision="ieee")
            score = tl.where(offs_j[None, :] < visible[:, None], score, float("-inf"))
            row_max, row_sum, acc = triton_tiles.softmax_step(score, scale_log2, row_max, row_sum, acc, v, mask_t)
        o, lse = triton_tiles.softmax_result(row_max, row_sum, acc)
        row = token * num_heads + head
        tl.store(o_ptr + row[:, None] * HEAD_DIM + offs_d[None, :], o.to(o_ptr.dtype.element_ty), mask=mask_q)
        tl.store(lse_ptr + row, lse, mask=mask_t)


@triton.jit
def _compression_bwd_dq_kernel(
    q_ptr,
    k_cmp_ptr,
    v_cmp_ptr,
    do_ptr,
    lse_ptr,
    delta_ptr,
    dq_ptr,
    cu_seqlens_q_ptr,
    cu_seqlens_k_ptr,
    stride_qt,
    stride_qh,
    stride_dot,
    stride_doh,
    num_heads,
    num_kv_heads,
    softmax_scale,
    HEAD_DIM: tl.constexpr,
    HEAD_PAD: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    TOKENS: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    """dq of TOKENS tokens of one query head, over the blocks they see. Grid: (tiles, num_heads, batch), last first."""
    head, sequence = tl.program_id(1), tl.program_id(2)
    tile_start = (tl.num_programs(0) - 1 - tl.program_id(0)) * TOKENS
    start_q, start_k, num_queries, num_keys = triton_tiles.sequence_bounds(cu_seqlens_q_ptr, cu_seqlens_k_ptr, sequence)
    num_tokens = tl.minimum(num_queries - tile_start, TOKENS)
    if num_tokens > 0:
        first = num_keys - num_queries + tile_start
        kv_head = head // (num_heads // num_kv_heads)
        offs_t = tl.arange(0, TOKENS)
        offs_d = tl.arange(0, HEAD_PAD)
        mask_t = offs_t < num_tokens
        mask_d = offs_d < HEAD_DIM
        mask_q = mask_t[:, None] & mask_d[None, :]
        token = (start_q + tile_start + offs_t).to(tl.int64)
        # [TOKENS, HEAD_PAD]
        q = tl.load(q_ptr + token[:, None] * stride_qt + head * stride_qh + offs_d[None, :], mask=mask_q, other=0.0)
        do = tl.load(do_ptr + token[:, None] * stride_dot + head * stride_doh + offs_d[None, :], mask=mask_q, other=0.0)
        row = token * num_heads + head
        lse_log2 = tl.load(lse_ptr + row, mask=mask_t, other=0.0) * _LOG2_E
        delta = tl.load(delta_ptr + row, mask=mask_t, other=0.0)
        visible = (first + offs_t + 1) // BLOCK_SIZE
        visible_to_any = (first + num_tokens) // BLOCK_SIZE
        scale_log2 = softmax_scale * _LOG2_E
        offs_cmp = ((start_k // BLOCK_SIZE).to(tl.int64) * num_kv_heads + kv_head) * HEAD_DIM
        stride_j = num_kv_heads * HEAD_DIM
        dq = tl.zeros([TOKENS, HEAD_PAD], tl.float32)
        for block in range(0, visible_to_any, BLOCKS):
            offs_j = block + tl.arange(0, BLOCKS)
            mask_j = (offs_j < visible_to_any)[:, None] & mask_d[None, :]
            offs_kv = offs_cmp + offs_j.to(tl.int64)[:, None] * stride_j + offs_d[None, :]
            # [BLOCKS, HEAD_PAD]
            k = tl.load(k_cmp_ptr + offs_kv, mask=mask_j, other=0.0)
            v = tl.load(v_cmp_ptr + offs_kv, mask=mask_j, other=0.0)
            # Rows that see nothing have lse -inf, but no column here either.
            seen = offs_j[None, :] < visible[:, None]
            dq = triton_tiles.dq_step(q, k, v, do, lse_log2, delta, dq, scale_log2, seen, MASKED=True)
        dq_row = dq_ptr + row[:, None] * HEAD_DIM + offs_d[None, :]
        tl.store(dq_row, (dq * softmax_scale).to(dq_ptr.dtype.element_ty), mask=mask_q)


@triton.jit(do_not_specialize=["batch"])
def _compression_bwd_dkv_kernel(
    q_ptr,
    k_cmp_ptr,
    v_cmp_ptr,
    do_ptr,
    lse_ptr,
    delta_ptr,
    dk_part_ptr,
    dv_part_ptr,
    cu_seqlens_q_ptr,
    cu_seqlens_k_ptr,
    stride_qt,
    stride_qh,
    stride_dot,
    stride_doh,
    stride_split,
    batch,
    num_kv_heads,
    softmax_scale,
    GROUP_SIZE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HEAD_PAD: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    TOKENS: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    """Partial sums of dk_cmp and dv_cmp of BLOCKS blocks. Grid: (tiles, splits, num_kv_heads * batch).

    The (token tile, query head) pairs that see the blocks are dealt out to the splits in turn, so that each has its
    share of late tokens; the first block tiles, which most tokens see, start first. Rows of a pair are tokens of one
    head: any group size fills the tile.
    """
    tile, split = tl.program_id(0), tl.program_id(1)
    kv_head, sequence = tl.program_id(2) // batch, tl.program_id(2) % batch
    start_q, start_k, num_queries, num_keys = triton_tiles.sequence_bounds(cu_seqlens_q_ptr, cu_seqlens_k_ptr, sequence)
    num_blocks = num_keys // BLOCK_SIZE
    if tile * BLOCKS < num_blocks:
        first = num_keys - num_queries
        num_heads = num_kv_heads * GROUP_SIZE
        offs_j = tile * BLOCKS + tl.arange(0, BLOCKS)
        offs_d = tl.arange(0, HEAD_PAD)
        mask_d = offs_d < HEAD_DIM
        mask_j = (offs_j < num_blocks)[:, None] & mask_d[None, :]
        row_cmp = (start_k // BLOCK_SIZE + offs_j).to(tl.int64) * num_kv_heads + kv_head
        offs_kv = row_cmp[:, None] * HEAD_DIM + offs_d[None, :]
        # [BLOCKS, HEAD_PAD]
        k = tl.load(k_cmp_ptr + offs_kv, mask=mask_j, other=0.0)
        v = tl.load(v_cmp_ptr + offs_kv, mask=mask_j, other=0.0)
        q_base = q_ptr + start_q.to(tl.int64) * stride_qt + kv_head * GROUP_SIZE * stride_qh
        do_base = do_ptr + start_q.to(tl.int64) * stride_dot + kv_head * GROUP_SIZE * stride_doh
        lse_base = lse_ptr + start_q.to(tl.int64) * num_heads + kv_head * GROUP_SIZE
        delta_base = delta_ptr + start_q.to(tl.int64) * num_heads + kv_head * GROUP_SIZE
        scale_log2 = softmax_scale * _LOG2_E
        dk = tl.zeros([BLOCKS, HEAD_PAD], tl.float32)
        dv = tl.zeros([BLOCKS, HEAD_PAD], tl.float32)
        # The first query that sees the first of the blocks.
        first_tile = tl.maximum((tile * BLOCKS + 1) * BLOCK_SIZE - 1 - first, 0) // TOKENS
        num_pairs = (tl.cdiv(num_queries, TOKENS) - first_tile) * GROUP_SIZE
        for pair in range(split, num_pairs, tl.num_programs(1)):
            query = (first_tile + pair // GROUP_SIZE) * TOKENS + tl.arange(0, TOKENS)
            head = pair % GROUP_SIZE
            mask_t = query < num_queries
            mask_q = mask_t[:, None] & mask_d[None, :]
            offs_q = query.to(tl.int64) * stride_qt + head * stride_qh
            offs_do = query.to(tl.int64) * stride_dot + head * stride_doh
            offs_lse = query.to(tl.int64) * num_heads + head
            # [TOKENS, HEAD_PAD]
            q = tl.load(q_base + offs_q[:, None] + offs_d[None, :], mask=mask_q, other=0.0)
            do = tl.load(do_base + offs_do[:, None] + offs_d[None, :], mask=mask_q, other=0.0)
            # With an infinite lse the probabilities of rows past the end are 0.
            lse_log2 = tl.load(lse_base + offs_lse, mask=mask_t, other=float("inf")) * _LOG2_E
            delta = tl.load(delta_base + offs_lse, mask=mask_t, other=0.0)
            visible = (first + query + 1) // BLOCK_SIZE
            # [BLOCKS, TOKENS]
            seen = offs_j[:, None] < visible[None, :]
            dk, dv = triton_tiles.dkv_step(q, k, v, do, lse_log2, delta, dk, dv, scale_log2, seen)
        offs_part = split.to(tl.int64) * stride_split + offs_kv
        tl.store(dk_part_ptr + offs_part, dk * softmax_scale, mask=mask_j)
        tl.store(dv_part_ptr + offs_part, dv, mask=mask_j)


@triton.jit(do_not_specialize=["num_splits"])
def _mean_unpool_kernel(
    dk_part_ptr,
    dv_part_ptr,
    dk_ptr,
    dv_ptr,
    cu_seqlens_k_ptr,
    stride_split,
    num_splits,
    num_kv_heads,
    HEAD_DIM: tl.constexpr,
    HEAD_PAD: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCK_PAD: tl.constexpr,
):
    """dk and dv of one block of tokens: the sum of its partial sums over BLOCK_SIZE; 0 in an incomplete block.

    Grid: (most blocks of a sequence, incomplete ones included, num_kv_heads, batch).
    """
    block, head, sequence = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    start = tl.load(cu_seqlens_k_ptr + sequence)
    num_keys = tl.load(cu_seqlens_k_ptr + sequence + 1) - start
    if block * BLOCK_SIZE < num_keys:
        offs_n = tl.arange(0, BLOCK_PAD)
        offs_d = tl.arange(0, HEAD_PAD)
        mask_d = offs_d < HEAD_DIM
        dk = tl.zeros([HEAD_PAD], tl.float32)
        dv = tl.zeros([HEAD_PAD], tl.float32)
        if (block + 1) * BLOCK_SIZE <= num_keys:
            row_cmp = (start // BLOCK_SIZE + block).to(tl.int64) * num_kv_heads + head
            offs = row_cmp * HEAD_DIM + offs_d
            for _ in range(num_splits):
                dk += tl.load(dk_part_ptr + offs, mask=mask_d, other=0.0)
                dv += tl.load(dv_part_ptr + offs, mask=mask_d, other=0.0)
                offs += stride_split
        inside = (offs_n < BLOCK_SIZE) & (block * BLOCK_SIZE + offs_n < num_keys)
        mask = inside[:, None] & mask_d[None, :]
        rows = (start + block * BLOCK_SIZE + offs_n).to(tl.int64) * num_kv_heads + head
        # [BLOCK_PAD, HEAD_PAD]
        offs = rows[:, None] * HEAD_DIM + offs_d[None, :]
        tl.store(dk_ptr + offs, tl.broadcast_to((dk / BLOCK_SIZE)[None, :], [BLOCK_PAD, HEAD_PAD]), mask=mask)
        tl.store(dv_ptr + offs, tl.broadcast_to((dv / BLOCK_SIZE)[None, :], [BLOCK_PAD, HEAD_PAD]), mask=mask)


def forward_config(q: Tensor) -> dict:
    """Constexprs and launch options of the forward kernel.

    Tiles of float32 are small, here and below: without matrix instructions, whole rows of operands live in registers.
    """
    wide = triton_tiles.is_wide(q.dtype)
    return {
        "HEAD_DIM": q.shape[2],
        "HEAD_PAD": triton_tiles.pad(q.shape[2]),
        "TOKENS": 32 if wide else 128,
        "BLOCKS": 16 if wide else 64,
        "num_warps": 8,
        "num_stages": 1 if wide else 3,
    }


def backward_config(q: Tensor) -> tuple[dict, dict]:
    """Constexprs and launch options of the dq kernel and of the dk, dv kernel.

    Hopper's MMA gives 16 rows of blocks to a warp: the 64 of the latter's products take four warps and no more. Other
    GPUs divide the columns as well, and keep the accumulators of a larger tile in the registers of eight.
    """
    wide, small = triton_tiles.is_wide(q.dtype), triton_tiles.is_small(q.device)
    shared = {"HEAD_DIM": q.shape[2], "HEAD_PAD": triton_tiles.pad(q.shape[2]), "num_stages": 1 if wide else 2}
    dq = {**shared, "TOKENS": 16 if wide else 128, "BLOCKS": 32 if wide or small else 64, "num_warps": 8}
    if wide:
        return dq, {**shared, "TOKENS": 32, "BLOCKS": 16, "num_warps": 8}
    return dq, {**shared, "TOKENS": 64 if small else 32, "BLOCKS": 64, "num_warps": 8 if small else 4}


def _pool(k: Tensor, v: Tensor, lengths: utils.SequenceLengths, block_size: int) -> tuple[Tensor, Tensor]:
    """Means of the complete blocks, (total_k // block_size, num_kv_heads, head_dim), in the dtype of k.

    Rows between two sequences' blocks are left unwritten, and are never read.
    """
    _, num_kv_heads, head_dim = k.shape
    pooled = [x.new_empty(x.shape[0] // block_size, num_kv_heads, head_dim) for x in (k, v)]
    num_blocks = triton_tiles.longest(lengths.offsets_k) // block_size
    if num_blocks:
        _mean_pool_kernel[(num_blocks, num_kv_heads, len(lengths.offsets_k) - 1)](
            k_ptr=k,
            v_ptr=v,
            k_cmp_ptr=pooled[0],
            v_cmp_ptr=pooled[1],
            cu_seqlens_k_ptr=lengths.cu_seqlens_k,
            **triton_tiles.strides(k=k, v=v),
            num_kv_heads=num_kv_heads,
            HEAD_DIM=head_dim,
            HEAD_PAD=triton_tiles.pad(head_dim),
            BLOCK_SIZE=block_size,
            BLOCK_PAD=triton.next_power_of_2(block_size),
            num_warps=4,
        )
    return pooled[0], pooled[1]


def _attend(q, k_cmp, v_cmp, lengths, block_size, softmax_scale):
    total_q, num_heads, _ = q.shape
    q, softmax_scale = triton_tiles.positive_scale(q, softmax_scale)
    o = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    lse = torch.empty(total_q, num_heads, dtype=torch.float32, device=q.device)
    config = forward_config(q)
    num_tiles = triton.cdiv(triton_tiles.longest(lengths.offsets_q), config["TOKENS"])
    if num_tiles:
        _compression_fwd_kernel[(num_tiles, num_heads, len(lengths.offsets_q) - 1)](
            q_ptr=q,
            k_cmp_ptr=k_cmp,
            v_cmp_ptr=v_cmp,
            o_ptr=o,
            lse_ptr=lse,
            cu_seqlens_q_ptr=lengths.cu_seqlens_q,
            cu_seqlens_k_ptr=lengths.cu_seqlens_k,
            **triton_tiles.strides(q=q),
            num_heads=num_heads,
            num_kv_heads=k_cmp.shape[1],
            softmax_scale=softmax_scale,
            BLOCK_SIZE=block_size,
            **config,
        )
    return o, lse


def compress(
    q: Tensor, k: Tensor, v: Tensor, lengths: utils.SequenceLengths, block_size: int, softmax_scale: float
) -> tuple[Tensor, Tensor]:
    """The compression branch alone: o and lse of `compress_and_choose`."""
    return _attend(q, *_pool(k, v, lengths, block_size), lengths, block_size, softmax_scale)


def compress_and_choose(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lengths: utils.SequenceLengths,
    block_size: int,
    block_counts: int,
    softmax_scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """The compression branch, and the blocks that every token and key/value head selects.

    Args:
        q: (total_q, num_heads, head_dim), fp16, bf16 or fp32, contiguous in its last dimension, like k and v.
        k, v: (total_k, num_kv_heads, head_dim), like q.
    Returns:
        o: like q; 0 where no block is visible.
        lse: (total_q, num_heads), fp32, natural log; -inf where no block is visible.
        block_indices: (total_q, num_kv_heads, block_counts), int32, ascending, -1 at the end.
    """
    k_cmp, v_cmp = _pool(k, v, lengths, block_size)
    o, lse = _attend(q, k_cmp, v_cmp, lengths, block_size, softmax_scale)
    return o, lse, triton_choice.choose(q, k_cmp, lse, lengths, block_size, block_counts, softmax_scale)


def num_splits(total_blocks: int, num_kv_heads: int, max_queries: int, blocks: int = 64) -> int:
    """Into how many partial sums the dk, dv kernel splits the queries.

    Splits times blocks is bounded, so the partial sums take memory linear in the tokens. Depends on shapes alone: the
    same inputs are summed in the same order on any device.
    """
    tiles = max(1, triton.cdiv(total_blocks, blocks)) * num_kv_heads
    return max(1, min(_DKV_MAX_SPLITS, _DKV_PROGRAMS // tiles, triton.cdiv(max_queries, 128)))


def compression_bwd(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lse: Tensor,
    do: Tensor,
    delta: Tensor,
    lengths: utils.SequenceLengths,
    block_size: int,
    softmax_scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of the compression branch, through the means.

    Args:
        lse, delta: (total_q, num_heads), fp32; delta is the sum of o * do over head_dim.
        do: like q, contiguous in its last dimension.
    Returns:
        dq: like q; dk, dv: (total_k, num_kv_heads, head_dim), fp32.
    """
    num_heads, num_kv_heads, head_dim = q.shape[1], k.shape[1], q.shape[2]
    dq = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    dk, dv = (torch.empty(x.shape, dtype=torch.float32, device=x.device) for x in (k, v))
    k_cmp, v_cmp = _pool(k, v, lengths, block_size)
    batch, max_q, max_k = (
        len(lengths.offsets_q) - 1,
        triton_tiles.longest(lengths.offsets_q),
        triton_tiles.longest(lengths.offsets_k),
    )
    dq_config, dkv_config = backward_config(q)
    shared = {
        "q_ptr": q,
        "k_cmp_ptr": k_cmp,
        "v_cmp_ptr": v_cmp,
        "do_ptr": do,
        "lse_ptr": lse,
        "delta_ptr": delta,
        "cu_seqlens_q_ptr": lengths.cu_seqlens_q,
        "cu_seqlens_k_ptr": lengths.cu_seqlens_k,
        **triton_tiles.strides(q=q, do=do),
        "num_kv_heads": num_kv_heads,
        "softmax_scale": softmax_scale,
        "BLOCK_SIZE": block_size,
    }
    if max_q:
        _compression_bwd_dq_kernel[(triton.cdiv(max_q, dq_config["TOKENS"]), num_heads, batch)](
            dq_ptr=dq, num_heads=num_heads, **shared, **dq_config
        )
    splits = num_splits(k_cmp.shape[0], num_kv_heads, max_q, dkv_config["BLOCKS"])
    dk_part, dv_part = (x.new_empty(splits, *x.shape, dtype=torch.float32) for x in (k_cmp, v_cmp))
    if max_k >= block_size:
        tiles = triton.cdiv(max_k // block_size, dkv_config["BLOCKS"])
        _compression_bwd_dkv_kernel[(tiles, splits, num_kv_heads * batch)](
            dk_part_ptr=dk_part,
            dv_part_ptr=dv_part,
            stride_split=dk_part.stride(0),
            batch=batch,
            GROUP_SIZE=num_heads // num_kv_heads,
            **shared,
            **dkv_config,
        )
    if max_k:
        _mean_unpool_kernel[(triton.cdiv(max_k, block_size), num_kv_heads, batch)](
            dk_part_ptr=dk_part,
            dv_part_ptr=dv_part,
            dk_ptr=dk,
            dv_ptr=dv,
            cu_seqlens_k_ptr=lengths.cu_seqlens_k,
            stride_split=dk_part.stride(0),
            num_splits=splits,
            num_kv_heads=num_kv_heads,
            HEAD_DIM=head_dim,
            HEAD_PAD=triton_tiles.pad(head_dim),
            BLOCK_SIZE=block_size,
            BLOCK_PAD=triton.next_power_of_2(block_size),
            num_warps=4,
        )
    return dq, dk, dv
