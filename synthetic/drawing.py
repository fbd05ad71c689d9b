"""Draw scenes, and write pictures into video files."""

import math
from collections.abc import Iterable
from fractions import Fraction
from functools import cache
from pathlib import Path

import av
import numpy as np
from PIL import Image, ImageDraw, ImageFont

from .scenes import Card, Scene

RGB = {"red": (220, 40, 40), "green": (40, 180, 60), "blue": (50, 80, 230), "yellow": (230, 210, 40)}
MOVES = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}


def draw_scene(scene: Scene, rng: np.random.Generator, *, size: int = 56, fps: int = 2) -> np.ndarray:
    """The pictures of a scene.

    Cards of the same kind do not look the same: size, place and background are random.

    Args:
        scene: one card a second.
        rng: the only source of chance.
        size: height and width in pixels, even.
        fps: pictures a second.
    Returns:
        (seconds * fps, size, size, 3) uint8.
    Raises:
        ValueError: an odd or too small size, fewer than one picture a second.
    """
    if size < 28 or size % 2:
        raise ValueError(f"`size` must be even and at least 28, got {size!r}")
    if fps < 1:
        raise ValueError(f"`fps` must be at least 1, got {fps!r}")
    return np.concatenate([draw_card(card, rng, size, fps) for card in scene.cards])


def draw_card(card: Card, rng: np.random.Generator, size: int, fps: int) -> np.ndarray:
    """The pictures of one second, (fps, size, size, 3) uint8."""
    grey = int(rng.integers(0, 60))
    radius = size * rng.uniform(0.24, 0.34)
    x, y = size / 2 + rng.uniform(-1, 1, size=2) * (0.46 * size - radius)
    background = Image.new("RGB", (size, size), (grey, grey, grey))
    if card.what == "ball":
        dx, dy = MOVES[card.value]
        pictures = []
        for number in range(fps):
            shift = (2 * number / fps - 0.6) * 0.4 * size  # it is on its way for the whole second
            picture = background.copy()
            _fill_circle(ImageDraw.Draw(picture), x=size / 2 + dx * shift, y=size / 2 + dy * shift, radius=0.16 * size)
            pictures.append(np.asarray(picture))
        return np.stack(pictures)
    draw = ImageDraw.Draw(background)
    if card.what == "flash":
        draw.rectangle((0, 0, size, size), fill=RGB[card.value])
    elif card.what == "digit":
        draw.text((x, y), card.value, fill="white", font=_font(round(2.8 * radius)), anchor="mm")
    elif card.what == "circle":
        _fill_circle(draw, x, y, radius, RGB[card.value])
    elif card.what in ("square", "triangle", "star"):
        draw.polygon(_corners(card.what, x, y, radius), fill=RGB[card.value])
    return np.broadcast_to(np.asarray(background), (fps, size, size, 3))


def _fill_circle(draw: ImageDraw.ImageDraw, x: float, y: float, radius: float, colour="white") -> None:
    draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=colour)


def _corners(shape: str, x: float, y: float, radius: float) -> list[tuple[float, float]]:
    if shape == "star":
        reach = [radius * (1.0 if corner % 2 == 0 else 0.42) for corner in range(10)]
    else:
        reach = [radius] * {"triangle": 3, "square": 4}[shape]
    turn = -math.pi / 2 if shape != "square" else -math.pi / 4
    angles = [turn + 2 * math.pi * corner / len(reach) for corner in range(len(reach))]
    return [(x + r * math.cos(angle), y + r * math.sin(angle)) for r, angle in zip(reach, angles, strict=True)]


@cache
def _font(pixels: int) -> ImageFont.FreeTypeFont:
    return ImageFont.load_default(pixels)


def write_scene(path: str | Path, scene: Scene, rng: np.random.Generator, *, size: int = 56, fps: int = 4) -> Path:
    """Draw a scene into a video file, as `draw_scene` and `write_video`."""
    return write_video(path, draw_scene(scene, rng, size=size, fps=fps), fps)


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
