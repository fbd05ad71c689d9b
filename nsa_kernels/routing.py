"""Which rows of a forward call are vision rows, which are text rows, and which keys each may see."""

from dataclasses import dataclass, fields, replace

import torch

from . import utils


@dataclass
class TextRun:
    """Consecutive text rows of one sample: rows `start` to `stop` see the sample's first `num_keys` keys, causally."""

    sample: int
    start: int
    stop: int
    num_keys: int
    # Where the sample's keys are in the cache: a slice, or an index tensor where padding lies between them.
    keys: slice | torch.Tensor


@dataclass
class VisionRouting:
    """Which rows of a forward call are vision rows, which are text rows, and what each may see.

    Built once per forward call and handed to every layer. "Rows" are the call's new tokens (`q_len` of them), "keys"
    the cached and the new ones (`past + q_len`).

    Attributes:
        vision_rows: (sample, row) index tensors of the new vision tokens, (total_q,) each, ordered by sample.
        vision_keys: (sample, key) index tensors of all vision tokens of the samples, (total_k,) each.
        lengths: the samples' boundaries in the two.
        text_runs: the text rows.
        text_rows: (sample, row) index tensors of the text rows, in the order of `text_runs`.
    """

    vision_rows: tuple[torch.Tensor, torch.Tensor]
    vision_keys: tuple[torch.Tensor, torch.Tensor]
    lengths: utils.SequenceLengths
    text_rows: tuple[torch.Tensor, torch.Tensor]
    text_runs: list[TextRun]

    @classmethod
    def build(cls, token_types: torch.Tensor, attention_mask: torch.Tensor | None, past: int) -> "VisionRouting | None":
        """Route the new tokens; `None` where no vision token is among them.

        Args:
            token_types: (batch, past + q_len); 0 text, 1 image, 2 video.
            attention_mask: (batch, past + q_len), nonzero for tokens that take part; all do where it is `None`.
            past: number of cached tokens.
        """
        device = token_types.device
        # One transfer to the host; everything below is arithmetic there, and the results go back in `.to(device)`.
        is_valid = torch.ones_like(token_types) if attention_mask is None else attention_mask
        token_types, is_valid = torch.stack([token_types, is_valid.to(token_types.dtype)]).cpu()
        is_valid = is_valid.bool()
        is_vision = (token_types != 0) & is_valid
        if not is_vision[:, past:].any():
            return None

        text_runs = []
        for sample, (valid, vision) in enumerate(zip(is_valid, is_vision, strict=True)):
            positions = valid.nonzero().squeeze(-1)
            if len(positions) and len(positions) == positions[-1] - positions[0] + 1:
                keys = slice(int(positions[0]), int(positions[-1]) + 1)
            else:
                keys = positions
            seen = valid.cumsum(0)
            rows = (valid & ~vision)[past:].nonzero().squeeze(-1)  # [num_text_rows]
            if len(rows):
                for run in torch.tensor_split(rows, (rows.diff() > 1).nonzero().squeeze(-1) + 1):
                    start, stop = int(run[0]), int(run[-1]) + 1
                    text_runs.append(TextRun(sample, start, stop, int(seen[past + stop - 1]), keys))
        return cls(
            vision_rows=is_vision[:, past:].nonzero(as_tuple=True),
            vision_keys=is_vision.nonzero(as_tuple=True),
            lengths=utils.SequenceLengths.from_lengths(
                is_vision[:, past:].sum(-1).tolist(), is_vision.sum(-1).tolist()
            ),
            text_rows=(is_valid & ~is_vision)[:, past:].nonzero(as_tuple=True),
            text_runs=text_runs,
        ).to(device)

    def to(self, device: torch.device, non_blocking: bool = False) -> "VisionRouting":
        """A copy on `device`. accelerate calls this for layers that live on another device than their inputs."""

        def move(value):
            if isinstance(value, torch.Tensor):
                return value.to(device, non_blocking=non_blocking)
            if isinstance(value, tuple):
                return tuple(map(move, value))
            if isinstance(value, list):
                return [move(item) for item in value]
            if isinstance(value, TextRun):
                return replace(value, keys=move(value.keys))
            if isinstance(value, utils.SequenceLengths):
                return replace(value, cu_seqlens_q=move(value.cu_seqlens_q), cu_seqlens_k=move(value.cu_seqlens_k))
            return value

        return replace(self, **{field.name: move(getattr(self, field.name)) for field in fields(self)})
