"""The analyses of attention: what is seen of every layer, and what is counted of it, against plain statements."""

import importlib
import json
import statistics
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from baseline_testing import build_qwen
from conftest import ROOT, Prompts, build_model, build_released
from matplotlib.figure import Figure

from analysis import figure, head_similarity, observe, questions, selected_blocks, sinks
from nsa_kernels import reference, utils
from videonsa_eval.draw_benchmark import draw_benchmark

TINY = ROOT / "checkpoints" / "tiny"
BLOCK, COUNTS, WINDOW, VISION = 4, 3, 6, 31
LAYOUT = [5, ("video", 4, 4, 6), 3, ("image", 4, 4), 4]


def make_layer(seed: int = 0, gates: bool = True) -> observe.Layer:
    """Random states of 4 query heads and 2 key/value heads: 31 vision tokens between 5 and 4 of text."""
    generator = torch.Generator().manual_seed(seed)
    length = 5 + VISION + 4
    query, key, value = (torch.randn(heads, length, 8, generator=generator) for heads in (4, 2, 2))
    # A block of the video and two more tokens are what every query likes, and their values are nothing.
    sink = [9, 10, 11, 12, 20, 33]
    query, value = query + 0.5, value / value.norm(dim=-1, keepdim=True)
    key[:, sink] += 1
    value[:, sink] *= 1e-3
    is_vision = torch.zeros(length, dtype=torch.bool)
    is_vision[5 : 5 + VISION] = True
    config = SimpleNamespace(block_size=BLOCK, block_counts=COUNTS, window_size=WINDOW)
    chosen = torch.rand(VISION, 4, 3, generator=generator) if gates else None
    return observe.Layer(0, query, key, value, is_vision, chosen, 8**-0.5, config)


def relative_error(layer: observe.Layer) -> float:
    """Of a float32 probability: a score of D products, of keys that may be means of a block, is off by at most
    (D + block + 2) eps times its absolute products, an exponential and the sum under it by that relatively, and a sum
    adds one eps a term."""
    eps, head_dim, length = torch.finfo(torch.float32).eps, layer.query.shape[-1], layer.key.shape[1]
    key = layer.key.abs().repeat_interleave(layer.group_size, dim=0)
    products = float((layer.query.abs() @ key.mT).max()) * layer.scale
    return eps * (2 * (head_dim + BLOCK + 2) * products + length + 3)


def error_bound(layer: observe.Layer) -> float:
    """Of an output, whose probabilities sum to one."""
    return float(layer.value.abs().max()) * relative_error(layer)


def packed(layer: observe.Layer) -> list[torch.Tensor]:
    """Query, key and value of vision tokens as the oracles take them, in float64."""
    return [layer.vision(states).transpose(0, 1).double() for states in (layer.query, layer.key, layer.value)]


def lengths(layer: observe.Layer) -> utils.SequenceLengths:
    return utils.SequenceLengths.from_lengths([int(layer.is_vision.sum())])


def oracle_blocks(layer: observe.Layer) -> torch.Tensor:
    q, k, _ = packed(layer)
    config = layer.config
    return reference.select_blocks_ref(q, k, lengths(layer), config.block_size, config.block_counts, layer.scale)


def oracle(layer: observe.Layer, branch: str) -> torch.Tensor:
    """(vision tokens, num_heads, head_dim), float64."""
    config, states, where = layer.config, packed(layer), lengths(layer)
    if branch == "compression":
        return reference.compression_attention_ref(*states, where, config.block_size, layer.scale)[0]
    if branch == "window":
        return reference.sliding_window_attention_ref(*states, where, config.window_size, layer.scale)[0]
    return reference.selection_attention_ref(*states, oracle_blocks(layer), where, config.block_size, layer.scale)[0]


def branch_output(layer: observe.Layer, branch: str) -> torch.Tensor:
    """What the observed probabilities make of the values: (vision tokens, num_heads, head_dim), float64."""
    heads = []
    for head in range(len(layer.key)):
        values = layer.vision(layer.value)[head].double()
        if branch == "compression":
            size = layer.config.block_size
            values = torch.stack([block.mean(0) for block in values.split(size) if len(block) == size])
        parts = list(layer.branch_probabilities(branch, head))
        assert [row for rows, _ in parts for row in range(rows.start, rows.stop)] == list(range(len(layer.gates)))
        heads.append(torch.cat([probabilities.double() @ values for _, probabilities in parts]))
    return torch.cat(heads, dim=1)


def dense_output(layer: observe.Layer) -> torch.Tensor:
    """(length, num_heads, head_dim), float64."""
    heads = []
    for head in range(len(layer.key)):
        parts = [probabilities.double() for _, probabilities in layer.dense_probabilities(head)]
        heads.append(torch.cat(parts) @ layer.value[head].double())
    return torch.cat(heads, dim=1)


