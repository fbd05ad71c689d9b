"""Text rows against a dense mask, whatever the number of rows, of keys and of heads in a group."""

import pytest
import torch

from nsa_kernels import dense, utils


def expected(q, k, v, scale):
    rows, keys, group = q.shape[0], k.shape[0], q.shape[1] // k.shape[1]
    k, v = (x.repeat_interleave(group, dim=1) for x in (k, v))
    scores = torch.einsum("thd,shd->hts", q, k) * scale
    hidden = torch.ones(rows, keys, dtype=torch.bool).triu(keys - rows + 1)
    return torch.einsum("hts,shd->thd", scores.masked_fill(hidden, -torch.inf).softmax(-1), v)


@pytest.mark.parametrize("mask_elements", [1, 100, 1 << 25])
@pytest.mark.parametrize("rows", [1, 2, 13, 40])
@pytest.mark.parametrize("heads", [(7, 1), (10, 2), (16, 2), (3, 3)], ids=str)
def test_forward_and_gradients(heads, rows, mask_elements, monkeypatch):
    monkeypatch.setattr(dense, "_MASK_ELEMENTS", mask_elements)
    generator = torch.Generator().manual_seed(0)
    shapes = (rows, heads[0], 8), (40, heads[1], 8), (40, heads[1], 8)
    q, k, v = (torch.randn(s, generator=generator, dtype=torch.float64).requires_grad_() for s in shapes)
    o, truth = dense.text_rows_attention(q, k, v, 0.3), expected(q, k, v, 0.3)
    torch.testing.assert_close(o, truth, atol=1e-12, rtol=1e-12)
    do = torch.randn(o.shape, generator=generator, dtype=torch.float64)
    for ours, theirs in zip(*(torch.autograd.grad(x, (q, k, v), do) for x in (o, truth)), strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("mask_elements", [1, 100, 1 << 25])
@pytest.mark.parametrize("positions", [[0], [39], [0, 1, 2, 17, 38], list(range(40))], ids=str)
def test_rows_anywhere(positions, mask_elements, monkeypatch):
    monkeypatch.setattr(dense, "_MASK_ELEMENTS", mask_elements)
    generator = torch.Generator().manual_seed(0)
    shapes = (40, 6, 8), (40, 2, 8), (40, 2, 8)
    q, k, v = (torch.randn(s, generator=generator, dtype=torch.float64).requires_grad_() for s in shapes)
    rows = torch.tensor(positions)
    o, truth = dense.text_rows_attention(q[rows], k, v, 0.3, positions=rows), expected(q, k, v, 0.3)[rows]
    torch.testing.assert_close(o, truth, atol=1e-12, rtol=1e-12)
    do = torch.randn(o.shape, generator=generator, dtype=torch.float64)
    for ours, theirs in zip(*(torch.autograd.grad(x, (q, k, v), do) for x in (o, truth)), strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-12, rtol=1e-12)


def test_wrong_positions():
    q, k = torch.zeros(3, 2, 4), torch.zeros(5, 2, 4)
    for positions in (torch.zeros(2, dtype=torch.long), torch.zeros(3)):
        with pytest.raises(ValueError, match=r"positions must be int32 or int64 of shape \(rows,\) = \(3,\)"):
            dense.text_rows_attention(q, k, k, positions=positions)


def test_the_default_scale():
    q, k, v = torch.randn(5, 4, 16), torch.randn(9, 2, 16), torch.randn(9, 2, 16)
    assert torch.equal(dense.text_rows_attention(q, k, v), dense.text_rows_attention(q, k, v, 0.25))


def test_more_rows_than_keys():
    with pytest.raises(ValueError, match="6 queries"):
        dense.text_rows_attention(torch.zeros(6, 2, 4), torch.zeros(5, 2, 4), torch.zeros(5, 2, 4))


def test_few_rows_over_many_keys_go_to_triton(monkeypatch):
    triton_rows = pytest.importorskip("nsa_kernels.triton_rows")
    monkeypatch.setattr(utils, "resolve_backend", lambda name, device: name)
    calls = []
    monkeypatch.setattr(triton_rows, "text_rows_of_checked", lambda *args: calls.append(args) or "o")
    q, k = torch.randn(3, 2, 4), torch.randn(5000, 2, 4)
    assert dense.text_rows_attention(q, k, k, backend="triton") == "o"
    assert calls == [(q, k, k, 0.5, None)]
    assert torch.is_tensor(dense.text_rows_attention(k, k, k, backend="triton"))  # plain causal attention
    assert torch.is_tensor(dense.text_rows_attention(q, k, k, backend="torch")) and len(calls) == 1
