"""Rows to their first two moments, and the merging of moments without cancellation."""

from typing import NamedTuple

import torch
from torch import Tensor

from lightning_spectral.functional.arguments import check_rows, describe

PANEL = 128
"""Columns of a panel in :func:`add_products`: of 64 to 512 the fastest for widths 384 to 1600 on two cores."""


class Moments(NamedTuple):
    r"""Sufficient statistics of a set of rows for their mean and covariance, batched over leading axes.

    The second moment is kept about the set's own mean, so that a mean much larger than the spread costs no digits.
    """

    num_rows: Tensor
    """Number of rows, shape ``(...)``, float64."""
    mean: Tensor
    """Mean row, shape ``(..., d)``; zero where the count is zero."""
    scatter: Tensor
    r"""Centred outer sum :math:`\sum_i (x_i - \mu)(x_i - \mu)^\top`, shape ``(..., d, d)``."""


def moments(rows: Tensor) -> Moments:
    r"""Count, mean and centred outer sum of rows, in float64.

    The rows are centred about their computed mean :math:`m` and the rounding of :math:`m` is undone exactly
    (the corrected two-pass algorithm): with :math:`c_i = x_i - m`,
    :math:`S = \sum_i c_i c_i^\top - \frac1n (\sum_i c_i)(\sum_i c_i)^\top`.

    Args:
        rows: ``(..., n, d)``, any floating dtype.

    Returns:
        Moments with the leading axes of ``rows``.

    Raises:
        ValueError: If the rows are not of a floating type, or have fewer than two axes.

    References:
        Chan, Golub, LeVeque, *Algorithms for computing the sample variance* (1983).
    """
    check_rows("rows", rows)
    if rows.ndim < 2:
        raise ValueError(f"rows must have the axes (..., n, d), got shape {tuple(rows.shape)}: use .reshape(-1, d)")
    rows = rows.to(torch.float64)
    num_rows = rows.shape[-2]
    count = rows.new_full(rows.shape[:-2], num_rows)
    if num_rows == 0:
        return Moments(count, rows.sum(-2), rows.mT @ rows)
    pivot = rows.mean(-2)
    centred = rows - pivot.unsqueeze(-2)
    return from_shifted_sums(count, centred.sum(-2), centred.mT @ centred, pivot)


def from_shifted_sums(count: Tensor, total: Tensor, outer: Tensor, pivot: Tensor) -> Moments:
    r"""Moments from sums taken about a pivot, in place of ``outer``.

    :math:`\mu = p + s/n` and :math:`S = O - s s^\top / n`; no digits are lost as long as the pivot lies within a few
    spreads of the mean.

    Args:
        count: ``(...)`` number of rows :math:`n`.
        total: ``(..., d)`` sum :math:`s` of rows minus pivot.
        outer: ``(..., d, d)`` sum :math:`O` of outer products of rows minus pivot; overwritten by the result.
        pivot: ``(..., d)`` the pivot :math:`p`, broadcast against ``total``.

    Returns:
        Moments whose scatter shares the memory of ``outer``.
    """
    offset = total / count.clamp(min=1).unsqueeze(-1)
    mean = torch.where(count.unsqueeze(-1) > 0, pivot + offset, torch.zeros_like(offset))
    outer.addcmul_(total.unsqueeze(-1), offset.unsqueeze(-2), value=-1)
    return Moments(count, mean, outer)


def add_products(total: Tensor, rows: Tensor) -> None:
    r"""Add :math:`X^\top X` of ``(n, d)`` rows to a sum, but for its lower half: see :func:`mirror_`.

    A product of a matrix with its own transpose is symmetric: a panel of columns is multiplied only with those from its
    own first on, which on a CPU saves up to half of the work. On a GPU more, smaller kernels would cost more than they
    save. ``total``, ``(d, d)``, is added to in place; its type and device are those of the sum, not of the products.
    """
    width = rows.shape[1]
    step = PANEL if rows.device.type == "cpu" else max(width, 1)
    for start in range(0, width, step):
        panel = rows[:, start : start + step].mT @ rows[:, start:]
        total[start : start + step, start:].add_(panel.to(total.device))


