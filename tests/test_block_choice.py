"""Block choice: own block first, then the most important ones, ties to the lower index, ascending output."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from nsa_cases import CASES, Case, PoisonedEmpty, cases, small_tiles, spec_packed, stable

from nsa_kernels import compression


def select(case: Case, backend: str, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    q, k, _ = case.qkv(dtype)
    return compression.select_blocks(
        q, k, case.lengths, block_size=case.block_size, block_counts=case.block_counts, backend=backend
    )


def as_masks(indices: torch.Tensor, num_blocks: int) -> torch.Tensor:
    """(..., block_counts) indices with -1 padding -> (..., num_blocks) bool."""
    mask = torch.zeros(*indices.shape[:-1], num_blocks + 1, dtype=torch.bool)
    return mask.scatter_(-1, indices.long().masked_fill(indices < 0, num_blocks), True)[..., :num_blocks]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_torch_matches_the_oracle(case):
    expected = select(case, "reference")
    assert torch.equal(select(case, "torch"), expected)
    with small_tiles(), PoisonedEmpty():
        assert torch.equal(select(case, "torch"), expected)


@stable
@given(cases())
def test_oracle_and_torch_match_the_specification(case):
    if not case.lengths.offsets_q[-1]:
        return
    q, k, v = case.qkv()
    num_blocks = -(-max(case.lengths_k) // case.block_size)

    def chosen(spec, _):
        mask = spec.chosen()
        return (torch.nn.functional.pad(mask, (0, num_blocks - mask.shape[-1])),)

    (expected,) = spec_packed(case, q, k, v, chosen)
    for backend in ("reference", "torch"):
        indices = select(case, backend)
        assert torch.equal(as_masks(indices, num_blocks), expected)
        if case.block_counts > 1:
            here, following = indices[..., :-1], indices[..., 1:]
            assert ((following > here) | (following == -1)).all(), "not ascending with -1 at the end"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_low_precision_differs_from_float64_only_at_near_ties(dtype):
    case = Case((300,), heads=(7, 1), head_dim=16, block_size=4, block_counts=9)
    q, k, v = (x.double() for x in case.qkv(dtype))
    indices = select(case, "torch", dtype)
    (importance,) = spec_packed(case, q, k, v, lambda spec, _: (spec.importance(),))
    chosen = as_masks(indices, 75)
    assert torch.equal(chosen.sum(-1)[:, 0], (torch.arange(300) // 4 + 1).clamp(max=9))
    worst_chosen = importance.masked_fill(~chosen, torch.inf).amin(-1)
    best_left = importance.masked_fill(chosen, -1.0).amax(-1)
    assert (worst_chosen - best_left).min() > -1e-5
    assert indices.dtype == torch.int32


@pytest.mark.parametrize("backend", ["reference", "torch"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_identical_keys_choose_the_first_blocks(dtype, backend):
    q = torch.randint(-3, 4, (40, 4, 8), generator=torch.Generator().manual_seed(0)).to(dtype)
    k = torch.ones(40, 2, 8, dtype=dtype)  # small integers: every score is exact, hence equal
    cu_seqlens = torch.tensor([0, 40], dtype=torch.int32)
    indices = compression.select_blocks(
        q, k, cu_seqlens, block_size=4, block_counts=4, softmax_scale=1.0, backend=backend
    )
    for t in range(40):
        own = t // 4
        expected = [*range(min(own, 3)), own]
        assert indices[t].tolist() == [expected + [-1] * (4 - len(expected))] * 2


@stable
@given(st.integers(0, 50), st.integers(1, 8), st.sampled_from([torch.float32, torch.float64]), st.data())
def test_choose_blocks_ranks_as_sorting_does(first, block_counts, dtype, data):
    tokens, block_size = 6, 4
    num_blocks = data.draw(st.integers((first + tokens) // block_size, 14))
    level = st.integers(0, 3)  # few levels: many ties
    levels = data.draw(st.lists(level, min_size=tokens * num_blocks, max_size=tokens * num_blocks))
    importance = torch.tensor(levels, dtype=dtype).view(tokens, num_blocks) / 3
    indices = compression.choose_blocks(importance, first, block_size, block_counts)
    for row, t in enumerate(range(first, first + tokens)):
        own = t // block_size
        ranked = sorted(range(own), key=lambda j, row=row: (-importance[row, j].item(), j))
        expected = sorted([*ranked[: block_counts - 1], own])
        assert indices[row].tolist() == expected + [-1] * (block_counts - len(expected))


def test_own_block_wins_over_more_important_ones():
    importance = torch.tensor([[9.0, 8.0, 7.0, 0.0]])
    assert compression.choose_blocks(importance, 12, 4, 1).tolist() == [[3]]
    assert compression.choose_blocks(importance, 12, 4, 2).tolist() == [[0, 3]]
    assert compression.choose_blocks(importance, 8, 4, 2).tolist() == [[0, 2]]


def test_selection_carries_no_gradient():
    case = Case((20,))
    q, k, _ = (x.requires_grad_() for x in case.qkv())
    for backend in ("torch", "reference"):
        assert not compression.select_blocks(q, k, case.lengths, block_size=4, backend=backend).requires_grad


def test_autocast_narrows_nothing():
    case = Case((200,), block_size=4, block_counts=5)
    expected = select(case, "torch", torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(select(case, "torch", torch.float32), expected)


@pytest.mark.parametrize(
    ("kwargs", "match"),
    [
        ({"block_counts": 0}, "block_counts must be a positive integer, got 0"),
        ({"block_size": True}, "block_size must be a positive integer, got True"),
        ({"softmax_scale": "1"}, "softmax_scale must be a finite number, got '1'"),
        ({"backend": "fast"}, "backend must be one of .* got 'fast'"),
    ],
)
def test_wrong_arguments(kwargs, match):
    case = Case((9,))
    with pytest.raises(ValueError, match=match):
        compression.select_blocks(*case.qkv()[:2], case.lengths, **kwargs)
