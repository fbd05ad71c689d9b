"""What each sparse prefill method chooses, against a plain statement of its paper, number by number."""

import json
import math

import pytest
import torch
from baseline_testing import build_qwen, mask_of, masked_attention, vectors
from conftest import Prompts
from transformers import AttentionInterface

import baselines
from baselines.scores import by_diagonal, largest, smallest_mass
from baselines.search import search

SHAPES = [(50, 50), (32, 32), (29, 50), (26, 50), (5, 5)]  # queries, keys
SCALE = 0.4


def softmax(logits: list[float]) -> list[float]:
    top = max(logits)
    weights = [math.exp(logit - top) for logit in logits]
    return [weight / sum(weights) for weight in weights]


def fewest(scores: dict, share: float) -> set:
    """The largest scores, one by one, until they hold the share."""
    total, held, chosen = sum(scores.values()), 0.0, set()
    for place in sorted(scores, key=lambda place: -scores[place]):
        if held >= share * total:
            break
        held += scores[place]
        chosen.add(place)
    return chosen


def best(scores: dict, count: int) -> set:
    return set(sorted(scores, key=lambda place: -scores[place])[:count])


def dot(a, b) -> float:
    return sum(x * y for x, y in zip(a.tolist(), b.tolist(), strict=True))


def mean(rows) -> torch.Tensor:
    return torch.stack(list(rows)).mean(0)


