"""The Trainer's events, handed on to its session by whichever callback joined first."""

from contextlib import suppress
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch import Tensor
from torch.optim import Optimizer
from typing_extensions import override

from lightning_spectral.callbacks.host import Host
from lightning_spectral.callbacks.loss_scale import gradient_scale, loss_of
from lightning_spectral.callbacks.participant import Participant
from lightning_spectral.callbacks.trainer_host import TrainerHost
from lightning_spectral.measurement import Session
from lightning_spectral.recording import RunRecorder

RUN_STATE = "lightning_spectral.run"
"""Key in a checkpoint of what all callbacks know of the run together. It does not depend on their arguments, so that
counting goes on where a run is resumed with others."""


class SessionCallback(Participant, Callback):
    """Takes part in the session of its Trainer, whose hooks it is told."""

    def __init__(self) -> None:
        super().__init__()
        self._run_before: dict[str, Any] | None = None
        self._run_kept: dict[str, Any] | None = None

    @override
    def join(self, host: Host) -> Session[RunRecorder]:
        session = super().join(host)
        session.recorder.load_state_dict(self._run_before)
        self._run_before = None
        return session

    @override
    def leave(self) -> None:
        # What is known of the run stays for checkpoints that are written after it.
        if self.session is not None:
            self._run_kept = self.session.recorder.state_dict()
        super().leave()

    def _led(self) -> Session[RunRecorder] | None:
        """The session, if this callback's events are those that count."""
        return self.session if self.session is not None and self.session.is_led_by(self) else None

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # After configure_model, before the first, perhaps compiled, call.
        self.join(TrainerHost(trainer, pl_module))

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        host = TrainerHost(trainer, pl_module)
        # Only now is the Trainer's step restored.
        if session := self._led():
            session.start_training(trainer.global_step)
            session.recorder.start(host.start())
        self.start_training(host)

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
            session.end_train_batch(loss_of(outputs, trainer, pl_module), trainer.global_step)
        self.take_report(TrainerHost(trainer, pl_module))

    @override
    def on_validation_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        host = TrainerHost(trainer, pl_module)
        self.publish_pending(host)
        # Without fit callbacks join as validation starts, just before, and it is always measured.
        if (session := self._led()) and not trainer.sanity_checking:
            session.start_validation(trainer.global_step, trainer.state.fn == "validate", host.validation_passes())

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
        self.end_validation_rows(TrainerHost(trainer, pl_module))

    @override
    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if (session := self._led()) and not trainer.sanity_checking:
            session.end_validation(trainer.global_step, trainer.callback_metrics)
        self.end_validation(TrainerHost(trainer, pl_module))

    @override
    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.publish_pending(TrainerHost(trainer, pl_module))

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.publish_pending(TrainerHost(trainer, pl_module))
        if session := self._led():
            session.end_training(trainer.global_step)

    @override
    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.end_fit(TrainerHost(trainer, pl_module))

    @override
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self.leave()

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._drop_or_publish(trainer, pl_module)
        self.leave()  # Lightning calls no teardown then

    def _drop_or_publish(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """One process has the report that it was making; of several none can count on the others any more."""
        if self.session is None:
            return
        if trainer.world_size == 1:
            with suppress(Exception):  # what has stopped training is what should be seen
                self.publish_pending(TrainerHost(trainer, pl_module))
        elif steps := self.session.abandon():
            rank_zero_info(
                f"lightning-spectral drops the report of step {steps[0]}, which was not ready when training ended early"
            )

    @override
    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        self.publish_pending(TrainerHost(trainer, pl_module))
        run = self._run_kept if self.session is None else self.session.recorder.state_dict()
        if run is not None:
            checkpoint[RUN_STATE] = run

    @override
    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        self._run_before = checkpoint.get(RUN_STATE)
