"""The executor of the sparse prefill methods, its counter, and their registration with transformers."""

import pytest
import torch
from baseline_testing import FLOAT64, build_ours, build_qwen, mask_of, masked_attention, pooled_attention, vectors
from conftest import Prompts
from torch.nn.attention.flex_attention import flex_attention
from transformers import AttentionInterface, AttentionMaskInterface, StaticCache
from transformers.masking_utils import causal_mask_function

import baselines
from baselines.attention import forward, padding_mask
from baselines.executor import _attend_flex, attend, block_mask
from baselines.pattern import Pattern
from generation_videonsa import CACHE_NAME

HEADS = [
    {"kind": "a_shape", "sink": 2, "window": 5},
    {"kind": "vertical_slash", "vertical": 4, "slash": 6},
    {"kind": "block_top_k", "blocks": 3},
    {"kind": "vertical_slash", "vertical": 0, "slash": 12},
]
SMALL = {
    "tri_shape": {"block_size": 4, "sink": 2, "window": 5, "last": 3},
    "minference": {
        "block_size": 4,
        "heads": [HEADS, HEADS[::-1]],
        "last_queries": 6,
        "min_vertical": 2,
        "min_slash": 3,
    },
    "mminference": {"block_size": 4, "strides": [6, 16], "heads": [[{"kind": "grid", "window": 5}] * 4] * 2},
    "flexprefill": {"block_size": 4, "min_budget": 4, "gamma": 0.6, "tau": 0.3},
    "xattention": {"block_size": 4, "stride": 2, "threshold": 0.6},
    "psa": {"block_size": 8, "stride": 4, "full": 0.3, "by_2": 0.5, "by_4": 0.7, "by_8": 0.9},
}
VIDEO = ("video", 6, 8, 8)  # 96 tokens


def random_pattern(kinds, num_heads=4, start=0, length=50, block_size=8, density=0.1, seed=0) -> Pattern:
    generator = torch.Generator().manual_seed(seed)
    pattern = Pattern(num_heads, start, length, block_size)
    shapes = {
        "blocks": (pattern.num_query_blocks, pattern.num_key_blocks),
        "rows": (length - start,),
        "columns": (length,),
        "diagonals": (length,),
        "slashes": (length,),
    }
    lists = {kind: torch.rand(num_heads, *shapes[kind], generator=generator) < density for kind in kinds}
    return Pattern(num_heads, start, length, block_size, **lists)


KINDS = [
    (),
    ("blocks",),
    ("rows",),
    ("columns",),
    ("diagonals",),
    ("columns", "diagonals"),
    ("slashes",),
    ("blocks", "rows", "columns", "diagonals", "slashes"),
]


@pytest.mark.parametrize("heads", [(4, 2), (6, 1), (3, 3)], ids=str)
@pytest.mark.parametrize(
    ("start", "length", "block_size"), [(0, 50, 8), (21, 50, 8), (24, 48, 8), (49, 50, 8), (0, 5, 8)]
)
@pytest.mark.parametrize("kinds", KINDS, ids="+".join)
def test_the_executor_computes_the_masked_dense_statement(kinds, start, length, block_size, heads):
    num_heads, num_kv_heads = heads
    pattern = random_pattern(kinds, num_heads, start, length, block_size)
    mask = mask_of(pattern)
    query, key, value = vectors(num_heads, num_kv_heads, length - start, length)
    output, pairs = attend(query, key, value, pattern, 0.3)
    torch.testing.assert_close(output, masked_attention(query, key, value, mask, 0.3), **FLOAT64)
    assert pairs == pattern.count() == int(mask.sum())
    assert pattern.dense_pairs == num_heads * sum(range(start + 1, length + 1))
    positions = torch.meshgrid(
        torch.arange(num_heads), torch.arange(start, length), torch.arange(length), indexing="ij"
    )
    assert torch.equal(pattern.contains(*positions), mask)


