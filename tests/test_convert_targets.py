"""Every kind of source to every kind of target, there and back, and `verify`."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from hub_client import align
from transformers import (
    AutoConfig,
    AutoModelForImageTextToText,
    AutoProcessor,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLProcessor,
)

import convert_weights
from checkpoints import damage_tensors, edit_json, load_all, new_name, raw, save_published_videonsa, snapshot
from conversion import writing
from convert_weights import convert
from modeling_videonsa import VideoNSAForConditionalGeneration
from processing_videonsa import VideoNSAProcessor

GATES = re.compile(r"\.self_attn\.g_proj_[12]\.(weight|bias)$")
LAYOUTS = ("4.51", "4.53")


@pytest.fixture(scope="session")
def published(tmp_path_factory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("published")
    folders = {layout: save_published_videonsa(root / layout, layout=layout) for layout in LAYOUTS}
    return folders | {"tied": save_published_videonsa(root / "tied", tied=True)}


@pytest.mark.parametrize("kind", ["4.51", "4.53", "tied"])
@pytest.mark.parametrize("variant", [None, "paper"])
def test_published_weights(kind, variant, published, tmp_path):
    """Both layouts are recognised; every tensor arrives, gates included; transformers' own loader agrees."""
    source = published[kind]
    folder = convert(source, tmp_path / "out", variant=variant, verify=True)
    before, after = load_all(source), load_all(folder)
    assert {new_name(key) for key in before} == after.keys()
    assert all(raw(tensor) == raw(after[new_name(key)]) for key, tensor in before.items())
    assert sum(bool(GATES.search(key)) for key in after) == 8
    config = AutoConfig.from_pretrained(folder, trust_remote_code=True)
    assert (config.model_type, config.nsa_variant) == ("videonsa", variant or "released")
    assert (config.block_size, config.block_counts, config.window_size, config.gate_temperature) == (64, 32, 256, 0.3)
    assert config.text_config.rope_parameters["mrope_section"] == [1, 1, 2]
    assert config.conversion["source_kind"] == "published" and "gate_init" not in config.conversion
    model, info = VideoNSAForConditionalGeneration.from_pretrained(folder, output_loading_info=True)
    assert not any(info.values()), info
    assert (model.lm_head.weight is model.model.language_model.embed_tokens.weight) == (kind == "tied")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_settings_in_a_published_configuration_are_kept(layout, published, tmp_path):
    source = Path(shutil.copytree(published[layout], tmp_path / "source"))
    config = json.loads((source / "config.json").read_text())
    (config if layout == "4.51" else config["text_config"]).update(block_counts=16, window_size=128)
    (source / "config.json").write_text(json.dumps(config))
    text = json.loads((convert(source, tmp_path / "out") / "config.json").read_text())["text_config"]
    assert (text["nsa_variant"], text["block_counts"], text["window_size"]) == ("released", 16, 128)


@pytest.mark.parametrize("target", ["videonsa", "qwen2_5_vl"])
def test_a_configuration_both_flat_and_nested(target, published, tmp_path):
    """As transformers 4.52 to 4.56 saved one that had been flat; the nested values are the model's."""
    source = Path(shutil.copytree(published["4.53"], tmp_path / "source"))
    expected = json.loads((convert(source, tmp_path / "nested", target=target) / "config.json").read_text())
    config = json.loads((source / "config.json").read_text())
    stale = config["text_config"] | {"num_hidden_layers": 9, "_name_or_path": "/home/me/Qwen"}
    config = stale | config | {"_attn_implementation_autoset": True}
    for part in ("text_config", "vision_config"):
        config[part]["_name_or_path"] = "/home/me/Qwen"
    (source / "config.json").write_text(json.dumps(config))
    assert json.loads((convert(source, tmp_path / "both", target=target) / "config.json").read_text()) == expected


def test_published_weights_of_another_shape_have_no_released_variant(pristine, tmp_path):
    own = convert(pristine["old"], tmp_path / "own")  # 4 and 2 heads
    edit_json(own / "config.json", model_type="qwen2_5_vl", auto_map=None)
    with pytest.raises(ValueError, match=r"`num_attention_heads` must be 28.*; --variant paper does without"):
        convert(own, tmp_path / "out")
    convert(own, tmp_path / "out", variant="paper")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_damaged_published_weights(layout, published, tmp_path):
    source = Path(shutil.copytree(published[layout], tmp_path / "source"))
    key = next(key for key in load_all(source) if key.endswith("1.self_attn.g_proj_2.bias"))
    damage_tensors(source, lambda tensors: tensors.pop(key))
    with pytest.raises(ValueError, match=f"the source lacks '{new_name(key)}'"):
        convert(source, tmp_path / "out")
    damage_tensors(source, lambda tensors: tensors.update({key: torch.ones(28)}))
    with pytest.raises(ValueError, match=rf"'{key}' has shape \(28,\), the configuration wants \(84,\)"):
        convert(source, tmp_path / "out")
    damage_tensors(source, lambda tensors: [tensors.pop(key) for key in list(tensors) if GATES.search(key)])
    with pytest.raises(ValueError, match=r"the source lacks .*g_proj_1.*and 3 more"):  # its class is VideoNSA's
        convert(source, tmp_path / "out")
    with pytest.raises(ValueError, match="`gate_init` = 'half' is for sources without gates"):
        convert(published[layout], tmp_path / "out", gate_init="half")
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


