"""Tables of forecasts, for the terminal: what unfinished runs will need, and how well that went with finished ones."""

from collections.abc import Sequence
from math import inf, isnan, nan

from rich.table import Table
from rich.text import Text

from lightning_spectral.functional.forecast import MIN_SETTINGS, NO_SKILL
from lightning_spectral.runs.backtesting import LARGE, FamilyBacktest, Point, Predictor
from lightning_spectral.runs.forecasting import FamilyForecast, RunForecast
from lightning_spectral.runs.tables import from_log
from lightning_spectral.terminal import console, new_table, show_number

ROOMY = 100
"""Columns of a terminal from which on there is room for intervals of correlations."""


def print_forecast(family: FamilyForecast) -> None:
    """Print the forecasts of a family's unfinished runs, and the backtest of its finished ones."""
    out = console()
    found = family.backtest
    if found is None:
        out.print(f"{family.family}: no forecast, {family.reason}")
        return
    fastest, slowest = min(found.tokens_to_target), max(found.tokens_to_target)
    num_settings = len(set(found.settings))
    seeds = f", of {num_settings} settings (seeds of one count once)" if num_settings < len(found.runs) else ""
    out.print(
        f"{family.family}: {len(found.runs)} runs came down to {family.target:g} in {fastest:,.0f} to {slowest:,.0f} "
        f"tokens{seeds}; {len(family.forecasts) or 'none'} unfinished"
    )
    if found.band is not None:
        out.print(f"spectra: tail of {found.layer}, band {found.band[0]:.3g} to {found.band[1]:.3g}")
    for run in (*found.runs, *(one.run for one in family.forecasts)):
        if run.columns:
            out.print(from_log(run))
    for path, reason in found.without_spectra.items():
        if not reason.startswith("is read from"):
            out.print(f"{path} {reason}: it serves by loss and batch alone")
    for line in found.series:
        out.print(line)
    unfinished = {str(one.run.path) for one in family.forecasts}
    for path, reason in found.skipped.items():
        if path not in unfinished:
            out.print(f"without {path}, which {reason}")
    for path, reason in found.unknown.items():
        out.print(f"no exponent of {path} at {reason}")
    if family.forecasts:
        _print_unfinished(family)
    _print_backtest(found)


def _print_unfinished(family: FamilyForecast) -> None:
    out = console()
    numbers = ["at tokens", "loss", "forecast", "80% interval", "of best"]
    table = new_table(f"unfinished runs, forecast by {family.by}", ["run"], numbers)
    for one in family.forecasts:
        interval = "-" if isnan(one.value) else f"{_short(one.low)} .. {_short(one.high)}"
        mark = " extrapolated" if one.extrapolated and not isnan(one.value) else ""
        times = "-" if isnan(one.relative) else f"{one.relative:.2f}x"
        table.add_row(
            f"{one.run.path}{mark}", _short(one.tokens), show_number(one.loss, 3), _short(one.value), interval, times
        )
    out.print(table)
    for one in family.forecasts:
        if (line := _caution(one)) is not None:
            out.print(f"{one.run.path}: {line}")


def _caution(one: RunForecast) -> str | None:
    """What to know before a forecast is believed."""
    if isnan(one.value):
        return f"no forecast, {one.reason}"
    at = f"at {one.tokens:,.0f} tokens {one.num_references} references of {one.num_settings} settings"
    if isnan(one.p_value):
        return f"{at} cannot tell the skill of the forecast"
    if one.p_value > NO_SKILL:
        return f"{at} forecast each other no better than their mean does (p = {one.p_value:.2f})"
    return None


def _short(number: float) -> str:
    """Tokens in few signs: three digits that count."""
    if isnan(number):
        return "-"
    if number == inf:
        return "inf"
    for size, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M")):
        if number >= 0.9995 * size:
            return f"{number / size:.3g}{unit}" if number < 999.5 * size else f"{number / size:,.0f}{unit}"
    return f"{number:,.0f}"


