"""Streams of frames: the same as a plain decoding gives, in bounded memory, whatever happens to the file meanwhile."""

import io
import logging
import os
import re
import subprocess
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace

import av
import numpy as np
import pytest
import torch
from moving_shapes import draw_frame
from processor_testing import ROOT

import decoding_videonsa
from decoding_videonsa import Decoder
from files_videonsa import FileClip
from frames_videonsa import FrameClip, VideoRequest
from listing_videonsa import DamagedVideoError, VideoFile
from rgb_videonsa import RgbConverter
from synthetic.drawing import write_video

COUNT, RATE = 100, 10
BATCHES = (1, 2, 7, COUNT + 1)
X264 = {"preset": "ultrafast", "crf": "18", "sc_threshold": "0"}
VIDEOS = {
    "closed.mp4": {"options": {**X264, "g": "20", "bf": "2"}},
    "open.mp4": {"options": {"g": "12", "x264-params": "open-gop=1:bframes=3:scenecut=0"}},
    "one.mp4": {"options": {**X264, "g": "9999", "bf": "2"}},
    "tiny.mp4": {"options": {**X264, "g": "4", "bf": "2"}},
    "refresh.mp4": {"options": {**X264, "x264-params": "intra-refresh=1:bframes=0:keyint=20"}},
    "variable.mkv": {"options": {**X264, "bf": "0"}, "times": [*range(40), *range(40, 640, 10)]},
    "closed.ts": {"options": {**X264, "g": "20", "bf": "2"}},
    "raw.h264": {"options": {**X264, "g": "20", "bf": "2"}},
    "mpeg4.avi": {"codec": "mpeg4", "options": {"g": "12", "bf": "2"}},
    "mpeg4.mp4": {"codec": "mpeg4", "options": {"g": "12", "bf": "2"}},
    "mpeg2.asf": {"codec": "mpeg2video", "options": {"g": "12", "bf": "2"}},
    "ffv1.mkv": {"codec": "ffv1"},
    "vp9.webm": {"codec": "libvpx-vp9", "options": {"deadline": "realtime", "cpu-used": "8", "g": "20"}},
}


@pytest.fixture(scope="module")
def videos(tmp_path_factory):
    """A function that writes one of `VIDEOS`, once."""
    folder = tmp_path_factory.mktemp("videos")

    def write(name: str) -> Path:
        settings = VIDEOS[name]
        if settings.get("codec", "libx264") not in av.codecs_available:
            pytest.skip(f"this PyAV has no {settings.get('codec', 'libx264')} encoder")
        path = folder / name
        if not path.exists():
            write_video(path, (draw_frame(i / RATE, 2, 96, 64) for i in range(COUNT)), RATE, **settings)
        return path

    return write


def decoded(path: Path) -> torch.Tensor:
    """All frames, (T, 3, H, W), by a plain loop over the container."""
    convert = RgbConverter(str(path))
    with av.open(str(path)) as container:
        pictures = [convert(frame) for frame in container.decode(video=0)]
    return torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2)


def plan_of(clip, indices: Sequence[int]) -> SimpleNamespace:
    return SimpleNamespace(frame_indices=tuple(indices), height=clip.source.height, width=clip.source.width)


def as_is(frames: torch.Tensor, plan) -> torch.Tensor:
    return frames


def stream(clip, indices: Sequence[int], batch: int):
    return clip.stream(plan_of(clip, indices), as_is, batch)


def assert_streams(clip, indices: Sequence[int], expected: torch.Tensor) -> None:
    for batch in BATCHES:
        pieces = [*stream(clip, indices, batch)]
        assert [len(piece) for piece in pieces] == [len(part) for part in torch.arange(len(indices)).split(batch)]
        assert torch.equal(torch.cat(pieces), expected), batch
    assert torch.equal(clip.read(plan_of(clip, indices), as_is), expected)


