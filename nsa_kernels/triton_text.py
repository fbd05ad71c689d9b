"""Dense causal attention of few query rows over many keys: a prompt's text rows (Triton backend).

    o[t,h] = softmax attention of q[t,h] over keys 0 .. position(t), with key/value head h // group_size

A question of 100 tokens after a video of 128K is 100 rows over 128K keys. A kernel with one program per tile of queries
has too few of them to fill a GPU, and one that takes heads apart reads every key group_size times. Here the heads of a
group lie packed in the rows of one tile, and the keys are split between programs, whose partial outputs are merged by
their lse (the split of FlashAttention's decoding, https://crfm.stanford.edu/2023/10/12/flashdecoding.html).

Rows may lie anywhere: with `positions`, all text rows of a sample, between its images too, are one call. Where torch's
own kernel is as good, `torch_is_as_good` says so; docs/kernel_model.md has the arithmetic. Ahead-of-time compilation:
docs/aot.md.
"""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import triton_tiles, utils

try:
    import triton
    import triton.language as tl
except ImportError as error:
    raise ImportError("text_rows_attention needs triton 3.6 or later: pip install 'triton>=3.6'") from error

_LOG2_E = tl.constexpr(1.4426950408889634)
_LN_2 = tl.constexpr(0.6931471805599453)

# A program that walks fewer keys than this spends more on its partial output than on its keys.
_MIN_KEYS_PER_SPLIT = 512
# Most waves of programs that a split may make of one, to fill the last of them.
_MAX_WAVES = 8
# Programs to aim for without a GPU to ask, in the interpreter: tiny inputs get split as well.
_PROGRAMS_INTERPRETED, _MIN_KEYS_PER_SPLIT_INTERPRETED = 16, 32


@triton.jit
def _row_positions(positions_ptr, rows, num_rows, num_keys, HAS_POSITIONS: tl.constexpr):
    """The last key that each row sees; -1 past the last row."""
    if HAS_POSITIONS:
        position = tl.load(positions_ptr + rows, mask=rows < num_rows, other=-1).to(tl.int32)
    else:
        position = tl.where(rows < num_rows, num_keys - num_rows + rows, -1)
    return position


@triton.jit
def _load_keys(ptr, offs_n, stride_t, num_keys, HEAD_DIM: tl.constexpr, HEAD_PAD: tl.constexpr, MASKED: tl.constexpr):
    """[BLOCK_N, HEAD_PAD], zero outside; MASKED where the block may reach past the last key."""
    offs_d = tl.arange(0, HEAD_PAD)
    ptrs = ptr + offs_n.to(tl.int64)[:, None] * stride_t + offs_d[None, :]
    if MASKED:
        x = tl.load(ptrs, mask=(offs_n < num_keys)[:, None] & (offs_d < HEAD_DIM)[None, :], other=0.0)
    elif HEAD_DIM < HEAD_PAD:
        x = tl.load(ptrs, mask=(offs_d < HEAD_DIM)[None, :], other=0.0)
    else:
        x = tl.load(ptrs)
    return x


@triton.jit
def _attend_keys(
    row_max,
    row_sum,
    acc,
    q,
    k_ptr,
    v_ptr,
    position,
    mask_m,
    start,
    stop,
    num_keys,
    stride_kt,
    stride_vt,
    scale_log2,
    HEAD_DIM: tl.constexpr,
    HEAD_PAD: tl.constexpr,
    BLOCK_N: tl.constexpr,
    MASKED: tl.constexpr,
):
    """Online softmax over keys start .. stop; without MASKED, every row sees all of them."""
    for block in range(start, stop, BLOCK_N):
        offs_n = block + tl.arange(0, BLOCK_N)
        k = _load_keys(k_ptr, offs_n, stride_kt, num_keys, HEAD_DIM, HEAD_PAD, MASKED)
        v = _load_keys(v_ptr, offs_n, stride_vt, num_keys, HEAD_DIM, HEAD_PAD, MASKED)
        score = tl.dot(q, tl.trans(k), input_precision="ieee")
        if MASKED:
            seen = (offs_n[None, :] <= position[:, None]) & (offs_n < stop)[None, :]
            score = tl.where(seen, score, float("-inf"))
        row_max, row_sum, acc = triton_tiles.softmax_step(score, scale_log2, row_max, row_sum, acc, v, mask_m)
    return row_max, row_sum, acc


