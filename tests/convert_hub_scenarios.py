"""The converter and a Hub that fails. Run by test_convert_hub, see scenarios.py."""

import contextlib
import functools
import io
import json
import os
import queue
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from fake_hub import FakeHub
from huggingface_hub import constants
from huggingface_hub.utils import close_session
from scenarios import scenario as run_in_folder
from tiny_random import save_tiny_qwen2_5_vl

import hub_videonsa
from checkpoints import damage_tensors, edit_json, load_all, snapshot, write_sharded
from convert_weights import convert
from hub_videonsa import CARD_MARK

hub: FakeHub = None  # set where the scenarios run
SHARD = r"/resolve/.*\.safetensors$"
UPLOAD, COMMIT = r"^/__lfs/", r"/commit/main$"
NORM = "model.language_model.norm.weight"


def scenario(function: Callable[["Place"], None]) -> None:
    @functools.wraps(function)
    def run(folder: Path) -> None:
        function(Place(folder))

    run_in_folder(run)


@functools.cache
def tiny_source(root: Path) -> tuple[Path, dict[str, bytes]]:
    """A sharded Qwen2.5-VL checkpoint, and what its conversion holds."""
    source = save_tiny_qwen2_5_vl(root / "pristine", max_shard_size="100KB")
    return source, without_provenance(snapshot(convert(source, root / "expected")))


class Place:
    """Folders of one scenario: `source`, a checkpoint in 8 shards that may be damaged, and `out`, which is to be."""

    def __init__(self, folder: Path):
        pristine, expected = tiny_source(folder.parent)
        self.folder, self.out, self.expected = folder, folder / "out", dict(expected)
        self.source = Path(shutil.copytree(pristine, folder / "source"))

    def is_whole(self) -> bool:
        """`out` is what a conversion of the local source gives, and nothing is beside it."""
        assert sorted(path.name for path in self.folder.iterdir()) == ["out", "source"]
        return without_provenance(snapshot(self.out)) == self.expected

    def is_empty(self) -> bool:
        return [path.name for path in self.folder.iterdir()] == ["source"]


def without_provenance(files: dict[str, bytes]) -> dict[str, bytes]:
    """Without what says where a checkpoint is from: the model card, and a part of the configuration."""
    config = json.loads(files["config.json"])
    del config["conversion"]
    files = {key: data for key, data in files.items() if key != "README.md"}
    return files | {"config.json": json.dumps(config).encode()}


def commits(repo_id: str) -> int:
    return len(hub.repos[repo_id].commits) - 1  # less the empty one that a repository begins with


def cached_blobs() -> list[Path]:
    """Large files in the Hub cache, which are named by their SHA-256."""
    return [path for path in Path(constants.HF_HUB_CACHE).rglob("blobs/*") if len(path.name) == 64]


@contextlib.contextmanager
def patience(seconds: float) -> Iterator[None]:
    """How long the client waits for an answer."""
    before = constants.HF_HUB_DOWNLOAD_TIMEOUT, hub_videonsa.UPLOAD_TIMEOUT_SECONDS
    constants.HF_HUB_DOWNLOAD_TIMEOUT = hub_videonsa.UPLOAD_TIMEOUT_SECONDS = seconds
    try:
        yield
    finally:
        constants.HF_HUB_DOWNLOAD_TIMEOUT, hub_videonsa.UPLOAD_TIMEOUT_SECONDS = before


def killed_at(method: str, path: str, convert_it: Callable[[], object]) -> None:
    """Run in a process of its own, which is killed when it makes this request."""
    started = queue.Queue()
    hub.fail(method, path, times=1, call=lambda: os.kill(started.get(), signal.SIGKILL))
    close_session()  # the child must not use this process's connections
    if (child := os.fork()) == 0:
        try:
            convert_it()
        finally:
            os._exit(1)
    started.put(child)
    status = os.waitpid(child, 0)[1]
    assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL, status


