"""The self-check of per-sample gradients: whether rows are of the loss that training follows, and of its samples."""

from collections.abc import Callable, Mapping
from math import isnan
from typing import Any

import torch
from torch import Tensor

from lightning_spectral.capture.engines import is_out_of_memory
from lightning_spectral.capture.kept import Kept
from lightning_spectral.capture.one_line import reason_of
from lightning_spectral.capture.self_check import SpanCheck, check_span, rounding
from lightning_spectral.capture.shadow import BatchLoss
from lightning_spectral.measurement.gradient_request import Check

EVERY = 10
"""Reports from one self-check to the next."""

LOSS_TOLERANCE = 1e-3
"""Relative difference of a loss between training and the shadow: kernels may differ, compiled ones for example."""

LOSS_TOLERANCE_IN_SHORT = 3e-2

UNEQUAL_MEAN = 0.05
"""By how much the weights of samples in a mean may miss a sum of one: rounding, not another reduction."""


def loss_tolerance(loss: BatchLoss) -> float:
    """Relative difference that rounding alone may make between two evaluations of a loss."""
    return LOSS_TOLERANCE_IN_SHORT if rounding(loss) > LOSS_TOLERANCE else LOSS_TOLERANCE


def _why_of_another_size(found: SpanCheck, is_scaled_as_mean: bool) -> str | None:
    """Why rows are not of the size that they have in the loss of a batch; None if they are, or nobody knows."""
    is_mean = abs(found.total - 1) <= UNEQUAL_MEAN
    is_sum = abs(found.total / max(found.num_parts, 1) - 1) <= UNEQUAL_MEAN
    if isnan(found.total) or is_mean or (is_sum and not is_scaled_as_mean):
        return None
    times = f"the loss of a batch is {found.total:.3g} times the mean of its {found.parts}' losses"
    if is_sum:
        return (
            f"{times}, for which loss_reduction='mean' takes it: give loss_reduction='sum' if it is their sum, or "
            "method='vmap'"
        )
    return (
        f"{times}, which is neither that nor their sum, as with a root of a mean, or samples that are others than "
        "they were taken for: give loss_fn, samples or check='warn'"
    )


class GradientCheck:
    """What the latest self-check of one measurement came to.

    Args:
        mode: Whether it is made at all, see ``GradientSpectrum``.
        is_told: Whether a loop, which has no ``training_step``, gave the loss function.
    """

    def __init__(self, mode: Check, is_told: bool) -> None:
        self.doubts: dict[str, str] = {}
        """Why the rows are not what they are taken for, by the part that says so."""
        self.results: dict[str, str] = {}
        """What each part came to, ``"passed"``, ``"failed"`` or why it was not made."""
        self.weights_ratio = torch.nan
        """Largest over smallest weight of a sample in its batch's loss."""
        self.residual = torch.nan
        """Share of a batch's gradient outside the span of its samples' gradients, or of two halves'."""
        self.losses = (torch.nan, torch.nan)
        """Of a batch, as the shadow has it and as training has it."""
        self.was_asked = False
        """Whether the shadow's loss was asked for in this report, or could not be."""
        self._mode: Check = mode
        self._is_told = is_told
        self._num_reports = 0
        self._expected: tuple[float, float] | None = None

    @property
    def is_due(self) -> bool:
        """Whether the report that is being collected is one with a self-check."""
        return self._mode != "off" and self._num_reports % EVERY == 0

    @property
    def refuses(self) -> str:
        """Why no number of the report is to be told; empty if they are."""
        return "; ".join(self.doubts.values()) if self._mode == "refuse" else ""

    @property
    def in_words(self) -> str:
        """All parts, for a record."""
        return "; ".join(f"{part}: {result}" for part, result in sorted(self.results.items()))

    @property
    def awaits_loss(self) -> bool:
        """Whether the shadow's loss of the batch under way is there, and training's is not yet."""
        return self._expected is not None

    def end_report(self) -> None:
        """Count a report."""
        self._num_reports += 1
        self.was_asked, self._expected = False, None

    def leave_out(self, reason: str, *parts: str) -> None:
        """Say why parts are not made, both where none is named."""
        self.results |= dict.fromkeys(parts or ("loss", "span"), reason)

    def expect_nothing(self) -> None:
        """No loss of training's will be compared with the shadow's."""
        self._expected = None

    def ask(self, make_loss: Callable[[], BatchLoss], batch: Any, batch_idx: int) -> None:
        """The loss of a batch as a shadow has it, before training asks for it, in the same state."""
        try:
            loss = make_loss()
            loss.batch_idx = batch_idx
            try:
                with loss.isolated(batch), torch.no_grad():
                    value = loss.of_training(batch)
            except RuntimeError as error:
                if is_out_of_memory(error):
                    raise
                # A step may differentiate something itself, as a force is an energy's slope.
                with loss.isolated(batch):
                    value = loss.of_training(batch)
            self._expected = value, loss_tolerance(loss)
        except Exception as error:  # for the report to say, where it matters
            self.leave_out(reason_of(error), "loss")

    def compare(self, found: float, failure: str = "") -> None:
        """Compare the shadow's loss of a batch with what training got for it.

        Args:
            found: Training's.
            failure: What to say if they differ, a template of ``{found}`` and ``{value}``; empty for what holds of the
                loss of a step.
        """
        assert self._expected is not None
        (value, tolerance), self._expected = self._expected, None
        self.losses = value, found
        if abs(value - found) <= tolerance * abs(found) or value == found or isnan(found):
            self.results["loss"] = "passed"
            self.doubts.pop("loss", None)
            return
        self.results["loss"] = "failed"
        if not failure and self._is_told:
            failure = (
                "training's loss of a batch was {found}, and loss_fn gives {value} on a copy of the module in the same "
                "state: have it do what the loop does"
            )
        failure = failure or (
            "training_step gave {found} for a batch and {value} on a copy of the module in the same state: its loss "
            "depends on what a copy does not have; give loss_fn"
        )
        self.doubts["loss"] = failure.format(found=f"{found:.6g}", value=f"{value:.6g}")

    def look_at_span(
        self,
        loss: BatchLoss,
        kept: Kept,
        names: list[str],
        batch: Any,
        rows: Mapping[str, Tensor] | None,
        is_scaled_as_mean: bool,
        has_run: bool,
    ) -> None:
        """See whether the loss of a batch is a mean of its samples' losses.

        Args:
            loss: Of a shadow, isolated.
            kept: What its isolation gave.
            names: Parameters.
            batch: Samples.
            rows: Each sample's gradient by name; None where they are to be had here.
            is_scaled_as_mean: Whether rows off a backward pass were multiplied by the number of samples, so that they
                are of their own size only if a mean is a mean, with weights that sum to one.
            has_run: Whether the shadow has had a loss of theirs; it has, too, where training's has just been compared.
        """
        has_run = has_run or self.results.get("loss") == "passed"
        try:
            found = check_span(loss, kept, names, batch, rows, has_run)
        except Exception as error:  # a batch that cannot be cut so, or does not fit into memory
            self.leave_out(reason_of(error), "span")
            return
        if found is None:
            few = "too few samples, numbers or dimensions that gradients span, none that are finite"
            self.leave_out(f"{few}, or reentrant checkpoints", "span")
            return
        self.weights_ratio, self.residual = found.ratio, found.residual
        failure = found.failure or _why_of_another_size(found, is_scaled_as_mean)
        self.results["span"] = "passed" if failure is None else "failed"
        if failure is None:
            self.doubts.pop("span", None)
        else:
            self.doubts["span"] = failure
