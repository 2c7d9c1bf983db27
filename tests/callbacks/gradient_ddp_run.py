"""A run of two processes under ddp, for test_gradient_ddp.py: gradients of unevenly many samples by every method."""

import copy
import sys
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_spectral import GradientSpectrum
from lightning_spectral.measurement import GradientReport

WIDTH, NUM_SAMPLES, NUM_GROUPS, STEPS = 6, 7, 3, 4
TRAIN_BATCHES = {0: [3, 2, 4, 2], 1: [2, 3, 1, 2]}
VALIDATION_BATCHES = {0: [3, 3], 1: [2, 2]}
"""Samples in each rank's batches: a report of 7 takes 4 from rank 0 and 3 from rank 1."""
METHODS = ("vmap", "loop", "hooks")


class Model(LightningModule):
    """Two layers."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(WIDTH, 5), nn.Tanh(), nn.Linear(5, 4))

    def loss(self, batch: Tensor) -> Tensor:
        return self.net(batch).square().sum(1).mean()

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return self.loss(batch)

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        self.loss(batch)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.05)


class Fussy(Model):
    """Rank 1 refuses one sample that comes alone: the first of its last training batch, and of its validation data."""

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        refused = (loader(TRAIN_BATCHES[1], 1).dataset[-1][0], loader(VALIDATION_BATCHES[1], 11).dataset[0][0])
        if len(batch) == self.global_rank == 1 and any(torch.equal(batch[0], sample) for sample in refused):
            raise RuntimeError("rank 1 cannot")
        return super().training_step(batch, batch_idx)


def fails_on_rank_1(module: Any, batch: Tensor) -> Tensor:
    if torch.distributed.get_rank() == 1:
        raise RuntimeError("rank 1 cannot")
    return module.loss(batch)


class Recorder(Callback):
    """Keeps each sample's gradient at the weights before every step, and after the last."""

    def __init__(self) -> None:
        self.before: dict[int, Tensor] = {}
        self.after: dict[int, Tensor] = {}
        self.held_out: list[Tensor] = []
        self.validation = torch.zeros(0)
        self.batches: list[Tensor] = []

    def _rows(self, module: Model, batch: Tensor) -> Tensor:
        with torch.inference_mode(False), torch.enable_grad():
            twin, batch = copy.deepcopy(module), batch.clone()
            weight = twin.net[0].weight
            return torch.stack([torch.autograd.grad(twin.loss(x.unsqueeze(0)), weight)[0].flatten() for x in batch])

    def on_train_batch_start(self, trainer: Trainer, pl_module: Model, batch: Tensor, batch_idx: int) -> None:
        self.batches.append(batch)
        self.before[trainer.global_step] = self._rows(pl_module, batch)

    def on_train_batch_end(self, trainer: Trainer, pl_module: Model, *_: Any) -> None:
        if trainer.global_step == STEPS:
            self.after = {index: self._rows(pl_module, batch) for index, batch in enumerate(self.batches)}

    def on_validation_batch_start(self, trainer: Trainer, pl_module: Model, batch: Tensor, *_: Any) -> None:
        self.held_out.append(self._rows(pl_module, batch))

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: Model) -> None:
        self.validation = torch.cat(self.held_out)


class Gradients(Callback):
    """Keeps what every optimizer step is given."""

    def __init__(self) -> None:
        self.seen: list[Tensor] = []

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: Model, optimizer: Any) -> None:
        self.seen += [parameter.grad.clone() for parameter in pl_module.parameters()]


class Kept(GradientSpectrum):
    """Keeps its reports."""

    def __init__(self, prefix: str, **kwargs: Any) -> None:
        self.report: GradientReport | None = None
        settings = {"every_n_steps": STEPS, "num_samples": NUM_SAMPLES, "num_groups": NUM_GROUPS, "head": (1, 3)}
        super().__init__("net.0.weight", prefix=prefix, **(settings | kwargs))

    def measured(self, report: GradientReport) -> dict[str, float]:
        self.report = report
        return super().measured(report)


def loader(sizes: list[int], seed: int) -> DataLoader:
    generator = torch.Generator().manual_seed(seed)
    return DataLoader([1 + torch.randn(size, WIDTH, generator=generator) for size in sizes], batch_size=None)


def fit(folder: Path, callbacks: list[Callback], make: type[Model] = Model) -> tuple[Trainer, Model]:
    torch.manual_seed(0)
    model = make()
    trainer = Trainer(
        strategy="ddp",
        devices=2,
        accelerator="cpu",
        max_epochs=1,
        use_distributed_sampler=False,
        callbacks=callbacks,
        logger=False,
        default_root_dir=folder,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
    )
    rank = trainer.global_rank
    trainer.fit(model, loader(TRAIN_BATCHES[rank], rank), loader(VALIDATION_BATCHES[rank], 10 + rank))
    return trainer, model


def main(folder: Path) -> None:
    expected, seen = Gradients(), Gradients()
    _, plain = fit(folder, [expected])
    recorder = Recorder()
    spectra = [Kept(f"{method}/", method=method) for method in METHODS]
    spectra += [Kept(f"{method} validate/", method=method, stage="validate") for method in METHODS]
    spectra.append(Kept("elsewhere/", method="loop", row_device="cpu", row_dtype="float64"))
    broken = Kept("broken/", loss_fn=fails_on_rank_1)
    trainer, watched = fit(folder, [recorder, *spectra, broken, seen])
    fussy = [Kept(f"{stage}/", method="loop", stage=stage) for stage in ("train", "validate")]
    fussy_trainer, fussed = fit(folder, fussy, Fussy)
    found = {
        "fussy": {s.prefix: s.report.spectra["gradient"]["net.0.weight"].failure for s in fussy},
        "fussy metrics": {key: float(value) for key, value in fussy_trainer.callback_metrics.items()},
        "fussy identical": all(map(torch.equal, plain.parameters(), fussed.parameters())),
        "identical": all(map(torch.equal, plain.parameters(), watched.parameters())),
        "gradients": len(seen.seen) == 16 and all(map(torch.equal, seen.seen, expected.seen)),
        "before": recorder.before,
        "after": recorder.after,
        "validation": recorder.validation,
        "spectra": {s.prefix: s.report.spectra["gradient"]["net.0.weight"].values for s in spectra},
        "broken": broken.report.spectra["gradient"]["net.0.weight"].failure,
        "metrics": {key: float(value) for key, value in trainer.callback_metrics.items() if "seconds" not in key},
    }
    torch.save(found, folder / f"rank{trainer.global_rank}.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
