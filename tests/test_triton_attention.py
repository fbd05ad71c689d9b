"""backend="triton" of the public functions: against the oracle, and what the dispatch promises."""

import contextlib
import logging
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from nsa_cases import Case, PoisonedEmpty, assert_close_to_truth, with_gradients
from triton_testing import DEVICE, DTYPES, lengths_on_device, needs_triton, on_cpu, on_device

from nsa_kernels import attention, compression, reference, selection, sliding_window, utils

pytestmark = needs_triton

# Two sequences, fewer queries than keys, a group that is not a power of two; some tokens select all, some do not.
PACKED = Case((20, 37), (20, 75), heads=(14, 2), head_dim=32, block_size=16, block_counts=2, window_size=10)
SMALL = Case((5, 20), (5, 40), heads=(6, 2), head_dim=32, block_size=16, block_counts=2, window_size=10)
CASES = [
    PACKED,
    Case((70,), heads=(5, 1), head_dim=64, block_size=16, block_counts=3, window_size=1),
    Case((3, 0, 40), (3, 9, 66), heads=(8, 1), head_dim=32, block_size=32, block_counts=1, window_size=100),
    Case((50,), heads=(16, 1), head_dim=32, block_size=16, block_counts=2, window_size=17),
    Case((1,), (81,), heads=(3, 3), head_dim=96, block_size=16, block_counts=2, window_size=5),
    # The window takes several steps that begin after the first key, and the last tile is almost empty.
    Case((31, 56), (61, 145), heads=(7, 1), head_dim=32, block_size=16, block_counts=2, window_size=70),
    Case((45,), heads=(7, 1), head_dim=32, block_size=16, block_counts=3, window_size=9),  # every block selected
]


def attend(case: Case, backend: str = "triton"):
    lengths = lengths_on_device(case)
    return lambda *inputs: attention.nsa_attention(*inputs, lengths, **case.nsa, backend=backend)


def chosen(case: Case, inputs: list[torch.Tensor]) -> torch.Tensor:
    q, k = inputs[:2]
    return compression.select_blocks(
        q,
        k,
        lengths_on_device(case),
        block_size=case.block_size,
        block_counts=case.block_counts,
        backend="triton",
    ).cpu()


def plain(case: Case, indices: torch.Tensor | None = None):
    """The oracle, with the blocks given."""
    return lambda *inputs: reference.nsa_attention_ref(
        *inputs, case.lengths, **case.nsa, softmax_scale=case.scale, block_indices=indices
    )


@pytest.mark.parametrize("case", CASES, ids=str)
def test_float32_matches_the_oracle(case):
    inputs = [*case.qkv(torch.float32), *case.gates(torch.float32)]
    # On a GPU a near tie may fall differently than in the oracle; which blocks are chosen is tested by itself.
    indices = chosen(case, on_device(inputs))
    expected = with_gradients(plain(case, indices), [x.double() for x in inputs])
    with PoisonedEmpty():
        actual = on_cpu(with_gradients(attend(case), on_device(inputs)))
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a.double(), e, rtol=0, atol=2e-5)


@pytest.mark.parametrize("case", [PACKED, CASES[2], CASES[5]], ids=str)
def test_dq_of_selection_and_window_by_one_kernel_or_two(case):
    from nsa_kernels import triton_rows, triton_tiles

    inputs = on_device([*case.qkv(torch.float32), *case.gates(torch.float32)])
    expected = with_gradients(plain(case, chosen(case, inputs)), on_cpu([x.double() for x in inputs]))
    launched, launch, is_small = [], triton_tiles.launch, triton_tiles.is_small(DEVICE)

    def record(kernel, *args, **arguments):
        launched.append(kernel)
        launch(kernel, *args, **arguments)

    for one_dq, small in ((True, is_small), (False, is_small), (True, True)):
        launched.clear()
        changes = {"tuning": triton_tiles.Tuning(one_dq=one_dq), "launch": record, "is_small": lambda _, s=small: s}
        with mock.patch.multiple(triton_tiles, **changes), PoisonedEmpty():
            actual = on_cpu(with_gradients(attend(case), inputs))
        assert (triton_rows._rows_bwd_dq_kernel in launched) != (one_dq and not small)
        for a, e in zip(actual, expected, strict=True):
            torch.testing.assert_close(a.double(), e, rtol=0, atol=2e-5)


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
@pytest.mark.parametrize("case", [PACKED, CASES[-1]], ids=str)
def test_half_precision_is_as_good_as_plain_code(case, dtype):
    inputs = [*case.qkv(dtype), *case.gates(dtype)]
    indices = chosen(case, on_device(inputs))
    truth = with_gradients(plain(case, indices), [x.double() for x in inputs])
    out = on_cpu(with_gradients(attend(case), on_device(inputs)))
    assert_close_to_truth(out, with_gradients(plain(case, indices), inputs), truth)
    assert {x.dtype for x in out} == {dtype}


