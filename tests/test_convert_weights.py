"""convert_weights: keys, bytes, gates, refusals, and what is left on the disk when it is stopped."""

import errno
import json
import os
import re
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from fake_hub import FakeHub
from filelock import FileLock
from safetensors.torch import load_file, save_file
from tiny_checkpoint import save_tiny_qwen2_5_vl
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

import convert_weights
from conversion import safetensors_io
from conversion.safetensors_io import read_headers
from convert_weights import convert, expected_shapes, parse_size, plan_tensors
from modeling_videonsa import VideoNSAForConditionalGeneration
from processing_videonsa import VideoNSAProcessor

ROOT = Path(convert_weights.__file__).parent
GATES = re.compile(r"\.self_attn\.g_proj_[12]\.(weight|bias)$")

# The fields of the published configurations that decide the tensors, and the size of the published bf16 weights
# where known.
PUBLISHED = {
    "3B": {"hidden_size": 2048, "intermediate_size": 11008, "num_hidden_layers": 36, "num_attention_heads": 16}
    | {"num_key_value_heads": 2, "vocab_size": 151936, "tie_word_embeddings": True, "bytes": 7509245952},
    "7B": {"hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28, "num_attention_heads": 28}
    | {"num_key_value_heads": 4, "vocab_size": 152064, "tie_word_embeddings": False, "bytes": 16584333312},
    "32B": {"hidden_size": 5120, "intermediate_size": 27648, "num_hidden_layers": 64, "num_attention_heads": 40}
    | {"num_key_value_heads": 8, "vocab_size": 152064, "tie_word_embeddings": False, "bytes": 66905436672},
    "72B": {"hidden_size": 8192, "intermediate_size": 29568, "num_hidden_layers": 80, "num_attention_heads": 64}
    | {"num_key_value_heads": 8, "vocab_size": 152064, "tie_word_embeddings": False, "bytes": None},
}


def published_config(size: str) -> dict:
    """A flat config.json as on the Hub."""
    text = {key: value for key, value in PUBLISHED[size].items() if key != "bytes"}
    vision = {
        "depth": 32,
        "fullatt_block_indexes": [7, 15, 23, 31],
        "hidden_act": "silu",
        "hidden_size": 1280,
        "in_chans": 3,
        "intermediate_size": 3456 if size in ("32B", "72B") else 3420,
        "num_heads": 16,
        "out_hidden_size": text["hidden_size"],
        "patch_size": 14,
        "spatial_merge_size": 2,
        "spatial_patch_size": 14,
        "temporal_patch_size": 2,
        "tokens_per_second": 2,
        "window_size": 112,
    }
    return text | {
        "architectures": ["Qwen2_5_VLForConditionalGeneration"],
        "attention_dropout": 0.0,
        "bos_token_id": 151643,
        "eos_token_id": 151645,
        "hidden_act": "silu",
        "image_token_id": 151655,
        "initializer_range": 0.02,
        "max_position_embeddings": 128000,
        "max_window_layers": text["num_hidden_layers"],
        "model_type": "qwen2_5_vl",
        "rms_norm_eps": 1e-06,
        "rope_scaling": {"mrope_section": [16, 24, 24], "type": "mrope"},
        "rope_theta": 1000000.0,
        "sliding_window": 32768,
        "torch_dtype": "bfloat16",
        "transformers_version": "4.41.2",
        "use_cache": True,
        "use_sliding_window": False,
        "video_token_id": 151656,
        "vision_config": vision,
        "vision_end_token_id": 151653,
        "vision_start_token_id": 151652,
        "vision_token_id": 151654,
    }


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


@pytest.fixture(scope="session")
def pristine(tmp_path_factory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("qwen")
    return {
        "old": save_tiny_qwen2_5_vl(root / "old", layout="old"),
        "old tied": save_tiny_qwen2_5_vl(root / "old_tied", layout="old", tie_word_embeddings=True),
        "new": save_tiny_qwen2_5_vl(root / "new"),
        "new sharded": save_tiny_qwen2_5_vl(root / "new_sharded", max_shard_size="100KB"),
        "new tied": save_tiny_qwen2_5_vl(root / "new_tied", tie_word_embeddings=True),
    }


@pytest.fixture
def source(pristine, tmp_path) -> Path:
    """A sharded checkpoint that a test may damage."""
    return Path(shutil.copytree(pristine["new sharded"], tmp_path / "source"))


def new_name(key: str) -> str:
    """The name in the result, stated independently of the converter's table."""
    if key.startswith(("lm_head.", "model.language_model.", "model.visual.")):
        return key
    return f"model.{key}" if key.startswith("visual.") else key.replace("model.", "model.language_model.", 1)


@pytest.mark.parametrize("kind", ["old", "old tied", "new", "new sharded", "new tied"])
def test_result_is_the_model_that_transformers_saves(kind, pristine, tmp_path):
    folder = convert(pristine[kind], tmp_path / "out", max_shard_size="150KB")
    model, info = VideoNSAForConditionalGeneration.from_pretrained(folder, output_loading_info=True)
    assert not any(info.values()), info
    model.save_pretrained(tmp_path / "saved")

    ours, theirs = load_all(folder), load_all(tmp_path / "saved")
    assert ours.keys() == theirs.keys()
    assert all(raw(ours[key]) == raw(theirs[key]) for key in ours)
    assert ("lm_head.weight" in ours) == ("tied" not in kind)
    config, saved_config = (json.loads((f / "config.json").read_text()) for f in (folder, tmp_path / "saved"))
    assert config == saved_config


@pytest.mark.parametrize("kind", ["old", "old tied", "new sharded"])
def test_every_source_tensor_arrives_bit_by_bit(kind, pristine, tmp_path):
    before, after = load_all(pristine[kind]), load_all(convert(pristine[kind], tmp_path / "out"))
    assert {new_name(key) for key in before} == {key for key in after if not GATES.search(key)}
    for key, tensor in before.items():
        assert tensor.dtype == after[new_name(key)].dtype
        assert raw(tensor) == raw(after[new_name(key)]), key


def test_mixed_dtypes_and_odd_bit_patterns_survive(pristine, tmp_path):
    source = Path(shutil.copytree(pristine["old"], tmp_path / "source"))
    tensors = {
        key: t.to((torch.bfloat16, torch.float16, t.dtype)[i % 3])
        for i, (key, t) in enumerate(load_all(source).items())
    }
    key = next(key for key, tensor in tensors.items() if tensor.dtype == torch.bfloat16)
    bits = tensors[key].view(torch.int16).view(-1)
    bits[:4] = torch.tensor(
        [0x7FC1, -0x8000, 0x0001, 0x7F80], dtype=torch.int16
    )  # a NaN with payload, -0, denormal, inf
    write_sharded(source, [tensors])
    after = load_all(convert(source, tmp_path / "out", max_shard_size="40KB"))
    assert all(raw(tensor) == raw(after[new_name(key)]) for key, tensor in tensors.items())


@pytest.mark.parametrize("size", PUBLISHED)
@pytest.mark.parametrize("layout", ["old", "new"])
def test_published_shapes_are_planned_from_headers_alone(size, layout, tmp_path):
    config = published_config(size)
    (tmp_path / "config.json").write_text(json.dumps(config))
    with torch.device("meta"):
        model = Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig.from_dict(dict(config)))
    shapes = {key: list(tensor.shape) for key, tensor in model.state_dict().items()}
    if config["tie_word_embeddings"]:
        del shapes["lm_head.weight"]
    if layout == "old":
        shapes = {
            key.replace("model.visual.", "visual.").replace("model.language_model.", "model."): shape
            for key, shape in shapes.items()
        }
    write_hollow_shards(tmp_path, shapes, shards=5)

    ours = convert_weights.build_config(tmp_path)
    plan = plan_tensors(read_headers(tmp_path), expected_shapes(ours))
    copied = [tensor for tensor in plan if tensor.source]
    gates = {tensor.name: tensor.shape for tensor in plan if not tensor.source}
    assert PUBLISHED[size]["bytes"] in (None, sum(tensor.nbytes for tensor in copied))
    assert {tensor.source.key for tensor in copied} == shapes.keys()
    assert all(tensor.name == new_name(tensor.source.key) for tensor in copied)
    assert {tensor.dtype for tensor in plan} == {torch.bfloat16}

    d, heads, layers = (config[key] for key in ("hidden_size", "num_attention_heads", "num_hidden_layers"))
    prefix = "model.language_model.layers.{}.self_attn.g_proj_{}"
    assert gates == {
        f"{prefix.format(layer, number)}.{kind}": (rows,) + ((d,) if kind == "weight" else ())
        for layer in range(layers)
        for number, rows in ((1, d), (2, 3 * heads))
        for kind in ("weight", "bias")
    }
    assert ours.text_config.rope_parameters["mrope_section"] == [16, 24, 24]
    assert (ours.text_config.hidden_size, ours.dtype) == (d, torch.bfloat16)


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


@pytest.mark.parametrize("gate_init, gates", [("half", [0.5, 0.5, 0.5]), ("selection", [0.0, 1.0, 0.0])])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_gates_start_where_they_should(gate_init, gates, dtype, pristine, tmp_path):
    tensors = load_all(convert(pristine["old"], tmp_path / "out", gate_init=gate_init, dtype=dtype))
    prefix = "model.language_model.layers.1.self_attn.g_proj_"
    first, second = ((tensors[f"{prefix}{i}.weight"], tensors[f"{prefix}{i}.bias"]) for i in (1, 2))
    hidden = 5 * torch.randn(7, 64, generator=torch.Generator().manual_seed(1)).to(getattr(torch, dtype))
    logits = torch.nn.functional.linear(torch.nn.functional.gelu(torch.nn.functional.linear(hidden, *first)), *second)
    opened = torch.sigmoid(logits.float().view(7, 4, 3) / 0.3)
    torch.testing.assert_close(opened, torch.tensor(gates).expand(7, 4, 3), rtol=0, atol=1e-43)
    assert (opened[..., 1] == gates[1]).all()

    assert abs(first[0].float().std().item() - 0.02) < 0.002  # the configuration's initializer_range
    assert not first[1].any() and not second[0].any()


def test_logits_are_those_of_the_source(pristine, tmp_path, prompts):
    """Bit by bit in dense mode; within rounding for a short video with the selection gate open, the video first."""
    folder = convert(pristine["old"], tmp_path / "out", gate_init="selection")
    model = VideoNSAForConditionalGeneration.from_pretrained(folder).eval()
    qwen = Qwen2_5_VLForConditionalGeneration.from_pretrained(pristine["old"]).eval()
    inputs = {key: x.float() if x.is_floating_point() else x for key, x in prompts.one([("video", 5, 8, 8), 6]).items()}
    inputs["position_ids"] = model.model.get_rope_index(**inputs)[0]
    with torch.no_grad():
        source, sparse = qwen(**inputs).logits, model(**inputs).logits
        model.config.nsa_mode = "dense"
        assert torch.equal(model(**inputs).logits, source)
    assert not torch.equal(sparse, source)
    torch.testing.assert_close(sparse, source, atol=2e-5, rtol=2e-5)


def test_gates_depend_on_the_seed_and_the_layer_only(pristine, tmp_path):
    key = "model.language_model.layers.{}.self_attn.g_proj_1.weight"
    one, same, other = (
        load_all(convert(pristine[kind], tmp_path / f"out{seed}{size}", seed=seed, max_shard_size=size))
        for kind, seed, size in (("old", 3, "5GB"), ("new sharded", 3, "50KB"), ("old", 4, "5GB"))
    )
    assert torch.equal(one[key.format(0)], same[key.format(0)])
    assert not torch.equal(one[key.format(0)], other[key.format(0)])
    assert not torch.equal(one[key.format(0)], one[key.format(1)])


def test_chunks_do_not_show_in_the_result(pristine, tmp_path, monkeypatch):
    whole = load_all(convert(pristine["old"], tmp_path / "whole", dtype="bfloat16"))
    monkeypatch.setattr(safetensors_io, "CHUNK_BYTES", 1000)  # copies and casts; a gate's random stream is per chunk
    pieces = load_all(convert(pristine["old"], tmp_path / "pieces", dtype="bfloat16"))
    assert all(torch.equal(whole[key], pieces[key]) for key in whole if not key.endswith("g_proj_1.weight"))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_cast(dtype, pristine, tmp_path):
    folder = convert(pristine["old"], tmp_path / "out", dtype=dtype)
    after = load_all(folder)
    assert {tensor.dtype for tensor in after.values()} == {getattr(torch, dtype)}
    for key, tensor in load_all(pristine["old"]).items():
        assert torch.equal(tensor.to(getattr(torch, dtype)), after[new_name(key)])
    assert VideoNSAForConditionalGeneration.from_pretrained(folder).dtype == getattr(torch, dtype)


def test_a_cast_that_overflows_is_refused(pristine, tmp_path):
    source = Path(shutil.copytree(pristine["old"], tmp_path / "source"))
    tensors = load_all(source)
    tensors["visual.blocks.1.mlp.up_proj.weight"][3, 2] = 1e5
    save_file(tensors, source / "model.safetensors")
    with pytest.raises(ValueError, match=r"visual\.blocks\.1\.mlp\.up_proj\.weight.*float16 cannot hold"):
        convert(source, tmp_path / "out", dtype="float16")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source"]


def test_shards_keep_the_limit(pristine, tmp_path):
    folder = convert(pristine["old"], tmp_path / "out", max_shard_size="40KB")
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    shards = {file.name: load_file(file) for file in folder.glob("*.safetensors")}
    assert index["weight_map"] == {key: name for name, tensors in shards.items() for key in tensors}
    sizes = {name: sum(t.nbytes for t in tensors.values()) for name, tensors in shards.items()}
    assert all(size <= 40_000 or len(shards[name]) == 1 for name, size in sizes.items())
    assert index["metadata"]["total_size"] == sum(sizes.values())
    assert index["metadata"]["total_parameters"] == sum(t.numel() for ts in shards.values() for t in ts.values())
    assert sorted(shards) == [f"model-{i:05}-of-{len(shards):05}.safetensors" for i in range(1, len(shards) + 1)]


@pytest.mark.parametrize(
    "size, expected",
    [(1000, 1000), ("1000", 1000), ("5GB", 5 * 10**9), ("2GiB", 2 * 2**30), ("1.5 MB", 1_500_000), ("10kb", 10_000)],
)
def test_parse_size(size, expected):
    assert parse_size(size) == expected


@pytest.mark.parametrize("size", ["", "GB", "5 apples", "-1GB", 0, "0MB", 1.5j, None])
def test_parse_size_refuses(size):
    with pytest.raises(
        ValueError,
        match=re.escape(f"`max_shard_size` must be a positive number of bytes or such as '5GB', got {size!r}"),
    ):
        parse_size(size)


def test_companion_files(pristine, tmp_path):
    source = Path(shutil.copytree(pristine["old"], tmp_path / "source"))
    (source / "LICENSE").write_text("terms")
    (source / "README.md").write_text("the card of another model")
    (source / "pytorch_model.bin").write_bytes(b"pickle")
    folder = convert(source, tmp_path / "out")
    files = snapshot(folder)
    code = {f"nsa_kernels/{path.name}" for path in (ROOT / "nsa_kernels").glob("*.py")}
    code |= {path.name for path in ROOT.glob("*_videonsa.py")}
    carried = {"LICENSE", "chat_template.jinja", "generation_config.json", "tokenizer.json", "tokenizer_config.json"}
    assert files.keys() == code | carried | {"config.json", "processor_config.json", "model.safetensors"}
    assert all(files[name] == (ROOT / name).read_bytes() for name in code)
    assert all(files[name] == (source / name).read_bytes() for name in carried)
    processor = json.loads(files["processor_config.json"])
    assert processor["processor_class"] == "VideoNSAProcessor"
    assert processor["auto_map"] == {"AutoProcessor": "processing_videonsa.VideoNSAProcessor"}


def test_processor_files_of_transformers_4(pristine, tmp_path):
    """The published repositories hold preprocessor_config.json and chat_template.json."""
    source = Path(shutil.copytree(pristine["old"], tmp_path / "source"))
    settings = json.loads((source / "processor_config.json").read_text())["image_processor"]
    settings |= {"processor_class": "Qwen2_5_VLProcessor", "image_processor_type": "Qwen2VLImageProcessor"}
    size = {"shortest_edge": 6272, "longest_edge": 12544}
    (source / "preprocessor_config.json").write_text(json.dumps(settings | {"size": size}))
    (source / "processor_config.json").unlink()
    (source / "chat_template.jinja").unlink()
    (source / "chat_template.json").write_text(json.dumps({"chat_template": "{{ 'tuned' }}"}))
    processor = VideoNSAProcessor.from_pretrained(convert(source, tmp_path / "out"))
    assert dict(processor.image_processor.size) == size
    assert processor.chat_template == "{{ 'tuned' }}"
    assert processor.max_pixels_per_frame == 64 * 28 * 28

    for name in ("preprocessor_config.json", "chat_template.json"):
        (source / name).unlink()
    processor = VideoNSAProcessor.from_pretrained(convert(source, tmp_path / "bare"))
    ours = json.loads((ROOT / "processor_config.json").read_text())
    assert dict(processor.image_processor.size) == ours["image_processor"]["size"]
    assert processor.chat_template == (ROOT / "chat_template.jinja").read_text()


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


NORM = "model.language_model.norm.weight"
DAMAGES = {
    "unknown key": (lambda f: damage_tensors(f, lambda t: t.update(extra=torch.ones(1))), "unknown tensor.*'extra'"),
    "gates already there": (
        lambda f: damage_tensors(f, lambda t: t.update({"model.layers.0.self_attn.g_proj_1.bias": torch.ones(64)})),
        r"unknown tensors.*'model\.layers\.0\.self_attn\.g_proj_1\.bias'",
    ),
    "key of a layer too many": (
        lambda f: damage_tensors(f, lambda t: t.update({"model.layers.2.mlp.up_proj.weight": torch.ones(128, 64)})),
        r"unknown tensors.*'model\.layers\.2\.mlp\.up_proj\.weight'",
    ),
    "missing key": (lambda f: damage_tensors(f, lambda t: t.pop(NORM)), f"lacks '{NORM}'"),
    "the same tensor in both layouts": (
        lambda f: damage_tensors(f, lambda t: t.update({"model.norm.weight": t[NORM].clone()})),
        "are both 'model.language_model.norm.weight'",
    ),
    "wrong shape": (
        lambda f: damage_tensors(f, lambda t: t.update({NORM: torch.ones(63)})),
        rf"'{NORM}' has shape \(63,\), the configuration wants \(64,\)",
    ),
    "integer dtype": (
        lambda f: damage_tensors(f, lambda t: t.update({NORM: torch.ones(64, dtype=torch.int32)})),
        f"'{NORM}' has dtype I32",
    ),
    "missing shard": (lambda f: first_shard(f).unlink(), r"lacks 'model-00001-of-\d+\.safetensors'"),
    "truncated shard": (lambda f: os.truncate(first_shard(f), 5000), r"model-00001-of-\d+\.safetensors is truncated"),
    "shard of 3 bytes": (lambda f: os.truncate(first_shard(f), 3), r"model-00001.*is truncated or not a safetensors"),
    "shard with a tail": (
        lambda f: first_shard(f).open("ab").write(b"x"),
        r"model-00001-of-\d+\.safetensors is truncated or corrupt",
    ),
    "header not JSON": (
        lambda f: first_shard(f).write_bytes((4).to_bytes(8, "little") + b"{{{{"),
        "model-00001.*corrupt safetensors header",
    ),
    "header without shape": (
        lambda f: rewrite_header(
            first_shard(f), lambda h: next(iter(h.values())).pop("shape", h.clear() or h.update(x={}))
        ),
        "model-00001.*corrupt safetensors header",
    ),
    "wrong offsets": (
        lambda f: rewrite_header(first_shard(f), lambda h: list(h.values())[-1].update(shape=[7])),
        "lies at bytes .* and 28 bytes",
    ),
    "index names another shard": (
        lambda f: rewrite_header(first_shard(f), lambda h: h.update({"other": h.popitem()[1]})),
        "holds 'other', which .* places in None",
    ),
    "index lists an absent tensor": (
        lambda f: edit_json(
            f / "model.safetensors.index.json",
            weight_map=json.loads((f / "model.safetensors.index.json").read_text())["weight_map"]
            | {"absent": first_shard(f).name},
        ),
        "lists tensors that their shards do not hold: 'absent'",
    ),
    "index leaves the folder": (
        lambda f: edit_json(f / "model.safetensors.index.json", weight_map={NORM: "../model.safetensors"}),
        r"file names in the same folder, got '\.\./model\.safetensors'",
    ),
    "empty index": (lambda f: (f / "model.safetensors.index.json").write_text("{}"), "`weight_map` must be"),
    "index not JSON": (lambda f: (f / "model.safetensors.index.json").write_text("{"), "index.json is not valid JSON"),
    "index and single file": (lambda f: (f / "model.safetensors").touch(), "holds both"),
    "pickles only": (
        lambda f: [p.rename(p.with_name("pytorch_model.bin")) for p in f.glob("model*")],
        r"holds neither.*pickled weights \('pytorch_model\.bin'\) are not read",
    ),
    "no configuration": (lambda f: (f / "config.json").unlink(), r"lacks config\.json"),
    "configuration is a list": (lambda f: (f / "config.json").write_text("[]"), "must hold a JSON object, got list"),
    "another model": (
        lambda f: edit_json(f / "config.json", model_type="llama"),
        "`model_type` must be 'qwen2_5_vl', got 'llama'",
    ),
    "configuration of a wrong type": (
        lambda f: edit_json(f / "config.json", image_token_id="many"),
        r"config\.json: .*image_token_id",
    ),
    "quantised": (lambda f: edit_json(f / "config.json", quantization_config={"bits": 4}), "`quantization_config`"),
    "tied but different head": (
        lambda f: edit_json(f / "config.json", tie_word_embeddings=True),
        "`tie_word_embeddings` is true but 'lm_head.weight' differs",
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_source_is_refused_before_anything_is_written(damage, source, tmp_path):
    action, message = DAMAGES[damage]
    action(source)
    with pytest.raises(ValueError, match=message):
        convert(source, tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source"]


def test_a_tied_head_that_equals_the_embeddings_is_left_out(pristine, tmp_path):
    source = Path(shutil.copytree(pristine["old tied"], tmp_path / "source"))
    damage_tensors(source, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].clone()}))
    assert (
        load_all(convert(source, tmp_path / "out")).keys()
        == load_all(convert(pristine["old tied"], tmp_path / "plain")).keys()
    )


def test_rotary_buffers_of_old_checkpoints_are_dropped(pristine, tmp_path):
    source = Path(shutil.copytree(pristine["old"], tmp_path / "source"))
    damage_tensors(source, lambda t: t.update({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)}))
    assert not [key for key in load_all(convert(source, tmp_path / "out")) if "inv_freq" in key]


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"gate_init": "open"}, "`gate_init` must be one of half, selection, got 'open'"),
        ({"dtype": "int8"}, "`dtype` must be one of float32, bfloat16, float16, got 'int8'"),
        ({"max_shard_size": "big"}, "`max_shard_size` .* got 'big'"),
        ({"revision": "main"}, "`revision` 'main' is for Hub repositories"),
        ({"source": "./no-such-folder"}, "`source` './no-such-folder' is neither a folder nor the id"),
        ({"source": "no-such-folder"}, "`source` 'no-such-folder' is neither a folder nor the id"),
    ],
    ids=str,
)
def test_wrong_arguments(arguments, message, pristine, tmp_path):
    with pytest.raises(ValueError, match=message):
        convert(**{"source": pristine["old"], "output": tmp_path / "out"} | arguments)
    assert not list(tmp_path.iterdir())


