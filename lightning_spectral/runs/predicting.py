"""The forecast of one run from what it shows and what its references showed: one rule, during training and after it."""

from collections.abc import Mapping, Sequence
from math import exp, inf, isnan, log, nan
from typing import Literal, NamedTuple

import torch
from scipy.special import ndtr, ndtri

from lightning_spectral.functional.early import PREDICTORS, Early
from lightning_spectral.functional.stacking import StackedForecast, forecast_by_line, stack
from lightning_spectral.runs.logarithms import vector
from lightning_spectral.runs.reference_numbers import SPECTRAL, ReferenceNumbers

By = Literal["stack", "tail", "head", "loss", "batch"]
BY: tuple[str, ...] = ("stack", "tail", "head", "loss", "batch")
"""What forecasts can go by."""

MIN_STEPS = 32
"""Optimizer steps before which no tail is gone by. In small GPTs its exponent rises to a peak at 32 to 128 steps and
falls from there on: before, the steepest is the one that has come farthest."""

MOST_SETTINGS = 60
"""Beyond so many the Gaussian process, whose time grows with their square, is left out of the stack."""

BEYOND_EXPECTATION = 0.99
"""A run that has taken more than so large a share of its forecast's distribution is not as its references are."""

_MOST_POWER = 600.0
"""Of e in what is a number."""


class Seen(NamedTuple):
    """A number of a spectrum, and when it was seen."""

    tokens: float
    value: float


class Shown(NamedTuple):
    """What a run has shown by now; NaN for what is not known."""

    tokens: float
    """Training tokens at its last loss."""
    log_gap: float
    """ln of what that lies above the target."""
    log_batch: float
    """ln of the tokens in a batch."""
    log_curve: float
    """ln of tokens to the target by its own loss curve."""
    spectral: Mapping[str, Seen]
    """By names of :data:`SPECTRAL`."""

    def late_enough(self, steps: float) -> "Shown":
        """Without a tail that still rises, for a run of so many optimizer steps at it."""
        rest = {name: seen for name, seen in self.spectral.items() if name != "alpha_tail"}
        return self if steps >= MIN_STEPS else self._replace(spectral=rest)

    def early(self) -> Early:
        """As :func:`lightning_spectral.functional.stack` is given it."""
        values = [self.spectral[name].value for name in SPECTRAL if name in self.spectral]
        return Early(
            vector([self.log_gap]),
            vector([self.log_batch]),
            vector([self.log_curve]),
            vector(values)[None] if values else None,
        )


def predict(by: str, shown: Shown, numbers: ReferenceNumbers, settings: Sequence[int]) -> StackedForecast:
    """Forecast a run.

    Each number of it is set against those of the references at the very tokens at which it was seen last.

    Args:
        by: One of :data:`BY`. By the loss, alone or in the stack, references that have reached the target by then say
            nothing of a run that has not, and are left out.
        shown: What the run has shown.
        numbers: Of the references.
        settings: Of each reference, equal for seeds of one.

    Returns:
        The forecast as it is before it is known that the run is above the target still, see :func:`from_now_on`.
    """
    of_run = torch.tensor(settings)
    if by in ("tail", "head"):
        seen = shown.spectral.get(f"alpha_{by}")
        if seen is None:
            found = forecast_by_line(torch.full_like(numbers.tokens, nan), numbers.tokens, nan, of_run)
            rises = f"its tail still rises before {MIN_STEPS} optimizer steps"
            return found._replace(reason=rises if by == "tail" else "its head is not known")
        return forecast_by_line(numbers.spectral(f"alpha_{by}", seen.tokens), numbers.tokens, seen.value, of_run)
    if by == "loss":
        return forecast_by_line(numbers.log_gap(shown.tokens), numbers.tokens, shown.log_gap, of_run)
    if by == "batch":
        nothing = torch.full_like(numbers.tokens, nan)
        query = Early(vector([nan]), vector([shown.log_batch]))
        return stack(Early(nothing, numbers.log_batch), numbers.tokens, query, of_run, predictors=("batch law",))
    early = numbers.early(shown.tokens, {name: seen.tokens for name, seen in shown.spectral.items()})
    return stack(early, numbers.tokens, shown.early(), of_run, predictors=predictors_for(settings))


def predictors_for(settings: Sequence[int]) -> tuple[str, ...]:
    """Those of a stack of so many settings."""
    few = len(set(settings)) <= MOST_SETTINGS
    return tuple(name for name in PREDICTORS if few or name != "Gaussian process")


class Remaining(NamedTuple):
    """A forecast for a run that is above the target still."""

    value: float
    """The median; NaN without one."""
    low: float
    """Lower end of the 80% interval."""
    high: float
    reason: str | None
    """Why there is no number, where there is none."""


def from_now_on(found: StackedForecast, taken: float) -> Remaining:
    """What is left of a forecast for a run that was above the target at some tokens.

    Args:
        found: The forecast.
        taken: Tokens at the run's last loss; NaN where there is none yet.

    Returns:
        The forecast itself where its interval lies above; else median and interval of that part of its distribution
        which does, a log-normal with its median and upper end. NaN, with the reason, for a case in a hundred.
    """
    value, low, high = found.value, found.low, found.high
    if isnan(value) or not low < taken:
        return Remaining(value, low, high, found.reason)
    left = _given_above(taken, value, high)
    if isnan(left[0]):
        return Remaining(*left, f"it has taken more tokens than the {high:,.0f} that its references let expect")
    return Remaining(*left, found.reason)


def _given_above(tokens: float, value: float, high: float) -> tuple[float, float, float]:
    """Median and 80% interval of a log-normal, given that it is above some tokens; NaN for a case in a hundred."""
    deviation = log(high / value) / float(ndtri(0.9))
    below = float(ndtr(log(tokens / value) / deviation)) if deviation > 0 else 1.0
    if not below < BEYOND_EXPECTATION:
        return nan, nan, nan
    powers = (deviation * float(ndtri(below + (1 - below) * part)) for part in (0.5, 0.1, 0.9))
    middle, low, high = (value * exp(power) if power < _MOST_POWER else inf for power in powers)
    return middle, low, high