@pytest.mark.parametrize(("start", "length"), [(0, 50), (21, 50)])
@pytest.mark.parametrize("kinds", [(), ("columns", "slashes")], ids="+".join)
def test_means_of_keys_count_as_often_as_they_have_keys(kinds, start, length):
    base = random_pattern(kinds, 4, start, length, 8)
    generator = torch.Generator().manual_seed(1)
    shape = 4, base.num_query_blocks, base.num_key_blocks
    sizes = torch.tensor([0, 2, 4, 8], dtype=torch.uint8)[torch.randint(4, shape, generator=generator)]
    lists = {kind: getattr(base, kind) for kind in kinds}
    pattern = Pattern(4, start, length, 8, **lists, pooled=sizes)
    query, key, value = vectors(num_queries=length - start)
    output, pairs = attend(query, key, value, pattern, 0.3)
    torch.testing.assert_close(output, pooled_attention(query, key, value, pattern, 0.3), **FLOAT64)
    means = 0
    for head in range(4):
        for row in range(length - start):
            block = (start + row) // 8
            means += sum(8 // size for size in sizes[head, block - start // 8, :block].tolist() if size)
    assert pairs == pattern.count() == int(mask_of(pattern).sum()) + means


def test_what_is_left_out_is_not_computed():
    """Keys and values that no query takes may hold anything."""
    query, key, value = vectors()
    columns = torch.zeros(4, 50, dtype=torch.bool)
    columns[:, :7] = True
    blocks = torch.zeros(4, 7, 7, dtype=torch.bool)
    blocks[:, 6, 6] = True
    pattern = Pattern(4, 40, 50, 8, blocks=blocks[:, 5:], columns=columns)
    expected, pairs = attend(query[:, 40:], key, value, pattern, 1.0)
    assert pairs == 4 * (10 * 7 + 8 + 3)
    key[:, 7:40], value[:, 7:40] = torch.nan, torch.nan
    assert torch.equal(attend(query[:, 40:], key, value, pattern, 1.0)[0], expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_low_precision_errs_no_more_than_eager_attention(dtype):
    query, key, value = vectors(dtype=dtype)
    pattern = random_pattern(("blocks", "columns", "diagonals", "slashes"))
    mask = mask_of(pattern)
    truth = masked_attention(query.double(), key.double(), value.double(), mask, 0.3)
    eager = masked_attention(query, key, value, mask, 0.3)
    output = attend(query, key, value, pattern, 0.3)[0]
    assert output.dtype == dtype
    assert (output - truth).abs().max() <= 2 * (eager - truth).abs().max()


@pytest.mark.parametrize(("start", "length"), [(0, 50), (21, 50), (24, 48)])
@pytest.mark.parametrize("kinds", KINDS, ids="+".join)
def test_flex_attention_gets_the_same_statement(kinds, start, length):
    """On a GPU: what its block lists leave out is empty, what they call full is, and its mask is the pattern."""
    pattern = random_pattern(kinds, 4, start, length, 8, density=0.4)
    mask, grid = mask_of(pattern), start // 8 * 8
    lists = block_mask(pattern, "cpu")

    def tiles(fill):  # of what is missing from the first and the last blocks
        padded = torch.nn.functional.pad(mask, (0, -length % 8, start - grid, -length % 8), value=fill)
        return padded.unflatten(1, (-1, 8)).unflatten(3, (-1, 8)).transpose(2, 3)

    some, every = tiles(False).any((-1, -2)), tiles(True).all((-1, -2))

    def listed(numbers, indices):
        table = torch.zeros(indices.shape, dtype=torch.bool)
        ranks = torch.arange(indices.shape[-1]) < numbers[..., None]
        return table.scatter(-1, indices.long(), ranks)[0]

    partial = listed(lists.kv_num_blocks, lists.kv_indices)
    full = listed(lists.full_kv_num_blocks, lists.full_kv_indices)
    assert not (some & ~(partial | full)).any() and not (partial & full).any()
    assert not (full & ~every).any()
    rows, keys = torch.arange(length - grid), torch.arange(length)
    found = lists.mask_mod(torch.zeros(1), torch.arange(4)[:, None, None], rows[:, None], keys)
    assert torch.equal(found.expand(4, -1, -1)[:, start - grid :], mask)


@pytest.mark.filterwarnings("ignore:.*flex_attention.*:UserWarning")
@pytest.mark.parametrize("is_compiled", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["eager", "compiled"])
def test_flex_attention_gives_what_the_blocks_give(is_compiled):
    """On a CPU; compiled, it goes by the lists of blocks."""
    flex = torch.compile(flex_attention, dynamic=False) if is_compiled else flex_attention
    start, length, size = (150, 500, 128) if is_compiled else (21, 50, 8)  # compiled, blocks cannot be smaller
    query, key, value = vectors(num_queries=length - start, length=length, head_dim=16, dtype=torch.float32)
    pattern = random_pattern(("blocks", "columns", "diagonals", "slashes"), 4, start, length, size, density=0.05)
    with torch.no_grad():
        expected = attend(query, key, value, pattern, 0.3)[0]
        output = _attend_flex(query, key, value, pattern, 0.3, flex=flex)
    truth = attend(query.double(), key.double(), value.double(), pattern, 0.3)[0]
    assert (output - truth).abs().max() <= 4 * (expected - truth).abs().max()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"start": 50}, "`start` = 50"),
        ({"block_size": 0}, "`block_size` must be at least 1, got 0"),
        ({"columns": torch.zeros(4, 49, dtype=torch.bool)}, r"`columns` must be bool of shape \(4, 50\)"),
        ({"pooled": torch.zeros(4, 7, 7)}, r"`pooled` must be uint8 of shape \(4, 7, 7\), got torch.float32"),
        ({"pooled": torch.full((4, 7, 7), 3, dtype=torch.uint8)}, "`pooled` must divide `block_size` = 8"),
        (
            {"pooled": torch.zeros(4, 7, 7, dtype=torch.uint8), "rows": torch.zeros(4, 50, dtype=torch.bool)},
            "`pooled` and `rows` exclude each other",
        ),
        ({"blocks": torch.zeros(4, 7, 7)}, r"`blocks` must be bool .*float32"),
    ],
)
def test_wrong_patterns(changes, message):
    with pytest.raises(ValueError, match=message):
        Pattern(**{"num_heads": 4, "start": 0, "length": 50, "block_size": 8} | changes)


