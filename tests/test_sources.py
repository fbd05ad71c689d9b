"""Videos and images as paths, URIs, bytes and files: all are the same video, and a bad one is a short ValueError."""

import base64
import dataclasses
import http.server
import io
import os
import pathlib
import socket
import threading
import time
import urllib.parse
import urllib.request

import av
import numpy as np
import pytest
import torch
from conftest import ROOT
from PIL import Image
from transformers import AutoProcessor

import sources_videonsa
from frames_videonsa import VideoRequest
from sources_videonsa import Source, is_image_reference, resolve_source

TINY = ROOT / "checkpoints" / "tiny"
SCENE = ROOT / "demo" / "scene.mp4"
PAYLOAD = base64.b64encode(bytes(range(256)) * 200).decode()
LONGEST_MESSAGE = 500


def data_uri(content: bytes, media_type: str = "video/mp4") -> str:
    return f"data:{media_type};base64,{base64.b64encode(content).decode()}"


def chat(processor, *content, **options):
    messages = [{"role": "user", "content": [*content, {"type": "text", "text": "?"}]}]
    options = {"tokenize": True, "add_generation_prompt": True, "return_dict": True, "return_tensors": "pt"} | options
    return processor.apply_chat_template(messages, **options)


def assert_same(inputs, expected):
    assert inputs.keys() == expected.keys()
    for name in expected:
        assert torch.equal(torch.as_tensor(inputs[name]), torch.as_tensor(expected[name])), name


@pytest.fixture(scope="module")
def processor():
    return AutoProcessor.from_pretrained(TINY, trust_remote_code=True)


@pytest.fixture(scope="module")
def expected(processor):
    return chat(processor, {"type": "video", "video": str(SCENE)})


@pytest.fixture
def awkward(tmp_path):
    """A video whose name must be percent-encoded, and holds something that looks percent-encoded."""
    path = tmp_path / "my видео #1?100%25.mp4"
    path.write_bytes(SCENE.read_bytes())
    return path


class Site(http.server.BaseHTTPRequestHandler):
    """A web site with a page for every trouble."""

    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def do_GET(self):
        path = urllib.parse.urlsplit(self.path).path
        self.server.seen.append(self.path)
        content = SCENE.read_bytes()
        if path == "/scene.mp4" or path.startswith("/%D0"):
            self.answer(content)
        elif path == "/a.png":
            self.answer(png())
        elif path == "/redirect":
            self.answer(b"", 302, Location="/scene.mp4?token=other")
        elif path == "/loop":
            self.answer(b"", 302, Location=f"/loop?{len(self.server.seen)}")
        elif path.startswith("/to/"):
            self.answer(b"", 302, Location=urllib.parse.unquote(path[4:]))
        elif path == "/missing":
            self.answer(b"no", 404)
        elif path == "/empty":
            self.answer(b"")
        elif path == "/packed":
            self.answer(content, **{"Content-Encoding": "gzip"})
        elif path == "/promises-much":
            self.answer(b"x", length=10**15)
        elif path == "/ends-early":
            self.answer(content[:1000], length=len(content))
        elif path == "/endless":
            self.send_response(200)
            self.send_header("Transfer-Encoding", "chunked")
            self.end_headers()
            self.drip(b"10000\r\n" + bytes(65536) + b"\r\n", 0)
        elif path == "/slow-body":
            self.send_response(200)
            self.send_header("Content-Length", "1000000")
            self.end_headers()
            self.drip(b"x", 0.05)
        elif path == "/slow-headers":
            self.wfile.write(b"HTTP/1.1 200 OK\r\nX: ")
            self.drip(b"x", 0.05)

    def answer(self, content, status=200, length=None, **headers):
        self.send_response(status)
        self.send_header("Content-Length", str(len(content) if length is None else length))
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(content)
        self.close_connection = True

    def drip(self, piece, seconds):
        try:
            for _ in range(2000):
                self.wfile.write(piece)
                time.sleep(seconds)
        except OSError:
            self.close_connection = True
            self.server.hung_up.set()


