r"""From what reference runs showed early to the tokens a run will need, and how far such a forecast is to be trusted.

Every number is drawn from a handful of runs, so each comes with what a handful can say of it: a forecast with the
prediction interval of its line, a rank correlation with a bootstrap interval or a p-value, and the error of forecasting
each reference from the others. Nothing here knows of spectra: log batch size or an early loss goes wherever ``alpha``
does, which is how the tail is compared with predictors that need no spectrum.
"""

import math
from typing import NamedTuple

import torch
from scipy.special import stdtrit
from torch import Tensor

from lightning_spectral.functional.arguments import check_number
from lightning_spectral.functional.rank_correlation import check_level, check_pair, p_value, spearman

MIN_REFERENCES = 4
"""Fewest runs, or points of a loss curve, that give a number: what fits three leaves one residual at best, and a t
interval on it spans orders of magnitude."""

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


class Skill(NamedTuple):
    """How well each reference is forecast from the others."""

    rank_correlation: float
    """Spearman's rho of forecasts and truths, both relative to the others' mean: 1 is best, about 0 is no skill."""
    p_value: float
    """Two-sided, of alpha and tokens being unrelated."""
    median_error: float
    """Median of ``|forecast / truth - 1|``."""
    predictions: Tensor
    """``(n,)`` forecasts in tokens, in the order given; NaN for a run without one."""


def forecast_tokens(alpha: Tensor, tokens: Tensor, at: float, level: float = 0.8) -> Forecast:
    r"""Tokens to a target at one exponent, by the line of ln tokens on alpha through n reference runs.

    Ordinary least squares with the prediction interval of a new run, t the quantile at (1 + level)/2 for n - 2 degrees
    of freedom and s the residual standard error:
    :math:`\hat y \pm t s \sqrt{1 + 1/n + (\alpha - \bar\alpha)^2 / S_{\alpha\alpha}}`, then exponentiated.

    Args:
        alpha: ``(n,)`` early exponents of the references, all at one number of tokens.
        tokens: ``(n,)`` tokens each took to the target, positive.
        at: The exponent of the run to forecast, at that same number of tokens.
        level: Share of new runs within the interval.

    Returns:
        The forecast. References with a number that is not finite are dropped first. NaN where fewer than four are
        left, where all their exponents are equal, and where ``at`` is not finite.

    Raises:
        ValueError: If alpha and tokens are not two vectors of one length, tokens are not positive, ``at`` is no number,
            or the level is not between 0 and 1.

    References:
        Draper, Smith, *Applied Regression Analysis*, section 3.1 (1998).

    Example:
        >>> import torch
        >>> alpha, noise = torch.tensor([1.0, 1.1, 1.2, 1.3, 1.4]), torch.tensor([0.02, -0.03, 0.0, 0.03, -0.02])
        >>> forecast = forecast_tokens(alpha, torch.exp(14 + 2 * alpha + noise), at=1.25)
        >>> [round(tokens / 1e6, 2) for tokens in forecast]  # the law gives exp(16.5), 14.65 million
        [14.64, 13.88, 15.43]
    """
    check_level(level)
    check_number(at=at)
    at = float(at)
    _check_references(alpha, tokens)
    alpha, logs = alpha.detach().to("cpu", torch.float64), tokens.detach().to("cpu", torch.float64).log()
    known = alpha.isfinite() & logs.isfinite()
    alpha, logs = alpha[known], logs[known]
    line = _line(alpha, logs)
    num_runs = len(alpha)
    if num_runs < MIN_REFERENCES or line is None or not math.isfinite(at):
        return Forecast(math.nan, math.nan, math.nan)
    degrees = num_runs - 2
    residual = (logs - line.at(alpha)).square().sum() / degrees
    leverage = 1 + 1 / num_runs + (at - line.mean).square() / line.square_sum
    reach = float(stdtrit(degrees, (1 + level) / 2)) * (residual * leverage).sqrt()
    centre = line.at(torch.tensor(at, dtype=torch.float64))
    return Forecast(float(centre.exp()), float((centre - reach).exp()), float((centre + reach).exp()))


