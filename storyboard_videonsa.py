"""Pictures of evidence, drawn with PIL alone: the strongest frames in order, and strength over time."""

from collections.abc import Sequence
from functools import cache
from typing import Any, NamedTuple

from PIL import Image, ImageDraw, ImageFont

_PAPER, _INK, _FAINT, _LINE = "#ffffff", "#1f2430", "#6b7280", "#d7dbe2"
_STRONG, _WEAK, _BEHIND = "#d9480f", "#f3c9ae", "#1864ab"
_MARGIN, _GAP, _COLUMNS = 24, 16, 6
_CELL = 168  # width of a frame, and its largest height
SHOWN_BLOCKS = 2  # under a frame, side by side
SHOWN_PLACES = 4  # of a block, in one picture
_LINKS = 44  # height between a frame's bar and what is behind it
_PLOT_WIDTH, _PLOT_HEIGHT = 900, 150

_LEGEND = "Bars: share of the answer's attention."
_LEGEND_BEHIND = " Blue: the earlier blocks of the video that the tokens of a frame selected most."


class BlockPicture(NamedTuple):
    """A block that a frame's tokens selected.

    Attributes:
        places: up to `SHOWN_PLACES` pairs of a picture and the box (left, top, right, bottom) of the block's tokens in
            it, in fractions.
        video: the number of the one in which it begins; start, end: seconds.
        weight: of the block.
    """

    places: list[tuple[Image.Image, tuple[float, float, float, float]]]
    video: int
    start: float
    end: float
    weight: float


def clock(seconds: float, spacing: float = 1.0) -> str:
    """A time as a clock shows it, with tenths where times lie closer than a second."""
    if spacing >= 0.95:
        whole, tenth = int(seconds + 0.05), None
    else:
        whole, tenth = divmod(round(10 * seconds), 10)
    minutes, whole = divmod(whole, 60)
    hours, minutes = divmod(minutes, 60)
    text = f"{hours}:{minutes:02}:{whole:02}" if hours else f"{minutes}:{whole:02}"
    return text if tenth is None else f"{text}.{tenth}"


