"""One recorded spectrum with what is known of its error, and what lies between two."""

from dataclasses import dataclass, replace
from math import nan
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lightning_spectral.functional.jackknife import jackknife
from lightning_spectral.functional.powerlaw import Band, power_law, resolve_band
from lightning_spectral.functional.spectrum import rankme


@dataclass(frozen=True, eq=False)
class Spectrum:
    """One spectrum of one report, or between two; an array of its values to NumPy."""

    kind: str
    name: str
    step: float
    tokens: float
    """Training tokens at the report."""
    values: Tensor
    """``(n,)`` float64, descending; NaN if the measurement failed."""
    leave_one_out: Tensor
    """``(G, m)`` values without each group of samples; no rows where there are no error bars."""
    count: int
    """Rows behind it: tokens for activations, samples for gradients; 0 for weights."""
    failure: str | None = None
    """Why there are no values; None if there are."""
    vectors: Tensor | None = None
    """``(d, k)`` leading eigenvectors as columns, where they were kept."""
    leave_one_out_vectors: Tensor | None = None
    """``(G, d, k)`` those without each group."""
    num_rows_without: int = 0
    """Rows left without the largest group, of activations."""

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        values = self.values.numpy()
        return values.astype(dtype) if dtype is not None else values.copy() if copy else values

    def exponent(self, band: Band) -> tuple[float, float]:
        """Power-law exponent over a band, with the jackknife's standard error.

        Args:
            band: Two ranks or two fractions, see :func:`lightning_spectral.functional.power_law`.

        Returns:
            Exponent and standard error; NaN for what is not to be had.
        """
        if self.failure is not None:
            return nan, nan
        try:
            # Ranks of the whole spectrum: without a group of samples there are fewer singular values.
            ranks = resolve_band(band, len(self.values))
            plain = power_law(self.values, ranks)
        except ValueError:  # the spectrum is shorter than the band
            return nan, nan
        num_groups, num_left = self.leave_one_out.shape
        # Fewer rows than channels would be another stretch of a spectrum.
        spans = self.kind != "activation" or self.num_rows_without - 1 >= min(num_left, self.count - 1)
        if num_groups < 2 or ranks[1] > num_left or not spans:
            return float(plain.exponent), nan
        without = power_law(self.leave_one_out, ranks)
        if bool((without.num_values != plain.num_values).any()):
            return float(plain.exponent), nan  # an exponent of another stretch
        return float(plain.exponent), float(jackknife(plain.exponent, without.exponent).stderr)

    def rankme(self) -> tuple[float, float]:
        """Effective rank, with the jackknife's standard error.

        Returns:
            RankMe and standard error; NaN for what is not to be had.
        """
        if self.failure is not None:
            return nan, nan
        plain = rankme(self.values)
        return float(plain), float(jackknife(plain, rankme(self.leave_one_out)).stderr)


def between(first: Spectrum, second: Spectrum, weight: float, tokens: float) -> Spectrum:
    """A spectrum between two of one run.

    Args:
        first: The earlier.
        second: The later.
        weight: Where between them, 0 to 1.
        tokens: Training tokens there.

    Returns:
        Values interpolated in their logarithms, so that exponents are linear in the weight; NaN, with the reason, where
        the two are not of equally many rows. Eigenvectors are those of the nearer.
    """
    nearer = second if weight >= 0.5 else first
    step = first.step + weight * (second.step - first.step)
    failure = first.failure or second.failure
    if failure is None and (first.count != second.count or len(first.values) != len(second.values)):
        failure = f"the reports on both sides are of {first.count} and {second.count} rows"
    if failure is not None:
        missing = torch.full_like(nearer.values, nan)
        return replace(nearer, step=step, tokens=tokens, values=missing, failure=failure)
    same = first.leave_one_out.shape == second.leave_one_out.shape
    without = (
        _log_mix(first.leave_one_out, second.leave_one_out, weight) if same else first.leave_one_out.new_empty(0, 0)
    )
    values = _log_mix(first.values, second.values, weight)
    return replace(nearer, step=step, tokens=tokens, values=values, leave_one_out=without)


def _log_mix(first: Tensor, second: Tensor, weight: float) -> Tensor:
    """Between two positive tensors in their logarithms; linear where one is zero."""
    positive = (first > 0) & (second > 0)
    logs = torch.lerp(torch.where(positive, first, 1.0).log(), torch.where(positive, second, 1.0).log(), weight)
    return torch.where(positive, logs.exp(), torch.lerp(first, second, weight))
