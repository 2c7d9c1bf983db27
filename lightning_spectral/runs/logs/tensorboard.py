"""Folders of TensorBoard's event files, with the ``hparams.yaml`` that Lightning writes beside them."""

import os
import re
import struct
from collections.abc import Iterator
from math import inf
from pathlib import Path
from typing import Any, BinaryIO

from lightning_spectral.runs.logs.hyperparameters import read_hyperparameters
from lightning_spectral.runs.logs.log import Log, Reader, Rows, since
from lightning_spectral.runs.safe_files import MAX_TEXT, open_regular

_EVENTS = re.compile(r"events\.out\.tfevents\.(?P<time>\d{1,18})(\.(?P<host>.+?))?(\.\d+\.(?P<number>\d+))?(\.v2)?")
_HEAD = struct.Struct("<QI")
_FLOAT, _DOUBLE = 1, 2
"""TensorFlow's numbers of types."""


def is_log(path: Path) -> bool:
    """Whether a path is a folder with event files."""
    return bool(_files(path))


def _files(path: Path) -> list[Path]:
    """In the order in which they were begun."""
    try:
        names = [name for name in os.listdir(path) if _EVENTS.fullmatch(name)] if os.path.isdir(path) else []
    except OSError:
        return []
    return [path / name for name in sorted(names, key=_order)]


def _order(name: str) -> tuple[int, int, str]:
    match = _EVENTS.fullmatch(name)
    assert match is not None
    return int(match["time"]), int((match["number"] or "0")[:18]), name


def read(path: Path) -> Log:
    """What it holds."""
    rows, started, files = Rows(), None, _files(path)
    latest, paused, pauses = inf, 0.0, 0
    for file in files:
        for number, event in enumerate(_events(file)):
            time = event.wall_time
            if number == 0 and time > latest:  # nobody trained between two files
                paused, pauses = paused + time - latest, pauses + 1
            latest = time if latest == inf else max(latest, time)
            started = time if started is None else started
            numbers = dict(_scalars(event))
            if numbers:
                rows.add({**numbers, "step": float(event.step), "wall_time": time - paused})
    columns = rows.columns()
    if started is not None and "wall_time" in columns:
        started = min(started, float(columns["wall_time"].values[0]))
        columns["wall_time"] = since(columns["wall_time"], started)
    match = _EVENTS.fullmatch(files[0].name) if files else None
    machine = (match["host"] or "") if match is not None else ""
    hyperparameters = read_hyperparameters(path / "hparams.yaml")
    return Log("TensorBoard", columns, ("step",), "wall_time", pauses, hyperparameters, started, machine)


def _events(file: Path) -> Iterator[Any]:
    """The events in a file; one that a kill tore off at the end does not count.

    TensorBoard's own reader believes any length, and takes sums over all bytes one by one in Python.
    """
    from tensorboard.compat.proto.event_pb2 import Event

    with open_regular(file) as opened:
        for number, content in enumerate(_records(opened), start=1):
            try:
                yield Event.FromString(content)
            except Exception as error:  # of protobuf's own class, whichever that is
                raise ValueError(f"event {number} of {file.name} is damaged") from error


def _records(file: BinaryIO) -> Iterator[bytes]:
    from tensorboard.compat.tensorflow_stub.pywrap_tensorflow import masked_crc32c

    while len(head := file.read(_HEAD.size)) == _HEAD.size:
        length, checksum = _HEAD.unpack(head)
        if masked_crc32c(head[:8]) != checksum:
            raise ValueError("it is damaged, or no file of events")
        if length > MAX_TEXT:
            raise ValueError(f"it has an event of {length:,} bytes, more than {MAX_TEXT:,}")
        content = file.read(length)
        if len(content) < length or len(file.read(4)) < 4:
            return
        yield content


def _scalars(event: Any) -> Iterator[tuple[str, float]]:
    for value in event.summary.value:
        if value.HasField("simple_value"):
            yield value.tag, value.simple_value
        elif value.HasField("tensor") and value.metadata.plugin_data.plugin_name in ("", "scalars"):
            # As TensorFlow 2 writes them, and torch with `new_style=True`.
            tensor = value.tensor
            numbers = list(tensor.float_val if tensor.dtype == _FLOAT else tensor.double_val)[:2]
            form = {_FLOAT: "<f", _DOUBLE: "<d"}.get(tensor.dtype)
            if form is not None and len(numbers) == 1:
                yield value.tag, numbers[0]
            elif form is not None and len(tensor.tensor_content) == struct.calcsize(form):
                yield value.tag, struct.unpack(form, tensor.tensor_content)[0]


READER = Reader(is_log, read)
