"""The harness of the tests of several processes: a failure shows its traceback, nothing hangs."""

import os
import signal
import time

import pytest
from torch.multiprocessing import ProcessExitedException, ProcessRaisedException

from tests.distributed import run_distributed
from tests.limit import LIMIT


def fail_on_the_second(rank):
    if rank == 1:
        raise ArithmeticError("a rank that fails")
    time.sleep(2 * LIMIT)


def die_on_the_second(rank):
    if rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(2 * LIMIT)


def sleep(rank):
    time.sleep(2 * LIMIT)


def test_a_failure_on_one_rank_ends_all_with_its_traceback():
    with pytest.raises(ProcessRaisedException, match=r"fail_on_the_second[\s\S]*ArithmeticError: a rank that fails"):
        run_distributed(fail_on_the_second, 2)


def test_a_rank_that_dies_without_a_word_ends_all():
    with pytest.raises(ProcessExitedException, match="process 1 terminated with signal SIGKILL"):
        run_distributed(die_on_the_second, 2)


def test_what_hangs_is_a_failure():
    with pytest.raises(TimeoutError, match=r"sleep: ranks \[0\] still ran after 1 s"):
        run_distributed(sleep, 1, timeout=1)
