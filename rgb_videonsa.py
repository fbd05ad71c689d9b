"""Decoded video frames as a player shows them: RGB by the frame's own colour matrix and range, upright, on white.

The conversion is libswscale's, through a filter graph, where matrix and range can be named in every version of PyAV.
"""

from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import numpy as np

try:
    import av
except ImportError:  # reading a file then raises in `files_videonsa`
    av = None

HD_HEIGHT = 720
"""Stored lines from which players take a video without a colour matrix for BT.709, and below it for BT.601."""

# AVColorSpace, ITU-T H.273 table 4, to the names of libavfilter's `scale`. 0 is RGB, 2 and 3 say nothing.
_MATRICES = {1: "bt709", 4: "fcc", 5: "bt601", 6: "bt601", 7: "smpte240m", 9: "bt2020"}
_UNTAGGED = (2, 3)
_RANGES = {1: "tv", 2: "pc"}  # AVColorRange; 0 says nothing


@dataclass(frozen=True)
class Orientation:
    """How a stored frame becomes the one shown: transposed first, then flipped."""

    transpose: bool = False
    flip_x: bool = False
    flip_y: bool = False

    @classmethod
    def of(cls, frame: Any) -> "Orientation":
        """From the display matrix of a frame; of other angles than quarter turns, the nearest quarter turn."""
        try:
            stored = frame.side_data[av.sidedata.sidedata.Type.DISPLAYMATRIX]
        except KeyError:
            return cls()
        # (a b u, c d v, x y w): the pixel (x, y) is shown at (a x + c y, b x + d y), up to a shift.
        a, b, _, c, d = np.frombuffer(bytes(stored), np.int32)[:5].tolist()
        if max(abs(a), abs(d)) >= max(abs(b), abs(c)):
            return cls(False, a < 0, d < 0)
        return cls(True, c < 0, b < 0)

    def shown_size(self, height: int, width: int) -> tuple[int, int]:
        """(height, width) as shown, or as stored: the relation holds both ways."""
        return (width, height) if self.transpose else (height, width)

    def apply(self, picture: np.ndarray) -> np.ndarray:
        """(H, W, C) as shown; torch takes no views with negative strides."""
        if self.transpose:
            picture = picture.transpose(1, 0, 2)
        if self.flip_x or self.flip_y:
            picture = picture[:: -1 if self.flip_y else 1, :: -1 if self.flip_x else 1]
        return np.ascontiguousarray(picture)


def shown_size(frame: Any, pixel_aspect: Fraction | None) -> tuple[int, int]:
    """(height, width) of a frame as shown.

    Args:
        pixel_aspect: width of a stored pixel over its height; None and 0 mean square. Neither side is made smaller.
    """
    height, width = frame.height, frame.width
    if pixel_aspect and pixel_aspect > 1:
        width = round(width * pixel_aspect)
    elif pixel_aspect and pixel_aspect > 0:
        height = round(height / pixel_aspect)
    return Orientation.of(frame).shown_size(height, width)


class RgbConverter:
    """PyAV frames to arrays (H, W, 3) uint8.

    Args:
        name: of the video, for messages.
    """

    def __init__(self, name: str):
        self.name = name
        self._settings, self._graph = None, None

    def __call__(self, frame: Any, size: tuple[int, int] | None = None) -> np.ndarray:
        """A frame upright and on white where it is transparent.

        Args:
            size: (height, width) shown; as stored if None, which leaves pixels that are not square as they are.
        Raises:
            ValueError: the frame's colours cannot be converted.
        """
        orientation = Orientation.of(frame)
        has_alpha = frame.format.has_palette or any(component.is_alpha for component in frame.format.components)
        stored = (frame.height, frame.width) if size is None else orientation.shown_size(*size)
        settings = (frame.width, frame.height, frame.format.name, self._colours(frame), stored, has_alpha)
        if settings != self._settings:
            self._graph, self._settings = self._build(frame, *settings[3:]), settings
        try:
            self._graph.vpush(frame)
            picture = self._graph.vpull().to_ndarray()
        except av.FFmpegError as error:
            self._settings = None
            raise ValueError(f"{self.name}: a frame of format {frame.format.name} cannot be converted") from error
        if frame.format.name.startswith(("gray", "ya")) and frame.color_range == 1:
            # libswscale takes grey for full range, whatever the frame says.
            picture[..., :3] = np.clip((picture[..., :3].astype(np.float32) - 16) * (255 / 219) + 0.5, 0, 255)
        return orientation.apply(on_white(picture) if has_alpha else picture)

    def _colours(self, frame: Any) -> str:
        """Options of `scale` that name what the frame's numbers mean."""
        if frame.format.is_rgb or frame.format.has_palette:
            return ""
        matrix = int(frame.colorspace)
        if matrix in _UNTAGGED:
            named = "bt709" if frame.height >= HD_HEIGHT else "bt601"
        elif matrix in _MATRICES:
            named = _MATRICES[matrix]
        elif frame.format.name.startswith(("gray", "ya")):
            named = "bt601"  # there is no colour to convert
        else:
            raise ValueError(
                f"{self.name}: the colour matrix {matrix} (ITU-T H.273) cannot be converted to RGB; supported are "
                f"{', '.join(f'{number} ({name})' for number, name in _MATRICES.items())}"
            )
        range_ = _RANGES.get(int(frame.color_range))
        return f":in_color_matrix={named}" + (f":in_range={range_}" if range_ else "")

    def _build(self, frame: Any, colours: str, size: tuple[int, int], has_alpha: bool) -> Any:
        graph = av.filter.Graph()
        source = graph.add_buffer(
            width=frame.width, height=frame.height, format=frame.format, time_base=frame.time_base or Fraction(1, 1000)
        )
        steps = [
            graph.add("scale", f"w={size[1]}:h={size[0]}:out_range=pc:threads=1{colours}"),
            graph.add("format", f"pix_fmts={'rgba' if has_alpha else 'rgb24'}"),
            graph.add("buffersink"),
        ]
        for one, next_one in zip([source, *steps], steps, strict=False):
            one.link_to(next_one)
        graph.configure()
        return graph


def on_white(picture: np.ndarray) -> np.ndarray:
    """(..., 4) uint8 with straight alpha to (..., 3), over white, rounded."""
    colour, alpha = picture[..., :3].astype(np.uint16), picture[..., 3:].astype(np.uint16)
    return ((colour * alpha + 255 * (255 - alpha) + 127) // 255).astype(np.uint8)
