"""How well early numbers forecast the tokens of finished runs: the tail beside predictors that need no spectrum."""

from collections.abc import Callable, Sequence
from math import isfinite, isnan, log, nan
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from lightning_spectral.functional.forecast import (
    MIN_REFERENCES,
    Forecast,
    extrapolate_loss,
    forecast_tokens,
)
from lightning_spectral.functional.powerlaw import Band
from lightning_spectral.functional.rank_correlation import partial_spearman, spearman, spearman_interval
from lightning_spectral.runs.measured import bands_of, check_comparable
from lightning_spectral.runs.references import KIND, alpha_at, loss_at
from lightning_spectral.runs.run import Run, open_runs

FRACTIONS = (0.1, 0.25, 0.5)
"""Of the tokens that the fastest run of a family took: all its runs are measured at these counts, each long before it
can have reached the target. A fraction of each run's own length would give its answer away."""

TAIL_BANDS: tuple[Band, ...] = ((1 / 8, 1 / 4), (1 / 6, 1 / 3), (1 / 4, 1 / 2), (1 / 8, 1 / 2))
"""Those of *Spectral Lens* at widths 768 to 1600, as fractions, and the callbacks' default."""


Measure = Callable[[Run, float], float]
"""A number of a run at some tokens; NaN for what is not known there."""


class Predictor(NamedTuple):
    """How well one early number goes with the tokens to the target, in one family at one number of tokens."""

    name: str
    rho: float
    """Spearman's correlation of the number with tokens to the target."""
    low: float
    """95% bootstrap interval of it."""
    high: float
    partial_rho: float
    """The same, given log batch size; NaN for log batch size itself."""
    skill: float
    """Rank correlation of leave-one-out forecasts with the truth, both relative to the other runs' mean."""
    median_error: float
    """Median relative error of leave-one-out forecasts."""
    forecasts: list[Forecast]
    """Of each run from the others."""


class Point(NamedTuple):
    """All predictors at one number of tokens."""

    tokens: float
    fraction: float
    """Of the tokens of the fastest run."""
    predictors: list[Predictor]
    by_layer: dict[str, dict[str, float]]
    """Spearman's correlation of the tail exponent, by layer and band."""


class FamilyForecast(NamedTuple):
    """One family of runs that reached a target."""

    family: str
    runs: list[Run]
    tokens_to_target: list[float]
    batch_tokens: list[float]
    layer: str
    band: Band
    points: list[Point]
    skipped: dict[str, str]
    """Runs of the family that do not serve, and why."""

    def as_dict(self) -> dict[str, Any]:
        """For programs.

        Returns:
            JSON-like.
        """
        return {
            **{
                name: getattr(self, name) for name in ("family", "tokens_to_target", "batch_tokens", "layer", "skipped")
            },
            "band": list(self.band),
            "runs": [str(run.path) for run in self.runs],
            "points": [
                point._asdict()
                | {
                    "predictors": [
                        p._asdict() | {"forecasts": [f._asdict() for f in p.forecasts]} for p in point.predictors
                    ]
                }
                for point in self.points
            ],
        }


def forecast(
    paths: str | Path | Sequence[str | Path],
    target: float,
    layer: str | None = None,
    tail: Band | None = None,
    at: Sequence[float] | None = None,
) -> list[FamilyForecast]:
    """How well the runs of each family could have been forecast, each from the others.

    No forecast of a run sees anything of it beyond its own report at or before the number of tokens in question; the
    others are finished runs, and are taken at the very tokens of that report.

    Args:
        paths: Log directories, or glob patterns of them.
        target: The loss.
        layer: Which; None for the deepest that was measured.
        tail: Band of the exponent; None for that of the runs' callbacks.
        at: Numbers of tokens at which to forecast; None for a tenth, a quarter and half of what the fastest run took.

    Returns:
        One entry for each family with four or more runs that reached the target.

    Raises:
        ValueError: If no family has, naming what is missing.
    """
    families: dict[str, list[Run]] = {}
    for run in open_runs(paths, "runs"):
        families.setdefault(run.family, []).append(run)
    found, missing = [], []
    for family, runs in families.items():
        usable, skipped = _usable(runs, target, layer)
        if len(usable) < MIN_REFERENCES:
            reasons = "; ".join(dict.fromkeys(skipped.values()))
            missing.append(f"{family} has {len(usable)}{f' ({reasons})' if reasons else ''}")
            continue
        check_comparable(usable)
        found.append(_of_family(family, usable, skipped, target, layer, tail, at))
    if not found:
        raise ValueError(
            f"runs must hold {MIN_REFERENCES} of one family that came down to {target:g}, with activation spectra: "
            + ", ".join(missing)
        )
    return found


def tail_course(family: FamilyForecast, num_points: int = 12) -> tuple[np.ndarray, list[list[Forecast]]]:
    """Forecasts by the tail over training.

    Args:
        family: The family.
        num_points: How many.

    Returns:
        Numbers of tokens, evenly in their logarithm from the first that all runs were measured at to those of the
        fastest run, and at each the forecast of every run from the others.
    """
    first = max(run.tokens_at(KIND, run.steps(KIND)[0]) for run in family.runs)
    tokens = np.geomspace(first, max(min(family.tokens_to_target), first), num_points)
    measure = _tail_of(family.layer, family.band)
    return tokens, [_forecasts(measure, family.runs, _vector(family.tokens_to_target), at) for at in tokens]


