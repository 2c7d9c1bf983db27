"""Checks of what users ask of runs; each names the argument, its value and a remedy in one line."""

import os
from collections.abc import Sequence, Set
from typing import Any

from lightning_spectral.functional.arguments import describe, is_finite_number, is_one_line
from lightning_spectral.functional.powerlaw import check_band


def check_path(name: str, path: Any) -> None:
    """Refuse what can be no path, by a ValueError."""
    is_path = isinstance(path, (str, os.PathLike))
    text = os.fspath(path) if is_path else ""
    if not isinstance(text, str) or not text or "\0" in text:
        raise ValueError(f"{name} must be a path, got {describe(path)}: give a log directory")


def check_paths(name: str, paths: Any) -> None:
    """Refuse what is neither a path nor a list of them, by a ValueError."""
    if isinstance(paths, (list, tuple)):
        for path in paths:
            check_path(name, path)
    elif not isinstance(paths, (str, os.PathLike)):
        raise ValueError(f"{name} must be a path, a pattern or a list of them, got {describe(paths)}")
    else:
        check_path(name, paths)


def check_loss(name: str, loss: Any) -> None:
    """Refuse what can be no loss, by a ValueError."""
    if not is_finite_number(loss):
        raise ValueError(f"{name} must be a finite number, got {describe(loss)}: write e.g. 2.0")


def check_name(name: str, value: Any) -> None:
    """Refuse what is neither a name nor None, by a ValueError."""
    if value is not None and not (is_one_line(value) and value):
        raise ValueError(f"{name} must be a name of one line, or None, got {describe(value)}")


def check_tail(tail: Any) -> None:
    """Refuse what is neither a band nor None, by a ValueError."""
    if tail is not None:
        check_band("tail", tail)


def check_tokens(name: str, tokens: Any) -> None:
    """Refuse what is neither None nor a list of positive numbers of tokens, by a ValueError."""
    if tokens is None:
        return
    if not isinstance(tokens, Sequence) or isinstance(tokens, (str, bytes)) or not tokens:
        raise ValueError(f"{name} must be a list of numbers of tokens, got {describe(tokens)}: write e.g. [1e6, 2e6]")
    for number in tokens:
        if not is_finite_number(number) or number <= 0:
            raise ValueError(f"{name} must hold positive numbers of tokens, got {describe(number)}: write e.g. [1e6]")


def check_text(**texts: Any) -> None:
    """Refuse what is no text, which can name nothing, by a ValueError."""
    for name, value in texts.items():
        if not isinstance(value, str):
            raise ValueError(f"{name} must be a name, got {describe(value)}: write it in quotes")


def check_fields(name: str, fields: Any) -> None:
    """Refuse what is no list of names of fields, by a ValueError."""
    if isinstance(fields, (str, bytes)) or not isinstance(fields, (Sequence, Set)):
        raise ValueError(f"{name} must be a list of names of fields, got {describe(fields)}: write e.g. ['vectors']")


def check_choice(name: str, value: Any, choices: Sequence[str]) -> None:
    """Refuse what is none of some names, by a ValueError."""
    if not isinstance(value, str) or value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(choices)}, got {describe(value)}")
