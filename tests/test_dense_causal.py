"""Dense causal attention through torch, and selection that runs through it."""

import pytest
import torch
from nsa_cases import Case, assert_close_to_truth, spec_packed, with_gradients
from triton_testing import DEVICE, DTYPES, lengths_on_device, needs_triton, on_cpu, on_device

from nsa_kernels import attention, dense, reference, utils

# Every block is selected in each.
ONE = Case((45,), heads=(7, 1), head_dim=32, block_size=16, block_counts=3, window_size=9)
EQUAL = Case((33, 33), heads=(6, 2), head_dim=24, block_size=16, block_counts=3, window_size=20)
LARGE = Case((200, 200), heads=(28, 4), head_dim=128, block_size=64, block_counts=4, window_size=70)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, True),
        ({"lengths_q": (33, 33)}, True),
        ({"lengths_q": (33, 34)}, False),
        ({"lengths_q": (33, 0)}, False),
        ({"lengths_q": (0,)}, False),
        ({"lengths_q": ()}, False),
        ({"lengths_q": (5,), "lengths_k": (9,)}, False),
        ({"head_dim": 20}, False),
        ({"dtype": torch.float32}, False),
    ],
    ids=str,
)
def test_what_one_call_of_torch_can_do(changes, expected):
    case = Case(
        **{"lengths_q": (45,), "heads": (7, 1), "head_dim": 32} | {k: v for k, v in changes.items() if k != "dtype"}
    )
    q = case.qkv(changes.get("dtype", torch.bfloat16))[0]
    assert dense.is_one_call(q, case.lengths) is expected


@pytest.mark.parametrize("case", [ONE, EQUAL], ids=str)
def test_is_causal_attention_within_each_sequence(case):
    def ours(q, k, v):
        return dense.dense_causal_attention(q, k, v, case.lengths, case.scale)

    def truth(q, k, v):
        return spec_packed(case, q, k, v, lambda spec, span: spec.selection())[0]

    inputs = case.qkv()
    for actual, expected in zip(with_gradients(ours, inputs), with_gradients(truth, inputs), strict=True):
        torch.testing.assert_close(actual, expected, rtol=0, atol=1e-9)
    assert ours(*inputs).is_contiguous()


def attend(case, gates_dtype=None):
    lengths = lengths_on_device(case)

    def function(q, k, v, *gates):
        gates = [gate.to(gates_dtype or gate.dtype) for gate in gates]
        return attention.nsa_attention(q, k, v, *gates, lengths, **case.nsa, backend="triton")

    return function


@needs_triton
@pytest.mark.parametrize("gates_dtype", [None, torch.float32], ids=str)
@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
@pytest.mark.parametrize("case", [ONE, EQUAL] + [LARGE] * (DEVICE.type == "cuda"), ids=str)
def test_selection_through_torch_is_as_good_as_plain_code(case, dtype, gates_dtype, monkeypatch):
    from nsa_kernels import triton_attention

    windows = []
    window_fwd = triton_attention.triton_rows._window
    monkeypatch.setattr(
        triton_attention.triton_rows, "_window", lambda *x, **y: windows.append(x[4]) or window_fwd(*x, **y)
    )

    def plain(*inputs):
        return reference.nsa_attention_ref(*inputs, case.lengths, **case.nsa, softmax_scale=case.scale)

    inputs = [*case.qkv(dtype), *case.gates(dtype)]
    out = on_cpu(with_gradients(attend(case, gates_dtype), on_device(inputs)))
    assert windows == [case.window_size]  # that of the window branch alone
    assert_close_to_truth(out, with_gradients(plain, inputs), with_gradients(plain, [x.double() for x in inputs]))


@needs_triton
def test_torch_and_the_window_kernel_agree_to_rounding(monkeypatch):
    inputs = on_device([*EQUAL.qkv(torch.float16), *EQUAL.gates(torch.float16)])
    inputs[4] = inputs[4].masked_fill(inputs[4] < 0.3, 0.0)  # closed gates
    through_torch = with_gradients(attend(EQUAL), inputs)
    monkeypatch.setattr(dense, "is_one_call", lambda q, lengths: False)
    through_window = with_gradients(attend(EQUAL), inputs)
    assert any(not torch.equal(a, b) for a, b in zip(through_torch, through_window, strict=True))
    for a, b in zip(through_torch, through_window, strict=True):
        torch.testing.assert_close(a, b, rtol=2e-2, atol=4e-3)


@needs_triton
def test_no_gradient_is_computed_where_none_is_asked_for():
    inputs = on_device([*ONE.qkv(torch.float16), *ONE.gates(torch.float16)])
    with torch.no_grad():
        without = attend(ONE)(*inputs)
    inputs[5].requires_grad_()  # a gate alone
    o = attend(ONE)(*inputs)
    assert torch.equal(o, without)
    (gradient,) = torch.autograd.grad(o.sum(), inputs[5])
    assert gradient.shape == inputs[5].shape and gradient.abs().sum() > 0


@needs_triton
def test_backward_inside_autocast():
    inputs = [x.requires_grad_() for x in on_device([*ONE.qkv(torch.float16), *ONE.gates(torch.float16)])]
    expected = torch.autograd.grad(attend(ONE)(*inputs).sum(), inputs)
    with torch.autocast(DEVICE.type, dtype=torch.bfloat16):
        inside = torch.autograd.grad(attend(ONE)(*inputs).sum(), inputs)
    for a, b in zip(inside, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-2, atol=1e-3)  # on a GPU, torch's backward adds in any order


def test_lengths_of_the_host_decide():
    """Nothing on the device is read: the lengths' tensors may be anything."""
    lengths = utils.SequenceLengths.from_lengths([45], device="meta")
    assert dense.is_one_call(torch.empty(45, 7, 32, dtype=torch.bfloat16, device="meta"), lengths)
