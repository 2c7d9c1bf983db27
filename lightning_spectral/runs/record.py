"""What a run leaves on disk while it trains: written whole or not at all, so that a kill loses nothing before it."""

import json
import os
import re
import shutil
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from lightning_spectral.runs.record_checks import MAX_STEP, check_line, why_broken
from lightning_spectral.runs.safe_files import read_text
from lightning_spectral.runs.to_json import to_json, to_json_line
from lightning_spectral.runs.writing import append_line, write_arrays, write_atomically

FOLDER = "spectra"
"""Name of the record's folder in the log directory of a run."""
ABOUT = "run.json"
HISTORY = "history.csv"
FORECASTS = "forecasts.jsonl"
FORMAT = 1
"""Version of the record's layout; a reader refuses others."""

_LASTING = (
    "started",
    "setting",
    "batch_tokens",
    "batch_samples",
    "validation_data",
    "validation_samples",
    "val_loss",
)
"""What is known of a run only once it is under way, and after a resume at first no more."""

_MOST_DIGITS = len(str(MAX_STEP)) + 1
"""Of a step: beyond, it is too large whatever they are, and Python may refuse to make an int."""

_TORN = "torn, as by a full disk"

_REPORT = re.compile(r"(?P<series>.+)-(?P<step>\d{9,})\.npz")


class Row(NamedTuple):
    """One line of a run's history; NaN for what is not known."""

    step: int
    """Optimizer steps."""
    tokens: float
    """Training tokens so far, over all ranks."""
    seconds: float
    """Training time so far, without validation and without measuring."""
    train_loss: float
    """Mean over the batches since the line before."""
    val_loss: float


class Report(NamedTuple):
    """The file of one report."""

    series: str
    """Which measurement it is of: ``activation-validate``, for example."""
    step: int
    path: Path


def reports(folder: Path) -> list[Report]:
    """The reports in a record's own folder, by series and step; files of other names are nobody's business here."""
    found = []
    for path in folder.glob("*.npz"):
        if not path.name.startswith(".") and (match := _REPORT.fullmatch(path.name)):
            # Of more digits than ours have, Python may refuse to make an int.
            step = int(match["step"]) if len(match["step"]) <= 18 else MAX_STEP + 1
            if step > MAX_STEP:
                raise ValueError(f"run has a broken record: {str(path)!r} has a step beyond {MAX_STEP:,}: remove it")
            found.append(Report(match["series"], step, path))
    return sorted(found)


def read_about(folder: Path) -> dict[str, Any]:
    """The description of a run, what ``run.json`` holds in the record's own folder.

    ValueError if there is no record, it is broken, or of another version.
    """
    path = folder / ABOUT
    try:
        about = json.loads(read_text(path))
    except (OSError, ValueError, RecursionError) as error:
        if not os.path.lexists(path):
            raise ValueError(f"run must be a folder with a record, got {str(folder)!r}: it has no {ABOUT}") from None
        raise ValueError(f"run has a broken record: {str(path)!r} cannot be read ({error}): restore it") from error
    if not isinstance(about, dict) or "format" not in about or not _is_table(about.get("series")):
        raise ValueError(f"run must be a folder with a record, got {str(folder)!r}: its {ABOUT} is something else's")
    if about["format"] != FORMAT:
        raise ValueError(
            f"run has a record of format {about['format']}, this version reads {FORMAT}: {str(folder)!r} needs "
            "another version of lightning-spectral"
        )
    if (reason := why_broken(about)) is not None:
        raise ValueError(f"run has a broken record: in {str(path)!r} {reason}: restore it")
    return about


def _is_table(series: Any) -> bool:
    return isinstance(series, dict) and all(isinstance(settings, dict) for settings in series.values())


def find_record(run_id: str, *places: Path | None) -> Path | None:
    """The first of some places that is the record of the run of that id; None for none."""
    return next((place for place in places if place is not None and _is_of(place, run_id)), None)


def read_history(folder: Path) -> list[Row]:
    """The lines of a run's history, in the order in which they were written, from the record's own folder.

    All whole lines; one that a kill tore off at the end does not count, and one that a full disk tore in the middle is
    skipped with a warning, as are lines that a spreadsheet wrote with decimal commas. ValueError if the file is
    missing, or is no history.
    """
    path = folder / HISTORY
    rows, torn, are_wide = [], [], True
    for place, (number, line) in enumerate(_whole_lines(path)):
        fields = line.split(",")  # numbers are never quoted
        if place == 0 and tuple(fields) == Row._fields:
            continue
        try:
            step, *others = fields
            row = Row(int(step[:_MOST_DIGITS]), *map(float, others))
        except (ValueError, TypeError) as error:
            if place == 0:
                raise ValueError(
                    f"run has a broken record: line {number} of {str(path)!r} must hold {', '.join(Row._fields)}, "
                    f"got {line[:60]!r}"
                ) from error
            torn.append(number)
            are_wide &= len(fields) > len(Row._fields)
            continue
        try:
            check_line(*row[:3])
        except ValueError as error:
            raise ValueError(f"run has a broken record: line {number} of {str(path)!r}: {error}") from error
        rows.append(row)
    _tell_torn(path, torn, "of too many numbers, as with decimal commas" if are_wide and not rows else _TORN)
    return rows


