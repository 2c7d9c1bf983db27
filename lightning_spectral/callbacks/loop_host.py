"""Any loop as instruments see it, and what the record of its run is told: model, loggers and a count of steps."""

from collections.abc import Sequence
from math import inf
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lightning_spectral.callbacks.host import T
from lightning_spectral.capture.names import wrapped
from lightning_spectral.capture.one_line import shown
from lightning_spectral.capture.shadow import BatchLoss, LossFunction
from lightning_spectral.measurement import Scene, Session
from lightning_spectral.measurement.passes import Pass, pass_of
from lightning_spectral.metrics.collectives import broadcast_object, rank_and_world
from lightning_spectral.metrics.layout import Layout, are_sharded
from lightning_spectral.recording import RunRecorder, Start
from lightning_spectral.recording.about import describe_run, global_seed, record_folder
from lightning_spectral.recording.family import describe_model, family_name
from lightning_spectral.runs.arguments import check_path
from lightning_spectral.runs.record import FOLDER

SPLIT = ("FullyShardedDataParallel", "DeepSpeedEngine", "DataParallel")
"""Classes that leave no process the whole of a module, or of a batch."""


class LoopHost:
    """A loop of one's own, as the protocol :class:`Host` has it. Ranks are those of the default process group.

    Args:
        model: As the loop calls it.
        loggers: Lightning's loggers, or what has their ``log_metrics``.
        log_dir: Where the record goes; None for the log directory of the first logger.
        loss_fn: The loop's loss; None if the module has a ``training_step``, or no gradients are asked for.
        optimizers: Those whose steps count.
        seed: Of the run; None for the one of Lightning's ``seed_everything``, if it is the last that torch was given.

    Raises:
        ValueError: For a model that is not whole on each rank, and a ``log_dir`` that is no path.
    """

    lends_averages = False
    is_fitting = True
    is_checking = False
    has_validation = True

    def __init__(
        self,
        model: nn.Module,
        loggers: Sequence[Any],
        log_dir: str | Path | None,
        loss_fn: LossFunction | None,
        optimizers: Sequence[Any],
        seed: int | None = None,
    ) -> None:
        self.module = watched_module(model)
        self.strategy = type(model).__name__
        self.session: Session[RunRecorder] = Session(RunRecorder)
        self.step = 0
        self.metrics: dict[str, Tensor] = {}
        self.should_stop = False
        self.num_batches = 0
        """Batches that have begun."""
        self.device = device_of(self.module)
        rank, self.num_ranks = rank_and_world()
        self.is_global_zero = rank == 0
        # Others would write beside rank zero: of loggers outside a Trainer not all know their rank.
        self.loggers: Sequence[Any] = loggers if self.is_global_zero else ()
        if log_dir is not None:
            check_path("log_dir", log_dir)
        self._log_dir = None if log_dir is None else Path(log_dir)
        self._loss_fn = loss_fn
        self._optimizers = optimizers
        self._seed = seed

    def scene(self) -> Scene:
        """Losses are computed by the loop's ``loss_fn``, else as in a ``training_step``."""

        def make_loss(loss_fn: LossFunction | None) -> BatchLoss:
            return BatchLoss(self.module, loss_fn or self._loss_fn)

        return Scene(self.module, self.device, self.session.stopwatch, make_loss, Layout.of_world(), self._loss_fn)

    def broadcast(self, value: T) -> T:
        """Over the default group."""
        return broadcast_object(value)

    def stop(self) -> None:
        """For whoever asks."""
        self.should_stop = True

    def start(self) -> Start:
        """What the recorder is told when training starts."""
        notes = self.session.recorder.notes
        plain = getattr(self.module, "_orig_mod", self.module)  # compiled or not, it is the same model
        self.num_batches = 0
        dtypes = sorted({str(parameter.dtype).removeprefix("torch.") for parameter in self.module.parameters()})

        def describe() -> dict[str, Any]:
            return describe_run(
                plain,
                notes,
                optimizers=self._optimizers,
                datamodule=None,
                accumulate_grad_batches=None,
                world_size=self.num_ranks,
                precision=f"parameters in {', '.join(dtypes)}",
                device=self.device,
                seed=_seed_in_force() if self._seed is None else self._seed,
            )

        is_placed = self._log_dir is not None or bool(self.loggers)
        return Start(
            step=self.step,
            family=notes.family or family_name(describe_model(plain)),
            describe=describe,
            folder=self.folder if self.is_global_zero and is_placed else None,
            settings=[(member.measurement, member.settings()) for member in self.session.members if member.measurement],
            layout=Layout.of_world(),
            device=self._reducing,
        )

    def folder(self) -> Path:
        """Of the record."""
        return record_folder(self.loggers, ".") if self._log_dir is None else self._log_dir / FOLDER

    def validation_pass(self, loader: Any, num_batches: int | None) -> Pass | None:
        """How long a pass over so many batches of a loader is going to be; None where nobody knows."""
        loader = getattr(loader, "_dataloader", loader)  # Fabric's own
        limit = inf if num_batches is None else num_batches
        try:
            most = min(len(loader), limit)
        except TypeError:
            most = limit
        found = pass_of(loader, most, self.num_ranks)
        # Samplers of others' make deal batches out to ranks by rules of their own.
        return Pass(found.num_batches) if found is not None and self.num_ranks > 1 and not _is_dealt(loader) else found

    @property
    def _reducing(self) -> torch.device:
        return torch.device("cpu") if self.device.type == "mps" else self.device


def _seed_in_force() -> int | None:
    """Loops seed as they like: what ``seed_everything`` has left may be of a run before, which torch then tells."""
    seed = global_seed()
    return seed if seed == torch.initial_seed() else None


def _is_dealt(loader: Any) -> bool:
    return type(getattr(loader, "sampler", None)).__name__ == "DistributedSampler"


def device_of(module: nn.Module) -> torch.device:
    """Where the first of its parameters is."""
    return next((parameter.device for parameter in module.parameters()), torch.device("cpu"))


def watched_module(model: nn.Module) -> nn.Module:
    """Where names begin: the module inside what distributes it; one that is compiled, but not distributed, as it is.

    Raises:
        ValueError: For a model that is not whole on each rank.
    """
    if not isinstance(model, nn.Module):
        raise ValueError(f"model must be a torch.nn.Module, got {shown(model)}")
    layers: list[nn.Module] = []
    inner: nn.Module | None = model
    while isinstance(inner, nn.Module):
        layers.append(inner)
        name = type(inner).__name__
        if name in SPLIT:
            raise ValueError(
                f"model must be whole on each rank, as under DistributedDataParallel, got {name}: a Lightning Trainer "
                "with ModelParallelStrategy is watched by the callbacks"
            )
        attribute = "_forward_module" if name == "_FabricModule" else wrapped(inner)
        inner = None if attribute is None else inner._modules.get(attribute)
    if are_sharded(layers[-1]):
        raise ValueError(
            "model must be whole on each rank, got one with sharded parameters: a Lightning Trainer with "
            "ModelParallelStrategy is watched by the callbacks"
        )
    # Of the last, compiled or not, after all that distributes.
    is_plain = [type(layer).__name__ == "OptimizedModule" for layer in layers[:-1]]
    return layers[-2] if is_plain and is_plain[-1] else layers[-1]