def fails(error: type[Exception], message: str, *arguments: object, **keywords: object) -> None:
    """`convert` raises this."""
    with pytest.raises(error, match=message):
        convert(*arguments, **keywords)


# Downloads.


@scenario
def revisions_and_wrong_names(place):
    """By id, at main and at a pinned older commit; pickles and foreign files are not fetched."""
    tensors = load_all(place.source)
    (place.source / "pytorch_model.bin").write_bytes(b"pickle")
    (place.source / "consolidated.safetensors").write_bytes(b"of another format")
    card = "---\nlicense: other\nlicense_name: qwen\nlicense_link: LICENSE\n---\nA card"
    (place.source / "README.md").write_text(card)
    (place.source / "LICENSE").write_text("terms")
    place.expected |= {"LICENSE": b"terms"}
    old = hub.seed("org/Qwen", place.source)
    tensors[NORM] += 1
    write_sharded(place.source, [tensors])
    new = hub.seed("org/Qwen", place.source)
    convert("org/Qwen", place.out, revision=old)
    assert place.is_whole()
    conversion = json.loads((place.out / "config.json").read_text())["conversion"]
    assert (conversion["source"], conversion["source_commit"]) == ("org/Qwen", old)
    assert [conversion[name] for name in ("base_model", "license", "license_name")] == ["org/Qwen", "other", "qwen"]
    convert("org/Qwen", place.folder / "main")
    assert torch.equal(load_all(place.folder / "main")[NORM], tensors[NORM])
    card = (place.folder / "main" / "README.md").read_text()
    assert f"[org/Qwen](https://huggingface.co/org/Qwen) at commit `{new}`" in card and "[qwen](LICENSE)" in card
    assert not hub.count("GET", "pytorch_model|consolidated")

    for file in place.source.glob("model*"):
        file.unlink()
    hub.seed("org/Pickled", place.source)
    out = place.folder / "failed"
    fails(ValueError, "`source` 'org/Absent' is neither a folder nor a repository on the Hub", "org/Absent", out)
    fails(ValueError, "`revision` 'v9' does not exist in 'org/Qwen'", "org/Qwen", out, revision="v9")
    fails(ValueError, r"pickled weights \('pytorch_model.bin'\) are not read", "org/Pickled", out)
    hub.fail("GET", "/api/models/org/Llama", status=403, code="GatedRepo")
    fails(ValueError, "`source` 'org/Llama' is gated", "org/Llama", out)
    assert not out.exists()


@scenario
def a_folder_of_the_hub_cache_knows_where_it_is_from(place):
    commit = hub.seed("org/Qwen", place.source)
    convert("org/Qwen", place.out)
    folder = cached_blobs()[0].parent.parent / "snapshots" / commit
    convert(folder, place.folder / "again")
    assert snapshot(place.folder / "again").keys() == snapshot(place.out).keys()
    assert (place.folder / "again/config.json").read_bytes() == (place.out / "config.json").read_bytes()


@scenario
def dry_run_fetches_headers_alone(place):
    commit = hub.seed("org/Qwen", place.source)
    printed = [io.StringIO(), io.StringIO()]
    for source, text in zip(("org/Qwen", place.source), printed, strict=True):
        with contextlib.redirect_stdout(text):
            convert(source, place.out, dry_run=True)
    remote, local = (text.getvalue().splitlines() for text in printed)
    assert remote[0] == f"Source  org/Qwen at commit {commit}"
    assert remote[4:] == local[4:] and len(remote) > 70
    assert place.is_empty() and not cached_blobs()


@scenario
def a_wrong_repository_is_told_apart_before_its_weights_are_fetched(place):
    edit_json(place.source / "config.json", model_type="llama")
    hub.seed("org/Llama", place.source)
    fails(ValueError, "`model_type` must be 'qwen2_5_vl' or 'videonsa', got 'llama'", "org/Llama", place.out)
    assert not hub.count("GET", SHARD)
    edit_json(place.source / "config.json", model_type="qwen2_5_vl")
    damage_tensors(place.source, lambda tensors: tensors.update(extra=torch.ones(1)))
    hub.seed("org/Odd", place.source)
    fails(ValueError, "unknown tensor in the source: 'extra'", "org/Odd", place.out)
    assert place.is_empty() and not cached_blobs()


