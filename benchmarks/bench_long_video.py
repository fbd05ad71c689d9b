"""Reading long videos: memory against length, what overlapping saves, and what a second question costs.

    OMP_WAIT_POLICY=passive python benchmarks/bench_long_video.py --output benchmarks/results/<date>_long_video.json

The videos are drawn and encoded here: two frames a second of noise in blocks, 224 pixels wide, 64 tokens for two frames
at the one frame a second that is read. Each is read in a process of its own, by the small checkpoint, and by a random
model of one decoder layer in the 7B's shape with a vision tower of the real width and one block. Memory is what the
process had at its peak beyond what it had with the model loaded, libraries that torch loads at first use included.
The file of results is written after each row.
"""

import argparse
import datetime
import itertools
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import av
import numpy as np
import torch
from bench_cpu import describe_cpu
from published_sizes import published_config
from tqdm import tqdm

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import prompt_videonsa  # noqa: E402
from configuration_videonsa import VideoNSAConfig  # noqa: E402
from modeling_videonsa import VideoNSAForConditionalGeneration  # noqa: E402
from processing_videonsa import VideoNSAProcessor  # noqa: E402

TINY = ROOT / "checkpoints" / "tiny"
SIDE, RATE = 224, 2
OPTIONS = {"fps": 1, "max_pixels_per_frame": SIDE * SIDE, "max_total_tokens": 1 << 40}
QUESTION = "Which shape is shown first?"


