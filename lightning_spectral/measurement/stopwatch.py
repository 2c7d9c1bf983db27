"""The time that measuring takes, added up."""

from collections.abc import Iterator
from contextlib import contextmanager
from time import perf_counter


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
