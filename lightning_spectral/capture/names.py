"""Names of modules and parameters: without what wrappers put into them, and by glob pattern."""

import difflib
import fnmatch
from collections.abc import Sequence

from torch import nn

WRAPPERS = {
    "OptimizedModule": "_orig_mod",
    "DistributedDataParallel": "module",
    "DataParallel": "module",
    "AveragedModel": "module",
    "DeepSpeedEngine": "module",
    "ActivationWrapper": "_checkpoint_wrapped_module",
}
"""Classes that stand in for the one module they hold, and the attribute under which they keep it: those of
torch.compile, data parallelism, averages of weights and checkpoint_wrapper."""


def wrapped(module: nn.Module) -> str | None:
    """The attribute under which a wrapper keeps the module that it stands in for; None for any other module.

    By class, not by the attribute's name: ``module`` is what many a user calls a part of a model, too.
    """
    return next((WRAPPERS[base.__name__] for base in type(module).__mro__ if base.__name__ in WRAPPERS), None)


def clean_name(root: nn.Module, name: str) -> str:
    """A module's or parameter's name, as ``named_modules`` of ``root`` gives it, without the parts of wrappers.

    Example:
        >>> wrapper = nn.DataParallel(nn.Sequential(nn.Linear(2, 2)))
        >>> clean_name(wrapper, "module.0.weight")
        '0.weight'
    """
    parts = []
    module: nn.Module | None = root
    for part in name.split("."):
        if module is None or part != wrapped(module):
            parts.append(part)
        # TorchScript's table of modules has no ``get``.
        module = module._modules[part] if module is not None and part in module._modules else None
    return ".".join(parts)


def matching(argument: str, patterns: str | Sequence[str], names: list[str], frozen: Sequence[str] = ()) -> set[str]:
    """The names that one or several glob patterns mean: those that match at least one.

    A name is tried as it stands first, then with brackets taken for what they are, since a ModuleDict may hold them in
    its keys, then as a pattern. ``*`` and ``?`` stay between two dots, or, where nothing matches so, run across them.
    ValueError if a pattern matches nothing; the message names the argument that holds the patterns, and lists close
    names. One that matches only some of ``frozen`` is told so.
    """
    chosen: set[str] = set()
    for pattern in [patterns] if isinstance(patterns, str) else patterns:
        matched = _matches(pattern, names)
        if not matched:
            what, close = argument.removesuffix("s"), _close(pattern, names)
            if others := _matches(pattern, list(frozen)):
                raise ValueError(
                    f"{argument}={pattern!r} matches no trained {what}, only such as {others[0]!r} with "
                    f"requires_grad=False: did you mean {close}?"
                )
            raise ValueError(f"{argument}={pattern!r} matches no {what}: did you mean {close}?")
        chosen.update(matched)
    return chosen


def _matches(pattern: str, names: list[str]) -> list[str]:
    if pattern in names:
        return [pattern]
    both = [pattern.replace("[", "[[]"), pattern] if "[" in pattern else [pattern]
    within = (_within(one, names) for one in both)
    across = (fnmatch.filter(names, one) for one in both)
    return next((found for way in (within, across) for found in way if found), [])


def _within(pattern: str, names: list[str]) -> list[str]:
    parts = pattern.split(".")
    return [
        name
        for name in names
        if name.count(".") == len(parts) - 1 and all(map(fnmatch.fnmatchcase, name.split("."), parts))
    ]


def _close(pattern: str, names: list[str]) -> str:
    close = difflib.get_close_matches(pattern, names, n=3, cutoff=0.4) or names[:3]
    return ", ".join(repr(name) for name in close)
