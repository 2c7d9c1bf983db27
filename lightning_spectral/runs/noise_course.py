"""The gradient noise scale of a run at any number of tokens."""

from bisect import bisect_left
from collections.abc import Mapping
from math import inf, log, nan
from typing import Any

from lightning_spectral.runs.course import SAME
from lightning_spectral.runs.kinds import KINDS, setting_of
from lightning_spectral.runs.logarithms import log_of
from lightning_spectral.runs.run import Run

GRADIENT = "gradient"


class NoiseCourse:
    """The noise scale of all parameters of a series together, each report read once.

    Args:
        run: The run.
        series: Of gradients.
    """

    def __init__(self, run: Run, series: str) -> None:
        self._run, self._series = run, series
        self._steps = run.steps(series)
        self._tokens: list[float] = []
        self._logs: dict[int, float] = {}

    def latest(self, tokens: float) -> float:
        """Tokens at the last report up to a number of them; NaN without one."""
        self._read_to(tokens)
        return max((there for there in self._tokens if there <= tokens), default=nan)

    def log_noise_scale(self, tokens: float) -> float:
        """Its logarithm, linear in log tokens between two reports; NaN outside them, or where it is infinite."""
        self._read_to(tokens)
        at = self._tokens
        after = bisect_left(at, tokens * (1 - SAME))
        if after == len(at) or (after == 0 and not at[0] <= tokens * (1 + SAME)):
            return nan
        second = self._log(after)
        if at[after] <= tokens * (1 + SAME):
            return second
        before, here = at[after - 1], at[after]
        weight = log(tokens / before) / log(here / before) if before > 0 else tokens / here
        first = self._log(after - 1)
        return first + weight * (second - first)

    def _log(self, index: int) -> float:
        if index not in self._logs:
            scale = self._run.noise_scale(self._steps[index], kind=self._series).value
            self._logs[index] = log_of(scale) if scale < inf else nan
        return self._logs[index]

    def _read_to(self, tokens: float) -> None:
        while len(self._tokens) < len(self._steps) and not (self._tokens and self._tokens[-1] >= tokens):
            self._tokens.append(self._run.tokens_at(self._series, self._steps[len(self._tokens)]))


def noise_series(run: Run, settings: Mapping[str, Any] | None) -> str:
    """The series of a run's gradients that were measured as some settings say.

    Args:
        run: The run.
        settings: Of the measurement; None for none.

    Returns:
        Its name; empty without one.
    """
    if settings is None:
        return ""
    must_agree = KINDS[GRADIENT].must_agree
    for series in run.all_series(GRADIENT):
        there = run.settings(series)
        if all(setting_of(there, name) == setting_of(settings, name) for name in must_agree):
            return series
    return ""
