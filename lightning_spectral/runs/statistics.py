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
from lightning_spectral.runs.kinds import Key
from lightning_spectral.runs.measured import Measured

LEVEL = 0.975
"""Confidence of intervals and run floors. Two questions are asked of a comparison, of tokens and of throughput, and
together they are to raise a false alarm in 5 of 100 cases (Bonferroni)."""


class Variance(NamedTuple):
    """Of single runs that differ by their seeds alone, pooled over sides."""

    value: float
    """Of a logarithm or an exponent; of spectra a Jensen-Shannon divergence from the mean, in nats."""
    degrees: int
    """Degrees of freedom behind it: runs less sides."""


class Error(NamedTuple):
    """Of the difference between the means of two sides."""

    stderr: float
    """Standard error; for spectra the root of a divergence. NaN where it is not known."""
    degrees: int
    """Degrees of freedom behind it."""

    def quantile(self, level: float) -> float:
        """Of Student's t, for a two-sided interval; NaN without degrees of freedom."""
        return float(stdtrit(self.degrees, (1 + level) / 2)) if self.degrees else nan

    def reach(self, level: float) -> float:
        """Half the width of a two-sided interval."""
        return self.quantile(level) * self.stderr


class Scatter(NamedTuple):
    """How runs that should be alike differ, quantity by quantity."""

    variances: dict[Key, Variance]
    """Of those that are known; others are missing."""
    families: list[str]
    """Of the runs they are of."""
    runs: list[str]
    """Their ids, so that none is counted twice."""
    loss: float = nan
    """At which they were matched, of one that was recorded."""
    loss_name: str = ""
    """Of which loss."""

    def floor(self, key: Key, num_base: int, num_variant: int) -> float:
        """The largest difference that seeds alone show between two sides of so many runs.

        t quantile times standard error, of logarithms for tokens, throughput and seconds; of spectra its square, a
        divergence. NaN where no side has two runs and no scatter is on record.
        """
        reach = self.error(key, num_base, num_variant).reach(LEVEL)
        return reach * reach if key.quantity == "js" else reach

    def error(self, key: Key, num_base: int, num_variant: int) -> Error:
        """Standard error of the difference between two sides of so many runs, by their seeds."""
        if key not in self.variances:
            return Error(nan, 0)
        variance, degrees = self.variances[key]
        return Error(sqrt(variance * (1 / num_base + 1 / num_variant)), degrees)

    def and_of(self, other: "Scatter") -> "Scatter":
        """Pooled with that of other runs, variances weighted by their degrees of freedom."""
        variances = dict(self.variances)
        for key, theirs in other.variances.items():
            mine = variances.get(key, Variance(0.0, 0))
            degrees = mine.degrees + theirs.degrees
            variances[key] = Variance((mine.value * mine.degrees + theirs.value * theirs.degrees) / degrees, degrees)
        families = list(dict.fromkeys([*self.families, *other.families]))
        return self._replace(variances=variances, families=families, runs=[*self.runs, *other.runs])

    def as_dict(self) -> dict[str, Any]:
        """JSON-like, for programs."""
        variances = {key.text: value._asdict() for key, value in self.variances.items()}
        return {"variances": variances, "families": self.families, "runs": self.runs}


def scatter(sides: Sequence[Sequence[Measured]]) -> Scatter:
    """How runs that should be alike differ: variances pooled over sides, none where no side has two runs.

    Each side is runs of one kind, all sides with the same spectra, all known.
    """
    runs = [measured.run for side in sides for measured in side]
    degrees = sum(len(side) - 1 for side in sides)
    variances: dict[Key, Variance] = {}
    if degrees:
        first = sides[0][0]
        sums = {
            key: sum(_squared_deviations([number(run, key) for run in side]) for side in sides)
            for key in (*first.logs, *first.estimates)
        }
        of_spectra = {
            key: sum(_squared_distances([run.spectra[key].values for run in side]) for side in sides)
            for key in first.spectra
        }
        sums |= of_spectra
        for kind in {key.kind for key in of_spectra}:
            sums[Key("js", kind)] = float(np.mean([of_spectra[key] for key in of_spectra if key.kind == kind]))
        variances = {key: Variance(value / degrees, degrees) for key, value in sums.items() if not isnan(value)}
    return Scatter(variances, list(dict.fromkeys(run.family for run in runs)), [run.id for run in runs])


def read_scatter(path: Path) -> Scatter:
    """The run floor in what ``compare --json`` wrote; ValueError if the file holds none."""
    try:
        comparison = json.loads(path.read_text(encoding="utf-8"))
        found = comparison["run_floor"]
        variances = {
            Key.parse(text): Variance(float(one["value"]), int(one["degrees"]))
            for text, one in found["variances"].items()
        }
        families, runs = (list(map(str, found[name])) for name in ("families", "runs"))
        return Scatter(variances, families, runs, float(comparison["loss"]), str(comparison["loss_name"]))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"floor must be runs, or a file that `compare --json` wrote, got {str(path)!r} without one ({error})"
        ) from error


def number(run: Measured, key: Key) -> float:
    """One number of a run, of its logarithms or estimates."""
    return run.logs[key] if key in run.logs else run.estimates[key].value


def mean_spectrum(spectra: Sequence[Tensor]) -> Tensor:
    """The mean, ``(n,)``, of spectra ``(n,)`` that are each normalised to sum to one."""
    return torch.stack([normalize(spectrum) for spectrum in spectra]).mean(0)


def _squared_deviations(numbers: Iterable[float]) -> float:
    found = np.asarray(list(numbers))
    return float(((found - found.mean()) ** 2).sum())


def _squared_distances(spectra: Sequence[Tensor]) -> float:
    centre = mean_spectrum(spectra)
    return sum(float(js_divergence(spectrum, centre)) for spectrum in spectra)
