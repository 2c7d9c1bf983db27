"""How gradients in a training step are scaled: by accumulation, and by float16's gradient scaler."""

from lightning.pytorch import LightningModule, Trainer


def gradient_scale(trainer: Trainer, pl_module: LightningModule) -> float:
    """Factor between the gradients of a training step's backward pass and those of the loss it returned.

    Args:
        trainer: The Trainer: it divides by the number of batches whose gradients it accumulates, under automatic
            optimisation, and multiplies by the scale of float16's gradient scaler.
        pl_module: The module that is trained.

    Returns:
        The factor.
    """
    accumulated = trainer.accumulate_grad_batches if pl_module.automatic_optimization else 1
    return loss_scale(trainer) / accumulated


def loss_scale(trainer: Trainer) -> float:
    """What float16's gradient scaler multiplies the loss with; 1 without one.

    Args:
        trainer: The Trainer.

    Returns:
        The current scale.
    """
    scaler = getattr(trainer.precision_plugin, "scaler", None)
    return 1.0 if scaler is None else float(scaler.get_scale())
