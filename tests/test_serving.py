"""`transformers serve` and `transformers chat` with the small checkpoint: the real server, the real clients."""

import base64
import http.server
import inspect
import json
import os
import re
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import fastapi
import openai
import pytest
import torch
from conftest import ROOT
from PIL import Image
from transformers import AutoModel, AutoProcessor
from transformers.cli.serving.chat_completion import ChatCompletionHandler
from transformers.cli.serving.model_manager import ModelManager
from transformers.cli.serving.utils import Modality
from transformers.models.auto.modeling_auto import MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES

from serving_videonsa import GUESSED_NUM_FRAMES, bad_request, drop_guesses, is_server_call

TINY = ROOT / "checkpoints" / "tiny"
SCENE = ROOT / "demo" / "scene.mp4"
QUESTIONS = json.loads((ROOT / "demo" / "scene.json").read_text())
COMMAND = [sys.executable, "-m", "transformers.cli.transformers"]
SECONDS_TO_START = 240  # 6 on an idle machine
SECONDS_TO_ANSWER = 120


class Server:
    """`transformers serve` of the small checkpoint in a process of its own."""

    def __init__(self, folder):
        self.log = folder / "server.log"
        self.environment = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
        self.environment |= {"HF_HOME": str(folder), "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive"}
        self.environment |= {"VIDEONSA_ALLOW_HTTP": "1", "NO_PROXY": "127.0.0.1"}
        (folder / "hub").mkdir()
        for _ in range(3):  # another program may take the port first
            with socket.socket() as free:
                free.bind(("127.0.0.1", 0))
                self.port = free.getsockname()[1]
            self.url = f"http://127.0.0.1:{self.port}"
            command = [*COMMAND, "serve", str(TINY), "--trust-remote-code", "--device", "cpu"]
            with self.log.open("w") as log:
                self.process = subprocess.Popen(
                    [*command, "--host", "127.0.0.1", "--port", str(self.port)],
                    env=self.environment | {"HF_HUB_OFFLINE": "1"},
                    stdout=log,
                    stderr=log,
                )
            if self.wait():
                return
        raise RuntimeError(f"the server does not start:\n{self.log.read_text()}")

    def wait(self) -> bool:
        """Until the server answers; False if it has ended."""
        end = time.monotonic() + SECONDS_TO_START
        while time.monotonic() < end and self.process.poll() is None:
            if self.is_healthy():
                return True
            time.sleep(0.2)
        self.stop()
        return False

    def is_healthy(self) -> bool:
        try:
            with urllib.request.urlopen(f"{self.url}/health", timeout=10) as answer:
                return json.load(answer) == {"status": "ok"}
        except (urllib.error.URLError, OSError):
            return False

    def stop(self) -> None:
        self.process.terminate()
        try:
            self.process.wait(30)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NO_PROXY", "127.0.0.1")
        server = Server(tmp_path_factory.mktemp("server"))
        yield server
        server.stop()


@pytest.fixture(scope="module")
def client(server):
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", timeout=SECONDS_TO_ANSWER, max_retries=0)


@pytest.fixture(scope="module")
def site():
    """A web site with the demo's files."""

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=ROOT / "demo"))
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


@pytest.fixture(scope="module")
def local():
    """The model without a server: `local(content, options of the processor, **options of generate)` is its answer, and
    the tokens of the prompt; `content` is that of one message of the user, or whole messages."""
    processor = AutoProcessor.from_pretrained(TINY, trust_remote_code=True)
    model = AutoModel.from_pretrained(TINY, trust_remote_code=True, dtype="auto").eval()

    def answer(content, options=None, **generating):
        is_messages = isinstance(content, list) and "role" in content[0]
        inputs = processor.apply_chat_template(
            content if is_messages else [{"role": "user", "content": content}],
            tokenize=True,
            add_generation_prompt=True,
            return_dict=True,
            return_tensors="pt",
            **(options or {}),
        )
        with torch.inference_mode():
            tokens = model.generate(**inputs, **({"max_new_tokens": 16, "do_sample": False} | generating))
        length = inputs["input_ids"].shape[1]
        return processor.decode(tokens[0, length:], skip_special_tokens=True), length

    return answer


def data_uri(path, media_type="video/mp4") -> str:
    return f"data:{media_type};base64,{base64.b64encode(path.read_bytes()).decode()}"


def ask(client, content, **options):
    options = {"model": str(TINY), "temperature": 0} | options
    return client.chat.completions.create(messages=[{"role": "user", "content": content}], **options)


def about(video, question="How many stars are there?"):
    return [{"type": "video_url", "video_url": {"url": str(video)}}, {"type": "text", "text": question}]


def text_of(chunks) -> str:
    return "".join(chunk.choices[0].delta.content or "" for chunk in chunks)