@pytest.mark.parametrize("name", VIDEOS)
def test_a_stream_gives_the_frames_of_a_plain_decoding(videos, name):
    clip, truth = FileClip(videos(name), False), decoded(videos(name))
    assert clip.source.num_frames == len(truth) == COUNT
    held = np.repeat(np.arange(0, COUNT, 9), 3).tolist()  # as where the frame rate varies
    for indices in (range(COUNT), range(2, COUNT, 7), [COUNT - 1], held):
        assert_streams(clip, indices, truth[list(indices)])


def test_images_and_arrays_are_streamed_as_they_are_read(tmp_path):
    frames = torch.randint(0, 256, (9, 3, 28, 28), dtype=torch.uint8)
    clip = FrameClip(VideoRequest(frames), 1.0, None, None, 255)
    for indices in (range(9), [0, 1, 2, 5, 8], [0, 0, 2, 2, 4, 4]):
        assert_streams(clip, indices, frames[list(indices)])


@pytest.mark.parametrize("batch", [0, -1, 1.5, True, None, "8", float("inf")])
def test_a_batch_is_a_positive_integer(videos, monkeypatch, batch):
    clips = FileClip(videos("tiny.mp4"), False), FrameClip(VideoRequest(torch.zeros(2, 3, 28, 28)), 1.0, None, None, 1)
    monkeypatch.setattr(VideoFile, "open", lambda self: pytest.fail("opened before the arguments were looked at"))
    for clip in clips:
        with pytest.raises(ValueError, match=re.escape(f"`batch` must be a positive integer, got {batch!r}")):
            stream(clip, [0], batch)


# Damage


def break_packets(path: Path, numbers: Sequence[int], target: Path) -> Path:
    """A copy of an MP4 file in which the content of these packets is zero, which is no picture of any codec."""
    content = bytearray(path.read_bytes())
    with av.open(str(path)) as container:
        packets = [(packet.pos, packet.size) for packet in container.demux(video=0) if packet.size]
    for number in numbers:
        start, size = packets[number]
        content[start : start + size] = bytes(size)
    target.write_bytes(content)
    return target


def damage(clip: FileClip, numbers: Sequence[int]) -> list[bool]:
    """Whether each frame, in the order shown, is damaged.

    They are from a broken packet to the end of its group, and so are frames shown before the key frame of the next.
    """
    listing = clip.listing
    broken = {
        group: min(n for n in numbers if listing.group_of(n) == group) for group in map(listing.group_of, numbers)
    }

    def is_damaged(number: int) -> bool:
        group = listing.group_of(number)
        leads_out = listing.is_leading(number) and group - 1 in broken
        return leads_out or number >= broken.get(group, COUNT)

    return [is_damaged(number) for number in listing.numbers]


def held(clip: FileClip, numbers: Sequence[int], indices: Sequence[int]) -> list[int]:
    """The frames that are shown where these are wanted: the last good one before, or the first.

    Looked at are those that are wanted, and all of the groups in doubt and of the ones before these.
    """
    listing, bad = clip.listing, damage(clip, numbers)
    broken = {listing.group_of(number) for number in numbers}
    needed = [listing.depends_on(listing.numbers[index]) for index in indices]
    groups = {group for some in needed if some & broken for group in some}
    groups |= {group - 1 for group in groups}
    looked_at = [i for i in range(COUNT) if i in indices or listing.group_of(listing.numbers[i]) in groups]
    good = [i for i in looked_at if not bad[i]]
    return [max((i for i in good if i <= index), default=good[0]) for index in indices]


BROKEN = {
    "closed.mp4": ([1], [35], [39, 99], [40], [38, 39, 59, 97]),
    "open.mp4": ([22], [95], [12]),
    "one.mp4": ([95], [99], [92, 97]),
    "tiny.mp4": ([3], [50, 51, 70], [48]),
    "mpeg4.mp4": ([0], [0, 12, 13], [30]),
}