def make_film(path: Path, seconds: int) -> None:
    """A minute of noise in blocks of 28 pixels, encoded once and repeated."""
    random, minute = np.random.default_rng(0), path.with_name("minute.mp4")
    with av.open(str(minute), "w") as container:
        stream = container.add_stream("libx264", rate=RATE, options={"preset": "ultrafast", "g": "20"})
        stream.width, stream.height, stream.pix_fmt = SIDE, SIDE, "yuv420p"
        for _ in range(60 * RATE):
            blocks = random.integers(0, 256, (SIDE // 28, SIDE // 28, 3), dtype=np.uint8)
            picture = blocks.repeat(28, 0).repeat(28, 1)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode())
    with av.open(str(path), "w") as target:
        copy = None
        for turn in range(-(-seconds // 60)):
            with av.open(str(minute)) as source:
                stream = source.streams.video[0]
                copy = copy or target.add_stream_from_template(stream)
                for packet in source.demux(stream):
                    if packet.dts is not None:
                        shift = round(60 * turn / stream.time_base)
                        packet.pts, packet.dts, packet.stream = packet.pts + shift, packet.dts + shift, copy
                        if float(packet.pts * stream.time_base) < seconds:
                            target.mux(packet)
    minute.unlink()


def load(model: str):
    """The small checkpoint or the random layer, and the small checkpoint's processor.

    Both in float32: many CPUs have no instructions for bfloat16, which takes them longer.
    """
    processor = VideoNSAProcessor.from_pretrained(TINY, trust_remote_code=True)
    if model == "small":
        loaded = VideoNSAForConditionalGeneration.from_pretrained(TINY, dtype=torch.float32, trust_remote_code=True)
        return loaded, processor
    tiny, config = json.loads((TINY / "config.json").read_text()), published_config("7B")
    config |= {name: value for name, value in tiny.items() if name.endswith("_token_id")}
    config |= {name: tiny["text_config"][name] for name in ("vocab_size", "bos_token_id", "eos_token_id")}
    config |= {"num_hidden_layers": 1, "max_window_layers": 1, "model_type": "videonsa"}
    config["vision_config"] |= {"depth": 1, "fullatt_block_indexes": [0]}
    torch.manual_seed(0)
    return VideoNSAForConditionalGeneration(VideoNSAConfig.from_dict(config)).eval(), processor


def status(name: str) -> int:
    """Bytes, of this process."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))


def timed(function) -> tuple:
    """(result, {"wall_s", "cpu_s"})"""
    wall, cpu = time.perf_counter(), time.process_time()
    result = function()
    return result, {"wall_s": round(time.perf_counter() - wall, 2), "cpu_s": round(time.process_time() - cpu, 2)}


def measure_memory(model, processor, film: str) -> dict:
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    before = status("VmRSS")
    reading, seconds = timed(lambda: model.read(processor, film, **OPTIONS))
    peak, memory = status("VmHWM") - before, reading.plan.memory
    return {
        "tokens": reading.num_tokens,
        **seconds,
        "peak_above_model": peak,
        "cache_bytes": memory.cache,
        "peak_above_model_and_cache": peak - memory.cache,
        "working_by_arithmetic": memory.working,
        "weights": memory.weights,
    }


def measure_overlap(model, processor, film: str) -> dict:
    """Reading; decoding and cutting patches alone; the model alone, on one prepared piece again and again."""
    prompt = prompt_videonsa.Prompt(model, processor, film, 1024, OPTIONS)
    pieces, decoding = timed(lambda: sum(1 for _ in prompt.pieces()))
    _, both = timed(lambda: model.read(processor, film, **OPTIONS))
    piece, usual = next(prompt.pieces()), prompt_videonsa.Prompt.pieces
    prompt_videonsa.Prompt.pieces = lambda self: (piece for _ in itertools.repeat(None, pieces + 1))
    try:
        _, alone = timed(lambda: model.read(processor, film, **OPTIONS))
    finally:
        prompt_videonsa.Prompt.pieces = usual
    return {"decoding_alone": decoding, "model_alone": alone, "overlapped": both}


def measure_questions(model, processor, film: str) -> dict:
    """The first question, reading included, and the second, of eight new tokens each."""
    reading, read = timed(lambda: model.read(processor, film, **OPTIONS))
    _, first = timed(lambda: reading.ask(QUESTION, max_new_tokens=8))
    _, second = timed(lambda: reading.ask(QUESTION, max_new_tokens=8))
    whole = read["wall_s"] + first["wall_s"]
    return {"tokens": reading.num_tokens, "read": read, "first_question": first, "second_question": second} | {
        "second_over_first": round(second["wall_s"] / whole, 4)
    }


MEASURES = {"memory": measure_memory, "overlap": measure_overlap, "questions": measure_questions}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=int, nargs="*", default=[10, 60, 180], help="for the small checkpoint")
    parser.add_argument("--layer-minutes", type=int, nargs="*", default=[10], help="for the layer in the 7B's shape")
    parser.add_argument("--measures", nargs="+", choices=MEASURES, default=list(MEASURES))
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--measure", nargs=3, metavar=("MEASURE", "MODEL", "FILE"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if arguments.measure:
        measure, model, film = arguments.measure
        print(json.dumps(MEASURES[measure](*load(model), film)))
        return
    rows = [("overlap", "small", 600), ("questions", "small", 512)]
    rows += [("memory", "small", 60 * minutes) for minutes in arguments.minutes]
    rows += [("memory", "layer", 60 * minutes) for minutes in arguments.layer_minutes]
    rows = [row for row in rows if row[0] in arguments.measures]
    results = {
        "date": datetime.date.today().isoformat(),
        "command": " ".join(["python", "benchmarks/bench_long_video.py", *sys.argv[1:]]),
        "environment": {name: value for name, value in os.environ.items() if name.startswith(("OMP_", "MALLOC_"))},
        "machine": describe_cpu("torch", "transformers", "av"),
        "threads": arguments.threads,
        "rows": [],
    }
    with tempfile.TemporaryDirectory() as folder:
        for measure, model, seconds in tqdm(rows, desc="Rows", disable=None):
            film = Path(folder) / f"{seconds}.mp4"
            if not film.exists():
                make_film(film, seconds)
            own = [
                sys.executable,
                __file__,
                "--threads",
                str(arguments.threads),
                "--measure",
                measure,
                model,
                str(film),
            ]
            load_before = os.getloadavg()[0]
            done = subprocess.run(own, stdout=subprocess.PIPE, text=True)  # its progress bar shows
            row = json.loads(done.stdout.splitlines()[-1]) if done.returncode == 0 else {"failed": done.returncode}
            results["rows"].append({"measure": measure, "model": model, "seconds": seconds, "load": load_before} | row)
            print(results["rows"][-1], flush=True)
            if arguments.output:
                arguments.output.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
