"""Steps of the linear model to far targets and near ones, by exponent of the spectrum: arithmetic, no experiment."""

import math
from typing import Any

import torch

from lightning_spectral.theory import crossover_rank, power_law_spectrum, steps_to_risk

ALPHAS = (0.8, 1.0, 1.2, 1.4, 1.6, 1.8, 2.0)
LEVELS = (0.8, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1, 0.05)
WIDTHS, BETAS, BATCHES = (256, 512, 1024), (1.1, 1.5, 2.0), (math.inf, 16.0)
LINEAR_RATE = 0.5


def linear(width: int, beta: float, batch_size: float) -> dict[str, Any]:
    """Steps to each level by exponent of the spectrum, and the level at which the steepest is as fast as the flattest.

    Args:
        width: Modes.
        beta: Exponent of the task power.
        batch_size: Rows a step.

    Returns:
        ``steps`` ``(levels, alphas)``, the ``crossing``, NaN beyond the levels, and whether the claim of the plan
        ``holds``.
    """
    power = torch.arange(1, width + 1, dtype=torch.float64) ** -beta
    power /= power.sum()
    spectra = [power_law_spectrum(width, alpha) for alpha in ALPHAS]

    def steps(level: float, index: int) -> float:
        return steps_to_risk(spectra[index], power, LINEAR_RATE, batch_size, 0.0, level)

    found = [[steps(level, index) for index in range(len(ALPHAS))] for level in LEVELS]
    ratios = [row[-1] / row[0] for row in found]
    crossing = math.nan
    if ratios[0] < 1 < ratios[-1]:
        low, high = math.log(LEVELS[-1]), math.log(LEVELS[0])
        for _ in range(40):
            middle = (low + high) / 2
            is_slower = steps(math.exp(middle), len(ALPHAS) - 1) > steps(math.exp(middle), 0)
            low, high = (middle, high) if is_slower else (low, middle)
        crossing = math.exp((low + high) / 2)
    return {
        "width": width,
        "beta": beta,
        "batch_size": batch_size,
        "steps": found,
        "crossing": crossing,
        "crossover_ranks": [crossover_rank(spectrum) for spectrum in spectra],
        "holds": ratios[0] < 1 < ratios[-1] and 0.2 <= crossing <= 0.4,
    }
