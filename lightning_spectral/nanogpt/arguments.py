"""Checks of arguments; each names the argument, its value and what it must be in one line."""

import math
import os
from typing import Any

MAX_INT = 10**15
"""Beyond it counts are no longer exact in floating point."""


def shown(value: Any) -> str:
    """A value, short enough for one line."""
    try:
        text = " ".join(repr(value).split())
    except Exception:  # whatever a user's own class makes of it
        text = f"a {type(value).__name__}"
    return text if len(text) <= 80 else f"{text[:76]} ..."


def check_int(least: int, most: int = MAX_INT, hint: str = "", **numbers: Any) -> None:
    """Refuse, by a ValueError, what is no int, or none within bounds."""
    for name, value in numbers.items():
        if isinstance(value, bool) or not isinstance(value, int):
            raise ValueError(f"{name} must be an int, got {shown(value)}{_hint(hint or 'write a whole number')}")
        if value < least:
            raise ValueError(f"{name} must be at least {least}, got {shown(value)}{_hint(hint)}")
        if value > most:
            raise ValueError(f"{name} must be at most {most}, got {shown(value)}{_hint(hint)}")


def check_number(hint: str = "", **numbers: Any) -> None:
    """Refuse, by a ValueError, what is no finite number."""
    for name, value in numbers.items():
        is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
        try:
            is_finite = is_number and math.isfinite(value)
        except OverflowError:
            is_finite = False
        if not is_finite:
            raise ValueError(f"{name} must be a finite number, got {shown(value)}{_hint(hint)}")


def check_flag(**flags: Any) -> None:
    """Refuse, by a ValueError, what is neither True nor False: the text "no" would count as true."""
    for name, value in flags.items():
        if not isinstance(value, bool):
            raise ValueError(f"{name} must be True or False, got {shown(value)}: give a bool")


def check_path(hint: str = "", **paths: Any) -> None:
    """Refuse, by a ValueError, what can be no path."""
    for name, value in paths.items():
        text = os.fspath(value) if isinstance(value, (str, os.PathLike)) else ""
        if not isinstance(text, str) or not text or "\0" in text:
            raise ValueError(f"{name} must be a path, got {shown(value)}{_hint(hint)}")


def _hint(hint: str) -> str:
    return f": {hint}" if hint else ""
