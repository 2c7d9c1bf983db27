"""Where runs record while others record in the same folder, and after a resume with other settings."""

import json
import os
import signal
from math import nan
from pathlib import Path

import pytest
from lightning.pytorch.callbacks import Callback, ModelCheckpoint

from lightning_spectral import Run
from lightning_spectral.cli import main
from lightning_spectral.recording import recorder
from lightning_spectral.recording.place import Place
from lightning_spectral.runs import Record, Row
from lightning_spectral.runs.lock import Holder, Lock
from lightning_spectral.runs.record import read_history
from tests.recording.test_recorder import BLOCK, fit, spectra

COMMON = {"limit_train_batches": 1, "val_check_interval": None, "check_val_every_n_epoch": 4, "max_epochs": -1}
RESUMED = pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")


def interrupted(folder: Path, *callbacks: Callback, steps: int = 8) -> Path:
    """A run with a checkpoint at its end; returns that."""
    saving = ModelCheckpoint(folder / "checkpoints", "at", every_n_epochs=steps, save_on_train_epoch_end=True)
    fit(folder, *callbacks, saving, max_steps=steps, enable_checkpointing=True, **COMMON)
    return folder / "checkpoints" / "at.ckpt"


@pytest.fixture
def other_process(tmp_path: Path):
    """A process that lives, and holds the lock on the record."""
    child = os.fork()
    if child == 0:
        signal.pause()
        os._exit(0)
    start = int(Path(f"/proc/{child}/stat").read_text().rpartition(")")[2].split()[19])
    holder = Holder.this_process()._replace(pid=child, start=start)
    Lock.path_of(tmp_path / "spectra").write_text(json.dumps(holder._asdict() | {"token": "other"}))
    yield child
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)


def let_fall(folder: Path) -> None:
    """Give a run the losses of one that learns."""
    rows = read_history(folder / "spectra")
    (folder / "spectra" / "history.csv").unlink()
    for row in rows:
        Record(folder / "spectra", Run(folder).about).append(row._replace(val_loss=5 - row.step / 8))


class Locked(Callback):
    """Notes, as training goes on, whether there is a lock."""

    def __init__(self) -> None:
        self.seen: list[bool] = []

    def on_train_batch_end(self, trainer, *_) -> None:
        self.seen.append(Lock.path_of(Path(trainer.default_root_dir) / "spectra").exists())
        if len(self.seen) == 9:
            raise RuntimeError("stop")


def test_a_run_holds_its_folder_while_it_trains_and_not_after(tmp_path: Path) -> None:
    locked = Locked()
    fit(tmp_path / "a", spectra(), locked, max_steps=8)
    assert locked.seen == [True] * 8
    with pytest.raises(RuntimeError, match="stop"):
        fit(tmp_path / "b", spectra(), Locked(), max_steps=12)
    assert not list(tmp_path.glob("*/.*"))


@RESUMED
def test_a_run_resumed_beside_another_records_beside_it_and_goes_on_there(tmp_path: Path, other_process: int) -> None:
    lock = Lock.path_of(tmp_path / "spectra")
    content = lock.read_text()
    lock.unlink()
    checkpoint = interrupted(tmp_path, spectra())
    lock.write_text(content)
    before = {path.name: path.read_bytes() for path in (tmp_path / "spectra").iterdir()}
    where = rf"records beside, in .*spectra-1: .*spectra is written by process {other_process} on .* since .* remove "
    saving = ModelCheckpoint(tmp_path / "saved", "later", every_n_epochs=12, save_on_train_epoch_end=True)
    with pytest.warns(UserWarning, match=where):
        fit(tmp_path, spectra(), saving, max_steps=12, ckpt_path=checkpoint, enable_checkpointing=True, **COMMON)
    assert {path.name: path.read_bytes() for path in (tmp_path / "spectra").iterdir()} == before
    assert lock.read_text() == content
    assert Run(tmp_path / "spectra-1").steps("activation") == [4, 8, 12]
    assert Run(tmp_path / "spectra-1").id == Run(tmp_path).id
    # Later, whether or not the other is still there.
    fit(tmp_path, spectra(), max_steps=16, ckpt_path=tmp_path / "saved" / "later.ckpt", **COMMON)
    assert Run(tmp_path / "spectra-1").history.step.tolist() == [4, 8, 12, 16]
    assert Run(tmp_path).history.step.tolist() == [4, 8]
    assert sorted(path.name for path in tmp_path.glob("*spectra*")) == [".spectra.lock", "spectra", "spectra-1"]


