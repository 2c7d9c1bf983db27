"""Puts files of a record on disk whole or not at all: a kill or a full disk leaves what was there before."""

import errno
import os
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

_BLOCK = 4096


def append_line(path: Path, line: str) -> None:
    """Add a line to a file that one process writes, in one write; OSError, and the file as it was, if that fails.

    What a kill or an earlier failure left behind the last whole line is cut off first.
    """
    data = f"{line}\n".encode()
    descriptor = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT | getattr(os, "O_BINARY", 0), 0o666)
    try:
        end = _cut_to_whole_lines(descriptor)
        try:
            written = os.write(descriptor, data)
            while written < len(data):  # as a disk that fills up does: the next try says why
                written += os.write(descriptor, data[written:])
        except BaseException:
            os.ftruncate(descriptor, end)
            raise
    finally:
        os.close(descriptor)


def _cut_to_whole_lines(descriptor: int) -> int:
    """Cut a file behind its last line break; returns where that is."""
    end = size = os.lseek(descriptor, 0, os.SEEK_END)
    while end:
        start = max(end - _BLOCK, 0)
        os.lseek(descriptor, start, os.SEEK_SET)
        block = os.read(descriptor, end - start)
        end = start + block.rfind(b"\n") + 1
        if b"\n" in block:
            break
    if end < size:
        os.ftruncate(descriptor, end)
    return end


def write_atomically(path: Path, write: Callable[[BinaryIO], Any]) -> None:
    """Write beside the file and move into its place: who reads it sees it whole, before or after."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            write(file)
            file.flush()
            sync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def sync(descriptor: int) -> None:
    """A power cut must not leave a name without its content; not all file systems can promise that."""
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise


def write_arrays(file: BinaryIO, arrays: Mapping[str, Any]) -> None:
    """What ``np.savez`` writes, with the bases compressed: they are by far the largest part."""
    with zipfile.ZipFile(file, "w") as archive:
        for name, array in arrays.items():
            kind = zipfile.ZIP_DEFLATED if name.endswith("vectors") else zipfile.ZIP_STORED
            entry = zipfile.ZipInfo(f"{name}.npy")
            entry.compress_type = kind
            with archive.open(entry, "w", force_zip64=True) as member:
                np.lib.format.write_array(member, np.asanyarray(array), allow_pickle=False)
