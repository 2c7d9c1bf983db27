r"""From what reference runs showed early to the tokens a run will need, and how far such a forecast is to be trusted.

Every number is drawn from a handful of runs, so each comes with what a handful can say of it: a forecast with the
prediction interval of its line, a rank correlation with a bootstrap interval or a p-value, and the error of forecasting
each reference from the others. Nothing here knows of spectra: log batch size or an early loss goes wherever ``alpha``
does, which is how the tail is compared with predictors that need no spectrum.

*Settings count, not runs.* Seeds of one batch size, learning rate and model are alike in alpha and in tokens: they say
how seeds scatter, and no more than one of them would about what another setting takes.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_spectral.functional.arguments import check_number
from lightning_spectral.functional.line import FARTHEST, fit_line, setting_means
from lightning_spectral.functional.rank_correlation import check_level, check_pair, p_value, spearman

NO_SKILL = 0.1
"""Above this p-value references forecast each other no better than runs without any relation do."""

MIN_REFERENCES = 4
"""Fewest runs, or points of a loss curve, that give a number: what fits three leaves one residual at best, and a t
interval on it spans orders of magnitude."""

MIN_SETTINGS = 3
"""Fewest settings among them: a line through two has no residual that is not of seeds."""

_EXPONENTS = (1e-3, 10.0)
"""Bounds on b of a loss curve: a straight line in ln t at one end, a drop after the first point at the other."""


class Forecast(NamedTuple):
    """Tokens a run will need to reach a loss."""

    value: float
    """The line at the run's exponent: the median of the tokens, not their mean."""
    low: float
    """Lower end of the prediction interval."""
    high: float
    """Upper end; infinite where it is beyond the floating-point range."""
    extrapolated: bool = False
    """Whether the run lies beyond its references."""
    reason: str | None = None
    """Why there is no number, where there is none."""


class Skill(NamedTuple):
    """How well each reference is forecast from those of other settings."""

    rank_correlation: float
    """Spearman's rho, over settings, of forecasts and truths, both relative to the others' mean: 1 is best, about 0 is
    no skill."""
    p_value: float
    """Two-sided, of alpha and tokens being unrelated."""
    median_error: float
    """Median over settings of the mean ``|forecast / truth - 1|`` of their runs."""
    predictions: Tensor
    """``(n,)`` forecasts in tokens, in the order given; NaN for a run without one."""


