"""The selection branch: causal attention over any set of key blocks."""

import contextlib

import pytest
import torch
from hypothesis import given
from nsa_cases import (
    CASES,
    Case,
    PoisonedEmpty,
    as_on_a_gpu,
    assert_all_close,
    assert_close_to_truth,
    cases,
    small_tiles,
    spec_packed,
    stable,
    with_gradients,
)

from nsa_kernels import compression, selection


def attend(case: Case, indices: torch.Tensor, backend: str, output: int = 0):
    return lambda q, k, v: selection.selection_attention(
        q, k, v, indices, case.lengths, block_size=case.block_size, backend=backend
    )[output]


def random_blocks(case: Case, seed: int = 3) -> torch.Tensor:
    """Distinct blocks in any order: own, earlier, later and missing ones, and tokens with none at all."""
    num_blocks = -(-max(case.lengths_k or case.lengths_q) // case.block_size)
    shape = case.lengths.offsets_q[-1], case.heads[1], max(num_blocks, case.block_counts)
    shuffled = torch.rand(shape, generator=torch.Generator().manual_seed(seed)).argsort(-1)
    shuffled = shuffled.masked_fill(shuffled >= num_blocks, -1)[..., : case.block_counts]
    missing = torch.rand(shuffled.shape, generator=torch.Generator().manual_seed(seed + 1)) < 0.2
    return shuffled.masked_fill(missing, -1).int()


def as_mask(indices: torch.Tensor, num_blocks: int) -> torch.Tensor:
    return (indices[..., None] == torch.arange(num_blocks)).any(-2)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_torch_matches_the_oracle(case, dtype):
    inputs, indices = case.qkv(dtype), random_blocks(case)
    expected = with_gradients(attend(case, indices, "reference"), inputs)
    lse = attend(case, indices, "reference", 1)(*inputs)
    for conditions in ((), (small_tiles(),), (as_on_a_gpu(),), (small_tiles(), as_on_a_gpu())):
        with contextlib.ExitStack() as stack:
            for condition in conditions:
                stack.enter_context(condition)
            assert_all_close(with_gradients(attend(case, indices, "torch"), inputs), expected, dtype)
            assert_all_close([attend(case, indices, "torch", 1)(*inputs)], [lse], dtype)


@stable
@given(cases())
def test_oracle_and_torch_match_the_specification(case):
    inputs, indices = case.qkv(), random_blocks(case)
    if not case.lengths.offsets_q[-1]:
        assert attend(case, indices, "torch")(*inputs).shape == inputs[0].shape
        return

    def branch(spec, span):
        return spec.selection(as_mask(indices[span.q_start : span.q_end], -(-span.num_keys // case.block_size)))

    expected = with_gradients(lambda q, k, v: spec_packed(case, q, k, v, branch)[0], inputs)
    lse = spec_packed(case, *inputs, branch)[1]
    for backend in ("reference", "torch"):
        assert_all_close(with_gradients(attend(case, indices, backend), inputs), expected, torch.float64)
        assert_all_close([attend(case, indices, backend, 1)(*inputs)], [lse], torch.float64)


@pytest.mark.parametrize(
    "case", [Case((9, 3), block_size=3, head_dim=2), Case((4,), (9,), block_size=2, head_dim=3)], ids=str
)
def test_gradcheck(case):
    inputs = [x.requires_grad_() for x in case.qkv()]
    assert torch.autograd.gradcheck(attend(case, random_blocks(case), "torch"), inputs)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_is_as_good_as_plain_code(dtype):
    case = Case((90, 40), (90, 61), heads=(14, 2), head_dim=32, block_counts=5)
    inputs = case.qkv(dtype)
    indices = compression.select_blocks(*inputs[:2], case.lengths, block_size=case.block_size, block_counts=5)
    truth = with_gradients(attend(case, indices, "reference"), [x.float() for x in inputs])
    out = with_gradients(attend(case, indices, "torch"), inputs)
    assert_close_to_truth(out, with_gradients(attend(case, indices, "reference"), inputs), truth)
    assert {x.dtype for x in out} == {dtype}
    assert attend(case, indices, "torch", 1)(*inputs).dtype == torch.float32


@pytest.mark.parametrize("lengths", [((70,), None), ((20, 9), (70, 9))], ids=str)
def test_all_blocks_are_dense_causal_attention(lengths):
    case = Case(*lengths, heads=(10, 2), block_counts=9)
    q, k, v = case.qkv()
    indices = torch.arange(9, dtype=torch.int32).expand(len(q), 2, 9)
    o = attend(case, indices, "torch")(q, k, v)
    for span in case.lengths.spans():
        rows, keys = slice(span.q_start, span.q_end), slice(span.k_start, span.k_end)
        mask = torch.ones(span.num_queries, span.num_keys, dtype=torch.bool).tril(span.first)
        dense = torch.nn.functional.scaled_dot_product_attention(
            *(x.transpose(0, 1)[None] for x in (q[rows], k[keys], v[keys])), attn_mask=mask, enable_gqa=True
        )
        torch.testing.assert_close(o[rows], dense[0].transpose(0, 1), rtol=0, atol=1e-12)


def test_a_block_that_everybody_selects():
    """Its run of pairs spans many tiles and batches."""
    case = Case((500,), heads=(2, 1), block_size=4, block_counts=3)
    inputs = case.qkv()
    own = torch.arange(500) // 4
    popular = torch.stack([torch.zeros_like(own), torch.full_like(own, -1), own], dim=-1)
    indices = popular.masked_fill(own[:, None] == torch.tensor([0, -1, -1]), -1)[:, None].int()
    expected = with_gradients(attend(case, indices, "reference"), inputs)
    with small_tiles():
        assert_all_close(with_gradients(attend(case, indices, "torch"), inputs), expected, torch.float64)
    assert_all_close(with_gradients(attend(case, indices, "torch"), inputs), expected, torch.float64)


def test_token_without_blocks_gets_zero_with_zero_gradient():
    case = Case((20,))
    inputs = [x.requires_grad_() for x in case.qkv()]
    indices = random_blocks(case)
    indices[5] = -1
    indices[6] = torch.tensor([2, 1, -1])  # both start after token 6
    o, lse = selection.selection_attention(*inputs, indices, case.lengths, block_size=8)
    assert not o[5:7].any() and lse[5:7].isneginf().all()
    for gradient in torch.autograd.grad(o[5:7].sum(), inputs):
        assert not gradient.any()


@pytest.mark.parametrize("order", ["rising", "falling", "random"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_scores_of_blocks_far_from_each_other(order, dtype):
    """By more than the range of exponentials: rows are computed again, or what comes adds nothing."""
    case = Case((200,), heads=(3, 1), block_size=4, block_counts=50)
    q, k, v = case.qkv(dtype)
    level = torch.arange(50) * 8.0  # six such steps are far, a dozen beyond float32's exponentials
    if order == "random":
        level = level[torch.randperm(50, generator=torch.Generator().manual_seed(5))]
    q[..., 0], k[..., 0] = 1.0, (level if order != "falling" else level.flip(0)).repeat_interleave(4)[:, None]
    indices = random_blocks(case)
    function = lambda *x: selection.selection_attention(  # noqa: E731
        *x, indices, case.lengths, block_size=4, softmax_scale=1.0, backend="torch"
    )
    truth_o, truth_lse = selection.selection_attention(
        *(x.double() for x in (q, k, v)), indices, case.lengths, block_size=4, softmax_scale=1.0, backend="reference"
    )
    # A score of up to 392 is off by half a unit in the last place, and the products before it were by as much.
    bound = 4 * 392 * torch.finfo(dtype).eps
    for condition in (contextlib.nullcontext(), small_tiles(), as_on_a_gpu()):
        with condition:
            o, lse = function(q, k, v)
        assert torch.equal(lse.isneginf(), truth_lse.isneginf())
        seen = truth_lse.isfinite()
        assert (lse - truth_lse)[seen].abs().max() < bound
        assert (o - truth_o).abs().max() < 2 * bound * v.abs().max()


def test_rows_far_above_their_own_block_are_computed_again_alone(monkeypatch):
    """On a CPU, where sums are relative to a score of the own block; all other rows stay as they are."""
    case = Case((90, 40), heads=(4, 2), block_counts=4)
    q, k, v = case.qkv(torch.float32)
    indices = compression.select_blocks(q, k, case.lengths, block_size=case.block_size, block_counts=4)
    tokens, sums = [], selection._sums
    monkeypatch.setattr(selection, "_sums", lambda batches, *rest: tokens.append(of(batches)) or sums(batches, *rest))
    o, lse = selection.selection_attention(q, k, v, indices, case.lengths, block_size=case.block_size)
    assert [len(found) for found in tokens] == [90, 90, 40, 40]  # each sequence's heads, each once
    q[70, 1] *= 300.0
    far_o, far_lse = selection.selection_attention(q, k, v, indices, case.lengths, block_size=case.block_size)
    assert [len(found) for found in tokens[4:]] == [90, 1, 90, 40, 40] and tokens[5] == {70}
    rest = torch.ones(130, 4, dtype=torch.bool)
    rest[70, 1] = False
    assert torch.equal(far_o[rest], o[rest]) and torch.equal(far_lse[rest], lse[rest])
    truth = attend(case, indices, "reference")(*(x.double() for x in (q, k, v)))
    # Scores in the hundreds, as in the test above.
    bound = 8 * float(far_lse[70, 1].abs()) * torch.finfo(torch.float32).eps * float(v.abs().max())
    assert (far_o[70, 1] - truth[70, 1]).abs().max() < bound


def test_large_values_are_finite():
    """Though a sum of exponentials that is not too large by itself takes them beyond float32."""
    case = Case((90,), heads=(4, 2), block_counts=4)
    q, k, v = case.qkv(torch.float32)
    indices = compression.select_blocks(q, k, case.lengths, block_size=case.block_size, block_counts=4)
    o, truth = (attend(case, indices, backend)(q * 8, k, v * 1e33) for backend in ("torch", "reference"))
    assert truth.isfinite().all() and o.isfinite().all()
    # Scores up to 100, each off by some units in the last place.
    assert (o - truth).abs().max() < 4 * 100 * torch.finfo(torch.float32).eps * 1e33 * float(v.abs().max())


def of(batches) -> set[int]:
    """Their tokens."""
    return {token for batch in batches for token in batch.tokens.tolist()}


def test_nan_stays_with_the_tokens_that_select_it():
    """In the first block of a batch, in a later one, and in a token's own."""
    case = Case((60,), heads=(2, 1), block_size=4, block_counts=4)
    q, k, v = case.qkv(torch.float32)
    indices = random_blocks(case)
    clean = attend(case, indices, "torch")(q, k, v)
    for block in (0, 5, 9):
        broken = k.clone()
        broken[block * 4] = torch.nan
        o = attend(case, indices, "torch")(q, broken, v)
        selects = (indices[:, 0] == block).any(-1) & (torch.arange(60) >= block * 4)
        assert selects.any() and o[selects].isnan().all()
        torch.testing.assert_close(o[~selects], clean[~selects])


@pytest.mark.parametrize("value", [-1, 1])
def test_nobody_has_a_block(value):
    case = Case((7,))
    inputs = [x.requires_grad_() for x in case.qkv()]
    o, _ = selection.selection_attention(*inputs, torch.full((7, 2, 1), value), case.lengths, block_size=8)
    assert not o.any()
    assert not any(gradient.any() for gradient in torch.autograd.grad(o.sum(), inputs))


def test_autocast_narrows_nothing():
    case = CASES[3]
    expected = with_gradients(attend(case, random_blocks(case), "torch"), case.qkv(torch.float32))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = with_gradients(attend(case, random_blocks(case), "torch"), case.qkv(torch.float32))
    assert all(torch.equal(a, b) for a, b in zip(inside, expected, strict=True))


def test_every_output_element_is_written():
    case = CASES[2]
    indices = random_blocks(case)
    for condition in (contextlib.nullcontext(), as_on_a_gpu()):
        with PoisonedEmpty(), condition:
            out = with_gradients(attend(case, indices, "torch"), case.qkv())
            lse = attend(case, indices, "torch", 1)(*case.qkv())
        assert all(x.isfinite().all() for x in out) and not lse.isnan().any()


@pytest.mark.parametrize(
    ("kwargs", "match"),
    [
        ({"block_size": 0}, "block_size must be a positive integer, got 0"),
        ({"softmax_scale": None, "backend": "tpu"}, "backend must be one of .* got 'tpu'"),
        ({"softmax_scale": float("nan")}, "softmax_scale must be a finite number, got nan"),
        ({"block_indices": torch.zeros(9, 2, dtype=torch.int32)}, r"block_indices must have shape .*\(9, 2, >= 1\)"),
        ({"block_indices": torch.zeros(9, 4, 1, dtype=torch.int32)}, r"block_indices must have shape .*\(9, 4, 1\)"),
        ({"block_indices": torch.zeros(9, 2, 0, dtype=torch.int32)}, r"block_indices must have shape .*\(9, 2, 0\)"),
        ({"block_indices": torch.zeros(9, 2, 1)}, "block_indices must be int32 or int64 on cpu, got torch.float32"),
    ],
)
def test_wrong_arguments(kwargs, match):
    case = Case((9,))
    kwargs = {"block_indices": random_blocks(case), **kwargs}
    with pytest.raises(ValueError, match=match):
        selection.selection_attention(*case.qkv(), cu_seqlens_q=case.lengths, **kwargs)
