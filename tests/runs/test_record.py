"""A record is written whole or not at all, says of whom it is, and reads back what was written."""

import json
import subprocess
import sys
from math import isnan, nan
from pathlib import Path

import numpy as np
import pytest

from lightning_spectral.runs import Record, Row, Run, open_runs
from lightning_spectral.runs.record import read_history, reports


def about(run_id: str = "a", **facts) -> dict:
    return {"id": run_id, "family": "F", "series": {"activation-validate": {"kind": "activation"}}, **facts}


def arrays(tokens: float, values=(4.0, 2.0, 1.0)) -> dict[str, np.ndarray]:
    return {
        "tokens": np.asarray(tokens),
        "activation/b.0/eigenvalues": np.asarray(values, dtype=np.float64),
        "activation/b.0/leave_one_out": np.ones((2, len(values))),
        "activation/b.0/num_tokens": np.asarray(64),
        "activation/b.0/failure": np.asarray(""),
    }


def row(step: int, val_loss: float = nan) -> Row:
    return Row(step, 10.0 * step, 0.1 * step, 1 / 3, val_loss)


def filled(folder: Path, steps: range, run_id: str = "a") -> Record:
    record = Record.begin(folder, about(run_id))
    for step in steps:
        record.write_report("activation-validate", step, arrays(10.0 * step))
        record.append(row(step, 1 / step))
    return record


def test_what_was_written_reads_back_exactly(tmp_path: Path) -> None:
    filled(tmp_path / "spectra", range(2, 12, 2))
    run = Run(tmp_path)
    assert run.path == tmp_path
    assert run.family == "F"
    assert run.steps("activation") == [2, 4, 6, 8, 10]
    assert run.history.val_loss.tolist() == [1 / step for step in range(2, 12, 2)]
    assert run.history.train_loss.tolist() == [1 / 3] * 5
    spectrum = run.spectrum("activation", "b.0", 4)
    np.testing.assert_array_equal(spectrum, [4.0, 2.0, 1.0])
    assert (spectrum.count, spectrum.tokens, spectrum.failure) == (64, 40.0, None)
    assert repr(Run(tmp_path / "spectra")) == repr(run)


def test_two_lines_of_one_step_are_one_entry(tmp_path: Path) -> None:
    record = Record.begin(tmp_path / "spectra", about())
    record.append(Row(5, 50, 1.0, 0.25, nan))
    record.append(Row(5, 50, 1.5, nan, 0.5))
    history = Run(tmp_path).history
    assert [column.tolist() for column in history] == [[5], [50], [1.5], [0.25], [0.5]]


@pytest.mark.parametrize("torn", ["7", "7,70.0,0.", "7,70.0,0.7,0.3,"])
def test_a_line_that_was_torn_off_does_not_count(tmp_path: Path, torn: str) -> None:
    record = filled(tmp_path / "spectra", range(1, 4))
    with (record.folder / "history.csv").open("a") as file:
        file.write(torn)
    assert Run(tmp_path).history.step.tolist() == [1, 2, 3]
    # Nor does it spoil the line that follows once the run goes on.
    resumed = Record.resume(record.folder, about(), None, step=3)
    resumed.append(row(4))
    assert Run(tmp_path).history.step.tolist() == [1, 2, 3, 4]


def test_a_report_torn_off_was_never_there(tmp_path: Path) -> None:
    record = filled(tmp_path / "spectra", range(1, 3))
    leftover = record.folder / ".activation-validate-000000003.npz.17.tmp"
    leftover.write_bytes(b"PK\x03\x04 half of a")
    assert Run(tmp_path).steps("activation") == [1, 2]
    Record.resume(record.folder, about(), None, step=2)
    assert not leftover.exists()


def test_a_new_run_sets_an_old_one_aside(tmp_path: Path) -> None:
    for run_id in "abc":
        filled(tmp_path / "spectra", range(1, 3), run_id)
    ids = {path.name: Run(path).about["id"] for path in tmp_path.iterdir()}
    assert ids == {"spectra": "c", "spectra-1": "a", "spectra-2": "b"}


