"""A Trainer as instruments see it, and what the record of its run is told."""

import weakref
from collections.abc import MutableMapping, Sequence
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor
from torch.utils._pytree import tree_flatten

from lightning_spectral.callbacks.host import Host, T
from lightning_spectral.callbacks.layout import data_rank, layout_of
from lightning_spectral.callbacks.scene import scene_of
from lightning_spectral.measurement import Scene, Session
from lightning_spectral.measurement.passes import Pass, pass_of
from lightning_spectral.recording import RunRecorder, Start
from lightning_spectral.recording.about import describe_run, global_seed, record_folder
from lightning_spectral.recording.family import describe_model, family_name

_sessions: "weakref.WeakKeyDictionary[Trainer, Session[RunRecorder]]" = weakref.WeakKeyDictionary()


class TrainerHost(Host):
    """A Trainer with its module, for as long as a hook runs."""

    def __init__(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.trainer = trainer
        self.pl_module = pl_module

    @property
    def module(self) -> LightningModule:
        """The LightningModule."""
        return self.pl_module

    @property
    def session(self) -> Session[RunRecorder]:
        """One for each Trainer."""
        return _sessions.setdefault(self.trainer, Session(RunRecorder))

    @property
    def step(self) -> int:
        """``global_step``."""
        return self.trainer.global_step

    @property
    def loggers(self) -> Sequence[Any]:
        """The Trainer's."""
        return self.trainer.loggers

    @property
    def metrics(self) -> MutableMapping[str, Tensor]:
        """``callback_metrics``, which EarlyStopping and ModelCheckpoint read."""
        return self.trainer.callback_metrics

    @property
    def is_global_zero(self) -> bool:
        """As the Trainer says."""
        return self.trainer.is_global_zero

    @property
    def strategy(self) -> str:
        """Of Lightning's strategies."""
        return type(self.trainer.strategy).__name__

    @property
    def lends_averages(self) -> bool:
        """With Lightning's WeightAveraging, or a subclass."""
        callbacks = self.trainer.callbacks  # type: ignore[attr-defined]
        return any(base.__name__ == "WeightAveraging" for callback in callbacks for base in type(callback).__mro__)

    @property
    def is_fitting(self) -> bool:
        """Not under ``trainer.validate()``."""
        return self.trainer.state.fn == "fit"

    @property
    def is_checking(self) -> bool:
        """The Trainer's own sanity check."""
        return self.trainer.sanity_checking

    @property
    def has_validation(self) -> bool:
        """As the Trainer was given data and limits."""
        return self.trainer.enable_validation

    def scene(self) -> Scene:
        """Losses are computed as in ``training_step``."""
        return scene_of(self.trainer, self.pl_module, self.session.stopwatch)

    def broadcast(self, value: T) -> T:
        """By the strategy."""
        return self.trainer.strategy.broadcast(value)

    def stop(self) -> None:
        """``should_stop``."""
        self.trainer.should_stop = True

    def start(self) -> Start:
        """What the recorder is told when training starts."""
        trainer, pl_module, session = self.trainer, self.pl_module, self.session
        notes, device = session.recorder.notes, pl_module.device
        writes = trainer.is_global_zero and not trainer.fast_dev_run  # type: ignore[attr-defined]

        def describe() -> dict[str, Any]:
            return describe_run(
                pl_module,
                notes,
                optimizers=trainer.optimizers,
                datamodule=getattr(trainer, "datamodule", None),
                accumulate_grad_batches=trainer.accumulate_grad_batches,
                world_size=trainer.world_size,
                precision=str(trainer.precision),
                device=device,
                seed=global_seed(),
            )

        return Start(
            step=trainer.global_step,
            family=notes.family or family_name(describe_model(pl_module)),
            describe=describe,
            folder=(lambda: record_folder(trainer.loggers, trainer.default_root_dir)) if writes else None,
            settings=[(member.measurement, member.settings()) for member in session.members if member.measurement],
            layout=layout_of(trainer),
            device=torch.device("cpu") if device.type == "mps" else device,
            monitored=[key for key in _monitored(trainer) if not session.is_claimed(key)],
        )

    def validation_passes(self) -> list[Pass | None]:
        """How long each pass over a validation loader is going to be."""
        loaders = tree_flatten(self.trainer.val_dataloaders)[0]
        _, world = data_rank(self.trainer)
        lengths = self.trainer.num_val_batches
        if len(loaders) != len(lengths):
            return [None] * len(lengths)
        return [pass_of(loader, length, world) for loader, length in zip(loaders, lengths, strict=True)]


def _monitored(trainer: Trainer) -> list[str]:
    """Metrics that callbacks of whatever make watch for the least."""
    found = []
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        key, mode = getattr(callback, "monitor", None), getattr(callback, "mode", "min")
        if isinstance(key, str) and mode == "min":
            found.append(key)
    return found
