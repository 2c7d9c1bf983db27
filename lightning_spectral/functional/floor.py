r"""Sampling floors: how far apart two spectra, or bases, of one and the same process may lie by sampling alone.

A floor is an upper 95% limit, in four steps.

*Expectation.* With :math:`\theta_{(g)}` a spectrum or basis without group g of G, a distance D that is quadratic in
small changes has, between two samples of the process, the expectation
:math:`\frac{(G-1)^2}{G}\, \overline{D(\theta_{(g)}, \theta_{(h)})}` over the pairs :math:`g < h`: to first order
:math:`\theta_{(g)} - \theta_{(h)} = (x_h - x_g)/(G - 1)` with :math:`x_g` the contribution of group g, while two
samples differ by two means of G such contributions. For G = 2 this is the distance of the two halves, divided by two.
The groups' own scatter sets the scale, so neither heavy tails nor tokens that depend on each other within a sequence
are assumed away, as long as the groups are of whole sequences.

*Limit.* To first order D is :math:`\sum_j c_j z_j^2` with standard normal z, and so is its estimate, with G - 1 times
the degrees of freedom: their ratio follows about :math:`F(\nu, \nu (G - 1))`, and its 95% quantile times the estimate
is the limit. Satterthwaite's :math:`\nu = (\sum c)^2 / \sum c^2` would match the variance if c were known. It is known
for independent Gaussian rows alone, and even there the errors of neighbouring eigenvalues go together. So
:math:`\nu = \sum c / \|c\|` is used, a lower bound of :math:`\sum c / \max c`, the number of *equal* parts as large as
the largest, whose sum has the heaviest tail; never below one.

*Rotations that are not small.* By the sin 2 Theta theorem a perturbation of size r turns a direction that a gap g
separates by no more than :math:`\frac12 \arcsin(2 r / g)`, and by any angle once :math:`2 r \ge g`. The limits above
are limits of r / g. Where eigenvalues on both sides of the cut are not separated beyond their sampling error the floor
of the angle therefore goes to pi/2, and the overlap may lose each direction that is free to turn.

*Two samples.* Each gives an estimate, and the mean of both is the expectation between them; of two numbers of degrees
of freedom the smaller one counts.

*Two of the same rows*, known by :attr:`Spectrum.rows`, as of one model at two times on validation data that come back,
are paired (:mod:`lightning_spectral.functional.paired`): the expectation is that of their difference, which the rows'
own scatter leaves alone as far as it is common to both. Then a distance beyond the floor is one that other rows of the
same population show too, in 95 of 100 cases where they would show none it lies within.

References:
    Satterthwaite, *An approximate distribution of estimates of variance components* (1946); Anderson, *Asymptotic
    theory for principal component analysis* (1963), for the rotation of eigenvectors; Davis, Kahan, *The rotation of
    eigenvectors by a perturbation III* (1970); Shao, Wu, *A general theory for jackknife variance estimation* (1989).
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from scipy.special import fdtri
from torch import Tensor

from lightning_spectral.functional.arguments import describe
from lightning_spectral.functional.estimate import Spectrum
from lightning_spectral.functional.paired import are_paired, basis_differences, pairs_of, spectral_differences
from lightning_spectral.functional.spectrum import js_divergence, normalize
from lightning_spectral.functional.subspace import principal_angles

LEVEL = 0.95
"""Share of samples of one process that stay within a floor."""

_TINY = 1e-300


def js_floor(*samples: Spectrum) -> Tensor:
    r"""Upper 95% limit of the Jensen-Shannon divergence of two samples of one process.

    Relative errors e of eigenvalues, normalised to p, come to :math:`\frac18 (\sum p e^2 - (\sum p e)^2)`: the parts c
    are the eigenvalues of :math:`\operatorname{diag} p - p p^\top`.

    Args:
        samples: One, for the floor about it, or the two that are compared: paired if they are of the same rows. Those
            with fewer than two groups are passed over.

    Returns:
        ``(...)`` nats, float64, at most ln 2; NaN where no sample has estimates without each of two or more groups.

    Raises:
        ValueError: If there is no sample, or they are of different widths.

    Example:
        >>> import torch
        >>> halves = torch.tensor([[3.1, 1.0], [2.9, 1.0]])
        >>> expected = js_divergence(halves[0], halves[1]) / 2
        >>> both = Spectrum(torch.tensor([3.0, 1.0]), halves)
        >>> js_floor(both) / expected  # F(1, 1): one pair says little of a scatter
        tensor(161.4476, dtype=torch.float64)
    """
    _check(samples)
    noises = [_js_noise(sample) for sample in samples]
    if _is_pair(samples):
        distances, parts = spectral_differences(*samples)
        noises = [_paired(noises, distances, parts)]
    return _limit(noises).clamp(max=math.log(2))


def overlap_floor(*samples: Spectrum) -> Tensor:
    r"""Lower 95% limit of the overlap of the leading eigenvectors of two samples of one process.

    To first order the squared rotation of direction i towards j is in proportion to
    :math:`w_{ij} = l_i l_j / (l_i - l_j)^2`, and the loss of overlap to their sum over :math:`i \le k < j`. The limit
    of the sum is shared out among the directions inside, and among those outside, in these proportions; a direction
    loses all once it is free to turn.

    Args:
        samples: As for :func:`js_floor`, with vectors.

    Returns:
        ``(...)`` float64 between max(0, 2k - d)/k and 1: an overlap *below* it is drift. NaN as for :func:`js_floor`.

    Raises:
        ValueError: If a sample has no vectors, there is none, or they are of different widths.
    """
    _check(samples)
    noises, weights = [], []
    for sample in samples:
        rotations = _rotations(sample)
        loss = _noise(sample, _angles(sample).sin().square().sum(-1), rotations.flatten(-2))
        noises.append(loss)
        weights.append(rotations / rotations.sum((-2, -1), keepdim=True).clamp(min=_TINY))
    if _is_pair(samples):
        noises = [_paired(noises, basis_differences(*samples).square().sum((-2, -1)))]
    shares = torch.stack(weights).mean(0) * _limit(noises)[..., None, None]
    inside, outside = (_loss(shares.sum(axis)).sum(-1) for axis in (-1, -2))
    width, rank = shares.shape[-2] + shares.shape[-1], shares.shape[-2]
    return 1 - torch.minimum(inside, outside).clamp(max=min(rank, width - rank)) / rank


def angle_floor(*samples: Spectrum) -> Tensor:
    r"""Upper 95% limit of the largest principal angle of the leading eigenvectors of two samples of one process.

    The degrees of freedom are those of the direction that turns most.

    Args:
        samples: As for :func:`js_floor`, with vectors.

    Returns:
        ``(...)`` radians, float64, at most pi/2, as where nothing separates the eigenvalues at the cut. NaN as for
        :func:`js_floor`.

    Raises:
        ValueError: If a sample has no vectors, there is none, or they are of different widths.
    """
    _check(samples)
    noises = []
    for sample in samples:
        rotations = _rotations(sample)
        most = rotations.sum(-1).argmax(-1)[..., None, None].expand(*rotations.shape[:-2], 1, rotations.shape[-1])
        noises.append(_noise(sample, _angles(sample)[..., 0].square(), rotations.gather(-2, most).squeeze(-2)))
    if _is_pair(samples):
        noises = [_paired(noises, torch.linalg.matrix_norm(basis_differences(*samples), ord=2).square())]
    return _loss(_limit(noises)).sqrt().asin()


def _check(samples: tuple[Spectrum, ...]) -> None:
    """Refuse what are no spectra of one shape, by a ValueError."""
    if not samples or not all(isinstance(sample, Spectrum) for sample in samples):
        raise ValueError(f"samples must be one Spectrum or more, got {describe(samples)}")
    shapes = [tuple(sample.values.shape) for sample in samples]
    ranks = [None if sample.vectors is None else sample.vectors.shape[-1] for sample in samples]
    if len(set(shapes)) > 1 or len({rank for rank in ranks if rank is not None}) > 1:
        raise ValueError(
            f"samples must have values and vectors of one shape, got values of {shapes}: compare like with like"
        )


class _Noise(NamedTuple):
    """What one sample tells of a distance between two."""

    expected: Tensor
    """``(...)`` expectation of the distance."""
    degrees: Tensor
    """``(...)`` its degrees of freedom nu, between two samples."""
    num_groups: int


def _is_pair(samples: tuple[Spectrum, ...]) -> bool:
    return len(samples) == 2 and _num_groups(samples[0]) >= 2 and are_paired(*samples)


def _paired(noises: list[_Noise], distances: Tensor, parts: Sequence[Tensor] = ()) -> _Noise:
    """What two samples of the same rows tell together, from distances ``(..., pairs)`` of the groups' differences."""
    num_groups = noises[0].num_groups
    known = [_degrees(part.sum(-1), torch.linalg.vector_norm(part, dim=-1)) for part in parts]
    degrees = torch.stack([*(noise.degrees for noise in noises), *known]).amin(0)
    return _Noise((num_groups - 1) ** 2 / (2 * num_groups) * distances.mean(-1), degrees, num_groups)


