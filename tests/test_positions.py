"""M-RoPE positions: prefill, and that decoding continues them without a jump."""

import pytest
import torch
from conftest import build_model, build_released
from transformers import StaticCache

from generation_videonsa import CACHE_NAME
from positions_videonsa import mrope_position_ids

LONG_VIDEO = ("video", 40, 4, 6)  # 40 steps of 2 x 3 tokens


def positions(types, **kwargs):
    return mrope_position_ids(torch.tensor(types), spatial_merge_size=2, tokens_per_second=2, **kwargs)


def test_text_counts_up():
    position_ids, deltas = positions([[0, 0, 0, 0]])
    assert position_ids.tolist() == [[[0, 1, 2, 3]]] * 3
    assert deltas.tolist() == [[0]]


def test_text_after_a_long_video_starts_after_its_largest_position():
    types = [[0] * 3 + [2] * 240 + [0] * 4]
    position_ids, deltas = positions(types, video_grid_thw=[[40, 4, 6]], second_per_grid_ts=[1.0])
    t, h, w = position_ids[:, 0]
    # start 3, one step a second, two positions a second: temporal 3, 5, ..., 81
    assert t[3:243].tolist() == [3 + 2 * step for step in range(40) for _ in range(6)]
    assert h[3:243].tolist() == [3 + row for _ in range(40) for row in range(2) for _ in range(3)]
    assert w[3:243].tolist() == [3 + column for _ in range(80) for column in range(3)]
    assert position_ids[:, 0, 243:].tolist() == [[82, 83, 84, 85]] * 3
    assert deltas.item() == 86 - 247


def test_text_after_a_short_wide_image_starts_after_its_width():
    position_ids, _ = positions([[1] * 10 + [0]], image_grid_thw=[[1, 4, 10]])
    assert position_ids[:, 0, 10].tolist() == [5, 5, 5]


@pytest.mark.parametrize(
    ("seconds", "expected"),
    [(0.25, [0, 0, 1, 1]), (1 / 3, [0, 0, 1, 2]), (0.7, [0, 1, 2, 4]), (2.0, [0, 4, 8, 12])],
)
def test_temporal_positions_are_floored(seconds, expected):
    position_ids, _ = positions([[2] * 4], video_grid_thw=[[4, 2, 2]], second_per_grid_ts=[seconds])
    assert position_ids[0, 0].tolist() == expected


@pytest.mark.parametrize(
    ("seconds", "expected"), [(0.5, [0, 0, 0, 0]), (1.0, [0, 2, 4, 6]), (1.99, [0, 2, 4, 6]), (2.5, [0, 4, 8, 12])]
)
def test_seconds_may_be_truncated(seconds, expected):
    """As transformers 4.51 to 4.53 did: `nsa_variant="released"`. Text goes on behind the largest position still."""
    for given in ([seconds], torch.tensor([seconds])):
        types = [[0] * 3 + [2] * 8 + [0]]
        kwargs = {"video_grid_thw": [[4, 2, 4]], "second_per_grid_ts": given, "truncate_seconds": True}
        position_ids, deltas = positions(types, **kwargs)
        assert (position_ids[0, 0, 3:11:2] - 3).tolist() == expected
        assert position_ids[:, 0, 11].tolist() == [3 + max(expected[-1], 1) + 1] * 3
        assert deltas.item() == position_ids[0, 0, 11] + 1 - 12


def test_the_released_variant_truncates_in_either_mode(prompts, monkeypatch):
    model = build_released()
    inputs = prompts.one([3, ("video", 4, 4, 4), 2], seconds_per_grid=0.5)
    seen = record_positions(model, monkeypatch)
    for mode in ("sparse", "dense"):
        model.config.nsa_mode = mode
        model.generate(**inputs, max_new_tokens=2, do_sample=False)
    assert [position_ids[0, 0].tolist() for position_ids in seen] == [[0, 1, 2, *[3] * 16, 5, 6], [7]] * 2


def test_temporal_positions_are_computed_in_float32():
    position_ids, _ = positions([[2] * 11], video_grid_thw=[[11, 2, 2]], second_per_grid_ts=torch.tensor([0.35]))
    assert position_ids[0, 0, 10] == 7  # in float64, 10 * (0.35 in float32) * 2 is below 7


def test_batches_take_their_media_in_order():
    types = [[0, 2, 2, 0, 1, 0], [1, 1, 0, 2, 0, 0]]
    mask = torch.tensor([[1, 1, 1, 1, 1, 1], [0, 1, 1, 1, 1, 1]])
    types[1][:2] = [0, 1]
    position_ids, deltas = positions(
        types,
        image_grid_thw=[[1, 2, 2], [1, 2, 2]],
        video_grid_thw=[[2, 2, 2], [1, 2, 2]],
        second_per_grid_ts=[3.0, 1.0],
        attention_mask=mask,
    )
    assert position_ids[0].tolist() == [[0, 1, 7, 8, 9, 10], [0, 0, 1, 2, 3, 4]]
    assert deltas.tolist() == [[5], [0]]


