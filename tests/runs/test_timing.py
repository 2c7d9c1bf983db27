"""By what comparisons in time are made: runs in turn, days, or nothing, in the table, JSON, figure and verdict."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from lightning_spectral import Comparison, compare
from lightning_spectral.runs.figures import comparison_figure
from lightning_spectral.runs.kinds import Key
from lightning_spectral.runs.tables import print_comparison
from lightning_spectral.runs.to_json import to_json
from tests.runs.made_up import made_up, when

Side = Callable[..., list[Path]]

SECONDS = {"b": [10.0, 10.1, 9.9, 10.05], "v": [5.0, 5.04, 4.97, 5.02]}
"""The variant is twice as fast."""


@pytest.fixture
def side(tmp_path: Path) -> Side:
    def made(name: str, *starts: float | None, **where: str) -> list[Path]:
        return [
            made_up(
                tmp_path / f"{name}{number}",
                100 + number,
                SECONDS[name][number],
                about=None if start is None else when(start, **where),
            )
            for number, start in enumerate(starts)
        ]

    return made


def shown(comparison: Comparison, capsys: pytest.CaptureFixture[str]) -> str:
    print_comparison(comparison)
    return " ".join(capsys.readouterr().out.split())


def test_runs_in_turn_are_compared_as_runs(side: Side, capsys: pytest.CaptureFixture[str]) -> None:
    found = compare(side("b", 0, 2, 4), side("v", 1, 3, 5))
    assert found.timing == ("runs", "")
    assert found.verdict.kind == "execution-side"
    assert "tokens a second and seconds are" not in shown(found, capsys)


@pytest.mark.parametrize(
    ("starts", "where", "reason"),
    [
        (((0, 1, 2), (24, 25, 26)), {}, "base and variant did not run in turn, nor on several days"),
        (((0, 1, 2), (3, 4, 5)), {}, "base and variant did not run in turn, nor on several days"),
        (((0, 2, 4), (1, 3, 5)), {"machine": "z"}, "base and variant ran on other machines, or in other shares (a; z)"),
        (((0, 24, 48), (1, 25, 49)), {"machine": "z"}, "base and variant ran on other machines, or in other shares"),
        (((0, 2, 4), (1, 3, 5)), {"device": "H100"}, "base and variant ran on other devices, or in other shares (cpu;"),
        (((None, 2, 4), (1, 3, 5)), {}, "b0 did not record when it started"),
        (((0, 2, 4), (1, 3, None)), {}, "v2 did not record when it started"),
    ],
    ids=["days", "blocks", "machines", "machines over days", "devices", "old base", "old variant"],
)
def test_sides_that_ran_apart_are_not_compared_in_time(
    side: Side, capsys: pytest.CaptureFixture[str], starts: tuple, where: dict[str, str], reason: str
) -> None:
    found = compare(side("b", *starts[0]), side("v", *starts[1], **where))
    assert found.timing.compared_by == ""
    assert reason in found.timing.reason
    assert "\n" not in found.timing.reason
    assert found.verdict.kind == "none"
    assert found.verdict.text.startswith("no detectable difference in tokens")
    for text in (found.verdict.text, shown(found, capsys), comparison_figure(found).axes[1].get_title()):
        assert "left out" in text
        assert reason in text.replace("\n", " ")
    for quantity in ("throughput", "seconds"):
        assert np.isnan(found.gains[quantity][3:7]).all()
        assert not found.gains[quantity].is_detected
        assert found.gains[quantity].base > 0  # what was measured is shown
    facts = json.loads(to_json(found.as_dict()))
    assert facts["timing"] == {"compared_by": "", "reason": found.timing.reason}
    assert facts["gains"]["throughput"]["gain"] is None
    assert np.isfinite(found.gains["tokens"].low)


def test_several_days_a_side_are_compared_day_by_day(side: Side, capsys: pytest.CaptureFixture[str]) -> None:
    """Two runs of one day count as their mean, and days as runs do otherwise."""
    found = compare(side("b", 0, 1, 24, 48), side("v", 72, 96, 97, 120))
    assert found.timing == ("days", "base and variant did not run in turn")
    assert "are compared day by day: base and variant did not run in turn" in shown(found, capsys)
    assert comparison_figure(found).axes[1].get_title().endswith(", by days")
    paces = {name: np.log([(100 + n) / seconds for n, seconds in enumerate(SECONDS[name])]) for name in "bv"}
    base = [paces["b"][:2].mean(), *paces["b"][2:]]
    variant = [paces["v"][0], paces["v"][1:3].mean(), paces["v"][3]]
    interval = stats.ttest_ind(variant, base).confidence_interval(0.975)
    gain = found.gains["throughput"]
    assert (gain.low, gain.high) == pytest.approx((np.expm1(interval.low), np.expm1(interval.high)), rel=1e-6)
    assert found.verdict.kind == "execution-side"


def test_a_recorded_floor_of_several_days_serves_later_comparisons(side: Side, tmp_path: Path) -> None:
    earlier = compare(side("b", 0, 24, 48), side("v", 72, 96, 120))
    assert earlier.run_floor.variances[Key("throughput", "day")].degrees == 4
    (tmp_path / "earlier.json").write_text(to_json(earlier.as_dict()))
    later = [made_up(tmp_path / f"later{n}", 100 + n, 10.0 / (1 + n), about=when(500 + 24 * n)) for n in range(2)]
    assert compare(later[0], later[1]).verdict.kind == "unknown"
    found = compare(later[0], later[1], floor=tmp_path / "earlier.json")
    assert found.timing.compared_by == "days"
    assert found.verdict.kind == "execution-side"
    seeds = compare(later[0], later[1], floor=[tmp_path / f"b{n}" for n in range(3)])
    assert seeds.timing.compared_by == "days"
    assert seeds.run_floor.variances[Key("throughput", "day")].degrees == 2


def test_a_run_is_not_compared_with_itself(side: Side, tmp_path: Path) -> None:
    runs = side("b", 0, 1, 2)
    with pytest.raises(ValueError, match=r"^base and variant must be different runs, got .*b1 on both sides: leave"):
        compare(runs[:2], runs[1:])
    (tmp_path / "link").symlink_to(runs[0])
    shutil.copytree(runs[0], tmp_path / "copy")
    for other in ("link", "copy", "b0/spectra", "../" + tmp_path.name + "/b0"):
        with pytest.raises(ValueError, match=r"^base and variant must be different runs, got ") as raised:
            compare(runs[0], tmp_path / other)
        assert "\n" not in str(raised.value)
