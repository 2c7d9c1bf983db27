"""A course gives the numbers of the spectra that a run gives at the same tokens, and reads each file once."""

from math import isnan, nan
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_spectral.runs import Record, Run, forecast, report_files
from lightning_spectral.runs.course import Course
from tests.runs.made_up import LAYER, made_up

BANDS = [(1, 10), (0.125, 0.5), (4, 16)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Reports at 250, 500, 750, 1000, 1500 and 2000 tokens, the fourth without a value, the last of other rows."""
    folder = made_up(tmp_path_factory.mktemp("run"), 1000.0, 10.0)
    for index, path in enumerate(sorted((folder / "spectra").glob("*.npz"))):
        arrays = dict(np.load(path)) | {f"activation/{LAYER}/eigenvalues": np.arange(1, 33.0) ** -(index + 1.0)}
        if index == 3:
            arrays |= {
                f"activation/{LAYER}/eigenvalues": np.full(32, nan),
                f"activation/{LAYER}/failure": np.asarray("out of memory"),
            }
        if index == 5:
            arrays |= {f"activation/{LAYER}/num_tokens": np.asarray(63)}
        np.savez(path, **arrays)
    return folder


@given(st.floats(1, 3000) | st.sampled_from([250.0, 500.0, 2000.0, nan, 0.0, -1.0]), st.sampled_from([None, 1, 2]))
@settings(max_examples=60)
def test_exponents_are_those_of_the_spectrum_there(folder: Path, tokens: float, keep: int | None) -> None:
    expected = Run(folder).spectrum_at("activation", LAYER, tokens)
    course = Course(Run(folder), "activation", keep)
    for band in BANDS:
        assert course.exponent(LAYER, band, tokens) == pytest.approx(
            expected.exponent(band).value, rel=1e-9, nan_ok=True
        )
    assert isnan(course.rankme(LAYER, tokens)) == isnan(expected.rankme().value)
    assert isnan(course.exponent("no such layer", (1, 10), tokens))


def test_rankme_is_that_of_the_reports_and_between_them(folder: Path) -> None:
    course, own = Run(folder).course("activation"), Run(folder)
    first, second = (own.spectrum("activation", LAYER, step).rankme().value for step in (100, 200))
    assert course.rankme(LAYER, 250.0) == first
    assert course.rankme(LAYER, 250 * 2**0.25) == pytest.approx(0.75 * first + 0.25 * second)


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the archives that are opened."""
    names: list[str] = []
    make = report_files.open_arrays

    def note(path):
        names.append(str(path))
        return make(path)

    monkeypatch.setattr(report_files, "open_arrays", note)
    return names


def test_reports_are_read_once_and_no_further_than_they_are_asked_for(folder: Path, opened: list[str]) -> None:
    course = Run(folder).course("activation")
    for tokens in (300.0, 600.0, 300.0):
        course.exponent(LAYER, (1, 10), tokens)
        course.rankme(LAYER, tokens)
        course.tokens_until(tokens)
    assert [Path(name).stem[-3:] for name in opened] == ["100", "200", "300"]


def test_a_forecast_reads_each_report_at_most_once(tmp_path: Path, opened: list[str]) -> None:
    for number, tokens in enumerate([300.0, 350.0, 420.0, 500.0, 610.0, 700.0]):
        made_up(tmp_path / f"{number}", tokens, 1.0, 0.8 + 0.1 * number, batch_tokens=2.0**number)
    forecast(f"{tmp_path}/*", 1.0)
    # But for the one whose layers are listed.
    assert max(opened.count(name) for name in opened if "/0/spectra" not in name) == 1


def test_of_a_layer_that_joins_later_there_is_nothing_before(tmp_path: Path) -> None:
    record = Record.begin(tmp_path / "spectra", {"id": "a", "series": {"activation-train": {"stage": "train"}}})
    values = np.arange(1, 33.0) ** -1
    for step in (1, 2, 3, 4):
        names = ["a", "b"] if step > 2 else ["a"]
        arrays = {f"activation/{name}/eigenvalues": values for name in names}
        record.write_report("activation-train", step, {"tokens": np.asarray(10.0 * step)} | arrays)
    run = Run(tmp_path)
    assert (run.names("activation"), run.steps("activation", "b")) == (["a", "b"], [3, 4])
    course = run.course("activation")
    assert [isnan(course.exponent("b", (1, 10), tokens)) for tokens in (15, 25, 35)] == [True, True, False]
    assert [run.spectrum_at("activation", "b", tokens).failure is None for tokens in (15, 25, 35)] == [
        False,
        False,
        True,
    ]
    assert set(run.spectra_at("activation", 25)) == {"a", "b"}
    with pytest.raises(ValueError, match=r"must be one of a for .* at step 1, got 'b': it was reported from step 3 to"):
        run.spectrum("activation", "b", 1)
