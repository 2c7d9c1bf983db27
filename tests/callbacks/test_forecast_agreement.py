"""The callback and the command forecast one run at one step from one rule: the same numbers, whatever they go by."""

import json
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from lightning.pytorch import Callback, seed_everything
from torch import Tensor

from lightning_spectral import GradientSpectrum, Run, RunRecord, forecast, functional
from lightning_spectral.callbacks import forecaster
from lightning_spectral.functional import Early, StackedForecast
from lightning_spectral.runs import Record, Row, predicting
from tests.callbacks.test_tail_forecaster import DATA, LAYER, Falling, Kept
from tests.models import LENGTH, tiny_trainer, token_loader
from tests.runs.made_up import SETTINGS

STEP = 4 * LENGTH
RATES = (0.7, 0.8, 0.9, 1.05, 1.15, 1.3, 0.95, 1.0)
"""At which references come down, relative to the run that is forecast."""


PARAMETER = f"{LAYER}.mix.weight"
GRADIENTS = {"kind": "gradient", "stage": "validate", "parameters": [PARAMETER], "num_samples": 16}


def reference(folder: Path, number: int) -> None:
    """A run that comes down from 3 evenly in its tokens, validated where no other is; its noise grows with them."""
    rate = RATES[number]
    settings = {**SETTINGS, "layers": [LAYER], "num_tokens": 512, "head": [1, 4], "tail": [0.125, 0.5]}
    batch = batch_of(number)
    facts = {"id": str(folder), "family": "F", "batch_tokens": batch}
    facts |= {"series": {"activation-validate": settings, "gradient-validate": GRADIENTS | {"loss_reduction": "mean"}}}
    record = Record.begin(folder / "spectra", facts | {"validation_data": {"0": DATA}, "val_loss": "falling_loss"})
    for index in range(1, int(1200 / batch)):
        tokens = batch * index
        loss = 3 - rate * tokens / STEP / 10 + 0.05 * math.cos(index + number)
        record.append(Row(index, tokens, 1.0 * index, math.nan, loss))
        exponent = 0.6 + 0.2 * number + 0.01 * index
        arrays = {
            "tokens": np.asarray(tokens),
            f"activation/{LAYER}/eigenvalues": np.arange(1, 33.0) ** -exponent,
            f"activation/{LAYER}/num_tokens": np.asarray(512),
        }
        record.write_report("activation-validate", index, arrays)
        parts = {"squared_norm": np.asarray(0.5), "trace": np.asarray(noise(number, tokens) / 2)}
        gradients = {f"gradient/{PARAMETER}/{name}": part for name, part in parts.items()}
        record.write_report("gradient-validate", index, {"tokens": np.asarray(tokens)} | gradients)


def batch_of(number: int) -> float:
    """Tokens of a step of a reference."""
    return STEP * (2 + number) / 4


def log_of(reference: Path, folder: Path, number: int) -> None:
    """What a CSVLogger would have left of it."""
    history = Run(reference).history
    folder.mkdir(parents=True)
    rows = [f"{step:.0f},{float(loss)!r}\n" for step, loss in zip(history.step, history.val_loss, strict=True)]
    (folder / "metrics.csv").write_text("step,nll\n" + "".join(rows))
    (folder / "hparams.yaml").write_text(f"batch_size: {batch_of(number) / LENGTH}\n")


def noise(number: int, tokens: float) -> float:
    """Noise scale of a reference."""
    return (3 + (5 * number) % 8) * tokens / 100


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
    about |= {"validation_data": {"0": DATA}, "validation_samples": {}, "val_loss": "falling_loss", "id": str(folder)}
    (folder / "spectra/run.json").write_text(json.dumps(about))
    return folder


