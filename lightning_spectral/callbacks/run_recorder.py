"""Keeps the record of a Trainer's run: counts tokens and seconds, and writes history and reports as they come."""

import re
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
from lightning_spectral.capture.family import describe_model, family_name
from lightning_spectral.measurement import StagedMeasurement
from lightning_spectral.measurement.batch_counter import BatchCounter
from lightning_spectral.measurement.fingerprint import Fingerprint
from lightning_spectral.measurement.stopwatch import Stopwatch, TrainingClock
from lightning_spectral.runs.record import FOLDER, Record, Row, find_record, read_about

_OF_VALIDATION = re.compile(r"(^|[/_.])(val|valid|validation)([/_.]|$)")


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
        self._written: dict[int, int] = {}
        self._fingerprint: Fingerprint | None = None
        self._device = torch.device("cpu")
        self._is_training = self._is_validating = False
        self.family = ""
        """Name that runs of this one's kind share; known from the start of training on."""

    @property
    def run_id(self) -> str | None:
        """What tells this run from all others; on rank zero, and after a resume on all."""
        return None if self._state is None else self._state["id"]

    def described(self, name: str) -> dict[str, Any]:
        """A table of what the record says of the run.

        Args:
            name: Its name.

        Returns:
            A copy; empty where there is none.
        """
        return {} if self._record is None else dict(self._record.about.get(name, {}))

    def describe(self, **facts: Any) -> None:
        """Add to what the record says of the run.

        Args:
            facts: JSON-like, by name.
        """
        if (record := self._record) is not None:
            with self._stopwatch.running():
                self._try(lambda: record.describe(**facts))

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
        if step > 0 and not before:
            member.warn(
                f"cannot tell how many tokens the first {step} steps took: the checkpoint is of a run without these "
                "callbacks. Tokens and seconds of this run are NaN"
            )
            before = {"tokens": nan, "seconds": nan}
        notes = agreed_notes([other.notes for other in self._members])
        self.family = notes.family or family_name(describe_model(pl_module))
        device = torch.device("cpu") if pl_module.device.type == "mps" else pl_module.device
        self._device = device
        self._counter = BatchCounter(notes.tokens_per_sample, device, before.get("tokens", 0.0), before.get("losses"))
        self._fingerprint = Fingerprint(trainer.global_rank, trainer.world_size)
        self._written.clear()
        self._is_training, self._is_validating = True, False
        self._name_series({})
        self._state = {"id": before.get("id", uuid.uuid4().hex), "folder": before.get("folder")}
        if trainer.is_global_zero and not trainer.fast_dev_run:  # type: ignore[attr-defined]
            with self._stopwatch.running():
                self._try(lambda: self._open(trainer, pl_module, notes))
        self._clock.start(before.get("seconds", 0.0))

    def _open(self, trainer: Trainer, pl_module: LightningModule, notes: RunNotes) -> None:
        assert self._state is not None
        run_id, before = self._state["id"], self._state["folder"]
        folder, source = _folder(trainer).absolute(), None if before is None else Path(before)
        self._state["folder"] = str(folder)
        known = find_record(run_id, folder, source) if trainer.global_step > 0 else None
        series = self._name_series({} if known is None else read_about(known)["series"])
        about = describe_run(trainer, pl_module, notes) | {"id": run_id, "series": series}
        self._record = (
            Record.begin(folder, about)
            if trainer.global_step == 0
            else Record.resume(folder, about, source, trainer.global_step)
        )

    def _name_series(self, known: Mapping[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
        """Name the measurements that members take part in, and describe them.

        Args:
            known: Series of the record so far: one of the same settings goes on, in whatever order callbacks come.
        """
        series: dict[str, dict[str, Any]] = {}
        self._series.clear()
        for member in self._members:
            settings = {"kind": member.measures} | member.settings()
            name = self._series.get(id(member.measurement))
            if name is None:
                start = f"{member.measures}-{member.stage}"
                names = [start, *(f"{start}-{number}" for number in range(2, len(self._members) + len(known) + 2))]
                same = [one for one in names if one in known and one not in series and _is_same(known[one], settings)]
                free = [one for one in names if one not in known and one not in series]
                name = self._series[id(member.measurement)] = (same or free)[0]
            # Members of one measurement may differ in what they make of it: the first to speak of a thing counts.
            series[name] = settings | series.get(name, {})
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
        except Exception as error:  # whatever a batch may be made of
            is_bad_input = isinstance(error, ValueError) and isinstance(self._counter.per_sample, str)
            if self._counter.num_batches == 1 and is_bad_input:
                raise
            member.warn(f"could not count the tokens of a batch: {error}", on_this_rank=True)

    def start_validation(self, member: Any) -> None:
        """A validation run begins.

        Args:
            member: Who forwards the event.
        """
        if self._is_training and self._leads(member):
            self._clock.pause()
            self._is_validating = True

    def start_validation_batch(self, member: Any, batch: Any, loader: int) -> None:
        """A validation batch begins.

        Args:
            member: Who forwards the event.
            batch: The batch.
            loader: Index of the loader it comes from.
        """
        if self._is_validating and self._leads(member) and self._fingerprint is not None:
            with self._stopwatch.running():
                self._fingerprint.add(batch, loader)

    def end_validation(self, member: Any, trainer: Trainer) -> None:
        """A validation run has ended, and its loss is known.

        Args:
            member: Who forwards the event.
            trainer: The Trainer.
        """
        if self._is_training and self._leads(member):
            # On all ranks: to read the metrics may be to compute them, together.
            key = _validation_loss(trainer.callback_metrics, member.dataloader_idx)
            self._add_row(trainer, nan if key is None else float(trainer.callback_metrics[key]))
            if self._fingerprint is not None:
                data = self._fingerprint.agree(len(trainer.num_val_batches), self._device)
                self._fingerprint = None
                self.describe(validation_data=data, val_loss=key)
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
        if not self._is_training or self._written.get(id(measurement)) == report.step:
            return
        self.agree()
        self._written[id(measurement)] = report.step
        if (record := self._record) is not None:
            meta = {"step": report.step, "tokens": self.tokens, "seconds": self._clock.seconds}
            series = self._series[id(measurement)]
            with self._stopwatch.running():
                self._try(
                    lambda: record.write_report(
                        series, report.step, report.arrays() | {key: np.asarray(value) for key, value in meta.items()}
                    )
                )
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
        counted = {"tokens": self._counter.estimate, "losses": self._counter.losses}
        return {**self._state, **counted, "seconds": self._clock.seconds}


def _folder(trainer: Trainer) -> Path:
    """The record's folder, on rank zero."""
    if not trainer.loggers:
        return Path(trainer.default_root_dir) / FOLDER
    logger = trainer.loggers[0]
    if (log_dir := getattr(logger, "log_dir", None)) is not None:
        return Path(log_dir) / FOLDER
    # Without a directory for each run, as Lightning's ModelCheckpoint does.
    run = logger.version if isinstance(logger.version, str) else f"version_{logger.version}"
    return Path(logger.save_dir or trainer.default_root_dir) / str(logger.name) / run / FOLDER


def _validation_loss(metrics: Mapping[str, Tensor], loader: int) -> str | None:
    """Key of the loss of a validation run: ``val_loss``, or another of validation, of the loader that is measured."""
    keys = [key for key in metrics if _OF_VALIDATION.search(key.lower()) and "loss" in key.lower()]
    of_loader = [key for key in keys if key.endswith(f"/dataloader_idx_{loader}")] or keys
    usual = [key for key in of_loader if re.match(r"(val|valid|validation)[_/.]loss($|/dataloader)", key.lower())]
    return min(usual or of_loader, key=lambda key: (len(key), key), default=None)


def _is_same(known: Mapping[str, Any], settings: Mapping[str, Any]) -> bool:
    """Whether two descriptions are of one measurement, as JSON would have it."""
    unlike = {"layers", "parameters", "head", "tail", "rank"}
    return all(known.get(name) == value for name, value in settings.items() if name not in unlike)
