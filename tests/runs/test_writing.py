"""Files are written whole or not at all, whatever the disk does."""

import errno
import os
import resource
import signal
import traceback
from collections.abc import Callable
from math import nan
from pathlib import Path

import numpy as np
import pytest

from lightning_spectral.runs import Record, Row, Run, writing
from lightning_spectral.runs.writing import append_line, sync, write_atomically
from tests.runs.test_record import about, arrays, filled, row


def in_child(work: Callable[[], None]) -> None:
    """Run in a process of its own, whose limits are its own."""
    child = os.fork()
    if child == 0:
        try:
            work()
            os._exit(0)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
    assert os.waitpid(child, 0)[1] == 0


def limit_files(size: int) -> None:
    """No file may grow beyond a size: the kernel writes what fits, and then refuses, as it does on a full disk."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))


def test_a_line_that_does_not_fit_leaves_the_lines_before(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"

    def work() -> None:
        append_line(path, "x" * 60)
        limit_files(100)
        for _ in range(3):
            with pytest.raises(OSError, match="File too large"):
                append_line(path, "y" * 60)  # of which the kernel writes 39 signs
            assert path.read_text() == "x" * 60 + "\n"
        append_line(path, "z" * 20)
        limit_files(1000)
        append_line(path, "y" * 60)

    in_child(work)
    assert path.read_text().split("\n") == ["x" * 60, "z" * 20, "y" * 60, ""]


@pytest.mark.parametrize("torn", ["half", "h" * 10_000])
def test_what_a_kill_left_behind_the_last_line_goes(tmp_path: Path, torn: str) -> None:
    path = tmp_path / "a.csv"
    for before in ("", "whole\n"):
        path.write_text(before + torn)
        append_line(path, "next")
        assert path.read_text() == f"{before}next\n"


def test_a_short_write_is_gone_on_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write = os.write
    monkeypatch.setattr(writing.os, "write", lambda descriptor, data: write(descriptor, data[:7]))
    append_line(tmp_path / "a", "abc" * 10)
    assert (tmp_path / "a").read_text() == "abc" * 10 + "\n"


def test_a_file_that_does_not_fit_leaves_nothing(tmp_path: Path) -> None:
    def work() -> None:
        (tmp_path / "a").write_text("before")
        limit_files(100)
        with pytest.raises(OSError, match="File too large"):
            write_atomically(tmp_path / "a", lambda file: file.write(b"x" * 200))

    in_child(work)
    assert [path.name for path in tmp_path.iterdir()] == ["a"]
    assert (tmp_path / "a").read_text() == "before"


@pytest.mark.parametrize(("number", "is_told"), [(errno.EINVAL, False), (errno.ENOTSUP, False), (errno.ENOSPC, True)])
def test_a_file_is_on_disk_before_it_gets_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, is_told: bool
) -> None:
    """Where the file system can promise that; one that is full says so now at the latest."""

    def fsync(descriptor: int) -> None:
        assert os.fstat(descriptor).st_size == 3
        assert not (tmp_path / "a").exists()
        raise OSError(number, "no")

    monkeypatch.setattr(writing, "sync", sync_of_the_package)
    monkeypatch.setattr(writing.os, "fsync", fsync)
    if is_told:
        with pytest.raises(OSError, match="no"):
            write_atomically(tmp_path / "a", lambda file: file.write(b"abc"))
    else:
        write_atomically(tmp_path / "a", lambda file: file.write(b"abc"))
    assert [path.name for path in tmp_path.iterdir()] == ([] if is_told else ["a"])


sync_of_the_package = sync
"""Which is switched off for all other tests once they run, and not yet as this file is read."""


def test_a_record_goes_on_once_there_is_room(tmp_path: Path) -> None:
    """Lines, reports and the description; what could be written before is there, and nothing partial is."""

    def work() -> None:
        record = filled(tmp_path / "spectra", range(1, 6))
        size = (record.folder / "history.csv").stat().st_size
        limit_files(size + 10)
        for step in (6, 7):
            for write in (
                lambda step=step: record.append(row(step, 1 / step)),
                lambda step=step: record.write_report("activation-validate", step, arrays(10.0 * step)),
                lambda: record.describe(batch_tokens=8.0, text="x" * 1000),
            ):
                with pytest.raises(OSError, match="File too large"):
                    write()
        assert Run(tmp_path).history.step.tolist() == [1, 2, 3, 4, 5]
        limit_files(10**6)
        record.append(row(8, 1 / 8))
        record.write_report("activation-validate", 8, arrays(80.0))

    in_child(work)
    run = Run(tmp_path)
    assert run.history.step.tolist() == [1, 2, 3, 4, 5, 8]
    assert run.steps("activation") == [1, 2, 3, 4, 5, 8]
    assert run.about["batch_tokens"] == 8.0
    assert not list(run.folder.glob(".*"))


def test_a_record_that_does_not_fit_leaves_no_part_of_itself(tmp_path: Path) -> None:
    def work() -> None:
        old = filled(tmp_path / "spectra", range(1, 6))
        limit_files(100)
        for begin in (
            lambda: Record.begin(tmp_path / "spectra", about("b", text="x" * 1000)),
            lambda: Record.resume(tmp_path / "spectra", about("a"), None, 3),
            lambda: Record.resume(tmp_path / "other" / "spectra", about("a"), old.folder, 3),
        ):
            with pytest.raises(OSError, match="File too large"):
                begin()

    in_child(work)
    assert {path.name for path in tmp_path.iterdir()} <= {"spectra", "other"}
    assert not list((tmp_path / "other").glob("*"))
    assert Run(tmp_path).steps("activation") == [1, 2, 3, 4, 5]
    Record.resume(tmp_path / "spectra", about("a"), None, 3)
    assert Run(tmp_path).steps("activation") == [1, 2, 3]
    assert Run(tmp_path / "spectra-1").steps("activation") == [4, 5]


def test_torn_lines_are_skipped_and_told(tmp_path: Path) -> None:
    record = filled(tmp_path / "spectra", range(1, 4))
    path = record.folder / "history.csv"
    with path.open("ab") as file:
        file.write(b"4,40.0,0.4,0.3" + b"5,50.0,0.5,0.3,nan\n" + b"\x00" * 30 + b"\n")
    record.append(row(6))
    record.append_forecast({"step": 6, "prefix": "", "low": nan})
    with (record.folder / "forecasts.jsonl").open("a") as file:
        file.write('{"step": 7, "pre\n[1]\n{"step": "x"}\n')
    record.append_forecast({"step": 8, "prefix": ""})
    with pytest.warns(UserWarning, match=r"^lines 5, 6 of '.*history\.csv' skipped: torn, as by a full disk$"):
        assert Run(tmp_path).history.step.tolist() == [1, 2, 3, 6]
    with pytest.warns(UserWarning, match=r"^lines 2, 3, 4 of '.*forecasts\.jsonl' skipped"):
        assert Run(tmp_path).forecasts == [{"step": 6, "prefix": "", "low": None}, {"step": 8, "prefix": ""}]
    # A resume goes on from the lines that are whole.
    with pytest.warns(UserWarning, match="skipped: torn"):
        resumed = Record.resume(record.folder, about(), None, step=6)
    resumed.append(Row(9, 90.0, 0.9, nan, nan))
    assert Run(tmp_path).history.step.tolist() == [1, 2, 3, 6, 9]
    assert [forecast["step"] for forecast in Run(tmp_path).forecasts] == [6]
    with pytest.warns(UserWarning, match="lines 2, 3, 4 of .*spectra-1"):
        assert [forecast["step"] for forecast in Run(tmp_path / "spectra-1").forecasts] == [6, 8]


def test_arrays_of_a_report_read_back(tmp_path: Path) -> None:
    record = Record.begin(tmp_path / "spectra", about())
    record.write_report("activation-validate", 1, arrays(10.0) | {"activation/b.0/vectors": np.eye(3, 2)})
    spectrum = Run(tmp_path).spectra("activation", 1)["b.0"]
    np.testing.assert_array_equal(spectrum.vectors, np.eye(3, 2))
    assert Run(tmp_path).spectra("activation", 1, without=("vectors", "leave_one_out"))["b.0"].vectors is None


def test_blank_lines_are_nothing(tmp_path: Path) -> None:
    folder = filled(tmp_path / "spectra", range(1, 4)).folder
    path = folder / "history.csv"
    path.write_text(" \n" + path.read_text().replace("\n", "\n\n \n"))
    (folder / "forecasts.jsonl").write_text('\n{"step": 6}\n\n')
    assert Run(tmp_path).history.step.tolist() == [1, 2, 3]
    assert Run(tmp_path).forecasts == [{"step": 6}]
    path.write_text(path.read_text() + "4,40.0\n")
    with pytest.warns(UserWarning, match=r"^line 14 of '.*history\.csv' skipped: torn, as by a full disk$"):
        assert Run(tmp_path).history.step.tolist() == [1, 2, 3]


def test_lines_with_decimal_commas_are_told_from_torn_ones(tmp_path: Path) -> None:
    path = filled(tmp_path / "spectra", range(1, 4)).folder / "history.csv"
    path.write_text(path.read_text().replace(".", ","))
    why = r"^lines 2, 3, 4 of '.*history\.csv' skipped: of too many numbers, as with decimal commas$"
    with pytest.warns(UserWarning, match=why):
        assert not len(Run(tmp_path).history.step)
    path.write_text(path.read_text() + "4,40.0\n")
    with pytest.warns(UserWarning, match=r"^lines 2, 3, 4, 5 of '.*history\.csv' skipped: torn, as by a full disk$"):
        assert not len(Run(tmp_path).history.step)