def test_images_without_text_between():
    position_ids, _ = positions([[1, 1, 0]], image_grid_thw=[[1, 2, 2], [1, 2, 2]])
    assert position_ids[0].tolist() == [[0, 1, 2]]


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"video_grid_thw": [[1, 2, 2]]}, "`video_grid_thw` .* fewer tokens"),
        ({"video_grid_thw": [[4, 2, 2]]}, "`video_grid_thw` .* more tokens"),
        ({}, "`video_grid_thw` .* fewer tokens"),
        ({"video_grid_thw": [[3, 2, 2], [1, 2, 2]]}, "`video_grid_thw` .* more tokens"),
        ({"video_grid_thw": [[3, 2, 2]], "second_per_grid_ts": []}, "`second_per_grid_ts` = .* 1 videos"),
        ({"video_grid_thw": [[3, 2, 2]], "second_per_grid_ts": 0.5}, "`second_per_grid_ts` = 0.5 .* 1 videos"),
        ({"video_grid_thw": [[3, 2, 2]], "second_per_grid_ts": [[0.5]]}, "`second_per_grid_ts` = .* 1 videos"),
    ],
)
def test_grids_that_do_not_fit_the_prompt(kwargs, message):
    with pytest.raises(ValueError, match=message):
        positions([[0, 2, 2, 2, 0]], **kwargs)


@pytest.mark.parametrize("mode", ["sparse", "dense"])
@pytest.mark.parametrize("medium", [("video", 2, 4, 4), ("image", 4, 6)], ids=["video", "image"])
def test_pixels_and_grids_come_together(prompts, medium, mode):
    """Stock Qwen2.5-VL answers about nothing where the pixels are missing, and fails deep inside without the grid."""
    model = build_model(nsa_mode=mode)
    inputs = prompts.one([3, medium, 2])
    pixels, grid = (
        ("pixel_values_videos", "video_grid_thw") if medium[0] == "video" else ("pixel_values", "image_grid_thw")
    )
    patches = len(inputs[pixels])
    cases = [
        ({grid: None}, rf"`{pixels}` of shape \({patches}, .* came without `{grid}`"),
        ({pixels: None}, rf"`{grid}` = .* came without `{pixels}`"),
        ({pixels: inputs[pixels][:-4]}, rf"`{pixels}` has {patches - 4} patches, and `{grid}` = .* has {patches}"),
        ({grid: inputs[grid].repeat(2, 1)}, rf"`{pixels}` has {patches} patches, and `{grid}` = .* has {2 * patches}"),
        ({grid: inputs[grid][0]}, rf"`{grid}` must have shape \(num_{medium[0]}s, 3\), got \(3,\)"),
        ({pixels: inputs[pixels][None]}, rf"`{pixels}` must have shape \(patches, pixels\)"),
    ]
    for change, match in cases:
        given = {key: value for key, value in (inputs | change).items() if value is not None}
        with pytest.raises(ValueError, match=match):
            model(**given)
        with pytest.raises(ValueError, match=match):
            model.generate(**given, max_new_tokens=1)
    if medium[0] == "video":
        for call in (model, model.generate):
            with pytest.raises(ValueError, match=r"`second_per_grid_ts` = .* 1 videos"):
                call(**(inputs | {"second_per_grid_ts": torch.ones(2)}))


def record_positions(model, monkeypatch) -> list:
    """Every position that the language model is given from now on, one (3, batch, q_len) tensor a call."""
    seen = []
    forward = model.model.language_model.rotary_emb.forward

    def spy(x, position_ids):
        seen.append(position_ids.clone())
        return forward(x, position_ids)

    monkeypatch.setattr(model.model.language_model.rotary_emb, "forward", spy)
    return seen


@pytest.mark.parametrize("options", [{}, {"use_cache": False}, {"cache_implementation": "static"}], ids=str)
def test_generation_continues_the_prompts_positions(prompts, monkeypatch, options):
    model = build_model()
    inputs = prompts.batch([prompts.one([3, LONG_VIDEO, 4]), prompts.one([5, LONG_VIDEO, 8], seed=1)])
    seen = record_positions(model, monkeypatch)
    model.generate(**inputs, max_new_tokens=4, do_sample=False, **options)
    assert [position_ids[:, :, -1].tolist() for position_ids in seen] == [
        [[85 + step, 91 + step]] * 3 for step in range(4)
    ]


