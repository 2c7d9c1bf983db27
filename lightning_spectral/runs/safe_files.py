"""Reading files that anybody may have written: regular ones only, of a stated size, and archives that cannot grow."""

import io
import os
import stat
import struct
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from math import prod
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

MAX_TEXT = 2**28
"""Bytes of a description or a history: 256 MiB are some three million lines."""
MAX_ARRAYS = 2**30
"""Bytes of all arrays of a report: 1 GiB is ten times the spectra and bases of 100 layers of width 4,096."""
MAX_DIRECTORY = 2**26
"""Bytes of an archive's own directory: 64 MiB are some 500,000 arrays."""
_MAX_HEADER = 10_000
"""NumPy's own limit."""

_KINDS = {"f": "float", "i": "int", "u": "int", "b": "bool", "U": "text"}
"""Types of arrays, by NumPy's letter; objects would have to be unpickled."""


@contextmanager
def open_regular(path: Path) -> Iterator[BinaryIO]:
    """A file open for reading; ValueError for a pipe, a device or a folder, which might never end, or never begin."""
    _check_regular(os.stat(path))
    # Not to wait for whoever may have put a pipe there since.
    descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    with open(descriptor, "rb") as file:
        _check_regular(os.fstat(descriptor))
        yield file


def read_text(path: Path, errors: str = "strict") -> str:
    """The text of a regular file of up to 256 MiB; ValueError, or OSError, saying why it cannot be read.

    ``errors`` is what becomes of bytes that are no text, as ``bytes.decode`` has it.
    """
    with open_regular(path) as file:
        data = file.read(MAX_TEXT + 1)
    if len(data) > MAX_TEXT:
        raise ValueError(f"it has more than {MAX_TEXT:,} bytes")
    return data.decode("utf-8", errors)


@contextmanager
def open_archive(path: Path) -> Iterator[BinaryIO]:
    """An ``.npz`` open for reading; ValueError for one whose directory says that it is larger than any of ours."""
    with open_regular(path) as file:
        size = file.seek(0, os.SEEK_END)
        if size > MAX_ARRAYS:
            raise ValueError(f"it has {size:,} bytes, more than {MAX_ARRAYS:,}")
        _check_directory(file, size)
        with zipfile.ZipFile(file) as archive:
            entries = archive.infolist()
        if len({entry.filename for entry in entries}) < len(entries):
            raise ValueError("it holds arrays of one name twice")
        total = sum(entry.file_size for entry in entries)
        if total > MAX_ARRAYS:
            raise ValueError(f"its arrays take {total:,} bytes, more than {MAX_ARRAYS:,}")
        file.seek(0)
        yield file


@contextmanager
def open_arrays(path: Path) -> Iterator["Arrays"]:
    """The arrays in an ``.npz``; ValueError as for :func:`open_archive`."""
    with open_archive(path) as file, zipfile.ZipFile(file) as archive:
        yield Arrays(archive)


class Arrays(Mapping[str, np.ndarray]):
    """Arrays by name, each read when it is asked for, after its size was checked.

    Args:
        archive: Open for reading, its sizes checked.
    """

    def __init__(self, archive: zipfile.ZipFile) -> None:
        entries = [entry for entry in archive.infolist() if entry.filename.endswith(".npy")]
        self._archive = archive
        self._entries = {entry.filename.removesuffix(".npy"): entry for entry in entries}

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, name: object) -> bool:
        return name in self._entries

    def __getitem__(self, name: str) -> np.ndarray:
        entry = self._entries.get(name)
        if entry is None:
            raise ValueError(f"it has no {name}")
        if entry.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            raise ValueError(f"{name} is compressed by method {entry.compress_type}")
        with self._archive.open(entry) as member:
            # Never more than the directory says, whatever lies there.
            data = io.BytesIO(member.read(entry.file_size))
        shape, is_transposed, dtype = _header(name, data)
        if prod(shape) * dtype.itemsize != entry.file_size - data.tell():
            raise ValueError(f"{name} is said to have the shape {_short(shape)}, and has not so many numbers")
        found = np.frombuffer(data.getbuffer()[data.tell() :], dtype)
        return found.reshape(shape, order="F" if is_transposed else "C").copy()


def _header(name: str, data: io.BytesIO) -> tuple[Any, bool, np.dtype]:
    version = np.lib.format.read_magic(data)
    if version == (1, 0):
        found = np.lib.format.read_array_header_1_0(data, max_header_size=_MAX_HEADER)
    elif version == (2, 0):
        found = np.lib.format.read_array_header_2_0(data, max_header_size=_MAX_HEADER)
    else:
        raise ValueError(f"{name} is of a version {version} of NumPy's format that no record has")
    if found[2].hasobject or found[2].kind not in _KINDS:
        raise ValueError(f"{name} holds {found[2]}, and neither numbers nor text")
    return found


def _check_directory(file: BinaryIO, size: int) -> None:
    """Refuse, by a ValueError, an archive whose directory alone would fill the memory: it is read as a whole."""
    tail = max(size - (22 + 2**16), 0)
    file.seek(tail)
    end = file.read()
    at = end.rfind(b"PK\x05\x06")
    if at >= 0 and len(end) >= at + 22:
        (length,) = struct.unpack_from("<I", end, at + 12)
        if length > MAX_DIRECTORY:
            raise ValueError(f"its directory takes {length:,} bytes, more than {MAX_DIRECTORY:,}")
    file.seek(0)


def _check_regular(status: os.stat_result) -> None:
    if not stat.S_ISREG(status.st_mode):
        kinds = {stat.S_IFDIR: "a folder", stat.S_IFIFO: "a pipe", stat.S_IFSOCK: "a socket"}
        raise ValueError(f"it is {kinds.get(stat.S_IFMT(status.st_mode), 'a device')} and no regular file")


def _short(shape: Any) -> str:
    text = str(shape)
    return text if len(text) <= 60 else f"{text[:56]} ..."
