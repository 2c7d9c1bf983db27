"""How well early numbers forecast the tokens of finished runs: the tail beside predictors that need no spectrum.

Settings count, not runs: each run is forecast from those of other settings, and skill and error are over settings.
"""

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
from lightning_spectral.functional.line import setting_means
from lightning_spectral.functional.powerlaw import Band, resolve_band
from lightning_spectral.functional.rank_correlation import partial_spearman, spearman, spearman_interval
from lightning_spectral.runs.arguments import check_loss, check_name, check_tail, check_tokens
from lightning_spectral.runs.finding import open_runs
from lightning_spectral.runs.measured import bands_of, check_comparable, series_used
from lightning_spectral.runs.references import KIND, alpha_at, longest_by_id, loss_at
from lightning_spectral.runs.run import Run
from lightning_spectral.runs.settings import settings_of

FRACTIONS = (0.1, 0.25, 0.5)
"""Of the tokens that the fastest run of a family took: all its runs are measured at these counts, each long before it
can have reached the target. A fraction of each run's own length would give its answer away."""

TAIL_BANDS: tuple[Band, ...] = ((1 / 8, 1 / 4), (1 / 6, 1 / 3), (1 / 4, 1 / 2), (1 / 8, 1 / 2))
"""Those of *Spectral Lens* at widths 768 to 1600, as fractions, and the callbacks' default."""


class Measure(NamedTuple):
    """An early number of a run."""

    name: str
    value: Callable[[Run, float], float]
    """At some tokens, between the points at which it is known; NaN where it is not."""
    known_at: Callable[[Run, float], Sequence[float]]
    """Tokens at which it is known, up to a number of them."""

    def latest(self, run: Run, tokens: float) -> float:
        """Tokens at which it was known last of a run that has come so far; NaN where it was not known yet."""
        return max((there for there in self.known_at(run, tokens) if there <= tokens), default=nan)


