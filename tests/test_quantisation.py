"""What quantisers find: both gate projections alike, and the skip list of docs/quantisation.md."""

import pytest
import torch
from conftest import ROOT, build_model
from torch import nn
from transformers.quantizers.base import get_keys_to_not_convert
from transformers.quantizers.quantizers_utils import should_convert_module

SKIP = ["lm_head", "model.visual", r".*g_proj_[12]"]


@pytest.fixture(scope="module")
def linears():
    return {name: module for name, module in build_model().named_modules() if isinstance(module, nn.Linear)}


def test_gate_projections_are_of_the_type_of_all_linear_layers(linears):
    """bitsandbytes and fine-grained FP8 convert `type(module) is nn.Linear`, the others `isinstance`."""
    assert {type(module) for module in linears.values()} == {nn.Linear}
    assert sum("g_proj_" in name for name in linears) == 4  # two in each of two layers


def test_new_gates_start_at_one_half_without_a_type_of_their_own():
    model = build_model(torch.float32)
    for layer in model.model.language_model.layers:
        for module in (layer.self_attn.g_proj_1, layer.self_attn.g_proj_2):
            model._init_weights(module)
        assert not layer.self_attn.g_proj_2.weight.any() and not layer.self_attn.g_proj_2.bias.any()
        assert layer.self_attn.g_proj_1.weight.any()


def test_the_documented_skip_list(linears):
    assert f"skip = {SKIP!r}".replace("'", '"').replace('".*', 'r".*') in (ROOT / "docs/quantisation.md").read_text()
    for name in linears:
        is_left_out = name == "lm_head" or ".visual." in name or ".g_proj_" in name
        assert should_convert_module(name, SKIP) == (not is_left_out), name
        # The parts of the list alone.
        assert should_convert_module(name, SKIP[1:2]) == (".visual." not in name)
        assert should_convert_module(name, SKIP[2:]) == (".g_proj_" not in name)
        assert should_convert_module(name, ["visual"])  # which the document warns of
    assert get_keys_to_not_convert(build_model()) == ["lm_head"]  # the default that a list replaces