@pytest.mark.parametrize("step", [1, 3, 10])
@pytest.mark.parametrize("name, numbers", [(name, numbers) for name in BROKEN for numbers in BROKEN[name]])
def test_small_damage_is_held_over_and_told_once(videos, tmp_path, caplog, monkeypatch, name, numbers, step):
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    monkeypatch.setattr(decoding_videonsa, "MAX_DAMAGED_SHARE", 0.3)
    clip = FileClip(break_packets(videos(name), numbers, tmp_path / "a.mp4"), False)
    truth, bad = decoded(videos(name)), damage(clip, numbers)
    indices = range(step // 2, COUNT, step)
    assert_streams(clip, indices, truth[held(clip, numbers, indices)])
    count = sum(bad[index] for index in indices)
    told = [record.getMessage() for record in caplog.records if "damaged" in record.getMessage()]
    assert len(told) == (len(BATCHES) + 1 if count else 0)
    assert all(f"{count} of the {len(indices)} frames needed" in text for text in told)


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize(
    "name, numbers", [("one.mp4", [60]), ("closed.mp4", [30, 45, 61]), ("open.mp4", range(40, 80)), ("one.mp4", [5])]
)
def test_too_much_damage_ends_a_stream_behind_all_frames_before_it(videos, tmp_path, name, numbers, batch):
    """Frames that are held for damage within the limit are given out if good ones follow."""
    clip = FileClip(break_packets(videos(name), numbers, tmp_path / "a.mp4"), False)
    truth, bad = decoded(videos(name)), damage(clip, numbers)
    limit = next(i for i in range(COUNT) if sum(bad[: i + 1]) > COUNT // 10)
    end = max(i for i in range(limit) if not bad[i]) + 1  # behind the last good frame before
    pieces = []
    with pytest.raises(DamagedVideoError, match=rf"damaged at .*{end / RATE:.2f} to .* needed cannot") as caught:
        pieces += iter_into(pieces, stream(clip, range(COUNT), batch))
    assert isinstance(caught.value, ValueError) and caught.value.second == pytest.approx(end / RATE)
    assert torch.equal(torch.cat(pieces), truth[held(clip, numbers, range(COUNT))[:end]])
    assert {len(piece) for piece in pieces[:-1]} <= {batch}
    with pytest.raises(DamagedVideoError, match="damaged at"):
        clip.read(plan_of(clip, range(COUNT)), as_is)


def iter_into(pieces: list, iterator) -> list:
    for piece in iterator:
        pieces.append(piece)
    return []


def test_nothing_is_given_out_where_nothing_is_good(videos, tmp_path):
    clip = FileClip(break_packets(videos("one.mp4"), [50], tmp_path / "a.mp4"), False)
    with pytest.raises(DamagedVideoError, match="1 of the 1 frames"):
        next(stream(clip, [80], 1))


def test_damage_that_was_passed_is_told_where_a_stream_is_given_up(videos, tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    clip = FileClip(break_packets(videos("closed.mp4"), [15], tmp_path / "a.mp4"), False)
    frames = stream(clip, range(COUNT), 30)
    next(frames)
    assert not caplog.records
    frames.close()
    (record,) = caplog.records
    assert "5 of the 100 frames needed" in record.getMessage()


def test_a_damaged_file_in_memory_is_gone_through_twice_at_once(videos, tmp_path):
    """The second pass, through what is in doubt, must not move the place at which the first reads."""
    path = break_packets(videos("closed.mp4"), [37, 38, 77], tmp_path / "a.mp4")
    clip = FileClip(path, False)
    expected = clip.read(plan_of(clip, range(COUNT)), as_is)
    with path.open("rb") as file:
        for source in (io.BytesIO(path.read_bytes()), file):
            clip = FileClip(source, False)
            two = [stream(clip, range(COUNT), 7) for _ in range(2)]
            for one, other in zip(*two, strict=True):
                assert torch.equal(one, other)
                assert torch.equal(one, expected[: len(one)])
                expected = expected.roll(-len(one), 0)
            expected = expected.roll(COUNT, 0)


# One pass, in bounded memory


def fed(monkeypatch) -> list[int]:
    """The packets that decoders are fed from here on."""
    numbers, feed = [], Decoder.feed

    def note(decoder):
        outcomes = feed(decoder)
        numbers.append(decoder.fed)
        return outcomes

    monkeypatch.setattr(Decoder, "feed", note)
    return numbers


@pytest.fixture(scope="module")
def endless(tmp_path_factory):
    """3000 frames of 112 x 112 in one group of pictures."""
    if "libx264" not in av.codecs_available:
        pytest.skip("this PyAV has no libx264 encoder")
    frames = (np.full((112, 112, 3), i % 256, np.uint8) for i in range(3000))
    path = tmp_path_factory.mktemp("endless") / "a.mp4"
    return write_video(path, frames, 30, options={"preset": "ultrafast", "g": "99999", "sc_threshold": "0"})


def test_frames_are_given_out_before_the_file_is_decoded(endless, monkeypatch):
    clip = FileClip(endless, False)
    assert len(clip.listing.starts) == 1
    numbers = fed(monkeypatch)
    batch = 8
    # As much is fed behind a frame as makes `_MAX_THREADS + _MAX_REORDERED` others come out, and inside the decoder are
    # as many packets again at most.
    look_ahead = 2 * (decoding_videonsa._MAX_THREADS + decoding_videonsa._MAX_REORDERED)
    for given, _ in enumerate(stream(clip, range(3000), batch), start=1):
        assert len(numbers) <= given * batch + look_ahead
    assert numbers == [*range(3000)]


@pytest.mark.parametrize("name, numbers", [("closed.mp4", []), ("closed.mp4", [35, 36, 75]), ("tiny.mp4", [1, 30, 61])])
def test_a_file_is_gone_through_once_and_what_is_in_doubt_once_more(videos, tmp_path, monkeypatch, name, numbers):
    clip = FileClip(break_packets(videos(name), numbers, tmp_path / "a.mp4"), False)
    opened, open_file = [], VideoFile.open
    monkeypatch.setattr(VideoFile, "open", lambda file: (opened.append(1), open_file(file))[1])
    packets = fed(monkeypatch)
    for _ in stream(clip, range(COUNT), 1):
        pass
    assert len(opened) == (2 if numbers else 1)
    assert len(packets) <= len(opened) * COUNT


def test_memory_does_not_grow_with_the_video(endless, tmp_path):
    """An endless group of pictures takes no more than its first tenth, up to what a stream holds at all."""
    short = tmp_path / "short.mp4"
    with av.open(str(endless)) as source, av.open(str(short), "w") as target:
        copy = target.add_stream_from_template(source.streams.video[0])
        for number, packet in enumerate(source.demux(video=0)):
            if number < 300:
                packet.stream = copy
                target.mux(packet)
    code = f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
import resource
from types import SimpleNamespace
from files_videonsa import FileClip
for path in sys.argv[1:]:
    clip = FileClip(path, False)
    count = clip.source.num_frames
    plan = SimpleNamespace(frame_indices=range(count), height=112, width=112)
    assert sum(len(piece) for piece in clip.stream(plan, lambda frames, plan: frames, 8)) == count
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""
    command = [sys.executable, "-c", code, str(short), str(short), str(endless)]
    output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    _, before, after = [1024 * int(line) for line in output.split()]
    frame = 3 * 112 * 112
    look_ahead = 2 * (decoding_videonsa._MAX_THREADS + decoding_videonsa._MAX_REORDERED) * frame
    # A frame is there as it comes and resized; of 2700 packets more, there are a few numbers each. The whole is 113 MB.
    assert after - before < 2 * look_ahead + 2700 * 400 < 3000 * frame / 10


# What happens to a file meanwhile


@pytest.mark.parametrize("batch", [1, 8])
@pytest.mark.parametrize(
    "change, match",
    [
        ("remove", "vanished"),
        ("replace", "changed"),
        ("cut", "changed"),
        ("overwrite", "changed"),
        ("touch", "changed"),
    ],
)
def test_a_file_that_vanishes_or_changes_is_an_error(endless, videos, tmp_path, change, match, batch):
    path = tmp_path / "a.mp4"
    path.write_bytes(endless.read_bytes())
    clip = FileClip(path, False)
    frames = stream(clip, range(3000), batch)
    given = [next(frames)]
    if change == "remove":
        path.unlink()
    elif change == "replace":
        os.replace(break_packets(endless, [1000], tmp_path / "b.mp4"), path)
    elif change == "cut":
        os.truncate(path, path.stat().st_size // 2)
    elif change == "overwrite":
        path.write_bytes(videos("closed.mp4").read_bytes())
    else:
        os.utime(path, ns=(1, 1))
    with pytest.raises(DamagedVideoError, match=match) as caught:
        iter_into(given, frames)
    assert path.name in str(caught.value)
    count = sum(map(len, given))
    assert caught.value.second == pytest.approx(count / 30) and count < 3000
    whole = FileClip(endless, False)
    assert torch.equal(torch.cat(given), whole.read(plan_of(whole, range(count)), as_is))
    with pytest.raises(ValueError, match=match):
        next(stream(clip, range(3000), 8))


@pytest.mark.parametrize("change", ["cut", "replace", "close"])
def test_a_file_in_memory_that_changes_is_an_error(endless, videos, change):
    file = io.BytesIO(endless.read_bytes())
    frames = stream(FileClip(file, False), range(3000), 8)
    next(frames)
    if change == "cut":
        file.truncate(len(file.getvalue()) // 2)
    elif change == "replace":
        file.seek(0)
        file.write(bytes(len(file.getvalue())))
    else:
        file.close()
    with pytest.raises(ValueError, match="video in memory"):
        iter_into([], frames)


@pytest.mark.parametrize("kind", [IndexError, OSError, ValueError])
def test_errors_of_python_in_the_demuxer_are_told_with_the_name(videos, kind):
    """PyAV's of a stream that begins late, and those of files in memory."""

    def demux(*streams):
        yield SimpleNamespace(size=1)
        raise kind("out of range")

    packets = VideoFile(videos("tiny.mp4")).packets(SimpleNamespace(demux=demux))
    next(packets)
    with pytest.raises(DamagedVideoError, match=r"tiny.mp4: cannot be read to its end: out of range"):
        next(packets)


def open_files(path: Path) -> int:
    folder = Path("/proc/self/fd")
    if not folder.exists():
        pytest.skip("needs /proc")
    return sum(os.path.realpath(link) == os.path.realpath(path) for link in folder.iterdir())


@pytest.mark.parametrize("ending", ["close", "exception", "interrupt", "end", "error", "dropped"])
def test_files_are_closed(videos, tmp_path, ending):
    numbers = range(60, 100) if ending == "error" else [15, 16]
    path = break_packets(videos("closed.mp4"), numbers, tmp_path / "a.mp4")
    clip = FileClip(path, False)
    assert open_files(path) == 0
    frames = stream(clip, range(COUNT), 4)
    assert open_files(path) == 0
    for _ in range(5):
        next(frames)
    assert open_files(path) == (1 if ending == "error" else 2)  # the second is for what is in doubt
    if ending == "close":
        frames.close()
    elif ending in ("exception", "interrupt"):
        kind = KeyboardInterrupt if ending == "interrupt" else RuntimeError
        with pytest.raises(kind):
            frames.throw(kind)
    elif ending == "dropped":
        del frames
    elif ending == "error":
        with pytest.raises(DamagedVideoError):
            iter_into([], frames)
    else:
        iter_into([], frames)
    assert open_files(path) == 0


def test_a_stream_belongs_to_no_thread(videos):
    clip = FileClip(videos("closed.mp4"), False)
    frames, pieces = stream(clip, range(COUNT), 10), []
    for _ in range(COUNT // 10):
        thread = threading.Thread(target=lambda: pieces.append(next(frames)))
        thread.start()
        thread.join()
    assert torch.equal(torch.cat(pieces), decoded(videos("closed.mp4")))
