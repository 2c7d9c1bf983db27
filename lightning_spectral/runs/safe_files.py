"""Reading files that anybody may have written: regular ones only, of a stated size, and archives that cannot grow."""

import io
import os
import stat
import struct
import zipfile
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import lru_cache
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

_LOCAL = struct.Struct("<4s22xHH")
"""Of a member's own header its sign and the lengths of name and extra, after which its content begins."""

_VERSIONS = {
    b"\x01\x00": np.lib.format.read_array_header_1_0,
    b"\x02\x00": np.lib.format.read_array_header_2_0,
}
"""Readers of the headers of NumPy's formats."""

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


def read_text(path: Path, errors: str = "strict", limit: int | None = None) -> str:
    """The text of a regular file of up to ``limit`` bytes, 256 MiB; ValueError or OSError if it cannot be read.

    ``errors`` is what becomes of bytes that are no text, as ``bytes.decode`` has it.
    """
    limit = MAX_TEXT if limit is None else limit
    with open_regular(path) as file:
        data = file.read(limit + 1)
    if len(data) > limit:
        raise ValueError(f"it has more than {limit:,} bytes")
    return data.decode("utf-8", errors)


@contextmanager
def open_arrays(path: Path) -> Iterator["Arrays"]:
    """The arrays in an ``.npz``; ValueError for one whose directory says that it is larger than any of ours."""
    with open_regular(path) as file:
        size = file.seek(0, os.SEEK_END)
        if size > MAX_ARRAYS:
            raise ValueError(f"it has {size:,} bytes, more than {MAX_ARRAYS:,}")
        _check_directory(file, size)
        with zipfile.ZipFile(file) as archive:
            members = archive.infolist()
        if len({member.filename for member in members}) < len(members):
            raise ValueError("it holds arrays of one name twice")
        total = sum(member.file_size for member in members)
        if total > MAX_ARRAYS:
            raise ValueError(f"its arrays take {total:,} bytes, more than {MAX_ARRAYS:,}")
        yield Arrays(file, members)


class Arrays(Mapping[str, np.ndarray]):
    """Arrays by name, each read when it is asked for: what ``np.load`` gives, at a fifth of its cost for small ones.

    Args:
        file: An archive open for reading, its sizes checked.
        members: Its directory.
    """

    def __init__(self, file: BinaryIO, members: Sequence[zipfile.ZipInfo]) -> None:
        self._file = file
        arrays = [member for member in members if member.filename.endswith(".npy")]
        self._members = {member.filename.removesuffix(".npy"): member for member in arrays}

    def __iter__(self) -> Iterator[str]:
        return iter(self._members)

    def __len__(self) -> int:
        return len(self._members)

    def __contains__(self, name: object) -> bool:
        return name in self._members

    def __getitem__(self, name: str) -> np.ndarray:
        if name not in self._members:
            raise ValueError(f"it has no {name}")
        content = self._content(name, self._members[name])
        version, start = content[6:8], 10 + int.from_bytes(content[8:10], "little")
        if content[:6] != b"\x93NUMPY" or version not in _VERSIONS:
            raise ValueError(f"{name} is of a version of NumPy's format that no record has")
        if version == b"\x02\x00":
            start = 12 + int.from_bytes(content[8:12], "little")
        if start > _MAX_HEADER:
            raise ValueError(f"{name} has a header of {start:,} bytes, more than {_MAX_HEADER:,}")
        shape, by_columns, dtype = _header(version, content[8:start])
        if dtype.hasobject or dtype.kind not in _KINDS:
            raise ValueError(f"{name} holds {dtype}, and neither numbers nor text")
        if prod(shape) * dtype.itemsize != len(content) - start:
            raise ValueError(f"{name} is said to have the shape {_short(shape)}, and has not so many numbers")
        flat = np.frombuffer(content, dtype, prod(shape), start)
        return flat.reshape(shape, order="F" if by_columns else "C").copy()

    def _content(self, name: str, member: zipfile.ZipInfo) -> bytes:
        """What a member holds, never more than the directory says, whatever lies there."""
        self._file.seek(member.header_offset)
        sign, name_size, extra_size = _LOCAL.unpack(self._file.read(_LOCAL.size))
        if sign != b"PK\x03\x04":
            raise ValueError(f"{name} is not where the directory says")
        self._file.seek(name_size + extra_size, os.SEEK_CUR)
        content = self._file.read(member.compress_size)
        if member.compress_type == zipfile.ZIP_DEFLATED:
            content = zlib.decompressobj(-15).decompress(content, member.file_size + 1)
        elif member.compress_type != zipfile.ZIP_STORED:
            raise ValueError(f"{name} is compressed by method {member.compress_type}")
        if len(content) != member.file_size or zlib.crc32(content) != member.CRC:
            raise ValueError(f"{name} is damaged")
        return content


@lru_cache(maxsize=256)
def _header(version: bytes, header: bytes) -> tuple[tuple[int, ...], bool, np.dtype]:
    """Shape, order and type of an array; reports of one run have the same few."""
    return _VERSIONS[version](io.BytesIO(header), max_header_size=_MAX_HEADER)


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
