"""Noise scales over several reports: means of both parts, failed reports passed over, and over a resume."""

import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch import Callback, Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_spectral import GradientSpectrum, Run
from lightning_spectral.callbacks.smoothed_noise import SmoothedNoise
from lightning_spectral.functional import NoiseSums, noise_sums
from lightning_spectral.runs.tables import evolution, print_run
from lightning_spectral.terminal import show_interval
from tests.models import LanguageModel, tiny_trainer, token_loader

ENDS = ("", "_low", "_high")
NAME = "network.blocks.0.mlp.2.weight"


def sums(seed: int) -> NoiseSums:
    rows = torch.randn(16, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)) + 0.3
    return noise_sums(rows @ rows.T, torch.arange(16) % 4)


def test_both_parts_are_averaged_and_later_reports_weigh_more() -> None:
    smoothed, parts = SmoothedNoise(0.5), [sums(seed).moments_between for seed in range(3)]
    found = [smoothed.update("a", sums(seed)) for seed in range(3)]
    assert found[0] == pytest.approx(float(parts[0].noise_scale))
    weights = (0.25, 0.5, 1.0)
    trace, squared_norm = (
        sum(weight * float(getattr(part, field)) for weight, part in zip(weights, parts, strict=True))
        for field in ("trace", "squared_norm")
    )
    assert found[2] == pytest.approx(trace / squared_norm)
    assert SmoothedNoise(0.5).update("a", sums(2)) != pytest.approx(found[2])


def test_the_latest_report_alone_at_a_decay_of_zero() -> None:
    smoothed = SmoothedNoise(0)
    smoothed.update("a", sums(0))
    assert smoothed.update("a", sums(1)) == pytest.approx(float(sums(1).moments_between.noise_scale))


def test_names_do_not_mix_and_reports_that_failed_are_passed_over() -> None:
    smoothed, other = SmoothedNoise(0.9), SmoothedNoise(0.9)
    smoothed.update("a", sums(0))
    other.update("a", sums(0))
    assert math.isnan(smoothed.update("a", NoiseSums.missing()))
    assert math.isnan(smoothed.update("b", NoiseSums.nothing()))
    smoothed.update("b", sums(7))
    assert smoothed.update("a", sums(1)) == other.update("a", sums(1))


def test_goes_on_from_its_state() -> None:
    whole, first, second = (SmoothedNoise(0.8) for _ in range(3))
    expected = [whole.update("", sums(seed)) for seed in range(4)]
    for seed in range(2):
        first.update("", sums(seed))
    second.restore(first.state())
    assert [second.update("", sums(seed)) for seed in (2, 3)] == expected[2:]
    second.restore({})
    assert second.update("", sums(0)) == expected[0]


@pytest.mark.parametrize("decay", [1, 1.5, -0.1, "half", True, math.nan])
def test_a_decay_that_is_none_is_refused(decay: object) -> None:
    with pytest.raises(ValueError, match="noise_decay must be from 0 up to 1, got") as caught:
        GradientSpectrum(noise_decay=decay)
    assert "\n" not in str(caught.value)


def fit(folder: Path, max_steps: int, *callbacks: Callback, ckpt_path: Path | None = None, **bands: Any) -> Trainer:
    seed_everything(0, verbose=False)
    spectrum = GradientSpectrum(
        "all", every_n_steps=2, num_samples=8, noise_decay=0.7, **{"head": (1, 3), "tail": (1, 3)} | bands
    )
    trainer = tiny_trainer(
        folder, max_steps=max_steps, limit_val_batches=0, callbacks=[spectrum, *callbacks], enable_checkpointing=True
    )
    # One batch: what order a loader resumes in does not matter.
    trainer.fit(LanguageModel(), token_loader(8, batch_size=8), token_loader(8, batch_size=8), ckpt_path=ckpt_path)
    return trainer


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")
def test_a_resumed_run_goes_on_with_its_means(tmp_path: Path) -> None:
    saving = ModelCheckpoint(tmp_path / "saved", "at", every_n_epochs=4, save_on_train_epoch_end=True)
    whole, cut = fit(tmp_path / "whole", 8), fit(tmp_path / "cut", 4, saving)
    resumed = fit(tmp_path / "resumed", 8, ckpt_path=tmp_path / "saved" / "at.ckpt")
    means = [trainer.callbacks[0]._kept["summary"]["noise"] for trainer in (whole, resumed, cut)]
    assert len(means[0]) == 1 + len(list(whole.lightning_module.parameters()))
    for name, expected in means[0].items():
        assert means[1][name] == pytest.approx(expected, rel=1e-6)
        assert means[2][name] != pytest.approx(expected, rel=1e-6)
    for start in (f"gradient/{NAME}", "gradient"):
        logged = [float(trainer.callback_metrics[f"{start}/noise_scale_smoothed"]) for trainer in (whole, resumed)]
        assert logged[1] == pytest.approx(logged[0], rel=1e-6)


