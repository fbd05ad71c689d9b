"""Selection branch: causal attention over the tokens of the selected key blocks (torch backend).

    o[t,h] = softmax attention of q[t,h] over { s <= t : s // B in block_indices[t, h // R] }

Native Sparse Attention (arXiv:2502.11089), equations 11 and 12.

Fetching 2 * B rows of k and v for every (token, block) pair is bound by memory, so the loop runs the other way round.
For a chunk of query tokens and one key/value head, the pairs are sorted by block and cut into tiles of a few tokens
that all selected the same block. A batched product of tiles with their blocks gives, per pair and query head, an
unnormalised output and its softmax state (maximum, sum); a weighted gather then adds up the pairs of each token.
Every shape is known beforehand on a GPU, so nothing waits for it, and every sum has a fixed order.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import dense, operators, reference, utils

# Outputs of the pairs of one chunk of tokens: 256 MB in float32.
_PARTIAL_ELEMENTS = 1 << 26
# Up to so many times the keys that are selected, scores for all keys are faster than gathering.
MASKED_BLOCKS = 2
# Query tokens that `selection_forward_masked` takes at a time.
_MASKED_TOKENS = 256


class _Tiles(NamedTuple):
    """Pairs of (token, block) of a chunk, sorted by block and cut into tiles of one block each."""

    tokens: Tensor  # (tiles, tile_size): token of each pair, 0 where a tile is not full
    inside: Tensor  # (tiles, tile_size), bool: False where a tile is not full
    blocks: Tensor  # (tiles,): key block of each tile
    slots: Tensor  # (tokens, block_counts): where a pair, or one of its token that counts, lies in tokens.flatten()
    counted: Tensor  # (tokens, block_counts), bool: pairs that count
    first_own: int  # tiles before this one hold no pair of a token and its own block, so they need no causal mask


class Scratch:
    """Memory that is reused from one use to the next: fresh pages cost as much as the arithmetic."""

    def __init__(self) -> None:
        self._buffers: dict[str, Tensor] = {}

    def take(self, name: str, shape: tuple[int, ...], like: Tensor) -> Tensor:
        """An uninitialised tensor with the dtype and device of ``like``; valid until the next call with this name."""
        numel = torch.Size(shape).numel()
        if name not in self._buffers or self._buffers[name].numel() < numel:
            self._buffers.pop(name, None)  # freed before the larger one is allocated
            self._buffers[name] = like.new_empty(numel * 5 // 4)  # the next one is often a little larger
        return self._buffers[name][:numel].view(shape)

    def take_rows(self, name: str, x: Tensor, rows: Tensor) -> Tensor:
        """x[rows], in such memory."""
        return torch.index_select(x, 0, rows, out=self.take(name, (len(rows), *x.shape[1:]), x))


def chunk_tokens(block_counts: int, group_size: int, head_dim: int) -> int:
    """Query tokens per chunk, so that the outputs of their pairs stay within a fixed size."""
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

    def fetch(self, blocks: Tensor, scratch: Scratch, name: str) -> Tensor:
        """(tiles,) -> (tiles, size, head_dim) in the scratch's memory, of the blocks of `_Tiles`."""
        if not len(self.whole):
            return scratch.take_rows(name, self.last, blocks)
        num_whole = len(self.whole)
        if not len(self.last) or (utils.reading_is_free(blocks.device) and blocks[-1] < num_whole):  # the last is last
            return scratch.take_rows(name, self.whole, blocks)
        taken = scratch.take_rows(name, self.whole, blocks.clamp(max=num_whole - 1))
        return torch.where((blocks == num_whole)[:, None, None], self.last, taken, out=taken)