def test_resuming_goes_on_and_sets_aside_what_comes_after_the_checkpoint(tmp_path: Path) -> None:
    filled(tmp_path / "spectra", range(1, 6))
    record = Record.resume(tmp_path / "spectra", about(), None, step=3)
    assert Run(tmp_path).steps("activation") == [1, 2, 3]
    assert Run(tmp_path).history.step.tolist() == [1, 2, 3]
    assert Run(tmp_path / "spectra-1").steps("activation") == [4, 5]
    assert Run(tmp_path / "spectra-1").history.step.tolist() == [1, 2, 3, 4, 5]
    record.write_report("activation-validate", 4, arrays(40.0))
    assert Run(tmp_path).steps("activation") == [1, 2, 3, 4]
    assert Run(tmp_path).about["resumed"] == [3]
    Record.resume(tmp_path / "spectra", about(), None, step=4)
    assert Run(tmp_path).about["resumed"] == [3, 4]
    assert not (tmp_path / "spectra-2").exists()


def test_a_run_resumed_elsewhere_takes_what_it_had_with_it(tmp_path: Path) -> None:
    old = filled(tmp_path / "version_0" / "spectra", range(1, 6))
    Record.resume(tmp_path / "version_1" / "spectra", about(), old.folder, step=3)
    assert Run(tmp_path / "version_0").steps("activation") == [1, 2, 3, 4, 5]
    assert Run(tmp_path / "version_1").steps("activation") == [1, 2, 3]
    assert Run(tmp_path / "version_1").history.step.tolist() == [1, 2, 3]


def test_a_run_whose_record_is_gone_starts_one(tmp_path: Path) -> None:
    Record.resume(tmp_path / "spectra", about(), tmp_path / "gone", step=3).append(row(4))
    assert Run(tmp_path).history.step.tolist() == [4]


def test_facts_of_the_interrupted_run_stay(tmp_path: Path) -> None:
    record = filled(tmp_path / "spectra", range(1, 3))
    record.describe(batch_tokens=512.0, validation_data={"0": "ab"}, device="that of before")
    Record.resume(record.folder, about(device="that of now"), None, step=2)
    found = Run(tmp_path).about
    assert (found["batch_tokens"], found["validation_data"], found["device"]) == (512.0, {"0": "ab"}, "that of now")


def test_a_kill_while_a_record_moves_in_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    old = filled(tmp_path / "version_0" / "spectra", range(1, 6))
    copied = []

    def killed(source: Path, target: Path) -> None:
        if len(copied) == 3:
            raise KeyboardInterrupt
        copied.append(target)

    monkeypatch.setattr("shutil.copyfile", killed)
    folder = tmp_path / "version_1" / "spectra"
    with pytest.raises(KeyboardInterrupt):
        Record.resume(folder, about(), old.folder, step=4)
    assert not folder.exists()
    monkeypatch.undo()
    Record.resume(folder, about(), old.folder, step=4)
    assert Run(folder).steps("activation") == [1, 2, 3, 4]
    assert Run(folder).history.step.tolist() == [1, 2, 3, 4]


def test_a_folder_of_somebody_else_is_left_alone(tmp_path: Path) -> None:
    folder = tmp_path / "spectra"
    folder.mkdir()
    (folder / "mine.txt").write_text("of use to me")
    with pytest.raises(ValueError, match=r"holds files that are no record of a run: move them$"):
        Record.begin(folder, about())
    assert [path.name for path in folder.iterdir()] == ["mine.txt"]


def test_two_runs_in_one_folder_do_not_mix(tmp_path: Path) -> None:
    first = filled(tmp_path / "spectra", range(1, 3), "a")
    filled(tmp_path / "spectra", range(1, 2), "b")
    with pytest.raises(ValueError, match="give each run a log directory of its own"):
        first.append(row(3))
    with pytest.raises(ValueError, match="is no longer the record of this run"):
        first.write_report("activation-validate", 3, arrays(30.0))
    assert Run(tmp_path).steps("activation") == [1]


