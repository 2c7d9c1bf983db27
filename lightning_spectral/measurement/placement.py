"""Where what waits for a report is kept: on the model's device while it fits into a share of its memory, or the CPU."""

from collections import deque
from collections.abc import Callable
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from lightning_spectral.capture.free_memory import free_bytes

Keep = Literal["auto", "device", "cpu"]

KEEPS: tuple[Keep, ...] = ("auto", "device", "cpu")

SHARE = 0.25
"""Of a device's free memory, what sums of activations, or rows of gradients, may take there by ``"auto"``."""

CPU = torch.device("cpu")


class Placement(NamedTuple):
    """Where something is kept, and why."""

    device: torch.device
    needed: int
    """Bytes of it."""
    budget: int
    """Bytes that it may take by ``"auto"`` where it is made."""


def placed(
    keep: Keep, needed: int, device: torch.device, free: Callable[[torch.device], int] = free_bytes
) -> Placement:
    """Choose between the device where something is made and the CPU.

    Args:
        keep: ``"device"`` and ``"cpu"`` choose by themselves, ``"auto"`` takes the device if what is needed is at most
            a quarter of the memory that is free there.
        needed: Bytes.
        device: Where it is made; one that is a CPU has no other.
        free: Tells the bytes that are free on a device.
    """
    budget = int(SHARE * free(device))
    stays = device.type == "cpu" or keep == "device" or (keep == "auto" and needed <= budget)
    return Placement(device if stays else CPU, needed, budget)


def room(*shape: int, dtype: torch.dtype, device: torch.device, beside: torch.device) -> Tensor:
    """Memory for a tensor; a CPU's is page-locked if a GPU ``beside`` is to copy to it while nobody waits."""
    return torch.empty(shape, dtype=dtype, device=device, pin_memory=device.type == "cpu" and beside.type == "cuda")


def to_locked(part: Tensor) -> tuple[Tensor, Callable[[], None]]:
    """Begin to copy what a GPU computes to the CPU: where it will be, and how to wait for it."""
    copy = torch.empty(part.shape, dtype=part.dtype, pin_memory=True)
    copy.copy_(part, non_blocking=True)
    event = torch.cuda.Event()
    event.record()
    return copy, event.synchronize


class Behind:
    """Adds to sums on the CPU what a GPU computes, in order, a few copies behind: so long as these nobody waits.

    Args:
        most: Copies under way.
        begin: Begins to copy, see :func:`to_locked`.
    """

    def __init__(self, most: int = 4, begin: Callable[[Tensor], tuple[Tensor, Callable[[], None]]] = to_locked) -> None:
        self._most, self._begin = most, begin
        self._under_way: deque[tuple[Tensor, Tensor, Callable[[], None]]] = deque()

    def add(self, total: Tensor, part: Tensor) -> None:
        """Add, sooner or later, a part to a sum."""
        self._under_way.append((total, *self._begin(part)))
        while len(self._under_way) > self._most:
            self._take()

    def settle(self) -> None:
        """Have everything added."""
        while self._under_way:
            self._take()

    def _take(self) -> None:
        total, part, wait = self._under_way.popleft()
        wait()
        total.add_(part)
