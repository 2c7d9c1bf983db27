"""The picture of a family's forecasts: loss curves with what is forecast, and forecasts of finished runs on truth."""

from math import isnan
from typing import TYPE_CHECKING

import numpy as np

from lightning_spectral.functional.forecast import Forecast
from lightning_spectral.runs.backtesting import FamilyBacktest, Point
from lightning_spectral.runs.figures import plain
from lightning_spectral.runs.forecasting import FamilyForecast

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MOST_NAMED = 8
"""Unfinished runs in the legend."""
MARKERS = "os^"


def forecast_figure(family: FamilyForecast) -> "Figure":
    """Loss against tokens, the unfinished runs with their intervals at the target; forecasts of the finished on truth.

    ValueError for a family with too few references.
    """
    from matplotlib.figure import Figure

    found = family.backtest
    if found is None:
        raise ValueError(f"plot must be of a family with references enough, got {family.family}: {family.reason}")
    figure = Figure(figsize=(11, 4.8), layout="constrained")
    curves, truths = figure.subplots(1, 2)
    _draw_curves(curves, family, found)
    _draw_truths(truths, found)
    for axes in (curves, truths):
        axes.grid(alpha=0.25, which="both", lw=0.5)
    figure.suptitle(plain(f"{family.family}: tokens to a loss of {family.target:g}"), fontsize="medium")
    return figure


def _draw_curves(axes: "Axes", family: FamilyForecast, found: FamilyBacktest) -> None:
    from matplotlib import colormaps

    for number, run in enumerate(found.runs):
        entries, losses = run.history.with_loss()
        label = f"finished ({len(found.runs)})" if number == 0 else None
        axes.plot(run.history.tokens[entries], losses, color="0.7", lw=0.8, label=label)
    axes.axhline(family.target, color="black", lw=0.8, ls="--")
    axes.plot(found.tokens_to_target, [family.target] * len(found.runs), "|", color="0.4", ms=9)
    colors = colormaps["viridis"](np.linspace(0, 0.9, max(len(family.forecasts), 1)))
    for number, (one, color) in enumerate(zip(family.forecasts, colors, strict=False)):
        entries, losses = one.run.history.with_loss()
        name = one.run.path.name if number < MOST_NAMED else None
        axes.plot(one.run.history.tokens[entries], losses, color=color, lw=1.8, label=name and plain(name))
        if not isnan(one.value):
            # Apart, where several are forecast to the same tokens.
            below = family.target * (1 - 0.02 * (number + 1))
            axes.plot([one.low, min(one.high, 1e3 * one.value)], [below] * 2, color=color, lw=1.8)
            axes.plot(one.value, below, "o", color=color, ms=5)
    title = f"forecast by {family.by}, with 80% intervals" if family.forecasts else "no run is unfinished"
    axes.set(xscale="log", xlabel="tokens", ylabel=found.runs[0].history.loss_name)
    axes.set_title(title, fontsize="small")
    axes.legend(fontsize="small")


def _draw_truths(axes: "Axes", found: FamilyBacktest) -> None:
    from matplotlib import colormaps

    truth = np.asarray(found.tokens_to_target)
    for point, marker, color in zip(found.points, MARKERS, colormaps["viridis"]([0.15, 0.5, 0.85]), strict=False):
        forecasts = _stack_of(point)
        values, lows, highs = (np.array([getattr(one, end) for one in forecasts]) for end in ("value", "low", "high"))
        known = np.isfinite(values) & np.isfinite(lows) & np.isfinite(highs)
        reach = np.abs(np.stack([lows, highs]) - values)[:, known]
        label = f"at {point.tokens:,.0f} tokens"
        axes.errorbar(truth[known], values[known], reach, fmt=marker, color=color, ms=4, lw=0.8, alpha=0.8, label=label)
    ends = [truth.min(), truth.max()]
    axes.plot(ends, ends, "--", color="black", lw=0.8)
    axes.set(xscale="log", yscale="log", xlabel="tokens that it took", ylabel="forecast from other settings")
    axes.set_title("finished runs by the stack, with 80% intervals", fontsize="small")
    axes.legend(fontsize="small")


def _stack_of(point: Point) -> list[Forecast]:
    return next(one.forecasts for one in point.predictors if one.name == "stack")
