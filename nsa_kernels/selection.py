"""Selection branch: causal attention over the tokens of the selected key blocks (torch backend).

    o[t,h] = softmax attention of q[t,h] over { s <= t : s // B in block_indices[t, h // R] }

Native Sparse Attention (arXiv:2502.11089), equations 11 and 12.

Fetching 2 * B rows of k and v for every (token, block) pair is bound by memory, so the loop runs the other way round.
For a chunk of query tokens and one key/value head, the pairs are sorted by block, and taken a tile at a time: tokens
that all selected one block. Two products of the tile with the block give each pair's share of its token's sums.

On a CPU a tile is every pair of a block, the block's keys are read where they lie, and shares are added to the sums at
once: exponentials are relative to the largest score in the token's own block. Rows with scores far above that one, or
without that block, are computed again, relative to their largest score. Elsewhere tiles have one size, so that a batch
of them is one product, and each pair's unnormalised output and softmax state (maximum, log-sum-exp) are kept for a
weighted gather that adds up the pairs of each token. There every shape is known beforehand, so nothing waits for the
device. Every sum has a fixed order.

Scores are in units of log 2, as exp2 is faster than exp.
"""

import threading
from collections.abc import Iterable, Iterator
from functools import cached_property
from itertools import pairwise
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import head_threads, operators, reference, utils

# Outputs of the pairs of one chunk of tokens, where they are kept: 256 MB in float32.
_PARTIAL_ELEMENTS = 1 << 26
# Sums of exponentials may grow so far before their row counts as far above its own block: by 44 e-folds.
_LARGEST_SUM = 2.0**64


class _Pairs(NamedTuple):
    """Pairs of (token, block) of a chunk, sorted: runs of each own block, runs of each block, what does not count.

    Pairs of a token and its own block are by themselves because only they need the causal mask.
    """

    order: Tensor  # (pairs,): which pair of block_indices.flatten() is in this place
    run: Tensor  # (pairs,), ascending: own block, num_blocks + block, or 2 * num_blocks where the pair does not count
    starts: Tensor  # (2 * num_blocks + 1,): where each run begins, and where the last one ends
    counted: Tensor  # (tokens, block_counts), bool: pairs that count


class _Batch(NamedTuple):
    """Some pairs of a chunk, as tiles of tokens that all selected one block; their rows are their query heads."""

    tokens: Tensor  # (pairs,), 0 for a pair that is none
    is_pair: Tensor | None  # (pairs,), bool: False where a tile is not full; None where all are
    blocks: Tensor | list[int]  # of each tile
    tile_rows: list[int] | None  # of each tile; None where all have as many
    mask: Tensor | None  # (pairs, 1, B): -inf where it hides a key from a pair, 0 elsewhere; None hides none


