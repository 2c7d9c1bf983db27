"""One measurement of activations, shared by all callbacks that ask for the same."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lightning_spectral.capture.activations import ActivationReader
from lightning_spectral.capture.batch import num_samples, token_mask
from lightning_spectral.functional.moments import Moments
from lightning_spectral.measurement.collector import Collector
from lightning_spectral.measurement.report import LayerSpectrum, Report, decompose
from lightning_spectral.measurement.staged import Stage, StagedMeasurement
from lightning_spectral.measurement.stopwatch import Stopwatch, settle

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


class Measurement(StagedMeasurement):
    """Collects rows while the model runs and turns them into a report at each due step.

    Members join before the first batch and forward the Trainer's events; only those of the first member act, so that an
    event forwarded by several happens once. The report is there for all when the first member's call returns.

    Args:
        request: What to measure.
        device: Where the sums are kept; the CPU is used where the device has no float64.
        stopwatch: Counts the time that measuring takes.
    """

    def __init__(self, request: Request, device: torch.device, stopwatch: Stopwatch) -> None:
        super().__init__(request.stage, request.every_n_steps, request.num_tokens, stopwatch)
        self.request = request
        self.report: Report | None = None
        self.widths: dict[str, int] = {}
        """Width of each layer that has run; known after the first batch, of training or of the sanity check."""
        self._members: list[Any] = []
        self._num_vectors = 0
        self._has_seen_mask = False
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
    def layers(self) -> list[str]:
        """Names of all that is watched."""
        return list(self._reader.names)

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

    def open(self, batch: Any, step: int, has_right_stage: bool) -> None:
        """Open the hooks for a batch.

        Args:
            batch: The batch.
            step: The trainer's ``global_step``.
            has_right_stage: Whether it is one of the stage's, which must hold the mask.

        Raises:
            ValueError: If the batch does not hold the mask.
        """
        # Until the widths are known a batch is looked at even if it is not collected: bad input should show early.
        if self.is_collecting or not self.widths:
            with self.stopwatch.running():
                mask = self._mask_of(batch) if has_right_stage else None
                self._collector.begin_batch(num_samples(batch), mask)
        self._reader.is_open = self.is_collecting or not self.widths

    def close(self) -> None:
        """Close the hooks."""
        self._reader.is_open = False

    def before_backward(self, scale: Callable[[], float]) -> None:
        """Close the hooks: activation checkpointing repeats forwards in a backward pass.

        Args:
            scale: Not used.
        """
        self._reader.is_open = False

    def after_backward(self, is_last: bool) -> None:
        """Open the hooks again if another forward pass of the batch may follow.

        Args:
            is_last: Whether none does: the next forward pass is somebody else's, of a sampling callback, say.
        """
        self._reader.is_open = self.is_collecting and not is_last

    def agree_on_rows(self) -> float:
        """Let all ranks know the widths, and the rows of the first optimizer step; a collective."""
        return self._collector.agree()

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
        if self.is_collecting:
            with self.stopwatch.running():
                self._collector.add(name, output)

    def make_report(self, step: int) -> None:
        """Pool, decompose and forget what was collected; a collective.

        Args:
            step: The trainer's ``global_step``.
        """
        settle(self._collector.device)
        with self.stopwatch.running():
            failures = self._collector.failures
            spectra = {name: _missing(name, failures.get(name, NEVER_RAN)) for name in self._reader.names}
            for names, parts, offered in self._collector.pool():
                if self.steps_collected:
                    self.schedule.rows_per_step = offered / self.steps_collected
                spectra.update(self._decompose(names, parts))
            self.report = Report(step, spectra)
            self.reset()

    def _decompose(self, names: list[str], parts: Moments) -> dict[str, LayerSpectrum]:
        # What float32 products can resolve: their rounding is about 1e-8 of the largest eigenvalue.
        rtol = torch.finfo(torch.float32).eps if self.request.dtype == "float32" else None
        try:
            spectra = decompose(names, parts, self._collector.failures, self._num_vectors, rtol)
        except RuntimeError as error:  # out of memory, most likely; past the collectives, so that no rank waits
            reason = str(error).partition("\n")[0]
            return {name: _missing(name, reason) for name in names}
        return {spectrum.name: spectrum for spectrum in spectra}

    def reset(self) -> None:
        """Forget all rows."""
        super().reset()
        self._collector.reset()


def _missing(name: str, failure: str) -> LayerSpectrum:
    return LayerSpectrum(name, 0, 0, torch.empty(0), torch.empty(0, 0), failure)
