"""Folders of Lightning's CSVLogger: ``metrics.csv``, and ``hparams.yaml`` beside it; or such a CSV file alone."""

import csv
import io
import os
from collections.abc import Iterable, Iterator, Mapping
from math import nan
from pathlib import Path

from lightning_spectral.runs.logs.hyperparameters import read_hyperparameters
from lightning_spectral.runs.logs.log import Log, Reader, Rows
from lightning_spectral.runs.safe_files import read_text

METRICS = "metrics.csv"


def is_log(path: Path) -> bool:
    """Whether a path is a folder of a CSVLogger, or a CSV file."""
    return os.path.isfile(path / METRICS) or (path.suffix == ".csv" and os.path.isfile(path))


def read(path: Path) -> Log:
    """What it holds."""
    file = path / METRICS if os.path.isdir(path) else path
    rows = Rows()
    for row in read_rows(file):
        rows.add(row)
    hyperparameters = read_hyperparameters(file.with_name("hparams.yaml"))
    return Log("CSVLogger", rows.columns(), steps=("step",), hyperparameters=hyperparameters)


def read_rows(file: Path) -> Iterator[Mapping[str, float]]:
    """The numbers in each row of a CSV file with a heading, by column; ValueError if it is none.

    Cells that hold no number are left out. NaN is one that was lost if the file leaves other cells empty; where it has
    none that are, NaN may be what it writes for them. A last row that is cut off, as of a run that goes on, does not
    count.
    """
    text = read_text(file)
    text = text if text.endswith(("\n", "\r")) else text[: text.rfind("\n") + 1]
    # Read twice, the first time to the first empty cell: lists of all cells would take many times the file's bytes.
    knows_empty = any("" in row.values() for row in _rows(text))
    for row in _rows(text):
        found = numbers_of(row.items())
        yield found if knows_empty else {name: value for name, value in found.items() if value == value}


def _rows(text: str) -> Iterator[dict[str, str]]:
    """Cells by column, row by row."""
    reader = csv.reader(io.StringIO(text, newline=""))
    try:
        names = next(reader, [])
        if len(set(names)) < len(names):
            raise ValueError("two of its columns have one name")
        for number, cells in enumerate(reader, start=2):
            if cells and len(cells) != len(names):
                raise ValueError(f"line {number} has {len(cells)} cells under {len(names)} headings")
            if cells:
                yield dict(zip(names, cells, strict=True))
    except csv.Error as error:
        raise ValueError(f"it is no CSV: {error}") from error


def numbers_of(cells: Iterable[tuple[str, object]]) -> dict[str, float]:
    """The numbers in cells, by name; NaN where one says NaN. What is no number is left out."""
    found = ((name, cell, number_of(cell)) for name, cell in cells)
    return {name: value for name, cell, value in found if value == value or _is_nan(cell)}


def _is_nan(cell: object) -> bool:
    return isinstance(cell, float) or (isinstance(cell, str) and cell.strip().lower().lstrip("+-") == "nan")


def number_of(cell: object) -> float:
    """The number in a cell; NaN for what is none."""
    try:
        return float(cell) if isinstance(cell, (int, float, str)) and not isinstance(cell, bool) else nan
    except (ValueError, OverflowError):
        return nan


READER = Reader(is_log, read)
