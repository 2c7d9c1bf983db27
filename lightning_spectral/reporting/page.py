"""A page of runs: one file that needs nothing else, made of what runs left behind."""

import json
import os
from collections.abc import Mapping, Sequence
from html import escape
from importlib.resources import files
from pathlib import Path
from typing import Any

from lightning_spectral.functional.arguments import describe
from lightning_spectral.reporting.choices import choices
from lightning_spectral.reporting.markup import subtitle, top
from lightning_spectral.reporting.number_tables import tables
from lightning_spectral.reporting.run_data import labels, run_data
from lightning_spectral.reporting.series import LEAST_SHOWN, MOST_SHOWN
from lightning_spectral.reporting.sides import compared
from lightning_spectral.reporting.thinning import plain
from lightning_spectral.runs import Run, open_runs
from lightning_spectral.runs.arguments import check_loss, check_path
from lightning_spectral.runs.finding import RunPaths
from lightning_spectral.runs.logs import Columns
from lightning_spectral.runs.writing import write_atomically
from lightning_spectral.version import __version__

SIDES = 2
"""So many arguments are the two sides of a comparison."""

SCRIPTS = ("chart.js", "views.js", "page.js")
"""Parts of the page's script, in the order in which they need each other."""


def report(
    runs: RunPaths | Sequence[RunPaths],
    path: str | Path = "report.html",
    at_loss: float | None = None,
    floor: RunPaths | None = None,
) -> Path:
    """Write a page of runs to look at: one HTML file that needs no network, and no other file.

    It shows losses, spectra report by report, exponents and RankMe with their intervals, drift beside its floors, the
    noise scale beside the batch and what was forecast. Logs of other tools have their losses.

    Args:
        runs: A run, or a list: log directories, logs of other tools, glob patterns of them, runs, or lists of these.
            Exactly two entries are the two sides of a comparison, base and variant, as for
            :func:`lightning_spectral.compare`; its verdict stands first, or in one line why they do not compare.
        path: The file to write; one that is there is replaced.
        at_loss: The loss that two sides are matched at; see :func:`lightning_spectral.compare`.
        floor: Recorded run floor of two sides, likewise.

    Returns:
        The file.

    Raises:
        ValueError: If a path names no run, or there is none, a record or a log is broken, or the file cannot be
            written.

    Example::

        report("lightning_logs/version_0")
        report(["runs/baseline/*", "runs/rope/*"], "rope.html")
    """
    # What is no list, or an empty one, is refused as a whole.
    groups: list[Any] = list(runs) if isinstance(runs, (list, tuple)) and runs else [runs]
    return write_page(groups, path, at_loss, floor)


def write_page(
    groups: Sequence[RunPaths],
    path: str | Path,
    at_loss: float | None = None,
    floor: RunPaths | None = None,
    columns: Columns | None = None,
) -> Path:
    """See :func:`report`; ``columns`` is what is said of logs of other tools."""
    check_path("path", path)
    if at_loss is not None:
        check_loss("at_loss", at_loss)
    for name, value in (("at_loss", at_loss), ("floor", floor)):
        if value is not None and len(groups) != SIDES:
            given = f"{describe(value)} for {len(groups)} entries"
            raise ValueError(f"{name} must be left out but for two sides, got {given}")
    found = gather(groups, at_loss, floor, columns)
    file = Path(path)
    if os.path.exists(file) and not os.path.isfile(file):
        # Who writes into a pipe waits for a reader.
        raise ValueError(f"path must be a file, such as report.html, got {str(path)!r}: a folder, a pipe or a device")
    try:
        write_atomically(file, lambda stream: stream.write(page(found).encode()))
    except OSError as error:
        raise ValueError(
            f"path must be a file that can be written, such as report.html, got {str(path)!r}: {error.strerror}"
        ) from error
    return file


def gather(
    groups: Sequence[RunPaths],
    at_loss: float | None = None,
    floor: RunPaths | None = None,
    columns: Columns | None = None,
) -> dict[str, Any]:
    """All that a page holds, JSON-like, with NaN where nothing is known.

    Args:
        groups: Of one argument each.
        at_loss: See :func:`report`.
        floor: Likewise.
        columns: What is said of logs of other tools.
    """
    opened = [open_runs(group, "runs", columns) for group in groups]
    has_sides = len(opened) == SIDES
    sides = {run.folder.resolve(): (run, number) for number, group in enumerate(opened) for run in group}
    runs = [run for run, _ in sides.values()]
    most_shown = max(LEAST_SHOWN, MOST_SHOWN // len(runs))
    data = [
        run_data(run, label, side if has_sides else None, most_shown)
        for (run, side), label in zip(sides.values(), labels(runs), strict=True)
    ]
    return {
        "version": __version__,
        "groups": [_name(group) for group in groups],
        "runs": data,
        "choices": choices(data),
        "comparison": compared(opened[0], opened[1], at_loss, floor) if has_sides else None,
    }


def _name(group: RunPaths) -> str:
    """An argument as it was given."""
    every = group if isinstance(group, (list, tuple)) else [group]
    return ", ".join(str(one.path if isinstance(one, Run) else one) for one in every)


def page(found: Mapping[str, Any]) -> str:
    """The HTML of what :func:`gather` gave."""
    runs, comparison = found["runs"], found["comparison"]
    title = (
        runs[0]["label"]
        if len(runs) == 1
        else "Base against variant"
        if comparison is not None
        else "Runs side by side"
    )
    # Within a script element only its end tag, and what looks like a comment, could be taken for anything else.
    data = json.dumps(plain(found), separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")
    parts = {
        "title": escape(title),
        "version": escape(__version__),
        "subtitle": subtitle(runs, found["groups"]),
        "top": top(runs, comparison),
        "tables": tables(runs),
        "footer": escape(footer(runs)),
        "style": asset("page.css"),
        "script": "".join(map(asset, SCRIPTS)),
        "data": data,
    }
    pieces = asset("page.html").split("{{")
    filled = [pieces[0]]
    for piece in pieces[1:]:  # each part once, so that nothing of a run's is taken for the name of a part
        name, _, rest = piece.partition("}}")
        filled += [parts[name], rest]
    return "".join(filled)


def footer(runs: Sequence[Mapping[str, Any]]) -> str:
    """Where the page comes from, and what it leaves out."""
    lines = [f"Written by lightning-spectral {__version__} from {', '.join(run['path'] for run in runs[:6])}"]
    if len(runs) > 6:
        lines[0] += f" and {len(runs) - 6} more"
    lines.append("of wide spectra and long loss curves it holds what a chart can show")
    thinned = {
        f"{key} of {run['label']}: spectra and drift of {len(one['shown'])} of {one['num_reports']:,} reports"
        for run in runs
        for key, one in run["series"].items()
        if len(one["shown"]) < one["num_reports"]
    }
    lines += sorted(thinned)[:4]
    return "; ".join(lines) + "."


def asset(name: str) -> str:
    """A file that lies beside this one, in ``assets``."""
    return (files("lightning_spectral.reporting") / "assets" / name).read_text(encoding="utf-8")
