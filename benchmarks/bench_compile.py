"""What torch.compile costs: seconds and graphs of VideoNSA and of Qwen2.5-VL of the same size, on the same video.

    python benchmarks/bench_compile.py --output benchmarks/results/<date>_compile.json

Takes the small checkpoint (checkpoints/tiny) and demo/scene.mp4; Qwen2.5-VL gets the same sizes with random weights,
which a compiler does not look at. Compiles the whole model and the text model alone, for a forward pass and for
training (forward and backward), with the backends "eager", which is Dynamo's part alone, and "inductor". Three prompts
of different lengths follow one another: the first compiles, the second compiles for any length, the third hardly
anything.

Every measurement is a process of its own without compilers' caches on the disk. `cpu_seconds` count the C++ compiler
too, and are what to look at on a machine that does other work.
"""

import argparse
import datetime
import json
import os
import platform
import resource
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
TINY = ROOT / "checkpoints" / "tiny"
# Which part is compiled, whether it is trained, and the backend.
CASES = [
    ("model", "forward", "eager"),
    ("text model", "forward", "eager"),
    ("text model", "training", "eager"),
    ("model", "forward", "inductor"),
    ("text model", "forward", "inductor"),
    ("text model", "training", "inductor"),
]
FRAMES = (8, 12, 16)


def build(name: str):
    """ "videonsa" or "qwen2_5_vl", of one size."""
    import torch
    from transformers import AutoModel, Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    if name == "videonsa":
        return AutoModel.from_pretrained(TINY, trust_remote_code=True, dtype=torch.float32)
    fields = json.loads((TINY / "config.json").read_text())
    for part in (fields, fields["text_config"], fields["vision_config"]):
        for field in ("model_type", "architectures", "auto_map", "transformers_version"):
            part.pop(field, None)
    config = Qwen2_5_VLConfig(**fields)
    config._attn_implementation = "sdpa"
    return Qwen2_5_VLForConditionalGeneration(config).eval()


def make_prompts() -> list[dict]:
    from transformers import AutoProcessor

    processor = AutoProcessor.from_pretrained(TINY, trust_remote_code=True)
    prompts = []
    for frames in FRAMES:
        content = [
            {"type": "video", "video": str(ROOT / "demo" / "scene.mp4"), "num_frames": frames},
            {"type": "text", "text": "Which way does the ball move?" + " Say it." * (frames // 4)},
        ]
        options = {"tokenize": True, "add_generation_prompt": True, "return_dict": True, "return_tensors": "pt"}
        prompts.append(dict(processor.apply_chat_template([{"role": "user", "content": content}], **options)))
    return prompts


def cpu_seconds() -> float:
    usages = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


def measure(name: str, part: str, mode: str, backend: str) -> dict:
    import torch
    from torch._dynamo.testing import CompileCounterWithBackend

    torch.set_num_threads(1)
    torch.manual_seed(0)
    model, prompts = build(name), make_prompts()
    counter = CompileCounterWithBackend(backend)
    if part == "model":
        call = torch.compile(model, backend=counter)
    else:
        text_model, call = model.model.language_model, model
        text_model.forward = torch.compile(text_model.forward, backend=counter, fullgraph=True)
    result = {"tokens": [], "seconds": [], "cpu_seconds": [], "graphs": [], "nodes": []}
    for prompt in prompts:
        before, wall, cpu = len(counter.graphs), time.perf_counter(), cpu_seconds()
        if mode == "training":
            call(**prompt, labels=prompt["input_ids"]).loss.backward()
        else:
            with torch.no_grad():
                call(**prompt)
        result["tokens"].append(prompt["input_ids"].shape[1])
        result["seconds"].append(round(time.perf_counter() - wall, 2))
        result["cpu_seconds"].append(round(cpu_seconds() - cpu, 2))
        new = counter.graphs[before:]
        result["graphs"].append(len(new))
        result["nodes"].append(sum(node.op.startswith("call") for graph in new for node in graph.graph.nodes))
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description="Compile times and graphs of VideoNSA and of Qwen2.5-VL.")
    parser.add_argument("--output", type=Path, help="JSON file to write")
    parser.add_argument("--one", nargs=4, metavar=("MODEL", "PART", "MODE", "BACKEND"), help="measure this only")
    arguments = parser.parse_args()
    if arguments.one:
        print(json.dumps(measure(*arguments.one)))
        return
    import torch
    import transformers
    from bench_cpu import cpu_model

    report = {
        "date": datetime.date.today().isoformat(),
        "command": "python benchmarks/bench_compile.py" + (f" --output {arguments.output}" if arguments.output else ""),
        "cpu": cpu_model(),
        "cores": os.cpu_count(),
        "threads": 1,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
        "load_average_before": os.getloadavg(),
        "cases": [],
    }
    environment = os.environ | {"TORCHINDUCTOR_FORCE_DISABLE_CACHES": "1", "OMP_NUM_THREADS": "1"}
    for case in CASES:
        entry = dict(zip(("part", "mode", "backend"), case, strict=True))
        for name in ("qwen2_5_vl", "videonsa"):
            command = [sys.executable, __file__, "--one", name, *case]
            output = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True).stdout
            entry[name] = json.loads(output.splitlines()[-1])
        stock, ours = (sum(entry[name]["cpu_seconds"]) for name in ("qwen2_5_vl", "videonsa"))
        entry["cpu_seconds_over_qwen2_5_vl"] = round(ours / stock, 2)
        report["cases"].append(entry)
        print(json.dumps(entry), flush=True)
    if arguments.output:
        arguments.output.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
