"""Keeps the record of a Trainer's run: counts tokens and seconds, and writes history and reports as they come."""

import os
import uuid
from collections.abc import Callable, Mapping
from math import isnan, nan
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor

from lightning_spectral.callbacks.run_about import RunNotes, agreed_notes, describe_run
from lightning_spectral.measurement import StagedMeasurement
from lightning_spectral.measurement.batch_counter import BatchCounter
from lightning_spectral.measurement.stopwatch import Stopwatch, TrainingClock
from lightning_spectral.runs.record import FOLDER, Record, Row


class RunRecorder:
    """Follows the events of a Trainer, which several callbacks forward and those of the first act.

    All ranks count, rank zero writes. Nothing that goes wrong in writing stops the run.

    Args:
        stopwatch: Counts the time that measuring takes, which is not training time.
    """

    def __init__(self, stopwatch: Stopwatch) -> None:
        self._stopwatch = stopwatch
        self._clock = TrainingClock(stopwatch)
        self._counter = BatchCounter(None, torch.device("cpu"))
        self._members: list[Any] = []
        self._state: dict[str, Any] | None = None
        self._record: Record | None = None
        self._series: dict[int, str] = {}
        self._written: dict[str, int] = {}
        self._is_training = self._is_validating = False

    @property
    def tokens(self) -> float:
        """Training tokens over all ranks when they last agreed on them; NaN outside training."""
        return self._counter.tokens if self._is_training else nan

    def agree(self) -> None:
        """Bring ``tokens`` up to date; a collective, which all ranks come to at the same points."""
        if self._is_training:
            self._counter.agree()

    def join(self, member: Any, state: dict[str, Any] | None) -> None:
        """Take part.

        Args:
            member: A callback, with its ``notes``.
            state: What :meth:`state_dict` gave when the checkpoint that is being resumed was written.

        Raises:
            ValueError: If it says something else of the run than another callback.
        """
        agreed_notes([other.notes for other in (*self._members, member)])
        self._members.append(member)
        self._state = self._state if state is None else state

    def leave(self, member: Any) -> None:
        """Take part no longer.

        Args:
            member: One that joined.
        """
        self._members = [other for other in self._members if other is not member]
        if not self._members:
            # A later fit of the same Trainer goes on from here.
            self._state = self.state_dict()
            self._clock.pause()
            self._is_training, self._record = False, None
            self._series.clear()

    def _leads(self, member: Any) -> bool:
        return bool(self._members) and self._members[0] is member

    def start(self, member: Any, trainer: Trainer, pl_module: LightningModule) -> None:
        """Training begins, or resumes.

        Args:
            member: Who forwards the event.
            trainer: The Trainer.
            pl_module: The module that is trained.
        """
        if not self._leads(member):
            return
        step = trainer.global_step
        before = self._state if step > 0 and self._state is not None else {}
        notes = agreed_notes([other.notes for other in self._members])
        device = torch.device("cpu") if pl_module.device.type == "mps" else pl_module.device
        self._counter = BatchCounter(notes.tokens_per_sample, device, before.get("tokens", 0.0))
        self._written.clear()
        self._is_training, self._is_validating = True, False
        folder = _folder(trainer)
        self._state = {"id": before.get("id", uuid.uuid4().hex), "folder": str(folder.absolute())}
        if trainer.is_global_zero and not trainer.fast_dev_run:  # type: ignore[attr-defined]
            source = Path(before["folder"]) if before else None
            with self._stopwatch.running():
                self._try(lambda: self._open(trainer, pl_module, notes, folder, source))
        self._clock.start(before.get("seconds", 0.0))

    def _open(
        self, trainer: Trainer, pl_module: LightningModule, notes: RunNotes, folder: Path, source: Path | None
    ) -> None:
        about = describe_run(trainer, pl_module, notes) | {"id": self._state["id"], "series": self._name_series()}  # type: ignore[index]
        step = trainer.global_step
        self._record = Record.begin(folder, about) if step == 0 else Record.resume(folder, about, source, step)

    def _name_series(self) -> dict[str, dict[str, Any]]:
        """Name the measurements that members take part in, and describe them."""
        series: dict[str, dict[str, Any]] = {}
        self._series.clear()
        for member in self._members:
            name = self._series.get(id(member.measurement))
            if name is None:
                name = f"{member.measures}-{member.stage}"
                taken = sum(other == name or other.startswith(f"{name}-") for other in series)
                name = self._series[id(member.measurement)] = f"{name}-{taken + 1}" if taken else name
            # Members of one measurement may differ in what they make of it: the first to speak of a thing counts.
            series[name] = {"kind": member.measures} | member.settings() | series.get(name, {})
        return series

    def end_train_batch(
        self, member: Any, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any
    ) -> None:
        """Count a batch.

        Args:
            member: Who forwards the event.
            trainer: The Trainer.
            pl_module: The module that is trained.
            outputs: What its training step returned, as Lightning hands it on.
            batch: The batch.

        Raises:
            ValueError: If the first batch does not hold what ``tokens_per_sample`` names.
        """
        if not self._leads(member):
            return
        loss = outputs.get("loss") if isinstance(outputs, Mapping) else outputs
        if isinstance(loss, Tensor) and loss.numel() == 1:
            # Lightning hands on the loss that it divided for the sake of accumulated gradients.
            divided_by = trainer.accumulate_grad_batches if pl_module.automatic_optimization else 1
            loss = loss.detach().reshape(()) * divided_by
        else:
            loss = None
        try:
            self._counter.add(batch, loss)
        except ValueError as error:
            if self._counter.num_batches == 1 and isinstance(self._counter.per_sample, str):
                raise
            member.warn(f"could not count the tokens of a batch: {error}")

    def start_validation(self, member: Any) -> None:
        """A validation run begins.

        Args:
            member: Who forwards the event.
        """
        if self._is_training and self._leads(member):
            self._clock.pause()
            self._is_validating = True

    def end_validation(self, member: Any, trainer: Trainer) -> None:
        """A validation run has ended, and its loss is known.

        Args:
            member: Who forwards the event.
            trainer: The Trainer.
        """
        if self._is_training and self._leads(member):
            # On all ranks: to read the metrics may be to compute them, together.
            self._add_row(trainer, _validation_loss(trainer.callback_metrics))
            self._is_validating = False
            self._clock.start()

    def end_training(self, member: Any, trainer: Trainer) -> None:
        """Training has ended: what came after the last line gets one of its own.

        Args:
            member: Who forwards the event.
            trainer: The Trainer.
        """
        if self._is_training and self._leads(member):
            self.agree()
            if self._counter.has_losses:
                self._add_row(trainer, nan)
            self._clock.pause()

    def add_report(self, trainer: Trainer, measurement: StagedMeasurement, report: Any) -> None:
        """Write a report, once, however many callbacks hand it in.

        Args:
            trainer: The Trainer.
            measurement: Whose report it is.
            report: The report.
        """
        series = self._series.get(id(measurement), f"{id(measurement)}")
        if not self._is_training or self._written.get(series) == report.step:
            return
        self.agree()
        checksum = nan
        if series not in self._written and measurement.stage == "validate":
            checksum = self._counter.sum_over_ranks(measurement.checksum)
        self._written[series] = report.step
        if (record := self._record) is not None:
            meta = {"step": report.step, "tokens": self.tokens, "seconds": self._clock.seconds}
            with self._stopwatch.running():
                arrays = report.arrays() | {key: np.asarray(value) for key, value in meta.items()}
                self._try(lambda: record.write_report(series, report.step, arrays))
                if not isnan(checksum):
                    settings = record.about["series"][series] | {"fingerprint": f"{int(checksum):x}"}
                    self._try(lambda: record.describe(series=record.about["series"] | {series: settings}))
        if not self._is_validating:  # the line of the validation run follows, with its loss
            self._add_row(trainer, nan)

    def _add_row(self, trainer: Trainer, val_loss: float) -> None:
        self.agree()
        train_loss = self._counter.take_loss()
        if (record := self._record) is None:
            return
        row = Row(trainer.global_step, self.tokens, self._clock.seconds, train_loss, val_loss)
        with self._stopwatch.running():
            self._try(lambda: record.append(row))
            if "batch_tokens" not in record.about and not isnan(self._counter.tokens_per_batch):
                batch_tokens = self._counter.tokens_per_batch * trainer.accumulate_grad_batches
                self._try(lambda: record.describe(batch_tokens=batch_tokens))

    def _try(self, write: Callable[[], None]) -> None:
        """A run is worth more than its record."""
        try:
            write()
        except Exception as error:
            if isinstance(error, ValueError):
                self._record = None  # somebody else's folder: leave it alone
            if self._members:
                self._members[0].warn(f"could not write the record of the run: {error}")

    def state_dict(self) -> dict[str, Any] | None:
        """What a resumed run needs to go on with its record.

        Returns:
            Plain numbers and strings; None before training. Tokens since the last line are this rank's times the
            number of ranks, which is exact where ranks have batches of one size.
        """
        if self._state is None or not self._is_training:
            return self._state
        return {**self._state, "tokens": self._counter.estimate, "seconds": self._clock.seconds}


def _folder(trainer: Trainer) -> Path:
    """The record's folder, the same on all ranks; a collective."""
    logger = trainer.loggers[0] if trainer.loggers else None
    if logger is None or getattr(logger, "log_dir", None) is not None:
        return Path(trainer.log_dir or trainer.default_root_dir) / FOLDER
    # Without a directory for each run, as Lightning's ModelCheckpoint does.
    run = logger.version if isinstance(logger.version, str) else f"version_{logger.version}"
    parent = os.path.join(logger.save_dir or trainer.default_root_dir, str(logger.name), run)
    return Path(trainer.strategy.broadcast(parent)) / FOLDER


def _validation_loss(metrics: Mapping[str, Tensor]) -> float:
    """The loss of a validation run: ``val_loss``, or the shortest key that speaks of validation and of a loss."""
    keys = [key for key in metrics if "val" in key.lower() and "loss" in key.lower()]
    key = "val_loss" if "val_loss" in keys else min(keys, key=lambda key: (len(key), key), default=None)
    return nan if key is None else float(metrics[key])
