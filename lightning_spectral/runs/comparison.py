"""Comparing two sides of runs at equal loss: what was gained in tokens and in time, and what moved in the spectra."""

import os
from collections.abc import Iterator, Sequence
from dataclasses import replace
from math import exp, isnan, log, nan, sqrt
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from scipy.special import stdtrit

from lightning_spectral.functional.estimate import Spectrum
from lightning_spectral.functional.floor import js_floor
from lightning_spectral.functional.jackknife import jackknife
from lightning_spectral.functional.paired import are_paired
from lightning_spectral.functional.spectrum import js_divergence
from lightning_spectral.runs.arguments import check_loss, check_paths
from lightning_spectral.runs.finding import RunPaths, open_runs
from lightning_spectral.runs.kinds import Key
from lightning_spectral.runs.measured import (
    Measured,
    bands_of,
    check_comparable,
    keep_known,
    lowest_common_loss,
    measure,
)
from lightning_spectral.runs.run import Run
from lightning_spectral.runs.statistics import Scatter, mean_spectrum, number, read_scatter, scatter
from lightning_spectral.runs.timing import Timing, time_sides
from lightning_spectral.runs.verdict import MIN_GAIN, Verdict, decide

Paths = RunPaths

BETTER = {"tokens": -1, "throughput": 1, "seconds": -1}
"""Whether more of it is a gain."""

TIMES = ("throughput", "seconds")
"""Those that depend on the machine's day."""


class Gain(NamedTuple):
    """What the variant gained over the base: a share, 0.5 for half as much again; negative for a loss."""

    quantity: str
    """``tokens`` and ``seconds`` to the matched loss, or ``throughput``, tokens a second on the way to it."""
    base: float
    """Geometric mean over the side's runs."""
    variant: float
    gain: float
    low: float
    """Interval, NaN where the scatter of runs is not known."""
    high: float
    run_floor: float
    """How large a gain, or how low a loss, of its sign seeds alone show; NaN likewise."""
    is_detected: bool


class Shift(NamedTuple):
    """How a spectrum moved from base to variant."""

    kind: str
    name: str
    """Layer or parameter; empty for the mean over all."""
    quantity: str
    """``alpha_head``, ``alpha_tail``, ``rankme``, or ``js``: the divergence of the sides' mean spectra, in nats."""
    base: float
    variant: float
    shift: float
    low: float
    """Interval, NaN where the scatter of runs is not known, and for ``js``."""
    high: float
    sampling_floor: float
    """What other rows of the same runs may show, with 95% confidence; paired where both sides are of the same rows."""
    run_floor: float
    """What other seeds may show; NaN where the scatter of runs is not known."""
    is_detected: bool
    """Whether it lies beyond both floors."""


class Comparison(NamedTuple):
    """Two sides of runs at equal loss."""

    base: list[Run]
    variant: list[Run]
    loss_name: str
    loss: float
    """The loss they are matched at."""
    gains: dict[str, Gain]
    shifts: list[Shift]
    verdict: Verdict
    run_floor: Scatter
    """What seeds show, as it is used."""
    left_out: dict[Key, str]
    """Spectra that cannot be compared, and why."""
    unknown: dict[Key, str]
    """Exponents that a run's spectra do not give, and why: their shifts are NaN."""
    timing: Timing
    """By what tokens a second and seconds are compared, or why not."""

    def as_dict(self) -> dict[str, Any]:
        """JSON-like, for programs; serves as the recorded run floor of later comparisons, too."""
        return {
            "base": [str(run.path) for run in self.base],
            "variant": [str(run.path) for run in self.variant],
            "families": {"base": self.base[0].family, "variant": self.variant[0].family},
            "loss_name": self.loss_name,
            "loss": self.loss,
            "timing": self.timing._asdict(),
            "gains": {name: gain._asdict() for name, gain in self.gains.items()},
            "shifts": [shift._asdict() for shift in self.shifts],
            "verdict": self.verdict._asdict(),
            "series": {
                kind: {str(run.path): run.series(kind) for run in (*self.base, *self.variant)}
                for kind in dict.fromkeys(shift.kind for shift in self.shifts)
            },
            "left_out": {f"{key.kind}/{key.name}": reason for key, reason in self.left_out.items()},
            "unknown": {key.text: reason for key, reason in self.unknown.items()},
            "run_floor": self.run_floor.as_dict(),
        }


