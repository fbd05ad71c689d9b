"""`generate` and kept caches: every way to run the same prompt gives the same tokens and logits."""

import copy
import inspect

import pytest
import torch
from conftest import build_model
from nsa_cases import CountSynchronisations
from transformers import DynamicCache, GenerationConfig, Qwen2Config, Qwen2ForCausalLM, StaticCache
from transformers.generation import utils as generation_utils

from generation_videonsa import CACHE_NAME

LAYOUT = [5, ("video", 6, 4, 4), 3, ("image", 4, 4), 7]
NEW_TOKENS = 8


@pytest.fixture(scope="module")
def greedy_model():
    return build_model()


@pytest.fixture(scope="module")
def batch(prompts):
    return prompts.batch(
        [prompts.one(LAYOUT), prompts.one([2, ("video", 4, 4, 6), 30], seed=1), prompts.one([9], seed=2)]
    )


def generate(model, inputs, **options):
    options = {"max_new_tokens": NEW_TOKENS, "do_sample": False} | options
    return model.generate(**inputs, return_dict_in_generate=True, output_logits=True, **options)


@pytest.fixture(scope="module")
def expected(greedy_model, batch):
    return generate(greedy_model, batch, use_cache=False)


def assert_same(output, expected):
    assert torch.equal(output.sequences, expected.sequences)
    torch.testing.assert_close(torch.stack(output.logits), torch.stack(expected.logits), atol=1e-8, rtol=1e-8)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"cache_implementation": "static"},
        {"prefill_chunk_size": 1},
        {"prefill_chunk_size": 7},
        {"prefill_chunk_size": 20},
        {"prefill_chunk_size": 7, "cache_implementation": "static"},
    ],
    ids=str,
)
def test_caches_and_chunks_change_nothing(greedy_model, batch, expected, options):
    if "prefill_chunk_size" in options and not hasattr(generation_utils, "_slice_mm_encoder_output"):
        pytest.skip("transformers before 5.23 cannot split images and videos over chunks")
    assert_same(generate(greedy_model, batch, **options), expected)


def test_chunked_prefill_is_refused_where_transformers_would_lose_the_video(greedy_model, batch, monkeypatch):
    monkeypatch.delattr(generation_utils, "_slice_mm_encoder_output", raising=False)
    with pytest.raises(ValueError, match=r"`prefill_chunk_size` = 7 .* needs transformers 5\.23"):
        generate(greedy_model, batch, prefill_chunk_size=7)


def test_batch_equals_singles(greedy_model, prompts, batch, expected):
    for sample, single in enumerate([prompts.one(LAYOUT), prompts.one([2, ("video", 4, 4, 6), 30], seed=1)]):
        output = generate(greedy_model, single)
        length = batch["input_ids"].shape[1]
        assert torch.equal(output.sequences[0, -NEW_TOKENS:], expected.sequences[sample, length:])


def test_token_types_may_be_left_out(greedy_model, batch, expected):
    without = {key: value for key, value in batch.items() if key != "mm_token_type_ids"}
    assert_same(generate(greedy_model, without), expected)


def test_embeddings_instead_of_token_ids(greedy_model, prompts, monkeypatch):
    single = prompts.one(LAYOUT)
    with monkeypatch.context() as patch, torch.no_grad():
        seen = []
        forward = greedy_model.model.language_model.forward
        patch.setattr(
            greedy_model.model.language_model,
            "forward",
            lambda **kwargs: seen.append(kwargs["inputs_embeds"]) or forward(**kwargs),
        )
        greedy_model(**single)
    dropped = ("input_ids", "pixel_values", "pixel_values_videos")
    embeds = {key: value for key, value in single.items() if key not in dropped}
    output, expected = generate(greedy_model, embeds | {"inputs_embeds": seen[0]}), generate(greedy_model, single)
    assert torch.equal(output.sequences, expected.sequences[:, -NEW_TOKENS:])
    torch.testing.assert_close(torch.stack(output.logits), torch.stack(expected.logits), atol=1e-8, rtol=1e-8)
    with pytest.raises(ValueError, match=r"`mm_token_type_ids` must have shape \(1, \d+\), .*got None"):
        generate(greedy_model, {"inputs_embeds": seen[0], "video_grid_thw": single["video_grid_thw"]})


def test_num_return_sequences(greedy_model, prompts):
    single = prompts.one(LAYOUT)
    torch.manual_seed(0)
    several = greedy_model.generate(**single, max_new_tokens=4, do_sample=True, num_return_sequences=3)
    torch.manual_seed(0)
    repeated = prompts.batch([single] * 3)
    assert torch.equal(several, greedy_model.generate(**repeated, max_new_tokens=4, do_sample=True))