def test_existing_output(pristine, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    convert(pristine["old"], out, seed=1)  # an empty folder is as good as none
    first = snapshot(out)
    with pytest.raises(ValueError, match=r"`output` .*out exists; `overwrite`"):
        convert(pristine["old"], out, seed=2)
    assert snapshot(out) == first
    convert(pristine["old"], out, seed=2, overwrite=True, max_shard_size="100KB")
    assert "model.safetensors" not in snapshot(out)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_overwrite_does_not_eat_what_is_not_a_checkpoint(pristine, tmp_path, monkeypatch):
    (tmp_path / "diary").mkdir()
    (tmp_path / "diary" / "monday.txt").write_text("dear diary")
    with pytest.raises(ValueError, match=r"diary is not a checkpoint folder"):
        convert(pristine["old"], tmp_path / "diary", overwrite=True)
    source = Path(shutil.copytree(pristine["old"], tmp_path / "models" / "source"))
    (tmp_path / "models" / "config.json").write_text("{}")
    for output in (source, tmp_path / "models"):
        with pytest.raises(ValueError, match="holds the source"):
            convert(source, output, overwrite=True)
    shutil.copytree(pristine["old"], tmp_path / "checkout")
    monkeypatch.setattr(convert_weights, "CODE_FOLDER", tmp_path / "checkout" / "code")
    with pytest.raises(ValueError, match="holds the code of VideoNSA"):
        convert(source, tmp_path / "checkout", overwrite=True)
    assert snapshot(tmp_path / "diary") == {"monday.txt": b"dear diary"}
    assert snapshot(source) == snapshot(pristine["old"])


def test_two_processes_do_not_share_an_output(pristine, tmp_path):
    (tmp_path / ".out.partial").mkdir()
    with FileLock(tmp_path / ".out.partial" / ".lock"), pytest.raises(ValueError, match="being written by another"):
        convert(pristine["old"], tmp_path / "out")
    convert(pristine["old"], tmp_path / "out")


def test_full_disk(pristine, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(convert_weights.shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**6, 10**6, 1000))
        with pytest.raises(ValueError, match=r"needs [\d,]+ bytes, its disk has 1,000 free"):
            convert(pristine["old"], tmp_path / "out")
    assert not list(tmp_path.iterdir())

    convert(pristine["old"], tmp_path / "out", seed=1)
    before = snapshot(tmp_path / "out")
    calls = []

    def fsync(descriptor, real=os.fsync):
        calls.append(descriptor)
        if len(calls) == 3:
            raise OSError(errno.ENOSPC, "No space left on device")
        real(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(OSError, match="No space left"):
        convert(pristine["old"], tmp_path / "out", seed=2, overwrite=True, max_shard_size="40KB")
    assert snapshot(tmp_path / "out") == before
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def run_python(code: str, *arguments: object, **environment: str) -> str:
    """Run `code` in a fresh interpreter with the repository on its path; its standard output."""
    paths = os.pathsep.join(path for path in sys.path if path)
    result = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code), *map(str, arguments)],
        env=os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1"} | environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def test_killed_at_any_moment_it_leaves_nothing_that_looks_whole(pristine, tmp_path):
    """SIGKILL before each file system call and each written piece, onto nothing and onto an older checkpoint."""
    out = run_python(KILL_DRIVER, pristine["new sharded"], tmp_path)
    fresh, overwriting = map(int, out.split())
    assert fresh > 60 and overwriting > 70, "too few moments: the driver no longer sees the converter's calls"


