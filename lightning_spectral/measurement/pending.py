"""What is made beside training: worked on in a thread, without collectives, and brought to its end by the main one."""

import os
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from typing import Generic, TypeVar

import torch
from torch import Tensor

T = TypeVar("T")

_AT_WORK = threading.Lock()
"""Held by a thread at work between two points at which it may rest. A process that forks, to load data say, waits for
such a point: its child would find the locks of a solver taken, by a thread that it does not have. It also makes two
threads take turns."""

if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_AT_WORK.acquire, after_in_parent=_AT_WORK.release, after_in_child=_AT_WORK.release)


class Pending(Generic[T]):
    """Work under way in a thread; begins at once.

    Args:
        step: Optimizer steps when it was begun.
        work: Gives a part of the work with each item, on ``device``; it may be left unfinished. No collectives.
        end: Makes the result, on the main thread, when all work is done; it may hold collectives.
        device: Where it works: on a GPU in a stream of its own, after what the current one has to do.
        tensors: What it reads, so that the memory of what lies on a GPU is not given to others before.
    """

    def __init__(
        self,
        step: int,
        work: Iterator[None],
        end: Callable[[], T],
        device: torch.device,
        tensors: Iterable[Tensor] = (),
    ) -> None:
        self.step = step
        self.times_asked = 0
        """How often it was asked for since it was begun."""
        self._work, self._end = work, end
        self._error: Exception | None = None
        self._is_abandoned = False
        self._stream: torch.cuda.Stream | None = None
        if device.type == "cuda":
            self._stream = torch.cuda.Stream(device)
            self._stream.wait_stream(torch.cuda.current_stream(device))
            for tensor in tensors:
                if tensor.is_cuda:  # sums may be kept on the CPU
                    tensor.record_stream(self._stream)
        # No daemon, which would be torn out of a solver: a process that exits waits for the part of the work under way.
        self._thread = threading.Thread(target=self._run, name="lightning-spectral")
        self._thread.start()

    def _run(self) -> None:
        # Gradients, streams and the current GPU are a thread's own.
        with ExitStack() as stack:
            stack.enter_context(torch.no_grad())
            if self._stream is not None:
                stack.enter_context(torch.cuda.stream(self._stream))
            try:
                is_more = True
                while is_more and not self._is_abandoned and threading.main_thread().is_alive():
                    with _AT_WORK:
                        is_more = next(self._work, self) is not self
            except Exception as error:  # for the main thread to raise
                self._error = error

    @property
    def is_done(self) -> bool:
        """Whether nobody would have to wait."""
        return not self._thread.is_alive()

    def result(self) -> T:
        """Wait for the work, and end it; raises what the work or its end has raised."""
        self._thread.join()
        if self._error is not None:
            raise self._error
        return self._end()

    def abandon(self) -> None:
        """Nobody will want it: the thread ends at the next point at which it may."""
        self._is_abandoned = True
