"""What an object leads to: what it holds, and what the code of a user's functions and classes names."""

import collections
import functools
import logging
import sys
import sysconfig
import types
import weakref
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

MANY = 10_000
"""Entries of a container from which on it is taken for data, which a training step reads."""

BARE = (dict, list, tuple, set, frozenset, collections.deque, collections.OrderedDict, collections.defaultdict)
"""Classes of containers to which nobody gives attributes."""

PLAIN = (str, bytes, int, float, complex, bool, type(None), torch.dtype, torch.device, torch.Size, types.ModuleType)
"""What leads to nothing that a loss could change."""

MISSING = object()
"""What an empty slot holds."""


def is_trainer(part: Any) -> bool:
    """Whether it is a Trainer, of whichever Lightning."""
    return any(base.__name__ == "Trainer" for base in type(part).__mro__)


def is_iterator(part: Any) -> bool:
    """Whether it is one to draw from, and no file."""
    return isinstance(part, Iterator) and not hasattr(part, "read")


def is_opaque(part: Any) -> bool:
    """Whether it is an iterator that does not keep in attributes how far it is, by which it could be put back."""
    if not is_iterator(part):
        return False
    # A DataLoader's has attributes, and a generator and processes among them.
    is_loaders = type(part).__module__.startswith("torch.utils.data")
    return is_loaders or not (hasattr(part, "__dict__") or hasattr(type(part), "__slots__"))


def is_others(part: Any) -> bool:
    """Whether others than a loss may change it meanwhile: it holds a lock or a thread, or is this package's."""
    attributes = getattr(part, "__dict__", None)
    held = attributes.values() if isinstance(attributes, dict) else ()
    return any(_is_of_threads(value) for value in (part, *held)) or any(
        base.__module__.partition(".")[0] == "lightning_spectral" for base in type(part).__mro__
    )


def _is_of_threads(part: Any) -> bool:
    return type(part).__module__ in ("_thread", "threading")


def children_of(part: Any) -> Iterable[Any]:
    """What a part leads to; nothing of what a library keeps to itself."""
    if isinstance(part, (Tensor, np.ndarray, logging.Logger)) or _is_of_threads(part):
        return ()
    entries: list[Any] = []
    if isinstance(part, (Mapping, list, tuple, set, frozenset, collections.deque)):
        if len(part) <= MANY:
            entries = list(part.values() if isinstance(part, Mapping) else part)
        if type(part) in BARE:
            return entries
    if isinstance(part, functools.partial):
        return [part.func, *part.args, *part.keywords.values(), *part.__dict__.values()]
    if isinstance(part, weakref.ref):
        return [part()]
    if isinstance(part, types.MethodType):
        return [part.__self__, part.__func__]
    if isinstance(part, types.CellType):
        return [content_of(part)]
    if isinstance(part, types.FunctionType):
        beside = [part.__defaults__ or (), part.__kwdefaults__ or {}, dict(part.__dict__)]
        return [*(part.__closure__ or ()), *beside, *named_globals(part).values(), *_of_modules(part)]
    if isinstance(part, (staticmethod, classmethod)):
        return [part.__func__]
    if isinstance(part, property):
        return [part.fget, part.fset]
    if isinstance(part, type):
        if not is_users(part.__module__):
            return ()
        return [value for base in part.__mro__ if is_users(base.__module__) for value in vars(base).values()]
    slots = [value_in(slot, part) for slot in slots_of(part)]
    attributes = getattr(part, "__dict__", None)
    held = list(attributes.values()) if isinstance(attributes, dict) else []
    return [*entries, *held, *slots, type(part)]


def slots_of(part: Any) -> list[types.MemberDescriptorType]:
    """Where a part has what its classes name in ``__slots__``."""
    bases = [vars(base) for base in type(part).__mro__ if "__slots__" in vars(base)]
    return [slot for held in bases for slot in held.values() if isinstance(slot, types.MemberDescriptorType)]


def value_in(slot: types.MemberDescriptorType, part: Any) -> Any:
    """What one holds; :data:`MISSING` while it is empty."""
    try:
        return slot.__get__(part, type(part))
    except AttributeError:
        return MISSING


@functools.cache
def is_users(module: str) -> bool:
    """Whether a module is neither Python's own nor installed, nor this package's."""
    file = getattr(sys.modules.get(module), "__file__", None)
    if module == "__main__":
        return True
    if file is None or module.partition(".")[0] in ("lightning_spectral", "torch", "lightning", "pytorch_lightning"):
        return False
    paths = sysconfig.get_paths()
    libraries = (paths["stdlib"], paths["platstdlib"], paths["purelib"], paths["platlib"])
    return not file.startswith(libraries) and "site-packages" not in file and "dist-packages" not in file


def named_globals(function: types.FunctionType) -> dict[str, Any]:
    """What a user's function names of its module's globals."""
    return {name: function.__globals__[name] for name in _names(function) if name in function.__globals__}


def _of_modules(function: types.FunctionType) -> list[Any]:
    """What it names of other modules of the user's."""
    modules = [part for part in named_globals(function).values() if isinstance(part, types.ModuleType)]
    names = _names(function)
    return [vars(part)[name] for part in modules if is_users(part.__name__) for name in names if name in vars(part)]


def _names(function: types.FunctionType) -> set[str]:
    names: set[str] = set()
    codes = [function.__code__] if is_users(function.__module__ or "") else []
    while codes:
        code = codes.pop()
        names.update(code.co_names)
        codes.extend(const for const in code.co_consts if isinstance(const, types.CodeType))
    return names


def content_of(cell: types.CellType) -> Any:
    """What a closure's cell holds; None while it is empty."""
    try:
        return cell.cell_contents
    except ValueError:
        return None