def recorded(folder: Path) -> Run:
    (spectra,) = folder.rglob("spectra")
    return Run(spectra)


def test_a_record_gives_back_what_was_logged(tmp_path: Path) -> None:
    trainer = fit(tmp_path, 2)
    run = recorded(tmp_path)
    for name, start in ((NAME, f"gradient/{NAME}"), (None, "gradient")):
        logged = [float(trainer.callback_metrics[f"{start}/noise_scale{end}"]) for end in ENDS]
        found = run.noise_scale(2, name)
        assert [found.value, found.low, found.high] == pytest.approx(logged)
        assert found.value == pytest.approx(found.trace / found.squared_norm if found.squared_norm > 0 else math.inf)
        # Of one report there is nothing to smooth.
        assert run.steps("gradient") == [2]
        assert found.between == pytest.approx(float(trainer.callback_metrics[f"{start}/noise_scale_smoothed"]))


def test_a_table_shows_the_interval(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trainer = fit(tmp_path, 2)
    value, low, high = (float(trainer.callback_metrics[f"gradient/{NAME}/noise_scale{end}"]) for end in ENDS)
    shown = show_interval(value, low, high)
    assert re.fullmatch(r"> [\d,.]+|[\d,.]+ \((> [\d,.]+|[\d,.]+\.\.[\d,.]+)\)", shown)
    assert shown in capsys.readouterr().out  # that closes the run
    run = recorded(tmp_path)
    print_run(run, ["gradient"])
    out = capsys.readouterr().out
    assert "noise scale (80%)" in out
    assert shown in out
    (row,) = (row for row in evolution(run, "gradient", [2]) if row["name"] == NAME)
    assert [row[f"noise_scale{end}"] for end in ENDS] == pytest.approx([value, low, high])


def test_a_record_without_sums_over_groups_has_no_interval(tmp_path: Path) -> None:
    fit(tmp_path, 2)
    run = recorded(tmp_path)
    before = run.noise_scale(2, NAME)
    (path,) = run.folder.glob("gradient-*.npz")
    with np.load(path) as arrays:
        kept = {key: arrays[key] for key in arrays.files if "/noise_" not in key}
    np.savez(path, **kept)
    found = run.noise_scale(2, NAME)
    assert found._replace(low=before.low, high=before.high, between=before.between) == pytest.approx(before)
    assert math.isnan(found.low)
    assert found.between == found.value
    np.savez(path, **{key: array for key, array in kept.items() if not key.endswith(("/trace", "/squared_norm"))})
    assert all(map(math.isnan, run.noise_scale(2, NAME)))


def test_a_record_refuses_what_it_does_not_hold(tmp_path: Path) -> None:
    fit(tmp_path, 2)
    run = recorded(tmp_path)
    for arguments, reason in (
        ((2, "nothing"), "name must be one of .*got 'nothing'"),
        ((3, NAME), "step must be one of 2"),
        ((2, NAME, "weight"), "kind must be 'gradient' or a series of it, got 'weight'"),
    ):
        with pytest.raises(ValueError, match=reason) as caught:
            run.noise_scale(*arguments)
        assert "\n" not in str(caught.value)
