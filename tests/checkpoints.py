"""Checkpoints for the tests of the converter: how they are read, compared, damaged, and made."""

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from tiny_random import save_tiny_qwen2_5_vl

TESTS = Path(__file__).resolve().parent


def load_all(folder: Path) -> dict[str, torch.Tensor]:
    return {key: tensor for file in folder.glob("*.safetensors") for key, tensor in load_file(file).items()}


def raw(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().view(torch.uint8).numpy().tobytes()


def write_sharded(folder: Path, shards: list[dict[str, torch.Tensor]]) -> None:
    """Replace the weights in `folder`."""
    for file in folder.glob("model*.safetensors*"):
        file.unlink()
    weight_map = {}
    for number, tensors in enumerate(shards, 1):
        name = f"model-{number:05}-of-{len(shards):05}.safetensors"
        save_file(tensors, folder / name, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(tensors, name)
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def snapshot(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def new_name(key: str) -> str:
    """The name in the result, stated independently of the converter's table."""
    if key.startswith(("lm_head.", "model.language_model.", "model.visual.")):
        return key
    return f"model.{key}" if key.startswith("visual.") else key.replace("model.", "model.language_model.", 1)


def write_hollow_shards(folder: Path, shapes: dict[str, list[int]], shards: int) -> None:
    """bf16 shards with true headers and sizes whose data are holes: they take no space on the disk."""
    weight_map = {}
    for number in range(shards):
        name, header, position = f"model-{number}.safetensors", {}, 0
        for key in list(shapes)[number::shards]:
            end = position + 2 * torch.Size(shapes[key]).numel()
            header[key] = {"dtype": "BF16", "shape": shapes[key], "data_offsets": [position, end]}
            position = end
            weight_map[key] = name
        text = json.dumps(header).encode()
        with (folder / name).open("wb") as stream:
            stream.write(len(text).to_bytes(8, "little") + text)
            stream.truncate(8 + len(text) + position)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def rewrite_header(file: Path, change) -> None:
    """Apply `change` to the parsed header of a safetensors file, data untouched."""
    data = file.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    change(header)
    text = json.dumps(header).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :])


def edit_json(file: Path, **changes) -> None:
    values = json.loads(file.read_text()) | changes
    file.write_text(json.dumps({key: value for key, value in values.items() if value is not None}))


def first_shard(folder: Path) -> Path:
    return sorted(folder.glob("*.safetensors"))[0]


def damage_tensors(folder: Path, change) -> None:
    tensors = load_all(folder)
    change(tensors)
    write_sharded(folder, [tensors])


def run_python(code: str, *arguments: object, **environment: str) -> str:
    """Run `code` in a fresh interpreter with the repository on its path; its standard output."""
    # Not this process's sys.path: a test before may have put another cache of remote code on it.
    folders = [TESTS, TESTS.parent, TESTS.parent / "checkpoints", *filter(None, [os.environ.get("PYTHONPATH")])]
    paths = os.pathsep.join(map(str, folders))
    result = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code), *map(str, arguments)],
        env=os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1"} | environment,
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def save_published_videonsa(folder: Path, *, layout: str = "4.51", tied: bool = False) -> Path:
    """A tiny checkpoint as the VideoNSA weights were published, in the head layout of the 7B model (28 and 4).

    Args:
        layout: version of transformers: "4.51" has keys `model.layers.*`, `visual.*` and a flat configuration, "4.53"
            has `model.language_model.*`, `model.visual.*` and a nested one.
        tied: no `lm_head.weight`.
    """
    save_tiny_qwen2_5_vl(
        folder,
        layout="old" if layout == "4.51" else "new",
        tie_word_embeddings=tied,
        hidden_size=224,
        num_attention_heads=28,
        num_key_value_heads=4,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6, "mrope_section": [1, 1, 2]},
    )
    tensors = load_all(folder)
    generator = torch.Generator().manual_seed(1)
    for key in [key for key in tensors if key.endswith("self_attn.q_proj.weight")]:
        prefix = key.removesuffix("q_proj.weight")
        for name, shape in (("g_proj_1", (224, 224)), ("g_proj_2", (84, 224))):
            tensors[f"{prefix}{name}.weight"] = torch.randn(shape, generator=generator) / 15
            tensors[f"{prefix}{name}.bias"] = torch.randn(shape[0], generator=generator) / 15
    names = sorted(tensors)
    write_sharded(folder, [{name: tensors[name] for name in names[start::2]} for start in (0, 1)])
    config = json.loads((folder / "config.json").read_text())
    text = config.pop("text_config")
    rope = text.pop("rope_parameters")
    text |= {"rope_theta": rope["rope_theta"], "rope_scaling": {"type": "mrope", "mrope_section": [1, 1, 2]}}
    config |= {"architectures": ["VideoNSAForConditionalGeneration"], "torch_dtype": config.pop("dtype")}
    config |= text | {"model_type": "qwen2_5_vl"} if layout == "4.51" else {"text_config": text}
    (folder / "config.json").write_text(json.dumps(config))
    return folder
