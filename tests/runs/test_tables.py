"""Tables of runs and comparisons, cell by cell, as somebody reads them; and what a path may hold without harm."""

import json
import re
from math import inf, nan
from pathlib import Path

import numpy as np
import pytest

from lightning_spectral import Run, compare
from lightning_spectral.functional import Forecast
from lightning_spectral.runs import Comparison, FamilyBacktest, FamilyForecast, Gain, Shift
from lightning_spectral.runs.backtesting import Point, Predictor
from lightning_spectral.runs.forecast_tables import print_forecast
from lightning_spectral.runs.forecasting import forecast
from lightning_spectral.runs.kinds import Key
from lightning_spectral.runs.movement import Movement
from lightning_spectral.runs.pairs import Pairs
from lightning_spectral.runs.spread import spread
from lightning_spectral.runs.tables import evolution, print_comparison, print_run
from lightning_spectral.runs.verdict import Verdict
from tests.runs.made_up import LAYER, made_up

Printed = pytest.CaptureFixture[str]


def rows_of(printed: str) -> list[list[str]]:
    """Cells of each line: those of a table stand two or more spaces apart."""
    return [re.split(r" {2,}", line.strip()) for line in printed.splitlines() if line.strip()]


@pytest.fixture
def comparison(tmp_path: Path) -> Comparison:
    base, variant = ([made_up(tmp_path / f"{side}{n}", 100 + n, 1) for n in range(2)] for side in "bv")
    return compare(base, variant, at_loss=1.0)


def gain(quantity: str = "tokens", **changes) -> Gain:
    known = Gain(quantity, 2e6, 1234567.0, 0.62, 0.5, 0.75, 0.08, True, 0.1, 0.7)
    return known._replace(**changes)


def shift(quantity: str = "rankme", name: str = "b.0.weight", **changes) -> Shift:
    known = Shift("activation", name, quantity, 1234.5, 1200.0, -34.5, -40.0, -29.0, 2.0, 5.5, True)
    return known._replace(**changes)


@pytest.mark.parametrize(
    ("row", "cells"),
    [
        (
            gain(),
            ["tokens to loss", "2,000,000", "1,234,567", "* +62.0%", "+50.0%..+75.0%", "+8.0%"],
        ),
        (
            gain("throughput", base=10.4, variant=9.6, gain=-0.08, low=-0.2, high=0.05, run_floor=-0.1, is_detected=0),
            ["tokens a second", "10", "10", "-8.0%", "-20.0%..+5.0%", "-10.0%"],
        ),
        (
            gain("seconds", base=1234.56, variant=0.04, low=nan, high=nan, run_floor=nan, is_detected=False),
            ["seconds to loss", "1,234.6", "0.0", "+62.0%", "-", "-"],
        ),
        (
            gain("throughput", base=nan, variant=nan, gain=nan, low=nan, high=nan, run_floor=nan, is_detected=False),
            ["tokens a second", "-", "-", "-", "-", "-"],
        ),
    ],
    ids=["detected", "within", "no floor", "not known"],
)
def test_a_gain_is_a_line(comparison: Comparison, capsys: Printed, row: Gain, cells: list[str]) -> None:
    print_comparison(comparison._replace(gains={row.quantity: row}, shifts=[]))
    assert cells in rows_of(capsys.readouterr().out)


@pytest.mark.parametrize(
    ("row", "cells"),
    [
        (shift(), ["RankMe", "1,234.5", "1,200.0", "* -34.5", "-40.0..-29.0", "2.0", "5.5"]),
        (
            shift("alpha_tail", "c", base=1.0, variant=1.25, shift=0.25, low=nan, run_floor=nan, is_detected=False),
            ["alpha_tail", "1.000", "1.250", "+0.250", "-", "2.000", "-"],
        ),
        (
            shift("alpha_head", "c", base=nan, variant=nan, shift=nan, low=nan, run_floor=nan, is_detected=False),
            ["alpha_head", "-", "-", "-", "-", "2.000", "-"],
        ),
        (
            shift("js", "", base=nan, variant=nan, shift=0.012, low=nan, high=nan, sampling_floor=0.001, run_floor=0.0),
            ["JS", "-", "-", "* 0.01200", "-", "0.00100", "0.00000"],
        ),
    ],
    ids=["detected", "no floor", "not known", "mean"],
)
def test_a_shift_is_a_line(comparison: Comparison, capsys: Printed, row: Shift, cells: list[str]) -> None:
    print_comparison(comparison._replace(shifts=[row]))
    rows = rows_of(capsys.readouterr().out)
    assert rows[rows.index(cells) - 1] == [row.name or "mean of all"]


