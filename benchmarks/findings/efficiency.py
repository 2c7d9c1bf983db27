"""Whether the early tail forecasts the tokens a run needs, beyond batch size and early loss: study 3 of ``plan.md``.

    python -m benchmarks.findings.efficiency

Trains the runs that are missing, then forecasts each from the others. JSON, figure and report go to
``benchmarks/results/findings``. About an hour on two cores, a minute where the runs are there.
"""

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from math import inf, isnan, log, nan
from typing import Any, NamedTuple

import numpy as np
import torch
from rich.progress import track

from benchmarks.findings.efficiency_report import write_report
from benchmarks.findings.permutation import rank_correlation
from benchmarks.findings.runs import (
    Family,
    Setting,
    all_settings,
    first_set,
    others,
    parse,
    rates,
    results_of,
    second_set,
)
from benchmarks.harness import console, environment
from lightning_spectral import Run
from lightning_spectral import backtest as backtest_family
from lightning_spectral.functional.forecast import MIN_REFERENCES, extrapolate_loss
from lightning_spectral.functional.line import fit_line
from lightning_spectral.functional.powerlaw import Band
from lightning_spectral.functional.rank_correlation import spearman_interval
from lightning_spectral.runs.references import alpha_at, loss_at

PRIMARY_POINT = 1
"""Of the numbers of tokens, the second."""
DEFAULT_BAND: Band = (0.125, 0.5)
BANDS: tuple[Band, ...] = ((1, 10), DEFAULT_BAND, (30, 100))
LEVEL = 0.01
LOSS_CURVE = "loss curve"
MIDDLE = (16, 32)
"""Batch sizes within which batch size says little."""


@dataclass(frozen=True)
class Observed:
    """One run: what it took, and what it showed early."""

    setting: Setting
    tokens: float
    """To the target; infinite where it was never reached."""
    early: dict[int, dict[str, float]]
    """By tokens and predictor; NaN after the run has ended."""

    @property
    def group(self) -> tuple[str, int, float]:
        """Runs that differ by their seed alone."""
        return self.setting.recipe, self.setting.batch_size, self.setting.multiplier


class Errors(NamedTuple):
    """Median relative errors of forecasts."""

    alone: float
    """Each run from all others."""
    setting: float
    """Each run from runs of other settings."""


def tail_name(layer: str, band: Band) -> str:
    return f"alpha {band[0]:g}-{band[1]:g} {layer}"


def observe(family: Family, setting: Setting) -> Observed:
    """Read one run.

    Args:
        family: Where runs are.
        setting: Which.

    Returns:
        Its tokens to the target, and its exponents by layer and band, its loss, its batch size and the extrapolation of
        its loss curve at each early point.
    """
    run = family.open(setting)
    tokens = run.tokens_to(family.target)
    early = {}
    for point in family.points:
        exponents = {
            tail_name(layer, band): alpha_at(run, "activation", layer, band, point)
            for layer in run.names("activation")
            for band in BANDS
        }
        early[point] = exponents | {
            "early loss": loss_at(run, point),
            "log batch size": log(setting.batch_size * family.block_size),
            LOSS_CURVE: extrapolated(run, point, family.target),
        }
    return Observed(setting, inf if isnan(tokens) else tokens, early)


def extrapolated(run: Run, point: float, target: float) -> float:
    """Tokens to the target by the run's own losses so far."""
    entries, losses = run.history.with_loss()
    tokens = run.history.tokens[entries]
    seen = (tokens <= point) & (tokens > 0)
    return extrapolate_loss(torch.from_numpy(tokens[seen]), torch.from_numpy(losses[seen]), target)


