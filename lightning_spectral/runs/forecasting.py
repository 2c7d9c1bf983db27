"""How many tokens unfinished runs will need, from the finished runs of their family, and how far to trust that."""

from collections.abc import Callable, Sequence
from functools import partial
from math import exp, inf, isfinite, isnan, log, nan
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from scipy.special import ndtr, ndtri

from lightning_spectral.functional.early import PREDICTORS
from lightning_spectral.functional.forecast import MIN_REFERENCES, Forecast, backtest, forecast_tokens
from lightning_spectral.functional.line import setting_means
from lightning_spectral.functional.powerlaw import Band
from lightning_spectral.functional.stacking import StackedForecast, stack
from lightning_spectral.runs.arguments import check_choice
from lightning_spectral.runs.backtesting import (
    FamilyBacktest,
    check_questions,
    of_family,
    predictors_for,
    why_none,
)
from lightning_spectral.runs.early_numbers import EARLY_LOSS, Measure, early_of, spectral_measures, vector
from lightning_spectral.runs.families import Basis, Family, basis_of, families_of
from lightning_spectral.runs.finding import RunPaths
from lightning_spectral.runs.references import loss_at
from lightning_spectral.runs.run import Run

By = Literal["stack", "tail", "head", "loss", "batch"]
BY: dict[str, tuple[str, ...]] = {
    "stack": tuple(PREDICTORS),
    "loss": ("loss",),
    "batch": ("batch law",),
    "tail": (),
    "head": (),
}
"""What forecasts can go by, with the predictors of a stack that are meant; lines on a spectrum's exponent have none."""


BEYOND_EXPECTATION = 0.99
"""A run that has taken more than so large a share of its forecast's distribution is not as its references are."""


class RunForecast(NamedTuple):
    """What an unfinished run will need."""

    run: Run
    step: float
    """Optimizer steps at the forecast."""
    tokens: float
    """Training tokens there: the last at which the run knows what the forecast goes by, and enough references do."""
    loss: float
    """There."""
    batch_tokens: float
    value: float
    """Tokens to the target, the median; NaN with the reason. Where the run has come into the interval, this and its
    ends are those of what is left of it."""
    low: float
    """Lower end of the 80% interval."""
    high: float
    relative: float
    """Value over the fewest tokens that a reference took."""
    extrapolated: bool
    """Whether the run lies beyond its references."""
    reason: str | None
    """Why there is no number."""
    num_references: int
    """That are known at these tokens, and above the target yet."""
    num_settings: int
    skill: float = nan
    """Rank correlation of forecasts of the references from each other, there."""
    p_value: float = nan
    """Of their being no better than without the predictor."""
    median_error: float = nan
    """Of the references, likewise."""
    mean_log_error: float = nan
    weights: dict[str, float] = {}
    """What a stack goes by."""
    uses_spectra: bool = False
    spectral_gain: tuple[float, float, float] = (nan, nan, nan)
    """What spectra take off its error, with the interval."""


class FamilyForecast(NamedTuple):
    """Forecasts of the unfinished runs of one family, and how well its finished ones could have been forecast."""

    family: str
    target: float
    by: str
    """What forecasts go by."""
    forecasts: list[RunForecast]
    backtest: FamilyBacktest | None
    """None where there are too few references."""
    reason: str | None
    """Why there are no forecasts, where there are too few references."""

    def as_dict(self) -> dict[str, Any]:
        """JSON-like, for programs."""
        return {
            **{name: getattr(self, name) for name in ("family", "target", "by", "reason")},
            "forecasts": [one._asdict() | {"run": str(one.run.path)} for one in self.forecasts],
            "backtest": None if self.backtest is None else self.backtest.as_dict(),
        }


def forecast(
    paths: RunPaths,
    target: float,
    layer: str | None = None,
    tail: Band | None = None,
    at: Sequence[float] | None = None,
    by: By = "stack",
) -> list[FamilyForecast]:
    """Forecast the tokens that unfinished runs will need, from the finished runs of their families among them.

    A run is finished that came down to the target. Each unfinished one is forecast from its last losses and reports, by
    what the finished ones showed at that very number of tokens, with an 80% interval; how well that would have gone
    with the finished ones themselves is told beside it, as by :func:`backtest`.

    Args:
        paths: Log directories, logs of other tools, glob patterns of them, or runs.
        target: The loss.
        layer: Whose spectra; None for the deepest that was measured.
        tail: Band of the tail's exponent; None for that of the runs' callbacks.
        at: Numbers of tokens at which to forecast the finished runs; None for a tenth, a quarter and half of what the
            fastest took.
        by: ``"stack"``, of predictors that go by loss, batch and loss curve, and by spectra where they help
            (:func:`lightning_spectral.functional.stack`); or one alone: ``"tail"`` and ``"head"``, a line on that
            exponent, ``"loss"``, a line on the log gap to the target, ``"batch"``, the batch law.

    Returns:
        One entry for each family. Of one with fewer than four finished runs, with the reason and no forecasts.

    Raises:
        ValueError: If all families have fewer than four, naming what is missing; otherwise as :func:`backtest`.

    Example::

        (family,) = forecast("references/*", target=2.0)
        [(one.run.path, one.value, one.low, one.high) for one in family.forecasts]
    """
    check_questions(target, layer, tail, at)
    check_choice("by", by, tuple(BY))
    families = families_of(paths, target, layer)
    if all(family.too_few is not None for family in families):
        raise ValueError(f"runs must be references enough: {why_none(families)}")
    return [_of_family(family, layer, tail, at, by) for family in families]


