"""Write a folder so that it appears under its name only when it is complete and on the disk, and so that the next run
goes on from what a killed one has finished.

Everything happens in `.<name>.partial` beside the output:

    lock            held by the process at work; the system frees it when that dies
    progress.jsonl  what is being made (a fingerprint), then a line for every finished shard: name, size, SHA-256
    content/        becomes the output, in one rename

A shard counts as finished when its line is there and its bytes on the disk have that SHA-256; anything else in
`content/` is removed and made again. Another fingerprint (another source, other options) starts over.

An older output moves to `.<name>.replaced` for the moment between two renames; whoever finds it there without a
successor puts it back.
"""

import contextlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

from filelock import FileLock, Timeout

from .safetensors_io import sha256_of

PROGRESS = "progress.jsonl"


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


def partial_folder(output: Path) -> Path:
    """Where the work on `output` is kept until it is complete."""
    return output.with_name(f".{output.name}.partial")


class Staging:
    """The folder being written.

    Attributes:
        folder: becomes the output.
        finished: sizes in bytes of the shards that need not be written again, by name.
    """

    def __init__(self, partial: Path, fingerprint: str, on_read: Callable[[int], object]):
        self.folder = partial / "content"
        self._progress = partial / PROGRESS
        self._on_read = on_read
        self.finished: dict[str, int] = {}
        start = json.dumps({"fingerprint": fingerprint})
        lines = self._progress.read_text(encoding="utf-8").splitlines() if self._progress.exists() else []
        if lines[:1] == [start]:
            self.finished = {name: size for name, size, digest in map(_parse, lines[1:]) if self._is(name, digest)}
            start = "\n".join([start, *(line for line in lines[1:] if _parse(line)[0] in self.finished)])
        self.folder.mkdir(exist_ok=True)
        for path in self.folder.iterdir():
            if path.name not in self.finished:
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        # Not in place: a kill in the middle must not lose the lines.
        new = self._progress.with_suffix(".new")
        new.unlink(missing_ok=True)
        write_file(new, f"{start}\n".encode())
        os.replace(new, self._progress)

    def _is(self, name: str, digest: str) -> bool:
        file = self.folder / name
        return bool(name) and file.is_file() and sha256_of(file, self._on_read) == digest

    def record(self, name: str, digest: str) -> None:
        """Note that the shard `name` is complete and on the disk."""
        size = (self.folder / name).stat().st_size
        with self._progress.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps({"name": name, "size": size, "sha256": digest}) + "\n")
            stream.flush()
            os.fsync(stream.fileno())
        self.finished[name] = size


def _parse(line: str) -> tuple[str, int, str]:
    """Name, size and SHA-256 of a line of the progress; empty if a kill or a power cut has torn it."""
    try:
        entry = json.loads(line)
        return entry["name"], entry["size"], entry["sha256"]
    except (ValueError, KeyError, TypeError):
        return "", 0, ""


@contextlib.contextmanager
def staged(
    output: Path,
    overwrite: bool,
    fingerprint: str = "",
    on_read: Callable[[int], object] = lambda size: None,
    **known_by: str,
) -> Iterator[Staging]:
    """A folder that takes the place of `output` when the block ends well.

    When it does not, finished shards stay for the next run, unless the error is a ValueError: that one would meet
    the same error again. Where no shard is finished, nothing stays.

    Args:
        output: the folder to be.
        overwrite: replace an existing one.
        fingerprint: of everything that decides the bytes of the shards, where there are any.
        on_read: called with the size of every piece of finished shards that is checked.
        known_by: `marker` and `what` of `check_output`.
    """
    output.parent.mkdir(parents=True, exist_ok=True)
    partial = partial_folder(output)
    partial.mkdir(exist_ok=True)
    lock = FileLock(partial / "lock", timeout=0)
    try:
        lock.acquire()
    except Timeout as error:
        raise ValueError(f"`output` {output} is being written by another process") from error
    staging = None
    try:
        _restore_replaced(output)
        check_output(output, overwrite, **known_by)
        staging = Staging(partial, fingerprint, on_read)
        yield staging
        for folder in (staging.folder, *(path for path in staging.folder.rglob("*") if path.is_dir())):
            _sync_folder(folder)
        replaced = _replaced_name(output)
        if output.exists():
            os.replace(output, replaced)
        os.replace(staging.folder, output)
        _sync_folder(output.parent)
        shutil.rmtree(replaced, ignore_errors=True)
        _remove(partial)
    except BaseException as error:
        _restore_replaced(output)
        if staging is None:  # what an earlier run has finished is not for this one to remove
            worthless = not (partial / PROGRESS).exists()
        else:
            worthless = isinstance(error, ValueError) or not staging.finished or not staging.folder.exists()
        if worthless:
            _remove(partial)
        elif staging is not None:
            for path in staging.folder.iterdir():  # the disk may be full
                if path.name not in staging.finished:
                    shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)
        raise
    finally:
        lock.release()


def _remove(partial: Path) -> None:
    """Remove the folder of work whose lock is held; the lock last, so that nobody is at work in what goes."""
    with contextlib.suppress(OSError):  # such as of another process that has come meanwhile
        for path in sorted(partial.iterdir(), key=lambda path: path.name == "lock"):
            shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink()
        partial.rmdir()


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