def test_patterns_of_other_shapes():
    query, key, value = vectors()
    with pytest.raises(ValueError, match="`pattern` is for 4 heads, 50 queries and 50 keys"):
        attend(query[:, 1:], key, value, random_pattern(()), 1.0)
    with pytest.raises(ValueError, match="do not serve 4 query heads"):
        attend(query, key[:1].expand(3, -1, -1), value, random_pattern(()), 1.0)


# ---- In models ----


@pytest.fixture(params=[build_qwen, build_ours], ids=["qwen", "ours"])
def any_model(request):
    return request.param()


def prompt(model, layout, seed=0) -> dict:
    return Prompts(model.config).one(layout, seed)


@pytest.mark.parametrize("name", SMALL)
def test_layers_compute_the_masked_dense_statement(any_model, name, monkeypatch):
    """The whole model, against one whose attention is a matrix with the pattern's mask; and every pair is counted."""
    inputs = prompt(any_model, [5, VIDEO, 9])
    baselines.configure(any_model, name, **SMALL[name])
    with torch.no_grad():
        logits = any_model(**inputs).logits
    counted, expected = baselines.pairs(any_model), []

    def dense(query, key, value, pattern, scale):
        mask = mask_of(pattern)
        if pattern.pooled is not None:
            expected.append(pattern.count())
            return pooled_attention(query, key, value, pattern, scale), 0
        expected.append(int(mask.sum()))
        return masked_attention(query, key, value, mask, scale), 0

    monkeypatch.setattr("baselines.attention.attend", dense)
    with torch.no_grad():
        torch.testing.assert_close(any_model(**inputs).logits, logits, **FLOAT64)
    assert len(expected) == 2 and counted.taken == sum(expected)
    assert counted.dense == 2 * 4 * sum(range(1, 111)) and 0 < counted.fraction < 0.9
    baselines.configure(any_model, None)
    with torch.no_grad():
        assert (any_model(**inputs).logits - logits).abs().max() > 1e-3  # something was left out


