"""Which ranks hold which data under a Trainer's strategy."""

from lightning.pytorch import Trainer

from lightning_spectral.metrics.collectives import world_size
from lightning_spectral.metrics.layout import Layout


def data_rank(trainer: Trainer) -> tuple[int, int]:
    """Whose data this rank holds, and how many ranks have data of their own, as the strategy tells samplers."""
    told = getattr(trainer.strategy, "distributed_sampler_kwargs", None) or {}
    return told.get("rank", trainer.global_rank), told.get("num_replicas", trainer.world_size)


def layout_of(trainer: Trainer) -> Layout:
    """Which ranks hold which data; a collective where some hold the same.

    Raises:
        ValueError: If the strategy has no mesh that tells these ranks from the others.
    """
    if world_size() == 1:
        return Layout.of_world()
    rank, world = data_rank(trainer)
    device = trainer.lightning_module.device
    device = device if device.type != "mps" else trainer.strategy.root_device
    return Layout.of_data(rank, world, getattr(trainer.strategy, "device_mesh", None), device)
