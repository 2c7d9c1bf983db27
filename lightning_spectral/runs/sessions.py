"""When and where runs trained: whether two sides may be compared in time, and by what.

How fast a machine is changes from day to day. Seeds that ran on one day do not know by how much, so that two sides that
ran apart differ in tokens a second whatever was changed.
"""

from collections.abc import Iterator, Sequence
from datetime import datetime, timedelta, timezone
from itertools import pairwise
from math import inf, sqrt
from typing import NamedTuple

import numpy as np

from lightning_spectral.runs.run import Run

APART = 2.0
"""Standard errors of the difference between two sides. A machine that changes its pace once, by whatever and whenever
it harms most, is then taken for a difference between sides in 3 to 8% of comparisons of 3 to 6 seeds a side, in 12% of
10, where 2.5% is aimed at; with sides in turn (a b a b, a b b a) in 2 to 3%."""

AT_ONCE = 0.1
"""Share of a run's time: starts that are closer are one."""

DAY = timedelta(hours=8)
"""A session ends where a machine has been idle for so long."""

APART_IN_TIME = "base and variant did not run in turn"


class Session(NamedTuple):
    """When and where a run trained."""

    start: datetime
    duration: timedelta
    """Of its training, without validation and measuring: it took so long at the least."""
    host: str
    """Names of machines that it ran on."""
    device: str

    @property
    def end(self) -> datetime:
        """When it had trained, at the earliest."""
        return self.start + self.duration


def session_of(run: Run) -> Session | str:
    """When and where a run trained; why that is not known, if it is not one session of which the start is recorded."""
    start = _time(run.about.get("started"))
    if start is None or start.year > 9000:  # to which nothing could be added
        return f"{run.path} did not record when it started"
    seconds = run.history.seconds[np.isfinite(run.history.seconds)]
    machines = run.about.get("machines")
    hosts = ", ".join(map(str, machines)) if isinstance(machines, list) else ""
    duration = timedelta(seconds=float(seconds.max(initial=0)))
    times, steps = run.about.get("resumed_at") or [], run.about.get("resumed") or []
    resumed = [time for one in times if (time := _time(one)) is not None]
    if len(resumed) < len(steps):
        return f"{run.path} did not record when it was resumed"
    # A machine may be faster on another day; what a run took of each is not told apart.
    if any(one - start > duration + DAY for one in resumed):
        return f"{run.path} was resumed on another day"
    return Session(start, duration, hosts, str(run.about.get("device", "")))


def told_apart(sides: Sequence[Sequence[Session]]) -> str | None:
    """Why runs of two sides cannot be compared in time; None if they can, run by run.

    They can where nothing of when and where they ran tells base and variant apart by itself: neither the machine nor
    the kind of device, of which they share one at the least, nor any moment before which some and after which the
    others started. Each of these, as a number of 0 or 1 for each run, goes through the test that tokens a second go
    through; a difference of more than two standard errors is too much. Nor may several runs of one side have a day to
    themselves: they are alike, and count for one.

    Args:
        sides: The runs of base, of variant, and others that show what seeds do.
    """
    return _machines_apart(sides) or _times_apart(sides) or _days_apart(sides)


def days_told_apart(sides: Sequence[Sequence[Session]]) -> str | None:
    """Why days of two sides cannot be compared; None if they can: no machine tells them apart.

    Args:
        sides: As for :func:`told_apart`.
    """
    return _machines_apart([[side[indices[0]] for indices in days_of(side)] for side in sides])


def days_of(side: Sequence[Session]) -> list[list[int]]:
    """Runs day by day.

    Args:
        side: Its runs.

    Returns:
        The indices of the runs of each session: those on one machine, each of which began less than eight hours after
        those before had trained.
    """
    grouped: list[list[int]] = []
    for index in sorted(range(len(side)), key=lambda i: (side[i].host, side[i].device, side[i].start)):
        before = [side[i] for i in grouped[-1]] if grouped else []
        is_same = before and (before[0].host, before[0].device) == (side[index].host, side[index].device)
        if is_same and side[index].start - max(one.end for one in before) < DAY:
            grouped[-1].append(index)
        else:
            grouped.append([index])
    return grouped


def _machines_apart(sides: Sequence[Sequence[Session]]) -> str | None:
    for what, noun in (("device", "devices"), ("host", "machines")):
        named = [[getattr(one, what) for one in side] for side in sides]
        base, variant = map(set, named[:2])
        telling = [
            name
            for name in sorted(set().union(*named))
            if _standard_errors([[one == name for one in side] for side in named]) > APART + 1e-9
        ]
        # Machines of other names may be of another kind, each of them.
        if not base & variant or telling:
            on = [_short(", ".join(sorted(name or "unknown" for name in side))) for side in (base, variant)]
            return f"base and variant ran on other {noun}, or in other shares ({on[0]}; {on[1]})"
    return None


def _times_apart(sides: Sequence[Sequence[Session]]) -> str | None:
    for moment in _moments([one for side in sides for one in side]):
        if _standard_errors([[one.start >= moment for one in side] for side in sides]) > APART + 1e-9:
            return APART_IN_TIME
    return None


def _days_apart(sides: Sequence[Sequence[Session]]) -> str | None:
    both = [(one, number) for number, side in enumerate(sides[:2]) for one in side]
    for indices in days_of([one for one, _ in both]):
        if len(indices) > 1 and len({both[index][1] for index in indices}) == 1:
            return "base and variant ran on days of their own"
    return None


def _moments(runs: Sequence[Session]) -> Iterator[datetime]:
    """Starts, each of which parts those before from itself and those after; not where several began at once."""
    for before, after in pairwise(sorted(runs)):
        if after.start - before.start > AT_ONCE * min(before.duration, after.duration):
            yield after.start


def _standard_errors(sides: Sequence[Sequence[bool]]) -> float:
    """Difference of the first two sides' means, in standard errors by the scatter within all of them."""
    every = [np.asarray(side, dtype=np.float64) for side in sides if len(side)]
    difference = abs(float(every[0].mean() - every[1].mean()))
    if difference < 1e-12:
        return 0.0
    degrees = sum(len(side) - 1 for side in every)
    squares = sum(float(((side - side.mean()) ** 2).sum()) for side in every)
    if squares == 0:
        return inf
    return difference / sqrt(squares / degrees * (1 / len(every[0]) + 1 / len(every[1])))


def _time(text: object) -> datetime | None:
    """A recorded time, of whatever zone; in UTC if it names none."""
    if not isinstance(text, str):
        return None
    for read in (datetime.fromisoformat, lambda one: datetime.strptime(one, "%Y-%m-%dT%H:%M:%S%z")):
        try:
            found = read(text.replace("Z", "+00:00"))
        except ValueError:
            continue
        return found.replace(tzinfo=timezone.utc) if found.tzinfo is None else found
    return None


def _short(names: str) -> str:
    return names if len(names) <= 40 else f"{names[:36]} ..."
