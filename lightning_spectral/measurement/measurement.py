"""What any measurement has: a request that makes it, events that it follows, reports that it makes."""

from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from typing import Any, ClassVar, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from lightning_spectral.capture.activations import always
from lightning_spectral.capture.batch import SampleCutter, Samples, path_of
from lightning_spectral.capture.one_line import reason_of
from lightning_spectral.capture.shadow import BatchLoss, LossFunction
from lightning_spectral.functional.arguments import describe
from lightning_spectral.functional.estimate import Spectrum
from lightning_spectral.measurement.arguments import MAX_GROUPS, check_at_most, check_axis, check_choice, check_positive
from lightning_spectral.measurement.passes import Pass, Place
from lightning_spectral.measurement.pending import Pending
from lightning_spectral.measurement.schedule import TrainSchedule
from lightning_spectral.measurement.stopwatch import Stopwatch
from lightning_spectral.metrics.collectives import Together, world_size
from lightning_spectral.metrics.layout import Layout

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
    layout: Layout | None = None
    """Which ranks hold which data; None for each its own."""
    loss_fn: LossFunction | None = None
    """The loop's own loss, which is made where none is asked for by name; None for that of ``training_step``."""
    is_in_step: Callable[[], bool] = always
    """Whether what runs now is the step of a batch, as far as a loop can tell."""


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
    batch_dim: int | None = None
    samples: SampleCutter | None = None

    def __post_init__(self) -> None:
        check_positive(every_n_steps=self.every_n_steps, num_groups=self.num_groups)
        check_at_most(num_groups=(self.num_groups, MAX_GROUPS, "each takes a matrix of its own, and 4 are usual"))
        check_choice(stage=(self.stage, ("train", "validate")))
        index = self.dataloader_idx
        if isinstance(index, bool) or not isinstance(index, int) or not 0 <= index < 2**31:
            raise ValueError(f"dataloader_idx must be an int from 0, got {describe(index)}")
        axis = self.batch_dim
        check_axis(batch_dim=axis)
        if axis is not None and axis < 0:
            raise ValueError(f"batch_dim must be an int from 0, or None, got {axis}")
        if axis is not None and self.samples is not None:
            raise ValueError(f"samples cuts batches by itself: give either it or batch_dim={axis}")

    def measure(self, scene: Scene) -> "Measurement":
        """A measurement of its own; raises ValueError for what the module does not allow."""
        raise NotImplementedError

    def settings(self) -> dict[str, Any]:
        """For the record of a run, JSON-like."""
        return {"kind": self.kind, **asdict(self), "samples": path_of(self.samples)}


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
        device: Where the process group can reduce.

    What a subclass does in :meth:`make_report` and :meth:`agree_on_rows` succeeds on all ranks or on none: there alone
    it may call the collectives of :mod:`lightning_spectral.metrics`, and raise whatever comes up between them.
    """

    def __init__(self, request: Request, num_rows: int, stopwatch: Stopwatch, device: torch.device) -> None:
        self.stage = request.stage
        self.every_n_steps = request.every_n_steps
        self.loader = request.dataloader_idx
        self.kind = request.kind
        self.samples = Samples(request.batch_dim, request.samples)
        """Where the samples of batches are."""
        self.report: Report | None = None
        """The latest report."""
        self.pending: Pending[Report] | None = None
        """A report that is being made beside training."""
        self.schedule = TrainSchedule(request.every_n_steps, num_rows)
        self.last_validation: int | None = None
        """Step of the latest report from a validation run."""
        self.is_collecting = False
        """Whether the batch, or validation run, under way belongs to a report."""
        self.steps_collected = 0
        """Optimizer steps collected for the next report."""
        self.stopwatch = stopwatch
        self.together = Together(device)
        """For parts of a report that may fail without the others."""
        self.is_overlapped = False
        """Whether reports are begun when they are due, and ended later: see ``pending``."""
        self._is_renewed = False
        self._failure: str | None = None
        self.validation: Pass | None = None
        """The pass of the validation run under way; None if its length is not known, and its first samples are read."""
        self.reading = ""
        """Which rows of the latest validation run there are, in words."""
        self.rows: dict[str, str] = {}
        """What a row of each layer that has run is, in words."""
        self.batch_idx = 0
        self.batch_step: int | None = None
        """Steps of the optimizers before the training batch under way; None for one of validation."""
        """Of the batch under way, as ``training_step`` is told."""

    def open(self, batch: Any, step: int, has_right_stage: bool) -> None:
        """A batch begins; it is to be collected if ``is_collecting``. It may be of the other stage."""
        raise NotImplementedError

    def close(self) -> None:
        """The batch has ended."""
        raise NotImplementedError

    @property
    def place(self) -> Place | None:
        """Where the validation batch under way lies in its pass, if that is to be read spread over."""
        is_spread = self.stage == "validate" and self.is_collecting and self.validation is not None
        return self.validation.place(self.batch_idx) if is_spread and self.validation is not None else None

    def before_backward(self, scale: Callable[[], float], loss: Tensor | None = None) -> None:
        """A backward pass begins.

        Args:
            loss: What is differentiated, the batch's own loss times that factor.
            scale: Tells the factor between the gradients it gives and those of the batch's own loss; a GPU may have to
                be waited for.
        """

    def after_backward(self, is_last: bool) -> None:
        """A backward pass has ended, and maybe no other forward pass of this batch follows."""

    def agree_on_rows(self) -> float:
        """Rows of the first optimizer step over all ranks; a collective."""
        raise NotImplementedError

    def renew(self) -> None:
        """Look up again what is measured, in a module that may have changed: before the first batch of a report."""

    def trim(self, step: int) -> None:
        """Forget what a first step collected, now that it is known to lie before the window."""
        if not self.schedule.collects(step):
            self.reset()

    def read_weights(self, step: int) -> None:
        """The last validation batch has ended: what is to be read of weights is read now.

        Later another callback may take back the weights that it lent the model for validation.
        """

    def make_report(self, step: int) -> None:
        """Set ``report`` from what was collected, and :meth:`reset`."""
        raise NotImplementedError

    def missing_report(self, step: int, reason: str) -> Report:
        """A report in which everything is NaN for one reason."""
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

    def start_train_batch(self, batch: Any, step: int, batch_idx: int = 0) -> None:
        """A training batch begins."""
        was_collecting = self.is_collecting
        self.batch_idx, self.batch_step = batch_idx, step
        self.is_collecting = self.stage == "train" and self.schedule.collects(step)
        if self.is_collecting and not was_collecting:
            self._renew()
        self.open(batch, step, has_right_stage=self.stage == "train")

    def before_optimizer_step(self, optimizer: Any) -> None:
        """An optimizer is about to move its parameters by the gradients that are there now."""

    def end_train_batch(self, step: int) -> None:
        """A training batch has ended; makes the report if one is due."""
        self.close()
        moved = self.schedule.advance(step)
        if self.stage != "train" or moved == 0:
            return
        self.steps_collected += self.is_collecting
        if self.schedule.rows_per_step is None:
            with suppress(Exception):  # on all ranks, which try again after the next step
                self.schedule.rows_per_step = self.together.attempt(self.agree_on_rows)
                self.trim(step - moved)
        if self.schedule.due():
            self.end_pending()
            self._report(step)
        else:
            self._ask()

    def _ask(self) -> None:
        """End the report that is being made beside training if no rank would have to wait for it.

        Ranks ask each other after 1, 2, 4, 8, ... steps: it comes at most as late again, and few questions are asked.
        """
        if (pending := self.pending) is None:
            return
        pending.times_asked += 1
        number = pending.times_asked
        is_time = world_size() == 1 or number & (number - 1) == 0
        if is_time and self.together.all(pending.is_done):
            self.end_pending()

    def end_pending(self) -> None:
        """Have the report that is being made beside training, if there is one, now, and wait for it; a collective."""
        if (pending := self.pending) is None:
            return
        with self.stopwatch.running():
            try:
                self.report = self.together.attempt(pending.result)
            except Exception as error:  # on all ranks
                self.report = self.missing_report(pending.step, reason_of(error))
        self.pending = None

    def abandon(self) -> int | None:
        """Drop the report that is being made beside training; its step, if there was one."""
        pending, self.pending = self.pending, None
        if pending is None:
            return None
        pending.abandon()
        return pending.step

    def start_validation(self, step: int, always: bool = False, of: Pass | None = None) -> None:
        """A validation run begins, of a pass over the loader that is measured, None for one of unknown length.

        It is measured if it comes late enough after the last that was, or always.
        """
        self.validation = of
        self.reading = "the first of a pass whose length is not known" if of is None else of.in_words
        last = self.last_validation
        early = last is not None and step - last < self.every_n_steps
        self.is_collecting = self.stage == "validate" and (always or not early)
        self._is_renewed = False

    def start_validation_batch(self, batch: Any, step: int, batch_idx: int = 0) -> None:
        """A batch of the loader that is measured, in a validation run or in the sanity check, begins."""
        if self.is_collecting and not self._is_renewed:
            self._is_renewed = True
            self._renew()
        self.batch_idx, self.batch_step = batch_idx, None
        self.open(batch, step, has_right_stage=self.stage == "validate")

    def end_validation_batch(self, step: int, is_last: bool) -> None:
        """A validation batch has ended, maybe the last of the loader that is measured."""
        self.close()
        if is_last and self.is_collecting:
            try:
                self.read_weights(step)
            except Exception as error:  # for the report to say
                self._failure = reason_of(error)

    def end_validation(self, step: int) -> None:
        """A validation run has ended; makes its report."""
        if self.is_collecting:
            self.last_validation = step
            self._report(step)

    def _renew(self) -> None:
        with self.stopwatch.running(), suppress(Exception):  # of a model that cannot be looked at, what was known stays
            self.renew()

    def _report(self, step: int) -> None:
        before = self.state_dict()
        try:
            self.together.attempt(lambda: self._make_report(step))
        except Exception as error:  # on all ranks
            self.load_state_dict(before)  # what some ranks have learnt is not what all know
            missing = self.missing_report(step, reason_of(error))
            if self.pending is not None:  # begun on this rank
                self.abandon()
            if self.is_overlapped:
                # As others, it comes with a later event: one event has one report.
                self.pending = Pending(step, iter(()), lambda: missing, torch.device("cpu"))
            else:
                self.report = missing
            self.reset()

    def _make_report(self, step: int) -> None:
        failure, self._failure = self._failure, None
        if failure is not None:
            raise RuntimeError(failure)
        self.make_report(step)