@pytest.fixture
def own(pristine, tmp_path) -> Path:
    """A VideoNSA checkpoint as training leaves it: settings, gates and processor changed, saved by transformers."""
    model = VideoNSAForConditionalGeneration.from_pretrained(
        convert(pristine["old"], tmp_path / "converted", base_model="org/Qwen"), block_counts=3, window_size=7
    )
    for name, parameter in model.named_parameters():
        if GATES.search(name):
            torch.nn.init.normal_(parameter, std=0.05, generator=torch.Generator().manual_seed(len(name)))
    model.save_pretrained(tmp_path / "own", max_shard_size="200KB")
    processor = VideoNSAProcessor.from_pretrained(
        tmp_path / "converted", trust_remote_code=True, fps=4.0, max_total_tokens=1000
    )
    processor.save_pretrained(tmp_path / "own")
    shutil.rmtree(tmp_path / "converted")
    return tmp_path / "own"


def test_own_checkpoint(own, tmp_path):
    """Settings, processor and shards stay; a cast and another size of shards can be had."""
    folder = convert(own, tmp_path / "same", verify=True)
    before, after = load_all(own), load_all(folder)
    assert before.keys() == after.keys() and all(raw(before[key]) == raw(after[key]) for key in before)
    assert {f.name for f in own.glob("*.safetensors")} == {f.name for f in folder.glob("*.safetensors")}
    config, expected = (json.loads((f / "config.json").read_text()) for f in (folder, own))
    assert config.pop("conversion")["base_model"] == expected.pop("conversion")["base_model"] == "org/Qwen"
    assert config == expected
    processor = VideoNSAProcessor.from_pretrained(folder, trust_remote_code=True)
    assert (processor.fps, processor.max_total_tokens) == (4.0, 1000)

    small = convert(own, tmp_path / "small", dtype="bfloat16", max_shard_size="5GB", verify=True)
    cast = load_all(small)
    assert all(torch.equal(before[key].bfloat16(), cast[key]) for key in before)
    assert "model.safetensors" in snapshot(small)


def test_own_checkpoint_with_its_code_elsewhere(own, tmp_path):
    """A fine-tune whose code lies in another repository becomes one that brings its own."""
    for name in ("config.json", "processor_config.json", "tokenizer_config.json"):
        values = json.loads((own / name).read_text())
        values["auto_map"] = {auto: f"org/Other--{target}" for auto, target in values["auto_map"].items()}
        (own / name).write_text(json.dumps(values))
    folder = convert(own, tmp_path / "out")
    assert not any(b"org/Other" in data for data in snapshot(folder).values())
    assert "modeling_videonsa.py" in snapshot(folder)


def canonical(tensors: dict[str, torch.Tensor]) -> dict[str, bytes]:
    return {new_name(key): raw(tensor) for key, tensor in tensors.items()}


def video_prompt(prompts) -> dict:
    inputs = prompts.one([4, ("video", 6, 8, 8), 5])
    return {key: x.float() if x.is_floating_point() else x for key, x in inputs.items()}


def qwen_logits(folder: Path, inputs: dict) -> torch.Tensor:
    """Through transformers alone."""
    model, info = AutoModelForImageTextToText.from_pretrained(folder, output_loading_info=True)
    assert type(model) is Qwen2_5_VLForConditionalGeneration and not any(info.values()), info
    with torch.no_grad():
        return align(model.eval())(**inputs).logits


@pytest.mark.parametrize("kind", ["old", "old tied", "new sharded"])
def test_there_and_back(kind, pristine, tmp_path, prompts):
    """Qwen2.5-VL -> VideoNSA -> Qwen2.5-VL: every byte of every tensor, the configuration, the files, the logits."""
    source = pristine[kind]
    back = convert(convert(source, tmp_path / "videonsa"), tmp_path / "back", target="qwen2_5_vl", verify=True)
    before, after = load_all(source), load_all(back)
    assert canonical(before) == canonical(after)
    assert not [key for key in after if key.startswith(("model.visual.", "model.language_model."))]
    if kind != "new sharded":
        assert before.keys() == after.keys()  # the published layout
    was, now = (Qwen2_5_VLConfig.from_pretrained(folder).to_dict() for folder in (source, back))
    now.pop("conversion")
    for part in (was, now):
        for values in (part, part["text_config"], part["vision_config"]):
            values.pop("_name_or_path", None)
            values.pop("dtype", None)
    assert now == was
    carried = {"chat_template.jinja", "generation_config.json", "tokenizer.json", "tokenizer_config.json"}
    assert all((back / name).read_bytes() == (source / name).read_bytes() for name in carried)
    processors = [json.loads((folder / "processor_config.json").read_text()) for folder in (source, back)]
    assert processors[0] == processors[1]
    assert not list(back.rglob("*.py")) and "auto_map" not in (back / "config.json").read_text()
    inputs = video_prompt(prompts)
    assert torch.equal(qwen_logits(back, inputs), qwen_logits(source, inputs))


