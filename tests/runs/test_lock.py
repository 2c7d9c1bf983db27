"""One process holds a lock; what a process left behind that is no more holds nobody up."""

import json
import os
import signal
from pathlib import Path

import pytest

from lightning_spectral.runs.lock import Holder, Lock


def content(lock: Lock) -> dict:
    return json.loads(lock.path.read_text())


def write(folder: Path, **facts) -> Path:
    """A lock as a process would have left it that differs from this one in some facts."""
    path = Lock.path_of(folder)
    path.write_text(json.dumps(Holder.this_process()._asdict() | {"token": "other"} | facts))
    return path


def held(lock: Lock | Holder | None) -> Lock:
    assert isinstance(lock, Lock)
    return lock


def child_that_waits() -> int:
    child = os.fork()
    if child == 0:
        signal.pause()
        os._exit(0)
    return child


def test_a_lock_names_its_holder_and_is_gone_after_release(tmp_path: Path) -> None:
    lock = held(Lock.take(tmp_path / "logs" / "spectra"))
    assert lock.path == tmp_path / "logs" / ".spectra.lock"
    assert content(lock)["pid"] == os.getpid()
    assert isinstance(content(lock)["start"], int)
    second = Lock.take(tmp_path / "logs" / "spectra")
    assert isinstance(second, Holder)
    assert str(second).startswith(f"process {os.getpid()} on ")
    lock.release()
    lock.release()
    assert not list((tmp_path / "logs").iterdir())
    held(Lock.take(tmp_path / "logs" / "spectra")).release()


def test_another_process_that_lives_keeps_it_and_a_dead_one_does_not(tmp_path: Path) -> None:
    child = child_that_waits()
    try:
        start = int(Path(f"/proc/{child}/stat").read_text().rpartition(")")[2].split()[19])
        write(tmp_path / "spectra", pid=child, start=start)
        assert isinstance(Lock.take(tmp_path / "spectra"), Holder)
        os.kill(child, signal.SIGKILL)
        # Dead, though nobody has waited for it yet.
        os.waitid(os.P_PID, child, os.WEXITED | os.WNOWAIT)
        lock = held(Lock.take(tmp_path / "spectra"))
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    lock.release()
    write(tmp_path / "spectra", pid=child, start=start)
    held(Lock.take(tmp_path / "spectra")).release()


@pytest.mark.parametrize(
    ("facts", "is_held"),
    [
        ({"host": "another"}, True),
        ({"host": "another", "boot": "another", "pid": 2**30}, True),
        ({"space": "pid:[1]", "pid": 2**30}, True),  # a container's number says nothing outside it
        ({"boot": "before the machine was started anew"}, False),
        ({"pid": os.getppid(), "start": 1}, False),  # another process had that number
        ({"pid": 2**30}, False),
        ({}, False),  # of this very process, which knows that it holds none
    ],
    ids=str,
)
def test_who_counts_as_gone(tmp_path: Path, facts: dict, is_held: bool) -> None:
    path = write(tmp_path / "spectra", **facts)
    before = path.read_text()
    lock = Lock.take(tmp_path / "spectra")
    assert isinstance(lock, Lock) != is_held
    assert (path.read_text() == before) == is_held
    if isinstance(lock, Lock):
        lock.release()
    assert [one.name for one in tmp_path.iterdir()] == ([".spectra.lock"] if is_held else [])


@pytest.mark.parametrize("text", ["", '{"pid": 3', "[]", '{"pid": "x"}', '{"pid": -1, "host": "h"}', "\x00" * 20])
def test_a_lock_without_sense_is_waited_for_a_minute(tmp_path: Path, text: str) -> None:
    """Its process may be about to write it, or died over it."""
    path = Lock.path_of(tmp_path / "spectra")
    path.write_text(text)
    assert Lock.take(tmp_path / "spectra") is None
    os.utime(path, (1e9, 1e9))
    held(Lock.take(tmp_path / "spectra")).release()


def test_a_lock_that_was_taken_over_stays_with_its_new_holder(tmp_path: Path) -> None:
    lock = held(Lock.take(tmp_path / "spectra"))
    path = write(tmp_path / "spectra", host="another")
    lock.release()
    assert json.loads(path.read_text())["host"] == "another"


def test_of_many_at_once_one_gets_a_lock_that_was_left_behind(tmp_path: Path) -> None:
    for number in range(5):
        folder = tmp_path / str(number)
        write(folder, pid=2**30)
        (reading, writing), (told, tell) = os.pipe(), os.pipe()
        children = []
        for _ in range(6):
            children.append(os.fork())
            if children[-1] == 0:
                os.close(tell)
                os.read(told, 1)  # until all are there
                lock = Lock.take(folder)
                os.write(writing, b"1" if isinstance(lock, Lock) else b"0")
                signal.pause()
        os.close(tell)
        os.close(told)
        answers = b""
        while len(answers) < len(children):
            answers += os.read(reading, 1)
        for child in children:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
        os.close(reading)
        os.close(writing)
        assert answers.count(b"1") == 1
        assert [path.name for path in tmp_path.glob(f".{number}.lock*")] == [f".{number}.lock"]


def test_whoever_comes_late_to_a_lock_that_was_left_behind_leaves_it_to_the_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between finding it and taking it over another process does the same, from end to end."""
    write(tmp_path / "spectra", pid=2**30)
    make = Lock._make
    firsts = []

    def late(path: Path) -> Lock | None:
        if path != Lock.path_of(tmp_path / "spectra") and not firsts:
            monkeypatch.setattr(Lock, "_make", make)
            firsts.append(Lock.take(tmp_path / "spectra"))
        return make(path)

    monkeypatch.setattr(Lock, "_make", late)
    assert isinstance(Lock.take(tmp_path / "spectra"), Holder)
    held(firsts[0]).release()
    assert not list(tmp_path.iterdir())


def test_a_process_that_died_while_it_took_a_lock_over_holds_nobody_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(tmp_path / "spectra", pid=2**30)
    child = os.fork()
    if child == 0:
        monkeypatch.setattr(Lock, "_move", lambda lock, path: os._exit(0))
        Lock.take(tmp_path / "spectra")
        os._exit(1)
    assert os.waitpid(child, 0)[1] == 0
    assert len(list(tmp_path.iterdir())) == 2
    lock = held(Lock.take(tmp_path / "spectra"))
    assert [one.name for one in tmp_path.iterdir()] == [path.name]
    lock.release()
    assert not list(tmp_path.iterdir())