def compare(base: Paths, variant: Paths, at_loss: float | None = None, floor: Paths | None = None) -> Comparison:
    """Compare two runs, or two sides of runs with several seeds each, at equal loss.

    Args:
        base: Log directory, or directories, or glob patterns of them.
        variant: Likewise.
        at_loss: The loss to match at; None for the lowest that all runs reached while their spectra were measured.
        floor: Where no side has two runs, or few: a recorded run floor of the base's family, that is, seeds of one
            setting, or a file with the JSON of an earlier comparison. Seeds of several days show how days differ.

    Returns:
        Gains, shifts and a verdict, each beside what sampling and what seeds alone show.

    Raises:
        ValueError: If a path names no run, one run is on both sides, or runs cannot be compared: their spectra are of
            different stages, layers, data or numbers of rows, a side mixes families, or a loss was not reached.

    Example::

        comparison = compare("logs/rope/*", "logs/muon/*")
        comparison.verdict.text
        comparison.gains["tokens"].gain
    """
    if at_loss is not None:
        check_loss("at_loss", at_loss)
    sides = open_runs(base, "base"), open_runs(variant, "variant")
    others, recorded = _open_floor(floor, sides)
    for name, side in (("base", sides[0]), ("variant", sides[1]), ("floor", others)):
        _check_alike(name, side)
    _check_apart(*sides)
    runs = [*sides[0], *sides[1], *others]
    kinds = check_comparable(runs)
    bands = {kind: bands_of(runs[0], kind) for kind in kinds}
    loss = lowest_common_loss(runs, kinds) if at_loss is None else float(at_loss)
    every = [measure(run, loss, kinds, bands) for run in runs]
    every, left_out = keep_known(every)
    num_base, num_both = len(sides[0]), len(sides[0]) + len(sides[1])
    first, second, third = every[:num_base], every[num_base:num_both], every[num_both:]
    known = scatter([first, second, *([third] if third else [])])
    if recorded is not None:
        known = known.and_of(recorded)
    timing, timed = time_sides([first, second, third], known, recorded)
    known = timed.known
    measured = _Sides(first, second, known)
    in_time = _Sides(timed.base, timed.variant, timed.floor)
    gains = {quantity: _gain(quantity, in_time if quantity in TIMES else measured) for quantity in BETTER}
    if not timing.compared_by:
        gains |= {quantity: _left_out(gains[quantity]) for quantity in TIMES}
    shifts, means = [], []
    for kind in kinds:
        names = [key.name for key in first[0].spectra if key.kind == kind]
        if names:
            of_names = [shift for name in names for shift in _shifts(kind, name, measured)]
            means.append(_mean_shift(kind, of_names, measured))
            shifts += of_names
    has_moved = {mean.kind: mean.is_detected for mean in means}
    left_out_time = "" if timing.compared_by else timing.reason
    verdict = decide(_detected(gains["tokens"]), _detected(gains["throughput"]), has_moved, left_out_time)
    loss_name = runs[0].history.loss_name
    unknown = {key: f"{one.run}: {why}" for one in [*second, *first] for key, why in one.unknown.items()}
    unknown = {key: why for key, why in unknown.items() if key._replace(quantity="js") in first[0].spectra}
    return Comparison(*sides, loss_name, loss, gains, [*means, *shifts], verdict, known, left_out, unknown, timing)


def _detected(gain: Gain) -> float:
    """The gain as the verdict sees it: none within its floor, NaN where that is not known."""
    if isnan(gain.run_floor):
        return nan
    return gain.gain if gain.is_detected else 0.0


def _left_out(gain: Gain) -> Gain:
    """What was measured on both sides, and no more."""
    return gain._replace(gain=nan, low=nan, high=nan, run_floor=nan, is_detected=False)


def _open_floor(floor: Paths | None, sides: tuple[list[Run], list[Run]]) -> tuple[list[Run], Scatter | None]:
    """Where a run floor beyond the two sides comes from: other runs, or an earlier comparison."""
    family, compared = sides[0][0].family, {run.id for side in sides for run in side}
    if floor is None:
        return [], None
    check_paths("floor", floor)
    if isinstance(floor, (str, Path)) and os.path.isfile(floor):
        recorded = read_scatter(Path(floor))
        if family not in recorded.families:
            raise ValueError(f"floor must be of the base's family, {family}, got {', '.join(recorded.families)}")
        if compared & set(recorded.runs):
            raise ValueError(f"floor must be of other runs than those that are compared, got {str(floor)!r}")
        return [], recorded
    # Those that are compared show their scatter anyway.
    others = [run for run in open_runs(floor, "floor") if run.id not in compared]
    for run in others:
        if run.family != family:
            raise ValueError(f"floor must be of the base's family, {family}, got {run.family} in {run}")
    return others, None


def _check_alike(name: str, runs: Sequence[Run]) -> None:
    """Refuse runs on a side that are no seeds of one setting."""
    seen: dict[str, Run] = {}
    for run in runs:
        if run.family != runs[0].family:
            raise ValueError(
                f"{name} must be runs of one family, got {runs[0].family} in {runs[0]} and {run.family} in {run}"
            )
        other = seen.setdefault(run.id, run)
        if other is not run:
            raise ValueError(
                f"{name} must be independent runs, got {other} and {run}, which go on from one start: leave one out"
            )


def _check_apart(base: Sequence[Run], variant: Sequence[Run]) -> None:
    """Refuse a run that is compared with itself, by whatever path it is named."""
    for run in variant:
        same = next((one for one in base if one.id == run.id or one.folder.samefile(run.folder)), None)
        if same is not None:
            where = f"{run.path}" if same.path == run.path else f"{same.path} and {run.path}, which are one run"
            raise ValueError(f"base and variant must be different runs, got {where} on both sides: leave it out of one")


