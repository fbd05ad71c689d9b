"""Key/value heads side by side on a CPU: the same results, torch's settings of a thread, whoever watches operators."""

import contextlib
import functools
import gc
import signal
import threading
import weakref

import pytest
import torch
from nsa_cases import Case, assert_all_close, with_gradients
from torch.utils.flop_counter import FlopCounterMode

from nsa_kernels import attention, compression, head_threads, selection, sliding_window, utils

CASE = Case((150, 0, 61), (150, 7, 90), heads=(6, 3), block_size=4, block_counts=5, window_size=20)
SECONDS = 60


@pytest.fixture(params=[2, 4, 13], ids="{} threads".format)
def threads(request, monkeypatch):
    """So many threads for torch, for inputs of any size."""
    before = torch.get_num_threads()
    monkeypatch.setattr(head_threads, "_THREADED_ELEMENTS", 1)
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def nsa(*inputs):
    return attention.nsa_attention(*inputs, CASE.lengths, **CASE.nsa, backend="torch")


def branches(q, k, v, *_):
    """The outputs of each branch alone, side by side."""
    size = {"block_size": CASE.block_size, "backend": "torch"}
    indices = compression.select_blocks(q, k, CASE.lengths, block_counts=CASE.block_counts, **size)
    outputs = (
        compression.compression_attention(q, k, v, CASE.lengths, **size),
        selection.selection_attention(q, k, v, indices, CASE.lengths, **size),
        sliding_window.sliding_window_attention(q, k, v, CASE.lengths, window_size=CASE.window_size, backend="torch"),
    )
    return torch.cat([o for o, _ in outputs])


@pytest.mark.parametrize("function", [nsa, branches])
def test_results_are_those_of_one_thread(function, threads, monkeypatch):
    inputs = [*CASE.qkv(torch.float64), *CASE.gates(torch.float64)]
    actual = with_gradients(function, inputs)
    monkeypatch.setattr(head_threads, "_THREADED_ELEMENTS", 1 << 62)
    assert_all_close(actual, with_gradients(function, inputs), torch.float64)


def test_rows_far_above_their_own_block(threads, monkeypatch):
    """Which are computed again, by each thread for its heads."""
    scale, passes, sums = 30.0, [], selection._sums
    monkeypatch.setattr(selection, "_sums", lambda *args: passes.append(args) or sums(*args))
    inputs = [*CASE.qkv(torch.float64), *CASE.gates(torch.float64)]
    inputs[0] = inputs[0] * scale
    actual = with_gradients(nsa, inputs)
    assert len(passes) > 2 * 3  # more than once for a sequence and head
    expected = with_gradients(
        lambda *x: attention.nsa_attention(*x, CASE.lengths, **CASE.nsa, backend="reference"), inputs
    )
    # Scores, and with them rounding, are larger by that; the gradients of k once more.
    assert_all_close([x / scale**2 for x in actual], [x / scale**2 for x in expected], torch.float64)


def threads_of_a_new_thread() -> int:
    seen = []
    thread = threading.Thread(target=lambda: seen.append(torch.get_num_threads()))
    thread.start()
    thread.join()
    return seen[0]


