"""What one report says of per-sample gradients: singular values, noise, and why something is missing."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from typing_extensions import override

from lightning_spectral.functional.estimate import NO_GROUPS, Spectrum
from lightning_spectral.functional.noise import NoiseSums, mean_row_norm, sums_of_groups
from lightning_spectral.functional.singular import centred_gram, roots_of_gram, rounding_floor, without_groups
from lightning_spectral.measurement.measurement import Report


class ParameterGradients(NamedTuple):
    """One parameter's per-sample gradients in one report."""

    spectrum: Spectrum
    """``min(N, P)`` singular values of all rows, not centred."""
    centred: Spectrum
    """Likewise, of the rows about their mean; without groups."""
    grad_norm: float
    """Norm of the mean gradient."""
    noise: NoiseSums
    """What the noise scale and its interval are made of."""

    @classmethod
    def missing(cls, name: str, count: int, failure: str, failed_here: bool) -> "ParameterGradients":
        """What stands for a parameter that could not be measured: the reason, and NaN everywhere."""
        nothing = Spectrum.missing(failure, failed_here, name=name, count=count, corrects_bias=False)
        return cls(nothing, nothing, torch.nan, NoiseSums.missing())

    @classmethod
    def absent(cls, name: str, reason: str) -> "ParameterGradients":
        """What stands for a parameter that is not trained at the time: the noise of the others is that of the model."""
        return cls.missing(name, 0, reason, False)._replace(noise=NoiseSums.nothing())


@dataclass(frozen=True)
class GradientReport(Report):
    """All parameters' gradients, and the spectra of weights, at one step."""

    parameters: Mapping[str, ParameterGradients]
    method: str
    """The engine that gave the rows."""
    span: tuple[int, int]
    """First and last ``global_step`` at whose weights gradients were taken; equal but for hooks in training."""
    checked: str = ""
    """Which parts of the latest self-check ran, and what came of them."""
    sample_weights_ratio: float = torch.nan
    """Largest over smallest weight of a sample in its batch's loss, by the latest self-check."""

    @classmethod
    def of(
        cls,
        step: int,
        parameters: Mapping[str, ParameterGradients],
        weights: Mapping[str, Spectrum],
        method: str,
        span: tuple[int, int],
        checked: str = "",
        sample_weights_ratio: float = torch.nan,
    ) -> "GradientReport":
        """With the spectra of both kinds."""
        gradients = {name: found.spectrum for name, found in parameters.items()}
        spectra = {"gradient": gradients, "weight": weights}
        return cls(step, spectra, parameters, method, span, checked, sample_weights_ratio)

    @override
    def arrays_beside(self) -> dict[str, np.ndarray]:
        arrays = {
            "method": np.asarray(self.method),
            "span": np.asarray(self.span),
            "checked": np.asarray(self.checked),
            "sample_weights_ratio": np.asarray(self.sample_weights_ratio),
        }
        for name, found in self.parameters.items():
            beside = {
                "centred": found.centred.values.numpy(),
                "grad_norm": np.asarray(found.grad_norm),
                "squared_norm": found.noise.moments.squared_norm.numpy(),
                "trace": found.noise.moments.trace.numpy(),
                **{f"noise_{part}": sums.numpy() for part, sums in found.noise._asdict().items()},
            }
            arrays |= {f"gradient/{name}/{field}": array for field, array in beside.items()}
        return arrays

    @property
    def noise(self) -> NoiseSums:
        """Those of all these parameters together: of the whole gradient, with what parameters have in common."""
        return NoiseSums.total([found.noise for found in self.parameters.values()])


def decompose_grams(
    grams: Mapping[str, Tensor],
    sizes: Mapping[str, int],
    groups: Tensor,
    num_groups: int,
    dtype: torch.dtype,
    step: float = torch.nan,
) -> dict[str, ParameterGradients]:
    """Solve all parameters at once: one batch with all samples, centred or not, and one without each group.

    Args:
        grams: ``(N, N)`` float64 Gram matrices by parameter, at least one.
        sizes: Numbers P of each parameter.
        groups: ``(N,)`` group of each sample.
        num_groups: G.
        dtype: In which the rows were kept: singular values below its rounding are zero.
        step: Optimizer steps so far.
    """
    stacked = torch.stack(list(grams.values()))
    floor = rounding_floor(stacked, dtype).unsqueeze(-1)
    both = _above(roots_of_gram(torch.stack([stacked, centred_gram(stacked)], 1)), floor.unsqueeze(-1)).cpu()
    counts = torch.bincount(groups, minlength=num_groups)
    has_errors = num_groups > 1 and bool((counts > 0).all())
    if has_errors:
        without = _above(roots_of_gram(without_groups(stacked, groups, num_groups)), floor.unsqueeze(-1)).cpu()
    noise = NoiseSums(*(part.cpu() for part in sums_of_groups(stacked, groups, num_groups)))
    norms = mean_row_norm(stacked).cpu()
    is_finite = stacked.isfinite().flatten(1).all(1).tolist()
    found = {}
    for index, name in enumerate(grams):
        plain, centred = both[index, :, : sizes[name]]
        failure = None
        if not is_finite[index]:
            failure = "the gradients hold NaN or infinity"
        elif bool(plain.isnan().any()):
            failure = "the eigensolver did not converge"
        left = without[index, :, : sizes[name]] if has_errors else NO_GROUPS
        facts: dict[str, Any] = {
            "count": stacked.shape[-1],
            "failure": failure,
            "corrects_bias": False,
            # Of rows in float32 the products, which square them, resolve less than the rows do.
            "dtype": "bfloat16" if dtype == torch.bfloat16 else "float64",
            "name": name,
            "step": step,
        }
        found[name] = ParameterGradients(
            Spectrum(plain, left, **facts),
            Spectrum(centred, **facts),
            float(norms[index]),
            NoiseSums(noise.products[index], noise.squares[index], noise.counts),
        )
    return found


def _above(values: Tensor, floor: Tensor) -> Tensor:
    return values.masked_fill(values < floor, 0.0)