class _Sides(NamedTuple):
    """Both sides as they were measured, and how runs scatter."""

    base: list[Measured]
    variant: list[Measured]
    known: Scatter

    @property
    def both(self) -> tuple[list[Measured], list[Measured]]:
        return self.base, self.variant

    def floor(self, key: Key) -> float:
        return self.known.floor(key, len(self.base), len(self.variant))

    def means(self, key: Key) -> list[float]:
        return [float(np.mean([number(run, key) for run in side])) for side in self.both]


def _gain(quantity: str, sides: _Sides) -> Gain:
    first, second = sides.means(Key(quantity))
    difference = BETTER[quantity] * (second - first)
    floor = sides.floor(Key(quantity))
    is_detected = not isnan(floor) and abs(difference) > max(floor, log(1 + MIN_GAIN))
    low, high = (exp(difference + sign * floor) - 1 for sign in (-1, 1))
    run_floor = exp(floor if difference >= 0 else -floor) - 1
    return Gain(quantity, exp(first), exp(second), exp(difference) - 1, low, high, run_floor, is_detected)


def _shifts(kind: str, name: str, sides: _Sides) -> Iterator[Shift]:
    """How one layer's, or parameter's, spectrum moved."""
    yield _js_shift(kind, name, sides)
    for quantity in ("alpha_head", "alpha_tail", "rankme"):
        key = Key(quantity, kind, name)
        first, second = sides.means(key)
        shift, run_floor, sampling_floor = second - first, sides.floor(key), _sampling_floor(key, sides, second - first)
        interval = (shift - run_floor, shift + run_floor)
        is_detected = _lies_beyond(abs(shift), run_floor, sampling_floor)
        yield Shift(kind, name, quantity, first, second, shift, *interval, sampling_floor, run_floor, is_detected)


def _js_shift(kind: str, name: str, sides: _Sides) -> Shift:
    key = Key("js", kind, name)
    spectra = [[run.spectra[key] for run in side] for side in sides.both]
    shift = float(js_divergence(*(mean_spectrum([spectrum.values for spectrum in side]) for side in spectra)))
    every = [spectrum for side in spectra for spectrum in side]
    if are_paired(*every):
        # However many runs a side has, their rows are the same: what those show of their own is in all of them.
        sampling_floor = float(js_floor(*map(_mean_of, spectra)))
    else:
        # Between means over runs, the sampling of rows shows less than between two.
        share = (1 / len(sides.base) + 1 / len(sides.variant)) / 2
        sampling_floor = share * float(js_floor(*every))
    return _divergence(key, shift, sampling_floor, sides)


def _mean_shift(kind: str, shifts: Sequence[Shift], sides: _Sides) -> Shift:
    """The mean divergence over all layers or parameters, which the verdict goes by."""
    divergences = [shift for shift in shifts if shift.quantity == "js"]
    shift, sampling_floor = (
        float(np.mean(numbers))
        for numbers in zip(*((one.shift, one.sampling_floor) for one in divergences), strict=True)
    )
    return _divergence(Key("js", kind), shift, sampling_floor, sides)


def _divergence(key: Key, shift: float, sampling_floor: float, sides: _Sides) -> Shift:
    run_floor = sides.floor(key)
    is_detected = _lies_beyond(shift, run_floor, sampling_floor)
    return Shift(key.kind, key.name, "js", nan, nan, shift, nan, nan, sampling_floor, run_floor, is_detected)


def _lies_beyond(shift: float, run_floor: float, sampling_floor: float) -> bool:
    """Whether neither seeds nor, where error bars are known, other rows of the same runs would show a shift."""
    return not isnan(run_floor) and shift > run_floor and not shift <= sampling_floor


def _mean_of(spectra: Sequence[Spectrum]) -> Spectrum:
    """The mean over runs that were measured on the same rows, with and without each group."""
    without = mean_spectrum([spectrum.leave_one_out for spectrum in spectra])
    return replace(spectra[0], values=mean_spectrum([one.values for one in spectra]), leave_one_out=without)


def _sampling_floor(key: Key, sides: _Sides, shift: float) -> float:
    """95% limit of the difference of two sides' means by the sampling of rows alone."""
    every = [run.spectra[key._replace(quantity="js")] for side in sides.both for run in side]
    if are_paired(*every):
        first, second = (torch.stack([run.without[key] for run in side]).mean(0) for side in sides.both)
        stderr = float(jackknife(torch.tensor(shift), second - first).stderr)
        return float(stdtrit(len(first) - 1, 0.975)) * stderr if len(first) > 1 else nan
    variance, degrees = 0.0, 0
    for side in sides.both:
        for run in side:
            variance += run.estimates[key].stderr ** 2 / len(side) ** 2
            degrees += max(len(run.spectra[key._replace(quantity="js")].leave_one_out) - 1, 0)
    return float(stdtrit(degrees, 0.975)) * sqrt(variance) if degrees else nan
