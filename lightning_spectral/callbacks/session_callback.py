"""The Trainer's events, handed on to its session by whichever callback joined first."""

import weakref
from contextlib import suppress
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch import Tensor
from torch.optim import Optimizer
from torch.utils._pytree import tree_flatten
from typing_extensions import override

from lightning_spectral.callbacks.layout import data_rank, layout_of
from lightning_spectral.callbacks.loss_scale import gradient_scale, loss_of
from lightning_spectral.measurement import Measurement, Session
from lightning_spectral.measurement.passes import Pass, pass_of
from lightning_spectral.recording import RunRecorder, Start
from lightning_spectral.recording.about import describe_run, record_folder
from lightning_spectral.recording.family import describe_model, family_name

RUN_STATE = "lightning_spectral.run"
"""Key in a checkpoint of what all callbacks know of the run together. It does not depend on their arguments, so that
counting goes on where a run is resumed with others."""

_sessions: "weakref.WeakKeyDictionary[Trainer, Session[RunRecorder]]" = weakref.WeakKeyDictionary()


def session_of(trainer: Trainer) -> Session[RunRecorder]:
    """The session of a Trainer, the same each time."""
    return _sessions.setdefault(trainer, Session(RunRecorder))


class SessionCallback(Callback):
    """Takes part in the session of its Trainer, from :meth:`join` to :meth:`leave`."""

    def __init__(self) -> None:
        self.session: Session[RunRecorder] | None = None
        """Of the run under way."""
        self.measurement: Measurement | None = None
        """What this callback takes reports from, during a run."""
        self._run_before: dict[str, Any] | None = None
        self._run_kept: dict[str, Any] | None = None

    def join(self, trainer: Trainer, pl_module: LightningModule) -> Session[RunRecorder]:
        """Take part; raises ValueError for what does not go with the module or with other callbacks."""
        self.session = session_of(trainer)
        self.session.join(self)
        self.session.recorder.load_state_dict(self._run_before)
        self._run_before = None
        return self.session

    def leave(self) -> None:
        """Take part no longer; what is known of the run stays for checkpoints that are written after it."""
        if self.session is not None:
            self._run_kept = self.session.recorder.state_dict()
            self.session.leave(self)
        self.session = self.measurement = None

    def __getstate__(self) -> dict[str, Any]:
        # A copy, or what goes to another process, takes no part in this run.
        return {**self.__dict__, "session": None, "measurement": None}

    def settings(self) -> dict[str, Any]:
        """How the measurement is made, JSON-like, for the record of the run."""
        return {}

    def take_report(self, trainer: Trainer) -> None:
        """Log the report of the measurement if there is a new one."""

    def publish_pending(self, trainer: Trainer) -> None:
        """Log what is still being made beside training. All ranks come here together; the first of callbacks waits."""
        if self.session is not None:
            self.session.end_pending()
            self.take_report(trainer)

    @property
    def tokens(self) -> float:
        """Training tokens at the latest report, over all ranks; NaN outside training."""
        if self.session is None or self.measurement is None:
            return torch.nan
        return self.session.recorder.tokens_at_report(self.measurement)

    def _led(self) -> Session[RunRecorder] | None:
        """The session, if this callback's events are those that count."""
        return self.session if self.session is not None and self.session.is_led_by(self) else None

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # After configure_model, before the first, perhaps compiled, call.
        self.join(trainer, pl_module)

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # Only now is the Trainer's step restored.
        if session := self._led():
            session.start_training(trainer.global_step)
            session.recorder.start(_start(session, trainer, pl_module))

    @override
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if session := self._led():
            session.start_train_batch(batch, trainer.global_step, batch_idx)

    @override
    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        if session := self._led():
            session.before_backward(lambda: gradient_scale(trainer, pl_module), loss.detach())

    @override
    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # Only under manual optimisation may another forward of the step follow.
        if session := self._led():
            session.after_backward(is_last=pl_module.automatic_optimization)

    @override
    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        if session := self._led():
            session.before_optimizer_step(optimizer)

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if session := self._led():
            session.end_train_batch(batch, loss_of(outputs, trainer, pl_module), trainer.global_step)
        self.take_report(trainer)

    @override
    def on_validation_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.publish_pending(trainer)
        # Without fit callbacks join as validation starts, just before, and it is always measured.
        if (session := self._led()) and not trainer.sanity_checking:
            session.start_validation(trainer.global_step, trainer.state.fn == "validate", _validation_passes(trainer))

    @override
    def on_validation_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        if session := self._led():
            is_check = trainer.sanity_checking
            session.start_validation_batch(batch, dataloader_idx, trainer.global_step, is_check, batch_idx)

    @override
    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        if session := self._led():
            # Of loaders without a length the last batch is not known.
            is_last = batch_idx + 1 >= trainer.num_val_batches[dataloader_idx]
            session.end_validation_batch(dataloader_idx, trainer.global_step, is_last)

    @override
    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # Before EarlyStopping and ModelCheckpoint look at what was measured.
        if (session := self._led()) and not trainer.sanity_checking:
            session.end_validation_rows(trainer.global_step)
        self.take_report(trainer)

    @override
    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if (session := self._led()) and not trainer.sanity_checking:
            session.end_validation(trainer.global_step, trainer.callback_metrics, len(trainer.num_val_batches))

    @override
    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.publish_pending(trainer)

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.publish_pending(trainer)
        if session := self._led():
            session.end_training(trainer.global_step)

    @override
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self.leave()

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._drop_or_publish(trainer)
        self.leave()  # Lightning calls no teardown then

    def _drop_or_publish(self, trainer: Trainer) -> None:
        """One process has the report that it was making; of several none can count on the others any more."""
        if self.session is None:
            return
        if trainer.world_size == 1:
            with suppress(Exception):  # what has stopped training is what should be seen
                self.publish_pending(trainer)
        elif steps := self.session.abandon():
            rank_zero_info(
                f"lightning-spectral drops the report of step {steps[0]}, which was not ready when training ended early"
            )

    @override
    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        self.publish_pending(trainer)
        run = self._run_kept if self.session is None else self.session.recorder.state_dict()
        if run is not None:
            checkpoint[RUN_STATE] = run

    @override
    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        self._run_before = checkpoint.get(RUN_STATE)


def _start(session: Session[RunRecorder], trainer: Trainer, pl_module: LightningModule) -> Start:
    notes, device = session.recorder.notes, pl_module.device
    writes = trainer.is_global_zero and not trainer.fast_dev_run  # type: ignore[attr-defined]
    return Start(
        step=trainer.global_step,
        family=notes.family or family_name(describe_model(pl_module)),
        describe=lambda: describe_run(trainer, pl_module, notes),
        folder=(lambda: record_folder(trainer)) if writes else None,
        settings=[(member.measurement, member.settings()) for member in session.members if member.measurement],
        layout=layout_of(trainer),
        device=torch.device("cpu") if device.type == "mps" else device,
        batches_per_step=trainer.accumulate_grad_batches,
        monitored=[key for key in _monitored(trainer) if not session.is_claimed(key)],
    )


def _validation_passes(trainer: Trainer) -> list[Pass | None]:
    """How long each pass over a validation loader is going to be."""
    loaders = tree_flatten(trainer.val_dataloaders)[0]
    _, world = data_rank(trainer)
    lengths = trainer.num_val_batches
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