def test_answers_are_right_and_those_of_generate(client, local):
    """With the checkpoint's own sampling of frames, not the server's 32."""
    for asked in QUESTIONS:
        completion = ask(client, about(SCENE, asked["question"]))
        expected, prompt_tokens = local(
            [{"type": "video", "video": str(SCENE)}, {"type": "text", "text": asked["question"]}]
        )
        assert completion.choices[0].message.content == expected == asked["answer"]
        assert completion.usage.prompt_tokens == prompt_tokens
        assert completion.choices[0].finish_reason == "stop"


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
@pytest.mark.parametrize("way", ["path", "file URI", "data URI", "http"])
def test_every_way_to_send_a_video(client, site, way, stream):
    video = {
        "path": SCENE,
        "file URI": SCENE.as_uri(),
        "data URI": data_uri(SCENE),
        "http": f"{site}/scene.mp4?token=1",
    }[way]
    for asked in QUESTIONS[:2]:
        answer = ask(client, about(video, asked["question"]), stream=stream)
        assert (text_of(answer) if stream else answer.choices[0].message.content) == asked["answer"]


def test_a_stream_joins_to_the_same_text(client, local):
    long = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False}
    options = {"extra_body": {"generation_config": json.dumps(long)}}
    expected, prompt_tokens = local([{"type": "video", "video": str(SCENE)}, {"type": "text", "text": "?"}], **long)
    whole = ask(client, about(SCENE, "?"), **options)
    chunks = list(ask(client, about(SCENE, "?"), stream=True, **options))
    assert sum(bool(chunk.choices[0].delta.content) for chunk in chunks) > 2
    assert whole.choices[0].message.content == text_of(chunks) == expected
    assert chunks[-1].choices[0].finish_reason == whole.choices[0].finish_reason == "length"
    assert chunks[-1].usage.prompt_tokens == whole.usage.prompt_tokens == prompt_tokens


def test_images(client, local, tmp_path):
    path = tmp_path / "a b.png"
    Image.new("RGB", (56, 56), (200, 30, 30)).save(path)
    question = {"type": "text", "text": "What is shown?"}
    expected = local([{"type": "image", "image": str(path)}, question])
    for image in (str(path), path.as_uri(), data_uri(path, "image/png")):
        completion = ask(client, [{"type": "image_url", "image_url": {"url": image}}, question])
        assert (completion.choices[0].message.content, completion.usage.prompt_tokens) == expected


def test_several_media_and_turns(client, local, tmp_path):
    path = tmp_path / "a.png"
    Image.new("RGB", (56, 56), (200, 30, 30)).save(path)
    first, second = QUESTIONS[:2]

    def conversation(video, image):
        return [
            {"role": "system", "content": "You are a helpful assistant."},
            {"role": "user", "content": [video(SCENE), {"type": "text", "text": first["question"]}]},
            {"role": "assistant", "content": first["answer"]},
            {
                "role": "user",
                "content": [image(path), video(SCENE), video(SCENE), {"type": "text", "text": second["question"]}],
            },
        ]

    sent = conversation(
        lambda path: {"type": "video_url", "video_url": {"url": data_uri(path)}},
        lambda path: {"type": "image_url", "image_url": {"url": data_uri(path, "image/png")}},
    )
    completion = client.chat.completions.create(model=str(TINY), messages=sent, temperature=0)
    expected = local(
        conversation(
            lambda path: {"type": "video", "video": str(path)}, lambda path: {"type": "image", "image": str(path)}
        )
    )
    assert (completion.choices[0].message.content, completion.usage.prompt_tokens) == expected


def test_several_requests_at_once(client):
    def answer(number):
        asked, stream = QUESTIONS[number % len(QUESTIONS)], number % 3 == 0
        result = ask(client, about(data_uri(SCENE) if number % 2 else SCENE, asked["question"]), stream=stream)
        return (text_of(result) if stream else result.choices[0].message.content) == asked["answer"]

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(answer, range(16)))


