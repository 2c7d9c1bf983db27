"""Gaps between kernels: when, during training steps, nothing ran on the device."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from benchmarks.gpu_sizes import Sizes, module_of, train
from benchmarks.harness import settle

PROFILED = 3
"""Steps at the end of a run."""


@dataclass(frozen=True)
class Gaps:
    """Of the time between the first kernel and the last."""

    share: float
    """In which none ran."""
    longest: float
    """Seconds."""
    count: int
    """Kernels."""


class Profiled(Callback):
    """Profiles steps from one on, until the last but one, whose end holds the report."""

    def __init__(self, first: int, activities: Iterable[ProfilerActivity]) -> None:
        self.first = first
        self.profiler = profile(activities=list(activities))
        self.is_running = False

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        if trainer.global_step == self.first:
            settle()
            self.profiler.start()
            self.is_running = True
        elif trainer.global_step == self.first + PROFILED:
            self.stop()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.stop()

    def stop(self) -> None:
        if self.is_running:
            settle()
            self.profiler.stop()
            self.is_running = False


def gaps_of(sizes: Sizes, callbacks: list[Callback], steps: int) -> Gaps:
    """Gaps in the steps before the last of a run, whose report is left out; the first cycle is to warm up."""
    is_cuda = sizes.device == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if is_cuda else [])]
    profiled = Profiled(2 * steps - 1 - PROFILED, activities)
    train(sizes, module_of(sizes), [*callbacks, profiled], 2 * steps)
    kind = DeviceType.CUDA if is_cuda else DeviceType.CPU
    spans = [
        (event.time_range.start, event.time_range.end)
        for event in profiled.profiler.events() or []
        if event.device_type == kind
    ]
    return gaps_between(spans)


def gaps_between(spans: list[tuple[float, float]]) -> Gaps:
    """Gaps of intervals, in microseconds, which may overlap."""
    if not spans:
        raise ValueError("spans must hold a kernel, got none: the profiler has seen nothing on this device")
    ordered = sorted(spans)
    end = ordered[0][0]
    idle = longest = 0.0
    for start, stop in ordered:
        gap = max(0.0, start - end)
        idle += gap
        longest = max(longest, gap)
        end = max(end, stop)
    return Gaps(idle / max(end - ordered[0][0], 1e-9), longest / 1e6, len(spans))
