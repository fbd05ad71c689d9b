"""Readings on disk: a safetensors file for each layer's keys and values, two files with the rest; no pickle.

A reading belongs to the weights and settings that made it, so their fingerprints are kept, and those of its media.
"""

import hashlib
import io
import json
import os
import shutil
import tempfile
from collections.abc import Mapping
from itertools import groupby, zip_longest
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from transformers import AutoProcessor

try:
    from .cache_videonsa import SPARE_TOKENS, RoomyCache
    from .kv_budget_videonsa import budget_method
    from .prompt_videonsa import OpenVideo, ReadingPlan, as_messages, kind_of, media_of
except ImportError:  # `import modeling_videonsa` from a checkout, without a package
    if __package__:
        raise
    from cache_videonsa import SPARE_TOKENS, RoomyCache
    from kv_budget_videonsa import budget_method
    from prompt_videonsa import OpenVideo, ReadingPlan, as_messages, kind_of, media_of

FORMAT = 2
_SAMPLES = 4096  # of each weight
_PIECES, _PIECE_BYTES = 64, 1 << 16  # of each file


def weights_fingerprint(model) -> str:
    """Of names, shapes, types and up to 4,096 evenly spaced values of every weight; on any device the same.

    A change of other values only goes unseen: training, merging and quantising change all of them.
    """
    digest = hashlib.blake2b(digest_size=16)
    for name, weight in sorted(model.state_dict().items()):
        flat = weight.detach().reshape(-1)
        step = max(1, flat.numel() // _SAMPLES)
        sample = flat[::step][:_SAMPLES].cpu().contiguous()
        digest.update(f"{name} {tuple(weight.shape)} {weight.dtype}".encode())
        digest.update(sample.view(torch.uint8).numpy().tobytes() if sample.numel() else b"")
    return digest.hexdigest()


def media_fingerprint(part: Mapping[str, Any]) -> dict[str, Any]:
    """What an image or a video of a message is, with a digest of its content.

    Of files, 64 evenly spaced pieces of 64 KiB and the size count; of frames and arrays, all of their values. What is
    behind a URL is known by its address alone.
    """
    kind = kind_of(part)
    media = next((part[name] for name in (kind, "image_url") if part.get(name) is not None), None)
    if isinstance(media, Mapping):
        media = media.get("url")
    digest = hashlib.blake2b(digest_size=16)
    _digest(media, digest)
    options = {name: value for name, value in part.items() if name not in ("type", kind, "image_url")}
    name = str(media)[:200] if isinstance(media, (str, os.PathLike)) else type(media).__name__
    return {"kind": kind, "name": name, "options": repr(sorted(options.items())), "digest": digest.hexdigest()}


def _digest(media: Any, digest) -> None:
    if isinstance(media, (str, os.PathLike)) and os.path.isfile(path := os.fspath(media).removeprefix("file://")):
        with open(path, "rb") as file:
            _digest_file(file, digest)
    elif isinstance(media, (str, os.PathLike)):
        digest.update(os.fspath(media).encode())
    elif isinstance(media, (bytes, bytearray, memoryview)):
        _digest_file(io.BytesIO(media), digest)
    elif hasattr(media, "seek") and hasattr(media, "read"):
        place = media.tell()
        _digest_file(media, digest)
        media.seek(place)
    elif isinstance(media, Image.Image):
        digest.update(f"{media.mode} {media.size}".encode() + media.tobytes())
    elif isinstance(media, Mapping):
        digest.update(repr(sorted(media.items())).encode())
    elif isinstance(media, (list, tuple)):
        for item in media:
            _digest(item, digest)
    elif media is not None:
        array = np.ascontiguousarray(media.cpu() if isinstance(media, torch.Tensor) else media)
        digest.update(f"{array.shape} {array.dtype}".encode() + array.tobytes())


def _digest_file(file, digest) -> None:
    size = file.seek(0, os.SEEK_END)
    digest.update(str(size).encode())
    last = max(0, size - _PIECE_BYTES)
    for start in sorted({last * piece // max(1, _PIECES - 1) for piece in range(_PIECES)}):
        file.seek(start)
        digest.update(file.read(_PIECE_BYTES))


def save_reading(reading, folder: str | os.PathLike, overwrite: bool) -> None:
    """Write a reading into a folder that appears whole; see `Reading.save`."""
    folder = Path(folder)
    if not isinstance(reading.cache, RoomyCache):
        raise ValueError(f"a reading with `cache` = {type(reading.cache).__name__} cannot be saved: read without one")
    if folder.exists() and not (overwrite and (folder / "reading.json").is_file()):
        hint = "it holds no reading" if overwrite else "`overwrite=True` replaces a reading"
        raise ValueError(f"`folder` {str(folder)!r} exists; {hint}")
    tensors = {"ids": reading.ids, "types": reading.types, "cache_types": reading.cache_types}
    tensors |= {f"method.{name}": value for name, value in reading.method.state.items()}
    method = reading.method
    video = None
    if reading.video is not None:
        video = dict(vars(reading.video))
        if (tail := video.pop("tail")) is not None:
            tensors["tail"] = tail.contiguous()
    content = {
        "format": FORMAT,
        "weights": weights_fingerprint(reading.model),
        "settings": reading.settings,
        "media": reading.media,
        "layers": len(reading.cache.layers),
        "next_position": reading.next_position,
        "method": [method.name, method.kv_budget, reading.is_kept] if method.name else [None, None, False],
        "frames": [[len(list(same)), *frame] for frame, same in groupby(reading.frames)],
        "video": video,
        "preparation": reading.preparation,
        "plan": reading.plan.to_dict(),
        "conversation": reading.conversation_state(),
        "footage": reading.footage_state(),
    }
    folder.parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        save_file(tensors, staging / "tokens.safetensors")
        for index, layer in enumerate(reading.cache.layers):  # one at a time: the cache may take half of the memory
            states = {name: getattr(layer, name).cpu().contiguous() for name in ("keys", "values")}
            save_file(states, staging / _layer_file(index))
        (staging / "reading.json").write_text(json.dumps(content, indent=1))
        for path in staging.iterdir():
            with path.open("rb") as file:
                os.fsync(file.fileno())
        staging.chmod(0o777 & ~_umask())
        if folder.exists():
            replaced = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
            os.replace(folder, replaced)
            os.replace(staging, folder)
            shutil.rmtree(replaced)
        else:
            os.replace(staging, folder)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _layer_file(index: int) -> str:
    return f"layer_{index:03}.safetensors"


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def load_reading(reading_class: type, model, folder: str | os.PathLike, processor, messages_or_video: Any):
    """Read what `save_reading` wrote; see `ReadingMixin.load_reading`."""
    folder = Path(folder)
    try:
        content = json.loads((folder / "reading.json").read_text())
        version = content["format"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"`folder` {str(folder)!r} holds no reading: {error}") from error
    if version != FORMAT:
        raise ValueError(f"`folder` {str(folder)!r} holds a reading of format {version!r}; this code reads {FORMAT}")
    if processor is None:
        try:
            processor = AutoProcessor.from_pretrained(model.name_or_path, trust_remote_code=True)
        except (OSError, ValueError) as error:
            raise ValueError(f"`processor` is missing, and {model.name_or_path!r} has none: {error}") from error
    try:
        return _load(reading_class, model, folder, content, processor, messages_or_video)
    except (AttributeError, KeyError, TypeError, SafetensorError, OSError) as error:
        raise ValueError(f"`folder` {str(folder)!r} holds a damaged reading: {error!r}") from error


def _load(reading_class, model, folder: Path, content: dict, processor, messages_or_video: Any):
    layers = model.model.language_model.layers
    name, budget, is_kept = content["method"]
    try:
        method = budget_method(budget, name, len(layers))
    except ValueError as error:
        raise ValueError(f"`folder` {str(folder)!r} holds a damaged reading: {error}") from error
    reading = reading_class(model, processor, ReadingPlan.from_dict(content["plan"]), None, None, method)
    for name, value in content["settings"].items():
        if reading.settings.get(name) != value:
            raise ValueError(
                f"`folder` {str(folder)!r} was read with {name} = {value!r}, and the model has "
                f"{reading.settings.get(name)!r}: set model.config.{name}, or read anew"
            )
    if content["weights"] != weights_fingerprint(model):
        raise ValueError(f"`folder` {str(folder)!r} was read with other weights than this model's: read anew")
    parts = [] if messages_or_video is None else media_of(as_messages(messages_or_video))
    if messages_or_video is not None:
        given = [media_fingerprint(part) for part in parts]
        for number, (mine, theirs) in enumerate(zip_longest(content["media"], given)):
            if mine is None or theirs is None or mine["digest"] != theirs["digest"]:
                raise ValueError(
                    f"`messages_or_video`: image or video {number} is not what `folder` {str(folder)!r} was read from, "
                    f"{mine and mine['name']!r}"
                )
    cache = RoomyCache(len(layers))
    for index, (layer, own) in enumerate(zip(layers, cache.layers, strict=True)):
        weight = next(layer.parameters())
        device = torch.device("cpu") if weight.device.type == "meta" else weight.device
        with safe_open(folder / _layer_file(index), framework="pt") as file:
            keys, values = (file.get_tensor(name) for name in ("keys", "values"))
        own.capacity = keys.shape[-2] + SPARE_TOKENS
        own.update(keys.to(device), values.to(device))
    with safe_open(folder / "tokens.safetensors", framework="pt") as file:
        reading.ids, reading.types, reading.cache_types = (file.get_tensor(n) for n in ("ids", "types", "cache_types"))
        states = {key for key in file.keys() if key.startswith("method.")}  # noqa: SIM118
        method.load_state({key.removeprefix("method."): file.get_tensor(key) for key in states})
        tail = file.get_tensor("tail") if "tail" in file.keys() else None  # noqa: SIM118 (no mapping)
    if cache.get_seq_length() != len(reading.cache_types):
        raise ValueError(f"`folder` {str(folder)!r} holds a damaged reading: its files are not of one reading")
    reading.cache, reading.media = cache, content["media"]
    if type(content["next_position"]) is not int or any(len(entry) != 3 for entry in content["frames"]):
        raise TypeError("next_position or frames")
    reading.next_position, reading.is_kept = content["next_position"], is_kept
    reading.frames = [tuple(frame) for count, *frame in content["frames"] for _ in range(count)]
    reading.preparation = content["preparation"]
    if content["video"] is not None:
        reading.video = OpenVideo(**content["video"] | {"size": tuple(content["video"]["size"])}, tail=tail)
    reading.set_conversation_state(content["conversation"])
    # Readings that were saved before footage was kept have none.
    reading.set_footage_state(content.get("footage", []), [part for part in parts if kind_of(part) == "video"])
    return reading
