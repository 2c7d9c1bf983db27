"""What goes wrong when a step calls it under ``torch.func``, and what serves instead."""

import functools
import types
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from typing_extensions import override

from lightning_spectral.capture.branches import ASKING, ask

_attention = F.scaled_dot_product_attention


def attention(query: Tensor, key: Tensor, value: Tensor, *more: Any, **named: Any) -> Tensor:
    """Attention as autocast has it: from inputs in its type, and by itself without it.

    Its parts, into which vmap takes it apart, are functions of their own to autocast, which would give some of them
    float32 and others not.
    """
    device = query.device.type
    if not torch.is_autocast_enabled(device):
        return _attention(query, key, value, *more, **named)
    dtype = torch.get_autocast_dtype(device)

    def cast(part: Any) -> Any:
        is_cast = isinstance(part, Tensor) and part.is_floating_point() and part.dtype != torch.float64
        return part.to(dtype) if is_cast else part

    with torch.autocast(device, enabled=False):
        parts = [cast(part) for part in (query, key, value, *more)]
        return _attention(*parts, **{name: cast(part) for name, part in named.items()})


def _with_attention(function: Any) -> Any:
    """A copy of a function of torch that calls :func:`attention`: a mode does not see what it calls itself."""
    names = function.__globals__ | {"scaled_dot_product_attention": attention}
    copy = types.FunctionType(function.__code__, names, function.__name__, function.__defaults__, function.__closure__)
    copy.__kwdefaults__ = function.__kwdefaults__
    return copy


def _in_one_type(norm: Any) -> Any:
    """A norm of 16 bits by statistics and weights in float32, as kernels have it but no rule of vmap."""

    @functools.wraps(norm)
    def normed(x: Tensor, *more: Any, **named: Any) -> Tensor:
        types = {part.dtype for part in (*more, *named.values()) if isinstance(part, Tensor)} - {x.dtype}
        return norm(x, *more, **named) if len(types) != 1 else norm(x.to(types.pop()), *more, **named).to(x.dtype)

    return normed


_NORMS: list[Any] = [F.batch_norm, F.instance_norm, F.layer_norm]
_NORMS += [torch.batch_norm, torch.instance_norm, torch.layer_norm]

_INSTEAD: dict[Any, Any] = {
    _attention: attention,
    F.multi_head_attention_forward: _with_attention(F.multi_head_attention_forward),
    **{norm: _in_one_type(norm) for norm in _NORMS},
}


class VmapRules(TorchFunctionMode):
    """Takes calls that go wrong under torch.func to what does not; raises for one that would end the process.

    Args:
        has_drawn: Whether random numbers were drawn since the step began.
    """

    def __init__(self, has_drawn: Callable[[], bool]) -> None:
        super().__init__()
        self._has_drawn = has_drawn

    @override
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__self__", None) is Tensor.data and func.__name__ == "__set__":
            # A segmentation fault.
            raise RuntimeError("tensor.data = other, in training_step, is nothing that torch.func can follow")
        if getattr(func, "__name__", None) in ASKING and len(args) == 1 and not kwargs:
            return ask(func, args[0], self._has_drawn)
        return _INSTEAD.get(func, func)(*args, **(kwargs or {}))


def buffers_of_samples(root: nn.Module) -> set[str]:
    """Names of buffers that each sample writes to in its own way: running statistics of norms in training.

    Vectorised, each sample must have them for itself.
    """
    return {
        f"{name}.{buffer}" if name else buffer
        for name, part in root.named_modules()
        if isinstance(part, nn.modules.batchnorm._NormBase) and part.training
        for buffer in ("running_mean", "running_var")
        if getattr(part, buffer) is not None
    }