def forecast_tokens(
    alpha: Tensor, tokens: Tensor, at: float, level: float = 0.8, settings: Tensor | None = None
) -> Forecast:
    r"""Tokens to a target at one exponent, by the line of ln tokens on alpha through n reference runs.

    Least squares with the prediction interval of a new run, t the quantile at (1 + level)/2 for n - 2 degrees of
    freedom and s the residual standard error:
    :math:`\hat y \pm t s \sqrt{1 + 1/n + (\alpha - \bar\alpha)^2 / S_{\alpha\alpha}}`, then exponentiated. Where
    there are several runs of one setting they share its weight, and n is the number of settings.

    The sign of the line is as found. That of a tail depends on how far the target lies: with the trace held a flatter
    tail reaches far targets sooner and near ones later (:func:`lightning_spectral.theory.crossover_rank`).

    *Beyond the references* nothing has been seen, and the interval also holds the curvature that they do not exclude:
    to its squared error comes :math:`(\hat c^2 + s^2 / Q)\, q(\alpha)^2`, q the parabola that is orthogonal to the line
    at the references, Q its sum of squares over them and :math:`\hat c` its coefficient. Past half their range beyond
    them there is no number. 80% intervals held 83 to 97% of new runs there, of laws without curvature and with one by
    which the slope changes threefold, of noisy predictors, and of 4 to 30 references; those of the line alone 2 to 81%
    (``python -m benchmarks.findings.promises --only forecasts``).

    Args:
        alpha: ``(n,)`` early exponents of the references, all at one number of tokens.
        tokens: ``(n,)`` tokens each took to the target, positive.
        at: The exponent of the run to forecast, at that same number of tokens.
        level: Share of new runs within the interval.
        settings: ``(n,)`` numbers that are equal for runs that differ by their seeds alone; None where each run is a
            setting of its own.

    Returns:
        The forecast. References with a number that is not finite are dropped first. NaN, with the reason, where fewer
        than four are left, or fewer than three settings, where all their exponents are equal, where ``at`` is not
        finite or lies too far beyond them.

    Raises:
        ValueError: If alpha, tokens and settings are not vectors of one length, tokens are not positive, ``at`` is no
            number, or the level is not between 0 and 1.

    References:
        Draper, Smith, *Applied Regression Analysis*, section 3.1 (1998).

    Example:
        >>> import torch
        >>> alpha, noise = torch.tensor([1.0, 1.1, 1.2, 1.3, 1.4]), torch.tensor([0.02, -0.03, 0.0, 0.03, -0.02])
        >>> forecast = forecast_tokens(alpha, torch.exp(14 + 2 * alpha + noise), at=1.25)
        >>> [round(tokens / 1e6, 2) for tokens in forecast[:3]]  # the law gives exp(16.5), 14.65 million
        [14.64, 13.88, 15.43]
        >>> forecast_tokens(alpha, torch.exp(14 + 2 * alpha + noise), at=2.0).reason
        'it lies beyond its references by 1.50 times their range, and half of it is the most'
    """
    check_level(level)
    check_number(at=at)
    at = float(at)
    alpha, logs, settings, _ = _known(alpha, tokens, settings)
    line = fit_line(alpha, logs, settings)
    reason = None
    if len(alpha) < MIN_REFERENCES:
        reason = f"it needs {MIN_REFERENCES} references and has {len(alpha)}"
    elif line is None:
        reason = "all its references have one exponent"
    elif line.num_settings < MIN_SETTINGS:
        reason = f"its references are of {line.num_settings} settings, and seeds of {MIN_SETTINGS} are the fewest"
    elif not math.isfinite(at):
        reason = "its own exponent is not known"
    elif line.beyond(at) > FARTHEST:
        reason = f"it lies beyond its references by {line.beyond(at):.2f} times their range, and half of it is the most"
    if line is None or reason is not None:
        is_beyond = line is not None and math.isfinite(at) and line.beyond(at) > 0
        return Forecast(math.nan, math.nan, math.nan, is_beyond, reason)
    reach = line.reach(at, level)
    centre = line.at(torch.tensor(at, dtype=torch.float64))
    low, high = float((centre - reach).exp()), float((centre + reach).exp())
    return Forecast(float(centre.exp()), low, high, extrapolated=line.beyond(at) > 0)


def backtest(alpha: Tensor, tokens: Tensor, settings: Tensor | None = None) -> Skill:
    r"""Forecast each reference from those of other settings, and compare with what it took.

    *Rank correlation.* The mean of the others is low when the run left out is high, so forecasts of a family without
    any relation go against the truth: by a line the correlation averages -0.35 to -0.4 for 4 to 30 runs, by the mean
    alone it is -1. Forecast and truth are therefore both taken relative to the others' mean of ln tokens. Without
    relation, given alpha, the two have covariance zero exactly: slope and mean of a line are uncorrelated, and the run
    left out is independent of both. What remains is a skew, since a slope near zero ranks the more haphazardly:
    for normal errors and 8 to 30 runs the median is within 0.1 of zero and the mean near -0.1, with a standard
    deviation of 0.5 for 8 runs, 0.4 for 12; for 5 runs the median is -0.2 and the standard deviation 0.6.

    *p-value.* With so wide and skew a scatter, the correlation of forecasts is no test. The p-value is that of
    Spearman's rho of alpha and tokens themselves, two-sided, since forecasts do not care for the sign: by all
    permutations up to eight, ties and all, by :math:`t = r \sqrt{(n - 2)/(1 - r^2)}` beyond. Both hold whatever the
    distributions, for what is exchangeable. Seeds of one setting are not, which are alike in both: with ``settings``,
    means over seeds take the place of runs throughout.

    Args:
        alpha: ``(n,)`` early exponents, all at one number of tokens; any other early number does as well.
        tokens: ``(n,)`` tokens each run took to the target, positive.
        settings: As for :func:`forecast_tokens`.

    Returns:
        The skill. Runs with a number that is not finite are dropped first, and have no forecast; nor has a run whose
        others all have one exponent. NaN where fewer than four runs are left; of fewer than four settings there are
        forecasts and errors, but neither correlation nor p-value. Of four, each is forecast by the line through three.

    Raises:
        ValueError: If alpha, tokens and settings are not vectors of one length, or tokens are not positive.

    References:
        Poldrack, Huckins, Varoquaux, *Establishment of best practices for evidence for prediction* (2020), on what
        leave-one-out does to correlations.

    Example:
        >>> import torch
        >>> alpha = torch.tensor([1.0, 1.1, 1.2, 1.3, 1.4, 1.5])
        >>> skill = backtest(alpha, torch.exp(14 + 2 * alpha))
        >>> round(skill.rank_correlation, 3), round(skill.p_value, 4), round(skill.median_error, 4)
        (1.0, 0.0028, 0.0)
    """
    alpha, logs, settings, known = _known(alpha, tokens, settings)
    predictions = torch.full((len(known),), math.nan, dtype=torch.float64)
    if len(alpha) < MIN_REFERENCES:
        return Skill(math.nan, math.nan, math.nan, predictions)
    groups = torch.arange(len(alpha)) if settings is None else settings
    predicted, others = torch.full_like(logs, math.nan), torch.full_like(logs, math.nan)
    for group in groups.unique():
        rest = groups != group
        others[~rest] = setting_means(logs[rest], groups[rest]).mean()
        line = fit_line(alpha[rest], logs[rest], groups[rest])
        if line is not None:
            predicted[~rest] = line.at(alpha[~rest])
    predictions[known] = predicted.exp()
    errors = (predicted - logs).expm1().abs()
    return Skill(
        spearman(setting_means(predicted - others, settings), setting_means(logs - others, settings)),
        p_value(setting_means(alpha, settings), setting_means(logs, settings)),
        float(setting_means(errors, settings).nanquantile(0.5)),
        predictions,
    )


