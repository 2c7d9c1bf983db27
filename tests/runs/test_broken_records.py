"""Files that are no record of a run, or none any more, are refused in one line that names the file and the remedy."""

import io
import json
import os
import re
import struct
import zipfile
from collections.abc import Callable
from math import nan
from pathlib import Path

import numpy as np
import pytest

from lightning_spectral import Run, compare
from lightning_spectral.cli import main
from lightning_spectral.runs import Record, Row, safe_files
from tests.runs.made_up import LAYER, made_up

REPORT = "spectra/activation-validate-000000100.npz"


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return made_up(tmp_path / "run", 1e5, 10.0)


def about(run: Path, **facts: object) -> None:
    file = run / "spectra/run.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | facts))


def settings(run: Path, **facts: object) -> None:
    file = run / "spectra/run.json"
    series = json.loads(file.read_text())["series"]
    about(run, series={name: found | facts for name, found in series.items()})


def history(run: Path, old: str, new: str) -> None:
    file = run / "spectra/history.csv"
    file.write_text(re.sub(old, new, file.read_text(), count=1))


def arrays(run: Path, change: Callable[[str, np.ndarray], object]) -> None:
    with np.load(run / REPORT) as found:
        changed = {name: change(name, array) for name, array in found.items()}
    np.savez(run / REPORT, **changed)


def stepped(run: Path, step: object) -> None:
    with np.load(run / REPORT) as found:
        np.savez(run / REPORT, **found, step=np.asarray(step))


def of(field: str, change: Callable[[np.ndarray], object]) -> Callable[[Path], None]:
    return lambda run: arrays(run, lambda name, array: change(array) if name.endswith(field) else array)


def refused(words: list[str], capsys: pytest.CaptureFixture) -> str:
    with pytest.raises(SystemExit) as stopped:
        main(words)
    assert stopped.value.code == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert error.startswith("lightning-spectral: error: ")
    return error


