r"""A stack of simple predictors from what runs showed early to the tokens they need, and what spectra add to it.

No one law holds for every family and at every stage. A few plausible ones are therefore fitted side by side, and each
weighs as well as it forecasts references of settings it has not seen. The same is done with spectral numbers and
without, which tells what they are worth.
"""

import itertools
import math
from typing import Any, NamedTuple

import torch
from scipy.special import stdtr, stdtrit
from torch import Tensor

from lightning_spectral.functional.early import PREDICTORS, Early, known_of
from lightning_spectral.functional.forecast import MIN_REFERENCES, MIN_SETTINGS, backtest, forecast_tokens
from lightning_spectral.functional.line import setting_means
from lightning_spectral.functional.nested_stack import fit_stack
from lightning_spectral.functional.rank_correlation import check_level, spearman

_MAX_FLIPPED = 12
"""Most settings of which all signs are flipped for a p-value, 4,096 times; beyond, Student's t is as good."""


class StackedForecast(NamedTuple):
    """Tokens a run will need to reach a loss, and how far its references let that be trusted."""

    value: float
    """The median of the tokens; NaN where there is no forecast."""
    low: float
    """Lower end of the prediction interval."""
    high: float
    """Upper end; infinite where it is beyond the floating-point range."""
    extrapolated: bool
    """Whether the run lies beyond its references in a number that the stack goes by."""
    reason: str | None
    """Why there is no forecast, where there is none."""
    weights: dict[str, float]
    """By predictor, summing to one; empty where nothing was fitted."""
    uses_spectra: bool
    """Whether forecast and errors are those of the stack with spectral numbers."""
    num_references: int
    """Runs that it rests on."""
    num_settings: int
    """Settings among them."""
    skill: float
    """Spearman's rho, over settings, of forecasts from the others with the truth, both relative to the others' mean."""
    p_value: float
    """One-sided, of these forecasts being no better than the others' mean."""
    median_error: float
    """Median over settings of the mean ``|forecast / truth - 1|`` of their runs, forecast from other settings."""
    mean_log_error: float
    """Mean over settings of that of ``|ln(forecast / truth)|``, in which large errors show."""
    spectral_gain: float
    """What spectral numbers take off the error: 1 - sum |e with| / sum |e without|, e of ln tokens and nested; NaN
    without them."""
    spectral_gain_low: float
    """Lower end of its interval."""
    spectral_gain_high: float
    """Upper end."""
    predictions: Tensor
    """``(n,)`` forecasts of the references, each from those of other settings; NaN for a run without one."""
    lows: Tensor
    """``(n,)`` lower ends of their intervals."""
    highs: Tensor
    """``(n,)`` upper ends."""


class Gain(NamedTuple):
    """What one set of forecasts takes off the errors of another."""

    value: float
    """1 - sum |e with| / sum |e without|, over settings."""
    stderr: float
    """Of a jackknife over settings."""
    low: float
    """Lower end of its interval."""
    high: float
    """Upper end."""


