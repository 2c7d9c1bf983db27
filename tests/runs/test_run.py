"""Reading runs back: what a kind means, and spectra at, between and outside reports."""

import os
from math import isnan, nan
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lightning_spectral import Run
from lightning_spectral.runs import Record, Row, open_runs
from lightning_spectral.runs.finding import folders_of_runs
from lightning_spectral.runs.run_spectra import kind_of
from tests.runs.made_up import LAYER, made_up


def arrays(tokens: float, *parts: str, values=(3.0, 2.0, 1.0)) -> dict[str, Any]:
    """A report of spectra, each by ``kind/name/field``."""
    return {"tokens": np.asarray(tokens)} | {part: np.asarray(values) for part in parts}


def record_of(folder: Path, series: dict[str, dict[str, Any]], **about: Any) -> Record:
    return Record.begin(folder / "spectra", {"id": "a", "series": series, **about})


@pytest.fixture
def run(tmp_path: Path) -> Run:
    """Reports at 250, 500, 750, 1000, 1500 and 2000 tokens, whose exponents are 1, 2, 3, ..."""
    folder = made_up(tmp_path / "a", 1000.0, 10.0)
    for index, path in enumerate(sorted((folder / "spectra").glob("*.npz"))):
        values = np.arange(1, 33.0) ** -(index + 1.0)
        np.savez(path, **(dict(np.load(path)) | {f"activation/{LAYER}/eigenvalues": values}))
    return Run(folder)


@pytest.mark.parametrize(("step", "tokens"), [(100, 250.0), (400, 1000.0), (600, 2000.0)])
@pytest.mark.parametrize("off", [1.0, 1 + 1e-13, 1 - 1e-13])
def test_at_a_report_its_spectrum_is_that_of_the_report(run: Run, step: int, tokens: float, off: float) -> None:
    """Also where rounding left the tokens beside it, at both ends too."""
    found = run.spectrum_at("activation", LAYER, tokens * off)
    np.testing.assert_array_equal(found, run.spectrum("activation", LAYER, step))
    assert (found.step, found.tokens, found.failure) == (step, tokens, None)
    assert len(found.leave_one_out) == 4


@pytest.mark.parametrize("tokens", [251.0, 600.0, 999.0, 1001.0, 1999.0])
def test_between_reports_exponents_are_linear_in_log_tokens(run: Run, tokens: float) -> None:
    at = [run.tokens_at("activation", step) for step in run.steps("activation")]
    expected = np.interp(np.log(tokens), np.log(at), [1, 2, 3, 4, 5, 6])
    found = run.spectrum_at("activation", LAYER, tokens)
    assert found.exponent((1, 32)).value == pytest.approx(expected)
    assert found.tokens == tokens
    assert found.step == pytest.approx(100 * expected)


@pytest.mark.parametrize(
    ("tokens", "reason"),
    [
        (249.0, "249 tokens lie outside its reports"),
        (2001.0, "2,001 tokens lie outside its reports"),
        (0.0, "0 tokens lie outside its reports"),
        (nan, "the loss was never reached"),
    ],
)
def test_outside_the_reports_there_is_none(run: Run, tokens: float, reason: str) -> None:
    found = run.spectrum_at("activation", LAYER, tokens)
    assert found.failure == reason
    assert len(found.values) == 32
    assert np.isnan(found).all()
    assert isnan(found.step)
    assert found.exponent((1, 10)).reason == reason
    assert isnan(found.rankme().value)


def test_a_matched_run_gives_its_spectra_there(run: Run) -> None:
    point = run.at_loss(1.1)
    assert point.run is run
    np.testing.assert_array_equal(
        point.spectrum("activation", LAYER), run.spectrum_at("activation", LAYER, run.tokens_to(1.1))
    )
    with pytest.raises(ValueError, match=r"name must be one of gpt\.blocks\.3 for 'activation'"):
        point.spectrum("activation", "b")


@pytest.mark.parametrize(
    ("loss", "tokens"),
    [
        (2.0, 250.0),  # at the first entry, where it was not above before
        (np.nextafter(2.0, 3), nan),
        (0.5, 2000.0),
        (np.nextafter(0.5, 0), nan),
        (1.1, 750 * (1000 / 750) ** 0.5),
        (nan, nan),
        (np.inf, nan),
        (-np.inf, nan),
    ],
)
def test_tokens_to_a_loss_at_the_ends(run: Run, loss: float, tokens: float) -> None:
    assert run.tokens_to(loss) == pytest.approx(tokens, nan_ok=True)


