"""A web page to ask a video: choose one, see what reading it costs, read it once, ask it as often as you like.

    python app.py                                # the small checkpoint and drawn videos
    python app.py --model path/or/hub-id         # any other, any video

It is a Gradio app in the form of a Hugging Face Space, where `VIDEONSA_MODEL` in the environment names the model.
`docs/app.md` says what it keeps of its visitors, and for how long. What is not layout is in `page/`.
"""

import argparse
import logging
import os
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).resolve().parent
# Nothing is told to anyone, and nothing fetched: both are read when Gradio is imported.
os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")

try:
    import gradio as gr
except ImportError as error:
    raise SystemExit('app.py needs Gradio: pip install -c constraints.txt -e ".[app]"') from error
import av  # noqa: E402
import torch  # noqa: E402
from starlette.middleware import Middleware  # noqa: E402

from page import views  # noqa: E402
from page.examples import draw_examples  # noqa: E402
from page.model_room import Done, LineFull, ModelRoom, Settings, Stopped, Waiting  # noqa: E402
from page.routes import NoFilesByGradio, routes  # noqa: E402
from page.visitors import KeptReading, Limits, Refused, Video, Visitor, Visitors  # noqa: E402

logger = logging.getLogger("videonsa.page")
SWEEP_SECONDS, STOPPING_SECONDS = 30, 60
WENT_WRONG = "Something went wrong on the server. Please try again."
# The system's own, so that nothing is fetched.
FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, 'Helvetica Neue', 'Noto Sans', 'DejaVu Sans', sans-serif"