def stack(
    references: Early,
    tokens: Tensor,
    query: Early | None = None,
    settings: Tensor | None = None,
    level: float = 0.8,
    predictors: tuple[str, ...] = tuple(PREDICTORS),
) -> StackedForecast:
    r"""Forecast a run from its references, and each reference from those of other settings.

    With y = ln tokens, g the log gap and b the log batch, n settings, and each run weighing one over the runs of its
    setting, predictors are: the mean; a line in g; the batch law :math:`a + \ln(1 + B / B^*)`; a run's own loss curve,
    less what it errs by on average; from n = 6 on the batch law with a slope on g; from n = 8 a Gaussian process on
    (g, b); from n = 10 a plane in (g, b, b²). Slopes have a ridge of 0.1 on standardised features.

    Each is fitted without each setting in turn. With :math:`M_k` the mean squared error that this shows, predictors
    weigh :math:`(M_k / \min M)^{-n/2}`, the likelihood of their residuals. The interval is :math:`\pm t_{n-1}\, s`, s
    from the residuals of the weighted mean. Beyond the references in g or b it also holds the curvature that they leave
    open, as in :func:`forecast_tokens`, and what the Gaussian process does; past half their range there is no number.

    *With spectra* every predictor that goes by g also goes by the spectral numbers. How well a stack does is told by
    nested forecasts: of each setting by a stack that was fitted, and weighed, on the others alone. The stack with
    spectra is used where its gain is larger than its standard error, and errors are then its own.

    Args:
        references: What finished runs showed, all at one number of tokens.
        tokens: ``(n,)`` tokens each took to the target, positive.
        query: What the run to forecast showed at that number of tokens, vectors of one; None where only the references
            are to be forecast from each other.
        settings: ``(n,)`` numbers that are equal for runs that differ by their seeds alone; None where each run is a
            setting of its own.
        level: Share of new runs within the intervals.
        predictors: Names from :data:`PREDICTORS`.

    Returns:
        The forecast. Of g and b, what the query or all but three references lack is done without, and so are the
        predictors that need it; then references that lack one of the rest are left out. A loss curve or a spectral
        number is used only if known of the query and of all references that are left. NaN, with the reason, for fewer
        than four references or three settings, and for a query too far beyond them; errors, skill and gain are NaN for
        fewer than four settings.

    Raises:
        ValueError: If vectors are not of one length, tokens not positive, predictors not known, or the level is not
            between 0 and 1.

    References:
        Wolpert, *Stacked generalization* (1992). The constants were fixed on 40 runs, of 18 settings, of one small GPT.

    Example:
        >>> import torch
        >>> batch = torch.tensor([4.0, 8.0, 16.0, 32.0, 64.0, 128.0])
        >>> noise = torch.tensor([0.1, -0.1, -0.1, 0.1, 0.1, -0.1])
        >>> references = Early(log_gap=noise.roll(2), log_batch=batch.log())
        >>> query = Early(log_gap=torch.zeros(1), log_batch=torch.tensor([48.0]).log())
        >>> forecast = stack(references, 1e6 * (1 + batch / 20) * noise.exp(), query)  # the law gives 3.4 million
        >>> [round(number / 1e6, 1) for number in forecast[:3]], max(forecast.weights, key=forecast.weights.get)
        ([3.4, 2.6, 4.4], 'batch law')
    """
    check_level(level)
    known = known_of(references, tokens, query, settings, predictors)
    num_references, num_settings = len(known.y), len(known.settings.unique())
    nothing = torch.full((len(tokens),), math.nan, dtype=torch.float64)
    result = StackedForecast(
        *(math.nan, math.nan, math.nan, False, None, {}, False, num_references, num_settings),
        *(math.nan,) * 7,
        *(nothing, nothing, nothing),
    )
    if num_references < MIN_REFERENCES:
        return result._replace(reason=f"it needs {MIN_REFERENCES} references and has {num_references}")
    if num_settings < MIN_SETTINGS:
        few = f"its references are of {num_settings} settings, and seeds of {MIN_SETTINGS} are the fewest"
        return result._replace(reason=few)
    if not known.names:
        return result._replace(reason="neither its loss nor its batch is known, or not those of its references")
    used, gain = fit_stack(known, with_spectra=False), Gain(*(math.nan,) * 4)
    values, reaches, beyond = used.forecasts(level)
    if known.spectral is not None:
        other = fit_stack(known, with_spectra=True)
        found = other.forecasts(level)
        gain = spectral_gain(found[0][1:] - known.y, values[1:] - known.y, known.settings, level)
        if gain.value > gain.stderr:
            used, (values, reaches, beyond) = other, found
    logs = (values, values - reaches, values + reaches)
    value, low, high = (float(log[0].exp()) for log in logs)
    predictions, lows, highs = (nothing.index_put((known.kept,), log[1:].exp()) for log in logs)
    skill: dict[str, Any] = _skill(values[1:], known.y, known.settings)
    reason = None
    if query is None:
        value = low = high = math.nan
        reason = "there is no run to forecast"
    elif math.isnan(value):
        reason = f"it lies beyond its references by {beyond[0]:.2f} times their range, and half of it is the most"
    return result._replace(
        value=value,
        low=low,
        high=high,
        extrapolated=query is not None and beyond[0] > 0,
        reason=reason,
        weights=dict(zip(used.names, used.weights[:, 0].tolist(), strict=True)),
        uses_spectra=used.has_spectra,
        spectral_gain=gain.value,
        spectral_gain_low=gain.low,
        spectral_gain_high=gain.high,
        predictions=predictions,
        lows=lows,
        highs=highs,
        **skill,
    )


