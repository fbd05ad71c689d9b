"""Which rows are sent where, against the same said row by row."""

from itertools import accumulate

import pytest
import torch
from conftest import random_step

from videonsa_vllm.routing import Routing, VisionFlags


@pytest.mark.parametrize("seed", range(40))
def test_every_row_sees_what_it_should(seed):
    step = random_step(seed)
    routing = Routing.build(step.is_vision, step.starts, step.num_keys, step.block_table, step.flags)
    vision_rows, vision_slots, lengths, text = [], [], [], []
    row = 0
    for request, kinds in enumerate(step.kinds):
        past = len(kinds) - (step.starts[request + 1] - step.starts[request])
        new = [position for position in range(past, len(kinds)) if kinds[position]]
        if new:
            seen = [position for position in range(len(kinds)) if kinds[position]]
            vision_slots += [step.slot(request, position) for position in seen]
            lengths.append((len(new), len(seen)))
        for position in range(past, len(kinds)):
            if kinds[position]:
                vision_rows.append(row)
            else:
                text.append((row, request, position + 1))
            row += 1
    if not vision_rows:
        assert routing is None
        return
    assert routing.vision_rows.tolist() == vision_rows
    queries, keys = zip(*lengths, strict=True)
    assert routing.lengths.offsets_q == tuple(accumulate(queries, initial=0))
    assert routing.lengths.offsets_k == tuple(accumulate(keys, initial=0))
    if routing.vision_slots is None:  # all keys are new ones
        assert queries == keys
    else:
        assert routing.vision_slots.tolist() == vision_slots
    # A run's rows end at its last key; each run belongs to one request, and all of them are the text rows.
    rows = iter(routing.text_rows.tolist())
    found = [
        (next(rows), run.request, run.num_keys - run.num_rows + 1 + offset)
        for run in routing.text_runs
        for offset in range(run.num_rows)
    ]
    assert found == text and next(rows, None) is None


def test_seeds_cover_the_cases():
    steps = [random_step(seed) for seed in range(40)]
    routings = [Routing.build(s.is_vision, s.starts, s.num_keys, s.block_table, s.flags) for s in steps]
    assert any(routing is None for routing in routings)
    assert any(routing is not None and routing.vision_slots is None for routing in routings)
    assert any(routing is not None and routing.vision_slots is not None for routing in routings)
    assert any(routing is not None and not routing.text_runs for routing in routings)


def test_the_device_is_read_once_where_vision_was_cached_and_never_else(monkeypatch):
    reads = []
    monkeypatch.setattr(torch.Tensor, "cpu", lambda tensor: reads.append(tensor) or tensor)
    flags = VisionFlags(64, 4, "cpu")
    table = torch.tensor([[3, 1, 5], [2, 4, 6]])
    vision, text = torch.ones(3, dtype=torch.bool), torch.zeros(2, dtype=torch.bool)
    flags.write(torch.tensor([12, 13]), None)
    assert Routing.build(text, [0, 1, 2], [5, 9], table, flags) is None  # two requests that generate
    Routing.build(vision, [0, 3], [3], table, flags)  # a prompt from its start
    assert not reads
    Routing.build(torch.cat([vision, vision]), [0, 3, 6], [7, 8], table, flags)
    assert len(reads) == 1


def test_flags_are_those_of_the_last_token_in_a_slot():
    flags = VisionFlags(8, 4, "cpu")
    flags.write(torch.tensor([3, 4, 5]), torch.tensor([True, False, True]))
    assert flags.flags.nonzero().flatten().tolist() == [3, 5]
    flags.write(torch.tensor([5, 6]), None)
    assert flags.flags.nonzero().flatten().tolist() == [3]
    # Padding has slot -1, and is no token of the last slot, 7.
    flags.write(torch.tensor([2, -1]), torch.tensor([True, True]))
    assert not flags.flags[7] and flags.slots(torch.tensor([1, 0]), 8).tolist() == [4, 5, 6, 7, 0, 1, 2, 3]