def assert_near(found: torch.Tensor, expected: torch.Tensor, bound: float) -> None:
    assert found.shape == expected.shape
    assert (found.double() - expected.double()).abs().max() <= bound


few_at_a_time = pytest.mark.parametrize("max_scores", [observe.MAX_SCORES, 300], ids=["whole", "in chunks"])


@few_at_a_time
@pytest.mark.parametrize("branch", observe.BRANCHES)
def test_branches_are_the_oracles(branch, max_scores, monkeypatch):
    monkeypatch.setattr(observe, "MAX_SCORES", max_scores)
    layer = make_layer()
    assert_near(branch_output(layer, branch), oracle(layer, branch), error_bound(layer))


@few_at_a_time
def test_dense_probabilities_are_a_causal_softmax(max_scores, monkeypatch):
    monkeypatch.setattr(observe, "MAX_SCORES", max_scores)
    layer = make_layer(gates=False)
    key, value = (states.double().repeat_interleave(2, dim=0) for states in (layer.key, layer.value))
    scores = layer.query.double() @ key.mT * layer.scale
    future = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
    expected = scores.masked_fill(future, -torch.inf).softmax(-1) @ value
    assert_near(dense_output(layer), expected.transpose(0, 1), error_bound(layer))


@few_at_a_time
def test_selected_blocks_are_the_oracles(max_scores, monkeypatch):
    monkeypatch.setattr(observe, "MAX_SCORES", max_scores)
    layer = make_layer()
    found = [torch.cat([blocks for _, blocks in layer.selected_blocks(head)]) for head in range(2)]
    assert torch.equal(torch.stack(found, 1), oracle_blocks(layer))


BUILDERS = {
    "sparse": lambda: build_model(torch.float32),
    "dense": lambda: build_model(torch.float32, nsa_mode="dense"),
    "qwen": lambda: build_qwen(dtype=torch.float32),
    "qwen eager": lambda: build_qwen(dtype=torch.float32, attn_implementation="eager"),
}
of_every_model = pytest.mark.parametrize("name", BUILDERS)


def test_states_may_require_gradients():
    """As those of a model that nobody put into inference mode do."""
    layer, plain = make_layer(), make_layer()
    layer.query.requires_grad_()
    for head in range(2):
        for branch in ("compression", "selection", "window"):
            pairs = zip(layer.branch_probabilities(branch, head), plain.branch_probabilities(branch, head), strict=True)
            for (rows, found), (plain_rows, expected) in pairs:
                assert rows == plain_rows
                assert torch.equal(found, expected)


def prompt_for(model, layout=LAYOUT, seed: int = 0) -> dict[str, torch.Tensor]:
    return Prompts(model.config, torch.float32).one(layout, seed)


@of_every_model
@torch.inference_mode()
def test_every_layer_is_what_the_model_computes(name):
    """The observed attention gives what reaches the output projection: all rows of dense layers, the vision rows of
    sparse ones, whose branches are weighted by the observed gates."""
    model = BUILDERS[name]()
    inputs, layers, outputs = prompt_for(model), [], []
    hooks = [
        layer.self_attn.o_proj.register_forward_pre_hook(lambda module, args: outputs.append(args[0][0]))
        for layer in model.model.language_model.layers
    ]
    observe.read_prompt(model, inputs, layers.append)
    for hook in hooks:
        hook.remove()
    assert [layer.index for layer in layers] == [0, 1] and len(outputs) == 2
    for layer, output in zip(layers, outputs, strict=True):
        assert torch.equal(layer.is_vision, inputs["mm_token_type_ids"][0] != 0)
        output = output.unflatten(-1, (len(layer.query), -1))
        if name == "sparse":
            assert layer.gates.shape == (int(layer.is_vision.sum()), 4, 3)
            gated = sum(
                layer.gates[..., index, None].double() * branch_output(layer, branch)
                for index, branch in enumerate(observe.BRANCHES)
            )
            # Both sides are in float32, and gates are at most 1.
            assert_near(output[layer.is_vision], gated, 2 * 3 * error_bound(layer))
        else:
            assert layer.gates is None
            assert_near(output, dense_output(layer), 2 * error_bound(layer))


@of_every_model
@torch.inference_mode()
def test_observing_leaves_no_trace(name):
    model = BUILDERS[name]()
    inputs = prompt_for(model)
    before = model(**inputs).logits
    implementations = [module.config._attn_implementation for module in (model, model.model, model.model.visual)]
    text_before = model.config.text_config._attn_implementation
    attributes = [set(vars(module)) for module in model.modules()]

    def assert_same():
        assert text_before == model.config.text_config._attn_implementation
        assert implementations == [
            module.config._attn_implementation for module in (model, model.model, model.model.visual)
        ]
        assert attributes == [set(vars(module)) for module in model.modules()]
        assert not any(module._forward_pre_hooks for module in model.modules())
        assert torch.equal(model(**inputs).logits, before)

    seen = []
    with observe.observed(model, seen.append):
        during = model(**inputs).logits
    assert len(seen) == 2
    if name != "qwen eager":  # which computes as sdpa does while it is observed
        assert torch.equal(during, before)
    assert_same()

    def fail(layer):
        raise KeyError(layer.index)

    with pytest.raises(KeyError), observe.observed(model, fail):
        model(**inputs)
    assert_same()


