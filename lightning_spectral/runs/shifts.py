"""How spectra moved from base to variant at the matched loss, beside what other rows and other seeds show."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from math import isnan, nan, sqrt
from typing import NamedTuple

import numpy as np
import torch
from scipy.special import stdtrit

from lightning_spectral.functional.estimate import Spectrum
from lightning_spectral.functional.floor import js_floor
from lightning_spectral.functional.jackknife import jackknife
from lightning_spectral.functional.paired import are_paired
from lightning_spectral.functional.spectrum import js_divergence
from lightning_spectral.runs.kinds import Key
from lightning_spectral.runs.sides import Sides
from lightning_spectral.runs.statistics import mean_spectrum


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


def shifts_of(kind: str, name: str, sides: Sides) -> Iterator[Shift]:
    """How one layer's, or parameter's, spectrum moved."""
    yield js_shift(kind, name, sides)
    for quantity in ("alpha_head", "alpha_tail", "rankme"):
        key = Key(quantity, kind, name)
        first, second = sides.means(key)
        shift, run_floor, sampling_floor = (
            second - first,
            sides.floor(key),
            sampling_floor_of(key, sides, second - first),
        )
        interval = (shift - run_floor, shift + run_floor)
        is_detected = _lies_beyond(abs(shift), run_floor, sampling_floor)
        yield Shift(kind, name, quantity, first, second, shift, *interval, sampling_floor, run_floor, is_detected)


def js_shift(kind: str, name: str, sides: Sides) -> Shift:
    """The divergence of the sides' mean spectra of one layer, or parameter."""
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


def mean_shift(kind: str, shifts: Sequence[Shift], sides: Sides) -> Shift:
    """The mean divergence over all layers or parameters, which the verdict goes by."""
    divergences = [shift for shift in shifts if shift.quantity == "js"]
    shift, sampling_floor = (
        float(np.mean(numbers))
        for numbers in zip(*((one.shift, one.sampling_floor) for one in divergences), strict=True)
    )
    return _divergence(Key("js", kind), shift, sampling_floor, sides)


def _divergence(key: Key, shift: float, sampling_floor: float, sides: Sides) -> Shift:
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


def sampling_floor_of(key: Key, sides: Sides, shift: float) -> float:
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