def test_a_missing_step_is_told_with_the_ends_of_what_there_is(tmp_path: Path) -> None:
    record = record_of(tmp_path, {"activation-train": {}})
    for step in range(1, 10):
        record.write_report("activation-train", step, arrays(step, "activation/b/eigenvalues"))
    with pytest.raises(
        ValueError, match=r"^step must be one of 1, 2, 3, \.\.\., 7, 8, 9 for 'activation' in .*, got 10$"
    ):
        Run(tmp_path).tokens_at("activation", 10)


def test_kinds_are_those_with_reports(tmp_path: Path) -> None:
    series = {
        "gradient-train": {"weights": False},
        "gradient-validate": {"stage": "validate", "weights": True},
        "activation-train": {"stage": "train"},
        "drift-train": {},
        "activation-validate": {"stage": "validate"},
    }
    record = record_of(tmp_path, series)
    both = "gradient/b.weight/singular_values", "weight/b.weight/singular_values"
    record.write_report("gradient-train", 5, arrays(50, both[0]))
    record.write_report("drift-train", 5, arrays(50))
    assert Run(tmp_path).kinds == ["gradient"]  # described is not reported, and a drift has no values
    record.write_report("gradient-validate", 10, arrays(100, *both))
    record.write_report("activation-train", 10, arrays(100, "activation/b/eigenvalues"))
    run = Run(tmp_path)
    assert run.kinds == ["activation", "gradient", "weight"]
    assert run.series("activation") == "activation-train"
    assert run.series("gradient") == run.series("weight") == "gradient-validate"
    assert run.all_series("gradient") == ["gradient-train", "gradient-validate"]
    assert run.all_series("weight") == []
    assert (run.steps("gradient"), run.steps("gradient-train"), run.steps("weight")) == ([10], [5], [10])
    assert run.steps("activation-validate") == run.steps("nonsense") == []
    assert run.settings("weight") == run.settings("gradient-validate") == series["gradient-validate"]
    assert run.settings("drift") == run.settings("nonsense") == {}
    known = "activation, gradient, weight, .*gradient-train"
    with pytest.raises(ValueError, match=f"kind must be one that .* has a report of, {known}.*, got 'drift'$"):
        run.series("drift")


def test_weights_that_no_measurement_was_asked_for_are_none(tmp_path: Path) -> None:
    record = record_of(tmp_path, {"gradient-train": {"weights": False}})
    record.write_report("gradient-train", 5, arrays(50, "gradient/b.weight/singular_values"))
    assert Run(tmp_path).kinds == ["gradient"]
    assert Run(tmp_path).steps("weight") == []


def test_of_several_on_validation_rows_the_first_is_meant(tmp_path: Path) -> None:
    names = ["activation-train", "activation-validate", "activation-validate-2", "activation-validate-10"]
    record = record_of(tmp_path, {name: {"stage": name.split("-")[1]} for name in names})
    for name in names[::-1]:
        record.write_report(name, 1, arrays(10, "activation/b/eigenvalues"))
    run = Run(tmp_path)
    assert run.series("activation") == "activation-validate"
    assert [run.series(name) for name in names] == names
    assert sorted(run.all_series("activation")) == sorted(names)


def test_names_are_in_the_order_of_the_latest_report(tmp_path: Path) -> None:
    record = record_of(tmp_path, {"gradient-train": {"weights": True}})
    of = [f"gradient/{name}/singular_values" for name in ("z.weight", "a/b.weight", "m[0].weight")]
    record.write_report("gradient-train", 1, arrays(10, of[1]))
    record.write_report("gradient-train", 2, arrays(20, *of, "weight/z.weight/singular_values"))
    run = Run(tmp_path)
    assert run.names("gradient") == ["z.weight", "a/b.weight", "m[0].weight"]
    assert run.names("weight") == ["z.weight"]
    np.testing.assert_array_equal(run.spectrum("gradient", "a/b.weight", 1), [3.0, 2.0, 1.0])
    with pytest.raises(ValueError, match=r"name must be one of z\.weight for 'weight' in .*, got 'a/b\.weight'"):
        run.spectrum("weight", "a/b.weight", 2)