SPOILT: dict[str, tuple[Callable[[Path], None], str]] = {
    "eigenvalues a number": (of("eigenvalues", lambda a: np.asarray(1.0)), "eigenvalues must be a vector, got shape"),
    "eigenvalues a square": (of("eigenvalues", lambda a: a.reshape(4, 8)), "eigenvalues must be a vector"),
    "eigenvalues a row": (of("eigenvalues", lambda a: a[None]), "eigenvalues must be a vector"),
    "eigenvalues complex": (of("eigenvalues", lambda a: a * 1j), "holds complex128, and neither numbers nor text"),
    "eigenvalues text": (of("eigenvalues", lambda a: a.astype(str)), "eigenvalues must hold real numbers"),
    "one negative": (of("eigenvalues", lambda a: np.where(np.arange(32) == 3, -a, a)), "must not be negative"),
    "rising": (of("eigenvalues", lambda a: a[::-1]), "must descend"),
    "infinite": (of("eigenvalues", lambda a: np.where(np.arange(32) == 0, np.inf, a)), "must be finite"),
    "leave_one_out a row": (of("leave_one_out", lambda a: a[0]), "shapes"),
    "rows a half": (of("num_tokens", lambda a: np.asarray(1.5)), "num_tokens must be a number of rows"),
    "rows many": (of("num_rows_without", lambda a: np.ones(3)), "num_rows_without must be a number of rows"),
    "of another step": (lambda run: stepped(run, 200), r"it holds step 200, and was renamed\): restore it or remove"),
    "of half a step": (lambda run: stepped(run, 99.5), "it holds step 99.5, and was renamed"),
    "of a step of words": (lambda run: stepped(run, "100"), "it holds step '100', and was renamed"),
    "of a step of lines": (lambda run: stepped(run, "1\n\x1b[2J"), r"it holds step '1\\n\\x1b\[2J', and was renamed"),
    "of many steps": (lambda run: stepped(run, [100, 100]), r"it holds step array\(\[100, 100\]\), and was renamed"),
    "tokens negative": (of("tokens", lambda a: -a if a.size == 1 else a), "must be"),
    "no spectrum": (
        lambda run: [np.savez(file, tokens=1.0) for file in run.glob("*/*.npz")],
        "holds no spectrum of kind activation",
    ),
    "head a number": (lambda run: settings(run, head=5), "head must be two ascending ranks or fractions, got 5"),
    "tail of null": (lambda run: settings(run, tail=[None, 1]), "tail must be two ascending"),
    "layers a number": (lambda run: settings(run, layers=3), "layers must be a list of names"),
    "rank a text": (lambda run: settings(run, rank="x"), "rank must be a count"),
    "a list of batches": (lambda run: about(run, batch_tokens=[1]), "batch_tokens must be a positive number"),
    "a negative batch": (lambda run: about(run, batch_tokens=-5), "batch_tokens must be a positive number"),
    "a batch of words": (lambda run: about(run, batch_tokens="many"), "batch_tokens must be a positive number"),
    "a family of numbers": (lambda run: about(run, family=[1]), "family must be a text of one line"),
    "a forecast of text": (lambda run: about(run, forecast={"a": "b"}), "forecast must be a table of tables"),
    "an actual of text": (
        lambda run: about(run, forecast={"a": {"actual": "x"}}),
        "forecast.a.actual must be a positive number",
    ),
    "fingerprints in a list": (
        lambda run: about(run, validation_data=["a"]),
        r"validation_data must be a table of digits, got \['a'\]",
    ),
    "samples a text": (
        lambda run: about(run, validation_samples={"0": "x"}),
        "validation_samples must be a table of counts",
    ),
    "advice of text": (lambda run: about(run, advice="x"), "advice must be a list of tables with text and url"),
    "advice of numbers": (lambda run: about(run, advice=[{"text": 1, "url": "u"}]), "advice must be a list of tables"),
    "advice of two lines": (
        lambda run: about(run, advice=[{"text": "a\x1b[2J", "url": "u"}]),
        "advice must be a list of tables with text and url, of one line each",
    ),
    "advice without an address": (lambda run: about(run, advice=[{"text": "a"}]), "advice must be a list of tables"),
    "a long step": (lambda run: history(run, "\n100,", "\n" + "9" * 400 + ","), "line 2"),
    "a longer step": (lambda run: history(run, "\n100,", "\n" + "9" * 5000 + ","), "line 2"),
    "endless tokens": (lambda run: history(run, "25000.0", "1e999"), "line 2"),
    "negative tokens": (lambda run: history(run, "25000.0", "-1"), "line 2"),
    "a step of many digits": (
        lambda run: (run / REPORT).rename(run / f"spectra/activation-validate-{'9' * 200}.npz"),
        "has a step beyond 1,000,000,000,000,000: remove it",
    ),
    "a report that is a pipe": (
        lambda run: [(run / REPORT).unlink(), os.mkfifo(run / REPORT)],
        "it is a pipe and no regular file",
    ),
    "a history that is a pipe": (
        lambda run: [(run / "spectra/history.csv").unlink(), os.mkfifo(run / "spectra/history.csv")],
        "it is a pipe and no regular file",
    ),
    "a history without end": (
        lambda run: [(run / "spectra/history.csv").unlink(), (run / "spectra/history.csv").symlink_to("/dev/zero")],
        "it is a device and no regular file",
    ),
    "a description that is a folder": (
        lambda run: [(run / "spectra/run.json").unlink(), (run / "spectra/run.json").mkdir()],
        "it is a folder and no regular file",
    ),
    "a report that is a folder": (lambda run: [(run / REPORT).unlink(), (run / REPORT).mkdir()], "it is a folder"),
    "deep JSON": (lambda run: (run / "spectra/run.json").write_text("[" * 10**5), "cannot be read"),
    "a long number": (lambda run: (run / "spectra/run.json").write_text("9" * 10**5), "run.json|cannot be read"),
    "no text": (lambda run: (run / "spectra/run.json").write_bytes(b"\xff\xfe\x00"), "cannot be read"),
}


@pytest.mark.parametrize("what", SPOILT)
def test_a_spoilt_record_is_told_in_one_line(what: str, run: Path, capsys: pytest.CaptureFixture) -> None:
    spoil, message = SPOILT[what]
    spoil(run)
    error = refused(["show", str(run)], capsys)
    assert str(run) in error
    assert re.search(message, error), error


