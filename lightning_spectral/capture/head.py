"""What a model's last linear layer takes, and the gradient of what it gives, read as training passes by."""

import functools
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from lightning_spectral.capture.activations import always, no_hook, outside_dynamo
from lightning_spectral.capture.contraction import is_linear
from lightning_spectral.capture.names import clean_name, matching
from lightning_spectral.capture.one_line import reason_of

MOST_CHECKED = 2**22
"""Logits of a pass that are copied, so that rows can be checked when their gradient comes by."""
LEAST_ROWS = 256

RAN_TWICE = "its head ran more than once before a backward pass, so that rows of one loss cannot be told"


class HeadPass(NamedTuple):
    """One run of a head and the backward pass through it; N rows."""

    inputs: Tensor
    """``(N, d)``."""
    gradient: Tensor
    """``(N, classes)`` of the loss with respect to the outputs."""
    checked: Tensor
    """``(M,)`` rows, spread over all."""
    logits: Tensor
    """``(M, classes)`` outputs of these."""


def find_head(root: nn.Module, name: str) -> nn.Module:
    """The linear layer of a clean name.

    Raises:
        ValueError: If there is none of this name, or it is no linear layer.
    """
    modules: dict[str, nn.Module] = {}
    for own, module in root.named_modules():
        if own and (cleaned := clean_name(root, own)):
            modules[cleaned] = module  # of a wrapper and what it holds the module itself
    if name not in modules:
        linear = [known for known, module in modules.items() if is_linear(module)]
        hint = "" if linear else ": there is no linear layer"
        try:
            matching("readout", name, linear or list(modules))
        except ValueError as error:
            raise ValueError(f"{error}{hint}") from None
        raise ValueError(f"readout must be the name of one module, got the pattern {name!r}")
    if not is_linear(modules[name]):
        raise ValueError(
            f"readout must name a linear layer, whose output is W h and maybe a bias, got {name!r}, "
            f"a {type(modules[name]).__name__}"
        )
    return modules[name]


class HeadReader:
    """A forward hook on a head that keeps its input until the gradient of its output comes by, while it is open.

    No node is added to the graph. Nothing is raised within the passes of training: ``fail`` is called with the reason.

    Args:
        consume: Called within the backward pass.
        fail: Likewise.
        timer: Makes a context to spend that time in.
        is_in_step: Whether what runs is the step's own, as for :class:`.activations.ActivationReader`.
    """

    def __init__(
        self,
        consume: Callable[[HeadPass], None],
        fail: Callable[[str], None],
        timer: Callable[[], AbstractContextManager[Any]] = nullcontext,
        is_in_step: Callable[[], bool] = always,
    ) -> None:
        self.is_open = False
        self.takes_runs = False
        """Whether what runs now is a forward pass, not one that checkpointing repeats in a backward pass."""
        self._consume = consume
        self._fail = fail
        self._timer = timer
        self._is_in_step = is_in_step
        self._module: nn.Module | None = None
        self._handle: RemovableHandle | None = None
        self._num_waiting = 0

    def watch(self, module: nn.Module | None) -> None:
        """Watch this head, and no other that was watched before; None for none."""
        if module is self._module:
            return
        if self._handle is not None:
            self._handle.remove()
        self._module, self._handle = module, None
        if module is not None:
            self._handle = module.register_forward_hook(_ForwardHook(self), with_kwargs=True)

    def begin(self) -> None:
        """A batch begins that is to be read."""
        self.is_open, self.takes_runs, self._num_waiting = True, True, 0

    def ran(self, inputs: tuple[Any, ...], output: Any) -> None:
        """The head has run."""
        if not (self.is_open and self.takes_runs and isinstance(output, Tensor) and output.requires_grad):
            return
        if not self._is_in_step():
            return
        try:
            self._num_waiting += 1
            if self._num_waiting > 1:
                raise ValueError(RAN_TWICE)
            self._ask(inputs[0].detach(), output)
        except Exception as error:  # never raised: a forward pass is under way
            self._fail(reason_of(error))

    def _ask(self, x: Tensor, output: Tensor) -> None:
        if x.shape[:-1] != output.shape[:-1]:
            raise ValueError(f"its head makes {tuple(output.shape)} of {tuple(x.shape)}, which is not row by row")
        with torch.no_grad(), self._timer():
            rows = output.detach().reshape(-1, output.shape[-1])
            num = min(len(rows), max(LEAST_ROWS, MOST_CHECKED // max(1, rows.shape[-1])))
            checked = torch.linspace(0, max(len(rows) - 1, 0), num, device=rows.device).long()
            logits = rows[checked]  # a copy: the model may write into its output
        output.register_hook(functools.partial(self._read, x, checked, logits))

    def _read(self, x: Tensor, checked: Tensor, logits: Tensor, grad: Tensor) -> None:
        self._num_waiting = 0
        if not self.is_open:
            return
        try:
            with self._timer(), torch.no_grad(), torch.autocast(grad.device.type, enabled=False):
                rows = HeadPass(x.reshape(-1, x.shape[-1]), grad.reshape(-1, grad.shape[-1]), checked, logits)
                self._consume(rows)
        except Exception as error:  # never raised: a backward pass is under way
            self._fail(reason_of(error))


class _ForwardHook:
    """Holds its reader; a module that is copied or saved leaves the hook behind."""

    def __init__(self, reader: HeadReader) -> None:
        self.ran = outside_dynamo(reader.ran, type(self))

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        if not torch.compiler.is_compiling():
            self.ran(args or tuple(kwargs.values()), output)

    def __reduce__(self) -> Any:
        return no_hook, ()
