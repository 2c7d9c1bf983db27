"""What one report says of per-sample gradients: singular values, noise, and why something is missing."""

from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from lightning_spectral.functional.jackknife import jackknife
from lightning_spectral.functional.noise import GradientMoments, gradient_moments, mean_row_norm
from lightning_spectral.functional.powerlaw import MIN_VALUES, Band, power_law, resolve_band
from lightning_spectral.functional.singular import centred_gram, rounding_floor, singular_values, without_groups
from lightning_spectral.measurement.report import Exponent

ZERO = "all its gradients are exactly zero, as those behind a zero-initialised layer are at first"


@dataclass(frozen=True)
class ParameterSpectrum:
    """One parameter's per-sample gradients in one report; tensors are float64 on the CPU."""

    name: str
    num_samples: int
    """Rows N behind the spectrum, over all ranks."""
    singular_values: Tensor
    """``(min(N, P),)`` descending, not centred; NaN if the measurement failed, empty without rows."""
    centred: Tensor
    """Likewise, of the rows about their mean."""
    leave_one_out: Tensor
    """``(G, min(M, P))`` singular values without each group; ``(0, 0)`` where a group is empty or there is but one."""
    grad_norm: float
    """Norm of the mean gradient."""
    moments: GradientMoments
    """Unbiased estimates behind the noise scale, 0-dim."""
    failure: str | None = None
    """Why there is no spectrum; None if there is one."""
    failed_here: bool = False
    """Whether the cause is one that other ranks may not know."""

    def arrays(self) -> dict[str, np.ndarray]:
        """What a record keeps of it.

        Returns:
            Arrays by field.
        """
        return {
            "singular_values": self.singular_values.numpy(),
            "centred": self.centred.numpy(),
            "leave_one_out": self.leave_one_out.numpy(),
            "num_samples": np.asarray(self.num_samples),
            "grad_norm": np.asarray(self.grad_norm),
            "squared_norm": self.moments.squared_norm.numpy(),
            "trace": self.moments.trace.numpy(),
            "failure": np.asarray(self.failure or ""),
        }

    @property
    def is_zero(self) -> bool:
        """Whether every gradient was exactly zero."""
        return self.failure is None and not bool(self.singular_values.any())

    def exponent(self, band: Band) -> Exponent:
        """Power-law exponent over a band of the singular values, with the jackknife's standard error.

        Ranks are fixed once, from the full spectrum: without a group the same ranks are fitted. No bias is corrected:
        the exponent depends on N in a way that the jackknife does not mend, so runs are compared at equal N.

        Args:
            band: Two ranks or two fractions, see :func:`lightning_spectral.functional.power_law`.

        Returns:
            The fit, with NaN for ``corrected``; or NaN with the reason.
        """
        return exponent_of(self.singular_values, self.leave_one_out, band, ZERO if self.is_zero else self.failure)

    def centred_exponent(self, band: Band) -> float:
        """The exponent of the rows about their mean over the same ranks.

        Args:
            band: Two ranks or two fractions.

        Returns:
            NaN where there is none.
        """
        return exponent_of(self.centred, torch.empty(0, 0), band, ZERO if self.is_zero else self.failure).value


def exponent_of(values: Tensor, leave_one_out: Tensor, band: Band, failure: str | None = None) -> Exponent:
    """Power-law exponent of a descending spectrum over a band of ranks, with a jackknife error.

    Args:
        values: ``(n,)``.
        leave_one_out: ``(G, m)`` spectra without each group; fewer than two for no error.
        band: Two ranks or two fractions of n.
        failure: Why there is nothing to fit, if so.

    Returns:
        The fit, without bias correction; what is missing is NaN with the reason.
    """
    if failure is not None:
        return _no_exponent(failure)
    try:
        ranks = resolve_band(band, len(values))
        plain = power_law(values, ranks) if ranks[0] < ranks[1] else None
    except ValueError as error:
        return _no_exponent(str(error))
    num_values = 0 if plain is None else int(plain.num_values)
    if plain is None or num_values < MIN_VALUES:
        return _no_exponent(
            f"band {band} holds {num_values} positive singular values of the {MIN_VALUES} needed: take more samples",
            num_values,
        )
    reason: str | None = None
    stderr = torch.tensor(torch.nan)
    if len(leave_one_out) < 2:
        reason = "no error bar: a group of samples is empty, or there are fewer than 2"
    elif ranks[1] > leave_one_out.shape[-1]:
        num_left = leave_one_out.shape[-1]
        reason = f"no error bar: without one group band {band} reaches beyond the {num_left} samples left"
    else:
        without = power_law(leave_one_out, ranks)
        if bool((without.num_values != plain.num_values).any()):
            reason = f"no error bar: without one group band {band} loses positive singular values: take more samples"
        else:
            stderr = jackknife(plain.exponent, without.exponent).stderr
    return Exponent(float(plain.exponent), float(stderr), torch.nan, float(plain.r2), num_values, reason)


def _no_exponent(reason: str, num_values: int = 0) -> Exponent:
    return Exponent(torch.nan, torch.nan, torch.nan, torch.nan, num_values, reason)