@scenario
def a_refused_shard(place):
    """503 for one shard: a clear error, and the next run fetches what is missing alone."""
    hub.seed("org/Qwen", place.source)
    convert("org/Qwen", place.out, dry_run=True)
    hub.fail("GET", "model-00005.*safetensors$", status=503)
    hub.fail("HEAD", "model-00005.*safetensors$", status=503)
    refused = "the Hub did not give `source` 'org/Qwen': .*503.*, so run the same command again"
    fails(OSError, refused, "org/Qwen", place.out)
    assert place.is_empty()
    hub.faults.clear()
    hub.requests.clear()
    arrived = len(cached_blobs())
    convert("org/Qwen", place.out)
    assert place.is_whole()
    assert hub.count("GET", SHARD) == 8 + 8 - arrived  # headers, and what had not arrived


@scenario
def a_dropped_download_goes_on_where_it_was(place):
    hub.seed("org/Qwen", place.source)
    hub.fail("GET", "model-00003.*safetensors$", cut_answer_at=50_000, times=2)  # the header's request, and the file's
    convert("org/Qwen", place.out)
    assert place.is_whole()


@scenario
def a_download_that_is_dropped_again_and_again(place):
    hub.seed("org/Qwen", place.source)
    convert("org/Qwen", place.out, dry_run=True)
    hub.fail("GET", "model-00003.*safetensors$", cut_answer_at=0)
    fails(OSError, "the Hub did not give `source` 'org/Qwen'", "org/Qwen", place.out)
    assert place.is_empty()
    hub.faults.clear()
    convert("org/Qwen", place.out)
    assert place.is_whole()


@scenario
def a_hub_that_does_not_answer_in_time(place):
    hub.seed("org/Qwen", place.source)
    with patience(0.5):
        hub.fail("GET", "model-00003.*safetensors$", delay=2, times=1)
        hub.fail("GET", "model-00004.*safetensors$", delay=2)
        fails(OSError, "the Hub did not give `source` 'org/Qwen'", "org/Qwen", place.out)
        assert place.is_empty()
        hub.faults.clear()
        convert("org/Qwen", place.out)
    assert place.is_whole()


@scenario
def a_hub_that_is_down_matters_only_while_something_is_missing(place):
    hub.seed("org/Qwen", place.source)
    hub.is_down = True
    fails(OSError, "the Hub did not give `source` 'org/Qwen'", "org/Qwen", place.out)
    hub.is_down = False
    with contextlib.redirect_stdout(io.StringIO()):
        convert("org/Qwen", place.out, dry_run=True)
    hub.is_down = True
    fails(OSError, "the Hub did not give `source` 'org/Qwen'", "org/Qwen", place.out)  # the weights are missing
    assert place.is_empty()
    hub.is_down = False
    convert("org/Qwen", place.folder / "first")
    shutil.rmtree(place.folder / "first")
    hub.is_down = True
    convert("org/Qwen", place.out)
    assert place.is_whole()


@scenario
def a_file_that_has_arrived_damaged(place):
    """What the Hub client does not see: its size is right."""
    hub.seed("org/Qwen", place.source)
    convert("org/Qwen", place.folder / "first")
    shutil.rmtree(place.folder / "first")
    blob = max(cached_blobs(), key=lambda path: path.stat().st_size)
    data = bytearray(blob.read_bytes())
    data[-1] ^= 1
    blob.write_bytes(data)
    hub.requests.clear()
    fails(
        ValueError, f"has arrived damaged: its SHA-256 is not {blob.name}; delete {blob} and run", "org/Qwen", place.out
    )
    assert place.is_empty()
    blob.unlink()
    convert("org/Qwen", place.out)
    assert place.is_whole()


