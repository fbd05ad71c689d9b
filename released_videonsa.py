"""The attention of the code that was published with the VideoNSA weights: `nsa_variant="released"`.

The published code computes something else than the paper, and its weights were trained with code like it. To run those
weights, this file reproduces its inference on prompts that mix text and vision, number for number (in float32; half
precision is widened, and rounded less often than there). Every oddity of that code is here, and nowhere else:

1. A token is a vision token iff its temporal, height and width positions are not all equal (`vision_mask_of`), so the
   first token of each image and video, and others on the diagonal of their grid, count as text.
2. Rows are not routed; two attentions over all tokens are added: NSA with text queries, keys and values set to zero,
   and dense attention with vision queries set to zero. So text tokens stay in every NSA softmax as zero keys, a text
   row also gets NSA of a zero query, and a vision row the running mean of v, which is what a zero query attends to.
3. The gate logits of text rows are zero: each of their gates is one half.
4. The published kernels want groups of at least 16 query heads, so the 28 heads are laid out twice and filled up with 8
   zero heads to 64 "padded" heads: padded head p reads key/value head p // 16, and the two copies are averaged.
5. Compression sees the block of the token, its future included, and all *later* blocks.
6. Blocks are ranked by weights, those of zero heads included, whose normaliser is read from a buffer with its axes
   confused (`_importance`); a token's own block is not guaranteed; ties go as the published kernel's bitonic network
   has them (`_bitonic_top_blocks`).

Selection and window are those of the paper on the zeroed keys and values, and run through the branches of
`nsa_kernels/`. The zero heads have no output, and are nowhere but in the normalisers and in the ranking.
Positions are cut to integers too: see `mrope_position_ids`.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

try:
    from .kernels_videonsa import kernel_module
    from .routing_videonsa import check_sparse_call, first_columns, is_2d, refuse_export
except ImportError:  # `import modeling_videonsa` from a checkout, without a package
    if __package__:
        raise
    from kernels_videonsa import kernel_module
    from routing_videonsa import check_sparse_call, first_columns, is_2d, refuse_export

operators, utils = kernel_module("operators"), kernel_module("utils")
dense, selection, sliding_window = map(kernel_module, ("dense", "selection", "sliding_window"))

NUM_HEADS, NUM_KV_HEADS = 28, 4
_PADDED_HEADS = 64
_GROUP = _PADDED_HEADS // NUM_KV_HEADS
_COPIED_HEADS = 2 * NUM_HEADS  # padded heads from here on are zero


def check_settings(num_heads: int, num_kv_heads: int, block_size: int, block_counts: int) -> None:
    """Raise ValueError unless the published code supports these: a head layout and two sizes are built into it."""
    if (num_heads, num_kv_heads) != (NUM_HEADS, NUM_KV_HEADS):
        raise ValueError(
            f"num_heads and num_kv_heads must be {NUM_HEADS} and {NUM_KV_HEADS} in the released variant, "
            f"got {num_heads} and {num_kv_heads}"
        )
    utils.check_positive(block_size=block_size, block_counts=block_counts)
    if block_size & (block_size - 1):
        raise ValueError(f"block_size must be a power of two in the released variant, got {block_size}")
    # The sorting network is block_size wide and carries its better half from one run of blocks to the next.
    if 2 * block_counts > block_size:
        raise ValueError(
            f"block_counts must be at most block_size / 2 = {block_size // 2} in the released variant, "
            f"got {block_counts}"
        )


def vision_mask_of(position_ids: Tensor) -> Tensor:
    """The released variant's vision tokens: those whose M-RoPE positions differ.

    Args:
        position_ids: (3, batch, seq_len), temporal, height and width; or (4, ...), with text positions before them.
    Returns:
        (batch, seq_len), bool.
    """
    temporal, height, width = position_ids[-3:]
    return (temporal != height) | (temporal != width)


@dataclass(frozen=True)
class TokenLayout:
    """Where the text of one sample is, known on the host: what `released_attention` would have to wait for.

    Attributes:
        vision_mask: (tokens,), bool.
        text_positions: (text_tokens,), int64, ascending, on the same device.
        lengths: of the sample, as one packed sequence.
    """

    vision_mask: Tensor
    text_positions: Tensor
    lengths: utils.SequenceLengths

    @classmethod
    def from_mask(cls, vision_mask: Tensor) -> "TokenLayout":
        """Waits for the device of vision_mask, unless that is the CPU."""
        lengths = utils.SequenceLengths.from_lengths([len(vision_mask)], device=vision_mask.device)
        return cls(vision_mask, (~vision_mask).nonzero().squeeze(-1), lengths)

    @property
    def has_vision(self) -> bool:
        return len(self.text_positions) < len(self.vision_mask)

    def to(self, device: torch.device, non_blocking: bool = False) -> "TokenLayout":
        """A copy on `device`."""
        lengths = utils.SequenceLengths.from_lengths([len(self.vision_mask)], device=device)
        mask, positions = (x.to(device, non_blocking=non_blocking) for x in (self.vision_mask, self.text_positions))
        return TokenLayout(mask, positions, lengths)


@dataclass
class ReleasedRouting:
    """The samples of one forward call; built once and handed to every layer.

    Attributes:
        samples: (sample, rows, layout): its index in the batch, a slice or an index tensor of its tokens without
            padding, and their layout.
        plan: (2, batch, q_len), bool, on the CPU: which tokens are vision tokens, and which take part. What compiled
            layers take (layer_videonsa.py).
    """

    samples: list[tuple[int, slice | Tensor, TokenLayout]]
    plan: Tensor

    @classmethod
    @torch.compiler.disable
    def build(cls, tokens: Tensor, attention_mask, kwargs: dict, config) -> "ReleasedRouting | None":
        """From the arguments of the text model's call; `None` where it has no vision tokens: it is Qwen2.5-VL's then.

        Args:
            tokens: the call's token ids or embeddings, (batch, q_len, ...).
            attention_mask: (batch, past + q_len) or `None`; text prompts may bring others.
            kwargs: `position_ids`, (3 or 4, batch or 1, q_len) where there are images or videos, and `past_key_values`.
        Raises:
            ValueError: vision tokens join a cache, a shape does not fit, or `check_sparse_call` raises.
        """
        position_ids, past_key_values = kwargs.get("position_ids"), kwargs.get("past_key_values")
        batch, length = tokens.shape[:2]
        if not may_hold_vision(tokens, kwargs):
            return None
        if position_ids.shape[1] not in (1, batch) or position_ids.shape[2] != length:
            raise ValueError(
                f"`position_ids` must have shape (3 or 4, {batch}, {length}), got {tuple(position_ids.shape)}"
            )
        position_ids = position_ids.expand(-1, batch, -1)
        past = 0 if past_key_values is None else int(past_key_values.get_seq_length())
        fits = attention_mask is None or (is_2d(attention_mask) and attention_mask.shape[1] >= past + length)
        if not fits and not vision_mask_of(position_ids).any():
            return None
        attention_mask = first_columns(attention_mask, past + length)
        plan = cls.plan_of(position_ids, attention_mask, past)
        if not (plan[0] & plan[1]).any():
            return None
        _check_nothing_cached(past)
        check_sparse_call(attention_mask, position_ids, past, kwargs, config)
        return cls.from_plan(plan, position_ids.device)

    @staticmethod
    def plan_of(position_ids: Tensor, attention_mask: Tensor | None, past: int = 0) -> Tensor:
        """The plan of new tokens at these positions, (3 or 4, batch, q_len), with a mask (batch, past + q_len)."""
        is_vision = vision_mask_of(position_ids)
        is_valid = torch.ones_like(is_vision) if attention_mask is None else attention_mask[:, past:].to(is_vision)
        if is_valid.shape != is_vision.shape:
            batch, length = is_vision.shape
            raise ValueError(
                f"`attention_mask` must have shape {(batch, past + length)}, got {tuple(attention_mask.shape)}"
            )
        return torch.stack([is_vision, is_valid]).cpu()  # the one transfer to the host

    @classmethod
    def from_plan(cls, plan: Tensor, device: torch.device) -> "ReleasedRouting":
        """Of a plan, calls that are all text included; index tensors are put on `device`."""
        is_vision, is_valid = plan.cpu()
        samples = []
        for sample, (vision, valid) in enumerate(zip(is_vision, is_valid, strict=True)):
            rows = valid.nonzero().squeeze(-1)
            if not len(rows):
                continue
            layout = TokenLayout.from_mask(vision[valid])
            if len(rows) == rows[-1] - rows[0] + 1:
                rows = slice(int(rows[0]), int(rows[-1]) + 1)
            samples.append((sample, rows, layout))
        return cls(samples, plan).to(device)

    def to(self, device: torch.device, non_blocking: bool = False) -> "ReleasedRouting":
        """A copy on `device`. accelerate calls this for layers that live on another device than their inputs."""
        samples = []
        for sample, rows, layout in self.samples:
            rows = rows if isinstance(rows, slice) else rows.to(device, non_blocking=non_blocking)
            samples.append((sample, rows, layout.to(device, non_blocking=non_blocking)))
        return replace(self, samples=samples)


def may_hold_vision(tokens: Tensor, kwargs: dict) -> bool:
    """Whether a call, by its shapes, is more than a text prompt or a decoding step: no tensor is looked at."""
    position_ids = kwargs.get("position_ids")
    return position_ids is not None and position_ids.ndim == 3 and tokens.shape[1] > 1


def check_token_types(token_types: Tensor, past: int, attention_mask, position_ids, kwargs: dict, config) -> None:
    """Raise ValueError early for vision tokens, by type, of calls that `ReleasedRouting.build` could not route.

    Args:
        token_types: (batch, past + q_len), nonzero for placeholders of images and videos.
        attention_mask, position_ids, kwargs, config: the call's arguments, and what its kwargs override.
    """
    grids = (kwargs.get(name) for name in ("image_grid_thw", "video_grid_thw"))
    has_positions = position_ids is not None or any(grid is not None for grid in grids)
    if not past and has_positions and is_2d(attention_mask) and not config.output_attentions:
        return  # without a look at the tokens
    refuse_export()
    if token_types[:, past:].any():
        _check_nothing_cached(past)
        check_sparse_call(first_columns(attention_mask, past), None, past, kwargs, config)
        if not has_positions:
            _check_all_text(token_types)


def _check_all_text(token_types: Tensor) -> None:
    if token_types.any():
        raise ValueError(
            "`image_grid_thw` or `video_grid_thw` is missing: nsa_variant='released' tells vision tokens by their "
            "positions, which it computes from these"
        )


def _check_nothing_cached(past: int) -> None:
    if past:
        raise ValueError(
            f"`past_key_values` holds {past} tokens, and vision tokens cannot join them with nsa_variant='released': "
            "its compression looks ahead, so that they would change what is cached; pass the whole prompt in one call"
        )


class _OwnAndLaterFunction(torch.autograd.Function):
    """Compression for one key/value head: q (tokens, heads, D) over k_cmp, v_cmp (blocks, D) -> o, lse.

    Token t sees block j iff j >= t // block_size. A tile of scores at a time, recomputed in backward.
    """

    @staticmethod
    def forward(ctx, q, k_cmp, v_cmp, block_size, softmax_scale):
        o = torch.empty_like(q, memory_format=torch.contiguous_format)
        lse = torch.empty(q.shape[:2], dtype=k_cmp.dtype, device=q.device)
        for rows, first_block, _, scores in _own_and_later_scores(q, k_cmp, block_size, softmax_scale):
            row_max = scores.amax(-1, keepdim=True)
            probs = scores.sub_(row_max).exp_()
            row_sum = probs.sum(-1, keepdim=True)
            lse[rows] = (row_sum.log() + row_max).squeeze(-1)
            o[rows] = probs.div_(row_sum) @ v_cmp[first_block:]
        ctx.save_for_backward(q, k_cmp, v_cmp, lse)
        ctx.args = block_size, softmax_scale
        ctx.mark_non_differentiable(lse)
        return o, lse

    @staticmethod
    @once_differentiable
    @utils.backward_without_autocast
    def backward(ctx, do, _dlse):
        q, k_cmp, v_cmp, lse = ctx.saved_tensors
        dq = torch.empty_like(q, memory_format=torch.contiguous_format)
        dk_cmp, dv_cmp = torch.zeros_like(k_cmp), torch.zeros_like(v_cmp)
        for rows, first_block, q_rows, scores in _own_and_later_scores(q, k_cmp, *ctx.args):
            probs = scores.sub_(lse[rows, :, None]).exp_()
            do_rows = do[rows].to(probs.dtype)
            dscores = do_rows @ v_cmp[first_block:].mT
            dscores = dscores.sub_((dscores * probs).sum(-1, keepdim=True)).mul_(probs).mul_(ctx.args[1])
            dv_cmp[first_block:].addmm_(probs.flatten(0, 1).mT, do_rows.flatten(0, 1))
            dk_cmp[first_block:].addmm_(dscores.flatten(0, 1).mT, q_rows.flatten(0, 1))
            dq[rows] = dscores @ k_cmp[first_block:]
        return dq, dk_cmp, dv_cmp, None, None


def _own_and_later_scores(q: Tensor, k_cmp: Tensor, block_size: int, softmax_scale: float):
    """Tiles: (slice of rows, first block that any of them sees, q of the rows, scaled scores (rows, heads, blocks))."""
    tokens, heads, _ = q.shape
    step = utils.tile_tokens(2 * heads * len(k_cmp), q.device)
    for start in range(0, tokens, step):
        rows = slice(start, min(start + step, tokens))
        first_block, last_own = start // block_size, (rows.stop - 1) // block_size
        q_rows = q[rows].to(k_cmp.dtype)
        scores = (q_rows @ k_cmp[first_block:].mT).mul_(softmax_scale)
        if last_own > first_block:
            own = torch.arange(start, rows.stop, device=q.device)[:, None, None] // block_size
            block = torch.arange(first_block, last_own, device=q.device)
            scores[..., : last_own - first_block].masked_fill_(block < own, -torch.inf)
        yield rows, first_block, q_rows, scores


def _pool(x: Tensor, block_size: int) -> Tensor:
    """Block means of (tokens, kv_heads, D) in the accumulate dtype; the last block's over its true length."""
    x = x.to(utils.accumulate_dtype(x.dtype))
    full = len(x) // block_size * block_size
    means = [x[:full].unflatten(0, (-1, block_size)).mean(1)] if full else []
    return torch.cat([*means, x[full:].mean(0, keepdim=True)] if full < len(x) else means)


