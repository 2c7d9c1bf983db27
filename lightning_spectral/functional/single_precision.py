r"""Spectra of a part of the rows, in float32 where its rounding is small beside the scatter they are wanted for.

What is left without one group of rows is solved for error bars and floors alone. They are read off differences, of
which two digits are plenty, and a solve in float32 takes about half the time.

*Rounding.* Solving in float32 solves a matrix that is off by some E, of a norm of a few :math:`u l_1`, with
:math:`u = 2^{-24}`. To first order an eigenvalue moves by :math:`v^\top E v`, and E has no preference for directions of
the tail: there this is at most about :math:`u l_1 / \sqrt d`, of either sign, where the values are solved for alone.
A solver that divides and conquers, for vectors, takes as equal what lies within a rounding of :math:`l_1`, and its
small values are off by that: leading vectors are of such a solve, values never.

*Sampling.* Without :math:`n - m` of n independent Gaussian rows an eigenvalue differs from that of all rows by
:math:`\sqrt{2 (1/m - 1/n)}` of itself. Rows that depend on each other, or have heavy tails, make that larger.

*Rule.* The smallest eigenvalue is rounded by at most a fifth (``SHARE``) of what sampling moves it by: its error bar is
at most 2% too long, that of a band less, as eigenvalues are rounded independently of each other. No eigenvalue lies
below :math:`2^{-19} l_1`, either, thirty-two times u, where the norm of E would count. Eigenvalues that are rounding
anyway, by ``rtol``, may. What does not meet the rule is solved in float64.

References:
    Wilkinson, *The Algebraic Eigenvalue Problem* (1965), for E; Anderson, *Asymptotic theory for principal component
    analysis* (1963), for the scatter; ``python -m benchmarks.findings.leave_one_out`` for what it does to error bars.
"""

import torch
from torch import Tensor

from lightning_spectral.functional.moments import Moments, covariance
from lightning_spectral.functional.spectrum import beyond_rank, eigenvectors, solve

SHARE = 0.2
"""Largest share of its scatter that an eigenvalue is rounded by."""

UNIT = 2.0**-24
"""Rounding of one float32 number, relative to it."""

LEAST = 32 * UNIT
"""Share of the largest eigenvalue below which none is read off a float32 solve."""


def spectra_of_parts(
    sample: Moments, total: Tensor, num_vectors: int, rtol: Tensor, before: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Eigenvalues and leading eigenvectors of the covariance of parts of some rows, to the digits of their scatter.

    Args:
        sample: Moments of the parts, batched over leading axes.
        total: ``(...)`` number of all rows. A part that is all of them is solved in float64.
        num_vectors: How many leading eigenvectors k are wanted, 0 for none.
        rtol: ``(..., 1)`` share of the largest eigenvalue below which others are rounding, and zero here.
        before: ``(..., d)`` eigenvalues of all rows, or of another part, where they are known: what does not resolve
            them is not tried in vain.

    Returns:
        ``(..., d)`` float64, descending, and ``(..., d, k)``; NaN as for
        :func:`lightning_spectral.functional.spectrum.eigenvectors`.
    """
    lead, width = sample.num_rows.shape, sample.mean.shape[-1]
    flat = Moments(*(part.flatten(0, len(lead) - 1) if lead else part.unsqueeze(0) for part in sample))
    total, rtol = total.expand(lead).reshape(-1), rtol.expand(*lead, 1).reshape(-1, 1)
    least = _least(flat.num_rows, total, width)
    trying = (least < 1) & flat.scatter.sum((-2, -1)).isfinite()
    if before is not None:
        trying &= _is_resolved(before.to(total.device).expand(*lead, width).reshape(-1, width), flat, least, rtol)
    values = flat.scatter.new_full((len(total), width), torch.nan, dtype=torch.float64)
    vectors = flat.scatter.new_full((len(total), width, num_vectors), torch.nan, dtype=torch.float64)
    for some in _in_turns(trying):
        values[some], vectors[some] = _single(_at(flat, some), num_vectors)
        are_known = vectors[some].isfinite().all(-1).all(-1)
        trying[some] = are_known & _is_resolved(values[some], _at(flat, some), least[some], rtol[some])
    for some in _in_turns(~trying):
        values[some], vectors[some] = eigenvectors(covariance(_at(flat, some)), num_vectors, rtol[some])
    beyond = beyond_rank(flat) & ~values.isnan()
    zero = (values < (rtol * values[:, :1]).clamp(min=0)) | beyond
    values = values.masked_fill(zero, 0.0)
    return values.reshape(*lead, width), vectors.reshape(*lead, width, num_vectors)


def _least(num_rows: Tensor, total: Tensor, width: int) -> Tensor:
    """Share of the largest eigenvalue from which on float32 resolves the scatter of others; infinite without any."""
    scatter = (2 * (1 / num_rows - 1 / total)).clamp(min=0).sqrt()
    return (UNIT / width**0.5 / (SHARE * scatter)).clamp(min=LEAST)


def _is_resolved(values: Tensor, sample: Moments, least: Tensor, rtol: Tensor) -> Tensor:
    """``(M,)`` whether all values ``(M, d)`` are large enough for float32, or surely none."""
    largest = values[:, :1]
    # Of a value near rtol float32 does not tell on which side it lies, and none at all where rtol is that of float64.
    rounding = (values < rtol / 2 * largest) & (rtol > UNIT)
    known = (values >= least.unsqueeze(-1) * largest) | rounding | beyond_rank(sample)
    return known.all(-1) & (largest > 0).squeeze(-1)


def _single(sample: Moments, num_vectors: int) -> tuple[Tensor, Tensor]:
    """As solved in float32, in float64, descending."""
    # The mean eigenvalue becomes one: the type's range of exponents is no bound then.
    scale = sample.scatter.diagonal(dim1=-2, dim2=-1).mean(-1)[:, None, None]
    matrices = torch.empty_like(sample.scatter, dtype=torch.float32)
    torch.div(sample.scatter, scale, out=matrices)
    values, vectors = solve(matrices, 0)
    if num_vectors:
        _, vectors = solve(matrices, num_vectors)
    return values.flip(-1) * (scale.squeeze(-1) / (sample.num_rows - 1).unsqueeze(-1)), vectors.double()


def _in_turns(wanted: Tensor) -> list[slice] | list[Tensor]:
    """Where ``(M,)`` are true, so many at a time as the device solves together."""
    if wanted.device.type == "cpu":
        # Its solver takes one matrix after the other anyway: one at a time is all the memory.
        return [slice(index, index + 1) for index in range(len(wanted)) if wanted[index]]
    return [wanted.nonzero().squeeze(-1)] if bool(wanted.any()) else []


def _at(sample: Moments, some: slice | Tensor) -> Moments:
    return Moments(*(part[some] for part in sample))
