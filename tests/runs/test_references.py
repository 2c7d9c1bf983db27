"""The runs that a forecast rests on: which serve, which do not and why, and what is read off them."""

import json
import shutil
from math import isnan, log, nan
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lightning_spectral import Run
from lightning_spectral.runs import Record, Row
from lightning_spectral.runs.references import (
    References,
    Wanted,
    alpha_at,
    find_references,
    longest_by_id,
    loss_at,
)
from lightning_spectral.runs.validation_data import ValidationData
from tests.runs.made_up import LAYER, SETTINGS, made_up

WANTED = Wanted("F", 1.0, "val_loss", LAYER, {"stage": "validate", "num_tokens": 64, "normalize": True})


def describe(folder: Path, **facts: Any) -> Path:
    path = folder / "spectra" / "run.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | facts))
    return folder


def cut_after(folder: Path, step: int) -> Path:
    """As a run that was stopped there."""
    history = folder / "spectra" / "history.csv"
    head, *lines = history.read_text().splitlines()
    kept = [line for line in lines if int(line.partition(",")[0]) <= step]
    history.write_text("".join(f"{line}\n" for line in [head, *kept]))
    return folder


def test_what_serves_is_read_off_the_runs(tmp_path: Path) -> None:
    for number, tokens in enumerate((300.0, 100.0, 200.0)):
        made_up(tmp_path / str(number), tokens, 1.0)
    found = find_references([f"{tmp_path}/*"], WANTED)
    assert found.skipped == {}
    assert found.reasons() == ""
    assert [reference.tokens_to_target for reference in found.usable] == pytest.approx([300, 100, 200])
    assert {reference.series for reference in found.usable} == {"activation-validate"}
    assert found.best == pytest.approx(100)


def test_without_references_there_is_no_best() -> None:
    assert isnan(References([], {}).best)


def test_a_run_is_no_reference_for_itself_and_needs_no_reason(tmp_path: Path) -> None:
    own = made_up(tmp_path / "0", 100.0, 1.0)
    other = made_up(tmp_path / "1", 200.0, 1.0)
    found = find_references([own, other], WANTED, own_id=str(own))
    assert [reference.run.path for reference in found.usable] == [other]
    assert found.skipped == {}


@pytest.mark.parametrize("is_first", [True, False])
def test_of_a_run_in_two_places_the_longer_counts(tmp_path: Path, is_first: bool) -> None:
    long = made_up(tmp_path / "ab"[is_first], 100.0, 1.0)
    short = tmp_path / "ba"[is_first]
    shutil.copytree(long, short)
    cut_after(short, 400)
    runs = [Run(tmp_path / "a"), Run(tmp_path / "b")]
    assert [run.path for run in longest_by_id(runs)] == [long]
    found = find_references([f"{tmp_path}/*"], WANTED)
    assert [reference.run.path for reference in found.usable] == [long]


def test_runs_of_their_own_stay_in_their_order(tmp_path: Path) -> None:
    runs = [Run(made_up(tmp_path / name, 100.0, 1.0)) for name in "cab"]
    assert longest_by_id(runs) == runs


FOREIGN = {
    "another family": ({"family": "G"}, {}, "of another family (G, not F)"),
    "another loss": ({"loss": "val_error"}, {}, "that recorded val_error and not val_loss"),
    "another stage": ({"stage": "train"}, {}, "that did not measure activations with stage='validate'"),
    "another layer": ({"layer": "b"}, {}, f"that did not measure {LAYER}"),
    "fewer rows": ({"num_tokens": 32}, {}, "measured with num_tokens=32 and not 64"),
    "no such setting": ({"normalize": None}, {}, "measured with normalize=None and not True"),
    "not reached": ({}, {"target": 0.25}, "that never came down to 0.25"),
    "below from the first": ({}, {"target": 3.0}, "that never came down to 3"),
}


@pytest.mark.parametrize(("made", "wanted", "reason"), FOREIGN.values(), ids=FOREIGN)
def test_why_a_run_does_not_serve(tmp_path: Path, made: dict, wanted: dict, reason: str) -> None:
    folder = made_up(tmp_path / "0", 100.0, 1.0, **made)
    found = find_references([folder], WANTED._replace(**wanted))
    assert found == References([], {str(folder): reason})


