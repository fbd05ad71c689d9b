"""From a manifest to batches: decoding, labels, the order of samples, packing.

The order depends on the seed and the epoch alone, so that a resumed run sees what it would have seen.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader, Dataset, Sampler

from positions_videonsa import mrope_position_ids

from .manifest import DataOptions, Manifest

IGNORE_INDEX = -100
# Samples in a row that may fail to decode before it must be the storage that fails.
MAX_FAILURES_IN_A_ROW = 16
# How many packs are kept open while samples are put into the first that has room.
_OPEN_PACKS = 64
# Batches whose samples are sorted by length together.
_BATCHES_PER_BUCKET = 64


class VideoDataset(Dataset):
    """Samples of a manifest, decoded when asked for.

    A sample that cannot be decoded is replaced by the next shorter one that can, and reported with it, so that every
    step has its batch and no batch outgrows its memory.

    Args:
        processor: a `VideoNSAProcessor`.
    Raises:
        RuntimeError: `MAX_FAILURES_IN_A_ROW` samples could not be decoded.
    """

    def __init__(self, manifest: Manifest, processor, options: DataOptions):
        self.manifest, self.processor, self.options = manifest, processor, options
        self.by_length = np.argsort(manifest.tokens, kind="stable")
        self.rank = np.argsort(self.by_length)

    def __len__(self) -> int:
        return len(self.manifest)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """A sample: `input_ids`, `labels` and `mm_token_type_ids` (tokens,), the video tensors, `index`, `failures`."""
        failures = {}
        for candidate in self._candidates(index):
            try:
                return {**self.load(candidate), "index": candidate, "failures": failures}
            except Exception as error:  # whatever it is, it must not end the run; the share of failures is watched
                failures[candidate] = f"{self.manifest[candidate].id}: {type(error).__name__}: {error}"
        raise RuntimeError(
            f"{len(failures)} samples in a row could not be decoded; is the storage there? {list(failures.values())}"
        )

    def _candidates(self, index: int) -> list[int]:
        """The sample, then shorter ones, then longer ones."""
        rank = int(self.rank[index])
        order = [*range(rank, -1, -1), *range(rank + 1, min(len(self), rank + MAX_FAILURES_IN_A_ROW))]
        return [int(self.by_length[place]) for place in order[:MAX_FAILURES_IN_A_ROW]]

    def load(self, index: int) -> dict[str, Any]:
        """As `__getitem__`, without a replacement.

        Raises:
            ValueError: a video cannot be decoded or has changed since the manifest was made.
        """
        inputs = self.processor.apply_chat_template(
            self.manifest[index].messages,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            **self.options.processor_options(),
        )
        length = inputs["input_ids"].shape[1]
        if length != self.manifest.tokens[index]:
            raise ValueError(
                f"{length} tokens where the manifest has {self.manifest.tokens[index]}: a video has changed"
            )
        sample = {name: inputs[name][0] for name in ("input_ids", "mm_token_type_ids")}
        sample |= {name: inputs[name] for name in ("pixel_values_videos", "video_grid_thw")}
        sample["second_per_grid_ts"] = torch.as_tensor(inputs["second_per_grid_ts"], dtype=torch.float32)
        sample["labels"] = answer_labels(sample["input_ids"], self.processor.tokenizer)
        return sample


def answer_labels(input_ids: torch.Tensor, tokenizer) -> torch.Tensor:
    """Labels that score the assistant's messages, each with the token that ends it, and nothing else.

    Args:
        input_ids: (tokens,), a conversation in the chat format of Qwen2.5-VL.
    Returns:
        (tokens,): the input where it is scored, `IGNORE_INDEX` elsewhere; not yet shifted.
    Raises:
        ValueError: no such message, or one without an end.
    """
    header = torch.tensor(tokenizer.encode("<|im_start|>assistant\n", add_special_tokens=False))
    (end,) = tokenizer.encode("<|im_end|>", add_special_tokens=False)
    labels = torch.full_like(input_ids, IGNORE_INDEX)
    windows = (
        input_ids.unfold(0, len(header), 1) if len(input_ids) >= len(header) else input_ids.new_empty(0, len(header))
    )
    for start in ((windows == header).all(-1).nonzero().squeeze(-1) + len(header)).tolist():
        stops = (input_ids[start:] == end).nonzero()
        if not len(stops):
            raise ValueError("an answer without <|im_end|>: the chat template is not that of Qwen2.5-VL")
        stop = start + int(stops[0]) + 1
        labels[start:stop] = input_ids[start:stop]
    if not (labels != IGNORE_INDEX).any():
        raise ValueError("no <|im_start|>assistant in a conversation: the chat template is not that of Qwen2.5-VL")
    return labels


class Collator:
    """Samples to the inputs of the model.

    As rows of a batch, padded on the right; or, packed, one after another in a single row without padding, where text
    positions that start again tell them apart and no token sees another sample.

    Args:
        config: a `VideoNSAConfig`.
        packing: into one row.
    """

    def __init__(self, config, packing: bool):
        self.packing = packing
        self.pad = {"input_ids": config.text_config.pad_token_id or 0, "mm_token_type_ids": 0, "labels": IGNORE_INDEX}
        self.mrope = {
            "spatial_merge_size": config.vision_config.spatial_merge_size,
            "tokens_per_second": config.vision_config.tokens_per_second,
            "truncate_seconds": config.nsa_variant == "released",
        }

    def __call__(self, samples: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """The inputs of `forward`, and what the trainer takes out again:

        `num_tokens` without padding, `indices` of the samples, `failures` by index.
        """
        lengths = [len(sample["input_ids"]) for sample in samples]
        names = ("pixel_values_videos", "video_grid_thw")
        batch: dict[str, Any] = {name: torch.cat([sample[name] for sample in samples]) for name in names}
        # The model could compute M-RoPE positions, but not from seconds that mixed precision has rounded to bfloat16.
        positions = [self._positions(sample) for sample in samples]
        if self.packing:
            batch |= {name: torch.cat([sample[name] for sample in samples])[None] for name in self.pad}
            batch["position_ids"] = torch.cat(positions, dim=2)
        else:
            for name, value in self.pad.items():
                rows = [sample[name] for sample in samples]
                batch[name] = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=value)
            batch["attention_mask"] = (torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]).long()
            rows = [F.pad(row[1:], (0, max(lengths) - row.shape[2])) for row in positions]
            batch["position_ids"] = torch.cat(rows, dim=1)
        batch["num_tokens"] = sum(lengths)
        batch["indices"] = [sample["index"] for sample in samples]
        batch["failures"] = {index: text for sample in samples for index, text in sample["failures"].items()}
        return batch

    def _positions(self, sample: dict[str, Any]) -> torch.Tensor:
        """Text and M-RoPE positions of a sample, (4, 1, tokens)."""
        types = sample["mm_token_type_ids"][None]
        grids = {name: sample[name] for name in ("video_grid_thw", "second_per_grid_ts")}
        positions, _ = mrope_position_ids(types, **grids, **self.mrope)
        return torch.cat([torch.arange(types.shape[1]).expand(1, 1, -1), positions])


def plan_batches(
    tokens: Sequence[int], *, batch_size: int, packing: bool, max_tokens: int, shuffle: bool, seed: int
) -> list[list[int]]:
    """Which samples make a batch; the same in every epoch.

    Args:
        tokens: length of each sample.
        batch_size: samples of a batch, of similar length where `shuffle` allows, so that there is little padding.
        packing: fill batches up to `max_tokens` instead.
        shuffle: else samples stay in their order, or nearly so with `packing`.
    """
    order = np.random.default_rng(seed).permutation(len(tokens)) if shuffle else np.arange(len(tokens))
    order = order.tolist()
    if not packing:
        bucket = batch_size * _BATCHES_PER_BUCKET if shuffle and batch_size > 1 else 0
        for start in range(0, len(order), bucket) if bucket else ():
            order[start : start + bucket] = sorted(order[start : start + bucket], key=lambda index: tokens[index])
        return [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
    packs: list[list[int]] = []
    room: dict[int, int] = {}  # of the open packs
    for index in order:
        pack = next((pack for pack, left in room.items() if left >= tokens[index]), None)
        if pack is None:
            packs.append([])
            pack, room[len(packs) - 1] = len(packs) - 1, max_tokens
        packs[pack].append(index)
        room[pack] -= int(tokens[index])
        if len(room) > _OPEN_PACKS:
            del room[min(room, key=room.__getitem__)]
    return packs


class EpochBatches(Sampler[list[int]]):
    """The batches of one data-parallel rank, in an order that depends on the epoch.

    Every rank has equally many: the first batches of an epoch come again where they do not divide.
    """

    def __init__(self, batches: list[list[int]], *, rank: int, num_ranks: int, shuffle: bool, seed: int):
        self.batches, self.rank, self.num_ranks, self.shuffle, self.seed = batches, rank, num_ranks, shuffle, seed
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return -(-len(self.batches) // self.num_ranks)

    def __iter__(self) -> Iterator[list[int]]:
        order = list(range(len(self.batches)))
        if self.shuffle:
            order = np.random.default_rng((self.seed, self.epoch)).permutation(len(order)).tolist()
        for place in range(self.rank, len(self) * self.num_ranks, self.num_ranks):
            yield self.batches[order[place % len(order)]]


class EpochDataLoader(DataLoader):
    """A loader that transformers' Trainer can tell the epoch."""

    def set_epoch(self, epoch: int) -> None:
        self.batch_sampler.set_epoch(epoch)
