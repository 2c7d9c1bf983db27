"""The time that measuring takes, and that training takes without it."""

from collections.abc import Iterator
from contextlib import contextmanager
from time import perf_counter

import torch


def settle(device: torch.device) -> None:
    """Wait for what training has yet to do on a GPU: a report, which must wait for it, shall not pass for its cost."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


class Stopwatch:
    """Adds up wall time; on a GPU, of what the host does, not of kernels it only queued."""

    def __init__(self) -> None:
        self.seconds = 0.0

    @contextmanager
    def running(self) -> Iterator[None]:
        """Count the time spent inside; not to be nested."""
        start = perf_counter()
        try:
            yield
        finally:
            self.seconds += perf_counter() - start


class TrainingClock:
    """Wall time of training and its waiting for data, without validation and measuring, which a stopwatch counts."""

    def __init__(self, stopwatch: Stopwatch) -> None:
        self._stopwatch = stopwatch
        self._before = 0.0
        self._since: float | None = None
        self._own = 0.0

    @property
    def seconds(self) -> float:
        """Time so far."""
        if self._since is None:
            return self._before
        return self._before + (perf_counter() - self._since) - (self._stopwatch.seconds - self._own)

    def start(self, seconds: float | None = None) -> None:
        """Run on from so many seconds; None for what the clock shows."""
        self._before = self.seconds if seconds is None else seconds
        self._since, self._own = perf_counter(), self._stopwatch.seconds

    def pause(self) -> None:
        """Stand still."""
        self._before, self._since = self.seconds, None
