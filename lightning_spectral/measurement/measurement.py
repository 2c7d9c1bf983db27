"""What any measurement has: a request that makes it, events that it follows, reports that it makes."""

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any, ClassVar, Literal, NamedTuple

import numpy as np
import torch
from torch import nn

from lightning_spectral.capture.shadow import BatchLoss, LossFunction
from lightning_spectral.functional.estimate import Spectrum
from lightning_spectral.measurement.arguments import check_choice, check_positive
from lightning_spectral.measurement.schedule import TrainSchedule
from lightning_spectral.measurement.stopwatch import Stopwatch

Stage = Literal["train", "validate"]


class Scene(NamedTuple):
    """What a measurement is made for."""

    module: nn.Module
    device: torch.device
    """Where the module is."""
    stopwatch: Stopwatch
    """Counts the time that measuring takes."""
    make_loss: Callable[[LossFunction | None], BatchLoss]
    """Makes the loss of a batch from the module as it is."""


@dataclass(frozen=True, kw_only=True)
class Request:
    """What is measured, and when: a value that checks itself; measurements of equal requests are shared.

    Raises:
        ValueError: For arguments out of range.
    """

    kind: ClassVar[str]
    """Of the series in a record that its reports make."""

    stage: Stage
    every_n_steps: int
    num_groups: int
    dataloader_idx: int = 0

    def __post_init__(self) -> None:
        check_positive(every_n_steps=self.every_n_steps, num_groups=self.num_groups)
        check_choice(stage=(self.stage, ("train", "validate")))
        index = self.dataloader_idx
        if isinstance(index, bool) or not isinstance(index, int) or index < 0:
            raise ValueError(f"dataloader_idx must be an int from 0, got {index!r}")

    def measure(self, scene: Scene) -> "Measurement":
        """A measurement of its own; raises ValueError for what the module does not allow."""
        raise NotImplementedError

    def settings(self) -> dict[str, Any]:
        """For the record of a run, JSON-like."""
        return {"kind": self.kind, **asdict(self)}


@dataclass(frozen=True)
class Report:
    """All spectra of one measurement at one step."""

    step: int
    spectra: Mapping[str, Mapping[str, Spectrum]]
    """By kind, ``"activation"`` for example, and by name of layer or parameter."""

    def arrays_beside(self) -> dict[str, np.ndarray]:
        """What a record keeps beside the spectra, by key."""
        return {}


class Measurement:
    """Follows the events of a loop, and asks a subclass to collect rows and to report.

    Args:
        request: What to measure, and when.
        num_rows: Rows wanted per report, over all ranks.
        stopwatch: Counts the time that measuring takes.
    """

    def __init__(self, request: Request, num_rows: int, stopwatch: Stopwatch) -> None:
        self.stage = request.stage
        self.every_n_steps = request.every_n_steps
        self.loader = request.dataloader_idx
        self.kind = request.kind
        self.report: Report | None = None
        """The latest report."""
        self.schedule = TrainSchedule(request.every_n_steps, num_rows)
        self.last_validation: int | None = None
        """Step of the latest report from a validation run."""
        self.is_collecting = False
        """Whether the batch, or validation run, under way belongs to a report."""
        self.steps_collected = 0
        """Optimizer steps collected for the next report."""
        self.stopwatch = stopwatch

    def open(self, batch: Any, step: int, has_right_stage: bool) -> None:
        """A batch begins; it is to be collected if ``is_collecting``. It may be of the other stage."""
        raise NotImplementedError

    def close(self) -> None:
        """The batch has ended."""
        raise NotImplementedError

    def before_backward(self, scale: Callable[[], float]) -> None:
        """A backward pass begins.

        Args:
            scale: Tells the factor between the gradients it gives and those of the batch's own loss; a GPU may have to
                be waited for.
        """

    def after_backward(self, is_last: bool) -> None:
        """A backward pass has ended, and maybe no other forward pass of this batch follows."""

    def agree_on_rows(self) -> float:
        """Rows of the first optimizer step over all ranks; a collective."""
        raise NotImplementedError

    def make_report(self, step: int) -> None:
        """Set ``report`` from what was collected, and :meth:`reset`."""
        raise NotImplementedError

    def remove(self) -> None:
        """Take every hook off and give all memory back."""
        raise NotImplementedError

    def reset(self) -> None:
        """Forget what was collected; nothing slides from one report into the next."""
        self.steps_collected = 0
        self.is_collecting = False

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs to report at the same steps on as many rows; never what was collected."""
        return {
            "rows_per_step": self.schedule.rows_per_step,
            "stride": self.schedule.stride,
            "last_validation": self.last_validation,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take up what :meth:`state_dict` gave."""
        self.schedule.rows_per_step = state["rows_per_step"]
        self.schedule.stride = state["stride"]
        self.last_validation = state["last_validation"]

    def start_training(self, step: int) -> None:
        """Training begins, or resumes, at a step."""
        self.schedule.start(step)

    def start_train_batch(self, batch: Any, step: int) -> None:
        """A training batch begins."""
        self.is_collecting = self.stage == "train" and self.schedule.collects(step)
        self.open(batch, step, has_right_stage=self.stage == "train")

    def end_train_batch(self, step: int) -> None:
        """A training batch has ended; makes the report if one is due."""
        self.close()
        moved = self.schedule.advance(step)
        if self.stage != "train" or moved == 0:
            return
        self.steps_collected += self.is_collecting
        if self.schedule.rows_per_step is None:
            self.schedule.rows_per_step = self.agree_on_rows()
            if not self.schedule.collects(step - moved):
                self.reset()
        if self.schedule.due():
            self.make_report(step)

    def start_validation(self, step: int, always: bool = False) -> None:
        """A validation run begins; it is measured if it comes late enough after the last that was, or always."""
        last = self.last_validation
        early = last is not None and step - last < self.every_n_steps
        self.is_collecting = self.stage == "validate" and (always or not early)

    def start_validation_batch(self, batch: Any, step: int) -> None:
        """A batch of the loader that is measured, in a validation run or in the sanity check, begins."""
        self.open(batch, step, has_right_stage=self.stage == "validate")

    def end_validation_batch(self) -> None:
        """A validation batch has ended."""
        self.close()

    def end_validation(self, step: int) -> None:
        """A validation run has ended; makes its report."""
        if self.is_collecting:
            self.last_validation = step
            self.make_report(step)
