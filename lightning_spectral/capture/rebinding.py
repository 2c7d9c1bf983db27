"""Functions that a deep copy shares with its original, bound to the copy: wrapped methods, closures, compiled code."""

import functools
import types
import weakref
from collections import deque
from collections.abc import Iterable
from typing import Any, TypeVar

from lightning_spectral.capture.reachable import MANY, content_of, named_globals, slots_of, value_in

T = TypeVar("T")

REFERENCES = (weakref.ref, weakref.WeakMethod)
CALLABLES = (types.FunctionType, types.MethodType, functools.partial, *REFERENCES)
CONTAINERS = (tuple, list, dict, set, frozenset)

DYNAMO = "torch._dynamo.eval_frame"
"""Where the wrappers are defined that run functions compiled, or keep them from being compiled."""

WRAPPED = "_torchdynamo_orig_callable"
"""Where they keep what they wrap."""


class Rebinding:
    """Puts twins in the place of what a deep copy holds and a deep copy does not copy.

    Python takes a function for a constant. One that has got hold of a part of the original, in a closure, a default, an
    attribute or, if it is a user's, in a global that it names, would go on to run on the original: as
    ``module.forward = torch.compile(module.forward)``, ``self.scorer = lambda x: self.net(x)`` and weak references do.
    Its twin has got hold of the copy of that part. A function that runs compiled is unwrapped, for neither is what was
    compiled for the original of use, nor can torch.func see through it.

    Args:
        memo: Of :func:`copy.deepcopy`; twins are added.
    """

    def __init__(self, memo: dict[int, Any]) -> None:
        self._memo = memo
        self._shared: set[int] = set()
        """Functions that have been seen to lead nowhere."""
        self._globals: dict[int, dict[str, Any]] = {}
        """Twins of modules' globals."""
        self._kept = memo.setdefault(id(memo), [])
        """What has been copied, kept alive, so that no id means two things."""

    def rebind(self) -> None:
        """Go through all that has been copied."""
        for part in list(self._kept):
            copied = self._memo.get(id(part))
            if isinstance(copied, dict):
                self._in_dict(copied)
            elif isinstance(copied, (list, deque)):
                for index, value in enumerate(copied):
                    if self._has_twin(value):
                        copied[index] = self.twin(value)
            elif isinstance(copied, set) and any(map(self._has_twin, copied)):
                values = list(map(self.twin, copied))
                copied.clear()
                copied.update(values)
            if isinstance(attributes := getattr(copied, "__dict__", None), dict):
                self._in_dict(attributes)
            for slot in slots_of(copied):
                if self._has_twin(value := value_in(slot, copied)):
                    slot.__set__(copied, self.twin(value))

    def _in_dict(self, mapping: dict[Any, Any]) -> None:
        for key, value in list(mapping.items()):
            if self._has_twin(value):
                mapping[key] = self.twin(value)

    def _has_twin(self, value: Any) -> bool:
        return isinstance(value, (*CALLABLES, tuple, frozenset)) and self.twin(value) is not value

    def twin(self, part: Any) -> Any:
        """What a part of the original, or of what leads to it, is in the copy; others are what they are."""
        if id(part) in self._memo:
            return self._memo[id(part)]
        if not isinstance(part, (*CALLABLES, *CONTAINERS)) or id(part) in self._shared:
            return part
        if not self._leads(part):
            if isinstance(part, types.FunctionType):  # others may be gone, and their ids another's, in a moment
                self._shared.add(id(part))
            return part
        if isinstance(part, types.FunctionType):
            return self.twin(part.__dict__[WRAPPED]) if _is_compiled(part) else self._function(part)
        if isinstance(part, types.MethodType):
            return types.MethodType(self.twin(part.__func__), self.twin(part.__self__))
        if isinstance(part, REFERENCES):
            return type(part)(self.twin(part()))
        if isinstance(part, functools.partial):
            keywords = {name: self.twin(value) for name, value in part.keywords.items()}
            partial = type(part)(self.twin(part.func), *map(self.twin, part.args), **keywords)
            partial.__dict__.update({name: self.twin(value) for name, value in part.__dict__.items()})
            return partial
        if isinstance(part, (tuple, frozenset)):
            twins = map(self.twin, part)
            return part._make(twins) if hasattr(part, "_make") else type(part)(twins)
        # Before it is filled: it may hold itself.
        copied: Any = self._remember(part, part.copy())
        if isinstance(part, dict):
            copied.update({key: self.twin(value) for key, value in part.items()})
        else:
            copied.clear()
            (copied.update if isinstance(part, set) else copied.extend)(map(self.twin, part))
        return copied

    def _function(self, function: types.FunctionType) -> types.FunctionType:
        cells = [self._cell(cell) for cell in function.__closure__ or ()]
        named = {name: value for name, value in named_globals(function).items() if self._leads(value)}
        globals_ = self._globals.setdefault(id(function.__globals__), dict(function.__globals__)) if named else None
        twin = self._remember(
            function,
            types.FunctionType(
                function.__code__,
                function.__globals__ if globals_ is None else globals_,
                function.__name__,
                closure=tuple(cells) or None,
            ),
        )
        for old, new in zip(function.__closure__ or (), cells, strict=True):
            if new is not old:
                new.cell_contents = self.twin(old.cell_contents)
        if globals_ is not None:
            globals_.update({name: self.twin(value) for name, value in named.items()})
        twin.__defaults__ = self.twin(function.__defaults__)
        twin.__kwdefaults__ = self.twin(function.__kwdefaults__)
        twin.__module__, twin.__qualname__, twin.__doc__ = function.__module__, function.__qualname__, function.__doc__
        twin.__dict__.update({name: self.twin(value) for name, value in function.__dict__.items()})
        return twin

    def _cell(self, cell: types.CellType) -> types.CellType:
        """One that several functions share stays one; what does not lead to the original stays shared with it."""
        if id(cell) in self._memo or not self._leads(content_of(cell)):
            return self._memo.get(id(cell), cell)
        return self._remember(cell, types.CellType())

    def _remember(self, part: Any, twin: T) -> T:
        self._memo[id(part)] = twin
        self._kept.append(part)
        return twin

    def _leads(self, part: Any) -> bool:
        return self._leads_to_original(part, set())

    def _leads_to_original(self, part: Any, seen: set[int]) -> bool:
        if id(part) in self._memo or _is_compiled(part):
            return True
        if id(part) in seen or not isinstance(part, (*CALLABLES, *CONTAINERS)):
            return False
        seen.add(id(part))
        return any(self._leads_to_original(inner, seen) for inner in _held_by(part))


def _is_compiled(part: Any) -> bool:
    # Wrappers of others may have its attributes, by functools.wraps.
    return (
        isinstance(part, types.FunctionType) and part.__globals__.get("__name__") == DYNAMO and WRAPPED in part.__dict__
    )


def _held_by(part: Any) -> Iterable[Any]:
    if isinstance(part, types.FunctionType):
        beside = [*(part.__defaults__ or ()), *(part.__kwdefaults__ or {}).values(), *part.__dict__.values()]
        return [*map(content_of, part.__closure__ or ()), *beside, *named_globals(part).values()]
    if isinstance(part, types.MethodType):
        return [part.__func__, part.__self__]
    if isinstance(part, REFERENCES):
        return [part()]
    if isinstance(part, functools.partial):
        return [part.func, *part.args, *part.keywords.values(), *part.__dict__.values()]
    if len(part) > MANY:
        return ()
    return list(part.values()) if isinstance(part, dict) else list(part)
