"""Whether a loss that is asked of a copy has used, or moved, the module that was copied; what it moved is put back."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

USED = (
    "the loss runs on the module itself, not on the copy that it is asked of: something in it holds on to the module "
    "as no copy can follow; give loss_fn(module, batch), which uses the module that it is given"
)

NO_PARAMETER = (
    "the loss depends on no parameter of the copy that it is asked of: give loss_fn(module, batch), which uses the "
    "module that it is given"
)


class OriginalUsedError(RuntimeError):
    """A loss of a copy is none: it runs on the original."""


class Original:
    """A module that was copied, and its tensors and attributes as they are now.

    Args:
        module: What was copied.
        shadow: The copy; what it shares with the module on purpose is nothing of the module's own.
        originals: What each part of the copy was copied from, by the part's id.
    """

    def __init__(self, module: nn.Module, shadow: nn.Module, originals: Mapping[int, Any]) -> None:
        shared = {id(part) for part in (*shadow.modules(), *shadow.parameters(), *shadow.buffers())}
        parts = [part for part in module.modules() if id(part) not in shared]
        self._attributes = [(vars(part), dict(vars(part))) for part in parts]
        self._tables: list[tuple[Any, dict[str, Any]]] = [
            (table, dict(table)) for part in parts for table in (part._parameters, part._buffers)
        ]
        self._parameters = {id(p) for part in parts for p in part._parameters.values() if id(p) not in shared}
        self._copies = {id(p) for p in shadow.parameters()}
        # Parameters are in the copy, which nothing has moved when this first is seen to be.
        twins = {id(originals[id(p)]): p for p in shadow.parameters() if id(p) in originals}
        self._tensors: list[tuple[Tensor, int, Tensor]] = []
        for tensor in (tensor for table, _ in self._tables for tensor in table.values()):
            if tensor is not None and id(tensor) not in shared and not tensor.is_inference() and not is_lazy(tensor):
                kept = twins[id(tensor)] if id(tensor) in twins else tensor.detach().clone()
                self._tensors.append((tensor, tensor._version, kept))

    def check(self) -> None:
        """Raise :class:`OriginalUsedError` if it has been moved."""
        if any(tensor._version != version for tensor, version, _ in self._tensors) or any(
            table.get(name) is not tensor for table, held in self._tables for name, tensor in held.items()
        ):
            raise OriginalUsedError(USED)

    def check_leaves(self, leaves: list[Tensor]) -> None:
        """Raise :class:`OriginalUsedError` for a loss whose graph leads back to it."""
        if any(id(leaf) in self._parameters for leaf in leaves):
            raise OriginalUsedError(USED)

    def check_gradient(self, leaves: list[Tensor]) -> None:
        """Likewise for one whose graph leads to none of the copy's parameters either."""
        self.check_leaves(leaves)
        if not any(id(leaf) in self._copies for leaf in leaves):
            raise OriginalUsedError(NO_PARAMETER)

    def put_back(self) -> None:
        """Let it be what it was."""
        for attributes, held in self._attributes:
            if len(attributes) != len(held) or any(attributes.get(name) is not value for name, value in held.items()):
                attributes.clear()
                attributes.update(held)
        for table, tensors in self._tables:
            if any(table.get(name) is not tensor for name, tensor in tensors.items()):
                table.update(tensors)
        with torch.no_grad():
            for tensor, version, kept in self._tensors:
                if tensor._version != version and not torch.equal(tensor, kept):
                    tensor.copy_(kept)
