"""What the tests of the web page share: the page in a process of its own, and a client that speaks Gradio's queue."""

import contextlib
import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
import uuid
from pathlib import Path
from urllib.parse import quote

from conftest import ROOT
from gradio_client.utils import apply_diff

SECONDS_TO_START = 240  # 15 on an idle machine
SECONDS = 120


class PageServer:
    """`python app.py` with the small checkpoint.

    Args:
        folder: for its temporary files and its log.
        arguments: of the command.
    """

    def __init__(self, folder: Path, *arguments: str):
        self.temporary, self.log = folder / "tmp", folder / "server.log"
        self.temporary.mkdir()
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        threads = {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive"}
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                [sys.executable, str(ROOT / "app.py"), "--port", str(self.port), "--device", "cpu", *arguments],
                env=os.environ | threads | {"TMPDIR": str(self.temporary), "HF_HUB_OFFLINE": "1"},
                stdout=log,
                stderr=log,
                cwd=folder,
            )
        end = time.monotonic() + SECONDS_TO_START
        while "The page is at" not in self.log.read_text():
            if self.process.poll() is not None or time.monotonic() > end:
                self.stop()
                raise RuntimeError(f"the page does not start:\n{self.log.read_text()}")
            time.sleep(0.1)

    @property
    def visitor_folders(self) -> list[Path]:
        return list(self.temporary.glob("videonsa-page-*/visitors/*"))

    def stop(self) -> None:
        self.process.terminate()
        try:
            self.process.wait(60)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


def request(url: str, data: bytes | None = None, method: str = "GET", **headers) -> tuple[int, bytes]:
    """Status and body, of refusals too."""
    asked = urllib.request.Request(url, data, headers, method=method)
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(asked, timeout=SECONDS) as answer:
            return answer.status, answer.read()
    except urllib.error.HTTPError as error:
        return error.code, error.read()


class PageClient:
    """A visitor without a browser.

    Attributes:
        parts: by `elem_id` (or number, without one), what was last shown.
        key: of this visitor's files.
    """

    def __init__(self, url: str):
        self.url, self.session = url, uuid.uuid4().hex[:11]
        config = json.loads(request(f"{url}/config")[1])
        self.names = {one["id"]: one["props"].get("elem_id") or one["id"] for one in config["components"]}
        self.values = {one["id"]: one["props"].get("value") for one in config["components"]}
        self.functions = {one["api_name"]: one for one in config["dependencies"]}
        self.parts: dict = {}
        self.heartbeat = urllib.request.urlopen(f"{url}/gradio_api/heartbeat/{self.session}", timeout=SECONDS)
        self.call("on_load")
        self.key = self.parts["uploader"].split("visitor/")[1].split("/")[0]

    def join(self, name: str, data: list | None = None, event_data=None) -> tuple[int, bytes]:
        function = self.functions[name]
        data = [self.values[number] for number in function["inputs"]] if data is None else data
        body = {"data": data, "fn_index": function["id"], "session_hash": self.session, "event_data": event_data}
        return request(
            f"{self.url}/gradio_api/queue/join",
            json.dumps(body).encode(),
            "POST",
            **{"Content-Type": "application/json"},
        )

    def call(self, name: str, data: list | None = None, event_data=None) -> dict:
        """Do what the browser does when a part is used, until it is done; what is shown then."""
        status, body = self.join(name, data, event_data)
        assert status == 200, body
        event, outputs = json.loads(body)["event_id"], self.functions[name]["outputs"]
        stream = urllib.request.urlopen(
            f"{self.url}/gradio_api/queue/data?session_hash={self.session}", timeout=SECONDS
        )
        with stream:
            whole: list | None = None
            for line in stream:
                message = json.loads(line[5:]) if line.startswith(b"data:") else {}
                if message.get("event_id") != event or message["msg"] not in (
                    "process_generating",
                    "process_completed",
                ):
                    continue
                assert message["success"], message
                data = message["output"].get("data") or []
                if message["msg"] == "process_generating":
                    # The first is whole, the next ones are differences.
                    whole = data if whole is None else list(map(apply_diff, whole, data))
                    data = whole
                self._show(outputs, data)
                if message["msg"] == "process_completed":
                    return self.parts
        raise AssertionError(f"{name} does not end")

    def _show(self, outputs: list[int], data: list) -> None:
        for number, value in zip(outputs, data, strict=False):
            if not (isinstance(value, dict) and value.get("__type__") == "update"):
                self.parts[self.names[number]] = value
            elif "value" in value:
                self.parts[self.names[number]] = value["value"]

    def upload(self, content: bytes, name: str = "my.mp4", key: str | None = None) -> tuple[int, dict]:
        status, body = request(f"{self.url}/visitor/{key or self.key}/upload?name={quote(name)}", content, "PUT")
        return status, json.loads(body)

    def ask(self, question: str) -> str:
        data = [self.values[number] for number in self.functions["on_ask"]["inputs"]]
        self.call("on_ask", [question, *data[1:]])
        return self.answer

    @property
    def answer(self) -> str:
        content = self.parts["chat"][-1]["content"]
        return content if isinstance(content, str) else content[0]["text"]

    def leave(self) -> None:
        with contextlib.suppress(OSError):
            self.heartbeat.close()
