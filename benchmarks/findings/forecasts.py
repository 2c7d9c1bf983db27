"""How often the 80% intervals of forecasts hold what a new run takes: inside the references, beyond them, of seeds."""

from math import isfinite, log

import numpy as np
import torch

from lightning_spectral.functional import backtest, forecast_tokens

NUM_FORECASTS = 600
NOISE = 0.15
"""Standard deviation of ln tokens about the law, of a run."""

LAWS = {"straight": (0.0, 0.0), "slightly curved": (0.5, 0.0), "curved": (1.5, 0.0), "noisy predictor": (0.0, 0.2)}
"""Curvature of ln tokens over exponents from 1 to 2, where the slope is 2 in the middle; noise of the exponent."""

Row = tuple[str, float, float, float]
"""What, the share that was found, and the limits that it is to keep."""


def coverage(num_references: int) -> list[Row]:
    """Shares of intervals that hold the truth, among those that are a number."""
    rng = np.random.default_rng(num_references)
    runs = f"{num_references} references"
    rows = [_seeds(rng)] if num_references == 12 else []
    for law, (curvature, noise) in LAWS.items():
        # A law that is not straight, or not seen well, is not what the interval inside is promised for.
        is_promised = law in ("straight", "noisy predictor")
        inside, beyond = (_held(rng, num_references, curvature, noise, is_beyond) for is_beyond in (False, True))
        rows.append((f"{runs}, {law}: inside", inside, 0.75 if is_promised else 0.7, 0.86))
        rows.append((f"{runs}, {law}: beyond, to half the range", beyond, 0.75, 1.0))
    return rows


def _held(rng: np.random.Generator, num: int, curvature: float, noise: float, is_beyond: bool) -> float:
    def takes(exponent: np.ndarray) -> np.ndarray:
        log_tokens = 14 + 2 * exponent + curvature * (exponent - 1.5) ** 2
        return np.asarray(np.exp(log_tokens + NOISE * rng.standard_normal(exponent.shape)))

    held: list[bool] = []
    while len(held) < NUM_FORECASTS:
        exponents = rng.uniform(1, 2, num)
        new = rng.uniform(2, 2.5, 1) if is_beyond else rng.uniform(1, 2, 1)
        seen, seen_new = (each + noise * rng.standard_normal(each.shape) for each in (exponents, new))
        found = forecast_tokens(torch.from_numpy(seen), torch.from_numpy(takes(exponents)), float(seen_new[0]))
        if isfinite(found.value) and found.extrapolated == is_beyond:
            held.append(found.low <= float(takes(new)[0]) <= found.high)
    return float(np.mean(held))


def _seeds(rng: np.random.Generator) -> Row:
    """Twelve references, four seeds of each of three batch sizes, without any relation; a run of a fourth."""
    settings = torch.arange(3).repeat_interleave(4)
    held: list[bool] = []
    while len(held) < NUM_FORECASTS:
        exponents, logs = rng.normal(1.5, 0.3, 4), rng.normal(14, 0.4, 4)
        alpha = torch.from_numpy(np.repeat(exponents[:3], 4) + rng.normal(0, 0.02, 12))
        tokens = torch.from_numpy(np.exp(np.repeat(logs[:3], 4) + rng.normal(0, 0.05, 12)))
        found = forecast_tokens(alpha, tokens, exponents[3] + rng.normal(0, 0.02), settings=settings)
        assert not backtest(alpha, tokens, settings).p_value <= 0.1, "three settings show no skill"
        if isfinite(found.value) and not found.extrapolated:
            held.append(log(found.low) <= logs[3] + rng.normal(0, 0.05) <= log(found.high))
    return ("12 references, seeds of 3 settings, no relation: inside", float(np.mean(held)), 0.75, 0.9)