def test_reasons_are_counted(tmp_path: Path) -> None:
    for number, family in enumerate("GFGHG"):
        made_up(tmp_path / str(number), 100.0, 1.0, family=family)
    reasons = find_references([f"{tmp_path}/*", tmp_path / "0"], WANTED).reasons()
    assert reasons == "3 of another family (G, not F); 1 of another family (H, not F)"


def test_what_cannot_be_read_is_passed_over_in_one_line_each(tmp_path: Path) -> None:
    good = made_up(tmp_path / "good", 100.0, 1.0)
    history = made_up(tmp_path / "history", 100.0, 1.0)
    (history / "spectra" / "history.csv").write_text("a,b\n1,2\n")
    table = describe(made_up(tmp_path / "table", 100.0, 1.0), forecast={"a": "no table\nat all"})
    (tmp_path / "file").write_text("no folder")
    paths = [good, history, table, tmp_path / "file", tmp_path / "gone", f"{tmp_path}/x*"]
    found = find_references(paths, WANTED)
    assert [reference.run.path for reference in found.usable] == [good]
    assert list(found.skipped) == [str(path) for path in paths[1:]]
    assert all(reason.startswith("that cannot be read (") for reason in list(found.skipped.values())[:4])
    assert list(found.skipped.values())[4] == f"pattern that matches no run ({tmp_path}/x*)"
    assert not any("\n" in reason for reason in found.skipped.values())


def test_a_path_that_the_system_refuses_is_told(tmp_path: Path) -> None:
    (reason,) = find_references([tmp_path / ("x" * 300)], WANTED).skipped.values()
    assert reason.startswith("that cannot be read (")


@pytest.mark.parametrize(
    ("data", "kept"),
    [("aab", "01"), ("abb", "12"), ("bab", "02"), ("ab", "0")],  # of a tie the first
)
def test_most_decide_what_the_validation_data_are(tmp_path: Path, data: str, kept: str) -> None:
    for number, fingerprint in enumerate(data):
        made_up(tmp_path / str(number), 100.0 + number, 1.0, data=fingerprint)
    found = find_references([f"{tmp_path}/*"], WANTED)
    assert [reference.run.path.name for reference in found.usable] == list(kept)
    assert set(found.skipped.values()) == {"of other validation data than most"}


@pytest.mark.parametrize(
    ("own", "kept"),
    [("a", "05"), ("b", "1245"), ("c", "5"), (None, "1245")],
)
def test_the_data_of_the_run_decide_where_they_are_known(tmp_path: Path, own: str | None, kept: str) -> None:
    """Whatever was told of other runs before; of one that says nothing nobody knows."""
    for number, fingerprint in enumerate(("a", "b", "b", "b", "b", None)):
        family = "G" if number == 3 else "F"
        made_up(tmp_path / str(number), 100.0 + number, 1.0, data=fingerprint, family=family)
    first = find_references([f"{tmp_path}/*"], WANTED)
    for found in (first, first.for_data(ValidationData({"0": "c"}))):
        of_own = found.for_data(ValidationData({} if own is None else {"0": own}))
        if own is not None or found is first:
            assert sorted(reference.run.path.name for reference in of_own.usable) == list(kept)
        every = {reference.run.path.name for reference in of_own.usable} | {Path(path).name for path in of_own.skipped}
        assert every == set("012345")
        assert of_own.skipped[str(tmp_path / "3")] == "of another family (G, not F)"
        if own is not None:
            aside = [str(reference.run.path) for reference in of_own.aside]
            assert {of_own.skipped[path] for path in aside} == {"of other validation data than this run"}


NOTE = {"monitor": "val_loss", "target_loss": 1.0, "actual": 77.0}


