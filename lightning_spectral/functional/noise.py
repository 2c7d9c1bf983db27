"""The gradient noise scale: how many samples a gradient needs before its noise is as small as itself."""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lightning_spectral.functional.arguments import check_gram, check_int, check_real, describe
from lightning_spectral.functional.noise_interval import NoiseInterval, noise_interval

MOST_GROUPS = 4096
"""Beyond the number of samples: products of their sums take 128 MiB."""


class GradientMoments(NamedTuple):
    """Unbiased estimates from per-sample gradients; they add up over parameters, the noise scale does not."""

    squared_norm: Tensor
    """Squared norm of the true gradient; negative where noise hides it."""
    trace: Tensor
    """Trace of the covariance of per-sample gradients."""

    @property
    def noise_scale(self) -> Tensor:
        """Simple noise scale, ``trace / squared_norm`` in samples.

        ``inf`` where the squared norm is not positive: the samples agree no more than noise does, and all that can be
        said is that the noise scale is large. NaN where a part is NaN, or both are zero.
        """
        ratio = self.trace / self.squared_norm
        return torch.where((self.squared_norm <= 0) & (self.trace > 0), torch.inf, ratio)


class NoiseSums(NamedTuple):
    """What the noise scale and its interval are made of: sums over groups of samples, which add up over parameters."""

    products: Tensor
    """``(..., G, G)`` products of the sums of the gradients of two groups."""
    squares: Tensor
    """``(..., G)`` squared norms of the gradients of single samples, summed over each group."""
    counts: Tensor
    """``(G,)`` samples of each group; no groups for what is not there, and adds nothing."""

    @property
    def moments(self) -> GradientMoments:
        """Unbiased estimates from all pairs of samples; NaN for fewer than two."""
        total, squares = self.products.sum((-2, -1)), self.squares.sum(-1)
        num_rows = float(self.counts.sum())
        if num_rows < 2:
            return _unknown(total)
        squared_norm = (total - squares) / (num_rows * (num_rows - 1))
        return GradientMoments(squared_norm, (squares - total / num_rows) / (num_rows - 1))

    @property
    def moments_between(self) -> GradientMoments:
        """Likewise from pairs of samples of different groups alone; from all pairs where there is but one group.

        Samples that share a document are alike: in the same group, they do not pass for signal here.
        """
        kept = self._filled
        num_pairs = float(kept.counts.sum().square() - kept.counts.square().sum())
        if num_pairs == 0:
            return self.moments
        within = kept.products.diagonal(dim1=-2, dim2=-1).sum(-1)
        squared_norm = (kept.products.sum((-2, -1)) - within) / num_pairs
        return GradientMoments(squared_norm, kept.squares.sum(-1) / float(kept.counts.sum()) - squared_norm)

    @property
    def noise_scale(self) -> Tensor:
        """See :attr:`GradientMoments.noise_scale`, from all pairs of samples."""
        return self.moments.noise_scale

    @property
    def interval(self) -> NoiseInterval:
        """80% interval of the noise scale, see :func:`lightning_spectral.functional.noise_interval.noise_interval`.

        That is made of pairs of samples of different groups. It is widened to hold :attr:`noise_scale`, of all pairs,
        which lies outside where samples of a group are so much alike that they pass for signal.
        """
        low, high = noise_interval(*self._filled)
        return NoiseInterval(torch.minimum(low, self.noise_scale), torch.maximum(high, self.noise_scale))

    @property
    def _filled(self) -> "NoiseSums":
        """Those of the groups that have samples."""
        filled = self.counts > 0
        products = self.products[..., filled, :][..., filled].to(torch.float64)
        return NoiseSums(products, self.squares[..., filled].to(torch.float64), self.counts[filled].to(torch.float64))

    @classmethod
    def total(cls, parts: Sequence["NoiseSums"]) -> "NoiseSums":
        """Those of several parameters together, on the same samples; NaN where those of one are."""
        there = [part for part in parts if part.counts.numel()]
        if not there:
            return cls.nothing()
        if any(part.products.shape != there[0].products.shape for part in there):
            return cls.missing()
        products, squares, counts = zip(*there, strict=True)
        return cls(torch.stack(products).sum(0), torch.stack(squares).sum(0), counts[0])

    @classmethod
    def nothing(cls) -> "NoiseSums":
        """Those of no samples."""
        empty = torch.zeros(0, dtype=torch.float64)
        return cls(empty.reshape(0, 0), empty, empty)

    @classmethod
    def missing(cls) -> "NoiseSums":
        """Those that are not known: all that is made of them is NaN."""
        unknown = torch.full((1,), torch.nan, dtype=torch.float64)
        return cls(unknown.reshape(1, 1), unknown, torch.zeros(1, dtype=torch.float64))


