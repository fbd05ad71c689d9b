"""The model's forward pass: routing, packing, dense mode, precisions, gradients."""

import copy
import warnings

import pytest
import torch
from conftest import (
    ROOT,
    Prompts,
    assert_autocast_trains,
    assert_batch_equals_singles,
    assert_checkpointing_changes_no_gradient,
    assert_errs_no_more_than_dense,
    assert_padding_between_tokens_changes_nothing,
    build_config,
    build_model,
    build_released,
)
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoConfig, AutoModel, DynamicCache, Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import apply_rotary_pos_emb

import layer_videonsa
import modeling_videonsa
from generation_videonsa import CACHE_NAME
from layer_videonsa import place_rows
from modeling_videonsa import VideoNSAAttention
from nsa_kernels import dense, reference, utils
from routing_videonsa import VisionRouting

VIDEO = ("video", 10, 4, 4)  # 40 tokens, 10 blocks of 4: far more than the 2 that a token selects
LAYOUTS = {
    "text-video-text": [5, VIDEO, 7],
    "video first": [VIDEO, 7],
    "video last": [5, VIDEO],
    "video only": [VIDEO],
    "one-token texts": [1, VIDEO, 1, VIDEO, 1],
    "images and videos": [3, ("image", 4, 6), 2, VIDEO, 4, ("video", 3, 4, 8), 1, ("image", 2, 2), 9],
    "adjacent images": [3, ("image", 4, 4), ("image", 8, 4), 5],
}