def broken(folder: Path, kind: str) -> None:
    record = filled(folder / "spectra", range(1, 3)).folder
    if kind == "no folder":
        record.rename(folder / "elsewhere")
    elif kind == "empty folder":
        for path in record.iterdir():
            path.unlink()
    elif kind == "other json":
        (record / "run.json").write_text('{"loss": 3}')
    elif kind == "no json":
        (record / "run.json").write_bytes(b"\x80\x81 no text")
    elif kind == "future":
        (record / "run.json").write_text(json.dumps(about(format=99)))
    elif kind == "other csv":
        (record / "history.csv").write_text("epoch,loss\n1,2\n")
    elif kind == "no csv":
        (record / "history.csv").unlink()
    elif kind == "no npz":
        (record / "activation-validate-000000001.npz").write_bytes(b"PK\x03\x04 half of a")
    elif kind == "pickle":
        pickled = np.asarray([{"a": 1}], dtype=object)
        np.savez(record / "activation-validate-000000001.npz", **{**arrays(1.0), "activation/b.0/eigenvalues": pickled})
    elif kind == "fewer arrays":
        np.savez(record / "activation-validate-000000001.npz", **{"activation/b.0/eigenvalues": np.ones(3)})


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("no folder", "run must be a folder with a record, got .*: it has no run.json"),
        ("empty folder", "run must be a folder with a record, got .*: it has no run.json"),
        ("other json", "its run.json is something else's"),
        ("no json", "run has a broken record: .*run.json' cannot be read"),
        ("future", "run has a record of format 99, this version reads 1"),
        (
            "other csv",
            r"line 1 of .*history.csv' must hold step, tokens, seconds, train_loss, val_loss, got 'epoch,loss'",
        ),
        ("no csv", "run has a broken record: .*history.csv' cannot be read"),
        ("no npz", "run has a broken record: .*000000001.npz' cannot be read"),
        ("pickle", "run has a broken record: .*000000001.npz' cannot be read"),
        ("fewer arrays", "run has a broken record: .*000000001.npz' cannot be read"),
    ],
)
def test_a_broken_record_is_one_line(tmp_path: Path, kind: str, message: str) -> None:
    broken(tmp_path, kind)

    def read() -> None:
        run = Run(tmp_path)
        assert len(run.history.step) == 2
        run.spectrum("activation", "b.0", 1)

    with pytest.raises(ValueError, match=message) as raised:
        read()
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda run: run.spectrum("gradient", "b.0", 1), "kind must be one that .* has a report of, activation, "),
        (lambda run: run.spectrum("activation", "b.7", 1), "name must be one of b.0 for 'activation' in .*, got 'b.7'"),
        (lambda run: run.spectrum("activation", "b.0", 7), "step must be one of 1, 2 for 'activation' in .*, got 7"),
    ],
)
def test_what_is_not_there_is_named(tmp_path: Path, call, message: str) -> None:
    filled(tmp_path / "spectra", range(1, 3))
    with pytest.raises(ValueError, match=message):
        call(Run(tmp_path))


def test_runs_are_found_by_pattern(tmp_path: Path) -> None:
    for name in ("v0", "v1", "other"):
        filled(tmp_path / name / "spectra", range(1, 3), name)
    (tmp_path / "v2").mkdir()
    assert [run.path.name for run in open_runs(str(tmp_path / "v*"))] == ["v0", "v1"]
    assert [run.path.name for run in open_runs([tmp_path / "v1", str(tmp_path / "v?" / "spectra")])] == ["v1", "v0"]
    with pytest.raises(ValueError, match=r"base must name runs with a record, got .*x\*': no folder with one matches"):
        open_runs(str(tmp_path / "x*"), "base")


def test_brackets_in_folders_are_brackets_first(tmp_path: Path) -> None:
    for name in ("lr=[1]/a0", "lr=[1]/a1", "lr=[1]/b[2]", "lr=1/a0"):
        filled(tmp_path / name / "spectra", range(1, 3), name)
    found = {
        pattern: [str(run.path.relative_to(tmp_path)) for run in open_runs(str(tmp_path / pattern))]
        for pattern in ("lr=[1]/a*", "lr=[1]/a[01]", "lr=[1]/b[2]", "lr=*]/b[2]*", "lr=[0-9]/a*")
    }
    assert list(found.values()) == [
        ["lr=[1]/a0", "lr=[1]/a1"],
        ["lr=[1]/a0", "lr=[1]/a1"],
        ["lr=[1]/b[2]"],
        ["lr=[1]/b[2]"],
        ["lr=1/a0"],
    ]


def test_validation_rows_are_what_a_kind_means(tmp_path: Path) -> None:
    series = {f"activation-{stage}": {"kind": "activation", "stage": stage} for stage in ("train", "validate")}
    record = Record.begin(tmp_path / "spectra", about(series=series))
    record.write_report("activation-train", 1, arrays(10.0))
    assert Run(tmp_path).steps("activation") == [1]
    record.write_report("activation-validate", 2, arrays(20.0))
    run = Run(tmp_path)
    assert run.steps("activation") == [2]
    assert run.steps("activation-train") == [1]
    assert run.spectrum("activation-train", "b.0", 1).step == 1
    assert run.names("activation-train") == ["b.0"]