class Page:
    """The page: its parts, and what happens when they are used.

    Args:
        room: the model.
        visitors: who is here.
        examples: videos that everybody may choose.
    """

    def __init__(self, room: ModelRoom, visitors: Visitors, examples: list[Video]):
        self.room, self.visitors, self.limits = room, visitors, visitors.limits
        self.examples = [(video, _thumbnail(video.path)) for video in examples]
        with gr.Blocks(title="Ask a video", analytics_enabled=False, delete_cache=(600, 600)) as self.blocks:
            self._lay_out()
            self._connect()

    def _lay_out(self) -> None:
        default, plain = self.room.default, {"apply_default_css": False}
        gr.HTML(views.header(self.room.name, self.room.model.device.type), **plain)
        with gr.Row(equal_height=False):
            with gr.Column(scale=6, min_width=320):
                self.player = gr.HTML(views.player(None, "", 0), elem_id="player", **plain)
                self.uploader = gr.HTML("", js_on_load=_file("uploader.js"), elem_id="uploader", **plain)
                self.plan = gr.HTML(elem_id="plan", **plain)
                self.read = gr.Button("Read the video", variant="primary", elem_id="read", interactive=False)
                self.cancel = gr.Button("Cancel", variant="stop", elem_id="cancel", visible=False)
                self.status = gr.HTML(elem_id="status", **plain)
                with gr.Group(elem_id="settings"):
                    with gr.Row():
                        self.fps = gr.Slider(0.1, 8, default.fps, step=0.1, label="Frames a second")
                        least = self.room.least_step_tokens
                        most = max(16 * default.step_tokens, 256)
                        self.tokens = gr.Slider(least, most, default.step_tokens, step=1, label="Tokens for two frames")
                    with gr.Row():
                        modes = [(mode.capitalize(), mode) for mode in self.room.modes]
                        self.mode = gr.Radio(modes, value=default.nsa_mode, label="Attention")
                        most = max(2 * default.block_counts, 8)
                        self.counts = gr.Slider(1, most, default.block_counts, step=1, label="Blocks a token selects")
            with gr.Column(scale=6, min_width=320):
                self.chat = gr.Chatbot(
                    elem_id="chat",
                    show_label=False,
                    height=300,
                    buttons=[],
                    feedback_options=None,
                    placeholder="Ask anything about the video.",
                )
                self.chips = gr.HTML(js_on_load=_file("chips.js"), elem_id="chips", **plain)
                self.question = gr.Textbox(
                    elem_id="question",
                    show_label=False,
                    container=False,
                    placeholder="Your question",
                    max_length=self.limits.question_letters,
                    submit_btn="Ask",
                )
                self.answer_from = gr.CheckboxGroup([], label="Answer from", visible=False, elem_id="answer-from")
                self.ask_status = gr.HTML(elem_id="ask-status", **plain)
                self.evidence = gr.HTML(elem_id="evidence", **plain)
                self.compare = gr.HTML(elem_id="compare", **plain)
                with gr.Accordion("Length of answers", open=False):
                    most = self.limits.new_tokens
                    self.length = gr.Slider(1, most, min(128, most), step=1, label="Tokens, at most")

    def _connect(self) -> None:
        settings = [self.fps, self.tokens, self.mode, self.counts]
        quiet = {"show_progress": "hidden", "api_visibility": "private"}
        alone = {**quiet, "concurrency_limit": None}  # the room has a line of its own
        asking = [self.answer_from, self.length, *settings]
        shown = [self.counts, self.uploader, self.player, self.plan, self.read, self.cancel, self.status]
        shown += [self.chat, self.chips, self.question, self.answer_from, self.ask_status, self.evidence, self.compare]
        self.blocks.load(self.on_load, settings, shown, **quiet)
        self.uploader.upload(self.on_upload, settings, shown, **quiet)
        self.uploader.select(self.on_example, settings, shown, **quiet)
        planned = [self.plan, self.read, self.counts]
        for one in settings:
            one.change(self.on_settings, settings, planned, trigger_mode="always_last", **quiet)
        self.read.click(self.on_read, settings, shown, **alone)
        self.question.submit(self.on_ask, [self.question, *asking], shown, **alone)
        self.chips.select(self.on_chip, asking, shown, **alone)
        self.chat.clear(self.on_clear, None, [self.evidence], **quiet)
        for stopped in (self.cancel.click, self.question.stop):
            stopped(self.on_stop, queue=False, **quiet)
        self.blocks.unload(self.on_unload)

    # What happens. Every handler gives updates of parts; it knows its visitor by the session alone.

    def on_load(self, request: gr.Request, *settings):
        visitor = self.visitors.arrive(request.session_hash)
        if self.examples:
            self.visitors.choose(visitor, self.examples[0][0])
        chosen = visitor.video.name if visitor.video else None
        return {
            self.uploader: views.uploader(visitor.key, self.examples, self.limits, chosen),
            **self._video_chosen(visitor, settings),
        }

    def on_upload(self, request: gr.Request, *settings):
        try:
            visitor = self.visitors.of(request.session_hash)
            if visitor.upload is None or not visitor.upload.path.is_file():
                raise Refused("The file did not arrive. Please choose it again.")
            self.visitors.choose(visitor, visitor.upload)
        except Refused as reason:
            return {self.status: views.problem(str(reason))}
        return {
            self.uploader: views.uploader(visitor.key, self.examples, self.limits, None),
            **self._video_chosen(visitor, settings),
        }

    def on_example(self, request: gr.Request, event: gr.EventData, *settings):
        try:
            visitor = self.visitors.of(request.session_hash)
            self.visitors.choose(visitor, self._example(event))
        except Refused as reason:
            return {self.status: views.problem(str(reason))}
        return self._video_chosen(visitor, settings)

    def on_settings(self, request: gr.Request, *settings):
        try:
            return self._planned(self.visitors.of(request.session_hash), settings)
        except Refused as reason:
            return {self.plan: views.problem(str(reason))}

    def on_read(self, request: gr.Request, *settings) -> Iterator[dict]:
        yield from self._safely(request, self.status, lambda visitor: self._read(visitor, settings, self.status))

    def on_chip(self, request: gr.Request, event: gr.EventData, *asking) -> Iterator[dict]:
        def steps(visitor: Visitor):
            questions = visitor.video.questions if visitor.video else ()
            index = getattr(event, "index", None)
            if not isinstance(index, int) or not 0 <= index < len(questions):
                raise Refused("There is no such question.")
            return self._ask(visitor, questions[index], *asking)

        yield from self._safely(request, self.ask_status, steps)

    def on_ask(self, request: gr.Request, question: str, *asking) -> Iterator[dict]:
        yield from self._safely(request, self.ask_status, lambda visitor: self._ask(visitor, question, *asking))

    async def on_stop(self, request: gr.Request) -> None:
        # On the event loop, since all threads may be waiting.
        self.visitors.of(request.session_hash).stop.set()

    def on_clear(self, request: gr.Request):
        self.visitors.of(request.session_hash).messages.clear()
        return {self.evidence: ""}

    def on_unload(self, request: gr.Request) -> None:
        self.visitors.leave(request.session_hash)

    # Steps of it.

    def _video_chosen(self, visitor: Visitor, settings) -> dict:
        """Everything as it is for a video that nothing was done with yet."""
        questions = visitor.video.questions if visitor.video else ()
        empty = dict.fromkeys((self.status, self.ask_status, self.evidence, self.compare), "")
        return {
            self.player: views.player(visitor.video, visitor.key, time.monotonic_ns()),
            self.chat: [],
            self.chips: views.chips(questions),
            self.question: "",
            self.answer_from: gr.CheckboxGroup(choices=[], value=[], visible=False),
            **empty,
            **self._planned(visitor, settings),
        }

    def _planned(self, visitor: Visitor, settings) -> dict:
        is_sparse = gr.Slider(interactive=settings[2] != "dense")
        if visitor.video is None:
            return {self.plan: "", self.read: gr.Button(interactive=False), self.counts: is_sparse}
        try:
            wanted = self._settings(settings)
            text, is_possible = views.plan(self._plan(visitor.video, wanted), wanted), True
        except Refused as reason:
            text, is_possible = views.problem(str(reason)), False
        return {self.plan: text, self.read: gr.Button(interactive=is_possible), self.counts: is_sparse}

    def _plan(self, video: Video, settings: Settings):
        try:
            plan = self.room.plan(video.path, settings)
        except ValueError as error:
            raise Refused(_for_visitors(error, video)) from error
        except Exception as error:
            logger.exception("a plan failed")
            raise Refused(WENT_WRONG) from error
        if plan.seconds > self.limits.seconds:
            most = views.clock(self.limits.seconds)
            raise Refused(f"This video is {views.clock(plan.seconds)} long, and the limit here is {most}.")
        if plan.memory.cache > self.limits.all_reading_bytes:
            size, most = views.size(plan.memory.cache), views.size(self.limits.all_reading_bytes)
            raise Refused(f"Its cache would take {size}, and the limit here is {most}: fewer frames or tokens fit.")
        return plan

    def _settings(self, values) -> Settings:
        fps, tokens, mode, counts = values
        for name, value in (("Frames a second", fps), ("Tokens for two frames", tokens), ("Blocks", counts)):
            if not isinstance(value, (int, float)) or isinstance(value, bool) or not value > 0:
                raise Refused(f"{name}: a number above zero, please.")
        if mode not in self.room.modes:
            raise Refused("There is no such attention.")
        return Settings(float(fps), int(tokens), mode, int(counts))

    def _example(self, event: gr.EventData) -> Video:
        index = getattr(event, "index", None)
        if not isinstance(index, int) or not 0 <= index < len(self.examples):
            raise Refused("There is no such example.")
        return self.examples[index][0]

    def _read(self, visitor: Visitor, values, status: gr.HTML) -> Iterator[dict]:
        settings, video = self._settings(values), visitor.video
        if video is None:
            raise Refused("Choose a video first.")
        self._plan(video, settings)  # the sliders may be ahead of what is shown
        start, label = time.perf_counter(), settings.attention
        opening = views.progress_bar(None, "Opening the video")
        yield {self.read: gr.Button(visible=False), self.cancel: gr.Button(visible=True), status: opening}
        try:
            for item in self.room.read(video.path, settings, visitor.stop):
                if isinstance(item, Waiting):
                    yield {status: views.waiting(item)}
                    start = time.perf_counter()
                elif not isinstance(item, Done):
                    yield {status: views.reading_progress(item)}
            reading, end = item.result, ""
        except (Stopped, ValueError) as error:
            reading = getattr(error, "reading", None)
            if reading is None or visitor.video is not video:
                raise
            until = views.clock(reading.seconds)
            label = f"{label}, until {until}"
            end = f"Stopped at {until}. You can ask about what was read until then."
            if isinstance(error, ValueError):
                end = f"{_for_visitors(error, video)} You can ask about what was read until then."
        if visitor.video is not video:
            raise Stopped
        seconds = time.perf_counter() - start
        self.visitors.keep(visitor, KeptReading(reading, settings, label, _cache_bytes(reading), seconds))
        yield {
            status: views.done(end or f"Read in {views.seconds(seconds)}. Ask away."),
            **self._readings(visitor),
        }

    def _readings(self, visitor: Visitor) -> dict:
        labels = [kept.label for kept in visitor.readings]
        return {
            self.answer_from: gr.CheckboxGroup(choices=labels, value=labels, visible=len(labels) > 1),
            self.compare: views.comparison(visitor.readings),
        }

    def _ask(self, visitor: Visitor, question: str, labels, length, *settings) -> Iterator[dict]:
        question = (question or "").strip()
        if not question:
            raise Refused("Type a question first.")
        if len(question) > self.limits.question_letters:
            raise Refused(f"A question has {self.limits.question_letters:,} letters at most.")
        if not isinstance(length, (int, float)) or not 1 <= length <= self.limits.new_tokens:
            raise Refused(f"An answer has 1 to {self.limits.new_tokens} tokens.")
        yield {self.question: gr.Textbox(value="", submit_btn=False, stop_btn="Stop"), self.ask_status: ""}
        if not visitor.readings:
            if visitor.messages:
                text = "The reading was dropped to make room: reading it again"
                yield {self.ask_status: views.progress_bar(None, text)}
            yield from self._read(visitor, settings, self.ask_status)
        chosen = [kept for kept in visitor.readings if kept.label in (labels or [])] or list(visitor.readings)
        video, messages = visitor.video, visitor.messages
        messages.append({"role": "user", "content": question})
        for kept in chosen:
            heading = f"**{kept.label}**\n\n" if len(chosen) > 1 else ""
            message = {"role": "assistant", "content": heading}
            messages.append(message)
            yield {self.chat: [*messages], self.ask_status: ""}
            for item in self.room.ask(kept.reading, kept.settings, question, int(length), visitor.stop):
                if isinstance(item, Waiting):
                    yield {self.ask_status: views.waiting(item)}
                elif isinstance(item, Done):
                    answer = item.result
                else:
                    message["content"] += item
                    yield {self.chat: [*messages], self.ask_status: ""}
            if visitor.video is not video:
                raise Stopped
            message["content"] = heading + (answer.text or "(no words)")
            kept.answer, kept.answer_seconds = answer.text, answer.seconds
            yield {self.chat: [*messages], self.compare: views.comparison(visitor.readings)}
            if kept is chosen[0] and getattr(answer, "evidence", None) is not None:
                yield {self.evidence: views.evidence(answer, kept.reading.seconds)}

    def _safely(self, request: gr.Request, status: gr.HTML, steps) -> Iterator[dict]:
        """The steps of one job of a visitor; whatever goes wrong is said without what visitors must not see."""
        video = None
        try:
            visitor = self.visitors.of(request.session_hash)
            video = visitor.video
            with _job(visitor):
                yield from steps(visitor)
        except Refused as reason:
            yield {status: views.problem(str(reason))}
        except LineFull:
            yield {status: views.problem("Too many visitors are waiting. Please try again in a minute.")}
        except Stopped:
            yield {status: views.done("Stopped.") if visitor.video is video else ""}
        except ValueError as error:
            yield {status: views.problem(_for_visitors(error, video))}
        except Exception:
            logger.exception("a job failed")
            yield {status: views.problem(WENT_WRONG)}
        yield {
            self.read: gr.Button(visible=True),
            self.cancel: gr.Button(visible=False),
            self.question: gr.Textbox(submit_btn="Ask", stop_btn=False),
        }


