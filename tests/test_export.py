"""torch.export: the language model with the routing of its vision rows, text alone, and clear refusals of the rest."""

import copy
import importlib.util
import io
import sys

import pytest
import torch
from conftest import build_model, build_released, our_nodes
from torch.utils import _pytree as pytree

import routing_videonsa
from routing_videonsa import VisionRouting

LAYOUT = [2, ("video", 2, 4, 4), 1, ("image", 2, 4), 3]


@pytest.fixture(scope="module")
def float_model():
    # Every block is selected: the search for tiles of selected blocks is not for a graph.
    return build_model(torch.float32, block_counts=8, text={"num_hidden_layers": 1})


def language_inputs(model, inputs) -> dict:
    """What the language model is called with."""
    seen = {}
    with torch.no_grad(), pytest.MonkeyPatch.context() as patch:
        forward = model.model.language_model.forward
        patch.setattr(model.model.language_model, "forward", lambda **kwargs: seen.update(kwargs) or forward(**kwargs))
        model(**inputs, use_cache=False)
    return {name: value for name, value in seen.items() if value is not None}


@pytest.fixture(scope="module")
def inputs(float_model, prompts):
    single = prompts.one(LAYOUT)
    single |= {name: value.float() for name, value in single.items() if value.is_floating_point()}
    return language_inputs(float_model, single)


def test_the_language_model_with_vision_rows(float_model, inputs):
    """Exported, saved and loaded, it computes what the model computes, of other embeddings too."""
    model = float_model.model.language_model
    buffer = io.BytesIO()
    torch.export.save(torch.export.export(model, (), copy.copy(inputs)), buffer)
    buffer.seek(0)
    exported = torch.export.load(buffer).module()
    others = inputs | {"inputs_embeds": torch.randn_like(inputs["inputs_embeds"])}
    with torch.no_grad():
        for given in (inputs, others):
            expected = model(**given).last_hidden_state
            torch.testing.assert_close(exported(**given).last_hidden_state, expected)


def test_a_routing_is_taken_apart_and_put_together(inputs):
    whole = inputs["vision_routing"]
    tensors, structure = pytree.tree_flatten(whole)
    assert all(isinstance(tensor, torch.Tensor) for tensor in tensors)
    again = pytree.tree_unflatten(tensors, pytree.treespec_loads(pytree.treespec_dumps(structure)))
    assert isinstance(again, VisionRouting)
    assert again.text_runs[0].keys == whole.text_runs[0].keys
    assert again.lengths.offsets_k == whole.lengths.offsets_k
    assert pytree.tree_structure(again) == structure
    for one, other in zip(pytree.tree_leaves(again), tensors, strict=True):
        assert one is other


def test_a_second_copy_of_the_code_has_its_own_routings(monkeypatch):
    """As transformers loads it, beside the checkout's or another version's."""
    spec = importlib.util.spec_from_file_location("routing_videonsa_again", routing_videonsa.__file__)
    copied = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, copied)
    spec.loader.exec_module(copied)
    types = torch.tensor([[0, 2, 2, 0, 1]])  # of no other test: torch keeps what it has read
    for kind in (VisionRouting, copied.VisionRouting):
        tensors, structure = pytree.tree_flatten(kind.build(types, None, 0))
        again = pytree.tree_unflatten(tensors, pytree.treespec_loads(pytree.treespec_dumps(structure)))
        assert type(again) is kind


def test_text_alone(float_model, prompts):
    inputs = {"input_ids": prompts.one([9])["input_ids"], "use_cache": False}
    exported = torch.export.export(float_model, (), inputs).module()
    torch.testing.assert_close(exported(**inputs).logits, float_model(**inputs).logits)


@pytest.mark.parametrize("build", [build_model, build_released], ids=["paper", "released"])
def test_token_types_in_the_graph(prompts, build):
    """Of prompts whose videos went through the vision tower, which transformers' own models cannot export."""
    model, single = build(torch.float32), prompts.one(LAYOUT)
    inputs = {
        "inputs_embeds": model.get_input_embeddings()(single["input_ids"]).detach(),
        "mm_token_type_ids": single["mm_token_type_ids"],
        "position_ids": model.model.get_rope_index(**single)[0],
        "use_cache": False,
    }
    nodes = {
        build_model: ["plan", "layer_attention", "layer_attention"],
        build_released: ["released_plan", "released_layer_attention", "released_layer_attention"],
    }
    for mode, strict in (("sparse", True), ("sparse", False), ("dense", False)):
        model.config.nsa_mode = mode
        program = torch.export.export(model, (), inputs, strict=strict)
        torch.testing.assert_close(program.module()(**inputs).logits, model(**inputs).logits)
        assert our_nodes(program.graph_module) == (nodes[build] if mode == "sparse" else [])

    # What only a look at the values decides is refused.
    model.config.nsa_mode = "sparse"
    inputs["attention_mask"] = torch.ones(1, 1, *2 * single["input_ids"].shape[1:]).bool().tril()
    with pytest.raises(ValueError, match="nsa_mode='sparse' cannot be exported with an `attention_mask`"):
        torch.export.export(model, (), inputs, strict=False)
