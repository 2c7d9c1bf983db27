"""A band of which float32 resolves a part: NaN with the reason everywhere, and whole from the next report on."""

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch import Callback, LightningModule
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_spectral import ActivationSpectrum, HeadDrift, Run, TailForecaster
from lightning_spectral.functional import covariance_spectrum, power_law
from tests.models import tiny_trainer

WIDTH, TAIL = 40, (5, 20)
SCALES = torch.arange(1, WIDTH + 1.0) ** -1.0
SCALES[0] = 300.0  # of its square float32 resolves 1e-7, standard deviations of 0.1: ranks to 9
ROWS: dict[str, Any] = {"stage": "validate", "every_n_steps": 2, "num_tokens": 2000, "normalize": False}
KEY = "activation/wide/alpha_tail"


class Model(LightningModule):
    """Hands rows on, one channel of them far larger than all others, and once more without that channel."""

    def __init__(self) -> None:
        super().__init__()
        self.wide, self.plain, self.weight = nn.Identity(), nn.Identity(), nn.Parameter(torch.ones(1))

    def step(self, batch: Tensor) -> Tensor:
        self.wide(batch)
        self.plain(batch / SCALES)
        return self.weight.square().sum()

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return self.step(batch)

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        self.log("val_loss", self.step(batch))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.1)


DATA = torch.randn(40, 50, WIDTH, generator=torch.Generator().manual_seed(0)) * SCALES
EXACT = float(power_law(covariance_spectrum(DATA), TAIL).exponent)


def fit(folder: Path, *callbacks: Callback, max_steps: int = 4, **kwargs: Any) -> tuple[Any, list[str]]:
    """The Trainer, and what was warned of numbers that are NaN."""
    loader = DataLoader(DATA, batch_size=8)
    trainer = tiny_trainer(
        folder,
        max_steps=max_steps,
        val_check_interval=2,
        check_val_every_n_epoch=None,
        num_sanity_val_steps=0,
        callbacks=list(callbacks),
        **{"enable_checkpointing": any(isinstance(one, ModelCheckpoint) for one in callbacks)},
    )
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        trainer.fit(Model(), loader, loader, **kwargs)
    return trainer, [str(one.message) for one in seen if "NaN" in str(one.message)]


@pytest.mark.parametrize("num_groups", [1, 4])
def test_a_part_of_a_band_is_no_exponent(tmp_path: Path, num_groups: int) -> None:
    kinds = {"tail": TAIL, "num_groups": num_groups, "dtype": "float32", **ROWS}
    spectrum = ActivationSpectrum("wide", head=(1, 3), **kinds)
    trainer, said = fit(tmp_path, spectrum, TailForecaster(0.1, layer="wide", **kinds))
    for key in (KEY, f"{KEY}_stderr", f"{KEY}_corrected", "activation/wide/r2_tail", "forecast/alpha_tail"):
        assert trainer.callback_metrics[key].isnan()
    assert np.isfinite(float(trainer.callback_metrics["activation/wide/alpha_head"]))
    reason = (
        "wide: NaN, because band (5, 20), ranks 5 to 20, holds 5 positive values of 16: float32 resolves no smaller"
    )
    assert [one.split()[0] for one in said if f"at step 2, {reason}" in one] == ["ActivationSpectrum", "TailForecaster"]
    read = Run(tmp_path).spectrum("activation", "wide", 4)
    assert read.dtype == "float32"
    assert "holds 5 positive values of 16: float32 resolves no smaller ones" in read.exponent(TAIL).reason


class Dtypes(ActivationSpectrum):
    """Keeps the tail and the type of each layer, by step."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.seen: dict[int, dict[str, tuple[str, float]]] = {}

    def measured(self, report):
        spectra = self.spectra(report)
        self.seen[report.step] = {name: (one.dtype, one.exponent(TAIL).value) for name, one in spectra.items()}
        return super().measured(report)


def test_auto_takes_float64_where_the_tail_would_be_lost_and_says_so_once(tmp_path: Path) -> None:
    spectrum = Dtypes(["wide", "plain"], head=(1, 3), tail=TAIL, **ROWS)
    forecaster = TailForecaster(0.1, layer="wide", tail=TAIL, **ROWS)
    trainer, said = fit(tmp_path, spectrum, forecaster, HeadDrift("wide", rank=2, **ROWS), max_steps=6)
    assert [{name: dtype for name, (dtype, _) in seen.items()} for seen in spectrum.seen.values()] == [
        {"wide": "float32", "plain": "float32"},
        {"wide": "float64", "plain": "float32"},
        {"wide": "float64", "plain": "float32"},
    ]
    assert np.isnan(spectrum.seen[2]["wide"][1])
    assert np.isfinite(spectrum.seen[2]["plain"][1])
    for found in (spectrum.seen[4]["wide"][1], float(trainer.callback_metrics["forecast/alpha_tail"])):
        assert found == pytest.approx(EXACT, rel=1e-6)
    assert said == [
        "Dtypes at step 2: float32 does not resolve all of band (5, 20) in wide: what needs it is NaN now, "
        "and is measured in float64 from the next report on"
    ]
    run = Run(tmp_path)
    assert [run.spectrum("activation", "wide", step).dtype for step in (2, 4)] == ["float32", "float64"]
    assert [run.settings("activation")["dtype"], len(run.all_series("activation"))] == ["auto", 1]
    # Between a report that does not resolve the tail and one that does, it is not known.
    middle = (run.tokens_at("activation", 2) + run.tokens_at("activation", 4)) / 2
    assert np.isnan(run.spectrum_at("activation", "wide", middle).exponent(TAIL).value)


def test_drift_begins_where_its_directions_are_resolved(tmp_path: Path) -> None:
    trainer, said = fit(tmp_path, HeadDrift("wide", rank=12, **ROWS), max_steps=6)
    assert [one.split(":")[0] for one in said] == ["HeadDrift at step 2"]
    assert float(trainer.callback_metrics["drift/wide/overlap"]) == pytest.approx(1)
    assert float(trainer.callback_metrics["drift/wide/js"]) == pytest.approx(0, abs=1e-12)


def test_a_resumed_run_goes_on_in_float64_and_with_its_record(tmp_path: Path) -> None:
    arguments: dict[str, Any] = {"head": (1, 3), "tail": TAIL, **ROWS}
    kept = ModelCheckpoint(tmp_path / "kept", every_n_train_steps=3, save_top_k=-1, filename="{step}")
    fit(tmp_path, Dtypes("wide", **arguments), kept, max_steps=3)
    resumed = Dtypes("wide", **arguments)
    _, said = fit(tmp_path, resumed, max_steps=4, ckpt_path=tmp_path / "kept" / "step=3.ckpt")
    assert said == []
    assert resumed.seen == {4: {"wide": ("float64", pytest.approx(EXACT, rel=1e-6))}}
    assert Run(tmp_path).all_series("activation") == ["activation-validate"]
