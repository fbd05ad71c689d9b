"""The window branch: the last window_size tokens, the query itself included."""

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

from nsa_kernels import sliding_window


def attend(case: Case, backend: str, output: int = 0):
    return lambda q, k, v: sliding_window.sliding_window_attention(
        q, k, v, case.lengths, window_size=case.window_size, backend=backend
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
    expected = with_gradients(lambda q, k, v: spec_packed(case, q, k, v, lambda s, _: s.window())[0], inputs)
    lse = spec_packed(case, *inputs, lambda s, _: s.window())[1]
    for backend in ("reference", "torch"):
        assert_all_close(with_gradients(attend(case, backend), inputs), expected, torch.float64)
        assert_all_close([attend(case, backend, 1)(*inputs)], [lse], torch.float64)


@pytest.mark.parametrize("case", [Case((9, 3), head_dim=2, window_size=4), Case((4,), (9,), window_size=2)], ids=str)
def test_gradcheck(case):
    inputs = [x.requires_grad_() for x in case.qkv()]
    assert torch.autograd.gradcheck(attend(case, "torch"), inputs)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_is_as_good_as_plain_code(dtype):
    case = Case((90, 40), (90, 61), heads=(14, 2), head_dim=32, window_size=33)
    inputs = case.qkv(dtype)
    truth = with_gradients(attend(case, "reference"), [x.float() for x in inputs])
    out = with_gradients(attend(case, "torch"), inputs)
    assert_close_to_truth(out, with_gradients(attend(case, "reference"), inputs), truth)
    assert {x.dtype for x in out} == {dtype}
    assert attend(case, "torch", 1)(*inputs).dtype == torch.float32


@pytest.mark.parametrize("window_size", [70, 1000])
def test_window_as_long_as_the_sequence_is_dense_causal_attention(window_size):
    q, k, v = Case((70,), heads=(10, 2)).qkv()
    o, _ = sliding_window.sliding_window_attention(q, k, v, Case((70,)).lengths, window_size=window_size)
    dense = torch.nn.functional.scaled_dot_product_attention(
        *(x.transpose(0, 1)[None] for x in (q, k, v)), is_causal=True, enable_gqa=True
    )
    torch.testing.assert_close(o, dense[0].transpose(0, 1), rtol=0, atol=1e-12)


def test_window_counts_the_query_itself():
    case = Case((12,), window_size=3)
    q, k, v = case.qkv()
    before = attend(case, "torch")(q, k, v)
    v[4] += 1.0
    changed = (attend(case, "torch")(q, k, v) != before).flatten(1).any(1)
    assert changed.tolist() == [4 <= t <= 6 for t in range(12)]
    alone = attend(Case((12,), window_size=1), "torch")(q, k, v)
    torch.testing.assert_close(alone, v.repeat_interleave(2, 1))


def test_autocast_narrows_nothing():
    case = CASES[3]
    expected = with_gradients(attend(case, "torch"), case.qkv(torch.float32))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = with_gradients(attend(case, "torch"), case.qkv(torch.float32))
    assert all(torch.equal(a, b) for a, b in zip(inside, expected, strict=True))


def test_every_output_element_is_written():
    case = CASES[2]
    with PoisonedEmpty():
        out = [*with_gradients(attend(case, "torch"), case.qkv()), attend(case, "torch", 1)(*case.qkv())]
    assert all(x.isfinite().all() for x in out)


@pytest.mark.parametrize(
    ("kwargs", "match"),
    [
        ({"window_size": 0}, "window_size must be a positive integer, got 0"),
        ({"window_size": 1.5}, "window_size must be a positive integer, got 1.5"),
        ({"softmax_scale": float("inf")}, "softmax_scale must be a finite number, got inf"),
        ({"backend": ""}, "backend must be one of .* got ''"),
    ],
)
def test_wrong_arguments(kwargs, match):
    case = Case((9,))
    with pytest.raises(ValueError, match=match):
        sliding_window.sliding_window_attention(*case.qkv(), case.lengths, **kwargs)