@contextmanager
def _job(visitor: Visitor) -> Iterator[None]:
    """One at a time for a visitor."""
    # What was stopped may need a moment to end.
    if not visitor.busy.acquire(timeout=STOPPING_SECONDS if visitor.stop.is_set() else 0):
        raise Refused("One thing at a time: something is still running for you.")
    visitor.stop = threading.Event()
    try:
        yield
    finally:
        visitor.busy.release()


def _for_visitors(error: Exception, video: Video | None) -> str:
    """What an error says, with the visitor's name for the file."""
    text = str(error) or WENT_WRONG
    if video is not None:
        text = text.replace(f"file:{video.path}", video.name).replace(str(video.path), video.name)
    text = text.partition("; read until second")[0]
    return WENT_WRONG if str(video.path.parent if video else ROOT) in text else f"{text[:1].upper()}{text[1:]}"


def _cache_bytes(reading) -> int:
    states = (states for layer in reading.cache.layers for states in (layer.keys, layer.values))
    return sum(one.untyped_storage().nbytes() for one in states)


def _thumbnail(path: Path) -> str:
    """Of a video in its middle of the first seconds, where there may be more to see than at its start."""
    with av.open(str(path)) as container:
        for number, frame in enumerate(container.decode(video=0)):
            if number == 8:
                break
        return views.picture(frame.to_image())