@triton.jit(do_not_specialize=["num_rows", "num_keys"])
def _text_fwd_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    o_ptr,
    lse_ptr,
    positions_ptr,
    stride_qt,
    stride_qh,
    stride_kt,
    stride_kh,
    stride_vt,
    stride_vh,
    num_rows,
    num_keys,
    num_kv_heads,
    softmax_scale,
    GROUP_SIZE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HEAD_PAD: tl.constexpr,
    TILE_ROWS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    HAS_POSITIONS: tl.constexpr,
):
    """o and lse of one tile over one share of its keys. Grid: (tiles, splits, num_kv_heads).

    Row r of a kv head is query row r // GROUP_SIZE, head r % GROUP_SIZE of the group. Tiles run fastest, so that
    programs side by side walk the same keys. o and lse are (splits, num_rows, num_heads, ..).
    """
    tile, split, kv_head = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    num_splits = tl.num_programs(1)
    num_heads = num_kv_heads * GROUP_SIZE
    offs_r = tile * TILE_ROWS + tl.arange(0, TILE_ROWS)
    offs_d = tl.arange(0, HEAD_PAD)
    row = offs_r // GROUP_SIZE
    head = kv_head * GROUP_SIZE + offs_r % GROUP_SIZE
    mask_m = row < num_rows
    mask_q = mask_m[:, None] & (offs_d < HEAD_DIM)[None, :]
    # [TILE_ROWS, HEAD_PAD]
    offs_q = row.to(tl.int64) * stride_qt + head * stride_qh
    q = tl.load(q_ptr + offs_q[:, None] + offs_d[None, :], mask=mask_q, other=0.0)

    position = _row_positions(positions_ptr, row, num_rows, num_keys, HAS_POSITIONS)
    num_seen = tl.max(position, 0) + 1
    seen_by_all = tl.min(tl.where(mask_m, position, num_keys), 0) + 1
    share = tl.cdiv(tl.cdiv(num_seen, num_splits), BLOCK_N) * BLOCK_N
    start = split * share
    stop = tl.minimum(start + share, num_seen)
    # Keys of this share that no row of the tile has to mask, in whole blocks.
    unmasked = tl.maximum(tl.minimum(stop, seen_by_all) - start, 0) // BLOCK_N * BLOCK_N + start

    k_base = k_ptr + kv_head * stride_kh
    v_base = v_ptr + kv_head * stride_vh
    scale_log2 = softmax_scale * _LOG2_E
    row_max, row_sum, acc = triton_tiles.softmax_start(TILE_ROWS, HEAD_PAD)
    row_max, row_sum, acc = _attend_keys(
        row_max, row_sum, acc, q, k_base, v_base, position, mask_m, start, unmasked, num_keys,
        stride_kt, stride_vt, scale_log2, HEAD_DIM, HEAD_PAD, BLOCK_N, False,
    )  # fmt: skip
    row_max, row_sum, acc = _attend_keys(
        row_max, row_sum, acc, q, k_base, v_base, position, mask_m, unmasked, stop, num_keys,
        stride_kt, stride_vt, scale_log2, HEAD_DIM, HEAD_PAD, BLOCK_N, True,
    )  # fmt: skip

    o, lse = triton_tiles.softmax_result(row_max, row_sum, acc)
    offs_o = (split * num_rows + row).to(tl.int64) * num_heads + head
    tl.store(o_ptr + offs_o[:, None] * HEAD_DIM + offs_d[None, :], o.to(o_ptr.dtype.element_ty), mask=mask_q)
    tl.store(lse_ptr + offs_o, lse, mask=mask_m)


