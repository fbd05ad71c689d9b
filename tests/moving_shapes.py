"""Pictures of any size on which something moves: coloured shapes over a plain background."""

import math

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
