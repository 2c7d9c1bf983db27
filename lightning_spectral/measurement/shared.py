"""One measurement of activations, shared by all callbacks that ask for the same."""

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lightning_spectral.capture.activations import ActivationReader
from lightning_spectral.capture.batch import num_samples, token_mask
from lightning_spectral.functional.moments import Moments
from lightning_spectral.measurement.collector import Collector
from lightning_spectral.measurement.report import LayerSpectrum, Report, decompose
from lightning_spectral.measurement.schedule import TrainSchedule
from lightning_spectral.measurement.stopwatch import Stopwatch

Stage = Literal["train", "validate"]

DTYPES = {"float32": torch.float32, "float64": torch.float64}

NEVER_RAN = "it never ran, or had run compiled before it was watched"


@dataclass(frozen=True)
class Request:
    """What is measured, and when; callbacks with equal requests share one measurement of the union of their layers."""

    stage: Stage
    every_n_steps: int
    num_tokens: int
    num_groups: int
    normalize: bool
    dtype: Literal["float32", "float64"]
    mask: str | None = None
    dataloader_idx: int = 0


class Measurement:
    """Collects rows while the model runs and turns them into a report at each due step.

    Members join before the first batch and forward the Trainer's events; only those of the first member act, so that an
    event forwarded by several happens once. The report is there for all when the first member's call returns.

    Args:
        request: What to measure.
        device: Where the sums are kept; the CPU is used where the device has no float64.
        stopwatch: Counts the time that measuring takes.
    """

    def __init__(self, request: Request, device: torch.device, stopwatch: Stopwatch) -> None:
        self.request = request
        self.report: Report | None = None
        """The latest report."""
        self.widths: dict[str, int] = {}
        """Width of each layer that has run; known after the first batch, of training or of the sanity check."""
        self.schedule = TrainSchedule(request.every_n_steps, request.num_tokens)
        self.last_validation: int | None = None
        """Step of the latest report from a validation run."""
        self._members: list[Any] = []
        self._num_vectors = 0
        self._collecting = False
        self._has_seen_mask = False
        self._steps_collected = 0
        self._stopwatch = stopwatch
        self._reader = ActivationReader(self._read)
        self._collector = Collector(
            self._reader.names,
            request.num_tokens,
            request.num_groups,
            request.normalize,
            DTYPES[request.dtype],
            torch.device("cpu") if device.type == "mps" else device,
        )

    def join(self, member: Any, layers: dict[str, nn.Module], num_vectors: int = 0) -> None:
        """Take part.

        Args:
            member: Whoever forwards events.
            layers: Modules to watch, by name; those already watched are not hooked again.
            num_vectors: How many leading eigenvectors the member needs in each report, 0 for none.
        """
        self._members.append(member)
        self._num_vectors = max(self._num_vectors, num_vectors)
        for name, layer in layers.items():
            if name not in self._reader.names:
                self._reader.add(name, layer)

    def leave(self, member: Any) -> None:
        """Take part no longer; with the last member all hooks go.

        Args:
            member: One that joined.
        """
        self._members = [other for other in self._members if other is not member]
        if not self._members:
            self._reader.remove()
            # The reader's way back to here is a cycle: the buffers should not wait for the garbage collector.
            self._collector.release()

    @property
    def has_members(self) -> bool:
        """Whether anyone takes part still."""
        return bool(self._members)

    def is_led_by(self, member: Any) -> bool:
        """Whether this member's events are the ones that act.

        Args:
            member: One that joined.

        Returns:
            True for the first that joined and has not left.
        """
        return self._members[0] is member

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs to report at the same steps on as many rows; never the sums.

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

        Raises:
            ValueError: If the batch does not hold the mask.
        """
        self._collecting = self.request.stage == "train" and self.schedule.collects(step)
        self._open(batch, has_mask=self.request.stage == "train")

    def pause(self) -> None:
        """Stop reading while a backward pass runs: activation checkpointing repeats forwards in it."""
        self._reader.is_open = False

    def resume(self) -> None:
        """Read on after a backward pass."""
        self._reader.is_open = self._collecting

    def end_train_batch(self, step: int) -> None:
        """A training batch has ended; makes the report if one is due.

        Args:
            step: The trainer's ``global_step``.
        """
        self._reader.is_open = False
        moved = self.schedule.advance(step)
        if self.request.stage != "train" or moved == 0:
            return
        self._steps_collected += self._collecting
        if self.schedule.rows_per_step is None:
            self.schedule.rows_per_step = self._collector.agree()
            if not self.schedule.collects(step - moved):
                self._reset()
        if self.schedule.due():
            self._make_report(step)

    def start_validation(self, step: int, always: bool = False) -> None:
        """A validation run begins; it is measured if it comes late enough after the last that was.

        Args:
            step: The trainer's ``global_step``.
            always: Measure it however early it comes.
        """
        last = self.last_validation
        early = last is not None and step - last < self.request.every_n_steps
        self._collecting = self.request.stage == "validate" and (always or not early)

    def start_validation_batch(self, batch: Any, dataloader_idx: int) -> None:
        """A validation batch, of a run or of the sanity check, begins.

        Args:
            batch: The batch.
            dataloader_idx: Which loader it comes from.

        Raises:
            ValueError: If the batch does not hold the mask.
        """
        if dataloader_idx == self.request.dataloader_idx:
            self._open(batch, has_mask=self.request.stage == "validate")

    def end_validation_batch(self) -> None:
        """A validation batch has ended."""
        self._reader.is_open = False

    def end_validation(self, step: int) -> None:
        """A validation run has ended; makes its report.

        Args:
            step: The trainer's ``global_step``.
        """
        if self._collecting:
            self.last_validation = step
            self._make_report(step)

    def _open(self, batch: Any, has_mask: bool) -> None:
        # Until the widths are known a batch is looked at even if it is not collected: bad input should show early.
        if self._collecting or not self.widths:
            with self._stopwatch.running():
                mask = self._mask_of(batch) if has_mask else None
                self._collector.begin_batch(num_samples(batch), mask)
        self._reader.is_open = self._collecting or not self.widths

    def _mask_of(self, batch: Any) -> Tensor | None:
        if self.request.mask is None:
            return None
        try:
            mask = token_mask(batch, self.request.mask)
        except ValueError as error:
            if not self._has_seen_mask:
                raise
            # One odd batch among many costs a report, not the run.
            self._collector.failures.update(dict.fromkeys(self._reader.names, str(error)))
            return None
        self._has_seen_mask = True
        return mask

    def _read(self, name: str, output: Tensor) -> None:
        self.widths[name] = output.shape[-1]
        if self._collecting:
            with self._stopwatch.running():
                self._collector.add(name, output)

    def _make_report(self, step: int) -> None:
        with self._stopwatch.running():
            failures = self._collector.failures
            spectra = {name: _missing(name, failures.get(name, NEVER_RAN)) for name in self._reader.names}
            for names, parts, offered in self._collector.pool():
                if self._steps_collected:
                    self.schedule.rows_per_step = offered / self._steps_collected
                spectra.update(self._decompose(names, parts))
            self.report = Report(step, spectra)
            self._reset()

    def _decompose(self, names: list[str], parts: Moments) -> dict[str, LayerSpectrum]:
        # What float32 products can resolve: their rounding is about 1e-8 of the largest eigenvalue.
        rtol = torch.finfo(torch.float32).eps if self.request.dtype == "float32" else None
        try:
            spectra = decompose(names, parts, self._collector.failures, self._num_vectors, rtol)
        except RuntimeError as error:  # out of memory, most likely; past the collectives, so that no rank waits
            reason = str(error).partition("\n")[0]
            return {name: _missing(name, reason) for name in names}
        return {spectrum.name: spectrum for spectrum in spectra}

    def _reset(self) -> None:
        self._collector.reset()
        self._steps_collected = 0
        self._collecting = False


def _missing(name: str, failure: str) -> LayerSpectrum:
    return LayerSpectrum(name, 0, 0, torch.empty(0), torch.empty(0, 0), failure)
