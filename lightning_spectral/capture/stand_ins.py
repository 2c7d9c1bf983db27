"""What stands in a copy of a module for its metrics, Trainer and optimizers, so that it can reach none of them."""

import copy
import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, NoReturn

import torch
from torchmetrics import Metric, MetricCollection


class MetricTermError(ValueError):
    """A loss is NaN because a metric, for whose value NaN stood, is one of its terms."""


def is_metric(part: Any) -> bool:
    """Whether a module is a torchmetrics metric, or a collection of them."""
    return isinstance(part, (Metric, MetricCollection))


class SilentMetric:
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


def silence_logging(part: Any, trainer: Any) -> None:
    """Let what a LightningModule of the copy logs go nowhere, and ``trainer`` be its Trainer."""
    part.log = part.log_dict = lambda *args, **kwargs: None
    part.all_gather = _refuse_to_gather
    if trainer is not None:
        part._trainer = trainer


def _refuse_to_gather(*args: Any, **kwargs: Any) -> Any:
    raise RuntimeError("training_step gathers over ranks, which the loss of one sample cannot: give loss_fn")


class Undrawable:
    """Stands in for an iterator of the module, which each sample would find where the one before has left it."""

    def __init__(self, iterator: Any) -> None:
        self._kind = type(iterator).__name__

    def __iter__(self) -> "Undrawable":
        return self

    def __next__(self) -> NoReturn:
        raise ValueError(
            f"training_step draws from an iterator, a {self._kind}, which cannot be put back for each sample: give "
            "loss_fn, which takes all it needs from the batch"
        )


class Watched(NamedTuple):
    """What training uses, and a stand-in reads: nothing of the stand-in's own."""

    part: Any


class _Live:
    """Hands on what training uses, but first to who wants to know of it; writes to attributes stay here."""

    def __init__(self, watched: Any) -> None:
        self._watched = Watched(watched)
        self.tell: Callable[[Any, str, Any], None] | None = None
        """Is given this, a name, and what is handed on by it."""

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._watched.part, name)
        if self.tell is not None:
            self.tell(self, name, value)
        return value


class Bystander(_Live):
    """A Trainer to read from: writes stay here, loggers swallow what they are given, optimizers can but be read."""

    def __init__(self, trainer: Any, memo: Mapping[int, Any]) -> None:
        from lightning.pytorch.loggers.logger import DummyLogger

        super().__init__(trainer)
        # Of no sample's doing, and so not put back between them.
        self._at = Watched([])
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

    def stand_at(self, step: int) -> None:
        """Be where training was after so many steps of optimizers."""
        self._at.part[:] = [step]

    @property
    def global_step(self) -> int:
        """Of the batch whose samples are asked for; of now where nobody said."""
        return int(self._at.part[0] if self._at.part else self._watched.part.global_step)

    def stand_before(self, module: Any) -> None:
        """Be the Trainer of a copied module."""
        self.model = self.lightning_module = module
        if "strategy" in vars(self):
            self.strategy.model = self.strategy.lightning_module = module

    def tell_of(self, tell: Callable[[Any, str, Any], None] | None) -> None:
        """Let ``tell`` know what training uses before it is handed on."""
        for part in (self, vars(self).get("strategy")):
            if part is not None:
                part.tell = tell


class _Reading:
    """Hands on what can be read of an object: writes stay here, and of its methods only those that get something."""

    def __init__(self, watched: Any, **instead: Any) -> None:
        vars(self).update(instead, _watched=Watched(watched))

    @property  # type: ignore[misc]
    def __class__(self) -> Any:
        """What Lightning asks before it hands one out."""
        return type(vars(self)["_watched"].part)

    def __getattr__(self, name: str) -> Any:
        value = getattr(vars(self)["_watched"].part, name)
        if callable(value) and not name.startswith("get_"):
            return _refuse_to_move
        return copy.copy(value) if isinstance(value, (dict, list)) else value


class _Strategy(_Live):
    """A strategy whose optimizers can but be read."""

    def __init__(self, watched: Any, optimizers: list[Any]) -> None:
        super().__init__(watched)
        self.model: Any = None
        self.lightning_module: Any = None
        self.optimizers = self._lightning_optimizers = optimizers


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
