"""Forward passes beside the step, of callbacks that sample and of hooks of the module itself, are not read."""

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_spectral import ActivationSpectrum
from tests.models import tiny_trainer

WIDTH, ROWS, CLASSES = 8, 32, 4


class Sampled(LightningModule):
    """Runs itself on noise in one of its hooks, by automatic or manual optimisation."""

    def __init__(self, hook: str = "", is_manual: bool = False, scripted: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.hook, self.automatic_optimization = hook, not is_manual
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh()) for _ in range(2))
        head = nn.Linear(WIDTH, CLASSES)
        self.head = torch.jit.script(head) if scripted else head

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        loss = self.loss(batch)
        if not self.automatic_optimization:
            self.manual_backward(loss)
            loss = self.loss(batch)  # of the step, too
            self.optimizers().step()
        return loss

    def loss(self, batch: list[Tensor]) -> Tensor:
        return nn.functional.cross_entropy(self.head(self(batch[0])), torch.arange(len(batch[0])) % CLASSES)

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self.log("val_loss", self(batch[0]).square().mean())

    def sample(self, hook: str) -> None:
        if self.hook == hook:
            self.head(self(10 * torch.randn(64, WIDTH)))  # with its graph, which nobody differentiates

    def on_train_batch_start(self, *_: Any) -> None:
        self.sample("on_train_batch_start")

    def on_validation_batch_start(self, *_: Any) -> None:
        self.sample("on_validation_batch_start")

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.0)


class Sampler(Callback):
    """Calls the module where callbacks log samples."""

    def on_validation_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        pl_module(10 * torch.randn(64, WIDTH))

    def on_before_zero_grad(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        with torch.no_grad():
            pl_module(10 * torch.randn(64, WIDTH))


def measured(
    folder: Path, module: Sampled, stage: str, *others: Callback, readout: str | None = None
) -> dict[str, float]:
    rows = torch.randn(ROWS, WIDTH, generator=torch.Generator().manual_seed(1))
    loader = DataLoader(TensorDataset(rows), ROWS // 2)
    bands = {"tail": (1, 4), "head": (1, 4), "num_groups": 1}
    callback = ActivationSpectrum("blocks.*", every_n_steps=2, stage=stage, readout=readout, **bands)
    trainer = tiny_trainer(folder, callbacks=[*others, callback], max_steps=2)
    trainer.fit(module, loader, loader)
    return {
        key: float(value)
        for key, value in trainer.callback_metrics.items()
        if key.startswith(("activation/blocks", "activation/head"))
    }


@pytest.mark.parametrize("stage", ["train", "validate"])
def test_they_are_not_read(tmp_path: Path, stage: str) -> None:
    expected = measured(tmp_path, Sampled(), stage)
    assert expected["activation/blocks.1/num_tokens"] == ROWS
    assert measured(tmp_path, Sampled(), stage, Sampler()) == pytest.approx(expected, nan_ok=True)
    own = Sampled("on_train_batch_start" if stage == "train" else "on_validation_batch_start")
    assert measured(tmp_path, own, stage) == pytest.approx(expected, nan_ok=True)


def test_a_head_that_they_run_is_read_in_the_step_alone(tmp_path: Path) -> None:
    expected = measured(tmp_path, Sampled(), "train", readout="head")
    assert expected["activation/head/task_power"] > 0
    found = measured(tmp_path, Sampled("on_train_batch_start"), "train", readout="head")
    assert found == pytest.approx(expected, nan_ok=True)


def test_all_passes_of_a_manual_step_are(tmp_path: Path) -> None:
    found = measured(tmp_path, Sampled("on_train_batch_start", is_manual=True), "train")
    assert found["activation/blocks.1/num_tokens"] == 2 * ROWS


@pytest.mark.filterwarnings("ignore:.*torch.jit.script")
def test_a_part_in_torchscript_harms_nothing(tmp_path: Path) -> None:
    expected = measured(tmp_path, Sampled(), "train")
    assert measured(tmp_path, Sampled(scripted=True), "train") == pytest.approx(expected, nan_ok=True)
