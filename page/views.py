"""HTML of the page's parts. Whatever comes from visitors, files or the model is escaped.

Elements with `data-second` move the video there when they are clicked (`page.js`).
"""

import base64
import html
import io
from collections.abc import Sequence
from typing import Any

from PIL import Image

from .model_room import Waiting
from .visitors import KeptReading, Limits, Video

THUMBNAIL = 240
FRAMES, BARS = 6, 120


def escape(text: Any) -> str:
    """For HTML that Gradio takes for a template too."""
    text = html.escape(str(text))
    return text.replace("{", "&#123;").replace("}", "&#125;").replace("$", "&#36;").replace("`", "&#96;")


def clock(second: float) -> str:
    """Minutes and seconds, 1:05."""
    hours, rest = divmod(int(second), 3600)
    minutes, seconds = divmod(rest, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


def size(number: float) -> str:
    """Bytes for people."""
    for unit in ("B", "kB", "MB"):
        if number < 1000:
            return f"{number:.3g} {unit}"
        number /= 1000
    return f"{number:,.1f} GB"


def seconds(number: float) -> str:
    return f"{number:.2f} s" if number < 10 else f"{number:,.0f} s" if number < 600 else f"{clock(number)} min"


def picture(image: Image.Image) -> str:
    """A data URI of a small JPEG: no file on the server, and nobody else can ask for it."""
    small = image.convert("RGB")
    small.thumbnail((THUMBNAIL, THUMBNAIL))
    file = io.BytesIO()
    small.save(file, "JPEG", quality=82)
    return "data:image/jpeg;base64," + base64.b64encode(file.getvalue()).decode()


def header(model: str, device: str) -> str:
    name = model.rstrip("/").split("/")[-1] if "/" in model else model
    return f"""<header class="head"><div><h1>Ask a video</h1>
<p>It is read once, and answers as often as you like, with the seconds that the answer comes from.</p></div>
<span class="tag" title="the model that answers">{escape(name)} on {escape(device)}</span></header>"""


def uploader(key: str, examples: Sequence[tuple[Video, str]], limits: Limits, chosen: str | None) -> str:
    """Where to drop a file, and the examples with a picture each."""
    most = f"up to {limits.upload_bytes / 2**20:,.0f} MB and {limits.seconds / 60:.4g} minutes; gone when you leave"
    pressed = {True: "true", False: "false"}
    cards = "".join(
        f'<button type="button" class="example" data-example="{index}" aria-pressed="{pressed[video.name == chosen]}">'
        f'<img src="{thumbnail}" alt="" width="64" height="48"><span>{escape(video.name)}</span></button>'
        for index, (video, thumbnail) in enumerate(examples)
    )
    row = f'<div class="examples" role="group" aria-label="Example videos">{cards}</div>' if cards else ""
    return f"""<div class="choose" data-address="visitor/{escape(key)}/upload">
<label class="drop"><input type="file" accept="video/*,.mkv,.avi,.ts,.flv" aria-label="Choose a video file">
<span class="drop-text"><b>Drop a video here</b> or <u>choose a file</u><small>{most}</small></span>
<span class="drop-bar" hidden><i></i></span></label>
<p class="problem" role="alert" hidden></p>{row}</div>"""


def player(video: Video | None, key: str, version: int) -> str:
    if video is None:
        return '<div class="stage empty"><p>The video that you choose is shown here.</p></div>'
    # The version makes the browser take another video for another one.
    return f"""<div class="stage"><video controls muted playsinline preload="auto"
src="visitor/{escape(key)}/video?{version}" aria-label="{escape(video.name)}"></video>
<p class="stage-note" hidden>Your browser cannot play this file.</p>
<p class="stage-name">{escape(video.name)}</p></div>"""


def plan(plan_: Any) -> str:
    """What reading means, before anything is decoded."""
    video, memory = plan_.videos[0], plan_.memory
    step_tokens = video.tokens // -(-video.num_frames // 2)
    cards = [
        ("Frames", f"{video.num_frames:,}", f"{video.fps:.3g} a second, {clock(plan_.seconds)} in all"),
        ("Pixels", f"{video.width}x{video.height}", f"{step_tokens:,} tokens for two frames"),
        ("Tokens", f"{plan_.tokens:,}", f"{plan_.vision_tokens:,} of them video"),
        ("Memory", size(memory.total), f"{size(memory.cache)} of it cache"),
        ("Attention", share(plan_.attention_share), "of the pairs of dense attention"),
    ]
    items = "".join(
        f'<div class="fact"><dt>{name}</dt><dd>{value}<small>{note}</small></dd></div>' for name, value, note in cards
    )
    notes = "".join(f'<p class="note">{escape(note)}</p>' for note in video.notes)
    return f'<dl class="facts">{items}</dl>{notes}'


def share(number: float) -> str:
    return f"{number:.0%}" if number >= 0.1 else f"{number:.1%}"


def waiting(before: Waiting) -> str:
    who = "one visitor is" if before.before == 1 else f"{before.before} visitors are"
    return progress_bar(None, f"Waiting: {who} served before you")


def progress_bar(done: float | None, text: str) -> str:
    """How far something is; None: nobody knows."""
    value = "" if done is None else f' aria-valuenow="{100 * done:.0f}"'
    width = "" if done is None else f' style="width:{100 * done:.1f}%"'
    moving = " moving" if done is None else ""
    return f"""<div class="status"><div class="bar{moving}" role="progressbar" aria-label="Progress"
aria-valuemin="0" aria-valuemax="100"{value}><i{width}></i></div><p>{escape(text)}</p></div>"""


def reading_progress(now: Any) -> str:
    rest = f", {seconds(now.remaining)} to go" if now.tokens < now.total_tokens else ""
    text = f"{now.frames:,} of {now.total_frames:,} frames, {now.tokens:,} of {now.total_tokens:,} tokens{rest}"
    return progress_bar(now.tokens / now.total_tokens, text)


def done(text: str) -> str:
    return f'<div class="status done"><p>{escape(text)}</p></div>'


def problem(text: str) -> str:
    return f'<div class="status wrong" role="alert"><p>{escape(text)}</p></div>'


def chips(questions: Sequence[str]) -> str:
    """Questions to click on."""
    if not questions:
        return ""
    buttons = "".join(
        f'<button type="button" class="chip" data-index="{index}">{escape(question)}</button>'
        for index, question in enumerate(questions)
    )
    return f'<div class="chips" role="group" aria-label="Suggested questions">{buttons}</div>'


def evidence(found: Any, total: float, whose: str = "") -> str:
    """Where an answer comes from: a timeline of the video, and the frames that counted most.

    Args:
        found: `Evidence` of the answer.
        total: seconds of the video.
        whose: which of several answers it is.
    """
    of_which = f" ({escape(whose)})" if whose else ""
    frames = found.frames(FRAMES)
    best = max(frames, key=lambda frame: frame.share)
    cards = "".join(
        f'<button type="button" class="frame{" best" if frame is best else ""}" data-second="{frame.time:.3f}">'
        f'<img src="{picture(frame.image)}" alt="The video at {clock(frame.time)}">'
        f"<span><b>{clock(frame.time)}</b><em>{share(frame.share)}</em></span></button>"
        for frame in frames
    )
    return f"""<section class="evidence" aria-label="Where the answer comes from">
<h3>Where the answer comes from{of_which}</h3><div class="frames">{cards}</div>
<div class="timeline"><div class="track" data-total="{total:.3f}">{_bars(found.moments, total)}
<i class="needle"></i></div>
<span>0:00</span><span>{clock(total)}</span></div>
<p class="hint">Click on a frame or a bar, and the video goes there. The numbers are shares of the attention that
question and answer paid; {share(found.text)} went to text.</p></section>"""


def _bars(moments: Sequence[Any], total: float) -> str:
    """The shares over time; where there are too many moments for bars of their own, some share one."""
    number = min(BARS, len(moments))
    groups = [moments[index * len(moments) // number : (index + 1) * len(moments) // number] for index in range(number)]
    sums = [sum(moment.share for moment in group) for group in groups]
    highest = max(sums) or 1
    bars = []
    for group, height in zip(groups, sums, strict=True):
        start, strongest = group[0].start, max(group, key=lambda moment: moment.share)
        place = f"left:{100 * start / total:.2f}%;width:{100 * (group[-1].end - start) / total:.2f}%"
        text = f"{clock(start)}: {share(height)}"
        bars.append(
            f'<button type="button" class="mark" tabindex="-1" data-second="{strongest.start:.3f}" title="{text}" '
            f'aria-label="{text}" style="{place}"><i style="height:{100 * height / highest:.1f}%"></i></button>'
        )
    return "".join(bars)


def comparison(readings: Sequence[KeptReading]) -> str:
    """The readings of a video side by side."""
    if not readings:
        return ""
    rows = "".join(
        f"<tr><th scope='row'>{escape(kept.label)}</th><td>{share(kept.attention_share)}</td>"
        f"<td class='wide'>{kept.tokens:,}</td><td class='wide'>{size(kept.cache_bytes)}</td>"
        f"<td>{seconds(kept.seconds)}</td>"
        f"<td>{'' if kept.answer_seconds is None else seconds(kept.answer_seconds)}</td>"
        f"<td class='answer'>{escape(kept.answer[:80])}</td></tr>"
        for kept in readings
    )
    return f"""<div class="compare"><table><caption>Readings of this video, side by side</caption><thead><tr>
<th scope="col">Attention</th><th scope="col" title="pairs of query and key, of those of dense attention">Of dense</th>
<th scope="col" class="wide">Tokens</th><th scope="col" class="wide">Cache</th><th scope="col">To read</th>
<th scope="col">To answer</th><th scope="col">Last answer</th></tr></thead><tbody>{rows}</tbody></table></div>"""
