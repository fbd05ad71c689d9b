"""The model with `nsa_variant="released"`: routing by positions, batches, generation, and what is refused."""

import pytest
import torch
from conftest import (
    Prompts,
    assert_autocast_trains,
    assert_batch_equals_singles,
    assert_checkpointing_changes_no_gradient,
    assert_errs_no_more_than_dense,
    assert_padding_between_tokens_changes_nothing,
    build_config,
    build_released,
)
from nsa_cases import CountSynchronisations
from released_oracle import oracle
from test_modeling import qwen_twin
from transformers import StaticCache
from transformers.generation import utils as generation_utils
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import apply_rotary_pos_emb

import released_videonsa
from generation_videonsa import CACHE_NAME
from modeling_videonsa import VideoNSAAttention

VIDEO = ("video", 6, 4, 8)  # 48 tokens: 6 steps of 2 x 4
LAYOUT = [5, VIDEO, 3, ("image", 4, 4), 7]
LAYOUTS = {
    "text-video-text": [5, VIDEO, 7],
    "video first": [VIDEO, 7],
    "video only": [VIDEO],
    "images and videos": [3, ("image", 4, 6), 2, VIDEO, 1, ("video", 3, 4, 4), 1, ("image", 2, 2), 9],
    "shorter than a block": [1, ("image", 2, 4), 2],
}


@pytest.fixture(scope="module")
def model():
    return build_released()


def positions(model, inputs):
    return model.model.get_rope_index(**inputs)[0]


