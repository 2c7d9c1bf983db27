"""Trains a small model on two gloo processes with callbacks, and leaves what each rank saw and computed in a folder.

Run as a script with that folder as its only argument: Lightning's "ddp" strategy starts the second process from the
command line.
"""

import sys
from pathlib import Path

import torch
import torch.distributed as dist
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_spectral import ActivationSpectrum, HeadDrift, RunRecord, TailForecaster

WIDTH, NUM_BLOCKS, LENGTH = 12, 3, 5
TRAIN_BATCHES = {0: [3, 4, 2, 4, 1, 4], 1: [4, 1, 4, 2, 3, 2]}
VALIDATION_BATCHES = {0: [4, 4, 3], 1: [4, 4, 1]}
"""Samples in each rank's batches: uneven everywhere, the last ones included."""


class Block(nn.Module):
    """A residual block."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.tanh(self.linear(x))


class Model(LightningModule):
    """A stack of blocks on rows far from the origin."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.Sequential(*(Block() for _ in range(NUM_BLOCKS)))
        self.lone, self.broken = nn.Identity(), nn.Identity()

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        output = self.blocks(batch)
        if self.global_rank == 0:
            self.lone(output)
        self.broken(output if self.global_rank == 0 else output * torch.nan)
        return output.square().mean()

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        # As most modules do: each rank for itself.
        self.log("val_loss", self.blocks(batch).square().mean(), batch_size=len(batch))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 1e-3)


class RowRecorder(Callback):
    """Keeps every output of every block, by stage and step, with a plain hook."""

    def __init__(self) -> None:
        self.rows: dict[tuple[str, int, int], list[Tensor]] = {}

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        for index, block in enumerate([*pl_module.blocks, pl_module.lone]):
            block.register_forward_hook(lambda _, __, output, index=index: self._keep(trainer, index, output))

    def _keep(self, trainer: Trainer, index: int, output: Tensor) -> None:
        stage = "validate" if trainer.validating or trainer.sanity_checking else "train"
        self.rows.setdefault((stage, trainer.global_step, index), []).append(output.detach().clone())


class CollectiveCounter(Callback):
    """Counts the collectives that the package starts; Lightning's own do not count."""

    def __init__(self) -> None:
        self.calls: list[tuple[int, str]] = []

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        for name in ("all_reduce", "all_gather", "all_gather_into_tensor", "barrier", "broadcast", "all_gather_object"):
            setattr(dist, name, self._counted(trainer, name, getattr(dist, name)))

    def _counted(self, trainer: Trainer, name: str, collective):
        def counted(*args, **kwargs):
            if sys._getframe(1).f_globals["__name__"].startswith("lightning_spectral"):
                # By a whole number ranks tell each other that they have come so far.
                is_meeting = isinstance(args[0], Tensor) and args[0].dtype == torch.int32
                self.calls.append((trainer.global_step, "meet" if is_meeting else name))
            return collective(*args, **kwargs)

        return counted


def loader(sizes: list[int], seed: int) -> DataLoader:
    generator = torch.Generator().manual_seed(seed)
    batches = [50 + torch.randn(size, LENGTH, WIDTH, generator=generator) for size in sizes]
    return DataLoader(batches, batch_size=None)


def main(folder: Path) -> None:
    torch.manual_seed(0)
    recorder, counter = RowRecorder(), CollectiveCounter()
    spectra = {
        "train": ActivationSpectrum("blocks.*", every_n_steps=3, num_tokens=30, num_groups=2, prefix="train/"),
        "others": ActivationSpectrum(
            ["lone", "broken"], every_n_steps=3, num_tokens=30, num_groups=2, prefix="others/"
        ),
        "validate": ActivationSpectrum(
            "blocks.*", every_n_steps=1, stage="validate", num_tokens=10_000, normalize=False, prefix="validate/"
        ),
    }
    drift = HeadDrift("blocks.*", 2, "previous", every_n_steps=3, stage="train", num_tokens=30, num_groups=2)
    forecaster = TailForecaster(
        1.0,
        references=[f"{folder}/references/*"],
        layer="blocks.1",
        every_n_steps=1,
        num_tokens=10_000,
        normalize=False,
        tail=(2, 10),
        head=(2, 10),
        predictor="head",  # by the tail there is no forecast after so few steps
        stop_if_relative_above=1e9,
    )
    reports: dict[str, list[dict]] = {name: [] for name in spectra}
    for name, callback in spectra.items():

        def keep(report, name=name, measured=callback.measured):
            layers = report.spectra["activation"].items()
            spectrum = {layer: (found.count, found.values) for layer, found in layers}
            reports[name].append({"step": report.step, "layers": spectrum})
            return measured(report)

        callback.measured = keep
    trainer = Trainer(
        strategy="ddp",
        devices=2,
        accelerator="cpu",
        max_epochs=1,
        use_distributed_sampler=False,
        callbacks=[recorder, counter, *spectra.values(), drift, forecaster, RunRecord(family="F")],
        logger=CSVLogger(folder, version=0),
        default_root_dir=folder,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=1,
    )
    rank = trainer.global_rank
    trainer.fit(Model(), loader(TRAIN_BATCHES[rank], rank), loader(VALIDATION_BATCHES[rank], 10 + rank))
    metrics = {key: float(value) for key, value in trainer.callback_metrics.items() if "seconds" not in key}
    seen = {"rows": recorder.rows, "reports": reports, "calls": counter.calls, "metrics": metrics}
    torch.save(seen, folder / f"rank{rank}.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