def test_options_of_a_request(client, local):
    """`chat_template_kwargs` are the processor's options."""
    content = [{"type": "video", "video": str(SCENE)}, {"type": "text", "text": "?"}]
    for options in ({"fps": 1}, {"num_frames": 6}, {"max_frames": 8}, {"num_frames": None, "fps": 4}):
        completion = ask(client, about(SCENE, "?"), extra_body={"chat_template_kwargs": options})
        assert completion.usage.prompt_tokens == local(content, options)[1]
    assert len({local(content, options)[1] for options in ({}, {"fps": 1}, {"num_frames": 6}, {"max_frames": 8})}) == 4


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
@pytest.mark.parametrize(
    ("content", "message"),
    [
        (about("/no/such.mp4"), "/no/such.mp4: there is no such video file"),
        (about(data_uri(ROOT / "LICENSE")), r"data URI of [\d,]+ bytes \(video/mp4\): cannot be opened as a video"),
        (about("data:video/mp4;base64,%%%" + "A" * 99_999), "not valid base64"),
        (about("http://127.0.0.1:1/a.mp4?token=secret"), "http://127.0.0.1:1/a.mp4: cannot be fetched"),
        (about("ftp://127.0.0.1/a.mp4"), "not from ftp:"),
        ([{"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}], "not an image of a known format"),
        ([{"type": "image_url", "image_url": {"url": "/no/such.png"}}], "no such image file"),
        ([{"type": "input_audio", "input_audio": {"data": "AAAA", "format": "wav"}}], "got 'audio'"),
    ],
    ids=["missing", "no video", "no base64", "no server", "ftp", "no image", "missing image", "audio"],
)
def test_bad_input_is_a_bad_request(server, client, content, message, stream):
    with pytest.raises(openai.BadRequestError) as caught:
        ask(client, content, stream=stream)
    detail = caught.value.response.json()["detail"]
    assert re.search(message, detail)
    assert len(detail) < 500 and "secret" not in detail
    assert server.is_healthy() and server.process.poll() is None


def test_bad_options_are_a_bad_request(server, client):
    for options, message in (({"fsp": 2}, "did you mean `fps`"), ({"num_frames": -1}, "num_frames")):
        with pytest.raises(openai.BadRequestError) as caught:
            ask(client, about(SCENE), extra_body={"chat_template_kwargs": options})
        assert message in caught.value.response.json()["detail"]
    assert ask(client, about(SCENE, QUESTIONS[0]["question"])).choices[0].message.content == QUESTIONS[0]["answer"]


def test_the_responses_endpoint(client):
    content = [
        {"type": "input_text", "text": QUESTIONS[0]["question"]},
        {"type": "video_url", "video_url": {"url": str(SCENE)}},
    ]
    options = {"model": str(TINY), "input": [{"role": "user", "content": content[::-1]}], "temperature": 0}
    assert client.responses.create(**options, stream=False).output_text == QUESTIONS[0]["answer"]


def test_chat(server, local):
    """The terminal client, which sends text only."""
    command = [*COMMAND, "chat", str(TINY), server.url, "do_sample=False", "max_new_tokens=4"]
    result = subprocess.run(
        command,
        input="hello\n!exit\n",
        env=server.environment | {"COLUMNS": "200", "HF_HUB_OFFLINE": "0"},
        capture_output=True,
        text=True,
        timeout=SECONDS_TO_ANSWER,
    )
    assert result.returncode == 0, result.stderr
    answer = result.stdout.split(f"<{TINY}>:")[1].split("tokens in")[0].splitlines()
    expected, _ = local("hello", max_new_tokens=4)
    assert expected.strip() and answer[1].strip() == expected.strip()


# The work-arounds, one by one


def test_the_server_knows_the_model():
    """What `register` is for: on a transformers that needs it no more, this fails."""
    model = AutoModel.from_pretrained(TINY, trust_remote_code=True)
    assert ModelManager.get_model_modality(model) == Modality.MULTIMODAL
    with pytest.MonkeyPatch.context() as patch:
        patch.delitem(MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES, "videonsa")
        with pytest.raises(ValueError, match="Unknown modality"):
            ModelManager.get_model_modality(model)


def test_guesses_are_those_of_the_server():
    """The server's source says what is taken for a guess."""
    source = inspect.getsource(ChatCompletionHandler.handle_request)
    assert f'chat_template_kwargs["num_frames"] = {GUESSED_NUM_FRAMES}' in source
    assert "load_audio_from_video=" in source
    assert is_server_call({"load_audio_from_video": False}) and not is_server_call({"num_frames": 32})
    call = {"load_audio_from_video": True, "num_frames": 32, "fps": 2, "tools": None}
    assert drop_guesses(call) == {"fps": 2, "tools": None}
    assert drop_guesses({"load_audio_from_video": True, "num_frames": 30}) == {"num_frames": 30}


def test_a_caller_who_is_no_server_is_taken_at_his_word(local):
    content = [{"type": "video", "video": str(SCENE)}, {"type": "text", "text": "?"}]
    assert local(content, {"num_frames": 32})[1] < local(content)[1]


def test_errors_are_value_errors(monkeypatch):
    error = bad_request(ValueError("no good"))
    assert isinstance(error, ValueError) and isinstance(error, fastapi.HTTPException)
    assert (error.status_code, error.detail, str(error)) == (400, "no good", "no good")
    monkeypatch.delitem(sys.modules, "fastapi")
    plain = ValueError("no good")
    assert bad_request(plain) is plain
