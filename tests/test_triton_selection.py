"""The Triton kernels of the selection branch, forward and backward."""

import contextlib
from unittest import mock

import pytest
import torch
from nsa_cases import (
    Case,
    PeakMemory,
    PoisonedEmpty,
    assert_all_close,
    assert_close_to_truth,
    on_drawn_cases,
    with_gradients,
)
from triton_testing import DEVICE, DTYPES, lengths_on_device, needs_triton, on_cpu, on_device

from nsa_kernels import compression, reference

pytestmark = needs_triton

CASES = [
    Case((67,), heads=(7, 1), head_dim=32, block_size=16, block_counts=3),
    Case((33, 0, 40), (33, 5, 90), heads=(10, 2), head_dim=64, block_size=32, block_counts=2),
    Case((30,), (150,), heads=(2, 1), head_dim=128, block_size=128, block_counts=2),
    Case((40, 1), (75, 1), heads=(8, 1), head_dim=96, block_size=24, block_counts=2),
    Case((1,), (131,), heads=(16, 1), head_dim=32, block_size=64, block_counts=5),
    Case((150,), heads=(1, 1), head_dim=32, block_size=16, block_counts=1),
    Case((40,), (300,), heads=(3, 1), head_dim=32, block_size=100, block_counts=2),
]


