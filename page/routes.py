"""How video files come to the page and go out to its player, without Gradio.

A file comes as the body of `PUT visitor/KEY/upload?name=...` and is shown at `visitor/KEY/video`; the key is a secret
of the visitor. Nothing that a client sends names a file of the server: a visitor has one uploaded file, which the
events of the page mean by "the upload". Of Gradio's own addresses, only those that the page uses are open: its ways
for files, and whatever a version of it adds, are not.
"""

import asyncio
import contextlib
import errno
import json
import re
import secrets
import unicodedata
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from pathlib import Path
from urllib.parse import unquote
from weakref import WeakValueDictionary

import av
from starlette.concurrency import run_in_threadpool
from starlette.requests import ClientDisconnect, Request
from starlette.responses import FileResponse, JSONResponse, PlainTextResponse, Response
from starlette.routing import Route

from .visitors import Refused, Video, Visitor, Visitors

MAX_EVENT_BYTES = 1 << 18
_MAX_NAME = 80
CHUNK_SECONDS = 30.0
"""An upload ends where nothing has come for so long."""
_CHECK_SECONDS = 0.2
LINGER_SECONDS = 5.0
"""For so long, what still comes of a refused request is taken and thrown away."""
# What the page asks for, as a browser was seen to. To stop is the one event that does without the queue: it comes as
# `run/predict` with its number, and Gradio refuses the numbers of others there.
_OPEN = {
    "GET": re.compile(
        r"/|/config/?|/theme\.css|/favicon\.ico|/manifest\.json|/(assets|static|svelte)/.+|/visitor/[^/]+/video"
        r"|/gradio_api/(theme\.css|app_id/?|startup-events|queue/data|heartbeat/[^/]+)"
    ),
    "POST": re.compile(r"/gradio_api/(queue/join|cancel|reset/?|run/predict)"),
    "PUT": re.compile(r"/visitor/[^/]+/upload"),
}
_OPEN["HEAD"] = _OPEN["GET"]
# An event with one of these makes Gradio copy or fetch a file before a handler sees it.
_FILE_MARK = "gradio.FileData"

_EBML, _ASF = b"\x1aE\xdf\xa3", b"\x30\x26\xb2\x75\x8e\x66\xcf\x11"
_MP4_BOXES = (b"ftyp", b"moov", b"mdat", b"free", b"skip", b"wide", b"pnot")
_MP4_MAX_BOX = 1 << 31
_PRINTABLE = frozenset(b"\t\n\r") | frozenset(range(32, 127))
# Names of FFmpeg's demuxers, the only ones that may open a file with this suffix.
_DEMUXERS = {
    ".mp4": "mov,mp4,m4a,3gp,3g2,mj2",
    ".mkv": "matroska,webm",
    ".webm": "matroska,webm",
    ".avi": "avi",
    ".mpg": "mpeg,mpegvideo",
    ".ts": "mpegts",
    ".m2ts": "mpegts",
    ".ogv": "ogg",
    ".flv": "flv",
    ".wmv": "asf,asf_o",
    ".gif": "gif",
}


def container_suffix(head: bytes) -> str | None:
    """The suffix for a video file with this beginning (400 bytes are enough), or None where it is no video container.

    Playlists, scripts and other texts that name further files are none.
    """
    if head[4:8] in _MP4_BOXES and _is_box_size(head[:4]):
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


def _is_box_size(size: bytes) -> bool:
    """Whether an MP4 box may begin so, and a text may not; 1 stands for a size of 64 bits that comes later."""
    number = int.from_bytes(size, "big")
    return number == 1 or (8 <= number <= _MP4_MAX_BOX and not _PRINTABLE.issuperset(size))


def is_what_it_seems(path: Path) -> bool:
    """Whether FFmpeg takes a file for what its suffix, a result of `container_suffix`, stands for.

    A demuxer of another kind is refused before it reads anything. Broken files of the right kind are True: the reader
    says what is wrong with them.
    """
    allowed = _DEMUXERS[path.suffix]
    # Not `options`: with those, which are for streams too, PyAV 15 crashes where streams are found late, as in MPEG.
    options = {"format_whitelist": allowed, "protocol_whitelist": "file"}
    try:
        with av.open(f"file:{path}", container_options=options, metadata_errors="replace") as container:
            return bool(set(container.format.name.split(",")) & set(allowed.split(",")))
    except av.error.FFmpegError as error:
        return error.errno != errno.EINVAL  # this is said of a demuxer that is not on the list


def shown_name(name: str) -> str:
    """A file name as it may be shown: the last part of a path, in one line, not too long."""
    name = "".join(one for one in re.split(r"[/\\]", name)[-1] if unicodedata.category(one)[0] != "C").strip()
    return name if len(name) <= _MAX_NAME else f"{name[: _MAX_NAME - 9]}...{name[-6:]}"


