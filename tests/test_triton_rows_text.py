"""Dense attention of few text rows over many keys, in Triton's interpreter without a GPU."""

import pytest
import torch
from nsa_cases import PoisonedEmpty, assert_close_to_truth, with_gradients
from triton_testing import DEVICE, DTYPES, needs_triton

pytestmark = needs_triton
triton_rows = pytest.importorskip("nsa_kernels.triton_rows")


def dense(q, k, v, softmax_scale, positions=None):
    """Softmax attention with a full mask, in the dtype of its inputs."""
    rows, keys, group_size = len(q), len(k), q.shape[1] // k.shape[1]
    if positions is None:
        positions = torch.arange(keys - rows, keys, device=q.device)
    k, v = (x.repeat_interleave(group_size, 1) for x in (k, v))
    scores = torch.einsum("thd,shd->hts", q, k) * softmax_scale
    hidden = torch.arange(keys, device=q.device) > positions[:, None]
    return torch.einsum("hts,shd->thd", scores.masked_fill(hidden, -torch.inf).softmax(-1), v)


def inputs(rows, keys, heads, head_dim, dtype, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shapes = (rows, heads[0], head_dim), (keys, heads[1], head_dim), (keys, heads[1], head_dim)
    return [torch.randn(*shape, generator=generator).to(DEVICE, dtype) for shape in shapes]


def run_all(qkv, softmax_scale, positions=None):
    """[o, dq, dk, dv] of the kernel, of plain code in the same dtype, and of plain code in float64."""

    def results(function, dtype):
        tensors = [x.to(dtype) for x in qkv]
        return [x.cpu() for x in with_gradients(lambda *a: function(*a, softmax_scale, positions), tensors)]

    dtype = qkv[0].dtype
    return results(triton_rows.text_rows_attention, dtype), results(dense, dtype), results(dense, torch.float64)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("rows", "keys", "heads", "head_dim"),
    [
        (2, 2, (1, 1), 32),
        (1, 150, (7, 1), 32),  # one row, many shares of keys
        (9, 130, (14, 2), 32),  # a share that only the last rows reach into
        (40, 41, (5, 1), 64),  # nearly square: most blocks masked
        (33, 33, (8, 1), 32),
        (20, 70, (16, 1), 32),
        (3, 66, (4, 4), 96),  # heads padded in the tile; no group
    ],
)
def test_close_to_truth(rows, keys, heads, head_dim, dtype):
    out, plain, truth = run_all(inputs(rows, keys, heads, head_dim, dtype), head_dim**-0.5)
    if dtype == torch.float32:
        for actual, expected in zip(out, truth, strict=True):
            torch.testing.assert_close(actual.double(), expected, rtol=0, atol=2e-5)
    else:
        assert_close_to_truth(out, plain, truth)


@pytest.mark.parametrize(
    "positions",
    [[0], [5], [0, 1, 2, 90], [3, 4, 50, 51, 52, 139], [139], list(range(0, 140, 7)), [0, 0, 63, 64, 64, 127, 128]],
    ids=str,
)
def test_rows_at_any_position(positions):
    qkv = inputs(len(positions), 140, (7, 1), 32, torch.float32)
    out, _, truth = run_all(qkv, 0.3, torch.tensor(positions, device=DEVICE))
    for actual, expected in zip(out, truth, strict=True):
        torch.testing.assert_close(actual.double(), expected, rtol=0, atol=2e-5)
    unseen = max(positions) + 1
    assert not out[2][unseen:].any() and not out[3][unseen:].any()


def test_positions_of_consecutive_rows_change_nothing():
    qkv = inputs(9, 100, (10, 2), 32, torch.float32)
    positions = torch.arange(91, 100, device=DEVICE, dtype=torch.int32)
    assert torch.equal(
        triton_rows.text_rows_attention(*qkv), triton_rows.text_rows_attention(*qkv, positions=positions)
    )


@pytest.mark.parametrize("splits", [1, 2, 3, 5, 40])
def test_any_number_of_splits(splits, monkeypatch):
    """Shares of uneven size, and more shares than blocks of keys."""
    monkeypatch.setattr(triton_rows, "_splits", lambda *_: splits)
    out, _, truth = run_all(inputs(7, 190, (7, 1), 32, torch.float32), 32**-0.5)
    for actual, expected in zip(out, truth, strict=True):
        torch.testing.assert_close(actual.double(), expected, rtol=0, atol=2e-5)


