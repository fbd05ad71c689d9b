"""Selection branch: causal attention over the tokens of the selected key blocks (Triton backend).

    o[t,h] = softmax attention of q[t,h] over { s <= t : s // B in block_indices[t, h // R] }

Native Sparse Attention (arXiv:2502.11089), equations 11 and 12.

Reading 2 * B rows of k and v for every (token, block) pair is bound by the L2 cache. Neighbouring tokens choose nearly
the same blocks, so a tile of up to 32 tokens times the heads of a group walks the union of their blocks, each block
once; a bit per token says which rows take part. Forward pass and dq work this way. The union may be any size: a tile
whose tokens agree on nothing costs what its pairs cost one by one.
dk and dv turn the lists around, in triton_selection_dkv.py.
"""

import torch
from torch import Tensor

from . import triton_selection_dkv, triton_tiles, utils

try:
    import triton
    import triton.language as tl
except ImportError as error:
    raise ImportError("backend='triton' needs triton 3.6 or later: pip install 'triton>=3.6'") from error

_LOG2_E = tl.constexpr(1.4426950408889634)
_NO_BLOCK = tl.constexpr(0x7FFFFFFF)

# A tile's membership of a block is one int32.
_MAX_TILE_TOKENS = 32


@triton.jit
def _union_kernel(
    block_indices_ptr,
    sorted_ptr,
    union_ptr,
    members_ptr,
    counts_ptr,
    cu_seqlens_q_ptr,
    cu_seqlens_k_ptr,
    num_kv_heads,
    block_counts,
    TOKENS: tl.constexpr,
    TOKENS_PAD: tl.constexpr,
    COUNTS_PAD: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
):
    """The union of the blocks of TOKENS tokens, ascending. Grid: (most tiles of a sequence, num_kv_heads, batch).

    Writes, per tile and key/value head, the blocks (union), which tokens selected each (members, a bit per token), and
    two counts: blocks, and those of them that lie wholly before every token of the tile. The list of a tile starts
    where the tile's own pairs start: it cannot be longer than they are. Each token's blocks are sorted into
    sorted_ptr, like block_indices, and then merged: a step takes the smallest next block of all tokens.
    """
    tile, kv_head, sequence = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    start_q, _, num_queries, num_keys = triton_tiles.sequence_bounds(cu_seqlens_q_ptr, cu_seqlens_k_ptr, sequence)
    num_tokens = tl.minimum(num_queries - tile * TOKENS, TOKENS)
    if num_tokens > 0:
        first = num_keys - num_queries + tile * TOKENS
        token = (start_q + tile * TOKENS).to(tl.int64)
        offs_t = tl.arange(0, TOKENS_PAD)
        offs_n = tl.arange(0, COUNTS_PAD)
        rows = ((token + offs_t) * num_kv_heads + kv_head) * block_counts
        mask = (offs_t < num_tokens)[:, None] & (offs_n < block_counts)[None, :]
        # [TOKENS_PAD, COUNTS_PAD]
        block = tl.load(block_indices_ptr + rows[:, None] + offs_n[None, :], mask=mask, other=-1).to(tl.int32)
        own = (first + offs_t) // BLOCK_SIZE
        block = tl.sort(tl.where((block >= 0) & (block <= own[:, None]), block, _NO_BLOCK), 1)
        tl.store(sorted_ptr + rows[:, None] + offs_n[None, :], block, mask=mask)
        tl.debug_barrier()

        start = (token * num_kv_heads + kv_head * num_tokens) * block_counts
        count = 0
        num_past = 0
        place = tl.zeros([TOKENS_PAD], tl.int32)
        # [TOKENS_PAD]
        block = tl.load(sorted_ptr + rows, mask=offs_t < num_tokens, other=_NO_BLOCK)
        smallest = tl.min(block, 0)
        while smallest != _NO_BLOCK:
            selects = block == smallest
            tl.store(union_ptr + start + count, smallest)
            tl.store(members_ptr + start + count, tl.sum(selects.to(tl.int32) << offs_t, 0))
            count += 1
            num_past += ((smallest + 1) * BLOCK_SIZE <= first + 1).to(tl.int32)
            place += selects.to(tl.int32)
            following = tl.load(sorted_ptr + rows + place, mask=selects & (place < block_counts), other=_NO_BLOCK)
            block = tl.where(selects, following, block)
            smallest = tl.min(block, 0)
        # Sequences cannot overlap: tile i of the sequence that starts at row c is number c // TOKENS + sequence + i.
        slot = ((start_q // TOKENS + sequence + tile) * num_kv_heads + kv_head) * 2
        tl.store(counts_ptr + slot, count)
        tl.store(counts_ptr + slot + 1, num_past)


@triton.jit
def _attend_blocks(
    q,
    row_max,
    row_sum,
    acc,
    begin,
    end,
    position,
    mask_m,
    offs_t,
    k_base,
    v_base,
    union_base,
    members_base,
    num_keys,
    stride_kt,
    stride_vt,
    scale_log2,
    MASKED: tl.constexpr,
    KEYS: tl.constexpr,
    PARTS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HEAD_PAD: tl.constexpr,
):
    """Softmax state after the blocks begin:end of the union; MASKED unless every row may see all of them."""
    offs_d = tl.arange(0, HEAD_PAD)
    mask_d = offs_d < HEAD_DIM
    # Loaded a step early, the block is there when the loads that it addresses are issued ahead of their use.
    block = tl.load(union_base + begin, mask=begin < end, other=0)
    for step in range(begin * PARTS, end * PARTS):
        members = tl.load(members_base + step // PARTS)
        offs_n = step % PARTS * KEYS + tl.arange(0, KEYS)
        key = block * BLOCK_SIZE + offs_n
        offs_row = key.to(tl.int64)[:, None]
        mask_n = mask_d[None, :]
        if MASKED:
            mask_n = mask_n & ((offs_n < BLOCK_SIZE) & (key < num_keys))[:, None]
        # [KEYS, HEAD_PAD]
        k = tl.load(k_base + offs_row * stride_kt + offs_d[None, :], mask=mask_n, other=0.0)
        v = tl.load(v_base + offs_row * stride_vt + offs_d[None, :], mask=mask_n, other=0.0)
        score = tl.dot(q, tl.trans(k), input_precision="ieee")
        if MASKED:
            seen = (offs_n < BLOCK_SIZE)[None, :] & (key[None, :] <= position[:, None])
            score = tl.where(seen, score, float("-inf"))
        member = mask_m & (((members >> offs_t) & 1) != 0)
        row_max, row_sum, acc = triton_tiles.softmax_step(score, scale_log2, row_max, row_sum, acc, v, member)
        block = tl.load(union_base + (step + 1) // PARTS, mask=step + 1 < end * PARTS, other=0)
    return row_max, row_sum, acc


@triton.jit
def _selection_fwd_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    o_ptr,
    lse_ptr,
    union_ptr,
    members_ptr,
    counts_ptr,
    cu_seqlens_q_ptr,
    cu_seqlens_k_ptr,
    stride_qt,
    stride_qh,
    stride_kt,
    stride_kh,
    stride_vt,
    stride_vh,
    num_kv_heads,
    block_counts,
    softmax_scale,
    GROUP_SIZE: tl.constexpr,
    TOKENS: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    PARTS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HEAD_PAD: tl.constexpr,
):
    """o and lse of TOKENS tokens x the heads of a group. Grid: (most tiles of a sequence, num_kv_heads, batch).

    Walks the tile's union; neighbouring programs share a key/value head and most blocks, so k and v come from the L2
    cache. Blocks before all of the tile's tokens need no causal mask.
    """
    tile, kv_head, sequence = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    start_q, start_k, num_queries, num_keys = triton_tiles.sequence_bounds(cu_seqlens_q_ptr, cu_seqlens_k_ptr, sequence)
    num_tokens = tl.minimum(num_queries - tile * TOKENS, TOKENS)
    if num_tokens > 0:
        num_heads = num_kv_heads * GROUP_SIZE
        first = num_keys - num_queries + tile * TOKENS
        token = (start_q + tile * TOKENS).to(tl.int64)
        start = (token * num_kv_heads + kv_head * num_tokens) * block_counts
        slot = ((start_q // TOKENS + sequence + tile) * num_kv_heads + kv_head) * 2
        count = tl.load(counts_ptr + slot)
        num_past = tl.load(counts_ptr + slot + 1)
        k_base = k_ptr + start_k.to(tl.int64) * stride_kt + kv_head * stride_kh
        v_base = v_ptr + start_k.to(tl.int64) * stride_vt + kv_head * stride_vh

        offs_m = tl.arange(0, ROWS)
        offs_d = tl.arange(0, HEAD_PAD)
        mask_m = offs_m < num_tokens * GROUP_SIZE
        mask_q = mask_m[:, None] & (offs_d < HEAD_DIM)[None, :]
        offs_t = tl.minimum(offs_m // GROUP_SIZE, TOKENS - 1)
        head = kv_head * GROUP_SIZE + offs_m % GROUP_SIZE
        offs_q = (token + offs_t) * stride_qt + head * stride_qh
        # [ROWS, HEAD_PAD]
        q = tl.load(q_ptr + offs_q[:, None] + offs_d[None, :], mask=mask_q, other=0.0)
        scale_log2 = softmax_scale * _LOG2_E
        row_max, row_sum, acc = triton_tiles.softmax_start(ROWS, HEAD_PAD)
        WHOLE: tl.constexpr = KEYS * PARTS == BLOCK_SIZE
        row_max, row_sum, acc = _attend_blocks(
            q, row_max, row_sum, acc, 0, num_past, first + offs_t, mask_m, offs_t,
            k_base, v_base, union_ptr + start, members_ptr + start, num_keys, stride_kt, stride_vt, scale_log2,
            MASKED=not WHOLE, KEYS=KEYS, PARTS=PARTS, BLOCK_SIZE=BLOCK_SIZE, HEAD_DIM=HEAD_DIM, HEAD_PAD=HEAD_PAD,
        )  # fmt: skip
        row_max, row_sum, acc = _attend_blocks(
            q, row_max, row_sum, acc, num_past, count, first + offs_t, mask_m, offs_t,
            k_base, v_base, union_ptr + start, members_ptr + start, num_keys, stride_kt, stride_vt, scale_log2,
            MASKED=True, KEYS=KEYS, PARTS=PARTS, BLOCK_SIZE=BLOCK_SIZE, HEAD_DIM=HEAD_DIM, HEAD_PAD=HEAD_PAD,
        )  # fmt: skip
        row_o = (token + offs_t) * num_heads + head
        o, lse = triton_tiles.softmax_result(row_max, row_sum, acc)
        tl.store(o_ptr + row_o[:, None] * HEAD_DIM + offs_d[None, :], o.to(o_ptr.dtype.element_ty), mask=mask_q)
        tl.store(lse_ptr + row_o, lse, mask=mask_m)


@triton.jit
def _dq_of_blocks(
    q,
    do,
    lse_log2,
    delta,
    dq,
    begin,
    end,
    position,
    mask_m,
    offs_t,
    k_base,
    v_base,
    union_base,
    members_base,
    num_keys,
    stride_kt,
    stride_vt,
    scale_log2,
    MASKED: tl.constexpr,
    KEYS: tl.constexpr,
    PARTS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HEAD_PAD: tl.constexpr,
):
    """dq / softmax_scale after the blocks begin:end of the union; MASKED as in `_attend_blocks`."""
    offs_d = tl.arange(0, HEAD_PAD)
    mask_d = offs_d < HEAD_DIM
    # Loaded a step early, the block is there when the loads that it addresses are issued ahead of their use.
    block = tl.load(union_base + begin, mask=begin < end, other=0)
    for step in range(begin * PARTS, end * PARTS):
        members = tl.load(members_base + step // PARTS)
        offs_n = step % PARTS * KEYS + tl.arange(0, KEYS)
        key = block * BLOCK_SIZE + offs_n
        offs_row = key.to(tl.int64)[:, None]
        mask_n = mask_d[None, :]
        if MASKED:
            mask_n = mask_n & ((offs_n < BLOCK_SIZE) & (key < num_keys))[:, None]
        # [KEYS, HEAD_PAD]
        k = tl.load(k_base + offs_row * stride_kt + offs_d[None, :], mask=mask_n, other=0.0)
        v = tl.load(v_base + offs_row * stride_vt + offs_d[None, :], mask=mask_n, other=0.0)
        member = mask_m & (((members >> offs_t) & 1) != 0)
        lse_of_members = tl.where(member, lse_log2, float("inf"))
        seen = (offs_n < BLOCK_SIZE)[None, :] & (key[None, :] <= position[:, None])
        dq = triton_tiles.dq_step(q, k, v, do, lse_of_members, delta, dq, scale_log2, seen, MASKED)
        block = tl.load(union_base + (step + 1) // PARTS, mask=step + 1 < end * PARTS, other=0)
    return dq


@triton.jit
def _selection_bwd_dq_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    do_ptr,
    lse_ptr,
    delta_ptr,
    dq_ptr,
    union_ptr,
    members_ptr,
    counts_ptr,
    cu_seqlens_q_ptr,
    cu_seqlens_k_ptr,
    stride_qt,
    stride_qh,
    stride_kt,
    stride_kh,
    stride_vt,
    stride_vh,
    stride_dot,
    stride_doh,
    num_kv_heads,
    block_counts,
    softmax_scale,
    GROUP_SIZE: tl.constexpr,
    TOKENS: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    PARTS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HEAD_PAD: tl.constexpr,
):
    """dq of TOKENS tokens x the heads of a group. Grid and walk: those of the forward kernel."""
    tile, kv_head, sequence = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    start_q, start_k, num_queries, num_keys = triton_tiles.sequence_bounds(cu_seqlens_q_ptr, cu_seqlens_k_ptr, sequence)
    num_tokens = tl.minimum(num_queries - tile * TOKENS, TOKENS)
    if num_tokens > 0:
        num_heads = num_kv_heads * GROUP_SIZE
        first = num_keys - num_queries + tile * TOKENS
        token = (start_q + tile * TOKENS).to(tl.int64)
        start = (token * num_kv_heads + kv_head * num_tokens) * block_counts
        slot = ((start_q // TOKENS + sequence + tile) * num_kv_heads + kv_head) * 2
        count = tl.load(counts_ptr + slot)
        num_past = tl.load(counts_ptr + slot + 1)
        k_base = k_ptr + start_k.to(tl.int64) * stride_kt + kv_head * stride_kh
        v_base = v_ptr + start_k.to(tl.int64) * stride_vt + kv_head * stride_vh
        scale_log2 = softmax_scale * _LOG2_E

        offs_m = tl.arange(0, ROWS)
        offs_d = tl.arange(0, HEAD_PAD)
        mask_m = offs_m < num_tokens * GROUP_SIZE
        mask_q = mask_m[:, None] & (offs_d < HEAD_DIM)[None, :]
        offs_t = tl.minimum(offs_m // GROUP_SIZE, TOKENS - 1)
        head = kv_head * GROUP_SIZE + offs_m % GROUP_SIZE
        offs_q = (token + offs_t) * stride_qt + head * stride_qh
        offs_do = (token + offs_t) * stride_dot + head * stride_doh
        row_o = (token + offs_t) * num_heads + head
        # [ROWS, HEAD_PAD]
        q = tl.load(q_ptr + offs_q[:, None] + offs_d[None, :], mask=mask_q, other=0.0)
        do = tl.load(do_ptr + offs_do[:, None] + offs_d[None, :], mask=mask_q, other=0.0)
        lse_log2 = tl.load(lse_ptr + row_o, mask=mask_m, other=float("inf")) * _LOG2_E
        delta = tl.load(delta_ptr + row_o, mask=mask_m, other=0.0)
        dq = tl.zeros([ROWS, HEAD_PAD], tl.float32)
        WHOLE: tl.constexpr = KEYS * PARTS == BLOCK_SIZE
        dq = _dq_of_blocks(
            q, do, lse_log2, delta, dq, 0, num_past, first + offs_t, mask_m, offs_t,
            k_base, v_base, union_ptr + start, members_ptr + start, num_keys, stride_kt, stride_vt, scale_log2,
            MASKED=not WHOLE, KEYS=KEYS, PARTS=PARTS, BLOCK_SIZE=BLOCK_SIZE, HEAD_DIM=HEAD_DIM, HEAD_PAD=HEAD_PAD,
        )  # fmt: skip
        dq = _dq_of_blocks(
            q, do, lse_log2, delta, dq, num_past, count, first + offs_t, mask_m, offs_t,
            k_base, v_base, union_ptr + start, members_ptr + start, num_keys, stride_kt, stride_vt, scale_log2,
            MASKED=True, KEYS=KEYS, PARTS=PARTS, BLOCK_SIZE=BLOCK_SIZE, HEAD_DIM=HEAD_DIM, HEAD_PAD=HEAD_PAD,
        )  # fmt: skip
        dq *= softmax_scale
        tl.store(dq_ptr + row_o[:, None] * HEAD_DIM + offs_d[None, :], dq.to(dq_ptr.dtype.element_ty), mask=mask_q)


def union_config(tokens: int, block_counts: int) -> dict:
    """Constexprs and launch options of the kernel that lists the blocks of a tile of tokens."""
    tokens_pad, counts_pad = triton.next_power_of_2(tokens), triton.next_power_of_2(block_counts)
    return {
        "TOKENS": tokens,
        "TOKENS_PAD": tokens_pad,
        "COUNTS_PAD": counts_pad,
        "num_warps": max(1, min(16, tokens_pad * counts_pad // 1024)),
    }


def walk_config(q: Tensor, group_size: int, block_size: int) -> dict:
    """Constexprs and launch options of the forward kernel and of the dq kernel."""
    config = triton_tiles.walk_extents(q)
    tokens = max(1, min(_MAX_TILE_TOKENS, config["ROWS"] // group_size))
    rows, keys = triton_tiles.pad(tokens * group_size), min(config["KEYS"], triton_tiles.pad(block_size))
    return {
        **config,
        "GROUP_SIZE": group_size,
        "TOKENS": tokens,
        "ROWS": rows,
        "KEYS": keys,
        "PARTS": triton.cdiv(block_size, keys),
        "num_warps": max(4, config["num_warps"] * rows // config["ROWS"]),
    }


def _unions(block_indices: Tensor, lengths: utils.SequenceLengths, block_size: int, config: dict) -> dict:
    """The lists of `_union_kernel`, as arguments of the kernels that walk them."""
    total_q, num_kv_heads, block_counts = block_indices.shape
    batch = len(lengths.offsets_q) - 1
    shapes = union_config(config["TOKENS"], block_counts)
    union = torch.empty(block_indices.numel(), dtype=torch.int32, device=block_indices.device)
    members = torch.empty_like(union)
    counts = union.new_empty(total_q // shapes["TOKENS"] + batch, num_kv_heads, 2)
    num_tiles = triton.cdiv(triton_tiles.longest(lengths.offsets_q), shapes["TOKENS"])
    lists = {
        "union_ptr": union,
        "members_ptr": members,
        "counts_ptr": counts,
        "cu_seqlens_q_ptr": lengths.cu_seqlens_q,
        "cu_seqlens_k_ptr": lengths.cu_seqlens_k,
        "num_kv_heads": num_kv_heads,
        "block_counts": block_counts,
        "BLOCK_SIZE": block_size,
    }
    _union_kernel[(num_tiles, num_kv_heads, batch)](
        block_indices_ptr=block_indices, sorted_ptr=torch.empty_like(union), **lists, **shapes
    )
    return lists


def selection_fwd(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    block_indices: Tensor,
    lengths: utils.SequenceLengths,
    block_size: int,
    softmax_scale: float,
) -> tuple[Tensor, Tensor]:
    """Causal attention of every query over the tokens of its selected key blocks.

    Args:
        q: (total_q, num_heads, head_dim), fp16, bf16 or fp32.
        k, v: (total_k, num_kv_heads, head_dim), like q.
        block_indices: (total_q, num_kv_heads, block_counts), int32 or int64, distinct within a token, in any order.
            Negative ones and blocks that start after the token are ignored.
    Returns:
        o: like q, contiguous; 0 for a token without blocks.
        lse: (total_q, num_heads), fp32, natural log; -inf for a token without blocks.
    """
    q, k, v = (triton_tiles.addressable(x) for x in (q, k, v))
    q, softmax_scale = triton_tiles.positive_scale(q, softmax_scale)
    o = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    lse = torch.empty(q.shape[:2], dtype=torch.float32, device=q.device)
    if q.shape[0] == 0:
        return o, lse
    config = walk_config(q, q.shape[1] // k.shape[1], block_size)
    lists = _unions(block_indices.contiguous(), lengths, block_size, config)
    num_tiles = triton.cdiv(triton_tiles.longest(lengths.offsets_q), config["TOKENS"])
    _selection_fwd_kernel[(num_tiles, k.shape[1], len(lengths.offsets_q) - 1)](
        q_ptr=q,
        k_ptr=k,
        v_ptr=v,
        o_ptr=o,
        lse_ptr=lse,
        softmax_scale=softmax_scale,
        **triton_tiles.strides(q=q, k=k, v=v),
        **lists,
        **config,
    )
    return o, lse


def selection_bwd(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    block_indices: Tensor,
    lse: Tensor,
    do: Tensor,
    delta: Tensor,
    lengths: utils.SequenceLengths,
    block_size: int,
    softmax_scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of the selection branch; the same inputs give the same bits.

    Args:
        lse, delta: (total_q, num_heads), fp32; delta is the sum of o * do over head_dim.
        do: like q.
    Returns:
        dq: like q, contiguous; dk, dv: (total_k, num_kv_heads, head_dim), fp32.
    """
    q, k, v, do = (triton_tiles.addressable(x) for x in (q, k, v, do))
    block_indices, lse, delta = (x.contiguous() for x in (block_indices, lse, delta))
    total_q, num_heads, _ = q.shape
    num_kv_heads = k.shape[1]
    dq = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    dk, dv = (torch.empty(k.shape, dtype=torch.float32, device=k.device) for _ in range(2))
    if total_q == 0:
        return dq, dk.zero_(), dv.zero_()
    shared = {
        "q_ptr": q,
        "k_ptr": k,
        "v_ptr": v,
        "do_ptr": do,
        "lse_ptr": lse,
        "delta_ptr": delta,
        "softmax_scale": softmax_scale,
        **triton_tiles.strides(q=q, k=k, v=v, do=do),
    }
    config = walk_config(q, num_heads // num_kv_heads, block_size)
    num_tiles = triton.cdiv(triton_tiles.longest(lengths.offsets_q), config["TOKENS"])
    _selection_bwd_dq_kernel[(num_tiles, num_kv_heads, len(lengths.offsets_q) - 1)](
        dq_ptr=dq, **shared, **_unions(block_indices, lengths, block_size, config), **config
    )
    triton_selection_dkv.write_dkv(dk, dv, block_indices, lengths, block_size, shared)
    return dq, dk, dv