def draw_storyboard(
    frames: Sequence[Any],
    moments: Sequence[Any],
    question: str,
    answer: str,
    behind: Sequence[Sequence[BlockPicture]] = (),
) -> Image.Image:
    """The frames in order, each with its time and a bar of its share, and over them where they lie in the video.

    Args:
        frames: `evidence_videonsa.Frame`s in the order of time.
        moments: all of the reading.
        question, answer: for the heading.
        behind: for each frame what its tokens selected, the largest weight first; or nothing.
    """
    columns = -(-len(frames) // -(-len(frames) // _COLUMNS))  # as many in each row
    width = max(2 * _MARGIN + columns * (_CELL + _GAP) - _GAP, 560)
    heading = _heading(question, answer, width - 2 * _MARGIN)
    sizes = [_fitted(frame.image.size, _CELL, _CELL) for frame in frames]
    tall = max(height for _, height in sizes)
    is_linked = any(behind)
    small = (_CELL - (SHOWN_BLOCKS - 1) * 6) // SHOWN_BLOCKS
    mosaics = [[_mosaic(block, small) for block in group[:SHOWN_BLOCKS]] for group in behind]
    small_tall = max((mosaic.height for group in mosaics for mosaic in group), default=0)
    cell_height = tall + 46 + (_LINKS + small_tall + 18 if is_linked else 0)
    rows = -(-len(frames) // columns)
    videos = sorted({moment.video for moment in moments})
    strip = 34 * len(videos)
    top = _MARGIN + heading.height + 14 + strip + 18
    legend = _wrapped(_LEGEND + (_LEGEND_BEHIND if is_linked else ""), width - 2 * _MARGIN, 13)
    bottom = top + rows * (cell_height + 22)
    picture = Image.new("RGB", (width, bottom + 18 * len(legend) + 14), _PAPER)
    picture.paste(heading, (_MARGIN, _MARGIN))
    draw = ImageDraw.Draw(picture)
    for number, line in enumerate(legend):
        draw.text((_MARGIN, bottom + 18 * number), line, fill=_FAINT, font=_font(13))
    shown = {frame.moment.index for frame in frames}
    for number, video in enumerate(videos):
        of_video = [moment for moment in moments if moment.video == video]
        y = _MARGIN + heading.height + 14 + 34 * number
        name = f"video {video + 1}" if len(videos) > 1 else ""
        _timeline(draw, of_video, shown, _MARGIN, y, width - _MARGIN, name, max(one.share for one in moments))
    most = max(frame.share for frame in frames)
    spacing = min((moment.end - moment.start for moment in moments), default=1.0)
    for number, (frame, size) in enumerate(zip(frames, sizes, strict=True)):
        x = _MARGIN + number % columns * (_CELL + _GAP)
        y = top + number // columns * (cell_height + 22)
        left = x + (_CELL - size[0]) // 2
        picture.paste(_resized(frame.image, size), (left, y + tall - size[1]))
        draw.rectangle((left, y + tall - size[1], left + size[0] - 1, y + tall - 1), outline=_LINE)
        name = clock(frame.time, spacing) + (f"  video {frame.video + 1}" if len(videos) > 1 else "")
        draw.text((x, y + tall + 6), name, fill=_INK, font=_font(16))
        draw.text((x + _CELL, y + tall + 8), _percent(frame.share), fill=_FAINT, font=_font(14), anchor="ra")
        bar = y + tall + 32
        draw.rounded_rectangle((x, bar, x + _CELL - 1, bar + 8), 4, fill=_LINE)
        if most:
            length = max(8, round(_CELL * frame.share / most))
            draw.rounded_rectangle((x, bar, x + length - 1, bar + 8), 4, fill=_STRONG)
        if is_linked and behind[number]:
            _draw_behind(picture, behind[number], mosaics[number], x, bar + 12, small, small_tall, len(videos) > 1)
    return picture


def _draw_behind(
    picture: Image.Image,
    blocks: Sequence[BlockPicture],
    mosaics: Sequence[Image.Image],
    x: int,
    y: int,
    small: int,
    tall: int,
    is_one_of_several: bool,
) -> None:
    """Under a frame's bar at (x, y), its blocks in the order of time, and a line to each, as thick as its weight."""
    draw = ImageDraw.Draw(picture)
    pairs, top = (
        sorted(zip(blocks, mosaics, strict=False), key=lambda pair: (pair[0].video, pair[0].start)),
        x + _CELL // 2,
    )
    if len(pairs) == 1:
        x += (_CELL - small) // 2
    for place, (block, mosaic) in enumerate(pairs):
        left = x + place * (small + 6) + (small - mosaic.width) // 2
        middle = left + mosaic.width // 2
        thick = max(1, round(6 * block.weight))
        draw.line((top, y, middle, y + _LINKS), fill=_BEHIND, width=thick)
        picture.paste(mosaic, (left, y + _LINKS))
        spacing = block.end - block.start
        name = f"{clock(block.start, spacing)}-{clock(block.end, spacing)}"
        name = f"{block.video + 1}: {name}" if is_one_of_several else name
        draw.text((middle, y + _LINKS + tall + 4), name, _FAINT, _font(12), "ma")


def _mosaic(block: BlockPicture, side: int) -> Image.Image:
    """The places of a block in one picture, with a box around its tokens in each."""
    count = len(block.places)
    columns = 1 if count == 1 else 2
    width = (side - 2 * (columns - 1)) // columns
    size = _fitted(block.places[0][0].size, width, side)
    rows = -(-count // columns)
    mosaic = Image.new("RGB", (columns * (size[0] + 2) - 2, rows * (size[1] + 2) - 2), _PAPER)
    draw = ImageDraw.Draw(mosaic)
    for number, (image, box) in enumerate(block.places):
        left, top = number % columns * (size[0] + 2), number // columns * (size[1] + 2)
        mosaic.paste(_resized(image, size), (left, top))
        x0, y0, x1, y1 = (round(edge * length) for edge, length in zip(box, (*size, *size), strict=True))
        draw.rectangle((left + x0, top + y0, left + x1 - 1, top + y1 - 1), outline=_BEHIND, width=2)
    return mosaic


def draw_plot(moments: Sequence[Any], question: str, answer: str) -> Image.Image:
    """Shares over time, one plot for each video, all in one scale; the strongest moments have their time written."""
    width, left = _PLOT_WIDTH, 64
    heading = _heading(question, answer, width - 2 * _MARGIN)
    videos = sorted({moment.video for moment in moments})
    height = _PLOT_HEIGHT + 78
    picture = Image.new("RGB", (width, 2 * _MARGIN + heading.height + height * len(videos)), _PAPER)
    picture.paste(heading, (_MARGIN, _MARGIN))
    draw = ImageDraw.Draw(picture)
    most = max(moment.share for moment in moments) or 1.0
    for number, video in enumerate(videos):
        of_video = [moment for moment in moments if moment.video == video]
        top = _MARGIN + heading.height + 34 + number * height
        bottom, right = top + _PLOT_HEIGHT, width - _MARGIN
        for line in (0.0, 0.5, 1.0):
            y = round(bottom - line * _PLOT_HEIGHT)
            draw.line((left, y, right, y), fill=_LINE)
            draw.text((left - 8, y), _percent(line * most), fill=_FAINT, font=_font(13), anchor="rm")
        if len(videos) > 1:
            draw.text((left, top - 26), f"video {video + 1}", fill=_INK, font=_font(14), anchor="lm")
        _bars(draw, of_video, set(), left, top, right, bottom, most, _STRONG)
        _times(draw, of_video, left, right, bottom)
        _peaks(draw, of_video, left, top, right, bottom, most)
    return picture


def _bars(draw, moments, shown, left, top, right, bottom, most, colour) -> None:
    """A bar for each moment; where there are more than pixels, the highest of those at a pixel is what is seen."""
    begin, end = _range(moments)
    for moment in moments:
        x0, x1 = (left + (right - left) * (time - begin) / (end - begin) for time in (moment.start, moment.end))
        gap = 1 if x1 - x0 >= 4 else 0
        y = bottom - (bottom - top) * moment.share / (most or 1.0)
        x0, x1 = int(x0), max(int(x0), int(x1) - 1 - gap)
        draw.rectangle((x0, min(int(y), bottom - 1), x1, bottom - 1), fill=_STRONG if moment.index in shown else colour)


def _timeline(draw, moments, shown, left, y, right, name, most) -> None:
    """A strip of the whole video, with the frames shown in the strong colour."""
    begin, end = _range(moments)
    if name:
        draw.text((left, y + 10), name, fill=_FAINT, font=_font(13), anchor="lm")
        left += 64
    last = clock(end, 1.0)
    draw.text((right, y + 20), last, fill=_FAINT, font=_font(12), anchor="rs")
    right -= round(draw.textlength(last, font=_font(12))) + 8
    draw.line((left, y + 21, right, y + 21), fill=_LINE)
    some = [moment for moment in moments if moment.index not in shown]
    _bars_in(draw, some, (begin, end), left, y, right, y + 21, most, _WEAK)
    _bars_in(draw, [one for one in moments if one.index in shown], (begin, end), left, y, right, y + 21, most, _STRONG)


def _bars_in(draw, moments, span, left, top, right, bottom, most, colour) -> None:
    begin, end = span
    for moment in moments:
        x0, x1 = (left + (right - left) * (time - begin) / (end - begin) for time in (moment.start, moment.end))
        x0, x1 = int(x0), max(int(x0) + 1, int(x1) - 1 - (x1 - x0 >= 4))
        y = bottom - max(1, round((bottom - top) * moment.share / (most or 1.0)))
        draw.rectangle((x0, y, x1, bottom - 1), fill=colour)


def _times(draw, moments, left, right, bottom) -> None:
    begin, end = _range(moments)
    step = next((one for one in _STEPS if (end - begin) / one <= 10), _STEPS[-1])
    time = -(-begin // step) * step
    while time <= end:
        x = left + (right - left) * (time - begin) / (end - begin)
        draw.line((x, bottom, x, bottom + 5), fill=_FAINT)
        draw.text((x, bottom + 8), clock(time, step), fill=_FAINT, font=_font(13), anchor="ma")
        time += step


_STEPS = (0.1, 0.2, 0.5, 1, 2, 5, 10, 15, 30, 60, 120, 300, 600, 900, 1800, 3600, 7200, 14400)


def _peaks(draw, moments, left, top, right, bottom, most) -> None:
    """The times of the strongest moments, where there is room."""
    begin, end = _range(moments)
    spacing = min(moment.end - moment.start for moment in moments)
    taken: list[float] = []
    for moment in sorted(moments, key=lambda one: -one.share)[:5]:
        x = left + (right - left) * ((moment.start + moment.end) / 2 - begin) / (end - begin)
        if any(abs(x - other) < 56 for other in taken):
            continue
        taken.append(x)
        y = bottom - (bottom - top) * moment.share / most
        draw.text((x, y - 4), clock(moment.start, spacing), fill=_INK, font=_font(13), anchor="ms")


def _range(moments) -> tuple[float, float]:
    begin, end = moments[0].start, moments[-1].end
    return begin, max(end, begin + 1e-3)


def _heading(question: str, answer: str, width: int) -> Image.Image:
    """Question and answer, in as many lines as they need, up to four each."""
    lines = [(line, _FAINT, 16) for line in _wrapped(question, width, 16)]
    lines += [(line, _INK, 20) for line in _wrapped(answer, width, 20)]
    height = sum(size + 8 for _, _, size in lines)
    picture = Image.new("RGB", (width, max(1, height)), _PAPER)
    draw, y = ImageDraw.Draw(picture), 0
    for line, colour, size in lines:
        draw.text((0, y), line, fill=colour, font=_font(size))
        y += size + 8
    return picture


def _wrapped(text: str, width: int, size: int, most: int = 4) -> list[str]:
    font, lines = _font(size), [""]
    for word in text.split():
        while font.getlength(word) > width:  # no room for it on any line
            cut = max(1, int(len(word) * width / font.getlength(word)) - 1)
            lines.append(word[:cut])
            word = word[cut:]
        longer = f"{lines[-1]} {word}".strip()
        if font.getlength(longer) <= width:
            lines[-1] = longer
        else:
            lines.append(word)
    lines = [line for line in lines if line]
    return lines if len(lines) <= most else [*lines[: most - 1], lines[most - 1][:-3] + "..."]


def _percent(share: float) -> str:
    return f"{share:.0%}" if share >= 0.1 or not share else f"{share:.1%}" if share >= 0.01 else f"{share:.2%}"


def _fitted(size: tuple[int, int], width: int, height: int) -> tuple[int, int]:
    scale = min(width / size[0], height / size[1])
    return max(1, round(size[0] * scale)), max(1, round(size[1] * scale))


def _resized(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    return image.convert("RGB").resize(size, Image.Resampling.LANCZOS)


@cache
def _font(pixels: int) -> ImageFont.FreeTypeFont:
    return ImageFont.load_default(pixels)
