r"""The simple predictors of a stack, each fitted many times over, with other runs left out each time.

All take weights ``(..., n)`` of the runs, zero for those left out, and give ``(..., n)`` values of y for all of them:
what is left out is forecast in the same pass.
"""

import math

import torch
from torch import Tensor

from lightning_spectral.functional.gaussian_process import standardised

RIDGE = 0.1
"""Penalty on the squared slopes of standardised features, in runs' squared errors: a tenth of what one setting weighs,
enough that features which say the same do not play against each other."""

NUM_BATCHES = 121
MARGIN = math.log(100.0)
"""Critical batches that are tried, evenly in their logarithm, and how far beyond the references' batches: at the ends
the law is proportional to the batch, or flat, to one percent."""


def mean(weights: Tensor, y: Tensor) -> Tensor:
    """The weighted mean, whatever a run shows.

    Args:
        weights: ``(..., n)``.
        y: ``(n,)``.

    Returns:
        ``(..., n)``.
    """
    return ((weights @ y) / weights.sum(-1))[..., None].expand(weights.shape)


def ridge(weights: Tensor, y: Tensor, features: Tensor) -> Tensor:
    """A plane in standardised features, its slopes drawn towards zero.

    Args:
        weights: ``(..., n)``.
        y: ``(n,)``.
        features: ``(n, d)``, or ``(..., n, d)``.

    Returns:
        ``(..., n)``.
    """
    z = standardised(weights, features)
    slopes, _ = _regress(weights, z, y[:, None])
    return mean(weights, y) + (z @ slopes)[..., 0]


def batch_law(weights: Tensor, y: Tensor, log_batch: Tensor, features: Tensor | None = None) -> Tensor:
    r"""Tokens that are the same for small batches and grow with large ones, and slopes on what else is known.

    :math:`y = a + \ln(1 + B / B^*) + c \cdot z`: up to a critical batch :math:`B^*` a sequence is worth as much in any
    batch, far beyond it a step is. For given :math:`B^*` the rest is a ridge regression.

    Args:
        weights: ``(..., n)``.
        y: ``(n,)``.
        log_batch: ``(n,)``.
        features: ``(n, d)``; None for the law alone.

    Returns:
        ``(..., n)``.

    References:
        McCandlish, Kaplan, Amodei, *An Empirical Model of Large-Batch Training*, arXiv 1812.06162 (2018), section 2.3.
    """
    ends = log_batch.min() - MARGIN, log_batch.max() + MARGIN
    critical = ends[0] + torch.linspace(0, 1, NUM_BATCHES, dtype=y.dtype) * (ends[1] - ends[0])
    law = torch.nn.functional.softplus(log_batch[:, None] - critical)
    rest = y[:, None] - law
    total = weights.sum(-1, keepdim=True)
    level = (weights @ rest) / total
    # About the mean of y, so that squares keep their digits.
    middle = rest - rest.mean()
    loss = weights @ middle.square() - (weights @ middle).square() / total
    if features is None:
        best = loss.argmin(-1)
        return law.mT[best] + level.gather(-1, best[..., None])
    z = standardised(weights, features)
    slopes, gain = _regress(weights, z, middle)
    best = (loss - gain).argmin(-1)
    slope = slopes.gather(-1, best[..., None, None].expand(*slopes.shape[:-1], 1))
    return law.mT[best] + level.gather(-1, best[..., None]) + (z @ slope)[..., 0]


def offset(weights: Tensor, y: Tensor, forecasts: Tensor) -> Tensor:
    """Forecasts that need no other runs, less what they are off by in the mean of the references.

    Args:
        weights: ``(..., n)``.
        y: ``(n,)``.
        forecasts: ``(n,)`` of y.

    Returns:
        ``(..., n)``.
    """
    return forecasts + mean(weights, y - forecasts)


def _regress(weights: Tensor, z: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Ridge slopes ``(..., d, m)`` of the columns of y on centred features, and what they take off the loss."""
    weighted = (weights[..., None] * z).mT
    along = weighted @ y
    slopes = torch.linalg.solve(weighted @ z + RIDGE * torch.eye(z.shape[-1], dtype=z.dtype), along)
    return slopes, (slopes * along).sum(-2)