def _copies_of(x: Tensor, kv_head: int) -> Tensor:
    """Of (tokens, 28, ...) the heads of padded group kv_head, without zero heads: (tokens, 16 or 8, ...)."""
    parts = [x[:, heads] for heads, _ in _groups(kv_head)]
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)


def _groups(kv_head: int) -> list[tuple[slice, slice]]:
    """Runs of (real heads, their places in padded group kv_head). The second copy of the heads follows the first."""
    start, size = kv_head * _GROUP % NUM_HEADS, min(_GROUP, _COPIED_HEADS - kv_head * _GROUP)
    first = min(size, NUM_HEADS - start)
    runs = [(slice(start, start + first), slice(0, first)), (slice(0, size - first), slice(first, size))]
    return runs if first < size else runs[:1]


def _add_gated_(out: Tensor, o: Tensor, gate: Tensor, kv_head: int) -> None:
    """Add a branch of padded group kv_head to out (tokens, 28, D); half of it, as the copies are averaged."""
    for heads, places in _groups(kv_head):
        out[:, heads].addcmul_(gate[:, heads, None], o[:, places], value=0.5)


def _compress(q: Tensor, k_cmp: Tensor, v_cmp: Tensor, block_size: int, softmax_scale: float):
    """For each key/value head in turn: o_cmp of its padded group, and lse (16, tokens), zero heads included."""
    own = torch.arange(len(q), device=q.device) // block_size
    lse_of_zero_head = (len(k_cmp) - own).to(k_cmp.dtype).log()  # all scores are 0
    for head in range(NUM_KV_HEADS):
        o, lse = _OwnAndLaterFunction.apply(
            _copies_of(q, head), k_cmp[:, head], v_cmp[:, head], block_size, softmax_scale
        )
        yield o, torch.cat([lse.T, lse_of_zero_head.expand(_GROUP - lse.shape[1], -1)])