# Each child process dies at the n-th event below the sandbox; then the folders are inspected and the run repeated.
KILL_DRIVER = """
    import json, os, signal, shutil, sys
    from pathlib import Path
    import torch
    torch.set_num_threads(1)
    import convert_weights

    source, sandbox = Path(sys.argv[1]), Path(sys.argv[2])
    os.fsync = lambda descriptor: None  # a killed process loses nothing that it has handed to the system
    CALLS = {"open", "os.mkdir", "os.rename", "os.remove", "os.rmdir"}

    def snapshot(folder):
        return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}

    def looks_whole(folder):
        try:
            return bool(json.loads((folder / "config.json").read_text()))
        except (OSError, ValueError):
            return False

    def run(output, seed, overwrite, die_at=None):
        child = os.fork()
        if child == 0:
            events = pieces = 0

            def event(name, arguments):
                nonlocal events
                if name in CALLS and str(sandbox) in str(arguments[0]):
                    events += 1
                    if events == die_at:
                        os.kill(os.getpid(), signal.SIGKILL)

            class Bar(convert_weights.tqdm):
                def update(self, n=1):
                    nonlocal pieces
                    pieces += 1
                    if pieces % 8 == 0:
                        event("open", [sandbox])

            convert_weights.tqdm = Bar
            sys.addaudithook(event)
            try:
                convert_weights.convert(source, output, seed=seed, overwrite=overwrite, max_shard_size="100KB")
            except BaseException:
                import traceback
                traceback.print_exc()
                os._exit(1)
            os._exit(0)
        return os.waitpid(child, 0)[1]

    def check(output, allowed):
        for folder in sandbox.iterdir():
            if looks_whole(folder):
                found = snapshot(folder)
                found.pop(".lock", None)
                assert found in allowed, (folder, sorted(found))
        assert output.exists() or len(allowed) == 1 or (sandbox / f".{output.name}.replaced").exists()

    reference, older = {}, sandbox.parent / (sandbox.name + "-older")
    for seed in (2, 1):
        convert_weights.convert(source, older, seed=seed, max_shard_size="100KB", overwrite=True)
        reference[seed] = snapshot(older)
    assert reference[1] != reference[2]

    # Planning writes nothing: done once, so that the children get to the writing at once.
    config = convert_weights.build_config(source)
    shapes, carried = convert_weights.expected_shapes(config), convert_weights._carried_files(source)
    convert_weights.build_config = lambda folder, dtype=None: config
    convert_weights.expected_shapes = lambda config: shapes
    convert_weights._carried_files = lambda folder: carried

    output = sandbox / "out"
    for overwrite in (False, True):
        moment = 0
        while True:
            moment += 1
            if overwrite:
                shutil.rmtree(output, ignore_errors=True)
                shutil.copytree(older, output)
            status = run(output, 2, overwrite, die_at=moment)
            check(output, [reference[2]] + [reference[1]] * overwrite)
            if status == 0:
                break
            assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL, status
            done = output.exists() and snapshot(output) == reference[2]
            assert run(output, 2, overwrite or done) == 0
            assert snapshot(output) == reference[2]
            assert [p.name for p in sandbox.iterdir()] == ["out"], list(sandbox.iterdir())
            if not overwrite:
                shutil.rmtree(output)
        print(moment - 1)
        assert snapshot(output) == reference[2]
"""