@pytest.fixture
def site(monkeypatch):
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Site)
    server.daemon_threads = True
    server.seen, server.hung_up = [], threading.Event()
    server.url = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("VIDEONSA_ALLOW_HTTP", "1")
    yield server
    server.shutdown()
    server.server_close()


def png() -> bytes:
    file = io.BytesIO()
    Image.fromarray(np.arange(56 * 56 * 3, dtype=np.uint8).reshape(56, 56, 3)).save(file, "png")
    return file.getvalue()


# Every way to write one video


@pytest.mark.parametrize("key", ["video", "url", "path"])
@pytest.mark.parametrize(
    "write",
    [
        str,
        lambda path: path,
        lambda path: path.as_uri(),
        lambda path: f"file://{path}",
        lambda path: path.as_uri().replace("file://", "file://localhost"),
        lambda path: path.as_uri().replace("file://", "FILE://LocalHost"),
        lambda path: path.as_uri().replace("file://", "file:"),
        lambda path: data_uri(path.read_bytes()),
        lambda path: data_uri(path.read_bytes()).replace("data:video/mp4;", "DATA:video/mp4;codecs=avc1;"),
        lambda path: "data:video/mp4," + urllib.parse.quote(path.read_bytes()),
        lambda path: "data:;base64," + base64.urlsafe_b64encode(path.read_bytes()).decode().replace("=", "%3D"),
        lambda path: "data:video/mp4;base64,\n" + base64.encodebytes(path.read_bytes()).decode().rstrip("\n="),
        lambda path: path.read_bytes(),
        lambda path: bytearray(path.read_bytes()),
        lambda path: memoryview(path.read_bytes()),
        lambda path: io.BytesIO(path.read_bytes()),
        lambda path: path.open("rb"),
    ],
    ids=[
        "str",
        "Path",
        "as_uri",
        "file://path",
        "localhost",
        "FILE",
        "file:",
        "data",
        "data+parameter",
        "data-percent",
        "data-url-safe",
        "data-lines",
        "bytes",
        "bytearray",
        "memoryview",
        "BytesIO",
        "open",
    ],
)
def test_every_way_to_write_a_video(processor, expected, awkward, write, key):
    assert_same(chat(processor, {"type": "video", key: write(awkward)}), expected)


def test_requests_survive_in_conversations():
    """transformers 5.24 makes dicts of the dataclasses in a conversation, and lists of its tuples."""
    assert not dataclasses.is_dataclass(VideoRequest) and not issubclass(VideoRequest, (tuple, dict))


def test_a_relative_path_after_file(processor, expected, awkward, monkeypatch):
    monkeypatch.chdir(awkward.parent)
    assert_same(chat(processor, {"type": "video", "video": f"file://{awkward.name}"}), expected)


def test_without_a_chat_template(processor, expected):
    content = SCENE.read_bytes()
    text = "<|video_pad|><|video_pad|><|video_pad|>"
    inputs = processor(text=[text], videos=[[content, SCENE.as_uri(), io.BytesIO(content)]], return_tensors="pt")
    pixels = expected["pixel_values_videos"]
    assert torch.equal(inputs["pixel_values_videos"], torch.cat([pixels] * 3))
    assert processor.plan_video(content).frame_indices == processor.plan_video(SCENE).frame_indices


def test_frames_as_references(processor, tmp_path):
    content = png()
    path = tmp_path / "a b.png"
    path.write_bytes(content)
    frames = [str(path), path, path.as_uri(), data_uri(content, "image/png"), content]
    expected = chat(processor, {"type": "video", "video": [Image.open(path)] * 5, "sample_fps": 2})
    assert_same(chat(processor, {"type": "video", "video": frames, "sample_fps": 2}), expected)