def relation(runs: Sequence[Observed], point: int, name: str) -> dict[str, Any]:
    """How a predictor goes with the tokens to the target.

    Args:
        runs: One family.
        point: Training tokens.
        name: Of the predictor.

    Returns:
        Spearman's rho with a bootstrap interval; given batch size, early loss, both, and both for means of settings,
        each with a permutation p-value; errors of forecasts.
    """
    known = [run for run in runs if not isnan(run.early[point][name]) and not isnan(run.early[point]["early loss"])]
    values, truth = vector(known, point, name), np.array([run.tokens for run in known])
    given = {key: vector(known, point, key) for key in ("log batch size", "early loss")}
    interval = spearman_interval(torch.from_numpy(values), torch.from_numpy(truth))

    def partial_rho(*keys: str) -> tuple[float, float]:
        rho, p_value = (nan, nan) if name in keys else rank_correlation(values, truth, [given[key] for key in keys])
        return float(rho), float(p_value)

    return {
        "predictor": name,
        "num_runs": len(known),
        "rho": partial_rho()[0],
        "interval": list(interval),
        "given_batch_size": partial_rho("log batch size"),
        "given_early_loss": partial_rho("early loss"),
        "given_both": partial_rho("log batch size", "early loss"),
        "of_settings": (nan, nan) if name in given else of_settings(known, point, name),
        "errors": errors(known, point, name)._asdict(),
    }


def vector(runs: Sequence[Observed], point: int, name: str) -> np.ndarray:
    return np.array([run.early[point][name] for run in runs])


def forecast(rest: Sequence[Observed], point: int, name: str | None, run: Observed) -> float:
    """Tokens of a run by the line of log tokens on a predictor through the rest.

    Args:
        rest: Other runs, which reached the target.
        point: Training tokens.
        name: Of the predictor. The loss curve needs no other runs; None is their mean, which knows nothing of the run.
        run: Which.

    Returns:
        The forecast; NaN where there is none.
    """
    tokens = torch.tensor([other.tokens for other in rest], dtype=torch.float64)
    if name is None:
        return float(tokens.log().mean().exp())
    own = run.early[point][name]
    if name == LOSS_CURVE:
        return own
    # As planned: a value however far it lies beyond the others, which `forecast_tokens` would refuse.
    values = torch.from_numpy(vector(rest, point, name))
    known = values.isfinite()
    line = fit_line(values[known], tokens[known].log()) if int(known.sum()) >= MIN_REFERENCES else None
    return nan if line is None else float(line.at(torch.tensor(own, dtype=torch.float64)).exp())


def errors(runs: Sequence[Observed], point: int, name: str | None) -> Errors:
    """How far forecasts of runs from the rest are off."""
    runs = [run for run in runs if run.tokens < inf]

    def median(are_apart: Callable[[Observed, Observed], bool]) -> float:
        found = [
            forecast([other for other in runs if are_apart(run, other)], point, name, run) / run.tokens for run in runs
        ]
        return median_error(np.array(found))

    return Errors(median(lambda one, other: one is not other), median(lambda one, other: one.group != other.group))


def median_error(ratios: np.ndarray) -> float:
    """Of forecasts over truths, those that are known."""
    known = ratios[~np.isnan(ratios)]
    return float(np.median(np.abs(known - 1))) if len(known) else nan


def held_out(rope: Sequence[Observed], recipe: Sequence[Observed], point: int, name: str | None) -> dict[str, Any]:
    """Another recipe's runs forecast from those of rope."""
    fitted = [run for run in rope if run.tokens < inf]
    runs = [run for run in recipe if run.tokens < inf and not isnan(run.early[point]["early loss"])]
    found = np.array([forecast(fitted, point, name, run) for run in runs])
    truth = np.array([run.tokens for run in runs])
    known = ~np.isnan(found)
    return {
        "predictor": name or "mean",
        "num_runs": len(runs),
        "rho": float(rank_correlation(found[known], truth[known])[0]),
        "median_error": median_error(found / truth),
        "median_ratio": float(np.median((found / truth)[known])) if known.any() else nan,
        "forecasts": found.tolist(),
        "truth": truth.tolist(),
    }


def of_settings(runs: Sequence[Observed], point: int, name: str) -> tuple[float, float]:
    """The partial correlation given batch size and early loss, of the means of settings over seeds."""
    groups: dict[Any, list[Observed]] = {}
    for run in runs:
        if not isnan(run.early[point][name]):
            groups.setdefault(run.group, []).append(run)

    def means(key: str) -> np.ndarray:
        return np.array([vector(group, point, key).mean() for group in groups.values()])

    truth = np.array([np.mean(np.log([run.tokens for run in group])) for group in groups.values()])
    rho, p_value = rank_correlation(means(name), truth, [means("log batch size"), means("early loss")])
    return float(rho), float(p_value)