@pytest.mark.parametrize(
    "name_and_options",
    [
        ("xattention", {"threshold": 1.0}),
        ("flexprefill", {"gamma": 1.0}),
        ("minference", {"min_slash": 1000, "heads": None}),
        ("tri_shape", {"window": 1000}),
        ("psa", {"full": 1.0, "by_2": 1.0, "by_4": 1.0, "by_8": 1.0}),
    ],
    ids=lambda pair: pair[0],
)
def test_everything_is_dense_attention(any_model, name_and_options):
    name, options = name_and_options
    inputs = prompt(any_model, [5, VIDEO, 9])
    with torch.no_grad():
        expected = any_model(**inputs).logits
        baselines.configure(any_model, name, **SMALL[name] | options)
        torch.testing.assert_close(any_model(**inputs).logits, expected, **FLOAT64)
    assert baselines.pairs(any_model).fraction == 1


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", SMALL)
def test_a_batch_is_its_samples(any_model, name, side):
    baselines.configure(any_model, name, **SMALL[name])
    prompts = Prompts(any_model.config)
    singles = [prompts.one([5, VIDEO, 9]), prompts.one([3, ("video", 2, 8, 8), 20], seed=1), prompts.one([30], seed=2)]
    with torch.no_grad():
        expected = [any_model(**single).logits[0] for single in singles]
        alone = baselines.pairs(any_model)
        baselines.reset_pairs(any_model)
        batch = prompts.batch(singles, side)
        logits = any_model(**batch).logits
    assert baselines.pairs(any_model) == alone
    for sample, single in enumerate(expected):
        torch.testing.assert_close(logits[sample, batch["attention_mask"][sample].bool()], single, **FLOAT64)


@pytest.mark.parametrize("name", SMALL)
def test_generation_is_prefill_and_dense_steps(any_model, name):
    """Of a batch with padding; each step over the cache is dense attention over all keys."""
    baselines.configure(any_model, name, **SMALL[name])
    prompts = Prompts(any_model.config)
    batch = prompts.batch([prompts.one([5, VIDEO, 9]), prompts.one([3, ("video", 2, 8, 8), 20], seed=1)])
    options = {"max_new_tokens": 5, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}
    result = any_model.generate(**batch, **options)
    counted = baselines.pairs(any_model)
    with torch.no_grad():
        step = any_model(**batch, use_cache=True)
        assert baselines.pairs(any_model).taken == 2 * counted.taken  # the steps were not counted
        baselines.configure(any_model, None)
        mask, logits = batch["attention_mask"], [step.logits[:, -1]]
        deltas = any_model.model.rope_deltas
        for number in range(4):
            mask = torch.nn.functional.pad(mask, (0, 1), value=1)
            place = {"position_ids": (mask.sum(1, keepdim=True) - 1 + deltas).expand(3, -1, -1), "attention_mask": mask}
            token = result.sequences[:, batch["input_ids"].shape[1] + number][:, None]
            step = any_model(input_ids=token, **place, **{CACHE_NAME: step[CACHE_NAME]})
            logits.append(step.logits[:, -1])
    for found, expected in zip(result.logits, logits, strict=True):  # `generate` rounds to float32
        torch.testing.assert_close(found, expected.float(), atol=1e-11, rtol=2**-23)