def test_own_checkpoint_to_qwen(own, tmp_path, prompts):
    """The Dense-NSA ablation: VideoNSA's weights under dense attention, for transformers alone."""
    back = convert(own, tmp_path / "back", target="qwen2_5_vl", verify=True)
    kept = {name: data for name, data in canonical(load_all(own)).items() if not GATES.search(name)}
    assert canonical(load_all(back)) == kept
    config = json.loads((back / "config.json").read_text())
    assert config["conversion"]["gates_dropped"] is True
    assert not {"nsa_variant", "block_counts", "block_size", "gate_temperature"} & config["text_config"].keys()
    text = "".join(data.decode() for name, data in snapshot(back).items() if name.endswith(".json"))
    assert "VideoNSA" not in text.replace('"source_kind": "videonsa"', "") and "auto_map" not in text

    processor = AutoProcessor.from_pretrained(back)
    assert type(processor) is Qwen2_5_VLProcessor
    assert processor.tokenizer("<|video_pad|>")["input_ids"] == [263]
    model = align(VideoNSAForConditionalGeneration.from_pretrained(own, nsa_mode="dense").eval())
    inputs = video_prompt(prompts)
    inputs["position_ids"] = model.model.get_rope_index(**inputs)[0]
    with torch.no_grad():
        assert torch.equal(model(**inputs).logits, qwen_logits(back, inputs))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_published_weights_to_qwen(layout, published, tmp_path):
    back = convert(published[layout], tmp_path / "back", target="qwen2_5_vl", verify=True)
    source = load_all(published[layout])
    assert canonical(load_all(back)) == canonical({k: t for k, t in source.items() if not GATES.search(k)})
    assert len(json.loads((back / "config.json").read_text())["conversion"]) > 2


def test_verify_sees_a_wrong_byte(pristine, tmp_path, monkeypatch):
    """And leaves the older checkpoint where it was."""
    output = convert(pristine["new sharded"], tmp_path / "out", seed=1)
    before = snapshot(output)

    def write_tensors(file, *arguments, real=writing.write_tensors):
        digest = real(file, *arguments)
        if file.name.startswith("model-00005"):
            data = bytearray(file.read_bytes())
            data[-1] ^= 1
            file.write_bytes(data)
        return digest

    with monkeypatch.context() as patch:
        patch.setattr(writing, "write_tensors", write_tensors)
        with pytest.raises(ValueError, match=r"model-00005-of-00008.safetensors: .* is not what the source makes it"):
            convert(pristine["new sharded"], output, overwrite=True, verify=True)
    assert snapshot(output) == before
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("mode", ["dense", "sparse"])
def test_verify_sees_other_logits(mode, own, tmp_path, monkeypatch):
    def load(model_class, folder, *, real=convert_weights._load, **kwargs):
        model = real(model_class, folder, **kwargs)
        if folder != own:
            attention = model.model.language_model.layers[1].self_attn
            layer = attention.q_proj if mode == "dense" else attention.g_proj_2
            layer.bias.data[3] += 1e-2
        return model

    monkeypatch.setattr(convert_weights, "_load", load)
    with pytest.raises(ValueError, match=f"the logits of the result differ from the source's in {mode} mode, by up to"):
        convert(own, tmp_path / "out", verify=True)
    assert [path.name for path in tmp_path.iterdir()] == ["own"]


def test_verify_of_what_is_there(pristine, tmp_path, monkeypatch):
    """The same command with --verify checks an existing output; another one is refused as ever."""
    output = convert(pristine["old"], tmp_path / "out")
    (output / "README.md").write_text("a card of my own")
    before = snapshot(output)
    with monkeypatch.context() as patch:
        patch.setattr(convert_weights, "write_checkpoint", None)
        assert convert(pristine["old"], output, verify=True) == output
    for change in ({"seed": 1}, {"dtype": "bfloat16"}, {"max_shard_size": "50KB"}):
        with pytest.raises(ValueError, match="exists; `overwrite`"):
            convert(pristine["old"], output, verify=True, **change)
    assert snapshot(output) == before