@scenario
def killed_while_downloading(place):
    hub.seed("org/Qwen", place.source)
    convert("org/Qwen", place.out, dry_run=True)
    hub.requests.clear()
    killed_at("GET", "model-00006.*safetensors$", lambda: convert("org/Qwen", place.out))
    assert place.is_empty()
    convert("org/Qwen", place.out)
    assert place.is_whole()


# Uploads.


def pushed(place: Place, repo_id: str = "me/VideoNSA") -> bool:
    """The repository holds what `out` holds, in one commit."""
    assert commits(repo_id) == 1
    return hub.files(repo_id) == snapshot(place.out)


@scenario
def a_push_and_its_repetition(place):
    """Private, one commit, the card with the repository's name; the same command again changes nothing."""
    for _ in range(2):
        hub.requests.clear()
        convert(place.source, place.out, push_to_hub="me/VideoNSA", base_model="org/Qwen")
        assert pushed(place) and hub.repos["me/VideoNSA"].private
    (place.out / "notes.txt").write_text("not of the checkpoint, and not for the Hub")
    convert(place.source, place.out, push_to_hub="me/VideoNSA", base_model="org/Qwen")
    (place.out / "notes.txt").unlink()
    assert pushed(place)
    assert not hub.count("PUT", UPLOAD) and not hub.count("POST", COMMIT)
    card = hub.files("me/VideoNSA")["README.md"].decode()
    assert (
        "Converted by `convert_weights.py`" in card
        and 'repo = "me/VideoNSA"' in card
        and "base_model: org/Qwen" in card
        and CARD_MARK in card
    )
    fails(ValueError, "exists; `overwrite`", place.source, place.out, push_to_hub="me/VideoNSA", seed=1)
    assert pushed(place)


@scenario
def a_public_repository(place):
    """Public when all is there, and never by accident."""
    convert(place.source, place.out, push_to_hub="me/VideoNSA", public=True)
    assert pushed(place) and not hub.repos["me/VideoNSA"].private
    order = [path.rpartition("VideoNSA")[2] for method, path, _ in hub.requests if method in ("POST", "PUT")]
    assert [path for path in order if path in ("/commit/main", "/settings")] == ["/commit/main", "/settings"]
    refused = "`push_to_hub` 'me/VideoNSA' is a public repository"
    fails(ValueError, refused, place.source, place.out, push_to_hub="me/VideoNSA")
    convert(place.source, place.out, push_to_hub="me/VideoNSA", public=True)
    assert commits("me/VideoNSA") == 1


@scenario
def a_missing_permission_shows_before_the_work(place):
    hub.fail("POST", "/api/repos/create", status=403, code="")
    fails(
        OSError,
        "the Hub did not take `push_to_hub` 'me/V': 403 Forbidden.*; nothing has been done",
        place.source,
        place.out,
        push_to_hub="me/V",
    )
    assert place.is_empty()


@scenario
def an_upload_that_is_refused(place):
    """503 for some of the shards: nothing is to be seen, and the next run sends those alone."""
    hub.fail("PUT", UPLOAD + "[0-7]", status=503)
    fails(
        OSError,
        f"the Hub did not take `push_to_hub` 'me/V'.*checkpoint in {place.out} is complete, and the same command sends",
        place.source,
        place.out,
        push_to_hub="me/V",
    )
    assert place.is_whole() and commits("me/V") == 0 and list(hub.files("me/V")) == []
    arrived = set(hub.lfs)
    assert 0 < len(arrived) < 8
    hub.faults.clear()
    hub.requests.clear()
    convert(place.source, place.out, push_to_hub="me/V")
    assert pushed(place, "me/V")
    sent = {path.rsplit("/", 1)[1] for method, path, _ in hub.requests if method == "PUT"}
    assert sent == hub.lfs.keys() - arrived


@scenario
def an_upload_that_is_dropped_once(place):
    hub.fail("PUT", UPLOAD, cut_request_at=1000, times=3)
    convert(place.source, place.out, push_to_hub="me/V")
    assert pushed(place, "me/V") and hub.count("PUT", UPLOAD) == 8 + 3


