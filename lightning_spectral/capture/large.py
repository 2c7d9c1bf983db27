"""Large tensors and arrays that a loss reaches and shares with training: saved when first written to, or locked."""

import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

ROOM = 2**26
"""Bytes of what is small: it is copied before anybody asks for a loss. Of all that does not fit into them one copy more
may be one too many, and what a step names so is data in most cases, which it only reads."""

LOCKED = (
    "training_step writes to a NumPy array that is too large to be copied for each report: give loss_fn, or keep it in "
    "a tensor"
)

HIDDEN = (
    "training_step reaches a tensor that is too large to be copied for each report, by way of the Trainer and within a "
    "TorchDispatchMode, where nobody sees it being written to: give loss_fn"
)


class Large:
    """What is too large to be copied for nothing.

    A tensor is copied just before an operation writes to its memory, through whatever view; to see that, every
    operation passes by in Python. An array is read-only meanwhile.
    """

    def __init__(self) -> None:
        self._tensors: dict[int, list[Tensor]] = {}
        self._arrays: list[np.ndarray] = []
        self._saved: dict[int, list[tuple[Tensor, Tensor]]] = {}
        self._open: ExitStack | None = None
        self._is_watching = False

    def add_tensor(self, tensor: Tensor) -> None:
        """Save this before it is written to; ValueError if that cannot be seen, for other modes are active."""
        self._tensors.setdefault(tensor.untyped_storage().data_ptr(), []).append(tensor)
        if self._open is not None and not self._is_watching:
            if torch._C._len_torch_dispatch_stack() > 0:  # which would be left before ours
                raise ValueError(HIDDEN)
            self._watch(self._open)

    def add_array(self, array: np.ndarray) -> None:
        """Let nobody write to this."""
        self._arrays.append(array)
        if self._open is not None:
            array.flags.writeable = False

    @property
    def has_arrays(self) -> bool:
        """Whether something is locked."""
        return bool(self._arrays)

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Watch and lock them in here, and what is added meanwhile."""
        for array in self._arrays:
            array.flags.writeable = False
        try:
            with ExitStack() as stack:
                if self._arrays:
                    # Of tensors that share the memory of an array, which may be read all the same.
                    stack.enter_context(warnings.catch_warnings())
                    warnings.filterwarnings("ignore", "The given NumPy array is not writ")
                self._open = stack
                if self._tensors:
                    self._watch(stack)
                yield
        finally:
            self._open, self._is_watching = None, False
            # A view cannot be written to before what it is a view of can.
            for array in sorted(self._arrays, key=_depth):
                array.flags.writeable = True

    def _watch(self, stack: ExitStack) -> None:
        stack.enter_context(_BeforeWriting(self))
        self._is_watching = True

    def save(self, written: Tensor) -> None:
        """Copy what shares memory with a tensor that is about to be written to, the first time."""
        place = written.untyped_storage().data_ptr()
        if place in self._tensors and place not in self._saved:
            self._saved[place] = [(tensor, tensor.detach().clone()) for tensor in self._tensors[place]]

    @torch.no_grad()
    def put_back(self) -> None:
        """Let all that was written to be what it was."""
        for tensor, kept in (pair for pairs in self._saved.values() for pair in pairs):
            if not torch.equal(tensor, kept):
                tensor.copy_(kept)


def _depth(array: Any) -> int:
    base = getattr(array, "base", None)
    return 0 if base is None else 1 + _depth(base)


class _BeforeWriting(TorchDispatchMode):
    def __init__(self, large: Large) -> None:
        super().__init__()
        self._large = large

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func._schema.is_mutable:
            for index, argument in enumerate(func._schema.arguments):
                if argument.alias_info is None or not argument.alias_info.is_write:
                    continue
                value = args[index] if index < len(args) else kwargs.get(argument.name)
                for tensor in value if isinstance(value, (list, tuple)) else (value,):
                    if isinstance(tensor, Tensor) and type(tensor) in (Tensor, torch.nn.Parameter):
                        self._large.save(tensor)
        return func(*args, **kwargs)