@triton.jit(do_not_specialize=["num_outputs", "num_splits"])
def _text_merge_kernel(
    o_part_ptr,
    lse_part_ptr,
    o_ptr,
    lse_ptr,
    num_outputs,
    num_splits,
    HEAD_DIM: tl.constexpr,
    HEAD_PAD: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Weighted mean of the partial outputs. Grid: (num_outputs / ROWS,), outputs being rows x heads."""
    offs_m = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    offs_d = tl.arange(0, HEAD_PAD)
    mask_m = offs_m < num_outputs
    mask = mask_m[:, None] & (offs_d < HEAD_DIM)[None, :]
    # The first share of keys is never empty: the maximum is finite.
    lse_max = tl.full([ROWS], float("-inf"), tl.float32)
    offs = offs_m
    for _ in range(num_splits):
        lse_max = tl.maximum(lse_max, tl.load(lse_part_ptr + offs, mask=mask_m, other=0.0))
        offs += num_outputs
    total = tl.zeros([ROWS], tl.float32)
    acc = tl.zeros([ROWS, HEAD_PAD], tl.float32)
    offs = offs_m
    for _ in range(num_splits):
        weight = tl.exp2((tl.load(lse_part_ptr + offs, mask=mask_m, other=0.0) - lse_max) * _LOG2_E)
        # [ROWS, HEAD_PAD]
        part = tl.load(o_part_ptr + offs[:, None] * HEAD_DIM + offs_d[None, :], mask=mask, other=0.0)
        total += weight
        acc += part * weight[:, None]
        offs += num_outputs
    o = (acc / total[:, None]).to(o_ptr.dtype.element_ty)
    tl.store(o_ptr + offs_m[:, None] * HEAD_DIM + offs_d[None, :], o, mask=mask)
    tl.store(lse_ptr + offs_m, lse_max + tl.log2(total) * _LN_2, mask=mask_m)


@triton.jit(do_not_specialize=["num_rows", "num_keys"])
def _text_bwd_dq_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    do_ptr,
    lse_ptr,
    delta_ptr,
    dq_ptr,
    positions_ptr,
    stride_qt,
    stride_qh,
    stride_kt,
    stride_kh,
    stride_vt,
    stride_vh,
    stride_dot,
    stride_doh,
    num_rows,
    num_keys,
    num_kv_heads,
    softmax_scale,
    GROUP_SIZE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HEAD_PAD: tl.constexpr,
    TILE_ROWS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    HAS_POSITIONS: tl.constexpr,
):
    """dq of one tile over one share of its keys. Grid and rows as in the forward kernel."""
    tile, split, kv_head = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    num_heads = num_kv_heads * GROUP_SIZE
    offs_r = tile * TILE_ROWS + tl.arange(0, TILE_ROWS)
    offs_d = tl.arange(0, HEAD_PAD)
    row = offs_r // GROUP_SIZE
    head = kv_head * GROUP_SIZE + offs_r % GROUP_SIZE
    mask_m = row < num_rows
    mask_q = mask_m[:, None] & (offs_d < HEAD_DIM)[None, :]
    # [TILE_ROWS, HEAD_PAD]
    offs_q = row.to(tl.int64) * stride_qt + head * stride_qh
    q = tl.load(q_ptr + offs_q[:, None] + offs_d[None, :], mask=mask_q, other=0.0)
    offs_do = row.to(tl.int64) * stride_dot + head * stride_doh
    do = tl.load(do_ptr + offs_do[:, None] + offs_d[None, :], mask=mask_q, other=0.0)
    offs_h = row.to(tl.int64) * num_heads + head
    lse_log2 = tl.load(lse_ptr + offs_h, mask=mask_m, other=0.0) * _LOG2_E
    delta = tl.load(delta_ptr + offs_h, mask=mask_m, other=0.0)

    position = _row_positions(positions_ptr, row, num_rows, num_keys, HAS_POSITIONS)
    num_seen = tl.max(position, 0) + 1
    share = tl.cdiv(tl.cdiv(num_seen, tl.num_programs(1)), BLOCK_N) * BLOCK_N
    start = split * share
    stop = tl.minimum(start + share, num_seen)
    k_base = k_ptr + kv_head * stride_kh
    v_base = v_ptr + kv_head * stride_vh
    scale_log2 = softmax_scale * _LOG2_E
    dq = tl.zeros([TILE_ROWS, HEAD_PAD], tl.float32)
    for block in range(start, stop, BLOCK_N):
        offs_n = block + tl.arange(0, BLOCK_N)
        k = _load_keys(k_base, offs_n, stride_kt, num_keys, HEAD_DIM, HEAD_PAD, True)
        v = _load_keys(v_base, offs_n, stride_vt, num_keys, HEAD_DIM, HEAD_PAD, True)
        # Shares are whole blocks, so the next share's keys begin after this loop's last block.
        seen = offs_n[None, :] <= position[:, None]
        dq = triton_tiles.dq_step(q, k, v, do, lse_log2, delta, dq, scale_log2, seen, MASKED=True)
    offs_dq = (split * num_rows + row).to(tl.int64) * num_heads + head
    dq = (dq * softmax_scale).to(dq_ptr.dtype.element_ty)
    tl.store(dq_ptr + offs_dq[:, None] * HEAD_DIM + offs_d[None, :], dq, mask=mask_q)


@triton.jit(do_not_specialize=["num_rows", "num_keys"])
def _text_bwd_dkv_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    do_ptr,
    lse_ptr,
    delta_ptr,
    dk_ptr,
    dv_ptr,
    positions_ptr,
    stride_qt,
    stride_qh,
    stride_kt,
    stride_kh,
    stride_vt,
    stride_vh,
    stride_dot,
    stride_doh,
    num_rows,
    num_keys,
    num_kv_heads,
    softmax_scale,
    GROUP_SIZE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HEAD_PAD: tl.constexpr,
    TILE_ROWS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    HAS_POSITIONS: tl.constexpr,
):
    """dk and dv of BLOCK_N keys over all rows that see them. Grid: (num_keys / BLOCK_N, num_kv_heads)."""
    block, kv_head = tl.program_id(0) * BLOCK_N, tl.program_id(1)
    num_heads = num_kv_heads * GROUP_SIZE
    offs_n = block + tl.arange(0, BLOCK_N)
    offs_d = tl.arange(0, HEAD_PAD)
    mask_d = offs_d < HEAD_DIM
    k = _load_keys(k_ptr + kv_head * stride_kh, offs_n, stride_kt, num_keys, HEAD_DIM, HEAD_PAD, True)
    v = _load_keys(v_ptr + kv_head * stride_vh, offs_n, stride_vt, num_keys, HEAD_DIM, HEAD_PAD, True)
    # Rows are ordered by position: the blind ones come first.
    if HAS_POSITIONS:
        num_blind = 0
        for start in range(0, num_rows, 128):
            rows = start + tl.arange(0, 128)
            position = tl.load(positions_ptr + rows, mask=rows < num_rows, other=2147483647)
            num_blind += tl.sum((position < block).to(tl.int32), 0)
    else:
        num_blind = tl.maximum(block - (num_keys - num_rows), 0)
    first = num_blind * GROUP_SIZE // TILE_ROWS * TILE_ROWS
    scale_log2 = softmax_scale * _LOG2_E
    dk = tl.zeros([BLOCK_N, HEAD_PAD], tl.float32)
    dv = tl.zeros([BLOCK_N, HEAD_PAD], tl.float32)
    for start in range(first, num_rows * GROUP_SIZE, TILE_ROWS):
        offs_r = start + tl.arange(0, TILE_ROWS)
        row = offs_r // GROUP_SIZE
        head = kv_head * GROUP_SIZE + offs_r % GROUP_SIZE
        mask_m = row < num_rows
        mask_q = mask_m[:, None] & mask_d[None, :]
        # [TILE_ROWS, HEAD_PAD]
        offs_q = row.to(tl.int64) * stride_qt + head * stride_qh
        q = tl.load(q_ptr + offs_q[:, None] + offs_d[None, :], mask=mask_q, other=0.0)
        offs_do = row.to(tl.int64) * stride_dot + head * stride_doh
        do = tl.load(do_ptr + offs_do[:, None] + offs_d[None, :], mask=mask_q, other=0.0)
        offs_h = row.to(tl.int64) * num_heads + head
        lse_log2 = tl.load(lse_ptr + offs_h, mask=mask_m, other=0.0) * _LOG2_E
        delta = tl.load(delta_ptr + offs_h, mask=mask_m, other=0.0)
        position = _row_positions(positions_ptr, row, num_rows, num_keys, HAS_POSITIONS)
        # [BLOCK_N, TILE_ROWS]
        seen = offs_n[:, None] <= position[None, :]
        dk, dv = triton_tiles.dkv_step(q, k, v, do, lse_log2, delta, dk, dv, scale_log2, seen)
    mask = (offs_n < num_keys)[:, None] & mask_d[None, :]
    offs = (offs_n.to(tl.int64) * num_kv_heads + kv_head)[:, None] * HEAD_DIM + offs_d[None, :]
    tl.store(dk_ptr + offs, (dk * softmax_scale).to(dk_ptr.dtype.element_ty), mask=mask)
    tl.store(dv_ptr + offs, dv.to(dv_ptr.dtype.element_ty), mask=mask)


def forward_config(q: Tensor, num_rows: int, group_size: int) -> dict:
    """Constexprs and launch options of the forward kernel: tiles as small as the rows, up to 128."""
    wide, head_dim = triton_tiles.is_wide(q.dtype), q.shape[2]
    rows = max(16, min(16 if wide else 128, triton.next_power_of_2(num_rows * group_size)))
    return {
        "GROUP_SIZE": group_size,
        "HEAD_DIM": head_dim,
        "HEAD_PAD": triton_tiles.pad(head_dim),
        "TILE_ROWS": rows,
        "BLOCK_N": 16 if wide else 64,
        "num_warps": 8 if rows == 128 or wide else 4,
        "num_stages": 1 if wide else 3,
    }


def backward_config(q: Tensor, group_size: int) -> tuple[dict, dict]:
    """Constexprs and launch options of the dq kernel and of the dk, dv kernel.

    Hopper's MMA gives 16 rows to a warp: 64 keys, the rows of the latter's products, take four warps and no more.
    """
    wide, small, head_dim = triton_tiles.is_wide(q.dtype), triton_tiles.is_small(q.device), q.shape[2]
    shared = {"GROUP_SIZE": group_size, "HEAD_DIM": head_dim, "HEAD_PAD": triton_tiles.pad(head_dim)}
    shared["num_stages"] = 1 if wide else 2
    dq = {**shared, "TILE_ROWS": 16 if wide else 128, "BLOCK_N": 32 if wide or small else 64, "num_warps": 8}
    dkv = {**shared, "TILE_ROWS": 16 if wide else 32, "BLOCK_N": 32 if wide else 64, "num_warps": 8 if wide else 4}
    return dq, dkv


def num_splits(num_tiles: int, num_keys: int, num_programs: int, min_keys: int = _MIN_KEYS_PER_SPLIT) -> int:
    """Into how many shares the keys of every tile are split.

    The fewest that leave at most an eighth of the last wave of programs idle, or come closest to it.

    Args:
        num_tiles: programs without a split: row tiles x key/value heads.
        num_programs: programs that run at once.
    """
    best, best_filled = 1, 0.0
    for splits in range(1, max(1, min(num_keys // min_keys, _MAX_WAVES * num_programs // num_tiles)) + 1):
        waves = num_tiles * splits / num_programs
        filled = waves / -(-num_tiles * splits // num_programs)
        if filled > best_filled + 1e-9:
            best, best_filled = splits, filled
        if filled >= 0.875:
            break
    return best


def torch_is_as_good(num_rows: int, num_keys: int) -> bool:
    """Whether torch's causal scaled_dot_product_attention does a run as fast as `text_rows_attention`.

    True for a run at the start of its sample, where rows and keys are the same tokens: there is nothing to split (the
    rows alone fill the GPU, or the whole call is a launch), and torch may take cuDNN's kernel. Every other run would
    need a mask there, which excludes its fast kernels, or FlashAttention 2 with the group's heads apart.
    """
    return num_rows == num_keys


def _splits(device: torch.device, num_tiles: int, num_keys: int, num_warps: int) -> int:
    if device.type != "cuda":
        return num_splits(num_tiles, num_keys, _PROGRAMS_INTERPRETED, _MIN_KEYS_PER_SPLIT_INTERPRETED)
    programs = torch.cuda.get_device_properties(device).multi_processor_count * (8 // num_warps)
    return num_splits(num_tiles, num_keys, programs)


def _arguments(q, k, v, positions, softmax_scale) -> dict:
    """The arguments that all kernels share."""
    return {
        "q_ptr": q,
        "k_ptr": k,
        "v_ptr": v,
        "positions_ptr": q if positions is None else positions,  # never read without positions
        **triton_tiles.strides(q=q, k=k, v=v),
        "num_rows": q.shape[0],
        "num_keys": k.shape[0],
        "num_kv_heads": k.shape[1],
        "softmax_scale": softmax_scale,
        "HAS_POSITIONS": positions is not None,
    }


def text_rows_fwd(
    q: Tensor, k: Tensor, v: Tensor, softmax_scale: float, positions: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """o like q, and lse (rows, num_heads), fp32, natural log; arguments as those of `text_rows_attention`."""
    (rows, heads, head_dim), (keys, kv_heads, _) = q.shape, k.shape
    q, softmax_scale = triton_tiles.positive_scale(q, softmax_scale)
    config = forward_config(q, rows, heads // kv_heads)
    tiles = triton.cdiv(rows * (heads // kv_heads), config["TILE_ROWS"])
    splits = _splits(q.device, tiles * kv_heads, keys, config["num_warps"])
    o = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    lse = torch.empty(rows, heads, dtype=torch.float32, device=q.device)
    is_split = splits > 1
    o_part = q.new_empty(splits, *q.shape, dtype=torch.float32) if is_split else o
    lse_part = lse.new_empty(splits, *lse.shape) if is_split else lse
    _text_fwd_kernel[(tiles, splits, kv_heads)](
        o_ptr=o_part, lse_ptr=lse_part, **_arguments(q, k, v, positions, softmax_scale), **config
    )
    if is_split:
        _text_merge_kernel[(triton.cdiv(rows * heads, 8),)](
            o_part_ptr=o_part,
            lse_part_ptr=lse_part,
            o_ptr=o,
            lse_ptr=lse,
            num_outputs=rows * heads,
            num_splits=splits,
            HEAD_DIM=head_dim,
            HEAD_PAD=config["HEAD_PAD"],
            ROWS=8,
            num_warps=4,
        )
    return o, lse


def text_rows_bwd(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    o: Tensor,
    lse: Tensor,
    do: Tensor,
    softmax_scale: float,
    positions: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """dq, dk, dv like q, k, v; do like q, contiguous in its last dimension. No atomics: repeated runs agree."""
    (rows, heads, _), (keys, kv_heads, _) = q.shape, k.shape
    config, dkv_config = backward_config(q, heads // kv_heads)
    dq = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    dk, dv = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (k, v))
    arguments = {
        **_arguments(q, k, v, positions, softmax_scale),
        "do_ptr": do,
        **triton_tiles.strides(do=do),
        "lse_ptr": lse,
        "delta_ptr": (o.float() * do.float()).sum(-1),
    }
    tiles = triton.cdiv(rows * (heads // kv_heads), config["TILE_ROWS"])
    splits = _splits(q.device, tiles * kv_heads, keys, config["num_warps"])
    dq_part = q.new_empty(splits, *q.shape, dtype=torch.float32) if splits > 1 else dq
    _text_bwd_dq_kernel[(tiles, splits, kv_heads)](dq_ptr=dq_part, **arguments, **config)
    if splits > 1:
        dq.copy_(dq_part.sum(0))
    _text_bwd_dkv_kernel[(triton.cdiv(keys, dkv_config["BLOCK_N"]), kv_heads)](
        dk_ptr=dk, dv_ptr=dv, **arguments, **dkv_config
    )
    return dq, dk, dv


class _TextRowsFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, softmax_scale, positions):
        o, lse = text_rows_fwd(q, k, v, softmax_scale, positions)
        ctx.save_for_backward(q, k, v, o, lse, positions)
        ctx.softmax_scale = softmax_scale
        return o

    @staticmethod
    @once_differentiable
    @utils.backward_without_autocast
    def backward(ctx, do):
        q, k, v, o, lse, positions = ctx.saved_tensors
        return *text_rows_bwd(q, k, v, o, lse, triton_tiles.addressable(do), ctx.softmax_scale, positions), None, None


@torch.compiler.disable
def text_rows_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    softmax_scale: float | None = None,
    positions: Tensor | None = None,
) -> Tensor:
    """Dense causal attention of some rows of a sample over its keys; differentiable in q, k and v.

    Args:
        q: (rows, num_heads, head_dim), fp16, bf16 or fp32: without `positions` the sample's last tokens.
        k, v: (keys, num_kv_heads, head_dim), like q; query head h reads key/value head h // group_size.
        softmax_scale: defaults to head_dim**-0.5.
        positions: (rows,), int32 or int64, ascending, each at least 0 and less than `keys`: row i sees keys
            0 .. positions[i]. Not checked: reading them would wait for the device.
    Returns:
        o: like q.
    Raises:
        ValueError: an argument has a wrong shape or dtype, or there are more rows than keys.
    """
    lengths = utils.SequenceLengths.from_lengths([q.shape[0]], [k.shape[0]])
    utils.check_qkv(q, k, v, lengths)
    triton_tiles.check_supported(q)
    if positions is not None:
        if positions.shape != q.shape[:1] or positions.dtype not in (torch.int32, torch.int64):
            raise ValueError(
                f"positions must be int32 or int64 of shape (rows,) = ({q.shape[0]},), "
                f"got {positions.dtype} {tuple(positions.shape)}"
            )
        if positions.device != q.device:
            raise ValueError(f"positions must be on {q.device}, like q, got {positions.device}")
        positions = positions.contiguous()
    softmax_scale = utils.resolve_scale(softmax_scale, q.shape[2])
    if not q.shape[0]:
        return torch.empty_like(q)
    q, k, v = map(triton_tiles.addressable, (q, k, v))
    with utils.no_autocast(q.device), triton_tiles.current_device(q):
        return _TextRowsFunction.apply(q, k, v, softmax_scale, positions)