def fit(folder: Path, kept: Kept, *callbacks: Callback) -> None:
    """Twelve steps with a loss after each."""
    record = RunRecord(family="F", loss="falling_loss")
    limits = {"max_steps": 12, "val_check_interval": 1, "limit_val_batches": 16}
    seed_everything(0, verbose=False)
    trainer = tiny_trainer(folder, callbacks=[*callbacks, kept, record], **limits)
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
    kept = Kept(refs, predictor=by)
    fit(tmp_path / "run", kept)
    compared = 0
    for step, logged in kept.logged.items():
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
def test_noise_scales_take_part_where_they_were_measured_alike(
    refs: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[Early, Early]] = []

    def stack(references: Early, tokens: Tensor, query: Early, *args: Any, **kwargs: Any) -> StackedForecast:
        asked.append((references, query))
        return functional.stack(references, tokens, query, *args, **kwargs)

    monkeypatch.setattr(predicting, "stack", stack)
    said = {}
    for num_samples in (16, 12):
        kept, folder = Kept(refs, predictor="stack"), tmp_path / f"{num_samples}"
        bands = {"num_groups": 2, "tail": (1, 4), "head": (1, 3)}
        gradients = GradientSpectrum(PARAMETER, every_n_steps=8, stage="validate", num_samples=num_samples, **bands)
        fit(folder / "run", kept, gradients)
        run = Run(folder / "run")
        assert run.steps("gradient") == [1, 9]
        # At step 5 the noise scale is that of step 1.
        for (references, query), at in zip(asked, (1, 1, 9), strict=True):
            assert query.spectral.shape == (1, 3)
            # Before a reference's first report nothing is known of it.
            every = range(len(RATES))
            expected = [math.log(noise(n, at * STEP)) if batch_of(n) <= at * STEP else math.nan for n in every]
            columns = references.spectral[:, -1].tolist()
            if num_samples == 16:
                assert columns == pytest.approx(expected, nan_ok=True)
                assert float(query.spectral[0, -1]) == pytest.approx(math.log(run.noise_scale(at).value))
            else:
                assert np.isnan(columns).all()
        asked.clear()
        said[num_samples] = kept.logged[9]
        (family,) = forecast([refs, as_of(folder / "run", 9, folder / "then")], 1.0)
        asked.clear()
        assert family.forecasts[0].value == pytest.approx(said[num_samples]["forecast/tokens_to_target"])
        assert family.forecasts[0].spectral_gain[0] == pytest.approx(said[num_samples]["forecast/spectral_gain"])
    assert said[16]["forecast/spectral_gain"] != pytest.approx(said[12]["forecast/spectral_gain"])


@pytest.mark.filterwarnings("ignore:Kept")
def test_logs_of_other_tools_are_references_by_loss_and_batch(
    refs: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """CSVs of the same runs forecast as their records do without spectra, and are told."""
    for number in range(len(RATES)):
        log_of(Path(refs).parent / f"{number}", tmp_path / "logs" / f"{number}", number)
    logs = {"path": f"{tmp_path}/logs/*", "loss": "nll", "batch_tokens": f"batch_size*{LENGTH}"}
    without = Kept(refs, predictor="stack", num_tokens=511)  # of as many rows no reference has spectra
    found, said = {"records": without}, []
    fit(tmp_path / "records", without)
    monkeypatch.setattr(forecaster, "rank_zero_info", said.append)
    for name, given in {"logs": [logs], "both": [f"{Path(refs).parent}/[0-3]", logs]}.items():
        found[name] = Kept(given, predictor="stack")
        fit(tmp_path / name, found[name])
    told = [text for text in said if "has no spectra: read from CSVLogger (loss: nll, step: step, tokens: " in text]
    assert len(told) == 2 * len(RATES)
    assert all(text.endswith("as a run of F, for it was given as one") for text in told)
    assert said.count("TailForecaster goes by loss and batch alone: 8 references have no such spectra") == 2
    for name in ("tokens_to_target", "low", "high", "relative", "num_settings", "skill", "median_error"):
        values = found["records"].values(name)
        assert np.isfinite(values[-2:]).all()
        assert found["logs"].values(name) == pytest.approx(values, nan_ok=True)
    assert found["both"].values("num_references")[-1] == 12
    assert found["both"].values("num_settings")[-1] == 8


@pytest.mark.filterwarnings("ignore:Kept")
def test_a_run_inside_its_interval_is_forecast_by_what_is_left_of_it(refs: str, tmp_path: Path) -> None:
    """At 480 of some 640 tokens: the median lies above what was taken, and so does the whole interval."""
    kept = Kept(refs, predictor="batch", target_loss=1.6, every_n_steps=1)
    fit(tmp_path / "run", kept)
    values = [kept.values(name) for name in ("low", "tokens_to_target", "high")]
    taken = [STEP * step for step in kept.logged]
    inside = [row for row in zip(taken, *values, strict=True) if not math.isnan(row[1])]
    assert inside
    assert all(now < low < value < high for now, low, value, high in inside)
    assert len({value for _, _, value, _ in inside}) > 1, "the unconditional forecast of the batch is one number"
