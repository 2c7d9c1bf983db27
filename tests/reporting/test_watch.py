"""A run under way in the terminal: the newest one, as its record grows, whatever half-written files lie in it."""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from rich.console import Console

from lightning_spectral import Run
from lightning_spectral.reporting import live
from lightning_spectral.reporting.commands import run_command
from lightning_spectral.reporting.live import Follower
from lightning_spectral.reporting.newest import newest_run
from lightning_spectral.reporting.summary import Failures
from tests.limit import LIMIT
from tests.reporting.conftest import REASON
from tests.runs.made_up import made_up

REPOSITORY = Path(__file__).parents[2]


def text_of(follower: Follower) -> str:
    console = Console(width=160)
    with console.capture() as shown:
        console.print(follower.look_again())
    return shown.get()


def aged(path: Path, seconds: float) -> Path:
    """As if the record had been written to so long ago."""
    then = time.time() - seconds
    for one in (*path.glob("spectra/*"), path / "spectra"):
        os.utime(one, (then, then))
    return path


def test_one_summary_says_how_the_run_stands(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_command(["watch", str(trained), "--once"])
    shown = capsys.readouterr().out
    run = Run(trained)
    losses = run.history.with_loss()[1]
    assert re.search(rf"val_loss +{losses[-1]:.4g} +from {losses[0]:.4g}", shown)
    assert re.search(r"noise scale +(\S+ tokens|not seen) +80%: .*; the batch is 32", shown)
    assert "last written" in shown
    step = run.steps("activation")[-1]
    for name in run.names("activation"):
        exponent = run.spectrum("activation", name, step).exponent((0.125, 0.5))
        assert f"{exponent.value:.3f} +/- {exponent.stderr:.3f}" in shown
    assert "overlap (floor)" in shown


def test_the_newest_run_is_found(tmp_path: Path) -> None:
    for name, seconds in (("a", 50.0), ("b", 10.0), ("c", 90.0)):
        aged(made_up(tmp_path / "logs" / name, 100.0, 1.0), seconds)
    hidden = shutil.copytree(tmp_path / "logs" / "a", tmp_path / "logs" / ".a.tmp")
    assert newest_run(tmp_path) == tmp_path / "logs" / "b" / "spectra"
    assert newest_run(hidden) == hidden / "spectra"
    assert newest_run(tmp_path / "logs" / "c" / "spectra") == tmp_path / "logs" / "c" / "spectra"
    beside = shutil.copytree(tmp_path / "logs" / "c" / "spectra", tmp_path / "logs" / "c" / "spectra-1")
    os.utime(beside / "history.csv")
    assert newest_run(tmp_path) == beside
    (tmp_path / "empty").mkdir()
    assert newest_run(tmp_path / "empty") is None


def test_a_record_is_followed_as_it_grows(tmp_path: Path) -> None:
    path = made_up(tmp_path / "run", 100.0, 1.0)
    later = sorted(path.glob("spectra/*.npz"))[3:]
    kept = [shutil.move(one, tmp_path / one.name) for one in later]
    history = path / "spectra" / "history.csv"
    lines = history.read_text().splitlines(keepends=True)
    history.write_text("".join(lines[:4]))
    follower = Follower(tmp_path)
    assert "step 300, 75 tokens" in text_of(follower)
    # A line that is being written, and a report that is not in its place yet, do not count.
    history.write_text("".join(lines[:4]) + lines[4][:5])
    (path / "spectra" / ".activation-validate-000000400.npz.1.tmp").write_bytes(b"half")
    assert "step 300, 75 tokens" in text_of(follower)
    for one in kept:
        shutil.move(one, path / "spectra")
    history.write_text("".join(lines))
    assert "step 600, 200 tokens" in text_of(follower)


def test_what_cannot_be_read_leaves_what_was_shown(tmp_path: Path) -> None:
    path = made_up(tmp_path / "run", 100.0, 1.0)
    follower = Follower(tmp_path)
    before = text_of(follower)
    last = path / "spectra" / "activation-validate-000000600.npz"
    whole = last.read_bytes()
    last.write_bytes(whole[:100])
    shown = text_of(follower)
    assert "step 600" in before
    assert "step 600" in shown
    assert "run has a broken record" in shown
    last.write_bytes(whole)
    assert "broken" not in text_of(follower)


def test_a_folder_without_a_run_is_waited_for(tmp_path: Path) -> None:
    follower = Follower(tmp_path)
    assert "logdir must hold a run with a record" in text_of(follower)
    made_up(tmp_path / "run", 100.0, 1.0)
    assert "step 600" in text_of(follower)


def test_warnings_of_the_record_stand_below(tmp_path: Path) -> None:
    path = made_up(tmp_path / "run", 100.0, 1.0)
    history = path / "spectra" / "history.csv"
    history.write_text(history.read_text().replace("300,", "300;"))
    assert "torn, as by a full disk" in " ".join(text_of(Follower(tmp_path)).split())


def test_failures_are_counted_once_for_each_report(failed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    failures = Failures()
    counted = failures.count(Run(failed))
    assert counted[:2] == (1, 3)
    assert REASON in counted[2]
    read: list[int] = []
    monkeypatch.setattr(Run, "spectra", lambda self, kind, step, without=(): read.append(step))
    assert failures.count(Run(failed)) == counted
    assert read == []


def test_a_run_without_spectra_is_summed_up(log: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_command(["watch", str(log), "--once"])
    assert re.search(r"val_loss +1\.9 +from 3", capsys.readouterr().out)
    path = made_up(tmp_path / "bare", 100.0, 1.0)
    for report in path.rglob("*.npz"):
        report.unlink()
    run_command(["watch", str(path), "--once"])
    assert re.search(r"val_loss +0\.5 +from 2", capsys.readouterr().out)


WRONG = {
    "nothing": (["watch"], "the following arguments are required: LOGDIR: see lightning-spectral watch --help"),
    "missing": (["watch", "gone"], "logdir must be a folder with runs in it, got 'gone': there is none"),
    "no run": (["watch", ".", "--once"], "logdir must hold a run with a record, got '.': callbacks write one at the"),
    "never": (["watch", ".", "--every", "0"], "every must be a positive number of seconds, got 0: 2 is usual"),
}


@pytest.mark.parametrize(("words", "message"), WRONG.values(), ids=WRONG)
def test_wrong_arguments_are_one_line(
    words: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=f"^{re.escape(message)}") as raised:
        run_command(words)
    assert "\n" not in str(raised.value)


def test_it_looks_again_until_it_is_interrupted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    made_up(tmp_path / "run", 100.0, 1.0)
    waited: list[float] = []

    def wait(seconds: float) -> None:
        waited.append(seconds)
        if len(waited) == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(live.time, "sleep", wait)
    run_command(["watch", str(tmp_path), "--every", "0.5"])
    assert waited == [0.5] * 3
    assert "step 600" in capsys.readouterr().out


def test_ctrl_c_ends_it_without_a_traceback(tmp_path: Path) -> None:
    made_up(tmp_path / "run", 100.0, 1.0)
    with subprocess.Popen(
        [sys.executable, "-u", "-m", "lightning_spectral", "watch", str(tmp_path), "--every", "0.05"],
        cwd=REPOSITORY,
        env=os.environ | {"OMP_NUM_THREADS": "1", "FORCE_COLOR": "1", "TTY_INTERACTIVE": "1", "COLUMNS": "120"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # A suite in the background ignores the signal, and so would what it starts.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    ) as process:
        assert process.stdout is not None
        first = process.stdout.readline()  # it shows something, so it is in its loop, or about to be
        process.send_signal(signal.SIGINT)
        rest, errors = process.communicate(timeout=LIMIT)
    assert "run" in first + rest
    assert errors == ""
    assert process.returncode == 0
