"""The noise scale over several reports: exponential means of its two parts, never of the ratio."""

from collections.abc import Mapping
from math import isfinite, nan
from typing import Any

import torch

from lightning_spectral.functional.noise import GradientMoments, NoiseSums


class SmoothedNoise:
    """Exponential means of numerator and denominator of noise scales, by name.

    A report k reports back weighs ``decay ** k``; both parts weigh alike, so that the ratio needs no correction for a
    short past. A report whose parts are not known is passed over.

    Args:
        decay: From 0, the latest report alone, up to but not including 1.
    """

    def __init__(self, decay: float) -> None:
        self.decay = decay
        self._means: dict[str, tuple[float, float]] = {}

    def update(self, name: str, sums: NoiseSums) -> float:
        """Take in a report; returns the noise scale of the means, NaN where the report's parts are not known."""
        squared_norm, trace = map(float, sums.moments_between)
        if not (isfinite(squared_norm) and isfinite(trace)):
            return nan
        before = self._means.get(name, (0.0, 0.0))
        fresh = 1 - self.decay
        means = tuple(
            self.decay * mean + fresh * part for mean, part in zip(before, (squared_norm, trace), strict=True)
        )
        self._means[name] = (means[0], means[1])
        return float(GradientMoments(*(torch.tensor(mean, dtype=torch.float64) for mean in means)).noise_scale)

    def state(self) -> dict[str, Any]:
        """What a resumed run goes on from: plain numbers and strings."""
        return {name: list(means) for name, means in self._means.items()}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Take up what :meth:`state` gave, or begin anew with an empty one."""
        self._means = {name: (float(means[0]), float(means[1])) for name, means in state.items()}
