"""VideoNSAConfig: where NSA fields may be given, what they may be, and that nothing is silently ignored."""

import json

import pytest
from conftest import ROOT, build_config, build_model
from transformers import AutoConfig
from transformers.models.qwen2_5_vl.configuration_qwen2_5_vl import Qwen2_5_VLTextConfig

from configuration_videonsa import AUTO_MAP, NSA_FIELDS, VideoNSAConfig, VideoNSATextConfig


def test_defaults_are_the_papers():
    config = VideoNSAConfig()
    assert {name: getattr(config, name) for name in NSA_FIELDS} == {
        "nsa_variant": "paper",
        "nsa_mode": "sparse",
        "nsa_backend": "auto",
        "block_size": 64,
        "block_counts": 32,
        "window_size": 256,
        "gate_temperature": 0.3,
    }


@pytest.mark.parametrize("where", ["top level", "text_config"])
def test_fields_are_given_at_either_place_and_saved_in_one(tmp_path, where):
    fields = {"block_counts": 16, "window_size": 7, "gate_temperature": 1, "nsa_mode": "dense"}
    config = VideoNSAConfig(**fields) if where == "top level" else VideoNSAConfig(text_config=fields)
    config.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    for name, value in fields.items():
        assert getattr(config, name) == getattr(config.text_config, name) == saved["text_config"][name] == value
        assert name not in saved
    assert saved["vision_config"]["window_size"] == 112  # the vision tower's own, untouched
    assert VideoNSAConfig.from_pretrained(tmp_path).to_dict() == config.to_dict()


def test_from_pretrained_takes_fields_as_keywords(tmp_path):
    build_model().save_pretrained(tmp_path)
    assert VideoNSAConfig.from_pretrained(tmp_path, block_counts=16).text_config.block_counts == 16
    model = type(build_model()).from_pretrained(tmp_path, block_counts=16, nsa_mode="dense")
    assert model.model.language_model.layers[0].self_attn.config.block_counts == 16
    assert model.config.nsa_mode == "dense"
    with pytest.raises(ValueError, match="`block_count` = 16 in from_pretrained; did you mean `block_counts`"):
        type(model).from_pretrained(tmp_path, block_count=16)
    with pytest.raises(ValueError, match="`block_counts` must be a positive integer, got 0"):
        type(model).from_pretrained(tmp_path, block_counts=0)


BAD_VALUES = [
    ("nsa_variant", "Paper"),
    ("nsa_mode", "nsa"),
    ("nsa_mode", None),
    ("nsa_backend", "cuda"),
    ("block_size", 0),
    ("block_size", 64.0),
    ("block_counts", -1),
    ("block_counts", True),
    ("window_size", "256"),
    ("gate_temperature", 0),
    ("gate_temperature", -0.3),
    ("gate_temperature", float("nan")),
    ("gate_temperature", float("inf")),
    ("gate_temperature", None),
]


@pytest.mark.parametrize(("name", "value"), BAD_VALUES, ids=str)
def test_wrong_values_name_key_and_value(name, value):
    message = rf"`{name}` must be .*got {value!r}"
    for build in (VideoNSAConfig, VideoNSATextConfig):
        with pytest.raises(ValueError, match=message):
            build(**{name: value})
    config = build_config()
    before = getattr(config, name)
    for part in (config, config.text_config):
        with pytest.raises(ValueError, match=message):
            setattr(part, name, value)
    assert getattr(config, name) == before


RELEASED = {"nsa_variant": "released", "hidden_size": 448, "num_attention_heads": 28, "num_key_value_heads": 4}
NSA_RELEASED = {"nsa_variant": "released", "block_size": 16, "block_counts": 8}


