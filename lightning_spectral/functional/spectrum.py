"""Eigenvalues of a covariance, and what is read off a spectrum: effective rank, head share, distance."""

import math
import warnings

import torch
from torch import Tensor

from lightning_spectral.functional.arguments import (
    check_broadcast,
    check_int,
    check_number,
    check_positive_semidefinite,
    check_rows,
    check_spectrum,
    check_square,
    check_symmetric,
)
from lightning_spectral.functional.moments import Moments, covariance, moments


def covariance_spectrum(rows: Tensor) -> Tensor:
    """Eigenvalues of the sample covariance of rows.

    Args:
        rows: ``(..., d)``, any floating dtype; all leading axes are rows.

    Returns:
        ``(d,)`` float64, descending; exact zeros beyond the numerical rank. NaN, with a warning that says why, for
        fewer than two rows, for rows that are not finite and where the eigensolver fails.

    Raises:
        ValueError: If the rows are not of a floating type, or have no features.

    Example:
        >>> import torch
        >>> covariance_spectrum(torch.tensor([[0.0, 1.0], [2.0, 1.0], [4.0, 1.0]]))
        tensor([4., 0.], dtype=torch.float64)
    """
    check_rows("rows", rows)
    if rows.shape[-1] == 0:
        raise ValueError(f"rows must have features in their last axis, got shape {tuple(rows.shape)}")
    return spectrum_or_warning(moments(rows.reshape(-1, rows.shape[-1])), "covariance_spectrum")


def spectrum_or_warning(sample: Moments, caller: str) -> Tensor:
    """Eigenvalues ``(d,)`` of one covariance, see :func:`spectrum`; a warning in the caller's name says why for NaN."""
    values = spectrum(sample)
    if bool(values.isnan().any()):
        reason = why_no_spectrum(sample) or "the eigensolver did not converge"
        warnings.warn(f"{caller} returns NaN: {reason}", stacklevel=3)
    return values


def spectrum(sample: Moments, rtol: float | Tensor | None = None) -> Tensor:
    """Eigenvalues of the covariance of rows given by their moments, batched; ``rtol`` is that of :func:`eigenvalues`.

    Returns:
        ``(..., d)`` float64, descending. n rows span n - 1 dimensions about their mean: values of higher rank are
        rounding, and are zero here.
    """
    values, _ = eigenvectors(covariance(sample), 0, rtol)
    return values.masked_fill(beyond_rank(sample) & ~values.isnan(), 0.0)


def beyond_rank(sample: Moments) -> Tensor:
    """Where a descending spectrum, ``(..., d)``, must be zero: n rows span n - 1 dimensions about their mean."""
    ranks = torch.arange(1, sample.mean.shape[-1] + 1, device=sample.num_rows.device)
    return ranks > (sample.num_rows - 1).unsqueeze(-1)


def why_no_spectrum(sample: Moments) -> str | None:
    """Why one covariance has no spectrum, a clause to complete "... is NaN: "; None where there is no reason."""
    num_rows = float(sample.num_rows)
    if not bool(sample.scatter.isfinite().all()):
        return "the rows hold NaN or infinity"
    if num_rows < 2:
        return f"a covariance needs at least 2 rows, got {num_rows:.0f}"
    return None


def eigenvalues(matrices: Tensor, rtol: float | Tensor | None = None) -> Tensor:
    """Eigenvalues of symmetric positive semi-definite matrices.

    Args:
        matrices: ``(..., d, d)``.
        rtol: Values below ``rtol`` times the largest are rounding and become exact zeros; a tensor, broadcast against
            ``(..., 1)``, for each matrix its own. Default: d times the float64 epsilon, NumPy's ``matrix_rank`` rule.

    Returns:
        ``(..., d)`` float64, descending. All NaN for a matrix that is not finite or whose solve failed, on its own
        device and on the CPU.

    Raises:
        ValueError: If the matrices are not square, not symmetric, or have eigenvalues below zero beyond rounding.
    """
    # The solver's own error would pass for a failed solve, and come back as NaN.
    check_square("matrices", matrices)
    if rtol is not None:
        check_number(minimum=0, rtol=rtol)
        rtol = float(rtol)
    matrices = matrices.to(torch.float64)
    check_symmetric("matrices", matrices)
    values, _, least = decompose(matrices, rtol, num_vectors=0)
    check_positive_semidefinite("matrices", least, torch.maximum(values[..., :1], -least))
    return values


def eigenvectors(matrices: Tensor, num_vectors: int, rtol: float | Tensor | None = None) -> tuple[Tensor, Tensor]:
    """What :func:`eigenvalues` gives, and the leading orthonormal eigenvectors, columns ``(..., d, num_vectors)``."""
    return decompose(matrices, rtol, num_vectors)[:2]


