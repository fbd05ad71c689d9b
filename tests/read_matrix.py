"""Every container with every codec that PyAV can write here, read by `FileClip`, each in a process of its own.

Run as a script with 1, or with N for an N-th of it; prints one line of JSON a file: its name, and
"equal", "refused: ...", "differs: ..." or "signal N".
A file is written by PyAV, decoded whole and in order (the truth), and read whole, thinned out, one frame at a time, and
as streams.
"""

import itertools
import json
import os
import signal
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace

import av
import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from files_videonsa import FileClip
from listing_videonsa import VideoFile
from rgb_videonsa import RgbConverter

WIDTH, HEIGHT, COUNT = 64, 48, 30
SECONDS = 60  # for one file
CONTAINERS = (
    *("mp4", "mov", "mkv", "webm", "avi", "flv", "ts", "mpg", "vob", "ogv", "nut", "asf", "wtv", "mxf", "3gp", "gif"),
    *("h264", "hevc", "m4v", "m2v", "m1v", "ivf", "obu", "mjpeg", "y4m", "apng", "dv", "rm", "swf", "h263", "vc2"),
)
CODECS = {
    **dict.fromkeys(("libx264", "libx265", "mpeg4", "mpeg2video", "mpeg1video"), ("1", "2", "12")),
    **dict.fromkeys(("libvpx", "libvpx-vp9", "libaom-av1", "flv", "h263p", "msmpeg4", "wmv2", "theora"), ("1", "12")),
    **dict.fromkeys(
        ("mjpeg", "ffv1", "huffyuv", "prores", "png", "qtrle", "gif", "rawvideo", "dnxhd", "dirac"), ("1",)
    ),
    **dict.fromkeys(
        ("cinepak", "svq1", "rv20", "snow", "utvideo", "jpeg2000", "flashsv", "apng", "vc2", "h263"), ("12",)
    ),
}
FORMATS = {"mpg": "mpeg", "ogv": "ogg", "asf": "asf", "m2v": "mpeg2video", "m1v": "mpeg1video", "y4m": "yuv4mpegpipe"}
SPEED = {
    "libx264": {"preset": "ultrafast", "sc_threshold": "0", "x264-params": "b-pyramid=normal:weightp=0"},
    "libx265": {"preset": "ultrafast", "x265-params": "log-level=none"},
    "libvpx": {"deadline": "realtime", "cpu-used": "8"},
    "libvpx-vp9": {"deadline": "realtime", "cpu-used": "8"},
    "libaom-av1": {"usage": "realtime", "cpu-used": "9"},
}


def picture(number: int) -> np.ndarray:
    """A bar that moves over a gradient: no two frames are equal, and a missing reference shows."""
    columns = np.arange(WIDTH)[None, :] + np.zeros((HEIGHT, 1), int)
    rows = np.arange(HEIGHT)[:, None] + np.zeros((1, WIDTH), int)
    image = np.stack([4 * columns, 5 * rows, 2 * (columns + rows)], -1) % 256
    image[:, 2 * number : 2 * number + 6] = (255 - 8 * number, 8 * number, 40)
    return image.astype(np.uint8)


def write(path: Path, codec: str, gop: str, b_frames: str) -> None:
    suffix = path.suffix[1:]
    with av.open(str(path), "w", format=FORMATS.get(suffix)) as container:
        options = {"g": gop, "bf": b_frames, "keyint_min": "1", **SPEED.get(codec, {})}
        stream = container.add_stream(codec, rate=25, options={k: v for k, v in options.items() if v != "0"})
        formats = [fmt.name for fmt in stream.codec.video_formats or ()]
        stream.pix_fmt = next(
            (f for f in ("yuv420p", "yuvj420p", "rgb24") if f in formats), (formats or ["yuv420p"])[0]
        )
        stream.width, stream.height, stream.thread_count = WIDTH, HEIGHT, 1
        for number in range(COUNT):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture(number), format="rgb24")))
        container.mux(stream.encode())


def compare(path: Path) -> str:
    """What came of reading a file."""
    convert = RgbConverter(str(path))
    try:
        with VideoFile(path).open() as (container, stream):
            truth = [convert(frame) for frame in container.decode(stream)]
        clip = FileClip(path, False)
        total = len(clip.listing.numbers)
        if total != len(truth):
            return f"differs: {total} frames listed, {len(truth)} decoded"
        for step in (1, 3, 7, total - 1 or 1):
            for start in range(0, total, 5) if step > 3 else (0,):
                indices = [*range(start, total, step)]
                read = clip.read_unresized(indices).permute(0, 2, 3, 1).numpy()
                wrong = [i for i, frame in zip(indices, read, strict=True) if not np.array_equal(frame, truth[i])]
                if wrong:
                    return f"differs: frames {wrong} of {indices}"
        plan = SimpleNamespace(frame_indices=range(total), height=clip.source.height, width=clip.source.width)
        for batch in (1, 7):
            streamed = [*clip.stream(plan, lambda frames, plan: frames, batch)]
            if not np.array_equal(np.concatenate(streamed).transpose(0, 2, 3, 1), truth):
                return f"differs: a stream of {batch} at a time"
    except ValueError as error:
        return f"refused: {error}"
    return "equal"


def in_a_process(action, *arguments) -> str:
    """The result of a call, or the signal that ended it."""
    reader, writer = os.pipe()
    child = os.fork()
    if not child:
        signal.alarm(SECONDS)
        try:
            result = action(*arguments)
        except Exception as error:
            result = f"error: {type(error).__name__}: {error}"
        os.write(writer, str(result)[:2000].encode())
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as pipe:
        result = pipe.read()
    _, status = os.waitpid(child, 0)
    return f"signal {os.WTERMSIG(status)}" if os.WIFSIGNALED(status) else result


def main(share: int) -> None:
    """Of the settings of each codec in each container, every `share`-th, at least one."""
    folder = Path(tempfile.mkdtemp())
    pairs = [(codec, suffix) for codec in CODECS if codec in av.codecs_available for suffix in CONTAINERS]
    for turn, (codec, suffix) in enumerate(pairs):
        can_reorder = codec in ("libx264", "libx265", "mpeg4", "mpeg2video", "mpeg1video")
        settings = [*itertools.product(CODECS[codec], ("0", "2") if can_reorder else ("0",))]
        for gop, b_frames in settings[turn % min(share, len(settings)) :: share]:
            path = folder / f"{codec}_g{gop}_b{b_frames}.{suffix}"
            if in_a_process(write, path, codec, gop, b_frames) == "None":  # else the codec does not go in there
                print(json.dumps({"file": path.name, "result": in_a_process(compare, path)}), flush=True)
            path.unlink(missing_ok=True)
    folder.rmdir()


if __name__ == "__main__":
    main(int(sys.argv[1]))
