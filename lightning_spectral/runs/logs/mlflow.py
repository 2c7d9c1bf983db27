"""Runs of MLflow: a run's folder in a file store, or the ``run.json`` that mlflow-export-import makes of one."""

import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from lightning_spectral.runs.logs.csv_logger import number_of
from lightning_spectral.runs.logs.hyperparameters import flatten, read_hyperparameters
from lightning_spectral.runs.logs.log import Log, Reader, Rows, since
from lightning_spectral.runs.safe_files import open_regular, read_text

METRICS, PARAMS, META = "metrics", "params", "meta.yaml"
MAX_PARAM = 2**14
"""Bytes of a parameter's file: MLflow takes 6,000 characters."""


class _Point(NamedTuple):
    timestamp: float
    """In milliseconds since 1970."""
    name: str
    value: float
    step: float


def is_log(path: Path) -> bool:
    """Whether a path is the folder of a run, or a JSON file that holds a table."""
    if path.suffix != ".json":
        return os.path.isfile(path / META) and os.path.isdir(path / METRICS)
    try:
        with open_regular(path) as file:
            return file.read(64).lstrip().startswith(b"{")
    except (OSError, ValueError):
        return False


def read(path: Path) -> Log:
    """What it holds."""
    return _from_folder(path) if os.path.isdir(path) else _from_export(path)


def _from_folder(path: Path) -> Log:
    points = [point for file, name in _files(path / METRICS) for point in _points(file, name)]
    parameters = {name: read_text(file, limit=MAX_PARAM) for file, name in _files(path / PARAMS)}
    return _log(points, parameters, read_hyperparameters(path / META).get("start_time"))


def _files(folder: Path) -> Iterator[tuple[Path, str]]:
    """Files of metrics or parameters, and their names: a slash in a name makes a folder."""
    for parent, _, names in os.walk(folder):
        for name in sorted(names):
            yield Path(parent, name), Path(parent, name).relative_to(folder).as_posix()


def _points(file: Path, name: str) -> Iterator[_Point]:
    """Lines of ``timestamp value step``; newer versions may add more, and a kill may tear the last."""
    for number, line in enumerate(read_text(file).split("\n")[:-1], start=1):
        cells = line.split()
        if not cells:
            continue
        if len(cells) < 3:
            raise ValueError(f"line {number} of {METRICS}/{name} is not of timestamp, value and step: {line[:60]!r}")
        yield _Point(number_of(cells[0]), name, number_of(cells[1]), number_of(cells[2]))


def _from_export(path: Path) -> Log:
    try:
        held = json.loads(read_text(path))
    except RecursionError as error:
        raise ValueError(f"it is no JSON: {error}") from error
    run = held.get("mlflow") if isinstance(held, dict) else None
    info, metrics = (_table(run, name) for name in ("info", METRICS))
    if not isinstance(run, dict) or not metrics:
        raise ValueError("it is no export of an MLflow run, with 'metrics' under 'mlflow'")
    points = []
    for name, found in metrics.items():
        if not isinstance(found, list) or not all(isinstance(point, dict) for point in found):
            raise ValueError(f"metric {name[:60]!r} is no list of tables")
        points += [
            _Point(
                *(number_of(point.get("timestamp")), name, number_of(point.get("value")), number_of(point.get("step")))
            )
            for point in found
        ]
    return _log(points, _table(run, PARAMS), info.get("start_time"))


def _table(run: Any, name: str) -> dict[str, Any]:
    found = run.get(name) if isinstance(run, dict) else None
    return found if isinstance(found, dict) else {}


def _log(points: list[_Point], parameters: Mapping[str, Any], start: Any) -> Log:
    rows = Rows()
    # By time, which is how they came: an export may have them in another order.
    for point in sorted(points, key=lambda point: point.timestamp):
        rows.add({point.name: point.value, "step": point.step, "timestamp": point.timestamp})
    columns = rows.columns()
    started, clock = number_of(start) / 1e3, ""
    if (times := columns.get("timestamp")) is not None and len(times.rows):
        clock = "timestamp"
        if not started <= times.values[0] / 1e3:  # also where it is not known
            started = float(times.values[0]) / 1e3
        columns["timestamp"] = since(times, started, 1e-3)
    known = {name: _plain(value) for name, value in flatten(parameters).items()}
    return Log(
        "MLflow", columns, ("step",), clock, hyperparameters=known, started=started if started == started else None
    )


def _plain(value: Any) -> Any:
    """MLflow keeps numbers as text."""
    number = number_of(value)
    return value if number != number else int(number) if number.is_integer() else number


READER = Reader(is_log, read)
