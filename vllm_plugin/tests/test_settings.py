"""What the plug-in refuses to start with, and what it sets."""

import dataclasses
import json

import pytest
from conftest import ROOT
from vllm import EngineArgs

from videonsa_vllm import internals, plugin, settings

TINY = ROOT / "checkpoints" / "tiny"
RELEASED = {"nsa_variant": "released", "num_attention_heads": 28, "num_key_value_heads": 4, "hidden_size": 896}


def start(model=TINY, **arguments):
    """vLLM's configuration, as far as it comes without loading the model."""
    defaults = {"dtype": "float32", "block_size": 32, "max_model_len": 2048, "trust_remote_code": True}
    return EngineArgs(model=str(model), **(defaults | arguments)).create_engine_config()


@pytest.fixture(scope="module")
def config():
    return start()


def test_what_is_set(config):
    assert config.model_config.multimodal_config.media_io_kwargs["video"] == {"video_backend": "videonsa"}
    assert settings.OPERATOR in settings.CompilationConfig._attention_ops


@pytest.mark.parametrize(
    ("arguments", "name"),
    [
        ({"pipeline_parallel_size": 2}, "pipeline_parallel_size"),
        ({"tensor_parallel_size": 2, "decode_context_parallel_size": 2}, "decode_context_parallel_size"),
        (
            {"speculative_config": {"method": "ngram", "num_speculative_tokens": 2, "prompt_lookup_max": 3}},
            "speculative_config",
        ),
        ({"kv_transfer_config": {"kv_connector": "ExampleConnector", "kv_role": "kv_both"}}, "kv_transfer_config"),
        ({"kv_cache_dtype": "fp8"}, "kv_cache_dtype"),
        ({"enable_lora": True}, "enable_lora"),
        ({"enable_prompt_embeds": True}, "enable_prompt_embeds"),
        ({"enable_mm_embeds": True}, "enable_mm_embeds"),
        ({"video_pruning_rate": 0.5}, "video_pruning_rate"),
        ({"compilation_config": {"cudagraph_mode": "FULL_AND_PIECEWISE"}}, "cudagraph_mode"),
        ({"media_io_kwargs": {"video": {"video_backend": "opencv"}}}, "video_backend"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_refused(arguments, name):
    with pytest.raises(ValueError, match=f"VideoNSA cannot be served with `{name}`=.*: |has {name}='opencv'"):
        start(**arguments)


@pytest.mark.parametrize(
    ("part", "field", "value"),
    [
        ("model_config", "quantization", "fp8"),
        ("model_config", "runner_type", "pooling"),
        ("parallel_config", "enable_dbo", True),
        ("parallel_config", "prefill_context_parallel_size", 2),
        ("cache_config", "kv_sharing_fast_prefill", True),
        ("compilation_config", "cudagraph_mm_encoder", True),
    ],
)
def test_refused_in_a_configuration(config, monkeypatch, part, field, value):
    """Where vLLM itself refuses first on a CPU, or has other ways to get there."""
    settings.refuse(config)
    monkeypatch.setattr(getattr(config, part), field, value)
    with pytest.raises(ValueError, match=f"VideoNSA cannot be served with `{field.removesuffix('_type')}`={value}: "):
        settings.refuse(config)


def test_a_vllm_in_which_it_cannot_be_registered(monkeypatch):
    """Other models are served: nothing is raised, and what is missing is said."""
    said = []
    monkeypatch.setattr(plugin.logger, "warning", lambda text, *values: said.append(text % values))
    monkeypatch.setitem(internals._PLACES, "ModelRegistry", "vllm.no_such_module")
    plugin.register()
    assert len(said) == 1 and "no_such_module" in said[0]
    monkeypatch.undo()
    plugin.register()
    assert plugin.ARCHITECTURE in internals.ModelRegistry.get_supported_archs()


def test_the_variant_that_is_not_served(tmp_path):
    for file in TINY.iterdir():
        (tmp_path / file.name).symlink_to(file)
    values = json.loads((TINY / "config.json").read_text())
    values["text_config"] |= RELEASED
    (tmp_path / "config.json").unlink()
    (tmp_path / "config.json").write_text(json.dumps(values))
    with pytest.raises(ValueError, match="VideoNSA cannot be served with `nsa_variant`=released: only the variant"):
        start(tmp_path)


def test_the_second_model_runner(monkeypatch):
    monkeypatch.setenv("VLLM_USE_V2_MODEL_RUNNER", "1")
    with pytest.raises(ValueError, match="VLLM_USE_V2_MODEL_RUNNER=0"):
        start()


def test_graphs_are_split_at_the_operator():
    @dataclasses.dataclass
    class Compilation:
        splitting_ops: list | None
        cudagraph_mode: object = None

    given = Compilation(["vllm::unified_attention_with_output"])
    settings.split_graphs(given)
    settings.split_graphs(given)  # vLLM may load a plug-in twice
    assert given.splitting_ops == ["vllm::unified_attention_with_output", settings.OPERATOR]
    assert given.cudagraph_mode == settings.CUDAGraphMode.PIECEWISE
    assert settings.CompilationConfig._attention_ops.count(settings.OPERATOR) == 1
    chosen = Compilation(None, settings.CUDAGraphMode.NONE)
    settings.split_graphs(chosen)
    assert chosen.splitting_ops is None and chosen.cudagraph_mode == settings.CUDAGraphMode.NONE


def test_untested_versions(monkeypatch):
    said = []
    monkeypatch.setattr(internals.logger, "warning", lambda text, *values: said.append(text % values))
    internals.check_versions()
    assert not said
    monkeypatch.setattr(internals, "TESTED_VERSIONS", ("0.31.0",))
    monkeypatch.setattr(internals, "COMPARED_VERSIONS", ("0.32.0",))
    internals.check_versions()
    assert said == ["VideoNSA was tested with vLLM 0.31.0, not yet with 0.32.0"]
    monkeypatch.setattr(internals, "COMPARED_VERSIONS", ())
    with pytest.raises(ValueError, match=r"tested with vLLM 0\.31\.0, got 0\.32\.0"):
        internals.check_versions()
    monkeypatch.setenv(internals.ANY_VERSION, "1")
    internals.check_versions()
    monkeypatch.setitem(internals._PLACES, "NoSuchThing", "vllm.config")
    with pytest.raises(ValueError, match=r"has no vllm\.config\.NoSuchThing"):
        internals.check_versions()


def test_old_transformers(monkeypatch):
    monkeypatch.setattr("transformers.__version__", "5.19.0")
    with pytest.raises(ValueError, match=r"transformers 5\.20 or later beside vLLM, got 5\.19\.0"):
        internals.check_versions()
