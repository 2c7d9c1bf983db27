"""An interval for the noise scale, a ratio whose denominator may well be zero."""

from typing import NamedTuple

import torch
from scipy.special import stdtrit
from torch import Tensor

LEVEL = 0.8
"""Share of intervals that hold the truth, as of all error bars here."""
MIN_GROUPS = 3
"""Of two groups there is a single product: nothing says how it scatters."""
RESOLUTION = 10.0
"""The low end is at most so many times the noise scale whose signal is as large as the noise of its estimate."""


class NoiseInterval(NamedTuple):
    """80% interval of a noise scale, in samples."""

    low: Tensor
    """Finite; below the truth in about nine cases of ten. NaN where nothing says how the estimate scatters."""
    high: Tensor
    """Above the truth in about nine cases of ten; ``inf`` where the samples do not exclude a gradient of zero."""


def noise_interval(products: Tensor, squares: Tensor, counts: Tensor) -> NoiseInterval:
    r"""80% interval of the noise scale from independent groups of samples.

    With :math:`M` the mean product of two samples of different groups, unbiased for :math:`|\mu|^2`, and :math:`D` the
    mean squared norm, unbiased for :math:`|\mu|^2 + \operatorname{tr} \Sigma`, the noise scale is :math:`1 / \rho - 1`
    of :math:`\rho = |\mu|^2 / (|\mu|^2 + \operatorname{tr} \Sigma)`. The interval holds all :math:`\rho` that a test of
    :math:`M - \rho D = 0` does not reject (Fieller, 1954):

    .. math:: (M - \rho D)^2 \le q^2 V(\rho), \quad
        V(\rho) = \frac{2 \operatorname{tr} \Omega^2}{N^2 - \sum_g n_g^2} + \frac{4 \rho D v}{N} - 2 \rho c + \rho^2 w

    :math:`\Omega / n_g` is the covariance of the mean of group g. The first term is the variance of a U-statistic of
    pure noise (Hoeffding, 1948), the second what the gradient adds to it, v being the variance along the mean gradient:
    it is taken at the :math:`\rho` that is tested (a score test), as the one at M would be too small where M came out
    too small. w is the variance of D, c the covariance of both. v, w and c are those between groups, with G - 1 degrees
    of freedom; :math:`\operatorname{tr} \Omega^2` is the unbiased estimate from the G - 1 contrasts between groups (of
    normal group means), with (G - 2)(G + 1) / 2. q is Student's 90% point, at Satterthwaite's degrees of freedom.

    Where :math:`\rho = 0` is not rejected the interval is open, as one that covers must be now and then (Gleser and
    Hwang, 1987). Where M is so negative that every :math:`\rho` is rejected, as chance will have it in a tenth of
    cases without a gradient, the low end is what the samples resolve, see ``RESOLUTION``.

    How often it holds the truth: ``python -m benchmarks.findings.promises --only "noise scale"``.

    Args:
        products: ``(..., G, G)`` products of the sums of the gradients of two groups.
        squares: ``(..., G)`` squared norms of gradients, summed over each group.
        counts: ``(G,)`` samples of each, at least one.

    Returns:
        ``(...)`` float64 each; NaN for fewer than three groups and numbers that are NaN.

    References:
        Fieller, *Some problems in interval estimation*, J. R. Stat. Soc. B 16 (1954); Hoeffding, *A class of
        statistics with asymptotically normal distribution*, Ann. Math. Stat. 19 (1948); Gleser, Hwang, *The
        nonexistence of 100(1 - alpha)% confidence sets of finite expected diameter in errors-in-variables and related
        models*, Ann. Stat. 15 (1987); Satterthwaite, *An approximate distribution of estimates of variance components*,
        Biometrics 2 (1946).
    """
    num_groups = len(counts)
    if num_groups < MIN_GROUPS:
        unknown = torch.full_like(squares.sum(-1), torch.nan)
        return NoiseInterval(unknown, unknown)
    rows, num_pairs = counts.sum(), counts.sum().square() - counts.square().sum()
    total = products.sum((-2, -1))
    signal = (total - products.diagonal(dim1=-2, dim2=-1).sum(-1)) / num_pairs
    size, mean_square = squares.sum(-1) / rows, total / rows.square()
    freedom = num_groups - 1

    # How groups differ: along the mean gradient, and in size.
    along = products.sum(-1) / (rows * counts) - mean_square.unsqueeze(-1)
    apart = squares / counts - size.unsqueeze(-1)
    direction = (counts * along.square()).sum(-1) / (freedom * mean_square.clamp(min=torch.finfo(torch.float64).tiny))
    size_variance = (counts * apart.square()).sum(-1) / (freedom * rows)
    covariance = 2 * (counts * along * apart).sum(-1) / (freedom * rows)
    covariance = covariance * (signal / mean_square).nan_to_num().clamp(0, 1)  # of the part that is no noise

    noise = 2 * _trace_of_square(products, counts) / num_pairs
    quantile = _quantile(
        noise, 4 * direction / rows * signal.clamp(min=0), (signal / size).square() * size_variance, freedom
    )
    noise_limit, linear = quantile.square() * noise, quantile.square() * (2 * direction / rows * size - covariance)

    # a rho^2 - 2 b rho + c <= 0; its lower root is c / (b + root) whatever the sign of a.
    a, b = size.square() - quantile.square() * size_variance, signal * size + linear
    c = signal.square() - noise_limit
    root = (b.square() - a * c).clamp(min=0).sqrt()
    upper = torch.where(a > 0, (b + root) / a, 1.0)
    upper = torch.maximum(upper, noise.sqrt() / (RESOLUTION * size)).clamp(max=1)
    lower = torch.where((signal > 0) & (c > 0), c / (b + root), 0.0).clamp(0, 1)
    low, high = 1 / upper - 1, 1 / lower - 1
    is_known = (upper > 0) & (size > 0) & total.isfinite()
    return NoiseInterval(torch.where(is_known, low, torch.nan), torch.where(is_known, high, torch.nan))


def _trace_of_square(products: Tensor, counts: Tensor) -> Tensor:
    """Trace of the squared covariance of noise, from the G - 1 contrasts between groups."""
    freedom = len(counts) - 1
    roots = counts.sqrt()
    weighted = products / (roots.unsqueeze(-1) * roots)
    share = roots / roots.square().sum().sqrt()
    centring = torch.eye(len(counts), dtype=products.dtype, device=products.device) - torch.outer(share, share)
    between = centring @ weighted @ centring / freedom
    trace = between.diagonal(dim1=-2, dim2=-1).sum(-1)
    squared = between.square().sum((-2, -1)) - trace.square() / freedom
    return freedom**2 / ((freedom - 1) * (freedom + 2)) * squared.clamp(min=0)


def _quantile(noise: Tensor, of_signal: Tensor, of_size: Tensor, freedom: int) -> Tensor:
    """Student's quantile where variances with different degrees of freedom add up."""
    by_groups = of_signal + of_size
    of_noise = (freedom - 1) * (freedom + 2) / 2
    found = (by_groups + noise).square() / (by_groups.square() / freedom + noise.square() / of_noise)
    found = torch.where(found.isfinite(), found, float(freedom))
    return torch.as_tensor(stdtrit(found.cpu().numpy(), (1 + LEVEL) / 2), dtype=torch.float64, device=noise.device)