def _file(name: str) -> str:
    return (ROOT / "page" / name).read_text()


def theme() -> gr.Theme:
    return gr.themes.Default(
        primary_hue="indigo",
        neutral_hue="slate",
        radius_size="lg",
        font=["Arial", "sans-serif"],
        font_mono=["monospace"],
    )


def parse_arguments() -> argparse.Namespace:
    limits = Limits()
    parser = argparse.ArgumentParser(description="A web page to ask a video.")
    model = os.environ.get("VIDEONSA_MODEL") or str(ROOT / "checkpoints" / "tiny")
    parser.add_argument("--model", default=model, help="checkpoint folder or Hub id; default: the small checkpoint")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", default="auto", choices=("auto", "float32", "bfloat16", "float16"))
    parser.add_argument("--chunk-tokens", type=int, default=1024, help="read between two steps of the progress bar")
    parser.add_argument("--max-upload-mb", type=float, default=limits.upload_bytes / 2**20)
    parser.add_argument("--max-minutes", type=float, default=limits.seconds / 60, help="of a video")
    parser.add_argument("--max-readings-gb", type=float, default=limits.all_reading_bytes / 2**30, help="all visitors'")
    parser.add_argument("--idle-minutes", type=float, default=limits.idle_seconds / 60, help="until one is forgotten")
    parser.add_argument("--examples", type=int, default=3, help="drawn videos to choose from")
    parser.add_argument("--host", help="address to listen on; default: this machine alone, or GRADIO_SERVER_NAME")
    parser.add_argument("--port", type=int, help="default: the first free one from 7860 on, or GRADIO_SERVER_PORT")
    parser.add_argument(
        "--share", default="no", choices=("no", "yes"), help="a public address through Gradio's servers"
    )
    arguments = parser.parse_args()
    for name in ("chunk_tokens", "max_upload_mb", "max_minutes", "max_readings_gb", "idle_minutes"):
        if not getattr(arguments, name) > 0:
            parser.error(f"--{name.replace('_', '-')} must be positive, got {getattr(arguments, name)}")
    if arguments.examples < 0:
        parser.error(f"--examples must not be negative, got {arguments.examples}")
    return arguments


