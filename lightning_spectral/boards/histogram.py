"""Histograms of log10 values on fixed edges, by which steps and runs compare bin by bin."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from torch import Tensor

BIN_WIDTH = 0.2


def _edges(lowest: float, highest: float) -> list[float]:
    return np.round(np.arange(lowest, highest + BIN_WIDTH / 2, BIN_WIDTH), 1).tolist()


EIGENVALUE_EDGES = _edges(-7.0, 4.0)
"""Right edges of the bins; the first bin takes all that lies below, exact zeros included, and the last all above.
Float32 products resolve 1e-7 beside an eigenvalue of 1, and the eigenvalues of RMS-normalised rows sum to no more than
the width."""

SINGULAR_VALUE_EDGES = _edges(-6.0, 2.0)
"""The same for singular values of per-sample gradients, whose norms are about 1 in small models and 1e-3 in large ones.
The few hundred of one matrix span two or three decades."""


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


def log10_histogram(values: Tensor, edges: Sequence[float]) -> Histogram | None:
    """Count the log10 of `(n,)` non-negative values on the CPU; None of no values and where one is not finite.

    Boards draw few linear bins, TensorBoard 30, which would put all but a few raw eigenvalues into the first. The edges
    are right edges, `BIN_WIDTH` apart; the first bin takes all that lies below, the last all above.
    """
    spectrum = values.numpy()
    if spectrum.size == 0 or not np.isfinite(spectrum).all():
        return None
    lowest, highest = edges[0] - BIN_WIDTH, edges[-1]
    logs = np.log10(np.clip(spectrum, 10.0**lowest, 10.0**highest)).clip(lowest, highest)
    counts = np.bincount(np.searchsorted(edges, logs), minlength=len(edges))
    return Histogram(counts, edges, logs)
