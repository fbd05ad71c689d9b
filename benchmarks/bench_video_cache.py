"""Time questions about one video with and without its KV cache, through the lmms-eval plugin.

    python benchmarks/bench_video_cache.py path/or/hub-id --output results.json

Draws videos, asks each all its questions, and compares the answers. The exit status is 1 where they differ in float32.
"""

import argparse
import json
import tempfile
import time
from pathlib import Path

import torch
from lmms_eval.api.instance import Instance

from videonsa_eval.draw_benchmark import draw_benchmark
from videonsa_eval.lmms_videonsa import VideoNSA


def requests_of(model: VideoNSA, folder: Path, new_tokens: int) -> list[Instance]:
    """One request for each question of a drawn benchmark."""
    lines = [json.loads(line) for line in (folder / "all.jsonl").read_text().splitlines()]
    model.task_dict["drawn"] = {"test": lines}

    def doc_to_messages(doc: dict) -> list[dict]:
        parts = [{"type": "video", "url": str(folder / doc["video"])}, {"type": "text", "text": doc["question"]}]
        return [{"role": "user", "content": parts}]

    gen_kwargs = {"max_new_tokens": new_tokens, "do_sample": False}
    metadata = {"task": "drawn", "repeats": 1}
    return [
        Instance(
            "generate_until",
            ("", doc_to_messages, gen_kwargs, number, "drawn", "test"),
            0,
            metadata | {"doc_id": number},
        )
        for number in range(len(lines))
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description="Time questions about one video with and without its KV cache.")
    parser.add_argument("pretrained", help="checkpoint folder or Hub id")
    parser.add_argument("--seconds", type=int, default=128, help="length of the videos")
    parser.add_argument("--videos", type=int, default=3)
    parser.add_argument("--tokens-per-frame", type=int, default=16)
    parser.add_argument("--fps", type=int, default=4)
    parser.add_argument("--new-tokens", type=int, default=16, help="of each answer")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--output", type=Path, help="JSON file")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    result = {"torch": torch.__version__, "device": "cpu"}
    result |= {name: str(value) for name, value in vars(arguments).items() if name != "output"}
    answers = {}
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder) / "data"
        draw_benchmark(data, lengths=[arguments.seconds], videos=arguments.videos, fps=arguments.fps, size=112)
        for cached in (True, False):
            model = VideoNSA(
                pretrained=arguments.pretrained,
                dtype=arguments.dtype,
                fps=arguments.fps,
                tokens_per_frame=arguments.tokens_per_frame,
                video_cache=cached,
            )
            result["device"] = str(model.device)
            requests = requests_of(model, data, arguments.new_tokens)
            model.generate_until(requests[:1])  # compile, allocate
            start, cpu = time.perf_counter(), time.process_time()
            answers[cached] = model.generate_until(requests)
            name = "with_cache" if cached else "without"
            result[f"wall_seconds_{name}"] = round(time.perf_counter() - start, 2)
            result[f"cpu_seconds_{name}"] = round(time.process_time() - cpu, 2)
    counts = answers[True][0].token_counts
    result |= {"questions": len(requests), "vision_tokens": counts.vision_tokens}
    result["same_answers"] = [a.text for a in answers[True]] == [a.text for a in answers[False]]
    for clock in ("wall", "cpu"):
        result[f"{clock}_ratio"] = round(result[f"{clock}_seconds_without"] / result[f"{clock}_seconds_with_cache"], 2)
    print(json.dumps(result, indent=2))
    if arguments.output:
        arguments.output.write_text(json.dumps(result, indent=2) + "\n")
    if arguments.dtype == "float32" and not result["same_answers"]:
        raise SystemExit("bench_video_cache.py: error: the answers differ")


if __name__ == "__main__":
    main()