def test_a_plain_loop_over_forward_continues_the_prompts_positions(prompts, monkeypatch):
    model = build_model()
    inputs = prompts.batch([prompts.one([3, LONG_VIDEO, 4]), prompts.one([5, LONG_VIDEO, 8], seed=1)])
    seen = record_positions(model, monkeypatch)
    mask = inputs["attention_mask"]
    with torch.no_grad():
        cache = model(**inputs)[CACHE_NAME]
        for _ in range(3):
            mask = torch.nn.functional.pad(mask, (0, 1), value=1)
            model(input_ids=torch.tensor([[7], [8]]), attention_mask=mask, **{CACHE_NAME: cache})
    assert [position_ids[0, :, -1].tolist() for position_ids in seen] == [[85 + step, 91 + step] for step in range(4)]


def test_each_cache_keeps_its_own_positions(prompts):
    """Two conversations in turn on one model."""
    model = build_model()
    first, second = prompts.one([3, LONG_VIDEO, 4]), prompts.one([3, ("video", 4, 4, 6), 9], seed=1)
    token = torch.tensor([[7]])
    with torch.no_grad():
        cache = model(**first)[CACHE_NAME]
        expected = model(input_ids=token, **{CACHE_NAME: cache}).logits
        cache = model(**first)[CACHE_NAME]
        other = model(**second)[CACHE_NAME]
        torch.testing.assert_close(model(input_ids=token, **{CACHE_NAME: cache}).logits, expected, atol=0, rtol=0)

        # A text-only turn of `generate`, without the grids of what is cached.
        model(**second)
        ids = torch.cat([first["input_ids"], token, token], dim=1)
        options = {"max_new_tokens": 3, "do_sample": False}
        generated = model.generate(input_ids=ids, **{CACHE_NAME: cache}, **options)
        whole = first | {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        whole["mm_token_type_ids"] = torch.nn.functional.pad(first["mm_token_type_ids"], (0, 2))
        assert torch.equal(generated, model.generate(**whole, **options))
        assert other.mrope_deltas.item() != cache.mrope_deltas.item()


def test_vision_tokens_join_a_padded_text_cache(prompts, monkeypatch):
    """Positions of a batch whose first turn was text, left-padded, and whose second holds a video."""
    model = build_model()
    first = prompts.batch([prompts.one([4]), prompts.one([6], seed=1)])
    second = prompts.batch([prompts.one([2, LONG_VIDEO, 3], seed=2), prompts.one([2, LONG_VIDEO, 3], seed=3)])
    mask = torch.cat([first["attention_mask"], second["attention_mask"]], dim=1)
    types = torch.cat([first["mm_token_type_ids"], second["mm_token_type_ids"]], dim=1)
    with torch.no_grad():
        cache = model(input_ids=first["input_ids"], attention_mask=first["attention_mask"])[CACHE_NAME]
        seen = record_positions(model, monkeypatch)
        model(**(second | {"attention_mask": mask, "mm_token_type_ids": types}), **{CACHE_NAME: cache})
        mask = torch.nn.functional.pad(mask, (0, 1), value=1)
        model(input_ids=torch.tensor([[7], [8]]), attention_mask=mask, **{CACHE_NAME: cache})
    # The text turn counted its padding: both rows go on at 6. The video's largest position is 8 + 78.
    assert seen[0][0, :, :3].tolist() == [[6, 7, 8]] * 2
    assert seen[0][0, :, -3:].tolist() == [[87, 88, 89]] * 2
    assert seen[1][0].tolist() == [[90], [90]]


def test_a_mask_as_long_as_a_static_cache(prompts):
    model, inputs = build_model(), prompts.one([3, LONG_VIDEO, 4])
    cache = StaticCache(config=model.config.text_config, max_cache_len=260)
    long_mask = torch.nn.functional.pad(inputs["attention_mask"], (0, 260 - 247))
    with torch.no_grad():
        output = model(**(inputs | {"attention_mask": long_mask}), **{CACHE_NAME: cache}).logits
        torch.testing.assert_close(output, model(**inputs).logits, atol=1e-9, rtol=1e-9)


def test_a_text_prompt_forgets_the_positions_of_the_video_before(prompts, monkeypatch):
    model = build_model()
    with torch.no_grad():
        model(**prompts.one([3, LONG_VIDEO, 4]))
        seen = record_positions(model, monkeypatch)
        cache = model(input_ids=torch.arange(5)[None])[CACHE_NAME]
        model(input_ids=torch.tensor([[7]]), **{CACHE_NAME: cache})
    assert [position_ids[0, 0].tolist() for position_ids in seen] == [[0, 1, 2, 3, 4], [5]]