def _js_noise(sample: Spectrum) -> _Noise:
    first, second = pairs_of(sample.leave_one_out)
    p = normalize(sample.values)
    square = p.square().sum(-1)
    # Trace and Frobenius norm of diag(p) - p p', whose eigenvalues are the parts c.
    total, norm = 1 - square, (square - 2 * p.pow(3).sum(-1) + square.square()).clamp(min=0).sqrt()
    return _Noise(_expected(sample, js_divergence(first, second)), _degrees(total, norm), _num_groups(sample))


def _noise(sample: Spectrum, distances: Tensor, parts: Tensor) -> _Noise:
    """From the distances ``(..., pairs)`` between estimates without each group, and the parts c ``(..., n)``."""
    degrees = _degrees(parts.sum(-1), torch.linalg.vector_norm(parts, dim=-1))
    return _Noise(_expected(sample, distances), degrees, _num_groups(sample))


def _degrees(total: Tensor, norm: Tensor) -> Tensor:
    # Below one only by rounding, and where there is no noise at all.
    return torch.where(norm > 0, total / norm.clamp(min=_TINY), 1.0).clamp(min=1)


def _num_groups(sample: Spectrum) -> int:
    return sample.leave_one_out.shape[-2]


def _expected(sample: Spectrum, distances: Tensor) -> Tensor:
    # The mean of no pair is NaN, and a sample without pairs is passed over.
    return (_num_groups(sample) - 1) ** 2 / max(_num_groups(sample), 1) * distances.mean(-1)


