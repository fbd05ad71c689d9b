"""Videos that are files: which frames are read, how they look, and what happens where they cannot be read."""

import json
import math
import struct
import subprocess
import sys
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from PIL import Image
from processor_testing import ROOT, apply, build_processor, message, numbered, numbered_video, numbers, read

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

    def decoded_frames(*args, **kwargs):
        for number, frame in FileClip._decoded(clip, *args, **kwargs):
            decoded.append(number)
            yield number, frame

    monkeypatch.setattr(clip, "_decoded", decoded_frames)
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


@pytest.mark.parametrize("turns, matrix", [(1, (0, -1, 1, 0)), (2, (-1, 0, 0, -1)), (3, (0, 1, -1, 0))])
def test_rotation_is_applied(processor, tmp_path, turns, matrix):
    picture = np.zeros((56, 112, 3), np.uint8)
    picture[:28, :28] = 255
    path = write_video(tmp_path / "a.mp4", [picture] * 4, 2)
    content = bytearray(path.read_bytes())
    # The display matrix (a b u, c d v, x y w) of the track header, ISO/IEC 14496-12, 8.3.2.
    start = content.index(b"tkhd") + 4 + 4 + 20 + 16
    assert struct.unpack_from(">9i", content, start) == (65536, 0, 0, 0, 65536, 0, 0, 0, 1 << 30)
    a, b, c, d = (value * 65536 for value in matrix)
    struct.pack_into(">9i", content, start, a, b, 0, c, d, 0, 0, 0, 1 << 30)
    path.write_bytes(content)
    plan = processor.plan_video(path)
    expected = np.rot90(picture, turns)
    assert (plan.height, plan.width) == expected.shape[:2]
    frames = FileClip(path, False).read(plan, lambda frames, plan: frames)
    assert np.abs(frames[0].permute(1, 2, 0).numpy().astype(int) - expected).max() < 60


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