def extrapolate_loss(tokens: Tensor, losses: Tensor, target: float) -> float:
    r"""Tokens at which a loss curve, continued, reaches a target: the baseline that needs no reference run.

    Least squares of :math:`L(t) = a t^{-b} + c` with :math:`a, b > 0` and :math:`c \ge 0`. For given b the best a and c
    are those of a straight line, so only b is searched for, between 0.001 and 10: on a grid, refined about its best
    point. No starting value is needed, and none can be wrong.

    Args:
        tokens: ``(m,)`` where the losses were measured, positive, in any order.
        losses: ``(m,)`` the curve so far; it sees no more than it is given.
        target: The loss to reach.

    Returns:
        Where the *fitted curve* crosses the target, even if that is among the points given or before them: a crossing
        already observed is better read off the losses. Points that are not finite are dropped first. Infinite where the
        fit never gets there; NaN for fewer than four different numbers of tokens, a target that is not finite, and a
        fit that does not fall and lies below the target.

    Raises:
        ValueError: If tokens and losses are not two vectors of one length, or tokens are not positive.

    References:
        Golub, Pereyra, *Separable nonlinear least squares: the variable projection method and its applications*
        (2003).

    Example:
        >>> import torch
        >>> tokens = torch.arange(1, 11) * 1e5
        >>> round(extrapolate_loss(tokens, 40 * tokens**-0.3 + 1.5, target=2.0) / 1e6, 3)  # (0.5 / 40)^(-1 / 0.3)
        2.206
    """
    tokens, losses, target = _curve(tokens, losses, target)
    log_tokens = tokens.log()
    if len(log_tokens.unique()) < MIN_REFERENCES or not math.isfinite(target):
        return math.nan
    # In units of the first, so that t^-b lies between zero and one whatever the tokens and b.
    origin = log_tokens.min()
    b, a, c = _fit_curve(log_tokens - origin, losses)
    drop = target - c
    if drop <= 0:
        return math.inf
    return float((origin - (drop / a).log() / b).exp()) if a > 0 else math.nan


