"""Key/value heads side by side on torch's threads of a CPU.

A branch handles one key/value head of one sequence at a time, in operations that are too small for many threads each.
"""

import contextlib
import threading
from collections import deque
from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from . import utils

# Queries of fewer elements are not worth starting threads for.
_THREADED_ELEMENTS = 1 << 20

# Held while threads take their shares: torch has no setter for a thread that leaves the number of the process alone.
_taking_shares = threading.Lock()


def heads_at_once(q: Tensor, num_kv_heads: int, lengths: utils.SequenceLengths) -> int:
    """How many key/value heads `for_each_head` takes side by side."""
    if q.device.type != "cpu" or q.numel() < _THREADED_ELEMENTS or _is_watched():
        return 1
    if not torch.backends.openmp.is_available():  # a pool of threads that cannot be divided
        return 1
    return min(torch.get_num_threads(), num_kv_heads * sum(1 for _ in lengths.spans()))


def _is_watched() -> bool:
    """Whether somebody watches or replaces operators, which is done in one thread."""
    has_function_mode = torch._C._len_torch_function_stack() > 0
    return is_in_torch_dispatch_mode() or has_function_mode or torch.autograd._profiler_enabled()


def for_each_head(
    body: Callable[[utils.Span, int], None], q: Tensor, num_kv_heads: int, lengths: utils.SequenceLengths
) -> None:
    """Call body(span, head) for every sequence and key/value head, without autograd.

    On a CPU, torch's threads are divided among heads: they meet once, and not at the end of every small operation.
    """
    jobs = deque((span, head) for span in lengths.spans() for head in range(num_kv_heads))
    workers = heads_at_once(q, num_kv_heads, lengths)
    if workers == 1:
        with torch.no_grad():
            for job in jobs:
                body(*job)
        return
    # Of equal size: that of tiles, and with it rounding, follows it, whichever thread takes a head.
    share = torch.get_num_threads() // workers
    is_inference = torch.is_inference_mode_enabled()
    errors = []
    # Three times: all have asked torch, which sets a thread's number to the process's; all have their shares, and with
    # them the process; the process has its own again, and heads can begin.
    meeting = threading.Barrier(workers + 1)

    def next_job() -> tuple[utils.Span, int] | None:
        try:
            return jobs.popleft()
        except IndexError:
            return None

    def give_back() -> None:
        of_process = torch.get_num_threads()
        with contextlib.suppress(threading.BrokenBarrierError):
            meeting.wait()
            meeting.wait()
        torch.set_num_threads(of_process)
        with contextlib.suppress(threading.BrokenBarrierError):
            meeting.wait()

    def work() -> None:
        torch.get_num_threads()
        try:
            meeting.wait()
            torch.set_num_threads(share)
            meeting.wait()
            meeting.wait()
            with torch.inference_mode(is_inference), torch.no_grad():
                while not errors and (job := next_job()) is not None:
                    body(*job)
        except BaseException as error:
            errors.append(error)

    started = []  # and joined: a process that has threads cannot be forked
    try:
        with _taking_shares:
            try:
                for target in (give_back, *[work] * workers):
                    thread = threading.Thread(target=target)
                    thread.start()
                    started.append(thread)
                started[0].join()
            except BaseException as error:  # the first of errors, before those of threads that wait in vain
                errors.append(error)
                meeting.abort()
                for thread in started[:1]:  # the process has its own number again before others take their shares
                    thread.join()
        for thread in started:
            thread.join()
    except BaseException as error:  # such as Ctrl-C: threads end with the head that they are at
        errors.append(error)
        for thread in started:
            thread.join()
    try:
        if errors:
            raise errors[0]
    finally:
        errors.clear()  # a cycle, through the traceback, that would keep all tensors