def forecast_by_line(
    x: Tensor, tokens: Tensor, at: float, settings: Tensor | None = None, level: float = 0.8
) -> StackedForecast:
    """The same by one number alone: :func:`forecast_tokens` and :func:`backtest` in one.

    Args:
        x: ``(n,)`` the number of the references.
        tokens: ``(n,)`` they took to the target.
        at: That of the run to forecast.
        settings: ``(n,)``, as for :func:`stack`.
        level: Share of new runs within the interval.

    Returns:
        The forecast, without intervals of the references.

    Raises:
        ValueError: As :func:`forecast_tokens`.
    """
    found = forecast_tokens(x, tokens, at, level, settings)
    skill = backtest(x, tokens, settings)
    known = x.isfinite()
    groups = torch.arange(len(x)) if settings is None else settings
    errors = (skill.predictions / tokens).log().abs()[known]
    nothing = torch.full((len(tokens),), math.nan, dtype=torch.float64)
    return StackedForecast(
        value=found.value,
        low=found.low,
        high=found.high,
        extrapolated=found.extrapolated,
        reason=found.reason,
        weights={},
        uses_spectra=False,
        num_references=int(known.sum()),
        num_settings=len(groups[known].unique()),
        skill=skill.rank_correlation,
        p_value=skill.p_value,
        median_error=skill.median_error,
        mean_log_error=float(setting_means(errors, groups[known]).nanmean()) if len(errors) else math.nan,
        spectral_gain=math.nan,
        spectral_gain_low=math.nan,
        spectral_gain_high=math.nan,
        predictions=skill.predictions,
        lows=nothing,
        highs=nothing,
    )


def spectral_gain(errors: Tensor, others: Tensor, settings: Tensor, level: float = 0.8) -> Gain:
    """What some forecasts take off the errors of others.

    Args:
        errors: ``(n,)`` of ln tokens; NaN without a forecast.
        others: ``(n,)`` those that they are compared with.
        settings: ``(n,)`` numbers that are equal for runs of one setting.
        level: Of the interval.

    Returns:
        The gain, of runs that have both forecasts; NaN for fewer than four settings of such runs.
    """
    both = errors.isfinite() & others.isfinite()
    with_it, without = (setting_means(each[both].abs(), settings[both]) for each in (errors, others))
    num = len(without)
    if num < MIN_REFERENCES or not float(without.sum()) > 0:
        return Gain(*(math.nan,) * 4)
    gain = float(1 - with_it.sum() / without.sum())
    left_out = 1 - (with_it.sum() - with_it) / (without.sum() - without)
    stderr = float(((num - 1) / num * (left_out - left_out.mean()).square().sum()).sqrt())
    reach = float(stdtrit(num - 1, (1 + level) / 2)) * stderr
    return Gain(gain, stderr, gain - reach, gain + reach)


def _skill(predicted: Tensor, y: Tensor, settings: Tensor) -> dict[str, float]:
    """Of nested forecasts of ln tokens."""
    known = predicted.isfinite()
    predicted, y, settings = predicted[known], y[known], settings[known]
    if len(settings.unique()) < MIN_REFERENCES:
        return {}
    means = setting_means(y, settings)
    of_run = settings.unique(return_inverse=True)[1]
    others = ((means.sum() - means) / (len(means) - 1))[of_run]
    errors = predicted - y
    return {
        "skill": spearman(setting_means(predicted - others, settings), setting_means(y - others, settings)),
        "p_value": _p_value(setting_means((y - others).abs() - errors.abs(), settings)),
        "median_error": float(setting_means(errors.expm1().abs(), settings).quantile(0.5)),
        "mean_log_error": float(setting_means(errors.abs(), settings).mean()),
    }


def _p_value(gains: Tensor) -> float:
    """One-sided, of numbers that are as often negative being so large: by all flips of signs, or Student's t."""
    num, total = len(gains), float(gains.sum())
    if num <= _MAX_FLIPPED:
        signs = torch.tensor(list(itertools.product((1.0, -1.0), repeat=num)), dtype=torch.float64)
        return float((signs @ gains >= total - 1e-12 * float(gains.abs().sum())).double().mean())
    deviation = float(gains.std())
    if deviation == 0:
        return 0.0 if total > 0 else 1.0
    return float(stdtr(num - 1, -total / math.sqrt(num) / deviation))
