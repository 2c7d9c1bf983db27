"""What the references of a forecast showed at any number of tokens: loss, batch, tail, head, RankMe."""

from collections.abc import Callable, Sequence
from math import isnan, nan
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from lightning_spectral.functional.forecast import anchored_power_law
from lightning_spectral.functional.powerlaw import Band
from lightning_spectral.runs.course import Course
from lightning_spectral.runs.early_numbers import log_batch, log_of, vector
from lightning_spectral.runs.references import Reference, loss_at

_MOST_REPORTS = 64
"""That are read to find where a tail is steepest, evenly among all."""


class Tails(NamedTuple):
    """Tail exponents of references at a number of tokens."""

    values: Tensor
    """``(n,)``."""
    is_past_peak: list[bool | None]
    """Of each, whether its tail has been at its steepest by then; None where that is not known."""


class ReferenceNumbers:
    """Reads each report of each reference once, as far as it is asked.

    Args:
        references: Runs that reached the target.
        layer: Whose spectra are read.
        target: The loss.
        warn: Told of what cannot be read, and whether only this rank knows.
    """

    def __init__(
        self, references: Sequence[Reference], layer: str, target: float, warn: Callable[[str, bool], None]
    ) -> None:
        self._references, self._layer, self._target, self._warn = references, layer, target, warn
        self._courses: dict[int, Course] = {}
        self._peaks: dict[tuple[int, Band], float] = {}
        self.tokens = vector([reference.tokens_to_target for reference in references])
        """``(n,)`` each took to the target."""
        self.log_batch = vector([log_batch(reference.run) for reference in references])
        """``(n,)`` ln of the tokens in a batch."""

    def __len__(self) -> int:
        return len(self._references)

    def log_gap(self, tokens: float) -> Tensor:
        """``(n,)`` ln of what the loss lies above the target."""
        return vector([log_of(loss_at(one.run, tokens) - self._target) for one in self._references])

    def log_curve(self, tokens: float) -> Tensor:
        """``(n,)`` ln of tokens to the target by their own loss curves up to there."""
        found = []
        for one in self._references:
            entries, losses = one.run.history.with_loss()
            at = one.run.history.tokens[entries]
            # A curve ends where this run's does, and not at the entry before.
            losses = np.append(losses[at < tokens], loss_at(one.run, tokens))
            found.append(curve_of(np.append(at[at < tokens], tokens), losses, self._target))
        return vector(found)

    def exponents(self, band: Band, tokens: float) -> Tensor:
        """``(n,)`` exponents of a band, between the reports on both sides; NaN where there are none."""
        return vector([self._exponent(index, band, tokens) for index in range(len(self))])

    def log_rankme(self, tokens: float) -> Tensor:
        """``(n,)`` ln of RankMe, likewise."""
        return vector(
            [log_of(self._read(index, lambda course: course.rankme(self._layer, tokens))) for index in range(len(self))]
        )

    def tails(self, band: Band, tokens: float) -> Tails:
        """Exponents of tails, and on which side of their own peaks they are."""
        values = self.exponents(band, tokens)
        peaks = [nan if isnan(value) else self._peak(index, band) for index, value in enumerate(values.tolist())]
        return Tails(values, [None if isnan(peak) else tokens >= peak for peak in peaks])

    def _exponent(self, index: int, band: Band, tokens: float) -> float:
        def read(course: Course) -> float:
            exponent = course.exponent(self._layer, band, tokens)
            if isnan(exponent) and (why := course.why_unknown(self._layer, band, tokens)) is not None:
                path = self._references[index].run.path
                self._warn(f"goes without {path} at {tokens:,.0f} tokens, because at {why}", False)
            return exponent

        return self._read(index, read)

    def _read(self, index: int, read: Callable[[Course], float]) -> float:
        reference = self._references[index]
        if not reference.series:
            return nan
        try:
            if index not in self._courses:  # training moves on, and what lies behind is not asked for again
                self._courses[index] = Course(reference.run, reference.series, keep=2)
            return read(self._courses[index])
        except ValueError as error:
            self._warn(f"goes without {reference.run.path}: {error}", True)
            return nan

    def _peak(self, index: int, band: Band) -> float:
        """Tokens at which a tail is steepest."""
        if (index, band) not in self._peaks:
            self._peaks[index, band] = self._read(
                index, lambda _: _steepest(self._references[index], self._layer, band)
            )
        return self._peaks[index, band]


def _steepest(reference: Reference, layer: str, band: Band) -> float:
    run, series = reference.run, reference.series
    steps = run.steps(series)
    steps = steps[:: -(-len(steps) // _MOST_REPORTS)] if steps else []
    course = Course(run, series, keep=2)
    at = [run.tokens_at(series, step) for step in steps]
    exponents = [(course.exponent(layer, band, tokens), tokens) for tokens in at]
    known = [one for one in exponents if not isnan(one[0])]
    return max(known)[1] if known else nan


def curve_of(tokens: Sequence[float] | np.ndarray, losses: Sequence[float] | np.ndarray, target: float) -> float:
    """Logarithm of the tokens to a target by a loss curve of its own; NaN where it does not say."""
    at, seen = np.asarray(tokens, dtype=np.float64), np.asarray(losses, dtype=np.float64)
    known = at > 0
    return log_of(anchored_power_law(torch.from_numpy(at[known]), torch.from_numpy(seen[known]), target))
