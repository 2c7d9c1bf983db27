"""The harness of the tests of several processes: a failure shows its traceback, nothing hangs."""

import time

import pytest
from torch.multiprocessing import ProcessRaisedException

from tests.distributed import run_distributed


def fail_on_the_second(rank):
    if rank == 1:
        raise ArithmeticError("a rank that fails")
    time.sleep(600)


def sleep(rank):
    time.sleep(600)


def test_a_failure_on_one_rank_ends_all_with_its_traceback():
    with pytest.raises(ProcessRaisedException, match=r"fail_on_the_second[\s\S]*ArithmeticError: a rank that fails"):
        run_distributed(fail_on_the_second, 2)


def test_what_hangs_is_a_failure():
    with pytest.raises(TimeoutError, match=r"sleep: ranks \[0\] still ran after 1 s"):
        run_distributed(sleep, 1, timeout=1)
