"""JSON for people and for git: nested parts indented, an array of numbers in one line."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning_spectral.runs.to_json import to_json


def write_compact(path: Path, facts: Mapping[str, Any]) -> None:
    """Write a file of results; null stands for NaN and infinities."""
    path.write_text(compact(to_json(facts)) + "\n")


def compact(text: str) -> str:
    """The same JSON, laid out anew.

    Args:
        text: JSON, in which NaN and infinities may stand as Python writes them.

    Returns:
        Objects, and arrays that hold objects or arrays, with a line for each part, indented by a blank a level; arrays
        of numbers, words or null in one line each.
    """
    return _laid_out(json.loads(text), "\n")


def _laid_out(value: Any, line: str) -> str:
    deeper = f"{line} "
    if isinstance(value, dict) and value:
        parts = [f"{json.dumps(key)}: {_laid_out(part, deeper)}" for key, part in value.items()]
        return "{" + deeper + f",{deeper}".join(parts) + line + "}"
    if isinstance(value, list) and any(isinstance(part, (dict, list)) for part in value):
        return "[" + deeper + f",{deeper}".join(_laid_out(part, deeper) for part in value) + line + "]"
    return json.dumps(value)
