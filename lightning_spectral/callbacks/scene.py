"""What a measurement is made for, under a Trainer."""

from collections.abc import Callable

from lightning.pytorch import Trainer
from torch import nn

from lightning_spectral.callbacks.layout import layout_of
from lightning_spectral.callbacks.loss_scale import loss_scale
from lightning_spectral.capture.shadow import BatchLoss, LossFunction
from lightning_spectral.measurement import Scene
from lightning_spectral.measurement.stopwatch import Stopwatch

STEPS = ("training_step", "validation_step")
"""Methods of a LightningModule whose forward passes are measured."""


def scene_of(trainer: Trainer, module: nn.Module, stopwatch: Stopwatch) -> Scene:
    """For a module that a Trainer trains, or that its module holds; losses are computed as in its training steps."""

    def make_loss(loss_fn: LossFunction | None) -> BatchLoss:
        context = trainer.precision_plugin.train_step_context
        return BatchLoss(module, loss_fn, context, trainer, loss_scale(trainer))

    return Scene(
        module, trainer.lightning_module.device, stopwatch, make_loss, layout_of(trainer), is_in_step=_steps_of(trainer)
    )


def _steps_of(trainer: Trainer) -> Callable[[], bool]:
    """Tells whether a step is running, and no other hook, in which a callback may sample from the model."""
    whole = trainer.lightning_module

    def is_in_step() -> bool:
        # By which ``self.log`` knows where it was called; it is put back after each hook within a step. Should a
        # version of Lightning not have it, all that runs while a batch is open counts.
        return getattr(whole, "_current_fx_name", STEPS[0]) in STEPS

    return is_in_step
