"""VideoNSAConfig: where NSA fields may be given, what they may be, and that nothing is silently ignored."""

import json

import pytest
import torch
from conftest import ROOT, build_config, build_model
from transformers import AutoConfig, GenerationConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.qwen2_5_vl.configuration_qwen2_5_vl import Qwen2_5_VLConfig, Qwen2_5_VLTextConfig

from configuration_videonsa import AUTO_MAP, NSA_FIELDS, VideoNSAConfig, VideoNSATextConfig, _misspelt_field


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


MISSPELT = {
    "block_count": "block_counts",
    "blockcounts": "block_counts",
    "blocks_count": "block_counts",
    "blocksize": "block_size",
    "block_sizes": "block_size",
    "BlockSize": "block_size",
    "block-size": "block_size",
    "windows_size": "window_size",
    "window_szie": "window_size",
    "windows_sizes": "window_size",
    "win_size": "window_size",
    "gate_temp": "gate_temperature",
    "gates_temprature": "gate_temperature",
    "nas_mode": "nsa_mode",
    "nsa_varient": "nsa_variant",
}


@pytest.mark.parametrize("key", [*MISSPELT, "nsa_top_k"])
def test_misspelt_keys(key):
    hint = f"; did you mean `{MISSPELT[key]}`" if key in MISSPELT else "; the NSA fields are nsa_variant"
    for build in (
        lambda: VideoNSAConfig(**{key: 3}),
        lambda: VideoNSAConfig(text_config={key: 3}),
        lambda: setattr(build_config(), key, 3),
        lambda: setattr(build_config().text_config, key, 3),
    ):
        with pytest.raises(ValueError, match=f"`{key}` = 3 .*{hint}"):
            build()


def test_every_slip_of_the_pen_is_caught():
    for field in NSA_FIELDS:
        cuts = [(field[:at], field[at:]) for at in range(len(field) + 1)]
        slips = {a + b[1:] for a, b in cuts if b} | {a + b[1] + b[0] + b[2:] for a, b in cuts if len(b) > 1}
        slips |= {a + letter + rest for a, b in cuts for letter in "aqz" for rest in (b, b[1:])}
        assert [slip for slip in slips - {*NSA_FIELDS} if _misspelt_field(slip) is None] == []


def test_names_of_others_are_let_through():
    """Those of all configurations in transformers and of its generation flags, and a few more, at every place."""
    names = set(vars(GenerationConfig())) | {"batch_size", "chunk_size", "variant", "kv_block_size", "blockwise"}
    for kind in CONFIG_MAPPING:
        for config_class in CONFIG_MAPPING[kind].__mro__:
            names |= {*getattr(config_class, "__annotations__", ()), *vars(config_class)}
    names = {name for name in names if not name.startswith("_")} - {*NSA_FIELDS}
    assert names > {"vocab_size", "temperature", "sliding_window_size", "index_block_size"}
    assert {name for name in names if _misspelt_field(name)} == {"block_sizes"}  # Funnel's, and a misspelling here
    config = build_config()
    for name in ("vocab_size", "batch_size", "chunk_size", "temperature", "softmax_temperature", "variant"):
        VideoNSAConfig(**{name: 300})
        setattr(config, name, 300)
        setattr(config.text_config, name, 300)


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


FLAT = {  # the configuration of a published Qwen2.5-VL checkpoint, smaller
    "attention_dropout": 0.0,
    "bos_token_id": 151643,
    "eos_token_id": 151645,
    "vision_token_id": 151654,
    "image_token_id": 151655,
    "video_token_id": 151656,
    "hidden_act": "silu",
    "hidden_size": 448,
    "intermediate_size": 64,
    "max_position_embeddings": 128000,
    "max_window_layers": 28,
    "model_type": "qwen2_5_vl",
    "num_attention_heads": 28,
    "num_hidden_layers": 2,
    "num_key_value_heads": 4,
    "rms_norm_eps": 1e-06,
    "rope_theta": 1000000.0,
    "sliding_window": 32768,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "use_sliding_window": False,
    "vision_config": {"depth": 2, "hidden_size": 64, "in_chans": 3, "out_hidden_size": 448, "window_size": 112},
    "rope_scaling": {"type": "mrope", "mrope_section": [2, 3, 3]},
    "vocab_size": 300,
}


def test_flat_configurations(tmp_path):
    """Text fields at the top level, as in published checkpoints, are read as transformers' own class reads them."""
    (tmp_path / "config.json").write_text(json.dumps(FLAT))
    flat = {name: value for name, value in FLAT.items() if name != "model_type"}
    config = VideoNSAConfig.from_pretrained(tmp_path)
    for ours, qwens in (
        (config.to_dict(), Qwen2_5_VLConfig.from_pretrained(tmp_path).to_dict()),
        (VideoNSAConfig(**flat).to_dict(), Qwen2_5_VLConfig(**flat).to_dict()),
    ):
        text = {name: value for name, value in ours["text_config"].items() if name not in NSA_FIELDS}
        assert text == qwens["text_config"] | {"model_type": "videonsa_text"}
        assert ours | {"text_config": text} == qwens | {"text_config": text, "model_type": "videonsa"}
    config.save_pretrained(tmp_path)
    assert VideoNSAConfig.from_pretrained(tmp_path).to_dict() == config.to_dict()
    assert (config.text_config.vocab_size, config.window_size, config.vision_config.window_size) == (300, 256, 112)
    # The variant takes its blocks only together with them.
    (tmp_path / "config.json").write_text(json.dumps(FLAT))
    for config in (VideoNSAConfig(**flat, **NSA_RELEASED), VideoNSAConfig.from_pretrained(tmp_path, **NSA_RELEASED)):
        assert {name: getattr(config, name) for name in NSA_RELEASED} == NSA_RELEASED


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_embeddings_are_resized(tmp_path, prompts, tied):
    model = build_model(text={"tie_word_embeddings": tied})
    inputs = prompts.one([3, ("video", 3, 4, 4), 4])
    with torch.no_grad():
        expected = model(**inputs).logits
        for size, options in ((300, {}), (280, {}), (320, {"pad_to_multiple_of": 64})):
            model.resize_token_embeddings(281 if options else size, **options)
            assert model.config.text_config.vocab_size == model.lm_head.out_features == size
            logits = model(**inputs).logits
            assert logits.shape[-1] == size
            torch.testing.assert_close(logits[..., :272], expected)
        model.config.vocab_size = 320  # what some training code adds
        model.save_pretrained(tmp_path)
        loaded, loading = type(model).from_pretrained(tmp_path, output_loading_info=True)
        assert not any(loading.values())
        assert torch.equal(loaded(**inputs).logits, logits)
    assert (loaded.lm_head.weight is loaded.get_input_embeddings().weight) == tied
    assert loaded(**inputs, labels=inputs["input_ids"]).loss.isfinite()


def test_the_roots_configuration():
    config = AutoConfig.from_pretrained(ROOT, trust_remote_code=True)
    assert {name: getattr(config, name) for name in NSA_FIELDS} == {
        name: getattr(VideoNSAConfig(), name) for name in NSA_FIELDS
    }
    assert config.auto_map == AUTO_MAP
