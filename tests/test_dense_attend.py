"""The softmax that the torch backend's branches are made of, by torch's fused kernel and by itself; scales, strides."""

import pytest
import torch

from nsa_kernels import attention, compression, dense, selection, sliding_window, utils

FUSED = pytest.mark.parametrize("fused", [True, False], ids=["fused", "by itself"])


def plain(q, k, v, scale, mask):
    scores = q @ k.mT * scale + mask
    return scores.softmax(-1).nan_to_num() @ v, scores.logsumexp(-1)


@FUSED
@pytest.mark.parametrize("scale", [0.3, 0.0, -0.3])
@pytest.mark.parametrize(("rows", "keys", "head_dim"), [(1, 1, 1), (5, 7, 3), (300, 1100, 16)])
def test_equals_the_plain_softmax(fused, scale, rows, keys, head_dim, monkeypatch):
    monkeypatch.setattr(dense, "is_fused", lambda q: fused)
    torch.manual_seed(0)
    q, k, v = (
        torch.randn(2, heads, n, head_dim, dtype=torch.float64) for heads, n in ((3, rows), (1, keys), (1, keys))
    )
    mask = torch.where(torch.rand(2, 1, rows, keys) < 0.4, -torch.inf, 0.0).double()
    mask[0, :, rows // 2] = -torch.inf  # a row that sees nothing
    mask[1, :, :, 512:1030] = -torch.inf  # and a whole tile of keys that nobody sees
    expected, expected_lse = plain(q, k, v, scale, mask)
    o, lse = dense.attend(q, k, v, scale, mask)
    assert (o - expected).abs().max() < 1e-12
    seen = expected_lse.isfinite()
    assert (lse - expected_lse)[seen].abs().max() < 1e-12 if seen.any() else True


@pytest.mark.parametrize("scale", [0.3, 0.0, -0.3])
def test_causal_where_fused(scale):
    q, k, v = torch.randn(3, 1, 2, 70, 8, dtype=torch.float64).unbind()
    expected, expected_lse = plain(q, k, v, scale, torch.full((70, 70), -torch.inf, dtype=torch.float64).triu(1))
    o, lse = dense.attend(q, k, v, scale, is_causal=True)
    assert (o - expected).abs().max() < 1e-12 and (lse - expected_lse).abs().max() < 1e-12


def test_numbers_of_a_row_that_do_not_lie_side_by_side():
    q, k, v = torch.randn(3, 1, 2, 9, 5, dtype=torch.float64).unbind()
    o, _ = dense.attend(q, k, v, 0.3)
    turned = q.transpose(2, 3).contiguous().transpose(2, 3)
    assert turned.stride(-1) != 1 and torch.equal(dense.attend(turned, k, v, 0.3)[0], o)


LENGTHS = utils.SequenceLengths.from_lengths([70, 9, 30], [70, 20, 30])


def calls(scale, backend, indices):
    """Outputs of every function with a softmax, of blocks of 4, from q, k, v and gates."""
    common = {"softmax_scale": scale, "backend": backend}
    return {
        "compression": lambda q, k, v, *_: compression.compression_attention(q, k, v, LENGTHS, block_size=4, **common)[
            0
        ],
        "selection": lambda q, k, v, *_: selection.selection_attention(
            q, k, v, indices, LENGTHS, block_size=4, **common
        )[0],
        "window": lambda q, k, v, *_: sliding_window.sliding_window_attention(
            q, k, v, LENGTHS, window_size=5, **common
        )[0],
        "whole": lambda q, k, v, *_: sliding_window.sliding_window_attention(
            q, k, v, LENGTHS, window_size=99, **common
        )[0],
        "nsa": lambda *x: attention.nsa_attention(*x, LENGTHS, block_size=4, block_counts=3, window_size=5, **common),
    }


@pytest.mark.parametrize("turned", [False, True], ids=["as usual", "turned"])
@pytest.mark.parametrize("scale", [0.3, 0.0, -0.3])
@pytest.mark.parametrize("name", ["compression", "selection", "window", "whole", "nsa"])
def test_any_scale_and_any_strides(name, scale, turned):
    torch.manual_seed(0)
    q, *kv = (torch.randn(n, heads, 6, dtype=torch.float64) for n, heads in ((109, 4), (120, 2), (120, 2)))
    inputs = [q, *kv, *torch.rand(3, 109, 4, dtype=torch.float64)]
    indices = compression.select_blocks(
        q, kv[0], LENGTHS, block_size=4, block_counts=3, softmax_scale=scale, backend="reference"
    )
    expected = calls(scale, "reference", indices)[name](*inputs)
    if turned:
        inputs = [x.permute(*range(x.ndim)[::-1]).contiguous().permute(*range(x.ndim)[::-1]) for x in inputs]
        assert inputs[0].stride(-1) != 1
    assert (calls(scale, "torch", indices)[name](*inputs) - expected).abs().max() < 1e-12


@pytest.mark.parametrize("scale", [0.3, 0.0, -0.3])
@pytest.mark.parametrize("rows", [0, 1, 6, 20])
def test_text_rows_of_any_scale(rows, scale):
    q, k, v = (torch.randn(n, heads, 6, dtype=torch.float64) for n, heads in ((rows, 4), (20, 2), (20, 2)))
    o = dense.text_rows_attention(q, k, v, scale)
    mask = torch.full((rows, 20), -torch.inf, dtype=torch.float64).triu(20 - rows + 1)
    keys, values = (x.repeat_interleave(2, 1).transpose(0, 1) for x in (k, v))
    expected, _ = plain(q.transpose(0, 1), keys, values, scale, mask)
    assert o.shape == q.shape and torch.allclose(o, expected.transpose(0, 1), rtol=0, atol=1e-12)
    if not rows:
        (dq,) = torch.autograd.grad(dense.text_rows_attention(q.requires_grad_(), k, v, scale).sum(), q)
        assert dq.shape == q.shape


def test_a_query_that_is_no_number_spoils_itself_alone():
    """Though other tokens have fewer blocks than it, so that their lists end with -1."""
    torch.manual_seed(0)
    q, k, v = torch.randn(64, 4, 6), torch.randn(64, 2, 6), torch.randn(64, 2, 6)
    lengths = utils.SequenceLengths.from_lengths([64])
    indices = compression.select_blocks(q, k, lengths, block_size=4, block_counts=20, backend="torch")
    assert (indices == -1).any()
    expected, _ = selection.selection_attention(q, k, v, indices, lengths, block_size=4, backend="torch")
    q[0] = q[32] = torch.nan  # the first is whom tiles are filled up with
    o, _ = selection.selection_attention(q, k, v, indices, lengths, block_size=4, backend="torch")
    spoilt = o.isnan().flatten(1).any(1)
    assert spoilt.nonzero().squeeze(1).tolist() == [0, 32] and torch.equal(o[~spoilt], expected[~spoilt])


def test_tokens_without_blocks_where_nothing_is_fused(monkeypatch):
    monkeypatch.setattr(dense, "is_fused", lambda q: False)
    q, k, v = torch.randn(8, 2, 6), torch.randn(8, 1, 6), torch.randn(8, 1, 6)
    lengths = utils.SequenceLengths.from_lengths([8])
    nothing = torch.full((8, 1, 2), -1)
    o, lse = selection.selection_attention(q, k, v, nothing, lengths, block_size=4, backend="torch")
    assert (o == 0).all() and lse.isneginf().all()