@pytest.mark.parametrize(
    ("note", "loss", "expected"),
    [
        (NOTE, "val_loss", 77.0),
        (NOTE | {"target_loss": 2.0}, "val_loss", 100.0),
        (NOTE | {"monitor": "train_loss"}, "val_loss", 100.0),
        (NOTE | {"actual": None}, "val_loss", 100.0),  # it did not see what the history shows
        (NOTE, "val_error", 77.0),  # of a loss that the history does not hold, only a forecaster knows
        (NOTE | {"actual": None}, "val_error", nan),
    ],
    ids=["noted", "other target", "other loss", "not seen", "only noted", "neither"],
)
def test_what_a_forecaster_noted_goes_before_the_history(
    tmp_path: Path, note: dict, loss: str, expected: float
) -> None:
    folder = describe(made_up(tmp_path / "0", 100.0, 1.0, loss=loss), forecast={"tail": note})
    found = find_references([folder], WANTED)
    if isnan(expected):
        assert found.reasons() == "1 that never came down to 1"
    else:
        assert [reference.tokens_to_target for reference in found.usable] == pytest.approx([expected])


@pytest.mark.parametrize(
    ("seconds", "series", "reason"),
    [
        ({}, "activation-validate-2", None),
        ({"stage": "train"}, "", "measured with num_tokens=16 and not 64"),
        ({"normalize": False}, "", "measured with normalize=False and not True"),
        ({"num_tokens": 8}, "", "measured with num_tokens=8 and not 64"),
    ],
    ids=["fits", "other stage", "other rows", "fewer rows"],
)
def test_of_several_series_the_one_that_fits_serves(tmp_path: Path, seconds: dict, series: str, reason) -> None:
    folder = made_up(tmp_path / "0", 100.0, 1.0, num_tokens=16)
    run_series = {"activation-validate": SETTINGS | {"num_tokens": 16}, "activation-validate-2": SETTINGS | seconds}
    describe(folder, series=run_series)
    for path in (folder / "spectra").glob("*.npz"):
        shutil.copy(path, path.with_name(path.name.replace("validate", "validate-2")))
    assert WANTED.series_of(Run(folder)) == (series, reason)


def test_the_tail_between_reports_is_linear_in_log_tokens(tmp_path: Path) -> None:
    folder = made_up(tmp_path / "0", 100.0, 1.0)
    alphas = [0.8, 1.1, 1.0, 1.3, 1.35, 1.6]
    paths = sorted((folder / "spectra").glob("*.npz"))
    for path, alpha in zip(paths, alphas, strict=True):
        np.savez(path, **(dict(np.load(path)) | {f"activation/{LAYER}/eigenvalues": np.arange(1, 33.0) ** -alpha}))
    run = Run(folder)
    at = [25.0, 50, 75, 100, 150, 200]
    for tokens in (25.0, 30.0, 75.0, 111.0, 199.0, 200.0):
        expected = np.interp(log(tokens), np.log(at), alphas)
        assert alpha_at(run, "activation", LAYER, (4, 16), tokens) == pytest.approx(expected)
    for tokens in (24.9, 200.1, nan):
        assert isnan(alpha_at(run, "activation", LAYER, (4, 16), tokens))


def test_the_loss_between_entries_is_linear_in_log_tokens(tmp_path: Path) -> None:
    run = Run(made_up(tmp_path / "0", 100.0, 1.0))
    at, losses = [25, 50, 75, 100, 150, 200], [2.0, 1.5, 1.2, 1.0, 0.7, 0.5]
    for tokens in (25.0, 30.0, 75.0, 111.0, 199.0, 200.0, 200 * (1 + 1e-13)):
        assert loss_at(run, tokens) == pytest.approx(np.interp(log(tokens), np.log(at), losses))
    for tokens in (24.9, 200.1, nan):
        assert isnan(loss_at(run, tokens))


def test_a_loss_before_the_first_token_is_at_no_logarithm(tmp_path: Path) -> None:
    record = Record.begin(tmp_path / "spectra", {"id": "a"})
    for step, loss in enumerate((4.0, 3.0, 2.0)):
        record.append(Row(step, 10.0 * step, 1.0 * step, nan, loss))
    run = Run(tmp_path)
    assert loss_at(run, 10 * 2**0.5) == pytest.approx(2.5)
    assert isnan(loss_at(run, 5.0))
    assert isnan(loss_at(run, 0.0))