def _vectors(sample: Spectrum) -> tuple[Tensor, Tensor]:
    if sample.vectors is None or sample.leave_one_out_vectors is None:
        raise ValueError("samples must have vectors and leave_one_out_vectors, got None: only js_floor does without")
    return sample.vectors, sample.leave_one_out_vectors


def _angles(sample: Spectrum) -> Tensor:
    """Principal angles ``(..., pairs, k)`` between the leading eigenvectors without each group."""
    return principal_angles(*pairs_of(_vectors(sample)[1], axis=-3))


def _rotations(sample: Spectrum) -> Tensor:
    """How far noise turns each leading eigenvector towards each other one, ``(..., k, d - k)`` up to a factor."""
    rank = _vectors(sample)[0].shape[-1]
    values = sample.values.to(torch.float64)
    inside, outside = values[..., :rank, None], values[..., None, rank:]
    # Equal values would divide by zero: their gap is rounding, and what it gives is large enough to be alone.
    gap = torch.maximum(inside - outside, torch.finfo(torch.float64).eps * inside)
    return inside * outside / gap.square().clamp(min=_TINY)


def _limit(noises: list[_Noise]) -> Tensor:
    """The upper limit of a distance, from one sample or two."""
    known = [noise for noise in noises if noise.num_groups >= 2] or noises
    expected = torch.stack([noise.expected for noise in known]).mean(0)
    degrees = torch.stack([noise.degrees for noise in known]).amin(0)
    # Of a mean of independent estimates: reciprocals of degrees of freedom add like variances.
    factor = len(known) ** 2 / sum(1 / max(noise.num_groups - 1, 1) for noise in known)
    return expected * _f_quantile(degrees, degrees * factor)


def _f_quantile(numerator: Tensor, denominator: Tensor) -> Tensor:
    numerator, denominator = numerator.detach(), denominator.detach()
    return torch.as_tensor(fdtri(numerator.cpu().numpy(), denominator.cpu().numpy(), LEVEL)).to(numerator)


def _loss(rotation: Tensor) -> Tensor:
    """Squared sine of the angle to which a limit of (r / g)^2, perturbation over gap, allows a direction to turn."""
    bound = (1 - (1 - 4 * rotation.clamp(max=0.25)).sqrt()) / 2
    return torch.where(rotation < 0.25, bound, 1.0).masked_fill(rotation.isnan(), torch.nan)
