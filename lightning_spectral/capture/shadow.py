"""The loss of any batch, computed on a shadow of the module, so that asking for it leaves the module as it is."""

import copy
import functools
import importlib
import inspect
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torchmetrics import Metric, MetricCollection
from typing_extensions import override

from lightning_spectral.capture.parameters import named_parameters

LossFunction = Callable[[nn.Module, Any], Tensor]
"""``loss_fn(module, batch) -> loss``, 0-dim."""

NO_OPTIMIZERS = "automatic_optimization=False: its training_step moves the optimizers, so give loss_fn(module, batch)"


class BatchLoss(nn.Module):
    """The loss of a batch as a function of a shadow's parameters.

    The shadow is a deep copy with parameters of its own that share the memory of the original's: a backward pass of the
    shadow fills nobody's ``.grad``, and what ``training_step`` moves (counters, buffers, metric states) are copies.
    Logging does nothing, torchmetrics are neither updated nor computed (NaN stands for their values), and hooks are
    gone, but for those by which :mod:`torch.nn.utils` computes weights.

    Args:
        module: A LightningModule, or any module if there is a ``loss_fn``.
        loss_fn: Takes the shadow and the batch; None calls ``training_step``.
        context: Makes the context of the forward pass, autocast for example.
        trainer: What the shadow sees as its ``trainer``; its loggers swallow what they are given.
        scale: Factor on the loss, so that gradients in float16 do not vanish; whoever asks for them divides by it.

    Raises:
        ValueError: If there is no loss to call: manual optimisation, or no ``training_step``.
        RuntimeError: If the module cannot be copied.
    """

    def __init__(
        self,
        module: nn.Module,
        loss_fn: LossFunction | None = None,
        context: Callable[[], AbstractContextManager[Any]] = nullcontext,
        trainer: Any = None,
        scale: float = 1.0,
    ) -> None:
        super().__init__()
        check_loss(module, loss_fn)
        self.shadow = _shadow(module, trainer)
        self.context = context
        self.scale = scale
        self.compute = _training_loss if loss_fn is None else loss_fn
        self.requires_grad = {name: p.requires_grad for name, p in self.shadow.named_parameters()}

    @override
    def forward(self, batch: Any) -> Tensor:
        """The loss, 0-dim, times ``scale``; ValueError if what comes back is no scalar."""
        with self.context():
            loss = self.compute(self.shadow, batch)
        if not isinstance(loss, Tensor) or loss.numel() != 1:
            what = f"shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else repr(loss)
            raise ValueError(f"loss must be a tensor with one number, got {what}")
        return loss.reshape(()) * self.scale if self.scale != 1 else loss.reshape(())

    def parameter(self, name: str) -> tuple[str, nn.Parameter]:
        """A parameter of the shadow by its clean name in the module, any of them if it is tied.

        With its name here, as ``torch.func.functional_call`` wants it.
        """
        return self._by_name[name]

    @functools.cached_property
    def _by_name(self) -> dict[str, tuple[str, nn.Parameter]]:
        first = {id(p): name for name, p in self.named_parameters()}
        return {name: (first[id(p)], p) for name, p in named_parameters(self.shadow).items()}

    def freeze(self) -> None:
        """Let no parameter of the shadow ask for a gradient: what is wanted is differentiated by other means."""
        self.shadow.requires_grad_(False)

    def unfreeze(self) -> None:
        """Undo :meth:`freeze`."""
        for name, parameter in self.shadow.named_parameters():
            parameter.requires_grad_(self.requires_grad[name])


def check_loss(module: nn.Module, loss_fn: LossFunction | None) -> None:
    """Refuse, in a ValueError of one line, a module whose loss could not be asked for without harm."""
    if loss_fn is not None:
        return
    if not getattr(module, "automatic_optimization", True):
        raise ValueError(f"loss_fn must be given for {type(module).__name__} with {NO_OPTIMIZERS}")
    step = getattr(type(module), "training_step", None)
    if step is None or step is LightningModule.training_step:
        raise ValueError(f"loss_fn must be given for {type(module).__name__}, which has no training_step")


