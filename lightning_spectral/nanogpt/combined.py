"""CombinedOptimizer, several optimizers that a Trainer and its schedulers take for one."""

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.optim import Optimizer
from typing_extensions import override


class CombinedOptimizer(Optimizer):
    """One optimizer made of several, each of which goes on updating its own parameters by its own rule.

    Lightning's automatic optimisation takes a single optimizer; with this one, Muon for matrices and AdamW for the rest
    are clipped, accumulated, scaled, scheduled and saved by the Trainer like any other. The parameter groups of all are
    its own, in their order, and so is the state: what a scheduler or a checkpoint writes here is what they read.
    Gradients in mixed precision are unscaled before the step: fused optimizers, which would do it themselves, are not
    told to.

    Args:
        optimizers: At least one; no parameter may be in two of them. They must not be used by themselves afterwards.

    Raises:
        ValueError: If there is none, or a parameter is in two of them.

    Example:
        >>> matrix, vector = torch.nn.Parameter(torch.eye(2)), torch.nn.Parameter(torch.ones(2))
        >>> muon = torch.optim.Muon([matrix], lr=0.5, weight_decay=0.0)
        >>> optimizer = CombinedOptimizer([muon, torch.optim.AdamW([vector], lr=0.1)])
        >>> [group["lr"] for group in optimizer.param_groups]
        [0.5, 0.1]
    """

    def __init__(self, optimizers: Sequence[Optimizer]) -> None:
        self.optimizers: list[Optimizer] = []
        super().__init__([group for optimizer in optimizers for group in optimizer.param_groups], {})
        for optimizer in optimizers:
            self.state.update(optimizer.state)
        self.optimizers = list(optimizers)
        self._num_groups = [len(optimizer.param_groups) for optimizer in optimizers]
        self._share()

    def _share(self) -> None:
        groups = iter(self.param_groups)
        for optimizer, num_groups in zip(self.optimizers, self._num_groups, strict=True):
            # through the optimizer's own hook, which brings what older versions have saved up to date
            optimizer.__setstate__({"state": self.state, "param_groups": list(itertools.islice(groups, num_groups))})

    def __getstate__(self) -> dict[str, Any]:
        return super().__getstate__() | {"optimizers": self.optimizers, "_num_groups": self._num_groups}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # also how `load_state_dict` puts in new groups and a new state
        self._share()

    @override
    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Refuse a further group once it is built: a ValueError, as there is no telling whose it would be."""
        if self.optimizers:
            names = ", ".join(type(optimizer).__name__ for optimizer in self.optimizers)
            raise ValueError(f"param_group must be added to one of {names} before they are combined")
        super().add_param_group(param_group)

    @override
    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Evaluate the closure once, then let every optimizer take its step."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for optimizer in self.optimizers:
            optimizer.step()
        return loss