def routes(visitors: Visitors) -> list[Route]:
    """For Starlette."""
    # By the visitor's key; each is there while uploads of the visitor use it.
    locks: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()

    def visitor_of(request: Request) -> Visitor | None:
        return visitors.by_key(request.path_params["key"])

    async def upload(request: Request) -> Response:
        visitor = visitor_of(request)
        if visitor is None:
            return _refusal("This page was left alone for too long. Please reload it.", 410)
        visitor.uploads += 1  # this ends the one that runs
        number = visitor.uploads
        lock = locks.setdefault(visitor.key, asyncio.Lock())
        async with lock:  # the one before has ended, and its part is gone
            try:
                return await receive(request, visitor, lambda: visitor.uploads == number and not visitor.is_gone)
            finally:
                visitor.reserved = 0

    async def receive(request: Request, visitor: Visitor, is_wanted: Callable[[], bool]) -> Response:
        if not is_wanted():
            return _refusal(_INTERRUPTED, 400)
        before, visitor.upload = visitor.upload, None
        if before is not None and before != visitor.video:
            before.path.unlink(missing_ok=True)
        try:
            room = await run_in_threadpool(visitors.reserve_upload, visitor)
        except Refused as reason:
            return _refusal(str(reason), 507)
        name = shown_name(unquote(request.query_params.get("name", ""))) or "video"
        part = visitor.folder / f"{secrets.token_hex(8)}.part"
        try:
            head = await _save(request, part, room, is_wanted)
            suffix = container_suffix(head)
            path = part.with_suffix(suffix or ".part")
            part.rename(path)
            if suffix is None or not await run_in_threadpool(is_what_it_seems, path):
                path.unlink(missing_ok=True)
                reason = "is empty" if not head else "is not a video file that can be read here"
                return _refusal(f"{name} {reason}. Try MP4, WebM, MKV, MOV or AVI.", 415)
            visitor.upload = Video(path, name, is_upload=True)
        except _TooLarge:
            return _refusal(f"{name} is larger than {room / 2**20:,.0f} MB, which is the limit here.", 413)
        except (ClientDisconnect, FileNotFoundError):  # the visitor has left, or chose another file
            return _refusal(_INTERRUPTED, 400)
        except TimeoutError:
            return _refusal(_INTERRUPTED, 408)
        finally:
            part.unlink(missing_ok=True)
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


_INTERRUPTED = "The upload was interrupted."


class _TooLarge(Exception):
    pass


async def _save(request: Request, path: Path, limit: int, is_wanted: Callable[[], bool]) -> bytes:
    """Write the body into a file; its first bytes.

    Raises:
        _TooLarge: it has more bytes than the limit.
        ClientDisconnect: it is not wanted any more, or nobody sends it any more.
        TimeoutError: nothing has come for `CHUNK_SECONDS`.
    """
    promised = request.headers.get("content-length", "0")
    if promised.isdigit() and int(promised) > limit:
        raise _TooLarge
    size, head = 0, b""
    with path.open("wb") as file:
        async for chunk in _chunks(request, is_wanted):
            size += len(chunk)
            if size > limit:
                raise _TooLarge
            if len(head) < 512:
                head += chunk[: 512 - len(head)]
            await run_in_threadpool(file.write, chunk)
    return head


async def _chunks(request: Request, is_wanted: Callable[[], bool]) -> AsyncIterator[bytes]:
    """Of the body. Whether it is wanted is asked while nothing comes, too: a client may stall for ever."""
    stream = request.stream()
    while True:
        coming = asyncio.ensure_future(anext(stream, None))
        try:
            end = asyncio.get_running_loop().time() + CHUNK_SECONDS
            while not (await asyncio.wait({coming}, timeout=_CHECK_SECONDS))[0]:
                if not is_wanted():
                    raise ClientDisconnect
                if asyncio.get_running_loop().time() > end:
                    raise TimeoutError
        finally:
            coming.cancel()  # of no effect where it has come
            await asyncio.wait({coming})
        chunk = coming.result()
        if chunk is None:
            return
        if not is_wanted():
            raise ClientDisconnect
        yield chunk


class OnlyThePage:
    """ASGI middleware: what the page does not need is not found; events carry no files, and their size is bounded.

    A request that is answered before it has all come, as one of a file that is too large, is listened to a little
    longer: a client that still sends when the connection closes sees a broken connection in place of the answer.
    """

    def __init__(self, app: Callable[..., Awaitable[None]]):
        self.app = app

    async def __call__(self, scope: Mapping, receive: Callable, send: Callable) -> None:
        if scope["type"] == "lifespan":
            return await self.app(scope, receive, send)
        if scope["type"] != "http":
            return await send({"type": "websocket.close"})
        if scope["method"] in ("POST", "PUT"):
            receive, send = _lingering(receive, send)
        path = scope["path"].removeprefix(scope.get("root_path", ""))
        is_open = _OPEN.get(scope["method"])
        if is_open is None or not is_open.fullmatch(path):
            return await PlainTextResponse("Not found", 404)(scope, receive, send)
        if scope["method"] == "POST":
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


def _lingering(receive: Callable, send: Callable) -> tuple[Callable, Callable]:
    """The same, and the answer ends when the request has ended, or `LINGER_SECONDS` later."""
    is_whole = False

    async def received():
        nonlocal is_whole
        message = await receive()
        is_whole |= not message.get("more_body", False)  # a disconnection has none either
        return message

    async def sent(message):
        if is_whole or message["type"] != "http.response.body" or message.get("more_body", False):
            return await send(message)
        await send(message | {"more_body": True})
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(_throw_away(received), LINGER_SECONDS)
        return await send({"type": "http.response.body"})

    return received, sent


async def _throw_away(receive: Callable) -> None:
    while (await receive()).get("more_body", False):
        pass


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