def test_token_types_are_read_off_the_placeholders():
    """Of a dense model whose caller gives positions instead."""
    model, seen = build_qwen(), []
    inputs = prompt_for(model)
    is_vision = inputs.pop("mm_token_type_ids")[0] != 0
    inputs["position_ids"] = torch.arange(len(is_vision)).expand(3, 1, -1)
    with torch.inference_mode(), observe.observed(model, seen.append):
        model(**inputs)
    assert all(torch.equal(layer.is_vision, is_vision) for layer in seen)


@pytest.mark.parametrize("name", ["sparse", "dense", "qwen"])
def test_refusals(name):
    model = BUILDERS[name]()
    inputs, prompts = prompt_for(model), Prompts(model.config, torch.float32)
    with torch.inference_mode(), observe.observed(model, lambda layer: None):
        with pytest.raises(ValueError, match="`input_ids` must be of one prompt, got a batch of 2"):
            model(**prompts.batch([inputs, inputs]))
        padded = inputs | {"attention_mask": inputs["attention_mask"].clone()}
        padded["attention_mask"][0, 0] = 0
        with pytest.raises(ValueError, match="`attention_mask` has padding"):
            model(**padded)
        cache = model(**inputs, use_cache=True).past_key_values
        with pytest.raises(ValueError, match=f"`past_key_values`.* {inputs['input_ids'].shape[1]} cached"):
            model(input_ids=torch.tensor([[3]]), past_key_values=cache)
    with pytest.raises(ValueError, match="without a picture or video"):
        observe.read_prompt(model, prompt_for(model, [9]), lambda layer: None)


def test_the_released_variant_is_refused():
    model = build_released(torch.float32)
    with pytest.raises(ValueError, match="`nsa_variant` = 'released'"), observe.observed(model, lambda layer: None):
        pass
    model.config.nsa_mode = "dense"
    seen = []
    with torch.inference_mode():
        observe.read_prompt(model, prompt_for(model), seen.append)
    assert len(seen) == 2


def test_correlations_are_numpys(monkeypatch):
    """Gates that differ by a ten-thousandth from a half: sums of squares would have lost nine digits of sixteen."""
    monkeypatch.setattr(head_similarity, "CHUNK", 50)
    generator = torch.Generator().manual_seed(0)
    common = torch.randn(700, 1, 3, generator=generator)
    gates = 0.5 + 1e-4 * (torch.randn(700, 6, 3, generator=generator) + common)
    gates[:, 5] = 0.3
    found = head_similarity.Correlation(6)
    for part in gates.split([1, 120, 49, 500, 30]):
        found.add(part)
    matrices = found.matrices()
    for branch in range(3):
        expected = np.corrcoef(gates[:, :5, branch].double().numpy().T)
        # Each of 700 terms of a sum is rounded; the mean that is taken off is 1e4 spreads large, and off by eps.
        bound = 700 * np.finfo(np.float64).eps * 1e4
        assert np.abs(matrices[branch, :5, :5].numpy() - expected).max() < bound
        assert matrices[branch, 5].isnan().all() and matrices[branch, :, 5].isnan().all()


def test_principal_components():
    generator = torch.Generator().manual_seed(0)
    vectors = torch.randn(9, 40, generator=generator, dtype=torch.float64)
    found = head_similarity.principal_components(vectors)
    variances, axes = np.linalg.eigh(np.cov(vectors.numpy().T))
    eps = np.finfo(np.float64).eps * 40 * 9
    assert np.abs(found.explained.numpy() - variances[::-1][:2] / variances.sum()).max() < eps
    centred = vectors.numpy() - vectors.numpy().mean(0)
    for component in range(2):
        axis = axes[:, -1 - component]
        axis = axis * np.sign(axis[np.abs(axis).argmax()])
        # An axis is off by eps over the gap between its variance and the next one's.
        gap = np.diff(variances[-4:]).min() / variances[-1]
        assert np.abs(found.places[:, component].numpy() - centred @ axis).max() < eps * np.abs(centred).sum() / gap
    # On one line, and in one point.
    line = torch.arange(5.0)[:, None] * torch.tensor([[1.0, -2.0, 0.5]])
    on_line = head_similarity.principal_components(line)
    assert on_line.explained[0] == pytest.approx(1.0) and on_line.explained[1] == pytest.approx(0.0, abs=1e-15)
    assert (on_line.places[:, 0].diff() < 0).all()  # the largest loading is that of -2, and made positive
    for same in (vectors[:1], vectors[:1].expand(7, -1)):
        alone = head_similarity.principal_components(same)
        assert alone.explained is None and not alone.places.any()


