"""The wiring that every callback on a measurement has in common: the Trainer's events in, reports out."""

import math
from collections.abc import Iterator
from typing import Any, Literal

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_warn

from lightning_spectral import tensorboard
from lightning_spectral.callbacks.arguments import check_choice, check_positive
from lightning_spectral.callbacks.display import Line, ReportDisplay
from lightning_spectral.callbacks.loss_scale import gradient_scale
from lightning_spectral.callbacks.run_about import RunNotes
from lightning_spectral.callbacks.run_recorder import RunRecorder
from lightning_spectral.callbacks.spectral_callback import SpectralCallback
from lightning_spectral.measurement import StagedMeasurement

DEFAULT_HEAD: tuple[int, int] = (1, 10)
"""Ranks of the head, as in *Spectral Lens* (arXiv 2605.05683)."""


class StagedCallback(SpectralCallback):
    """Forwards the Trainer's events to a measurement and logs what it makes of each report.

    A subclass joins or makes the measurement (:meth:`join`), gives it up (:meth:`leave`), and says what a report is
    worth (:meth:`measured`, :meth:`failures`).

    Args:
        every_n_steps: Optimizer steps between reports.
        stage: Where rows come from.
        num_groups: Groups of the jackknife.
        dataloader_idx: Which validation loader is read.
        prefix: Put before every key.
        notes: What the record of the run is to say.

    Raises:
        ValueError: For arguments out of range.
    """

    measures: str
    """Kind of the spectra in the measurement's reports."""

    def __init__(
        self,
        every_n_steps: int,
        stage: Literal["train", "validate"],
        num_groups: int,
        dataloader_idx: int,
        prefix: str,
        notes: RunNotes,
    ) -> None:
        super().__init__(prefix)
        check_positive(every_n_steps=every_n_steps, num_groups=num_groups)
        check_choice("stage", stage, ("train", "validate"))
        if isinstance(dataloader_idx, bool) or not isinstance(dataloader_idx, int) or dataloader_idx < 0:
            raise ValueError(f"dataloader_idx must be an int from 0, got {dataloader_idx!r}")
        self.stage = stage
        self.dataloader_idx = dataloader_idx
        self.notes = notes
        self.display: ReportDisplay | None = None
        """How reports are shown; None for a callback that only logs."""
        self._measurement: StagedMeasurement | None = None
        self._recorder: RunRecorder | None = None
        self._seen: Any = None

    @property
    def measurement(self) -> StagedMeasurement | None:
        """What this callback takes part in, during a run."""
        return self._measurement

    @property
    def tokens(self) -> float:
        """Training tokens at the latest report, over all ranks; NaN outside a run."""
        return math.nan if self._recorder is None else self._recorder.tokens

    def settings(self) -> dict[str, Any]:
        """How the measurement is made, for the record of the run.

        Returns:
            JSON-like values by name.
        """
        raise NotImplementedError

    def join(self, trainer: Trainer, pl_module: LightningModule) -> StagedMeasurement:
        """Open, and take part in a measurement.

        Args:
            trainer: The Trainer.
            pl_module: The module that is trained.

        Returns:
            The measurement.
        """
        raise NotImplementedError

    def leave(self, measurement: StagedMeasurement) -> None:
        """Take part no longer.

        Args:
            measurement: What :meth:`join` returned.
        """
        raise NotImplementedError

    def leads(self, measurement: StagedMeasurement) -> bool:
        """Whether this callback's events are the ones that act.

        Args:
            measurement: What :meth:`join` returned.

        Returns:
            True unless the measurement is shared and another was first.
        """
        return True

    def measured(self, report: Any) -> dict[str, float]:
        """What a report comes to.

        Args:
            report: The measurement's report; it may hold more than was asked for here.

        Returns:
            Values by key, without the prefix.
        """
        raise NotImplementedError

    def failures(self, report: Any) -> Iterator[tuple[str, str, bool]]:
        """What could not be measured.

        Args:
            report: The measurement's report.

        Returns:
            Name, reason, and whether the reason is one that other ranks may not know.
        """
        raise NotImplementedError

    def check_early(self) -> None:
        """Refuse settings that do not fit the model, after each batch, for what only shows then."""

    def lines(self, report: Any) -> dict[str, Line]:
        """The spectra to show, for a callback with a ``display`` of them.

        Args:
            report: The measurement's report.

        Returns:
            Spectra by name; none unless a subclass has some.
        """
        return {}

    def title(self, report: Any = None) -> str:
        """What is shown, for a callback with a ``display``.

        Args:
            report: One report, or None for all.

        Returns:
            A heading.
        """
        raise NotImplementedError

    def draw(self, writer: Any, report: Any) -> None:
        """Histograms at every report, the figure at the 1st, 2nd, 4th, 8th, ... and the last, the chart once.

        Args:
            writer: A SummaryWriter.
            report: The measurement's report.
        """
        if self.display is not None:
            self.display.draw(writer, self.prefix, report.step, self.lines(report))
            if self.display.is_milestone:
                self._draw_figure(writer, report)

    def _draw_figure(self, writer: Any, report: Any) -> None:
        if self.display is not None:
            self.display.draw_figure(writer, self.prefix, report.step, self.title(report), self.lines(report))

    def summary(self) -> dict[str, Any]:
        """The first report and the last, for the table.

        Returns:
            Plain numbers and strings.
        """
        return {} if self.display is None else self.display.state()

    def restore(self, summary: dict[str, Any]) -> None:
        """Take up what :meth:`summary` gave.

        Args:
            summary: Its result, or an empty one to begin anew.
        """
        if self.display is not None:
            self.display.restore(summary)

    def measurement_state(self) -> dict[str, Any]:
        """What the measurement needs to report at the same steps after a resume.

        Returns:
            Plain numbers.
        """
        return {} if self._measurement is None else self._measurement.state_dict()

    def run_state(self) -> dict[str, Any] | None:
        """What the record of the run needs to go on after a resume.

        Returns:
            Plain numbers and strings.
        """
        return None if self._recorder is None else self._recorder.state_dict()

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Find the layers and hook them: after ``configure_model``, before the first, perhaps compiled, call."""
        if self.stage == "validate" and not trainer.enable_validation:
            rank_zero_warn(
                f"{type(self).__name__}(stage='validate') will measure nothing: no validation will run. "
                "Give the Trainer validation data, or use stage='train'."
            )
        self.begin_anew()
        self._join(trainer, pl_module)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin, or resume, where the Trainer stands: only now is its step restored."""
        if self._measurement is not None and self._restored is not None:
            # Whoever has a state gives it: the first member may be new to this run.
            self._measurement.load_state_dict(self._restored["measurement"])
        if measurement := self._led():
            measurement.start_training(trainer.global_step)
        if self._recorder is not None:
            self._recorder.start(self, trainer, pl_module)
        # The sanity check clears what was there.
        self.set_unknown(trainer)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Open the hooks if this step belongs to a report."""
        if measurement := self._led():
            measurement.start_train_batch(batch, trainer.global_step)

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: torch.Tensor) -> None:
        """A backward pass begins."""
        if measurement := self._led():
            measurement.before_backward(lambda: gradient_scale(trainer, pl_module))

    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """A backward pass has ended; only under manual optimisation may another forward of the step follow."""
        if measurement := self._led():
            measurement.after_backward(is_last=pl_module.automatic_optimization)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Log a report if one is due."""
        if self._recorder is not None:
            self._recorder.end_train_batch(self, trainer, pl_module, outputs, batch)
        if measurement := self._led():
            measurement.end_train_batch(trainer.global_step)
        self._take_report(trainer)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin a validation run; without ``fit`` it is always measured."""
        if self._recorder is not None:
            self._recorder.start_validation(self)
        if self.stage != "validate" and self._measurement is None:
            return
        alone = trainer.state.fn == "validate"
        if alone and self._measurement is None:
            self._join(trainer, pl_module)
        num_loaders = len(trainer.num_val_batches)
        if self.stage == "validate" and self.dataloader_idx >= num_loaders:
            raise ValueError(
                f"dataloader_idx must be below {num_loaders}, the number of validation loaders, "
                f"got {self.dataloader_idx}"
            )
        if (measurement := self._led()) and not trainer.sanity_checking:
            measurement.start_validation(trainer.global_step, always=alone)

    def on_validation_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Begin a batch, if it is of the loader that is measured."""
        if self._recorder is not None and not trainer.sanity_checking:
            self._recorder.start_validation_batch(self, batch, dataloader_idx)
        if (measurement := self._led()) and dataloader_idx == self.dataloader_idx:
            measurement.start_validation_batch(batch, trainer.global_step)

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Close the hooks."""
        if measurement := self._led():
            measurement.end_validation_batch()
        self.check_early()

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log the report: before EarlyStopping and ModelCheckpoint look at what was measured."""
        if (measurement := self._led()) and not trainer.sanity_checking:
            measurement.end_validation(trainer.global_step)
        self._take_report(trainer)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Record the loss, which is known only now."""
        if self._recorder is not None:
            self._recorder.end_validation(self, trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Record what came after the last report."""
        if self._recorder is not None:
            self._recorder.end_training(self, trainer)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Draw the last report and print it, with the first, as a table."""
        if self.display is None:
            return
        if self._seen is not None and not self.display.is_milestone:
            self.show(trainer, self._seen, self._draw_figure)
        if trainer.is_global_zero:
            try:
                self.display.print(f"{self.prefix}{self.title()}")
            except Exception as error:  # a terminal that cannot print is not a reason to fail a finished run
                self.warn(f"could not print its table: {error!r}")

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Take the hooks off."""
        self._leave()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Take the hooks off: Lightning calls no ``teardown`` then."""
        self._leave()

    def _led(self) -> StagedMeasurement | None:
        """The measurement, if this callback's events are the ones that act."""
        measurement = self._measurement
        return measurement if measurement is not None and self.leads(measurement) else None

    def _join(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._measurement = self.join(trainer, pl_module)
        if self._session is not None:
            if self._restored is not None:  # before any clock runs that leaves this time out
                stopwatch = self._session.stopwatch
                stopwatch.seconds = max(stopwatch.seconds, self._restored["seconds"])
            self._recorder = self._session.shared(RunRecorder)
            self._recorder.join(self, self._run_before)
            self._run_before = None
        shows = not trainer.is_global_zero or tensorboard.writers(trainer.loggers) or not trainer.loggers
        if not shows and self._session is not None and self._session.is_first("a warning of missing histograms"):
            rank_zero_warn(
                "lightning-spectral draws histograms and figures into TensorBoard only, and no logger is one: "
                "add a TensorBoardLogger to see them. Scalars go to every logger."
            )

    def _leave(self) -> None:
        self.close()
        if self._recorder is not None:
            self._recorder.leave(self)
        self._recorder = None
        if self._measurement is not None:
            self.leave(self._measurement)
        self._measurement = self._seen = None

    def _take_report(self, trainer: Trainer) -> None:
        self.check_early()
        if self._measurement is None or self._session is None or self._measurement.report is self._seen:
            return
        report = self._seen = self._measurement.report
        assert report is not None
        if self._recorder is not None:
            self._recorder.agree()
        with self._session.stopwatch.running():
            values = self._values(report)
            self.show(trainer, report, self.draw)
        self.publish(trainer, values, report.step)
        if self._recorder is not None:
            self._recorder.add_report(trainer, self._measurement, report)

    def _values(self, report: Any) -> dict[str, float]:
        """The values of all keys; NaN for what failed, whatever the cause."""
        for name, reason, here in self.failures(report):
            self.num_failed += 1
            self.warn(f"at step {report.step}, {name}: NaN, because {reason}", here)
        values = dict.fromkeys(self.keys(), torch.nan)
        try:
            values |= self.measured(report)
        except Exception as error:  # whatever it is, the training run is worth more than the measurement
            self.num_failed += 1
            self.warn(f"at step {report.step}: NaN, because {error!r}")
        values[f"{self.kind}/failed"] = float(self.num_failed)
        return values
