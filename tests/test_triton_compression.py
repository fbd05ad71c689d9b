"""The Triton kernels of the compression branch and of block choice, one by one."""

import pytest
import torch
from nsa_cases import Case, PoisonedEmpty, assert_close_to_truth, with_gradients
from triton_testing import DEVICE, DTYPES, lengths_on_device, needs_triton, on_cpu, on_device

from nsa_kernels import compression, reference, utils

pytestmark = needs_triton
triton_compression = pytest.importorskip("nsa_kernels.triton_compression")
triton_tiles = pytest.importorskip("nsa_kernels.triton_tiles")

CASES = [
    Case((50, 20), (50, 61), heads=(14, 2), head_dim=32, block_size=8, block_counts=3),
    Case((3, 0, 40), (3, 9, 40), heads=(5, 1), head_dim=24, block_size=5, block_counts=2),  # nothing a power of two
    Case((70,), heads=(16, 1), head_dim=64, block_size=16, block_counts=1),
    Case((130,), heads=(1, 1), head_dim=32, block_size=32, block_counts=3),  # 64 tokens in a tile
    Case((2,), (90,), heads=(3, 3), head_dim=96, block_size=1, block_counts=40),
    Case((7,), heads=(8, 1), head_dim=128, block_size=128, block_counts=4),  # no complete block
    Case((20,), heads=(40, 1), head_dim=32, block_size=4, block_counts=4),  # a group larger than 32
]

SMALL = Case((9, 16), (9, 61), heads=(6, 2), head_dim=32, block_size=8, block_counts=3)


def results(case: Case, dtype: torch.dtype) -> tuple[list[torch.Tensor], torch.Tensor, torch.Tensor]:
    """[o, dq, dk, dv], lse and block indices of the kernels, with poisoned outputs and scratch."""
    q, k, v = on_device(case.qkv(dtype))
    lengths = lengths_on_device(case)
    do = torch.randn(q.shape, generator=torch.Generator().manual_seed(7), dtype=torch.float64).to(q)
    with PoisonedEmpty():
        o, lse, indices = triton_compression.compress_and_choose(
            q, k, v, lengths, case.block_size, case.block_counts, case.scale
        )
        lse_delta = triton_tiles.lse_and_delta(lse, (o.float() * do.float()).sum(-1))
        gradients = triton_compression.compression_bwd(
            q, k, v, lse_delta, do, lengths, case.block_size, case.scale
        )  # fmt: skip
    assert gradients[0].dtype == dtype and {x.dtype for x in [*gradients[1:], lse]} == {torch.float32}
    return on_cpu([o, *gradients]), lse.cpu(), indices.cpu()