def main() -> None:
    arguments = parse_arguments()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))  # so that the folder is removed
    limits = Limits(
        upload_bytes=int(arguments.max_upload_mb * 2**20),
        seconds=60 * arguments.max_minutes,
        all_reading_bytes=int(arguments.max_readings_gb * 2**30),
        idle_seconds=60 * arguments.idle_minutes,
    )
    with tempfile.TemporaryDirectory(prefix="videonsa-page-") as folder:
        print(f"Loading {arguments.model} on {arguments.device}", flush=True)
        room = ModelRoom(arguments.model, arguments.device, arguments.dtype, arguments.chunk_tokens, limits.waiting)
        print(f"Drawing {arguments.examples} example videos", flush=True)
        drawn = draw_examples(Path(folder), arguments.examples)
        page = Page(room, Visitors(Path(folder) / "visitors", limits), [video for video, _ in drawn])
        serve(page, Path(folder), arguments.host, arguments.port, arguments.share == "yes")


def serve(page: Page, folder: Path, host: str | None, port: int | None, share: bool) -> None:
    """Show the page until the process is told to end."""
    os.environ["GRADIO_TEMP_DIR"] = str(folder / "gradio")
    is_over = threading.Event()

    def sweep():
        while not is_over.wait(SWEEP_SECONDS):
            page.visitors.sweep()

    threading.Thread(target=sweep, name="page-sweep", daemon=True).start()
    try:
        page.blocks.queue(max_size=64, default_concurrency_limit=8, api_open=False).launch(
            server_name=host,
            server_port=port,
            share=share,
            show_error=False,
            ssr_mode=False,
            footer_links=[],
            theme=theme(),
            css=f".gradio-container, body {{ --font: {FONT} !important; }}\n{_file('page.css')}",
            head=f"<script>{_file('page.js')}</script>",
            app_kwargs={"routes": routes(page.visitors), "middleware": [Middleware(NoFilesByGradio)]},
        )
    finally:
        is_over.set()
        page.visitors.leave_all()


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError, ImportError) as error:
        raise SystemExit(f"app.py: error: {error}") from error
