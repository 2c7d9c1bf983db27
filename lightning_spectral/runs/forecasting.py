"""How many tokens unfinished runs will need, from the finished runs of their family, and how far to trust that."""

from collections.abc import Sequence
from math import inf, isfinite, isnan, nan
from typing import Any, NamedTuple

import numpy as np

from lightning_spectral.functional.forecast import MIN_REFERENCES
from lightning_spectral.functional.powerlaw import Band
from lightning_spectral.runs.arguments import check_choice
from lightning_spectral.runs.backtesting import (
    FamilyBacktest,
    check_questions,
    of_family,
    why_none,
)
from lightning_spectral.runs.early_numbers import log_batch
from lightning_spectral.runs.families import Basis, Family, basis_of, families_of, reference_of
from lightning_spectral.runs.finding import RunPaths
from lightning_spectral.runs.predicting import BY, By, Seen, Shown, from_now_on, predict
from lightning_spectral.runs.reference_numbers import ReferenceNumbers
from lightning_spectral.runs.references import KIND, loss_at
from lightning_spectral.runs.run import Run


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
    check_choice("by", by, BY)
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
    if not isnan(diverged_at := run.history.diverged_at):
        return _nothing(run, nan, f"its loss is no finite number from step {diverged_at:,.0f} on")
    has_spectra = basis.look is not None and family.has_spectra(run)
    if by in ("tail", "head") and not has_spectra:
        why = family.without_spectra.get(str(run.path), f"has not {MIN_REFERENCES} references with spectra")
        return _nothing(run, nan, f"it {why}")
    numbers = ReferenceNumbers(basis.references(run), basis.look, family.target)
    own = ReferenceNumbers([reference_of(run, nan, has_spectra, run)], basis.look, family.target)
    at = (
        run.history.tokens[run.history.with_loss()[0]]
        if by not in ("tail", "head")
        else run.course(KIND).tokens_until(inf)
    )
    points = [float(there) for there in at if there > 0]
    if not points:
        return _nothing(run, nan, "it is not known at any tokens yet")
    found = _at(inf, run, own, numbers, basis, by)
    earlier = [there for there in points if there < min(min(basis.tokens), points[-1])]
    if isnan(found.value) and earlier:
        # Where few references are above the target still: where all of them were.
        before = _at(earlier[-1], run, own, numbers, basis, by)
        found = found if isnan(before.value) else before
    return found


def _nothing(run: Run, tokens: float, reason: str | None) -> RunForecast:
    """What is known of a run without a forecast."""
    history, batch = run.history, float(run.about.get("batch_tokens") or nan)
    step = float(np.interp(tokens, history.tokens, history.step)) if isfinite(tokens) else nan
    loss = loss_at(run, tokens) if isfinite(tokens) else nan
    return RunForecast(run, step, tokens, loss, batch, nan, nan, nan, nan, False, reason, 0, 0)


def _at(until: float, run: Run, own: ReferenceNumbers, numbers: ReferenceNumbers, basis: Basis, by: str) -> RunForecast:
    """A forecast by what a run had shown when it had come so far."""
    shown = shown_by(run, own, until)
    found = predict(by, shown, numbers, basis.settings)
    left = from_now_on(found, _last_loss(run, inf))  # by now, which may be later than the point that it goes by
    at = shown.spectral[f"alpha_{by}"].tokens if f"alpha_{by}" in shown.spectral else shown.tokens
    return _nothing(run, at, left.reason)._replace(
        value=left.value,
        low=left.low,
        high=left.high,
        relative=left.value / min(basis.tokens),
        extrapolated=found.extrapolated,
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


def shown_by(run: Run, own: ReferenceNumbers, until: float) -> Shown:
    """What a run, of which these are the numbers, had shown up to some tokens."""
    tokens = _last_loss(run, until)
    latest = own.latest(until)
    spectral = {name: Seen(there, float(own.spectral(name, there))) for name, there in latest.items()}
    shown = Shown(tokens, float(own.log_gap(tokens)), log_batch(run), float(own.log_curve(tokens)), spectral)
    reported = latest.get("alpha_tail", nan)
    return shown.late_enough(float(np.interp(reported, run.history.tokens, run.history.step)))


def _last_loss(run: Run, until: float) -> float:
    """Tokens at the last loss up to some tokens; NaN without one."""
    at = run.history.tokens[run.history.with_loss()[0]]
    return float(max((there for there in at if 0 < there <= until), default=nan))