def test_heads_meet_and_have_their_share_of_threads(threads, monkeypatch):
    """Two heads wait for each other, which two calls one after the other could not."""
    barrier, shares, others, first = threading.Barrier(2), set(), set(), iter(range(2))
    kv_head = utils.kv_head

    def wait(*args):
        shares.add(torch.get_num_threads())
        if next(first, None) is not None:
            barrier.wait(SECONDS)
            others.add(threads_of_a_new_thread())
        return kv_head(*args)

    monkeypatch.setattr(utils, "kv_head", wait)
    nsa(*CASE.qkv(torch.float32), *CASE.gates(torch.float32))
    assert shares == {threads // min(threads, 6)}  # two sequences have queries, of three heads each
    assert others == {threads}, "whoever begins while heads are at work"
    assert torch.get_num_threads() == threads_of_a_new_thread() == threads


def test_threads_that_cannot_be_started(threads, monkeypatch):
    started, start = iter(range(1)), threading.Thread.start

    def start_one(thread):
        if next(started, None) is None:
            raise RuntimeError("can't start new thread")
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", start_one)
    with pytest.raises(RuntimeError, match="can't start"):
        nsa(*CASE.qkv(torch.float32), *CASE.gates(torch.float32))
    assert torch.get_num_threads() == threads


def test_interrupted(threads, monkeypatch):
    """Ctrl-C reaches the main thread, wherever it waits; the others end first."""
    kv_head, seen, alive = utils.kv_head, [], threading.active_count()
    # Whoever starts the tests in the background of a script makes them ignore it.
    handler = signal.signal(signal.SIGINT, signal.default_int_handler)

    def interrupt_once(*args):
        if not seen:
            seen.append(args)
            signal.raise_signal(signal.SIGINT)
        return kv_head(*args)

    monkeypatch.setattr(utils, "kv_head", interrupt_once)
    try:
        with pytest.raises(KeyboardInterrupt):
            nsa(*CASE.qkv(torch.float32), *CASE.gates(torch.float32))
    finally:
        signal.signal(signal.SIGINT, handler)
    assert torch.get_num_threads() == threads and threading.active_count() == alive


def test_an_error_of_a_head_is_raised(threads, monkeypatch):
    kv_head = utils.kv_head

    def fail(x, span, head):
        if head == 2:
            raise RuntimeError("of head 2")
        return kv_head(x, span, head)

    monkeypatch.setattr(utils, "kv_head", fail)
    with pytest.raises(RuntimeError, match="of head 2"):
        nsa(*CASE.qkv(torch.float32), *CASE.gates(torch.float32))
    assert torch.get_num_threads() == threads


def test_inference_mode(threads):
    inputs = [*CASE.qkv(torch.float32), *CASE.gates(torch.float32)]
    expected = nsa(*inputs)
    with torch.inference_mode():
        o = nsa(*inputs)
    assert o.is_inference() and torch.equal(o, expected)


def test_calls_side_by_side_leave_the_number_of_threads(threads):
    """Each starts and ends while others take their shares; their own number may be another than the process's."""
    inputs = [*CASE.qkv(torch.float32), *CASE.gates(torch.float32)]
    torch.set_num_threads(threads + 1)
    assert threads_of_a_new_thread() == threads + 1

    def call_often():
        for _ in range(10):
            nsa(*inputs)

    callers = [threading.Thread(target=call_often) for _ in range(4)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert torch.get_num_threads() == threads_of_a_new_thread() == threads + 1


def test_a_caller_with_a_number_of_its_own(threads):
    """It began before the process got another number; both keep theirs."""
    has_asked, may_call, numbers = threading.Event(), threading.Event(), []

    def call():
        torch.get_num_threads()
        has_asked.set()
        may_call.wait(SECONDS)
        nsa(*CASE.qkv(torch.float32), *CASE.gates(torch.float32))
        numbers.append(torch.get_num_threads())

    caller = threading.Thread(target=call)
    caller.start()
    has_asked.wait(SECONDS)
    torch.set_num_threads(threads + 3)
    may_call.set()
    caller.join()
    assert numbers == [threads] and threads_of_a_new_thread() == threads + 3


def test_an_error_keeps_nothing(threads, monkeypatch):
    def fail(*_):
        raise RuntimeError("of a head")

    monkeypatch.setattr(utils, "kv_head", fail)
    q, k, v = CASE.qkv(torch.float32)
    gone = weakref.ref(q)
    gc.collect()
    gc.disable()
    try:
        with contextlib.suppress(RuntimeError):
            nsa(q, k, v, *CASE.gates(torch.float32))
        del q
        assert gone() is None
    finally:
        gc.enable()


def test_who_counts_operations_sees_all_of_them(threads, monkeypatch):
    inputs = [*CASE.qkv(torch.float32), *CASE.gates(torch.float32)]
    with FlopCounterMode(display=False) as counted:
        nsa(*inputs)
    torch.set_num_threads(1)
    with FlopCounterMode(display=False) as alone:
        nsa(*inputs)
    assert counted.get_total_flops() == alone.get_total_flops() > 0


@pytest.mark.parametrize(
    "watch", [torch.profiler.profile, torch.autograd.profiler.profile, functools.partial(torch.device, "cpu")]
)
def test_who_watches_sees_one_thread(watch, threads, monkeypatch):
    inputs = [*CASE.qkv(torch.float32), *CASE.gates(torch.float32)]
    with watch():
        assert head_threads.heads_at_once(inputs[0], 3, CASE.lengths) == 1
    assert head_threads.heads_at_once(inputs[0], 3, CASE.lengths) == min(threads, 6)


def test_a_few_queries_start_no_thread(monkeypatch):
    """A generated token of a 7B model, and, to see that the test can fail, a prompt."""
    monkeypatch.setattr(threading.Thread, "start", None)
    before = torch.get_num_threads()
    torch.set_num_threads(4)
    try:
        for tokens in (1, 600):
            lengths = utils.SequenceLengths.from_lengths([tokens], [3000])
            q, k = torch.randn(tokens, 28, 128), torch.randn(3000, 4, 128)
            with contextlib.nullcontext() if tokens == 1 else pytest.raises(TypeError):
                attention.nsa_attention(q, k, k, *torch.rand(3, tokens, 28), lengths, backend="torch")
    finally:
        torch.set_num_threads(before)
