"""Work beside training: in a thread, its end on the main one; dropped, failed, and where a process forks or exits."""

import os
import subprocess
import sys
import threading
from collections.abc import Iterator

import pytest
import torch

from lightning_spectral.measurement.pending import _AT_WORK, Pending
from tests.limit import LIMIT

CPU = torch.device("cpu")


def test_work_is_done_in_a_thread_and_ended_on_the_main_one() -> None:
    threads = []

    def work() -> Iterator[None]:
        for _ in range(3):
            threads.append((threading.current_thread(), torch.is_grad_enabled(), _AT_WORK.locked()))
            yield

    def end() -> str:
        threads.append((threading.current_thread(), torch.is_grad_enabled(), False))
        return "whole"

    pending = Pending(7, work(), end, CPU)
    assert (pending.step, pending.result(), pending.is_done) == (7, "whole", True)
    worker = threads[0][0]
    assert threads == [(worker, False, True)] * 3 + [(threading.main_thread(), True, False)]
    assert worker is not threading.main_thread()


def test_what_the_work_raises_is_raised_where_it_is_ended() -> None:
    def work() -> Iterator[None]:
        raise RuntimeError("no memory")
        yield

    pending = Pending(1, work(), lambda: pytest.fail("ended"), CPU)
    with pytest.raises(RuntimeError, match=r"^no memory$"):
        pending.result()


def test_nobody_waits_for_what_was_dropped() -> None:
    begun, go, done = threading.Event(), threading.Event(), []

    def work() -> Iterator[None]:
        for index in range(100):
            begun.set()
            go.wait(LIMIT)
            done.append(index)
            yield

    pending = Pending(1, work(), lambda: None, CPU)
    begun.wait(LIMIT)
    assert not pending.is_done
    pending.abandon()
    go.set()
    pending._thread.join(LIMIT)
    assert pending.is_done
    assert done == [0]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no processes fork here")
@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork.*:DeprecationWarning")
def test_a_fork_waits_for_a_point_at_which_the_thread_may_rest() -> None:
    begun, inside = threading.Event(), []

    def work() -> Iterator[None]:
        for _ in range(20):
            inside.append(True)
            begun.set()
            threading.Event().wait(0.001)
            inside.clear()
            yield

    pending = Pending(1, work(), lambda: None, CPU)
    begun.wait(LIMIT)
    child = os.fork()
    if child == 0:
        os._exit(int(bool(inside) or not _AT_WORK.acquire(blocking=False)))
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    pending.result()


def test_a_process_that_ends_does_not_wait_for_all_of_it() -> None:
    script = """if True:
        import itertools, sys, torch
        from lightning_spectral.measurement.pending import Pending
        Pending(1, (None for _ in itertools.count()), print, torch.device("cpu"))
        sys.exit(3)
    """
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=LIMIT)
    assert (run.returncode, run.stderr) == (3, "")
