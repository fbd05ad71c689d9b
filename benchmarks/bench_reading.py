"""CPU time of reading an hour of H.264 at a few frames a second: ours beside decord and torchcodec.

    .venv/bin/python benchmarks/bench_reading.py --output benchmarks/results/DATE_reading.json

The film is drawn and encoded here, a minute of it, and repeated without encoding again. Every reader, in a process of
its own, gives the same frames in the same small size: decord and torchcodec decode, and torchvision resizes, as
qwen-vl-utils does. torchcodec is left out, and said to be, where it cannot be loaded.
"""

import argparse
import contextlib
import datetime
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import av
import numpy as np
import torch
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as transforms
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))


from bench_cpu import describe_cpu

from files_videonsa import FileClip

RATE = 25
SIZE = (168, 308)  # 66 tokens for two frames
CHUNK = 64  # frames that decord and torchcodec hold at once


def make_film(path: Path, minutes: int, width: int, height: int) -> None:
    """Noise that drifts over moving gradients, in scenes of five seconds, encoded with x264's usual settings."""
    minute = path.with_name("minute.mp4")
    random = np.random.default_rng(0)
    with av.open(str(minute), "w") as container:
        stream = container.add_stream("libx264", rate=RATE, options={"preset": "medium", "crf": "23"})
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        for number in tqdm(range(60 * RATE), desc="drawing a minute", mininterval=2):
            if number % (5 * RATE) == 0:
                noise = random.integers(0, 60, (height + 256, width + 256, 3))
                slopes = random.integers(1, 5, 3)
            x, y = 2 * (number % 125), number % 125
            gradient = (np.arange(width)[:, None] * slopes // 4 + 3 * number) % 190
            picture = gradient[None] + noise[y : y + height, x : x + width]
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture.astype(np.uint8), format="rgb24")))
        container.mux(stream.encode())
    with av.open(str(path), "w") as target:
        copy = None
        for turn in range(minutes):
            with av.open(str(minute)) as source:
                stream = source.streams.video[0]
                copy = copy or target.add_stream_from_template(stream)
                shift = round(60 * turn / stream.time_base)
                for packet in source.demux(stream):
                    if packet.dts is not None:
                        packet.pts, packet.dts, packet.stream = packet.pts + shift, packet.dts + shift, copy
                        target.mux(packet)
    minute.unlink()


def resize(frames: torch.Tensor) -> torch.Tensor:
    """(T, 3, H, W) uint8."""
    return transforms.resize(frames, list(SIZE), InterpolationMode.BICUBIC, antialias=True)


def read_videonsa(path: str, indices: list[int]) -> torch.Tensor:
    class Plan:
        frame_indices, (height, width) = indices, SIZE

    return FileClip(path, False).read(Plan, lambda frames, plan: resize(frames))


def read_decord(path: str, indices: list[int]) -> torch.Tensor:
    import decord

    reader = decord.VideoReader(path)
    parts = [reader.get_batch(indices[i : i + CHUNK]).asnumpy() for i in range(0, len(indices), CHUNK)]
    return torch.cat([resize(torch.from_numpy(part).permute(0, 3, 1, 2)) for part in parts])


def read_torchcodec(path: str, indices: list[int]) -> torch.Tensor:
    from torchcodec.decoders import VideoDecoder

    reader = VideoDecoder(path, num_ffmpeg_threads=0, seek_mode="approximate")
    parts = range(0, len(indices), CHUNK)
    return torch.cat([resize(reader.get_frames_at(indices[i : i + CHUNK]).data) for i in parts])


READERS = {"videonsa": read_videonsa, "decord": read_decord, "torchcodec": read_torchcodec}


def measure(reader: str, path: str, fps: float, minutes: int) -> dict:
    """In this process: CPU and wall seconds, and the peak of its memory beyond imports in MB."""
    indices = [round(i * RATE / fps) for i in range(round(60 * minutes * fps))]
    before = resource.getrusage(resource.RUSAGE_SELF)
    start = time.perf_counter()
    frames = READERS[reader](path, indices)
    wall = time.perf_counter() - start
    after = resource.getrusage(resource.RUSAGE_SELF)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return {
        "frames": len(frames),
        "cpu_s": round(cpu, 2),
        "wall_s": round(wall, 2),
        "memory_mb": round((after.ru_maxrss - before.ru_maxrss) / 1024),
        "mean_pixel": round(frames[:: max(1, len(frames) // 100)].float().mean().item(), 2),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=int, default=60)
    parser.add_argument("--width", type=int, default=1280)
    parser.add_argument("--height", type=int, default=720)
    parser.add_argument("--fps", type=float, nargs="+", default=[0.2, 1, 4])
    parser.add_argument("--output", type=Path)
    parser.add_argument("--measure", nargs=3, metavar=("READER", "FILE", "FPS"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        reader, path, fps = arguments.measure
        print(json.dumps(measure(reader, path, float(fps), arguments.minutes)))
        return
    film = {"minutes": arguments.minutes, "width": arguments.width, "height": arguments.height, "fps": RATE}
    machine = describe_cpu("av", "decord", "torch", "torchvision")
    with contextlib.suppress(PackageNotFoundError):
        machine["torchcodec"] = version("torchcodec")
    results = {"date": datetime.date.today().isoformat(), "machine": machine, "film": film, "rows": []}
    with tempfile.TemporaryDirectory() as folder:
        film = Path(folder) / "film.mp4"
        make_film(film, arguments.minutes, arguments.width, arguments.height)
        print(f"{arguments.minutes} minutes, {film.stat().st_size / 1e6:.0f} MB")
        for fps in arguments.fps:
            for reader in READERS:
                own = [sys.executable, __file__, "--measure", reader, str(film), str(fps)]
                own += ["--minutes", str(arguments.minutes)]
                load = os.getloadavg()[0]  # of other programs on these cores
                run = subprocess.run(own, capture_output=True, text=True, env=os.environ)
                said = (run.stdout or run.stderr).strip().splitlines()[-1:]
                row = json.loads(said[0]) if run.returncode == 0 else {"not_run": said[0][:200] if said else "crashed"}
                results["rows"].append({"reader": reader, "fps": fps, "load": round(load, 2), **row})
                print(results["rows"][-1], flush=True)
                if arguments.output:
                    arguments.output.write_text(json.dumps(results, indent=1, default=str) + "\n")


if __name__ == "__main__":
    main()