def mirror_(matrices: Tensor) -> None:
    """Make ``(..., d, d)`` matrices symmetric, in place, from what is known above the diagonal alone."""
    if matrices.numel() == 0:
        return
    flat = matrices.view(-1, *matrices.shape[-2:])
    for index in range(len(flat)):
        # One at a time: a copy of all would double the memory of a report.
        upper = flat[index].triu(1)
        flat[index].triu_().add_(upper.mT)


def pool(parts: Moments, subsets: Tensor | None = None) -> Moments:
    r"""Moments of unions of disjoint sets of rows.

    For a subset with members :math:`g`: :math:`n = \sum n_g`, :math:`\mu = \frac1n \sum n_g \mu_g`,
    :math:`S = \sum S_g + \sum n_g (\mu_g - \mu)(\mu_g - \mu)^\top`. Every term is positive semi-definite: nothing
    cancels.

    Args:
        parts: Moments of G disjoint sets: num_rows ``(..., G)``, mean ``(..., G, d)``, scatter ``(..., G, d, d)``.
        subsets: ``(K, G)``, one where a set belongs to a union, zero elsewhere. None pools all sets into one.

    Returns:
        Moments of the K unions, with a K axis where the G axis was; without that axis if ``subsets`` is None.

    Raises:
        ValueError: If the parts are no moments of sets, or the subsets do not say which of them belong together.
    """
    _check_moments("parts", parts, num_axes=1)
    if subsets is not None and not (
        isinstance(subsets, Tensor) and subsets.ndim == 2 and subsets.shape[1] == parts.num_rows.shape[-1]
    ):
        raise ValueError(
            f"subsets must have the shape (K, {parts.num_rows.shape[-1]}) of unions and sets, got {describe(subsets)}"
        )
    num_parts = parts.num_rows.shape[-1]
    members = parts.num_rows.new_ones(1, num_parts) if subsets is None else subsets.to(parts.num_rows)
    count, mean, between = between_sets(parts.num_rows, parts.mean, members)
    within = torch.einsum("kg,...gde->...kde", members, parts.scatter)
    pooled = Moments(count, mean, within.add_(between))
    return (
        Moments(*(field.squeeze(-dim) for field, dim in zip(pooled, (1, 2, 3), strict=True)))
        if subsets is None
        else pooled
    )


def between_sets(counts: Tensor, means: Tensor, members: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The part of :func:`pool` that needs no scatter.

    Args:
        counts: ``(..., G)`` rows in each set.
        means: ``(..., G, d)`` their means.
        members: ``(K, G)`` membership of the sets in the unions.

    Returns:
        Counts ``(..., K)``, means ``(..., K, d)`` and scatter between the sets ``(..., K, d, d)`` of the unions.
    """
    weights = members * counts.unsqueeze(-2)
    count = weights.sum(-1)
    mean = (weights @ means) / count.clamp(min=1).unsqueeze(-1)
    deviations = means.unsqueeze(-3) - mean.unsqueeze(-2)
    between = torch.einsum("...kg,...kgd,...kge->...kde", weights, deviations, deviations)
    return count, mean, between


def covariance(sample: Moments) -> Tensor:
    """Sample covariance with divisor n - 1.

    Args:
        sample: Moments, batched over leading axes.

    Returns:
        ``(..., d, d)`` float64; NaN where there are fewer than two rows.

    Raises:
        ValueError: If they are no moments.
    """
    _check_moments("sample", sample)
    degrees = sample.num_rows - 1
    degrees = torch.where(degrees > 0, degrees, torch.nan)
    return sample.scatter / degrees[..., None, None]


def _check_moments(name: str, sample: object, num_axes: int = 0) -> None:
    """Refuse what are no moments, batched over at least so many axes, by a ValueError."""
    if not isinstance(sample, Moments) or not all(isinstance(field, Tensor) for field in sample):
        raise ValueError(f"{name} must be Moments, got {describe(sample)}: see lightning_spectral.functional.moments")
    shapes = tuple(sample.num_rows.shape), tuple(sample.mean.shape), tuple(sample.scatter.shape)
    lead, row, matrix = shapes
    if len(lead) < num_axes or row[:-1] != lead or len(row) != len(lead) + 1 or matrix != (*row, row[-1]):
        raise ValueError(f"{name} must have the shapes (...), (..., d) and (..., d, d), got {shapes}")
