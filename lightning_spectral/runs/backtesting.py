"""How well early numbers forecast the tokens of finished runs: a stack of them, and each alone.

Settings count, not runs: each run is forecast from those of other settings, and skill and error are over settings.
"""

from collections.abc import Sequence
from math import isfinite, isnan, nan
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from lightning_spectral.functional.forecast import (
    Forecast,
    extrapolate_loss,
    forecast_tokens,
)
from lightning_spectral.functional.line import setting_means
from lightning_spectral.functional.powerlaw import Band
from lightning_spectral.functional.rank_correlation import partial_spearman, spearman, spearman_interval
from lightning_spectral.functional.stacking import stack
from lightning_spectral.runs.arguments import check_loss, check_name, check_tail, check_tokens
from lightning_spectral.runs.early_numbers import (
    EARLY_LOSS,
    LOG_BATCH,
    Measure,
    curve_until,
    spectral_measures,
    tail_of,
)
from lightning_spectral.runs.families import Basis, Family, basis_of, families_of
from lightning_spectral.runs.finding import RunPaths
from lightning_spectral.runs.logarithms import vector
from lightning_spectral.runs.noise_course import GRADIENT
from lightning_spectral.runs.predicting import predictors_for
from lightning_spectral.runs.reference_numbers import ReferenceNumbers
from lightning_spectral.runs.references import KIND
from lightning_spectral.runs.run import Run

FRACTIONS = (0.1, 0.25, 0.5)
"""Of the tokens that the fastest run of a family took: all its runs are measured at these counts, each long before it
can have reached the target. A fraction of each run's own length would give its answer away."""

TAIL_BANDS: tuple[Band, ...] = ((1 / 8, 1 / 4), (1 / 6, 1 / 3), (1 / 4, 1 / 2), (1 / 8, 1 / 2))
"""Those of *Spectral Lens* at widths 768 to 1600, as fractions, and the callbacks' default."""

LARGE = 0.5
"""Batches of at least this share of the largest are the largest batches: their runs have taken the fewest steps."""


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
    mean_log_error: float = nan
    """Mean over settings of that of ``|ln(forecast / truth)|``, in which large errors show."""
    large_error: float = nan
    """The same of the largest batches, those of half the largest or more."""

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
    """Spearman's correlation of the tail exponent, by layer and band; empty without spectra."""
    steps: tuple[float, float] = (nan, nan)
    """The fewest and the most optimizer steps that runs had taken there."""
    spectral_gain: tuple[float, float, float] = (nan, nan, nan)
    """What spectral numbers take off the error of the stack, with its interval; NaN where not all runs have them."""
    uses_spectra: bool = False
    """Whether the stack goes by them."""