class Scratch:
    """Memory that each thread reuses from one use to the next: fresh pages cost as much as the arithmetic."""

    def __init__(self) -> None:
        self._buffers: dict[tuple[str, int], Tensor] = {}

    def take(self, name: str, shape: tuple[int, ...], like: Tensor) -> Tensor:
        """An uninitialised tensor with the dtype and device of ``like``; valid until the next call with this name."""
        numel, key = torch.Size(shape).numel(), (name, threading.get_ident())
        if key not in self._buffers or self._buffers[key].numel() < numel:
            self._buffers.pop(key, None)  # freed before the larger one is allocated
            self._buffers[key] = like.new_empty(numel * 5 // 4)  # the next one is often a little larger
        return self._buffers[key][:numel].view(shape)

    def take_rows(self, name: str, x: Tensor, rows: Tensor) -> Tensor:
        """x (tokens, group_size[, dim]), rows (pairs,) -> (pairs * group_size, dim or 1), in such memory."""
        taken = torch.index_select(x, 0, rows, out=self.take(name, (len(rows), *x.shape[1:]), x))
        return taken.view(len(rows) * x.shape[1], -1)


def chunk_tokens(device: torch.device, block_counts: int, group_size: int, head_dim: int) -> int:
    """Query tokens per chunk, so that what is kept of their pairs stays within a fixed size."""
    if utils.reading_is_free(device):  # nothing is kept, and more tokens share a block
        return 2 * utils.CHUNK_TOKENS
    return min(utils.CHUNK_TOKENS, max(1, _PARTIAL_ELEMENTS // (block_counts * group_size * head_dim)))


class Blocks:
    """Keys or values of one head, (num_keys, head_dim), by block; only an incomplete last block is copied.

    Attributes:
        size: tokens of a block.
        whole: (num_whole, size, head_dim), a view.
        last: (0 or 1, size, head_dim), completed by zeros.
    """

    def __init__(self, x: Tensor, size: int):
        num_whole = x.shape[0] // size
        self.size, self.whole = size, x[: num_whole * size].unflatten(0, (num_whole, size))
        rest = x[num_whole * size :]
        self.last = F.pad(rest, (0, 0, 0, -rest.shape[0] % size)).unflatten(0, (-1, size))

    def __len__(self) -> int:
        return len(self.whole) + len(self.last)

    def zeros(self) -> Tensor:
        """(num_blocks, size, head_dim), for gradients."""
        return self.whole.new_zeros(len(self), *self.whole.shape[1:])

    @cached_property
    def views(self) -> tuple[Tensor, ...]:
        """(size, head_dim) of each."""
        return self.whole.unbind() + self.last.unbind()

    def fetch(self, blocks: Tensor) -> Tensor:
        """(tiles,) -> (tiles, size, head_dim), a copy."""
        if not len(self.last):
            return self.whole[blocks]
        if not len(self.whole):
            return self.last[blocks]
        taken = self.whole[blocks.clamp(max=len(self.whole) - 1)]
        return torch.where((blocks == len(self.whole))[:, None, None], self.last, taken)


def _sort_pairs(block_indices: Tensor, first: int, block_size: int, num_blocks: int) -> _Pairs:
    tokens, device = block_indices.shape[0], block_indices.device
    own = torch.arange(first, first + tokens, device=device)[:, None] // block_size
    counted = (block_indices >= 0) & (block_indices <= own)
    run = torch.where(block_indices == own, block_indices, block_indices + num_blocks)
    run, order = run.masked_fill(~counted, 2 * num_blocks).flatten().sort(stable=True)
    starts = torch.searchsorted(run, torch.arange(2 * num_blocks + 1, device=device, dtype=run.dtype))
    return _Pairs(order, run, starts, counted)


def _whole_runs(pairs: _Pairs, q: Tensor, block_size: int, num_blocks: int, first: int) -> Iterator[_Batch]:
    """Batches of all pairs in their order: some whole runs, or a part of a long one."""
    tokens, group_size = pairs.order // pairs.counted.shape[1], q.shape[1]
    limit = 2 * utils.tile_tokens(group_size * (q.shape[2] + block_size), q.device)
    tiles: list[tuple[int, int, int]] = []  # run, and its pairs, of the batch that is being filled

    def batch() -> _Batch:
        pair_slice, mask = slice(tiles[0][1], tiles[-1][2]), None
        if tiles[0][0] < num_blocks:
            mask = _causal_mask(tokens[pair_slice], pairs.run[pair_slice], block_size, first, q)
        tile_rows = [(stop - start) * group_size for _, start, stop in tiles]
        return _Batch(tokens[pair_slice], None, [run % num_blocks for run, *_ in tiles], tile_rows, mask)

    for run, (run_start, run_stop) in enumerate(pairwise(pairs.starts.tolist())):
        for start in range(run_start, run_stop, limit):
            stop = min(start + limit, run_stop)
            if tiles and (stop - tiles[0][1] > limit or tiles[0][0] < num_blocks <= run):
                yield batch()
                tiles.clear()
            tiles.append((run, start, stop))
    if tiles:
        yield batch()


def _equal_tiles(
    pairs: _Pairs, q: Tensor, block_size: int, num_blocks: int, first: int
) -> tuple[Iterator[_Batch], int, Tensor]:
    """Batches of tiles of one size, some of them not full, with shapes that depend on nothing but shapes.

    Returns:
        The batches; how many pairs they have room for; slots (tokens, block_counts): where among these a pair is, or
        one of the same token that counts: the weight of one that does not is 0, and 0 times nan is nan.
    """
    block_counts, num_pairs, device = pairs.counted.shape[1], len(pairs.order), q.device
    # Half-empty tiles waste work and small ones waste bandwidth: take about a quarter of the average run.
    size = min(32, max(4, num_pairs // (4 * num_blocks)))
    run_tiles = (pairs.starts.diff() + size - 1) // size
    tile_end = run_tiles.cumsum(0)
    tile_start = tile_end - run_tiles
    num_tiles = num_pairs // size + min(2 * num_blocks, num_pairs)  # or less: asking would wait for the device
    tile = torch.arange(num_tiles, device=device)
    run = torch.searchsorted(tile_end, tile, right=True).clamp_max_(2 * num_blocks - 1)
    place = (pairs.starts[run] + (tile - tile_start[run]) * size)[:, None] + torch.arange(size, device=device)
    is_pair = place < pairs.starts[run + 1][:, None]
    tokens = (pairs.order[place.clamp_max_(num_pairs - 1)] // block_counts).masked_fill_(~is_pair, 0)
    pair_run = pairs.run.clamp_max(2 * num_blocks - 1).long()
    slots = tile_start[pair_run] * size + torch.arange(num_pairs, device=device) - pairs.starts[pair_run]
    slots = torch.empty_like(slots).scatter_(0, pairs.order, slots).view_as(pairs.counted)
    stand_in = slots.gather(1, pairs.counted.int().argmax(1, keepdim=True))
    slots = torch.where(pairs.counted, slots, stand_in).masked_fill_(~pairs.counted.any(1, keepdim=True), 0)

    def batches():
        step = utils.tile_tokens(size * q.shape[1] * (q.shape[2] + block_size), device)
        for start in range(0, num_tiles, step):
            tiles = slice(start, min(start + step, num_tiles))
            rows, blocks = tokens[tiles].flatten(), run[tiles] % num_blocks
            mask = _causal_mask(rows, blocks.repeat_interleave(size), block_size, first, q)
            yield _Batch(rows, is_pair[tiles].flatten(), blocks, None, mask)

    return batches(), num_tiles * size, slots


def _causal_mask(tokens: Tensor, blocks: Tensor, block_size: int, first: int, like: Tensor) -> Tensor:
    """(pairs, 1, block_size) of -inf at keys after the token and 0 elsewhere."""
    key = blocks[:, None] * block_size + torch.arange(block_size, device=like.device)
    hidden = key > (tokens + first)[:, None]
    return like.new_zeros(hidden.shape).masked_fill_(hidden, -torch.inf)[:, None]


def _scores(q_rows: Tensor, k_blocks: Blocks, batch: _Batch, scale: float, scratch: Scratch) -> Tensor:
    """Scores of each row and the keys of its block, in units of log 2, masked: (rows, B)."""
    scores = scratch.take("scores", (len(q_rows), k_blocks.size), q_rows)
    _times(q_rows, k_blocks, batch, scores, of_dims=True, scale=scale * utils.LOG2_E)
    if batch.mask is not None:
        scores.view(len(batch.tokens), -1, k_blocks.size).add_(batch.mask)
    return scores


def _times(
    rows: Tensor, blocks: Blocks, batch: _Batch, out: Tensor, of_dims: bool = False, scale: float = 1.0
) -> Tensor:
    """out = scale * each row times its block (B, head_dim): sums over B, or over head_dim."""
    if isinstance(batch.blocks, Tensor):
        tiles, fetched = len(batch.blocks), blocks.fetch(batch.blocks)
        if scale != 1.0:
            fetched *= scale
        rows, target = (x.view(tiles, -1, x.shape[1]) for x in (rows, out))
        torch.bmm(rows, fetched.mT if of_dims else fetched, out=target)
    else:
        tiles = (x.split(batch.tile_rows) for x in (rows, out))
        for block, part, target in zip(batch.blocks, *tiles, strict=True):
            block = blocks.views[block]
            torch.addmm(target, part, block.T if of_dims else block, beta=0, alpha=scale, out=target)
    return out


def _add_products_(target: Tensor, left: Tensor, right: Tensor, batch: _Batch) -> None:
    """target (num_blocks, B, head_dim)[block] += left^T right, for left (rows, B) and right (rows, head_dim)."""
    if isinstance(batch.blocks, Tensor):
        left, right = (x.view(len(batch.blocks), -1, x.shape[1]) for x in (left, right))
        utils.add_rows_(target, batch.blocks, left.mT @ right)
    else:
        tiles = (x.split(batch.tile_rows) for x in (left, right))
        for block, left_rows, right_rows in zip(batch.blocks, *tiles, strict=True):
            target[block].addmm_(left_rows.T, right_rows)


def selection_forward(
    q: Tensor,
    k_blocks: Blocks,
    v_blocks: Blocks,
    block_indices: Tensor,
    first: int,
    softmax_scale: float,
    scratch: Scratch,
) -> tuple[Tensor, Tensor]:
    """o (tokens, group_size, head_dim) and lse (tokens, group_size) for one chunk and one key/value head.

    Args:
        q: (tokens, group_size, head_dim), the tokens at positions first, first + 1, ...
        k_blocks, v_blocks: of the head's num_keys keys.
        block_indices: (tokens, block_counts), distinct within a token; -1 and blocks after the token are ignored.
    """
    forward = _forward_by_runs if utils.reading_is_free(q.device) else _forward_by_tiles
    return forward(block_indices, q, k_blocks, v_blocks, first, softmax_scale, scratch)


def _forward_by_runs(block_indices, q, k_blocks, v_blocks, first, softmax_scale, scratch):
    def batches_of(block_indices: Tensor) -> list[_Batch]:
        pairs = _sort_pairs(block_indices, first, k_blocks.size, len(k_blocks))
        return list(_whole_runs(pairs, q, k_blocks.size, len(k_blocks), first))

    batches = batches_of(block_indices)
    own = [batch for batch in batches if batch.mask is not None]
    level = _largest_scores(own, q, k_blocks, softmax_scale, scratch)
    o, total = _sums(batches, level, q, k_blocks, v_blocks, softmax_scale, scratch)
    is_far = ~(total <= _LARGEST_SUM) | ~o.sum(-1).isfinite()  # nan, too, and rows without their own block
    if is_far.any():  # the others stay as they are, to the last digit
        batches = batches_of(block_indices.masked_fill(~is_far.any(1, keepdim=True), -1))
        far_level = _largest_scores(batches, q, k_blocks, softmax_scale, scratch)
        far_o, far_total = _sums(batches, far_level, q, k_blocks, v_blocks, softmax_scale, scratch)
        o[is_far], total[is_far], level[is_far] = far_o[is_far], far_total[is_far], far_level[is_far]
    # The sum of a token's exponentials is at least that of its level, 1; or 0 without blocks.
    return o.div_(total.clamp_min(1.0)[..., None]), level.add_(total.log2_()).mul_(utils.LN_2)


def _largest_scores(
    batches: Iterable[_Batch], q: Tensor, k_blocks: Blocks, softmax_scale: float, scratch: Scratch
) -> Tensor:
    """(tokens, group_size): the largest score of a row in any of the batches, the lowest number where it is in none."""
    tokens, group_size, _ = q.shape
    largest = q.new_full((tokens, group_size), torch.finfo(q.dtype).min)
    for batch in batches:
        scores = _scores(scratch.take_rows("q", q, batch.tokens), k_blocks, batch, softmax_scale, scratch)
        index = batch.tokens[:, None].expand(-1, group_size)
        largest.scatter_reduce_(0, index, scores.amax(1).view(-1, group_size), "amax")
    return largest


def _sums(
    batches: Iterable[_Batch],
    level: Tensor,
    q: Tensor,
    k_blocks: Blocks,
    v_blocks: Blocks,
    softmax_scale: float,
    scratch: Scratch,
) -> tuple[Tensor, Tensor]:
    """Sums of exponentials, relative to the level, times values (like q), and without them (tokens, group_size)."""
    o, total = torch.zeros_like(q), torch.zeros_like(level)
    for batch in batches:
        q_rows = scratch.take_rows("q", q, batch.tokens)
        scores = _scores(q_rows, k_blocks, batch, softmax_scale, scratch)
        probs = scores.sub_(level[batch.tokens].view(-1, 1)).exp2_()
        total.index_add_(0, batch.tokens, probs.sum(1).view(-1, q.shape[1]))
        # Queries are not needed any more.
        o.index_add_(0, batch.tokens, _times(probs, v_blocks, batch, q_rows).view(-1, *q.shape[1:]))
    return o, total


def _forward_by_tiles(block_indices, q, k_blocks, v_blocks, first, softmax_scale, scratch):
    group_size, head_dim = q.shape[1:]
    pairs = _sort_pairs(block_indices, first, k_blocks.size, len(k_blocks))
    batches, num_slots, slots = _equal_tiles(pairs, q, k_blocks.size, len(k_blocks), first)
    partial = scratch.take("partial", (num_slots * group_size, head_dim), q)
    maximum, log_sum = (q.new_empty(num_slots * group_size) for _ in range(2))
    lowest, stop = torch.finfo(q.dtype).min, 0
    for batch in batches:
        q_rows = scratch.take_rows("q", q, batch.tokens)
        scores = _scores(q_rows, k_blocks, batch, softmax_scale, scratch)
        # A finite maximum keeps nan out of the rows of a tile that is not full.
        row_max = scores.amax(1, keepdim=True).clamp_min_(lowest)
        probs = scores.sub_(row_max).exp2_()
        rows = slice(stop, stop := stop + len(probs))
        maximum[rows], log_sum[rows] = row_max[:, 0], probs.sum(1).log2_()
        _times(probs, v_blocks, batch, partial[rows])

    # Each token's pairs, weighted by their share of its softmax: (tokens, block_counts, group_size).
    maximum, log_sum = (x.mul_(utils.LN_2).view(-1, group_size)[slots] for x in (maximum, log_sum))
    lse = (maximum + log_sum).masked_fill_(~pairs.counted[..., None], -torch.inf).logsumexp(1)
    # Of a token without pairs all weights are 0.
    shift = lse.masked_fill(lse.isneginf(), 0.0)[:, None]
    weights = maximum.sub_(shift).exp_().masked_fill_(~pairs.counted[..., None], 0.0)
    return _add_pairs(partial, slots, group_size, weights), lse


def _add_pairs(partial: Tensor, slots: Tensor, group_size: int, weights: Tensor) -> Tensor:
    """Weighted sum over each token's pairs: weights (tokens, block_counts, group_size) -> (tokens, group_size, D)."""
    rows = slots[..., None] * group_size + torch.arange(group_size, device=slots.device)
    rows, weights = (x.transpose(1, 2).flatten(0, 1).contiguous() for x in (rows, weights))
    total = F.embedding_bag(rows, partial.view(-1, partial.shape[-1]), per_sample_weights=weights, mode="sum")
    return total.view(slots.shape[0], group_size, -1)


def selection_backward(
    q: Tensor,
    k_blocks: Blocks,
    v_blocks: Blocks,
    block_indices: Tensor,
    do: Tensor,
    lse: Tensor,
    delta: Tensor,
    dk_blocks: Tensor,
    dv_blocks: Tensor,
    first: int,
    softmax_scale: float,
    scratch: Scratch,
    gate: Tensor | None = None,
) -> Tensor:
    """Gradients of ``gate * o``: returns dq like q, adds to dk_blocks and dv_blocks in place.

    Args:
        do: like q; lse, gate, delta: (tokens, group_size), delta the sum of o * do over head_dim.
    """
    group_size, head_dim = q.shape[1:]
    pairs = _sort_pairs(block_indices, first, k_blocks.size, len(k_blocks))
    if adds_at_once := utils.reading_is_free(q.device):
        batches, dq = _whole_runs(pairs, q, k_blocks.size, len(k_blocks), first), torch.zeros_like(q)
    else:
        batches, num_slots, slots = _equal_tiles(pairs, q, k_blocks.size, len(k_blocks), first)
        partial = scratch.take("partial", (num_slots * group_size, head_dim), q)
    q, lse, stop = q * softmax_scale, lse * utils.LOG2_E, 0  # q for scores, and with it for dk
    for batch in batches:
        q_rows, do_rows, lse_rows, delta_rows = (
            scratch.take_rows(name, x, batch.tokens)
            for name, x in (("q", q), ("do", do), ("lse", lse), ("delta", delta))
        )
        if batch.is_pair is not None:
            # Rows without a pair repeat token 0 of the chunk: an infinite lse makes their probabilities 0.
            lse_rows.view(-1, group_size).masked_fill_(~batch.is_pair[:, None], torch.inf)
        probs = _scores(q_rows, k_blocks, batch, 1.0, scratch).sub_(lse_rows).exp2_()
        dscores = _times(do_rows, v_blocks, batch, scratch.take("dscores", probs.shape, q), of_dims=True)
        if gate is not None:
            probs.mul_(scratch.take_rows("gate", gate, batch.tokens))
        _add_products_(dv_blocks, probs, do_rows, batch)
        dscores.sub_(delta_rows).mul_(probs)
        _add_products_(dk_blocks, dscores, q_rows, batch)
        if adds_at_once:  # in memory that is not needed any more
            dq.index_add_(0, batch.tokens, _times(dscores, k_blocks, batch, q_rows).view(-1, *q.shape[1:]))
        else:
            _times(dscores, k_blocks, batch, partial[stop : (stop := stop + len(dscores))])
    if adds_at_once:
        return dq.mul_(softmax_scale)
    weights = pairs.counted[..., None].to(q.dtype).mul_(softmax_scale).expand(-1, -1, group_size)
    return _add_pairs(partial, slots, group_size, weights)


class _SelectionFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, block_indices, lengths, block_size, softmax_scale):
        group_size = q.shape[1] // k.shape[1]
        acc = utils.accumulate_dtype(q.dtype)
        size = chunk_tokens(q.device, block_indices.shape[2], group_size, q.shape[2])
        scratch = Scratch()
        o = torch.empty_like(q, memory_format=torch.contiguous_format)
        lse = torch.empty(q.shape[:2], dtype=acc, device=q.device)

        def of_head(span: utils.Span, head: int) -> None:
            k_blocks, v_blocks = (Blocks(utils.kv_head(x, span, head), block_size) for x in (k, v))
            for chunk, first in utils.query_chunks(span, size):
                index = chunk, utils.head_slice(head, group_size)
                o[index], lse[index] = selection_forward(
                    q[index].to(acc), k_blocks, v_blocks, block_indices[chunk, head], first, softmax_scale, scratch
                )

        head_threads.for_each_head(of_head, q, k.shape[1], lengths)
        ctx.save_for_backward(q, k, v, block_indices, o, lse)
        ctx.args = lengths, block_size, softmax_scale
        ctx.mark_non_differentiable(lse)
        return o, lse

    @staticmethod
    @once_differentiable
    @utils.backward_without_autocast
    def backward(ctx, do, _dlse):
        q, k, v, block_indices, o, lse = ctx.saved_tensors
        lengths, block_size, softmax_scale = ctx.args
        group_size = q.shape[1] // k.shape[1]
        acc = utils.accumulate_dtype(q.dtype)
        size = chunk_tokens(q.device, block_indices.shape[2], group_size, q.shape[2])
        scratch = Scratch()
        dq, dk, dv = (torch.zeros_like(x, memory_format=torch.contiguous_format) for x in (q, k, v))

        def of_head(span: utils.Span, head: int) -> None:
            k_blocks, v_blocks = (Blocks(utils.kv_head(x, span, head), block_size) for x in (k, v))
            dk_blocks, dv_blocks = k_blocks.zeros(), v_blocks.zeros()
            for chunk, first in utils.query_chunks(span, size):
                index = chunk, utils.head_slice(head, group_size)
                do_chunk = do[index].to(acc)
                dq[index] = selection_backward(
                    q[index].to(acc), k_blocks, v_blocks, block_indices[chunk, head], do_chunk, lse[index],
                    (o[index] * do_chunk).sum(-1), dk_blocks, dv_blocks, first, softmax_scale, scratch,
                )  # fmt: skip
            dk[span.k_start : span.k_end, head] = dk_blocks.flatten(0, 1)[: span.num_keys]
            dv[span.k_start : span.k_end, head] = dv_blocks.flatten(0, 1)[: span.num_keys]

        head_threads.for_each_head(of_head, q, k.shape[1], lengths)
        return dq, dk, dv, None, None, None, None


def selection_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    block_indices: Tensor,
    cu_seqlens_q: Tensor | utils.SequenceLengths,
    cu_seqlens_k: Tensor | None = None,
    *,
    block_size: int = 64,
    softmax_scale: float | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Causal attention of every query over the tokens of its selected key blocks.

    Args:
        q: (total_q, num_heads, head_dim), fp16, bf16, fp32 or fp64.
        k, v: (total_k, num_kv_heads, head_dim), like q; query head h reads key/value head h // group_size.
        block_indices: (total_q, num_kv_heads, block_counts), int32 or int64, counted from the start of the sequence's
            keys, distinct within a token. Negative ones and blocks that start after the token are ignored.
        cu_seqlens_q, cu_seqlens_k: (batch + 1,), int32; k's defaults to q's. Or one `utils.SequenceLengths`.
        softmax_scale: defaults to head_dim**-0.5.
        backend: one of `utils.BACKENDS`.
    Returns:
        o: like q, 0 with zero gradient for a token without blocks.
        lse: (total_q, num_heads), fp32 (fp64 for fp64), natural log, -inf for a token without blocks; no gradient.
    Raises:
        ValueError: an argument has a wrong value, shape or dtype. ImportError: triton is not installed.
    """
    if torch.compiler.is_compiling():
        boundaries = operators.boundaries(cu_seqlens_q, cu_seqlens_k)
        return _operator(q, k, v, block_indices, *boundaries, block_size, softmax_scale, backend)
    lengths, softmax_scale, backend = utils.check_call(
        q, k, v, cu_seqlens_q, cu_seqlens_k, softmax_scale, backend, block_size=block_size
    )
    if block_indices.shape[:-1] != (q.shape[0], k.shape[1]) or block_indices.shape[-1] == 0:
        raise ValueError(
            f"block_indices must have shape (total_q, num_kv_heads, block_counts) = ({q.shape[0]}, {k.shape[1]}, >= 1),"
            f" got {tuple(block_indices.shape)}"
        )
    if block_indices.dtype not in (torch.int32, torch.int64) or block_indices.device != q.device:
        raise ValueError(
            f"block_indices must be int32 or int64 on {q.device}, got {block_indices.dtype} on {block_indices.device}"
        )
    with utils.no_autocast(q.device):
        if backend == "reference":
            return reference.selection_attention_ref(q, k, v, block_indices, lengths, block_size, softmax_scale)
        if backend == "triton":
            from . import triton_attention

            return triton_attention.selection_attention(q, k, v, block_indices, lengths, block_size, softmax_scale)
        return _SelectionFunction.apply(q, k, v, block_indices, lengths, block_size, softmax_scale)


_operator = operators.define_differentiable(
    "selection_attention",
    "Tensor q, Tensor k, Tensor v, Tensor block_indices, Tensor cu_seqlens_q, Tensor cu_seqlens_k, int block_size, "
    "float? softmax_scale, str backend",
    "(Tensor, Tensor)",
    lambda *args: selection_attention(*args[:6], block_size=args[6], softmax_scale=args[7], backend=args[8]),
    operators.fake_branch,
    num_inputs=3,
)
