"""The callback and the command forecast one run at one step from one rule: the same numbers, whatever they go by."""

import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
from lightning.pytorch import Callback, seed_everything

from lightning_spectral import RunRecord, forecast
from lightning_spectral.runs import Record, Row, predicting
from tests.callbacks.test_tail_forecaster import LAYER, Falling, Kept
from tests.models import LENGTH, tiny_trainer, token_loader
from tests.runs.made_up import SETTINGS

STEP = 4 * LENGTH
RATES = (0.7, 0.8, 0.9, 1.05, 1.15, 1.3, 0.95, 1.0)
"""At which references come down, relative to the run that is forecast."""


def reference(folder: Path, number: int) -> None:
    """A run that comes down from 3 evenly in its tokens, validated where no other is."""
    rate = RATES[number]
    settings = {**SETTINGS, "layers": [LAYER], "num_tokens": 512, "head": [1, 4], "tail": [0.125, 0.5]}
    batch = STEP * (0.5 + number / 4)
    facts = {"id": str(folder), "family": "F", "series": {"activation-validate": settings}, "batch_tokens": batch}
    record = Record.begin(folder / "spectra", facts | {"validation_data": {"0": "a1"}, "val_loss": "falling_loss"})
    for index in range(1, 46):
        tokens = (0.71 + 0.01 * number) * STEP * index
        loss = 3 - rate * tokens / STEP / 10 + 0.05 * math.cos(index + number)
        record.append(Row(index, tokens, 1.0 * index, math.nan, loss))
        exponent = 0.6 + 0.2 * number + 0.01 * index
        arrays = {
            "tokens": np.asarray(tokens),
            f"activation/{LAYER}/eigenvalues": np.arange(1, 33.0) ** -exponent,
            f"activation/{LAYER}/num_tokens": np.asarray(512),
        }
        record.write_report("activation-validate", index, arrays)


def as_of(run: Path, step: int, folder: Path) -> Path:
    """A copy of a run as it was at a step, on the validation data of the references."""
    shutil.copytree(run, folder)
    history = folder / "spectra/history.csv"
    head, *lines = history.read_text().splitlines()
    kept = [line for line in lines if int(line.partition(",")[0]) <= step]
    history.write_text("\n".join([head, *kept]) + "\n")
    for report in (folder / "spectra").glob("*.npz"):
        if int(report.stem.rpartition("-")[2]) > step:
            report.unlink()
    about = json.loads((folder / "spectra/run.json").read_text())
    about |= {"validation_data": {"0": "a1"}, "validation_samples": {}, "val_loss": "falling_loss", "id": str(folder)}
    (folder / "spectra/run.json").write_text(json.dumps(about))
    return folder


def fit(folder: Path, forecaster: Kept, *callbacks: Callback) -> None:
    """Twelve steps with a loss after each."""
    record = RunRecord(family="F", loss="falling_loss")
    limits = {"max_steps": 12, "val_check_interval": 1, "limit_val_batches": 16}
    seed_everything(0, verbose=False)
    trainer = tiny_trainer(folder, callbacks=[*callbacks, forecaster, record], **limits)
    trainer.fit(Falling(), token_loader(400), token_loader(64, seed=1))


@pytest.fixture(scope="module")
def refs(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("references")
    for number in range(len(RATES)):
        reference(folder / f"{number}", number)
    return f"{folder}/*"


@pytest.mark.filterwarnings("ignore:Kept")
@pytest.mark.parametrize(
    ("by", "min_steps"), [("stack", 0), ("stack", 32), ("tail", 0), ("head", 32), ("loss", 32), ("batch", 32)]
)
def test_callback_and_command_say_the_same(
    refs: str, by: str, min_steps: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Twelve losses, of which eight are kept; between them the references have theirs."""
    monkeypatch.setattr(predicting, "MIN_STEPS", min_steps)
    forecaster = Kept(refs, predictor=by)
    fit(tmp_path / "run", forecaster)
    compared = 0
    for step, logged in forecaster.logged.items():
        (family,) = forecast([refs, as_of(tmp_path / "run", step, tmp_path / f"{step}")], 1.0, by=by)
        (one,) = family.forecasts
        said = {name.removeprefix("forecast/"): value for name, value in logged.items()}
        gain = dict(zip(("spectral_gain", "spectral_gain_low", "spectral_gain_high"), one.spectral_gain, strict=True))
        names = ("low", "high", "relative", "num_references", "num_settings", "skill", "median_error")
        command = {name: getattr(one, name) for name in names} | {"tokens_to_target": one.value} | gain
        assert {name: said[name] for name in command} == pytest.approx(command, rel=1e-6, nan_ok=True), step
        assert one.step == step
        compared += math.isfinite(one.value)
    assert compared >= 2


@pytest.mark.filterwarnings("ignore:Kept")
def test_a_run_inside_its_interval_is_forecast_by_what_is_left_of_it(refs: str, tmp_path: Path) -> None:
    """At 480 of some 640 tokens: the median lies above what was taken, and so does the whole interval."""
    forecaster = Kept(refs, predictor="batch", target_loss=1.6, every_n_steps=1)
    fit(tmp_path / "run", forecaster)
    values = [forecaster.values(name) for name in ("low", "tokens_to_target", "high")]
    taken = [STEP * step for step in forecaster.logged]
    inside = [row for row in zip(taken, *values, strict=True) if not math.isnan(row[1])]
    assert inside
    assert all(now < low < value < high for now, low, value, high in inside)
    assert len({value for _, _, value, _ in inside}) > 1, "the unconditional forecast of the batch is one number"
