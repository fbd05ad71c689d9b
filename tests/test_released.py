"""The released variant's attention: against tensors of the published code, and against a plain statement of it."""

import contextlib
import json
from pathlib import Path

import pytest
import torch
from nsa_cases import CountSynchronisations, PeakMemory, PoisonedEmpty, as_on_a_gpu, small_tiles, with_gradients
from released_oracle import oracle, oracle_blocks, sort_network
from safetensors import safe_open
from triton_testing import DEVICE, needs_triton

import layer_videonsa
import released_videonsa
from generation_videonsa import CACHE_NAME
from modeling_videonsa import VideoNSATextConfig, VideoNSATextModel
from released_videonsa import TokenLayout, released_attention, released_block_indices

GOLDEN = Path(__file__).parent / "golden"


def golden(name: str) -> tuple[dict[str, torch.Tensor], dict]:
    """Tensors computed with the code published with the weights, on a CPU in float32; half-precision ones are inputs.

    Outputs hold the rows named by `rows`. The second value are the settings.
    """
    with safe_open(GOLDEN / f"released_{name}.safetensors", "pt") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118  no mapping
        settings = {key: json.loads(value) for key, value in (file.metadata() or {}).items() if key != "note"}
    tensors = {key: x.float() if x.dtype == torch.float16 else x for key, x in tensors.items()}
    tensors = {key: x.long() if x.dtype in (torch.int16, torch.int32) else x for key, x in tensors.items()}
    return tensors, settings


def nsa(settings: dict, *names: str) -> dict[str, int]:
    return {name: settings[name] for name in names or ("block_size", "block_counts", "window_size")}


def golden_model(settings: dict) -> VideoNSATextModel:
    """A text model of one layer whose attention is the published one: its input is not normalised."""
    config = VideoNSATextConfig(
        vocab_size=8,
        hidden_size=settings["num_heads"] * settings["head_dim"],
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=settings["num_heads"],
        num_key_value_heads=settings["num_kv_heads"],
        rope_parameters={
            "rope_type": "default",
            "rope_theta": settings["rope_theta"],
            "mrope_section": settings["mrope_section"],
        },
        nsa_variant="released",
        **nsa(settings),
    )
    config._attn_implementation = "sdpa"
    model = VideoNSATextModel(config).eval()
    model.layers[0].input_layernorm = torch.nn.Identity()
    model.layers[0].self_attn.load_state_dict(golden("weights")[0])
    return model


@contextlib.contextmanager
def recorded(module, function):
    """Calls of the module's function while the context lasts: (args, kwargs, result)."""
    calls, original = [], getattr(module, function)

    def record(*args, **kwargs):
        calls.append((args, kwargs, original(*args, **kwargs)))
        return calls[-1][2]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, function, record)
        yield calls


def test_golden_function():
    tensors, settings = golden("no_text")
    q, k, v = (tensors[name] for name in "qkv")
    mask = torch.ones(len(q), dtype=torch.bool)
    indices = released_block_indices(q, k, mask, **nsa(settings, "block_size", "block_counts"))
    assert torch.equal(indices.long(), tensors["block_indices"])
    output = released_attention(q, k, v, tensors["gates"].logit(), mask, **nsa(settings))
    # The golden output is NSA alone; the dense attention of a vision row is the mean of v so far.
    mean = v.cumsum(0) / torch.arange(1, len(v) + 1)[:, None, None]
    nsa_output = (output - mean.repeat_interleave(7, dim=1))[tensors["rows"]]
    torch.testing.assert_close(nsa_output, tensors["nsa_output"], atol=1e-5, rtol=0)


