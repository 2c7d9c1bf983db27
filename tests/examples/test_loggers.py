"""The examples of other tools' stores: what they print is what is there, and it reads back."""

import re
from pathlib import Path

import numpy as np
import pytest

from lightning_spectral import Run, compare
from tests.examples.running import run_example


def test_a_history_out_of_an_offline_run_is_compared(tmp_path: Path) -> None:
    folders = {f"WANDB_{name}_DIR": tmp_path for name in ("DATA", "CACHE", "CONFIG")}
    *_, has, command = run_example(
        "wandb_offline", "--max-steps", "10", "--seeds", "1", "--folder", tmp_path, **folders
    )
    found = {kind: int(count) for count, kind in re.findall(r"(\d+) x ([^,]+)", has)}
    assert found["histogram"] == 2 * 10  # layers, reports
    assert found["image-file"] == found["table-file"] > 0  # a figure and its values at some of them
    assert found["artifact of type spectra"] == 1
    patterns = re.findall(r"'([^']+)'", command)
    exported, recorded = Run(tmp_path / "base/seed_1/history.jsonl"), Run(*tmp_path.glob("base/seed_1/spectra/*"))
    assert exported.columns["tool"] == "W&B"
    # Lightning logs a validation run with the number of the batch before it.
    read, seen = (
        {step: loss for step, loss in zip(run.history.step, run.history.val_loss, strict=True) if np.isfinite(loss)}
        for run in (exported, recorded)
    )
    assert read == pytest.approx(seen)
    assert len(read) == 10
    np.testing.assert_array_equal(exported.history.tokens, 512 * exported.history.step)
    assert compare(*patterns).verdict.text


def test_the_record_comes_back_from_mlflow(tmp_path: Path) -> None:
    *_, ranks, files, tail, last = run_example("mlflow_local", "--max-steps", "10", "--folder", tmp_path)
    assert str(tmp_path) in last
    run = Run(tmp_path)
    assert run.steps("activation") == list(range(1, 11))
    spectra = [run.spectrum("activation", "gpt.blocks.1", step=step) for step in range(1, 11)]
    printed = re.findall(r"(\d+): (\d+\.\d)", ranks)
    assert printed == [(str(step), f"{spectrum.rankme().value:.1f}") for step, spectrum in enumerate(spectra, start=1)]
    assert {"activation/values", "gradient/spectra", "spectra"} <= set(files.partition("files in ")[2].split(", "))
    assert f"{spectra[-1].exponent((0.125, 0.5)).value:.3f}" in tail
