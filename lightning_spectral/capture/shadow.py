"""The loss of any batch, computed on a shadow of the module, so that asking for it leaves the module as it is."""

import copy
import functools
import importlib
import inspect
import sys
import types
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torchmetrics import Metric, MetricCollection
from typing_extensions import override

from lightning_spectral.capture.batch import batch_of, copied, tensors
from lightning_spectral.capture.kept import Kept, content_of
from lightning_spectral.capture.parameters import named_parameters

LossFunction = Callable[[nn.Module, Any], Tensor]
"""``loss_fn(module, batch) -> loss``, 0-dim."""

NO_OPTIMIZERS = "automatic_optimization=False: its training_step moves the optimizers, so give loss_fn(module, batch)"


class BatchLoss(nn.Module):
    """The loss of a batch as a function of a shadow's parameters.

    The shadow is a deep copy, parameters included: a backward pass of it fills nobody's ``.grad``, and whatever
    ``training_step`` writes (counters, buffers, metric states, a teacher's weights) are copies. What it can reach
    beside them (globals, closures, generators) is put back by :meth:`isolated`. The user's own hooks stay, ours are
    gone. Logging does nothing. torchmetrics are neither updated nor computed, NaN stands for their values, until one is
    seen to be a term of the loss.

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
        self.shadow, self._originals = _shadow(module, trainer)
        self.context = context
        self.scale = scale
        self.loss_fn = loss_fn
        self.batch_idx = 0
        """What ``training_step`` is told of the batch whose samples are asked for."""
        self.dataloader_idx = 0
        self.requires_grad = {name: p.requires_grad for name, p in self.shadow.named_parameters()}
        self._metrics = [_SilentMetric(part) for part in self.shadow.modules() if is_metric(part)]
        self._kept: Kept | None = None

    @override
    def forward(self, batch: Any) -> Tensor:
        """The loss, 0-dim, times ``scale``; ValueError if what comes back is no scalar."""
        # Of its own: a step may write into its batch.
        batch = copied(batch_of(batch))
        with self.context():
            loss = self._training_loss(batch) if self.loss_fn is None else self.loss_fn(self.shadow, batch)
        if not isinstance(loss, Tensor) or loss.numel() != 1:
            what = f"shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else repr(loss)
            raise ValueError(f"loss must be a tensor with one number, got {what}")
        return loss.reshape(()) * self.scale if self.scale != 1 else loss.reshape(())

    def _training_loss(self, batch: Any) -> Tensor:
        step: Any = self.shadow.training_step
        names = list(inspect.signature(step).parameters)
        # As Lightning does it.
        known = {"batch_idx": self.batch_idx, "dataloader_idx": self.dataloader_idx}
        given = {name: known[name] for name in names[1:] if name in known}
        output = step(batch, self.batch_idx) if len(names) > 1 and not given else step(batch, **given)
        return output["loss"] if isinstance(output, Mapping) else output

    def of_training(self, batch: Any) -> float:
        """What ``training_step`` will return for a batch that is about to begin."""
        module: Any = self.shadow
        if type(module).on_train_batch_start is not LightningModule.on_train_batch_start:
            # What it does to the batch the samples that are kept do not see: the two losses then differ, as they must.
            module.on_train_batch_start(copied(batch), self.batch_idx)
        value = self(batch)
        try:
            self.check(value)
        except MetricTermError:
            self.compute_metrics()
            value = self(batch)
        return float(value) / self.scale

    @contextmanager
    def isolated(self, *beside: Any) -> Iterator[Kept]:
        """Ask for losses in here: whatever they write or draw from, :func:`isolated` included, is as it was afterwards.

        ``beside`` is what else a loss may reach: the batches. ValueError for what cannot be put back.
        """
        roots = (self.shadow, self.loss_fn, *beside)
        # A loss is given copies of a batch's tensors.
        known = self._originals | {id(tensor): tensor for tensor in tensors(beside)}
        with isolated():
            self._kept = kept = Kept(roots, known, stops=(_Bystander, _SilentMetric))
            try:
                yield kept
            finally:
                kept.put_back()
                self._kept = None

    def reset(self, anew: bool = False) -> None:
        """Let the next loss begin where this one did, see :meth:`Kept.reset`; generators go on."""
        if self._kept is not None:
            self._kept.reset(anew)

    def check(self, values: Tensor) -> None:
        """Raise :class:`MetricTermError` for losses that are NaN while NaN stands for metrics that were asked for."""
        if any(metric.was_asked for metric in self._metrics) and bool(values.isnan().any()):
            raise MetricTermError("a metric is a term of the loss")

    def compute_metrics(self) -> None:
        """From now on let metrics compute, each on its copy of the state and on this rank alone."""
        self.reset(anew=True)
        for metric in self._metrics:
            metric.let_compute()

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


@contextmanager
def isolated() -> Iterator[None]:
    """Random streams restored afterwards, gradients on even where a validation pass turned them off, no compiler."""
    # Without dynamo in the process nothing is compiled, and importing it takes seconds.
    eager = torch.compiler.set_stance("force_eager") if "torch._dynamo" in sys.modules else nullcontext()
    failure: BaseException | None = None
    with isolate_rng(include_cuda=torch.cuda.is_available()):
        try:
            with torch.inference_mode(False), torch.enable_grad(), eager:
                yield
        except BaseException as error:  # one that passes through isolate_rng keeps it from restoring anything
            failure = error
    if failure is not None:
        raise failure


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


def _shadow(module: nn.Module, trainer: Any) -> tuple[nn.Module, dict[int, Any]]:
    """The copy, and what each of its parts was copied from, by the part's id."""
    try:
        # To be differentiated, even where a validation pass allows nothing else to be.
        with torch.inference_mode(False), _CopyGraphTensors():
            memo: dict[int, Any] = {id(p): _copy(p) for p in module.parameters()}
            originals = {id(memo[id(p)]): p for p in module.parameters()}
            shadow = copy.deepcopy(module, memo)
    except Exception as error:
        raise RuntimeError(f"{type(module).__name__} cannot be copied: {str(error).partition(chr(10))[0]}") from error
    # A deep copy keeps all alive that it has copied.
    originals |= {id(memo[id(part)]): part for part in memo.get(id(memo), ()) if id(part) in memo}
    for part in shadow.modules():
        if isinstance(part, nn.SyncBatchNorm) and part.training and _many_ranks():
            raise RuntimeError("a loss of one sample cannot wait for other ranks in SyncBatchNorm: give loss_fn")
        _rebind_hooks(part, memo)
        if hasattr(part, "training_step") and hasattr(part, "log_dict"):
            _silence_logging(part, trainer, memo)
    return shadow, originals


