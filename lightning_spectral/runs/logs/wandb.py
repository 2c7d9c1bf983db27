"""Exported histories of W&B: CSV or JSON of the rows that its API gives for a run, with ``config.json`` beside it.

``run.history().to_csv(path)``, and ``json.dump(list(run.scan_history()), file)``: rows with ``_step``, ``_runtime`` and
``_timestamp`` beside what was logged.
"""

import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from lightning_spectral.runs.logs.csv_logger import numbers_of, read_rows
from lightning_spectral.runs.logs.hyperparameters import read_hyperparameters
from lightning_spectral.runs.logs.log import Log, Reader, Rows, since
from lightning_spectral.runs.safe_files import open_regular, read_text

STEPS = ("trainer/global_step", "train/global_step", "global_step", "_step")
"""Optimizer steps as Lightning and others log them; else those of W&B, one for each time something was logged."""
_HEAD = 4096


def is_log(path: Path) -> bool:
    """Whether a path is a CSV file with a column ``_step``, or JSON of a list of rows, or of a row a line."""
    if path.suffix not in (".csv", ".json", ".jsonl") or not os.path.isfile(path):
        return False
    head = _head(path)
    if path.suffix == ".csv":
        return b"_step" in [cell.strip(b'"') for cell in head.split(b"\n")[0].strip().split(b",")]
    return path.suffix == ".jsonl" or head.lstrip().startswith(b"[")


def _head(path: Path) -> bytes:
    try:
        with open_regular(path) as file:
            return file.read(_HEAD)
    except (OSError, ValueError):  # which reading it will tell
        return b""


def read(path: Path) -> Log:
    """What it holds."""
    rows = Rows()
    for row in read_rows(path) if path.suffix == ".csv" else _json_rows(path):
        rows.add(row)
    columns = rows.columns()
    clock, started = "", None
    if (times := columns.get("_timestamp")) is not None and len(times.rows):
        # In seconds; of old exports in milliseconds.
        unit = 1e-3 if times.values[0] > 1e11 else 1.0
        started, clock = float(times.values[0]) * unit, "_timestamp"
        columns["_timestamp"] = since(times, started, unit)
    if (runtime := columns.get("_runtime")) is not None and len(runtime.rows):
        clock = "_runtime"
        started = None if started is None else started - float(runtime.values[0])
    config = read_hyperparameters(path.with_name("config.json"))
    return Log("W&B", columns, STEPS, clock, hyperparameters=config, started=started)


def _json_rows(path: Path) -> Iterable[Mapping[str, float]]:
    text = read_text(path)
    try:
        rows: Any = list(map(json.loads, text.splitlines())) if path.suffix == ".jsonl" else json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"it is no JSON: {error}") from error
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise ValueError("it is no list of rows, each a table")
    return (numbers_of(row.items()) for row in rows)


READER = Reader(is_log, read)
