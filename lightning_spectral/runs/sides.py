"""Both sides of a comparison as they were measured, and how far their means may lie apart by seeds alone."""

from collections.abc import Sequence
from math import isnan, nan, sqrt
from typing import NamedTuple

import numpy as np
from scipy.special import nctdtrinc

from lightning_spectral.runs.kinds import Key
from lightning_spectral.runs.measured import Measured
from lightning_spectral.runs.statistics import LEVEL, Error, Scatter, number

UNPAIRED = ("js", "throughput")
"""What pairs do not share: how fast a machine was; of divergences there are ratios (``runs/movement.py``)."""

POWER = 0.8
"""How often a gain is found that is said to be detectable; Cohen's convention."""


class Sides(NamedTuple):
    """Both sides as they were measured, and how runs scatter."""

    base: list[Measured]
    variant: list[Measured]
    known: Scatter
    is_paired: bool = False
    """Whether the runs of base and variant, in their order, are pairs (``runs/pairs.py``)."""

    @property
    def both(self) -> tuple[list[Measured], list[Measured]]:
        """Base and variant."""
        return self.base, self.variant

    def means(self, key: Key) -> list[float]:
        """The mean of each side."""
        return [float(np.mean(_numbers(side, key))) for side in self.both]

    def error(self, key: Key) -> Error:
        """Standard error of the difference of the sides' means by seeds: of pairs, where there are, by differences."""
        if self.is_paired and key.quantity not in UNPAIRED:
            differences = np.subtract(*(_numbers(side, key) for side in self.both))
            return Error(float(differences.std(ddof=1)) / sqrt(len(differences)), len(differences) - 1)
        return self.known.error(key, len(self.base), len(self.variant))

    def floor(self, key: Key) -> float:
        """The largest difference that seeds alone show; of spectra a divergence. See :meth:`Scatter.floor`."""
        reach = self.error(key).reach(LEVEL)
        return reach * reach if key.quantity == "js" else reach

    def detectable(self, key: Key) -> float:
        """The smallest difference that would lie beyond the floor in 80 of 100 such comparisons.

        By Student's noncentral t, the scatter of seeds taken for what it was found to be.
        """
        error = self.error(key)
        if isnan(error.stderr) or error.degrees < 1:
            return nan
        return float(nctdtrinc(error.degrees, 1 - POWER, error.quantile(LEVEL))) * error.stderr


def _numbers(side: Sequence[Measured], key: Key) -> np.ndarray:
    return np.array([number(run, key) for run in side])
