"""The Triton kernels of the window branch, forward and backward."""

from unittest import mock

import pytest
import torch
from nsa_cases import Case, PoisonedEmpty, assert_all_close, assert_close_to_truth, on_drawn_cases, with_gradients
from triton_testing import DEVICE, DTYPES, lengths_on_device, needs_triton, on_cpu, on_device

from nsa_kernels import reference

pytestmark = needs_triton

CASES = [
    Case((70,), heads=(7, 1), head_dim=32, window_size=13),
    Case((33, 0, 40), (33, 5, 90), heads=(10, 2), head_dim=64, window_size=33),
    Case((40,), heads=(2, 2), head_dim=128, window_size=1),
    Case((40, 1), (75, 1), heads=(8, 1), head_dim=96, window_size=500),
    Case((1,), (131,), heads=(16, 1), head_dim=32, window_size=130),
    Case((150,), heads=(1, 1), head_dim=32, window_size=64),
]


def run(case: Case, inputs: list[torch.Tensor], do: torch.Tensor) -> list[torch.Tensor]:
    """[o, lse, dq, dk, dv] of the kernels."""
    from nsa_kernels import triton_rows, triton_tiles

    q, k, v = inputs
    args = lengths_on_device(case), case.window_size, case.scale
    o, lse = triton_rows.window_fwd(q, k, v, *args)
    lse_delta = triton_tiles.lse_and_delta(lse, (o.float() * do.float()).sum(-1))
    return [o, lse, *triton_rows.window_bwd(q, k, v, lse_delta, do, *args)]


def expected(case: Case, inputs: list[torch.Tensor], dtype: torch.dtype) -> list[torch.Tensor]:
    """[o, lse, dq, dk, dv] of the oracle."""
    args = case.lengths, case.window_size, case.scale
    inputs = [x.to(dtype) for x in inputs]
    lse = reference.sliding_window_attention_ref(*inputs, *args)[1]
    o, *gradients = with_gradients(lambda *x: reference.sliding_window_attention_ref(*x, *args)[0], inputs)
    return [o, lse, *gradients]


def random_do(case: Case, dtype: torch.dtype) -> torch.Tensor:
    """The gradient of the output that `with_gradients` uses."""
    shape = case.lengths.offsets_q[-1], case.heads[0], case.head_dim
    return torch.randn(*shape, generator=torch.Generator().manual_seed(7), dtype=torch.float64).to(dtype)


def run_on_device(case: Case, inputs: list[torch.Tensor], do: torch.Tensor) -> list[torch.Tensor]:
    return on_cpu(run(case, on_device(inputs), do.to(DEVICE)))


def check_float32(case: Case) -> None:
    inputs = case.qkv(torch.float32)
    with PoisonedEmpty():
        actual = run_on_device(case, inputs, random_do(case, torch.float32))
    if case.lengths.offsets_q[-1]:
        assert_all_close(actual, [x.float() for x in expected(case, inputs, torch.float64)], torch.float32)
    else:
        assert not any(gradient.any() for gradient in actual[3:])


@pytest.mark.parametrize("case", CASES, ids=str)
def test_float32_matches_the_oracle(case):
    check_float32(case)


@on_drawn_cases(15)
def test_float32_matches_the_oracle_on_drawn_cases(case):
    check_float32(case)


@pytest.mark.parametrize("scale", [-0.3, 0.0])
def test_scale_may_be_any_number(scale):
    with mock.patch.object(Case, "scale", scale):
        check_float32(CASES[1])


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
@pytest.mark.parametrize("case", CASES[:4], ids=str)
def test_half_precision_is_as_good_as_plain_code(case, dtype):
    inputs = case.qkv(dtype)
    out = run_on_device(case, inputs, random_do(case, dtype))
    assert [x.dtype for x in out] == [dtype, torch.float32, dtype, torch.float32, torch.float32]
    truth, plain = expected(case, inputs, torch.float64), expected(case, inputs, dtype)
    # With a window of one token dq and dk are 0, and plain code makes no error.
    skipped = {1, 2, 3} if case.window_size == 1 else {1}
    assert_close_to_truth(*([x for i, x in enumerate(y) if i not in skipped] for y in (out, plain, truth)))
    torch.testing.assert_close(out[1].double(), truth[1], rtol=0, atol=2e-5)


def test_window_of_one_token_copies_its_value():
    case = CASES[2]
    inputs = case.qkv(torch.float16)
    o, _, dq, dk, dv = run_on_device(case, inputs, random_do(case, torch.float16))
    torch.testing.assert_close(o, inputs[2], rtol=0, atol=0)
    torch.testing.assert_close(dv, random_do(case, torch.float16).float(), rtol=2e-3, atol=1e-6)
    assert dq.abs().max() < 1e-4 and dk.abs().max() < 1e-4


def test_runs_repeat_to_the_last_bit_whatever_the_strides():
    case = CASES[1]
    inputs, do = case.qkv(torch.float32), random_do(case, torch.float32)
    first = run_on_device(case, inputs, do)
    for strided in (lambda x: x.transpose(0, 1).contiguous().transpose(0, 1), lambda x: x.mT.contiguous().mT):
        strided_inputs = [strided(x) for x in on_device(inputs)]
        assert not any(x.is_contiguous() for x in strided_inputs)
        again = on_cpu(run(case, strided_inputs, strided(do.to(DEVICE))))
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


def test_packed_sequences_equal_each_alone():
    case = CASES[1]
    inputs, do = case.qkv(torch.float32), random_do(case, torch.float32)
    packed = run_on_device(case, inputs, do)
    for span in case.lengths.spans():
        alone = Case((span.num_queries,), (span.num_keys,), case.heads, case.head_dim, window_size=case.window_size)
        rows, keys = slice(span.q_start, span.q_end), slice(span.k_start, span.k_end)
        out = run_on_device(alone, [inputs[0][rows], inputs[1][keys], inputs[2][keys]], do[rows])
        for x, part in zip(packed, out, strict=True):
            assert torch.equal(x[rows] if len(x) == len(do) else x[keys], part)


@pytest.mark.filterwarnings("ignore:overflow encountered in exp2")  # of keys that are masked afterwards
def test_softmax_survives_large_scores():
    """Scores of hundreds, of either sign."""
    case = Case((50,), heads=(2, 1), head_dim=32, window_size=20)
    q, k, v = case.qkv(torch.float32)
    do = random_do(case, torch.float32)
    for factor in (100.0, -100.0):
        truth = expected(case, [factor * q, k, v], torch.float64)
        o, lse, _, _, dv = run_on_device(case, [factor * q, k, v], do)
        torch.testing.assert_close(lse.double(), truth[1], rtol=1e-5, atol=1e-4)
        torch.testing.assert_close(o.double(), truth[0], rtol=0, atol=1e-3)
        torch.testing.assert_close(dv.double(), truth[4], rtol=0, atol=2e-3)