@dataclass(frozen=True)
class WeightSpectrum:
    """Singular values of one weight matrix; ``(min(rows, columns),)`` float64 on the CPU."""

    singular_values: Tensor
    failure: str | None = None
    """Why they could not be had; None if they could."""

    def arrays(self) -> dict[str, np.ndarray]:
        """What a record keeps of it.

        Returns:
            Arrays by field.
        """
        return {"singular_values": self.singular_values.numpy(), "failure": np.asarray(self.failure or "")}

    def exponent(self, band: Band) -> Exponent:
        """Power-law exponent over a band; a matrix has no samples, so no error bar.

        Args:
            band: Two ranks or two fractions.

        Returns:
            The fit.
        """
        is_finite = bool(self.singular_values.isfinite().all())
        failure = self.failure or (None if is_finite else "the weights hold NaN or infinity")
        return exponent_of(self.singular_values, torch.empty(0, 0), band, failure)


@dataclass(frozen=True)
class GradientReport:
    """All parameters' spectra at one step."""

    step: int
    method: str
    """The engine that gave the rows."""
    span: tuple[int, int]
    """First and last ``global_step`` at whose weights gradients were taken; equal but for hooks in training."""
    parameters: dict[str, ParameterSpectrum]
    weights: dict[str, WeightSpectrum] = field(default_factory=dict)

    def arrays(self) -> dict[str, np.ndarray]:
        """What a record keeps of it.

        Returns:
            Arrays by ``gradient/{parameter}/{field}`` and ``weight/{parameter}/{field}``, and how the rows were had.
        """
        parts = {f"gradient/{name}": spectrum.arrays() for name, spectrum in self.parameters.items()}
        parts |= {f"weight/{name}": spectrum.arrays() for name, spectrum in self.weights.items()}
        arrays = {f"{part}/{field}": array for part, fields in parts.items() for field, array in fields.items()}
        return arrays | {"method": np.asarray(self.method), "span": np.asarray(self.span)}

    @property
    def noise_scale(self) -> float:
        """Noise scale of all these parameters together, in samples; their moments add up."""
        parts = [spectrum.moments for spectrum in self.parameters.values()]
        total = GradientMoments(*(torch.stack(list(column)).sum() for column in zip(*parts, strict=True)))
        return float(total.noise_scale)


def decompose_grams(
    grams: dict[str, Tensor], sizes: dict[str, int], groups: Tensor, num_groups: int, dtype: torch.dtype
) -> list[ParameterSpectrum]:
    """Solve all parameters at once: one batch with all samples, centred or not, and one without each group.

    Args:
        grams: ``(N, N)`` float64 Gram matrices by parameter, at least one.
        sizes: Numbers P of each parameter.
        groups: ``(N,)`` group of each sample.
        num_groups: G.
        dtype: In which the rows were kept: singular values below its rounding are zero.

    Returns:
        A spectrum per parameter.
    """
    stacked = torch.stack(list(grams.values()))
    floor = rounding_floor(stacked, dtype).unsqueeze(-1)
    both = _above(singular_values(torch.stack([stacked, centred_gram(stacked)], 1)), floor.unsqueeze(-1)).cpu()
    counts = torch.bincount(groups, minlength=num_groups)
    has_errors = num_groups > 1 and bool((counts > 0).all())
    if has_errors:
        without = _above(singular_values(without_groups(stacked, groups, num_groups)), floor.unsqueeze(-1)).cpu()
    moments = gradient_moments(stacked)
    squared_norms, traces, norms = moments.squared_norm.cpu(), moments.trace.cpu(), mean_row_norm(stacked).cpu()
    is_finite = stacked.isfinite().flatten(1).all(1).tolist()
    spectra = []
    for index, name in enumerate(grams):
        plain, centred = both[index, :, : sizes[name]]
        failure = None
        if not is_finite[index]:
            failure = "the gradients hold NaN or infinity"
        elif bool(plain.isnan().any()):
            failure = "the eigensolver did not converge"
        left = without[index, :, : sizes[name]] if has_errors else torch.empty(0, 0)
        spectra.append(
            ParameterSpectrum(
                name,
                stacked.shape[-1],
                plain,
                centred,
                left,
                float(norms[index]),
                GradientMoments(squared_norms[index], traces[index]),
                failure,
            )
        )
    return spectra


def _above(values: Tensor, floor: Tensor) -> Tensor:
    return values.masked_fill(values < floor, 0.0)


def missing(name: str, num_samples: int, failure: str, failed_here: bool) -> ParameterSpectrum:
    """What stands for a parameter that could not be measured.

    Args:
        name: The parameter.
        num_samples: Samples that were looked at.
        failure: Why.
        failed_here: Whether other ranks may not know.

    Returns:
        NaN everywhere.
    """
    nothing = torch.empty(0, dtype=torch.float64)
    unknown = torch.tensor(torch.nan, dtype=torch.float64)
    moments = GradientMoments(unknown, unknown)
    return ParameterSpectrum(
        name, num_samples, nothing, nothing, torch.empty(0, 0), torch.nan, moments, failure, failed_here
    )