def test_every_way_to_write_an_image(processor, tmp_path):
    content = png()
    path = tmp_path / "мой a%20b.png"
    path.write_bytes(content)
    expected = chat(processor, {"type": "image", "image": Image.open(path)})
    plain = base64.b64encode(content).decode()
    images = [str(path), path, path.as_uri(), f"file://{path}", data_uri(content, "image/png"), plain, content]
    for image in [*images, io.BytesIO(content)]:
        for key in ("image", "url", "path"):
            assert_same(chat(processor, {"type": "image", key: image}), expected)


@pytest.mark.parametrize(
    ("reference", "is_image"),
    [
        ("a.PNG", True),
        ("a.mp4", False),
        (pathlib.Path("a.jpeg"), True),
        ("https://x.org/a.png?width=3", True),
        ("https://x.org/a.mp4?cover=a.png", False),
        ("data:image/webp;base64,AA", True),
        ("data:image/gif;base64,AA", False),
        ("data:video/mp4;base64,AA.png", False),
        (b"\xff\xd8\xff\xe0", True),
        (b"RIFF\0\0\0\0WEBP", True),
        (b"RIFF\0\0\0\0AVI ", False),
        (b"\0\0\0 ftypisom", False),
        (Source("x", path="x.bmp"), True),
        (io.BytesIO(), False),
    ],
)
def test_is_image_reference(reference, is_image):
    assert is_image_reference(reference) is is_image


# Bad ones


