"""A Hugging Face Hub in memory, enough for the real huggingface_hub client: repositories, commits, LFS, revisions.

    with FakeHub() as hub:
        commit = hub.seed("org/VideoNSA", folder)
        hub.fail("GET", r"/resolve/.*safetensors", cut_answer_at=1000, times=2)
        subprocess.run(..., env=os.environ | hub.environment(cache_folder))

or, to look at it from a shell, `python tests/fake_hub.py --port 8123 --seed org/VideoNSA=/path/to/folder`.
"""

import argparse
import base64
import hashlib
import json
import re
import socket
import sys
import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

LFS_SUFFIXES = (".safetensors", ".bin", ".pt", ".mp4", ".parquet")
LFS_BYTES = 10 * 2**20


def git_sha(data: bytes) -> str:
    """The object id that git gives a file of this content."""
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def object_id(data: bytes, is_lfs: bool) -> str:
    """What the Hub knows a file by."""
    return hashlib.sha256(data).hexdigest() if is_lfs else git_sha(data)


class Repo:
    """Commits, each a full listing `{path: (content, is_lfs)}`, and the branches that point to them."""

    def __init__(self, private: bool = False):
        self.private = private
        self.commits: dict[str, dict[str, tuple[bytes, bool]]] = {}
        self.refs: dict[str, str] = {}
        self.commit({}, "initial commit")

    def resolve(self, revision: str) -> str | None:
        """The commit of a branch name or commit id, or None."""
        return self.refs.get(revision) or (revision if revision in self.commits else None)

    def commit(
        self,
        changes: dict[str, tuple[bytes, bool]],
        message: str,
        branch: str = "main",
        deleted: Iterable[str] = (),
    ) -> str:
        """Commit new and changed files, less those deleted (files or whole folders); the commit's id."""
        parent = self.refs.get(branch) or self.refs.get("main")
        gone = [path.rstrip("/") for path in deleted]
        files = {
            path: file
            for path, file in self.commits.get(parent, {}).items()
            if not any(path == name or path.startswith(f"{name}/") for name in gone)
        } | changes
        digest = hashlib.sha1(f"{parent} {message} {len(self.commits)}".encode())
        for path in sorted(files):
            digest.update(path.encode() + files[path][0])
        self.refs[branch] = digest.hexdigest()
        self.commits[digest.hexdigest()] = files
        return digest.hexdigest()


@dataclass
class Fault:
    """What goes wrong with some requests; see `FakeHub.fail`."""

    method: str
    path: re.Pattern
    times: int
    status: int | None
    code: str
    cut_request_at: int | None
    cut_answer_at: int | None
    lose_answer: bool
    delay: float
    call: Callable[[], object] | None


class Server(ThreadingHTTPServer):
    """Does not print that a client has gone, which is what faults are for."""

    def handle_error(self, request, client_address):
        if not isinstance(sys.exc_info()[1], ConnectionError):
            super().handle_error(request, client_address)