def test_a_report_that_was_renamed_is_no_report_of_another_step(tmp_path: Path) -> None:
    record = Record.begin(tmp_path / "spectra", {"id": "a", "series": {"gradient-train": {"kind": "gradient"}}})
    record.append(Row(60, 600.0, 1.0, nan, 2.0))
    values = {"gradient/w/singular_values": np.arange(3.0, 0, -1)}
    record.write_report("gradient-train", 60, {"step": 60, "tokens": 600.0} | values | {"gradient/w/trace": 1.0})
    assert Run(tmp_path).spectrum("gradient", "w", 60).step == 60
    assert Run(tmp_path).noise_scale(60).trace == 1
    file = tmp_path / "spectra/gradient-train-000000060.npz"
    file.rename(moved := file.with_name("gradient-train-000000070.npz"))
    for ask in (
        lambda run: run.spectrum("gradient", "w", 70),
        lambda run: run.spectra("gradient", 70),
        lambda run: run.names("gradient"),
        lambda run: run.tokens_at("gradient", 70),
        lambda run: run.noise_scale(70),
    ):
        with pytest.raises(ValueError, match=rf"{str(moved)!r} cannot be read \(it holds step 60, and was renamed\)"):
            ask(Run(tmp_path))


def test_spectra_from_before_the_first_token_are_interpolated(tmp_path: Path) -> None:
    run = made_up(tmp_path / "run", 1e5, 10.0)
    arrays(run, lambda name, array: np.asarray(0.0) if name == "tokens" else array)
    found = Run(run).spectrum_at("activation", LAYER, 25_000.0)
    assert found.exponent((1, 32)).value == pytest.approx(1, abs=1e-6)
    assert found.step == pytest.approx(150)
    assert compare(run, made_up(tmp_path / "other", 1e5, 10.0)).loss < 2


def entry(name: str, data: bytes, compression: int = zipfile.ZIP_DEFLATED) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", compression) as archive:
        archive.writestr(f"{name}.npy", data)
    return file.getvalue()


def header(shape: tuple[int, ...], dtype: str = "<f8") -> bytes:
    file = io.BytesIO()
    np.lib.format.write_array_header_1_0(file, {"descr": dtype, "fortran_order": False, "shape": shape})
    return file.getvalue()


ARCHIVES = {
    "a shape beyond its data": (entry("tokens", header((10**13,))), "has not so many numbers"),
    "a shape beyond all": (entry("tokens", header((10**30, 10**30))), "has not so many numbers"),
    "objects": (entry("tokens", header((1,), "|O") + bytes(8)), "neither numbers nor text"),
    "no array": (entry("tokens", b"abc"), "cannot be read"),
    "another compression": (entry("tokens", header(()) + bytes(8), zipfile.ZIP_LZMA), "compressed by method"),
    "no archive": (b"PK" + bytes(100), "cannot be read"),
}


@pytest.mark.parametrize("what", ARCHIVES)
def test_an_archive_is_checked_before_it_is_read(what: str, run: Path) -> None:
    data, message = ARCHIVES[what]
    (run / REPORT).write_bytes(data)
    with pytest.raises(ValueError, match=f"{re.escape(str(run / REPORT))}.*{message}.*: restore it or remove it"):
        Run(run).tokens_at("activation", 100)


def test_an_archive_that_grows_is_refused_by_its_directory(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    zeros = header((2**22,)) + bytes(2**25)  # 32 MiB that were 32 KiB
    (run / REPORT).write_bytes(entry("tokens", zeros))
    assert (run / REPORT).stat().st_size < 2**16
    monkeypatch.setattr(safe_files, "MAX_ARRAYS", 2**20)
    with pytest.raises(ValueError, match=r"its arrays take 33,55.,... bytes, more than 1,048,576"):
        Run(run).tokens_at("activation", 100)


def test_a_directory_that_lies_gives_no_more_than_it_says(run: Path) -> None:
    data = entry("tokens", header((2**20,)) + bytes(2**23))
    size = struct.pack("<I", len(header((2**20,))) + 2**23)
    assert size in data
    (run / REPORT).write_bytes(data.replace(size, struct.pack("<I", 200)))
    with pytest.raises(ValueError, match="cannot be read"):
        Run(run).tokens_at("activation", 100)


def test_a_directory_of_millions_is_refused(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(safe_files, "MAX_DIRECTORY", 100)
    with pytest.raises(ValueError, match=r"its directory takes .* bytes, more than 100"):
        Run(run).tokens_at("activation", 100)


def test_a_text_beyond_the_limit_is_refused(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(safe_files, "MAX_TEXT", 100)
    with pytest.raises(ValueError, match="it has more than 100 bytes"):
        Run(run)


def test_facts_that_are_null_are_missing(run: Path) -> None:
    about(run, tags=None, family=None, id=None)
    found = Run(run)
    assert (found.tags, found.family) == ({}, "")
    assert found.id == str(found.folder.resolve())