def anchored_power_law(tokens: Tensor, losses: Tensor, target: float) -> float:
    r"""Tokens to a target by a power law that a loss curve ends in: the baseline of two points.

    :math:`\ln L = \ln L_t - b (\ln \tau - \ln t)`, the least-squares line through the last point t for the points from
    a quarter of t on. It knows of no floor of the loss and errs accordingly; :func:`stack` takes off what it errs by
    in the mean of the references, and asks no more of it than to tell runs apart.

    Args:
        tokens: ``(m,)`` where the losses were measured, positive, in any order.
        losses: ``(m,)`` the curve so far.
        target: The loss to reach.

    Returns:
        Tokens. Points that are not finite, or not positive, are dropped first. NaN for fewer than two, for a curve
        that does not fall, and where the last loss is not above a positive target.

    Raises:
        ValueError: If tokens and losses are not two vectors of one length, or tokens are not positive.

    Example:
        >>> import torch
        >>> tokens = torch.tensor([1e5, 2e5, 4e5])
        >>> round(anchored_power_law(tokens, 100 * tokens**-0.25, target=2.0) / 1e6, 2)  # (2 / 100)^(-1 / 0.25)
        6.25
    """
    tokens, losses, target = _curve(tokens, losses, target)
    tokens, losses = tokens[losses > 0], losses[losses > 0]
    if len(tokens) < 2 or not 0 < target < math.inf:
        return math.nan
    last = tokens.argmax()
    recent = tokens >= tokens[last] / 4
    along, fall = (tokens[last] / tokens[recent]).log(), (losses[recent] / losses[last]).log()
    left, slope = float((losses[last] / target).log()), float(along @ fall / (along @ along))
    return float((tokens[last].log() + left / slope).exp()) if slope > 0 and left > 0 else math.nan


def _curve(tokens: Tensor, losses: Tensor, target: float) -> tuple[Tensor, Tensor, float]:
    """Those points of a loss curve that are finite, in float64, and the target; ValueError for what is none."""
    check_pair(tokens=tokens, losses=losses)
    check_positive(tokens)
    check_number(target=target)
    tokens, losses = tokens.detach().to("cpu", torch.float64), losses.detach().to("cpu", torch.float64)
    known = tokens.isfinite() & losses.isfinite()
    return tokens[known], losses[known], float(target)


def _fit_curve(log_tokens: Tensor, losses: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The best b, a and c."""
    low, high = (math.log(bound) for bound in _EXPONENTS)
    for _ in range(12):  # each narrows b 32 times: to rounding
        exponents = torch.linspace(low, high, 65, dtype=torch.float64).exp()
        errors, a, c = _fit_given_exponents(exponents, log_tokens, losses)
        best = int(errors.argmin())
        low, high = (float(exponents[max(0, min(64, best + step))].log()) for step in (-1, 1))
    return exponents[best], a[best], c[best]


def _fit_given_exponents(exponents: Tensor, log_tokens: Tensor, losses: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Sum of squares, a and c for each b."""
    powers = (-exponents[:, None] * log_tokens).exp()
    centred = powers - powers.mean(-1, keepdim=True)
    # About the first loss, so that equal ones leave exact zeros.
    beyond_first = losses - losses[0]
    # A curve that rises is best fitted by none at all.
    a = (centred @ beyond_first / centred.square().sum(-1)).clamp(min=0)
    c = losses[0] + beyond_first.mean() - a * powers.mean(-1)
    # Convex for given b, so that where the floor would be negative the best is at zero.
    a = torch.where(c < 0, (powers @ losses / powers.square().sum(-1)).clamp(min=0), a)
    c = c.clamp(min=0)
    return (losses - a[:, None] * powers - c[:, None]).square().sum(-1), a, c


def _known(alpha: Tensor, tokens: Tensor, settings: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
    """Exponents, ln tokens and settings of the references whose numbers are finite, and which those are."""
    vectors = {"alpha": alpha, "tokens": tokens}
    check_pair(**vectors if settings is None else vectors | {"settings": settings})
    check_positive(tokens)
    alpha, logs = alpha.detach().to("cpu", torch.float64), tokens.detach().to("cpu", torch.float64).log()
    known = alpha.isfinite() & logs.isfinite()
    return alpha[known], logs[known], None if settings is None else settings.to("cpu")[known], known


def check_positive(tokens: Tensor) -> None:
    """Refuse numbers of tokens that have no logarithm.

    Args:
        tokens: ``(n,)``.

    Raises:
        ValueError: Naming the least.
    """
    if bool((tokens <= 0).any()):
        raise ValueError(f"tokens must be positive, got {float(tokens.min())}: leave such runs or points out")
