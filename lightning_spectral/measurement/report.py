"""What one report says of one layer: the spectrum, the spectra without each group, and why something is missing."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from lightning_spectral.functional.jackknife import jackknife
from lightning_spectral.functional.moments import Moments, covariance, pool
from lightning_spectral.functional.powerlaw import MIN_VALUES, Band, PowerLaw, power_law, resolve_band
from lightning_spectral.functional.spectrum import beyond_rank, eigenvectors, spectrum, why_no_spectrum


@dataclass(frozen=True)
class Exponent:
    """A band's exponent with what is known of its error; plain floats, NaN where there is none."""

    value: float
    stderr: float
    corrected: float
    r2: float
    num_values: int
    reason: str | None
    """Why a number above is NaN; None if none is."""


@dataclass(frozen=True)
class LayerSpectrum:
    """One layer's covariance spectrum in one report; tensors are float64 on the CPU."""

    name: str
    num_tokens: int
    """Rows behind the spectrum, over all ranks, after the mask."""
    num_groups: int
    """Groups that received rows."""
    eigenvalues: Tensor
    """``(d,)`` descending; NaN if the measurement failed, empty if the layer never ran."""
    leave_one_out: Tensor
    """``(G, d)`` eigenvalues without each group; ``(0, d)`` where a group is empty or there is but one."""
    failure: str | None = None
    """Why there is no spectrum; None if there is one."""
    failed_here: bool = False
    """Whether the cause is one that other ranks may not know."""
    num_rows_without: int = 0
    """Rows left without the largest group."""
    vectors: Tensor | None = None
    """``(d, k)`` leading eigenvectors as columns, if a member asked for them."""
    leave_one_out_vectors: Tensor | None = None
    """``(G, d, k)`` leading eigenvectors without each group, with the eigenvectors; ``(0, d, k)`` as there."""

    def exponent(self, band: Band) -> Exponent:
        """Power-law exponent over a band, with jackknife error and bias correction.

        Args:
            band: Two ranks or two fractions, see :func:`lightning_spectral.functional.power_law`.

        Returns:
            The fit. Without a failure, the reason of a missing error bar is one of: fewer groups than asked, or a
            spectrum without one group that has fewer positive values in the band (its exponent would be of another
            stretch).
        """
        if self.failure is not None:
            return Exponent(torch.nan, torch.nan, torch.nan, torch.nan, 0, self.failure)
        try:
            plain, without = power_law(self.eigenvalues, band), power_law(self.leave_one_out, band)
        except ValueError as error:
            return Exponent(torch.nan, torch.nan, torch.nan, torch.nan, 0, str(error))
        corrected, stderr = jackknife(plain.exponent, without.exponent)
        reason = self._doubt(band, plain, without)
        if reason is not None:
            corrected = stderr = torch.tensor(torch.nan)
        num_values = int(plain.num_values)
        return Exponent(float(plain.exponent), float(stderr), float(corrected), float(plain.r2), num_values, reason)

    def _doubt(self, band: Band, plain: PowerLaw, without: PowerLaw) -> str | None:
        """Why the exponent, or its error bar, is not to be had."""
        _, hi = resolve_band(band, len(self.eigenvalues))
        # Zero are the eigenvalues that the rows do not span, and those below the rounding of the products.
        remedy = "it needs more rows" if self.num_tokens <= hi + 1 else "dtype='float64' resolves smaller ones"
        if plain.num_values < MIN_VALUES:
            num_values = int(plain.num_values)
            return f"band {band} holds {num_values} positive eigenvalues of the {MIN_VALUES} needed: {remedy}"
        if len(self.leave_one_out) < 2:
            return f"no error bar: only {self.num_groups} group(s) of samples received rows, all must, and at least 2"
        if self.num_rows_without - 1 < min(len(self.eigenvalues), self.num_tokens - 1):
            width = len(self.eigenvalues)
            return (
                f"no error bar: without one group {self.num_rows_without} rows do not span {width} channels: take more"
            )
        if bool((without.num_values != plain.num_values).any()):
            return f"no error bar: without one group band {band} loses positive eigenvalues: {remedy}"
        return None

    def arrays(self) -> dict[str, np.ndarray]:
        """What a record keeps of it.

        Returns:
            Arrays by field.
        """
        tensors = {
            "eigenvalues": self.eigenvalues,
            "leave_one_out": self.leave_one_out,
            "vectors": self.vectors,
            "leave_one_out_vectors": self.leave_one_out_vectors,
        }
        arrays = {field: tensor.numpy() for field, tensor in tensors.items() if tensor is not None}
        numbers = {"num_tokens": self.num_tokens, "num_rows_without": self.num_rows_without}
        return arrays | {"failure": np.asarray(self.failure or "")} | {key: np.asarray(n) for key, n in numbers.items()}


