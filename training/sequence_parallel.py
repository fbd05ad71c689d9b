"""Sequence parallelism for VideoNSA, after DeepSpeed-Ulysses (arXiv 2309.14509).

The ranks of a group hold the same batch. Each keeps an equal, contiguous share of every row's tokens, and does all that
works token by token (embeddings, norms, projections, MLPs, loss) on its share. Before attention an all-to-all trades
tokens for heads, so that each rank attends over whole sequences with its share of the heads; another trades back. The
gates are made from a token's own hidden state and travel with the queries. Block choice sums over the query heads of
one key/value head, so a key/value head is never split: **the group size must divide the number of key/value heads** (4
of the 7B model, 2 of the 3B).

The vision tower attends within one temporal step of a video, so the steps are shared out too, and what comes out of it
is gathered.

accelerate's own context parallelism cannot carry this attention: `cp` is ring attention inside one call of
`scaled_dot_product_attention`, and `sp` is DeepSpeed's exchange around transformers' attention functions, which sparse
branches do not go through, for models without a vision tower.
"""

from functools import partial
from itertools import pairwise

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from routing_videonsa import VisionRouting, sample_starts


class SequenceParallel:
    """A group of ranks that share the tokens of a batch; consecutive ranks form a group.

    Args:
        size: ranks in a group.
    Raises:
        ValueError: the group size does not divide the number of processes.
    """

    def __init__(self, size: int):
        world = dist.get_world_size() if dist.is_initialized() else 1
        if size < 1 or world % size:
            raise ValueError(f"`sequence_parallel_size` must divide the number of processes ({world}), got {size}")
        self.size, self.rank = size, dist.get_rank() % size
        for start in range(0, world, size):
            ranks = list(range(start, start + size))
            group = dist.new_group(ranks)
            if dist.get_rank() in ranks:
                self.group = group
        self._vision_rows = None  # those of the current batch that are here: (sample, local row)
        self._patches = None  # patches that each rank's part of the vision tower gets

    def attach(self, model) -> None:
        """Make a `VideoNSAForConditionalGeneration`, or one with adapters, run on shares of its input.

        It is then called with whole batches and returns the logits of its share: see `share`.

        Raises:
            ValueError: the group size does not divide the number of key/value heads.
        """
        config = model.config.text_config
        if config.num_key_value_heads % self.size:
            raise ValueError(
                f"`sequence_parallel_size` = {self.size} must divide the {config.num_key_value_heads} key/value heads"
            )
        core = next(module for module in model.modules() if hasattr(module, "language_model"))
        core.language_model.register_forward_pre_hook(self._share_inputs, with_kwargs=True)
        core.visual.register_forward_pre_hook(self._share_steps, with_kwargs=True)
        core.visual.register_forward_hook(self._gather_steps)
        for layer in core.language_model.layers:
            layer.self_attn._attend = partial(self._attend, layer.self_attn)

    def share(self, x: Tensor, dim: int = 1, fill: float = 0) -> Tensor:
        """This rank's share of a tensor's tokens; the last share is completed with `fill`."""
        length = -(-x.shape[dim] // self.size)
        missing = length * self.size - x.shape[dim]
        x = F.pad(x, (0, 0) * (x.ndim - 1 - dim) + (0, missing), value=fill) if missing else x
        return x.narrow(dim, self.rank * length, length)

    def sum(self, x: Tensor) -> Tensor:
        """Sum over the group, without gradient."""
        x = x.clone()
        dist.all_reduce(x, group=self.group)
        return x

    def _share_inputs(self, language_model, args, kwargs):
        """Before the language model: whole rows in, this rank's share of the tokens on."""
        embeds, position_ids, routing = (kwargs[name] for name in ("inputs_embeds", "position_ids", "vision_routing"))
        if position_ids is None:
            raise ValueError("`position_ids` are needed with sequence parallelism where there is no image or video")
        if routing is None:  # dense mode, or text alone: every token is a text row
            mask = kwargs["attention_mask"]
            starts = sample_starts(position_ids) if mask is None else None
            types = torch.zeros(embeds.shape[:2], dtype=torch.long, device=embeds.device)
            routing = VisionRouting.build(types, mask, 0, starts, needs_vision=False)
        is_vision = torch.zeros(embeds.shape[:2], dtype=torch.bool, device=embeds.device)
        is_vision[routing.vision_rows] = True
        self._vision_rows = self.share(is_vision).nonzero(as_tuple=True)
        return args, {
            **kwargs,
            "inputs_embeds": self.share(embeds),
            "position_ids": self.share(position_ids[-3:], dim=2),
            "attention_mask": None,
            "vision_routing": routing,
        }

    def _attend(self, attention, hidden_states: Tensor, query: Tensor, key: Tensor, value: Tensor, routing, **kwargs):
        """In place of `VideoNSAAttention._attend`: shares of tokens in and out, shares of heads between."""
        gates = torch.sigmoid(attention._gate_logits(hidden_states[self._vision_rows]))
        all_gates = gates.new_zeros(*hidden_states.shape[:2], *gates.shape[1:])  # [batch, share, num_heads, 3]
        all_gates = all_gates.index_put(self._vision_rows, gates).transpose(1, 2)
        query, key, value = self._to_heads(query, key, value)
        gates = self._to_heads(all_gates)[0].transpose(1, 2)[routing.vision_rows]
        output = attention._attend_rows(query, key, value, gates, routing, **kwargs)
        return self._to_tokens(output)

    def _to_heads(self, *states: Tensor) -> list[Tensor]:
        """(batch, heads, share, dim) each -> (batch, heads / size, tokens, dim), in one exchange."""
        # [size, batch, heads / size, share, dim]: the first dimension is where to
        parts = [x.unflatten(1, (self.size, -1)).movedim(1, 0) for x in states]
        heads = [part.shape[2] for part in parts]
        received = _AllToAll.apply(torch.cat(parts, dim=2), self.group)
        # ... and now where from: the place of the tokens
        return [part.movedim(0, 2).flatten(2, 3) for part in received.split(heads, dim=2)]

    def _to_tokens(self, output: Tensor) -> Tensor:
        """(batch, tokens, heads / size, dim) -> (batch, share, heads, dim)."""
        received = _AllToAll.apply(output.unflatten(1, (self.size, -1)).movedim(1, 0), self.group)
        return received.movedim(0, 2).flatten(2, 3)

    def _share_steps(self, visual, args, kwargs):
        """Before the vision tower: the patches of this rank's temporal steps, of all images and videos together."""
        (pixels,), grid = args, kwargs["grid_thw"]
        steps = [(index, height * width) for index, (t, height, width) in enumerate(grid.tolist()) for _ in range(t)]
        if len(steps) < self.size:  # too few to share: every rank sees them all, and there is nothing to gather
            self._patches = None
            return None
        bounds = [round(rank * len(steps) / self.size) for rank in range(self.size + 1)]
        self._patches = [sum(n for _, n in steps[a:b]) for a, b in pairwise(bounds)]
        first = sum(self._patches[: self.rank])
        mine = torch.tensor([index for index, _ in steps[bounds[self.rank] : bounds[self.rank + 1]]])
        index, counts = mine.unique_consecutive(return_counts=True)
        mine = grid[index.to(grid.device)].clone()
        mine[:, 0] = counts.to(grid)
        return (pixels[first : first + self._patches[self.rank]],), {**kwargs, "grid_thw": mine}

    def _gather_steps(self, visual, args, output):
        """After the vision tower: the embeddings of all steps, on every rank."""
        if self._patches is not None:
            counts = [n // visual.spatial_merge_size**2 for n in self._patches]
            output.pooler_output = _GatherRows.apply(output.pooler_output, counts, self.rank, self.group)
        return output


class _AllToAll(torch.autograd.Function):
    """Sends x[i] to rank i; the result's [i] comes from rank i."""

    @staticmethod
    def forward(ctx, x, group):
        ctx.group = group
        return _all_to_all(x, group)

    @staticmethod
    def backward(ctx, grad):
        return _all_to_all(grad, ctx.group), None


def _all_to_all(x: Tensor, group) -> Tensor:
    x = x.contiguous()
    received = torch.empty_like(x)
    dist.all_to_all_single(received, x, group=group)
    return received


class _GatherRows(torch.autograd.Function):
    """(counts[rank], dim) of every rank, one after another; gradients are summed over the ranks."""

    @staticmethod
    def forward(ctx, rows, counts, rank, group):
        ctx.counts, ctx.rank, ctx.group = counts, rank, group
        most = max(counts)
        padded = F.pad(rows, (0, 0, 0, most - len(rows)))
        gathered = rows.new_empty(len(counts) * most, rows.shape[1])
        dist.all_gather_into_tensor(gathered, padded, group=group)
        return torch.cat([part[:count] for part, count in zip(gathered.split(most), counts, strict=True)])

    @staticmethod
    def backward(ctx, grad):
        most = max(ctx.counts)
        padded = torch.cat([F.pad(part, (0, 0, 0, most - len(part))) for part in grad.split(ctx.counts)])
        mine = grad.new_empty(most, grad.shape[1])
        dist.reduce_scatter_tensor(mine, padded, group=ctx.group)
        return mine[: ctx.counts[ctx.rank]], None, None, None