@pytest.mark.parametrize("softmax_scale", [-0.4, 0.0])
def test_scales_that_are_not_positive(softmax_scale):
    out, _, truth = run_all(inputs(5, 70, (7, 1), 32, torch.float32), softmax_scale)
    for actual, expected in zip(out, truth, strict=True):
        torch.testing.assert_close(actual.double(), expected, rtol=0, atol=2e-5)


def test_large_scores_do_not_overflow():
    q, k, v = inputs(4, 100, (2, 1), 32, torch.float32)
    q, k = 60 * q, 60 * k
    expected = dense(q.double(), k.double(), v.double(), 1.0)
    torch.testing.assert_close(triton_rows.text_rows_attention(q, k, v, 1.0).double(), expected, rtol=0, atol=1e-2)


def test_layouts_of_the_model():
    """q, k and v are transposed slices of larger tensors, k and v with unused keys behind; do is expanded."""
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(14, 50, 32, generator=generator).to(DEVICE)[:, 20:30].transpose(0, 1)
    k, v = torch.randn(2, 2, 90, 64, generator=generator).to(DEVICE)[..., ::2][:, :, :80].transpose(1, 2)
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    triton_rows.text_rows_attention(*leaves).sum().backward()
    doubles = [x.detach().double().requires_grad_() for x in (q, k, v)]
    dense(*doubles, 32**-0.5).sum().backward()
    for leaf, double in zip(leaves, doubles, strict=True):
        torch.testing.assert_close(leaf.grad.double(), double.grad, rtol=0, atol=2e-5)


def test_writes_every_element_and_repeats():
    qkv = inputs(9, 130, (7, 1), 32, torch.float32)
    run = lambda: with_gradients(triton_rows.text_rows_attention, qkv)  # noqa: E731
    plain = run()
    with PoisonedEmpty():
        poisoned = run()
    for first, second in zip(plain, poisoned, strict=True):
        assert first.isfinite().all() and torch.equal(first, second)


@pytest.mark.parametrize(
    ("tiles", "keys", "programs"), [(4, 131072, 132), (116, 131072, 132), (1, 100, 264), (4000, 131072, 132), (1, 1, 1)]
)
def test_splits_fill_the_gpu(tiles, keys, programs):
    splits = triton_rows.num_splits(tiles, keys, programs)
    assert 1 <= splits <= max(1, keys // 512)
    waves = -(-tiles * splits // programs)
    if keys // 512 * tiles >= programs:
        assert tiles * splits >= 0.8 * waves * programs


def test_positions_may_be_strided():
    qkv = inputs(3, 100, (4, 2), 32, torch.float32)
    positions = torch.tensor([[5, 0], [40, 0], [99, 0]], device=DEVICE)[:, 0]
    expected = triton_rows.text_rows_attention(*qkv, positions=positions.clone())
    assert torch.equal(triton_rows.text_rows_attention(*qkv, positions=positions), expected)


def test_refuses_what_it_cannot_do():
    q, k, v = inputs(3, 10, (2, 1), 32, torch.float32)
    with pytest.raises(ValueError, match="float64"):
        triton_rows.text_rows_attention(q.double(), k.double(), v.double())
    with pytest.raises(ValueError, match=r"3 queries .* only 2 keys"):
        triton_rows.text_rows_attention(q, k[:2], v[:2])
    with pytest.raises(ValueError, match="head_dim must be at most 128 for backend='triton', got 160"):
        triton_rows.text_rows_attention(*inputs(3, 10, (2, 1), 160, torch.float32))
    with pytest.raises(ValueError, match=r"positions must be on .*, like q, got meta"):
        triton_rows.text_rows_attention(q, k, v, positions=torch.arange(3, device="meta"))
    with pytest.raises(ValueError, match="positions must be int32 or int64"):
        triton_rows.text_rows_attention(q, k, v, positions=torch.arange(2, device=DEVICE))
    assert triton_rows.text_rows_attention(q[:0], k, v).shape == (0, 2, 32)


def test_torch_takes_square_runs_only():
    assert triton_rows.torch_is_as_good(20, 20) and not triton_rows.torch_is_as_good(20, 21)