def oracle_attention(self, hidden_states, position_embeddings, position_ids_3d, **kwargs):
    """One layer for one unpadded sample, from the M-RoPE positions on."""
    heads = (*hidden_states.shape[:2], -1, self.head_dim)
    q, k, v = (proj(hidden_states).view(heads).transpose(1, 2) for proj in (self.q_proj, self.k_proj, self.v_proj))
    q, k = apply_rotary_pos_emb(q, k, *position_embeddings)
    q, k, v = (x[0].transpose(0, 1) for x in (q, k, v))
    logits = self.g_proj_2(torch.nn.functional.gelu(self.g_proj_1(hidden_states)))[0].view(len(q), 28, 3)
    t, h, w = position_ids_3d[:, 0]
    is_vision = ~((t == h) & (h == w))
    config = self.config
    settings = config.block_size, config.block_counts, config.window_size
    output = oracle(q, k, v, logits / config.gate_temperature, is_vision, *settings)
    return self.o_proj(output.flatten(1))[None], None


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_forward_follows_the_specification(model, prompts, layout, monkeypatch):
    inputs = prompts.one(layout, seconds_per_grid=0.5 if layout is LAYOUTS["video only"] else 1.0)
    with torch.no_grad():
        logits = model(**inputs).logits
        position_ids = positions(model, inputs)
        monkeypatch.setattr(
            VideoNSAAttention,
            "forward",
            lambda self, **kwargs: oracle_attention(self, position_ids_3d=position_ids, **kwargs),
        )
        torch.testing.assert_close(logits, model(**inputs).logits, atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize("side", ["left", "right"])
def test_batch_equals_singles(model, prompts, side):
    assert_batch_equals_singles(model, prompts, [*LAYOUTS.values(), [6]], side)


def test_padding_between_tokens(model, prompts):
    assert_padding_between_tokens_changes_nothing(model, prompts, VIDEO)


def routing_of(model, inputs, monkeypatch):
    """The routing that the layers of one forward call get."""
    seen = []
    forward = VideoNSAAttention.forward

    def record(self, *args, vision_routing=None, **kwargs):
        seen.append(vision_routing)
        return forward(self, *args, vision_routing=vision_routing, **kwargs)

    with monkeypatch.context() as patch, torch.no_grad():
        patch.setattr(VideoNSAAttention, "forward", record)
        model(**inputs)
    assert len(seen) > 1 and all(routing is seen[0] for routing in seen), "built once for all layers"
    return seen[0]


def test_vision_tokens_are_told_by_their_positions(model, prompts, monkeypatch):
    inputs = prompts.one([2, ("video", 3, 4, 6), 2], seconds_per_grid=1.0)  # two positions a second
    ((_, rows, layout),) = routing_of(model, inputs, monkeypatch).samples
    assert rows == slice(0, 22)
    # Of the grid's (t, h, w) = (0|2|4, 0|1, 0|1|2), only (0, 0, 0) is on the diagonal; at one temporal position for
    # all steps, (0, 0, 0) of each is.
    assert layout.text_positions.tolist() == [0, 1, 2, 20, 21]
    truncated = inputs | {"second_per_grid_ts": [0.5]}
    ((_, _, layout),) = routing_of(model, truncated, monkeypatch).samples
    assert layout.text_positions.tolist() == [0, 1, 2, 8, 14, 20, 21]
    # Given positions say it all: here that the video is text, and that a text token is vision.
    plain = torch.arange(22).expand(3, 1, -1).clone()
    assert routing_of(model, inputs | {"position_ids": plain}, monkeypatch) is None
    plain[1, 0, 7] = 3
    for axes in (plain, torch.cat([plain[:1], plain])):
        ((_, _, layout),) = routing_of(model, inputs | {"position_ids": axes}, monkeypatch).samples
        assert (~layout.vision_mask).nonzero().flatten().tolist() == [*range(7), *range(8, 22)]


def test_an_image_of_one_token_is_text(prompts, monkeypatch):
    model, inputs = build_released(torch.float32), prompts.one([4, ("image", 2, 2), 3])
    inputs["pixel_values"] = inputs["pixel_values"].float()
    assert routing_of(model, inputs, monkeypatch) is None
    with torch.no_grad():
        expected = qwen_twin(model)(**inputs, position_ids=positions(model, inputs)).logits
        assert torch.equal(model(**inputs).logits, expected)


def test_positions_are_enough(model, prompts):
    """Embeddings and positions, without token types or grids."""
    inputs = prompts.one(LAYOUT)
    with torch.no_grad():
        expected, embeds = model(**inputs, output_hidden_states=True), None
        embeds = expected.hidden_states[0]
        output = model(inputs_embeds=embeds, position_ids=positions(model, inputs))
        torch.testing.assert_close(output.logits, expected.logits, atol=1e-9, rtol=1e-9)


def test_positions_of_one_row_hold_for_a_batch(model, prompts):
    inputs = prompts.one([5, VIDEO, 7])
    twice = prompts.batch([inputs, prompts.one([5, VIDEO, 7], seed=1)])
    with torch.no_grad():
        expected = model(**twice).logits
        output = model(**twice, position_ids=positions(model, inputs)).logits
    torch.testing.assert_close(output, expected, atol=1e-9, rtol=1e-9)


def test_text_prompts_and_dense_mode_are_qwen_to_the_last_bit(prompts):
    model = build_released(torch.float32)
    text = prompts.batch([prompts.one([9]), prompts.one([14], seed=1)])
    mixed = prompts.batch([prompts.one(LAYOUT), prompts.one([4, VIDEO, 30], seed=1)])
    mixed["position_ids"] = positions(model, mixed)
    mixed |= {key: mixed[key].float() for key in ("pixel_values", "pixel_values_videos")}
    twin = qwen_twin(model)
    with torch.no_grad():
        assert torch.equal(model(**text).logits, twin(**text).logits)
        expected = twin(**mixed).logits
        assert (model(**mixed).logits - expected).abs().max() > 1e-2
        model.config.nsa_mode = "dense"
        assert torch.equal(model(**mixed).logits, expected)


def test_variants_differ_and_can_be_changed_on_a_loaded_model(prompts):
    model, inputs = build_released(), prompts.one(LAYOUT)
    with torch.no_grad():
        as_released = model(**inputs).logits
        model.config.nsa_variant = "paper"
        as_paper = model(**inputs).logits
        torch.testing.assert_close(as_paper, build_released(nsa_variant="paper")(**inputs).logits, atol=0, rtol=0)
        assert (as_paper - as_released).abs().max() > 1e-2
        model.config.nsa_variant = "released"
        assert torch.equal(model(**inputs).logits, as_released)


@pytest.fixture(scope="module")
def batch(prompts):
    return prompts.batch(
        [prompts.one(LAYOUT), prompts.one([2, ("video", 4, 4, 6), 30], seed=1), prompts.one([9], seed=2)]
    )


def generate(model, inputs, **options):
    options = {"max_new_tokens": 4, "do_sample": False} | options
    return model.generate(**inputs, return_dict_in_generate=True, output_logits=True, **options)


def test_generate_is_one_prompt_and_dense_steps(model, prompts, batch):
    """`generate` of a batch, against forward calls of each sample alone."""
    output = generate(model, batch)
    for sample, single in enumerate([prompts.one(LAYOUT), prompts.one([2, ("video", 4, 4, 6), 30], seed=1)]):
        with torch.no_grad():
            step = model(**single)
            next_position = int(positions(model, single).max()) + 1
            for i, logits in enumerate(output.logits):
                torch.testing.assert_close(step.logits[0, -1].float(), logits[sample], atol=1e-5, rtol=1e-5)
                token = logits[sample].argmax()[None, None]
                assert token == output.sequences[sample, batch["input_ids"].shape[1] + i]
                # Not only the model's own position of the step: this one.
                position_ids = torch.full((3, 1, 1), next_position + i)
                step = model(input_ids=token, **{CACHE_NAME: step[CACHE_NAME]}, position_ids=position_ids)


@pytest.mark.parametrize("options", [{"cache_implementation": "static"}, {"prefill_chunk_size": 512}], ids=str)
def test_caches_change_nothing(model, batch, options):
    if "prefill_chunk_size" in options and not hasattr(generation_utils, "_slice_mm_encoder_output"):
        pytest.skip("transformers before 5.23 cannot split images and videos over chunks")
    output, expected = generate(model, batch, **options), generate(model, batch)
    assert torch.equal(output.sequences, expected.sequences)
    torch.testing.assert_close(torch.stack(output.logits), torch.stack(expected.logits), atol=1e-8, rtol=1e-8)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"use_cache": False}, "`use_cache` = False: .* whole prompt"),
        ({"prompt_lookup_num_tokens": 3}, "assisted decoding: .* whole prompt"),
        ({"prefill_chunk_size": 60}, "`prefill_chunk_size` = 60: .* whole prompt"),
        ({"prefill_chunk_size": 1}, "`prefill_chunk_size` = 1: .* whole prompt"),
    ],
    ids=str,
)
def test_what_would_see_part_of_a_prompt_is_refused(model, prompts, options, message):
    single = prompts.one(LAYOUT)
    assert single["input_ids"].shape[1] > 60
    with pytest.raises(ValueError, match=message):
        generate(model, single, **options)
    text = prompts.one([70])
    assert torch.equal(generate(model, text, **options).sequences, generate(model, text).sequences)


