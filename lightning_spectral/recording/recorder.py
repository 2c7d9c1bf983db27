"""Keeps the record of a run: counts tokens and seconds, and writes history and reports as they come."""

import uuid
from collections.abc import Callable, Mapping, Sequence
from math import inf, isclose, isnan, nan
from pathlib import Path
from typing import Any, NamedTuple

import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch import Tensor

from lightning_spectral.capture.batch import Samples
from lightning_spectral.measurement.measurement import Measurement, Report
from lightning_spectral.measurement.passes import Pass
from lightning_spectral.measurement.stopwatch import Stopwatch, TrainingClock
from lightning_spectral.metrics.collectives import Together, world_size
from lightning_spectral.metrics.layout import Layout
from lightning_spectral.recording.about import Notes
from lightning_spectral.recording.counter import BatchCounter
from lightning_spectral.recording.fingerprint import Fingerprint
from lightning_spectral.recording.place import Place
from lightning_spectral.recording.validation_loss import loss_candidates, mean_over_ranks, validation_loss
from lightning_spectral.runs.kinds import KINDS, Series
from lightning_spectral.runs.record import Record, Row, read_about
from lightning_spectral.runs.validation_data import ValidationData
from lightning_spectral.warner import Warner

BATCH_MOVES = 0.01
"""Share by which the mean batch of a step must have moved to be said again."""


class Start(NamedTuple):
    """What a recorder must know of a run that begins, or is resumed."""

    step: int
    family: str
    describe: Callable[[], dict[str, Any]]
    """Makes the description of the run; on the rank that writes."""
    folder: Callable[[], Path] | None
    """The record's own folder; None on ranks, and in runs, that write none."""
    settings: Sequence[tuple[Measurement, Mapping[str, Any]]]
    """How each member measures, in the order in which they joined: of one measurement the first to speak counts."""
    layout: Layout
    """Which ranks hold which data."""
    device: torch.device
    """Where the process group can reduce."""
    monitored: Sequence[str] = ()
    """Metrics that others watch for the least, as EarlyStopping and ModelCheckpoint do, ours not among them."""


class StepSize(NamedTuple):
    """What an optimizer step takes on average, over all ranks; NaN where it is not known."""

    samples: float
    tokens: float

    @property
    def tokens_per_sample(self) -> float:
        """Mean over the samples so far."""
        return self.tokens / self.samples if self.samples > 0 else nan