def oracle_attention(self, hidden_states, position_embeddings, token_types, **kwargs):
    """semantics of one layer for one unpadded sample, row by row and without any of the routing code."""
    _, length, _ = hidden_states.shape
    states = [
        proj(hidden_states).view(1, length, -1, self.head_dim) for proj in (self.q_proj, self.k_proj, self.v_proj)
    ]
    q, k, v = (x.transpose(1, 2) for x in states)
    q, k = apply_rotary_pos_emb(q, k, *position_embeddings)
    q, k, v = (x[0].transpose(0, 1) for x in (q, k, v))  # [length, heads, head_dim]
    group = q.shape[1] // k.shape[1]
    output = torch.zeros_like(q)
    for row in range(length):
        if token_types[row] == 0:
            for head in range(q.shape[1]):
                scores = k[: row + 1, head // group] @ q[row, head] * self.scaling
                output[row, head] = scores.softmax(0) @ v[: row + 1, head // group]
    vision = [row for row in range(length) if token_types[row] != 0]
    hidden = torch.nn.functional.gelu(hidden_states[0, vision] @ self.g_proj_1.weight.T + self.g_proj_1.bias)
    logits = (hidden @ self.g_proj_2.weight.T + self.g_proj_2.bias).view(len(vision), q.shape[1], 3)
    gates = torch.sigmoid(logits / self.config.gate_temperature)
    lengths = utils.SequenceLengths.from_lengths([len(vision)])
    output[vision] = reference.nsa_attention_ref(
        *(x[vision] for x in (q, k, v)), *gates.unbind(-1), lengths,
        self.config.block_size, self.config.block_counts, self.config.window_size, self.scaling,
    )  # fmt: skip
    return self.o_proj(output.flatten(1))[None], None


@torch.no_grad()
def oracle_logits(model, inputs, monkeypatch):
    types = inputs["mm_token_type_ids"][0].tolist()
    with monkeypatch.context() as patch:
        patch.setattr(
            VideoNSAAttention, "forward", lambda self, **kwargs: oracle_attention(self, token_types=types, **kwargs)
        )
        return model(**inputs).logits


def qwen_twin(model):
    """transformers' own Qwen2.5-VL with the weights of `model`."""
    config = model.config.to_dict()
    for part in (config, config["text_config"], config["vision_config"]):
        part.pop("model_type", None)
    twin = Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(**config)).to(model.dtype).eval()
    twin.set_attn_implementation(model.config._attn_implementation)
    twin.generation_config = copy.deepcopy(model.generation_config)
    missing, unexpected = twin.load_state_dict(model.state_dict(), strict=False)
    assert not missing and all(".g_proj_" in key for key in unexpected)
    return twin


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_sparse_forward_follows_the_specification(model, prompts, layout, monkeypatch):
    inputs = prompts.one(layout)
    with torch.no_grad():
        logits = model(**inputs).logits
    torch.testing.assert_close(logits, oracle_logits(model, inputs, monkeypatch), atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize("side", ["left", "right"])
def test_batch_equals_singles(model, prompts, side):
    assert_batch_equals_singles(model, prompts, [*LAYOUTS.values(), [6]], side)


def test_padding_between_tokens(model, prompts):
    assert_padding_between_tokens_changes_nothing(model, prompts, VIDEO)


def test_vision_tokens_that_are_masked_take_part_in_nothing(model, prompts):
    """A hole inside a video: the rest is what it would be if those tokens were not there."""
    inputs = prompts.one([5, VIDEO, 7])
    inputs["position_ids"], _ = model.model.get_rope_index(**inputs)
    keep = torch.ones(52, dtype=torch.bool)
    keep[10:17] = False
    masked = inputs | {"attention_mask": keep.long()[None]}
    features = model.model.get_video_features(inputs["pixel_values_videos"], inputs["video_grid_thw"]).pooler_output
    embeds = model.get_input_embeddings()(inputs["input_ids"]).clone()
    embeds[inputs["mm_token_type_ids"] == 2] = torch.cat(features)
    with torch.no_grad():
        expected = model(
            inputs_embeds=embeds[:, keep],
            mm_token_type_ids=inputs["mm_token_type_ids"][:, keep],
            position_ids=inputs["position_ids"][:, :, keep],
        ).logits
        torch.testing.assert_close(model(**masked).logits[:, keep], expected, atol=1e-9, rtol=1e-9)


def test_token_types_are_read_off_the_input_ids(model, prompts):
    inputs = prompts.one(LAYOUTS["images and videos"])
    inputs["position_ids"], _ = model.model.get_rope_index(**inputs)
    with torch.no_grad():
        expected = model(**inputs).logits
        del inputs["mm_token_type_ids"]
        assert torch.equal(model(**inputs).logits, expected)


@pytest.mark.parametrize("attn_implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_dense_mode_is_qwen_to_the_last_bit(prompts, attn_implementation, dtype):
    model = build_model(dtype, attn_implementation=attn_implementation, nsa_mode="dense")
    twin = qwen_twin(model)
    singles = [prompts.one(layout, seed) for seed, layout in enumerate(LAYOUTS.values())]
    inputs = prompts.batch(singles)
    position_ids, deltas = model.model.get_rope_index(**inputs)
    step = torch.randint(0, 250, (len(singles), 1))
    mask = torch.nn.functional.pad(inputs["attention_mask"], (0, 1), value=1)
    step_positions = (mask.sum(-1, keepdim=True) - 1 + deltas).expand(3, -1, 1)
    with torch.no_grad():
        outputs = [m(**inputs, position_ids=position_ids) for m in (model, twin)]
        assert torch.equal(outputs[0].logits, outputs[1].logits)
        steps = [
            m(
                input_ids=step,
                attention_mask=mask,
                position_ids=step_positions,
                **{CACHE_NAME: output[CACHE_NAME]},
            ).logits
            for m, output in zip((model, twin), outputs, strict=True)
        ]
        assert torch.equal(*steps)


def test_dense_mode_takes_what_qwen_takes(prompts):
    """Embeddings without token types, and types of the new tokens alone on a cache."""
    model = build_model(torch.float32, nsa_mode="dense")
    twin = qwen_twin(model)
    first, second = prompts.one([5]), prompts.one([2, VIDEO, 4], seed=1)
    second.pop("attention_mask")
    embeds = model.get_input_embeddings()(first["input_ids"])
    positions = torch.arange(5, 51).expand(3, 1, -1)
    with torch.no_grad():
        assert torch.equal(model(inputs_embeds=embeds).logits, twin(inputs_embeds=embeds).logits)
        logits = [
            m(**second, position_ids=positions, **{CACHE_NAME: m(**first)[CACHE_NAME]}).logits for m in (model, twin)
        ]
    assert torch.equal(*logits)


@pytest.mark.filterwarnings("ignore:`past_key_values` is deprecated:FutureWarning")
@pytest.mark.parametrize("mode", ["sparse", "released", "dense"])
def test_the_cache_goes_by_either_name(prompts, mode):
    """`past_key_values`, or `cache` as in transformers 5.24 and later: every module fills and reads the one given."""
    model = build_released() if mode == "released" else build_model(nsa_mode=mode)
    inputs, step = prompts.one([3, VIDEO, 4]), torch.tensor([[7]])
    length = inputs["input_ids"].shape[1]
    for part in (model, model.model, model.model.language_model):
        outputs = []
        for name in ("past_key_values", "cache"):
            cache = DynamicCache(config=model.config.text_config)
            with torch.no_grad():
                model(**inputs, **{name: cache}, use_cache=True)
                assert cache.get_seq_length() == length
                outputs.append(part(input_ids=step, **{name: cache})[0])
            assert cache.get_seq_length() == length + 1
        assert torch.equal(*outputs)


@pytest.mark.parametrize("options", [{}, {"prompt_lookup_num_tokens": 2}], ids=str)
def test_no_name_is_handed_on_that_transformers_gives_up(model, prompts, options):
    inputs, new = prompts.one([3, VIDEO, 4]), {"max_new_tokens": 3, "do_sample": False}
    cache = DynamicCache(config=model.config.text_config)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("error", FutureWarning)
        model(**inputs, **{CACHE_NAME: cache})
        model.generate(**inputs, **new, **options)
        longer = {"input_ids": torch.nn.functional.pad(inputs["input_ids"], (0, 2), value=7)}
        model.generate(**longer, **new, **{CACHE_NAME: cache})


def test_text_prompts_may_bring_their_own_mask(model, prompts):
    inputs = prompts.one([9])
    causal = torch.ones(1, 1, 9, 9, dtype=torch.bool).tril()
    with torch.no_grad():
        expected = model(**inputs).logits
        torch.testing.assert_close(
            model(**(inputs | {"attention_mask": causal})).logits, expected, atol=1e-9, rtol=1e-9
        )


def test_embeddings_without_token_types_are_text(model, prompts):
    inputs = prompts.one([9])
    with torch.no_grad():
        embeds = model.get_input_embeddings()(inputs["input_ids"])
        assert torch.equal(model(inputs_embeds=embeds).logits, model(input_ids=inputs["input_ids"]).logits)


def test_text_prompts_are_qwen_to_the_last_bit(prompts):
    model = build_model(torch.float32)
    inputs = prompts.batch([prompts.one([9]), prompts.one([14], seed=1)])
    with torch.no_grad():
        assert torch.equal(model(**inputs).logits, qwen_twin(model)(**inputs).logits)


def open_selection_gate(model):
    """What `convert_weights.py --gate-init selection` writes: selection open, the other two shut."""
    for layer in model.model.language_model.layers:
        gate = layer.self_attn.g_proj_2
        torch.nn.init.zeros_(gate.weight)
        gate.bias.data.copy_(torch.tensor([-30.0, 30.0, -30.0]).repeat(gate.out_features // 3))


def test_open_selection_gate_equals_dense_on_short_videos(prompts):
    model = build_model(block_counts=10)
    open_selection_gate(model)
    inputs = prompts.one([VIDEO, 7])  # 40 tokens = block_counts * block_size
    with torch.no_grad():
        sparse = model(**inputs).logits
        model.config.nsa_mode = "dense"
        dense = model(**inputs).logits
        torch.testing.assert_close(sparse[:, :40], dense[:, :40], atol=1e-9, rtol=1e-9)
        model.config.nsa_mode, model.config.block_counts = "sparse", 9
        assert (model(**inputs).logits - dense)[:, :40].abs().max() > 1e-3


def test_settings_changed_on_a_loaded_model_take_effect(prompts):
    inputs = prompts.one([3, VIDEO, 4])
    model = build_model()
    with torch.no_grad():
        before = model(**inputs).logits
        for name, value in (("block_counts", 3), ("block_size", 5), ("window_size", 2), ("gate_temperature", 1.0)):
            setattr(model.config, name, value)
            changed = model(**inputs).logits
            torch.testing.assert_close(changed, build_model(**{name: value})(**inputs).logits, atol=0, rtol=0)
            assert not torch.equal(changed, before)
            setattr(model.config, name, getattr(build_config(), name))
        assert torch.equal(model(**inputs).logits, before)


@pytest.mark.parametrize("implementation", ["eager", "flash_attention_2"])
def test_dense_part_runs_on_every_attention_implementation(prompts, implementation, monkeypatch):
    """eager for real; flash attention by its contract: no mask, causal from the bottom right."""

    def flash(module, query, key, value, attention_mask, scaling=None, **kwargs):
        assert attention_mask is None and module.is_causal
        rows, keys = query.shape[2], key.shape[2]
        key, value = (x.repeat_interleave(module.num_key_value_groups, dim=1) for x in (key, value))
        mask = torch.ones(rows, keys, dtype=torch.bool).tril(keys - rows)
        output = torch.nn.functional.scaled_dot_product_attention(query, key, value, mask, scale=scaling)
        return output.transpose(1, 2), None

    inputs = prompts.batch([prompts.one(LAYOUTS["images and videos"]), prompts.one([4, VIDEO, 30], seed=1)])
    valid = inputs["attention_mask"].bool()
    monkeypatch.setattr(layer_videonsa, "MAX_SCORES", 4 * 80 * 8)  # chunks of about 8 rows
    model = build_model()
    with torch.no_grad():
        expected = model(**inputs).logits[valid]
        if implementation == "flash_attention_2":
            monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._global_mapping, implementation, flash)
        for layer in model.model.language_model.layers:
            monkeypatch.setattr(layer.self_attn.config, "_attn_implementation_internal", implementation)
        tolerance = 1e-5 if implementation == "eager" else 1e-9  # transformers' eager softmax runs in float32
        torch.testing.assert_close(model(**inputs).logits[valid], expected, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_errs_no_more_than_dense(prompts, dtype):
    """Against the float64 truth, sparse attention may not lose more than twice what Qwen2.5-VL's dense one loses."""
    inputs = prompts.one([5, ("video", 8, 4, 4), 6])
    # All blocks selected: block choice, which rounding may flip, plays no part.
    assert_errs_no_more_than_dense(build_model(block_counts=8), build_model(dtype, block_counts=8), inputs)


def test_autocast_trains_in_bfloat16(prompts):
    assert_autocast_trains(build_model(torch.float32, block_counts=10), prompts.one([5, VIDEO, 6]))


def test_autocast_with_text_in_the_cache_first(prompts):
    """Text alone takes Qwen2.5-VL's path, which caches keys in float32 under autocast; vision tokens join them."""
    inputs = prompts.one([5, VIDEO, 6])
    inputs["pixel_values_videos"] = inputs["pixel_values_videos"].float()
    model = build_model(torch.float32, block_counts=10)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        expected = model(**inputs).logits
        cache = model(input_ids=inputs["input_ids"][:, :5])[CACHE_NAME]
        rest = inputs | {"input_ids": inputs["input_ids"][:, 5:]}
        output = model(**rest, **{CACHE_NAME: cache}).logits
    assert (output - expected[:, 5:]).abs().mean() < 0.02 * expected.abs().mean()


def test_gradient_checkpointing_changes_no_gradient(prompts):
    assert_checkpointing_changes_no_gradient(build_model, prompts, VIDEO)


def test_gradients_equal_the_oracles(prompts, monkeypatch):
    inputs = prompts.one([3, ("video", 4, 4, 4), 4])
    types = inputs["mm_token_type_ids"][0].tolist()
    gradients = []
    for patched in (False, True):
        model = build_model()
        with monkeypatch.context() as patch:
            if patched:
                patch.setattr(
                    VideoNSAAttention,
                    "forward",
                    lambda self, **kwargs: oracle_attention(self, token_types=types, **kwargs),
                )
            model(**inputs, labels=inputs["input_ids"]).loss.backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    for ours, expected in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, expected, atol=1e-10, rtol=1e-7)


def test_lora_trains_saves_and_reloads(prompts, tmp_path):
    peft = pytest.importorskip("peft")
    inputs = prompts.one([3, VIDEO, 4])
    lora = peft.LoraConfig(target_modules=["q_proj", "v_proj", "g_proj_1", "g_proj_2"], r=4, init_lora_weights=False)
    model = peft.get_peft_model(build_model().train(), lora)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    losses = []
    for _ in range(4):
        loss = model(**inputs, labels=inputs["input_ids"]).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    model.eval().save_pretrained(tmp_path)
    reloaded = peft.PeftModel.from_pretrained(build_model(), tmp_path)
    with torch.no_grad():
        torch.testing.assert_close(reloaded(**inputs).logits, model(**inputs).logits, atol=1e-9, rtol=1e-9)


def test_layers_offloaded_by_accelerate(prompts, tmp_path):
    """`device_map` with offloading moves every layer argument through accelerate's hooks, the routing included."""
    model = build_model(torch.float32)
    model.save_pretrained(tmp_path / "model")
    resident = ["visual", *(f"language_model.{name}" for name in ("embed_tokens", "layers.0", "norm", "rotary_emb"))]
    device_map = {f"model.{name}": "cpu" for name in resident}
    device_map |= {"model.language_model.layers.1": "disk", "lm_head": "cpu"}
    offloaded = type(model).from_pretrained(
        tmp_path / "model", device_map=device_map, offload_folder=tmp_path / "offload", dtype=torch.float32
    )
    inputs = prompts.one([3, VIDEO, 4])
    with torch.no_grad():
        assert torch.equal(offloaded(**inputs).logits, model(**inputs).logits)


def test_routing_moves_whole():
    """What accelerate's hooks do for layers on another device."""
    mask = torch.ones(2, 9, dtype=torch.long)
    mask[0, 4] = 0
    moved = VisionRouting.build(torch.tensor([[0, 0, 2, 2, 0, 0, 2, 0, 0]] * 2), mask, 0).to("meta")
    tensors = [*moved.vision_rows, *moved.vision_keys, *moved.text_rows, *(run.keys for run in moved.text_runs)]
    tensors += [moved.lengths.cu_seqlens_q, moved.lengths.cu_seqlens_k]
    assert (
        sum(isinstance(tensor, torch.Tensor) for tensor in tensors) == 6 + 3 + 2
    )  # slices of the unpadded sample stay
    assert all(tensor.device.type == "meta" for tensor in tensors if isinstance(tensor, torch.Tensor))
    assert moved.lengths.offsets_q == (0, 3, 6)


@pytest.mark.parametrize("extra", [0, 1])
def test_rows_that_complete_a_share_are_zero(extra):
    """Sequence parallelism completes the last share of the tokens with rows that the routing does not know."""
    where = VisionRouting.build(torch.tensor([[0, 2, 2, 2, 0, 0]]), None, 0)
    rows = torch.arange(1.0, 7.0)[:, None, None].expand(6, 2, 4)  # [row, num_heads, head_dim], of its number
    placed = place_rows(torch.empty(1, 2, 6 + extra, 4), rows[1:4], [rows[:1], rows[4:]], where)
    assert placed[0, :, 1, 3].tolist() == [1, 2, 3, 4, 5, 6, 0][: 6 + extra]


def test_new_gates_start_at_one_half():
    model = modeling_videonsa.VideoNSAForConditionalGeneration(build_config())
    for layer in model.model.language_model.layers:
        attention = layer.self_attn
        assert not attention.g_proj_2.weight.any() and not attention.g_proj_2.bias.any()
        assert attention.g_proj_1.weight.std() > 0.01
    assert set(model._no_split_modules) == {"VideoNSADecoderLayer", "Qwen2_5_VLVisionBlock"}


class LargestTensor(TorchDispatchMode):
    """Remembers the most elements that any operation returned in one tensor."""

    def __init__(self):
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in torch.utils._pytree.tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                self.numel = max(self.numel, tensor.numel())
        return result


def test_no_tensor_of_sequence_length_squared(prompts, monkeypatch):
    monkeypatch.setattr(dense, "_MASK_ELEMENTS", 1 << 18)  # as small beside this length as the real one at 128K
    model = build_model(torch.float32)
    inputs = prompts.batch([prompts.one([600, ("video", 300, 4, 4), 900]), prompts.one([900, VIDEO, 9], seed=1)])
    length = inputs["input_ids"].shape[1]
    position_ids, _ = model.model.get_rope_index(**inputs)
    types, mask = inputs["mm_token_type_ids"], inputs["attention_mask"]
    with torch.no_grad(), LargestTensor() as largest:
        model(
            inputs_embeds=model.get_input_embeddings()(inputs["input_ids"]),
            position_ids=position_ids,
            mm_token_type_ids=types,
            attention_mask=mask,
            logits_to_keep=1,
        )
    assert largest.numel < length**2 / 8


def test_routing_is_built_once_for_all_layers(model, prompts, monkeypatch):
    calls = []
    build = VisionRouting.build.__func__
    monkeypatch.setattr(VisionRouting, "build", classmethod(lambda cls, *args: calls.append(1) or build(cls, *args)))
    with torch.no_grad():
        model(**prompts.one([3, VIDEO, 4]))
    assert len(calls) == 1 and model.config.text_config.num_hidden_layers > 1


def test_output_attentions_is_refused_or_right(prompts):
    model = build_model(attn_implementation="eager")
    inputs = prompts.one([3, VIDEO, 4])
    with pytest.raises(ValueError, match="output_attentions"):
        model(**inputs, output_attentions=True)
    for config in (model.config, model.config.text_config):
        config.output_attentions = True
        with pytest.raises(ValueError, match="output_attentions"):
            model(**inputs)
        config.output_attentions = False
    model.config.nsa_mode = "dense"
    with torch.no_grad():
        attentions = model(**inputs, output_attentions=True).attentions
    assert len(attentions) == 2
    torch.testing.assert_close(attentions[0].sum(-1), torch.ones(1, 4, 47, dtype=torch.float64))


def test_output_hidden_states(model, prompts):
    with torch.no_grad():
        assert len(model(**prompts.one([3, VIDEO, 4]), output_hidden_states=True).hidden_states) == 3


def test_wrong_inputs_are_named(model, prompts):
    inputs = prompts.one([3, VIDEO, 4])
    with pytest.raises(ValueError, match=r"`mm_token_type_ids` must have shape .*\(1, 47\).*got \(1, 46\)"):
        model(**(inputs | {"mm_token_type_ids": inputs["mm_token_type_ids"][:, 1:]}))
    with pytest.raises(ValueError, match="`attention_mask` must be 2D"):
        model(**(inputs | {"attention_mask": torch.ones(1, 1, 47, 47)}))
    with pytest.raises(ValueError, match="`nsa_mode` = 'dense' is no argument of a call"):
        model(**inputs, nsa_mode="dense")
    embeds = model.get_input_embeddings()(inputs["input_ids"])
    with pytest.raises(ValueError, match="`mm_token_type_ids` is needed"):
        model(inputs_embeds=embeds, **{key: inputs[key] for key in ("pixel_values_videos", "video_grid_thw")})
    packed = torch.arange(47).remainder(45)
    for position_ids in (packed[None], packed.expand(3, 1, 47), packed.expand(4, 1, 47)):
        # Without a mask, text positions tell samples apart: tests/test_packing.py.
        for mask in (None, inputs["attention_mask"])[len(position_ids) == 4 :]:
            with pytest.raises(ValueError, match="packs several samples"):
                model(**(inputs | {"attention_mask": mask, "position_ids": position_ids}))
    with pytest.raises(ValueError, match="packs several samples"):
        model(**inputs, cu_seq_lens_q=torch.tensor([0, 20, 47]))
    with torch.no_grad():
        cache = model(input_ids=torch.arange(5)[None])[CACHE_NAME]
    with pytest.raises(ValueError, match="`mm_token_type_ids` must cover the 5 cached tokens"):
        model(**inputs, **{CACHE_NAME: cache})


def test_the_repository_root_is_the_7b_model():
    config = AutoConfig.from_pretrained(ROOT, trust_remote_code=True)
    text = config.text_config
    assert (text.num_hidden_layers, text.num_attention_heads, text.num_key_value_heads) == (28, 28, 4)
    with torch.device("meta"):
        model = AutoModel.from_config(config, trust_remote_code=True)
    gates = sum(p.numel() for name, p in model.named_parameters() if ".g_proj_" in name)
    total = sum(p.numel() for p in model.parameters())
    # 8.29 B parameters of Qwen2.5-VL-7B, and two linear layers with bias in each of the 28 layers
    assert gates == 28 * (3584 * 3584 + 3584 + 3584 * 84 + 84)
    assert total - gates == 8_292_166_656
    assert model.can_generate()


def test_every_kernel_file_is_declared():
    files = {path.stem for path in (ROOT / "nsa_kernels").glob("*.py")} - {"__init__"}
    assert files == set(modeling_videonsa.KERNEL_NAMES)
    assert (ROOT / "nsa_kernels/__init__.py").read_text() == ""


def test_prompts_helper_pads_on_the_asked_side(prompts):
    batch = Prompts.batch([prompts.one([2]), prompts.one([4])])
    assert batch["attention_mask"].tolist() == [[0, 0, 1, 1], [1, 1, 1, 1]]
