"""Qwen2.5-VL -> VideoNSA: keys, bytes, dtypes, shards, gates, and the files beside the weights."""

import json
import re
import shutil
import sys
from pathlib import Path

import pytest
import torch
from hub_client import align
from published_sizes import PUBLISHED, published_config
from safetensors.torch import load_file, save_file
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

import convert_weights
from checkpoints import (
    load_all,
    new_name,
    raw,
    snapshot,
    write_hollow_shards,
    write_sharded,
)
from conversion import safetensors_io
from conversion.plan import Options
from conversion.safetensors_io import PlannedTensor, parse_size, read_headers, write_tensors
from convert_weights import build_config, convert, expected_shapes, plan_tensors
from modeling_videonsa import VideoNSAForConditionalGeneration
from processing_videonsa import VideoNSAProcessor

ROOT = Path(convert_weights.__file__).parent
GATES = re.compile(r"\.self_attn\.g_proj_[12]\.(weight|bias)$")


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
    bits[:3] = torch.tensor([-0x8000, 0x0001, 0x7F7F], dtype=torch.int16)  # -0, a denormal, the largest number
    write_sharded(source, [tensors])
    after = load_all(convert(source, tmp_path / "out", max_shard_size="40KB"))
    assert all(raw(tensor) == raw(after[new_name(key)]) for key, tensor in tensors.items())


def test_every_tensor_is_aligned_to_its_element(tmp_path):
    shapes = {"odd": (torch.float16, (3,)), "wide": (torch.float32, (2, 2)), "none": (torch.bfloat16, (0, 4))}
    tensors = [PlannedTensor(name, dtype, shape, None, tmp_path) for name, (dtype, shape) in shapes.items()]
    file = tmp_path / "model.safetensors"
    write_tensors(file, tensors, lambda tensor: [bytes(tensor.nbytes)] * bool(tensor.nbytes), lambda size: None)
    assert all(t.start % t.dtype.itemsize == 0 for t in read_headers(tmp_path).values())
    assert {name: (t.dtype, tuple(t.shape)) for name, t in load_file(file).items()} == shapes


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

    ours = build_config(tmp_path, "qwen2_5_vl", Options())
    plan, dropped = plan_tensors(read_headers(tmp_path), expected_shapes(ours), new_gates=True)
    assert not dropped
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
    model = align(VideoNSAForConditionalGeneration.from_pretrained(folder).eval())
    qwen = align(Qwen2_5_VLForConditionalGeneration.from_pretrained(pristine["old"]).eval())
    inputs = {key: x.float() if x.is_floating_point() else x for key, x in prompts.one([("video", 5, 8, 8), 6]).items()}
    inputs["position_ids"] = model.model.get_rope_index(**inputs)[0]
    with torch.no_grad():
        model.config.nsa_mode = "dense"
        assert torch.equal(model(**inputs).logits, qwen(**inputs).logits)
        # In float64, where rounding is far below any other difference.
        model.config.nsa_mode = "sparse"
        inputs["pixel_values_videos"] = inputs["pixel_values_videos"].double()
        source, sparse = qwen.double()(**inputs).logits, model.double()(**inputs).logits
        model.config.block_counts = 1
        assert (model(**inputs).logits - source).abs().max() > 1e-3  # it was sparse attention
    torch.testing.assert_close(sparse, source, atol=1e-9, rtol=1e-9)


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


def test_shards_are_those_of_the_source_where_no_size_is_asked_for(pristine, tmp_path):
    """Gates lie beside their layer's projections, and files have the names that transformers gives."""
    before = {file.name: set(load_file(file)) for file in pristine["new sharded"].glob("*.safetensors")}
    folder = convert(pristine["new sharded"], tmp_path / "out")
    after = {file.name: set(load_file(file)) for file in folder.glob("*.safetensors")}
    assert len(before) > 5 and before.keys() == after.keys()
    for name, keys in after.items():
        assert {key for key in keys if not GATES.search(key)} == before[name]
        for key in keys - before[name]:
            assert f"{key.partition('.g_proj')[0]}.q_proj.weight" in keys
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    assert index["weight_map"] == {key: name for name, keys in after.items() for key in keys}
    assert "model.safetensors" in snapshot(convert(pristine["old"], tmp_path / "single"))


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
    made = {"README.md", "config.json", "processor_config.json", "model.safetensors"}
    assert files.keys() == code | carried | made
    assert "the card of another model" not in files["README.md"].decode()
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


def test_command_line(pristine, tmp_path, monkeypatch, capsys):
    arguments = [str(pristine["old"]), str(tmp_path / "out"), "--gate-init", "selection", "--dtype", "bfloat16"]
    monkeypatch.setattr(sys, "argv", ["convert_weights.py", *arguments, "--seed", "5", "--max-shard-size", "100KB"])
    convert_weights.main()
    assert capsys.readouterr().out == f"{tmp_path / 'out'}\n"
    expected = {"gate_init": "selection", "dtype": "bfloat16", "seed": 5, "max_shard_size": "100KB"}
    assert weights(tmp_path / "out") == weights(convert(pristine["old"], tmp_path / "same", **expected))
    with pytest.raises(SystemExit, match=r"^convert_weights\.py: error: `output` .* exists"):
        convert_weights.main()
    monkeypatch.setattr(sys, "argv", ["convert_weights.py", *arguments[:2], "--overwrite"])
    convert_weights.main()
    assert weights(tmp_path / "out") == weights(convert(pristine["old"], tmp_path / "plain"))


def weights(folder: Path) -> dict[str, bytes]:
    return {name: data for name, data in snapshot(folder).items() if "safetensors" in name}


def test_dry_run(pristine, tmp_path, capsys):
    """Every tensor, every shard, every size; and nothing written."""
    asked = {"dtype": "bfloat16", "max_shard_size": "60KB"}
    convert(pristine["old"], tmp_path / "out", dry_run=True, **asked)
    printed = capsys.readouterr().out
    assert not list(tmp_path.iterdir())

    folder = convert(pristine["old"], tmp_path / "out", **asked)
    shards = {file.name: load_file(file) for file in folder.glob("*.safetensors")}
    assert f"Shards  {len(shards)}\n" in printed
    for name, tensors in shards.items():
        size = sum(tensor.nbytes for tensor in tensors.values())
        assert re.search(rf"^{name}  {size / 1000:.1f} kB  {len(tensors)} tensors$", printed, re.MULTILINE), name
        for key, tensor in tensors.items():
            line = next(line for line in printed.splitlines() if line.startswith(f"  {key}  "))
            assert str(list(tensor.shape)) in line
            assert line.endswith("new") if GATES.search(key) else "F32->BF16" in line
    assert "  from visual.patch_embed.proj.weight" in printed
    for name in snapshot(folder).keys() - shards.keys() - {"model.safetensors.index.json"}:
        assert name in printed


def test_progress_tells_rate_and_remaining_time(pristine, tmp_path, capsys):
    convert(pristine["new sharded"], tmp_path / "out", progress=True)
    shown = capsys.readouterr().err
    assert re.search(r"Writing out: +\d+%.* \d+k/\d+k \[\d\d:\d\d<\d\d:\d\d, .*B/s\]", shown), shown
    assert "100%" in shown
    convert(pristine["old"], tmp_path / "silent")
    assert "Writing" not in capsys.readouterr().err
