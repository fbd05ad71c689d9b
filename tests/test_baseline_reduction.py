"""Token reduction against a model that computes every token and masks those that are dropped."""

import math

import pytest
import torch
from baseline_testing import build_ours, build_qwen
from conftest import Prompts
from transformers import AttentionInterface
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import get_vision_window_index

import baselines
from generation_videonsa import CACHE_NAME

VIDEO, IMAGE = ("video", 4, 8, 12), ("image", 12, 8)  # 96 tokens in 4 steps, 24 tokens
LAYERS = 4
OPTIONS = {
    "fastv": {"layer": 2, "ratio": 0.4},
    "visionzip": {"dominant": 0.3, "contextual": 0.2},
    "vscan": {"keep": 0.4, "keep_middle": 0.5},
}
# Float64 throughout, but for logits of `generate`, which are rounded to float32.
CLOSE = {"atol": 1e-9, "rtol": 2**-23}


@pytest.fixture(params=["qwen", "ours"])
def any_model(request):
    if request.param == "qwen":
        return build_qwen(num_hidden_layers=LAYERS)
    return build_ours(text={"num_hidden_layers": LAYERS})


def by_score(scores: dict, count: int) -> list:
    return sorted(scores, key=lambda place: (-scores[place], place))[:count]


def cosine(a, b) -> float:
    return float(a @ b) / math.sqrt(float(a @ a) * float(b @ b))


