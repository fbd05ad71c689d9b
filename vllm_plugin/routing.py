"""Which rows of a step are vision rows, which keys they see, and which runs of text rows lie between them.

A step of vLLM is a batch of requests, packed one after another, of which each brings some new tokens: a prompt, a part
of one (chunked prefill, or what the prefix cache did not have), or one generated token. Vision rows attend to the
vision tokens of their request alone, old and new; text rows to everything before them. Nothing here knows vLLM.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch

from .videonsa import SequenceLengths


class VisionFlags:
    """Which slots of the paged cache hold a vision token: written with the keys, read when later tokens need them.

    Args:
        num_slots: of the cache, over all its blocks.
        block_size: slots of a block.
    """

    def __init__(self, num_slots: int, block_size: int, device: torch.device | str):
        # One more, which no key has: padding is given slot -1.
        self.flags = torch.zeros(num_slots + 1, dtype=torch.bool, device=device)
        self.block_size = block_size

    def write(self, slots: torch.Tensor, is_vision: torch.Tensor | None) -> None:
        """Say of new tokens what they are.

        Args:
            slots: (rows,), on the device; -1 for padding.
            is_vision: (rows,) bool on the host; `None` where all are text, which sends nothing to the device.
        """
        if is_vision is None:
            self.flags.index_fill_(0, slots.long(), False)
        else:
            self.flags[slots] = is_vision.to(self.flags.device, non_blocking=True)

    def slots(self, blocks: torch.Tensor, num_tokens: int) -> torch.Tensor:
        """The slots of a request's first tokens, (num_tokens,); blocks: (blocks,), its row of the block table."""
        positions = torch.arange(num_tokens, device=blocks.device)
        return blocks[positions // self.block_size].long() * self.block_size + positions % self.block_size


@dataclass(frozen=True)
class TextRun:
    """Consecutive text rows of one request: the last of them sees the request's first `num_keys` tokens, causally."""

    request: int
    num_rows: int
    num_keys: int


@dataclass(frozen=True)
class Routing:
    """A step with new vision tokens.

    Attributes:
        vision_rows: (total_q,), on the device, ordered by request.
        lengths: the requests' boundaries among vision rows and vision keys.
        vision_slots: (total_k,), where all their vision keys are in the cache; `None` where those are the vision rows'.
        text_rows: (rows,), on the device, in the order of `text_runs`.
        text_runs: the text rows.
    """

    vision_rows: torch.Tensor
    lengths: SequenceLengths
    vision_slots: torch.Tensor | None
    text_rows: torch.Tensor
    text_runs: tuple[TextRun, ...]

    @classmethod
    def build(
        cls,
        is_vision: torch.Tensor,
        starts: Sequence[int],
        num_keys: Sequence[int],
        block_table: torch.Tensor,
        flags: VisionFlags,
    ) -> "Routing | None":
        """Route a step; `None` where no vision token is new.

        The device is read at most once, and only where a request with new vision tokens has cached ones.

        Args:
            is_vision: (rows,) bool on the host.
            starts: (requests + 1), the rows at which requests begin, and the end of the last.
            num_keys: (requests,), tokens of each, the new ones included.
            block_table: (requests, blocks), on the device.
            flags: of the cached tokens; those of the new ones are not read.
        """
        if not is_vision.any():
            return None
        device = block_table.device
        rows_of = [slice(*ends) for ends in pairwise(starts)]
        new = [is_vision[rows].nonzero().squeeze(-1) for rows in rows_of]  # offsets into each request's rows
        past = [total - (rows.stop - rows.start) for total, rows in zip(num_keys, rows_of, strict=True)]
        asked = [request for request, offsets in enumerate(new) if len(offsets)]
        cached = _cached_vision([(block_table[request], past[request]) for request in asked], flags)

        slots = None
        if any(map(len, cached)):
            slots = []
            for request, old in zip(asked, cached, strict=True):
                whole = flags.slots(block_table[request], num_keys[request])
                slots += [whole[old.to(device)], whole[(new[request] + past[request]).to(device)]]
            slots = torch.cat(slots)
        lengths_q = [len(new[request]) for request in asked]
        lengths_k = [len(old) + count for old, count in zip(cached, lengths_q, strict=True)]
        end = starts[-1]
        return cls(
            vision_rows=is_vision[:end].nonzero().squeeze(-1).to(device),
            lengths=SequenceLengths.from_lengths(lengths_q, lengths_k, device=device),
            vision_slots=slots,
            text_rows=(~is_vision[:end]).nonzero().squeeze(-1).to(device),
            text_runs=tuple(
                TextRun(request, len(run), past[request] + int(run[-1]) + 1)
                for request, rows in enumerate(rows_of)
                for run in _runs((~is_vision[rows]).nonzero().squeeze(-1))
            ),
        )


def _cached_vision(requests: Sequence[tuple[torch.Tensor, int]], flags: VisionFlags) -> list[torch.Tensor]:
    """Of each request, given by its blocks and the number of its cached tokens, where its vision tokens are: on the
    host, positions among the cached ones."""
    counts = [past for _, past in requests]
    if not sum(counts):
        return [torch.empty(0, dtype=torch.long)] * len(counts)
    slots = torch.cat([flags.slots(blocks, past) for blocks, past in requests])
    return [part.nonzero().squeeze(-1) for part in flags.flags[slots].cpu().split(counts)]


def _runs(rows: torch.Tensor) -> Sequence[torch.Tensor]:
    """Ascending numbers, cut where one is left out."""
    if not len(rows):
        return ()
    return torch.tensor_split(rows, (rows.diff() > 1).nonzero().squeeze(-1) + 1)
