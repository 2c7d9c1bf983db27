"""Callbacks go to other processes and into copies: before, during and after a run."""

import copy
import pickle
from pathlib import Path

import pytest
from lightning.pytorch import Callback, LightningModule, Trainer

from lightning_spectral import ActivationSpectrum, GradientSpectrum, HeadDrift, RunRecord, TailForecaster
from tests.models import LanguageModel, tiny_trainer, token_loader

MAKERS = [
    pytest.param(lambda: ActivationSpectrum(every_n_steps=2), id="ActivationSpectrum"),
    pytest.param(lambda: ActivationSpectrum(every_n_steps=2, overlap=True), id="overlap"),
    pytest.param(lambda: GradientSpectrum("*.mix.weight", 2, num_samples=8), id="GradientSpectrum"),
    pytest.param(lambda: GradientSpectrum("*.mix.weight", 2, num_samples=8, method="hooks"), id="hooks"),
    pytest.param(lambda: HeadDrift(every_n_steps=2, stage="train", rank=2), id="HeadDrift"),
    pytest.param(lambda: TailForecaster(1.0, "train_loss", stage="train", every_n_steps=2), id="TailForecaster"),
    pytest.param(lambda: RunRecord(tags={"idea": "a"}), id="RunRecord"),
]


class Pickle(Callback):
    """Sends another callback through pickle and copy in the middle of a run."""

    def __init__(self, other: Callback) -> None:
        self.other = other
        self.copies: list[Callback] = []

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_) -> None:
        self.copies = [pickle.loads(pickle.dumps(self.other)), copy.deepcopy(self.other)]


@pytest.mark.parametrize("make", MAKERS)
@pytest.mark.filterwarnings(
    "ignore:TailForecaster makes no forecast", "ignore:.*NaN, because", "ignore:.*Skipping val loop"
)
def test_callbacks_can_be_pickled_at_any_time(tmp_path: Path, make) -> None:
    callback = pickle.loads(pickle.dumps(make()))
    pickler = Pickle(callback)
    tiny_trainer(tmp_path, callbacks=[callback, pickler], max_steps=4).fit(LanguageModel(), token_loader(16))
    after = pickle.loads(pickle.dumps(callback))
    assert after.state_key == callback.state_key
    # A copy is of use in a run of its own.
    for number, one in enumerate([*pickler.copies, after]):
        trainer = tiny_trainer(tmp_path / str(number), callbacks=[one], max_steps=2)
        trainer.fit(LanguageModel(), token_loader(16))
        assert all(key in trainer.callback_metrics for key in getattr(one, "keys", list)())
