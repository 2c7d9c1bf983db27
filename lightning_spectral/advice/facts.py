"""What callbacks know at the end of a run, each number with the error or floor that it must lie beyond."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from math import nan
from typing import Literal, NamedTuple

from scipy.special import stdtrit

LEVEL = 0.95
"""Of the limits beyond which a number has moved, as of all sampling floors here."""

UNEQUAL = 0.1
"""Relative difference of numbers of rows from which two spectra do not compare: fewer rows alone make one steeper."""


def are_as_many(rows: float, others: float) -> bool:
    """Whether spectra of so many rows each compare."""
    return abs(rows - others) <= UNEQUAL * max(rows, others)


class Number(NamedTuple):
    """A mean over layers, in one report."""

    value: float
    stderr: float
    """At most: as if the errors of all layers went together, as those of the same rows may."""

    @classmethod
    def mean(cls, numbers: "Sequence[Number]") -> "Number":
        """Of some layers; NaN of none."""
        if not numbers:
            return cls(nan, nan)
        return cls(sum(one.value for one in numbers) / len(numbers), sum(one.stderr for one in numbers) / len(numbers))


def student(num_groups: int, level: float) -> float:
    """Student's quantile for a jackknife over so many groups; NaN for fewer than two."""
    return float(stdtrit(num_groups - 1, level)) if num_groups > 1 else nan


def floor_of_change(first: Number, last: Number, num_groups: int) -> float:
    """How far two reports of one and the same process lie apart in 95 of 100 cases, on either side.

    Errors of independent rows; those of the same rows have much in common, and their difference a lower floor. By
    Student's quantile with a degree of freedom less than there are groups.
    """
    return student(num_groups, (1 + LEVEL) / 2) * math.hypot(first.stderr, last.stderr)


def floor_of_fall(before: Number, after: Number, num_groups: int) -> float:
    """Likewise on one side: how far the later lies below the earlier in 95 of 100 cases at the most."""
    return student(num_groups, LEVEL) * math.hypot(before.stderr, after.stderr)


@dataclass(frozen=True, kw_only=True)
class Fact:
    """What a callback knows."""

    prefix: str = ""
    """Of its keys."""


@dataclass(frozen=True, kw_only=True)
class Moved(Fact):
    """A number of activation spectra at the first report and the last, the same layers in both."""

    quantity: Literal["alpha_tail", "rankme_share"]
    """RankMe is a share of the width."""
    first: Number
    last: Number
    num_layers: int
    num_groups: int
    """Of the jackknife."""
    steps: tuple[int, int]

    @property
    def floor(self) -> float:
        """What the change must exceed."""
        return floor_of_change(self.first, self.last, self.num_groups)


class Drift(NamedTuple):
    """How far the head of one layer has turned from its reference."""

    layer: str
    overlap: float
    floor: float
    """It has turned where the overlap is below."""


@dataclass(frozen=True, kw_only=True)
class Drifted(Fact):
    """The drift of all layers at the last report."""

    rank: int
    reference: str
    """``"first"``, ``"previous"`` or the path of a run."""
    layers: tuple[Drift, ...]
    step: int


@dataclass(frozen=True, kw_only=True)
class BatchNoise(Fact):
    """The gradient noise scale at the last report, beside the batch."""

    batch: float
    """Samples of an optimizer step over all ranks; NaN if they are not known."""
    tokens_per_sample: float
    """NaN where a sample has no tokens, or they are not known."""
    scale: float
    """In samples, as its interval is."""
    low: float
    high: float
    """``inf`` where a gradient of zero is not excluded."""
    num_parameters: int | None
    """None for the whole model."""
    step: int


@dataclass(frozen=True, kw_only=True)
class Awaited(Fact):
    """The last forecast of a run that has not reached its target."""

    monitor: str
    target: float
    tokens: float
    """Of training, at its end."""
    forecast: float
    low: float
    high: float
    """80% prediction interval."""
    p_value: float
    """Of its references' forecasting each other by chance alone."""


@dataclass(frozen=True, kw_only=True)
class Alarmed(Fact):
    """Layers whose RankMe is in alarm at the last report, each with its numbers in words."""

    layers: tuple[tuple[str, str], ...]
    num_watched: int
    step: int