def study(rope: Sequence[Observed], by_recipe: dict[str, list[Observed]]) -> dict[str, Any]:
    """Everything that the plan asks for.

    Args:
        rope: All runs of the first recipe.
        by_recipe: Those of the recipes held out.

    Returns:
        Relations by point and predictor, for all runs and for the middle batch sizes; forecasts of the recipes held
        out; the primary test; what follows for the default band.
    """
    points = list(rope[0].early)
    primary_point = points[PRIMARY_POINT]
    predictors = list(rope[0].early[primary_point])
    layers = list(dict.fromkeys(name.split()[-1] for name in predictors if name.startswith("alpha")))
    middle = [run for run in rope if run.setting.batch_size in MIDDLE]
    found: dict[str, Any] = {"points": {}, "middle": {}, "mean": {}, "held_out": {}}
    last = [tail_name(layers[-1], band) for band in BANDS]
    for point in track(points, "points", console=console, transient=True):
        found["points"][point] = [relation(rope, point, name) for name in predictors]
        found["middle"][point] = [relation(middle, point, name) for name in (*last, "early loss", LOSS_CURVE)]
        present = [run for run in rope if not isnan(run.early[point]["early loss"])]
        found["mean"][point] = errors(present, point, None)._asdict()
        found["held_out"][point] = {
            recipe: [
                held_out(rope, runs, point, name) for name in (*last, "early loss", "log batch size", LOSS_CURVE, None)
            ]
            for recipe, runs in by_recipe.items()
        }
    name = tail_name(layers[-1], DEFAULT_BAND)
    primary = next(one for one in found["points"][primary_point] if one["predictor"] == name)
    rho, p_value = primary["given_both"]
    found["primary"] = {
        "predictor": name,
        "tokens": primary_point,
        "rho": rho,
        "p_value": p_value,
        "of_settings": primary["of_settings"],
        "outcome": outcome(rho, p_value),
    }
    found["band"] = better_bands(found, layers[-1])
    found["never"] = [run.setting.name for runs in (rope, *by_recipe.values()) for run in runs if run.tokens == inf]
    return found


def outcome(rho: float, p_value: float) -> str:
    """What the primary test comes to."""
    if isnan(p_value):
        return "not testable"
    if p_value > LEVEL:
        return "not shown"
    return "as the paper says" if rho > 0 else "the other sign"


def better_bands(found: dict[str, Any], layer: str) -> list[list[float]]:
    """Bands that forecast better than the default at every point, within rope and of every recipe held out."""

    def error_of(band: Band) -> np.ndarray:
        name = tail_name(layer, band)
        values = []
        for point in found["points"]:
            values += [one["errors"]["alone"] for one in found["points"][point] if one["predictor"] == name]
            for recipe in found["held_out"][point].values():
                values += [one["median_error"] for one in recipe if one["predictor"] == name]
        return np.array(values)

    return [list(band) for band in BANDS if band != DEFAULT_BAND and (error_of(band) < error_of(DEFAULT_BAND)).all()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    arguments, family = parse(parser)
    family.train_all(all_settings(), arguments.processes)
    read = partial(observe, family)
    rope = [read(setting) for setting in dict.fromkeys([*first_set(), *second_set(), *rates()])]
    by_recipe: dict[str, list[Observed]] = {}
    for setting in others():
        by_recipe.setdefault(setting.recipe, []).append(read(setting))
    paths = [family.folder / run.setting.name for run in rope]
    try:
        (told,) = backtest_family(paths, family.target, at=family.points)
    except ValueError as error:  # too few runs came down to the target
        console.print(str(error))
        told = None
    write_report(rope, by_recipe, study(rope, by_recipe), told, environment(), results_of(arguments))


if __name__ == "__main__":
    main()
