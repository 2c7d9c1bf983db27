"""What the variant gained over the base, beside what seeds alone show and what they could have shown."""

from math import exp, expm1, isnan, log1p, nan
from typing import NamedTuple

from lightning_spectral.runs.kinds import Key
from lightning_spectral.runs.sides import Sides

BETTER = {"tokens": -1, "throughput": 1, "seconds": -1}
"""Whether more of it is a gain."""

TIMES = ("throughput", "seconds")
"""Those that depend on the machine's day."""

MIN_GAIN = 0.02
"""A gain below two percent gets no name, however little seeds scatter; one that is within, for sure, is none."""

EQUIVALENCE = 0.9
"""Confidence of the interval that lies within two percent where a gain is equivalent to zero: two one-sided tests at 5%
(Schuirmann, *A comparison of the two one-sided tests procedure and the power approach for assessing the equivalence of
average bioavailability*, 1987)."""


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
    detectable: float
    """The smallest gain that these seeds would have shown in 80 of 100 cases; NaN likewise."""
    resolved: float
    """The end farther from zero of the 90% interval: a gain below it is not told from none. NaN likewise."""

    @property
    def is_zero(self) -> bool:
        """Whether it is equivalent to zero: its 90% interval lies within two percent."""
        return self.resolved <= MIN_GAIN


def gain_in(quantity: str, sides: Sides) -> Gain:
    """The gain in one of ``BETTER``, by logarithms."""
    key = Key(quantity)
    first, second = sides.means(key)
    difference = BETTER[quantity] * (second - first)
    floor, reach = sides.floor(key), sides.error(key).reach(EQUIVALENCE)
    is_detected = not isnan(floor) and abs(difference) > max(floor, log1p(MIN_GAIN))
    low, high = (expm1(difference + sign * floor) for sign in (-1, 1))
    run_floor = expm1(floor if difference >= 0 else -floor)
    detectable = sides.detectable(key)
    detectable = nan if isnan(detectable) else max(expm1(detectable), MIN_GAIN)
    resolved = nan if isnan(reach) else max(abs(expm1(difference + sign * reach)) for sign in (-1, 1))
    return Gain(
        quantity, exp(first), exp(second), expm1(difference), low, high, run_floor, is_detected, detectable, resolved
    )


def without_floor(gain: Gain) -> Gain:
    """What was measured on both sides, and no more."""
    return gain._replace(gain=nan, low=nan, high=nan, run_floor=nan, is_detected=False, detectable=nan, resolved=nan)
