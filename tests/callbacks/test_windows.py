"""Each layer is read at the end of its window, whatever other layers are watched beside it."""

from pathlib import Path

import numpy as np
import pytest
import torch
from lightning.pytorch import LightningModule
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_spectral import ActivationSpectrum
from tests.models import tiny_trainer

SIZE, LENGTH, WIDTH = 8, 4, 6


class Pooled(LightningModule):
    """A block with a row for each position, and a head with one for each sample."""

    def __init__(self) -> None:
        super().__init__()
        self.block, self.head = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.rows: dict[int, np.ndarray] = {}

    def training_step(self, batch, batch_idx):
        states = self.block(batch[0])
        self.rows[self.global_step] = states.detach().double().numpy().reshape(-1, WIDTH)
        return self.head(states.tanh().mean(1)).square().mean()

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), 0.05)


@pytest.mark.parametrize("layers", [["block"], ["block", "head"], ["head", "block"]], ids=str)
def test_a_layer_of_many_rows_is_read_in_the_last_steps(tmp_path: Path, layers: list[str]) -> None:
    torch.manual_seed(0)
    model = Pooled()
    spectra = ActivationSpectrum(
        layers, 6, num_tokens=2 * SIZE * LENGTH, normalize=False, tail=(1, 4), head=(1, 4), num_groups=1
    )
    trainer = tiny_trainer(tmp_path, callbacks=[spectra], max_steps=12)
    trainer.fit(model, DataLoader(TensorDataset(torch.randn(12 * SIZE, LENGTH, WIDTH)), SIZE))
    shares = np.linalg.eigvalsh(np.cov(np.concatenate([model.rows[10], model.rows[11]]).T))
    shares = shares / shares.sum()
    metrics = trainer.callback_metrics
    assert float(metrics["activation/block/rankme"]) == pytest.approx(
        np.exp(-(shares * np.log(shares)).sum()), rel=1e-4
    )
    assert int(metrics["activation/block/num_tokens"]) == 2 * SIZE * LENGTH
    if "head" in layers:
        assert int(metrics["activation/head/num_tokens"]) == 6 * SIZE