def test_a_new_run_does_not_push_aside_one_that_records(tmp_path: Path, other_process: int) -> None:
    Record.begin(tmp_path / "spectra", {"id": "other", "series": {}}).append(Row(1, 2.0, 3.0, nan, nan))
    with pytest.warns(UserWarning, match="records beside, in .*spectra-1"):
        fit(tmp_path, spectra(), max_steps=4)
    assert Run(tmp_path).id == "other"
    assert Run(tmp_path / "spectra-1").steps("activation") == [4]


@RESUMED
def test_a_lock_of_a_killed_run_is_taken_over(tmp_path: Path, other_process: int) -> None:
    lock = Lock.path_of(tmp_path / "spectra")
    content = json.loads(lock.read_text())
    lock.unlink()
    checkpoint = interrupted(tmp_path, spectra())
    lock.write_text(json.dumps(content | {"start": content["start"] + 1}))
    fit(tmp_path, spectra(), max_steps=12, ckpt_path=checkpoint, **COMMON)
    assert Run(tmp_path).steps("activation") == [4, 8, 12]
    assert not list(tmp_path.glob("*spectra-1*"))


@RESUMED
def test_resumed_with_another_layer_both_are_there_with_their_spans(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint = interrupted(tmp_path, spectra(layers=[BLOCK]))
    fit(tmp_path, spectra(layers=["network.blocks.[02]"]), max_steps=16, ckpt_path=checkpoint, **COMMON)
    run, new = Run(tmp_path), "network.blocks.2"
    assert run.names("activation") == [BLOCK, new]
    assert run.steps("activation") == run.steps("activation", BLOCK) == [4, 8, 12, 16]
    assert run.steps("activation", new) == [12, 16]
    assert run.settings("activation")["layers"] == [BLOCK, new]
    assert run.settings("activation")["layers_before"] == [[BLOCK]]
    capsys.readouterr()
    for words in ([], ["--json"], ["--plot", f"{tmp_path}/a.png"]):
        main(["show", str(tmp_path), *words])
        shown = capsys.readouterr().out
        if words == ["--json"]:
            rows = json.loads(shown)["runs"][0]["spectra"]
            assert [(row["name"], row["step"]) for row in rows] == [
                *((BLOCK, step) for step in (4, 8, 12, 16)),
                *((new, step) for step in (12, 16)),
            ]
        elif not words:
            assert new in shown


@RESUMED
def test_resumed_with_other_rows_both_series_are_shown_and_compared(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in "abc":
        fit(tmp_path / name, spectra(num_tokens=32), max_steps=16, **COMMON)
    checkpoint = interrupted(tmp_path / "d", spectra(), steps=8)
    fit(tmp_path / "d", spectra(num_tokens=32), max_steps=16, ckpt_path=checkpoint, **COMMON)
    for name in "abcd":
        let_fall(tmp_path / name)
    run = Run(tmp_path / "d")
    assert run.all_series("activation") == ["activation-validate", "activation-validate-2"]
    assert run.series("activation") == "activation-validate"
    assert (run.steps("activation"), run.steps("activation-validate-2")) == ([4, 8], [12, 16])
    capsys.readouterr()
    main(["show", str(tmp_path / "d")])
    shown = " ".join(capsys.readouterr().out.split())
    assert "activation-validate, steps 4 to 8" in shown
    assert "activation-validate-2, steps 12 to 16" in shown
    main(["show", str(tmp_path / "d"), "--json", "--plot", f"{tmp_path}/a.png"])
    rows = json.loads(capsys.readouterr().out)["runs"][0]["spectra"]
    assert {(row["series"], row["step"]) for row in rows} == {
        *(("activation-validate", step) for step in (4, 8)),
        *(("activation-validate-2", step) for step in (12, 16)),
    }
    main(["compare", str(tmp_path / "a"), str(tmp_path / "d"), "--json"])
    series = json.loads(capsys.readouterr().out)["series"]["activation"]
    assert series[str(tmp_path / "d")] == "activation-validate-2"
    main(["compare", str(tmp_path / "a"), str(tmp_path / "d")])
    shown = " ".join(capsys.readouterr().out.split())
    assert "are those of activation-validate-2 (steps 12 to 16), not of activation-validate (steps 4 to 8)" in shown
    main(["forecast", f"{tmp_path}/[abcd]", "--target", "3.2"])
    assert "are those of activation-validate-2" in " ".join(capsys.readouterr().out.split())


@RESUMED
@pytest.mark.parametrize("spoil", [{"format": 99}, None], ids=["format", "torn"])
def test_a_record_that_cannot_be_gone_on_with_is_kept_and_told(tmp_path: Path, spoil: dict | None) -> None:
    checkpoint = interrupted(tmp_path, spectra())
    path = tmp_path / "spectra" / "run.json"
    path.write_text("{" if spoil is None else json.dumps(json.loads(path.read_text()) | spoil))
    files = {path.name: path.read_bytes() for path in (tmp_path / "spectra").iterdir()}
    with pytest.warns(
        UserWarning, match=r"begins a new record in .*, and leaves what was recorded in .*spectra-1: run "
    ):
        fit(tmp_path, spectra(), max_steps=12, ckpt_path=checkpoint, **COMMON)
    assert Run(tmp_path).steps("activation") == [12]
    assert {path.name: path.read_bytes() for path in (tmp_path / "spectra-1").iterdir()} == files


def test_a_record_begins_once_there_is_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Facts that were said before are in it."""
    begin, calls = Record.begin, []

    def full_at_first(*args) -> Record:
        calls.append(args)
        if len(calls) < 3:
            raise OSError(28, "No space left on device", str(tmp_path / f"{len(calls)}.tmp"))
        return begin(*args)

    monkeypatch.setattr(recorder.Record, "begin", full_at_first)
    with pytest.warns(UserWarning, match=r"could not write the record of the run: No space left on device$") as told:
        fit(tmp_path, spectra())
    assert len([one for one in told if "could not write" in str(one.message)]) == 1
    run = Run(tmp_path)
    assert run.steps("activation")[-1] == 12
    assert run.about["val_loss"] == "val_loss"
    assert "batch_tokens" in run.about
    assert not Lock.path_of(tmp_path / "spectra").exists()


def test_lines_and_reports_are_written_again_once_there_is_room(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write, calls = recorder.Record.write_report, []

    def full_in_between(record: Record, series: str, step: int, arrays: dict) -> None:
        calls.append(step)
        if step == 8:
            raise OSError(28, "No space left on device")
        write(record, series, step, arrays)

    monkeypatch.setattr(recorder.Record, "write_report", full_in_between)
    with pytest.warns(UserWarning, match="No space left on device"):
        fit(tmp_path, spectra())
    assert calls == [4, 8, 12]
    assert Run(tmp_path).steps("activation") == [4, 12]
    assert Run(tmp_path).history.step.tolist() == [4, 8, 12]


def test_a_place_is_left_for_the_next(tmp_path: Path) -> None:
    first = Place.take(tmp_path / "spectra", "a", None, 0)
    second = Place.take(tmp_path / "spectra", "b", None, 0)
    third = Place.take(tmp_path / "spectra", "c", None, 0)
    assert [place.folder.name for place in (first, second, third)] == ["spectra", "spectra-1", "spectra-2"]
    assert (first.beside, second.known) == (None, None)
    for place in (first, second, third):
        place.leave()
    assert not list(tmp_path.iterdir())
