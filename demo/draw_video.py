"""Draw the demo video: coloured shapes that move over a plain background and change every four seconds.

    python demo/draw_video.py demo/shapes.mp4

The picture of every frame follows from its number alone, so that the same command draws the same pictures.
"""

import argparse
import math
from collections.abc import Iterable
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from PIL import Image, ImageDraw

SCENES = [
    # (background, colour, shape, where it starts and where it ends, in shares of the width and height)
    ("white", "crimson", "circle", (0.15, 0.5), (0.85, 0.5)),
    ("lightyellow", "royalblue", "square", (0.5, 0.15), (0.5, 0.85)),
    ("white", "seagreen", "triangle", (0.85, 0.2), (0.15, 0.8)),
    ("lavender", "darkorange", "circle", (0.2, 0.8), (0.8, 0.2)),
    ("white", "purple", "square", (0.8, 0.5), (0.2, 0.5)),
]


def draw_frame(seconds: float, seconds_per_scene: float, width: int, height: int) -> np.ndarray:
    """The picture at a time, (height, width, 3) uint8."""
    scene, progress = divmod(seconds / seconds_per_scene, 1)
    background, colour, shape, start, end = SCENES[int(scene) % len(SCENES)]
    image = Image.new("RGB", (width, height), background)
    x, y = ((a + (b - a) * progress) * side for a, b, side in zip(start, end, (width, height), strict=True))
    radius = 0.15 * min(width, height)
    box = (x - radius, y - radius, x + radius, y + radius)
    draw = ImageDraw.Draw(image)
    if shape == "circle":
        draw.ellipse(box, fill=colour)
    elif shape == "square":
        draw.rectangle(box, fill=colour)
    else:
        corners = [math.radians(angle) for angle in (-90, 30, 150)]
        draw.polygon([(x + radius * math.cos(a), y + radius * math.sin(a)) for a in corners], fill=colour)
    return np.asarray(image)


def write_video(
    path: str | Path,
    frames: Iterable[np.ndarray],
    fps: int = 25,
    *,
    times: Iterable[int] | None = None,
    codec: str | None = None,
    options: dict[str, str] | None = None,
) -> Path:
    """Encode frames, (height, width, 3) uint8 with even sides, into the container that the file's suffix names.

    Args:
        fps: frames per second.
        times: for a variable frame rate, when each frame is shown, in units of 1 / fps.
        codec: of PyAV; h264 where the installed PyAV has it, else mpeg4.
        options: of the codec.
    """
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec or h264_or_mpeg4(), rate=fps, options=options or {})
        stream.pix_fmt = "yuv420p"
        stream.thread_count = 1
        for number, picture in enumerate(frames):
            if number == 0:
                stream.height, stream.width = picture.shape[:2]
                clock = iter(range(number, 1 << 31) if times is None else times)
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
            frame.pts, frame.time_base = next(clock), Fraction(1, fps)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return Path(path)


def h264_or_mpeg4() -> str:
    """The better of the two encoders that PyAV's wheels may bring."""
    return "libx264" if "libx264" in av.codecs_available else "mpeg4"


def draw_video(path: str | Path, *, seconds: float = 20, fps: int = 25, width: int = 320, height: int = 240) -> Path:
    """Write the demo video."""
    count = round(seconds * fps)
    pictures = (draw_frame(i / fps, seconds / len(SCENES), width, height) for i in range(count))
    return write_video(path, pictures, fps)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Draw the demo video.")
    parser.add_argument("path", type=Path)
    parser.add_argument("--seconds", type=float, default=20)
    parser.add_argument("--fps", type=int, default=25)
    parser.add_argument("--width", type=int, default=320, help="even")
    parser.add_argument("--height", type=int, default=240, help="even")
    arguments = parser.parse_args()
    draw_video(
        arguments.path, seconds=arguments.seconds, fps=arguments.fps, width=arguments.width, height=arguments.height
    )
    print(f"{arguments.path}: {arguments.path.stat().st_size} bytes")
