"""Where what is known of a run comes from: the record that our callbacks wrote, or the log of another tool."""

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lightning_spectral.functional.arguments import describe
from lightning_spectral.runs.history import History
from lightning_spectral.runs.logs import Columns, reader_of
from lightning_spectral.runs.logs.columns import read_columns
from lightning_spectral.runs.record import ABOUT, FOLDER, Report, read_about, read_forecasts, reports


@dataclass(frozen=True)
class Source:
    """The record of a run.

    Args:
        folder: The record's own folder.
        path: The log directory.
        about: The description of the run.
    """

    folder: Path
    path: Path
    about: dict[str, Any]
    columns: Mapping[str, str] = field(default_factory=dict, init=False)
    """Of a log, who wrote it and which of its columns is what, in words."""

    def history(self) -> History:
        """Steps, tokens, seconds and losses."""
        return History.read(self.folder)

    def forecasts(self) -> list[dict[str, Any]]:
        """What forecasters said as the run went on."""
        return read_forecasts(self.folder)

    def reports(self) -> list[Report]:
        """The files of reports."""
        return reports(self.folder)


@dataclass(frozen=True)
class LogSource(Source):
    """The log of another tool: a history, and no spectra."""

    held: History
    columns: Mapping[str, str]

    def history(self) -> History:
        """As the log has it."""
        return self.held

    def forecasts(self) -> list[dict[str, Any]]:
        """None."""
        return []

    def reports(self) -> list[Report]:
        """None."""
        return []


def has_record(path: Path) -> bool:
    """Whether there is a record at a path."""
    return any(os.path.lexists(path / part / ABOUT) for part in (".", FOLDER))


def is_run(path: Path) -> bool:
    """Whether there is a record at a path, or the log of another tool."""
    return has_record(path) or reader_of(path) is not None


def open_source(path: Path, told: Columns) -> Source:
    """The record at a path, or the log of another tool if there is none.

    ValueError if there is neither, it is broken, or things are said of a record that only logs need.
    """
    # Unlike pathlib's, these answer no where a path is too long, or may not be looked at.
    folder = path / FOLDER if os.path.isdir(path / FOLDER) else path
    reader = None if has_record(path) else reader_of(path)
    if reader is None:
        about = read_about(folder)
        for name, value in told.given().items():
            raise ValueError(
                f"{name} must be left out for a run with a record, got {describe(value)} for {str(path)!r}"
            )
        return Source(folder, folder.parent if folder.name == FOLDER else folder, about)
    try:
        log = reader.read(path)
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"run has a broken log: {str(path)!r} cannot be read ({reason})") from error
    try:
        history, about, columns = read_columns(log, told)
    except ValueError as error:
        raise ValueError(f"{error} (the {log.tool} log {str(path)!r})") from error
    return LogSource(path, path, about, columns=columns, held=history)