def random_blocks(case: Case, seed: int = 3) -> torch.Tensor:
    """Distinct blocks in any order: own, earlier, later and missing ones, and tokens with none at all."""
    num_blocks = -(-max(case.lengths_k or case.lengths_q) // case.block_size)
    shape = case.lengths.offsets_q[-1], case.heads[1], max(num_blocks, case.block_counts)
    shuffled = torch.rand(shape, generator=torch.Generator().manual_seed(seed)).argsort(-1)
    shuffled = shuffled.masked_fill(shuffled >= num_blocks, -1)[..., : case.block_counts]
    missing = torch.rand(shuffled.shape, generator=torch.Generator().manual_seed(seed + 1)) < 0.2
    return shuffled.masked_fill(missing, -1).int()


def run(case: Case, inputs: list[torch.Tensor], indices: torch.Tensor, do: torch.Tensor) -> list[torch.Tensor]:
    """[o, lse, dq, dk, dv] of the kernels."""
    from nsa_kernels import triton_selection, triton_tiles

    q, k, v = inputs
    args = lengths_on_device(case), case.block_size, case.scale
    lists = triton_selection.list_blocks(indices, q, *args[:2], is_sorted=False)
    o, lse = triton_selection.selection_fwd(q, k, v, lists, *args)
    lse_delta = triton_tiles.lse_and_delta(lse, (o.float() * do.float()).sum(-1))
    return [o, lse, *triton_selection.selection_bwd(q, k, v, lists, lse_delta, do, *args)]


def run_on_device(case: Case, inputs: list[torch.Tensor], indices: torch.Tensor, do: torch.Tensor):
    return on_cpu(run(case, on_device(inputs), indices.to(DEVICE), do.to(DEVICE)))


def expected(case: Case, inputs: list[torch.Tensor], indices: torch.Tensor, dtype: torch.dtype) -> list[torch.Tensor]:
    """[o, lse, dq, dk, dv] of the oracle."""
    args = indices, case.lengths, case.block_size, case.scale
    inputs = [x.to(dtype) for x in inputs]
    lse = reference.selection_attention_ref(*inputs, *args)[1]
    o, *gradients = with_gradients(lambda *x: reference.selection_attention_ref(*x, *args)[0], inputs)
    return [o, lse, *gradients]


def random_do(case: Case, dtype: torch.dtype) -> torch.Tensor:
    """The gradient of the output that `with_gradients` uses."""
    shape = case.lengths.offsets_q[-1], case.heads[0], case.head_dim
    return torch.randn(*shape, generator=torch.Generator().manual_seed(7), dtype=torch.float64).to(dtype)


def check_float32(case: Case, indices: torch.Tensor) -> None:
    inputs = case.qkv(torch.float32)
    with PoisonedEmpty():
        actual = run_on_device(case, inputs, indices, random_do(case, torch.float32))
    if case.lengths.offsets_q[-1]:
        truth = expected(case, inputs, indices, torch.float64)
        assert_all_close(actual, [x.float() for x in truth], torch.float32)
    else:
        assert not any(gradient.any() for gradient in actual[3:])


@pytest.mark.parametrize("case", CASES, ids=str)
def test_float32_matches_the_oracle(case):
    check_float32(case, random_blocks(case))


@on_drawn_cases(8, where=lambda case: case.block_size > 1)
def test_float32_matches_the_oracle_on_drawn_cases(case):
    check_float32(case, random_blocks(case))


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
@pytest.mark.parametrize("case", [CASES[0], CASES[1], CASES[3], CASES[5]], ids=str)
def test_half_precision_is_as_good_as_plain_code(case, dtype):
    inputs = case.qkv(dtype)
    indices = compression.select_blocks(
        *inputs[:2], case.lengths, block_size=case.block_size, block_counts=case.block_counts, backend="torch"
    )
    out = run_on_device(case, inputs, indices, random_do(case, dtype))
    assert [x.dtype for x in out] == [dtype, torch.float32, dtype, torch.float32, torch.float32]
    truth, plain = (expected(case, inputs, indices, t) for t in (torch.float64, dtype))
    torch.testing.assert_close(out.pop(1).double(), truth.pop(1), rtol=0, atol=2e-5)
    plain.pop(1)
    assert_close_to_truth(out, plain, truth)


def test_all_blocks_are_dense_causal_attention():
    case = Case((60, 20), (60, 70), heads=(10, 2), head_dim=32, block_size=16, block_counts=5)
    q, k, v = case.qkv(torch.float32)
    indices = torch.arange(5).expand(len(q), 2, 5)  # int64, strided, and with blocks past the end
    o = run_on_device(case, [q, k, v], indices, random_do(case, torch.float32))[0]
    for span in case.lengths.spans():
        rows, keys = slice(span.q_start, span.q_end), slice(span.k_start, span.k_end)
        mask = torch.ones(span.num_queries, span.num_keys, dtype=torch.bool).tril(span.first)
        dense = torch.nn.functional.scaled_dot_product_attention(
            *(x.transpose(0, 1)[None] for x in (q[rows], k[keys], v[keys])), attn_mask=mask, enable_gqa=True
        )
        torch.testing.assert_close(o[rows], dense[0].transpose(0, 1), rtol=0, atol=2e-6)


def test_a_block_that_everybody_selects():
    """Its pairs take several runs, the partial sums of which are added up."""
    case = Case((150,), heads=(2, 1), head_dim=32, block_size=16, block_counts=2)
    own = torch.arange(150) // 16
    indices = torch.stack([torch.zeros_like(own), own], -1)
    indices[:16, 0] = -1
    assert (indices == 0).sum() > 4 * case.block_size * case.block_counts
    check_float32(case, indices[:, None].int())


def test_tokens_that_agree_on_nothing():
    """The union of a tile is as long as all of its lists."""
    case = Case((24,), (24 * 3 * 8 + 24,), heads=(4, 1), head_dim=32, block_size=8, block_counts=3)
    indices = torch.randperm(72, generator=torch.Generator().manual_seed(0)).view(24, 1, 3).int()
    check_float32(case, indices)


def test_tiles_may_be_counted_in_any_number_of_chunks():
    """Tokens of a block come in order, whatever programs count them; and so many tiles that they walk several."""
    from nsa_kernels import triton_selection

    case = Case((40, 30), heads=(28, 2), head_dim=32, block_size=16, block_counts=2)  # nine tokens in a tile
    inputs, do = case.qkv(torch.float32), random_do(case, torch.float32)
    usual = run_on_device(case, inputs, random_blocks(case), do)
    for chunks in (1, 2, 3):
        with mock.patch.object(triton_selection, "_MAX_CHUNKS", chunks), PoisonedEmpty():
            others = run_on_device(case, inputs, random_blocks(case), do)
        assert all(torch.equal(a, b) for a, b in zip(usual, others, strict=True))


def test_every_block_gets_its_tokens_in_order():
    from nsa_kernels import triton_selection

    case = Case((50, 20), (50, 41), heads=(12, 2), head_dim=32, block_size=8, block_counts=4)
    indices, lengths = random_blocks(case), lengths_on_device(case)
    q = case.qkv(torch.float32)[0].to(DEVICE)
    lists = triton_selection.list_blocks(indices.to(DEVICE), q, lengths, 8, is_sorted=False)
    num_slots = 91 // 8 + 2
    tokens = triton_selection.tile_config(q, 6, 8)["TOKENS"]
    found, starts = on_cpu(triton_selection._tokens_of_blocks(lists, lengths, 8, tokens, num_slots))
    for head in range(2):
        for sequence, span in enumerate(case.lengths.spans()):
            for block in range(-(-span.num_keys // 8)):
                number = head * num_slots + span.k_start // 8 + sequence + block
                listed = [
                    token
                    for token in range(span.q_start, span.q_end)
                    if block in indices[token, head].tolist() and block * 8 <= span.first + token - span.q_start
                ]
                assert found[starts[number] : starts[number + 1]].tolist() == listed


def test_two_blocks_a_step_change_nothing_but_rounding():
    from nsa_kernels import triton_selection, triton_tiles

    case = Case((67, 9), (67, 40), heads=(7, 1), head_dim=32, block_size=16, block_counts=3)
    inputs = case.qkv(torch.float16)
    do, indices = random_do(case, torch.float16), random_blocks(case)
    truth = expected(case, inputs, indices, torch.float64)
    outputs = []
    for span in (1, 2):
        with mock.patch.object(triton_tiles, "tuning", triton_tiles.Tuning(selection_span=span)), PoisonedEmpty():
            assert triton_selection.forward_config(inputs[0], 7, 16)["SPAN"] == span
            outputs.append(run_on_device(case, inputs, indices, do)[:2])
    assert_close_to_truth([outputs[1][0]], [outputs[0][0]], [truth[0]])
    torch.testing.assert_close(outputs[1][1].double(), truth[1], rtol=0, atol=2e-5)


def test_lists_of_ascending_blocks_need_no_sorting():
    from nsa_kernels import triton_selection

    case = Case((50, 20), (50, 41), heads=(6, 2), head_dim=32, block_size=8, block_counts=4)
    q, k, _ = on_device(case.qkv(torch.float32))
    lengths = lengths_on_device(case)
    indices = compression.select_blocks(q, k, lengths, block_size=8, block_counts=4, backend="torch")
    as_they_are, sorted_first = (
        triton_selection.list_blocks(indices, q, lengths, 8, is_sorted=is_sorted) for is_sorted in (True, False)
    )
    tokens = triton_selection.tile_config(q, 3, 8)["TOKENS"]
    # What lies between the tiles of two sequences, and after the union of a tile, is not written.
    for start, first_tile, num_tokens in ((0, 0, 50), (50, 50 // tokens + 1, 20)):
        for tile in range(-(-num_tokens // tokens)):
            assert torch.equal(as_they_are.counts[first_tile + tile], sorted_first.counts[first_tile + tile])
            for head in range(2):
                size = min(tokens, num_tokens - tile * tokens)
                begin = ((start + tile * tokens) * 2 + head * size) * 4
                count = as_they_are.counts[first_tile + tile, head, 0]
                assert count > 0
                for a, b in zip(as_they_are[:2], sorted_first[:2], strict=True):
                    assert torch.equal(a.flatten()[begin : begin + count], b.flatten()[begin : begin + count])


def test_the_order_of_a_tokens_blocks_does_not_matter():
    case = CASES[0]
    inputs, do = case.qkv(torch.float32), random_do(case, torch.float32)
    indices = random_blocks(case)
    first = run_on_device(case, inputs, indices, do)
    flipped = run_on_device(case, inputs, indices.flip(-1), do)
    assert all(torch.equal(a, b) for a, b in zip(first, flipped, strict=True))


def test_token_without_blocks_gets_zero_with_zero_gradient():
    case = Case((20,), heads=(7, 1), head_dim=32, block_size=8, block_counts=3)
    indices = random_blocks(case)
    indices[5] = -1
    indices[6] = torch.tensor([2, 1, -1])  # both start after token 6
    do = random_do(case, torch.float32)
    do[:5], do[7:] = 0, 0
    with PoisonedEmpty():
        o, lse, *gradients = run_on_device(case, case.qkv(torch.float32), indices, do)
    assert not o[5:7].any() and lse[5:7].isneginf().all()
    assert not any(gradient.any() for gradient in gradients)


def test_nobody_has_a_block():
    case = Case((7,), heads=(2, 1), head_dim=32)
    with PoisonedEmpty():
        o, lse, *gradients = run_on_device(
            case, case.qkv(torch.float32), torch.full((7, 1, 1), -1), random_do(case, torch.float32)
        )
    assert lse.isneginf().all() and not any(x.any() for x in (o, *gradients))


def test_runs_repeat_to_the_last_bit_whatever_the_strides():
    case = CASES[1]
    inputs, do, indices = case.qkv(torch.float32), random_do(case, torch.float32), random_blocks(case)
    first = run_on_device(case, inputs, indices, do)
    for strided in (lambda x: x.transpose(0, 1).contiguous().transpose(0, 1), lambda x: x.mT.contiguous().mT):
        arguments = [strided(x) for x in on_device([*inputs, indices, do])]
        assert not any(x.is_contiguous() for x in arguments)
        *strided_inputs, strided_indices, strided_do = arguments
        again = on_cpu(run(case, strided_inputs, strided_indices, strided_do))
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


def test_packed_sequences_equal_each_alone():
    case = CASES[1]
    inputs, do, indices = case.qkv(torch.float32), random_do(case, torch.float32), random_blocks(case)
    packed = run_on_device(case, inputs, indices, do)
    for span in case.lengths.spans():
        rows, keys = slice(span.q_start, span.q_end), slice(span.k_start, span.k_end)
        alone = Case((span.num_queries,), (span.num_keys,), case.heads, case.head_dim, case.block_size)
        out = run_on_device(alone, [inputs[0][rows], inputs[1][keys], inputs[2][keys]], indices[rows], do[rows])
        for x, part in zip(packed, out, strict=True):
            assert torch.equal(x[rows] if len(x) == len(do) else x[keys], part)


@pytest.mark.filterwarnings("ignore:overflow encountered in exp2")  # of keys that are masked afterwards
def test_softmax_survives_large_scores():
    """Scores of hundreds, of either sign."""
    case = Case((50,), heads=(2, 1), head_dim=32, block_size=16, block_counts=2)
    (q, k, v), do, indices = case.qkv(torch.float32), random_do(case, torch.float32), random_blocks(case)
    for factor in (100.0, -100.0):
        truth = expected(case, [factor * q, k, v], indices, torch.float64)
        o, lse, _, _, dv = run_on_device(case, [factor * q, k, v], indices, do)
        torch.testing.assert_close(lse.double(), truth[1], rtol=1e-5, atol=1e-4)
        torch.testing.assert_close(o.double(), truth[0], rtol=0, atol=1e-3)
        torch.testing.assert_close(dv.double(), truth[4], rtol=0, atol=2e-3)


@pytest.mark.parametrize("scale", [-0.3, 0.0])
def test_scale_may_be_any_number(scale):
    with mock.patch.object(Case, "scale", scale):
        check_float32(CASES[1], random_blocks(CASES[1]))


def test_memory_is_linear_in_tokens():
    """Twice the tokens, twice the memory; and no more than a few copies of the gradients. No kernel runs."""
    from nsa_kernels import triton_selection

    kernels = [(triton_selection, name) for name in vars(triton_selection) if name.endswith("_kernel")]
    assert len(kernels) == 6
    live = []
    for tokens in (4096, 8192):
        case = Case((tokens,), heads=(14, 2), head_dim=128, block_size=64, block_counts=32)
        inputs = case.qkv(torch.float16)
        arguments = [*on_device(inputs), torch.zeros(tokens, 2, 32, dtype=torch.int32, device=DEVICE)]
        do = torch.zeros_like(arguments[0])
        with contextlib.ExitStack() as no_kernels:
            for kernel in kernels:
                no_kernels.enter_context(mock.patch.object(*kernel, mock.MagicMock()))
            with PeakMemory() as memory:
                run(case, arguments[:3], arguments[3], do)
        live.append(memory.live)
    assert live[1] <= 2.01 * live[0]
    assert live[1] <= 20 * inputs[1].numel() + 4 * inputs[0].numel()