def test_gates_may_be_closed_strided_and_of_another_dtype():
    case = SMALL
    gates = torch.stack(case.gates(torch.float64), -1)  # as the model makes them: (tokens, heads, 3)
    gates[torch.rand(gates.shape, generator=torch.Generator().manual_seed(3)) < 0.3] = 0.0
    inputs = [*case.qkv(torch.float32), gates]
    expected = with_gradients(
        lambda q, k, v, g: plain(case)(q, k, v, *g.unbind(-1)), [x.double() for x in inputs]
    )  # fmt: skip
    actual = with_gradients(lambda q, k, v, g: attend(case)(q, k, v, *g.unbind(-1)), on_device(inputs))
    assert actual[-1].dtype == torch.float64
    for a, e in zip(on_cpu(actual), expected, strict=True):
        torch.testing.assert_close(a.double(), e, rtol=0, atol=2e-5)


def test_strides_and_repeated_runs():
    inputs = on_device([*SMALL.qkv(torch.float32), *SMALL.gates(torch.float32)])
    expected = with_gradients(attend(SMALL), inputs)
    strided = [x.transpose(0, 1).contiguous().transpose(0, 1) for x in inputs]
    strided[0] = inputs[0].mT.contiguous().mT  # not even the last dimension is contiguous
    assert not any(x.is_contiguous() for x in strided)
    leaves = [x.requires_grad_() for x in strided]
    o = attend(SMALL)(*leaves)
    do = torch.randn(o.shape, generator=torch.Generator().manual_seed(7), dtype=torch.float64).to(o)
    do = do.permute(2, 1, 0).contiguous().permute(2, 1, 0)
    actual = [o.detach(), *torch.autograd.grad(o, leaves, do)]
    assert all(torch.equal(a, e) for a, e in zip(actual, expected, strict=True))
    with torch.no_grad():
        assert torch.equal(attend(SMALL)(*inputs), expected[0])


def test_where_every_block_is_selected_nothing_but_rounding_changes(monkeypatch):
    from nsa_kernels import triton_attention

    case = Case((48,), heads=(7, 1), head_dim=32, block_size=16, block_counts=3, window_size=9)
    inputs = on_device([*case.qkv(torch.float32), *case.gates(torch.float32)])

    def refuse(*args):
        raise AssertionError("blocks were chosen")

    with monkeypatch.context() as patch:
        patch.setattr(triton_attention.triton_compression, "compress_and_choose", refuse)
        dense = with_gradients(attend(case), inputs)
        longer = Case((48,), (49,), heads=(7, 1), head_dim=32, block_size=16, block_counts=3, window_size=9)
        with pytest.raises(AssertionError, match="blocks were chosen"):
            attend(longer)(*on_device(longer.qkv(torch.float32)), *inputs[3:])
    with monkeypatch.context() as patch:
        patch.setattr(triton_attention, "selects_all", lambda *args: False)
        sparse = with_gradients(attend(case), inputs)
    for d, s in zip(dense, sparse, strict=True):
        torch.testing.assert_close(d, s, rtol=0, atol=1e-5)


@pytest.mark.parametrize("lengths", [(), (0, 0)], ids=str)
def test_no_tokens_at_all(lengths):
    case = Case(lengths, head_dim=32, block_size=16)
    out = with_gradients(attend(case), on_device([*case.qkv(torch.float32), *case.gates(torch.float32)]))
    assert out[0].shape == (0, 4, 32)


def test_branches_by_themselves():
    case = Case((6, 40), (9, 40), heads=(7, 1), head_dim=32, block_size=16, block_counts=2, window_size=10)
    q, k, v = on_device(case.qkv(torch.float32))
    lengths = lengths_on_device(case)
    indices = compression.select_blocks(q, k, lengths, block_size=16, block_counts=2, backend="torch")
    shuffled = indices.flip(-1).long()  # in any order, -1 anywhere

    def branches(backend):
        return {
            "compression": lambda *x: compression.compression_attention(*x, lengths, block_size=16, backend=backend),
            "selection": lambda *x: selection.selection_attention(
                *x, shuffled, lengths, block_size=16, backend=backend
            ),
            "window": lambda *x: sliding_window.sliding_window_attention(
                *x, lengths, window_size=10, backend=backend
            ),
        }  # fmt: skip

    for name, branch in branches("triton").items():
        torch_branch = branches("torch")[name]
        expected = with_gradients(lambda *x, branch=torch_branch: branch(*x)[0], [q, k, v])
        actual = with_gradients(lambda *x, branch=branch: branch(*x)[0], [q, k, v])
        for a, e in zip([*actual, branch(q, k, v)[1]], [*expected, torch_branch(q, k, v)[1]], strict=True):
            torch.testing.assert_close(a, e, rtol=0, atol=2e-5, msg=lambda text, name=name: f"{name}: {text}")