class FakeHub:
    """The server; also a context manager.

    Attributes:
        url: where it listens.
        repos: repositories by id, those of datasets and kernels with the prefixes `datasets/`, `kernels/`.
        lfs: uploaded large files by SHA-256.
        requests: what has been asked: (method, path, query).
        is_down: answer every request with 503.
    """

    def __init__(self, port: int = 0):
        self.repos: dict[str, Repo] = {}
        self.lfs: dict[str, bytes] = {}
        self.requests: list[tuple[str, str, str]] = []
        self.is_down = False
        self.faults: list[Fault] = []
        self.lock = threading.Lock()
        self.server = Server(("127.0.0.1", port), type("BoundHandler", (Handler,), {"hub": self}))
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"

    def seed(self, repo_id: str, folder: str | Path, branch: str = "main") -> str:
        """Make `folder` the content of a repository, created if need be; the commit's id."""
        repo = self.repos.setdefault(repo_id, Repo())
        files = {
            path.relative_to(folder).as_posix(): (path.read_bytes(), path.suffix in LFS_SUFFIXES)
            for path in Path(folder).rglob("*")
            if path.is_file() and "__pycache__" not in path.parts
        }
        return repo.commit(files, f"seed {folder}", branch, deleted=list(repo.commits[repo.refs["main"]]))

    def fail(
        self,
        method: str,
        path: str,
        *,
        times: int = 1_000_000,
        status: int | None = None,
        code: str = "Down",
        cut_request_at: int | None = None,
        cut_answer_at: int | None = None,
        lose_answer: bool = False,
        delay: float = 0.0,
        call: Callable[[], object] | None = None,
    ) -> None:
        """Let the next `times` requests go wrong whose method is `method` and in whose path the pattern `path` is.

        Args:
            status, code: answer with this instead; the code is the `X-Error-Code`.
            cut_request_at: drop the connection after so many bytes of the request's body.
            cut_answer_at: drop the connection after so many bytes of the answer's body.
            lose_answer: do what was asked, and drop the connection instead of answering.
            delay: seconds to wait before doing anything.
            call: run this first.
        """
        self.faults.append(
            Fault(
                method, re.compile(path), times, status, code, cut_request_at, cut_answer_at, lose_answer, delay, call
            )
        )

    def take_fault(self, method: str, path: str) -> Fault | None:
        """The fault that this request has, if any; it then has happened once more."""
        with self.lock:
            for fault in self.faults:
                if fault.times and fault.method == method and fault.path.search(path):
                    fault.times -= 1
                    return fault
        return None

    def count(self, method: str, path: str) -> int:
        """How many requests so far had this method and a path with this pattern in it."""
        return sum(asked == method and bool(re.search(path, where)) for asked, where, _ in self.requests)

    def files(self, repo_id: str, revision: str = "main") -> dict[str, bytes]:
        """The content of a repository, by path."""
        repo = self.repos[repo_id]
        return {path: data for path, (data, _) in repo.commits[repo.resolve(revision)].items()}

    def environment(self, cache: str | Path, *, offline: bool = False) -> dict[str, str]:
        """Environment variables with which huggingface_hub uses this server and keeps its caches below `cache`."""
        return {
            "HF_ENDPOINT": self.url,
            "HF_HOME": str(cache),
            "HF_HUB_CACHE": str(Path(cache) / "hub"),
            "HF_MODULES_CACHE": str(Path(cache) / "modules"),
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_OFFLINE": "1" if offline else "0",
            "HF_TOKEN": "hf_fake",
        }

    def start(self) -> "FakeHub":
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        return self

    def stop(self) -> None:
        """Stop listening: connections are refused from here on."""
        self.server.shutdown()
        self.server.server_close()

    def __enter__(self) -> "FakeHub":
        return self.start()

    def __exit__(self, *error) -> None:
        self.stop()


