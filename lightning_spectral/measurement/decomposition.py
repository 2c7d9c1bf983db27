"""From the moments of groups to each layer's spectrum, with all groups and without each."""

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from lightning_spectral.functional.estimate import Spectrum
from lightning_spectral.functional.moments import Moments, covariance, pool
from lightning_spectral.functional.spectrum import beyond_rank, eigenvectors, spectrum, why_no_spectrum


def decompose(
    names: list[str],
    parts: Moments,
    failures: Mapping[str, str],
    step: float = torch.nan,
    num_vectors: int = 0,
    dtypes: Sequence[str] | None = None,
    elsewhere: Mapping[str, str] | None = None,
) -> dict[str, Spectrum]:
    """Solve all layers of one width.

    Args:
        names: The L layers.
        parts: Their moments by group, num_rows ``(L, G)``.
        failures: What this rank knows of failures, by name.
        step: Optimizer steps so far.
        num_vectors: How many leading eigenvectors to keep, 0 for none.
        dtypes: Of the products of each layer, ``"float32"`` or ``"float64"``; None for float64. Eigenvalues below their
            rounding are zero.
        elsewhere: What is known of failures on other ranks.

    Returns:
        Spectra by name; error bars where all of two or more groups received rows.
    """
    num_groups = parts.num_rows.shape[-1]
    without_each = 1 - torch.eye(num_groups) if num_groups > 1 else torch.ones(0, 1)
    members = torch.cat([torch.ones(1, num_groups), without_each])
    counts = parts.num_rows.cpu()
    dtypes = ["float64"] * len(names) if dtypes is None else dtypes
    spectra = {}
    for name, dtype, count, (sample, values, vectors) in zip(
        names, dtypes, counts, _solved(parts, members, num_vectors, _rounding(parts, dtypes)), strict=True
    ):
        failure = failures.get(name)
        if failure is None and bool(count.isnan().any()):
            failure = (elsewhere or {}).get(name) or "another rank could not measure it"
        failure = failure or why_no_spectrum(Moments(*(part[0] for part in sample)))
        if failure is None and bool(values[0].isnan().any()):
            failure = "the eigensolver did not converge"
        kept = slice(1, None if bool((count > 0).all()) else 1)
        spectra[name] = Spectrum(
            values[0] if failure is None else torch.full_like(values[0], torch.nan),
            values[kept],
            None if vectors is None else vectors[0],
            None if vectors is None else vectors[kept],
            count=int(count.sum().nan_to_num()),
            count_without=int((count.sum() - count.max()).nan_to_num()),
            failure=failure,
            failed_here=name in failures,
            dtype=dtype,
            name=name,
            step=step,
        )
    return spectra


def _rounding(parts: Moments, dtypes: Sequence[str]) -> Tensor:
    """``(L, 1, 1)`` share of the largest eigenvalue below which others are rounding."""
    # Products in float32 leave about 1e-8 of it in rows of any direction; in float64 only the solver rounds.
    shares = {
        "float32": torch.finfo(torch.float32).eps,
        "float64": parts.mean.shape[-1] * torch.finfo(torch.float64).eps,
    }
    rtol = torch.tensor([shares[dtype] for dtype in dtypes], dtype=torch.float64, device=parts.scatter.device)
    return rtol[:, None, None]


def _solved(
    parts: Moments, members: Tensor, num_vectors: int, rtol: Tensor
) -> Iterator[tuple[Moments, Tensor, Tensor | None]]:
    """Layer by layer the moments of unions of groups, their eigenvalues and leading eigenvectors."""
    num_layers = len(parts.num_rows)
    # A CPU's solver takes one matrix after the other anyway: there one layer's matrices at a time are all the memory.
    at_a_time = 1 if parts.scatter.device.type == "cpu" else num_layers
    for start in range(0, num_layers, at_a_time):
        sample = pool(Moments(*(part[start : start + at_a_time] for part in parts)), members)
        values, vectors = _solve(sample, num_vectors, rtol[start : start + at_a_time])
        for index in range(len(values)):
            yield Moments(*(part[index] for part in sample)), values[index], None if vectors is None else vectors[index]


def _solve(sample: Moments, num_vectors: int, rtol: Tensor) -> tuple[Tensor, Tensor | None]:
    if num_vectors == 0:
        return spectrum(sample, rtol).cpu(), None
    values, vectors = eigenvectors(covariance(sample), num_vectors, rtol)
    return values.masked_fill(beyond_rank(sample) & ~values.isnan(), 0.0).cpu(), vectors.cpu()