def _make_tiles(block_indices: Tensor, first: int, block_size: int, num_blocks: int) -> _Tiles:
    tokens, block_counts = block_indices.shape
    device, pairs = block_indices.device, block_indices.numel()
    own = torch.arange(first, first + tokens, device=device)[:, None] // block_size
    counted = (block_indices >= 0) & (block_indices <= own)
    # Runs of equal key: one per block, then one per own block, then the pairs that do not count.
    key = torch.where(block_indices == own, block_indices + num_blocks, block_indices)
    key = key.masked_fill(~counted, 2 * num_blocks).flatten()
    key, order = key.sort(stable=True)
    run_start = torch.searchsorted(key, torch.arange(2 * num_blocks + 1, device=device, dtype=key.dtype))
    run_length = run_start.diff()
    # Half-empty tiles waste work and small ones waste bandwidth: take about a quarter of the average run.
    tile_size = min(32, max(4, pairs // (4 * num_blocks)))
    run_tiles = (run_length + tile_size - 1) // tile_size
    tile_end = run_tiles.cumsum(0)
    tile_start = tile_end - run_tiles
    if utils.reading_is_free(device):
        num_tiles, first_own = max(1, int(tile_end[-1])), int(tile_end[num_blocks - 1])
    else:  # an upper bound, because asking for the number would wait for the device
        num_tiles, first_own = pairs // tile_size + min(2 * num_blocks, pairs), 0
    tile = torch.arange(num_tiles, device=device)
    run = torch.searchsorted(tile_end, tile, right=True).clamp_max_(2 * num_blocks - 1)
    sorted_pair = (run_start[run] + (tile - tile_start[run]) * tile_size)[:, None]
    sorted_pair = sorted_pair + torch.arange(tile_size, device=device)
    inside = sorted_pair < run_start[run + 1][:, None]
    tile_tokens = (order[sorted_pair.clamp_max_(pairs - 1)] // block_counts).masked_fill_(~inside, 0)
    pair_run = key.clamp_max(2 * num_blocks - 1).long()
    slot = tile_start[pair_run] * tile_size + torch.arange(pairs, device=device) - run_start[pair_run]
    slots = torch.empty_like(slot).scatter_(0, order, slot).view(tokens, block_counts).masked_fill_(~counted, 0)
    # A pair that does not count stands for one of the same token that does: its weight is 0, and 0 times nan is nan.
    slots = torch.where(counted, slots, slots.gather(1, counted.int().argmax(1, keepdim=True)))
    return _Tiles(tile_tokens, inside, run % num_blocks, slots, counted, first_own)


def _gather_rows(x: Tensor, rows: Tensor, scratch: Scratch, name: str) -> Tensor:
    """x (tokens, group_size[, dim]), rows (tiles, tile_size) -> (tiles, tile_size * group_size, dim or 1)."""
    return scratch.take_rows(name, x, rows.flatten()).view(rows.shape[0], rows.shape[1] * x.shape[1], -1)


def _batches(q: Tensor, k_blocks: Blocks, tiles: _Tiles, first: int):
    """Batches of (slice of tiles, rows (tiles, tile_size), mask to add to their scores or None).

    The mask (.., tile_size, 1, B) hides keys after the row from it, in tiles of rows and their own block.
    """
    _, group_size, head_dim = q.shape
    num_tiles, tile_size = tiles.tokens.shape
    step = utils.tile_tokens(tile_size * group_size * (head_dim + k_blocks.size), q.device)
    offset = torch.arange(k_blocks.size, device=q.device)
    for start in range(0, num_tiles, step):
        batch = slice(start, min(start + step, num_tiles))
        rows, mask = tiles.tokens[batch], None
        if batch.stop > tiles.first_own:
            key = tiles.blocks[batch, None] * k_blocks.size + offset
            hidden = key[:, None] > (rows + first)[:, :, None]
            mask = q.new_zeros(hidden.shape).masked_fill_(hidden, -torch.inf)[:, :, None]
        yield batch, rows, mask


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
    group_size, head_dim = q.shape[1:]
    tiles = _make_tiles(block_indices, first, k_blocks.size, len(k_blocks))
    num_tiles, tile_size = tiles.tokens.shape
    partial = scratch.take("partial", (num_tiles, tile_size * group_size, head_dim), q)
    partial_lse = q.new_empty(num_tiles, tile_size * group_size)
    for batch, rows, mask in _batches(q, k_blocks, tiles, first):
        blocks = tiles.blocks[batch]
        if mask is not None:
            mask = mask.expand(-1, -1, group_size, -1).flatten(1, 2)[:, None]
        o, lse = dense.attend(
            _gather_rows(q, rows, scratch, "q")[:, None],
            k_blocks.fetch(blocks, scratch, "k")[:, None],
            v_blocks.fetch(blocks, scratch, "v")[:, None],
            softmax_scale,
            mask,
        )
        partial[batch], partial_lse[batch] = o[:, 0], lse[:, 0]

    # Each token's pairs, weighted by their share of its softmax: (tokens, block_counts, group_size).
    weights = partial_lse.view(-1, group_size)[tiles.slots].masked_fill_(~tiles.counted[..., None], -torch.inf)
    lse = weights.logsumexp(1)
    # Of a token without pairs all weights are exp(-inf - 0).
    weights.sub_(lse.masked_fill(lse.isneginf(), 0.0)[:, None]).exp_()
    return _add_pairs(partial, tiles.slots, group_size, weights), lse


def selection_forward_masked(
    q: Tensor, k: Tensor, v: Tensor, block_indices: Tensor, first: int, block_size: int, softmax_scale: float
) -> tuple[Tensor, Tensor]:
    """The same with scores for all keys, which is faster where most blocks are selected; every token needs a block.

    Args:
        k, v: (num_keys, head_dim).
    """
    tokens, step = q.shape[0], _MASKED_TOKENS
    if not dense.is_fused(q):
        step = min(step, utils.tile_tokens(q.shape[1] * (first + tokens), q.device))
    o, lse = torch.empty_like(q), q.new_empty(q.shape[:2])
    for start in range(0, tokens, step):
        rows = slice(start, min(start + step, tokens))
        keys = slice(first + rows.stop)
        num_blocks = -(-keys.stop // block_size)
        blocks = block_indices[rows].long()
        blocks = blocks.masked_fill((blocks < 0) | (blocks > num_blocks), num_blocks)  # a column that is not looked at
        is_chosen = blocks.new_zeros(len(blocks), num_blocks + 1, dtype=torch.bool).scatter_(1, blocks, True)
        position = torch.arange(first + start, keys.stop, device=q.device)
        is_seen = is_chosen.repeat_interleave(block_size, 1)[:, : keys.stop]
        is_seen &= torch.arange(keys.stop, device=q.device) <= position[:, None]
        mask = torch.where(is_seen, 0.0, -torch.inf).to(q.dtype)
        o_rows, lse_rows = dense.attend(
            q[rows].transpose(0, 1)[None], k[None, None, keys], v[None, None, keys], softmax_scale, mask
        )
        o[rows], lse[rows] = o_rows[0].transpose(0, 1), lse_rows[0].T
    return o, lse


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
    tiles = _make_tiles(block_indices, first, k_blocks.size, len(k_blocks))
    num_tiles, tile_size = tiles.tokens.shape
    partial = scratch.take("partial", (num_tiles, tile_size * group_size, head_dim), q)
    for batch, rows, mask in _batches(q, k_blocks, tiles, first):
        blocks, q_rows = tiles.blocks[batch], _gather_rows(q, rows, scratch, "q")
        k_rows, v_rows = k_blocks.fetch(blocks, scratch, "k"), v_blocks.fetch(blocks, scratch, "v")
        scores = (q_rows @ k_rows.mT).mul_(softmax_scale)
        if mask is not None:
            scores.view(*rows.shape, group_size, -1).add_(mask)
        # Rows without a pair repeat token 0 of the chunk: an infinite lse makes their probabilities 0.
        lse_rows = (
            _gather_rows(lse, rows, scratch, "lse")
            .view(*rows.shape, -1)
            .masked_fill(~tiles.inside[batch, :, None], torch.inf)
        )
        probs = scores.sub_(lse_rows.view(len(rows), -1, 1)).exp_()
        do_rows = _gather_rows(do, rows, scratch, "do")
        dscores = do_rows @ v_rows.mT
        if gate is not None:
            probs.mul_(_gather_rows(gate, rows, scratch, "gate"))
        utils.add_rows_(dv_blocks, blocks, probs.mT @ do_rows)
        dscores = dscores.sub_(_gather_rows(delta, rows, scratch, "delta")).mul_(probs).mul_(softmax_scale)
        utils.add_rows_(dk_blocks, blocks, dscores.mT @ q_rows)
        torch.bmm(dscores, k_rows, out=partial[batch])
    weights = tiles.counted[..., None].expand(-1, -1, group_size).to(q.dtype)
    return _add_pairs(partial, tiles.slots, group_size, weights)


class _SelectionFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, block_indices, lengths, block_size, softmax_scale):
        group_size = q.shape[1] // k.shape[1]
        acc = utils.accumulate_dtype(q.dtype)
        size, scratch = chunk_tokens(block_indices.shape[2], group_size, q.shape[2]), Scratch()
        o = torch.empty_like(q, memory_format=torch.contiguous_format)
        lse = torch.empty(q.shape[:2], dtype=acc, device=q.device)
        for span in lengths.spans():
            for head in range(k.shape[1]):
                k_blocks, v_blocks = (Blocks(utils.kv_head(x, span, head), block_size) for x in (k, v))
                for chunk, first in utils.query_chunks(span, size):
                    index = chunk, utils.head_slice(head, group_size)
                    o[index], lse[index] = selection_forward(
                        q[index].to(acc), k_blocks, v_blocks, block_indices[chunk, head],
                        first, softmax_scale, scratch,
                    )  # fmt: skip
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
        size, scratch = chunk_tokens(block_indices.shape[2], group_size, q.shape[2]), Scratch()
        dq, dk, dv = (torch.zeros_like(x, memory_format=torch.contiguous_format) for x in (q, k, v))
        for span in lengths.spans():
            for head in range(k.shape[1]):
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
