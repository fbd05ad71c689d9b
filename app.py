"""A web page to ask a video: choose one, see what reading it costs, read it once, ask it as often as you like.

    python app.py                                # the small checkpoint and drawn videos
    python app.py --model path/or/hub-id         # any other, any video

It is a Gradio app in the form of a Hugging Face Space, where `VIDEONSA_PAGE` in the environment has the arguments.
`docs/app.md` says what it keeps of its visitors, and for how long. What is not layout is in `page/`.
"""

import argparse
import contextlib
import math
import os
import shlex
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent
# For all files of the page, and removed when the process ends.
FOLDER = tempfile.TemporaryDirectory(prefix="videonsa-page-")
# Nothing is told to anyone, and nothing kept elsewhere: both are read when Gradio is imported.
os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")
os.environ["GRADIO_TEMP_DIR"] = os.path.join(FOLDER.name, "gradio")

try:
    import gradio as gr
except ImportError as error:
    raise SystemExit('app.py needs Gradio: pip install -c constraints.txt -e ".[app]"') from error
import av  # noqa: E402
import torch  # noqa: E402
from starlette.middleware import Middleware  # noqa: E402
from transformers import PretrainedConfig  # noqa: E402

from page import views  # noqa: E402
from page.examples import draw_examples  # noqa: E402
from page.jobs import Jobs  # noqa: E402
from page.model_room import ModelRoom, Settings  # noqa: E402
from page.routes import OnlyThePage, routes  # noqa: E402
from page.visitors import Limits, Refused, Video, Visitor, Visitors  # noqa: E402

