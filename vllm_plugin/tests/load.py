"""A client that asks many things at once of an OpenAI-compatible server; the standard library is enough for it.

    python vllm_plugin/tests/load.py http://127.0.0.1:8000 MODEL REFERENCE_FOLDER [--requests 50] [--at-once 10]

asks the demo's questions and prints how many answers a second came, and whether they are the reference's.
"""

import argparse
import datetime
import json
import os
import platform
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

SECONDS_TO_ANSWER = 300
# Not those of the environment: the server is on this machine.
OPENER = urllib.request.build_opener(urllib.request.ProxyHandler({}))


def post(url: str, body: dict, timeout: float = SECONDS_TO_ANSWER):
    """The open answer of the server to a chat.

    Raises:
        urllib.error.HTTPError: a status of 400 or more.
    """
    request = urllib.request.Request(
        f"{url}/v1/chat/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    return OPENER.open(request, timeout=timeout)


def chat(url: str, body: dict) -> dict:
    """The server's answer to a chat, or `{"status": ..., "error": ...}`."""
    try:
        with post(url, body) as answer:
            return json.load(answer)
    except urllib.error.HTTPError as error:
        return {"status": error.code, "error": error.read().decode(errors="replace")}


def cancel(url: str, body: dict) -> str:
    """Ask for a stream, read its first line, and hang up."""
    with post(url, body | {"stream": True}) as answer:
        return answer.readline().decode()


def body_of(model: str, content: list[dict], **options: Any) -> dict:
    return {"model": model, "temperature": 0, "messages": [{"role": "user", "content": content}], **options}


def at_once(jobs: Sequence[Callable[[], Any]], number: int) -> tuple[list, float]:
    """The results of the jobs, in their order, of which `number` run at a time; and the seconds that they took."""
    start = time.monotonic()
    with ThreadPoolExecutor(number) as pool:
        results = list(pool.map(lambda job: job(), jobs))
    return results, time.monotonic() - start


def main() -> None:
    parser = argparse.ArgumentParser(description="Ask a server the demo's questions, many at once.")
    parser.add_argument("url")
    parser.add_argument("model")
    parser.add_argument("reference", type=Path)
    parser.add_argument("--requests", type=int, default=50)
    parser.add_argument("--at-once", type=int, default=10)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--output", type=Path, help="JSON file to write")
    arguments = parser.parse_args()
    cases = json.loads((arguments.reference / "reference.json").read_text())["tiny"]
    demo = [case for case in cases if case["name"].startswith("demo")]
    asked = [demo[number % len(demo)] for number in range(arguments.requests)]
    bodies = [body_of(arguments.model, case["content"], max_tokens=8) for case in asked]
    chat(arguments.url, bodies[0])  # whatever is made once
    jobs = [lambda body=body: chat(arguments.url, body) for body in bodies]
    rounds = []
    for _ in range(arguments.rounds):
        answers, seconds = at_once(jobs, arguments.at_once)
        texts = [answer["choices"][0]["message"]["content"] for answer in answers]
        right = sum(text == case["text"] for text, case in zip(texts, asked, strict=True))
        rounds.append({"right": right, "answers_per_second": round(len(asked) / seconds, 2)})
        print(f"{right} of {len(asked)} answers are the reference's; {len(asked) / seconds:.2f} answers a second")
    if arguments.output:
        about = {
            "date": datetime.date.today().isoformat(),
            "machine": f"{platform.machine()}, {os.cpu_count()} cores",
            "requests": arguments.requests,
            "at_once": arguments.at_once,
        }
        arguments.output.write_text(json.dumps(about | {"rounds": rounds}, indent=1) + "\n")


if __name__ == "__main__":
    main()
