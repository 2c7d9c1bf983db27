"""Under ``pytorch_lightning``, the other name of Lightning, callbacks do what they do under ``lightning``."""

import math
from pathlib import Path
from types import ModuleType
from typing import Any

import lightning.pytorch
import pytest
import pytorch_lightning
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_spectral import ActivationSpectrum, GradientSpectrum, HeadDrift, Run, RunRecord


def _module(package: ModuleType) -> Any:
    class Small(package.LightningModule):  # type: ignore[name-defined, misc]
        def __init__(self) -> None:
            super().__init__()
            self.embedding = nn.Embedding(20, 16)
            self.blocks = nn.ModuleList(nn.Linear(16, 16) for _ in range(3))
            self.head = nn.Linear(16, 20)

        def loss(self, tokens: Tensor) -> Tensor:
            x = self.embedding(tokens[:, :-1])
            for block in self.blocks:
                x = x + block(x).tanh()
            return nn.functional.cross_entropy(self.head(x).flatten(0, 1), tokens[:, 1:].flatten())

        def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
            return self.loss(batch[0])

        def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
            self.log("val_loss", self.loss(batch[0]))

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), 0.1)

    return Small()


def _watchers() -> list[Any]:
    return [
        ActivationSpectrum("blocks.*", stage="validate", every_n_steps=4),
        GradientSpectrum(["blocks.*.weight"], every_n_steps=4, num_samples=16, method="vmap"),
        HeadDrift("blocks.*", every_n_steps=4, rank=2),
        RunRecord(family="small"),
    ]


def _fit(package: ModuleType, folder: Path, watchers: list[Any], steps: int = 8, resume: str | None = None) -> Any:
    torch.manual_seed(0)
    data = torch.randint(0, 20, (64, 9), generator=torch.Generator().manual_seed(1))
    loader = DataLoader(TensorDataset(data), 4)
    trainer = package.Trainer(
        max_steps=steps,
        val_check_interval=4,
        accelerator="cpu",
        logger=package.loggers.TensorBoardLogger(folder, version=str(steps)),
        callbacks=watchers,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(_module(package), loader, loader, ckpt_path=resume)
    return trainer


@pytest.fixture(scope="module")
def trainers(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any]:
    first, second = tmp_path_factory.mktemp("lightning"), tmp_path_factory.mktemp("pytorch_lightning")
    return _fit(lightning.pytorch, first, _watchers()), _fit(pytorch_lightning, second, _watchers())


def test_values_are_the_same_to_the_bit(trainers: tuple[Any, Any]) -> None:
    one, other = ({k: float(v) for k, v in each.callback_metrics.items() if "seconds" not in k} for each in trainers)
    assert one.keys() == other.keys()
    assert [
        key for key in one if one[key] != other[key] and not (math.isnan(one[key]) and math.isnan(other[key]))
    ] == []
    assert other["activation/failed"] == other["gradient/failed"] == other["drift/failed"] == 0
    assert other["activation/blocks.0/num_tokens"] == 64 * 8


def test_records_are_the_same(trainers: tuple[Any, Any]) -> None:
    one, other = (Run(each.logger.log_dir) for each in trainers)
    assert other.about["family"] == "small"
    assert (one.history.tokens == other.history.tokens).all()
    assert other.steps("activation") == one.steps("activation") == [4, 8]
    assert torch.equal(*(run.spectrum("activation", "blocks.1", 8).values for run in (one, other)))


def test_training_is_bit_identical_to_training_without(trainers: tuple[Any, Any], tmp_path: Path) -> None:
    bare, watched = _fit(pytorch_lightning, tmp_path, []), trainers[1]
    weights = (each.lightning_module.state_dict() for each in (bare, watched))
    assert all(torch.equal(*pair) for pair in zip(*(state.values() for state in weights), strict=True))


@pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended")
def test_a_resumed_run_goes_on_alike(tmp_path: Path) -> None:
    found = []
    for package in (lightning.pytorch, pytorch_lightning):
        folder = tmp_path / package.__name__
        state = folder / "state.ckpt"
        _fit(package, folder, _watchers(), steps=4).save_checkpoint(state)
        found.append(_fit(package, folder, _watchers(), steps=8, resume=str(state)))
    key = "drift/blocks.2/overlap"
    one, other = (float(trainer.callback_metrics[key]) for trainer in found)
    assert one == other < 1, "against the first report, of the run before"
    assert Run(found[1].logger.log_dir).history.tokens.tolist() == Run(found[0].logger.log_dir).history.tokens.tolist()