@pytest.mark.parametrize("first", [[3, ("image", 4, 4), 2], [6]], ids=["vision", "text"])
def test_vision_tokens_cannot_join_a_cache(model, prompts, first):
    first, second = prompts.one(first), prompts.one([2, VIDEO, 3], seed=1)
    types = torch.cat([first["mm_token_type_ids"], second["mm_token_type_ids"]], dim=1)
    del second["attention_mask"]
    message = "`past_key_values` holds .* tokens, and vision tokens cannot join them"
    for changed in ({}, {"position_ids": positions(model, second) + 20}):
        with torch.no_grad():
            cache = model(**first)[CACHE_NAME]
        with pytest.raises(ValueError, match=message):
            model(**(second | changed | {"mm_token_type_ids": types}), **{CACHE_NAME: cache})
    # By positions alone, and a single token by its type.
    embeds = torch.zeros(1, second["input_ids"].shape[1], 448, dtype=torch.float64)
    with torch.no_grad():
        cache = model(**first)[CACHE_NAME]
    with pytest.raises(ValueError, match=message):
        model(inputs_embeds=embeds, position_ids=positions(model, second), **{CACHE_NAME: cache})
    types = torch.nn.functional.pad(first["mm_token_type_ids"], (0, 1), value=2)
    with pytest.raises(ValueError, match=message):
        model(inputs_embeds=embeds[:, :1], mm_token_type_ids=types, **{CACHE_NAME: cache})


def test_a_text_turn_on_a_kept_cache_is_dense(model, prompts):
    """As decoding steps are, one by one or together."""
    first = prompts.one(LAYOUT)
    more = torch.tensor([[7, 8, 9]])
    with torch.no_grad():
        cache = model(**first)[CACHE_NAME]
        together = model(input_ids=more, **{CACHE_NAME: cache}).logits
        cache = model(**first)[CACHE_NAME]
        for i in range(3):
            one = model(input_ids=more[:, i : i + 1], **{CACHE_NAME: cache}).logits
            torch.testing.assert_close(one[0, 0], together[0, i], atol=1e-9, rtol=1e-9)


def test_vision_tokens_without_positions_are_refused(model, prompts):
    inputs = prompts.one([3, VIDEO, 4])
    embeds = model.get_input_embeddings()(inputs["input_ids"])
    with pytest.raises(ValueError, match="`image_grid_thw` or `video_grid_thw` is missing"):
        model(inputs_embeds=embeds, mm_token_type_ids=inputs["mm_token_type_ids"])


