"""How often machines that change their pace are taken for a gain in tokens a second, by how base and variant ran."""

from collections.abc import Sequence
from datetime import datetime, timedelta, timezone
from types import SimpleNamespace
from typing import Any

import numpy as np

from benchmarks.findings.forecasts import Row
from lightning_spectral.runs.gains import TIMES, gain_in
from lightning_spectral.runs.kinds import Key
from lightning_spectral.runs.measured import Measured
from lightning_spectral.runs.sides import Sides
from lightning_spectral.runs.statistics import scatter
from lightning_spectral.runs.timing import time_sides

NUM_COMPARISONS = 400
RUN, DAY = 0.01, 0.05
"""Standard deviations of ln tokens a second: of a run, and of a machine from day to day."""

START = datetime(2026, 11, 2, 9, tzinfo=timezone.utc)

ORDERS = {
    "one day a side": (("bbb", "vvv"), "", (0.0, 0.0)),
    "in turn, one day": (("bvbvbv",), "runs", (0.0, 0.05)),
    "in turn, two days": (("bvb", "vbv"), "runs", (0.0, 0.06)),
    "in turn, a day a run": (tuple("bvbvbv"), "runs", (0.0, 0.05)),
    "three days a side, in turn": (("bb", "vv", "b", "vv", "bb", "v"), "days", (0.0, 0.05)),
    "three days a side, one after the other": (("bb", "bb", "b", "vv", "v", "vv"), "days", (0.0, 0.05)),
}
"""Days with the runs of each; by what sides are then compared; limits of the share of alarms."""


def alarms(order: str) -> list[Row]:
    """Sides that differ by nothing: shares of comparisons that find one faster. And of a gain by half, that find it."""
    days, compared_by, limits = ORDERS[order]
    rng = np.random.default_rng(0)
    found = np.array([_compared(rng, days, compared_by, gain) for _ in range(NUM_COMPARISONS) for gain in (0.0, 0.5)])
    rows = [(f"{order}: one side is found faster", float(found[::2].mean()), *limits)]
    if compared_by:
        rows.append((f"{order}: half as fast again is found", float(found[1::2].mean()), 0.8, 1.0))
    return rows


def _compared(rng: np.random.Generator, days: Sequence[str], expected: str, gain: float) -> bool:
    sides: dict[str, list[Measured]] = {"b": [], "v": []}
    for day, runs in enumerate(days):
        pace = DAY * rng.standard_normal()
        for number, side in enumerate(runs):
            log_pace = 9 + pace + RUN * rng.standard_normal() + np.log1p(gain) * (side == "v")
            start = START + timedelta(days=day, hours=number)
            sides[side].append(_measured(f"{side}{len(sides[side])}", log_pace, start))
    both = list(sides.values())
    timing, timed = time_sides([*both, []], scatter(both), None)
    assert timing.compared_by == expected, timing
    return bool(expected) and gain_in("throughput", Sides(timed.base, timed.variant, timed.floor)).is_detected


def _measured(name: str, log_pace: float, start: datetime) -> Measured:
    history = SimpleNamespace(seconds=np.array([1200.0]))
    about = {"started": start.isoformat(), "machines": ["a"]}
    run: Any = SimpleNamespace(id=name, path=name, family="F", about=about, history=history, columns=None)
    return Measured(run, dict(zip(map(Key, TIMES), (log_pace, 14 - log_pace), strict=True)), {}, {})