class Handler(BaseHTTPRequestHandler):
    """Answers one request. The methods below the routing take the request's body and the groups of the route."""

    hub: FakeHub
    protocol_version = "HTTP/1.1"

    def log_message(self, *args) -> None:
        """Override: requests are kept in `FakeHub.requests`, not printed."""

    def route(self) -> None:
        url = urlsplit(self.path)
        self.query = parse_qs(url.query)
        self.hub.requests.append((self.command, url.path, url.query))
        self.fault = self.hub.take_fault(self.command, url.path)
        if self.fault:
            if self.fault.call:
                self.fault.call()
            threading.Event().wait(self.fault.delay)  # not time.sleep, which tests may have replaced
            if self.fault.cut_request_at is not None:
                self.rfile.read(self.fault.cut_request_at)
                self.hang_up()
                return
        body = self.read_body() if self.command in ("POST", "PUT", "DELETE") else b""
        if self.hub.is_down:
            self.fail(503, "Down", "the fake hub is down")
            return
        if self.fault and self.fault.status:
            self.fail(self.fault.status, self.fault.code, "the fake hub fails")
            return
        for methods, pattern, handler in ROUTES:
            match = re.fullmatch(pattern, url.path)
            if match and self.command in methods:
                handler(self, body, **{name: value and unquote(value) for name, value in match.groupdict().items()})
                return
        self.fail(404, "", f"no route for {self.command} {url.path}")

    def hang_up(self) -> None:
        self.close_connection = True
        self.connection.shutdown(socket.SHUT_RDWR)

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = route

    def read_body(self) -> bytes:
        if "chunked" not in self.headers.get("Transfer-Encoding", ""):
            length = int(self.headers.get("Content-Length") or 0)
            body = self.rfile.read(length)
            if len(body) < length:
                raise ConnectionResetError("the client has gone in the middle of its request")
            return body
        body = b""
        while size := int(self.rfile.readline().split(b";")[0], 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return body

    def answer(self, body: object = b"", headers: dict[str, str] | None = None, status: int = 200) -> None:
        """Send bytes as they are and anything else as JSON."""
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        if self.fault and self.fault.lose_answer:
            self.hang_up()
            return
        self.send_response(status)
        for name, value in (
            {"Content-Type": "application/json", "Content-Length": len(data)} | (headers or {})
        ).items():
            self.send_header(name, str(value))
        self.end_headers()
        if self.command != "HEAD":
            cut = self.fault.cut_answer_at if self.fault else None
            self.wfile.write(data[:cut])
            if cut is not None and cut < len(data):
                self.wfile.flush()
                self.hang_up()

    def fail(self, status: int, code: str, message: str, **headers: str) -> None:
        self.answer({"error": message}, {"X-Error-Code": code, "X-Error-Message": message} | headers, status)

    def find_repo(self, key: str) -> Repo | None:
        repo = self.hub.repos.get(key)
        if repo is None:
            status = 404 if "Authorization" in self.headers else 401
            self.fail(status, "RepoNotFound", f"Repository {key} not found")
        return repo

    def find_commit(self, key: str, revision: str) -> tuple[Repo, str, dict[str, tuple[bytes, bool]]] | None:
        if (repo := self.find_repo(key)) is None:
            return None
        commit = repo.resolve(revision)
        if commit is None:
            self.fail(404, "RevisionNotFound", f"Invalid rev id: {revision}")
            return None
        return repo, commit, repo.commits[commit]

    def create_repo(self, body: bytes) -> None:
        wanted = json.loads(body)
        repo_id = f"{wanted.get('organization') or 'org'}/{wanted['name']}"
        key = repo_key(f"{wanted.get('type', 'model')}s", repo_id)
        url = f"{self.hub.url}/{key}"
        if key in self.hub.repos:
            self.answer({"error": "You already created this repository", "url": url}, status=409)
            return
        self.hub.repos[key] = Repo(private=bool(wanted.get("private")) or wanted.get("visibility") == "private")
        self.answer({"url": url, "name": repo_id, "id": "0" * 24})

    def repo_info(self, body: bytes, kind: str, repo_id: str, revision: str = "main") -> None:
        if found := self.find_commit(repo_key(kind, repo_id), revision):
            repo, commit, files = found
            self.answer(
                {
                    "_id": "0" * 24,
                    "id": repo_id,
                    "modelId": repo_id,
                    "author": repo_id.split("/")[0],
                    "sha": commit,
                    "private": repo.private,
                    "gated": False,
                    "disabled": False,
                    "downloads": 0,
                    "likes": 0,
                    "tags": [],
                    "createdAt": "2025-01-01T00:00:00.000Z",
                    "lastModified": "2025-01-01T00:00:00.000Z",
                    "siblings": [{"rfilename": path} for path in sorted(files)],
                }
            )

    def list_refs(self, body: bytes, kind: str, repo_id: str) -> None:
        if repo := self.find_repo(repo_key(kind, repo_id)):
            branches = [
                {"name": name, "ref": f"refs/heads/{name}", "targetCommit": commit}
                for name, commit in repo.refs.items()
            ]
            self.answer({"branches": branches, "tags": [], "converts": []})

    def tree(self, body: bytes, kind: str, repo_id: str, revision: str, folder: str | None) -> None:
        if not (found := self.find_commit(repo_key(kind, repo_id), revision)):
            return
        prefix = f"{folder.strip('/')}/" if folder else ""
        recursive = self.query.get("recursive", ["false"])[0].lower() in ("1", "true")
        entries, folders = [], set()
        for path, (data, is_lfs) in sorted(found[2].items()):
            if not path.startswith(prefix):
                continue
            parts = path.removeprefix(prefix).split("/")
            parents = [prefix + "/".join(parts[:depth]) for depth in range(1, len(parts))]
            folders.update(parents if recursive else parents[:1])
            if recursive or not parents:
                entry = {"type": "file", "path": path, "size": len(data), "oid": git_sha(data)}
                if is_lfs:
                    entry["lfs"] = {"oid": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 134}
                entries.append(entry)
        if folder and not entries and not folders:
            self.fail(404, "EntryNotFound", f"{folder} does not exist")
            return
        directories = [{"type": "directory", "path": p, "size": 0, "oid": git_sha(p.encode())} for p in sorted(folders)]
        self.answer(directories + entries)

    def settings(self, body: bytes, kind: str, repo_id: str) -> None:
        if repo := self.find_repo(repo_key(kind, repo_id)):
            wanted = json.loads(body)
            repo.private = wanted.get("private", wanted.get("visibility") == "private")
            self.answer({})

    def create_branch(self, body: bytes, kind: str, repo_id: str, name: str) -> None:
        start = (json.loads(body) if body else {}).get("startingPoint") or "main"
        if found := self.find_commit(repo_key(kind, repo_id), start):
            repo, commit, _ = found
            if name in repo.refs:
                self.answer({"error": "Reference already exists"}, status=409)
                return
            repo.refs[name] = commit
            self.answer({})

    def resolve(self, body: bytes, repo_id: str, revision: str, path: str, kind: str | None) -> None:
        """A file's content. The real Hub redirects large files to a CDN; here they come at once."""
        if not (found := self.find_commit((kind or "") + repo_id, revision)):
            return
        _, commit, files = found
        if path not in files:
            self.fail(404, "EntryNotFound", "Entry not found", **{"X-Repo-Commit": commit})
            return
        data, is_lfs = files[path]
        etag = f'"{object_id(data, is_lfs)}"'
        headers = {"X-Repo-Commit": commit, "ETag": etag, "Content-Type": "application/octet-stream"}
        if is_lfs:
            headers |= {"X-Linked-ETag": etag, "X-Linked-Size": str(len(data))}
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if asked is None:
            self.answer(data, headers)
            return
        first, last = int(asked[1]), min(int(asked[2] or len(data) - 1), len(data) - 1)
        headers["Content-Range"] = f"bytes {first}-{last}/{len(data)}"
        self.answer(data[first : last + 1], headers, status=206)

    def preupload(self, body: bytes, kind: str, repo_id: str, revision: str) -> None:
        if found := self.find_commit(repo_key(kind, repo_id), revision):
            files = []
            for file in json.loads(body)["files"]:
                is_lfs = file["path"].endswith(LFS_SUFFIXES) or file["size"] > LFS_BYTES
                mode = "lfs" if is_lfs else "regular"
                data, was_lfs = found[2].get(file["path"], (None, False))
                oid = None if data is None else object_id(data, was_lfs)
                files.append({"path": file["path"], "uploadMode": mode, "shouldIgnore": False, "oid": oid})
            self.answer({"files": files})

    def lfs_batch(self, body: bytes, repo_id: str, kind: str | None) -> None:
        objects = []
        for wanted in json.loads(body)["objects"]:
            entry = {"oid": wanted["oid"], "size": wanted["size"]}
            if wanted["oid"] not in self.hub.lfs:
                entry["actions"] = {"upload": {"href": f"{self.hub.url}/__lfs/{wanted['oid']}", "header": {}}}
            objects.append(entry)
        headers = {"Content-Type": "application/vnd.git-lfs+json"}
        self.answer({"transfer": "basic", "objects": objects}, headers)

    def lfs_put(self, body: bytes, oid: str) -> None:
        if hashlib.sha256(body).hexdigest() != oid:
            self.fail(400, "BadOid", "sha256 mismatch")
            return
        self.hub.lfs[oid] = body
        self.answer()

    def commit(self, body: bytes, kind: str, repo_id: str, revision: str) -> None:
        if not (repo := self.find_repo(repo_key(kind, repo_id))):
            return
        changes, deleted, message = {}, [], ""
        for line in body.splitlines():
            operation = json.loads(line)
            value = operation["value"]
            if operation["key"] == "header":
                message = value["summary"]
            elif operation["key"] == "file":
                changes[value["path"]] = (base64.b64decode(value["content"]), False)
            elif operation["key"] == "lfsFile":
                changes[value["path"]] = (self.hub.lfs[value["oid"]], True)
            else:
                deleted.append(value["path"])
        commit = repo.commit(changes, message, revision, deleted)
        url = f"{self.hub.url}/{repo_id}/commit/{commit}"
        self.answer({"success": True, "commitOid": commit, "commitUrl": url, "hookOutput": "", "pullRequestUrl": None})

    def validate_card(self, body: bytes) -> None:
        self.answer({"errors": [], "warnings": []})


def repo_key(kind: str, repo_id: str) -> str:
    """The key in `FakeHub.repos`; `kind` is "models", "datasets" or "kernels"."""
    return repo_id if kind == "models" else f"{kind}/{repo_id}"


_REPO = r"/api/(?P<kind>models|datasets|kernels)/(?P<repo_id>[^/]+/[^/]+)"
_FILES = r"/(?P<kind>datasets/|kernels/)?(?P<repo_id>[^/]+/[^/]+)"
_REVISION = r"(?P<revision>[^/]+)"
ROUTES = (
    (("POST",), r"/api/repos/create", Handler.create_repo),
    (("POST",), r"/api/validate-yaml", Handler.validate_card),
    (("GET", "HEAD"), _REPO, Handler.repo_info),
    (("GET", "HEAD"), f"{_REPO}/revision/{_REVISION}", Handler.repo_info),
    (("GET",), rf"{_REPO}/tree/{_REVISION}(?:/(?P<folder>.+))?", Handler.tree),
    (("GET",), f"{_REPO}/refs", Handler.list_refs),
    (("PUT",), f"{_REPO}/settings", Handler.settings),
    (("POST",), rf"{_REPO}/branch/(?P<name>.+)", Handler.create_branch),
    (("POST",), f"{_REPO}/preupload/{_REVISION}", Handler.preupload),
    (("POST",), f"{_REPO}/commit/{_REVISION}", Handler.commit),
    (("POST",), rf"{_FILES}\.git/info/lfs/objects/batch", Handler.lfs_batch),
    (("PUT",), r"/__lfs/(?P<oid>[0-9a-f]+)", Handler.lfs_put),
    (("GET", "HEAD"), rf"{_FILES}/resolve/{_REVISION}/(?P<path>.+)", Handler.resolve),
)


def main() -> None:
    parser = argparse.ArgumentParser(description="Serve folders as Hub repositories until interrupted.")
    parser.add_argument("--port", type=int, default=8123)
    parser.add_argument("--seed", action="append", default=[], metavar="ORG/NAME=FOLDER")
    arguments = parser.parse_args()
    hub = FakeHub(arguments.port)
    for pair in arguments.seed:
        repo_id, folder = pair.split("=", 1)
        print(repo_id, hub.seed(repo_id, folder), flush=True)
    print(f"export HF_ENDPOINT={hub.url} HF_HUB_DISABLE_XET=1 HF_TOKEN=hf_fake", flush=True)
    hub.server.serve_forever()


if __name__ == "__main__":
    main()
