"""Safetensors checkpoints without tensors in memory: headers are read alone, data move in chunks.

The format is that of https://github.com/huggingface/safetensors: 8 bytes of header length, a JSON header, the data.
"""

import hashlib
import json
import math
import os
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

# Quantised checkpoints have other dtypes; their tensors cannot be taken over one to one.
DTYPES = {"F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}

CHUNK_BYTES = 4 * 2**20
# The safetensors library's limit; a longer header is damage, not to be read into memory.
MAX_HEADER_BYTES = 100_000_000
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
    """A tensor of the result: copied from `source`, or a gate to initialise where `source` is None.

    Attributes:
        home: the file of the source whose other tensors it stays with where the source's sharding is kept.
    """

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    source: StoredTensor | None
    home: Path

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def read_headers(
    folder: Path,
    names: Iterable[str] | None = None,
    read_header: Callable[[Path], dict[str, StoredTensor]] | None = None,
) -> dict[str, StoredTensor]:
    """The tensors of the checkpoint in `folder`, by key, from the headers of its safetensors files.

    Args:
        folder: holds the index, if there is one.
        names: of the checkpoint's files; None means those in `folder`.
        read_header: the tensors of one file; None reads it in `folder`.
    Raises:
        ValueError: no safetensors weights, several candidates, a shard that is missing, truncated or corrupt, or that
            does not hold what the index says.
    """
    names = {path.name for path in folder.iterdir()} if names is None else set(names)
    read_header = read_header or _read_header
    if WEIGHTS in names and INDEX in names:
        raise ValueError(f"{folder} holds both {WEIGHTS} and {INDEX}: remove the one that is out of date")
    if WEIGHTS in names:
        return read_header(folder / WEIGHTS)
    if INDEX not in names:
        pickles = some(sorted(name for name in names if name.endswith((".bin", ".pt", ".pth")))) or "there are none"
        raise ValueError(
            f"{folder} holds neither {WEIGHTS} nor {INDEX}; pickled weights ({pickles}) are not read, "
            "save them as safetensors first"
        )
    index = folder / INDEX
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ValueError(f"{index}: `weight_map` must be a non-empty object, got {weight_map!r}")
    if wrong := [name for name in weight_map.values() if not isinstance(name, str) or Path(name).name != name]:
        raise ValueError(f"{index}: shards must be file names in the same folder, got {some(wrong)}")
    files = sorted(set(weight_map.values()))
    if missing := [name for name in files if name not in names]:
        raise ValueError(f"{folder} lacks {some(missing)}, listed in {INDEX}")
    stored: dict[str, StoredTensor] = {}
    for name in files:
        for key, tensor in read_header(folder / name).items():
            if weight_map.get(key) != name:
                raise ValueError(f"{folder / name} holds {key!r}, which {INDEX} places in {weight_map.get(key)!r}")
            stored[key] = tensor
    if missing := [key for key in weight_map if key not in stored]:
        raise ValueError(f"{folder}: {INDEX} lists tensors that their shards do not hold: {some(missing)}")
    return stored


def _read_header(file: Path) -> dict[str, StoredTensor]:
    with file.open("rb") as stream:

        def read(start: int, size: int) -> bytes:
            stream.seek(start)
            return stream.read(size)

        return parse_header(file, file.stat().st_size, read)


def parse_header(file: Path, size: int, read: Callable[[int, int], bytes]) -> dict[str, StoredTensor]:
    """The tensors of one safetensors file.

    Args:
        file: its name, for messages and for the result.
        size: of the file, in bytes.
        read: gives so many bytes from a position on.
    """
    length = int.from_bytes(read(0, 8), "little")
    if size < 8 or length > min(size - 8, MAX_HEADER_BYTES):
        raise ValueError(f"{file} is truncated or not a safetensors file: {size} bytes, header of {length}")
    try:
        header = json.loads(read(8, length))
        header.pop("__metadata__", None)
        entries = []
        for key, entry in header.items():
            begin, end = map(int, entry["data_offsets"])
            entries.append((key, str(entry["dtype"]), tuple(map(int, entry["shape"])), begin, end))
        entries.sort(key=lambda entry: entry[3])
    except (ValueError, TypeError, KeyError, AttributeError, OverflowError, RecursionError) as error:
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


def split_into_shards(plan: Iterable[PlannedTensor], max_bytes: int | None) -> dict[str, list[PlannedTensor]]:
    """Distribute tensors over files, named as transformers does.

    Args:
        plan: the tensors, in the order of the model.
        max_bytes: of data in one file; None keeps together what is together in the source.
    """
    if max_bytes is None:
        homes: dict[Path, list[PlannedTensor]] = {}
        for tensor in plan:
            homes.setdefault(tensor.home, []).append(tensor)
        shards = [homes[home] for home in sorted(homes)]
    else:
        shards, size = [[]], 0
        for tensor in plan:
            if shards[-1] and size + tensor.nbytes > max_bytes:
                shards.append([])
                size = 0
            shards[-1].append(tensor)
            size += tensor.nbytes
    if len(shards) == 1:
        return {WEIGHTS: shards[0]}
    return {f"model-{i:05}-of-{len(shards):05}.safetensors": tensors for i, tensors in enumerate(shards, 1)}


def parse_size(size: int | str) -> int:
    """Bytes of an integer or of a text such as "500MB" (10^6) or "2GiB" (2^30).

    Raises:
        ValueError: not a size, or not positive.
    """
    units = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([A-Z]*)", str(size).strip().upper())
    number = int(float(match[1]) * units[match[2]]) if match and match[2] in units else 0
    if number < 1:
        raise ValueError(f"`max_shard_size` must be a positive number of bytes or such as '5GB', got {size!r}")
    return number


def write_tensors(
    file: Path,
    tensors: Iterable[PlannedTensor],
    to_chunks: Callable[[PlannedTensor], Iterator[bytes]],
    on_written: Callable[[int], object],
) -> str:
    """Write one safetensors file and flush it to the disk.

    Args:
        file: must not exist.
        tensors: what it holds.
        to_chunks: the bytes of a tensor, in pieces.
        on_written: called with the size of every piece.
    Returns:
        The SHA-256 of the file, of the bytes as they were handed to the system.
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
    start = len(text).to_bytes(8, "little") + text
    digest = hashlib.sha256(start)
    with file.open("xb") as stream:
        stream.write(start)
        for tensor in tensors:
            for chunk in to_chunks(tensor):
                stream.write(chunk)
                digest.update(chunk)
                on_written(len(chunk))
        stream.flush()
        os.fsync(stream.fileno())
    return digest.hexdigest()


def sha256_of(file: Path, on_read: Callable[[int], object] = lambda size: None) -> str:
    """The SHA-256 of a file, read in pieces of `CHUNK_BYTES`."""
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        while chunk := stream.read(CHUNK_BYTES):
            digest.update(chunk)
            on_read(len(chunk))
    return digest.hexdigest()


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


def copy_chunks(tensor: PlannedTensor) -> Iterator[bytes]:
    """The bytes of a tensor's source, as they are or converted to its dtype.

    Raises:
        ValueError: a value is NaN or infinite, or is after the conversion.
    """
    source = tensor.source
    for chunk in read_chunks(source):
        values = torch.frombuffer(bytearray(chunk), dtype=source.dtype)
        if not _is_finite(values):
            raise ValueError(f"{source.file}: {source.key!r} holds NaN or infinite values")
        if tensor.dtype == source.dtype:
            yield chunk
            continue
        cast = values.to(tensor.dtype)
        if not _is_finite(cast):
            raise ValueError(f"{source.file}: {source.key!r} has values that {tensor.dtype} cannot hold")
        yield to_bytes(cast)


def _is_finite(values: torch.Tensor) -> bool:
    # The extremes are NaN where any value is. Many times faster than a test of each value.
    return bool(torch.stack(torch.aminmax(values)).isfinite().all())


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
