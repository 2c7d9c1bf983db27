"""How losses and gradients in a training step are scaled: by accumulation, and by float16's gradient scaler."""

from collections.abc import Mapping
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from torch import Tensor


def gradient_scale(trainer: Trainer, pl_module: LightningModule) -> float:
    """Factor between the gradients of a training step's backward pass and those of the loss it returned.

    Under manual optimisation those of the loss that backward is called on: by what it was divided nothing tells.
    """
    return loss_scale(trainer) / accumulated_batches(trainer, pl_module)


def accumulated_batches(trainer: Trainer, pl_module: LightningModule) -> int:
    """What Lightning divides a training step's loss by: batches a step, under automatic optimisation."""
    return trainer.accumulate_grad_batches if pl_module.automatic_optimization else 1


def loss_scale(trainer: Trainer) -> float:
    """What float16's gradient scaler multiplies the loss with now; 1 without one."""
    scaler = getattr(trainer.precision_plugin, "scaler", None)
    return 1.0 if scaler is None else float(scaler.get_scale())


def loss_of(outputs: Any, trainer: Trainer, pl_module: LightningModule) -> Tensor | None:
    """The loss that a training step returned, which Lightning hands on divided for the sake of accumulation."""
    loss = outputs.get("loss") if isinstance(outputs, Mapping) else outputs
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        return None
    return loss.detach().reshape(()) * accumulated_batches(trainer, pl_module)