def _many_ranks() -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def _copy(parameter: nn.Parameter) -> nn.Parameter:
    return nn.Parameter(parameter.detach().clone(), requires_grad=parameter.requires_grad)


class _CopyGraphTensors(TorchFunctionMode):
    """Lets a deep copy pass over tensors with a history, which a module may well keep: losses of an epoch, say."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is Tensor.__deepcopy__ and args[0].grad_fn is not None:
            return args[0].detach().clone()
        return func(*args, **(kwargs or {}))


HOOKS = (
    "_forward_hooks",
    "_forward_pre_hooks",
    "_backward_hooks",
    "_backward_pre_hooks",
)

WATCHERS = ("wandb",)
"""Packages whose hooks send what they see elsewhere; nothing of it comes back to the loss."""


def _rebind_hooks(part: nn.Module, memo: Mapping[int, Any]) -> None:
    """Let the user's hooks, which a deep copy of the module shares with it, mean the copies of what they enclose."""
    for attribute in HOOKS:
        hooks = getattr(part, attribute, {})
        for key, hook in list(hooks.items()):
            package = (getattr(hook, "__module__", None) or type(hook).__module__).partition(".")[0]
            if package in WATCHERS:
                del hooks[key]
            elif package != "torch":  # whose hooks compute weights
                is_closure = isinstance(hook, types.FunctionType) and hook.__closure__
                hooks[key] = functools.partial(_run_if_it_can, _rebound(hook, memo) if is_closure else hook)