def test_memory_is_bounded_by_chunks(tmp_path):
    """A checkpoint of 400 MB whose largest tensor has 64 MB, copied and cast into a single shard."""
    save_tiny_qwen2_5_vl(
        tmp_path / "source",
        max_shard_size="16MB",
        vocab_size=31250,
        hidden_size=512,
        intermediate_size=8192,
        num_hidden_layers=5,
        num_attention_heads=8,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6, "mrope_section": [8, 12, 12]},
    )
    shards = list((tmp_path / "source").glob("*.safetensors"))
    assert len(shards) >= 16 and sum(path.stat().st_size for path in shards) > 300e6
    grown = run_python(
        """
        import resource, sys
        import convert_weights

        def peak():
            return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

        # Imports, the configuration and the model on the meta device cost the same for every checkpoint.
        source, plain, cast = sys.argv[1:]
        convert_weights.expected_shapes(convert_weights.build_config(convert_weights.Path(source)))
        before = peak()
        convert_weights.convert(source, plain)
        convert_weights.convert(source, cast, dtype="bfloat16")
        print(peak() - before)
        """,
        tmp_path / "source",
        tmp_path / "plain",
        tmp_path / "cast",
    )
    assert (tmp_path / "plain" / "model.safetensors").stat().st_size > 300e6
    assert int(grown) < 64e6


