"""One training step of a copy of a module, under a Trainer of its own, with somebody who watches."""

import contextlib
import copy
import importlib
import logging
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn
from torch.optim import Optimizer
from typing_extensions import override

from lightning_spectral.callbacks.loss_scale import gradient_scale, loss_of
from lightning_spectral.capture.batch import copied
from lightning_spectral.capture.shadow import LossFunction

PACKAGES = ("lightning.pytorch", "pytorch_lightning")
"""The two names of Lightning; a Trainer of either takes its own modules alone."""


class Spectator(Protocol):
    """Who watches the one step; none of its methods may raise."""

    def start(self, trainer: Trainer, batch: Any) -> None:
        """The batch, where the module is, is about to enter the training step."""

    def before_backward(self, scale: Callable[[], float], loss: Tensor) -> None:
        """A backward pass begins, see :meth:`Measurement.before_backward`."""

    def after_backward(self, is_last: bool) -> None:
        """A backward pass has ended."""

    def before_optimizer_step(self, optimizer: Any) -> None:
        """An optimizer is about to move its parameters."""

    def end(self, loss: float | None) -> None:
        """The step has ended, with its loss if it gave one."""


class _Enough(Exception):  # noqa: N818
    """The step has been seen; nothing that follows in a run is wanted."""


class _Watcher(Callback):
    def __init__(self, spectator: Spectator) -> None:
        self.spectator = spectator

    @override
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self.spectator.start(trainer, batch)

    @override
    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        self.spectator.before_backward(lambda: gradient_scale(trainer, pl_module), loss.detach())

    @override
    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.spectator.after_backward(pl_module.automatic_optimization)

    @override
    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        self.spectator.before_optimizer_step(optimizer)

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        loss = loss_of(outputs, trainer, pl_module)
        self.spectator.end(None if loss is None else float(loss))
        raise _Enough

    @override
    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        raise ValueError("no training step was made: on_train_batch_start returned -1")


class _Plain(LightningModule):
    """A module with a loss function, as something that a Trainer takes."""

    def __init__(self, module: nn.Module, loss_fn: LossFunction) -> None:
        super().__init__()
        self.module = module
        self.loss_fn = loss_fn

    @override
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.loss_fn(self.module, batch)

    @override
    def configure_optimizers(self) -> Optimizer | None:
        parameters = [p for p in self.parameters() if p.requires_grad]
        return torch.optim.SGD(parameters, 0.0) if parameters else None


class _One:
    """A loader of one batch."""

    def __init__(self, batch: Any) -> None:
        self.batch = batch

    def __iter__(self) -> Iterator[Any]:
        yield self.batch

    def __len__(self) -> int:
        return 1


def take_step(
    module: nn.Module,
    batch: Any,
    spectator: Spectator,
    loss_fn: LossFunction | None,
    accelerator: str | None,
    precision: Any,
) -> None:
    """Let a module make one training step, as far as the optimizer's move, and then no more.

    Hooks of the module run as in ``fit`` until then; its callbacks, validation, checkpoints and loggers do not.

    Args:
        module: A LightningModule that may be changed; or any module, with the loss function.
        batch: A batch, which may be changed; a LightningDataModule, whose first training batch is taken; None for the
            first that the module's own loader gives.
        spectator: Who watches.
        loss_fn: For a module without a ``training_step``.
        accelerator: Lightning's; None for where the module is.
        precision: Lightning's.

    Raises:
        Exception: Whatever the module or its data raise, or Lightning about them.
    """
    model: Any = module if has_step(module) else _Plain(module, loss_fn)  # type: ignore[arg-type]
    model.configure_callbacks = lambda: []
    has_own = batch is None or is_data_module(batch)
    if not has_own:
        model.prepare_data = lambda: None
    kind, devices = _device_of(module) if accelerator is None else (accelerator, 1)
    with _quiet():
        trainer = _part_of_lightning(model, "trainer").Trainer(
            accelerator=kind,
            devices=devices,
            precision=precision,
            plugins=[_part_of_lightning(model, "plugins.environments").LightningEnvironment()],
            logger=_part_of_lightning(model, "loggers.logger").DummyLogger(),
            callbacks=[_Watcher(spectator)],
            # More than the one, for schedules that are made of the number of steps.
            max_epochs=1000,
            limit_train_batches=1,
            limit_val_batches=0,
            num_sanity_val_steps=0,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        try:
            if is_data_module(batch):
                trainer.fit(model, datamodule=batch)
            else:
                trainer.fit(model, None if batch is None else _One(batch))
        except _Enough:
            return
    raise ValueError("batch must come from a train_dataloader that gives one, got none")


def has_step(module: nn.Module) -> bool:
    """Whether a module says how it is trained."""
    base = _lightning_module(module)
    return base is not None and getattr(type(module), "training_step", None) is not base.training_step


def _lightning_module(module: nn.Module) -> Any:
    """The class LightningModule that a module is of, by whichever of its two names Lightning is installed."""
    names = {f"{package}.core.module" for package in PACKAGES}
    bases = (b for b in type(module).__mro__ if b.__name__ == "LightningModule" and b.__module__ in names)
    return next(bases, None)


def _part_of_lightning(module: nn.Module, name: str) -> Any:
    """A part of the package whose Trainer takes a module."""
    package = _lightning_module(module).__module__.removesuffix(".core.module")
    return importlib.import_module(f"{package}.{name}")


def is_data_module(batch: Any) -> bool:
    """Whether data come with a loader, rather than as a batch."""
    return any(base.__name__ == "LightningDataModule" for base in type(batch).__mro__)


def own_copy(batch: Any) -> Any:
    """A batch that may be changed."""
    try:
        return copy.deepcopy(batch)
    except Exception:  # tensors with a history, for example
        return copied(batch)


def _device_of(module: nn.Module) -> tuple[str, Any]:
    device = next((p.device for p in module.parameters()), torch.device("cpu"))
    if device.type == "cuda":
        return "gpu", [device.index or 0]
    return ("mps", 1) if device.type == "mps" else ("cpu", 1)


@contextmanager
def _quiet() -> Iterator[None]:
    """No word of Lightning's about a run that is none, and what a step prints on stderr: a program reads stdout."""
    names = (*PACKAGES, "lightning.fabric", "lightning_fabric")
    loggers = [logging.getLogger(name) for name in names]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(sys.stderr):
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
