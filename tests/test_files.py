"""Videos that are files: which frames are read, how they look, and what happens where they cannot be read."""

import io
import json
import logging
import math
import re
import struct
import subprocess
import sys
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from moving_shapes import draw_frame
from PIL import Image
from processor_testing import ROOT, apply, build_processor, message, numbered, numbered_video, numbers, read

from decoding_videonsa import Decoder
from files_videonsa import FileClip
from synthetic.drawing import write_video

VIDEO = "<|vision_start|><|video_pad|><|vision_end|>"


@pytest.fixture(scope="module")
def processor():
    return build_processor()


# Reading files

CONTAINERS = {
    "h264.mp4": {},
    "closed.mp4": {"options": {"g": "5", "bf": "2"}},
    "open.mp4": {"options": {"g": "8", "x264-params": "open-gop=1:bframes=3:scenecut=0"}},
    "mpeg4.mp4": {"codec": "mpeg4"},
    "h264.mkv": {},
    "vp9.webm": {"codec": "libvpx-vp9", "options": {"deadline": "realtime", "cpu-used": "8", "g": "10"}},
    "h264.ts": {"options": {"g": "10"}},
    "h264.avi": {"codec": "libx264"},  # no presentation times
    "mpeg4.avi": {"codec": "mpeg4"},
    "raw.h264": {},  # no times and no frame count
}


def skip_without(codec: str | None) -> None:
    if (codec or "libx264") not in av.codecs_available:
        pytest.skip(f"this PyAV has no {codec} encoder")


@pytest.mark.parametrize("name", CONTAINERS)
def test_the_planned_frames_are_read(processor, tmp_path, name):
    skip_without(CONTAINERS[name].get("codec"))
    path = numbered_video(tmp_path / name, **CONTAINERS[name])
    for options in ({"fps": 2}, {"fps": 10}, {"num_frames": 50}, {"num_frames": 2}):
        seen, plan = read(processor, path, **options)
        assert seen == list(plan.frame_indices)
        assert len(seen) == options.get("num_frames", 2 * options.get("fps", 0))
        assert plan.fps == pytest.approx(len(seen) / 50 * 25)


@pytest.mark.parametrize("share", [6, pytest.param(1, marks=pytest.mark.slow)])
def test_every_container_and_codec(share):
    """Frames equal to a plain decoding of the whole file, or a ValueError: never a signal, never other frames."""
    command = [sys.executable, str(ROOT / "tests" / "read_matrix.py"), str(share)]
    output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    results = {(entry := json.loads(line))["file"]: entry["result"] for line in output.splitlines()}
    assert {name: result for name, result in results.items() if result != "equal" and "refused" not in result} == {}
    equal = {(Path(name).suffix, name.split("_")[0]) for name, result in results.items() if result == "equal"}
    assert len(equal) > 100


