"""The runs that paths and glob patterns name."""

import glob
import os
from collections.abc import Sequence
from pathlib import Path

from lightning_spectral.runs.arguments import check_paths
from lightning_spectral.runs.record import ABOUT, FOLDER
from lightning_spectral.runs.run import Run


def open_runs(paths: str | Path | Sequence[str | Path], name: str = "runs") -> list[Run]:
    """The runs that paths and glob patterns name.

    Args:
        paths: Log directories, ``spectra`` folders, or patterns of them.
        name: The argument's name, for the message.

    Returns:
        At least one, each once. Of a pattern, folders without a record are passed over.

    Raises:
        ValueError: If one names no run, or a record is broken.
    """
    check_paths(name, paths)
    patterns = list(paths) if isinstance(paths, (list, tuple)) else [paths]
    found: dict[Path, Run] = {}
    for pattern in map(str, patterns):
        runs = [Run(folder) for folder in folders_of_runs(pattern)]
        if not runs:
            raise ValueError(f"{name} must name runs with a record, got {pattern!r}: no folder with one matches")
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
        A path as it is; of a pattern, those that hold a record.
    """
    if os.path.exists(pattern) or not any(sign in pattern for sign in "*?["):
        return [Path(pattern)]
    folders = [Path(Path(pattern).anchor)]
    for part in Path(pattern).relative_to(folders[0]).parts:
        folders = _inside(folders, part)
    return [folder for folder in folders if any(os.path.exists(folder / part / ABOUT) for part in (".", FOLDER))]


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