@pytest.mark.parametrize("name", ["tri_shape", "xattention", "psa"])
def test_a_prompt_in_parts(any_model, name):
    """What goes by positions or by each block of queries alone takes the same pairs in parts of whole blocks."""
    options = SMALL[name] | ({"last": 0} if name == "tri_shape" else {})
    baselines.configure(any_model, name, **options)
    text = torch.randint(0, 250, (1, 61), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        whole = any_model(input_ids=text, use_cache=True)
        counted = baselines.pairs(any_model)
        baselines.reset_pairs(any_model)
        cache, parts = None, []
        for part in text.split([24, 16, 21], dim=1):
            step = any_model(input_ids=part, use_cache=True, **{CACHE_NAME: cache})
            cache = step[CACHE_NAME]
            parts.append(step.logits)
    torch.testing.assert_close(torch.cat(parts, 1), whole.logits, **FLOAT64)
    assert baselines.pairs(any_model) == counted


@pytest.mark.parametrize("name", SMALL)
def test_parts_that_end_anywhere(name):
    """Later parts are computed from where they start, though no block does."""
    model = build_qwen()
    baselines.configure(model, name, **SMALL[name])
    text = torch.randint(0, 250, (1, 61), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        cache = model(input_ids=text[:, :23], use_cache=True)[CACHE_NAME]
        first = baselines.pairs(model)
        logits = model(input_ids=text[:, 23:], use_cache=True, **{CACHE_NAME: cache}).logits
    assert logits.shape[1] == 38 and torch.isfinite(logits).all()
    taken, dense = baselines.pairs(model).taken - first.taken, baselines.pairs(model).dense - first.dense
    assert dense == 2 * 4 * sum(range(24, 62)) and 0 < taken < dense


@pytest.mark.parametrize("name", ["tri_shape", "xattention", "psa"])
def test_no_query_sees_what_comes_after_it(name):
    """Other tokens at the end change nothing before the last block.

    (MInference and FlexPrefill choose by the last queries for all of the prompt: of them, only pairs are causal.)
    """
    model = build_qwen()
    baselines.configure(model, name, **SMALL[name] | ({"last": 0} if name == "tri_shape" else {}))
    text = torch.randint(0, 250, (1, 60), generator=torch.Generator().manual_seed(0))
    other = text.clone()
    other[:, 56:] = (other[:, 56:] + 1) % 250
    with torch.no_grad():
        torch.testing.assert_close(
            model(input_ids=other).logits[:, :56], model(input_ids=text).logits[:, :56], **FLOAT64
        )


def test_a_static_cache():
    """Its empty slots are no keys."""
    model = build_qwen()
    baselines.configure(model, "xattention", **SMALL["xattention"])
    text = torch.randint(0, 250, (2, 30), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(text)
    mask[0, :7] = 0
    with torch.no_grad():
        expected = model(input_ids=text, attention_mask=mask).logits
        cache = StaticCache(config=model.config.text_config, max_cache_len=50)
        found = model(input_ids=text, attention_mask=mask, use_cache=True, **{CACHE_NAME: cache}).logits
    valid = mask.bool()
    torch.testing.assert_close(found[valid], expected[valid], **FLOAT64)


def test_by_name_alone(tmp_path):
    """`from_pretrained` takes the name, and the method's own defaults hold; the vision tower stays dense."""
    model = build_qwen(dtype=torch.float32)
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path, attn_implementation="tri_shape")
    inputs = Prompts(model.config, torch.float32).one([5, ("video", 8, 16, 16), 9])
    with torch.no_grad():
        logits = loaded(**inputs).logits
    baselines.configure(model, "tri_shape")
    with torch.no_grad():
        assert torch.equal(model(**inputs).logits, logits)
    assert model.config.vision_config._attn_implementation == "sdpa"
    assert baselines.pairs(model) == baselines.pairs(loaded) and baselines.pairs(model).fraction == 1  # 526 tokens


def test_every_method_has_a_mask():
    """Without one of its own, transformers would hand over none, and padding would be tokens."""
    for name in baselines.SPARSE_PREFILL:
        assert name in AttentionInterface()._global_mapping
        assert AttentionMaskInterface()._global_mapping[name] is padding_mask


def test_masks_of_packed_rows_are_refused():
    assert padding_mask(2, 5, 5) is None
    with pytest.raises(ValueError, match="`mask_function` must be causal"):
        padding_mask(2, 5, 5, mask_function=lambda *indices: causal_mask_function(*indices))


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("xatention", {}, "`method` must be one of .*xattention.*, got 'xatention'"),
        ("xattention", {"treshold": 0.5}, "`treshold` = 0.5 is no option of xattention; did you mean `threshold`"),
        ("xattention", {"threshold": 1.5}, "`threshold` of xattention must be a number from 0 to 1, got 1.5"),
        ("xattention", {"stride": 3}, "`stride` of xattention must divide `block_size` = 128, got 3"),
        ("xattention", {"block_size": "128"}, "`block_size` of xattention must be an integer from 1 on, got '128'"),
        ("flexprefill", {"gamma": -0.1}, "`gamma` of flexprefill"),
        ("flexprefill", {"min_budget": 0.5}, "`min_budget` of flexprefill"),
        ("tri_shape", {"window": 0}, "`window` of tri_shape must be an integer from 1 on, got 0"),
        ("minference", {"heads": "missing.json"}, "`heads` = 'missing.json' is no file"),
        ("minference", {"heads": [[{"kind": "b_shape"}]]}, "layer 0, head 0: `kind` must be one of .*, got 'b_shape'"),
        (
            "minference",
            {"heads": [[{"kind": "a_shape", "sink": 1}]]},
            "`window` must be an integer from 0 on, got None",
        ),
        ("minference", {"heads": [[{"kind": "grid", "window": 1}]]}, "`kind` must be one of .*, got 'grid'"),
        ("mminference", {"strides": [1]}, r"`strides` of mminference must be integers from 2 on, got \[1\]"),
        ("mminference", {"strides": "16"}, "`strides` of mminference"),
        ("psa", {"full": 0.9, "by_2": 0.8}, "must ascend, got"),
        ("psa", {"block_size": 20}, "`block_size` of psa must be a multiple of 8"),
        (None, {"threshold": 0.5}, "`threshold` is an option of no method"),
    ],
)
def test_wrong_options(name, options, message):
    model = build_qwen()
    with pytest.raises(ValueError, match=message):
        baselines.configure(model, name, **options)
    assert model.config.text_config._attn_implementation == "sdpa"