def test_only_what_the_planned_frames_need_is_decoded(processor, tmp_path, monkeypatch):
    path = numbered_video(tmp_path / "a.mp4", count=200, options={"g": "10", "sc_threshold": "0"})
    clip = FileClip(path, False)
    decoded = []

    decode = Decoder._decode

    def decode_and_note(decoder, packet):
        outcomes = decode(decoder, packet)
        decoded.extend(number for number, _ in outcomes)
        return outcomes

    monkeypatch.setattr(Decoder, "_decode", decode_and_note)
    for wanted, least in (([0, 199], {0, 199}), ([25, 26], {20, 25, 26}), ([183], {180, 183})):
        decoded.clear()
        assert numbers(clip.read_unresized(wanted)) == wanted
        positions = {clip.listing.position[number] for number in decoded}
        # Key frames and pictures that others refer to come along, of no other group than those that are needed.
        assert least <= positions and {p // 10 for p in positions} == {p // 10 for p in wanted}
    assert len(clip.listing.starts) == 20


def test_open_groups_need_the_group_before(tmp_path):
    path = numbered_video(tmp_path / "a.mp4", **CONTAINERS["open.mp4"])
    clip = FileClip(path, every_frame=False)
    leading = [i for i, number in enumerate(clip.listing.numbers) if clip.listing.is_leading(number)]
    assert len(leading) >= 6
    for index in leading:
        assert numbers(clip.read_unresized([index])) == [index]


def on_screen(times: list[float], second: float) -> int:
    """Number of the frame that a player shows."""
    return max(i for i, time in enumerate(times) if time <= second + 1e-6)


BURST = [*(i / 30 for i in range(30)), *range(10, 70, 10)]  # a camera that slows down, seconds


@pytest.mark.parametrize("times", [pytest.param(BURST, id="burst"), pytest.param([0.0, 1.0, 8.0], id="three")])
@pytest.mark.parametrize("suffix", ["mkv", "mp4"])
@pytest.mark.parametrize(
    "options",
    [{"fps": 1}, {"fps": 4}, {"fps": 30}, {"num_frames": 36}, {"num_frames": 200}, {"do_sample_frames": False}],
    ids=str,
)
def test_variable_frame_rates_are_sampled_by_time(processor, tmp_path, times, suffix, options):
    stamps = [round(1000 * time) for time in times]
    path = numbered_video(tmp_path / f"a.{suffix}", len(times), 1000, times=stamps, options={"bf": "0"})
    times = [stamp / 1000 for stamp in stamps]
    seen, plan = read(processor, path, **options)
    assert seen == [on_screen(times, i / plan.fps) for i in range(plan.num_frames)]
    if "num_frames" in options:
        assert plan.num_frames == options["num_frames"]
    elif "fps" in options:
        assert plan.fps == pytest.approx(options["fps"], rel=0.05)
    else:
        assert set(seen) == {*range(len(times))}  # none is left out
    inputs = apply(processor, message({"type": "video", "video": path}), **options, max_total_tokens=10**6)
    assert inputs["second_per_grid_ts"].item() == pytest.approx(2 / plan.fps)


def test_an_absurd_time_is_a_jump_of_the_clock(processor, tmp_path):
    """One broken timestamp, 3 years ahead: the rest is seen, and it is said."""
    times = [*range(0, 2100, 100), 10**11]
    path = numbered_video(tmp_path / "a.mkv", count=22, fps=1000, times=times, options={"bf": "0"})
    for options in ({"fps": 10}, {"num_frames": 22}, {"do_sample_frames": False}):
        seen, plan = read(processor, path, **options)
        assert seen == [*range(22)][: len(seen)] and len(seen) >= 20
        assert any("clock jumps" in note for note in plan.notes)


def test_a_video_that_starts_late(processor, tmp_path):
    path = numbered_video(tmp_path / "a.mkv", count=20, fps=10, times=range(50, 70))
    seen, plan = read(processor, path, fps=5)
    assert seen == list(plan.frame_indices) and len(seen) == 10 and plan.fps == pytest.approx(5.0)


def test_a_recording_that_begins_inside_a_group_of_pictures(processor, tmp_path):
    path = numbered_video(tmp_path / "whole.ts", options={"g": "10", "sc_threshold": "0"})
    content = path.read_bytes()
    packets = len(content) // 188
    (tmp_path / "joined.ts").write_bytes(content[188 * (packets // 3) :])
    seen, _ = read(processor, tmp_path / "joined.ts", fps=25)
    assert seen == [*range(20, 50)]


def test_frames_cut_away_by_an_edit_list_are_not_shown(processor, tmp_path):
    whole = numbered_video(tmp_path / "whole.mp4", options={"bf": "2"})
    with av.open(str(whole)) as source, av.open(str(tmp_path / "cut.mp4"), "w") as target:
        stream = source.streams.video[0]
        copy = target.add_stream_from_template(stream)
        shift = round(10 / 25 / stream.time_base)
        for packet in source.demux(stream):
            if packet.dts is not None:
                packet.pts, packet.dts, packet.stream = packet.pts - shift, packet.dts - shift, copy
                target.mux(packet)
    seen, _ = read(processor, tmp_path / "cut.mp4", fps=25)
    assert seen == [*range(10, 50)]


def test_memory_holds_the_planned_frames_only(tmp_path):
    """Of 400 frames of 0.9 MB each, 20 are wanted, resized."""
    pictures = (np.full((480, 640, 3), i % 256, np.uint8) for i in range(400))
    path = write_video(tmp_path / "a.mp4", pictures, 30, codec="mpeg4")
    code = f"""
import sys
sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / "checkpoints")!r}]
import resource
from files_videonsa import FileClip
from budget_videonsa import VideoOptions, plan_videos
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
before = peak()
clip = FileClip({str(path)!r}, False)
options = VideoOptions(num_frames=20, min_pixels_per_frame=3136, max_pixels_per_frame=50176)
plan, = plan_videos([clip.source], [options], 10**6)
frames = clip.read(plan, lambda frames, plan: frames[..., :plan.height, :plan.width])
assert frames.shape == (20, 3, 168, 252), frames.shape
print(peak() - before)
"""
    growth = float(subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout)
    assert growth < 120


def test_image_files_are_one_frame_videos(processor, tmp_path):
    Image.fromarray(numbered(5)).save(tmp_path / "a.png")
    inputs = processor(text=VIDEO, videos=str(tmp_path / "a.png"), return_tensors="pt")
    assert inputs["video_grid_thw"].tolist() == [[1, 4, 16]]


# Videos that cannot be read


def audio(path: Path) -> Path:
    with av.open(str(path), "w") as container:
        stream = container.add_stream("aac", rate=16000)
        for i in range(8):
            frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
            frame.sample_rate, frame.pts, frame.time_base = 16000, 1024 * i, Fraction(1, 16000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def broken(tmp_path: Path, kind: str) -> Path | str:
    path = tmp_path / f"{kind.replace(' ', '_')}.mp4"
    if kind == "missing":
        return path
    if kind == "empty":
        path.touch()
    elif kind == "folder":
        path.mkdir()
    elif kind == "text":
        path.write_text("This is not a video. " * 100)
    elif kind == "url":
        return "https://example.org/a.mp4"
    elif kind == "audio only":
        audio(path)
    elif kind == "no frames":
        with av.open(str(path), "w") as container:
            stream = container.add_stream("mpeg4", rate=25)
            stream.width, stream.height, stream.pix_fmt = 64, 64, "yuv420p"
            container.start_encoding()
    elif kind == "index cut off":  # moov comes last
        content = numbered_video(tmp_path / "whole.mp4").read_bytes()
        path.write_bytes(content[: content.index(b"moov")])
    elif kind == "frames cut off":  # moov comes first
        with av.open(str(tmp_path / "first.mp4"), "w", options={"movflags": "faststart"}) as container:
            stream = container.add_stream("mpeg4", rate=25)
            stream.width, stream.height, stream.pix_fmt = 128, 56, "yuv420p"
            for i in range(50):
                container.mux(stream.encode(av.VideoFrame.from_ndarray(numbered(i), format="rgb24")))
            container.mux(stream.encode())
        content = (tmp_path / "first.mp4").read_bytes()
        assert content.index(b"moov") < content.index(b"mdat")
        path.write_bytes(content[: len(content) * 7 // 10])
    elif kind == "matroska cut off":
        path = path.with_suffix(".mkv")
        content = numbered_video(tmp_path / "whole.mkv", options={"g": "5"}).read_bytes()
        path.write_bytes(content[: len(content) * 6 // 10])
    elif kind == "avi cut off":
        path = path.with_suffix(".avi")
        content = numbered_video(tmp_path / "whole.avi", codec="mpeg4").read_bytes()
        path.write_bytes(content[: len(content) * 6 // 10])
    elif kind == "damaged":
        content = bytearray(numbered_video(tmp_path / "whole.mp4", options={"g": "1"}).read_bytes())
        start, end = content.index(b"mdat") + 1500, content.index(b"moov") - 1500
        content[start:end] = bytes(end - start)
        path.write_bytes(content)
    return path


@pytest.mark.parametrize(
    "kind, match",
    [
        ("missing", "no such video file"),
        ("empty", "empty"),
        ("folder", "not a video file"),
        ("text", "cannot be opened as a video"),
        ("url", "VIDEONSA_ALLOW_HTTP"),
        ("audio only", "no video stream .*audio"),
        ("no frames", "no frames|no video stream"),
        ("index cut off", "no video stream|cannot be opened"),
        ("frames cut off", r"cut short: only \d+ frames, \d\.\d\d s, can be read of the 2\.00 s"),
        ("matroska cut off", r"cut short: only \d+ frames, \d\.\d\d s, can be read of the 2\.00 s"),
        ("avi cut off", r"cut short: only \d+ frames"),
        ("damaged", r"damaged at .* s: \d+ of the 50 frames needed cannot be decoded"),
    ],
)
def test_unreadable_videos_are_errors(processor, tmp_path, kind, match):
    path = broken(tmp_path, kind)
    with pytest.raises(ValueError, match=match) as caught:
        apply(processor, message({"type": "video", "video": path}), fps=25)
    assert Path(str(path)).name in str(caught.value)


@pytest.mark.parametrize("count", [1, 2, 3, 5])
def test_very_short_videos(processor, tmp_path, count):
    path = numbered_video(tmp_path / "a.mp4", count=count)
    inputs = apply(processor, message({"type": "video", "video": path}))
    frames = 1 if count == 1 else min(count - count % 2, 4)
    assert inputs["video_grid_thw"].tolist() == [[math.ceil(frames / 2), 4, 16]]
    assert (inputs["input_ids"] == processor.video_token_id).sum() == math.ceil(frames / 2) * 16
    assert inputs["second_per_grid_ts"].isfinite().all()
    if count == 1:  # the frame is repeated: both halves of every patch are equal
        patches = inputs["pixel_values_videos"].reshape(-1, 3, 2, 14, 14)
        assert torch.equal(patches[:, :, 0], patches[:, :, 1])


# How frames look


def encode(path: Path, frames, codec="libx264", fps=10, *, pix_fmt="yuv420p", options=None, **attributes) -> Path:
    """A video whose stream and codec context carry `attributes` (colorspace, sample_aspect_ratio, ...)."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=fps, options=options or {})
        stream.pix_fmt, stream.thread_count = pix_fmt, 1
        for name, value in attributes.items():
            setattr(stream.codec_context, name, value)
        for frame in frames:
            stream.width, stream.height = frame.width, frame.height
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


# Kr, Kb of ITU-T H.273 table 4
LUMA = {
    1: (0.2126, 0.0722),
    5: (0.299, 0.114),
    6: (0.299, 0.114),
    7: (0.212, 0.087),
    9: (0.2627, 0.0593),
    4: (0.3, 0.11),
}


def to_yuv(rgb: np.ndarray, matrix: int, full_range: bool) -> np.ndarray:
    """(H, W, 3) uint8 of a colour matrix, from the definition in ITU-T H.273, 8.3."""
    kr, kb = LUMA[matrix]
    r, g, b = np.moveaxis(rgb / 255.0, -1, 0)
    y = kr * r + (1 - kr - kb) * g + kb * b
    cb, cr = (b - y) / (2 * (1 - kb)), (r - y) / (2 * (1 - kr))
    scale, offset, chroma = (255, 0, 255) if full_range else (219, 16, 224)
    yuv = np.stack([scale * y + offset, chroma * cb + 128, chroma * cr + 128], -1)
    return np.clip(np.round(yuv), 0, 255).astype(np.uint8)


def rounding(matrix: int, full_range: bool = False) -> float:
    """The largest error of a colour that was Y, Cb and Cr of 8 bits on its way.

    Half a step of each of them and of the colour, and one for libswscale's tables.
    """
    kr, kb = LUMA[matrix]
    luma, chroma = (1, 1) if full_range else (255 / 219, 255 / 224)
    green = 2 * (kr * (1 - kr) + kb * (1 - kb)) / (1 - kr - kb)
    return 0.5 * luma + 0.5 * chroma * max(2 * (1 - kr), 2 * (1 - kb), green) + 0.5 + 1


COLOURS = np.array([[255, 0, 0], [0, 255, 0], [0, 0, 255], [255, 255, 255], [0, 0, 0], [180, 90, 40]], np.uint8)


@pytest.mark.parametrize("full_range", [False, True], ids=["limited", "full"])
@pytest.mark.parametrize("height, tag, matrix", [(48, 2, 6), (718, 2, 6), (720, 2, 1), *((48, m, m) for m in LUMA)])
def test_colours_are_those_of_the_frames_own_matrix(tmp_path, height, tag, matrix, full_range):
    shown = np.repeat(np.repeat(COLOURS[None], height, 0), 16, 1)
    frame = av.VideoFrame.from_ndarray(np.moveaxis(to_yuv(shown, matrix, full_range), -1, 0), format="yuv444p")
    frame.colorspace, frame.color_range = tag, 2 if full_range else 1
    attributes = {"colorspace": tag, "color_range": frame.color_range}
    path = encode(tmp_path / "a.mkv", [frame], pix_fmt="yuv444p", options={"qp": "0"}, **attributes)
    read = FileClip(path, False).read_unresized([0])[0].permute(1, 2, 0).numpy()
    assert np.abs(read[:, 8::16].astype(int) - shown[:, 8::16]).max() <= rounding(matrix, full_range)


def test_a_matrix_that_cannot_be_converted_is_an_error(tmp_path):
    frame = av.VideoFrame.from_ndarray(np.full((3, 48, 64), 100, np.uint8), format="yuv444p")
    frame.colorspace = 14  # ICtCp
    path = encode(tmp_path / "a.mkv", [frame], pix_fmt="yuv444p", colorspace=14)
    with pytest.raises(ValueError, match="colour matrix 14"):
        FileClip(path, False).read_unresized([0])


@pytest.mark.parametrize("transpose, flip_x, flip_y", [*np.ndindex(2, 2, 2)])
def test_the_whole_display_matrix_is_applied(tmp_path, transpose, flip_x, flip_y):
    picture = np.zeros((56, 112, 3), np.uint8)
    picture[:28, :28], picture[28:, :28] = 255, 120
    path = write_video(tmp_path / "a.mp4", [picture] * 2, 2)
    stored = FileClip(path, False).read_unresized([0])[0].permute(1, 2, 0).numpy()
    assert stored[14, 14].min() > stored[42, 14].max() > stored[14, 70].max()
    content = bytearray(path.read_bytes())
    start = content.index(b"tkhd") + 4 + 4 + 20 + 16
    # ISO/IEC 14496-12, 8.3.2: a pixel (x, y) is shown at (a x + c y, b x + d y).
    x, y = (-1 if flip_x else 1) * 65536, (-1 if flip_y else 1) * 65536
    a, b, c, d = (0, y, x, 0) if transpose else (x, 0, 0, y)
    struct.pack_into(">9i", content, start, a, b, 0, c, d, 0, 0, 0, 1 << 30)
    path.write_bytes(content)
    expected = stored.transpose(1, 0, 2) if transpose else stored
    expected = expected[:: -1 if flip_y else 1, :: -1 if flip_x else 1]
    clip = FileClip(path, False)
    assert (clip.source.height, clip.source.width) == expected.shape[:2]
    assert np.array_equal(clip.read_unresized([0])[0].permute(1, 2, 0).numpy(), expected)


@pytest.mark.parametrize("suffix", ["mp4", "mkv"])
@pytest.mark.parametrize("aspect, size", [((2, 1), (56, 224)), ((1, 2), (112, 112)), ((1, 1), (56, 112))])
def test_pixels_that_are_not_square_are_shown_as_wide_as_they_are(processor, tmp_path, suffix, aspect, size):
    frames = [av.VideoFrame.from_ndarray(np.full((56, 112, 3), 99, np.uint8), format="rgb24")] * 4
    path = encode(tmp_path / f"a.{suffix}", frames, sample_aspect_ratio=Fraction(*aspect))
    plan = processor.plan_video(path)
    assert (plan.height, plan.width) == size
    inputs = apply(processor, message({"type": "video", "video": path}))
    assert inputs["video_grid_thw"][0, 1:].tolist() == [side // 14 for side in size]


@pytest.mark.parametrize(
    "codec, suffix, pix_fmt", [("png", "mov", "rgba"), ("ffv1", "mkv", "yuva420p"), ("libvpx-vp9", "webm", "yuva420p")]
)
def test_transparent_videos_are_on_white(tmp_path, codec, suffix, pix_fmt):
    picture = np.zeros((56, 112, 4), np.uint8)
    picture[:, :56], picture[:, 56:] = (255, 0, 0, 255), (0, 255, 0, 0)
    frames = [av.VideoFrame.from_ndarray(picture, format="rgba")] * 3
    options = {"lossless": "1"} if codec == "libvpx-vp9" else {}
    path = encode(tmp_path / f"a.{suffix}", frames, codec, pix_fmt=pix_fmt, options=options)
    read = FileClip(path, False).read_unresized([0])[0].permute(1, 2, 0).numpy().astype(int)
    # Away from the edge between the halves, over which chroma is interpolated.
    assert np.abs(read[:, :52] - (255, 0, 0)).max() <= (0 if pix_fmt == "rgba" else rounding(5))
    assert np.array_equal(read[:, 60:], np.full((56, 52, 3), 255))


def test_the_size_may_change_in_the_middle(processor, tmp_path):
    """Two recordings one after the other; frames get the size of the first."""
    skip_without("libx264")
    parts = [
        write_video(
            tmp_path / f"{i}.ts",
            [np.full((56 * i, 56 * i, 3), 80 * i, np.uint8)] * 10,
            10,
            codec="libx264",
            options={"qp": "0"},
        )
        for i in (1, 2)
    ]
    path = tmp_path / "both.ts"
    path.write_bytes(b"".join(part.read_bytes() for part in parts))
    frames = FileClip(path, False).read_unresized(range(20))
    assert frames.shape == (20, 3, 56, 56)
    assert np.abs(frames.int().numpy() - np.repeat([80, 160], 10)[:, None, None, None]).max() <= rounding(5)
    assert apply(processor, message({"type": "video", "video": path}), fps=10)["video_grid_thw"].tolist() == [
        [10, 4, 4]
    ]


# What the container says, and what counts


@pytest.mark.parametrize("name, codec", [("a.h264", "libx264"), ("a.hevc", "libx265"), ("a.m2v", "mpeg2video")])
@pytest.mark.parametrize("rate", [24, 50])
def test_raw_streams_have_the_rate_that_their_codec_states(tmp_path, name, codec, rate):
    skip_without(codec)
    options = {"x265-params": "log-level=none"} if codec == "libx265" else {}
    path = write_video(tmp_path / name, [numbered(i) for i in range(50)], rate, codec=codec, options=options)
    source = FileClip(path, False).source
    assert (source.num_frames, source.fps, source.notes) == (50, rate, ())


def test_a_rate_that_nobody_states_is_assumed_and_said(tmp_path):
    path = tmp_path / "a.mjpeg"
    with av.open(str(path), "w", format="mjpeg") as container:
        stream = container.add_stream("mjpeg", rate=10)
        stream.width, stream.height, stream.pix_fmt = 224, 56, "yuvj420p"
        for i in range(10):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(numbered(i), format="rgb24")))
        container.mux(stream.encode())
    source = FileClip(path, False).source
    assert source.fps == 25 and any("25 a second are assumed" in note for note in source.notes)


@pytest.mark.parametrize(
    "defaults, expected", [((False, True), 1), ((True, False), 0), ((False, False), 1), ((True, True), 1)]
)
def test_the_default_track_counts_then_the_largest(tmp_path, defaults, expected):
    """A preview of 56 x 56 pixels comes before the film of 112 x 112."""
    path = tmp_path / "a.mkv"
    with av.open(str(path), "w") as container:
        streams = []
        for size, default in zip((56, 112), defaults, strict=True):
            stream = container.add_stream("libx264", rate=10)
            stream.width = stream.height = size
            stream.pix_fmt = "yuv420p"
            stream.disposition = av.stream.Disposition.default.value if default else 0
            streams.append(stream)
        for _ in range(5):
            for stream in streams:
                picture = np.full((stream.height, stream.width, 3), 50, np.uint8)
                container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        for stream in streams:
            container.mux(stream.encode())
    assert FileClip(path, False).source.height == (56, 112)[expected]


@pytest.mark.parametrize("in_memory", [False, True])
def test_a_playlist_opens_nothing_but_files(tmp_path, in_memory):
    """Not the network, and from memory nothing at all."""
    secret = numbered_video(tmp_path / "secret.ts")
    for target in (secret.name, secret.as_uri(), "http://127.0.0.1:9/a.ts"):
        text = f"#EXTM3U\n#EXT-X-TARGETDURATION:2\n#EXTINF:2,\n{target}\n#EXT-X-ENDLIST\n"
        playlist = tmp_path / "list.m3u8"
        playlist.write_text(text)
        source = io.BytesIO(text.encode()) if in_memory else playlist
        if not in_memory and "http" not in target:
            assert FileClip(source, False).source.num_frames == 50
        else:
            with pytest.raises(ValueError):
                FileClip(source, False)


# Damage


def overwrite(path: Path, start: float, count: int) -> Path:
    """`count` bytes, from that share of the media data on."""
    content = bytearray(path.read_bytes())
    first = content.index(b"mdat") + 8
    first += round((content.rindex(b"moov") - first) * start)
    content[first : first + count] = np.random.default_rng(0).bytes(count)
    damaged = path.with_name("damaged.mp4")
    damaged.write_bytes(content)
    return damaged


@pytest.fixture(scope="module")
def long_video(tmp_path_factory):
    """20 seconds of ten groups of pictures."""
    frames = (draw_frame(i / 10, 2, 224, 112) for i in range(200))
    options = {"g": "20", "sc_threshold": "0", "bf": "2", "crf": "18"}
    return write_video(tmp_path_factory.mktemp("long") / "a.mp4", frames, 10, options=options)


def test_small_damage_is_said_and_the_last_good_frame_is_held(long_video, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    whole = FileClip(long_video, False).read_unresized(range(200))
    clip = FileClip(overwrite(long_video, 0.55, 300), False)
    with caplog.at_level("WARNING"):
        read = clip.read_unresized(range(200))
    good = [torch.equal(one, other) for one, other in zip(read, whole, strict=True)]
    bad = [i for i, same in enumerate(good) if not same]
    assert 0 < len(bad) <= 20  # up to the end of one group of pictures, no further
    (said,) = [record.getMessage() for record in caplog.records if "damaged" in record.getMessage()]
    first, last = map(float, re.search(r"damaged at ([\d.]+) to ([\d.]+) s:", said).groups())
    assert first <= bad[0] / 10 and bad[-1] / 10 <= last < first + 2
    for i in range(round(10 * first), round(10 * last) + 1):  # what was on the screen before, not garbage
        assert any(torch.equal(read[i], whole[j]) for j in range(max(0, i - 20), i))


def test_much_damage_is_refused(long_video):
    with pytest.raises(ValueError, match=r"damaged at .* s: \d+ of the 200 frames needed cannot be decoded"):
        FileClip(overwrite(long_video, 0.2, 10**4), False).read_unresized(range(200))


def test_damage_beside_what_is_wanted_is_no_matter(long_video, caplog):
    clip = FileClip(overwrite(long_video, 0.55, 300), False)
    clip.read_unresized([0, 30, 60, 160, 199])
    assert not [record for record in caplog.records if "damaged" in record.getMessage()]


def test_palettes_are_not_lost_between_the_wanted_frames(tmp_path):
    """They are stored once, when they change, and not with every key frame."""
    path = tmp_path / "a.avi"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("rawvideo", rate=10)
        stream.width, stream.height, stream.pix_fmt = 64, 56, "pal8"
        for i in range(12):
            indices = np.full((56, 64), i, np.uint8)
            palette = np.zeros((256, 4), np.uint8)
            palette[:, 0], palette[:, 1] = 255, 20 * np.arange(256) % 256
            container.mux(stream.encode(av.VideoFrame.from_ndarray((indices, palette), format="pal8")))
        container.mux(stream.encode())
    clip = FileClip(path, False)
    whole = clip.read_unresized(range(12))
    assert len({frame.float().mean().item() for frame in whole}) == 12
    for i in range(12):
        assert torch.equal(clip.read_unresized([i])[0], whole[i])


def test_streams_that_are_joined_are_not_damaged(tmp_path, caplog):
    part = numbered_video(tmp_path / "part.ts", count=25, options={"g": "12", "bf": "2"})
    path = tmp_path / "joined.ts"
    path.write_bytes(part.read_bytes() * 3)
    assert numbers(FileClip(path, False).read_unresized(range(75))) == [*range(25)] * 3
    assert not [record for record in caplog.records if "damaged" in record.getMessage()]


def test_packets_lost_in_a_transport_stream_are_damage(tmp_path):
    path = numbered_video(tmp_path / "whole.ts", count=50, options={"g": "50", "bf": "0", "crf": "1"})
    content = path.read_bytes()
    packets = len(content) // 188
    lost = tmp_path / "lost.ts"
    lost.write_bytes(content[: 188 * (packets // 2)] + content[188 * (packets // 2 + 40) :])
    clip = FileClip(lost, False)
    with pytest.raises(ValueError, match="damaged at"):
        clip.read_unresized(range(clip.source.num_frames))


def test_a_hole_in_the_times_is_noted(processor, tmp_path):
    times = [i for i in range(60) if not 20 <= i < 28]
    path = numbered_video(tmp_path / "a.mkv", count=52, fps=10, times=times)
    (note,) = processor.plan_video(path).notes
    assert "no frames from 1.90 to 2.80 s" in note
