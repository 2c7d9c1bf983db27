"""Which sides ran in turn: every order of small sides against the rule written out, machines, days and old records."""

import itertools
import math
from datetime import datetime, timedelta, timezone
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from lightning_spectral import Run
from lightning_spectral.runs.sessions import APART, Session, days_of, days_told_apart, session_of, told_apart
from tests.runs.made_up import made_up, when

START = datetime(2026, 11, 2, tzinfo=timezone.utc)


def at(hours: float, host: str = "a", device: str = "cpu", minutes: float = 30) -> Session:
    return Session(START + timedelta(hours=hours), timedelta(minutes=minutes), host, device)


def in_order(order: str, **where: str) -> list[list[Session]]:
    """Sides b and v, and o that show what seeds do, an hour each."""
    return [[at(hour, **where) for hour, side in enumerate(order) if side == name] for name in "bvo"]


@pytest.mark.parametrize("order", ["bv" * 3, "bvvbbv", "bvvb", "vbv", "bvbvvbvb", "bvvvbbvvbvbb"])
def test_sides_in_turn_may_be_compared(order: str) -> None:
    assert told_apart(in_order(order)) is None


@pytest.mark.parametrize("order", ["bbbvvv", "vvbb", "bbbbvbvvvv", "bvvv", "bv", "bbbbbbvvvvvvbv"])
def test_sides_one_after_the_other_may_not(order: str) -> None:
    assert told_apart(in_order(order)) == "base and variant did not run in turn"


@pytest.mark.filterwarnings("ignore:Precision loss occurred")
@pytest.mark.parametrize("num", [2, 3])
def test_every_order_goes_by_the_t_statistic_of_the_worst_moment(num: int) -> None:
    for chosen in itertools.combinations(range(2 * num), num):
        order = "".join("b" if i in chosen else "v" for i in range(2 * num))
        worst = 0.0
        for moment in range(1, 2 * num):
            late = [[float(i >= moment) for i, one in enumerate(order) if one == side] for side in "bv"]
            if np.ptp(late[0]) == np.ptp(late[1]) == 0:
                found = math.inf if late[0][0] != late[1][0] else 0.0
            else:
                found = abs(stats.ttest_ind(*late).statistic)
            worst = max(worst, found)
        assert (told_apart(in_order(order)) is None) == (worst < APART + 1e-6), order


def test_others_that_ran_before_and_after_show_what_a_moment_does() -> None:
    assert told_apart(in_order("bv")) is not None
    assert told_apart(in_order("obovo")) is None


def test_runs_that_began_at_once_are_in_turn() -> None:
    sides = [[at(hour + side / 60, minutes=60) for hour in range(3)] for side in range(2)]
    assert told_apart(sides) is None
    together = [[at(number / 3600, minutes=60) for number in range(start, start + 3)] for start in (0, 3)]
    assert told_apart(together) is None


@pytest.mark.parametrize(("what", "noun"), [("host", "machines"), ("device", "devices")])
def test_machines_that_tell_the_sides_apart(what: str, noun: str) -> None:
    def sides(*machines: str) -> list[list[Session]]:
        return [[at(2 * n + side, **{what: one}) for n, one in enumerate(names)] for side, names in enumerate(machines)]

    assert told_apart(sides("xxx", "yyy")) == f"base and variant ran on other {noun}, or in other shares (x; y)"
    assert days_told_apart(sides("xxx", "yyy")) == f"base and variant ran on other {noun}, or in other shares (x; y)"
    assert told_apart(sides("xyz", "xyz")) is None
    assert told_apart(sides("xxy", "xyy")) is None
    assert told_apart(sides("uvw", "xyz")) is not None  # of other names may be of another kind
    assert told_apart(sides("xxxxx", "yyyyx")) is not None


def test_a_day_ends_where_the_machine_is_idle() -> None:
    side = [at(0), at(1), at(7), at(24), at(24, "b"), at(25)]
    assert days_of(side) == [[0, 1, 2], [3, 5], [4]]
    back_to_back = [at(20 * n, minutes=20 * 60) for n in range(4)]
    assert days_of(back_to_back) == [[0, 1, 2, 3]]


@pytest.mark.parametrize(
    ("started", "expected"),
    [
        ("2026-11-02T09:00:00+00:00", START + timedelta(hours=9)),
        ("2026-11-02T10:30:00+0130", START + timedelta(hours=9)),
        ("2026-11-02T09:00:00Z", START + timedelta(hours=9)),
        ("2026-11-02T09:00:00.250", START + timedelta(hours=9, milliseconds=250)),
    ],
)
def test_times_of_any_zone_are_read(tmp_path: Path, started: str, expected: datetime) -> None:
    found = session_of(Run(made_up(tmp_path / "a", 100, 30, about={"started": started})))
    assert found == Session(expected, timedelta(seconds=60), "", "")


@pytest.mark.parametrize("started", [None, "", "yesterday", 5, ["2026"]], ids=str)
def test_a_record_without_a_start_has_no_session(tmp_path: Path, started: object) -> None:
    about = when(0) | {"started": started}
    run = Run(made_up(tmp_path / "a", 100, 30, about=about))
    assert session_of(run) == f"{run.path} did not record when it started"


def test_a_run_that_was_resumed_soon_is_one_session_and_one_of_another_day_is_none(tmp_path: Path) -> None:
    def session(name: str, **about: object) -> Session | str:
        return session_of(Run(made_up(tmp_path / name, 100, 30, about=when(0) | about)))

    soon, late = ((START + timedelta(hours=hours)).isoformat() for hours in (2, 50))
    assert isinstance(session("soon", resumed=[3], resumed_at=[soon]), Session)
    assert session("late", resumed=[3, 5], resumed_at=[soon, late]) == f"{tmp_path / 'late'} was resumed on another day"
    for name, more in (("old", {}), ("half", {"resumed_at": [soon]}), ("odd", {"resumed_at": [soon, "then"]})):
        why = session(name, resumed=[3, 5], **more)
        assert why == f"{tmp_path / name} did not record when it was resumed"


def test_runs_that_have_days_to_themselves_are_no_runs_in_turn() -> None:
    """Runs of a day are alike: two days a side are two numbers a side, whatever stands in each."""
    sides = [[at(24 * day + hour) for day in days for hour in range(2)] for days in ((0, 2), (1, 3))]
    assert told_apart(sides) == "base and variant ran on days of their own"
    assert told_apart([[at(24 * day) for day in days] for days in ((0, 2), (1, 3))]) is None
    shared = [[at(24 * day + hour + side / 2) for day in range(2) for hour in range(2)] for side in range(2)]
    assert told_apart(shared) is None