def test_command_line(pristine, tmp_path, monkeypatch, capsys):
    arguments = [str(pristine["old"]), str(tmp_path / "out"), "--gate-init", "selection", "--dtype", "bfloat16"]
    monkeypatch.setattr(sys, "argv", ["convert_weights.py", *arguments, "--seed", "5", "--max-shard-size", "100KB"])
    convert_weights.main()
    assert capsys.readouterr().out == f"{tmp_path / 'out'}\n"
    expected = {"gate_init": "selection", "dtype": "bfloat16", "seed": 5, "max_shard_size": "100KB"}
    assert snapshot(tmp_path / "out") == snapshot(convert(pristine["old"], tmp_path / "same", **expected))
    with pytest.raises(SystemExit, match=r"^convert_weights\.py: error: `output` .* exists"):
        convert_weights.main()
    monkeypatch.setattr(sys, "argv", ["convert_weights.py", *arguments[:2], "--overwrite"])
    convert_weights.main()
    assert snapshot(tmp_path / "out") == snapshot(convert(pristine["old"], tmp_path / "plain"))


def test_hub_source(pristine, tmp_path):
    """By id, at main and at a pinned older commit; pickles and foreign files are not fetched."""
    hub = FakeHub().start()
    folder = Path(shutil.copytree(pristine["old"], tmp_path / "repo"))
    (folder / "pytorch_model.bin").write_bytes(b"pickle")
    old = hub.seed("org/Qwen", folder)
    tensors = load_all(folder)
    tensors["model.norm.weight"] += 1
    save_file(tensors, folder / "model.safetensors")
    hub.seed("org/Qwen", folder)
    for path in folder.glob("model*"):
        path.unlink()
    hub.seed("org/Pickled", folder)
    run_python(
        """
        import sys
        from pathlib import Path
        from convert_weights import convert

        out, old = Path(sys.argv[1]), sys.argv[2]
        convert("org/Qwen", out / "main")
        convert("org/Qwen", out / "pinned", revision=old)
        for source, revision, message in (
            ("org/Absent", None, "`source` 'org/Absent' is neither a folder nor a repository on the Hub"),
            ("org/Qwen", "v9", "`revision` 'v9' does not exist in 'org/Qwen'"),
            ("org/Pickled", None, "save them as safetensors first"),
        ):
            try:
                convert(source, out / "failed", revision=revision)
            except ValueError as error:
                assert message in str(error), error
            else:
                raise AssertionError(source)
        """,
        tmp_path / "out",
        old,
        **hub.environment(tmp_path / "cache"),
    )
    hub.stop()
    assert not [path for _, path, _ in hub.requests if "pytorch_model" in path]
    assert snapshot(tmp_path / "out" / "pinned") == snapshot(convert(pristine["old"], tmp_path / "local"))
    norm = load_all(tmp_path / "out" / "main")["model.language_model.norm.weight"]
    assert torch.equal(norm, tensors["model.norm.weight"])
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["main", "pinned"]