@pytest.mark.parametrize(
    ("reference", "message"),
    [
        ("file://server/share/a.mp4", "names the host 'server'"),
        ("file://a.mp4", "must hold an absolute path"),
        ("file:///no/such%20file.mp4", "/no/such file.mp4: there is no such video file"),
        ("file:///a%00.mp4", "zero byte"),
        ("s3://bucket/a.mp4", "not from s3:"),
        ("rtsp://user:secret@host/a?key=secret", "rtsp://host/a: videos are read from"),
        ("concat:a.mp4|b.mp4", "no such video file"),
        ("subfile,,start,0,end,9,,:/etc/passwd", "no such video file"),
        ("", "no path and no URI"),
        (" ", "no path and no URI"),
        ("a\0b", "no path and no URI"),
        (b"", "there is nothing in it"),
        (b"no video", "cannot be opened as a video"),
        ("data:video/mp4;base64", "without a comma"),
        ("data:video/mp4;base64,", "there is nothing in it"),
        ("data:video/mp4;base64,A", "not valid base64"),
        (f"data:video/mp4;base64,{PAYLOAD}", "data URI of 51,200 bytes .* cannot be opened"),
        (f"data:video/mp4;base64,{PAYLOAD}!", "not valid base64"),
        (f"data:{PAYLOAD};base64,{PAYLOAD}", "cannot be opened"),
        (f"data:{PAYLOAD}", "without a comma"),
        (f"data:,{PAYLOAD}", "cannot be opened"),
        (PAYLOAD, "no such video file"),
        (f"file:///{PAYLOAD}", "no such video file"),
        (f"file://{PAYLOAD.replace('/', 'x')}", "must hold an absolute path"),
        (f"x://{PAYLOAD}", "not from x:"),
        (f"https://{PAYLOAD}", "not fetched unless VIDEONSA_ALLOW_HTTP"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_bad_videos(processor, reference, message):
    with pytest.raises(ValueError, match=message) as caught:
        chat(processor, {"type": "video", "video": reference})
    assert len(str(caught.value)) < LONGEST_MESSAGE and "secret" not in str(caught.value)


@pytest.mark.parametrize(
    "part",
    [
        {"type": "image", "image": data_uri(bytes(60_000), "image/png")},
        {"type": "image", "image": f"data:image/png;base64,{PAYLOAD}!"},
        {"type": "image", "url": PAYLOAD},
        {"type": "image", "url": PAYLOAD + "!"},
        {"type": "image", "image": bytes(60_000)},
        {"type": "image", "image": "/no/such/image.png"},
        {"type": "video", "video": [data_uri(bytes(60_000), "image/png")] * 4, "sample_fps": 2},
        {"type": "video", "video": [data_uri(png(), "image/png")] * 3 + [f"data:image/png;base64,{PAYLOAD}!"]},
        {"type": "video", "video": data_uri(bytes(60_000)), "fsp": 2},
        {"type": "video", "video": data_uri(bytes(60_000)), "url": data_uri(bytes(60_000))},
        {"type": "video", "video": [data_uri(png(), "image/png"), data_uri(SCENE.read_bytes())]},
        {"type": "video", "vidoe": data_uri(bytes(60_000))},
        {"type": data_uri(bytes(60_000)), "video": str(SCENE)},
    ],
    ids=lambda part: str(part)[:60],
)
def test_no_error_prints_a_payload(processor, part):
    with pytest.raises(ValueError) as caught:
        chat(processor, part)
    assert len(str(caught.value)) < LONGEST_MESSAGE


def test_files_that_cannot_be_read():
    closed = io.BytesIO(SCENE.read_bytes())
    closed.close()
    reading, writing = os.pipe()
    os.close(writing)
    with os.fdopen(reading, "rb") as pipe:
        for file, message in (
            (closed, "open BytesIO: must be open and seekable"),
            (pipe, "must be open and seekable"),
            (io.StringIO("text"), "open StringIO: must be opened in binary mode"),
        ):
            with pytest.raises(ValueError, match=message):
                resolve_source(file, argument="videos")


def test_metadata_is_for_frames(processor):
    with pytest.raises(ValueError, match="`video_metadata` is for frames"):
        processor(text="<|video_pad|>", videos=[SCENE.read_bytes()], video_metadata=[{"fps": 2, "total_num_frames": 9}])


def test_the_size_of_a_data_uri_is_limited(processor, monkeypatch):
    content = SCENE.read_bytes()
    monkeypatch.setenv("VIDEONSA_MAX_MEDIA_BYTES", str(len(content)))
    chat(processor, {"type": "video", "video": data_uri(content)})
    monkeypatch.setenv("VIDEONSA_MAX_MEDIA_BYTES", str(len(content) - 3))
    for video in (data_uri(content), "data:video/mp4," + urllib.parse.quote(content)):
        with pytest.raises(ValueError, match=f"over the limit of {len(content) - 3:,} bytes; VIDEONSA_MAX_MEDIA_BYTES"):
            chat(processor, {"type": "video", "video": video})


@pytest.mark.parametrize("demuxer", ["ffconcat", "hls", "dash"])
def test_a_playlist_in_memory_opens_nothing(processor, tmp_path, monkeypatch, demuxer):
    """libavformat opens what a playlist in memory names, beside the working directory, unless it is told otherwise."""
    (tmp_path / "secret.mp4").write_bytes(SCENE.read_bytes())
    monkeypatch.chdir(tmp_path)
    playlist = {
        "ffconcat": "ffconcat version 1.0\nfile secret.mp4\n",
        "hls": "#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:9,\nsecret.mp4\n#EXT-X-ENDLIST\n",
        "dash": '<?xml version="1.0"?><MPD type="static" mediaPresentationDuration="PT9S"><Period><AdaptationSet '
        'contentType="video"><Representation id="0" bandwidth="1"><BaseURL>secret.mp4</BaseURL><SegmentBase/>'
        "</Representation></AdaptationSet></Period></MPD>",
    }[demuxer].encode()
    if demuxer == "ffconcat":
        with av.open(io.BytesIO(playlist)) as container:
            assert next(container.decode(video=0))
    for video in (playlist, data_uri(playlist, "application/x-playlist"), io.BytesIO(playlist)):
        with pytest.raises(ValueError, match="cannot be opened as a video"):
            chat(processor, {"type": "video", "video": video})


# Over http


def test_videos_are_fetched_only_where_that_is_allowed(processor, site, monkeypatch):
    url = f"{site.url}/scene.mp4"
    for policy, message in ((None, "not fetched unless"), ("0", "not fetched unless"), ("yes", "must be 0, 1 or pub")):
        monkeypatch.delenv("VIDEONSA_ALLOW_HTTP") if policy is None else monkeypatch.setenv(
            "VIDEONSA_ALLOW_HTTP", policy
        )
        with pytest.raises(ValueError, match=message):
            chat(processor, {"type": "video", "video": url})
    assert site.seen == []
    # Images are fetched as transformers does, unless that is forbidden.
    monkeypatch.delenv("VIDEONSA_ALLOW_HTTP")
    image = chat(processor, {"type": "image", "image": f"{site.url}/a.png"})
    assert_same(image, chat(processor, {"type": "image", "image": png()}))
    monkeypatch.setenv("VIDEONSA_ALLOW_HTTP", "0")
    with pytest.raises(ValueError, match="images are not fetched"):
        chat(processor, {"type": "image", "image": f"{site.url}/a.png"})
    # A request cannot allow it.
    with pytest.raises(ValueError, match="is not an option"):
        chat(processor, {"type": "video", "video": url}, allow_http=True)


def test_a_video_over_http(processor, expected, site):
    for path in ("/scene.mp4", "/scene.mp4?token=secret#t=3", "/redirect?token=secret", "/видео 1.mp4"):
        assert_same(chat(processor, {"type": "video", "video": site.url + path}), expected)
    assert site.seen == [
        "/scene.mp4",
        "/scene.mp4?token=secret",
        "/redirect?token=secret",
        "/scene.mp4?token=other",
        "/%D0%B2%D0%B8%D0%B4%D0%B5%D0%BE%201.mp4",
    ]


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("/missing?secret", "the server answered 404"),
        ("/empty", "there is nothing in it"),
        ("/packed", "compressed"),
        ("/ends-early", r"ended after 1,000 of [\d,]+ bytes"),
        ("/loop", "the server answered 302"),
        ("/to/file%3A%2F%2F%2Fetc%2Fpasswd", "not allowed|redirected to file:"),
        ("/to/ftp%3A%2F%2F127.0.0.1%2Fa", "redirected to ftp:"),
        ("/to/http%3A%2F%2Fuser%3Apassword%40127.0.0.1%2Fa", "user and password"),
    ],
)
def test_bad_answers(site, path, message):
    with pytest.raises(ValueError, match=message) as caught:
        resolve_source(site.url + path, argument="videos")
    assert str(caught.value).startswith(f"`videos` {site.url}/") and "secret" not in str(caught.value)


def test_bad_urls(site):
    for url, message in (
        ("http://", "names no host"),
        ("http://[::1", "no valid URL"),
        ("http://127.0.0.1:99999/a", "no valid URL"),
        (site.url.replace("//", "//user:secret@") + "/scene.mp4", "user and password"),
        ("http://127.0.0.1:1/a.mp4?secret", "cannot be fetched"),
    ):
        with pytest.raises(ValueError, match=message) as caught:
            resolve_source(url, argument="videos")
        assert "secret" not in str(caught.value)
    assert site.seen == []


@pytest.mark.parametrize("path", ["/promises-much", "/endless", "/scene.mp4"])
def test_the_size_of_an_answer_is_limited(site, monkeypatch, path):
    monkeypatch.setenv("VIDEONSA_MAX_MEDIA_BYTES", "10000")
    with pytest.raises(ValueError, match="over the limit of 10,000 bytes; VIDEONSA_MAX_MEDIA_BYTES"):
        resolve_source(site.url + path, argument="videos")


@pytest.mark.parametrize("path", ["/slow-body", "/slow-headers"])
def test_the_time_of_an_answer_is_limited(site, monkeypatch, path):
    """In all, though something arrives all the time; and the connection is closed."""
    monkeypatch.setenv("VIDEONSA_HTTP_TIMEOUT", "0.5")
    start = time.monotonic()
    with pytest.raises(ValueError, match=r"not fetched within 0\.5 seconds; VIDEONSA_HTTP_TIMEOUT"):
        resolve_source(site.url + path, argument="videos")
    assert 0.4 < time.monotonic() - start < 20  # 100 seconds of dripping
    assert site.hung_up.wait(20)


@pytest.mark.parametrize("variable", ["VIDEONSA_MAX_MEDIA_BYTES", "VIDEONSA_HTTP_TIMEOUT"])
@pytest.mark.parametrize("value", ["0", "-1", "inf", "nan", "much"])
def test_bad_limits(site, monkeypatch, variable, value):
    monkeypatch.setenv(variable, value)
    with pytest.raises(ValueError, match=f"{variable} must be a positive number, got '{value}'"):
        resolve_source(f"{site.url}/scene.mp4", argument="videos")
    assert site.seen == []


def test_only_public_addresses(site, monkeypatch):
    monkeypatch.setenv("VIDEONSA_ALLOW_HTTP", "public")
    for host in ("127.0.0.1", "localhost", "2130706433", "0x7f.1"):
        with pytest.raises(ValueError, match=r"is not a public address|cannot be fetched"):
            resolve_source(f"http://{host}:{site.server_port}/scene.mp4", argument="videos")
    assert site.seen == []


def test_the_address_that_was_checked_is_the_one_connected_to(site, monkeypatch):
    """A name may resolve to another address a moment later; proxies would resolve it themselves, and are not asked."""
    monkeypatch.setenv("VIDEONSA_ALLOW_HTTP", "public")
    monkeypatch.setenv("http_proxy", site.url)
    monkeypatch.delenv("NO_PROXY")
    asked, connected = [], []

    def getaddrinfo(host, port, **_):
        asked.append(host)
        address = "93.184.216.34" if len(asked) == 1 else "127.0.0.1"
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, port))]

    class Socket(socket.socket):
        def connect(self, address):
            connected.append(address)
            super().connect(("127.0.0.1", site.server_port))

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    monkeypatch.setattr(sources_videonsa.socket, "socket", Socket)
    assert resolve_source("http://example.org/scene.mp4", argument="videos").file.read() == SCENE.read_bytes()
    assert asked == ["example.org"] and connected == [("93.184.216.34", 80)]
    with pytest.raises(ValueError, match=r"127\.0\.0\.1 is not a public address"):
        resolve_source("http://example.org/scene.mp4", argument="videos")
    asked.clear()
    with pytest.raises(ValueError, match=r"127\.0\.0\.1 is not a public address"):  # of the redirect
        resolve_source("http://example.org/redirect", argument="videos")
    assert len(connected) == 2


