"""The run under a folder that was written to last."""

import os
from pathlib import Path

from lightning_spectral.runs.record import ABOUT, FOLDER, FORECASTS, HISTORY
from lightning_spectral.runs.source import is_run


def newest_run(folder: str | Path) -> Path | None:
    """The record under a folder that was written to last, as a path of a run.

    Args:
        folder: Searched with all folders in it, but for those within a record.

    Returns:
        The record's own folder; the folder itself if it is the log of another tool; None if there is neither.

    Raises:
        ValueError: If there is no such folder.
    """
    path = Path(folder)
    if not os.path.exists(path):
        raise ValueError(f"logdir must be a folder with runs in it, got {str(folder)!r}: there is none")
    found: dict[Path, float] = {}
    # A run that another process's record stands beside has spectra-1 and the like.
    for place, folders, files in os.walk(path):
        here = Path(place)
        if ABOUT in files and (here.name.startswith(FOLDER) or here == path):
            found[here] = written_at(here)
            folders.clear()
        # Half of a record that is being put into its place, and hidden folders, are none.
        folders[:] = [name for name in folders if not name.startswith(".")]
    if found:
        return max(found, key=lambda one: (found[one], str(one)))
    return path if is_run(path) else None


def written_at(record: Path) -> float:
    """When something was written to a record last, in seconds since the epoch; minus infinity if it is gone."""
    times = []
    for name in (ABOUT, HISTORY, FORECASTS, "."):  # a report renews the folder
        try:
            times.append((record / name).stat().st_mtime)
        except OSError:  # not written yet, or set aside in this moment
            continue
    return max(times, default=float("-inf"))