def _usable(runs: Sequence[Run], target: float, layer: str | None) -> tuple[list[Run], dict[str, str]]:
    usable, skipped = [], {}
    for run in runs:
        if isnan(run.tokens_to(target)):
            skipped[str(run.path)] = f"never came down to {target:g}"
        elif not run.steps(KIND):
            skipped[str(run.path)] = "has no activation spectra"
        elif layer is not None and layer not in run.names(KIND):
            skipped[str(run.path)] = f"did not measure {layer}"
        else:
            usable.append(run)
    return usable, skipped


def _of_family(
    family: str,
    runs: list[Run],
    skipped: dict[str, str],
    target: float,
    layer: str | None,
    tail: Band | None,
    at: Sequence[float] | None,
) -> FamilyForecast:
    layer = layer or runs[0].names(KIND)[-1]
    band = tail or bands_of(runs[0], KIND)["tail"]
    tokens = [run.tokens_to(target) for run in runs]
    batches = [float(run.about.get("batch_tokens") or nan) for run in runs]
    fastest = min(tokens)
    at = [fraction * fastest for fraction in FRACTIONS] if at is None else at
    points = [_point(runs, tokens, batches, layer, band, target, there) for there in at]
    return FamilyForecast(family, runs, tokens, batches, layer, band, points, skipped)


def _point(
    runs: list[Run], tokens: list[float], batches: list[float], layer: str, band: Band, target: float, at: float
) -> Point:
    def head(run: Run, there: float) -> float:
        return run.spectrum_at(KIND, layer, there).exponent(bands_of(run, KIND)["head"])[0]

    measures: dict[str, Measure] = {
        "alpha_tail": _tail_of(layer, band),
        "alpha_head": head,
        "RankMe": lambda run, there: run.spectrum_at(KIND, layer, there).rankme()[0],
        "early loss": loss_at,
        "log batch size": lambda run, there: log(run.about.get("batch_tokens") or nan),
    }
    truth, log_batch = _vector(tokens), _vector(batches).log()
    predictors = [_predictor(name, measure, runs, truth, log_batch, at) for name, measure in measures.items()]
    predictors.append(_extrapolation(runs, truth, log_batch, at, target))
    by_layer = {
        name: {
            f"{low:.3g}-{high:.3g}": spearman(
                _vector([alpha_at(run, KIND, name, (low, high), at) for run in runs]), truth
            )
            for low, high in TAIL_BANDS
        }
        for name in runs[0].names(KIND)
    }
    return Point(at, at / min(tokens), predictors, by_layer)


def _predictor(name: str, measure: Measure, runs: list[Run], truth: Tensor, log_batch: Tensor, at: float) -> Predictor:
    forecasts = _forecasts(measure, runs, truth, at)
    here = _vector([measure(run, at) for run in runs])
    interval = spearman_interval(here, truth)
    partial = nan if name == "log batch size" else partial_spearman(here, truth, log_batch)
    return Predictor(name, spearman(here, truth), *interval, partial, *_skill(forecasts, truth), forecasts)


def _forecasts(measure: Measure, runs: list[Run], truth: Tensor, at: float) -> list[Forecast]:
    """Of each run from the others, at its last report, of which nothing later is known."""
    forecasts = []
    for index, run in enumerate(runs):
        others = _others(len(runs), index)
        there = _last_report(run, at)
        values = _vector([measure(runs[other], there) if isfinite(there) else nan for other in others])
        forecasts.append(forecast_tokens(values, truth[others], measure(run, there) if isfinite(there) else nan))
    return forecasts


def _others(num: int, index: int) -> list[int]:
    return [other for other in range(num) if other != index]


def _tail_of(layer: str, band: Band) -> Measure:
    return lambda run, tokens: alpha_at(run, KIND, layer, band, tokens)


def _extrapolation(runs: list[Run], truth: Tensor, log_batch: Tensor, at: float, target: float) -> Predictor:
    """The loss curve itself, which needs no other runs."""
    values = []
    for run in runs:
        entries, losses = run.history.with_loss()
        tokens = run.history.tokens[entries]
        seen = (tokens <= at) & (tokens > 0)
        values.append(extrapolate_loss(torch.from_numpy(tokens[seen]), torch.from_numpy(losses[seen]), target))
    found = _vector(values)
    forecasts = [Forecast(value, nan, nan) for value in values]
    return Predictor(
        "L(t) = a t^-b + c",
        spearman(found, truth),
        *spearman_interval(found, truth),
        partial_spearman(found, truth, log_batch),
        *_skill(forecasts, truth),
        forecasts,
    )


def _skill(forecasts: Sequence[Forecast], truth: Tensor) -> tuple[float, float]:
    """Rank correlation and median relative error of forecasts, each made without the run itself."""
    values = _vector([forecast.value for forecast in forecasts])
    errors = (values / truth - 1).abs()
    known = errors.isfinite()
    # Relative to the mean of the others, as in `leave_one_out`.
    centres = _vector([float(truth[_others(len(truth), index)].log().mean()) for index in range(len(truth))])
    rho = spearman((values.log() - centres)[known], (truth.log() - centres)[known])
    return rho, float(errors[known].median()) if bool(known.any()) else nan


def _last_report(run: Run, tokens: float) -> float:
    """Tokens at a run's last report at or before a number of them; NaN where there is none."""
    before = [there for there in (run.tokens_at(KIND, step) for step in run.steps(KIND)) if there <= tokens]
    return max(before, default=nan)


def _vector(values: Sequence[float]) -> Tensor:
    return torch.as_tensor(np.asarray(values, dtype=np.float64))
