"""Histograms of log10 values on fixed edges, by which steps and runs compare bin by bin."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from torch import Tensor

BIN_WIDTH = 0.2


class Histogram(NamedTuple):
    """How many log10 values lie in each bin."""

    counts: np.ndarray
    """`(n,)` integers whose sum is the number of values."""
    edges: Sequence[float]
    """`(n,)` right edges, equidistant."""
    logs: np.ndarray
    """`(m,)` log10 of the values, clipped to the outer edges."""

    @property
    def lowest(self) -> float:
        """Left edge of the first bin, as wide as the others although it takes all that lies below."""
        return self.edges[0] - BIN_WIDTH

    @property
    def highest(self) -> float:
        """Right edge of the last bin."""
        return self.edges[-1]

    @property
    def bounds(self) -> np.ndarray:
        """`(n + 1,)`: all edges from the lowest to the highest."""
        return np.array([self.lowest, *self.edges])


def log10_histogram(values: Tensor, lowest: float, highest: float) -> Histogram | None:
    """Count the log10 of `(n,)` non-negative values on the CPU; None of no values and where one is not finite.

    Boards draw few linear bins, TensorBoard 30, which would put all but a few raw eigenvalues into the first. Bins are
    `BIN_WIDTH` wide from `lowest` to `highest`; one more takes all that lies below, zeros included, the last all above.
    """
    spectrum = values.numpy()
    if spectrum.size == 0 or not np.isfinite(spectrum).all():
        return None
    edges = np.round(np.arange(lowest, highest + BIN_WIDTH / 2, BIN_WIDTH), 1).tolist()
    bounds = edges[0] - BIN_WIDTH, edges[-1]
    logs = np.log10(np.clip(spectrum, *(10.0**bound for bound in bounds))).clip(*bounds)
    counts = np.bincount(np.searchsorted(edges, logs), minlength=len(edges))
    return Histogram(counts, edges, logs)
