"""Safetensors checkpoints without tensors in memory: headers are read alone, data move in chunks.

The format is that of https://github.com/huggingface/safetensors: 8 bytes of header length, a JSON header, the data.
"""

import json
import math
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

# Quantised checkpoints have other dtypes; their tensors cannot be taken over one to one.
DTYPES = {"F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}

CHUNK_BYTES = 16 * 2**20
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"


@dataclass(frozen=True)
class StoredTensor:
    """Where a tensor lies in a safetensors file: `nbytes` bytes from byte `start` of `file` on."""

    file: Path
    key: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    nbytes: int


@dataclass(frozen=True)
class PlannedTensor:
    """A tensor of the result: copied from `source`, or a gate to initialise where `source` is None."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    source: StoredTensor | None

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def read_headers(folder: Path) -> dict[str, StoredTensor]:
    """The tensors of the checkpoint in `folder`, by key, from the headers of its safetensors files.

    Raises:
        ValueError: no safetensors weights, several candidates, a shard that is missing, truncated or corrupt, or that
            does not hold what the index says.
    """
    single, index = folder / WEIGHTS, folder / INDEX
    if single.exists() and index.exists():
        raise ValueError(f"{folder} holds both {WEIGHTS} and {INDEX}: remove the one that is out of date")
    if single.exists():
        return _read_header(single)
    if not index.exists():
        pickles = some(sorted(path.name for path in folder.glob("*.bin*"))) or "there are none"
        raise ValueError(
            f"{folder} holds neither {WEIGHTS} nor {INDEX}; pickled weights ({pickles}) are not read, "
            "save them as safetensors first"
        )
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ValueError(f"{index}: `weight_map` must be a non-empty object, got {weight_map!r}")
    if wrong := [name for name in weight_map.values() if not isinstance(name, str) or Path(name).name != name]:
        raise ValueError(f"{index}: shards must be file names in the same folder, got {some(wrong)}")
    files = sorted(set(weight_map.values()))
    if missing := [name for name in files if not (folder / name).is_file()]:
        raise ValueError(f"{folder} lacks {some(missing)}, listed in {INDEX}")
    stored: dict[str, StoredTensor] = {}
    for name in files:
        for key, tensor in _read_header(folder / name).items():
            if weight_map.get(key) != name:
                raise ValueError(f"{folder / name} holds {key!r}, which {INDEX} places in {weight_map.get(key)!r}")
            stored[key] = tensor
    if missing := [key for key in weight_map if key not in stored]:
        raise ValueError(f"{folder}: {INDEX} lists tensors that their shards do not hold: {some(missing)}")
    return stored


def _read_header(file: Path) -> dict[str, StoredTensor]:
    """The tensors of one safetensors file: 8 bytes of header length, a JSON header, then the data without gaps."""
    size = file.stat().st_size
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if size < 8 or length > size - 8:
            raise ValueError(f"{file} is truncated or not a safetensors file: {size} bytes, header of {length}")
        try:
            header = json.loads(stream.read(length))
            header.pop("__metadata__", None)
            entries = [(key, e["dtype"], tuple(e["shape"]), *e["data_offsets"]) for key, e in header.items()]
            entries.sort(key=lambda entry: entry[3])
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise ValueError(f"{file} has a corrupt safetensors header: {error!r}") from error
    tensors, position = {}, 0
    for key, dtype, shape, begin, end in entries:
        if dtype not in DTYPES:
            raise ValueError(f"{file}: {key!r} has dtype {dtype}; supported are {', '.join(DTYPES)}")
        nbytes = math.prod(shape) * DTYPES[dtype].itemsize
        if begin != position or end - begin != nbytes:
            raise ValueError(f"{file}: {key!r} lies at bytes {begin} to {end}, expected {position} and {nbytes} bytes")
        tensors[key] = StoredTensor(file, key, DTYPES[dtype], shape, 8 + length + begin, nbytes)
        position = end
    if size != 8 + length + position:
        raise ValueError(f"{file} is truncated or corrupt: {size} bytes, its header describes {8 + length + position}")
    return tensors


def split_into_shards(plan: Iterable[PlannedTensor], max_bytes: int) -> dict[str, list[PlannedTensor]]:
    """Distribute tensors over files of at most `max_bytes` of data each, in order, named as transformers does."""
    shards: list[list[PlannedTensor]] = [[]]
    size = 0
    for tensor in plan:
        if shards[-1] and size + tensor.nbytes > max_bytes:
            shards.append([])
            size = 0
        shards[-1].append(tensor)
        size += tensor.nbytes
    if len(shards) == 1:
        return {WEIGHTS: shards[0]}
    return {f"model-{i:05}-of-{len(shards):05}.safetensors": tensors for i, tensors in enumerate(shards, 1)}


def write_tensors(
    file: Path,
    tensors: Iterable[PlannedTensor],
    to_chunks: Callable[[PlannedTensor], Iterator[bytes]],
    on_written: Callable[[int], object],
) -> None:
    """Write one safetensors file and flush it to the disk.

    Args:
        file: must not exist.
        tensors: what it holds.
        to_chunks: the bytes of a tensor, in pieces.
        on_written: called with the size of every piece.
    """
    # Wide types first keeps every tensor aligned to its element, as the safetensors library does.
    tensors = sorted(tensors, key=lambda tensor: -tensor.dtype.itemsize)
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    position = 0
    for tensor in tensors:
        offsets = [position, position + tensor.nbytes]
        header[tensor.name] = {"dtype": DTYPE_NAMES[tensor.dtype], "shape": tensor.shape, "data_offsets": offsets}
        position += tensor.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with file.open("xb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        for tensor in tensors:
            for chunk in to_chunks(tensor):
                stream.write(chunk)
                on_written(len(chunk))
        stream.flush()
        os.fsync(stream.fileno())


def read_chunks(tensor: StoredTensor) -> Iterator[bytes]:
    """The bytes of a stored tensor in pieces of `CHUNK_BYTES`, which every element size divides."""
    with tensor.file.open("rb") as stream:
        stream.seek(tensor.start)
        left = tensor.nbytes
        while left:
            chunk = stream.read(min(CHUNK_BYTES, left))
            if not chunk:
                raise OSError(f"{tensor.file} has become shorter while {tensor.key!r} was read")
            left -= len(chunk)
            yield chunk


def cast_chunks(tensor: PlannedTensor) -> Iterator[bytes]:
    """The bytes of a tensor's source, converted to its dtype.

    Raises:
        ValueError: a value is not finite after the conversion.
    """
    for chunk in read_chunks(tensor.source):
        values = torch.frombuffer(bytearray(chunk), dtype=tensor.source.dtype)
        cast = values.to(tensor.dtype)
        if not cast.isfinite().all():
            raise ValueError(f"{tensor.source.file}: {tensor.source.key!r} has values that {tensor.dtype} cannot hold")
        yield to_bytes(cast)


def to_bytes(values: torch.Tensor) -> bytes:
    """The bytes of a tensor on the CPU, row by row."""
    return values.reshape(-1).view(torch.uint8).numpy().tobytes()


def read_json(file: Path) -> dict:
    """The JSON object in `file`.

    Raises:
        ValueError: there is none.
    """
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ValueError(f"{file.parent} lacks {file.name}") from error
    except ValueError as error:
        raise ValueError(f"{file} is not valid JSON: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{file} must hold a JSON object, got {type(values).__name__}")
    return values


def some(names: list) -> str:
    """At most five names, for an error message."""
    rest = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return ", ".join(repr(name) for name in names[:5]) + rest