def _of_family(
    family: Family, layer: str | None, tail: Band | None, at: Sequence[float] | None, by: str
) -> FamilyForecast:
    if family.too_few is not None:
        return FamilyForecast(family.name, family.target, by, [], None, family.too_few)
    basis = basis_of(family, layer, tail)
    forecasts = [_forecast(run, family, basis, by) for run in family.unfinished]
    return FamilyForecast(family.name, family.target, by, forecasts, of_family(family, basis, at), None)


def _forecast(run: Run, family: Family, basis: Basis, by: str) -> RunForecast:
    spectral = [] if basis.band is None or not family.has_spectra(run) else spectral_measures(basis.layer, basis.band)
    make: Callable[[float], RunForecast]
    if by in ("tail", "head"):
        if not spectral:
            why = family.without_spectra.get(str(run.path), f"has not {MIN_REFERENCES} references with spectra")
            return _nothing(run, nan, f"it {why}")
        measure = spectral[by == "head"]
        make = partial(_by_line, measure, run, basis)
    else:
        measure = EARLY_LOSS
        make = partial(_by_stack, spectral, BY[by], run, basis, family.target)
    points = [there for there in measure.known_at(run, inf) if there > 0]
    if not points:
        return _nothing(run, nan, "it is not known at any tokens yet")
    found = make(points[-1])
    earlier = [there for there in points if there < min(min(basis.tokens), points[-1])]
    if isnan(found.value) and earlier:
        # Where few references are above the target still: where all of them were.
        before = make(earlier[-1])
        found = found if isnan(before.value) else before
    return found


def _nothing(run: Run, tokens: float, reason: str | None) -> RunForecast:
    """What is known of a run without a forecast."""
    history, batch = run.history, float(run.about.get("batch_tokens") or nan)
    step = float(np.interp(tokens, history.tokens, history.step)) if isfinite(tokens) else nan
    loss = loss_at(run, tokens) if isfinite(tokens) else nan
    return RunForecast(run, step, tokens, loss, batch, nan, nan, nan, nan, False, reason, 0, 0)


def _filled(known: RunForecast, found: Forecast | StackedForecast, basis: Basis, **facts: Any) -> RunForecast:
    """With a forecast, or why there is none."""
    value, low, high = found[:3]
    # By now, which may be later than the point that the forecast goes by.
    taken = float(known.run.history.tokens[known.run.history.with_loss()[0][-1]])
    if low < taken:
        value, low, high = _given_above(taken, value, high)
        if isnan(value):
            facts["reason"] = f"it has taken more tokens than the {found.high:,.0f} that its references let expect"
    return known._replace(
        value=value, low=low, high=high, relative=value / min(basis.tokens), extrapolated=found.extrapolated, **facts
    )


def _given_above(tokens: float, value: float, high: float) -> tuple[float, float, float]:
    """Median and 80% interval of a log-normal, given that it is above some tokens; NaN for a case in a hundred."""
    deviation = log(high / value) / float(ndtri(0.9))
    below = float(ndtr(log(tokens / value) / deviation)) if deviation > 0 else 1.0
    if not below < BEYOND_EXPECTATION:
        return nan, nan, nan
    middle, low, high = (value * exp(deviation * float(ndtri(below + (1 - below) * part))) for part in (0.5, 0.1, 0.9))
    return middle, low, high


def _by_line(measure: Measure, run: Run, basis: Basis, tokens: float) -> RunForecast:
    """By a line on the exponent of a spectrum."""
    has = torch.tensor(basis.spectral)
    references = [one for one, has_spectra in zip(basis.runs, basis.spectral, strict=True) if has_spectra]
    values = vector([measure.value(reference, tokens) for reference in references])
    truth, settings = vector(basis.tokens)[has], torch.tensor(basis.settings)[has]
    found, skill = (
        forecast_tokens(values, truth, measure.value(run, tokens), settings=settings),
        backtest(values, truth, settings),
    )
    known, errors = values.isfinite(), (skill.predictions / truth).log().abs()
    forecast_known = errors.isfinite()
    return _filled(
        _nothing(run, tokens, found.reason),
        found,
        basis,
        num_references=int(known.sum()),
        num_settings=len(settings[known].unique()),
        skill=skill.rank_correlation,
        p_value=skill.p_value,
        median_error=skill.median_error,
        mean_log_error=float(setting_means(errors[forecast_known], settings[forecast_known]).mean()),
    )


def _by_stack(
    spectral: Sequence[Measure], predictors: tuple[str, ...], run: Run, basis: Basis, target: float, tokens: float
) -> RunForecast:
    """By a stack of predictors, or one of them."""
    reported = spectral[0].latest(run, tokens) if spectral and all(basis.spectral) else nan
    measures = spectral if isfinite(reported) and len(predictors) > 1 else ()
    references, query = (early_of(runs, target, tokens, measures, reported) for runs in (basis.runs, [run]))
    allowed = predictors_for(basis.settings)
    found = stack(
        references,
        vector(basis.tokens),
        query,
        torch.tensor(basis.settings),
        predictors=tuple(name for name in predictors if name in allowed),
    )
    return _filled(
        _nothing(run, tokens, found.reason),
        found,
        basis,
        num_references=found.num_references,
        num_settings=found.num_settings,
        skill=found.skill,
        p_value=found.p_value,
        median_error=found.median_error,
        mean_log_error=found.mean_log_error,
        weights=found.weights,
        uses_spectra=found.uses_spectra,
        spectral_gain=(found.spectral_gain, found.spectral_gain_low, found.spectral_gain_high),
    )
