"""The noise scale of a report, read back from what a record keeps of it."""

from collections.abc import Mapping, Sequence
from math import nan
from typing import Any, NamedTuple

import torch

from lightning_spectral.functional.noise import GradientMoments, NoiseSums


class NoiseScale(NamedTuple):
    """A noise scale as it was measured; NaN for what is not known."""

    value: float
    """In samples; ``inf`` where they agree no more than noise does."""
    low: float
    """80% interval; finite."""
    high: float
    """``inf`` where a gradient of zero is not excluded."""
    squared_norm: float
    """Squared norm of the true gradient, without bias."""
    trace: float
    """Trace of the covariance of per-sample gradients, without bias."""
    between: float
    """The noise scale from pairs of samples of different groups, of which the interval is: samples that share a
    document do not pass for signal there. ``value`` where there are no groups."""


def names_of_gradients(arrays: Mapping[str, Any]) -> list[str]:
    """The parameters of whose gradients a report says something."""
    keys = [key.removeprefix("gradient/") for key in arrays if key.startswith("gradient/")]
    return list(dict.fromkeys(key.rpartition("/")[0] for key in keys))


def read_noise(arrays: Mapping[str, Any], names: Sequence[str]) -> NoiseScale:
    """The noise scale of some parameters together, from the arrays of a report of their gradients.

    A report that holds the parts but not the sums over groups has no interval; one that holds neither, nothing.
    """
    fields = NoiseSums._fields
    if all(f"gradient/{name}/noise_{field}" in arrays for name in names for field in fields):
        sums = NoiseSums.total(
            [
                NoiseSums(*(torch.as_tensor(arrays[f"gradient/{name}/noise_{field}"]) for field in fields))
                for name in names
            ]
        )
        parts, interval = sums.moments, sums.interval
        low, high, between = float(interval.low), float(interval.high), float(sums.moments_between.noise_scale)
    else:
        parts = GradientMoments(*(_summed(arrays, names, field) for field in GradientMoments._fields))
        low = high = nan
        between = float(parts.noise_scale)
    return NoiseScale(float(parts.noise_scale), low, high, float(parts.squared_norm), float(parts.trace), between)


def _summed(arrays: Mapping[str, Any], names: Sequence[str], field: str) -> torch.Tensor:
    keys = [f"gradient/{name}/{field}" for name in names]
    numbers = [float(arrays[key]) if key in arrays else nan for key in keys]
    return torch.tensor(numbers, dtype=torch.float64).sum()