LOSSES = [4.0, 3.0, 2.0, 2.5, 1.0]


@pytest.fixture
def falling(tmp_path: Path) -> Run:
    """Tokens double from step to step; eigenvalue exponents grow by one from report to report."""
    record = Record.begin(tmp_path / "spectra", about())
    for index, loss in enumerate(LOSSES):
        step, tokens = index + 1, 1000.0 * 2**index
        record.append(Row(step, tokens, tokens / 100, nan, loss))
        values = np.arange(1, 33.0) ** -(index + 1.0)
        record.write_report("activation-validate", step, arrays(tokens, values))
    return Run(tmp_path)


@pytest.mark.parametrize(
    ("loss", "tokens"),
    [
        (4.0, 1000.0),
        (3.0, 2000.0),
        (3.5, 1000 * 2**0.5),
        (2.25, 2000 * 2**0.75),
        (2.2, 2000 * 2**0.8),  # the first crossing, not that after the loss rose again
        (1.0, 16000.0),
        (1.25, 8000 * 2 ** (1.25 / 1.5)),
        (0.9, nan),
        (4.5, nan),
    ],
)
def test_tokens_to_a_loss_are_interpolated_in_their_logarithm(falling: Run, loss: float, tokens: float) -> None:
    found = falling.tokens_to(loss)
    assert found == pytest.approx(tokens, rel=1e-12, nan_ok=True)
    at = falling.at_loss(loss)
    assert at.seconds == pytest.approx(tokens / 100, rel=1e-12, nan_ok=True)
    assert isnan(at.step) == isnan(tokens)


def test_spectrum_at_a_loss_lies_between_the_reports(falling: Run) -> None:
    # Half way in log tokens between exponents 1 and 2.
    spectrum = falling.at_loss(3.5).spectrum("activation", "b.0")
    np.testing.assert_allclose(spectrum, np.arange(1, 33.0) ** -1.5, rtol=1e-12)
    assert spectrum.exponent((1, 32))[0] == pytest.approx(1.5)
    np.testing.assert_array_equal(
        falling.at_loss(3.0).spectrum("activation", "b.0"), falling.spectrum("activation", "b.0", 2)
    )
    never = falling.at_loss(0.5).spectrum("activation", "b.0")
    assert np.isnan(never).all()
    assert never.failure == "the loss was never reached"


def test_a_run_without_validation_is_judged_by_its_training_loss(tmp_path: Path) -> None:
    record = Record.begin(tmp_path / "spectra", about())
    for step, loss in ((1, 2.0), (2, 1.0)):
        record.append(Row(step, 100.0 * step, 1.0, loss, nan))
    assert Run(tmp_path).history.loss_name == "train_loss"
    assert Run(tmp_path).tokens_to(1.0) == 200.0


def test_reports_list_nothing_else(tmp_path: Path) -> None:
    record = filled(tmp_path / "spectra", range(1, 3))
    (record.folder / "notes.npz").write_bytes(b"")
    (record.folder / "activation-validate-7.npz").write_bytes(b"")
    assert [report.step for report in reports(record.folder)] == [1, 2]
    assert len(read_history(record.folder)) == 2


KILL = """
import os, sys, threading, signal, time
import numpy as np
from pathlib import Path
from tests.runs.test_record import about, arrays, row
from lightning_spectral.runs import Record
record = Record.begin(Path(sys.argv[1]), about())
print("ready", flush=True)
step = 0
while True:
    step += 1
    record.write_report("activation-validate", step, arrays(10.0 * step, np.ones(20000)))
    record.append(row(step))
    os.write(1, f"{step}\\n".encode())
"""


def test_a_writer_killed_in_mid_write_leaves_whole_files(tmp_path: Path) -> None:
    command = [sys.executable, "-c", KILL, str(tmp_path / "spectra")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parents[2]) as writer:
        assert writer.stdout is not None
        lines = iter(writer.stdout)
        while next(lines).strip() != "137":
            pass
        writer.kill()
        done = 137 + sum(1 for _ in lines)
    run = Run(tmp_path)
    steps = run.steps("activation")
    assert steps[:done] == list(range(1, done + 1))
    for step in steps:
        assert len(run.spectrum("activation", "b.0", step).values) == 20000
    assert run.history.step.tolist()[:done] == list(range(1, done + 1))