class Sample:
    """One query head and its keys, by position; blocks as lists of positions."""

    def __init__(self, query, key, head, size):
        self.query, self.key = query[head], key[head // (len(query) // len(key))]
        self.length, self.start, self.size = len(self.key), len(self.key) - len(self.query), size

    def q(self, position):
        return self.query[position - self.start]

    def queries_of(self, block):
        return [p for p in self.block(block) if p >= self.start]

    def block(self, block):
        return range(block * self.size, min(self.length, (block + 1) * self.size))

    @property
    def query_blocks(self):
        return range(self.start // self.size, -(-self.length // self.size))

    def attention(self, position) -> list[float]:
        return softmax([SCALE * dot(self.q(position), self.key[k]) for k in range(position + 1)])

    def last(self, count):
        """Attention of the last queries, by (query, key)."""
        positions = range(max(self.start, self.length - count), self.length)
        return {(q, k): weight for q in positions for k, weight in enumerate(self.attention(q))}

    def lines(self, count):
        """What columns and diagonals get of it."""
        columns, diagonals = dict.fromkeys(range(self.length), 0.0), dict.fromkeys(range(self.length), 0.0)
        for (q, k), weight in self.last(count).items():
            columns[k] += weight
            diagonals[q - k] += weight
        return columns, diagonals

    def map_of_means(self):
        """Attention of mean queries over mean keys, by (query block, key block)."""
        scores = {}
        for i in self.query_blocks:
            query = mean(self.q(p) for p in self.queries_of(i))
            row = softmax([SCALE * dot(query, mean(self.key[p] for p in self.block(j))) for j in range(i + 1)])
            scores |= {(i, j): weight for j, weight in enumerate(row)}
        return scores

    def pairs(self, blocks=(), columns=(), diagonals=(), slashes=(), rows=()):
        """The mask of these, (queries, keys)."""
        mask = torch.zeros(self.length - self.start, self.length, dtype=torch.bool)
        for q in range(self.start, self.length):
            met = {p - s for s in slashes for p in self.queries_of(q // self.size)}
            for k in range(q + 1):
                is_listed = k in columns or q - k in diagonals or (q // self.size, k // self.size) in blocks
                mask[q - self.start, k] = is_listed or k == q or q in rows or k in met
        return mask


def choose(name, query, key, layer=0, **options):
    method = baselines.check(name, **options)
    return mask_of(method.select(query, key, SCALE, layer))


def samples(shape, size):
    query, key, _ = vectors(num_queries=shape[0], length=shape[1], seed=sum(shape))
    return query, key, [Sample(query, key, head, size) for head in range(len(query))]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_tri_shape(shape):
    query, key, heads = samples(shape, 8)
    found = choose("tri_shape", query, key, block_size=8, sink=3, window=6, last=5)
    for head, sample in enumerate(heads):
        last = range(sample.length - 5, sample.length)
        assert torch.equal(found[head], sample.pairs(columns=range(3), diagonals=range(6), rows=last))


def antidiagonals(sample, stride) -> dict:
    """XAttention's estimate, by (query block, key block)."""
    attention = {}
    for group in range(sample.start // stride, -(-sample.length // stride)):
        logits = []
        for other in range(group + 1):  # the i-th key of a group with the i-th query from the end of its group
            total = 0.0
            for i in range(stride):
                q, k = group * stride + stride - 1 - i, other * stride + i
                if sample.start <= q < sample.length and k < sample.length:
                    total += dot(sample.q(q), sample.key[k])
            logits.append(total * SCALE / stride)
        attention |= {(group, other): weight for other, weight in enumerate(softmax(logits))}
    per_block, scores = sample.size // stride, {}
    for (group, other), weight in attention.items():
        place = group // per_block, other // per_block
        scores[place] = scores.get(place, 0.0) + weight
    return scores


@pytest.mark.parametrize("stride", [1, 2, 4])
@pytest.mark.parametrize("threshold", [0.3, 0.8])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_xattention(shape, threshold, stride):
    query, key, heads = samples(shape, 8)
    found = choose("xattention", query, key, block_size=8, stride=stride, threshold=threshold)
    for head, sample in enumerate(heads):
        scores, blocks = antidiagonals(sample, stride), set()
        for i in sample.query_blocks:
            row = {place: weight for place, weight in scores.items() if place[0] == i}
            blocks |= fewest(row, threshold) | {(i, i)}
        assert torch.equal(found[head], sample.pairs(blocks=blocks))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("min_budget", [0, 16])
def test_flexprefill(shape, min_budget):
    gamma, size = 0.55, 8
    query, key, heads = samples(shape, size)
    # Keys that hardly differ within their blocks: means tell what such heads attend to.
    key[1] = key[1, torch.arange(shape[1]) // size * size] + 0.01 * key[1]
    query[2:] = query[2:, -1:] + 0.01 * query[2:]
    divergences = []
    for sample in heads:
        last = range(max(sample.start, sample.length - size), sample.length)
        blocks = range(-(-sample.length // size))
        true, scores = [0.0] * len(blocks), sample.last(size)
        for (_, k), weight in scores.items():
            true[k // size] += weight / len(last)
        query_mean = mean(sample.q(p) for p in last)
        estimated = softmax([SCALE * dot(query_mean, mean(sample.key[p] for p in sample.block(j))) for j in blocks])
        halves = [(p, e, (p + e) / 2) for p, e in zip(true, estimated, strict=True)]
        divergence = sum(p * math.log(p / m) / 2 + e * math.log(e / m) / 2 for p, e, m in halves)
        divergences.append(math.sqrt(max(0, divergence)))
    tau = sum(sorted(divergences)[1:3]) / 2  # between two heads: two are query-aware, two are not
    found = choose("flexprefill", query, key, block_size=size, gamma=gamma, tau=min(1, tau), min_budget=min_budget)
    for head, sample in enumerate(heads):
        if divergences[head] < tau:
            scores = sample.map_of_means()
            blocks = fewest(scores, gamma)
            for i in sample.query_blocks:
                row = {place: weight for place, weight in scores.items() if place[0] == i}
                blocks |= best(row, -(-min_budget // size)) | {(i, 0), (i, i)}
            assert torch.equal(found[head], sample.pairs(blocks=blocks))
        else:
            columns, slashes = (
                fewest(scores, gamma) | best(scores, min_budget) | set(range(size)) for scores in sample.lines(size)
            )
            assert torch.equal(found[head], sample.pairs(columns=columns, slashes=slashes))
    if shape[1] > size:
        assert sum(divergence < tau for divergence in divergences) in (1, 2)


HEADS = [
    {"kind": "a_shape", "sink": 3, "window": 6},
    {"kind": "vertical_slash", "vertical": 5, "slash": 7},
    {"kind": "block_top_k", "blocks": 2},
    {"kind": "vertical_slash", "vertical": 0, "slash": 0},
]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_minference(shape, tmp_path):
    query, key, heads = samples(shape, 8)
    (tmp_path / "heads.json").write_text(json.dumps({"layers": [[], HEADS]}))
    options = {"block_size": 8, "last_queries": 6, "min_vertical": 2, "min_slash": 3}
    found = choose("minference", query, key, layer=1, heads=str(tmp_path / "heads.json"), **options)
    assert torch.equal(found, choose("minference", query, key, layer=1, heads=[[], HEADS], **options))
    for head, sample in enumerate(heads):
        choice = HEADS[head]
        if choice["kind"] == "a_shape":
            expected = sample.pairs(columns=range(3), diagonals=range(6))
        elif choice["kind"] == "vertical_slash":
            columns, slashes = sample.lines(6)
            expected = sample.pairs(
                columns=best(columns, max(2, choice["vertical"])), slashes=best(slashes, max(3, choice["slash"]))
            )
        else:
            scores, blocks = sample.map_of_means(), set()
            for i in sample.query_blocks:
                row = {place: weight for place, weight in scores.items() if place[0] == i and place[1] != i}
                blocks |= best(row, 1) | {(i, i)}
            expected = sample.pairs(blocks=blocks)
        assert torch.equal(found[head], expected)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_psa(shape):
    query, key, heads = samples(shape, 8)
    ends = {1: 0.3, 2: 0.5, 4: 0.7, 8: 0.9}
    options = {"full": 0.3, "by_2": 0.5, "by_4": 0.7, "by_8": 0.9, "block_size": 8, "stride": 4}
    pattern, levels = baselines.check("psa", **options).select(query, key, SCALE, 0), set()
    for head, sample in enumerate(heads):
        scores = antidiagonals(sample, 4)
        for i in sample.query_blocks:
            row, sum_before = {place: weight for place, weight in scores.items() if place[0] == i}, 0.0
            for place in sorted(row, key=lambda place: -row[place]):
                share = sum_before / sum(row.values())
                level = next((level for level, end in ends.items() if share < end), 0)
                level = 1 if place[1] in (0, i) else level
                levels.add(level)
                where = head, i - sample.start // 8, place[1]
                assert (int(pattern.blocks[where]), int(pattern.pooled[where])) == (
                    level == 1,
                    level if level > 1 else 0,
                )
                sum_before += row[place]
    assert len(levels) > 2 or shape[1] < 10


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_grid_heads(shape):
    """Of MMInference: the stride and the phase whose keys get the most of the last queries, on average."""
    query, key, heads = samples(shape, 8)
    choices = [HEADS[1], *[{"kind": "grid", "window": 4}] * 3]
    options = {"block_size": 8, "last_queries": 6, "min_vertical": 2, "min_slash": 3}
    found = choose("mminference", query, key, heads=[choices], strides=[3, 4, 7], **options)
    assert torch.equal(found[0], choose("minference", query, key, heads=[HEADS[1:2] * 4], **options)[0])
    strides = set()
    for head, sample in list(enumerate(heads))[1:]:
        received, means = sample.lines(6)[0], {}
        for stride in (3, 4, 7):
            for phase in range(min(stride, sample.length)):
                keys = range(phase, sample.length, stride)
                means[stride, phase] = sum(received[k] for k in keys) / len(keys)
        stride, phase = max(means, key=means.get)
        strides.add((stride, phase))
        grid = set(range(phase, sample.length, stride))
        assert torch.equal(found[head], sample.pairs(columns=grid, rows=grid, diagonals=range(4)))
    assert len(strides) > 1
    every = choose("mminference", query, key, strides=5)
    assert torch.equal(
        every, choose("mminference", query, key, heads=[[{"kind": "grid", "window": 1024}] * 4], strides=5)
    )


def test_without_a_search_every_head_of_minference_is_the_fallback():
    query, key, _ = samples((50, 50), 8)
    method = baselines.check("minference")
    pattern = method.select(query, key, SCALE, 0)
    assert pattern.count() == pattern.dense_pairs  # 1,000 columns are more than there are
    assert pattern.blocks is None and pattern.diagonals is None


def test_a_search_with_grid_heads():
    model = build_qwen()
    inputs = Prompts(model.config).one([5, ("video", 4, 8, 8), 9])
    candidates = [{"kind": "grid", "window": 30}, {"kind": "vertical_slash", "vertical": 2, "slash": 0}]
    options = {"block_size": 8, "strides": 16, "min_vertical": 0, "min_slash": 0}
    found = search(model, inputs, share=0.4, method="mminference", candidates=candidates, **options)
    kinds = {choice["kind"] for layer in found["layers"] for choice in layer}
    assert "grid" in kinds
    baselines.configure(model, "mminference", heads=found["layers"], **options)
    with torch.no_grad():
        model(**inputs)
    assert 0.05 < baselines.pairs(model).fraction <= 0.4


def test_sets_of_scores():
    scores = torch.tensor([[0.4, 0.1, 0.1, 0.3, 0.1], [0.0, 1.0, 0.0, 0.0, 0.0]])
    assert smallest_mass(scores, 0.7).tolist() == [
        [True, False, False, True, False],
        [False, True, False, False, False],
    ]
    assert smallest_mass(scores, 0.71)[0].tolist() == [True, True, False, True, False]
    assert smallest_mass(scores, 1.0).tolist() == [[True] * 5, [False, True, False, False, False]]
    assert not smallest_mass(scores, 0.0).any()
    assert largest(scores, 3)[0].tolist() == [True, True, False, True, False]
    assert largest(scores, torch.tensor([1, 0])).sum(-1).tolist() == [1, 0] and largest(scores, 9).all()
    assert by_diagonal(torch.tensor([[1.0, 2.0, 0.0], [3.0, 4.0, 5.0]])).tolist() == [7, 5, 3]


def test_the_search_finds_what_differs_least(tmp_path):
    """By a plain search: all candidates within the budget, cut down where they are over it."""
    model = build_qwen()
    inputs = Prompts(model.config).one([5, ("video", 4, 8, 8), 9])
    candidates = [
        {"kind": "a_shape", "sink": 4, "window": 30},
        {"kind": "vertical_slash", "vertical": 8, "slash": 3},
        {"kind": "block_top_k", "blocks": 4},
    ]
    options = {"block_size": 8, "last_queries": 6, "min_vertical": 0, "min_slash": 0}
    found = search(model, inputs, share=0.4, candidates=candidates, **options)
    assert model.config.text_config._attn_implementation == "sdpa" and found["tokens"] == 78
    assert len({choice["kind"] for layer in found["layers"] for choice in layer}) > 1
    # What each head was given: within the budget, and nothing larger of its kind is.
    recorded = []
    method = baselines.check("minference", **options)
    original = AttentionInterface()._global_mapping["sdpa"]

    def record(module, query, key, value, *arguments, **keywords):
        if module.is_causal:
            recorded.append((query[0], key[0], value[0]))
        return original(module, query, key, value, *arguments, **keywords)

    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        patch.setitem(AttentionInterface._global_mapping, "sdpa", record)
        model(**inputs)
    scale = 16**-0.5
    for layer, (query, key, value) in enumerate(recorded):
        for head, choice in enumerate(found["layers"][layer]):
            own = query[head][None], key[head // 2][None], value[head // 2][None]
            dense = masked_attention(*own, torch.ones(78, 78, dtype=torch.bool).tril(), scale)
            errors = []
            for candidate in candidates:
                best_cut = None
                for part in range(1001):
                    sizes = {name: int(candidate[name] * part / 1000) for name in candidate if name != "kind"}
                    pattern = method.pattern_of([candidate | sizes], *own[:2], scale)
                    if pattern.count() <= 0.4 * pattern.dense_pairs:
                        best_cut = candidate | sizes
                    elif best_cut is not None:
                        break
                output = masked_attention(*own, mask_of(method.pattern_of([best_cut], *own[:2], scale)), scale)
                errors.append((float((output - dense).norm() / dense.norm()), best_cut))
            assert [error for error, _ in errors] == pytest.approx(found["errors"][layer][head], rel=1e-9)
            assert choice == min(errors, key=lambda pair: pair[0])[1]
    # And the result is what MInference runs with.
    baselines.configure(model, "minference", heads=found["layers"], **options)
    with torch.no_grad():
        model(**inputs)
    assert 0.1 < baselines.pairs(model).fraction <= 0.4


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"share": 0}, "`share` must be over 0 and at most 1, got 0"),
        ({"share": 0.5, "method": "xattention"}, "`method` must be one of minference, mminference, got 'xattention'"),
        ({"share": 0.5, "candidates": []}, "`candidates` must name one choice at least"),
        ({"share": 0.5, "candidates": [{"kind": "x"}]}, r"`candidates`\[0\]: `kind` must be one of"),
    ],
)
def test_wrong_searches(arguments, message):
    with pytest.raises(ValueError, match=message):
        search(build_qwen(), {}, **arguments)
