"""How many blocks neighbouring tokens select together, as the benchmarks count it."""

import sys
from pathlib import Path

import pytest
import torch
from nsa_cases import Case
from triton_testing import lengths_on_device, needs_triton, on_device

from nsa_kernels import attention, compression

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))

import query_order
import unions


def test_statistics_count_what_sets_count():
    case = Case((70,), heads=(6, 2), block_size=4, block_counts=5)
    q, k, _ = case.qkv()
    indices = compression.select_blocks(q, k, case.lengths, block_size=4, block_counts=5, backend="reference")
    distinct, selected, by_members = 0, 0, [0] * 8
    for start in range(0, 64, 8):  # the last 6 tokens fill no tile
        for head in range(2):
            lists = [set(indices[token, head].tolist()) - {-1} for token in range(start, start + 8)]
            union = set.union(*lists)
            distinct, selected = distinct + len(union), selected + sum(map(len, lists))
            for block in union:
                by_members[sum(block in chosen for chosen in lists) - 1] += 1
    found = unions.union_statistics(indices, tile=8)
    assert found["r"] == pytest.approx(distinct * 8 / selected)
    assert found["blocks_per_tile"] == pytest.approx(distinct / 16)
    assert found["share_by_members"] == pytest.approx([count / distinct for count in by_members], abs=1e-4)
    cheaper = sum(count * min(1.0, 0.15 * (i + 1)) for i, count in enumerate(by_members))
    assert found["hybrid_over_union"] == pytest.approx(cheaper / distinct)


def test_tokens_that_agree_and_tokens_that_do_not():
    same = torch.arange(4).expand(36, 1, 4)
    assert unions.union_statistics(same, tile=18)["r"] == 1.0
    assert unions.union_statistics(torch.arange(144).view(36, 1, 4), tile=18)["r"] == 18.0
    assert unions.union_statistics(same[:17], tile=18) == {}


@needs_triton
def test_recording_sees_every_choice():
    case = Case((40,), heads=(4, 2), head_dim=32, block_size=16, block_counts=2)
    inputs, lengths = on_device([*case.qkv(torch.float32), *case.gates(torch.float32)]), lengths_on_device(case)
    with unions.recording(tile=4) as found:
        for _ in range(2):
            attention.nsa_attention(*inputs, lengths, **case.nsa, backend="triton")
    assert len(found) == 2 and found[0] == found[1] and 1.0 <= found[0]["r"] <= 4.0
    attention.nsa_attention(*inputs, lengths, **case.nsa, backend="triton")
    assert len(found) == 2


def test_tiles_of_a_frame_cover_their_rectangles():
    grid = 4, 6, 12
    place = torch.stack(torch.meshgrid(*map(torch.arange, grid), indexing="ij"), -1).flatten(0, 2)  # [tokens, 3]
    for tile in ((1, 1, 12), (1, 3, 6), (2, 3, 3)):
        order = query_order.in_order(grid, tile)
        assert torch.equal(order.sort().values, torch.arange(288))
        covered = place[order].view(-1, tile[0] * tile[1] * tile[2], 3)
        assert (covered.amax(1) - covered.amin(1) + 1).tolist() == [list(tile)] * len(covered)
    with pytest.raises(ValueError, match=r"`tile` = \(1, 4, 3\) must divide `grid` = \(4, 6, 12\)"):
        query_order.in_order(grid, (1, 4, 3))


def test_tiles_of_like_tokens_walk_fewer_blocks():
    """Tokens of a 3 x 6 rectangle look for the same thing, and others for something else."""
    grid, generator = (8, 18, 18), torch.Generator().manual_seed(0)
    kinds = torch.randn(8 * 18, 1, 32, generator=generator)
    q = torch.empty(8 * 18 * 18, 1, 32)
    q[query_order.in_order(grid, (1, 3, 6))] = kinds.repeat_interleave(18, 0)
    k = torch.randn(len(q), 1, 32, generator=generator)
    found = query_order.by_order(q, k, grid)
    # Alike but for their own blocks, of which a rectangle of three rows touches one or two.
    assert 1.0 <= found["3 x 6"] < 33 / 32 + 0.02 < found["sequence"]
    assert found["3 x 6"] < min(r for order, r in found.items() if order != "3 x 6")
