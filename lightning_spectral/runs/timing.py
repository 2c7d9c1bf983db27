"""By what two sides are compared in time: runs that ran in turn, days that differ, or nothing."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from lightning_spectral.runs.kinds import Key
from lightning_spectral.runs.measured import Measured
from lightning_spectral.runs.sessions import APART_IN_TIME, Session, days_of, days_told_apart, session_of, told_apart
from lightning_spectral.runs.statistics import Scatter, scatter

OF_DAYS = "day"
"""Stands for the kind in the keys of what differs between days."""


class Timing(NamedTuple):
    """By what tokens a second and seconds are compared."""

    compared_by: str
    """``runs``, ``days``, or nothing."""
    reason: str
    """Why not by runs; empty if they are."""


class Timed(NamedTuple):
    """Both sides as they are compared in time."""

    base: list[Measured]
    """A run each, or the mean of a day's runs each."""
    variant: list[Measured]
    floor: Scatter
    """How they scatter."""
    known: Scatter
    """How runs do, and beside it days, for later comparisons."""


def time_sides(sides: Sequence[list[Measured]], known: Scatter, recorded: Scatter | None) -> tuple[Timing, Timed]:
    """Find by what two sides can be compared in time.

    By runs where base and variant ran in turn on the same machines (:func:`told_apart`). Else by days, if several days
    of one setting show how those differ: the mean of each day's runs then counts as one run does otherwise.

    Args:
        sides: The runs of base, of variant, and others that show what seeds do; at the matched loss.
        known: How they scatter, with what is on record.
        recorded: What is on record; days among it.
    """
    base, variant = sides[:2]
    by_runs = Timed(base, variant, known, known)
    sessions = [[session_of(measured.run) for measured in side] for side in sides]
    unknown = [one for found in sessions[:2] for one in found if isinstance(one, str)]
    if unknown:
        return Timing("", unknown[0]), by_runs
    told = [
        [(m, one) for m, one in zip(*pair, strict=True) if isinstance(one, Session)]
        for pair in zip(sides, sessions, strict=True)
    ]
    whens = [[session for _, session in side] for side in told]
    days = [_days([measured for measured, _ in side], when) for side, when in zip(told, whens, strict=True)]
    floor = scatter([side for side in days if side])
    if recorded is not None:
        of_days = {key._replace(kind=""): one for key, one in recorded.variances.items() if key.kind == OF_DAYS}
        floor = floor.and_of(recorded._replace(variances=of_days))
    named = {Key(key.quantity, OF_DAYS): one for key, one in floor.variances.items()}
    by_days = Timed(days[0], days[1], floor, known._replace(variances=known.variances | named))
    if len({bool(measured.run.columns) for side in sides[:2] for measured in side}) > 1:
        return Timing(
            "", "seconds of logs of other tools count validation and measuring, those of records do not"
        ), by_runs
    reason = told_apart(whens)
    if reason is None:
        return Timing("runs", ""), by_days._replace(base=base, variant=variant, floor=known)
    if (apart := days_told_apart(whens)) is not None:
        return Timing("", apart), by_days
    if Key("throughput") not in floor.variances:
        return Timing("", f"{APART_IN_TIME}, nor on several days"), by_days
    return Timing("days", reason), by_days


def _days(side: Sequence[Measured], sessions: Sequence[Session]) -> list[Measured]:
    """The mean of each day's runs, of what depends on the day."""
    found = []
    for indices in days_of(sessions):
        runs = [side[index] for index in indices]
        logs = {Key(name): float(np.mean([run.logs[Key(name)] for run in runs])) for name in ("throughput", "seconds")}
        found.append(Measured(runs[0].run, logs, {}, {}))
    return found