def softmax_over(scores: dict[int, float]) -> dict[int, float]:
    top = max(scores.values(), default=0.0)
    exponentials = {key: np.exp(score - top) for key, score in scores.items()}
    return {key: number / sum(exponentials.values()) for key, number in exponentials.items()}


def plain_sinks(layer: observe.Layer, head: int) -> dict[str, tuple[list, list, list]]:
    """By branch: column sums, means over queries that could see the key, norms of values; token by token."""
    q, k, v = (states.numpy() for states in packed(layer))
    count, group = len(q), layer.group_size
    blocks = [list(range(j * BLOCK, (j + 1) * BLOCK)) for j in range(count // BLOCK)]
    pooled_k = [k[block, head].mean(0) for block in blocks]
    pooled_v = [v[block, head].mean(0) for block in blocks]
    chosen = oracle_blocks(layer)[:, head].tolist()
    seen = {
        "compression": [[j for j, block in enumerate(blocks) if block[-1] <= t] for t in range(count)],
        "selection": [[s for s in range(t + 1) if s // BLOCK in chosen[t]] for t in range(count)],
        "window": [[s for s in range(t + 1) if t - s < WINDOW] for t in range(count)],
    }
    keys = {"compression": pooled_k, "selection": k[:, head], "window": k[:, head]}
    values = {"compression": pooled_v, "selection": v[:, head], "window": v[:, head], "all": v[:, head]}
    sums = {branch: [0.0] * len(values[branch]) for branch in values}
    for t in range(count):
        for h in range(head * group, (head + 1) * group):
            for index, branch in enumerate(observe.BRANCHES):
                scores = {s: float(q[t, h] @ keys[branch][s]) * layer.scale for s in seen[branch][t]}
                for s, probability in softmax_over(scores).items():
                    sums[branch][s] += probability / group
                    gated = float(layer.gates[t, h, index]) * probability / group
                    for token in blocks[s] if branch == "compression" else [s]:
                        sums["all"][token] += gated / (BLOCK if branch == "compression" else 1)
    could_see = {
        "compression": [sum(block[-1] <= t for t in range(count)) for block in blocks],
        "window": [sum(0 <= t - s < WINDOW for t in range(count)) for s in range(count)],
    }
    from_it_on = [count - s for s in range(count)]
    return {
        branch: (
            of,
            [total / n for total, n in zip(of, could_see.get(branch, from_it_on), strict=True)],
            [float(np.linalg.norm(value)) for value in values[branch]],
        )
        for branch, of in sums.items()
    }


def plain_dense_sinks(layer: observe.Layer, head: int) -> dict[str, tuple[list, list, list]]:
    q, k, v = (states.double().numpy() for states in (layer.query, layer.key, layer.value))
    count, sums = q.shape[1], [0.0] * q.shape[1]
    for t in range(count):
        for h in range(head * layer.group_size, (head + 1) * layer.group_size):
            scores = {s: float(q[h, t] @ k[head, s]) * layer.scale for s in range(t + 1)}
            for s, probability in softmax_over(scores).items():
                sums[s] += probability / layer.group_size
    means = [total / (count - s) for s, total in enumerate(sums)]
    every = sums, means, [float(np.linalg.norm(v[head, s])) for s in range(count)]
    vision = layer.is_vision.nonzero().flatten().tolist()
    return {"dense": tuple([of[s] for s in vision] for of in every), "dense_all_keys": every}


@few_at_a_time
@pytest.mark.parametrize("is_dense", [False, True], ids=["sparse", "dense"])
def test_sinks_are_those_of_a_loop(is_dense, max_scores, monkeypatch):
    monkeypatch.setattr(observe, "MAX_SCORES", max_scores)
    layer, sinks_seen = make_layer(gates=not is_dense), 0
    for head in range(2):
        plain = plain_dense_sinks(layer, head) if is_dense else plain_sinks(layer, head)
        found = sinks.received(layer, head)
        assert found.keys() == plain.keys()
        for branch, (total, mean, norms) in plain.items():
            # A column has as many terms as there are queries, two heads each.
            bound = relative_error(layer) + 2 * 40 * torch.finfo(torch.float32).eps
            tally = sinks.Tally(2)
            tally.add(head, found[branch])
            first, median, third = statistics.quantiles(norms, n=4, method="inclusive")
            small = [norm < median - 2 * (third - first) for norm in norms]
            assert sinks.is_small(found[branch].norms).tolist() == small
            assert tally.small[head] == sum(small) and tally.keys.tolist()[1 - head] == 0
            for index, (name, alpha) in enumerate((("mean", mean), ("sum", total))):
                assert found[branch].alpha(name).tolist() == pytest.approx(alpha, rel=bound, abs=0)
                assert min(abs(a - 0.1) for a in alpha) > 0.1 * bound, "the test cannot tell what is above"
                is_sink = [a > 0.1 and s for a, s in zip(alpha, small, strict=True)]
                assert tally.above[index, head] == sum(a > 0.1 for a in alpha)
                assert tally.sinks[index, head] == sum(is_sink)
                assert float(tally.largest[index, head]) == pytest.approx(max(alpha), rel=bound)
                bins = [0] * sinks.BINS
                for place, sink in enumerate(is_sink):
                    bins[place * sinks.BINS // len(is_sink)] += sink
                assert tally.sink_bins[index].tolist() == bins
                sinks_seen += sum(is_sink)
    assert sinks_seen >= 4, "without sinks nothing was tested"


@pytest.mark.parametrize("count", [30, 31, 32, 33])
def test_small_norms_are_told_from_the_quartiles(count):
    """Two norms, just under the limit and just over it; both stay under the first quartile, and move none."""
    norms = [10.0 + 0.1 * place for place in range(count)]
    first, median, third = statistics.quantiles(norms, n=4, method="inclusive")
    limit = median - 2 * (third - first)
    norms[:2] = limit - 0.01, limit + 0.01
    assert sinks.is_small(torch.tensor(norms)).tolist() == [True, *[False] * (count - 1)]


def test_one_norm_is_not_small():
    assert sinks.is_small(torch.tensor([3.0])).tolist() == [False]


def test_sinks_of_short_prompts():
    """Shorter than a block: no pooled keys, and no shares of them."""
    nothing = sinks.Received(torch.zeros(0), torch.zeros(0), torch.zeros(0))
    tally = sinks.Tally(2)
    tally.add(0, nothing)
    numbers = tally.numbers()
    assert numbers["keys"] == 0 and numbers["small_values"] is None and numbers["mean"]["sinks"] is None


def test_frames():
    """In the order of the prompt: a video of two steps, an image, a video of one."""
    types = torch.tensor([2] * 12 + [1] * 4 + [2] * 2)
    frames = selected_blocks.frames_of(types, [(1, 4, 4)], torch.tensor([[2, 4, 6], [1, 2, 4]]), merge_size=2)
    assert frames.tolist() == [0] * 6 + [1] * 6 + [2] * 4 + [3] * 2
    with pytest.raises(ValueError, match="do not make the 11 vision tokens"):
        selected_blocks.frames_of(types[:11], [], [(2, 4, 6)], merge_size=2)


@pytest.mark.parametrize("chunk", [1 << 14, 7], ids=["whole", "in chunks"])
@pytest.mark.parametrize("frame_tokens", [6, 3], ids=["longer frames", "shorter frames"])
def test_choices_are_those_of_a_loop(chunk, frame_tokens, monkeypatch):
    """Two prompts of different length. By chance, a token takes each block before its own with one probability."""
    monkeypatch.setattr(selected_blocks, "CHUNK", chunk)
    tile, found = 5, selected_blocks.Choices()
    distances, by_chance = {}, {}
    frames_seen, frames_by_chance = [0, 0, 0], [Fraction(0)] * 3
    distinct = alone = kept = choices = 0
    for seed in (0, 1):
        layer = make_layer(seed)
        tokens = VISION - 12 * seed
        indices = oracle_blocks(layer)[:tokens]
        frames = torch.arange(tokens) // frame_tokens
        found.add(indices, frames, BLOCK, tile)
        for head in range(2):
            sets = [set(row) - {-1} for row in indices[:, head].tolist()]
            for t, chosen in enumerate(sets):
                own = t // BLOCK
                back = {j: min(2, t // frame_tokens - j * BLOCK // frame_tokens) for j in range(own)}
                for j in chosen - {own}:
                    distances[own - j] = distances.get(own - j, 0) + 1
                    frames_seen[back[j]] += 1
                for j in range(own):
                    chance = Fraction(len(chosen) - 1, own)
                    by_chance[own - j] = by_chance.get(own - j, 0) + chance
                    frames_by_chance[back[j]] += chance
                if t + 1 < tokens:
                    choices += len(chosen - {own})
                    kept += len((chosen - {own}) & sets[t + 1])
            for start in range(0, tokens - tile + 1, tile):
                distinct += len(set.union(*sets[start : start + tile]))
                alone += sum(map(len, sets[start : start + tile]))
    numbers = found.numbers()
    assert numbers["kept"] == round(kept / choices, 4) and 0 < kept < choices
    assert numbers["union"] == pytest.approx(distinct * tile / alone, abs=6e-5)
    for name, counts in (("distance", distances), ("uniform_distance", by_chance)):
        total = sum(counts.values())
        bins = {"1": range(1, 2), "2-3": range(2, 4), "4-7": range(4, 8)}
        shares = {label: float(sum(counts.get(d, 0) for d in members) / total) for label, members in bins.items()}
        assert numbers[name] == pytest.approx(shares, abs=6e-5)
    for name, counts in (("frames", frames_seen), ("uniform_frames", frames_by_chance)):
        shares = [float(count / sum(counts)) for count in counts]
        assert list(numbers[name].values()) == pytest.approx(shares, abs=6e-5)
        assert (shares[0] > 0) == (frame_tokens > BLOCK)


def test_nothing_to_choose():
    """A prompt of one block."""
    found = selected_blocks.Choices()
    indices = torch.tensor([[[0, -1]]] * 3, dtype=torch.int32)
    found.add(indices, torch.zeros(3, dtype=torch.long), BLOCK, tile=5)
    numbers = found.numbers()
    assert numbers["distance"] == {} and numbers["union"] is None and numbers["kept"] is None
    assert list(numbers["frames"].values()) == [None] * 3


def test_tiles_are_the_kernels():
    pytest.importorskip("triton")
    from nsa_kernels import triton_selection

    for group_size in (1, 2, 7, 16, 200):
        q = torch.empty(1, group_size, 128, dtype=torch.bfloat16)
        assert selected_blocks.tile_tokens(group_size) == triton_selection.tile_config(q, group_size, 64)["TOKENS"]


@pytest.fixture(scope="module")
def drawn(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("drawn") / "benchmark"
    draw_benchmark(folder, lengths=(16, 20), videos=1)
    return folder


@pytest.fixture(scope="module")
def two_questions(drawn) -> Path:
    """Of two kinds about two videos."""
    lines = [json.loads(line) for line in (drawn / "all.jsonl").read_text().splitlines()]
    kept = [next(line for line in lines if line["kind"] == kind) for kind in ("needle", "order")]
    kept[1] |= {"video": next(line["video"] for line in lines if line["video"] != kept[0]["video"])}
    path = drawn / "two.jsonl"
    path.write_text("\n\n".join(map(json.dumps, kept)))
    return path


def test_questions_of_a_folder(drawn, two_questions):
    lines = [json.loads(line) for line in (drawn / "all.jsonl").read_text().splitlines()]
    loaded = questions.load(drawn)
    assert len(loaded) == len(lines) == 20
    by_text = {(str((drawn / line["video"]).resolve()), line["question"], line["kind"]): line for line in lines}
    for question in loaded:
        (message,) = question.messages
        video, text = message["content"]
        line = by_text.pop((video["video"], text["text"], question.kind))
        assert message["role"] == "user" and question.video == line["video"]
        assert (question.answer, list(question.choices)) == (line["answer"], line["choices"])
        assert question.score(f"It is {line['answer']}.") == 1
    assert not by_text
    kinds = [question.kind for question in loaded]
    assert kinds == sorted(kinds, key=kinds.index), "kinds come one after the other"
    assert [len(batch) for batch in questions.batches(loaded[:5], 2)] == [2, 2, 1]
    assert [question.kind for question in questions.load(two_questions)] == ["needle", "order"]


@pytest.mark.parametrize(
    ("answer", "choices", "right", "wrong"),
    [
        ("A", (), ("A", "(A)", "A.", "The answer is A."), ("Answer: B", "All of them", "", "B")),
        ("B", ("A", "B"), ("B", "(B) a dog"), ("A", "Both")),
        ("dog", ("dog", "cat"), ("A dog.", "dog, not cat", "Dog", "dog1"), ("a cat, no dog", "dogma", "")),
        ("a black dog", ("a dog", "a black dog"), ("It is a black dog.",), ("a dog",)),
        ("1.5", ("1", "1.5"), ("1.5 m", "about 1.5"), ("1", "11.5")),
        ("2", ("1", "2", "3"), ("two", "There are 2."), ("three, or two", "12")),
        ("two", ("one", "two"), ("two",), ("one",)),
        ("Café", ("Café", "Bar"), ("the café",), ("bar",)),
        ("1", (), ("1", "1 metre", "1."), ("12", "1.5", "one")),
        ("a red car", (), ("A red car.", "a red car drives by"), ("a red carpet", "It is a red car")),
    ],
)
def test_scoring(answer, choices, right, wrong):
    question = questions.Question("kind", (), "my.mp4", answer, choices)
    assert [question.score(text) for text in right] == [1] * len(right)
    assert [question.score(text) for text in wrong] == [0] * len(wrong)


def test_a_question_that_nobody_can_score():
    with pytest.raises(ValueError, match="`answer` of a question about my"):
        questions.Question("kind", (), "my.mp4").score("yes")
    with pytest.raises(ValueError, match="gives a single document no score"):
        questions.Question("kind", (), "my.mp4", judge=lambda response: None).score("yes")


def test_answers_of_lines(drawn, tmp_path):
    (tmp_path / "all.jsonl").touch()
    path = tmp_path / "lines.jsonl"
    line = {"video": "all.jsonl", "question": "what?", "choices": ["dog", "cat"]}
    path.write_text(json.dumps(line | {"answer": " "}) + "\n" + json.dumps(line | {"answer": "Dog"}))
    assert [question.answer for question in questions.load(path)] == [None, "Dog"]
    path.write_text(json.dumps(line | {"answer": "bird"}))
    with pytest.raises(ValueError, match=r"line 1: `answer` must be one of `choices` = \['dog', 'cat'\], got 'bird'"):
        questions.load(path)


def test_questions_of_a_task_of_lmms_eval(tmp_path, monkeypatch):
    """This repository's own: documents are read as far as the limit goes, and judged as the task does."""
    draw_benchmark(tmp_path / "eval" / "data", lengths=(16,), videos=3)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LMMS_EVAL_DATASETS_CACHE", str(tmp_path / "cache"))
    found = questions.load("synthetic_order", limit=2)
    assert len(found) == 2 and len({question.video for question in found}) == 2
    assert all(question.kind == "synthetic_order" and question.video.endswith(".mp4") for question in found)
    lines = [json.loads(line) for line in Path("eval/data/order.jsonl").read_text().splitlines()]
    for question in found:
        (line,) = [line for line in lines if question.video.endswith(line["video"])]
        text = question.messages[-1]["content"][-1]["text"]
        assert line["question"] in text
        assert question.score(line["answer"]) == 1
        assert question.score(next(choice for choice in line["choices"] if choice != line["answer"])) == 0
    with pytest.raises(ValueError, match="nor a task of lmms-eval"):
        questions.load("no_such_task")


def test_one_question_for_each_video(drawn):
    kept = questions.one_per_video(questions.load(drawn))
    assert [question.kind for question in kept] == ["needle"] * 2 and len({question.video for question in kept}) == 2


def test_a_limit_takes_of_every_kind(drawn):
    every, limited = questions.load(drawn), questions.load(drawn, limit=1)
    assert len(limited) == 10 and len({question.kind for question in limited}) == 10
    assert all(question in every for question in limited)
    assert limited == questions.load(drawn, limit=1)
    assert any(limited != questions.load(drawn, limit=1, seed=seed) for seed in range(1, 6))
    assert len(questions.load(drawn, limit=99)) == 20


@pytest.mark.parametrize(
    "line",
    ["not json", "[1]", "5", '{"question": "what?"}', '{"video": "all.jsonl"}', '{"video": 5, "question": "what?"}'],
)
def test_lines_that_are_no_questions(line, drawn, tmp_path):
    path = tmp_path / "lines.jsonl"
    (tmp_path / "all.jsonl").touch()
    path.write_text('{"video": "all.jsonl", "question": "what?"}\n' + line + "\n")
    with pytest.raises(ValueError, match="line 2: expected JSON with `video` and `question`"):
        questions.load(path)


def test_sources_that_are_none(tmp_path):
    path = tmp_path / "empty.jsonl"
    path.write_text("\n")
    missing = tmp_path / "missing.jsonl"
    missing.write_text('{"video": "nowhere.mp4", "question": "what?"}')
    for source, message in (
        (path, "holds no question"),
        (missing, "line 1: there is no video .*nowhere.mp4"),
        (tmp_path / "other.jsonl", "there is no such file"),
        (tmp_path, "there is no such file"),
    ):
        with pytest.raises(ValueError, match=message):
            questions.load(source)
    with pytest.raises(ValueError, match="`limit` must be positive, got 0"):
        questions.load(path, limit=0)


def run_command(name: str, source: Path, tmp_path: Path, *arguments: str) -> dict:
    """The record that the command of a module wrote; its picture exists."""
    module = importlib.import_module(f"analysis.{name}")
    output, picture = tmp_path / "of" / f"{name}.json", tmp_path / "of" / f"{name}.png"
    given = [str(TINY), "--questions", str(source), "--output", str(output), "--plot", str(picture), "--device", "cpu"]
    extra = [module.add_arguments] if hasattr(module, "add_arguments") else []
    record = figure.command(module.run, module.plot, module.__doc__, *extra, arguments=[*given, *arguments])
    assert picture.read_bytes().startswith(b"\x89PNG") and picture.stat().st_size > 5000
    assert json.loads(output.read_text()) == record
    assert record["questions"] == 2
    return record["results"]


def test_gates_command(two_questions, tmp_path):
    """Means, spreads and quantiles are numpy's, of all gates at once."""
    results = run_command("gates", two_questions, tmp_path)
    assert list(results) == ["all", "needle", "order"]
    model, processor = figure.load_model(TINY)
    seen = {"all": [[] for _ in range(4)]}
    for question in questions.load(two_questions):
        layers = []
        with torch.inference_mode():
            observe.read_prompt(model, questions.prepare(processor, [question]), layers.append)
        seen[question.kind] = [[layer.gates.flatten(0, 1)] for layer in layers]
        for of, layer in zip(seen["all"], seen[question.kind], strict=True):
            of += layer
    for kind, layers in results.items():
        for layer, gates in zip(layers, seen[kind], strict=True):
            for branch, values in zip(observe.BRANCHES, torch.cat(gates).double().numpy().T, strict=True):
                assert layer[branch]["mean"] == pytest.approx(values.mean(), abs=6e-5)
                assert layer[branch]["std"] == pytest.approx(values.std(), abs=6e-5)
                for q, found in layer[branch]["quantiles"].items():
                    # The middle of the bin, a hundredth wide, that the quantile is in.
                    assert abs(found - np.quantile(values, float(q), method="inverted_cdf")) < 0.005 + 1e-9


def test_head_similarity_command(two_questions, tmp_path):
    results = run_command("head_similarity", two_questions, tmp_path)
    assert len(results["layers"]) == 4
    for layer in results["layers"][:3]:
        for branch in observe.BRANCHES:
            matrix = np.array(layer[branch]["correlation"], dtype=float)
            assert matrix.shape == (4, 4) and (np.diag(matrix) == 1).all() and (matrix == matrix.T).all()
    # Nothing reads the vision rows of the last layer, so its gates were never trained: they are one half everywhere.
    assert results["layers"][3]["compression"] == {"mean_of_pairs": None, "correlation": [[None] * 4] * 4}
    assert [prompt["kind"] for prompt in results["components"]["prompts"]] == ["needle", "order"]
    assert results["components"]["explained"] == [1.0, 0.0]


def test_sinks_command(two_questions, tmp_path):
    results = run_command("sinks", two_questions, tmp_path, "--dense_checkpoint", str(TINY))
    branches = ["compression", "selection", "window", "all", "dense", "dense_all_keys"]
    assert list(results["layers"]) == list(results["total"]) == list(results["density"]) == branches
    for branch in branches:
        total, layers = results["total"][branch], results["layers"][branch]
        assert len(layers) == 4 and total["keys"] == sum(layer["keys"] for layer in layers)
        assert sum(results["density"][branch]["keys"]) == total["keys"]
        for name in sinks.NORMALISATIONS:
            assert 0 <= total[name]["sinks"] <= min(total[name]["above"], total["small_values"]) <= 1
            assert total[name]["largest"] == max(layer[name]["largest"] for layer in layers) > 0
            share = sum(results["density"][branch][f"sinks_{name}"]) / total["keys"]
            assert total[name]["sinks"] == round(share, 6)
    vision = results["total"]["selection"]["keys"]
    assert results["total"]["dense"]["keys"] == vision < results["total"]["dense_all_keys"]["keys"]
    assert results["total"]["compression"]["keys"] < vision / 15
    alone = run_command("sinks", two_questions, tmp_path, "--config_args", "nsa_mode=dense")
    assert alone["total"] == {branch: results["total"][branch] for branch in branches[4:]}


def test_selected_blocks_command(two_questions, tmp_path):
    results = run_command("selected_blocks", two_questions, tmp_path)
    assert results["tile"] == 32 and list(results["kinds"]) == ["all", "needle", "order"]
    for of_kind in results["kinds"].values():
        for layer in of_kind:
            assert sum(layer["distance"].values()) == pytest.approx(1, abs=1e-3)
            # A block holds four frames of four tokens, so none but a token's own begins in its frame or the one before.
            assert layer["frames"] == layer["uniform_frames"] == {"same": 0.0, "previous": 0.0, "earlier": 1.0}
            assert 1 <= layer["union"] <= 32 and 0 < layer["kept"] < 1


@pytest.mark.parametrize("name", ["gates", "head_similarity", "selected_blocks"])
def test_models_without_gates_are_refused(name, two_questions, tmp_path, capsys):
    with pytest.raises(SystemExit):
        run_command(name, two_questions, tmp_path, "--config_args", "nsa_mode=dense")
    assert "`nsa_mode` = 'dense'" in capsys.readouterr().err


@pytest.mark.parametrize("suffix", [".png", ".svg", ".pdf"])
def test_the_same_numbers_give_the_same_picture(suffix, tmp_path):
    paths = [tmp_path / f"{number}{suffix}" for number in range(2)]
    for path in paths:
        drawing = Figure()
        drawing.subplots().plot([0, 1], marker="o")
        figure.save(drawing, path)
    assert paths[0].read_bytes() == paths[1].read_bytes()
