"""Hyperparameters that a logger keeps beside its numbers: YAML or JSON, of anybody, by dotted name."""

import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from lightning_spectral.runs.logs.log import MAX_NAMES
from lightning_spectral.runs.safe_files import read_text

MAX_TEXT = 2**20
"""Bytes of a file of them: YAML is slow to read, and 1 MiB are some 30,000."""
MAX_DEPTH = 20
MAX_CHARACTERS = 2**24
"""Of all names together: aliases make few words into names without end."""


class _Loader(getattr(yaml, "CSafeLoader", yaml.SafeLoader)):  # type: ignore[misc]
    """Makes no objects: what a tag asks for is left out."""


_Loader.add_multi_constructor("", lambda loader, suffix, node: None)


def read_hyperparameters(path: Path) -> dict[str, Any]:
    """What a YAML or JSON file holds, plain values by dotted name; nothing if it is not there.

    ValueError, naming the file, if it holds no table, or one too large or too deep.
    """
    if not os.path.lexists(path):
        return {}
    try:
        text = read_text(path, limit=MAX_TEXT)
        found = json.loads(text) if path.suffix == ".json" else yaml.load(text, _Loader)
        return flatten(found or {})
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ValueError(f"{str(path)!r} cannot be read ({reason})") from error


def flatten(table: Any) -> dict[str, Any]:
    """Numbers, texts and truth values in tables within tables, by names that dots join; others are left out."""
    if not isinstance(table, Mapping):
        raise ValueError(f"it is no table of hyperparameters, but {type(table).__name__}")
    found: dict[str, Any] = {}
    num_names = num_characters = 0
    for name, value in _walk(table, "", 0):
        num_names, num_characters = num_names + 1, num_characters + len(name)
        if num_names > MAX_NAMES or num_characters > MAX_CHARACTERS:
            raise ValueError(f"it holds more than {MAX_NAMES:,} names, or {MAX_CHARACTERS:,} characters of them")
        if isinstance(value, (bool, int, float, str)):
            found[name] = value
    return found


def _walk(table: Mapping[Any, Any], start: str, depth: int) -> Iterator[tuple[str, Any]]:
    if depth > MAX_DEPTH:
        raise ValueError(f"its tables lie more than {MAX_DEPTH} deep in each other")
    for key, value in table.items():
        name = f"{start}{key}"
        yield name, value
        if isinstance(value, Mapping):
            yield from _walk(value, f"{name}.", depth + 1)
