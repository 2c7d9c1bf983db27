"""Which loss a Trainer of transformers trains by: what ``compute_loss`` returns, and where backward passes begin."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lightning_spectral.integrations.divided_loss import multiplier_of

MULTIPLES = ("MulBackward0", "DivBackward0")
"""Nodes of a loss that is multiplied, or divided: by a number, if nothing else leads to them."""


class OwnLoss(NamedTuple):
    """The loss that a model has returned, before anything is made of it."""

    value: Tensor
    node: Any
    factor: float | Tensor | None
    """What makes it the mean over its own batch; None if that is not known."""


class Watched:
    """A method of one object, whose calls are told of until :meth:`remove`.

    Args:
        owner: Whose method it is.
        name: Of the method.
        tell: Called with what the method returned and its keywords, or with its first argument before it begins.
        before: Which of the two.
    """

    def __init__(self, owner: Any, name: str, tell: Callable[..., None], before: bool = False) -> None:
        inner = getattr(owner, name)

        @functools.wraps(inner)
        def method(*args: Any, **kwargs: Any) -> Any:
            if before:
                tell(args[0] if args else kwargs.get("loss"))
                return inner(*args, **kwargs)
            returned = inner(*args, **kwargs)
            tell(returned, kwargs)
            return returned

        self._owner, self._name, self._method = owner, name, method
        self._former = vars(owner).get(name)
        setattr(owner, name, method)

    def remove(self) -> None:
        """Put back what was there, unless somebody has put something else in its place."""
        if vars(self._owner).get(self._name) is not self._method:
            return
        if self._former is None:
            delattr(self._owner, self._name)
        else:
            setattr(self._owner, self._name, self._former)


def times_of(loss: Tensor, own: OwnLoss, num_processes: int) -> int | None:
    """How many times a model's own loss a loss is: 1, or the number of processes, by which the Trainer multiplies it.

    Returns:
        None for another loss. Graphs tell; where they do not lead to one another, as through DistributedDataParallel's
        own nodes, equal values do.
    """
    node: Any = loss.grad_fn
    if node is not None and node is own.node:
        return 1
    if own.node is not None and (number := multiplier_of(node)) is not None and _multiplied(node) is own.node:
        return num_processes if number == num_processes else None
    value = loss.detach().reshape(())
    return next((times for times in (1, num_processes) if torch.equal(value, own.value * times)), None)


def is_multiple(root: Tensor, node: Any) -> bool:
    """Whether a loss is a number times that of a node."""
    found: Any = root.grad_fn
    while found is not None and found is not node:
        found = _multiplied(found) if found.name() in MULTIPLES else None
    return found is not None


def _multiplied(node: Any) -> Any:
    """What a node multiplies by a number that does not depend on anything."""
    following = [one for one, _ in node.next_functions if one is not None]
    return following[0] if len(following) == 1 else None