def backtest(alpha: Tensor, tokens: Tensor) -> Skill:
    r"""Forecast each reference from the others, and compare with what it took.

    *Rank correlation.* The mean of the others is low when the run left out is high, so forecasts of a family without
    any relation go against the truth: by a line the correlation averages -0.35 to -0.4 for 4 to 30 runs, by the mean
    alone it is -1. Forecast and truth are therefore both taken relative to the others' mean of ln tokens. Without
    relation, given alpha, the two have covariance zero exactly: slope and mean of a line are uncorrelated, and the run
    left out is independent of both. What remains is a skew, since a slope near zero ranks the more haphazardly:
    for normal errors and 8 to 30 runs the median is within 0.1 of zero and the mean near -0.1, with a standard
    deviation of 0.5 for 8 runs, 0.4 for 12; for 5 runs the median is -0.2 and the standard deviation 0.6.

    *p-value.* With so wide and skew a scatter, the correlation of forecasts is no test. The p-value is that of
    Spearman's rho of alpha and tokens themselves, two-sided, since forecasts do not care for the sign: by all
    permutations up to eight runs, ties and all, by :math:`t = r \sqrt{(n - 2)/(1 - r^2)}` beyond. Both hold whatever
    the distributions, for runs that are exchangeable. Seeds of one batch size are alike in alpha and in tokens, so that
    they count for fewer runs than they are: :func:`partial_spearman` given log batch size asks what is left.

    Args:
        alpha: ``(n,)`` early exponents, all at one number of tokens; any other early number does as well.
        tokens: ``(n,)`` tokens each run took to the target, positive.

    Returns:
        The skill. Runs with a number that is not finite are dropped first, and have no forecast; nor has a run whose
        others all have one exponent. NaN where fewer than four runs are left. Of four, each is forecast by the line
        through three.

    Raises:
        ValueError: If alpha and tokens are not two vectors of one length, or tokens are not positive.

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
    _check_references(alpha, tokens)
    alpha, logs = alpha.detach().to("cpu", torch.float64), tokens.detach().to("cpu", torch.float64).log()
    known = alpha.isfinite() & logs.isfinite()
    predicted, others = torch.full_like(logs, math.nan), torch.full_like(logs, math.nan)
    if int(known.sum()) < MIN_REFERENCES:
        return Skill(math.nan, math.nan, math.nan, predicted)
    for run in known.nonzero().flatten().tolist():
        rest = known.clone()
        rest[run] = False
        others[run] = logs[rest].mean()
        line = _line(alpha[rest], logs[rest])
        if line is not None:
            predicted[run] = line.at(alpha[run])
    errors = (predicted - logs).expm1().abs()
    return Skill(
        spearman(predicted - others, torch.where(known, logs - others, torch.nan)),
        p_value(alpha[known], logs[known]),
        float(errors.nanquantile(0.5)),
        predicted.exp(),
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
    check_pair(tokens=tokens, losses=losses)
    _check_positive(tokens)
    check_number(target=target)
    target = float(target)
    tokens, losses = tokens.detach().to("cpu", torch.float64), losses.detach().to("cpu", torch.float64)
    known = tokens.isfinite() & losses.isfinite()
    log_tokens, losses = tokens[known].log(), losses[known]
    if len(log_tokens.unique()) < MIN_REFERENCES or not math.isfinite(target):
        return math.nan
    # In units of the first, so that t^-b lies between zero and one whatever the tokens and b.
    origin = log_tokens.min()
    b, a, c = _fit_curve(log_tokens - origin, losses)
    drop = target - c
    if drop <= 0:
        return math.inf
    return float((origin - (drop / a).log() / b).exp()) if a > 0 else math.nan


class _Line(NamedTuple):
    """A least-squares line about the mean of its points."""

    mean: Tensor
    square_sum: Tensor
    intercept: Tensor
    slope: Tensor

    def at(self, alpha: Tensor) -> Tensor:
        return self.intercept + self.slope * (alpha - self.mean)


def _line(alpha: Tensor, logs: Tensor) -> _Line | None:
    # Compared, not subtracted: equal numbers may leave rounding about their mean.
    if len(alpha) == 0 or bool(alpha.min() == alpha.max()):
        return None
    mean, intercept = alpha.mean(), logs.mean()
    centred = alpha - mean
    square_sum = centred @ centred
    return _Line(mean, square_sum, intercept, centred @ (logs - intercept) / square_sum)


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


def _check_references(alpha: Tensor, tokens: Tensor) -> None:
    check_pair(alpha=alpha, tokens=tokens)
    _check_positive(tokens)


def _check_positive(tokens: Tensor) -> None:
    if bool((tokens <= 0).any()):
        raise ValueError(f"tokens must be positive, got {float(tokens.min())}: leave such runs or points out")
