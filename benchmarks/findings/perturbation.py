r"""An infinitesimal jackknife: spectra without each group by perturbation theory, from one eigendecomposition.

With :math:`C = V \Lambda V^\top` the covariance of all rows and :math:`C_{(g)}` that without group g, let
:math:`R = V^\top C_{(g)} V`. To *first order* its eigenvalues are the diagonal of R, Rayleigh quotients. They give the
standard error of a smooth functional :math:`\theta`, but nearly none of its bias, which is of second order and comes
from eigenvalues that repel each other: :math:`\sum_{k \ne j} R_{jk}^2 / (R_{jj} - R_{kk})`.

Term by term that sum is useless. Neighbours in the tail lie closer together than :math:`R_{jk}`. In a smooth functional
the terms of a pair come together as :math:`R_{jk}^2 (f'_j - f'_k) / (R_{jj} - R_{kk})`, with f' its derivatives by the
eigenvalues, and this does not diverge. To keep eigenvalues, of which every functional can be taken, each pair is
diagonalised exactly: of a 2 by 2 matrix with the gap :math:`\delta` and the off-diagonal entry m one eigenvalue goes up
by :math:`s = \frac12 (\sqrt{\delta^2 + 4 m^2} - \delta)` and the other down by as much. For large gaps that is
:math:`m^2 / \delta`. For small ones :math:`\delta s + s^2 = m^2`, so that the second-order change of a functional,
:math:`f''(\delta s + s^2)`, is right however small the gap is.

Leading vectors turn towards the others, to first order, by :math:`R_{jk} / (R_{kk} - R_{jj})`; among themselves it does
not matter to their span.

References:
    Kato, *Perturbation Theory for Linear Operators* (1966), chapter II; Jaeckel, *The infinitesimal jackknife* (1972);
    Anderson, *Asymptotic theory for principal component analysis* (1963); Lawley, *Tests of significance for the latent
    roots of covariance and correlation matrices* (1956), for the bias.
"""

from torch import Tensor


def rotated(without: Tensor, vectors: Tensor) -> Tensor:
    """Covariances ``(..., d, d)`` without each group, in the basis of the eigenvectors of all, ``(d, d)``."""
    return vectors.mT @ without @ vectors


def first_order(matrices: Tensor) -> Tensor:
    """Rayleigh quotients ``(..., d)``, descending, of rotated matrices."""
    return _descending(matrices.diagonal(dim1=-2, dim2=-1))


def second_order(matrices: Tensor) -> Tensor:
    """Rayleigh quotients, each pair of which repels as an exact 2 by 2 matrix does: ``(..., d)``, descending."""
    quotients = matrices.diagonal(dim1=-2, dim2=-1)
    gaps = quotients.unsqueeze(-1) - quotients.unsqueeze(-2)
    # On the diagonal the gap is zero, and so is its sign.
    shifts = ((gaps.square() + 4 * matrices.square()).sqrt() - gaps.abs()) / 2 * gaps.sign()
    return _descending(quotients + shifts.sum(-1))


def leading_vectors(matrices: Tensor, vectors: Tensor, num_vectors: int) -> Tensor:
    """Bases ``(..., d, k)`` of the leading subspaces of rotated matrices, to first order; not orthonormal."""
    quotients = matrices.diagonal(dim1=-2, dim2=-1)
    gaps = quotients[..., None, :num_vectors] - quotients[..., num_vectors:, None]
    turns = matrices[..., num_vectors:, :num_vectors] / gaps
    return vectors[:, :num_vectors] + vectors[:, num_vectors:] @ turns


def _descending(values: Tensor) -> Tensor:
    # A sum of terms may end below zero, where no eigenvalue can be.
    return values.clamp(min=0).sort(-1, descending=True).values
