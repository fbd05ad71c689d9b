"""How video files come to the page and go out to its player, without Gradio.

A file comes as the body of `PUT visitor/KEY/upload?name=...` and is shown at `visitor/KEY/video`; the key is a secret
of the visitor. Nothing that a client sends names a file of the server: a visitor has one uploaded file, which the
events of the page mean by "the upload". Gradio's own ways for files are closed, since the page does without them.
"""

import json
import re
import secrets
import unicodedata
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path
from urllib.parse import unquote

from starlette.concurrency import run_in_threadpool
from starlette.requests import ClientDisconnect, Request
from starlette.responses import FileResponse, JSONResponse, PlainTextResponse, Response
from starlette.routing import Route

from .visitors import Refused, Video, Visitor, Visitors

MAX_EVENT_BYTES = 1 << 18
_MAX_NAME = 80
# What Gradio takes and gives out files by, and what fetches addresses or calls handlers past the queue.
_CLOSED = re.compile(r"/(gradio_api/)?(upload|upload_progress|file=|file/|proxy=|stream/|api/|call/|deep_link|vibe)")
_EVENTS = re.compile(r"/gradio_api/(queue|run|component_server|cancel|reset)")
# An event with one of these makes Gradio copy or fetch a file before a handler sees it.
_FILE_MARK = "gradio.FileData"

_EBML, _ASF = b"\x1aE\xdf\xa3", b"\x30\x26\xb2\x75\x8e\x66\xcf\x11"
_MP4_BOXES = (b"ftyp", b"moov", b"mdat", b"free", b"skip", b"wide", b"pnot")


def container_suffix(head: bytes) -> str | None:
    """The suffix for a video file with this beginning (400 bytes are enough), or None where it is no video container.

    Playlists, scripts and other texts that name further files are none.
    """
    if head[4:8] in _MP4_BOXES:
        return ".mp4"
    if head.startswith(_EBML):
        return ".mkv" if b"webm" not in head[:64] else ".webm"
    if head.startswith(b"RIFF") and head[8:12] == b"AVI ":
        return ".avi"
    if head.startswith((b"\0\0\1\xba", b"\0\0\1\xb3")):
        return ".mpg"
    if all(head[place : place + 1] == b"G" for place in (0, 188, 376)):
        return ".ts"
    if all(head[place : place + 1] == b"G" for place in (4, 196, 388)):
        return ".m2ts"
    beginnings = {b"OggS": ".ogv", b"FLV\1": ".flv", _ASF: ".wmv", b"GIF8": ".gif"}
    return next((suffix for beginning, suffix in beginnings.items() if head.startswith(beginning)), None)


def shown_name(name: str) -> str:
    """A file name as it may be shown: the last part of a path, in one line, not too long."""
    name = "".join(one for one in re.split(r"[/\\]", name)[-1] if unicodedata.category(one)[0] != "C").strip()
    return name if len(name) <= _MAX_NAME else f"{name[: _MAX_NAME - 9]}...{name[-6:]}"


