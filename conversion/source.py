"""Where a checkpoint comes from: a folder, or a commit of a Hub repository whose files are brought into the Hub cache.

Small files come first; the weights of a Hub repository are looked at through their headers alone until `fetch_weights`.
"""

import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import yaml
from huggingface_hub import HfApi, constants, hf_hub_url, snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HTTPError,  # httpx's base class, of whichever version the client uses
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.repocard import metadata_load
from huggingface_hub.utils import build_hf_headers, hf_raise_for_status, http_backoff

from .safetensors_io import INDEX, WEIGHTS, StoredTensor, parse_header, read_headers, read_json, sha256_of

# In the Hub cache a snapshot is .../models--ORG--NAME/snapshots/COMMIT, and its large files are links to files that
# are named by their SHA-256.
_SNAPSHOT = re.compile(r"models--(?P<org>[\w.-]+?)--(?P<name>[\w.-]+)/snapshots/(?P<commit>[0-9a-f]{40})$")
_SHA256 = re.compile(r"[0-9a-f]{64}")
# Bytes of a remote file that are fetched at once; few headers are longer.
_HEADER_GUESS = 100_000
_LICENSE_FIELDS = ("license", "license_name", "license_link")


@dataclass(frozen=True)
class Source:
    """A checkpoint to convert.

    Attributes:
        folder: holds its small files, and its weights once `fetch_weights` has returned.
        repo_id, commit: where it comes from on the Hub, None where that is not known.
        remote_names: all files of a Hub repository; None for a local folder.
    """

    folder: Path
    repo_id: str | None
    commit: str | None
    remote_names: tuple[str, ...] | None = None

    def __str__(self) -> str:
        return f"{self.repo_id} at commit {self.commit}" if self.remote_names is not None else str(self.folder)

    @property
    def has_weights(self) -> bool:
        """Whether all shards are on this machine."""
        if self.remote_names is None:
            return True
        names = _shard_names(self.folder, self.remote_names)
        return bool(names) and all((self.folder / name).exists() for name in names)

    def headers(self) -> dict[str, StoredTensor]:
        """The tensors by key; of weights that are still on the Hub, their headers are read there.

        Raises:
            ValueError: as `safetensors_io.read_headers`.
            OSError: the Hub failed.
        """
        if self.has_weights:
            return read_headers(self.folder)
        with _hub_errors(self.repo_id, self.commit):
            return read_headers(self.folder, self.remote_names, self._read_remote_header)

    def fetch_weights(self, on_checked: Callable[[int], object] = lambda size: None) -> None:
        """Bring the weights into the Hub cache, and check them against the SHA-256 that the Hub states.

        What an earlier, interrupted download has brought is not fetched again. The Hub client looks at sizes alone.

        Args:
            on_checked: called with the size of every piece of a checked file.
        Raises:
            ValueError: a file in the cache is not what the Hub has.
            OSError: the Hub failed.
        """
        names = _shard_names(self.folder, self.remote_names)
        if not self.has_weights:
            with _hub_errors(self.repo_id, self.commit):
                snapshot_download(self.repo_id, revision=self.commit, allow_patterns=names)
        for name in names:
            blob = (self.folder / name).resolve()
            if _SHA256.fullmatch(blob.name) and sha256_of(blob, on_checked) != blob.name:
                raise ValueError(
                    f"{name} of {self} has arrived damaged: its SHA-256 is not {blob.name}; delete {blob} and run again"
                )

    def license(self) -> dict[str, str]:
        """What the model card of the source says of its licence: `license`, `license_name`, `license_link`."""
        card = self.folder / "README.md"
        try:
            metadata = (metadata_load(card) if card.is_file() else None) or {}
        except (ValueError, yaml.YAMLError):  # a card that is none is no reason not to convert
            metadata = {}
        found = {key: metadata[key] for key in _LICENSE_FIELDS if isinstance(metadata.get(key), str)}
        # A link to a file of the source's repository means its copy, or the repository itself.
        link = found.get("license_link")
        if link and "://" not in link and not (self.folder / link).is_file():
            del found["license_link"]
        return found

    def _read_remote_header(self, file: Path) -> dict[str, StoredTensor]:
        url = hf_hub_url(self.repo_id, file.name, revision=self.commit)
        start = _fetch(url, 0, _HEADER_GUESS)
        size = int(start.headers.get("Content-Range", f"/{len(start.content)}").rpartition("/")[2])

        def read(position: int, length: int) -> bytes:
            held = start.content[position : position + length]
            return held if len(held) == min(length, size - position) else _fetch(url, position, length).content

        return parse_header(file, size, read)


