"""A least-squares line in which settings count and not runs, and what curvature beyond its points it cannot exclude."""

import math
from typing import NamedTuple

import torch
from scipy.special import stdtrit
from torch import Tensor

FARTHEST = 0.5
"""How far beyond its points, in shares of their range, a line says anything: there the interval that curvature leaves
open is two to four times as wide as inside, and farther out it grows with the square."""


class Line(NamedTuple):
    """A weighted least-squares line about the weighted mean of its points, and the parabola that it leaves out."""

    mean: Tensor
    square_sum: Tensor
    """Weighted, of x about its mean."""
    intercept: Tensor
    """At the mean."""
    slope: Tensor
    num_settings: int
    """The sum of the weights."""
    squared_error: Tensor
    """Weighted residual sum of squares over ``num_settings`` - 2: the variance of a new run; NaN for two settings."""
    low: float
    """The least x."""
    high: float
    second: Tensor
    """Weighted mean of the squares of x about its mean, and"""
    third: Tensor
    """their slope on x: what makes the parabola orthogonal to the line."""
    parabola_square_sum: Tensor
    """Weighted, of the parabola at the points; zero where x has but two values."""
    curvature: Tensor
    """Least-squares coefficient of the parabola."""

    def at(self, x: Tensor) -> Tensor:
        """The line at points of any shape."""
        return self.intercept + self.slope * (x - self.mean)

    def beyond(self, x: float) -> float:
        """How far x lies beyond the points, in shares of their range; zero inside, and where only rounding differs."""
        share = max(self.low - x, x - self.high, 0.0) / (self.high - self.low)
        return round(share, 9)

    def parabola(self, x: Tensor) -> Tensor:
        """What is left of the square of x, about the mean, by its own line through the points."""
        centred = x - self.mean
        return centred.square() - self.second - self.third * centred

    def reach(self, x: float, level: float) -> float:
        r"""Half the width of the prediction interval of a new run at x.

        Inside the points :math:`t s \sqrt{1 + 1/n + (x - \bar x)^2 / S}`, with n settings and n - 2 degrees of freedom.
        Beyond them a parabola c q(x) may lie over the line, q orthogonal to it at the points, Q its sum of squares: the
        references show :math:`\hat c` with a standard error of :math:`s / \sqrt Q`, so that the squared error of the
        line has a mean of :math:`(\hat c^2 + s^2 / Q)\, q(x)^2` more. (Inside, s holds what there is of it.)

        Args:
            x: Where.
            level: Share of new runs within the interval.

        Returns:
            Infinite beyond points of which x has but two values, which exclude no curvature.
        """
        at = torch.tensor(x, dtype=torch.float64)
        variance = self.squared_error * (1 + 1 / self.num_settings + (at - self.mean).square() / self.square_sum)
        variance = variance + self.unseen(x)
        return float(stdtrit(self.num_settings - 2, (1 + level) / 2) * variance.sqrt())

    def unseen(self, x: float) -> float:
        r"""Mean square of what a parabola that the points do not exclude adds beyond them, see :meth:`reach`.

        Args:
            x: Where.

        Returns:
            :math:`(\hat c^2 + s^2 / Q)\, q(x)^2`; zero inside the points, infinite beyond points of which x has but two
            values.
        """
        if self.beyond(x) == 0:
            return 0.0
        if self.parabola_square_sum == 0:
            return math.inf
        unknown = self.curvature.square() + self.squared_error / self.parabola_square_sum
        return float(unknown * self.parabola(torch.tensor(x, dtype=torch.float64)).square())


def fit_line(x: Tensor, y: Tensor, settings: Tensor | None = None) -> Line | None:
    """Least squares in which each setting weighs one, shared by its runs.

    Residuals of runs about the line hold both how settings differ and how seeds of one do, so that their weighted
    square sum over settings less two is the variance of a run of a new setting. Where each run is a setting of its own,
    this is ordinary least squares.

    Args:
        x: ``(n,)`` float64.
        y: ``(n,)`` float64.
        settings: ``(n,)`` numbers that are equal for runs of one setting; None where each run is one.

    Returns:
        The line; None without two different x.
    """
    # Compared, not subtracted: equal numbers may leave rounding about their mean.
    if len(x) == 0 or bool(x.min() == x.max()):
        return None
    weights = setting_weights(x, settings)
    num_settings = round(float(weights.sum()))
    mean, intercept = weights @ x / num_settings, weights @ y / num_settings
    centred = x - mean
    weighted = weights * centred
    square_sum = weighted @ centred
    slope = weighted @ (y - intercept) / square_sum
    residuals = y - intercept - slope * centred
    degrees = num_settings - 2
    squared_error = weights @ residuals.square() / degrees if degrees > 0 else torch.tensor(math.nan).double()
    second, third = weighted @ centred / num_settings, weighted @ centred.square() / square_sum
    parabola = centred.square() - second - third * centred
    # Through two values of x there is a parabola for every curvature, whatever rounding may leave.
    parabola_square_sum = weights @ parabola.square() if len(x.unique()) > 2 else torch.zeros_like(mean)
    curvature = weights * parabola @ residuals / parabola_square_sum
    ends = float(x.min()), float(x.max())
    return Line(
        mean,
        square_sum,
        intercept,
        slope,
        num_settings,
        squared_error,
        *ends,
        second,
        third,
        parabola_square_sum,
        curvature,
    )


def setting_weights(x: Tensor, settings: Tensor | None) -> Tensor:
    """One over the runs of a setting.

    Args:
        x: ``(n,)`` anything of the runs.
        settings: As for :func:`fit_line`.

    Returns:
        ``(n,)`` float64, for each run.
    """
    if settings is None:
        return torch.ones(len(x), dtype=torch.float64)
    _, of_run, counts = settings.unique(return_inverse=True, return_counts=True)
    return 1 / counts[of_run].double()


def setting_means(values: Tensor, settings: Tensor | None) -> Tensor:
    """Means over the runs of each setting.

    Args:
        values: ``(n,)``; NaN are passed over.
        settings: As for :func:`fit_line`.

    Returns:
        ``(num_settings,)`` ascending by setting; NaN for one without a number.
    """
    if settings is None or len(values) == 0:
        return values
    return torch.stack([values[settings == setting].nanmean() for setting in settings.unique()])