def test_a_name_stands_above_its_lines_and_each_kind_has_a_table(comparison: Comparison, capsys: Printed) -> None:
    shifts = [
        shift(name=""),
        shift(name="b.0"),
        shift("alpha_tail", "b.0"),
        shift(name="c"),
        shift(name="b.0", kind="gradient"),
    ]
    print_comparison(comparison._replace(shifts=shifts))
    printed = capsys.readouterr().out
    shown = [row[0] for row in rows_of(printed) if row[0] in ("mean of all", "b.0", "c", "RankMe", "alpha_tail")]
    assert shown == ["mean of all", "RankMe", "b.0", "RankMe", "alpha_tail", "c", "RankMe", "b.0", "RankMe"]
    for kind in ("activation", "gradient"):
        assert printed.count(f"{kind} spectra at the matched loss (* beyond its floors)") == 1


def test_a_terminal_of_80_columns_shows_all_of_it(
    comparison: Comparison, capsys: Printed, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lightning_spectral.terminal.Console.is_terminal", True)
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.setenv("TERM", "dumb")
    print_comparison(comparison)
    printed = capsys.readouterr().out
    assert max(len(line) for line in printed.splitlines()) <= 80
    labels = [row[0] for row in rows_of(printed)]
    for label in ("tokens to loss", "tokens a second", "seconds to loss", "JS", "alpha_head", "alpha_tail", "RankMe"):
        assert label in labels
    assert LAYER in labels


def test_what_seeds_could_have_shown_and_what_moved_is_said(comparison: Comparison, capsys: Printed) -> None:
    print_comparison(comparison)
    words = " ".join(capsys.readouterr().out.split())
    detectable = comparison.gains["tokens"].detectable
    assert f"a gain in tokens of {detectable:.1%} or more would be found in 80 of 100 such comparisons" in words
    assert "3 splits give no p of 0.025, as four seeds a side do: floors stand for it" in words
    assert "activation spectra did not move: between sides " in words
    known = Movement("activation", [1.0, 1.25, 2.0], [3.0, 2.25, nan], [0.002, 0.01, nan], "splits", 462, True)
    pairs = Pairs([1, 2, 30], "")
    print_comparison(comparison._replace(movements={"activation": known}, pairs=pairs))
    words = " ".join(capsys.readouterr().out.split())
    assert "activation spectra moved: between sides 3.00, 2.25, - times as far apart as between seeds (R)" in words
    assert "at val_loss 1.00, 1.25, 2.00; p 0.002, 0.010, - of 462 splits" in words
    assert "compared pair by pair, of seeds 1, 2, 30" in words
    print_comparison(comparison._replace(pairs=Pairs([], "that takes 3 of them")))
    assert "not compared pair by pair: that takes 3 of them" in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize(
    ("num_runs", "said"), [(1, "1 run of F"), (3, "3 runs of F"), (4, "4 runs of F")], ids=["one", "three", "more"]
)
def test_sides_are_introduced(comparison: Comparison, capsys: Printed, num_runs: int, said: str) -> None:
    run = comparison.base[0]
    print_comparison(comparison._replace(base=[run] * num_runs))
    words = " ".join(capsys.readouterr().out.split())
    assert f"base {said}: {run.path}" in words
    assert words.partition("variant")[0].count(str(run.path)) == min(num_runs, 3)
    assert (", ... variant" in words) == (num_runs > 3)
    assert "matched at val_loss 1.0000" in words


def test_brackets_and_colons_are_shown_as_they_are(comparison: Comparison, capsys: Printed) -> None:
    """What rich takes for markup comes up in names, paths and messages, where a closing tag would end the program."""
    odd = "m[bold].x[/b] :warning:"
    left_out = {Key("js", "activation", odd): f"{odd}: no values"}
    verdict = Verdict("none", "", f"nothing in {odd}")
    print_comparison(comparison._replace(shifts=[shift(name=odd)], left_out=left_out, verdict=verdict))
    printed = capsys.readouterr().out
    assert f"without activation {odd}, in {odd}: no values" in printed
    assert [odd] in rows_of(printed)
    assert f"verdict  nothing in {odd}" in printed


def test_what_is_said_of_a_run_is_shown_as_it_is(tmp_path: Path, capsys: Printed) -> None:
    folder = made_up(tmp_path / "[red]", 100, 1, family="F[a]", layer="m[b].c")
    about = folder / "spectra" / "run.json"
    about.write_text(json.dumps(json.loads(about.read_text()) | {"tags": {"warmup": "[/b]", "lr": 0.1}}))
    print_run(Run(folder), ["activation"])
    printed = capsys.readouterr().out.replace("\n", "")
    assert "[red]  F[a]  warmup=[/b]  lr=0.1" in printed
    assert " m[b].c " in printed


def test_a_run_is_shown_with_its_losses_and_a_few_reports(tmp_path: Path, capsys: Printed) -> None:
    folder = made_up(tmp_path / "a", 1e6, 4000.0, exponent=1.5, stage="train")
    first = folder / "spectra" / "activation-validate-000000100.npz"
    for step in range(110, 190, 10):
        (first.with_name(f"activation-validate-{step:09d}.npz")).write_bytes(first.read_bytes())
    run = Run(folder)
    print_run(run, ["activation"])
    rows = rows_of(capsys.readouterr().out)
    assert ["val_loss 2.0000 to 0.5000 (lowest 0.5000) over 600 steps, 2,000,000 tokens, 8,000.0 s"] in rows
    assert ["activation spectra, train"] in rows
    assert ["activation", "step", "tokens", "alpha_tail", "alpha_head", "RankMe"] in rows
    shown = [row for row in rows if any(cell.startswith("1.500 +/- ") for cell in row)]
    assert [row[-5].replace(",", "") for row in shown] == [str(step) for step in spread(run.steps("activation"))]
    assert [row[0] for row in shown][:1] == [LAYER]
    assert {len(row) for row in shown[1:]} == {5}  # the name is not repeated
    assert shown[0][2] == "250,000"


def test_a_run_without_losses_says_nothing_of_them(tmp_path: Path, capsys: Printed) -> None:
    folder = made_up(tmp_path / "a", 100, 1)
    (folder / "spectra" / "history.csv").write_text("")
    print_run(Run(folder), [])
    assert "loss " not in capsys.readouterr().out


def test_evolution_gives_the_numbers_of_the_spectra(tmp_path: Path) -> None:
    run = Run(made_up(tmp_path / "a", 100, 1, head=[2, 9], tail=[0.25, 0.5]))
    rows = list(evolution(run, "activation", [200, 500]))
    assert [(row["kind"], row["name"], row["step"], row["tokens"]) for row in rows] == [
        ("activation", LAYER, 200, 50.0),
        ("activation", LAYER, 500, 150.0),
    ]
    for row in rows:
        spectrum = run.spectrum("activation", LAYER, row["step"])
        tail = spectrum.exponent((0.25, 0.5))
        assert (row["alpha_tail"], row["alpha_tail_stderr"]) == (tail.value, tail.stderr)
        assert row["alpha_head"] == spectrum.exponent((2, 9)).value
        assert row["rankme"] == spectrum.rankme().value
        assert np.isnan(row["overlap"])  # no eigenvectors were kept


def test_overlap_is_that_with_the_first_report(tmp_path: Path, capsys: Printed) -> None:
    """A plane that turns about one of its two axes keeps half of it, and the cosine squared of the rest."""
    folder = made_up(tmp_path / "a", 100, 1, rank=2)
    for index, path in enumerate(sorted((folder / "spectra").glob("*.npz"))):
        basis = np.zeros((32, 2))
        basis[0, 0] = 1
        basis[1, 1], basis[2, 1] = np.cos(0.2 * index), np.sin(0.2 * index)
        np.savez(path, **(dict(np.load(path)) | {f"activation/{LAYER}/vectors": basis}))
    run = Run(folder)
    found = [row["overlap"] for row in evolution(run, "activation", run.steps("activation"))]
    expected = (1 + np.cos(0.2 * np.arange(6)) ** 2) / 2
    assert found == pytest.approx(expected)
    print_run(run, ["activation"])
    rows = rows_of(capsys.readouterr().out)
    assert [row[-1] for row in rows if row[-1].startswith(("0.", "1."))][-6:] == [f"{one:.3f}" for one in expected]


def test_overlap_of_unlike_ranks_is_of_the_directions_that_both_have(tmp_path: Path) -> None:
    """A run that was resumed may keep more directions than it began with: those it led with have turned away."""
    folder = made_up(tmp_path / "a", 100, 1, rank=2)
    for index, path in enumerate(sorted((folder / "spectra").glob("*.npz"))):
        basis = np.eye(32)[:, :2] if index == 0 else np.eye(32)[:, [2, 3, 0, 1]]
        np.savez(path, **(dict(np.load(path)) | {f"activation/{LAYER}/vectors": basis}))
    run = Run(folder)
    assert [row["overlap"] for row in evolution(run, "activation", run.steps("activation"))] == [1, 0, 0, 0, 0, 0]


FAR, NEAR = Forecast(nan, nan, nan, True, "too far"), Forecast(1.0, 1.0, 1.0)


def predictor(name: str, error: float, **changes) -> Predictor:
    known = Predictor(name, 0.9, 0.5, 0.99, 0.8, -0.25, error, 5, [Forecast(nan, nan, nan)] * 5, error, 2 * error)
    return known._replace(**changes)


def family(runs: list[Run], *predictors: Predictor, **changes) -> FamilyForecast:
    by_layer = {LAYER: {"0.125-0.5": 0.5, "0.25-0.5": nan}}
    points = [Point(tokens, 0.25, list(predictors), by_layer, (3.0, 48.0)) for tokens in (1234.0, 5678.0)]
    known = FamilyBacktest(
        "F", runs, [2000.0, 1500.0, 98765.0], [64.0] * 3, LAYER, (0.125, 0.5), points, {}, {}, range(4)
    )
    return FamilyForecast("F", 1.0, "stack", [], known._replace(**changes), None)


def recorded(folder: Path, num: int) -> list[Run]:
    return [Run(made_up(folder / str(number), 100, 1)) for number in range(num)]


@pytest.mark.parametrize(
    ("row", "cells"),
    [
        (
            predictor("alpha_tail", 0.126),
            ["alpha_tail", "+0.90", "+0.50 .. +0.99", "+0.80", "-0.25", "13%", "0.13", "0.25"],
        ),
        (
            predictor("x", nan, rho=nan, low=nan, high=nan, partial_rho=nan, skill=nan, num_forecasts=0),
            ["x", "-", "-", "-", "-", "-", "-", "-"],
        ),
        (predictor("x", inf), ["x", "+0.90", "+0.50 .. +0.99", "+0.80", "-0.25", "inf%", "inf", "inf"]),
    ],
    ids=["known", "not known", "some"],
)
def test_a_predictor_is_a_line(capsys: Printed, row: Predictor, cells: list[str]) -> None:
    print_forecast(family([], row))
    rows = rows_of(capsys.readouterr().out)
    assert ["1,234", *cells] in rows
    assert ["5,678", *cells] in rows
    assert [LAYER, "1,234", "+0.50", "-"] in rows
    assert ["5,678", "+0.50", "-"] in rows


def test_how_many_runs_have_forecasts_is_told(capsys: Printed) -> None:
    beyond = [Forecast(1.0, 1.0, 1.0, True), *[FAR] * 2, *[NEAR] * 2]
    print_forecast(family([], predictor("x", 0.2, num_forecasts=3, forecasts=beyond), predictor("y", 0.2)))
    printed = capsys.readouterr().out
    assert "at 1,234 tokens, not all of 5 runs have forecasts: 3 by x\n" in printed
    assert "at 1,234 tokens, forecasts are extrapolated: 1 by x\n" in printed
    assert "at 1,234 tokens, 25% of what the fastest took, runs have taken 3 to 48 steps\n" in printed


def test_a_forecast_says_what_it_is_of_and_what_was_passed_over(tmp_path: Path, capsys: Printed) -> None:
    skipped = {"logs/[a]": "has no losses"}
    print_forecast(family(recorded(tmp_path, 3), predictor("alpha_tail", 0.1), skipped=skipped))
    printed = capsys.readouterr().out
    assert printed.startswith("F: 3 runs came down to 1 in 1,500 to 98,765 tokens; none unfinished\n")
    assert "spectra: tail of gpt.blocks.3, band 0.125 to 0.5\n" in printed
    assert "without logs/[a], which has no losses\n" in printed


def test_settings_are_told_where_runs_are_seeds_of_one(tmp_path: Path, capsys: Printed) -> None:
    row, runs = predictor("alpha_tail", 0.1), recorded(tmp_path, 6)
    print_forecast(family(runs, row, settings=[0, 1, 2, 3, 0, 1]))
    printed = capsys.readouterr().out
    assert "tokens, of 4 settings (seeds of one count once); none unfinished\n" in printed
    assert "no run is forecast" not in printed
    print_forecast(family(runs, row, settings=[0, 1, 0, 1, 0, 1]))
    told = " ".join(capsys.readouterr().out.split())
    assert "no run is forecast: that takes 3 other settings" in told
    assert told.endswith("so train runs of 2 more")
    print_forecast(family(runs[:4], row))
    assert "seeds of one" not in capsys.readouterr().out


def test_the_best_and_the_worst_are_marked_by_the_mean_error(capsys: Printed) -> None:
    rows = [
        predictor("alpha_tail", 0.1),
        predictor("RankMe", 0.2, mean_log_error=0.05),
        predictor("early loss", nan),
        predictor("x", 0.01, mean_log_error=3.0),
    ]
    print_forecast(family([], *rows))
    names = [row[1] if row[0] == "1,234" else row[0] for row in rows_of(capsys.readouterr().out)]
    assert [name for name in names if "(" in name][:2] == ["RankMe (best)", "x (worst)"]


def test_one_predictor_is_neither_best_nor_worst(capsys: Printed) -> None:
    print_forecast(family([], predictor("alpha_tail", nan), predictor("RankMe", 0.1)))
    printed = capsys.readouterr().out
    assert "(best)" not in printed
    assert "(worst)" not in printed


def test_what_spectra_add_is_told(capsys: Printed) -> None:
    found = family([], predictor("stack", 0.1))
    points = [found.backtest.points[0]._replace(spectral_gain=(0.12, -0.03, 0.27))]
    print_forecast(found._replace(backtest=found.backtest._replace(points=points)))
    told = " ".join(capsys.readouterr().out.split())
    assert "spectra take +12% (-3% .. +27%) off the error of the stack: not used" in told


@pytest.mark.parametrize("num", [0, 1, 5, 6, 7, 11, 40, 1000])
def test_a_few_of_many_are_spread_evenly(num: int) -> None:
    found = spread(range(num))
    assert found == sorted(set(found))
    assert len(found) == min(num, 6)
    if num:
        assert (found[0], found[-1]) == (0, num - 1)
        assert np.ptp(np.diff(found)) <= 1 if num > 1 else True


def test_a_band_that_is_not_whole_is_told_wherever_it_would_count(tmp_path: Path, capsys: Printed) -> None:
    reason = "band (0.125, 0.5), ranks 4 to 16, holds 9 positive values of 13: float32 resolves no smaller ones"
    whole = [made_up(tmp_path / f"whole{n}", 100 + 10 * n, 1, 1 + n / 4) for n in range(5)]
    part = made_up(tmp_path / "part", 105, 1, 2.0, num_positive=12)
    print_run(Run(part), ["activation"])
    shown = " ".join(capsys.readouterr().out.split())
    assert f"no alpha_tail of {LAYER} at step 100, 200, 300, 400, 500, 600: {reason}" in shown
    assert next(evolution(Run(part), "activation", [300]))["unknown"] == {"alpha_tail": WholeReason(reason)}

    comparison = compare(whole[0], part, at_loss=1.0)
    (tail,) = [shift for shift in comparison.shifts if shift.quantity == "alpha_tail"]
    assert np.isnan([tail.variant, tail.shift]).all()
    assert not tail.is_detected
    assert comparison.as_dict()["unknown"] == {f"activation/{LAYER}/alpha_tail": WholeReason(reason)}
    print_comparison(comparison)
    shown = "".join(capsys.readouterr().out.split())
    assert "".join(f"no alpha_tail of activation {LAYER}, in Run({str(part)!r}): {reason}".split()) in shown

    (family,) = forecast([*whole, part], 1.0)
    assert family.as_dict()["backtest"]["unknown"] == {str(part): WholeReason(reason)}
    print_forecast(family)
    shown = "".join(capsys.readouterr().out.split())
    assert "".join(f"no exponent of {part} at step 100: {reason}".split()) in shown


class WholeReason(str):
    """Equal to a reason that has it in it."""

    def __eq__(self, other: object) -> bool:
        return str(self) in str(other)

    __hash__ = str.__hash__


@pytest.mark.parametrize(("other", "says"), [(32, True), (60, False)])
def test_runs_validated_on_unequally_many_samples_are_compared_and_that_is_said(
    tmp_path: Path, capsys: Printed, other: int, says: bool
) -> None:
    """As by one limit in batches for several batch sizes."""
    counts = {"b": 64, "v": other}
    paths = {
        f"{side}{n}": made_up(tmp_path / f"{side}{n}", 100 + n, 1, about={"validation_samples": {"0": counts[side]}})
        for side in "bv"
        for n in range(2)
    }
    comparison = compare(str(tmp_path / "b*"), str(tmp_path / "v*"), at_loss=1.0)
    caveats = comparison.as_dict()["caveats"]
    print_comparison(comparison)
    printed = capsys.readouterr().out.replace("\n", "")
    told = forecast(str(tmp_path / "?[01]"), 0.8)
    assert bool(caveats) == ("validated on" in printed) == says
    if says:
        least, most = paths["v0"], paths["b1"]
        assert caveats[0].startswith(f"validated on 32 samples in {least} and on 64 in {most}: losses and spectra are")
        assert told[0].backtest is not None
        assert caveats[0] in told[0].backtest.series