def oracle(case: Case):
    return lambda q, k, v: reference.compression_attention_ref(q, k, v, case.lengths, case.block_size, case.scale)[0]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_float32_matches_the_oracle(case):
    out, lse, indices = results(case, torch.float32)
    exact = case.qkv()
    expected_lse = reference.compression_attention_ref(*exact, case.lengths, case.block_size, case.scale)[1]
    for a, e in zip([*out, lse], [*with_gradients(oracle(case), exact), expected_lse], strict=True):
        torch.testing.assert_close(a.double(), e, rtol=0, atol=2e-5)
    settings = {"block_size": case.block_size, "block_counts": case.block_counts, "backend": "reference"}
    assert torch.equal(indices, compression.select_blocks(*exact[:2], case.lengths, **settings))


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
@pytest.mark.parametrize("case", CASES[:2], ids=str)
def test_half_precision_is_as_good_as_plain_code(case, dtype):
    inputs = case.qkv(dtype)
    out, lse, _ = results(case, dtype)
    truth = with_gradients(oracle(case), [x.double() for x in inputs])
    same_dtype = with_gradients(oracle(case), inputs)
    # Keys' gradients are summed over branches before they are rounded, so the kernels return them in float32.
    assert_close_to_truth([x.to(dtype) for x in out], same_dtype, truth)
    plain_lse, exact_lse = (
        reference.compression_attention_ref(*x, case.lengths, case.block_size, case.scale)[1]
        for x in (inputs, [x.double() for x in inputs])
    )
    seen = exact_lse.isfinite()
    assert torch.equal(seen, lse.isfinite())
    assert_close_to_truth([lse[seen]], [plain_lse[seen]], [exact_lse[seen]])


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_half_precision_choice_differs_only_at_near_ties(dtype):
    case = Case((24,), (200,), heads=(7, 1), head_dim=32, block_size=4, block_counts=9)
    q, k, _ = case.qkv(dtype)
    _, _, indices = results(case, dtype)
    chosen = torch.zeros(24, 1, 51, dtype=torch.bool).scatter_(-1, indices.long(), True)
    k_cmp = compression.pool_blocks(k.double(), 4)[:, 0]
    scores = torch.einsum("thd,jd->thj", q.double(), k_cmp) * case.scale
    position = torch.arange(176, 200)[:, None]
    scores = scores.masked_fill((torch.arange(50) >= (position + 1) // 4)[:, None], -torch.inf)
    importance = torch.nn.functional.pad(scores.softmax(-1).sum(1), (0, 1))[:, None]
    own = (position // 4)[:, None]
    importance = importance.masked_fill(torch.arange(51) == own, torch.inf)
    assert (chosen.sum(-1) == 9).all() and chosen.gather(-1, own).all()
    worst_chosen = importance.masked_fill(~chosen, torch.inf).amin(-1)
    best_left = importance.masked_fill(chosen, -1.0).amax(-1)
    # Pooled keys are rounded to the dtype: scores move by its epsilon, probabilities by the same part of themselves.
    assert ((worst_chosen - best_left) / best_left > -8 * torch.finfo(dtype).eps).all()


@pytest.mark.parametrize("block_counts", [1, 4, 9, 60], ids=str)
def test_ties_go_to_the_lower_block(block_counts):
    """Equal keys of small integers make every importance equal to the last bit, in any order of summation."""
    case = Case((9,), (240,), heads=(5, 1), head_dim=32, block_size=4, block_counts=block_counts)
    q, k, v = (x.round() for x in case.qkv(torch.float32))
    lengths = lengths_on_device(case)
    with PoisonedEmpty():
        _, _, indices = triton_compression.compress_and_choose(
            *on_device([q, torch.ones_like(k), v]), lengths, 4, block_counts, case.scale
        )
    for row, position in enumerate(range(231, 240)):
        own = position // 4
        expected = [*range(min(own, block_counts - 1)), own]
        assert indices[row, 0].tolist() == expected + [-1] * (block_counts - len(expected))


@pytest.mark.parametrize(
    ("levels", "block_counts"), [(3, 5), (3, 33), (10**9, 5), (10**9, 33)], ids=["ties-5", "ties-33", "5", "33"]
)
def test_choice_over_many_blocks_ranks_as_sorting_does(levels, block_counts):
    """Blocks of one token, exact copies of few or of many keys; 300 of them need 512 columns, written in two goes."""
    generator = torch.Generator().manual_seed(0)
    tokens, keys = 4, 300
    q = torch.randn(tokens, 3, 32, generator=generator)
    k = torch.randn(min(levels, keys), 32, generator=generator)
    if levels < keys:  # small integers: equal keys have equal scores in any order of summation
        q, k = q.round(), k.round()
    k = k[torch.randint(len(k), (keys,), generator=generator)][:, None] if levels < keys else k[:, None]
    lengths = utils.SequenceLengths.from_lengths([tokens], [keys], DEVICE)
    _, _, indices = triton_compression.compress_and_choose(*on_device([q, k, k]), lengths, 1, block_counts, 0.2)
    for row, own in enumerate(range(keys - tokens, keys)):
        probs = (q[row].double() @ k[: own + 1, 0].double().mT * 0.2).softmax(-1).sum(0).tolist()
        ranked = sorted(range(own), key=lambda j, probs=probs: (-round(probs[j], 9), j))
        assert indices[row, 0].tolist() == sorted([*ranked[: block_counts - 1], own])


def test_early_tokens_of_a_long_sequence_rank_few_columns():
    """Tiles whose columns fit into a quarter of the scratch take another path through the same code."""
    case = Case((100,), heads=(1, 1), head_dim=16, block_size=1, block_counts=3)
    q, k, v = case.qkv(torch.float32)
    lengths = lengths_on_device(case)
    indices = triton_compression.compress_and_choose(*on_device([q, k, v]), lengths, 1, 3, case.scale)[2]
    expected = compression.select_blocks(q, k, case.lengths, block_size=1, block_counts=3, backend="torch")
    assert torch.equal(indices.cpu(), expected)


def test_identical_runs():
    first, second = ((*out, lse, indices) for out, lse, indices in (results(SMALL, torch.float32) for _ in range(2)))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_large_scores_stay_finite():
    case = SMALL
    q, k, v = on_device(case.qkv(torch.float32))
    lengths = lengths_on_device(case)
    o, lse, indices = triton_compression.compress_and_choose(q * 60, k * 60, v, lengths, 8, 3, case.scale)
    # Most importances underflow to 0 and tie; each list still ascends to the token's own block.
    position = torch.cat([torch.arange(9), torch.arange(45, 61)])
    assert torch.equal(indices.amax(-1).cpu(), (position // 8)[:, None].expand(-1, 2).int())
    assert ((indices[..., 1:] > indices[..., :-1]) | (indices[..., 1:] == -1)).all()
    lse_delta = triton_tiles.lse_and_delta(lse, (o * o).sum(-1))
    gradients = triton_compression.compression_bwd(q * 60, k * 60, v, lse_delta, o, lengths, 8, case.scale)
    assert all(x.isfinite().all() for x in [o, *gradients]) and not lse.isnan().any()


def test_nan_inputs_are_not_hidden():
    case = Case((40,), heads=(2, 1), head_dim=32, block_size=8, block_counts=2)
    q, k, v = on_device(case.qkv(torch.float32))
    q[30, 1] = torch.nan
    o, lse, indices = triton_compression.compress_and_choose(q, k, v, lengths_on_device(case), 8, 2, case.scale)
    assert o[30, 1].isnan().all() and lse[30, 1].isnan()
    assert ((indices >= -1) & (indices < 5)).all()
    o[30, 1] = lse[30, 1] = 0.0
    assert o.isfinite().all() and not lse.isnan().any()


def test_memory_of_partial_sums_is_linear_in_tokens():
    for num_kv_heads in (1, 4, 8):
        rows = [
            triton_compression.num_splits(tokens // 64, num_kv_heads, tokens) * max(1, tokens // 64 * num_kv_heads)
            for tokens in (1 << i for i in range(6, 24))
        ]
        tokens = [1 << i for i in range(6, 24)]
        # (split, block, head) rows of head_dim float32, against the token rows of k.
        assert all(r <= max(65536, t * num_kv_heads / 64) for r, t in zip(rows, tokens, strict=True))


def test_scratch_does_not_grow_with_tiles():
    small, large = (triton_compression.choice_config(torch.bfloat16, 7, 128, n, 32) for n in (512, 2048))
    assert small["TOKENS"] == large["TOKENS"] == 16
    assert (small["NUM_BLOCKS_PAD"], large["NUM_BLOCKS_PAD"]) == (512, 2048)
