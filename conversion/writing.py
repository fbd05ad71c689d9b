"""Write what a plan says, and recognise what has been written."""

import contextlib
import errno
import math
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from tqdm import tqdm

from hub_videonsa import CARD_NAME, model_card

from .companions import to_json
from .plan import Plan
from .safetensors_io import INDEX, write_tensors
from .staging import staged, write_file
from .verification import compare_headers, compare_tensors


def write_checkpoint(
    plan: Plan,
    output: Path,
    *,
    card_name: str,
    overwrite: bool,
    progress: bool | None,
    verify: Callable[[Path], object] | None = None,
) -> None:
    """Make the output; see `staged` for what remains when this fails.

    Args:
        card_name: what the model card calls the repository.
        verify: raises if the complete checkpoint in a folder is wrong.
    Raises:
        ValueError: the source holds what cannot be written, or has changed.
        OSError: of the disk.
    """
    fingerprint = plan.fingerprint()
    with contextlib.ExitStack() as bars:
        on_bytes = bars.enter_context(byte_bar(f"Writing {output.name}", plan.nbytes, progress))
        with staged(output, overwrite, fingerprint, on_bytes) as staging:
            missing = plan.nbytes - sum(staging.finished.values())
            free = shutil.disk_usage(staging.folder).free
            if missing > free:
                text = f"`output` {output} needs {missing:,} more bytes, its disk has {free:,} free"
                raise OSError(errno.ENOSPC, text)
            for name, tensors in plan.shards.items():
                if name not in staging.finished:
                    staging.record(name, write_tensors(staging.folder / name, tensors, plan.to_chunks, on_bytes))
            card = {CARD_NAME: model_card(plan.config.to_dict(), card_name, as_converted=True).encode()}
            for name, data in (_other_files(plan) | card).items():
                write_file(staging.folder / name, data)
            compare_headers(staging.folder, plan.tensors)
            if plan.fingerprint() != fingerprint:
                raise ValueError(f"{plan.source} has changed while it was read: run again")
            write_file(staging.folder / "config.json", _config_json(plan))
            bars.close()  # the verification has one of its own
            if verify is not None:
                verify(staging.folder)


def is_result(output: Path, plan: Plan, progress: bool | None) -> bool:
    """Whether `output` is what would be written, to the last byte; its model card may be the user's."""
    files = _other_files(plan) | {"config.json": _config_json(plan)}
    if not all((output / name).is_file() and (output / name).read_bytes() == data for name, data in files.items()):
        return False
    try:
        found = {name: tensor.file.name for name, tensor in compare_headers(output, plan.tensors).items()}
        if found != {tensor.name: file for file, tensors in plan.shards.items() for tensor in tensors}:
            return False
        with byte_bar(f"Comparing {output.name}", plan.nbytes, progress) as on_compared:
            compare_tensors(output, plan.tensors, plan.to_chunks, on_compared)
    except ValueError:
        return False
    return True


def result_files(plan: Plan) -> list[str]:
    """Paths of all files of the result but the model card."""
    return sorted({*plan.shards, *_other_files(plan), "config.json"})


def _config_json(plan: Plan) -> bytes:
    return plan.config.to_json_string().encode()


def _other_files(plan: Plan) -> dict[str, bytes]:
    """Everything but weights, configuration and model card."""
    if len(plan.shards) == 1:
        return plan.files
    parameters = sum(math.prod(tensor.shape) for tensor in plan.tensors)
    weight_map = {tensor.name: file for file, tensors in plan.shards.items() for tensor in tensors}
    index: dict[str, Any] = {"total_parameters": parameters, "total_size": plan.nbytes}
    return plan.files | {INDEX: to_json({"metadata": index, "weight_map": weight_map})}


@contextlib.contextmanager
def byte_bar(title: str, total: int, progress: bool | None) -> Iterator[Callable[[int], None]]:
    """A progress bar with rate and remaining time; gives what to call with the size of every piece.

    Args:
        progress: None shows it on a terminal only.
    """
    off = None if progress is None else not progress  # tqdm's None: unless standard error is a terminal
    with tqdm(total=total, desc=title, unit="B", unit_scale=True, disable=off) as bar:
        yield lambda size: bar.update(min(size, bar.total - bar.n))
