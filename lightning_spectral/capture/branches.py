"""Branches of a step on its samples' values under vmap: samples that take the same one are vectorised together."""

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch._C import _functorch

TORCH = str(Path(torch.__file__).parent)

ASKING = ("__bool__", "__int__", "__float__", "__index__", "item", "tolist")
"""Methods of a tensor that hand out values, which a step may go by."""


class BranchError(RuntimeError):
    """Samples take different branches.

    Args:
        taken: ``(B,)`` booleans, on the CPU.
    """

    def __init__(self, taken: Tensor) -> None:
        super().__init__("samples take different branches")
        self.taken = taken

    def parts(self) -> Iterator[Tensor]:
        """Indices of those that take one branch, and of those that take the other."""
        for value in (True, False):
            yield (self.taken == value).nonzero().flatten()


def ask(func: Any, tensor: Tensor, has_drawn: Callable[[], bool]) -> Any:
    """What a tensor answers to one of :data:`ASKING`, under vmap too where all samples answer the same yes or no.

    Raises:
        BranchError: If some answer yes and some no.
        RuntimeError: If they are asked for anything else, or after random numbers were drawn: who runs a part of the
            samples again for their answer would choose among the numbers that they draw.
    """
    values = _values(tensor)
    if values is None or values.numel() != len(values):
        return func(tensor)
    what = f"{_asker()} asks for a value of each sample, which torch.func does not give"
    if func.__name__ != "__bool__" and not (func.__name__ == "item" and values.dtype == torch.bool):
        raise RuntimeError(what)
    if has_drawn():
        raise RuntimeError(f"{what} after random numbers were drawn")
    taken = values.flatten().bool().cpu()
    if bool(taken.all()) or not bool(taken.any()):
        return bool(taken[0])
    raise BranchError(taken)


def _values(tensor: Tensor) -> Tensor | None:
    """``(B, ...)`` of all samples of a tensor within one vmap; None for any other."""
    found = None
    while _functorch.is_gradtrackingtensor(tensor) or _functorch.is_batchedtensor(tensor):
        if _functorch.is_batchedtensor(tensor):
            if found is not None:
                return None
            found = _functorch.maybe_get_bdim(tensor)
        tensor = _functorch.get_unwrapped(tensor)
    return None if found is None else tensor.detach().movedim(found, 0)


def _asker() -> str:
    """The line of a user's or a library's that asks, as ``masking_utils.py:344``."""
    frame = sys._getframe(1)
    while frame.f_back is not None and (frame.f_code.co_filename.startswith(TORCH) or _is_ours(frame.f_globals)):
        frame = frame.f_back
    return f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno}"


def _is_ours(names: dict[str, Any]) -> bool:
    return str(names.get("__name__")).startswith("lightning_spectral.capture.")