def test_lengths_may_be_strided():
    """Kernels read them on the device, one after the other."""
    inputs = on_device([*SMALL.qkv(torch.float32), *SMALL.gates(torch.float32)])
    boundaries = [torch.tensor(x, dtype=torch.int32, device=DEVICE) for x in ((0, 5, 25), (0, 5, 45))]
    strided = [torch.stack([x, torch.full_like(x, 99)], -1)[:, 0] for x in boundaries]
    o = attention.nsa_attention(*inputs, *strided, **SMALL.nsa, backend="triton")
    assert torch.equal(o, attend(SMALL)(*inputs))


def test_launches_are_on_the_device_of_the_inputs(monkeypatch):
    from nsa_kernels import triton_rows, triton_tiles

    entered = []
    monkeypatch.setattr(
        triton_tiles, "current_device", lambda x: contextlib.nullcontext(entered.append(x.device))
    )  # fmt: skip
    inputs = on_device([*SMALL.qkv(torch.float32), *SMALL.gates(torch.float32)])
    attend(SMALL)(*inputs)
    assert entered == [inputs[0].device]
    triton_rows.text_rows_attention(inputs[0][:2], *inputs[1:3])
    assert entered == [inputs[0].device] * 2


def test_head_major_tensors_may_be_of_any_size():
    """Offsets of heads are 32 bits in the kernels: a tensor that needs more becomes token-major."""
    from nsa_kernels import triton_tiles

    for heads, is_copied in ((7, False), (9, True)):
        x = torch.empty_strided((10, heads, 128), (128, 2**28, 1), dtype=torch.float16, device="meta")
        assert (triton_tiles.addressable(x) is not x) is is_copied
    assert triton_tiles.addressable(x).stride() == (9 * 128, 128, 1)


def test_nan_is_not_hidden():
    """A query that is not a number has an lse and gradients that are not, in every branch."""
    case = Case((40,), heads=(2, 1), head_dim=32, block_size=8, block_counts=2, window_size=5)
    q, k, v = on_device(case.qkv(torch.float32))
    q[30] = torch.nan
    lengths = lengths_on_device(case)
    indices = compression.select_blocks(*on_device(case.qkv(torch.float32)[:2]), lengths, block_size=8, backend="torch")
    for o, lse in (
        compression.compression_attention(q, k, v, lengths, block_size=8, backend="triton"),
        selection.selection_attention(q, k, v, indices, lengths, block_size=8, backend="triton"),
        sliding_window.sliding_window_attention(q, k, v, lengths, window_size=5, backend="triton"),
    ):
        assert o[30].isnan().all() and lse[30].isnan().all()
        assert o[:30].isfinite().all() and o[31:].isfinite().all()


def test_blocks_beyond_32_bits_are_after_every_token():
    case = Case((20,), heads=(2, 1), head_dim=32, block_size=8, block_counts=2)
    inputs, lengths = on_device(case.qkv(torch.float32)), lengths_on_device(case)
    indices = torch.tensor([0, 2**32], device=DEVICE).expand(20, 1, 2)
    o, _ = selection.selection_attention(*inputs, indices, lengths, block_size=8, backend="triton")
    expected, _ = selection.selection_attention(*inputs, indices[..., :1], lengths, block_size=8, backend="triton")
    assert torch.equal(o, expected)


def test_autocast_narrows_nothing():
    case = Case((20,), heads=(2, 1), head_dim=32, block_size=16, block_counts=1, window_size=4)
    inputs = on_device([*case.qkv(torch.float32), *case.gates(torch.float32)])
    expected = with_gradients(attend(case), inputs)
    with torch.autocast(DEVICE.type, dtype=torch.bfloat16):
        inside = with_gradients(attend(case), inputs)
    assert all(torch.equal(a, b) for a, b in zip(inside, expected, strict=True))


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"dtype": torch.float64}, "q must be float16, bfloat16 or float32 for backend='triton', got torch.float64"),
        ({"head_dim": 160}, "head_dim must be at most 128 for backend='triton', got 160"),
        ({"lengths": "meta"}, "cu_seqlens_q must be on .*, like q, for backend='triton', got meta"),
        ({"sequences": 20000}, "sequences x num_heads must be at most 65535 for backend='triton', got 80004"),
    ],
    ids=["dtype", "head_dim", "lengths", "sequences"],
)
def test_what_the_kernels_do_not_support(changes, match):
    case = Case((9,), head_dim=changes.get("head_dim", 32), block_size=16)
    dtype = changes.get("dtype", torch.float32)
    empty = [0] * changes.get("sequences", 0)
    lengths = utils.SequenceLengths.from_lengths([9, *empty], device=changes.get("lengths", DEVICE))
    with pytest.raises(ValueError, match=match):
        attention.nsa_attention(
            *on_device([*case.qkv(dtype), *case.gates(dtype)]), lengths, **case.nsa, backend="triton"
        )