def test_beam_search(greedy_model, batch):
    """With and without a cache, and the best beam is at least as likely as the greedy continuation."""
    options = {"num_beams": 3, "output_scores": True}
    cached = generate(greedy_model, batch, **options)
    assert torch.equal(cached.sequences, generate(greedy_model, batch, use_cache=False, **options).sequences)
    logits = torch.stack(generate(greedy_model, batch).logits).log_softmax(-1)
    greedy_score = logits.max(-1).values.sum(0) / NEW_TOKENS
    assert (cached.sequences_scores >= greedy_score - 1e-9).all()


@pytest.mark.parametrize("kind", ["assistant", "prompt lookup", "itself"])
def test_assisted_decoding_gives_the_greedy_answer(greedy_model, prompts, kind):
    single = prompts.one(LAYOUT)
    options = {"prompt_lookup_num_tokens": 3} if kind == "prompt lookup" else {}
    if kind == "assistant":
        options["assistant_model"] = build_model(seed=1)
    elif kind == "itself":
        options["assistant_model"] = build_model()
    output = greedy_model.generate(**single, max_new_tokens=NEW_TOKENS, do_sample=False, **options)
    assert torch.equal(output, generate(greedy_model, single).sequences)


def test_a_model_for_text_drafts_for_text_prompts_alone(greedy_model, prompts):
    shape = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1}
    config = Qwen2Config(vocab_size=272, num_attention_heads=2, num_key_value_heads=1, eos_token_id=None, **shape)
    draft = Qwen2ForCausalLM(config).double().eval()
    text = prompts.one([9])
    output = greedy_model.generate(**text, max_new_tokens=NEW_TOKENS, do_sample=False, assistant_model=draft)
    assert torch.equal(output, generate(greedy_model, text).sequences)
    for layout in ([5, ("video", 2, 4, 4), 3], [5, ("image", 4, 4), 3]):
        with pytest.raises(ValueError, match="`assistant_model` = Qwen2ForCausalLM takes no images or videos"):
            greedy_model.generate(**prompts.one(layout), max_new_tokens=4, assistant_model=draft)


@pytest.mark.parametrize("option", [{"assistant_early_exit": 1}, {"use_mtp": True}], ids=str)
@pytest.mark.parametrize("layout", [[9], LAYOUT], ids=["text", "media"])
def test_drafts_from_layers_that_cannot_make_them_are_refused(greedy_model, prompts, option, layout):
    [(name, value)] = option.items()
    if not hasattr(GenerationConfig(), name):
        pytest.skip(f"this transformers has no `{name}`")
    with pytest.raises(ValueError, match=f"`{name}` = {value}: this model has no layers"):
        greedy_model.generate(**prompts.one(layout), max_new_tokens=4, **option)


@pytest.mark.parametrize("cache_class", [DynamicCache, StaticCache])
def test_second_turn_with_a_new_video_on_a_kept_cache(greedy_model, prompts, cache_class):
    first = prompts.one(LAYOUT)
    config = greedy_model.config.text_config
    cache = cache_class(config=config) if cache_class is DynamicCache else StaticCache(config=config, max_cache_len=160)
    answer = generate(greedy_model, first, **{CACHE_NAME: cache})

    # The conversation goes on: the answer, a question, a second video, another question, all as the processor of the
    # whole conversation would give it.
    second = prompts.one([4, ("video", 5, 4, 4), 6, ("image", 2, 4), 3], seed=3)
    whole = {
        "input_ids": torch.cat([answer.sequences, second["input_ids"]], dim=1),
        "mm_token_type_ids": torch.cat(
            [torch.nn.functional.pad(first["mm_token_type_ids"], (0, NEW_TOKENS)), second["mm_token_type_ids"]], dim=1
        ),
    }
    whole["attention_mask"] = torch.ones_like(whole["input_ids"])
    for key in ("pixel_values", "pixel_values_videos", "image_grid_thw", "video_grid_thw", "second_per_grid_ts"):
        whole[key] = torch.cat([first[key], second[key]])

    seen_patches = []
    visual = greedy_model.model.visual
    handle = visual.register_forward_pre_hook(lambda module, args: seen_patches.append(args[0].shape[0]))
    output = generate(greedy_model, whole, **{CACHE_NAME: cache})
    handle.remove()
    assert sorted(seen_patches) == [2 * 4, 5 * 4 * 4]  # the media in the cache were not encoded again
    assert_same(output, generate(greedy_model, whole))

    # An unrelated prompt in between leaves the conversation alone.
    with torch.no_grad():
        greedy_model(**prompts.one([3, ("video", 20, 4, 4), 2], seed=5))
    third = whole | {"input_ids": torch.cat([output.sequences, second["input_ids"][:, :4]], dim=1)}
    extra = third["input_ids"].shape[1] - whole["input_ids"].shape[1]
    third["mm_token_type_ids"] = torch.nn.functional.pad(whole["mm_token_type_ids"], (0, extra))
    third["attention_mask"] = torch.ones_like(third["input_ids"])
    expected = generate(greedy_model, third)
    grids_alone = {name: value for name, value in third.items() if not name.startswith("pixel_values")}
    for inputs in (third, grids_alone):
        assert_same(generate(greedy_model, inputs, **{CACHE_NAME: copy.deepcopy(cache)}), expected)


