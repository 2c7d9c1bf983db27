"""Names of modules and parameters: without what wrappers put into them, and by glob pattern."""

import difflib
import fnmatch
from collections.abc import Sequence

WRAPPERS = ("_orig_mod", "module", "_checkpoint_wrapped_module")
"""Attributes under which torch.compile, DistributedDataParallel and checkpoint_wrapper keep the wrapped module."""


def clean_name(name: str) -> str:
    """A module's or parameter's name, as ``named_modules`` gives it, without the wrappers' parts.

    Example:
        >>> clean_name("model._orig_mod.blocks.0._checkpoint_wrapped_module.mlp")
        'model.blocks.0.mlp'
    """
    return ".".join(part for part in name.split(".") if part not in WRAPPERS)


def matching(argument: str, patterns: str | Sequence[str], names: list[str]) -> set[str]:
    """The names that one or several glob patterns mean: those that match at least one.

    ``*`` and ``?`` stay between two dots, or, where nothing matches so, run across them. ValueError if a pattern
    matches nothing; the message names the argument that holds the patterns, and lists close names.
    """
    chosen: set[str] = set()
    for pattern in [patterns] if isinstance(patterns, str) else patterns:
        matched = _matches(pattern, names)
        if not matched:
            what = argument.removesuffix("s")
            raise ValueError(f"{argument}={pattern!r} matches no {what}: did you mean {_close(pattern, names)}?")
        chosen.update(matched)
    return chosen


def _matches(pattern: str, names: list[str]) -> list[str]:
    parts = pattern.split(".")
    within = [
        name
        for name in names
        if name.count(".") == len(parts) - 1 and all(map(fnmatch.fnmatchcase, name.split("."), parts))
    ]
    return within or fnmatch.filter(names, pattern)


def _close(pattern: str, names: list[str]) -> str:
    close = difflib.get_close_matches(pattern, names, n=3, cutoff=0.4) or names[:3]
    return ", ".join(repr(name) for name in close)
