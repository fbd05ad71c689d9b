"""Draw the demo video: coloured shapes that move over a plain background and change every four seconds.

    python demo/draw_video.py demo/shapes.mp4

The picture of every frame follows from its number alone, so that the same command draws the same pictures.
"""

import argparse
import math
import sys
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from synthetic.drawing import write_video

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