def test_second_turn_by_plain_forward_calls(greedy_model, prompts):
    first, second = prompts.one(LAYOUT), prompts.one([4, ("video", 30, 4, 4), 6], seed=3)
    whole = {key: torch.cat([first[key], second[key]], 1) for key in ("input_ids", "mm_token_type_ids")}
    for key in ("pixel_values_videos", "video_grid_thw", "second_per_grid_ts"):
        whole[key] = torch.cat([first[key], second[key]])
    for key in ("pixel_values", "image_grid_thw"):
        whole[key] = first[key]
    del first["attention_mask"], second["attention_mask"]
    with torch.no_grad():
        expected = greedy_model(**whole)
        expected_next = greedy_model(input_ids=torch.tensor([[7]]), **{CACHE_NAME: expected[CACHE_NAME]})
        cache = greedy_model(**first)[CACHE_NAME]
        output = greedy_model(**(second | {"mm_token_type_ids": whole["mm_token_type_ids"]}), **{CACHE_NAME: cache})
        output_next = greedy_model(input_ids=torch.tensor([[7]]), **{CACHE_NAME: cache})
    length = second["input_ids"].shape[1]
    torch.testing.assert_close(output.logits, expected.logits[:, -length:], atol=1e-9, rtol=1e-9)
    torch.testing.assert_close(output_next.logits, expected_next.logits, atol=1e-9, rtol=1e-9)


FOLLOW_UPS = {"text": [6], "text and media": [4, ("video", 3, 4, 4), 2, ("image", 2, 4), 3]}


@pytest.mark.parametrize("mode", ["sparse", "dense"])
@pytest.mark.parametrize("follow_up", FOLLOW_UPS.values(), ids=FOLLOW_UPS)
@pytest.mark.parametrize("types", ["first call's", "of one token", "none"])
def test_conversations_go_on_with_the_first_calls_token_types(greedy_model, prompts, mode, follow_up, types):
    """As Qwen2.5-VL's users do: ids and media of the whole conversation, everything else as it was at first."""
    first, second = prompts.one(LAYOUT), prompts.one(follow_up, seed=3)
    try:
        greedy_model.config.nsa_mode = mode
        answer = generate(greedy_model, first)
        whole = dict(first)
        whole["input_ids"] = torch.cat([answer.sequences, second["input_ids"]], dim=1)
        whole["attention_mask"] = torch.ones_like(whole["input_ids"])
        for key in ("pixel_values", "pixel_values_videos", "image_grid_thw", "video_grid_thw", "second_per_grid_ts"):
            whole[key] = torch.cat([first[key], second[key]]) if key in second else first[key]
        whole["mm_token_type_ids"] = greedy_model.model.token_types(whole["input_ids"])
        expected = generate(greedy_model, whole)
        if types == "none":
            del whole["mm_token_type_ids"]
        else:
            whole["mm_token_type_ids"] = first["mm_token_type_ids"][:, : 1 if types == "of one token" else None]
        assert_same(generate(greedy_model, whole, **{CACHE_NAME: answer[CACHE_NAME]}), expected)
        assert_same(generate(greedy_model, whole), expected)
        whole["mm_token_type_ids"] = first["mm_token_type_ids"][:, 1:]
        with pytest.raises(ValueError, match="`mm_token_type_ids` must have shape"):
            generate(greedy_model, whole)
    finally:
        greedy_model.config.nsa_mode = "sparse"


