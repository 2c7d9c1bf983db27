"""An instrument under a Trainer: what only the Trainer's hooks bring with them."""

from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from typing_extensions import override

from lightning_spectral.callbacks.instrument import Instrument, ReportT
from lightning_spectral.callbacks.session_callback import SessionCallback
from lightning_spectral.callbacks.trainer_host import TrainerHost


class SpectralCallback(Instrument[ReportT], SessionCallback):
    """Wires an instrument to the hooks of a Trainer, see :class:`Instrument`."""

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.stage == "validate" and not trainer.enable_validation:
            rank_zero_warn(
                f"{type(self).__name__}(stage='validate') will measure nothing: no validation will run. "
                "Give the Trainer validation data, or use stage='train'."
            )
        self.begin()
        super().on_fit_start(trainer, pl_module)

    @override
    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.stage != "validate":
            return
        if self.session is None and trainer.state.fn == "validate":
            self.join(TrainerHost(trainer, pl_module))
        self.check_loader(len(trainer.num_val_batches))

    @override
    def on_validation_batch_end(self, *args: Any, **kwargs: Any) -> None:
        super().on_validation_batch_end(*args, **kwargs)
        self.check_early()

    @override
    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        # Where state_dict would have put it. With a state_dict Lightning refuses two equal callbacks when the Trainer
        # is made, in words that do not name the keys both would write; our own check does, at the start of fit.
        super().on_save_checkpoint(trainer, pl_module, checkpoint)
        if (state := self.state()) is not None:
            checkpoint.setdefault("callbacks", {})[self.state_key] = state