@pytest.mark.parametrize(
    ("kind", "field", "corrects", "count"),
    [("activation", "eigenvalues", True, 48), ("gradient", "singular_values", False, 0)],
)
def test_a_spectrum_knows_what_it_is_of(tmp_path: Path, kind: str, field: str, corrects: bool, count: int) -> None:
    series = f"{kind}-train"
    record = record_of(tmp_path, {series: {}})
    record.write_report(series, 7, arrays(70, f"{kind}/b/{field}") | {f"{kind}/b/num_tokens": np.asarray(48)})
    found = Run(tmp_path).spectrum(kind, "b", 7)
    assert (found.name, found.step, found.tokens) == ("b", 7, 70.0)
    assert (found.corrects_bias, found.count) == (corrects, count)


def test_what_nobody_said_of_a_run_is_empty(tmp_path: Path) -> None:
    record = record_of(tmp_path, {})
    record.about.pop("id")
    record.describe()
    run = Run(tmp_path)
    assert (run.family, run.tags, run.kinds) == ("", {}, [])
    assert run.id == str((tmp_path / "spectra").resolve())
    with pytest.raises(ValueError, match="has a report of, nothing, got 'activation'"):
        run.names("activation")


def test_what_is_said_of_a_run_is_a_copy(tmp_path: Path) -> None:
    record_of(tmp_path, {}, tags={"lr": 0.1})
    run = Run(tmp_path)
    run.tags["lr"] = 2
    assert run.tags == {"lr": 0.1}


def test_history_and_reports_are_read_once(run: Run) -> None:
    assert run.history is run.history
    before = run.tokens_at("activation", 100)
    for path in run.folder.glob("*.npz"):
        path.unlink()
    assert run.tokens_at("activation", 100) == before
    assert run.steps("activation") == [100, 200, 300, 400, 500, 600]


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("activation", "activation"),
        ("activation-train", "activation"),
        ("gradient-validate-2", "gradient"),
        ("x-", "x-"),
    ],
)
def test_a_series_is_of_a_kind(name: str, kind: str) -> None:
    assert kind_of(name) == kind


def test_each_run_is_opened_once_whatever_it_is_called(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = made_up(tmp_path / "a", 100, 1)
    os.symlink(folder, tmp_path / "link")
    monkeypatch.chdir(tmp_path)
    found = open_runs(["a", folder, folder / "spectra", "link", "*"])
    assert [run.folder.resolve() for run in found] == [(folder / "spectra").resolve()]


@pytest.mark.parametrize("paths", [[], ()], ids=["list", "tuple"])
def test_no_path_is_no_run(paths) -> None:
    with pytest.raises(ValueError, match=r"base must name at least one run, got .*: give a log directory"):
        open_runs(paths, "base")


def test_a_folder_with_the_signs_of_a_pattern_is_itself(tmp_path: Path) -> None:
    folder = made_up(tmp_path / "lr=[1]", 100, 1)
    made_up(tmp_path / "lr=1", 100, 1)  # what the pattern would match
    assert folders_of_runs(str(folder)) == [folder]


def test_a_pattern_passes_over_folders_without_a_record_and_a_path_does_not(tmp_path: Path) -> None:
    folder = made_up(tmp_path / "b", 100, 1)
    for name in ("a", "c/spectra"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "d").write_text("a file")
    assert folders_of_runs(f"{tmp_path}/*") == [folder]
    assert folders_of_runs(str(tmp_path / "a")) == [tmp_path / "a"]
    assert folders_of_runs(f"{tmp_path}/x*") == []


def test_two_entries_with_one_number_of_tokens_match_at_the_first_that_is_low_enough(tmp_path: Path) -> None:
    """Steps without tokens of their own: where a loss was reached is still one place."""
    record = record_of(tmp_path, {})
    for step, tokens, loss in ((1, 10.0, 3.0), (2, 10.0, 2.0), (3, 20.0, 1.0)):
        record.append(Row(step, tokens, float(step), nan, loss))
    found = Run(tmp_path).at_loss(2.5)
    assert (found.step, found.tokens, found.seconds) == pytest.approx((1.5, 10.0, 1.5))
