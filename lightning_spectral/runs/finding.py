"""The runs that paths and glob patterns name."""

import glob
import os
from collections.abc import Sequence
from pathlib import Path

from lightning_spectral.runs.arguments import check_path, check_paths
from lightning_spectral.runs.logs import Columns
from lightning_spectral.runs.run import Run
from lightning_spectral.runs.source import has_record, is_run

RunPaths = str | Path | Run | Sequence[str | Path | Run]
"""What names runs: log directories, ``spectra`` folders, logs of other tools, patterns of them, or runs."""


def open_runs(paths: RunPaths, name: str = "runs", columns: Columns | None = None) -> list[Run]:
    """The runs that paths and glob patterns name.

    Args:
        paths: Log directories, ``spectra`` folders, logs of other tools, or patterns of them; runs as they are.
        name: The argument's name, for the message.
        columns: What is said of logs of other tools; runs with a record do without.

    Returns:
        At least one, each once. Of a pattern, folders with neither a record nor a log are passed over.

    Raises:
        ValueError: If one names no run, or a record or a log is broken.
    """
    given = list(paths) if isinstance(paths, (list, tuple)) else [paths]
    if not any(isinstance(one, Run) for one in given):
        check_paths(name, paths)
    told = (columns or Columns()).given()
    found: dict[Path, Run] = {}
    for one in given:
        if isinstance(one, Run):
            found[one.folder.resolve()] = one
            continue
        check_path(name, one)
        folders = folders_of_runs(str(one))
        runs = [Run(folder) if has_record(folder) else Run(folder, **told) for folder in folders]
        if not runs:
            raise ValueError(f"{name} must name runs with a record, got {str(one)!r}: no folder with one matches")
        found |= {run.folder.resolve(): run for run in runs}
    if not found:
        raise ValueError(f"{name} must name at least one run, got {paths!r}: give a log directory")
    return list(found.values())


def folders_of_runs(pattern: str) -> list[Path]:
    """The folders that a path or a glob pattern names.

    Args:
        pattern: A log directory, a ``spectra`` folder, or a pattern of them. Each part is tried as it stands first,
            then with brackets taken for what they are, as Hydra writes them into folders, then as a pattern.

    Returns:
        A path as it is; of a pattern, those that hold a record, or are a log of another tool.
    """
    if os.path.exists(pattern) or not any(sign in pattern for sign in "*?["):
        return [Path(pattern)]
    folders = [Path(Path(pattern).anchor)]
    for part in Path(pattern).relative_to(folders[0]).parts:
        folders = _inside(folders, part)
    return [folder for folder in folders if is_run(folder)]


def _inside(folders: list[Path], part: str) -> list[Path]:
    """What a part of a path, or of a pattern, names in some folders."""
    literal = [folder / part for folder in folders if os.path.exists(folder / part)]
    if literal or not any(sign in part for sign in "*?["):
        return literal
    for way in (part.replace("[", "[[]"), part):
        found = sorted(str(folder / name) for folder in folders for name in glob.glob(way, root_dir=folder))
        if found:
            return [Path(name) for name in found]
    return []