def read_forecasts(folder: Path) -> list[dict[str, Any]]:
    """What forecasters said as the run went on, a table for each line, from the record's own folder.

    Empty where no forecaster was; torn lines are as in :func:`read_history`.
    """
    path = folder / FORECASTS
    found, torn = [], []
    for number, line in _whole_lines(path) if path.exists() else ():
        try:
            forecast = json.loads(line)
        except (ValueError, RecursionError):
            forecast = None
        if isinstance(forecast, dict) and isinstance(forecast.get("step"), (int, float)):
            found.append(forecast)
        else:
            torn.append(number)
    _tell_torn(path, torn, _TORN)
    return found


def _whole_lines(path: Path) -> list[tuple[int, str]]:
    """Lines with their numbers, but for blank ones."""
    try:
        text = read_text(path, errors="replace")
    except (OSError, ValueError) as error:
        raise ValueError(f"run has a broken record: {str(path)!r} cannot be read ({error})") from error
    lines = text.split("\n")[:-1]  # the last is empty, or was torn off
    return [(number, line) for number, line in enumerate(lines, start=1) if line.strip()]


def _tell_torn(path: Path, lines: list[int], why: str) -> None:
    if lines:
        which = f"line {lines[0]}" if len(lines) == 1 else f"lines {', '.join(map(str, lines[:8]))}"
        more = f" and {len(lines) - 8} more" if len(lines) > 8 else ""
        warnings.warn(f"{which}{more} of {str(path)!r} skipped: {why}", stacklevel=4)


class _Held(NamedTuple):
    """What a record holds up to a step."""

    rows: list[Row]
    reports: list[Report]
    forecasts: list[dict[str, Any]]

    @property
    def size(self) -> int:
        return len(self.rows) + len(self.reports) + len(self.forecasts)

    @classmethod
    def at(cls, folder: Path, step: float) -> "_Held":
        return cls(
            [row for row in read_history(folder) if row.step <= step],
            [report for report in reports(folder) if report.step <= step],
            [forecast for forecast in read_forecasts(folder) if forecast["step"] <= step],
        )


