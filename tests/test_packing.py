"""Several samples in one row: the same logits and gradients as one row each."""

import pytest
import torch
from conftest import build_model

import layer_videonsa
from positions_videonsa import mrope_position_ids
from routing_videonsa import VisionRouting

LAYOUTS = ([3, ("video", 5, 4, 4), 6], [9], [("video", 1, 2, 2), 2, ("video", 3, 4, 6), 4], [2, ("image", 4, 4), 5])


def pack(samples: list[dict], config) -> dict:
    """One row; a sample's text positions begin at 0."""
    names = {name for sample in samples for name in sample} - {"attention_mask"}
    dims = {"input_ids": 1, "mm_token_type_ids": 1}
    packed = {
        name: torch.cat([sample[name] for sample in samples if name in sample], dims.get(name, 0)) for name in names
    }
    positions = []
    for sample in samples:
        mrope, _ = mrope_position_ids(
            sample["mm_token_type_ids"],
            *(sample.get(name) for name in ("image_grid_thw", "video_grid_thw", "second_per_grid_ts")),
            spatial_merge_size=config.vision_config.spatial_merge_size,
            tokens_per_second=config.vision_config.tokens_per_second,
        )
        positions.append(torch.cat([torch.arange(mrope.shape[2]).expand(1, 1, -1), mrope]))
    return packed | {"position_ids": torch.cat(positions, dim=2)}


# transformers' eager attention is in float32, whose rounding depends on the length of a dense row.
@pytest.mark.parametrize(
    ("nsa_mode", "attn_implementation"), [("sparse", "sdpa"), ("sparse", "eager"), ("dense", "sdpa")]
)
def test_packed_rows_are_the_samples_alone(nsa_mode, attn_implementation, prompts):
    model = build_model(nsa_mode=nsa_mode, attn_implementation=attn_implementation)
    samples = [prompts.one(layout, seed=seed) for seed, layout in enumerate(LAYOUTS)]
    weights = torch.randn(272, dtype=torch.float64)

    alone = [model(**sample, use_cache=False).logits[0] for sample in samples]
    (torch.cat(alone).tanh() @ weights).sum().backward()
    expected = {
        name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None
    }
    model.zero_grad()

    logits = model(**pack(samples, model.config), use_cache=False).logits[0]
    torch.testing.assert_close(logits, torch.cat(alone), rtol=0, atol=1e-10)
    (logits.tanh() @ weights).sum().backward()
    for name, parameter in model.named_parameters():
        if name in expected:
            torch.testing.assert_close(
                parameter.grad, expected[name], rtol=1e-9, atol=1e-9, msg=lambda m, n=name: n + m
            )


def test_routing_of_a_packed_row():
    types = torch.tensor([[0, 2, 2, 0, 0, 2, 2, 2, 0, 0]])
    starts = torch.tensor([[1, 0, 0, 0, 1, 0, 0, 0, 1, 0]])
    routing = VisionRouting.build(types, None, 0, starts)
    assert routing.lengths.offsets_q == routing.lengths.offsets_k == (0, 2, 5, 5)
    runs = [(run.start, run.stop, run.num_keys, run.keys) for run in routing.text_runs]
    assert runs == [
        (0, 1, 1, slice(0, 4)),
        (3, 4, 4, slice(0, 4)),
        (4, 5, 1, slice(4, 8)),
        (8, 10, 2, slice(8, 10)),
    ]


def test_calls_for_text_rows(monkeypatch):
    """Runs of a sample at once where a kernel takes rows from anywhere; its first tokens by themselves."""
    types = torch.tensor([[0, 2, 0, 0, 2, 0, 0, 2, 0, 2, 0]])
    starts = torch.tensor([[1, 0, 0, 0, 0, 0, 1, 0, 0, 0, 0]])
    routing = VisionRouting.build(types, None, 0, starts)

    def rows(implementation, backend):
        calls = layer_videonsa.text_calls(routing, implementation, backend, torch.device("cpu"))
        return [
            ([*range(11)][call.rows] if isinstance(call.rows, slice) else call.rows.tolist(), call.num_keys)
            + (() if call.positions is None else (call.positions.tolist(),))
            for call in calls
        ]

    one_by_one = [([0], 1), ([2, 3], 4), ([5], 6), ([6], 1), ([8], 3), ([10], 5)]
    assert rows("sdpa", "torch") == rows("eager", "torch") == one_by_one
    monkeypatch.setattr(layer_videonsa.utils, "resolve_backend", lambda *_: "triton")
    assert rows("sdpa", "auto") == [([0], 1), ([2, 3, 5], 6, [2, 3, 5]), ([6], 1), ([8, 10], 5, [2, 4])]
    assert rows("eager", "auto") == one_by_one

    # With a cache: of all eleven tokens the last seven are new, and nothing is at the sample's start.
    routing = VisionRouting.build(types, None, 4)
    assert rows("sdpa", "auto") == [([1, 2, 4, 6], 11, [5, 6, 8, 10])]
