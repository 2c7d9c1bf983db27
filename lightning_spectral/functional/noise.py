"""The gradient noise scale: how many samples a gradient needs before its noise is as small as itself."""

import math
from typing import NamedTuple

import torch
from torch import Tensor


class GradientMoments(NamedTuple):
    """Unbiased estimates from per-sample gradients; they add up over parameters, the noise scale does not."""

    squared_norm: Tensor
    """Squared norm of the true gradient; negative where noise hides it."""
    trace: Tensor
    """Trace of the covariance of per-sample gradients."""

    @property
    def noise_scale(self) -> Tensor:
        """Simple noise scale, ``trace / squared_norm`` in samples; NaN where the squared norm is not positive."""
        return torch.where(self.squared_norm > 0, self.trace / self.squared_norm, torch.nan)


def gradient_moments(gram: Tensor) -> GradientMoments:
    r"""Squared norm of the mean gradient and trace of the covariance, without bias.

    With :math:`K = G G^\top` of N rows, :math:`s = \sum_{mn} K_{mn}` and :math:`t = \sum_m K_{mm}`:
    :math:`|\mu|^2 = \frac{s - t}{N (N - 1)}`, the mean product of two different rows, and
    :math:`\operatorname{tr} \Sigma = \frac{t - s / N}{N - 1}`.

    Args:
        gram: ``(..., N, N)``.

    Returns:
        ``(...)`` float64 each; NaN for fewer than two rows.
    """
    gram = gram.to(torch.float64)
    num_rows = gram.shape[-1]
    total, diagonal = gram.sum((-2, -1)), gram.diagonal(dim1=-2, dim2=-1).sum(-1)
    if num_rows < 2:
        missing = torch.full_like(total, torch.nan)
        return GradientMoments(missing, missing)
    squared_norm = (total - diagonal) / (num_rows * (num_rows - 1))
    return GradientMoments(squared_norm, (diagonal - total / num_rows) / (num_rows - 1))


def gradient_noise_scale(gram: Tensor) -> Tensor:
    r"""Simple gradient noise scale :math:`\operatorname{tr} \Sigma / |\mu|^2`, in samples.

    Args:
        gram: ``(..., N, N)`` Gram matrix of the gradients of N samples.

    Returns:
        ``(...)`` float64; NaN for fewer than two samples and where the unbiased estimate of :math:`|\mu|^2` is not
        positive: too few samples to see the gradient behind its noise.

    Raises:
        ValueError: If the matrix is not square.

    References:
        McCandlish, Kaplan, Amodei et al., *An Empirical Model of Large-Batch Training*, arXiv 1812.06162 (2018), whose
        appendix A.1 removes the bias in the same way from gradients of two batch sizes.

    Example:
        >>> import torch
        >>> rows = torch.tensor([[2.0, 1.0], [2.0, -1.0]])  # mean (2, 0), trace of the covariance 2
        >>> gradient_noise_scale(rows @ rows.T)  # unbiased: 2 / (4 - 2 / 2)
        tensor(0.6667, dtype=torch.float64)
    """
    if gram.ndim < 2 or gram.shape[-1] != gram.shape[-2]:
        raise ValueError(f"gram must be square in its last two axes, got shape {tuple(gram.shape)}")
    return gradient_moments(gram).noise_scale


def mean_row_norm(gram: Tensor) -> Tensor:
    r"""Norm of the mean row, :math:`\sqrt{\sum_{mn} K_{mn}} / N`, from ``(..., N, N)`` float64; NaN without rows."""
    num_rows = gram.shape[-1]
    return gram.sum((-2, -1)).clamp(min=0).sqrt() / (num_rows or math.nan)
