"""What only a GPU can show about the Triton kernels: bf16, real sizes, races, memory errors.

    python -m pytest --noconftest tests/test_gpu.py                     # on a CUDA machine, transformers not needed
    NSA_DRY_RUN=1 python -m pytest --noconftest tests/test_gpu.py       # tiny sizes, in the interpreter

bf16 results are held against float64 truth: their largest error may be twice (gradients: three times) that of plain
torch code in bf16. The dry run exists to test the tests, in fp16.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from nsa_cases import Case, PoisonedEmpty, Spec, assert_close_to_truth, spec_packed, with_gradients
from triton_testing import DEVICE, needs_triton

from nsa_kernels import attention, compression, selection, sliding_window, utils

DRY_RUN = os.environ.get("NSA_DRY_RUN") == "1"
HAS_GPU = torch.cuda.is_available()
pytestmark = [
    needs_triton,
    pytest.mark.gpu,
    pytest.mark.skipif(not HAS_GPU and not DRY_RUN, reason="needs a CUDA device"),
]

HALF = [torch.bfloat16, torch.float16] if HAS_GPU else [torch.float16]
ROOT = Path(__file__).resolve().parents[1]

if DRY_RUN:
    CASES = [Case((40, 3), heads=(7, 1), head_dim=32, block_size=16, block_counts=2, window_size=20)]
    LONG, LONG_SEQUENCES, LONG_HEADS, LONG_DIM = 80, 2, (7, 1), 32
    PRODUCTION = 100
    SETTINGS = {"block_size": 16, "block_counts": 2, "window_size": 20}
    SAMPLED_ROWS = 3
else:
    CASES = [
        Case((190, 345), heads=(28, 4), head_dim=128, block_size=16, block_counts=6, window_size=50),
        Case((333,), heads=(16, 2), head_dim=128, block_size=32, block_counts=4, window_size=64),
        Case((65, 200), (65, 321), heads=(10, 2), head_dim=64, block_size=64, block_counts=2, window_size=256),
        Case((257,), heads=(16, 1), head_dim=96, block_size=16, block_counts=3, window_size=1),
    ]
    # Five of these have more than 2**31 elements of q.
    LONG, LONG_SEQUENCES, LONG_HEADS, LONG_DIM = 131072, 5, (28, 4), 128
    SETTINGS = {"block_size": 64, "block_counts": 32, "window_size": 256}
    PRODUCTION = 8192
    SAMPLED_ROWS = 24


def branches(case: Case, indices: torch.Tensor) -> dict:
    """Name -> (kernel's function of q, k, v; the specification's branch of one sequence)."""
    lengths = utils.SequenceLengths.from_lengths(case.lengths_q, case.lengths_k, device=DEVICE)
    chosen = indices.to(DEVICE)

    def selected(spec: Spec, span: utils.Span):
        rows = indices[span.q_start : span.q_end].long()
        mask = torch.zeros(*rows.shape[:2], -(-span.num_keys // case.block_size) + 1, dtype=torch.bool)
        return spec.selection(mask.scatter_(-1, rows + 1, True)[..., 1:])

    size = {"block_size": case.block_size, "backend": "triton"}
    window = {"window_size": case.window_size, "backend": "triton"}
    return {
        "compression": (
            lambda q, k, v: compression.compression_attention(q, k, v, lengths, **size)[0],
            lambda spec, span: spec.compression(),
        ),
        "selection": (
            lambda q, k, v: selection.selection_attention(q, k, v, chosen, lengths, **size)[0],
            selected,
        ),
        "window": (
            lambda q, k, v: sliding_window.sliding_window_attention(q, k, v, lengths, **window)[0],
            lambda spec, span: spec.window(),
        ),
    }


def chosen_blocks(case: Case, qkv: list[torch.Tensor]) -> torch.Tensor:
    """(total_q, G, block_counts) by the specification, ascending, -1 at the end."""

    def one(spec, span):
        chosen = spec.chosen()
        counts = min(case.block_counts, chosen.shape[-1])
        order = chosen.int().sort(dim=-1, descending=True, stable=True)
        indices = torch.where(order.values.bool(), order.indices, -1)[..., :counts]
        return (torch.nn.functional.pad(indices, (0, case.block_counts - counts), value=-1).int(),)

    return spec_packed(case, *(x.double() for x in qkv), one)[0]


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("branch", ["compression", "selection", "window"])
@pytest.mark.parametrize("case", CASES, ids=lambda case: f"heads{case.heads}-dim{case.head_dim}-block{case.block_size}")
def test_branch_close_to_truth(case, branch, dtype):
    qkv = case.qkv(dtype)
    ours, spec = branches(case, chosen_blocks(case, qkv))[branch]
    out = [x.cpu() for x in with_gradients(ours, [x.to(DEVICE) for x in qkv])]
    plain = with_gradients(lambda *x: spec_packed(case, *x, spec)[0], qkv)
    truth = with_gradients(lambda *x: spec_packed(case, *x, spec)[0], [x.double() for x in qkv])
    assert_close_to_truth(out, plain, truth)


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("rows", [1, 7, 200] if HAS_GPU else [7])
def test_text_rows_close_to_truth(rows, dtype):
    from nsa_kernels import triton_rows

    keys = 3000 if HAS_GPU else 100
    case = Case((rows,), (keys,), heads=(7, 1), head_dim=128 if HAS_GPU else 32, window_size=keys)
    qkv = case.qkv(dtype)
    dense = lambda *x: spec_packed(case, *x, lambda spec, span: spec.window())[0]  # noqa: E731
    out = with_gradients(triton_rows.text_rows_attention, [x.to(DEVICE) for x in qkv])
    truth = with_gradients(dense, [x.double() for x in qkv])
    assert_close_to_truth([x.cpu() for x in out], with_gradients(dense, qkv), truth)


def inputs_on_device(tokens, dtype=HALF[0]):
    generator = torch.Generator(device=DEVICE).manual_seed(0)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, device=DEVICE, dtype=dtype)

    qkv = [normal(tokens, heads, LONG_DIM) for heads in (LONG_HEADS[0], LONG_HEADS[1], LONG_HEADS[1])]
    return [*qkv, *normal(tokens, LONG_HEADS[0], 3).sigmoid().unbind(-1)]


def run_once(inputs, lengths):
    leaves = [x.detach().requires_grad_() for x in inputs]
    o = attention.nsa_attention(*leaves, lengths, **SETTINGS, backend="triton")
    do = torch.randn(o.shape, generator=torch.Generator(device=DEVICE).manual_seed(1), device=DEVICE, dtype=o.dtype)
    return [o.detach(), *torch.autograd.grad(o, leaves, do)]


def test_production_shape():
    """All of the attention and its gradients at the model's shapes, against the torch backend on float32 copies.

    The blocks are those that the kernels choose, in both: near ties fall differently in another arithmetic. Results go
    through at most eight roundings to half precision one after the other (pooled keys, probabilities, a branch, the
    sum; and again in backward), each of half its epsilon at most, relative to the norm.
    """
    inputs = inputs_on_device(PRODUCTION)
    lengths = utils.SequenceLengths.from_lengths([PRODUCTION], device=DEVICE)
    size, counts, width = SETTINGS.values()
    choose = {"block_size": size, "block_counts": counts}
    indices = compression.select_blocks(*inputs[:2], lengths, **choose, backend="triton")
    position = torch.arange(PRODUCTION, device=DEVICE)
    found = (indices >= 0).sum(-1)
    assert torch.equal(found, (position // size + 1).clamp(max=counts)[:, None].expand_as(found))

    def torch_backend(q, k, v, g_cmp, g_slc, g_swa):
        o_cmp, _ = compression.compression_attention(q, k, v, lengths, block_size=size, backend="torch")
        o_slc, _ = selection.selection_attention(q, k, v, indices, lengths, block_size=size, backend="torch")
        o_swa, _ = sliding_window.sliding_window_attention(q, k, v, lengths, window_size=width, backend="torch")
        return g_cmp[..., None] * o_cmp + g_slc[..., None] * o_slc + g_swa[..., None] * o_swa

    actual = run_once(inputs, lengths)
    leaves = [x.float().requires_grad_() for x in inputs]
    o = torch_backend(*leaves)
    do = torch.randn(o.shape, generator=torch.Generator(device=DEVICE).manual_seed(1), device=DEVICE, dtype=HALF[0])
    expected = [o.detach(), *torch.autograd.grad(o, leaves, do.float())]
    for name, a, e in zip(("o", "dq", "dk", "dv", "dg_cmp", "dg_slc", "dg_swa"), actual, expected, strict=True):
        error = ((a.float() - e).norm() / e.norm()).item()
        assert error < 8 * torch.finfo(HALF[0]).eps / 2, f"{name}: relative error {error:.1e}"


@pytest.mark.parametrize("tokens", [LONG // 8 + 37, LONG // 64])
def test_repeated_runs_agree_to_the_bit_and_write_everything(tokens):
    inputs = inputs_on_device(tokens)
    lengths = utils.SequenceLengths.from_lengths([tokens // 3, tokens - tokens // 3], device=DEVICE)
    first = run_once(inputs, lengths)
    for _ in range(3 if HAS_GPU else 1):
        for a, b in zip(first, run_once(inputs, lengths), strict=True):
            assert torch.equal(a, b)
    with PoisonedEmpty():  # outputs and scratch start as NaN, or as the lowest integer
        poisoned = run_once(inputs, lengths)
    for a, b in zip(first, poisoned, strict=True):
        assert a.isfinite().all() and torch.equal(a, b)


def test_no_overflow_in_long_sequences():
    """The last sequence of a batch with more than 2**31 elements, against the oracle at some of its rows.

    Only those rows have an output gradient, so that the oracle, row by row, gives all of dk and dv.
    """
    from nsa_kernels import triton_compression, triton_rows, triton_selection, triton_tiles

    size, counts, width = SETTINGS.values()
    total, start, scale = LONG * LONG_SEQUENCES, LONG * (LONG_SEQUENCES - 1), LONG_DIM**-0.5
    if not DRY_RUN:
        assert total * LONG_HEADS[0] * LONG_DIM > 2**31
        if torch.cuda.get_device_properties(DEVICE).total_memory < 70 * 2**30:
            pytest.skip("needs 70 GiB of GPU memory")
    q, k, v, *_ = inputs_on_device(total)
    lengths = utils.SequenceLengths.from_lengths([LONG] * LONG_SEQUENCES, device=DEVICE)
    last = slice(start, total)
    rows = torch.linspace(size, LONG - 1, SAMPLED_ROWS).long().tolist()
    do = torch.zeros_like(q)
    do[[start + row for row in rows]] = torch.randn(len(rows), *q.shape[1:], device=DEVICE, dtype=q.dtype)

    o_cmp, lse_cmp, indices = triton_compression.compress_and_choose(q, k, v, lengths, size, counts, scale)
    results, lse_delta = {}, {}

    def backward(name, o, lse, function, *middle):
        # Not the whole of it at once: in float32, o and do would be the largest tensors here.
        delta = torch.cat([(a.float() * b.float()).sum(-1) for a, b in zip(o.split(LONG), do.split(LONG), strict=True)])
        lse_delta[name] = triton_tiles.lse_and_delta(lse, delta)
        dq, dk, dv = function(q, k, v, *middle, lse_delta[name], do, lengths)
        assert all(not x[:start].any() for x in (dk, dv)), f"{name}: gradients of other sequences"
        results[name] = [x[last].clone() for x in (o, dq, dk, dv)]

    compression_bwd = lambda *x: triton_compression.compression_bwd(*x, size, scale)  # noqa: E731
    selection_bwd = lambda *x: triton_selection.selection_bwd(*x, size, scale)  # noqa: E731
    window_bwd = lambda *x: triton_rows.window_bwd(*x, width, scale)  # noqa: E731
    backward("compression", o_cmp, lse_cmp, compression_bwd)
    lists = triton_selection.list_blocks(indices, q, lengths, size, is_sorted=True)
    backward("selection", *triton_selection.selection_fwd(q, k, v, lists, lengths, size, scale), selection_bwd, lists)
    backward("window", *triton_rows.window_fwd(q, k, v, lengths, width, scale), window_bwd)
    # By one kernel, dq of both; float32 sums may have another order, and there are three roundings.
    window = width, lse_delta["window"]
    of_both = triton_selection.selection_bwd(
        q, k, v, lists, lse_delta["selection"], do, lengths, size, scale, window
    )[0][last][rows].float()  # fmt: skip
    parts = torch.stack([results[name][1][rows].float() for name in ("selection", "window")])
    rounding = torch.finfo(q.dtype).eps / 2 * (of_both.abs() + parts.abs().sum(0))
    assert ((of_both - parts.sum(0)).abs() <= 1.01 * rounding + 1e-5 * parts.abs().amax()).all()

    truth = {
        "compression": lambda q, k, v, row, one: compression.compression_attention(
            q, k, v, one, block_size=size, backend="reference"
        )[0],
        "selection": lambda q, k, v, row, one: selection.selection_attention(
            q, k, v, indices[start + row, None], one, block_size=size, backend="reference"
        )[0],
        "window": lambda q, k, v, row, one: sliding_window.sliding_window_attention(
            q, k, v, one, window_size=width, backend="reference"
        )[0],
    }
    queries = [start + row for row in rows]
    for name, oracle in truth.items():
        k_leaf, v_leaf = (x[last].float().requires_grad_() for x in (k, v))
        q_leaf = q[queries].float().requires_grad_()
        outputs = [
            oracle(
                q_leaf[i : i + 1], k_leaf[: row + 1], v_leaf[: row + 1], row,
                utils.SequenceLengths.from_lengths([1], [row + 1], device=DEVICE),
            )
            for i, row in enumerate(rows)
        ]  # fmt: skip
        o = torch.cat(outputs)
        expected = [o, *torch.autograd.grad(o, (q_leaf, k_leaf, v_leaf), do[queries].float())]
        o, dq, dk, dv = results[name]
        for what, a, e in zip(("o", "dq", "dk", "dv"), (o[rows], dq[rows], dk, dv), expected, strict=True):
            error = ((a.float() - e).norm() / e.norm()).item()
            # bf16 rounds to 4e-3; an index that wrapped around is wrong by about 1.
            assert error < 2e-2, f"{name}, {what}: relative error {error:.1e}"


@pytest.mark.parametrize("tool", ["memcheck", "racecheck"])
def test_compute_sanitizer_finds_nothing(tool):
    command = [sys.executable, str(ROOT / "tests" / "small_calls.py")]
    sanitizer = shutil.which("compute-sanitizer") or shutil.which("/usr/local/cuda/bin/compute-sanitizer")
    if HAS_GPU:
        if sanitizer is None:
            pytest.skip("compute-sanitizer is not installed")
        command = [sanitizer, "--tool", tool, "--error-exitcode", "9", *command]
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}  # each tensor is an allocation of its own
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=130)
    if "Device not supported" in done.stdout:
        pytest.skip("compute-sanitizer does not support this machine")
    assert done.returncode == 0 and "small calls: done" in done.stdout, done.stdout[-3000:] + done.stderr[-2000:]
