"""What is asked for, and what will be written."""

import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from transformers import PreTrainedConfig

from .companions import CODE_FOLDER
from .safetensors_io import PlannedTensor, copy_chunks, parse_size, sha256_of
from .source import Source

TARGETS = ("videonsa", "qwen2_5_vl")
VARIANTS = ("paper", "released")
GATE_INITS = ("half", "selection")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class Options:
    """What is asked for; see `convert`."""

    target: str = "videonsa"
    variant: str | None = None
    gate_init: str | None = None
    seed: int = 0
    dtype: str | None = None
    max_shard_size: int | str | None = None

    def __post_init__(self):
        for name, choices in (
            ("target", TARGETS),
            ("variant", (None, *VARIANTS)),
            ("gate_init", (None, *GATE_INITS)),
            ("dtype", (None, *DTYPES)),
        ):
            value = getattr(self, name)
            if value not in choices:
                raise ValueError(f"`{name}` must be one of {', '.join(filter(None, choices))}, got {value!r}")
        if self.target == "qwen2_5_vl":
            for name in ("variant", "gate_init"):
                if getattr(self, name) is not None:
                    raise ValueError(f"`{name}` = {getattr(self, name)!r} is for `target` 'videonsa'")
        if self.max_shard_size is not None:
            parse_size(self.max_shard_size)


@dataclass(frozen=True)
class Plan:
    """What will be written.

    Attributes:
        source_kind: "qwen2_5_vl", "published" or "videonsa".
        config: of the result.
        shards: the tensors by file.
        files: everything else but the model card, by path.
        dropped: keys of the source that have no place in the result.
        make_gate: the bytes of a tensor that the source does not have, in pieces.
    """

    source: Source
    options: Options
    source_kind: str
    config: PreTrainedConfig
    shards: dict[str, list[PlannedTensor]]
    files: dict[str, bytes]
    dropped: tuple[str, ...]
    make_gate: Callable[[PlannedTensor], Iterator[bytes]]

    @property
    def tensors(self) -> list[PlannedTensor]:
        return [tensor for tensors in self.shards.values() for tensor in tensors]

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors)

    @property
    def source_bytes(self) -> int:
        return sum(tensor.source.nbytes for tensor in self.tensors if tensor.source)

    @property
    def new_gates(self) -> list[PlannedTensor]:
        return [tensor for tensor in self.tensors if tensor.source is None]

    @property
    def gate_init(self) -> str:
        return self.options.gate_init or GATE_INITS[0]

    def to_chunks(self, tensor: PlannedTensor) -> Iterator[bytes]:
        """The bytes of a tensor of the result, in pieces."""
        return self.make_gate(tensor) if tensor.source is None else copy_chunks(tensor)

    def fingerprint(self) -> str:
        """Of everything that decides the bytes of the shards: source files, options, this program."""
        code = [CODE_FOLDER / "convert_weights.py", *sorted((CODE_FOLDER / "conversion").glob("*.py"))]
        stats = {tensor.source.file: tensor.source.file.stat() for tensor in self.tensors if tensor.source}
        stated = {
            "sources": [[str(file), stat.st_size, stat.st_mtime_ns] for file, stat in sorted(stats.items())],
            "config": self.config.to_json_string(),
            "options": vars(self.options),
            "shards": {
                file: [[t.name, str(t.dtype), t.shape, t.source and [t.source.key, t.source.start]] for t in tensors]
                for file, tensors in self.shards.items()
            },
            "code": [sha256_of(path) for path in code],
        }
        return hashlib.sha256(json.dumps(stated, sort_keys=True).encode()).hexdigest()
