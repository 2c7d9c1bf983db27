"""Functions run in real gloo processes, so that what is said of several ranks is tested on several ranks."""

import multiprocessing
import os
import pickle
import tempfile
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from tests.limit import LIMIT


def run_distributed(function: Callable[..., Any], world_size: int, *args: Any, timeout: float = LIMIT) -> list[Any]:
    """Call a function once in each of several processes that form a gloo group, as torchrun would have set them up.

    Processes are forked off one that has imported what they need, and nothing else: it starts with the first of them,
    takes a few seconds, and sees no later change of ``os.environ``.

    Args:
        function: Importable by name; called as ``function(rank, *args)`` with the process group ready.
        world_size: Number of processes.
        args: Arguments that can be pickled.
        timeout: Seconds after which all processes are killed; what hangs is a failure, not a stuck test.

    Returns:
        What the function returned, by rank.

    Raises:
        TimeoutError: If a process is still running at the end of the timeout.
        torch.multiprocessing.ProcessRaisedException: If a process raised; the message holds its traceback.
    """
    deadline = time.monotonic() + timeout
    with tempfile.TemporaryDirectory() as folder:
        multiprocessing.set_forkserver_preload(["lightning_spectral.nanogpt", "tests.distributed"])
        rank_args = (function, world_size, args, folder, timeout)
        context = mp.start_processes(_run_rank, rank_args, world_size, join=False, start_method="forkserver")
        try:
            while not context.join(timeout=1):
                if time.monotonic() > deadline:
                    running = [rank for rank, process in enumerate(context.processes) if process.is_alive()]
                    raise TimeoutError(f"{function.__name__}: ranks {running} still ran after {timeout} s")
        finally:
            for process in context.processes:
                process.kill()
                process.join()
        return [pickle.loads(_result(folder, rank).read_bytes()) for rank in range(world_size)]


def _result(folder: str, rank: int) -> Path:
    return Path(folder) / f"rank{rank}.pkl"


def _run_rank(
    rank: int, function: Callable[..., Any], world_size: int, args: tuple[Any, ...], folder: str, timeout: float
) -> None:
    torch.set_num_threads(1)
    # Lightning takes its place in the world from these; the group is there already, so that nobody dials the port.
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        GROUP_RANK="0",
        WORLD_SIZE=str(world_size),
        LOCAL_WORLD_SIZE=str(world_size),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT="0",
        TORCHELASTIC_RUN_ID="test",
    )
    dist.init_process_group(
        "gloo",
        # A file, not a port: tests that run side by side cannot take each other's.
        init_method=f"file://{folder}/store",
        rank=rank,
        world_size=world_size,
        timeout=timedelta(seconds=timeout),
    )
    _result(folder, rank).write_bytes(pickle.dumps(function(rank, *args)))
    dist.destroy_process_group()