def _run_if_it_can(hook: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """A hook that looks at a whole batch may not be able to look at one sample, and is passed over there.

    If it did more than look, the losses of samples are others than that of the batch, which the self-check finds.
    """
    try:
        return hook(*args, **kwargs)
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except Exception:
        return None


def _rebound(function: types.FunctionType, memo: Mapping[int, Any]) -> types.FunctionType:
    cells = [cell for cell in function.__closure__ or () if id(content_of(cell)) in memo]
    if not cells:
        return function
    copies = {id(cell): types.CellType(memo[id(content_of(cell))]) for cell in cells}
    closure = tuple(copies.get(id(cell), cell) for cell in function.__closure__ or ())
    rebound = types.FunctionType(
        function.__code__, function.__globals__, function.__name__, function.__defaults__, closure
    )
    rebound.__kwdefaults__, rebound.__module__ = function.__kwdefaults__, function.__module__
    rebound.__dict__.update(function.__dict__)
    return rebound


class MetricTermError(ValueError):
    """A loss is NaN because a metric, for whose value NaN stood, is one of its terms."""


def is_metric(part: Any) -> bool:
    """Whether a module is a torchmetrics metric, or a collection of them."""
    return isinstance(part, (Metric, MetricCollection))


class _SilentMetric:
    """Stands before a metric of the shadow, and is silent until :meth:`let_compute`."""

    def __init__(self, metric: Any) -> None:
        self.metric = metric
        self.was_asked = False
        self._is_silent = True
        if isinstance(metric, Metric):
            metric.sync_on_compute = metric.dist_sync_on_step = metric._to_sync = False
        for name in ("forward", "update", "compute"):
            setattr(metric, name, functools.partial(self._answer, getattr(metric, name)))

    def _answer(self, method: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if not self._is_silent:
            return method(*args, **kwargs)
        self.was_asked = True
        if isinstance(self.metric, MetricCollection):
            return {name: torch.tensor(torch.nan) for name in self.metric}
        return torch.tensor(torch.nan)

    def let_compute(self) -> None:
        """Let the metric work, on this rank alone."""
        self._is_silent = self.was_asked = False


def _silence_logging(part: Any, trainer: Any, memo: Mapping[int, Any]) -> None:
    part.log = part.log_dict = lambda *args, **kwargs: None
    part.all_gather = _refuse_to_gather
    if trainer is not None:
        part._trainer = _Bystander(trainer, memo)


def _refuse_to_gather(*args: Any, **kwargs: Any) -> Any:
    raise RuntimeError("training_step gathers over ranks, which the loss of one sample cannot: give loss_fn")


class _Bystander:
    """A Trainer to read from: writes stay here, loggers swallow what they are given, optimizers can but be read."""

    def __init__(self, trainer: Any, memo: Mapping[int, Any]) -> None:
        from lightning.pytorch.loggers.logger import DummyLogger

        self._watched = trainer
        self.logger = DummyLogger()
        self.loggers = [self.logger]
        self.callback_metrics: dict[str, Any] = dict(trainer.callback_metrics)
        self.callbacks: list[Any] = []
        optimizers = getattr(trainer, "optimizers", None) or []
        self.optimizers = [_Optimizer(optimizer, memo) for optimizer in optimizers]
        if (strategy := getattr(trainer, "strategy", None)) is not None:
            self.strategy = _Strategy(strategy, self.optimizers)
        configs = getattr(trainer, "lr_scheduler_configs", None) or []
        self.lr_scheduler_configs = [_Reading(config, scheduler=_Reading(config.scheduler)) for config in configs]

    def __getattr__(self, name: str) -> Any:
        return getattr(self._watched, name)


class _Reading:
    """Hands on what can be read of an object: writes stay here, and of its methods only those that get something."""

    def __init__(self, watched: Any, **instead: Any) -> None:
        vars(self).update(instead, _watched=watched)

    @property  # type: ignore[misc]
    def __class__(self) -> Any:
        """What Lightning asks before it hands one out."""
        return type(vars(self)["_watched"])

    def __getattr__(self, name: str) -> Any:
        value = getattr(vars(self)["_watched"], name)
        if callable(value) and not name.startswith("get_"):
            return _refuse_to_move
        return copy.copy(value) if isinstance(value, (dict, list)) else value


class _Strategy:
    """A strategy whose optimizers can but be read."""

    def __init__(self, watched: Any, optimizers: list[Any]) -> None:
        self._watched = watched
        self.optimizers = self._lightning_optimizers = optimizers

    def __getattr__(self, name: str) -> Any:
        return getattr(self._watched, name)


class _Optimizer(_Reading):
    """An optimizer to read from; its parameters are the shadow's."""

    def __init__(self, watched: Any, memo: Mapping[int, Any]) -> None:
        groups = [
            {key: copy.copy(value) if isinstance(value, list) else value for key, value in group.items()}
            | {"params": [memo.get(id(p), p) for p in group["params"]]}
            for group in watched.param_groups
        ]
        super().__init__(watched, param_groups=groups, optimizer=self)


def _refuse_to_move(*args: Any, **kwargs: Any) -> Any:
    raise RuntimeError(
        "training_step moves an optimizer or a scheduler, which the loss of one sample must not: give loss_fn"
    )
