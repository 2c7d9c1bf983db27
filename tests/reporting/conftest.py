"""Runs to look at: a real tiny one with all that can be measured, one that failed, two sides of seeds, and a log."""

from pathlib import Path

import numpy as np
import pytest
import torch
from lightning.pytorch.loggers import TensorBoardLogger

from lightning_spectral import ActivationSpectrum, GradientSpectrum, HeadDrift
from lightning_spectral.runs import Record, Row
from lightning_spectral.runs.record import read_about
from lightning_spectral.runs.to_json import to_json, to_json_line
from tests.models import LanguageModel, tiny_trainer, token_loader
from tests.runs.made_up import LAYER, SETTINGS, made_up, when

EVIL = "<script>alert('&\"')</script>"
"""A name that would do harm on a page that does not escape it."""
REASON = f"Gram matrix is not finite </script>{EVIL}"
ADVICE = [
    {"text": f"The tail fell {EVIL}", "url": "https://example.org/tail"},
    {"text": "No link", "url": "javascript:1"},
]


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A real run: activations with eigenvectors, per-sample gradients, weights, and a forecaster's lines."""
    folder = tmp_path_factory.mktemp("trained")
    callbacks = [
        ActivationSpectrum(every_n_steps=2, stage="validate", num_tokens=256, tail=(0.125, 0.5)),
        HeadDrift(every_n_steps=2, stage="validate", num_tokens=256, rank=3),
        GradientSpectrum(every_n_steps=4, stage="validate", num_samples=32, weights=True),
    ]
    logger = TensorBoardLogger(folder, version=0)
    torch.manual_seed(0)
    settings = {"max_steps": 8, "val_check_interval": 2, "check_val_every_n_epoch": None, "log_every_n_steps": 1}
    trainer = tiny_trainer(folder, callbacks=callbacks, logger=logger, **settings)
    trainer.fit(LanguageModel(), token_loader(64), token_loader(64))
    path = Path(logger.log_dir)
    said = {"forecast": {"": {"target_loss": 2.0, "monitor": "val_loss"}}, "advice": ADVICE}
    told(path, **said)
    lines = [
        {"prefix": "", "step": 2, "tokens": 64.0, "tokens_to_target": None, "low": None, "high": None, "actual": None},
        {"prefix": "", "step": 4, "tokens": 128.0, "tokens_to_target": 500.0, "low": 300.0, "high": 900.0},
    ]
    text = "".join(f"{to_json_line(line)}\n" for line in lines)
    (path / "spectra" / "forecasts.jsonl").write_text(text)
    return path


def told(path: Path, **facts: object) -> None:
    """Say more of a run in its record."""
    folder = path / "spectra"
    (folder / "run.json").write_text(to_json(read_about(folder) | facts))


@pytest.fixture(scope="session")
def failed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose second report of three failed, with a reason and a tag that are no HTML."""
    folder = tmp_path_factory.mktemp("failed") / "run"
    facts = {"id": "failed", "family": EVIL, "tags": {EVIL: EVIL}, "series": {"activation-validate": SETTINGS}}
    record = Record.begin(folder / "spectra", facts)
    values = np.arange(1, 33.0) ** -1.5
    for step, failure in ((10, ""), (20, REASON), (30, "")):
        record.append(Row(step, step * 64.0, float(step), 3.0 / step, float("nan")))
        arrays = {
            "tokens": np.asarray(step * 64.0),
            f"activation/{LAYER}/eigenvalues": np.full(32, np.nan) if failure else values,
            f"activation/{LAYER}/failure": np.asarray(failure),
            f"activation/{LAYER}/num_tokens": np.asarray(64),
        }
        record.write_report("activation-validate", step, arrays)
    return folder


@pytest.fixture(scope="session")
def sides(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three seeds of each of two sides, of which the variant takes half the tokens."""
    folder = tmp_path_factory.mktemp("sides")
    for number in range(3):
        for name, tokens, exponent in (("base", 100, 1.0), ("variant", 50, 1.5)):
            about = when(number)
            made_up(folder / name / f"{number}", tokens + number, 1.0, exponent + 0.01 * number, about=about)
    return folder


@pytest.fixture(scope="session")
def log(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a CSVLogger left: losses, and no tokens."""
    folder = tmp_path_factory.mktemp("csv") / "version_0"
    folder.mkdir()
    (folder / "metrics.csv").write_text("step,val_loss\n4,3.0\n9,2.2\n15,1.9\n")
    return folder