@pytest.mark.parametrize(
    ("address", "is_public"),
    [
        ("8.8.8.8", True),
        ("2606:4700:4700::1111", True),
        *[
            (address, False)
            for address in (
                *("127.0.0.1", "10.1.2.3", "172.16.0.1", "192.168.1.1", "169.254.169.254", "100.64.0.1", "0.0.0.0"),
                *("224.0.0.1", "255.255.255.255", "::1", "::", "fe80::1%eth0", "fc00::1", "ff02::1"),
                *("::ffff:127.0.0.1", "::ffff:10.0.0.1", "2002:7f00:1::", "64:ff9b::7f00:1", "64:ff9b::a00:1"),
            )
        ],
        ("64:ff9b::808:808", True),
    ],
)
def test_public_addresses(address, is_public):
    assert sources_videonsa._is_public(address) is is_public


def test_from_https_to_http_is_no_redirect():
    redirects = next(
        handler
        for handler in sources_videonsa._opener(sources_videonsa._Download(1, 1, False)).handlers
        if hasattr(handler, "redirect_request")
    )
    request = urllib.request.Request("https://example.org/a")
    with pytest.raises(sources_videonsa._Refused, match="from https to http"):
        redirects.redirect_request(request, None, 302, "", {}, "http://example.org/a")
    assert redirects.redirect_request(request, None, 302, "", {}, "https://example.org/b").full_url.endswith("/b")