SWEEP_SECONDS = 30
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
        self.jobs = Jobs(room, visitors)
        self.examples = [(video, _thumbnail(video.path)) for video in examples]
        with gr.Blocks(title="Ask a video", analytics_enabled=False, delete_cache=(600, 600)) as self.blocks:
            self._lay_out()
            self._connect()

    def _lay_out(self) -> None:
        default, plain = self.room.default, {"apply_default_css": False}
        gr.HTML(views.header(self.room.name, self.room.model.device.type), **plain)
        with gr.Row(equal_height=False, elem_id="columns"):
            with gr.Column(scale=6, min_width=320):
                self.player = gr.HTML(views.player(None, "", 0), elem_id="player", **plain)
                self.uploader = gr.HTML("", js_on_load=_file("uploader.js"), elem_id="uploader", **plain)
                self.plan = gr.HTML(elem_id="plan", **plain)
                self.read = gr.Button("Read the video", variant="primary", elem_id="read", interactive=False)
                self.cancel = gr.Button("Cancel", variant="stop", elem_id="cancel", visible=False)
                self.status = gr.HTML(elem_id="status", **plain)
                with gr.Group(elem_id="settings"):
                    with gr.Row():
                        self.fps = gr.Slider(0.1, 8, default.fps, step=0.1, label="Frames a second", min_width=120)
                        least = self.room.least_step_tokens
                        most = max(16 * default.step_tokens, 256)
                        self.tokens = gr.Slider(
                            least, most, default.step_tokens, step=1, label="Tokens for two frames", min_width=120
                        )
                    with gr.Row():
                        modes = [(mode.capitalize(), mode) for mode in self.room.modes]
                        self.mode = gr.Radio(modes, value=default.nsa_mode, label="Attention", min_width=120)
                        most = max(2 * default.block_counts, 8)
                        self.counts = gr.Slider(
                            1, most, default.block_counts, step=1, label="Blocks a token selects", min_width=120
                        )
            with gr.Column(scale=6, min_width=320):
                self.chat = gr.Chatbot(
                    elem_id="chat",
                    show_label=False,
                    height=280,
                    buttons=[],
                    feedback_options=None,
                    group_consecutive_messages=False,
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
                with gr.Accordion("Length of answers", open=False, elem_id="length"):
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
        try:
            visitor = self.visitors.arrive(request.session_hash)
        except Refused as reason:
            return {self.status: views.problem(str(reason))}
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
            self.visitors.choose(visitor, _chosen(event, self.examples)[0])
        except Refused as reason:
            return {self.status: views.problem(str(reason))}
        return self._video_chosen(visitor, settings)

    def on_settings(self, request: gr.Request, *settings):
        try:
            return self._planned(self.visitors.of(request.session_hash), settings)
        except Refused as reason:
            return {self.plan: views.problem(str(reason))}

    def on_read(self, request: gr.Request, *settings) -> Iterator[dict]:
        def steps(visitor: Visitor):
            return self.jobs.read(visitor, self.jobs.settings(*settings))

        yield from self._shown(request, self.status, settings, steps)

    def on_chip(self, request: gr.Request, event: gr.EventData, *asking) -> Iterator[dict]:
        def steps(visitor: Visitor):
            questions = visitor.video.questions if visitor.video else ()
            return self._ask(visitor, _chosen(event, questions), *asking)

        yield from self._shown(request, self.ask_status, asking[2:], steps)

    def on_ask(self, request: gr.Request, question: str, *asking) -> Iterator[dict]:
        def steps(visitor: Visitor):
            return self._ask(visitor, question, *asking)

        yield from self._shown(request, self.ask_status, asking[2:], steps, typed=question)

    async def on_stop(self, request: gr.Request) -> None:
        # On the event loop, since all threads may be waiting.
        with contextlib.suppress(Refused):
            self.visitors.of(request.session_hash).stop.set()

    def on_clear(self, request: gr.Request):
        with contextlib.suppress(Refused):
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
            wanted = self.jobs.settings(*settings)
            text, button = views.plan(self.jobs.plan(visitor.video, wanted)), self._read_button(visitor, wanted)
        except Refused as reason:
            text, button = views.problem(str(reason)), gr.Button(interactive=False)
        return {self.plan: text, self.read: button, self.counts: is_sparse}

    def _read_button(self, visitor: Visitor, settings: Settings) -> gr.Button:
        is_read = any(kept.settings == settings for kept in visitor.readings)
        text = "Read the video again" if is_read else "Read the video"
        if visitor.readings and not is_read:
            text = f"Read the video so too: {settings.attention.lower()}"
        return gr.Button(text, variant="secondary" if is_read else "primary", interactive=True, visible=True)

    def _ask(self, visitor: Visitor, question: str, labels, length, *settings) -> Iterator[dict]:
        return self.jobs.ask(visitor, self.jobs.settings(*settings), question, labels, length)

    def _shown(self, request: gr.Request, status: gr.HTML, settings, steps, typed: str = "") -> Iterator[dict]:
        """The updates of a job, as updates of parts; one that is refused at once leaves those of a running one."""
        has_begun, lost = False, {}
        try:
            visitor = self.visitors.of(request.session_hash)
            for update in steps(visitor):
                if "has_begun" in update:
                    has_begun, asked = True, {"value": ""} if typed else {}
                    yield {status: "", self.question: gr.Textbox(submit_btn=False, stop_btn="Stop", **asked)}
                    continue
                parts = {"status": status, "messages": self.chat, "evidence": self.evidence}
                shown = {part: update[name] for name, part in parts.items() if name in update}
                if "is_reading" in update:
                    shown |= {self.read: gr.Button(visible=False), self.cancel: gr.Button(visible=True)}
                if "readings" in update:
                    labels = [kept.label for kept in update["readings"]]
                    shown[self.answer_from] = gr.CheckboxGroup(labels, value=labels, visible=len(labels) > 1)
                    shown[self.compare] = views.comparison(update["readings"])
                    shown[self.read] = self._read_button(visitor, self.jobs.settings(*settings))
                    shown[self.cancel] = gr.Button(visible=False)
                yield shown
        except Refused as reason:
            yield {status: views.problem(str(reason))}
            lost = {"value": typed} if typed else {}
        if not has_begun:
            return
        yield {
            self.read: gr.Button(visible=True),
            self.cancel: gr.Button(visible=False),
            self.question: gr.Textbox(submit_btn="Ask", stop_btn=False, **lost),
        }


def _chosen(event: gr.EventData, of: Sequence):
    """What a click chose by its number."""
    index = event._data.get("index") if isinstance(event._data, dict) else None
    if not isinstance(index, int) or not 0 <= index < len(of):
        raise Refused("There is no such thing to choose.")
    return of[index]


def _thumbnail(path: Path) -> str:
    """The third second of a video, where there may be more to see than at its start."""
    with av.open(str(path)) as container:
        container.seek(3 * 10**6)
        return views.picture(next(container.decode(video=0)).to_image())


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
    model = str(ROOT / "checkpoints" / "tiny")
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
    arguments = parser.parse_args([*shlex.split(os.environ.get("VIDEONSA_PAGE", "")), *sys.argv[1:]])
    for name in ("chunk_tokens", "max_upload_mb", "max_minutes", "max_readings_gb", "idle_minutes"):
        value = getattr(arguments, name)
        if not 0 < value < math.inf:
            parser.error(f"--{name.replace('_', '-')} must be positive and finite, got {value}")
    if arguments.examples < 0:
        parser.error(f"--examples must not be negative, got {arguments.examples}")
    if arguments.port is not None and not 0 <= arguments.port <= 65535:
        parser.error(f"--port must be 0 to 65535, got {arguments.port}")
    return arguments


def limits_of(arguments: argparse.Namespace) -> Limits:
    """What the arguments of the command allow."""
    upload_bytes = int(arguments.max_upload_mb * 2**20)
    return Limits(
        upload_bytes=upload_bytes,
        # A visitor's video is there until the next one has come.
        all_upload_bytes=max(Limits.all_upload_bytes, 2 * upload_bytes),
        seconds=60 * arguments.max_minutes,
        all_reading_bytes=int(arguments.max_readings_gb * 2**30),
        idle_seconds=60 * arguments.idle_minutes,
    )


def check_checkpoint(name: str) -> None:
    """Before anything of it is loaded.

    Raises:
        ValueError: it is the checkpoint of another model.
        OSError: there is none.
    """
    model_type = PretrainedConfig.get_config_dict(name)[0].get("model_type")
    if model_type != "videonsa":
        raise ValueError(f"--model must be a checkpoint of the model type videonsa, got {name} with {model_type!r}")


def main() -> None:
    arguments = parse_arguments()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))  # so that the folder is removed
    limits = limits_of(arguments)
    with FOLDER as folder:
        os.makedirs(os.environ["GRADIO_TEMP_DIR"])  # some of Gradio expects it
        check_checkpoint(arguments.model)
        print(f"Loading {arguments.model} on {arguments.device}", flush=True)
        room = ModelRoom(arguments.model, arguments.device, arguments.dtype, arguments.chunk_tokens, limits.waiting)
        print(f"Drawing {arguments.examples} example videos", flush=True)
        drawn = draw_examples(Path(folder), arguments.examples)
        page = Page(room, Visitors(Path(folder) / "visitors", limits), [video for video, _ in drawn])
        serve(page, arguments.host, arguments.port, arguments.share == "yes")