class Predictor(NamedTuple):
    """How well one early number goes with the tokens to the target, in one family at one number of tokens."""

    name: str
    rho: float
    """Spearman's correlation of the number with tokens to the target, where all runs know it last."""
    low: float
    """95% bootstrap interval of it."""
    high: float
    partial_rho: float
    """The same, given log batch size; NaN for log batch size itself."""
    skill: float
    """Rank correlation of forecasts with the truth, both relative to the mean of the other settings."""
    median_error: float
    """Median over settings of the mean relative error of their runs."""
    num_forecasts: int
    """Of how many runs there is one."""
    forecasts: list[Forecast]
    """Of each run from those of other settings."""

    @property
    def num_extrapolated(self) -> int:
        """How many runs that have a forecast lie beyond those that it rests on."""
        return sum(forecast.extrapolated and not isnan(forecast.value) for forecast in self.forecasts)


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
    unknown: dict[str, str]
    """Runs whose tail has no exponent at a report that forecasts would go by, and why."""
    settings: Sequence[int] = ()
    """Of each run; equal for seeds of one (:func:`lightning_spectral.runs.settings.settings_of`)."""
    series: tuple[str, ...] = ()
    """Of runs with several series of activations, which is meant, in words."""

    def as_dict(self) -> dict[str, Any]:
        """JSON-like, for programs."""
        return {
            **{
                name: getattr(self, name)
                for name in ("family", "tokens_to_target", "batch_tokens", "layer", "skipped", "unknown")
            },
            "settings": list(self.settings),
            "band": list(self.band),
            "runs": [str(run.path) for run in self.runs],
            "series": {str(run.path): run.series(KIND) for run in self.runs},
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
    """How well the runs of each family could have been forecast, each from those of other settings.

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
        ValueError: If no family has, naming what is missing; if an argument is of another type, the tail reaches beyond
            the width, or ``at`` beyond what the fastest run took or before any was measured.
    """
    check_loss("target", target)
    check_name("layer", layer)
    check_tail(tail)
    check_tokens("at", at)
    families: dict[str, list[Run]] = {}
    for run in longest_by_id(open_runs(paths, "runs")):
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

    Returns:
        Numbers of tokens, evenly in their logarithm from the first that all runs were measured at to those of the
        fastest run, and at each the forecast of every run from those of other settings.
    """
    first = max(run.tokens_at(KIND, run.steps(KIND)[0]) for run in family.runs)
    tokens = np.geomspace(first, max(min(family.tokens_to_target), first), num_points)
    measure = _tail_of(family.layer, family.band)
    truth, settings = _vector(family.tokens_to_target), torch.tensor(family.settings)
    return tokens, [_forecasts(measure, family.runs, truth, settings, at) for at in tokens]


def _usable(runs: Sequence[Run], target: float, layer: str | None) -> tuple[list[Run], dict[str, str]]:
    usable, skipped = [], {}
    for run in runs:
        if isnan(run.tokens_to(target)):
            skipped[str(run.path)] = f"never came down to {target:g}"
        elif not run.steps(KIND):
            skipped[str(run.path)] = "has no activation spectra"
        elif layer is not None and not run.holds(KIND, layer):
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
    if tail is not None:
        first = runs[0].steps(KIND)[0]
        resolve_band(tail, len(runs[0].spectrum(KIND, layer, first).values), "tail")
    band = tail or bands_of(runs[0], KIND)["tail"]
    tokens = [run.tokens_to(target) for run in runs]
    batches = [float(run.about.get("batch_tokens") or nan) for run in runs]
    fastest = min(tokens)
    if at is None:
        at = [fraction * fastest for fraction in FRACTIONS]
    else:
        _check_at(at, min(run.tokens_at(KIND, run.steps(KIND)[0]) for run in runs), fastest)
    settings = settings_of(runs)
    points = [_point(runs, tokens, batches, settings, layer, band, target, there) for there in at]
    unknown = {str(run.path): why for run in runs if (why := _why_no_tail(run, layer, band, at)) is not None}
    series = tuple(series_used(runs, KIND))
    return FamilyForecast(family, runs, tokens, batches, layer, band, points, skipped, unknown, settings, series)


def _why_no_tail(run: Run, layer: str, band: Band, at: Sequence[float]) -> str | None:
    """Why a report that forecasts go by gives no exponent; None if all do."""
    whys = (run.course(KIND).why_unknown(layer, band, there) for there in at)
    return next((why for why in whys if why is not None), None)


def _check_at(at: Sequence[float], first: float, fastest: float) -> None:
    """Refuse numbers of tokens at which there is nothing to forecast by, or nothing left to forecast."""
    for tokens in at:
        if not first <= tokens <= fastest:
            raise ValueError(
                f"at must be from {first:,.0f} tokens, at which a run was measured first, to the {fastest:,.0f} that "
                f"the fastest took, got {tokens:,.6g}: leave it out for 10, 25 and 50%"
            )


def _point(
    runs: list[Run],
    tokens: list[float],
    batches: list[float],
    settings: list[int],
    layer: str,
    band: Band,
    target: float,
    at: float,
) -> Point:
    heads = {run: bands_of(run, KIND)["head"] for run in runs}

    def head(run: Run, there: float) -> float:
        return run.course(KIND).exponent(layer, heads[run], there)

    measures = [
        _tail_of(layer, band),
        Measure("alpha_head", head, _reported),
        Measure("RankMe", lambda run, there: run.course(KIND).rankme(layer, there), _reported),
        Measure("early loss", loss_at, _validated),
        Measure("log batch size", lambda run, _: log(run.about.get("batch_tokens") or nan), lambda *_: [at]),
    ]
    truth, log_batch, groups = _vector(tokens), _vector(batches).log(), torch.tensor(settings)
    predictors = [_predictor(measure, runs, truth, log_batch, groups, at) for measure in measures]
    predictors.append(_extrapolation(runs, truth, log_batch, groups, at, target))
    by_layer = {
        name: {
            f"{low:.3g}-{high:.3g}": spearman(_matched(_tail_of(name, (low, high)), runs, at), truth)
            for low, high in TAIL_BANDS
        }
        for name in runs[0].names(KIND)
    }
    return Point(at, at / min(tokens), predictors, by_layer)


def _predictor(
    measure: Measure, runs: list[Run], truth: Tensor, log_batch: Tensor, settings: Tensor, at: float
) -> Predictor:
    forecasts = _forecasts(measure, runs, truth, settings, at)
    here = _matched(measure, runs, at)
    interval = spearman_interval(here, truth)
    partial = nan if measure.name == "log batch size" else partial_spearman(here, truth, log_batch)
    skill, error, num_known = _skill(forecasts, truth, settings, is_relative=True)
    return Predictor(measure.name, spearman(here, truth), *interval, partial, skill, error, num_known, forecasts)


def _matched(measure: Measure, runs: list[Run], at: float) -> Tensor:
    """Of all runs at one number of tokens: the latest at which each of them is known from nothing after `at`."""
    latest = [measure.latest(run, at) for run in runs]
    there = nan if any(map(isnan, latest)) else min(latest)
    return _vector([measure.value(run, there) if isfinite(there) else nan for run in runs])


def _forecasts(measure: Measure, runs: list[Run], truth: Tensor, settings: Tensor, at: float) -> list[Forecast]:
    """Of each run from those of other settings, where it was measured last, of which nothing later is known."""
    forecasts = []
    for run, setting in zip(runs, settings, strict=True):
        others = settings != setting
        there = measure.latest(run, at)
        known = isfinite(there)
        values = _vector([measure.value(runs[i], there) if known else nan for i in others.nonzero().flatten().tolist()])
        own = measure.value(run, there) if known else nan
        forecasts.append(forecast_tokens(values, truth[others], own, settings=settings[others]))
    return forecasts


def _reported(run: Run, tokens: float) -> list[float]:
    return run.course(KIND).tokens_until(tokens)


def _validated(run: Run, tokens: float) -> list[float]:
    return run.history.tokens[run.history.with_loss()[0]].tolist()


def _tail_of(layer: str, band: Band) -> Measure:
    return Measure("alpha_tail", lambda run, tokens: alpha_at(run, KIND, layer, band, tokens), _reported)


def _extrapolation(
    runs: list[Run], truth: Tensor, log_batch: Tensor, settings: Tensor, at: float, target: float
) -> Predictor:
    """The loss curve itself, which needs no other runs."""
    values = []
    for run in runs:
        entries, losses = run.history.with_loss()
        tokens = run.history.tokens[entries]
        seen = (tokens <= at) & (tokens > 0)
        values.append(extrapolate_loss(torch.from_numpy(tokens[seen]), torch.from_numpy(losses[seen]), target))
    found = _vector(values)
    forecasts = [Forecast(value, nan, nan) for value in values]
    skill, error, num_known = _skill(forecasts, truth, settings, is_relative=False)
    return Predictor(
        "L(t) = a t^-b + c",
        spearman(found, truth),
        *spearman_interval(found, truth),
        partial_spearman(found, truth, log_batch),
        skill,
        error,
        num_known,
        forecasts,
    )


def _skill(
    forecasts: Sequence[Forecast], truth: Tensor, settings: Tensor, is_relative: bool
) -> tuple[float, float, int]:
    """Rank correlation and relative error, over settings, of forecasts that were made without the run; their number."""
    # A forecast of "never" is one, and as wrong as can be.
    values = _vector([forecast.value for forecast in forecasts])
    known = ~values.isnan()
    logs, logs_of_truth = values.log(), truth.log()
    if is_relative:
        # Those that rest on other settings are taken relative to their mean, as in `backtest`, without which they would
        # go against the truth.
        of_setting = setting_means(logs_of_truth, settings)
        own = of_setting[settings.unique(return_inverse=True)[1]]
        means = (of_setting.sum() - own) / (len(of_setting) - 1)
        logs, logs_of_truth = logs - means, logs_of_truth - means
    errors = (values / truth - 1).abs()[known]
    groups = settings[known]
    median = float(np.median(setting_means(errors, groups))) if len(errors) else nan
    rho = (
        spearman(setting_means(logs[known], groups), setting_means(logs_of_truth[known], groups))
        if len(errors)
        else nan
    )
    return rho, median, int(known.sum())


def _vector(values: Sequence[float]) -> Tensor:
    return torch.as_tensor(np.asarray(values, dtype=np.float64))