def test_golden_module_of_several_videos():
    tensors, settings = golden("several")
    model, outputs = golden_model(settings), []
    model.layers[0].self_attn.register_forward_hook(lambda module, args, output: outputs.append(output[0]))
    with torch.no_grad(), recorded(layer_videonsa, "released_attention") as calls:
        model(inputs_embeds=tensors["hidden_states"][None], position_ids=tensors["position_ids"][:, None])
    torch.testing.assert_close(outputs[0][0, tensors["rows"]], tensors["attn_output"], atol=1e-5, rtol=0)
    ((args, _, output),) = calls
    torch.testing.assert_close(output[tensors["rows"]], tensors["attn_pre_o"], atol=1e-5, rtol=0)
    q, k, _, _, layout = args
    assert torch.equal(layout.vision_mask, tensors["is_vision"])
    indices = released_block_indices(q, k, layout, **nsa(settings, "block_size", "block_counts"))
    assert torch.equal(indices.long(), tensors["block_indices"])


def test_golden_prompt_and_decoding_steps():
    tensors, settings = golden("decode")
    model, outputs = golden_model(settings), []
    model.layers[0].self_attn.register_forward_hook(lambda module, args, output: outputs.append(output[0]))
    embeds, positions = tensors["hidden_states"][None], tensors["position_ids"][:, None]
    prompt = len(tensors["is_vision"])
    with torch.no_grad(), recorded(layer_videonsa, "released_attention") as calls:
        cache = model(inputs_embeds=embeds[:, :prompt], position_ids=positions[..., :prompt], use_cache=True)
        for t in range(prompt, embeds.shape[1]):
            step = slice(t, t + 1)
            model(
                inputs_embeds=embeds[:, step],
                position_ids=positions[..., step],
                **{CACHE_NAME: cache[CACHE_NAME]},
            )
    output = torch.cat(outputs, dim=1)[0, tensors["rows"]]
    torch.testing.assert_close(output, tensors["attn_output"], atol=1e-5, rtol=0)
    ((args, _, _),) = calls
    q, k, _, _, layout = args
    indices = released_block_indices(q, k, layout, **nsa(settings, "block_size", "block_counts"))
    assert torch.equal(indices.long(), tensors["block_indices"])


# tokens, block_size, block_counts, window_size, head_dim, vision tokens: a share of them at random, or slices
CASES = [
    (1, 8, 1, 1, 4, 1.0),
    (5, 8, 3, 4, 16, 0.6),  # shorter than a block; 3 block_counts are 4
    (61, 8, 3, 10, 8, [slice(7, 30), slice(33, 59)]),
    (70, 4, 2, 7, 8, 0.5),  # 18 blocks: five runs of the network
    (50, 2, 1, 3, 5, [slice(1, 50)]),
    (53, 8, 4, 300, 8, [slice(20, 21)]),  # almost all text: almost all ties
    (67, 16, 8, 20, 16, 1.0),
    (40, 16, 5, 6, 8, 0.0),
]


