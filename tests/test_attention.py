"""The public entry point: gated sum of the branches, packed sequences, memory, backends, arguments."""

import contextlib
import logging
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from nsa_cases import (
    CASES,
    Case,
    PeakMemory,
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

from nsa_kernels import attention, compression, reference, selection, utils

LONG = Case((150, 61), (150, 90), heads=(14, 2), block_size=4, block_counts=5, window_size=20)


def attend(case: Case, backend: str = "torch"):
    return lambda *inputs: attention.nsa_attention(*inputs, case.lengths, **case.nsa, backend=backend)


def spec(case: Case, q, k, v, *gates):
    def branch(s, span):
        g_cmp, g_slc, g_swa = (g[span.q_start : span.q_end, :, None] for g in gates)
        return (g_cmp * s.compression()[0] + g_slc * s.selection()[0] + g_swa * s.window()[0],)

    return spec_packed(case, q, k, v, branch)[0]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("case", [*CASES, LONG], ids=str)
def test_torch_matches_the_oracle(case, dtype):
    inputs = [*case.qkv(dtype), *case.gates(dtype)]
    expected = with_gradients(attend(case, "reference"), inputs)
    for conditions in ((), (small_tiles(),), (as_on_a_gpu(),)):
        with contextlib.ExitStack() as stack:
            for condition in conditions:
                stack.enter_context(condition)
            assert_all_close(with_gradients(attend(case), inputs), expected, dtype)
            with torch.no_grad():
                assert_all_close([attend(case)(*inputs)], expected[:1], dtype)


@stable
@given(cases())
def test_oracle_and_torch_match_the_specification(case):
    inputs = [*case.qkv(), *case.gates()]
    if not case.lengths.offsets_q[-1]:
        assert attend(case)(*inputs).shape == inputs[0].shape
        return
    expected = with_gradients(lambda *x: spec(case, *x), inputs)
    for backend in ("reference", "torch"):
        assert_all_close(with_gradients(attend(case, backend), inputs), expected, torch.float64)


@pytest.mark.parametrize(
    "case",
    [
        Case((13,), head_dim=2, block_size=2, block_counts=2, window_size=3),
        Case((3, 2), (9, 2), heads=(3, 1), head_dim=2, block_size=2, block_counts=2, window_size=3),
    ],
    ids=str,
)
def test_gradcheck(case):
    inputs = [x.requires_grad_() for x in [*case.qkv(), *case.gates()]]
    assert torch.autograd.gradcheck(attend(case), inputs)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_is_as_good_as_plain_code(dtype):
    case = Case((90, 40), (90, 61), heads=(14, 2), head_dim=32, block_counts=4, window_size=20)
    inputs = [*case.qkv(dtype), *case.gates(dtype)]
    exact = [x.float() for x in inputs]
    # The same blocks for all three, those of the exact inputs: the choice itself is tested in test_block_choice.py.
    indices = compression.select_blocks(*exact[:2], case.lengths, block_size=8, block_counts=4, backend="reference")

    def plain(*inputs):
        return reference.nsa_attention_ref(
            *inputs, case.lengths, **case.nsa, softmax_scale=case.scale, block_indices=indices
        )

    out = with_gradients(attend(case), inputs)
    assert_close_to_truth(out, with_gradients(plain, inputs), with_gradients(plain, exact))
    assert {x.dtype for x in out} == {dtype}


def test_gates_may_have_another_dtype():
    inputs = [*LONG.qkv(torch.bfloat16), *LONG.gates(torch.float32)]
    for backend in ("torch", "reference"):
        out = with_gradients(attend(LONG, backend), inputs)
        assert [x.dtype for x in out] == [torch.bfloat16] * 4 + [torch.float32] * 3


@pytest.mark.parametrize("block_counts", [38, 100])
def test_all_blocks_selected_is_dense_causal_attention(block_counts):
    case = Case((150,), heads=(14, 2), block_size=4, block_counts=block_counts)
    q, k, v = case.qkv()
    gates = [torch.zeros(150, 14, dtype=torch.float64) for _ in range(3)]
    gates[1] += 1.0
    dense = torch.nn.functional.scaled_dot_product_attention(
        *(x.transpose(0, 1)[None] for x in (q, k, v)), is_causal=True, enable_gqa=True
    )
    torch.testing.assert_close(attend(case)(q, k, v, *gates), dense[0].transpose(0, 1), rtol=0, atol=1e-12)


@pytest.mark.parametrize("gate", [0, 1, 2])
def test_each_gate_opens_its_branch(gate):
    inputs = [*LONG.qkv(), *(torch.zeros(211, 14, dtype=torch.float64) for _ in range(3))]
    inputs[3 + gate] += 1.0
    name = ("compression", "selection", "window")[gate]
    expected = spec_packed(LONG, *inputs[:3], lambda s, _: getattr(s, name)())[0]
    assert_all_close([attend(LONG)(*inputs)], [expected], torch.float64)


def test_prefill_in_chunks_equals_prefill_at_once():
    case = Case((150,), heads=(7, 1), block_size=4, block_counts=5, window_size=20)
    q, k, v, *gates = [*case.qkv(), *case.gates()]
    at_once = attend(case)(q, k, v, *gates)
    bounds = [0, 1, 7, 8, 64, 65, 149, 150]
    for start, end in pairwise(bounds):
        part = Case((end - start,), (end,), heads=(7, 1), block_size=4, block_counts=5, window_size=20)
        o = attend(part)(q[start:end], k[:end], v[:end], *(g[start:end] for g in gates))
        torch.testing.assert_close(o, at_once[start:end], rtol=0, atol=1e-12)


def test_packed_equals_one_by_one():
    q, k, v, *gates = [*LONG.qkv(), *LONG.gates()]
    packed = attend(LONG)(q, k, v, *gates)
    for a, b, c, d in LONG.lengths.spans():
        one = Case((b - a,), (d - c,), heads=(14, 2), block_size=4, block_counts=5, window_size=20)
        o = attend(one)(q[a:b], k[c:d], v[c:d], *(g[a:b] for g in gates))
        torch.testing.assert_close(packed[a:b], o, rtol=0, atol=1e-12)


def test_strided_inputs_and_gradients():
    inputs = [*LONG.qkv(), *LONG.gates()]
    expected = with_gradients(attend(LONG), inputs)
    strided = [x.transpose(0, 1).contiguous().transpose(0, 1) for x in inputs]
    assert not any(x.is_contiguous() for x in strided)
    assert_all_close(with_gradients(lambda *x: attend(LONG)(*x), strided), expected, torch.float64)
    inputs = [x.requires_grad_() for x in inputs]
    broadcast = torch.autograd.grad(attend(LONG)(*inputs).sum(), inputs)  # a gradient whose strides are all 0
    dense = torch.autograd.grad(attend(LONG)(*inputs), inputs, torch.ones_like(inputs[0]))
    assert_all_close(broadcast, dense, torch.float64)
    turned = torch.ones(8, 14, 211, dtype=torch.float64).permute(2, 1, 0)
    assert_all_close(torch.autograd.grad(attend(LONG)(*inputs), inputs, turned), dense, torch.float64)


def test_runs_are_identical_to_the_last_bit():
    inputs = [*LONG.qkv(torch.float32), *LONG.gates(torch.float32)]
    first, second = (with_gradients(attend(LONG), inputs) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    with torch.no_grad():
        assert torch.equal(attend(LONG)(*inputs), first[0])


def test_autocast_narrows_nothing():
    inputs = [*LONG.qkv(torch.float32), *LONG.gates(torch.float32)]
    expected = with_gradients(attend(LONG), inputs)
    oracle = attend(LONG, "reference")(*inputs)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = with_gradients(attend(LONG), inputs)
        assert torch.equal(attend(LONG, "reference")(*inputs), oracle)
        assert (inputs[0][0] @ inputs[0][0].mT).dtype == torch.bfloat16
    assert all(torch.equal(a, b) for a, b in zip(inside, expected, strict=True))


def test_every_output_element_is_written():
    for case in (CASES[2], LONG):
        with PoisonedEmpty():
            out = with_gradients(attend(case), [*case.qkv(), *case.gates()])
        assert all(x.isfinite().all() for x in out)


def test_scores_beyond_the_range_of_exp_stay_finite():
    q, k, v = LONG.qkv(torch.float32)
    out = with_gradients(attend(LONG), [q * 40, k * 40, v, *LONG.gates(torch.float32)])
    assert all(x.isfinite().all() for x in out)


@pytest.mark.parametrize("lengths", [(), (0,), (0, 0)], ids=str)
def test_no_tokens_at_all(lengths):
    case = Case(lengths)
    for backend in ("torch", "reference"):
        out = with_gradients(attend(case, backend), [*case.qkv(), *case.gates()])
        assert out[0].shape == (0, 4, 8)


def test_sequence_without_queries_still_has_a_zero_gradient():
    case = Case((0, 5), (12, 5))
    _, _, dk, dv, *_ = with_gradients(attend(case), [*case.qkv(), *case.gates()])
    assert not dk[:12].any() and not dv[:12].any() and dv[12:].any()


@pytest.fixture
def cache_sized_tiles(monkeypatch):
    """Scales the constants to the short sequences of a memory test."""
    monkeypatch.setattr(utils, "CHUNK_TOKENS", 128)
    monkeypatch.setitem(utils._TILE_ELEMENTS, "cpu", 1 << 14)


def peak(tokens: int, backward: bool) -> PeakMemory:
    case = Case((tokens,), heads=(4, 1), head_dim=8, block_size=8, block_counts=8, window_size=32)
    inputs = [*case.qkv(torch.float32), *case.gates(torch.float32)]
    lengths = case.lengths
    with PeakMemory() as memory:
        leaves = [x.detach().requires_grad_(backward) for x in inputs]
        o = attention.nsa_attention(*leaves, lengths, **case.nsa)
        if backward:
            torch.autograd.grad(o.sum(), leaves)
    return memory


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
def test_memory_is_linear_in_tokens(cache_sized_tiles, backward):
    tokens = 4096
    memory = peak(tokens, backward)
    # Neither scores of all tokens over all tokens or all blocks, nor a copy of each token's own blocks.
    never = min(tokens * tokens, tokens * (tokens // 8), tokens * 8 * 8 * 8)
    assert memory.largest <= tokens * 4 * 8 < never / 8, "the largest tensor is larger than q"
    assert memory.live < (12 if backward else 4) * tokens * 4 * 8
    assert memory.live < 2.2 * peak(tokens // 2, backward).live


def test_lengths_are_not_read_from_the_device():
    """Tensors without data, as if reading them were forbidden: only the host's copy of the lengths is used."""
    inputs = [*LONG.qkv(), *LONG.gates()]
    lengths = LONG.lengths
    unreadable = utils.SequenceLengths(
        lengths.cu_seqlens_q.to("meta"), lengths.cu_seqlens_k.to("meta"), lengths.offsets_q, lengths.offsets_k
    )
    o = attention.nsa_attention(*inputs, unreadable, **LONG.nsa)
    assert torch.equal(o, attention.nsa_attention(*inputs, lengths.cu_seqlens_q, lengths.cu_seqlens_k, **LONG.nsa))


def test_cu_seqlens_k_defaults_to_cu_seqlens_q():
    case = Case((20, 13))
    inputs = [*case.qkv(), *case.gates()]
    cu_seqlens = torch.tensor([0, 20, 33], dtype=torch.int32)
    once = attention.nsa_attention(*inputs, cu_seqlens, **case.nsa)
    assert torch.equal(once, attention.nsa_attention(*inputs, cu_seqlens, cu_seqlens.clone(), **case.nsa))


def test_auto_says_once_what_it_chose(caplog):
    utils._choose.cache_clear()
    case = Case((3,))
    with caplog.at_level(logging.INFO, logger="nsa_kernels.utils"):
        for _ in range(3):
            attend(case, "auto")(*case.qkv(), *case.gates())
    assert [record.getMessage() for record in caplog.records] == ["backend='auto' chose 'torch' on cpu"]


def test_backends():
    assert attention.BACKENDS == ("auto", "reference", "torch", "triton")
    assert [attention.resolve_backend(name, "cpu") for name in ("auto", "torch", "reference")] == [
        "torch",
        "torch",
        "reference",
    ]
    with pytest.raises(ValueError, match=r"backend must be one of .* got 'flash'"):
        attend(LONG, "flash")(*LONG.qkv(), *LONG.gates())


def test_the_chosen_backend_runs(monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("the torch backend ran")

    monkeypatch.setattr(attention._NSAFunction, "apply", refuse)
    attend(CASES[0], "reference")(*CASES[0].qkv(), *CASES[0].gates())
    with pytest.raises(AssertionError, match="the torch backend ran"):
        attend(CASES[0])(*CASES[0].qkv(), *CASES[0].gates())


def cu(*offsets: int, dtype: torch.dtype = torch.int32) -> torch.Tensor:
    return torch.tensor(offsets, dtype=dtype)


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"block_size": 0}, "block_size must be a positive integer, got 0"),
        ({"block_counts": -3}, "block_counts must be a positive integer, got -3"),
        ({"window_size": None}, "window_size must be a positive integer, got None"),
        ({"softmax_scale": float("inf")}, "softmax_scale must be a finite number, got inf"),
        ({"q": torch.zeros(9, 32)}, r"q must have shape \(total, heads, head_dim\), got torch.float32 \(9, 32\)"),
        ({"v": torch.zeros(1, 9, 2, 8)}, "v must have shape"),
        (
            {"q": torch.zeros(9, 4, 8, dtype=torch.int32)},
            "q must be float16, bfloat16, float32 or .*int32",
        ),
        ({"k": torch.zeros(9, 2, 8).double()}, "k must have the dtype and device of q, .*float32.* got .*float64"),
        ({"v": torch.zeros(9, 2, 8, device="meta")}, "v must have the dtype and device of q, .* got .* on meta"),
        ({"v": torch.zeros(9, 1, 8)}, r"v must have the shape of k, \(9, 2, 8\), got \(9, 1, 8\)"),
        ({"q": torch.zeros(9, 4, 4)}, "head_dim of q and k must be equal and positive, got 4 and 8"),
        ({"q": torch.zeros(9, 5, 8)}, "num_heads of q must be a multiple of num_kv_heads of k, got 5 and 2"),
        ({"q": torch.zeros(9, 0, 8)}, "num_heads of q must be a multiple of num_kv_heads of k, got 0 and 2"),
        ({"q": torch.zeros(8, 4, 8)}, "q has 8 rows, but cu_seqlens_q ends at 9"),
        ({"cu_seqlens_k": cu(0, 10)}, "k has 9 rows, but cu_seqlens_k ends at 10"),
        (
            {"g_cmp": torch.zeros(9, 4, 1)},
            r"g_cmp must be floating point .*\(9, 4\) on cpu, got .*\(9, 4, 1\)",
        ),
        ({"g_slc": torch.zeros(9, 4, dtype=torch.int64)}, "g_slc must be floating point .* got torch.int64"),
        ({"g_swa": torch.zeros(9, 4, device="meta")}, "g_swa must be floating point .* on meta"),
        ({"cu_seqlens_q": [0, 9]}, r"cu_seqlens_q must be an int32 tensor of shape \(batch \+ 1,\), got \[0, 9\]"),
        ({"cu_seqlens_q": cu(0, 9, dtype=torch.int64)}, "cu_seqlens_q must be an int32 tensor .* got torch.int64"),
        ({"cu_seqlens_q": cu(0, 9)[None]}, r"cu_seqlens_q must be an int32 tensor .* \(1, 2\)"),
        ({"cu_seqlens_q": cu()}, r"cu_seqlens_q must be an int32 tensor .* \(0,\)"),
        ({"cu_seqlens_q": cu(1, 9)}, r"cu_seqlens_q must start at 0 and never decrease, got \[1, 9\]"),
        ({"cu_seqlens_k": cu(0, 12, 9)}, "cu_seqlens_k must have as many entries as cu_seqlens_q .2., got 3"),
        (
            {"cu_seqlens_q": cu(0, 12, 9), "cu_seqlens_k": cu(0, 9, 9)},
            "cu_seqlens_q must start at 0 and never decrease",
        ),
        ({"cu_seqlens_q": cu(0, 6, 9), "cu_seqlens_k": cu(0, 5, 9)}, "sequence 0 has 6 queries .* but only 5 keys"),
        (
            {"cu_seqlens_q": utils.SequenceLengths.from_lengths([9]), "cu_seqlens_k": cu(0, 9)},
            "cu_seqlens_k must be None when cu_seqlens_q is a SequenceLengths",
        ),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_wrong_arguments(changes, match):
    names = ("q", "k", "v", "g_cmp", "g_slc", "g_swa")
    case = Case((9,))
    arguments = dict(zip(names, [*case.qkv(torch.float32), *case.gates(torch.float32)], strict=True))
    with pytest.raises(ValueError, match=match):
        attention.nsa_attention(**{**arguments, "cu_seqlens_q": cu(0, 9), **changes})


@pytest.mark.parametrize(
    ("lengths", "match"),
    [
        (([3, -1],), "lengths must not be negative"),
        (([3], [3, 4]), "q has 1 sequences and k has 2"),
        (([3, 4], [3, 3]), "sequence 1 has 4 queries"),
    ],
)
def test_wrong_lengths(lengths, match):
    with pytest.raises(ValueError, match=match):
        utils.SequenceLengths.from_lengths(*lengths)


def test_the_last_chunk_of_a_long_sequence_is_cut_as_documented():
    """Chunks end where selection stops being dense, and never mix the two."""
    span = utils.Span(0, 5000, 1000, 7000)
    chunks = list(attention._chunks(span, 2048, 2048))
    assert [(c.start, c.stop, first) for c, first in chunks] == [
        (0, 1048, 1000),
        (1048, 3096, 2048),
        (3096, 5000, 4096),
    ]
    assert selection.chunk_tokens(torch.device("cuda"), 32, 7, 128) == 2048
    assert selection.chunk_tokens(torch.device("cpu"), 32, 7, 128) == 4096


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_cuda_matches_the_cpu_without_waiting(dtype):
    inputs = [*LONG.qkv(dtype), *LONG.gates(dtype)]
    expected = with_gradients(attend(LONG), inputs)
    lengths = utils.SequenceLengths.from_lengths(LONG.lengths_q, LONG.lengths_k, device="cuda")
    leaves = [x.cuda().requires_grad_() for x in inputs]
    do = torch.randn(expected[0].shape, generator=torch.Generator().manual_seed(7), dtype=torch.float64).to(
        "cuda", dtype
    )
    torch.cuda.set_sync_debug_mode("error")
    try:
        o = attention.nsa_attention(*leaves, lengths, **LONG.nsa, backend="torch")
        gradients = torch.autograd.grad(o, leaves, do)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert_all_close([x.detach().cpu() for x in (o, *gradients)], expected, dtype)