@torch.no_grad()
def _choose_blocks(
    q: Tensor, k_cmp: Tensor, lse: Tensor, block_size: int, block_counts: int, softmax_scale: float
) -> Tensor:
    """(tokens, kv_heads, S), int32, S the next power of two of block_counts: see `released_block_indices`."""
    num_blocks, tokens = len(k_cmp), len(q)
    num_chosen = 1 << (block_counts - 1).bit_length()
    indices = torch.empty(tokens, NUM_KV_HEADS, num_chosen, dtype=torch.int32, device=q.device)
    # The published kernel indexes this buffer as (tokens, 64), though compression filled it as (64, tokens).
    lse = lse.view(tokens, _PADDED_HEADS)
    step = utils.tile_tokens(NUM_KV_HEADS * num_blocks, q.device)
    for start in range(0, tokens, step):
        rows = slice(start, min(start + step, tokens))
        own = torch.arange(start, rows.stop, device=q.device) // block_size
        visible = (rows.stop - 1) // block_size + 1
        # Whole runs of block_size blocks, as wide as the network; blocks that do not exist have importance 0.
        width = -(-visible // block_size) * block_size
        importance = torch.zeros(len(own), NUM_KV_HEADS, width, dtype=lse.dtype, device=q.device)
        for head in range(NUM_KV_HEADS):
            lse_group = lse[rows, head * _GROUP : (head + 1) * _GROUP]
            group = _copies_of(q[rows], head)
            sub_step = utils.tile_tokens(group.shape[1] * visible, q.device)
            for part in (slice(i, i + sub_step) for i in range(0, len(own), sub_step)):
                importance[part, head, :visible] = _importance(
                    group[part], k_cmp[:visible, head], lse_group[part], own[part], softmax_scale
                )
        indices[rows] = _bitonic_top_blocks(importance, own, start // block_size, block_size)[..., :num_chosen]
    return indices


def _importance(q: Tensor, k_cmp: Tensor, lse: Tensor, own: Tensor, softmax_scale: float) -> Tensor:
    """What one key/value head's blocks are ranked by: q (rows, 16 or 8, D), lse (rows, 16) -> (rows, blocks).

    A block before the token's own counts exp(score - lse) for each padded head, its own 1, a later one nothing. The lse
    are those of other tokens and heads, and of own and later blocks at that, so the weights are no probabilities.
    """
    weights = (q.to(k_cmp.dtype).transpose(0, 1) @ k_cmp.mT).mul_(softmax_scale)  # [heads, rows, blocks]
    weights = weights.sub_(lse.T[: len(weights), :, None]).exp_()
    # One head after the other: scores that are exactly equal, those of every text row, must stay so in the sums.
    total = weights[0]
    for head in range(1, _GROUP):
        total = total.add_(weights[head] if head < len(weights) else lse[:, head, None].neg().exp_())
    block = torch.arange(len(k_cmp), device=q.device)
    total = total.masked_fill_(block == own[:, None], float(_GROUP))
    return total.masked_fill_(block > own[:, None], 0.0)


def _bitonic_top_blocks(importance: Tensor, own: Tensor, first_own: int, width: int) -> Tensor:
    """The best half of `width` blocks, best first, with ties in the order that the published kernel leaves them in.

    It sorts `width` (= block_size) blocks at a time, and merges the better halves of what it has and of the next run.

    Args:
        importance: (rows, kv_heads, runs * width); own: (rows,), the block of each row, ascending from first_own.
    Returns:
        (rows, kv_heads, width), int32: the first half are the block indices, -1 where there is none.
    """
    stages = width.bit_length() - 1
    best = best_ids = None
    for start in range(0, importance.shape[-1], width):
        values = importance[..., start : start + width]
        ids = torch.arange(start, start + width, dtype=torch.int32, device=own.device)
        ids = torch.where(ids <= own[:, None, None], ids, -1).expand(values.shape)
        for stage in range(1, stages):
            values, ids = _bitonic_merge(values, ids, stage)
        if best is None:
            best, best_ids = _bitonic_merge(values, ids, stages, descending=True)
            continue
        values, ids = _bitonic_merge(values, ids, stages, descending=False)
        half = width // 2
        values = torch.cat([best[..., :half], values[..., half:]], dim=-1)
        ids = torch.cat([best_ids[..., :half], ids[..., half:]], dim=-1)
        values, ids = _bitonic_merge(values, ids, stages, descending=True)
        if start > first_own:  # for rows whose own block lies before this run, the kernel has stopped
            runs = (own >= start)[:, None, None]
            values, ids = torch.where(runs, values, best), torch.where(runs, ids, best_ids)
        best, best_ids = values, ids
    return best_ids


def _bitonic_merge(values: Tensor, ids: Tensor, stage: int, descending: bool | None = None) -> tuple[Tensor, Tensor]:
    """One stage of a bitonic sort along the last axis: runs of 2**stage become sorted, ids along with their values.

    descending None sorts every other run down, as the next stage wants it. Pairs of equal values are swapped where
    sorting goes down, and not where it goes up: this is what decides ties.
    """
    for stride in (1 << i for i in reversed(range(stage))):
        left, right = values.unflatten(-1, (-1, 2, stride)).unbind(-2)
        left_ids, right_ids = ids.unflatten(-1, (-1, 2, stride)).unbind(-2)
        if descending is None:
            start = torch.arange(0, values.shape[-1], 2 * stride, device=values.device)
            swap = (left > right) != ((start >> stage) & 1).bool()[:, None]
        else:
            swap = left <= right if descending else left > right
        values = torch.stack([torch.where(swap, right, left), torch.where(swap, left, right)], -2).flatten(-3)
        ids = torch.stack([torch.where(swap, right_ids, left_ids), torch.where(swap, left_ids, right_ids)], -2)
        ids = ids.flatten(-3)
    return values, ids


def _dense(q: Tensor, k: Tensor, v: Tensor, layout: TokenLayout, softmax_scale: float, backend: str) -> Tensor:
    """Causal attention over all tokens, head h reading key/value head h // 7, with vision queries set to zero."""
    if not layout.has_vision:
        return dense.text_rows_attention(q, k, v, softmax_scale, backend=backend)
    count = torch.arange(1, len(v) + 1, device=v.device)[:, None, None]
    mean = (v.to(utils.accumulate_dtype(v.dtype)).cumsum(0) / count).to(v.dtype)
    o = mean.repeat_interleave(NUM_HEADS // NUM_KV_HEADS, dim=1)
    rows = layout.text_positions
    if len(rows):
        text = dense.text_rows_attention(q[rows], k, v, softmax_scale, positions=rows, backend=backend)
        o = o.index_copy(0, rows, text)
    return o


def _zero_text(layout: TokenLayout, *tensors: Tensor) -> list[Tensor]:
    return [x.masked_fill(~layout.vision_mask.view(-1, *[1] * (x.ndim - 1)), 0.0) for x in tensors]


def _check(q: Tensor, k: Tensor, v: Tensor | None, vision_mask: Tensor | TokenLayout) -> TokenLayout:
    if q.dim() != 3 or len(q) == 0:
        raise ValueError(f"q must have shape (tokens, {NUM_HEADS}, head_dim) with a token at least, got {q.shape}")
    mask = vision_mask.vision_mask if isinstance(vision_mask, TokenLayout) else vision_mask
    if mask.shape != q.shape[:1] or mask.dtype != torch.bool or mask.device != q.device:
        raise ValueError(
            f"vision_mask must be bool of shape (tokens,) = ({len(q)},) on {q.device}, "
            f"got {mask.dtype} {tuple(mask.shape)} on {mask.device}"
        )
    utils.check_qkv(q, k, v, utils.SequenceLengths.from_lengths([len(q)]))
    return vision_mask if isinstance(vision_mask, TokenLayout) else TokenLayout.from_mask(vision_mask)


@torch.no_grad()
def released_block_indices(
    q: Tensor,
    k: Tensor,
    vision_mask: Tensor | TokenLayout,
    *,
    block_size: int = 64,
    block_counts: int = 32,
    softmax_scale: float | None = None,
) -> Tensor:
    """The blocks that each token and key/value head of one sample selects, in the published kernel's order.

    Args:
        q: (tokens, 28, head_dim); k: (tokens, 4, head_dim), like q.
        vision_mask, block_size, block_counts, softmax_scale: as in `released_attention`.
    Returns:
        (tokens, 4, S), int32, S the next power of two of block_counts, as many as the published kernel takes. Most
        important first; -1 where there is no block.
    Raises:
        ValueError: as `released_attention`.
    """
    if torch.compiler.is_compiling():
        mask = vision_mask.vision_mask if isinstance(vision_mask, TokenLayout) else vision_mask
        return _indices_operator(q.detach(), k.detach(), mask, block_size, block_counts, softmax_scale)
    layout = _check(q, k, None, vision_mask)
    check_settings(q.shape[1], k.shape[1], block_size, block_counts)
    scale = utils.resolve_scale(softmax_scale, q.shape[2])
    with utils.no_autocast(q.device):
        q, k = _zero_text(layout, q, k)
        k_cmp = _pool(k, block_size)
        lse = torch.cat([lse for _, lse in _compress(q, k_cmp, k_cmp, block_size, scale)])
        return _choose_blocks(q, k_cmp, lse, block_size, block_counts, scale)


def released_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gate_logits: Tensor,
    vision_mask: Tensor | TokenLayout,
    *,
    block_size: int = 64,
    block_counts: int = 32,
    window_size: int = 256,
    softmax_scale: float | None = None,
    backend: str = "auto",
) -> Tensor:
    """The published code's attention of one sample whose prompt mixes text and vision, up to `o_proj`. Differentiable.

    Memory grows linearly with the tokens: the block choice and every branch go a bounded number of scores at a time.

    Args:
        q: (tokens, 28, head_dim), fp16, bf16, fp32 or fp64, after M-RoPE.
        k, v: (tokens, 4, head_dim), like q, k after M-RoPE.
        gate_logits: (tokens, 28, 3), floating point: compression, selection, window, divided by the gate temperature.
        vision_mask: (tokens,), bool. Reading it waits for a GPU: callers with many layers pass a `TokenLayout`.
        block_size: tokens per key block, a power of two.
        block_counts: blocks per token and key/value head in selection, at most block_size / 2; rounded up to a power
            of two.
        window_size: tokens in the window, the query itself included.
        softmax_scale: defaults to head_dim**-0.5.
        backend: of selection, window and the dense attention of text rows, as in `nsa_attention`. Compression and
            block choice have one form, in torch operations on the device of q.
    Returns:
        o: like q.
    Raises:
        ValueError: an argument has a wrong value, shape or dtype. ImportError: triton is not installed.
    """
    if torch.compiler.is_compiling():
        mask = vision_mask.vision_mask if isinstance(vision_mask, TokenLayout) else vision_mask
        return _operator(q, k, v, gate_logits, mask, block_size, block_counts, window_size, softmax_scale, backend)
    layout = _check(q, k, v, vision_mask)
    check_settings(q.shape[1], k.shape[1], block_size, block_counts)
    utils.check_positive(window_size=window_size)
    if gate_logits.shape != (*q.shape[:2], 3) or not gate_logits.is_floating_point() or gate_logits.device != q.device:
        raise ValueError(
            f"gate_logits must be floating point of shape (tokens, {NUM_HEADS}, 3) = {(*q.shape[:2], 3)} on "
            f"{q.device}, got {gate_logits.dtype} {tuple(gate_logits.shape)} on {gate_logits.device}"
        )
    scale = utils.resolve_scale(softmax_scale, q.shape[2])
    backend = utils.resolve_backend(backend, q.device)
    with utils.no_autocast(q.device):
        out = _dense(q, k, v, layout, scale, backend)
        if not layout.has_vision:
            return out
        # The branches are added up in place, in the accumulate dtype.
        acc = utils.accumulate_dtype(q.dtype)
        out, dtype = out.to(acc), out.dtype
        q, k, v, gate_logits = _zero_text(layout, q, k, v, gate_logits)
        g_cmp, g_slc, g_swa = torch.sigmoid(gate_logits.to(acc)).unbind(-1)
        k_cmp, lse = _pool(k, block_size), []
        for head, (o_cmp, lse_group) in enumerate(_compress(q, k_cmp, _pool(v, block_size), block_size, scale)):
            _add_gated_(out, o_cmp, g_cmp, head)
            lse.append(lse_group)
        indices = _choose_blocks(q, k_cmp, torch.cat(lse), block_size, block_counts, scale)
        settings = {"softmax_scale": scale, "backend": backend}
        for head in range(NUM_KV_HEADS):
            group = _copies_of(q, head), k[:, head : head + 1], v[:, head : head + 1]
            blocks = indices[:, head : head + 1]
            o_slc, _ = selection.selection_attention(*group, blocks, layout.lengths, block_size=block_size, **settings)
            _add_gated_(out, o_slc, g_slc, head)
            del o_slc
            o_swa, _ = sliding_window.sliding_window_attention(
                *group, layout.lengths, window_size=window_size, **settings
            )
            _add_gated_(out, o_swa, g_swa, head)
        return out.to(dtype)


_operator = operators.define_differentiable(
    "released_attention",
    "Tensor q, Tensor k, Tensor v, Tensor gate_logits, Tensor vision_mask, int block_size, int block_counts, "
    "int window_size, float? softmax_scale, str backend",
    "Tensor",
    lambda *args: released_attention(
        *args[:5],
        block_size=args[5],
        block_counts=args[6],
        window_size=args[7],
        softmax_scale=args[8],
        backend=args[9],
    ).contiguous(),
    lambda q, *_: operators.like(q),
    num_inputs=4,
)
_indices_operator = operators.define(
    "released_block_indices",
    "(Tensor q, Tensor k, Tensor vision_mask, int block_size, int block_counts, float? softmax_scale) -> Tensor",
    lambda *args: released_block_indices(
        *args[:3], block_size=args[3], block_counts=args[4], softmax_scale=args[5]
    ).contiguous(),
    lambda q, k, *args: q.new_empty(q.shape[0], NUM_KV_HEADS, 1 << (args[2] - 1).bit_length(), dtype=torch.int32),
)


def _text_ids(input_ids: Tensor, token_types: Tensor) -> Tensor:
    _check_all_text(token_types)
    return input_ids.clone()


# (input_ids, token_types) -> input_ids: `check_token_types` of a new prompt without positions, in compiled code. It
# hands the ids on, as a compiler drops what nobody uses.
text_ids_operator = operators.define(
    "text_ids",
    "(Tensor input_ids, Tensor token_types) -> Tensor",
    _text_ids,
    lambda input_ids, _: torch.empty_like(input_ids),
)
