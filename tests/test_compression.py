"""The compression branch: means of complete blocks, softmax over those a token can see."""

import pytest
import torch
from hypothesis import given
from nsa_cases import (
    CASES,
    Case,
    PoisonedEmpty,
    assert_all_close,
    assert_close_to_truth,
    cases,
    small_tiles,
    spec_packed,
    stable,
    with_gradients,
)

from nsa_kernels import compression, utils


def attend(case: Case, backend: str, output: int = 0):
    return lambda q, k, v: compression.compression_attention(
        q, k, v, case.lengths, block_size=case.block_size, backend=backend
    )[output]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_torch_matches_the_oracle(case, dtype):
    inputs = case.qkv(dtype)
    expected = with_gradients(attend(case, "reference"), inputs)
    assert_all_close(with_gradients(attend(case, "torch"), inputs), expected, dtype)
    with small_tiles():
        assert_all_close(with_gradients(attend(case, "torch"), inputs), expected, dtype)
    assert_all_close([attend(case, "torch", 1)(*inputs)], [attend(case, "reference", 1)(*inputs)], dtype)


@stable
@given(cases())
def test_oracle_and_torch_match_the_specification(case):
    inputs = case.qkv()
    if not case.lengths.offsets_q[-1]:
        assert attend(case, "torch")(*inputs).shape == inputs[0].shape
        return
    expected = with_gradients(lambda q, k, v: spec_packed(case, q, k, v, lambda s, _: s.compression())[0], inputs)
    lse = spec_packed(case, *inputs, lambda s, _: s.compression())[1]
    for backend in ("reference", "torch"):
        assert_all_close(with_gradients(attend(case, backend), inputs), expected, torch.float64)
        assert_all_close([attend(case, backend, 1)(*inputs)], [lse], torch.float64)


@pytest.mark.parametrize("case", [Case((9, 3), block_size=3, head_dim=2), Case((4,), (9,), block_size=2)], ids=str)
def test_gradcheck(case):
    inputs = [x.requires_grad_() for x in case.qkv()]
    assert torch.autograd.gradcheck(attend(case, "torch"), inputs)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_is_as_good_as_plain_code(dtype):
    case = Case((90, 40), (90, 61), heads=(14, 2), head_dim=32)
    inputs = case.qkv(dtype)
    truth = with_gradients(attend(case, "reference"), [x.float() for x in inputs])
    out = with_gradients(attend(case, "torch"), inputs)
    assert_close_to_truth(out, with_gradients(attend(case, "reference"), inputs), truth)
    assert {x.dtype for x in out} == {dtype}
    assert attend(case, "torch", 1)(*inputs).dtype == torch.float32


def test_a_block_is_visible_from_its_last_token_on():
    case = Case((24,))
    q, k, v = case.qkv()
    before = attend(case, "torch")(q, k, v)
    v[8:16] += 1.0  # block 1 ends with token 15
    changed = (attend(case, "torch")(q, k, v) != before).flatten(1).any(1)
    assert changed.tolist() == [t >= 15 for t in range(24)]


def test_no_visible_block_gives_zero_with_zero_gradient():
    case = Case((7, 12))
    inputs = [x.requires_grad_() for x in case.qkv()]
    o, lse = compression.compression_attention(*inputs, case.lengths, block_size=8)
    blind = [*range(7), *range(7, 14)]
    assert not o[blind].any() and lse[blind].isneginf().all()
    assert o[14:].all() and lse[14:].isfinite().all()
    for gradient in torch.autograd.grad(o[blind].sum(), inputs):
        assert not gradient.any()


def test_autocast_narrows_nothing():
    case = CASES[3]
    expected = with_gradients(attend(case, "torch"), case.qkv(torch.float32))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = with_gradients(attend(case, "torch"), case.qkv(torch.float32))
    assert all(torch.equal(a, b) for a, b in zip(inside, expected, strict=True))


def test_every_output_element_is_written():
    case = CASES[2]
    with PoisonedEmpty():
        out = with_gradients(attend(case, "torch"), case.qkv())
        lse = attend(case, "torch", 1)(*case.qkv())
    assert all(x.isfinite().all() for x in out) and not lse.isnan().any()


def test_mean_pool():
    case = Case((20, 5, 0, 17))
    x = case.qkv()[1].requires_grad_()
    pooled, cu_blocks = compression.mean_pool(x, case.lengths.cu_seqlens_k, block_size=8)
    assert cu_blocks.tolist() == [0, 2, 2, 2, 4] and cu_blocks.dtype == torch.int32
    starts = [0, 8, 25, 33]
    torch.testing.assert_close(pooled, torch.stack([x[s : s + 8].mean(0) for s in starts]))
    (gradient,) = torch.autograd.grad(pooled.sum(), x)
    used = torch.zeros(42, dtype=torch.float64)
    used[0:16] = used[25:41] = 1 / 8
    torch.testing.assert_close(gradient, used[:, None, None].expand_as(x))
    shorter_q = utils.SequenceLengths.from_lengths([1, 5, 0, 2], [20, 5, 0, 17])
    assert torch.equal(compression.mean_pool(x, shorter_q, block_size=8)[0], pooled)
    assert compression.mean_pool(x.bfloat16(), case.lengths, block_size=8)[0].dtype == torch.float32


@pytest.mark.parametrize(
    ("kwargs", "match"),
    [
        ({"block_size": 0}, "block_size must be a positive integer, got 0"),
        ({"block_size": 2.0}, "block_size must be a positive integer, got 2.0"),
        ({"softmax_scale": float("nan")}, "softmax_scale must be a finite number, got nan"),
        ({"backend": "cuda"}, "backend must be one of .* got 'cuda'"),
    ],
)
def test_wrong_arguments(kwargs, match):
    case = Case((9,))
    with pytest.raises(ValueError, match=match):
        compression.compression_attention(*case.qkv(), case.lengths, **kwargs)


def test_wrong_mean_pool_arguments():
    case = Case((9,))
    x = case.qkv()[1]
    with pytest.raises(ValueError, match="block_size"):
        compression.mean_pool(x, case.lengths, block_size=-1)
    with pytest.raises(ValueError, match=r"x must be floating point of shape \(9, num_kv_heads, .*8, 2"):
        compression.mean_pool(x[1:], case.lengths)