def test_calls_that_nsa_cannot_serve(prompts):
    model = build_released(attn_implementation="eager")
    inputs = prompts.one([3, VIDEO, 4])
    length = inputs["input_ids"].shape[1]
    square = {"attention_mask": torch.ones(1, 1, length, length)}
    with pytest.raises(ValueError, match="`attention_mask` must be 2D"):
        model(**(inputs | square))
    with pytest.raises(ValueError, match="`attention_mask` must be 2D"):
        model(**(inputs | square), position_ids=positions(model, inputs))
    with pytest.raises(ValueError, match=r"`attention_mask` must have shape \(1, 55\), got \(1, 54\)"):
        model(**(inputs | {"attention_mask": torch.ones(1, 54)}), position_ids=positions(model, inputs))
    with pytest.raises(ValueError, match=r"`position_ids` must have shape \(3 or 4, 1, 55\), got \(3, 1, 54\)"):
        model(**inputs, position_ids=positions(model, inputs)[..., 1:])
    with pytest.raises(ValueError, match="packs several samples"):
        model(**inputs, cu_seq_lens_q=torch.tensor([0, 20, length]))
    packed = positions(model, inputs).clone()
    packed[..., -2:] = torch.arange(2)
    with pytest.raises(ValueError, match="packs several samples"):
        model(**inputs, position_ids=packed)
    with pytest.raises(ValueError, match="output_attentions"):
        model(**inputs, output_attentions=True)
    for config in (model.config, model.config.text_config):
        config.output_attentions = True
        with pytest.raises(ValueError, match="output_attentions"):
            model(**inputs)
        config.output_attentions = False


def test_text_prompts_may_bring_their_own_mask(model, prompts):
    text, causal = prompts.one([9]), torch.ones(1, 1, 9, 9, dtype=torch.bool).tril()
    with torch.no_grad():
        expected = model(**text).logits
        for changed in ({}, {"position_ids": torch.arange(9).expand(3, 1, -1)}):
            logits = model(**(text | {"attention_mask": causal} | changed)).logits
            torch.testing.assert_close(logits, expected, atol=1e-9, rtol=1e-9)


def test_a_mask_as_long_as_a_static_cache(model, prompts):
    inputs = prompts.one([3, VIDEO, 4])
    cache = StaticCache(config=model.config.text_config, max_cache_len=80)
    long_mask = torch.nn.functional.pad(inputs["attention_mask"], (0, 80 - inputs["input_ids"].shape[1]))
    with torch.no_grad():
        output = model(**(inputs | {"attention_mask": long_mask}), **{CACHE_NAME: cache}).logits
        torch.testing.assert_close(output, model(**inputs).logits, atol=1e-9, rtol=1e-9)


def test_gradient_checkpointing_changes_no_gradient(prompts):
    assert_checkpointing_changes_no_gradient(build_released, prompts, VIDEO)


def test_half_precision_errs_no_more_than_dense(prompts):
    # All blocks selected: block choice, which rounding may flip, plays no part.
    models = (build_released(dtype, block_size=16, block_counts=4) for dtype in (torch.float64, torch.bfloat16))
    assert_errs_no_more_than_dense(*models, prompts.one([5, VIDEO, 6]))


def test_autocast_trains_in_bfloat16(prompts):
    assert_autocast_trains(build_released(torch.float32, block_size=16, block_counts=4), prompts.one([5, VIDEO, 6]))


def test_routing_moves_whole():
    """What accelerate's hooks do for layers on another device."""
    grid = torch.arange(9).expand(3, 2, -1).clone()
    grid[0, :, 3:6] = 3
    mask = torch.ones(2, 9, dtype=torch.long)
    mask[0, 7] = 0
    routing = released_videonsa.ReleasedRouting.build(mask, mask, {"position_ids": grid}, build_config().text_config)
    assert [(sample, layout.text_positions.tolist()) for sample, _, layout in routing.samples] == [
        (0, [0, 1, 2, 3, 6, 7]),
        (1, [0, 1, 2, 3, 6, 7, 8]),
    ]
    (_, holed, layout), (_, whole, _) = routing.to("meta").samples
    assert holed.device.type == "meta" and whole == slice(0, 9)
    tensors = layout.vision_mask, layout.text_positions, layout.lengths.cu_seqlens_q
    assert all(tensor.device.type == "meta" for tensor in tensors) and layout.lengths.offsets_q == (0, 8)


def test_layers_do_not_read_from_the_device(model, prompts, monkeypatch):
    counts, forward = [], VideoNSAAttention.forward

    def counted(self, *args, **kwargs):
        with CountSynchronisations() as synchronisations, monkeypatch.context() as patch:
            patch.setattr(released_videonsa.utils, "reading_is_free", lambda device: False)
            result = forward(self, *args, **kwargs)
        counts.append(synchronisations.count)
        return result

    monkeypatch.setattr(VideoNSAAttention, "forward", counted)
    with torch.no_grad():
        model(**Prompts.batch([prompts.one(LAYOUT), prompts.one([6], seed=1)]))
    assert counts == [0, 0]
