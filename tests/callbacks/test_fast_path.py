"""A layer that torch runs on a fast path in evaluation mode stays on it, and is read all the same."""

import functools
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_spectral import ActivationSpectrum, GradientSpectrum, HeadDrift
from tests.models import tiny_trainer

WIDTH, BANDS = 16, {"tail": (1, 4), "head": (1, 4)}


class Encoder(LightningModule):
    """Its validation loss tells by rounding which path was taken: on the fast one, rows of padding alone are NaN."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(20, WIDTH)
        make = functools.partial(nn.TransformerEncoderLayer, WIDTH, 2, 32, 0.1, batch_first=True, activation="gelu")
        self.layers = nn.ModuleList(make() for _ in range(3))
        self.head = nn.Linear(WIDTH, 20)
        self.losses: list[Tensor] = []

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        hidden = self.embedding(batch[0])
        for layer in self.layers:
            hidden = layer(hidden, src_key_padding_mask=batch[0] == 0)
        return self.head(hidden.mean(1)).square().mean()

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self.losses.append(self.training_step(batch, batch_idx))

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), 0.01)


def losses(tmp_path: Path, *callbacks: Callback) -> Tensor:
    """Of validation, with rows of padding alone in its last batch."""
    ids = torch.randint(1, 20, (32, 10), generator=torch.Generator().manual_seed(3))
    ids[::2, 6:] = 0
    seen = ids.clone()
    seen[-1] = 0
    loaders = (DataLoader(TensorDataset(x), 8) for x in (ids, seen))
    trainer = tiny_trainer(tmp_path, callbacks=list(callbacks), logger=False, max_steps=4, val_check_interval=2)
    model = Encoder()
    torch.manual_seed(1)
    trainer.fit(model, *loaders)
    assert not any(module._forward_hooks for module in model.modules())
    assert not nn.modules.module._global_forward_hooks
    return torch.stack(model.losses)


CALLBACKS = {
    "train": lambda: ActivationSpectrum(every_n_steps=1),
    "validate": lambda: ActivationSpectrum(every_n_steps=1, stage="validate"),
    "parts": lambda: ActivationSpectrum("layers.*.linear2", every_n_steps=1, **BANDS),
    "attention": lambda: ActivationSpectrum("layers.1.self_attn", every_n_steps=1, **BANDS),
    "drift": lambda: HeadDrift(layers="layers.*", every_n_steps=1, rank=2),
    "gradients": lambda: GradientSpectrum("layers.*.linear2.weight", every_n_steps=1, method="hooks", num_samples=8),
}


@pytest.mark.filterwarnings("default::UserWarning")
@pytest.mark.parametrize("what", CALLBACKS)
def test_validation_is_the_same_to_the_bit(tmp_path: Path, what: str) -> None:
    without = losses(tmp_path)
    assert without.isnan().any()
    torch.testing.assert_close(losses(tmp_path, CALLBACKS[what]()), without, rtol=0, atol=0, equal_nan=True)


def test_what_is_read_is_what_the_fast_path_gives(tmp_path: Path) -> None:
    class Last(Encoder):
        """Keeps what its last layer gives in validation, by other means than hooks."""

        def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
            hidden = self.embedding(batch[0])
            for layer in self.layers:
                hidden = layer(hidden)
            self.losses.append(hidden)

    spectrum = ActivationSpectrum(
        "layers.2", every_n_steps=1, stage="validate", normalize=False, num_groups=1, dtype="float64", **BANDS
    )
    ids = torch.randint(1, 20, (32, 10), generator=torch.Generator().manual_seed(3))
    loader = DataLoader(TensorDataset(ids), 8)
    trainer = tiny_trainer(tmp_path, callbacks=[spectrum], logger=False, max_steps=4, num_sanity_val_steps=0)
    trainer.fit(model := Last(), loader, loader)
    rows = torch.cat(model.losses).flatten(0, 1).double()
    eigenvalues = torch.linalg.eigvalsh((rows - rows.mean(0)).T @ (rows - rows.mean(0)))
    share = eigenvalues / eigenvalues.sum()
    rankme = float(torch.exp(-torch.special.xlogy(share, share).sum()))
    assert float(trainer.callback_metrics["activation/layers.2/rankme"]) == pytest.approx(rankme, rel=1e-5)


class Compiled(Encoder):
    def configure_model(self) -> None:
        self.layers[1].compile(backend="eager")


def test_compiled_layers_are_refused(tmp_path: Path) -> None:
    loader = DataLoader(TensorDataset(torch.randint(1, 20, (8, 10))), 8)
    spectrum = ActivationSpectrum("layers.1", every_n_steps=1, **BANDS)
    trainer = tiny_trainer(tmp_path, callbacks=[spectrum], logger=False, max_steps=1)
    with pytest.raises(ValueError, match=r"^layers must stay on .*'layers.1' of an nn.T.*in layers.1, which is"):
        trainer.fit(Compiled(), loader, loader)


@pytest.mark.parametrize("is_fast", [True, False])
def test_layers_beside_compiled_ones_and_without_a_fast_path_are_read(tmp_path: Path, is_fast: bool) -> None:
    loader = DataLoader(TensorDataset(torch.randint(1, 20, (8, 10))), 8)
    name = "layers.0" if is_fast else "layers.1"
    spectrum = ActivationSpectrum(name, every_n_steps=1, **BANDS)
    trainer = tiny_trainer(tmp_path, callbacks=[spectrum], logger=False, max_steps=1)
    torch.backends.mha.set_fastpath_enabled(is_fast)
    try:
        trainer.fit(Compiled(), loader, loader)
    finally:
        torch.backends.mha.set_fastpath_enabled(True)
    assert float(trainer.callback_metrics[f"activation/{name}/rankme"]) > 1


def test_parts_that_the_fast_path_does_not_call_are_said_to_be_skipped(tmp_path: Path) -> None:
    spectrum = ActivationSpectrum("layers.1.linear2", every_n_steps=1, stage="validate", **BANDS)
    with pytest.warns(UserWarning, match=r"calls none of its parts: choose the layer itself, or torch.backends.mha"):
        losses(tmp_path, spectrum)
    assert all(math.isnan(report["rows"]["layers.1.linear2"]["rankme"]) for report in spectrum.display.reports)
