r"""Two spectra, or bases, of the same rows: how far their difference is that of these rows alone.

Much of what the choice of rows does to one it does to the other, and it goes out in their difference. The error of that
is read off the differences without each group, :math:`\delta_{(g)} = \theta_{(g)} - \theta'_{(g)}`: to first order
:math:`\delta_{(g)} - \delta_{(h)} = (y_h - y_g)/(G - 1)` with :math:`y_g` what group g contributes to the difference,
which itself is the mean of the G contributions. Where the population shows no difference, a distance q, quadratic in
small changes, has the expectation
:math:`\frac{(G-1)^2}{2 G}\, \overline{q(\delta_{(g)} - \delta_{(h)})}` over the pairs :math:`g < h`. Where the two have
nothing in common that is the expectation for independent samples.
"""

import torch
from torch import Tensor

from lightning_spectral.functional.estimate import Spectrum
from lightning_spectral.functional.spectrum import normalize

_TINY = 1e-300


def are_paired(*samples: Spectrum) -> bool:
    """Whether spectra are of the same rows, in the same groups, as far as is known."""
    first = samples[0]
    return bool(first.rows) and all(
        other.rows == first.rows
        and other.count == first.count
        and other.leave_one_out.shape == first.leave_one_out.shape
        for other in samples
    )


def spectral_differences(first: Spectrum, second: Spectrum) -> tuple[Tensor, list[Tensor]]:
    r"""Jensen-Shannon divergences that the groups' differences come to, in its quadratic form.

    :math:`\frac18 \sum_j e_j^2 / p_j` for a change e of normalised eigenvalues about p, the mean of both spectra.

    Returns:
        ``(..., pairs)`` nats, and in the mean over pairs their parts ``(..., n)``, eigenvalue by eigenvalue: of spectra
        that each sum to one, and with the sums of all groups, where a change of one eigenvalue is none of the others.
    """
    centre = (normalize(first.values) + normalize(second.values)) / 2
    parts = [
        _parts(of(first) - of(second), centre)
        for of in (
            lambda one: normalize(one.leave_one_out),
            lambda one: one.leave_one_out / one.values.sum(-1)[..., None, None],
        )
    ]
    return parts[0].sum(-1), [part.mean(-2) for part in parts]


def _parts(differences: Tensor, centre: Tensor) -> Tensor:
    one, other = pairs_of(differences)
    parts = (one - other).square() / (8 * centre.clamp(min=_TINY).unsqueeze(-2))
    return torch.where(centre.unsqueeze(-2) > 0, parts, 0.0)


def basis_differences(first: Spectrum, second: Spectrum) -> Tensor:
    r"""Rotations that the groups' differences come to.

    Bases without each group are told by their tangents :math:`(I - U U^\top) U_{(g)} (U^\top U_{(g)})^{-1}` at the
    basis U of all rows, those of the second after the rotation that takes it to the first along the shortest way.

    Returns:
        ``(..., pairs, d, k)``, whose singular values are tangents of principal angles.
    """
    (here, without), (there, without_there) = (
        (_orthonormal(sample.vectors), _orthonormal(sample.leave_one_out_vectors)) for sample in (first, second)
    )
    differences = _tangents(without, here) - _tangents(_turned(without_there, there, here), here)
    one, other = pairs_of(differences, axis=-3)
    return one - other


def pairs_of(estimates: Tensor, axis: int = -2) -> tuple[Tensor, Tensor]:
    """The first and the second of each pair of groups, along the groups' axis."""
    first, second = torch.triu_indices(estimates.shape[axis], estimates.shape[axis], 1, device=estimates.device)
    return estimates.index_select(axis, first), estimates.index_select(axis, second)


def _orthonormal(vectors: Tensor | None) -> Tensor:
    assert vectors is not None
    return torch.linalg.qr(vectors.to(torch.float64)).Q


def _tangents(bases: Tensor, origin: Tensor) -> Tensor:
    """Of bases ``(..., G, d, k)`` at one ``(..., d, k)``; they do not depend on which vectors span them."""
    origin = origin.unsqueeze(-3)
    inner = origin.mT @ bases
    return (bases - origin @ inner) @ torch.linalg.pinv(inner)


def _turned(bases: Tensor, start: Tensor, end: Tensor) -> Tensor:
    """Bases ``(..., G, d, k)`` after the direct rotation of the span of ``start`` to that of ``end``."""
    left, cosines, right = torch.linalg.svd(start.mT @ end)
    one, other = start @ left, end @ right.mT
    beyond = other - one * cosines.unsqueeze(-2)
    sines = torch.linalg.vector_norm(beyond, dim=-2)
    # Of directions that do not turn there is no plane to turn in.
    beyond = torch.where(sines.unsqueeze(-2) > 1e-12, beyond / sines.clamp(min=_TINY).unsqueeze(-2), 0.0)
    one, beyond, cosines, sines = (
        part.unsqueeze(-3) for part in (one, beyond, cosines.unsqueeze(-1), sines.unsqueeze(-1))
    )
    along, across = one.mT @ bases, beyond.mT @ bases
    return bases + one @ ((cosines - 1) * along - sines * across) + beyond @ (sines * along + (cosines - 1) * across)