def load_loss(loss_fn: LossFunction | str | None) -> LossFunction | None:
    """A loss function, or the one that an import path means; ValueError if that leads to nothing that can be called."""
    if loss_fn is None or callable(loss_fn):
        return loss_fn
    try:
        module, _, name = loss_fn.rpartition(".")
        loaded = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError, TypeError) as error:
        raise ValueError(f"loss_fn must be a callable or its import path, got {loss_fn!r}: {error}") from error
    if not callable(loaded):
        raise ValueError(f"loss_fn must be a callable or its import path, got {loss_fn!r}, a {type(loaded).__name__}")
    return loaded


def _training_loss(module: Any, batch: Any) -> Tensor:
    takes_index = len(inspect.signature(module.training_step).parameters) > 1
    output = module.training_step(batch, 0) if takes_index else module.training_step(batch)
    return output["loss"] if isinstance(output, Mapping) else output


def _shadow(module: nn.Module, trainer: Any) -> nn.Module:
    try:
        # To be differentiated, even where a validation pass allows nothing else to be.
        with torch.inference_mode(False), _CopyGraphTensors():
            memo: dict[int, Any] = {id(p): _alias(p) for p in module.parameters()}
            shadow = copy.deepcopy(module, memo)
    except Exception as error:
        raise RuntimeError(f"{type(module).__name__} cannot be copied: {str(error).partition(chr(10))[0]}") from error
    for part in shadow.modules():
        _clear_hooks(part)
        if isinstance(part, (Metric, MetricCollection)):
            _silence_metric(part)
        if hasattr(part, "training_step") and hasattr(part, "log_dict"):
            _silence_logging(part, trainer)
    return shadow


def _alias(parameter: nn.Parameter) -> nn.Parameter:
    return nn.Parameter(parameter.detach(), requires_grad=parameter.requires_grad)


class _CopyGraphTensors(TorchFunctionMode):
    """Lets a deep copy pass over tensors with a history, which a module may well keep: losses of an epoch, say."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is Tensor.__deepcopy__ and args[0].grad_fn is not None:
            return args[0].detach().clone()
        return func(*args, **(kwargs or {}))


HOOKS = (
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_backward_hooks",
    "_backward_pre_hooks",
)


def _clear_hooks(part: nn.Module) -> None:
    for attribute in HOOKS:
        hooks = getattr(part, attribute, {})
        for key in [key for key, hook in hooks.items() if not _computes_weights(hook)]:
            del hooks[key]


def _computes_weights(hook: Any) -> bool:
    return type(hook).__module__.startswith("torch.nn.utils")


def _silence_metric(metric: Any) -> None:
    def nothing(*args: Any, **kwargs: Any) -> Any:
        if isinstance(metric, MetricCollection):
            return {name: torch.tensor(torch.nan) for name in metric}
        return torch.tensor(torch.nan)

    metric.forward = metric.update = metric.compute = nothing


def _silence_logging(part: Any, trainer: Any) -> None:
    part.log = part.log_dict = lambda *args, **kwargs: None
    part.all_gather = _refuse_to_gather
    if trainer is not None:
        part._trainer = _Bystander(trainer)


def _refuse_to_gather(*args: Any, **kwargs: Any) -> Any:
    raise RuntimeError("training_step gathers over ranks, which the loss of one sample cannot: give loss_fn")


class _Bystander:
    """A Trainer to read from: writes stay here, loggers swallow what they are given, optimizers are out of reach."""

    def __init__(self, trainer: Any) -> None:
        from lightning.pytorch.loggers.logger import DummyLogger

        self._watched = trainer
        self.logger = DummyLogger()
        self.loggers = [self.logger]
        self.callback_metrics: dict[str, Any] = dict(trainer.callback_metrics)
        self.optimizers: list[Any] = []
        self.callbacks: list[Any] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._watched, name)