class RunRecorder:
    """Follows the events of one loop. All ranks count, one writes; nothing that goes wrong in writing stops the run.

    Args:
        stopwatch: Counts the time that measuring takes, which is not training time.
    """

    def __init__(self, stopwatch: Stopwatch) -> None:
        self._stopwatch = stopwatch
        self._clock = TrainingClock(stopwatch)
        self._counter = BatchCounter(None, torch.device("cpu"))
        self._warner = Warner("RunRecord")
        self._notes: Notes | None = None
        self._state: dict[str, Any] | None = None
        self._record: Record | None = None
        self._opening: Callable[[], None] | None = None
        self._place: Place | None = None
        self._num_missing = 0
        self._late: dict[str, Any] = {}
        self._series: dict[Measurement, Series] = {}
        self._begun: dict[Measurement, tuple[float, float]] = {}
        self._tokens_of: dict[Measurement, float] = {}
        self._fingerprint: Fingerprint | None = None
        self._has_told_data = True
        self._passes: Sequence[Pass | None] = ()
        self._validated = 0.0
        self._device = torch.device("cpu")
        self._together = Together(self._device)
        self._is_agreed = True
        self._step = 0
        self._updates = self._batches_of_updates = 0
        self._monitored: Sequence[str] = ()
        self._is_training = self._is_validating = False
        self.family = ""
        """Name that runs of this one's kind share; known from the start of training on."""
        self.batch_tokens = nan
        """Training tokens of an optimizer step over all ranks, as the record says it; NaN until its first line."""
        self.validation_data: ValidationData | None = None
        """The same on all ranks; None until the last batch of the run's first validation, which a resumed run had."""

    @property
    def notes(self) -> Notes:
        """What the user says of the run."""
        return Notes() if self._notes is None else self._notes

    def note(self, notes: Notes) -> None:
        """Hear what the user says of the run; once.

        Raises:
            ValueError: If it was said before.
        """
        if self._notes is not None:
            raise ValueError("RunRecord must be given once to a Trainer, got two: say all in one")
        self._notes = notes

    @property
    def run_id(self) -> str | None:
        """What tells this run from all others; on the rank that writes, and after a resume on all."""
        return None if self._state is None else self._state["id"]

    @property
    def folder(self) -> Path | None:
        """The record's own folder, where one is written."""
        return None if self._record is None else self._record.folder

    @property
    def is_training(self) -> bool:
        """Whether a training run is under way, of which tokens are counted."""
        return self._is_training

    def described(self, name: str) -> dict[str, Any]:
        """A copy of a table of what the record says of the run; empty where there is none of that name."""
        about = self._late if self._record is None else self._record.about
        return dict(about.get(name, {}))

    def describe(self, **facts: Any) -> None:
        """Add JSON-like facts to what the record says of the run."""
        if self._record is None and self._opening is not None:
            self._late |= facts
        self._write(lambda record: record.amend(**facts))

    def add_forecast(self, forecast: Mapping[str, Any]) -> None:
        """Add what a forecaster says, JSON-like, with its ``step``, to what it said before."""
        self._write(lambda record: record.append_forecast(forecast))

    @property
    def tokens(self) -> float:
        """Training tokens over all ranks when they last agreed on them; NaN outside training."""
        return self._counter.tokens if self._is_training and self._is_agreed else nan

    @property
    def step_size(self) -> StepSize:
        """Of the batches that ranks have agreed on."""
        if not self._is_training:
            return StepSize(nan, nan)
        per_batch = StepSize(self._counter.samples_per_batch, self._counter.tokens_per_batch)
        # Counted, for what a Trainer says of accumulation holds for whole windows of it, and not where a module steps.
        batches = self._batches_of_updates / self._updates if self._updates else nan
        return StepSize(*(size * batches for size in per_batch))

    def agree(self) -> None:
        """Bring ``tokens`` up to date; a collective, which all ranks come to at the same points."""
        if self._is_training and self._counter.is_behind:
            try:
                self._together.attempt(self._counter.agree)
                self._is_agreed = True
            except Exception as error:  # on all ranks; the next time counts what this one did not
                self._is_agreed = False
                self._warner.warn(f"does not know the tokens at a report: {error}")

    def start(self, start: Start) -> None:
        """Training begins, or resumes."""
        before = self._state if start.step > 0 and self._state is not None else {}
        if start.step > 0 and not before:
            self._warner.warn(
                f"cannot tell how many tokens the first {start.step} steps took: the checkpoint is of a run without "
                "these callbacks. Tokens and seconds of this run are NaN"
            )
            before = {"tokens": nan, "seconds": nan}
        self.family, self._device, self._step = start.family, start.device, start.step
        self._updates = self._batches_of_updates = 0
        self._together, self._is_agreed = Together(start.device), True
        self._monitored = start.monitored
        tokens, losses = before.get("tokens", 0.0), before.get("losses")
        samples = next((m.samples for m, _ in start.settings if m.samples.is_said), Samples())
        self._counter = BatchCounter(self.notes.tokens_per_sample, start.device, tokens, losses, samples, start.layout)
        self._fingerprint = Fingerprint(start.layout.rank, start.layout.world, samples, start.layout.counts)
        self._has_told_data = False
        self.validation_data = ValidationData.of(before) if "validation_data" in before else None
        self._is_training, self._is_validating = True, False
        self.batch_tokens = before.get("batch_tokens", nan)
        self._name_series(start, {})
        self._state = {"id": before.get("id", uuid.uuid4().hex), "folder": before.get("folder")}
        self._late = {}
        if start.folder is not None and self.notes.enabled:
            folder = start.folder
            self._opening = lambda: self._open(start, folder)
            self._write(lambda record: None)
        self._clock.start(before.get("seconds", 0.0))

    def _open(self, start: Start, folder: Callable[[], Path]) -> None:
        assert self._state is not None
        if self._place is None:
            before = self._state["folder"]
            source = None if before is None else Path(before)
            self._place = Place.take(folder().absolute(), self._state["id"], source, start.step)
        place = self._place
        if place.beside is not None:
            self._warner.warn(place.beside)
        known = {} if place.known is None else read_about(place.known)["series"]
        series = self._name_series(start, known)
        series = {name: _continued(known.get(name), settings) for name, settings in series.items()}
        about = start.describe() | {"id": self._state["id"], "series": series}
        if start.step == 0:
            record = Record.begin(place.folder, about)
        else:
            record = Record.resume(place.folder, about, place.known, start.step)
        if (lost := place.why_anew(record, start.step)) is not None:
            self._warner.warn(lost)
        elif record.aside is not None:
            rank_zero_info(f"RunRecord keeps in {record.aside} what {place.folder} held beyond step {start.step}")
        self._state["folder"] = str(place.folder)
        self._record, self._opening = record, None
        if self._late:
            record.describe(**self._late)

    def _name_series(self, start: Start, known: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
        """Name the measurements, and describe them: a known series of the same settings goes on, whatever the order."""
        series: dict[str, dict[str, Any]] = {}
        self._series.clear()
        for measurement, settings in start.settings:
            name = self._series.get(measurement)
            if name is None:
                most = len(start.settings) + len(known) + 1
                names = [Series(measurement.kind, measurement.stage, number) for number in range(1, most + 1)]
                same = [n for n in names if n.text not in series and _is_same(known.get(n.text), settings)]
                free = [n for n in names if n.text not in known and n.text not in series]
                name = self._series[measurement] = (same or free)[0]
            series[name.text] = {**settings, **series.get(name.text, {})}
        return series

    def start_train_batch(self, batch: Any) -> None:
        """Count what is in a batch, as it is before the step.

        Raises:
            ValueError: If the first does not hold what ``tokens_per_sample`` names.
        """
        if not self._is_training:
            return
        try:
            self._counter.look(batch)
        except Exception as error:  # whatever a batch may be made of
            is_bad_input = isinstance(error, ValueError) and isinstance(self._counter.per_sample, str)
            if self._counter.num_batches == 0 and is_bad_input:
                raise
            self._warner.warn(f"could not count the tokens of a batch: {error}", on_this_rank=True)

    def end_train_batch(self, loss: Tensor | None, step: int) -> None:
        """Count a batch, after which optimizers have stepped so often in all."""
        if not self._is_training:
            return
        if step != self._step:  # once, however many optimizers there are
            self._step = step
            self._updates += 1
            self._batches_of_updates = self._counter.num_batches + 1
        self._counter.add(loss)

    def start_validation(self, passes: Sequence[Pass | None] = ()) -> None:
        """A validation run begins, of these passes over its loaders."""
        if self._is_training:
            self._passes = passes
            self._validated = 0.0
            self._clock.pause()
            self._is_validating = True

    def start_validation_batch(self, batch: Any, loader: int) -> None:
        """A validation batch begins."""
        if self._is_validating and world_size() > 1 and loader == self._loader:
            try:
                self._validated += self._counter.samples_of(batch)
            except Exception:  # whatever a batch may be made of
                self._validated = nan
        if self._is_validating and self._fingerprint is not None:
            with self._stopwatch.running():
                self._fingerprint.add(batch, loader)

    def end_validation_rows(self) -> None:
        """The last batch of a validation run has ended: which data these are is known before a report is looked at."""
        if not self._is_validating or (fingerprint := self._fingerprint) is None:
            return
        try:
            found = self._together.attempt(lambda: fingerprint.agree(len(self._passes), self._device))
        except Exception as error:  # on all ranks, and tried again after the next validation
            self._warner.warn(f"does not know which validation data these are: {error}")
            return
        self._fingerprint = None
        passes = enumerate(self._passes)
        known = {str(loader): of.of_all_ranks for loader, of in passes if of and of.of_all_ranks}
        self.validation_data = ValidationData(found, known)

    def end_validation(self, step: int, metrics: Mapping[str, Tensor]) -> None:
        """A validation run has ended, and its loss is known."""
        if not self._is_training:
            return
        # On all ranks: to read the metrics may be to compute them, together.
        key = self._loss_key(metrics)
        loss = self.over_ranks(key, None if key is None else float(metrics[key]))
        self._add_row(step, nan if loss is None else inf if isnan(loss) else loss)  # NaN says that there was none
        if self._fingerprint is None and self.validation_data is not None and not self._has_told_data:
            self._has_told_data = True
            self.describe(**self.validation_data.as_facts(), val_loss=key)
        self._is_validating = False
        self._clock.start()

    def over_ranks(self, key: str | None, loss: float | None) -> float | None:
        """A loss of the validation run that ends, over all ranks' samples, where each may have logged its own.

        A collective, which all ranks come to at the same points.

        Args:
            key: Its name.
            loss: What this rank has logged; None for nothing.

        Returns:
            None where no rank has one, or they could not tell each other.
        """
        try:
            found, is_mean = mean_over_ranks(loss, self._validated, self._together, self._device)
        except Exception as error:  # on all ranks
            self._warner.warn(f"does not know the validation loss of all ranks: {error}")
            return None
        if is_mean:
            self._warner.warn(
                f"takes the mean of {key or 'the validation loss'} over all ranks, each of which has logged its own: "
                "sync_dist=True gives it to all callbacks"
            )
        return found

    @property
    def _loader(self) -> int:
        """Whose loss is recorded."""
        return next((measurement.loader for measurement in self._series), 0)

    def _loss_key(self, metrics: Mapping[str, Tensor]) -> str | None:
        key = self.notes.loss
        if key is not None and key not in metrics:
            known = ", ".join(name for name in metrics if "loss" in name.lower()) or "no losses"
            self._warner.warn(f"finds no loss={key!r} among what is logged: there are {known}")
            return None
        if key is None and (key := validation_loss(metrics, self._loader, self._monitored)) is None:
            candidates = loss_candidates(metrics)
            if candidates:
                self._warner.warn(
                    f"does not know which of {', '.join(candidates)} is the validation loss, and records none: "
                    f"name it with RunRecord(loss={candidates[0]!r})"
                )
        return key

    def end_training(self, step: int) -> None:
        """Training has ended: what came after the last line gets one of its own."""
        if self._is_training:
            self.agree()
            if self._counter.has_losses:
                self._add_row(step, nan)
            self._clock.pause()
            self._leave_place()

    def tokens_at_report(self, measurement: Measurement) -> float:
        """Training tokens over all ranks at the latest report of a measurement; NaN outside training."""
        return self._tokens_of.get(measurement, nan) if self._is_training else nan

    def begin_report(self, measurement: Measurement, step: int) -> None:
        """A report is being made of a step, and :meth:`add_report` will come later: count what it is counted at."""
        if not self._is_training:
            return
        self.agree()
        self._begun[measurement] = self.tokens, self._clock.seconds
        self._add_row(step, nan)

    def add_report(self, measurement: Measurement, report: Report) -> None:
        """Write a report."""
        if not self._is_training:
            return
        self.agree()
        begun = self._begun.pop(measurement, None)
        tokens, seconds = (self.tokens, self._clock.seconds) if begun is None else begun
        self._tokens_of[measurement] = tokens
        meta = {"step": report.step, "tokens": tokens, "seconds": seconds}
        series = self._series[measurement].text
        self._write(lambda record: record.write_report(series, report.step, self._arrays(report) | meta))
        self._note_rows(series, measurement.rows)
        if not self._is_validating and begun is None:  # the line of the validation run follows, with its loss
            self._add_row(report.step, nan)

    def _note_rows(self, series: str, rows: Mapping[str, str]) -> None:
        """Say among the settings of a series what its rows were, which only the first batches have shown."""
        every = self.described("series")
        if series in every and rows and every[series].get("rows") != dict(rows):
            self.describe(series={**every, series: {**every[series], "rows": dict(rows)}})

    def _arrays(self, report: Report) -> dict[str, Any]:
        arrays = {
            f"{kind}/{name}/{field}": array
            for kind, spectra in report.spectra.items()
            for name, spectrum in spectra.items()
            for field, array in spectrum.arrays(KINDS[kind].values, KINDS[kind].count).items()
            if self.notes.vectors or not field.endswith("vectors")
        }
        return arrays | report.arrays_beside()

    def _add_row(self, step: int, val_loss: float) -> None:
        self.agree()
        train_loss = self._counter.take_loss()
        row = Row(step, self.tokens, self._clock.seconds, train_loss, val_loss)
        self._write(lambda record: record.append(row))
        self._describe_batch()

    def _describe_batch(self) -> None:
        """Say how large a step's batch is: a mean, which is said again where it has moved."""
        size = self.step_size
        if isnan(size.tokens):
            return
        is_new = self._record is not None and "batch_tokens" not in self._record.about
        if not is_new and isclose(size.tokens, self.batch_tokens, rel_tol=BATCH_MOVES):
            return
        self.batch_tokens = size.tokens
        samples = {"batch_samples": size.samples} if size.samples > 0 else {}  # not where it is unknown
        self.describe(batch_tokens=size.tokens, **samples)

    def _write(self, write: Callable[[Record], None]) -> None:
        """Write into the record, and first begin it where there was no room before; a run is worth more than either."""
        if self._record is None and self._opening is None:
            return
        with self._stopwatch.running():
            try:
                if self._opening is not None:
                    self._opening()
                assert self._record is not None
                write(self._record)
            except Exception as error:
                self._num_missing += 1
                if isinstance(error, ValueError):  # somebody else's folder: leave it alone
                    self._record = self._opening = None
                    self._leave_place()
                reason = (error.strerror if isinstance(error, OSError) else None) or error
                self._warner.warn(f"could not write the record of the run: {reason}")
            else:
                if self._num_missing:
                    rank_zero_info(f"RunRecord can write again; it could not {self._num_missing} times")
                self._num_missing = 0

    def _leave_place(self) -> None:
        if self._place is not None:
            self._place.leave()
        self._place = None

    def end(self) -> None:
        """The last member has left: a later run of the same loop goes on from here."""
        self._state = self.state_dict()
        self._clock.pause()
        self._is_training, self._record, self._opening, self._notes = False, None, None, None
        self._num_missing = 0
        self._leave_place()
        self._series.clear()
        self._begun.clear()
        self._tokens_of.clear()
        self._warner.clear()

    def state_dict(self) -> dict[str, Any] | None:
        """What a resumed run needs to go on with its record: plain numbers and strings; None before training.

        Tokens since the last line are this rank's times the number of ranks, which is exact where ranks have batches of
        one size.
        """
        if self._state is None or not self._is_training:
            return self._state
        counted = {"tokens": self._counter.estimate, "losses": self._counter.losses, "batch_tokens": self.batch_tokens}
        data = {} if self.validation_data is None else self.validation_data.as_facts()
        return {**self._state, **counted, **data, "seconds": self._clock.seconds}

    def load_state_dict(self, state: dict[str, Any] | None) -> None:
        """Take up what :meth:`state_dict` gave when the checkpoint that is being resumed was written."""
        self._state = self._state if state is None else state


def _is_same(known: Mapping[str, Any] | None, settings: Mapping[str, Any]) -> bool:
    """Whether two descriptions are of one measurement, as JSON would have it."""
    unlike = {"layers", "parameters", "head", "tail", "rank"}
    return known is not None and all(known.get(name) == value for name, value in settings.items() if name not in unlike)


def _continued(known: Mapping[str, Any] | None, settings: dict[str, Any]) -> dict[str, Any]:
    """Settings of a series that goes on, perhaps with other layers: it holds those of before as well, and says so."""
    for kind in ("layers", "parameters"):
        names, before = settings.get(kind), None if known is None else known.get(kind)
        if known is None or not isinstance(names, list) or not isinstance(before, list):
            continue
        earlier = list(known.get(f"{kind}_before", []))
        if before != names:
            settings = {**settings, kind: [*names, *(name for name in before if name not in names)]}
            earlier.append(before)
        if earlier:
            settings = {**settings, f"{kind}_before": earlier}
    return settings