def test_released_variant_takes_what_the_published_code_takes(tmp_path):
    shape = {name: RELEASED[name] for name in ("hidden_size", "num_attention_heads", "num_key_value_heads")}
    for config in (
        VideoNSAConfig(text_config=RELEASED | NSA_RELEASED),
        VideoNSAConfig(text_config=shape, **NSA_RELEASED),
        VideoNSAConfig(**shape, **NSA_RELEASED),
        VideoNSAConfig(text_config=VideoNSATextConfig(**RELEASED, block_size=16, block_counts=8)),
    ):
        assert {name: getattr(config, name) for name in NSA_RELEASED} == NSA_RELEASED
    config.save_pretrained(tmp_path)
    assert VideoNSAConfig.from_pretrained(tmp_path).to_dict() == config.to_dict()
    # Neither 32 blocks of 16 nor 8 of 8 would do: the file's and the given fields count together.
    config = VideoNSAConfig.from_pretrained(tmp_path, block_counts=4, block_size=8)
    assert (config.block_size, config.block_counts) == (8, 4)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_attention_heads": 56}, "`num_attention_heads` must be 28 .*'released', got 56"),
        ({"num_key_value_heads": 7}, "`num_key_value_heads` must be 4 .*'released', got 7"),
        ({"block_size": 96}, "`block_size` must be a power of two .*'released', got 96"),
        ({"block_counts": 33}, r"`block_counts` must be at most half of `block_size` \(64\) .*'released', got 33"),
        ({"block_size": 1, "block_counts": 1}, r"`block_counts` must be at most half of `block_size` \(1\)"),
    ],
)
def test_released_variant_refuses_the_rest(fields, message):
    with pytest.raises(ValueError, match=message):
        VideoNSATextConfig(**(RELEASED | fields))
    paper = VideoNSATextConfig(**(RELEASED | fields | {"nsa_variant": "paper"}))
    with pytest.raises(ValueError, match=message):
        paper.nsa_variant = "released"
    assert paper.nsa_variant == "paper"
    config = VideoNSAConfig(text_config=RELEASED)
    if len(fields) == 1:
        (name, value) = next(iter(fields.items()))
        before = getattr(config.text_config, name)
        with pytest.raises(ValueError, match=message):
            setattr(config.text_config, name, value)
        assert getattr(config.text_config, name) == before


@pytest.mark.parametrize("key", ["block_count", "blocksize", "windows_size", "gate_temp", "nsa_top_k", "nsa_varient"])
def test_misspelt_keys(key):
    with pytest.raises(ValueError, match=f"`{key}` = 3"):
        VideoNSAConfig(**{key: 3})
    with pytest.raises(ValueError, match=f"`{key}` = 3"):
        VideoNSAConfig(text_config={key: 3})


def test_misspelt_names_on_a_loaded_model():
    config = build_config()
    for part, name in ((config, "block_count"), (config.text_config, "window_sizes")):
        with pytest.raises(ValueError, match=f"`{name}` = 3"):
            setattr(part, name, 3)
    config.some_other_attribute = 3  # transformers and its users set what they like


def test_misplaced_and_contradicting_keys():
    with pytest.raises(ValueError, match="`block_size` = 32 is misplaced in `vision_config`"):
        VideoNSAConfig(vision_config={"block_size": 32})
    with pytest.raises(ValueError, match="`block_sizes` = 32"):
        VideoNSAConfig(vision_config={"block_sizes": 32})
    text = VideoNSATextConfig(block_counts=8)
    with pytest.raises(ValueError, match="`block_counts` is 16 at the top level but 8 in `text_config`"):
        VideoNSAConfig(text_config=text, block_counts=16)
    assert text.block_counts == 8
    with pytest.raises(ValueError, match=r"`text_config` must be .* got Qwen2_5_VLTextConfig"):
        VideoNSAConfig(text_config=Qwen2_5_VLTextConfig())
    with pytest.raises(ValueError, match="`block_size` is 32 at the top level but 16 in `text_config`"):
        VideoNSAConfig(block_size=32, text_config={"block_size": 16})


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_attention_heads": 7}, r"`num_attention_heads` \(7\) must divide `hidden_size`"),
        ({"num_attention_heads": 0}, "`num_attention_heads` must be a positive integer, got 0"),
        ({"num_key_value_heads": -4}, "`num_key_value_heads` must be a positive integer, got -4"),
        ({"num_key_value_heads": 3}, r"`num_key_value_heads` \(3\) must divide `num_attention_heads`"),
        ({"attention_dropout": 0.1}, "`attention_dropout` must be 0, got 0.1"),
        ({"use_sliding_window": True, "max_window_layers": 3}, "`layer_types`"),
    ],
)
def test_shapes_that_nsa_cannot_have(fields, message):
    with pytest.raises(ValueError, match=message):
        VideoNSATextConfig(**fields)


def test_unrelated_keys_of_published_configurations_are_kept():
    config = VideoNSAConfig(
        vision_token_id=151654,
        text_config={"max_window_layers": 28, "use_sliding_window": False},
        vision_config={"in_chans": 3, "spatial_patch_size": 14},
    )
    assert config.vision_token_id == 151654


def test_the_roots_configuration():
    config = AutoConfig.from_pretrained(ROOT, trust_remote_code=True)
    assert {name: getattr(config, name) for name in NSA_FIELDS} == {
        name: getattr(VideoNSAConfig(), name) for name in NSA_FIELDS
    }
    assert config.auto_map == AUTO_MAP
