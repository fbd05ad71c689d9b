"""Videos and images as callers write them: paths, `file:`, `data:` and http(s) URIs, bytes, open files.

`resolve_source` turns each into something a reader opens: a path, or a seekable binary file. What it says about a
source in messages is short and holds no payload, password or signature.

URLs make a program fetch what a stranger wrote, so that this is a decision of whoever runs the process, and not of a
request or a checkpoint. It is read from the environment at every use:

- `VIDEONSA_ALLOW_HTTP`: `1` fetches from any host, this machine and its network included; `public` only from addresses
  that are reachable from the whole internet; `0` from nowhere. Unset, videos are not fetched; images are, from any
  host, as transformers does;
- `VIDEONSA_MAX_MEDIA_BYTES` (default 1 GiB): limit on what is fetched, and on what a `data:` URI holds;
- `VIDEONSA_HTTP_TIMEOUT` (default 60): seconds for everything from the name's resolution to the last byte.

At most five redirects are followed, to http and https alone and never from https to http, and every one is checked as
the first address is. With `public`, a connection goes to the very address that was checked, and proxies are not used.
"""

import base64
import binascii
import contextlib
import http.client
import io
import ipaddress
import os
import re
import socket
import tempfile
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, BinaryIO

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".ppm")
DEFAULT_MAX_MEDIA_BYTES = 1 << 30
DEFAULT_HTTP_TIMEOUT = 60.0