def noise_sums(gram: Tensor, groups: Tensor | None = None, num_groups: int | None = None) -> NoiseSums:
    """What the noise scale is made of, from the Gram matrix of per-sample gradients.

    Args:
        gram: ``(..., N, N)`` Gram matrix of the gradients of N samples.
        groups: ``(N,)`` group of each sample, from 0; samples of different groups must be independent. None for a group
            of its own for each.
        num_groups: G; None for as many as there are.

    Returns:
        Sums in float64, on the device of the matrix.

    Raises:
        ValueError: For what is no Gram matrix, see :func:`gradient_noise_scale`, for groups of another number of
            samples or that are no whole numbers from 0, and for fewer groups than are there.

    Example:
        >>> import torch
        >>> rows = 1 + torch.randn(64, 50, generator=torch.Generator().manual_seed(0))  # truth: 50 / 50
        >>> low, high = noise_sums(rows @ rows.T, torch.arange(64) % 4).interval
        >>> bool(low < 1 < high)
        True
    """
    check_gram(gram)
    groups = _checked_groups(groups, num_groups, gram.shape[-1])
    return sums_of_groups(gram, groups, None if num_groups is None else int(num_groups))


def sums_of_groups(gram: Tensor, groups: Tensor, num_groups: int | None = None) -> NoiseSums:
    """See :func:`noise_sums`, of a matrix that is known for a Gram matrix."""
    gram, groups = gram.to(torch.float64), groups.to(gram.device)
    if num_groups is None:
        num_groups = int(groups.max()) + 1 if groups.numel() else 0
    members = torch.nn.functional.one_hot(groups, max(num_groups, 1)).to(torch.float64)
    products = members.mT @ gram @ members
    return NoiseSums(products, gram.diagonal(dim1=-2, dim2=-1) @ members, members.sum(0))


def gradient_moments(gram: Tensor) -> GradientMoments:
    r"""Squared norm of the mean gradient and trace of the covariance, without bias.

    With :math:`K = G G^\top` of N rows, :math:`s = \sum_{mn} K_{mn}` and :math:`t = \sum_m K_{mm}`:
    :math:`|\mu|^2 = \frac{s - t}{N (N - 1)}`, the mean product of two different rows, and
    :math:`\operatorname{tr} \Sigma = \frac{t - s / N}{N - 1}`.

    Args:
        gram: ``(..., N, N)``.

    Returns:
        ``(...)`` float64 each; NaN for fewer than two rows.

    Raises:
        ValueError: For what is no Gram matrix, see :func:`gradient_noise_scale`.
    """
    check_gram(gram)
    return sums_of_groups(gram, torch.zeros(gram.shape[-1], dtype=torch.int64)).moments


def gradient_noise_scale(gram: Tensor) -> Tensor:
    r"""Simple gradient noise scale :math:`\operatorname{tr} \Sigma / |\mu|^2`, in samples.

    Both parts are estimated without bias, their ratio is not: where N is not far above the noise scale, it scatters by
    more than its size, and below it half of the estimates of :math:`|\mu|^2` are not positive. Read it with its
    interval, :attr:`NoiseSums.interval` of :func:`noise_sums`; to average several, average their parts
    (:func:`gradient_moments`).

    Args:
        gram: ``(..., N, N)`` Gram matrix of the gradients of N samples.

    Returns:
        ``(...)`` float64; ``inf`` where the unbiased estimate of :math:`|\mu|^2` is not positive: too few samples to
        see the gradient behind its noise. NaN for fewer than two samples, numbers that are NaN and gradients of zero.

    Raises:
        ValueError: If the matrix is not real, square and symmetric, or a sample's squared norm is negative.

    References:
        McCandlish, Kaplan, Amodei et al., *An Empirical Model of Large-Batch Training*, arXiv 1812.06162 (2018), whose
        appendix A.1 removes the bias of the parts in the same way from gradients of two batch sizes.

    Example:
        >>> import torch
        >>> rows = torch.tensor([[2.0, 1.0], [2.0, -1.0]])  # mean (2, 0), trace of the covariance 2
        >>> gradient_noise_scale(rows @ rows.T)  # 2 / (4 - 2 / 2)
        tensor(0.6667, dtype=torch.float64)
    """
    return gradient_moments(gram).noise_scale


def mean_row_norm(gram: Tensor) -> Tensor:
    r"""Norm of the mean row, :math:`\sqrt{\sum_{mn} K_{mn}} / N`, from ``(..., N, N)`` float64; NaN without rows."""
    num_rows = gram.shape[-1]
    return gram.sum((-2, -1)).clamp(min=0).sqrt() / (num_rows or math.nan)


def _unknown(like: Tensor) -> GradientMoments:
    missing = torch.full_like(like, torch.nan)
    return GradientMoments(missing, missing)


def _checked_groups(groups: Any, num_groups: Any, num_samples: int) -> Tensor:
    """The group of each sample as an index; ValueError for what is none, or for fewer groups than there are."""
    most = max(num_samples, MOST_GROUPS)
    if groups is None:
        groups = torch.arange(num_samples)
    check_real(groups=groups)
    if groups.is_floating_point():
        raise ValueError(f"groups must hold whole numbers, got {describe(groups)}: use .long()")
    if groups.shape != (num_samples,):
        raise ValueError(f"groups must be one for each of {num_samples} samples, got shape {tuple(groups.shape)}")
    groups = groups.to(torch.int64)
    lowest, highest = (int(groups.min()), int(groups.max())) if num_samples else (0, 0)
    if lowest < 0 or highest >= most:
        wrong = lowest if lowest < 0 else highest
        raise ValueError(f"groups must be from 0 to {most - 1}, got {wrong}: number them in order")
    if num_groups is not None:
        check_int(highest + 1, most, num_groups=num_groups)
    return groups
