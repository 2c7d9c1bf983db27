"""A lock on a record's folder, so that two processes never write into one; nobody ever waits for it."""

import hashlib
import json
import os
import socket
import time
import uuid
import weakref
from pathlib import Path
from typing import NamedTuple

_PATIENCE = 60.0
"""Seconds after which a lock without content was left by a process that died while it wrote it."""

_held: "weakref.WeakValueDictionary[str, Lock]" = weakref.WeakValueDictionary()
"""Locks of this process, by path."""


class Holder(NamedTuple):
    """The process that holds a lock."""

    pid: int
    host: str
    boot: str | None
    """Since the machine was started; None where the system does not tell."""
    space: str | None
    """The namespace that the number is of: containers on one machine do not see each other's processes."""
    start: int | None
    """When the process started, in ticks since then: another process of the same number has another."""
    since: str
    """When it took the lock."""

    @classmethod
    def this_process(cls) -> "Holder":
        """Who would hold a lock that is taken here."""
        pid = os.getpid()
        return cls(pid, socket.gethostname(), _boot(), _space(), _start_of(pid), time.strftime("%Y-%m-%dT%H:%M:%S%z"))

    @property
    def is_gone(self) -> bool:
        """Whether the process is known to be no more; of other machines, and other containers, nothing is known."""
        if self.host != socket.gethostname():
            return False
        if self.boot != _boot():
            return True
        return self.space == _space() and not self._is_running()

    def _is_running(self) -> bool:
        if (stat := _stat_of(self.pid)) is not None:
            return stat.state not in "ZX" and stat.start == self.start
        if os.name != "posix":  # where signal 0 is none that only asks
            return True
        try:
            os.kill(self.pid, 0)
        except ProcessLookupError:
            return False
        except OSError:  # somebody else's
            pass
        return True

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host} since {self.since}"


class Lock:
    """The right to write into a folder, from :meth:`take` to :meth:`release`.

    A file beside the folder, made with ``O_EXCL``, which network file systems keep to as well, names process, machine
    and start of the process. One whose process is gone, or never finished writing it, is taken over: by whoever holds
    the lock on taking over just that one, so that of many who find it one gets it.
    """

    def __init__(self, path: Path, token: str) -> None:
        self.path = path
        self._token = token

    @classmethod
    def take(cls, folder: Path) -> "Lock | Holder | None":
        """The lock on a folder, which need not exist; else its holder, or None for one that cannot be told.

        OSError if no file can be written there.
        """
        path = cls.path_of(folder)
        path.parent.mkdir(parents=True, exist_ok=True)
        return cls._take(path)

    @classmethod
    def _take(cls, path: Path) -> "Lock | Holder | None":
        for _ in range(8):  # with others at the same time
            lock = cls._make(path)
            if lock is not None:
                return lock
            found = _Found.at(path)
            if found is None:
                continue
            if not found.is_left_behind:
                return found.holder
            claim = cls._take(path.with_name(f"{path.name}.{found.name}"))
            if not isinstance(claim, Lock):
                return claim
            if _Found.at(path) == found:  # nobody else may change it now
                claim._move(path)
                return claim
            claim.release()
        return None

    @staticmethod
    def path_of(folder: Path) -> Path:
        """Where the lock on a folder is."""
        return folder.with_name(f".{folder.name}.lock")

    @classmethod
    def _make(cls, path: Path) -> "Lock | None":
        try:
            descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
        except FileExistsError:
            return None
        token = uuid.uuid4().hex
        try:
            try:
                os.write(descriptor, json.dumps(Holder.this_process()._asdict() | {"token": token}).encode())
                if not _is_at(path, descriptor):  # taken over from a process that was held up between the two
                    return None
            finally:
                os.close(descriptor)
        except OSError:
            path.unlink(missing_ok=True)
            raise
        lock = _held[str(path)] = cls(path, token)
        return lock

    def _move(self, path: Path) -> None:
        self.path.replace(path)
        _held.pop(str(self.path), None)
        self.path = path
        _held[str(path)] = self

    def release(self) -> None:
        """Let others write there; a file that is somebody else's by now stays."""
        _held.pop(str(self.path), None)
        if f'"{self._token}"' in (_read(self.path) or ""):
            self.path.unlink(missing_ok=True)


class _Found(NamedTuple):
    """A lock that is somebody else's: the file, and what stands in it."""

    path: Path
    content: str
    inode: int
    changed: int

    @classmethod
    def at(cls, path: Path) -> "_Found | None":
        """What is there; None for no file."""
        try:
            with path.open(encoding="utf-8", errors="replace") as file:
                stat = os.fstat(file.fileno())
                return cls(path, file.read(), stat.st_ino, stat.st_mtime_ns)
        except OSError:
            return None

    @property
    def holder(self) -> Holder | None:
        """Who made it, where it says so."""
        return _parse(self.content)

    @property
    def name(self) -> str:
        """Of this lock and no other that ever is at its path."""
        return hashlib.sha256(repr(self[1:]).encode()).hexdigest()[:16]

    @property
    def is_left_behind(self) -> bool:
        """Whether its process is gone, or has not written it in a minute."""
        if self.holder is None:
            return time.time() - self.changed / 1e9 > _PATIENCE
        if self.holder[:-1] == Holder.this_process()[:-1]:
            return str(self.path) not in _held  # of a run of this process that ended without a word
        return self.holder.is_gone


def _is_at(path: Path, descriptor: int) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except OSError:
        return False


def _read(path: Path) -> str | None:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None


def _parse(content: str) -> Holder | None:
    try:
        found = json.loads(content)
        holder = Holder(*(found[name] for name in Holder._fields))
    except (ValueError, TypeError, KeyError, RecursionError):
        return None
    return holder if isinstance(holder.pid, int) and 0 < holder.pid < 2**31 else None


def _boot() -> str | None:
    found = _read(Path("/proc/sys/kernel/random/boot_id"))
    return None if found is None else found.strip()


def _space() -> str | None:
    try:
        return os.readlink("/proc/self/ns/pid")
    except OSError:
        return None


class _Stat(NamedTuple):
    """What proc(5) says of a process: its state, ``Z`` for one that only waits to be reaped, and when it started."""

    state: str
    start: int


def _stat_of(pid: int) -> _Stat | None:
    found = _read(Path(f"/proc/{pid}/stat"))
    if found is None:
        return None
    fields = found.rpartition(")")[2].split()  # the name before may hold spaces and brackets
    return _Stat(fields[0], int(fields[19]))


def _start_of(pid: int) -> int | None:
    stat = _stat_of(pid)
    return None if stat is None else stat.start