class FamilyBacktest(NamedTuple):
    """One family of runs that reached a target."""

    family: str
    runs: list[Run]
    tokens_to_target: list[float]
    batch_tokens: list[float]
    layer: str
    """Whose spectra are meant; empty where fewer than four runs have any."""
    band: Band | None
    points: list[Point]
    skipped: dict[str, str]
    """Runs of the family that do not serve, and why."""
    unknown: dict[str, str]
    """Runs whose tail has no exponent at a report that forecasts would go by, and why."""
    settings: Sequence[int] = ()
    """Of each run; equal for seeds of one (:func:`lightning_spectral.runs.settings.settings_of`)."""
    series: tuple[str, ...] = ()
    """Of runs with several series of activations, which is meant, and of runs validated unlike each other; in words."""
    without_spectra: dict[str, str] = {}
    """Runs that serve by loss and batch alone, and why."""

    def as_dict(self) -> dict[str, Any]:
        """JSON-like, for programs."""
        names = ("family", "tokens_to_target", "batch_tokens", "layer", "skipped", "unknown", "without_spectra")
        return {
            **{name: getattr(self, name) for name in names},
            "settings": list(self.settings),
            "band": None if self.band is None else list(self.band),
            "runs": [str(run.path) for run in self.runs],
            "series": {str(run.path): run.series(KIND) for run in self.runs if run.steps(KIND)},
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


def backtest(
    paths: RunPaths,
    target: float,
    layer: str | None = None,
    tail: Band | None = None,
    at: Sequence[float] | None = None,
) -> list[FamilyBacktest]:
    """How well the finished runs of each family could have been forecast, each from those of other settings.

    No forecast of a run sees anything of it beyond its own report at or before the number of tokens in question; the
    others are finished runs, and are taken at the very tokens of that report.

    Args:
        paths: Log directories, logs of other tools, glob patterns of them, or runs.
        target: The loss.
        layer: Which; None for the deepest that was measured.
        tail: Band of the exponent; None for that of the runs' callbacks.
        at: Numbers of tokens at which to forecast; None for a tenth, a quarter and half of what the fastest run took.

    Returns:
        One entry for each family with four or more runs that reached the target. Runs without spectra serve by loss and
        batch alone.

    Raises:
        ValueError: If no family has, naming what is missing; if an argument is of another type, the tail reaches beyond
            the width, or ``at`` beyond what the fastest run took or before any was measured.
    """
    check_questions(target, layer, tail, at)
    families = families_of(paths, target, layer)
    found = [of_family(family, basis_of(family, layer, tail), at) for family in families if family.too_few is None]
    if not found:
        raise ValueError(f"runs must be references enough: {why_none(families)}")
    return found


def check_questions(target: Any, layer: Any, tail: Any, at: Any) -> None:
    """Refuse what can be no target, layer, tail or numbers of tokens, by a ValueError."""
    check_loss("target", target)
    check_name("layer", layer)
    check_tail(tail)
    check_tokens("at", at)


def why_none(families: Sequence[Family]) -> str:
    """Why there is no forecast of any family, each in its words."""
    return "; ".join(f"{family.name}: {family.too_few}" for family in families)


def of_family(family: Family, basis: Basis, at: Sequence[float] | None) -> FamilyBacktest:
    """The backtest of a family with references enough."""
    fastest = min(basis.tokens)
    if at is None:
        at = [fraction * fastest for fraction in FRACTIONS]
    else:
        _check_at(at, min(_first_known(run) for run in basis.runs), fastest)
    points = [_point(basis, family.target, there) for there in at]
    unknown = {}
    if basis.band is not None:
        whys = {str(run.path): _why_no_tail(run, basis.layer, basis.band, at) for run in _measured(basis)}
        unknown = {path: why for path, why in whys.items() if why is not None}
    skipped = family.skipped | {str(run.path): f"never came down to {family.target:g}" for run in family.unfinished}
    finished = {str(run.path) for run in basis.runs}
    without = {path: why for path, why in family.without_spectra.items() if path in finished}
    return FamilyBacktest(
        *(family.name, basis.runs, basis.tokens, basis.batches, basis.layer, basis.band, points),
        *(skipped, unknown, basis.settings, basis.series, without),
    )


def _measured(basis: Basis) -> list[Run]:
    return [run for run, has_spectra in zip(basis.runs, basis.spectral, strict=True) if has_spectra]


def _first_known(run: Run) -> float:
    """Tokens at which a run was measured first, or validated where it was not."""
    if steps := run.steps(KIND):
        return run.tokens_at(KIND, steps[0])
    return float(run.history.tokens[run.history.with_loss()[0][0]])


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


def _point(basis: Basis, target: float, at: float) -> Point:
    spectral = [] if basis.band is None else spectral_measures(basis.layer, basis.band)
    stacked, gain, uses_spectra = _stacked(basis, target, at)
    predictors = [stacked, *(_predictor(measure, basis, at) for measure in (*spectral, EARLY_LOSS, LOG_BATCH))]
    predictors.append(_extrapolation(basis, at, target))
    by_layer = {}
    if basis.band is not None:
        runs, truth = _measured(basis), vector(basis.tokens)[torch.tensor(basis.spectral)]
        by_layer = {
            name: {
                f"{low:.3g}-{high:.3g}": spearman(_matched(tail_of(name, (low, high)), runs, at), truth)
                for low, high in TAIL_BANDS
            }
            for name in runs[0].names(KIND)
        }
    steps = [
        float(np.interp(at, np.append(0, run.history.tokens), np.append(0, run.history.step))) for run in basis.runs
    ]
    return Point(at, at / min(basis.tokens), predictors, by_layer, (min(steps), max(steps)), gain, uses_spectra)


def _stacked(basis: Basis, target: float, at: float) -> tuple[Predictor, tuple[float, float, float], bool]:
    """The stack, of runs whose loss is known; what spectra add to it, and whether it goes by them."""
    losses = [EARLY_LOSS.latest(run, at) for run in basis.runs]
    known = [index for index, there in enumerate(losses) if isfinite(there)]
    truth, settings = vector(basis.tokens), torch.tensor(basis.settings)
    forecasts, gain, uses_spectra = [Forecast(nan, nan, nan)] * len(truth), (nan, nan, nan), False
    if known:
        references = basis.references(_typical(basis.runs))
        numbers = ReferenceNumbers([references[index] for index in known], basis.look, target)
        early = numbers.early(min(losses[index] for index in known), numbers.latest(at))
        found = stack(early, truth[known], None, settings[known], predictors=predictors_for(basis.settings))
        gain = (found.spectral_gain, found.spectral_gain_low, found.spectral_gain_high)
        uses_spectra = found.uses_spectra
        for index, *ends in zip(known, *(part.tolist() for part in found[-3:]), strict=True):
            forecasts[index] = Forecast(*ends)
    return _judged("stack", forecasts, basis, is_relative=True), gain, uses_spectra


def _typical(runs: Sequence[Run]) -> Run:
    """A run whose gradients were measured, if one's were."""
    return next((run for run in runs if run.steps(GRADIENT)), runs[0])


def _judged(
    name: str, forecasts: list[Forecast], basis: Basis, is_relative: bool, numbers: Tensor | None = None
) -> Predictor:
    """A predictor with its errors, and the correlations of its numbers, one for each run, with tokens and batch."""
    truth, settings, batches = vector(basis.tokens), torch.tensor(basis.settings), vector(basis.batches)
    relation = (nan, nan, nan, nan)
    if numbers is not None:
        has = torch.tensor([forecast.reason != NO_SPECTRA for forecast in forecasts])
        of = numbers[has], truth[has]
        partial = nan if name == LOG_BATCH.name else partial_spearman(*of, batches[has].log())
        relation = (spearman(*of), *spearman_interval(*of), partial)
    skill, median, mean, num_known = _skill(forecasts, truth, settings, is_relative)
    large = batches >= LARGE * batches.max()
    of_large = [forecast for forecast, is_large in zip(forecasts, large, strict=True) if is_large]
    large_error = _skill(of_large, truth[large], settings[large], is_relative=False)[2]
    return Predictor(name, *relation, skill, median, num_known, forecasts, mean, large_error)


NO_SPECTRA = "it has no spectra"


def _predictor(measure: Measure, basis: Basis, at: float) -> Predictor:
    """A line on one number, of the runs that can have it."""
    has = [index for index, there in enumerate(basis.spectral) if there or not measure.is_spectral]
    runs = [basis.runs[index] for index in has]
    truth, settings = vector(basis.tokens), torch.tensor(basis.settings)
    forecasts = [Forecast(nan, nan, nan, reason=NO_SPECTRA)] * len(truth)
    for index, forecast in zip(has, _forecasts(measure, runs, truth[has], settings[has], at), strict=True):
        forecasts[index] = forecast
    here = torch.full_like(truth, nan)
    here[has] = _matched(measure, runs, at)
    return _judged(measure.name, forecasts, basis, is_relative=True, numbers=here)


def _matched(measure: Measure, runs: Sequence[Run], at: float) -> Tensor:
    """Of all runs at one number of tokens: the latest at which each of them is known from nothing after `at`."""
    latest = [measure.latest(run, at) for run in runs]
    there = nan if any(map(isnan, latest)) else min(latest)
    return vector([measure.value(run, there) if isfinite(there) else nan for run in runs])


def _forecasts(measure: Measure, runs: Sequence[Run], truth: Tensor, settings: Tensor, at: float) -> list[Forecast]:
    """Of each run from those of other settings, where it was measured last, of which nothing later is known."""
    forecasts = []
    for run, setting in zip(runs, settings, strict=True):
        others = settings != setting
        there = measure.latest(run, at)
        known = isfinite(there)
        values = vector([measure.value(runs[i], there) if known else nan for i in others.nonzero().flatten().tolist()])
        own = measure.value(run, there) if known else nan
        forecasts.append(forecast_tokens(values, truth[others], own, settings=settings[others]))
    return forecasts


def _extrapolation(basis: Basis, at: float, target: float) -> Predictor:
    """The loss curve itself, which needs no other runs."""
    values = [extrapolate_loss(*curve_until(run, at), target) for run in basis.runs]
    forecasts = [Forecast(value, nan, nan) for value in values]
    return _judged("own loss curve", forecasts, basis, is_relative=False, numbers=vector(values))


def _skill(
    forecasts: Sequence[Forecast], truth: Tensor, settings: Tensor, is_relative: bool
) -> tuple[float, float, float, int]:
    """Rank correlation, median and mean logarithmic error, over settings, of forecasts; how many there are."""
    # A forecast of "never" is one, and as wrong as can be.
    values = vector([forecast.value for forecast in forecasts])
    known = ~values.isnan()
    logs, logs_of_truth = values.log(), truth.log()
    if is_relative:
        # Those that rest on other settings are taken relative to their mean, as in `backtest`, without which they would
        # go against the truth.
        of_setting = setting_means(logs_of_truth, settings)
        own = of_setting[settings.unique(return_inverse=True)[1]]
        means = (of_setting.sum() - own) / (len(of_setting) - 1)
        logs, logs_of_truth = logs - means, logs_of_truth - means
    groups = settings[known]
    if not len(groups):
        return nan, nan, nan, 0
    ratios = (values / truth)[known]
    median = float(np.median(setting_means((ratios - 1).abs(), groups)))
    mean = float(setting_means(ratios.log().abs(), groups).mean())
    rho = spearman(setting_means(logs[known], groups), setting_means(logs_of_truth[known], groups))
    return rho, median, mean, int(known.sum())
