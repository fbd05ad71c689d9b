"""Inputs for the attention tests, and a statement of the attention that shares nothing with the code under test.

`spec_*` work on one sequence with full (queries, keys) masks in the dtype of the inputs; block choice counts, for every
block, the blocks that rank before it. The oracles in nsa_kernels/reference.py go token by token instead.
"""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from unittest import mock

import pytest
import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from nsa_kernels import utils

try:
    import hypothesis
    from hypothesis import strategies as st
except ImportError:  # on a machine that is borrowed for its GPU
    hypothesis = None

TOLERANCE = {torch.float64: 1e-9, torch.float32: 2e-5}


@dataclass(frozen=True)
class Case:
    """Shapes and NSA settings of one call."""

    lengths_q: tuple[int, ...]
    lengths_k: tuple[int, ...] | None = None
    heads: tuple[int, int] = (4, 2)
    head_dim: int = 8
    block_size: int = 8
    block_counts: int = 3
    window_size: int = 10

    @property
    def lengths(self) -> utils.SequenceLengths:
        return utils.SequenceLengths.from_lengths(self.lengths_q, self.lengths_k)

    @property
    def group_size(self) -> int:
        return self.heads[0] // self.heads[1]

    @property
    def scale(self) -> float:
        return self.head_dim**-0.5

    @property
    def nsa(self) -> dict[str, int]:
        return {"block_size": self.block_size, "block_counts": self.block_counts, "window_size": self.window_size}

    def qkv(self, dtype: torch.dtype = torch.float64, seed: int = 0) -> list[Tensor]:
        generator = torch.Generator().manual_seed(seed)
        total_q, total_k = self.lengths.offsets_q[-1], self.lengths.offsets_k[-1]
        shapes = [(total_q, self.heads[0]), (total_k, self.heads[1]), (total_k, self.heads[1])]
        return [
            torch.randn(*shape, self.head_dim, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes
        ]

    def gates(self, dtype: torch.dtype = torch.float64, seed: int = 1) -> list[Tensor]:
        generator = torch.Generator().manual_seed(seed)
        shape = self.lengths.offsets_q[-1], self.heads[0]
        return [torch.rand(*shape, generator=generator, dtype=torch.float64).to(dtype) for _ in range(3)]


CASES = [
    Case((50,)),
    Case((64,), heads=(5, 1), block_counts=1, window_size=1),
    Case((1, 0, 33, 70), (1, 0, 40, 70), heads=(7, 1), window_size=5),
    Case((65, 20), (65, 83), heads=(14, 2), head_dim=16, block_size=16, block_counts=4, window_size=40),
    Case((1,), (77,), heads=(8, 1), block_size=4),
    Case((5,), heads=(16, 1), head_dim=4),
    Case((90,), heads=(2, 2), head_dim=5, block_size=4, block_counts=5, window_size=300),
]


if hypothesis:
    # The same examples on every run, none of them timed.
    stable = hypothesis.settings(derandomize=True, deadline=None, database=None, max_examples=60)

    @st.composite
    def cases(draw: st.DrawFn) -> Case:
        """Up to three packed sequences, empty ones included, q at most as long as k, group sizes 1, 5, 7, 8 and 16."""
        lengths_k = draw(st.lists(st.integers(0, 60), min_size=1, max_size=3))
        lengths_q = [draw(st.integers(0, n)) for n in lengths_k] if draw(st.booleans()) else lengths_k
        return Case(
            tuple(lengths_q),
            tuple(lengths_k),
            heads=draw(st.sampled_from([(1, 1), (2, 2), (5, 1), (10, 2), (7, 1), (8, 1), (16, 1)])),
            head_dim=draw(st.sampled_from([1, 3, 8])),
            block_size=draw(st.sampled_from([1, 4, 8])),
            block_counts=draw(st.integers(1, 6)),
            window_size=draw(st.integers(1, 20)),
        )


def on_drawn_cases(max_examples: int, where: Callable[[Case], bool] = lambda case: True) -> Callable:
    """Decorator of a test that takes a `case`; the test is skipped where hypothesis is not installed."""
    if hypothesis is None:
        return lambda test: pytest.mark.skip(reason="hypothesis is not installed")(lambda: None)
    given = hypothesis.given(case=cases().filter(where))
    return lambda test: hypothesis.settings(stable, max_examples=max_examples)(given(test))


def spec_masked_attention(logits: Tensor, mask: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """logits (H, Tq, S), mask broadcastable to it, v (S, H, D) -> o (Tq, H, D), lse (Tq, H); 0, -inf without keys."""
    mask = mask.expand_as(logits)
    seen = mask.any(-1, keepdim=True)
    probs = torch.where(seen, logits.masked_fill(~mask & seen, -torch.inf).softmax(-1), 0.0)
    lse = logits.masked_fill(~mask, -torch.inf).logsumexp(-1)
    return torch.einsum("hts,shd->thd", probs, v), lse.detach().T


class Spec:
    """One sequence's attention written with masks; q (Tq, H, D), k and v (Tk, G, D)."""

    def __init__(self, case: Case, q: Tensor, k: Tensor, v: Tensor):
        self.case, self.q = case, q
        self.t = torch.arange(len(k) - len(q), len(k))[:, None]
        self.s = torch.arange(len(k))
        self.k, self.v = (x.repeat_interleave(case.group_size, 1) for x in (k, v))
        self.logits = self._logits(self.k)
        complete = len(k) // case.block_size
        pool = torch.zeros(complete, len(k), dtype=k.dtype)
        for j in range(complete):
            pool[j, j * case.block_size : (j + 1) * case.block_size] = 1 / case.block_size
        self.k_cmp, self.v_cmp = (torch.einsum("js,shd->jhd", pool, x) for x in (self.k, self.v))
        self.sees_block = (torch.arange(complete) + 1) * case.block_size <= self.t + 1

    def _logits(self, keys: Tensor) -> Tensor:
        return torch.einsum("thd,shd->hts", self.q, keys) * self.case.scale

    def compression(self) -> tuple[Tensor, Tensor]:
        return spec_masked_attention(self._logits(self.k_cmp), self.sees_block, self.v_cmp)

    def importance(self) -> Tensor:
        """(Tq, G, blocks): summed probabilities of the blocks before a token's own, inf for its own, -1 after it."""
        case, blocks = self.case, -(-len(self.s) // self.case.block_size)
        logits = self._logits(self.k_cmp).detach().masked_fill(~self.sees_block, -torch.inf)
        probs = logits.softmax(-1).nan_to_num(0.0).unflatten(0, (case.heads[1], case.group_size)).sum(1)
        own, block = self.t // case.block_size, torch.arange(blocks)
        padded = torch.nn.functional.pad(probs, (0, blocks - probs.shape[-1]))
        return padded.masked_fill(block == own, torch.inf).masked_fill(block > own, -1.0).transpose(0, 1)

    def chosen(self) -> Tensor:
        """(Tq, G, blocks) bool: fewer than block_counts blocks rank before it, by importance, then by index."""
        importance = self.importance()
        mine, other = importance[..., :, None], importance[..., None, :]
        index = torch.arange(importance.shape[-1])
        before = (other > mine) | ((other == mine) & (index < index[:, None]))
        return (before.sum(-1) < self.case.block_counts) & (importance >= 0)

    def selection(self, chosen: Tensor | None = None) -> tuple[Tensor, Tensor]:
        chosen = self.chosen() if chosen is None else chosen
        mask = chosen[..., self.s // self.case.block_size].transpose(0, 1) & (self.s <= self.t)
        return spec_masked_attention(self.logits, mask.repeat_interleave(self.case.group_size, 0), self.v)

    def window(self) -> tuple[Tensor, Tensor]:
        mask = (self.s <= self.t) & (self.s > self.t - self.case.window_size)
        return spec_masked_attention(self.logits, mask, self.v)


def spec_packed(case: Case, q: Tensor, k: Tensor, v: Tensor, branch: Callable) -> tuple[Tensor, ...]:
    """branch(Spec, Span) -> tuple of (Tq, ...) tensors, concatenated over the sequences."""
    spans = list(case.lengths.spans())
    parts = [branch(Spec(case, q[a:b], k[c:d], v[c:d]), span) for span in spans for a, b, c, d in [span]]
    return tuple(torch.cat(tensors) for tensors in zip(*parts, strict=True))


def with_gradients(function: Callable[..., Tensor], inputs: list[Tensor]) -> list[Tensor]:
    """[output, gradients of the inputs] for a fixed random gradient of the output."""
    inputs = [x.detach().clone().requires_grad_() for x in inputs]
    output = function(*inputs)
    do = torch.randn(output.shape, generator=torch.Generator().manual_seed(7), dtype=torch.float64).to(output)
    gradients = torch.autograd.grad(output, inputs, do, allow_unused=True, materialize_grads=True)
    return [output.detach(), *gradients]


def assert_all_close(actual: list[Tensor], expected: list[Tensor], dtype: torch.dtype) -> None:
    for i, (a, e) in enumerate(zip(actual, expected, strict=True)):
        try:
            torch.testing.assert_close(a, e, rtol=0, atol=TOLERANCE[dtype])
        except AssertionError as error:
            found = describe_error(a, e, TOLERANCE[dtype])[1] if a.shape == e.shape else ""
            raise AssertionError(f"result {i}: {found}\n{error}") from None


# What `with_gradients` returns for q, k, v and the gates.
NAMES = ("o", "dq", "dk", "dv", "dg_cmp", "dg_slc", "dg_swa")


def assert_close_to_truth(out: list[Tensor], same_dtype: list[Tensor], truth: list[Tensor]) -> None:
    """The largest error is at most twice (outputs) or three times (gradients) that of plain code in the same dtype."""
    all_right, report = True, []
    for i, (o, s, t) in enumerate(zip(out, same_dtype, truth, strict=True)):
        plain, factor = (s.to(t.dtype) - t).abs().max().item() if t.numel() else 0.0, 3 if i else 2
        is_right, text = describe_error(o, t, factor * plain)
        all_right &= is_right
        report.append(f"{NAMES[i] if len(out) > 1 else 'it'}: {text}; plain code: {plain:.2e}")
    assert all_right, "\n".join(report)


def describe_error(out: Tensor, truth: Tensor, allowed: float) -> tuple[bool, str]:
    """Whether every error is allowed, and where the largest one is, how large, and how many elements are off."""
    if not truth.numel():
        return True, "right: empty"
    error = (out.to(truth.dtype) - truth).abs()
    bad = ~(error <= allowed)  # nan is
    worst = error.nan_to_num(torch.inf, posinf=torch.inf).argmax().item()
    index = tuple(int(i) for i in torch.unravel_index(torch.tensor(worst), truth.shape))
    text = (
        f"largest error {error.flatten()[worst]:.2e} at {index} of {tuple(out.shape)} {out.dtype}, "
        f"{out.flatten()[worst]:.6g} for {truth.flatten()[worst]:.6g}"
    )
    if not bad.any():
        return True, f"right: {text}"
    rows = bad.flatten(1).any(1) if bad.dim() > 1 else bad
    rows = rows.nonzero().flatten().tolist()
    return False, (
        f"WRONG: {text}; {int(bad.sum())} elements are off by more than {allowed:.2e}, {int((~out.isfinite()).sum())} "
        f"are not finite, in {len(rows)} rows of {len(truth)} ({rows[0]} .. {rows[-1]}); relative error "
        f"{(error.norm() / truth.norm().clamp_min(1e-30)).item():.1e}"
    )


@contextlib.contextmanager
def small_tiles() -> Iterator[None]:
    """Chunks and tiles so small that short sequences are cut everywhere a long one would be."""
    with mock.patch.object(utils, "CHUNK_TOKENS", 11), mock.patch.dict(utils._TILE_ELEMENTS, cpu=100):
        yield


@contextlib.contextmanager
def as_on_a_gpu() -> Iterator[None]:
    """Shapes as where the host must not read from the device: upper bounds instead of counts."""
    with mock.patch.object(utils, "reading_is_free", lambda device: False):
        yield


class PoisonedEmpty(TorchDispatchMode):
    """Fills memory from torch.empty and its kin with NaN, or the lowest integer, so that a missed element shows."""

    _OPS = ("aten::empty", "aten::empty_like", "aten::new_empty", "aten::empty_strided")

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func.name().split(".")[0] in self._OPS:
            out.fill_(torch.nan if out.is_floating_point() else torch.iinfo(out.dtype).min)
        return out


class PeakMemory(TorchDispatchMode):
    """Elements of all tensors made inside, at their peak (`live`), and of the largest one (`largest`)."""

    def __init__(self) -> None:
        super().__init__()
        self.live = self.largest = 0
        self._storages: dict[int, tuple[StorageWeakRef, int]] = {}
        self._foreign: set[int] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        before = {a.untyped_storage()._cdata for a in _tensors((args, kwargs)) if a.untyped_storage().nbytes()}
        self._foreign |= before - self._storages.keys()
        out = func(*args, **(kwargs or {}))
        self._storages = {key: entry for key, entry in self._storages.items() if not entry[0].expired()}
        for tensor in _tensors(out):
            storage = tensor.untyped_storage()
            if storage._cdata not in self._foreign:
                numel = storage.nbytes() // tensor.element_size()
                self._storages[storage._cdata] = StorageWeakRef(storage), numel
                self.largest = max(self.largest, numel)
        self.live = max(self.live, sum(numel for _, numel in self._storages.values()))
        return out


class CountSynchronisations(TorchDispatchMode):
    """Counts the operations that would make the host wait for a GPU."""

    NAMES = ("_local_scalar_dense", "nonzero", "is_nonzero", "equal", "masked_select")

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func.overloadpacket.__name__ in self.NAMES
        return func(*args, **(kwargs or {}))


def _tensors(tree: object) -> list[Tensor]:
    return [leaf for leaf in torch.utils._pytree.tree_leaves(tree) if isinstance(leaf, Tensor)]