def test_gpus_that_the_kernels_do_not_run_on(monkeypatch):
    from nsa_kernels import triton_tiles

    q = SimpleNamespace(
        dtype=torch.float16, shape=(3, 2, 32), is_cuda=True, device=torch.device("cuda")
    )  # fmt: skip
    properties = SimpleNamespace(major=8, minor=0, name="a GPU")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    triton_tiles.check_supported(q)
    properties.major, properties.minor = 7, 5
    with pytest.raises(
        ValueError, match=r"needs compute capability 8.0 or later, got 7.5 \(a GPU\): use backend='torch'"
    ):
        triton_tiles.check_supported(q)
    monkeypatch.setattr(torch.version, "hip", "6.2")
    with pytest.raises(ValueError, match="is for NVIDIA GPUs, got a build of torch for ROCm"):
        triton_tiles.check_supported(q)


def test_helpers_of_the_host_agree_with_tritons():
    import triton

    from nsa_kernels import triton_tiles

    for n in (1, 2, 3, 16, 17, 2**20, 2**20 + 1):
        assert triton_tiles.next_power_of_2(n) == triton.next_power_of_2(n)
        assert all(triton_tiles.cdiv(n, m) == triton.cdiv(n, m) for m in (1, 3, 64))
    assert triton_tiles.next_power_of_2(0) == 1 and triton_tiles.cdiv(0, 64) == 0


def test_launches_fuse_multiplications_and_skip_empty_grids():
    from nsa_kernels import triton_tiles

    kernel = mock.MagicMock()
    triton_tiles.launch(kernel, [2, 3], x=1)
    kernel.__getitem__.assert_called_once_with((2, 3))
    kernel.__getitem__.return_value.assert_called_once_with(x=1, enable_fp_fusion=True)
    triton_tiles.launch(kernel, [2, 0], x=1)
    kernel.__getitem__.assert_called_once()


def test_the_lists_of_blocks_are_kept_for_backward(monkeypatch):
    """Backward of eager code does not merge them again; that of an operator gets the indices alone."""
    from nsa_kernels import triton_selection

    listed, list_blocks = [], triton_selection.list_blocks
    monkeypatch.setattr(
        triton_selection, "list_blocks", lambda *args, **kwargs: listed.append(kwargs) or list_blocks(*args, **kwargs)
    )
    with_gradients(attend(SMALL), on_device([*SMALL.qkv(torch.float32), *SMALL.gates(torch.float32)]))
    assert listed == [{"is_sorted": True}]


def test_triton_needs_a_cuda_device(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    case = Case((3,))
    with pytest.raises(ValueError, match="backend='triton' needs q on a CUDA device, got cpu: use 'torch'"):
        attention.nsa_attention(*case.qkv(), *case.gates(), case.lengths, backend="triton")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert utils.resolve_backend("triton", "cpu") == "triton"
    with pytest.raises(ValueError, match="needs q on a CUDA device, got meta"):
        utils.resolve_backend("triton", "meta")


def test_triton_that_is_not_installed(monkeypatch):
    monkeypatch.setattr(utils, "_has_triton", lambda: False)
    with pytest.raises(ImportError, match=r"backend='triton' needs triton 3.6 or later: pip install 'triton>=3.6'"):
        utils.resolve_backend("triton", "cuda")


def test_auto_is_torch_and_says_so_once_for_each_kind_of_device(caplog):
    utils._choose.cache_clear()
    with caplog.at_level(logging.WARNING, logger="nsa_kernels.utils"):
        assert {utils.resolve_backend("auto", device) for device in ("cuda", "cuda:1", "cpu", "cpu")} == {"torch"}
    utils._choose.cache_clear()
    on_cuda, on_cpu = (record.getMessage() for record in caplog.records)
    assert on_cuda.startswith("backend='auto' chose 'torch' on cuda; 'triton' is there and faster, but")
    assert on_cpu == "backend='auto' chose 'torch' on cpu"