class Record:
    """The record of one run in its own folder, for the one process that writes it.

    The folder exists; the description ``about`` of the run has an ``id`` that no other run has.
    """

    def __init__(self, folder: Path, about: dict[str, Any]) -> None:
        self.folder = folder
        self.about = about
        self.aside: Path | None = None
        """Where what lay in the folder, and could not stay, is now."""
        self._is_described = False

    @classmethod
    def begin(cls, folder: Path, about: Mapping[str, Any]) -> "Record":
        """Start the record of a new run; one that another run left there is set aside as ``{folder}-1``, ``-2``, ...

        ValueError if the folder holds something that is no record, OSError if it cannot be written.
        """
        return cls._install(folder, about, _Held([], [], []))

    @classmethod
    def resume(cls, folder: Path, about: Mapping[str, Any], source: Path | None, step: int) -> "Record":
        """Go on with the record of a run that is resumed from the checkpoint of a step, or begin one if it has none.

        What the interrupted run, of the ``id`` in ``about``, wrote after that checkpoint will be measured again, and is
        set aside. A run that is resumed into another log directory takes a copy of what it had with it, from ``source``
        if it is known where that is. Errors are those of :meth:`begin`.
        """
        known = find_record(str(about["id"]), folder, source)
        if known is None:
            return cls.begin(folder, about)
        before = read_about(known)
        kept = {key: before[key] for key in _LASTING if key in before}
        begun = about.get("started")
        about = {**about, **kept, "series": before["series"] | about.get("series", {})}
        about["resumed"] = [*(before.get("resumed") or []), step]
        about["resumed_at"] = [*(before.get("resumed_at") or []), begun]
        about["machines"] = list(dict.fromkeys([*(before.get("machines") or []), *(about.get("machines") or [])]))
        if known != folder:
            return cls._install(folder, about, _Held.at(known, step))
        for leftover in folder.glob(".*.tmp"):
            leftover.unlink(missing_ok=True)
        record = cls(folder, {"format": FORMAT, **about})
        record._set_aside_after(step)
        record.describe()
        return record

    @classmethod
    def _install(cls, folder: Path, about: Mapping[str, Any], held: _Held) -> "Record":
        """Put a record into its place once it is whole: a kill leaves what was there, or all of it."""
        is_taken = folder.exists() and any(folder.iterdir())
        if is_taken and not (folder / ABOUT).exists():
            raise ValueError(f"{str(folder)!r} holds files that are no record of a run: move them")
        draft = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
        shutil.rmtree(draft, ignore_errors=True)
        draft.mkdir(parents=True)
        record = cls(draft, {"format": FORMAT, "series": {}, **about})
        try:
            for report in held.reports:
                shutil.copyfile(report.path, draft / report.path.name)
            record._write_lines(held)
            record.describe()
            if is_taken:
                record.aside = free_name(folder)
                folder.rename(record.aside)
            elif folder.exists():
                folder.rmdir()
            draft.rename(folder)
        except BaseException:
            shutil.rmtree(draft, ignore_errors=True)
            raise
        record.folder = folder
        return record

    def _set_aside_after(self, step: int) -> None:
        """Leave in the folder what it held at a step, and put the rest into a record beside it."""
        held, every = _Held.at(self.folder, step), _Held.at(self.folder, float("inf"))
        if held.size < every.size:
            aside = free_name(self.folder)
            try:
                aside.mkdir()
                for name in (ABOUT, HISTORY, FORECASTS):
                    if (self.folder / name).exists():
                        shutil.copyfile(self.folder / name, aside / name)
            except OSError:
                shutil.rmtree(aside, ignore_errors=True)
                raise
            self.aside = aside
            for report in every.reports:
                if report.step > step:
                    report.path.rename(aside / report.path.name)
        self._write_lines(held)  # also without the line that a kill tore off

    def describe(self, **facts: Any) -> None:
        """Add facts by key, JSON-like, to the description of the run; if that fails, with the next line or report."""
        self.about |= facts
        self._is_described = False
        text = to_json(self.about)
        write_atomically(self.folder / ABOUT, lambda file: file.write(text.encode()))
        self._is_described = True

    def amend(self, **facts: Any) -> None:
        """Likewise of a run under way; ValueError if another run writes into the folder by now."""
        self._check_owner()
        self.describe(**facts)

    def append(self, row: Row) -> None:
        """Add a line to the history; ValueError if another run writes into the folder by now."""
        self._check_owner()
        append_line(self.folder / HISTORY, _line(row))
        self._catch_up()

    def append_forecast(self, forecast: Mapping[str, Any]) -> None:
        """Add what a forecaster says, JSON-like, its ``step`` among it, to the forecasts; ValueError as above."""
        self._check_owner()
        append_line(self.folder / FORECASTS, to_json_line(forecast))
        self._catch_up()

    def write_report(self, series: str, step: int, arrays: Mapping[str, Any]) -> None:
        """Write one report of a series, arrays by name: numbers and strings, nothing that would have to be pickled.

        ValueError if another run writes into the folder by now.
        """
        self._check_owner()
        write_atomically(self.folder / f"{series}-{step:09d}.npz", lambda file: write_arrays(file, arrays))
        self._catch_up()

    def _catch_up(self) -> None:
        if not self._is_described:
            self.describe()

    def _check_owner(self) -> None:
        try:
            owner = read_about(self.folder).get("id")
        except ValueError as error:
            if isinstance(error.__cause__, OSError):
                raise error.__cause__ from error  # which may pass
            owner = None
        if owner != self.about["id"]:
            raise ValueError(
                f"{str(self.folder)!r} is no longer the record of this run: give each run a log directory of its own"
            )

    def _write_lines(self, held: _Held) -> None:
        text = ",".join(Row._fields) + "\n" + "".join(f"{_line(row)}\n" for row in held.rows)
        write_atomically(self.folder / HISTORY, lambda file: file.write(text.encode()))
        if held.forecasts or (self.folder / FORECASTS).exists():
            lines = "".join(f"{to_json_line(forecast)}\n" for forecast in held.forecasts)
            write_atomically(self.folder / FORECASTS, lambda file: file.write(lines.encode()))


def _line(row: Row) -> str:
    # repr of a float is the shortest that reads back to the same.
    return ",".join([str(row.step), *(repr(float(value)) for value in row[1:])])


def _is_of(folder: Path, run_id: str) -> bool:
    try:
        return read_about(folder).get("id") == run_id
    except ValueError:
        return False


def free_name(folder: Path) -> Path:
    """The first of ``{folder}-1``, ``-2``, ... that is not there."""
    number = 1
    while (name := folder.with_name(f"{folder.name}-{number}")).exists():
        number += 1
    return name