def decompose(matrices: Tensor, rtol: float | Tensor | None, num_vectors: int) -> tuple[Tensor, Tensor, Tensor]:
    """Values, vectors, and the smallest eigenvalue, ``(..., 1)``, before rounding was made zero."""
    matrices = matrices.to(torch.float64)
    finite = matrices.isfinite().all(-1).all(-1, keepdim=True)
    # A solver refuses the whole batch for one bad matrix: the others must not pay for it.
    solvable = matrices if bool(finite.all()) else matrices.masked_fill(~finite.unsqueeze(-1), 0.0)
    ascending, vectors = solve(solvable, num_vectors)
    values = ascending.flip(-1)
    tolerance = matrices.shape[-1] * torch.finfo(torch.float64).eps if rtol is None else rtol
    rounding = values < (tolerance * values[..., :1]).clamp(min=0)
    values = values.masked_fill(rounding, 0.0).masked_fill(~finite, torch.nan)
    least = ascending[..., :1].masked_fill(~finite, torch.nan)
    return values, vectors.masked_fill(~finite.unsqueeze(-1), torch.nan), least


def solve(matrices: Tensor, num_vectors: int) -> tuple[Tensor, Tensor]:
    """Ascending eigenvalues, and the leading vectors in descending order, of finite symmetric matrices."""
    try:
        if num_vectors == 0:
            return torch.linalg.eigvalsh(matrices), matrices[..., :0]
        values, vectors = torch.linalg.eigh(matrices)
        return values, vectors[..., -num_vectors:].flip(-1)
    except RuntimeError:  # no convergence, or no memory for the batch
        if matrices.ndim == 2 and matrices.device.type == "cpu":
            size = matrices.shape[-1]
            return matrices.new_full((size,), torch.nan), matrices.new_full((size, num_vectors), torch.nan)
    # GPU solvers give up on low-rank matrices now and then: each goes to the CPU, and costs the others nothing.
    single = [solve(matrix.cpu(), num_vectors) for matrix in matrices.reshape(-1, *matrices.shape[-2:])]
    return tuple(  # type: ignore[return-value]
        torch.stack(part).reshape(*matrices.shape[:-2], *part[0].shape).to(matrices.device)
        for part in zip(*single, strict=True)
    )


def normalize(values: Tensor) -> Tensor:
    """Spectrum divided by its sum (trace normalisation for eigenvalues).

    Args:
        values: ``(..., n)``, non-negative.

    Returns:
        ``(..., n)`` float64 that sums to one; NaN where the sum is zero.

    Raises:
        ValueError: If a value is negative, or no real number.
    """
    check_spectrum(values=values)
    return _normalize(values)


def _normalize(values: Tensor) -> Tensor:
    values = values.to(torch.float64)
    return values / values.sum(-1, keepdim=True)


def rankme(values: Tensor) -> Tensor:
    r"""RankMe, a smooth rank: :math:`\exp(-\sum_j p_j \ln p_j)` of the normalised values.

    Args:
        values: ``(..., n)``, non-negative. Eigenvalues in this package; Garrido et al. apply it to singular values.

    Returns:
        ``(...)`` float64 between 1 and n; NaN where all values are zero.

    Raises:
        ValueError: If a value is negative, or no real number.

    References:
        Garrido, Balestriero, Najman, LeCun, *RankMe* (2023); Roy, Vetterli, *The effective rank* (2007).

    Example:
        >>> import torch
        >>> rankme(torch.tensor([1.0, 1.0, 1.0, 0.0]))
        tensor(3.0000, dtype=torch.float64)
    """
    return torch.special.entr(normalize(values)).sum(-1).exp()


def head_share(values: Tensor, k: int) -> Tensor:
    """Share of the k largest values in the sum of all.

    Args:
        values: ``(..., n)``, non-negative and descending.
        k: How many values form the head, 1 to n.

    Returns:
        ``(...)`` float64 between 0 and 1; NaN where all values are zero.

    Raises:
        ValueError: If ``k`` is not an int from 1 to n, or values are negative, rise, or are no real numbers.
    """
    check_spectrum(is_ordered=True, values=values)
    check_int(1, values.shape[-1], k=k)
    return _normalize(values)[..., :k].sum(-1)


def js_divergence(p: Tensor, q: Tensor) -> Tensor:
    r"""Jensen-Shannon divergence of two spectra, each normalised to sum to one, in nats.

    :math:`\frac12 \sum_j p_j \ln\frac{p_j}{m_j} + \frac12 \sum_j q_j \ln\frac{q_j}{m_j}` with
    :math:`m = (p + q)/2`. Between 0 and ln 2.

    Args:
        p: ``(..., n)``, non-negative.
        q: ``(..., n)``, non-negative, of the same length.

    Returns:
        ``(...)`` float64; NaN where either sums to zero.

    Raises:
        ValueError: If the spectra have different lengths, or values that are negative or no real numbers.

    References:
        Lin, *Divergence measures based on the Shannon entropy* (1991).
    """
    check_spectrum(p=p, q=q)
    if p.shape[-1] != q.shape[-1]:
        raise ValueError(f"p and q must have the same number of values, got {p.shape[-1]} and {q.shape[-1]}")
    check_broadcast(p=p.shape[:-1], q=q.shape[:-1])
    p, q = _normalize(p), _normalize(q)
    middle = (p + q) / 2
    entropy = torch.special.entr
    divergence = entropy(middle).sum(-1) - (entropy(p).sum(-1) + entropy(q).sum(-1)) / 2
    return divergence.clamp(0, math.log(2))