_MAX_REDIRECTS = 5
_MAX_NAME = 200
_CHUNK = 1 << 18
_NAT64 = ipaddress.ip_network("64:ff9b::/96")  # IPv4 addresses, behind a gateway
_IMAGE_SIGNATURES = (b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff", b"BM", b"II*\0", b"MM\0*", b"P6")
_SCHEME = re.compile(r"([a-zA-Z][a-zA-Z0-9+.-]*):")
_BASE64 = re.compile(r"[A-Za-z0-9+/_-]{64,}={0,2}")


@dataclass(frozen=True)
class Source:
    """Where a video or an image is read from.

    Args:
        name: for messages.
        path: of a file; or None, and
        file: a seekable binary file, to be read from its beginning. Nothing it refers to may be opened.
    """

    name: str
    path: str | None = None
    file: BinaryIO | None = None

    @property
    def readable(self) -> str | BinaryIO:
        """What `open` functions of readers take."""
        return self.file if self.path is None else self.path


def is_reference(value: Any) -> bool:
    """Whether this is something for `resolve_source`, and not pixels."""
    return isinstance(value, (str, os.PathLike, bytes, bytearray, memoryview, Source)) or _is_file(value)


def is_image_reference(value: Any) -> bool:
    """Whether a reference is one of an image, by its suffix, media type or first bytes; nothing is opened."""
    if isinstance(value, (bytes, bytearray, memoryview)):
        head = bytes(value[:12])
        return head.startswith(_IMAGE_SIGNATURES) or (head[:4] == b"RIFF" and head[8:] == b"WEBP")
    if isinstance(value, Source):
        value = value.path or ""
    if not isinstance(value, (str, os.PathLike)):
        return False
    text = os.fsdecode(value)
    scheme = _scheme(text)
    if scheme == "data":
        media_type = text[5:64].lower()
        return media_type.startswith("image/") and not media_type.startswith("image/gif")
    if scheme in ("http", "https"):
        text = urllib.parse.urlsplit(text).path
    return text[-8:].lower().endswith(IMAGE_SUFFIXES)


def resolve_source(reference: Any, *, argument: str, kind: str = "video") -> Source:
    """Find what a caller means.

    Args:
        reference: a path; a `file:`, `data:`, `http:` or `https:` URI (str); the bytes of a file; a seekable binary
            file; or a `Source`, which is returned as it is. For images also base64 without `data:`, as in transformers.
        argument: where it was given, for messages.
        kind: "video" or "image".
    Returns:
        the source. That a path exists is left to its reader.
    Raises:
        ValueError: a URI of another kind, not allowed, broken, over a limit of the environment, or not reached in time.
    """
    if isinstance(reference, Source):
        return reference
    if isinstance(reference, (bytes, bytearray, memoryview)):
        return _in_memory(bytes(reference), f"{len(reference):,} bytes in memory", argument)
    if _is_file(reference):
        return _open_file(reference, argument)
    if isinstance(reference, os.PathLike):
        path = os.fsdecode(reference)
        return Source(shorten(path), path=path)
    if not isinstance(reference, str):
        raise ValueError(f"`{argument}` must be a path, a URI, bytes or a binary file, got {type(reference).__name__}")
    if not reference.strip() or "\0" in reference:
        raise ValueError(f"`{argument}` is {shorten(reference)!r}, which is no path and no URI")
    scheme = _scheme(reference)
    if scheme == "data":
        content, media_type = _decode_data_uri(reference, argument)
        return _in_memory(content, f"data URI of {len(content):,} bytes ({media_type})", argument)
    if scheme == "file":
        return _from_file_uri(reference, argument)
    if scheme in ("http", "https"):
        _check_allowed(reference, argument, kind)
        return _fetch(reference, argument, kind)
    if not os.path.exists(reference):
        if "://" in reference:
            raise ValueError(
                f"`{argument}` {name_of_url(reference)}: {kind}s are read from paths and from file:, data:, http: and "
                f"https: URIs, not from {scheme}:"
            )
        if kind == "image" and _BASE64.fullmatch("".join(reference.split())):
            content = _decode_base64(reference, argument, "base64 text")
            return _in_memory(content, f"base64 text of {len(content):,} bytes", argument)
    return Source(shorten(reference), path=reference)


def shorten(text: str) -> str:
    """A text for a message: never a payload that somebody took for a path."""
    return text if len(text) <= _MAX_NAME else f"{text[:60]}... ({len(text):,} characters)"


def name_of_url(url: str) -> str:
    """A URL without what may be secret in it: user, password, query and fragment."""
    try:
        parts = urllib.parse.urlsplit(url)
        return shorten(f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}")
    except ValueError:
        return shorten(url.split("?")[0].split("@")[-1])


def _is_file(value: Any) -> bool:
    return callable(getattr(value, "read", None)) and callable(getattr(value, "seek", None))


def _scheme(text: str) -> str:
    found = _SCHEME.match(text)
    return found[1].lower() if found else ""


def _in_memory(content: bytes, name: str, argument: str) -> Source:
    if not content:
        raise ValueError(f"`{argument}` {name}: there is nothing in it")
    return Source(name, file=io.BytesIO(content))


def _open_file(file: Any, argument: str) -> Source:
    name = getattr(file, "name", None)
    name = f"open file {shorten(name)}" if isinstance(name, str) else f"open {type(file).__name__}"
    try:
        file.seek(0)
        is_binary = isinstance(file.read(0), bytes)
    except (OSError, ValueError) as error:
        raise ValueError(f"`{argument}` {name}: must be open and seekable: {error}") from error
    if not is_binary:
        raise ValueError(f"`{argument}` {name}: must be opened in binary mode")
    return Source(name, file=file)


def _from_file_uri(uri: str, argument: str) -> Source:
    """Percent-encoded, as `Path.as_uri()` writes it; or "file://" before a path, as many programs write it."""
    rest = uri[len("file:") :]
    if rest.startswith("//"):
        host, slash, path = rest[2:].partition("/")
        if not slash or host.lower() not in ("", "localhost"):
            if os.path.exists(rest[2:]):  # a relative path
                return Source(shorten(rest[2:]), path=rest[2:])
            raise ValueError(
                f"`{argument}` {shorten(uri)}: a file: URI must hold an absolute path on this machine, and names the "
                f"host {shorten(host)!r}"
            )
        rest = slash + path
    decoded = urllib.request.url2pathname(rest)
    path = rest if not os.path.exists(decoded) and os.path.exists(rest) else decoded
    if "\0" in path:
        raise ValueError(f"`{argument}` {shorten(uri)}: a path holds no zero byte")
    return Source(shorten(path), path=path)


def _decode_data_uri(uri: str, argument: str) -> tuple[bytes, str]:
    """Content and media type of an RFC 2397 URI."""
    header, comma, payload = uri[len("data:") :].partition(",")
    if not comma:
        raise ValueError(f"`{argument}` is a data URI without a comma, of {len(uri):,} characters")
    media_type, *parameters = header.split(";")
    media_type = shorten(media_type.strip().lower() or "no media type")
    what = f"data URI ({media_type})"
    if not parameters or parameters[-1].strip().lower() != "base64":
        content = urllib.parse.unquote_to_bytes(payload)
        _check_size(len(content), argument, what)
        return content, media_type
    return _decode_base64(urllib.parse.unquote(payload), argument, what), media_type


def _decode_base64(text: str, argument: str, what: str) -> bytes:
    _check_size(len(text) // 4 * 3 - 2, argument, what)
    text = "".join(text.split()).replace("-", "+").replace("_", "/").rstrip("=")
    try:
        return base64.b64decode(text + "=" * (-len(text) % 4), validate=True)
    except (binascii.Error, ValueError) as error:
        # The message of `error` could quote the payload.
        raise ValueError(f"`{argument}` {what}: {len(text):,} characters are not valid base64") from error


def _limit(variable: str, default: float) -> float:
    text = os.environ.get(variable, "").strip()
    try:
        value = float(text) if text else default
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise ValueError(f"the environment variable {variable} must be a positive number, got {text!r}")
    return value


def _check_size(size: int, argument: str, what: str) -> None:
    limit = _limit("VIDEONSA_MAX_MEDIA_BYTES", DEFAULT_MAX_MEDIA_BYTES)
    if size > limit:
        raise _over_limit(limit, argument, what)


def _over_limit(limit: float, argument: str, what: str) -> ValueError:
    return ValueError(
        f"`{argument}` {what}: over the limit of {limit:,.0f} bytes; VIDEONSA_MAX_MEDIA_BYTES in the environment sets "
        "another"
    )


def _http_policy() -> str | None:
    """ "0", "public", "1", or None where nobody said."""
    value = os.environ.get("VIDEONSA_ALLOW_HTTP", "").strip().lower()
    if value not in ("", "0", "1", "public"):
        raise ValueError(f"the environment variable VIDEONSA_ALLOW_HTTP must be 0, 1 or public, got {value!r}")
    return value or None


def _check_allowed(url: str, argument: str, kind: str) -> None:
    policy = _http_policy()
    if policy == "0" or (policy is None and kind != "image"):
        raise ValueError(
            f"`{argument}` {name_of_url(url)}: {kind}s are not fetched unless VIDEONSA_ALLOW_HTTP is set in the "
            f"environment, to 1 or to public; or save the file and give its path"
        )


class _Download:
    """What one `_fetch` shares with its thread."""

    def __init__(self, limit: float, timeout: float, only_public: bool):
        self.limit, self.only_public = limit, only_public
        self.deadline = time.monotonic() + timeout
        self.sockets: list[socket.socket] = []
        self.file: BinaryIO | None = None
        self.error: Exception | None = None

    def left(self) -> float:
        left = self.deadline - time.monotonic()
        if left <= 0:
            raise TimeoutError
        return left

    def connect(self, address: tuple[str, int], *_: Any) -> socket.socket:
        """In place of `socket.create_connection`: to the addresses that were checked, within the time left."""
        error: OSError = OSError("the name has no address")
        for family, kind, protocol, _, where in socket.getaddrinfo(*address, type=socket.SOCK_STREAM):
            if self.only_public and not _is_public(where[0]):
                raise _Refused(f"{where[0]} is not a public address (VIDEONSA_ALLOW_HTTP=public)")
            connection = socket.socket(family, kind, protocol)
            self.sockets.append(connection)
            try:
                connection.settimeout(self.left())
                connection.connect(where)
                return connection
            except OSError as failure:
                connection.close()
                error = failure
        raise error

    def run(self, url: str) -> None:
        try:
            request = urllib.request.Request(url, headers={"Accept-Encoding": "identity", "User-Agent": "videonsa"})
            with _opener(self).open(request, timeout=self.left()) as response:
                self.file = self._save(response)
        except Exception as error:  # the caller's thread raises it
            self.error = error
        finally:
            self.close()

    def _save(self, response: Any) -> BinaryIO:
        encoding = response.headers.get("Content-Encoding", "identity")
        if encoding.lower() != "identity":
            raise _Refused(f"its content is compressed ({shorten(encoding)}), which was not asked for")
        promised = response.length  # of http.client: None where it is not told
        if promised is not None and promised > self.limit:
            raise _TooLarge
        # A named file, since PyAV wants a name that is text; it is gone when it is closed.
        file = tempfile.NamedTemporaryFile(prefix="videonsa-")  # noqa: SIM115 the reader keeps it open
        size = 0
        while chunk := response.read1(_CHUNK):
            size += len(chunk)
            if size > self.limit:
                raise _TooLarge
            self.left()
            file.write(chunk)
        if promised is not None and size < promised:
            raise _Refused(f"the connection ended after {size:,} of {promised:,} bytes")
        if not size:
            raise _Refused("there is nothing in it")
        file.seek(0)
        return file

    def close(self) -> None:
        for connection in self.sockets:
            with contextlib.suppress(OSError):  # it is closed
                connection.shutdown(socket.SHUT_RDWR)


class _Refused(Exception):
    """With the reason as its text."""


class _TooLarge(Exception):
    pass


def _is_public(address: str) -> bool:
    ip = ipaddress.ip_address(address.partition("%")[0])
    if ip in _NAT64:
        ip = ipaddress.ip_address(int(ip) & 0xFFFFFFFF)
    ip = getattr(ip, "ipv4_mapped", None) or getattr(ip, "sixtofour", None) or ip
    return ip.is_global and not ip.is_multicast


def _opener(download: _Download) -> urllib.request.OpenerDirector:
    """An opener that knows http and https, and no other scheme."""

    def connecting(kind: type[http.client.HTTPConnection]) -> Callable:
        def build(host: str, **options: Any) -> http.client.HTTPConnection:
            connection = kind(host, **{**options, "timeout": download.left()})
            connection._create_connection = download.connect
            return connection

        return build

    class Http(urllib.request.HTTPHandler):
        def http_open(self, request):
            return self.do_open(connecting(http.client.HTTPConnection), request)

    class Https(urllib.request.HTTPSHandler):
        def https_open(self, request):
            return self.do_open(connecting(http.client.HTTPSConnection), request, context=self._context)

    class Redirects(urllib.request.HTTPRedirectHandler):
        max_redirections = _MAX_REDIRECTS

        def redirect_request(self, request, file, code, message, headers, url):
            if request.type == "https" and _scheme(url) != "https":
                raise _Refused(f"redirected from https to {_scheme(url)}")
            if _scheme(url) not in ("http", "https"):
                raise _Refused(f"redirected to {_scheme(url)}:")
            _check_url(url)
            return super().redirect_request(request, file, code, message, headers, url)

    opener = urllib.request.OpenerDirector()
    handlers = [
        Http(),
        Https(),
        Redirects(),
        urllib.request.HTTPDefaultErrorHandler(),
        urllib.request.HTTPErrorProcessor(),
    ]
    if not download.only_public:  # a proxy would choose the address
        handlers.append(urllib.request.ProxyHandler())
    for handler in handlers:
        opener.add_handler(handler)
    return opener


def _check_url(url: str) -> str:
    """The URL, with spaces and letters beyond ASCII percent-encoded."""
    try:
        parts = urllib.parse.urlsplit(url)
        host, _ = parts.hostname, parts.port
    except ValueError as error:
        raise _Refused("it is no valid URL") from error
    if not host:
        raise _Refused("it names no host")
    if "@" in parts.netloc:
        raise _Refused("user and password in a URL are not supported")
    quoted = {name: urllib.parse.quote(getattr(parts, name), safe="%/:=&?~+!$,;'@()*[]") for name in ("path", "query")}
    return urllib.parse.urlunsplit(parts._replace(**quoted, fragment=""))


def _fetch(url: str, argument: str, kind: str) -> Source:
    """Download to a temporary file, in a thread, since not everything in a connection can be timed out otherwise."""
    limit = _limit("VIDEONSA_MAX_MEDIA_BYTES", DEFAULT_MAX_MEDIA_BYTES)
    timeout = _limit("VIDEONSA_HTTP_TIMEOUT", DEFAULT_HTTP_TIMEOUT)
    name = name_of_url(url)
    download = _Download(limit, timeout, _http_policy() == "public")
    try:
        url = _check_url(url.strip())
    except _Refused as error:
        raise ValueError(f"`{argument}` {name}: {error}") from error
    thread = threading.Thread(target=download.run, args=(url,), daemon=True, name="videonsa-download")
    thread.start()
    thread.join(timeout)
    error = download.error
    if thread.is_alive() or isinstance(error, TimeoutError) or isinstance(getattr(error, "reason", 0), TimeoutError):
        download.close()
        raise ValueError(
            f"`{argument}` {name}: not fetched within {timeout:g} seconds; VIDEONSA_HTTP_TIMEOUT in the environment "
            "sets another limit"
        ) from error
    if isinstance(error, _TooLarge):
        raise _over_limit(limit, argument, name)
    if isinstance(error, urllib.error.HTTPError):
        raise ValueError(f"`{argument}` {name}: the server answered {error.code} {shorten(str(error.reason))}")
    if error is not None:
        reason = getattr(error, "reason", error)
        reason = shorten(str(reason) or type(reason).__name__)
        raise ValueError(f"`{argument}` {name}: cannot be fetched: {reason}") from error
    return Source(name, file=download.file)