def test_heads_of_another_model():
    model = build_qwen()
    baselines.configure(model, "minference", block_size=4, heads=[[{"kind": "block_top_k", "blocks": 2}]] * 2)
    with pytest.raises(ValueError, match="`heads` of minference has 1 heads for layer 0, the model 4"):
        model(input_ids=torch.zeros(1, 9, dtype=torch.long))


def test_the_sparse_mode_is_refused(model):
    with pytest.raises(ValueError, match="`method` = 'xattention' runs in the place of dense attention"):
        baselines.configure(model, "xattention")
    model.set_attn_implementation({"text_config": "xattention"})
    with pytest.raises(ValueError, match="set `nsa_mode` = 'dense'"):
        model(input_ids=torch.zeros(1, 9, dtype=torch.long))


def test_other_masks_are_refused():
    model = build_qwen()
    attention = model.model.language_model.layers[0].self_attn
    query, key, value = (x[None] for x in vectors())
    with pytest.raises(ValueError, match=r"`attention_mask` of xattention must have shape \(batch, length\)"):
        forward(baselines.SPARSE_PREFILL["xattention"], attention, query, key, value, torch.ones(1, 1, 50, 50))
    with pytest.raises(ValueError, match=r"`dropout` = 0\.1: xattention has none"):
        forward(baselines.SPARSE_PREFILL["xattention"], attention, query, key, value, None, dropout=0.1)