@scenario
def an_upload_that_is_dropped_again_and_again(place):
    hub.fail("PUT", UPLOAD + "[0-7]", cut_request_at=1000)
    fails(OSError, "the Hub did not take `push_to_hub` 'me/V'", place.source, place.out, push_to_hub="me/V")
    assert place.is_whole() and commits("me/V") == 0
    hub.faults.clear()
    convert(place.source, place.out, push_to_hub="me/V")
    assert pushed(place, "me/V")


@scenario
def an_upload_that_is_not_answered_in_time(place):
    with patience(0.5):
        hub.fail("PUT", UPLOAD + "[0-3]", delay=1.5, times=1)
        convert(place.source, place.out, push_to_hub="me/V")
        assert pushed(place, "me/V")
        del hub.repos["me/V"]
        hub.lfs.clear()
        hub.fail("PUT", UPLOAD + "[0-7]", delay=1.5)
        fails(OSError, "the Hub did not take `push_to_hub` 'me/V'", place.source, place.out, push_to_hub="me/V")
    assert place.is_whole() and commits("me/V") == 0
    hub.faults.clear()
    convert(place.source, place.out, push_to_hub="me/V")
    assert pushed(place, "me/V")


@scenario
def a_commit_that_is_refused(place):
    hub.fail("POST", COMMIT, status=503, times=1)
    fails(OSError, "the Hub did not take `push_to_hub` 'me/V'", place.source, place.out, push_to_hub="me/V")
    assert commits("me/V") == 0 and len(hub.lfs) == 8
    hub.requests.clear()
    convert(place.source, place.out, push_to_hub="me/V")
    assert pushed(place, "me/V") and not hub.count("PUT", UPLOAD)


@scenario
def a_commit_whose_answer_is_lost(place):
    """The Hub has taken it, the client cannot know: the next run finds nothing to do."""
    hub.fail("POST", COMMIT, lose_answer=True, times=1)
    fails(OSError, "the Hub did not take `push_to_hub` 'me/V'", place.source, place.out, push_to_hub="me/V")
    convert(place.source, place.out, push_to_hub="me/V")
    assert pushed(place, "me/V")


@scenario
def killed_while_uploading(place):
    for method, path in (("POST", "/api/repos/create"), ("PUT", UPLOAD), ("POST", COMMIT)):
        killed_at(method, path, lambda: convert(place.source, place.out, push_to_hub="me/V"))
        assert place.is_empty() if path.endswith("create") else place.is_whole()
    convert(place.source, place.out, push_to_hub="me/V")
    assert pushed(place, "me/V")


@scenario
def other_shards_replace_those_of_the_repository(place):
    """Stale weights would be loaded instead of the new ones."""
    convert(place.source, place.out, push_to_hub="me/V")
    notes = place.folder / "notes"
    notes.mkdir()
    (notes / "notes.txt").write_text("the user's")
    hub.repos["me/V"].commit({"notes.txt": (b"the user's", False)}, "notes")
    convert(place.source, place.out, push_to_hub="me/V", max_shard_size="5GB", overwrite=True)
    assert hub.files("me/V") == snapshot(place.out) | {"notes.txt": b"the user's"}
    assert "model.safetensors" in hub.files("me/V")


@scenario
def a_card_of_ones_own(place):
    """The repository's stays, and so does the folder's."""
    convert(place.source, place.out, push_to_hub="me/V")
    hub.repos["me/V"].commit({"README.md": (b"# Mine", False)}, "my card")
    (place.out / "README.md").write_text("# Mine too")
    convert(place.source, place.out, push_to_hub="me/V")
    assert hub.files("me/V")["README.md"] == b"# Mine" and commits("me/V") == 2
    convert(place.source, place.out, push_to_hub="me/New")
    assert hub.files("me/New")["README.md"] == b"# Mine too"
    assert (place.out / "README.md").read_text() == "# Mine too"
