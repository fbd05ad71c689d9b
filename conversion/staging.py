"""Write a folder so that it appears under its name only when it is complete and on the disk.

It is built in `.<name>.partial` beside its place. An older folder moves to `.<name>.replaced` for the moment between
two renames; whoever finds it there without a successor puts it back.
"""

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from filelock import FileLock, Timeout


def check_output(output: Path, overwrite: bool, marker: str = "config.json", what: str = "checkpoint") -> None:
    """Refuse an output that would cost the user something. An empty folder costs nothing.

    Args:
        marker: a file that a folder of `what` has, so that no other folder is replaced.
    """
    if not output.exists() or (output.is_dir() and not any(output.iterdir())):
        return
    if not overwrite:
        raise ValueError(f"`output` {output} exists; `overwrite` (--overwrite) replaces it")
    if not (output / marker).is_file():
        raise ValueError(f"`output` {output} is not a {what} folder, so `overwrite` does not replace it")


@contextlib.contextmanager
def staged(output: Path, overwrite: bool, **known_by: str) -> Iterator[Path]:
    """A folder beside `output` that takes its place when the block ends well, and is removed when it does not.

    Args:
        known_by: `marker` and `what` of `check_output`.
    """
    output.parent.mkdir(parents=True, exist_ok=True)
    staging = output.with_name(f".{output.name}.partial")
    staging.mkdir(exist_ok=True)
    lock = FileLock(staging / ".lock", timeout=0)
    try:
        lock.acquire()
    except Timeout as error:
        raise ValueError(f"`output` {output} is being written by another process") from error
    try:
        _restore_replaced(output)
        check_output(output, overwrite, **known_by)
        for left in staging.iterdir():  # by a run that was killed
            if left.name != ".lock":
                shutil.rmtree(left) if left.is_dir() else left.unlink()
        yield staging
        (staging / ".lock").unlink()
        for folder in (staging, *(path for path in staging.rglob("*") if path.is_dir())):
            _sync_folder(folder)
        replaced = _replaced_name(output)
        if output.exists():
            os.replace(output, replaced)
        os.replace(staging, output)
        _sync_folder(output.parent)
        shutil.rmtree(replaced, ignore_errors=True)
    except BaseException:
        _restore_replaced(output)
        shutil.rmtree(staging, ignore_errors=True)
        raise
    finally:
        lock.release()


def _replaced_name(output: Path) -> Path:
    return output.with_name(f".{output.name}.replaced")


def _restore_replaced(output: Path) -> None:
    """Undo what a crash between the two renames of `staged` left: the old checkpoint comes back."""
    replaced = _replaced_name(output)
    if replaced.exists():
        if output.exists():
            shutil.rmtree(replaced)
        else:
            os.replace(replaced, output)


def write_file(path: Path, data: bytes) -> None:
    """Write a new file, with its folders, and flush it to the disk."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("xb") as stream:
        stream.write(data)
        stream.flush()
        os.fsync(stream.fileno())


def _sync_folder(folder: Path) -> None:
    """Make the names in `folder` durable; Windows has no such call and needs none."""
    if os.name == "posix":
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