def make(case, dtype=torch.float64):
    tokens, block_size, block_counts, window_size, head_dim, vision = case
    generator = torch.Generator().manual_seed(tokens)
    shapes = (28, head_dim), (4, head_dim), (4, head_dim), (28, 3)
    inputs = [torch.randn(tokens, *shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes]
    mask = torch.zeros(tokens, dtype=torch.bool)
    if isinstance(vision, list):
        for part in vision:
            mask[part] = True
    else:
        mask = torch.rand(tokens, generator=generator) < vision
    return inputs, mask, {"block_size": block_size, "block_counts": block_counts, "window_size": window_size}


@pytest.mark.parametrize("case", CASES, ids=str)
def test_output_and_gradients_equal_the_oracles(case):
    inputs, mask, settings = make(case)
    expected = with_gradients(lambda *x: oracle(*x, mask, *settings.values()), inputs)
    for conditions in ((), (small_tiles(),), (as_on_a_gpu(), PoisonedEmpty())):
        with contextlib.ExitStack() as stack:
            for condition in conditions:
                stack.enter_context(condition)
            actual = with_gradients(lambda *x: released_attention(*x, mask, **settings, backend="torch"), inputs)
        for ours, theirs in zip(actual, expected, strict=True):
            torch.testing.assert_close(ours, theirs, atol=1e-10, rtol=1e-9)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_blocks_equal_the_oracles_in_order(case, dtype):
    (q, k, _, _), mask, settings = make(case, dtype)
    del settings["window_size"]
    expected = oracle_blocks(q * mask[:, None, None], k * mask[:, None, None], **settings)
    for condition in (contextlib.nullcontext(), small_tiles()):
        with condition:
            assert torch.equal(released_block_indices(q, k, mask, **settings).long(), expected)


def test_ties_are_broken_as_the_network_does():
    """Text rows rank all earlier blocks alike; a stable sort would list them in another order."""
    (q, k, _, _), mask, settings = make((53, 8, 4, 1, 8, [slice(20, 21)]))
    del settings["window_size"]
    indices = released_block_indices(q, k, mask, **settings)
    blocks = indices[52, 0].tolist()
    importance = [1.0] * 6 + [16.0, 0.0]
    assert blocks == sort_network(importance, 6, 8)[:4]
    assert blocks[0] == 6 and sorted(blocks[1:]) != [0, 1, 2] and blocks[1:] != sorted(blocks[1:])
    # The same token of other key/value heads sees the same ties, and no block comes twice.
    assert (indices[52] == indices[52, :1]).all()
    assert all(len(set(row)) == 4 for row in indices[40:].flatten(0, 1).tolist())


def test_weights_may_overflow_and_vanish():
    """exp(score - lse) of another token's lse has no bound in float32: infinite and zero weights are ties too."""
    (q, k, v, gates), mask, settings = make((60, 4, 2, 5, 8, 0.7), torch.float32)
    q = 60 * q
    with recorded(released_videonsa, "_importance") as calls:
        indices = released_block_indices(q, k, mask, block_size=4, block_counts=2)
    text_zeroed = q * mask[:, None, None], k * mask[:, None, None]
    assert torch.equal(indices.long(), oracle_blocks(*text_zeroed, block_size=4, block_counts=2))
    importance = torch.cat([result.flatten() for _, _, result in calls])
    assert importance.isposinf().any() and not importance.isnan().any()
    own = torch.arange(60) // 4
    assert (indices[:, :, 0] >= 0).all() and (indices <= own[:, None, None]).all()
    assert (indices[mask][..., 0] != own[mask, None]).any(), "the own block is not guaranteed"
    assert released_attention(q, k, v, gates, mask, **settings).isfinite().all()


def test_the_whole_prompt_changes_with_its_last_token():
    """What makes caches and chunks impossible: the first rows look ahead, and the lse buffer depends on the length."""
    inputs, mask, settings = make((40, 8, 2, 5, 8, 1.0))
    whole = released_attention(*inputs, mask, **settings)
    shorter = released_attention(*(x[:-1] for x in inputs), mask[:-1], **settings)
    assert (whole[:8] - shorter[:8]).abs().max() > 1e-3


@pytest.mark.parametrize("backend", ["reference", pytest.param("triton", marks=needs_triton)])
def test_backends_agree(backend):
    inputs, mask, settings = make((55, 16, 2, 9, 16, [slice(3, 20), slice(22, 50)]), torch.float32)
    mask, inputs = mask.to(DEVICE), [x.to(DEVICE) for x in inputs]
    expected = with_gradients(lambda *x: released_attention(*x, mask, **settings, backend="torch"), inputs)
    actual = with_gradients(lambda *x: released_attention(*x, mask, **settings, backend=backend), inputs)
    for ours, theirs in zip(actual, expected, strict=True):
        torch.testing.assert_close(ours, theirs, atol=2e-5, rtol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision(dtype):
    """As good as the oracle in the same precision, where every block is chosen so that rounding cannot change that."""
    inputs, mask, settings = make((60, 16, 4, 9, 16, 0.8), dtype)
    truth = oracle(*(x.double() for x in inputs), mask, *settings.values())
    plain = oracle(*inputs, mask, *settings.values())
    output = released_attention(*inputs, mask, **settings)
    assert output.dtype == dtype
    assert (output - truth).abs().max() <= (plain - truth).abs().max()


def peak(tokens: int, backward: bool) -> PeakMemory:
    inputs, mask, settings = make((tokens, 8, 2, 8, 8, [slice(9, tokens // 2), slice(tokens // 2 + 3, tokens - 6)]))
    inputs = [x.requires_grad_(backward) for x in inputs]
    with PeakMemory() as memory:
        output = released_attention(*inputs, mask, **settings, backend="torch")
        if backward:
            output.sum().backward()
    return memory


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
def test_memory_is_linear_in_tokens(backward, monkeypatch):
    """Nothing of tokens x tokens, nor of tokens x blocks x heads, with tiles scaled to these short prompts."""
    monkeypatch.setitem(released_videonsa.utils._TILE_ELEMENTS, "cpu", 1 << 14)
    monkeypatch.setattr(released_videonsa.utils, "CHUNK_TOKENS", 64)
    monkeypatch.setattr(released_videonsa.selection, "_PARTIAL_ELEMENTS", 1 << 15)
    monkeypatch.setattr(released_videonsa.dense, "_MASK_ELEMENTS", 1 << 14)
    tokens, q = 512, 512 * 28 * 8
    memory = peak(tokens, backward)
    assert memory.largest <= q < tokens * tokens / 2
    assert memory.live < (20 if backward else 8) * q
    assert memory.live < 2.5 * peak(tokens // 2, backward).live  # 2 and some that is counted by chance


def test_nothing_waits_for_the_device():
    inputs, mask, settings = make((45, 8, 2, 5, 8, 0.6), torch.float32)
    inputs = [x.requires_grad_() for x in inputs]
    layout = TokenLayout.from_mask(mask)
    with as_on_a_gpu(), CountSynchronisations() as synchronisations:
        released_attention(*inputs, layout, **settings, backend="torch").sum().backward()
    assert synchronisations.count == 0
    with CountSynchronisations() as synchronisations:
        TokenLayout.from_mask(mask)
    assert synchronisations.count == 1


def test_wrong_arguments_are_named():
    (q, k, v, gates), mask, settings = make((20, 8, 2, 5, 8, 0.6))

    def refused(message, q=q, k=k, v=v, gates=gates, mask=mask, **changed):
        with pytest.raises(ValueError, match=message):
            released_attention(q, k, v, gates, mask, **(settings | changed))

    refused("num_heads and num_kv_heads must be 28 and 4 .* got 24 and 4", q=q[:, :24])
    refused("num_heads and num_kv_heads must be 28 and 4 .* got 28 and 2", k=k[:, :2], v=v[:, :2])
    refused("block_size must be a power of two .* got 12", block_size=12)
    refused("block_size must be a positive integer, got 0", block_size=0)
    refused("block_counts must be at most block_size / 2 = 4 .* got 5", block_counts=5)
    refused("block_counts must be a positive integer, got True", block_counts=True)
    refused("window_size must be a positive integer, got 0", window_size=0)
    refused(r"gate_logits must be floating point of shape .* \(20, 28, 3\) .* got torch.float64 \(20, 28, 2\)",
            gates=gates[..., :2])  # fmt: skip
    refused("gate_logits must be floating point", gates=gates.long())
    refused(r"vision_mask must be bool of shape \(tokens,\) = \(20,\) .* got torch.bool \(19,\)", mask=mask[1:])
    refused("vision_mask must be bool", mask=mask.long())
    refused("k must have the dtype", k=k.float())
    refused("v must have the shape of k", v=v[..., :4])
    refused("k has 19 rows", k=k[1:], v=v[1:])
    refused("q must have shape", q=q[None])
    refused("q must have shape", q=q[:0], k=k[:0], v=v[:0], gates=gates[:0], mask=mask[:0])
    refused("backend must be one of", backend="cuda")
    with pytest.raises(ValueError, match="num_heads and num_kv_heads"):
        released_block_indices(q[:, :8], k, mask)
