"""The exponent of a spectrum over a band of ranks: a straight line through logarithms."""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_spectral.functional.arguments import check_int, check_spectrum, describe

Band = tuple[int, int] | tuple[float, float]
"""Two ints: 1-based inclusive ranks. Two floats: fractions of the number of values. Ints first, so that jsonargparse
reads ``[30, 150]`` as ranks."""

MIN_VALUES = 3
"""A line through two points has no residual, so r2 would be 1 whatever the spectrum."""


class PowerLaw(NamedTuple):
    """A fitted power law; the fields are tensors with the leading axes of the spectrum."""

    exponent: Tensor
    """Minus the slope of ln value on ln rank: larger is steeper. NaN below three positive values."""
    r2: Tensor
    """Coefficient of determination of that line. NaN with the exponent, and where all logarithms are equal."""
    num_values: Tensor
    """How many positive values of the band were fitted: all of them, or the line is that of a part of the band. Fewer
    than three is the reason for NaN."""


def check_band(name: str, band: Band) -> None:
    """Raise ValueError, naming the argument, for a band that mixes types, is out of order or out of range."""
    is_pair = isinstance(band, (tuple, list)) and len(band) == 2
    if not is_pair or any(isinstance(bound, bool) or not isinstance(bound, (int, float)) for bound in band):
        raise ValueError(
            f"{name} must be two ranks or two fractions, got {describe(band)}: write e.g. (1, 10) or (0.125, 0.5)"
        )
    lo, hi = band
    if isinstance(lo, int) != isinstance(hi, int):
        raise ValueError(
            f"{name} must be two ints (ranks) or two floats (fractions), got {describe(band)}: do not mix them"
        )
    if isinstance(lo, int) and not 1 <= lo < hi:
        raise ValueError(f"{name} must be two ascending ranks from 1, got {describe(band)}: write e.g. (1, 10)")
    if isinstance(lo, float) and not (0 <= lo < hi <= 1):
        raise ValueError(
            f"{name} must be two ascending fractions in [0, 1], got {describe(band)}: write e.g. (0.125, 0.5)"
        )


def resolve_band(band: Band, num_values: int, name: str = "band") -> tuple[int, int]:
    """Ranks of a band in a spectrum of a given length.

    Fractions f become ``max(1, floor(f n))`` and ``floor(f n)``: (0.125, 0.5) of 256 values are ranks 32 to 128.

    Args:
        band: Two ints, 1-based inclusive ranks, or two floats, fractions.
        num_values: Length n of the spectrum.
        name: The argument's name, for the message.

    Returns:
        First and last rank, 1-based, both inclusive. The last may lie below the first for a handful of values.

    Raises:
        ValueError: If the band is out of order or reaches beyond the spectrum, or the length is no int from 0.

    Example:
        >>> resolve_band((0.125, 0.5), 256)
        (32, 128)
    """
    check_band(name, band)
    check_int(0, 2**53, num_values=num_values)
    lo, hi = band
    if isinstance(lo, int) and isinstance(hi, int):
        if hi > num_values:
            raise ValueError(
                f"{name} must end at or before rank {num_values}, the last there is, got {describe(band)}: "
                "lower its end"
            )
        return lo, hi
    return max(1, math.floor(lo * num_values)), math.floor(hi * num_values)


def power_law(values: Tensor, band: Band) -> PowerLaw:
    r"""Exponent of a power law :math:`l_j \propto j^{-\alpha}` over a band of ranks.

    Ordinary least squares of :math:`\ln l_j` on :math:`\ln j`, j the 1-based rank, over the positive values of the
    band; the estimator of the scripts released with *Spectral Lens* (arXiv 2605.05683). Where values of the band are
    zero, below rounding say, the line is that of the others, and ``num_values`` tells how many:
    :meth:`lightning_spectral.functional.Spectrum.exponent` takes only bands that are whole.

    Args:
        values: ``(..., n)``, descending: eigenvalues, or singular values (whose exponent is half as large).
        band: Two ints, 1-based inclusive ranks, or two floats, fractions of n.

    Returns:
        The fit, batched over leading axes; NaN where the band holds fewer than three positive values, or a NaN.

    Raises:
        ValueError: If the band is out of order or reaches beyond the spectrum, or values are negative, rise, or are no
            real numbers.

    Example:
        >>> import torch
        >>> fit = power_law(torch.arange(1, 101.0) ** -1.5, (10, 50))
        >>> round(float(fit.exponent), 6), int(fit.num_values)
        (1.5, 41)
    """
    check_spectrum(is_ordered=True, values=values)
    lo, hi = resolve_band(band, values.shape[-1])
    values = values[..., lo - 1 : max(hi, lo - 1)].to(torch.float64)
    log_rank = torch.arange(lo, lo + values.shape[-1], dtype=torch.float64, device=values.device).log()
    positive = values > 0
    num_values = positive.sum(-1)
    log_value = torch.where(positive, values, 1.0).log()
    # About the first, so that equal values leave exact zeros and not rounding with an r2 of its own.
    log_value = log_value - log_value[..., :1]

    def mean(x: Tensor) -> Tensor:
        return torch.where(positive, x, 0.0).sum(-1, keepdim=True) / num_values.clamp(min=1).unsqueeze(-1)

    x, y = log_rank - mean(log_rank), log_value - mean(log_value)
    variance_x, variance_y, covariance = mean(x * x), mean(y * y), mean(x * y)
    exponent = (-covariance / variance_x).squeeze(-1)
    r2 = (covariance.square() / (variance_x * variance_y)).squeeze(-1)
    enough = (num_values >= MIN_VALUES) & ~values.isnan().any(-1)
    return PowerLaw(torch.where(enough, exponent, torch.nan), torch.where(enough, r2, torch.nan), num_values)