def serve(page: Page, host: str | None, port: int | None, share: bool) -> None:
    """Show the page until the process is told to end."""
    is_over = threading.Event()

    def sweep():
        while not is_over.wait(SWEEP_SECONDS):
            page.visitors.sweep()

    threading.Thread(target=sweep, name="page-sweep", daemon=True).start()
    try:
        page.blocks.queue(max_size=64, default_concurrency_limit=8, api_open=False)
        _, address, public_address = page.blocks.launch(
            server_name=host,
            server_port=port,
            share=share,
            show_error=False,
            ssr_mode=False,
            footer_links=[],
            run_history=False,  # no questions and answers in the browser's storage
            theme=theme(),
            css=f".gradio-container, body {{ --font: {FONT} !important; }}\n{_file('page.css')}",
            head=f"<script>{_file('page.js')}</script>",
            app_kwargs={"routes": routes(page.visitors), "middleware": [Middleware(OnlyThePage)]},
            quiet=True,
            prevent_thread_lock=True,
            _frontend=False,  # else it gives up where the page does not answer within 3 seconds, on a busy machine
        )
        print(f"The page is at {public_address or address}", flush=True)
        page.blocks.block_thread()
    finally:
        is_over.set()
        page.visitors.leave_all()


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError, ImportError) as error:
        raise SystemExit(f"app.py: error: {error}") from error