def routes(visitors: Visitors) -> list[Route]:
    """For Starlette."""

    def visitor_of(request: Request) -> Visitor | None:
        return visitors.by_key(request.path_params["key"])

    async def upload(request: Request) -> Response:
        visitor = visitor_of(request)
        if visitor is None:
            return _refusal("This page was left alone for too long. Please reload it.", 410)
        try:
            room = await run_in_threadpool(visitors.reserve_upload, visitor)
        except Refused as reason:
            return _refusal(str(reason), 507)
        visitor.uploads += 1
        number = visitor.uploads
        name = shown_name(unquote(request.query_params.get("name", ""))) or "video"
        part = visitor.folder / f"{secrets.token_hex(8)}.part"
        try:
            head = await _save(request, part, room, lambda: visitor.uploads == number and not visitor.is_gone)
            suffix = container_suffix(head)
            if suffix is None:
                reason = "is empty" if not head else "is not a video file that can be read here"
                return _refusal(f"{name} {reason}. Try MP4, WebM, MKV, MOV or AVI.", 415)
            path = part.with_suffix(suffix)
            part.rename(path)
            before, visitor.upload = visitor.upload, Video(path, name, is_upload=True)
            if before is not None and before != visitor.video:
                before.path.unlink(missing_ok=True)
        except _TooLarge:
            return _refusal(f"{name} is larger than {room / 2**20:,.0f} MB, which is the limit here.", 413)
        except (ClientDisconnect, FileNotFoundError):  # the visitor has left, or chose another file
            return _refusal("The upload was interrupted.", 400)
        finally:
            part.unlink(missing_ok=True)
            if visitor.uploads == number:
                visitor.reserved = 0
        return JSONResponse({"name": name})

    async def video(request: Request) -> Response:
        visitor = visitor_of(request)
        if visitor is None or visitor.video is None or not visitor.video.path.is_file():
            return PlainTextResponse("There is no such video.", 404)
        # Never interpreted as a page, whatever is in it, and not kept by caches of others.
        headers = {"Cache-Control": "private, no-store", "X-Content-Type-Options": "nosniff"}
        return FileResponse(visitor.video.path, media_type=_media_type(visitor.video.path), headers=headers)

    return [
        Route("/visitor/{key}/upload", upload, methods=["PUT"]),
        Route("/visitor/{key}/video", video, methods=["GET"]),
    ]


def _media_type(path: Path) -> str:
    names = {".webm": "video/webm", ".mkv": "video/x-matroska", ".ogv": "video/ogg", ".gif": "image/gif"}
    return names.get(path.suffix, "video/mp4")


def _refusal(reason: str, status: int) -> Response:
    return JSONResponse({"error": reason}, status)


class _TooLarge(Exception):
    pass


async def _save(request: Request, path: Path, limit: int, is_wanted: Callable[[], bool]) -> bytes:
    """Write the body into a file; its first bytes."""
    promised = request.headers.get("content-length", "0")
    if promised.isdigit() and int(promised) > limit:
        raise _TooLarge
    size, head = 0, b""
    with path.open("wb") as file:
        async for chunk in request.stream():
            size += len(chunk)
            if size > limit:
                raise _TooLarge
            if not is_wanted():
                raise ClientDisconnect
            if len(head) < 512:
                head += chunk[: 512 - len(head)]
            await run_in_threadpool(file.write, chunk)
    return head


class NoFilesByGradio:
    """ASGI middleware: Gradio's own ways for files are closed, events carry none, and their size is bounded."""

    def __init__(self, app: Callable[..., Awaitable[None]]):
        self.app = app

    async def __call__(self, scope: Mapping, receive: Callable, send: Callable) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        path = scope["path"].removeprefix(scope.get("root_path", ""))
        if _CLOSED.match(path):
            return await PlainTextResponse("Not found", 404)(scope, receive, send)
        if scope["method"] == "POST" and _EVENTS.match(path):
            body, more = b"", True
            while more and len(body) <= MAX_EVENT_BYTES:
                message = await receive()
                if message["type"] != "http.request":
                    return None
                body, more = body + message.get("body", b""), message.get("more_body", False)
            if more or len(body) > MAX_EVENT_BYTES or _has_files(body):
                return await PlainTextResponse("Refused", 400)(scope, receive, send)
            receive = _replay(body, receive)
        return await self.app(scope, receive, send)


def _has_files(body: bytes) -> bool:
    """Whether an event says so anywhere, however its letters are written; True also of what is no JSON."""
    try:
        return _FILE_MARK in json.dumps(json.loads(body))
    except (ValueError, RecursionError):
        return True


def _replay(body: bytes, receive: Callable) -> Callable:
    messages = iter([{"type": "http.request", "body": body, "more_body": False}])

    async def replayed():
        return next(messages, None) or await receive()

    return replayed
