"""Steps of the linear model to far targets and near ones, by exponent of the spectrum: arithmetic, no experiment."""

import math
from typing import Any

import numpy as np
import torch

from lightning_spectral.theory import crossover_rank, power_law_spectrum, sgd_risk

ALPHAS = (0.8, 1.0, 1.2, 1.4, 1.6, 1.8, 2.0)
LEVELS = (0.8, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1, 0.05)
WIDTHS, BETAS, BATCHES = (256, 512, 1024), (1.1, 1.5, 2.0), (math.inf, 16.0)
RATE = 0.5
TIMES = np.geomspace(0.1, 1e8, 6000)
"""Steps at which the risk is looked at, 0.35% apart."""


def linear(width: int, beta: float, batch_size: float) -> dict[str, Any]:
    """Steps to each level by exponent of the spectrum, and the level at which the steepest is as fast as the flattest.

    Args:
        width: Modes.
        beta: Exponent of the task power.
        batch_size: Rows a step.

    Returns:
        ``steps`` ``(levels, alphas)``, the ``crossing``, NaN where there is none between the levels, and whether the
        claim of the plan ``holds``.
    """
    power = torch.arange(1, width + 1, dtype=torch.float64) ** -beta
    power /= power.sum()
    spectra = [power_law_spectrum(width, alpha) for alpha in ALPHAS]
    times = torch.from_numpy(TIMES)
    risks = [sgd_risk(spectrum, power, RATE, batch_size, 0.0, times).numpy() for spectrum in spectra]
    steps = [[reached(risk, level) for risk in risks] for level in LEVELS]
    ratios = [row[-1] / row[0] for row in steps]
    # The steeper is below at first.
    later = np.flatnonzero(risks[-1] > risks[0])
    crossing = float(risks[0][later[0]]) if len(later) and ratios[0] < 1 < ratios[-1] else math.nan
    return {
        "width": width,
        "beta": beta,
        "batch_size": batch_size,
        "steps": steps,
        "crossing": crossing,
        "crossover_ranks": [crossover_rank(spectrum) for spectrum in spectra],
        "holds": ratios[0] < 1 < ratios[-1] and 0.2 <= crossing <= 0.4,
    }


def reached(risk: np.ndarray, level: float) -> float:
    """Steps at which a falling risk comes to a level, between two looks."""
    return float(np.exp(np.interp(-math.log(level), -np.log(np.maximum(risk, 1e-300)), np.log(TIMES))))