class Statement:
    """A prompt of one sample without padding: what is dropped where, and the logits of all places, by masks.

    The model computes every token in every layer; dropped ones are hidden from the others.
    """

    def __init__(self, model, inputs, generated):
        self.model, self.inputs = model, inputs
        ids = inputs["input_ids"][0]
        config = model.config
        self.vision = [i for i, token in enumerate(ids) if token in (config.image_token_id, config.video_token_id)]
        self.length, self.generated = len(ids), generated
        self.kept = {layer: set(range(self.length)) for layer in range(LAYERS)}
        self.merged = {}  # rows of the first layer, each the mean of others
        self.maps = {}
        self._see()

    def drop(self, first_layer, keep) -> None:
        for layer in range(first_layer, LAYERS):
            self.kept[layer] &= set(keep) | (set(range(self.length)) - set(self.vision))

    def _see(self) -> None:
        """Record the vision tower's attention and keys: by block, of each token what its patches get, key, group."""
        self.seen, recorded, block_of = {}, [], {}

        def record(module, query, key, value, *args, scaling, **kwargs):
            weights = (query[0] @ key[0].transpose(1, 2) * scaling).softmax(-1)
            recorded.append((block_of[module], weights.mean((0, 1)), key[0].mean(0)))
            return (weights @ value[0]).transpose(0, 1)[None], None

        AttentionInterface.register("record_vision", record)
        visual = self.model.model.visual
        block_of |= {block.attn: number for number, block in enumerate(visual.blocks)}
        offset = 0
        for pixels, grid in (("pixel_values", "image_grid_thw"), ("pixel_values_videos", "video_grid_thw")):
            if grid not in self.inputs:
                continue
            before, visual.config._attn_implementation = visual.config._attn_implementation, "record_vision"
            with torch.no_grad():
                visual(self.inputs[pixels], grid_thw=self.inputs[grid])
            visual.config._attn_implementation = before
            order = get_vision_window_index(
                self.inputs[grid], spatial_merge_size=2, window_size=visual.window_size, patch_size=14, kwargs={}
            )[0].tolist()
            for block in range(len(visual.blocks)):
                row, window = 0, 0
                for of_block, received, keys in recorded:
                    if of_block != block:
                        continue
                    for token in range(len(received) // 4):
                        patches = slice(4 * token, 4 * token + 4)
                        place = offset + order[row]
                        what = float(received[patches].sum()), keys[patches].mean(0), (offset, window)
                        self.seen.setdefault(block, {})[place] = what
                        row += 1
                    window += 1
            recorded.clear()
            offset += len(order)
        # Images come before videos from the tower, whatever their order in the prompt.
        ids, config = self.inputs["input_ids"][0], self.model.config
        images = [i for i in self.vision if ids[i] == config.image_token_id]
        self.place = images + [i for i in self.vision if ids[i] != config.image_token_id]

    def units(self) -> list[list[int]]:
        """Numbers of the vision tokens of each image and step."""
        groups = {}
        for number in range(len(self.place)):
            groups.setdefault(self.seen[1][number][2], []).append(number)
        return list(groups.values())

    def logits(self) -> torch.Tensor:
        """Of all places, and of the generated tokens after them; `maps` then has every layer's attention."""
        model, handles = self.model, []
        total = self.length + len(self.generated)
        ids = torch.cat([self.inputs["input_ids"], self.generated[None]], 1)

        def on_layer(layer):
            def hook(module, args, kwargs):
                mask = torch.ones(total, total, dtype=torch.bool).tril()
                dropped = [place for place in range(self.length) if place not in self.kept[layer]]
                mask[:, dropped] = False
                mask |= torch.eye(total, dtype=torch.bool)
                kwargs["attention_mask"] = mask
                if layer == 0 and self.merged:
                    hidden = args[0].clone()
                    for target, sources in self.merged.items():
                        hidden[0, target] = args[0][0, sources].mean(0)
                    args = (hidden, *args[1:])
                return args, kwargs

            return hook

        for layer, module in enumerate(model.model.language_model.layers):
            handles.append(module.register_forward_pre_hook(on_layer(layer), with_kwargs=True))

        def attend(module, query, key, value, mask, scaling, **kwargs):
            key, value = (x[0].repeat_interleave(query.shape[1] // len(x[0]), 0) for x in (key, value))
            weights = (query[0] @ key.transpose(1, 2) * scaling).masked_fill(~mask, -torch.inf).softmax(-1)
            self.maps[module.layer_idx] = weights
            return (weights @ value).transpose(0, 1)[None], None

        AttentionInterface.register("record_text", attend)
        model.set_attn_implementation({"text_config": "record_text"})
        positions = model.model.get_rope_index(
            self.inputs["input_ids"],
            mm_token_type_ids=self.inputs["mm_token_type_ids"],
            image_grid_thw=self.inputs.get("image_grid_thw"),
            video_grid_thw=self.inputs.get("video_grid_thw"),
            second_per_grid_ts=self.inputs.get("second_per_grid_ts"),
        )[0]
        after = positions.max() + 1 + torch.arange(len(self.generated))
        positions = torch.cat([positions, after.expand(3, 1, -1)], -1)
        media = {name: value for name, value in self.inputs.items() if "pixel" in name or "grid_thw" in name}
        types = torch.nn.functional.pad(self.inputs["mm_token_type_ids"], (0, len(self.generated)))
        try:
            with torch.no_grad():
                return model(
                    input_ids=ids, position_ids=positions, mm_token_type_ids=types, use_cache=False, **media
                ).logits
        finally:
            model.set_attn_implementation({"text_config": "sdpa"})
            for handle in handles:
                handle.remove()

    # ---- The papers ----

    def fastv(self, queries="all"):
        self.logits()
        map_ = self.maps[OPTIONS["fastv"]["layer"] - 1].mean(0)[: self.length, : self.length]
        received = map_.sum(0) if queries == "all" else map_[-1]
        count = len(self.vision) - int(0.4 * len(self.vision))
        self.drop(2, by_score({i: float(received[i]) for i in self.vision}, count))

    def visionzip(self):
        keep = []
        for unit in self.units():
            scores = {number: self.seen[1][number][0] for number in unit}
            dominant = by_score(scores, max(1, round(0.3 * len(unit))))
            rest = [number for number in unit if number not in dominant]
            count = round(0.2 * len(unit))
            targets = [rest[i * len(rest) // count] for i in range(count)]
            groups = {target: [target] for target in targets}
            for number in rest:
                if number not in targets:
                    keys = {target: cosine(self.seen[1][number][1], self.seen[1][target][1]) for target in targets}
                    groups[max(keys, key=keys.get)].append(number)
            keep += dominant + targets
            self.merged |= {self.place[t]: [self.place[n] for n in group] for t, group in groups.items()}
        self.drop(0, [self.place[number] for number in keep])

    def vscan(self):
        keep = []
        for unit in self.units():
            count = max(1, round(0.4 * len(unit)))
            chosen = by_score({number: self.seen[1][number][0] for number in unit}, math.ceil(count / 2))
            windows = {}
            for number in unit:
                if number not in chosen:
                    windows.setdefault(self.seen[0][number][2], {})[number] = self.seen[0][number][0]
            ranks = {
                n: (rank, -scores[n]) for scores in windows.values() for rank, n in enumerate(by_score(scores, 999))
            }
            chosen += sorted(ranks, key=ranks.get)[: count - len(chosen)]
            groups = {target: [target] for target in chosen}
            for number in unit:
                if number not in chosen:
                    keys = {
                        target: cosine(self.seen[1][number][1], self.seen[1][target][1]) for target in sorted(chosen)
                    }
                    groups[max(keys, key=keys.get)].append(number)
            keep += chosen
            self.merged |= {self.place[t]: [self.place[n] for n in group] for t, group in groups.items()}
        left = [self.place[number] for number in keep]
        self.drop(0, left)
        self.logits()
        received = self.maps[LAYERS // 2 - 1].mean(0)[self.length - 1]
        self.drop(LAYERS // 2, by_score({i: float(received[i]) for i in left}, round(0.5 * len(left))))


def generate(model, inputs, steps=4, **options):
    result = model.generate(
        **inputs, max_new_tokens=steps, do_sample=False, return_dict_in_generate=True, output_logits=True, **options
    )
    return result.sequences[:, inputs["input_ids"].shape[1] :], torch.stack(result.logits, 1), result


def assert_follows(model, name, single, tokens, logits, **choice):
    statement = Statement(model, single, tokens[:-1])
    statement_of = getattr(statement, name)
    statement_of(**choice)
    expected = statement.logits()[0, statement.length - 1 :].float()
    torch.testing.assert_close(logits, expected, **CLOSE)
    return statement


LAYOUTS = [[5, VIDEO, 9], [3, IMAGE, 6, VIDEO, 4], [4, VIDEO, 2, IMAGE, 7], [20]]


@pytest.mark.parametrize("layout", LAYOUTS, ids=["video", "image video", "video image", "text"])
@pytest.mark.parametrize("name", OPTIONS)
def test_generation_is_that_of_a_model_that_hides_what_is_dropped(any_model, name, layout):
    """Positions are kept, every later step sees what is left; pairs are counted, and the cache holds no more."""
    single = Prompts(any_model.config).one(layout)
    baselines.configure(any_model, name, **OPTIONS[name])
    tokens, logits, result = generate(any_model, single)
    pairs, cache = baselines.pairs(any_model), result.past_key_values
    baselines.configure(any_model, None)
    statement = assert_follows(any_model, name, single, tokens[0], logits[0])
    counts = [len(statement.kept[layer]) for layer in range(LAYERS)]
    assert [layer.keys.shape[2] for layer in cache.layers] == [count + 3 for count in counts]
    assert pairs.taken == 4 * sum(count * (count + 1) // 2 for count in counts)
    assert pairs.dense == 4 * LAYERS * statement.length * (statement.length + 1) // 2
    if statement.vision:
        assert counts[-1] < statement.length and pairs.fraction < 0.9
        if name != "fastv":
            assert counts[0] < statement.length


@pytest.mark.parametrize("name", OPTIONS)
def test_a_batch_is_its_samples(any_model, name):
    """Of other lengths, other media, and with padding."""
    prompts = Prompts(any_model.config)
    singles = [prompts.one(layout, seed) for seed, layout in enumerate(LAYOUTS)]
    baselines.configure(any_model, name, **OPTIONS[name])
    alone, pairs = [], []
    for single in singles:
        alone.append(generate(any_model, single)[:2])
        pairs.append(baselines.pairs(any_model))
        baselines.reset_pairs(any_model)
    tokens, logits, _ = generate(any_model, prompts.batch(singles))
    assert baselines.pairs_by_sample(any_model) == pairs
    for sample, (own_tokens, own_logits) in enumerate(alone):
        assert torch.equal(tokens[sample], own_tokens[0])
        torch.testing.assert_close(logits[sample], own_logits[0], **CLOSE)


@pytest.mark.parametrize("name", OPTIONS)
def test_beams_and_several_answers(any_model, name):
    """Copies of a prompt drop the same tokens; the vision tower saw it once."""
    single = Prompts(any_model.config).one(LAYOUTS[1])
    baselines.configure(any_model, name, **OPTIONS[name])
    _tokens, logits, _ = generate(any_model, single)
    options = {"max_new_tokens": 1, "num_beams": 3, "do_sample": False, "output_scores": True}
    beams = any_model.generate(**single, **options, num_return_sequences=3, return_dict_in_generate=True)
    best = logits[0, 0].log_softmax(-1).topk(3)
    assert beams.sequences[:, -1].tolist() == best.indices.tolist()
    torch.testing.assert_close(beams.sequences_scores, best.values.to(beams.sequences_scores), atol=1e-5, rtol=1e-5)


def test_fastv_by_the_last_query(any_model):
    single = Prompts(any_model.config).one(LAYOUTS[0])
    baselines.configure(any_model, "fastv", **OPTIONS["fastv"], queries="last")
    tokens, logits, _ = generate(any_model, single)
    baselines.configure(any_model, None)
    assert_follows(any_model, "fastv", single, tokens[0], logits[0], queries="last")


@pytest.mark.parametrize("name", OPTIONS)
def test_logits_are_at_the_places_of_their_tokens(any_model, name):
    """`forward` gives as many as there are tokens; of those that were dropped, of a vector of zeros."""
    single = Prompts(any_model.config).one(LAYOUTS[0])
    baselines.configure(any_model, name, **OPTIONS[name])
    with torch.no_grad():
        logits = any_model(**single).logits[0]
    baselines.configure(any_model, None)
    statement = Statement(any_model, single, torch.zeros(0, dtype=torch.long))
    getattr(statement, name)()
    expected, kept = statement.logits()[0], sorted(statement.kept[LAYERS - 1])
    torch.testing.assert_close(logits[kept], expected[kept], atol=1e-9, rtol=1e-9)
    dropped = sorted(set(range(statement.length)) - set(kept))
    assert dropped and not logits[dropped].any()


@pytest.mark.parametrize("name", OPTIONS)
def test_nothing_dropped_changes_nothing(any_model, name):
    everything = {"fastv": {"layer": 2, "ratio": 0}, "visionzip": {"dominant": 1, "contextual": 0}}
    everything |= {"vscan": {"keep": 1, "keep_middle": 1}}
    single = Prompts(any_model.config).one(LAYOUTS[1])
    expected = generate(any_model, single)
    baselines.configure(any_model, name, **everything[name])
    found = generate(any_model, single)
    assert torch.equal(found[0], expected[0]) and baselines.pairs(any_model).fraction == 1
    torch.testing.assert_close(found[1], expected[1], **CLOSE)


def test_no_hook_stays(any_model):
    single = Prompts(any_model.config).one(LAYOUTS[1])
    expected = generate(any_model, single)[1]
    for name, options in OPTIONS.items():
        baselines.configure(any_model, name, **options)
        assert not torch.equal(generate(any_model, single)[1], expected)
    baselines.configure(any_model, None)
    assert torch.equal(generate(any_model, single)[1], expected)
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in any_model.modules())


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("fastv", {"layer": 0}, "`layer` of fastv must be a layer from 1 on, got 0"),
        ("fastv", {"layer": 9}, "fastv has a stage at layer 9; the model has 4"),
        ("fastv", {"ratio": 1.5}, "`ratio` of fastv must be a number from 0 to 1, got 1.5"),
        ("fastv", {"queries": "first"}, "`queries` of fastv must be 'all' or 'last', got 'first'"),
        ("visionzip", {"dominant": 0.9, "contextual": 0.2}, "at most 1, got 0.9 . 0.2"),
        ("visionzip", {"dominant": 0, "contextual": 0}, "must be over 0"),
        ("vscan", {"keep": 0}, "`keep` of vscan"),
        ("vscan", {"kepp": 0.5}, "`kepp` = 0.5 is no option of vscan; did you mean `keep`"),
    ],
)
def test_wrong_options(name, options, message):
    model = build_qwen(num_hidden_layers=LAYERS)
    with pytest.raises(ValueError, match=message):
        baselines.configure(model, name, **options)
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_what_cannot_be_reduced(any_model):
    baselines.configure(any_model, "visionzip", **OPTIONS["visionzip"])
    prompts = Prompts(any_model.config)
    text, single = prompts.one([8]), prompts.one(LAYOUTS[0])
    with torch.no_grad():
        cache = any_model(**text, use_cache=True)[CACHE_NAME]
        both = {"mm_token_type_ids": torch.cat([text["mm_token_type_ids"], single["mm_token_type_ids"]], 1)}
        both["attention_mask"] = torch.ones_like(both["mm_token_type_ids"])
        with pytest.raises(
            ValueError, match="visionzip reduces the vision tokens of whole prompts; 96 come to a cache of 8"
        ):
            any_model(**single | both, **{CACHE_NAME: cache})
        length = single["input_ids"].shape[1]
        with pytest.raises(ValueError, match=r"`attention_mask` of visionzip must have shape \(batch, length\)"):
            any_model(**single | {"attention_mask": torch.ones(1, 1, length, length)})
