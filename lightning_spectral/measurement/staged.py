"""When any measurement collects and reports, in training or in validation; what it collects is up to subclasses."""

from collections.abc import Callable
from typing import Any, Literal

from lightning_spectral.measurement.schedule import TrainSchedule
from lightning_spectral.measurement.stopwatch import Stopwatch

Stage = Literal["train", "validate"]


class StagedMeasurement:
    """Follows the Trainer's events and asks a subclass to collect rows and to report.

    Args:
        stage: Where rows come from.
        every_n_steps: Optimizer steps between reports; between measured validation runs at the least.
        num_rows: Rows wanted per report, over all ranks.
        stopwatch: Counts the time that measuring takes.
    """

    def __init__(self, stage: Stage, every_n_steps: int, num_rows: int, stopwatch: Stopwatch) -> None:
        self.stage = stage
        self.every_n_steps = every_n_steps
        self.report: Any = None
        """The latest report."""
        self.schedule = TrainSchedule(every_n_steps, num_rows)
        self.last_validation: int | None = None
        """Step of the latest report from a validation run."""
        self.is_collecting = False
        """Whether the batch, or validation run, under way belongs to a report."""
        self.steps_collected = 0
        """Optimizer steps collected for the next report."""
        self.stopwatch = stopwatch

    def open(self, batch: Any, step: int, has_right_stage: bool) -> None:
        """A batch begins; it is to be collected if ``is_collecting``.

        Args:
            batch: The batch.
            step: The trainer's ``global_step``.
            has_right_stage: Whether it is one of the stage's.
        """
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
        """A backward pass has ended.

        Args:
            is_last: Whether no other forward pass of this batch follows.
        """

    def agree_on_rows(self) -> float:
        """Rows of the first optimizer step over all ranks; a collective."""
        raise NotImplementedError

    def make_report(self, step: int) -> None:
        """Set ``report`` from what was collected, and :meth:`reset`.

        Args:
            step: The trainer's ``global_step``.
        """
        raise NotImplementedError

    def reset(self) -> None:
        """Forget what was collected; nothing slides from one report into the next."""
        self.steps_collected = 0
        self.is_collecting = False

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs to report at the same steps on as many rows; never what was collected.

        Returns:
            Plain numbers.
        """
        return {
            "rows_per_step": self.schedule.rows_per_step,
            "stride": self.schedule.stride,
            "last_validation": self.last_validation,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up what :meth:`state_dict` gave.

        Args:
            state: Its result.
        """
        self.schedule.rows_per_step = state["rows_per_step"]
        self.schedule.stride = state["stride"]
        self.last_validation = state["last_validation"]

    def start_training(self, step: int) -> None:
        """Training begins, or resumes.

        Args:
            step: The trainer's ``global_step``.
        """
        self.schedule.start(step)

    def start_train_batch(self, batch: Any, step: int) -> None:
        """A training batch begins.

        Args:
            batch: The batch.
            step: The trainer's ``global_step``.
        """
        self.is_collecting = self.stage == "train" and self.schedule.collects(step)
        self.open(batch, step, has_right_stage=self.stage == "train")

    def end_train_batch(self, step: int) -> None:
        """A training batch has ended; makes the report if one is due.

        Args:
            step: The trainer's ``global_step``.
        """
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
        """A validation run begins; it is measured if it comes late enough after the last that was.

        Args:
            step: The trainer's ``global_step``.
            always: Measure it however early it comes.
        """
        last = self.last_validation
        early = last is not None and step - last < self.every_n_steps
        self.is_collecting = self.stage == "validate" and (always or not early)

    def start_validation_batch(self, batch: Any, step: int) -> None:
        """A batch of the validation loader that is measured, in a run or in the sanity check, begins.

        Args:
            batch: The batch.
            step: The trainer's ``global_step``.
        """
        self.open(batch, step, has_right_stage=self.stage == "validate")

    def end_validation_batch(self) -> None:
        """A validation batch has ended."""
        self.close()

    def end_validation(self, step: int) -> None:
        """A validation run has ended; makes its report.

        Args:
            step: The trainer's ``global_step``.
        """
        if self.is_collecting:
            self.last_validation = step
            self.make_report(step)