@dataclass(frozen=True)
class Report:
    """All layers' spectra at one step."""

    step: int
    layers: dict[str, LayerSpectrum]

    def arrays(self) -> dict[str, np.ndarray]:
        """What a record keeps of it.

        Returns:
            Arrays by ``activation/{layer}/{field}``.
        """
        return {
            f"activation/{name}/{field}": array
            for name, layer in self.layers.items()
            for field, array in layer.arrays().items()
        }


def decompose(
    names: list[str], parts: Moments, failures: dict[str, str], num_vectors: int = 0, rtol: float | None = None
) -> list[LayerSpectrum]:
    """Solve all layers of one width, with all groups and without each.

    Args:
        names: The L layers.
        parts: Their moments by group, num_rows ``(L, G)``.
        failures: What this rank knows of failures, by name.
        num_vectors: How many leading eigenvectors to keep, 0 for none.
        rtol: Eigenvalues below this share of the largest are rounding, see
            :func:`lightning_spectral.functional.eigenvalues`.

    Returns:
        One spectrum per name.
    """
    num_groups = parts.num_rows.shape[-1]
    without_each = 1 - torch.eye(num_groups) if num_groups > 1 else torch.ones(0, 1)
    members = torch.cat([torch.ones(1, num_groups), without_each])
    counts = parts.num_rows.cpu()
    spectra = []
    for index, (name, (sample, values, vectors)) in enumerate(
        zip(names, _solved(parts, members, num_vectors, rtol), strict=True)
    ):
        failure = failures.get(name)
        if failure is None and bool(counts[index].isnan().any()):
            failure = "another rank could not measure it"
        failure = failure or why_no_spectrum(Moments(*(part[0] for part in sample)))
        if failure is None and bool(values[0].isnan().any()):
            failure = "the eigensolver did not converge"
        nonempty = int((counts[index] > 0).sum())
        kept = slice(1, None if nonempty == num_groups else 1)
        spectra.append(
            LayerSpectrum(
                name,
                num_tokens=int(counts[index].sum().nan_to_num()),
                num_groups=nonempty,
                eigenvalues=values[0] if failure is None else torch.full_like(values[0], torch.nan),
                leave_one_out=values[kept],
                failure=failure,
                failed_here=name in failures,
                num_rows_without=int((counts[index].sum() - counts[index].max()).nan_to_num()),
                vectors=None if vectors is None else vectors[0],
                leave_one_out_vectors=None if vectors is None else vectors[kept],
            )
        )
    return spectra


def _solved(
    parts: Moments, members: Tensor, num_vectors: int, rtol: float | None
) -> Iterator[tuple[Moments, Tensor, Tensor | None]]:
    """Layer by layer the moments of unions of groups, their eigenvalues and leading eigenvectors."""
    num_layers = len(parts.num_rows)
    # A CPU's solver takes one matrix after the other anyway: there one layer's matrices at a time are all the memory.
    at_a_time = 1 if parts.scatter.device.type == "cpu" else num_layers
    for start in range(0, num_layers, at_a_time):
        sample = pool(Moments(*(part[start : start + at_a_time] for part in parts)), members)
        values, vectors = _solve(sample, num_vectors, rtol)
        for index in range(len(values)):
            yield Moments(*(part[index] for part in sample)), values[index], None if vectors is None else vectors[index]


def _solve(sample: Moments, num_vectors: int, rtol: float | None) -> tuple[Tensor, Tensor | None]:
    if num_vectors == 0:
        return spectrum(sample, rtol).cpu(), None
    values, vectors = eigenvectors(covariance(sample), num_vectors, rtol)
    return values.masked_fill(beyond_rank(sample) & ~values.isnan(), 0.0).cpu(), vectors.cpu()
