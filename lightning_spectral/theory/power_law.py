"""Spectra that fall as a power of the rank, and the rank about which a change of exponent turns."""

from typing import Literal

import torch
from torch import Tensor

from lightning_spectral.functional.arguments import check_int, describe
from lightning_spectral.theory.checks import check_not_negative, spectrum_of

MOST_VALUES = 10**8
"""They take 0.8 GB."""


def power_law_spectrum(num: int, alpha: float, normalize: Literal["trace", "top"] = "trace") -> Tensor:
    r"""Eigenvalues :math:`j^{-\alpha}`, j = 1 ... num.

    Args:
        num: How many, to 100,000,000.
        alpha: Exponent; 0 is white.
        normalize: ``"trace"``: they sum to one, as of rows of a fixed norm. ``"top"``: the first is one.

    Returns:
        ``(num,)`` float64, descending.

    Raises:
        ValueError: If ``num`` is not within bounds, ``alpha`` is negative, or ``normalize`` is another word.

    Example:
        >>> power_law_spectrum(3, 1.0, normalize="top")
        tensor([1.0000, 0.5000, 0.3333], dtype=torch.float64)
    """
    check_int(1, MOST_VALUES, num=num)
    check_not_negative(alpha=alpha)
    if not isinstance(normalize, str) or normalize not in ("trace", "top"):
        raise ValueError(f"normalize must be 'trace' or 'top', got {describe(normalize)}")
    values = torch.arange(1, num + 1, dtype=torch.float64) ** -float(alpha)
    return values / values.sum() if normalize == "trace" else values


def crossover_rank(spectrum: Tensor) -> float:
    r"""The rank beyond which a flatter spectrum of the same trace holds more variance, and before which less.

    Of :math:`p_j = j^{-\alpha} / \sum_i i^{-\alpha}`,
    :math:`\frac{d \ln p_j}{d \alpha} = \sum_i p_i \ln i - \ln j`, which changes sign at
    :math:`j^* = \exp \sum_i p_i \ln i`. Gradient flow learns mode j at a rate that is proportional to its
    eigenvalue: with the trace held, a flatter spectrum speeds up the modes beyond j* and slows those before it.
    Whether a steep tail means many tokens or few therefore depends on how far away the target lies.

    Args:
        spectrum: ``(d,)`` eigenvalues, descending; normalised here. Of a spectrum that is no power law, the p_j are
            its own shares of the trace, and j* the turning point of :math:`l_j \to l_j j^{-\epsilon}`.

    Returns:
        A rank from 1 to d, seldom a whole number.

    Raises:
        ValueError: If the spectrum is no descending vector of eigenvalues.

    References:
        Liu, Paquette, Sous, *Spectral Lens*, arXiv 2605.05683 (2026), for the question; the derivative is above.

    Example:
        >>> round(crossover_rank(power_law_spectrum(768, 1.0)), 1)
        21.0
    """
    values = spectrum_of(spectrum)
    log_rank = torch.arange(1, len(values) + 1, dtype=torch.float64, device=values.device).log()
    return float((values @ log_rank / values.sum()).exp())