@pytest.mark.parametrize("length", [1, 4, 23])
@pytest.mark.parametrize("given", ["ids", "embeddings"])
def test_text_on_a_cache_takes_any_token_types(greedy_model, prompts, length, given):
    """Plain calls: types of the first tokens, however many, and of the first call, also where they are as many."""
    first, second = prompts.one([5, ("video", 3, 4, 4), 6]), prompts.one([length], seed=3)
    assert first["input_ids"].shape[1] == 23
    inputs = {"input_ids": second["input_ids"]}
    if given == "embeddings":
        inputs = {"inputs_embeds": greedy_model.get_input_embeddings()(second["input_ids"]).detach()}
    types = first["mm_token_type_ids"]
    lengths = {0, 3, 23} - ({length} if given == "embeddings" else set())
    with torch.no_grad():
        expected = greedy_model(**inputs, **{CACHE_NAME: greedy_model(**first)[CACHE_NAME]}).logits
        for columns in lengths:
            short = torch.nn.functional.pad(types, (0, length))[:, :columns]
            cache = greedy_model(**first)[CACHE_NAME]
            assert torch.equal(greedy_model(**inputs, mm_token_type_ids=short, **{CACHE_NAME: cache}).logits, expected)
        for wrong in (types[0], types.repeat(2, 1), types.repeat(1, 3), types.repeat(1, 3)[:, : 22 + length]):
            if wrong.shape[1:] == (23,) and len(wrong) == 1:
                continue  # no wrong one with a single new token
            cache = greedy_model(**first)[CACHE_NAME]
            with pytest.raises(ValueError, match="`mm_token_type_ids` must have shape"):
                greedy_model(**inputs, mm_token_type_ids=wrong, **{CACHE_NAME: cache})


def test_media_on_a_cache_need_the_types_of_what_is_cached(greedy_model, prompts):
    """Those of the new tokens are read off the ids."""
    first, second = prompts.one(LAYOUT), prompts.one([4, ("video", 3, 4, 4), 6], seed=3)
    types = first["mm_token_type_ids"]
    whole = torch.cat([types, second["mm_token_type_ids"]], dim=1)
    del second["attention_mask"]
    with torch.no_grad():
        outputs = [
            greedy_model(**(second | {"mm_token_type_ids": given}), **{CACHE_NAME: greedy_model(**first)[CACHE_NAME]})
            for given in (whole, types)
        ]
        assert torch.equal(outputs[0].logits, outputs[1].logits)
        for short in (types[:, :-1], second["mm_token_type_ids"]):
            cache = greedy_model(**first)[CACHE_NAME]
            with pytest.raises(ValueError, match=r"`mm_token_type_ids` must cover the \d+ cached tokens too"):
                greedy_model(**(second | {"mm_token_type_ids": short}), **{CACHE_NAME: cache})


def test_a_cache_that_ends_inside_a_video_is_refused_with_its_pixels(greedy_model, prompts):
    whole = prompts.one(LAYOUT)
    with torch.no_grad():
        cache = greedy_model(input_ids=whole["input_ids"][:, :9], mm_token_type_ids=torch.zeros(1, 9).long())[
            CACHE_NAME
        ]
    with pytest.raises(ValueError, match="`past_key_values` ends inside"):
        generate(greedy_model, whole, **{CACHE_NAME: cache})


@pytest.mark.parametrize("cache_implementation", ["dynamic", "static"])
def test_decoding_steps_never_look_at_the_tokens(prompts, monkeypatch, cache_implementation):
    """Of the whole decoding step, from its inputs' preparation to its logits, nothing is read back to the host."""
    model = build_model()
    counts, host_reads = [], []
    for name in ("cpu", "tolist", "item", "numpy"):
        original = getattr(torch.Tensor, name)
        monkeypatch.setattr(
            torch.Tensor, name, lambda self, *args, _f=original, _n=name: host_reads.append(_n) or _f(self, *args)
        )
    forward, prepare = type(model).forward, type(model).prepare_inputs_for_generation

    def counted(function):
        def run(self, *args, **kwargs):
            before = len(host_reads)
            with CountSynchronisations() as synchronisations:
                result = function(self, *args, **kwargs)
            counts.append((function.__name__, synchronisations.count, host_reads[before:]))
            return result

        run.__signature__ = inspect.signature(function)  # `generate` reads it
        return run

    monkeypatch.setattr(type(model), "forward", counted(forward))
    monkeypatch.setattr(type(model), "prepare_inputs_for_generation", counted(prepare))
    options = {"cache_implementation": "static"} if cache_implementation == "static" else {}
    model.generate(**prompts.one(LAYOUT), max_new_tokens=4, do_sample=False, **options)
    prefill, decoding = counts[:2], counts[2:]
    assert prefill[1][1] > 0 or prefill[1][2], "the counter sees the prefill's synchronisation"
    assert len(decoding) == 6
    assert [count for count in decoding if count[1] or count[2]] == []
