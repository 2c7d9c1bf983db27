"""Records of reference runs that the package carries, by name: ``"bundled:tiny"``."""

from pathlib import Path
from typing import Any

PREFIX = "bundled:"
FOLDER = Path(__file__).resolve().parent


def is_bundled(path: Path) -> bool:
    """Whether the log directory at a path is one that the package carries."""
    return FOLDER in path.resolve().parents


def bundled(reference: Any) -> list[Path]:
    """The log directories that a name stands for.

    Args:
        reference: ``"bundled:"`` and a name, or anything else.

    Returns:
        The directories; none for anything else.

    Raises:
        ValueError: If there are none of that name.
    """
    if not isinstance(reference, str) or not reference.startswith(PREFIX):
        return []
    names = sorted(path.name for path in FOLDER.iterdir() if path.is_dir() and any(path.glob("*/spectra")))
    name = reference.removeprefix(PREFIX)
    if name not in names:
        there = ", ".join(f"{PREFIX}{one}" for one in names) or "none"
        raise ValueError(f"references must name runs that the package carries, got {reference!r}: there are {there}")
    return sorted(path for path in (FOLDER / name).iterdir() if path.is_dir())
