"""How far apart two subspaces lie: principal angles, and the overlap that they come to."""

import torch
from torch import Tensor

from lightning_spectral.functional.arguments import check_broadcast, check_rows


def principal_angles(u: Tensor, v: Tensor) -> Tensor:
    r"""Principal angles between the spans of two sets of columns.

    With orthonormal bases :math:`Q_u, Q_v` the cosines are the singular values of :math:`Q_u^\top Q_v` and the sines
    those of :math:`Q_v - Q_u Q_u^\top Q_v`. A cosine near one says nothing of a small angle, so angles below a quarter
    of pi are read off the sines.

    Args:
        u: ``(..., d, k)``, linearly independent columns; they need not be orthonormal.
        v: ``(..., d, m)``, likewise; leading axes are broadcast.

    Returns:
        ``(..., min(k, m))`` radians between 0 and pi/2, float64, descending. NaN where a column is not finite.

    Raises:
        ValueError: If the columns are not of a floating type, have different lengths, or are more than they are long.

    References:
        Björck, Golub, *Numerical methods for computing angles between linear subspaces* (1973); Knyazev, Argentati,
        *Principal angles between subspaces in an A-based scalar product* (2002), whose sines are used here.

    Example:
        >>> import torch
        >>> u, v = torch.eye(3)[:, :2], torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, 1e-9]])
        >>> principal_angles(u, v)
        tensor([1.0000e-09, 0.0000e+00], dtype=torch.float64)
    """
    u, v, known = _bases(u, v)
    if u.shape[-1] < v.shape[-1]:
        u, v = v, u
    inner = u.mT @ v
    cosines = torch.linalg.svdvals(inner).flip(-1).clamp(0, 1)
    sines = torch.linalg.svdvals(v - u @ inner).clamp(0, 1)
    angles = torch.where(cosines.square() >= 0.5, sines.asin(), cosines.acos())
    return angles.masked_fill(~known.unsqueeze(-1), torch.nan)


def subspace_overlap(u: Tensor, v: Tensor) -> Tensor:
    r"""Mean squared cosine of the principal angles, :math:`\|Q_u^\top Q_v\|_F^2 / \min(k, m)`.

    Args:
        u: ``(..., d, k)``, linearly independent columns; they need not be orthonormal.
        v: ``(..., d, m)``, likewise; leading axes are broadcast.

    Returns:
        ``(...)`` float64: 1 for the same subspace, k/d on average for random ones, 0 for orthogonal ones. NaN where a
        column is not finite.

    Raises:
        ValueError: If the columns are not of a floating type, have different lengths, or are more than they are long.

    Example:
        >>> import torch
        >>> subspace_overlap(torch.eye(4)[:, :2], torch.eye(4)[:, 1:3])
        tensor(0.5000, dtype=torch.float64)
    """
    u, v, known = _bases(u, v)
    squares = (u.mT @ v).square().sum((-2, -1)) / min(u.shape[-1], v.shape[-1])
    return squares.clamp(max=1).masked_fill(~known, torch.nan)


def _bases(u: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Orthonormal bases in float64, and where both are known."""
    for name, columns in (("u", u), ("v", v)):
        check_rows(name, columns)
        if columns.ndim < 2 or not 1 <= columns.shape[-1] <= columns.shape[-2]:
            raise ValueError(
                f"{name} must hold 1 to d columns of length d in its last two axes, got shape {tuple(columns.shape)}: "
                "columns that span a subspace are no more than they are long"
            )
    if u.shape[-2] != v.shape[-2]:
        raise ValueError(
            f"u and v must have columns of the same length, got {u.shape[-2]} and {v.shape[-2]}: compare equal widths"
        )
    check_broadcast(u=u.shape[:-2], v=v.shape[:-2])
    finite_u, finite_v = (columns.isfinite().all(-1).all(-1) for columns in (u, v))
    # The solver refuses a whole batch for one bad matrix: the others must not pay for it.
    bases = (
        torch.linalg.qr(columns.to(torch.float64).masked_fill(~finite[..., None, None], 0.0)).Q
        for columns, finite in ((u, finite_u), (v, finite_v))
    )
    return *bases, finite_u & finite_v
