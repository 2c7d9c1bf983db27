"""What a log holds, whatever its format: numbers by name, each in some of its rows, and hyperparameters."""

from array import array
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

MAX_NAMES = 100_000
"""Of columns or hyperparameters; more are nobody's."""


class Column(NamedTuple):
    """The numbers of one name."""

    rows: np.ndarray
    """``(m,)`` which rows hold one, ascending."""
    values: np.ndarray
    """``(m,)`` float64, none of them NaN."""
    lost: np.ndarray
    """Which rows hold NaN, ascending: a number was written that was none."""


@dataclass(frozen=True)
class Log:
    """A log of one run.

    Args:
        tool: Who wrote it, in words.
        columns: By name.
        steps: Names of the column of steps, the first that is there.
        clock: Name of a column of seconds since the start, by the clock on the wall; empty for none.
        pauses: How many were left out of it.
        hyperparameters: By dotted name.
        started: Seconds since 1970 at its start; None if it does not say.
        machine: Name of the machine; empty if it does not say.
    """

    tool: str
    columns: Mapping[str, Column]
    steps: tuple[str, ...]
    clock: str = ""
    pauses: int = 0
    hyperparameters: Mapping[str, Any] = field(default_factory=dict)
    started: float | None = None
    machine: str = ""


class Reader(NamedTuple):
    """How the logs of one tool are read."""

    is_log: Callable[[Path], bool]
    """Whether a path is one, by the names of files and, where these do not tell, the first bytes."""
    read: Callable[[Path], Log]
    """ValueError, or OSError, for one that is broken."""


class Rows:
    """Collects numbers row by row, those that are there; a few bytes for each."""

    def __init__(self) -> None:
        self._rows: dict[str, array[int]] = {}
        self._values: dict[str, array[float]] = {}
        self._lost: dict[str, array[int]] = {}
        self._row = 0

    def add(self, numbers: Mapping[str, float]) -> None:
        """Add a row; what is not there is left out of it, NaN is something that is there."""
        for name, value in numbers.items():
            if name not in self._rows:
                if len(self._rows) >= MAX_NAMES:
                    raise ValueError(f"it has more than {MAX_NAMES:,} columns")
                self._rows[name], self._values[name], self._lost[name] = array("q"), array("d"), array("q")
            if value == value:
                self._rows[name].append(self._row)
                self._values[name].append(value)
            else:
                self._lost[name].append(self._row)
        self._row += 1

    def columns(self) -> dict[str, Column]:
        """What was collected."""
        return {
            name: Column(
                np.asarray(rows, dtype=np.int64),
                np.asarray(self._values[name], dtype=np.float64),
                np.asarray(self._lost[name], dtype=np.int64),
            )
            for name, rows in self._rows.items()
        }


def since(column: Column, start: float, unit: float = 1.0) -> Column:
    """A column of times in some unit of seconds, as seconds since a start."""
    return column._replace(values=column.values * unit - start)
