"""What seeds alone show: the scatter of runs within a side, and how large a difference it may feign."""

import json
from collections.abc import Iterable, Sequence
from math import isnan, nan, sqrt
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from scipy.special import stdtrit
from torch import Tensor

from lightning_spectral.functional.spectrum import js_divergence, normalize
from lightning_spectral.runs.measured import Measured

LEVEL = 0.975
"""Confidence of intervals and run floors. Two questions are asked of a comparison, of tokens and of throughput, and
together they are to raise a false alarm in 5 of 100 cases (Bonferroni)."""


class Scatter(NamedTuple):
    """Variances of single runs, pooled over sides, by quantity; of spectra in units of Jensen-Shannon divergence."""

    variances: dict[str, float]
    degrees: int
    """Degrees of freedom behind them: runs less sides."""
    family: str
    """Of the runs they are of."""

    def floor(self, key: str, num_base: int, num_variant: int) -> float:
        """The largest difference of two sides that seeds alone show.

        Args:
            key: The quantity.
            num_base: Runs on one side.
            num_variant: Runs on the other.

        Returns:
            t quantile times standard error, of logarithms for tokens, throughput and seconds; of spectra its square, a
            divergence. NaN where no side has two runs and no scatter is on record.
        """
        variance = self.variances.get(key, nan)
        if self.degrees < 1 or isnan(variance):
            return nan
        t = float(stdtrit(self.degrees, (1 + LEVEL) / 2))
        squared = t * t * variance * (1 / num_base + 1 / num_variant)
        return squared if key.endswith("/js") else sqrt(squared)

    def and_of(self, other: "Scatter") -> "Scatter":
        """Pooled with that of other runs.

        Args:
            other: Theirs.

        Returns:
            Variances weighted by their degrees of freedom.
        """
        degrees = self.degrees + other.degrees
        variances = {}
        for key in self.variances.keys() | other.variances.keys():
            parts = [(s.variances.get(key, nan), s.degrees) for s in (self, other) if s.degrees > 0]
            known = [(variance, weight) for variance, weight in parts if not isnan(variance)]
            total = sum(weight for _, weight in known)
            variances[key] = sum(variance * weight for variance, weight in known) / total if total else nan
        return Scatter(variances, degrees, self.family)

    def as_dict(self) -> dict[str, Any]:
        """JSON-like.

        Returns:
            All fields.
        """
        return self._asdict()


def scatter(sides: Sequence[Sequence[Measured]], family: str) -> Scatter:
    """How runs that should be alike differ.

    Args:
        sides: Runs of one kind each.
        family: Whose scatter it is.

    Returns:
        Pooled variances; NaN where a run has no number.
    """
    degrees = sum(len(side) - 1 for side in sides)
    variances: dict[str, float] = {}
    first = sides[0][0]
    for key in [*first.logs, *first.exponents]:
        deviations = [_squared_deviations([number(run, key) for run in side]) for side in sides]
        variances[key] = sum(deviations) / degrees if degrees else nan
    for key in first.spectra:
        deviations = [_squared_distances([run.spectra[key].values for run in side]) for side in sides]
        variances[f"{key}/js"] = sum(deviations) / degrees if degrees else nan
    for kind in {key.split("/")[0] for key in first.spectra}:
        variances[f"{kind}/js"] = _mean(variances[f"{key}/js"] for key in first.spectra if key.startswith(f"{kind}/"))
    return Scatter(variances, degrees, family)


def read_scatter(path: Path) -> Scatter:
    """The scatter in what ``compare --json`` wrote.

    Args:
        path: The file.

    Returns:
        The run floor it holds.

    Raises:
        ValueError: If it holds none.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))["run_floor"]
        variances = {str(key): nan if value is None else float(value) for key, value in found["variances"].items()}
        return Scatter(variances, int(found["degrees"]), str(found["family"]))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"floor must be runs, or a file that `compare --json` wrote, got {str(path)!r} without one ({error})"
        ) from error


def number(run: Measured, key: str) -> float:
    """One number of a run.

    Args:
        run: The run.
        key: Of its logarithms or exponents.

    Returns:
        The number.
    """
    return run.logs[key] if key in run.logs else run.exponents[key][0]


def mean_spectrum(spectra: Sequence[Tensor]) -> Tensor:
    """The mean of spectra that are each normalised to sum to one.

    Args:
        spectra: ``(n,)`` each.

    Returns:
        ``(n,)``.
    """
    return torch.stack([normalize(spectrum) for spectrum in spectra]).mean(0)


def _squared_deviations(numbers: Iterable[float]) -> float:
    found = np.asarray(list(numbers))
    return float(((found - found.mean()) ** 2).sum())


def _squared_distances(spectra: Sequence[Tensor]) -> float:
    centre = mean_spectrum(spectra)
    return sum(float(js_divergence(spectrum, centre)) for spectrum in spectra)


def _mean(numbers: Iterable[float]) -> float:
    return float(np.mean(list(numbers)))