def _fetch(url: str, position: int, length: int):
    """The answer of the Hub to a request for some bytes of a file, asked for again where it fails for a moment."""
    headers = build_hf_headers() | {"Range": f"bytes={position}-{position + length - 1}"}
    answer = http_backoff("GET", url, headers=headers, timeout=constants.HF_HUB_DOWNLOAD_TIMEOUT)
    hf_raise_for_status(answer)
    return answer


def open_source(source: str | Path, revision: str | None, patterns: tuple[str, ...]) -> Source:
    """Find a checkpoint; of a Hub repository, fetch the files that match `patterns` and the index of its weights.

    Raises:
        ValueError: neither a folder nor a repository, no such revision, or a revision with a folder.
        OSError: the Hub failed.
    """
    folder = Path(source).expanduser()
    if folder.is_dir():
        if revision is not None:
            raise ValueError(f"`revision` {revision!r} is for Hub repositories; `source` {folder} is a folder")
        folder = folder.resolve()
        snapshot = _SNAPSHOT.search(folder.as_posix())
        if snapshot is None:
            return Source(folder, None, None)
        return Source(folder, f"{snapshot['org']}/{snapshot['name']}", snapshot["commit"])
    repo_id = str(source)
    if not re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", repo_id):
        raise ValueError(f"`source` {repo_id!r} is neither a folder nor the id of a Hub repository")
    with _hub_errors(repo_id, revision):
        # The commit, not the revision, from here on: a branch may move between two downloads.
        folder = Path(snapshot_download(repo_id, revision=revision, allow_patterns=[*patterns, INDEX]))
        commit = folder.name
        return Source(folder, repo_id, commit, tuple(_list_files(repo_id, folder, commit)))


def _list_files(repo_id: str, folder: Path, commit: str) -> list[str]:
    """Names of a repository's files; without the Hub those in its cache, if all weights are there."""
    try:
        return HfApi().list_repo_files(repo_id, revision=commit)
    except (HTTPError, OSError):
        names = [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()]
        if not _shard_names(folder, names) or not set(_shard_names(folder, names)) <= set(names):
            raise
        return names


def _shard_names(folder: Path, names: Iterable[str]) -> list[str]:
    """The files that hold the weights, by the index if there is one; none where there are no safetensors."""
    if INDEX in names:
        weight_map = read_json(folder / INDEX).get("weight_map")
        values = weight_map.values() if isinstance(weight_map, dict) else ()
        return sorted({name for name in values if isinstance(name, str)})
    return [WEIGHTS] if WEIGHTS in names else []


@contextmanager
def _hub_errors(repo_id: str, revision: str | None) -> Iterator[None]:
    """Say in one sentence what went wrong with the Hub."""
    try:
        yield
    except GatedRepoError as error:
        raise ValueError(f"`source` {repo_id!r} is gated: accept its terms on the Hub, then `hf auth login`") from error
    except RepositoryNotFoundError as error:
        raise ValueError(
            f"`source` {repo_id!r} is neither a folder nor a repository on the Hub that you may read (`hf auth login`)"
        ) from error
    except RevisionNotFoundError as error:
        raise ValueError(f"`revision` {revision!r} does not exist in {repo_id!r}") from error
    except (HTTPError, OSError) as error:
        raise OSError(
            f"the Hub did not give `source` {repo_id!r}: {first_line(error)}; what has arrived is kept, "
            "so run the same command again"
        ) from error


def first_line(error: BaseException) -> str:
    """What an error says, without the advice that huggingface_hub adds."""
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