def _print_backtest(found: FamilyBacktest) -> None:
    out = console()
    is_roomy = out.width >= ROOMY
    numbers = ["rho", *(["95% interval"] if is_roomy else []), "given B", "rank", "median", "mean ln", "large B"]
    table = new_table("finished runs, each forecast from those of other settings", ["tokens", "predictor"], numbers)
    for point in found.points:
        marks = _marks(point.predictors)
        for index, one in enumerate(point.predictors):
            table.add_row("" if index else _short(point.tokens), *_cells(one, marks.get(one.name), is_roomy))
        if point is not found.points[-1]:
            table.add_section()
    out.print(table)
    out.print(
        "rho: Spearman of the number with tokens; given B: the same, given batch size; rank: of forecasts with the "
        "truth; median: of |forecast / truth - 1|; mean ln: of |ln(forecast / truth)|; large B: the same of batches "
        f"of {LARGE:.0%} of the largest or more; best and worst by mean ln"
    )
    for point in found.points:
        for line in _notes(point):
            out.print(f"at {point.tokens:,.0f} tokens, {line}")
    if found.layer:
        out.print(_layers(found))
        out.print(
            "the sign of tail against tokens depends on how far the target lies, and on how many steps runs have taken "
            "(lightning_spectral.theory)"
        )
    num_settings = len(set(found.settings))
    if num_settings <= MIN_SETTINGS:
        out.print(
            f"no run is forecast: that takes {MIN_SETTINGS} other settings, of batch size or learning rate, so train "
            f"runs of {MIN_SETTINGS + 1 - num_settings} more"
        )


def _marks(predictors: Sequence[Predictor]) -> dict[str, str]:
    """Which predictors forecast best and worst, by the mean logarithmic error."""
    errors = {one.name: one.mean_log_error for one in predictors if not isnan(one.mean_log_error)}
    if len(errors) < 2:
        return {}
    return {min(errors, key=errors.__getitem__): "best", max(errors, key=errors.__getitem__): "worst"}


def _cells(one: Predictor, mark: str | None, is_roomy: bool) -> list[str | Text]:
    interval = "-" if isnan(one.low) else f"{one.low:+.2f} .. {one.high:+.2f}"
    rho, partial, skill = ("-" if isnan(x) else f"{x:+.2f}" for x in (one.rho, one.partial_rho, one.skill))
    median = "-" if isnan(one.median_error) else f"{one.median_error:.0%}"
    means = (show_number(x, 2) for x in (one.mean_log_error, one.large_error))
    style = {"best": "bold green", "worst": "red"}.get(mark or "", "")
    name = Text(f"{one.name} ({mark})" if mark else one.name, style=style)
    return [name, rho, *([interval] if is_roomy else []), partial, skill, median, *means]


def _notes(point: Point) -> list[str]:
    """What else there is to say of the forecasts at one number of tokens."""
    steps = " to ".join(dict.fromkeys(f"{steps:,.0f}" for steps in point.steps))
    lines = [f"{point.fraction:.0%} of what the fastest took, runs have taken {steps} steps"]
    some = [one for one in point.predictors if 0 < one.num_forecasts < len(one.forecasts)]
    if some:
        counts = ", ".join(f"{one.num_forecasts} by {one.name}" for one in some)
        lines.append(f"not all of {len(some[0].forecasts)} runs have forecasts: {counts}")
    beyond = [f"{one.num_extrapolated} by {one.name}" for one in point.predictors if one.num_extrapolated]
    if beyond:
        lines.append(f"forecasts are extrapolated: {', '.join(beyond)}")
    value, low, high = point.spectral_gain
    if not isnan(value):
        used = "used" if point.uses_spectra else "not used"
        lines.append(f"spectra take {value:+.0%} ({low:+.0%} .. {high:+.0%}) off the error of the stack: {used}")
    return lines


def _layers(found: FamilyBacktest) -> Table:
    """Which layer and band carry it."""
    bands = list(next(iter(found.points[0].by_layer.values())))
    table = new_table(
        "rho of the tail exponent, by layer and band (fractions of the width)", ["layer"], ["tokens", *bands]
    )
    for layer in found.points[0].by_layer:
        for point in found.points:
            rhos = (point.by_layer.get(layer, {}).get(band, nan) for band in bands)
            cells = ("-" if isnan(rho) else f"{rho:+.2f}" for rho in rhos)
            table.add_row(layer if point is found.points[0] else "", f"{point.tokens:,.0f}", *cells)
    return table
