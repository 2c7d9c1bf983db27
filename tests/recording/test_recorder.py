"""Any Trainer with one of the callbacks leaves a record: what it holds, and that it goes on after a resume."""

import dataclasses
import json
import platform
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from lightning.pytorch import Callback, Trainer, seed_everything
from lightning.pytorch.callbacks import EarlyStopping, GradientAccumulationScheduler, ModelCheckpoint
from torch.utils.data import DataLoader

from lightning_spectral import (
    ActivationSpectrum,
    Exponent,
    GradientSpectrum,
    HeadDrift,
    Run,
    RunRecord,
    Spectrum,
    boards,
)
from lightning_spectral.boards import Board
from lightning_spectral.measurement import stopwatch
from lightning_spectral.recording import recorder
from lightning_spectral.recording.validation_loss import validation_loss
from lightning_spectral.runs.validation_data import ValidationData
from tests.models import LENGTH, PROBES, Alternating, LanguageModel, NoLogDir, Perceptron, tiny_trainer, token_loader

BLOCK = "network.blocks.0"


def fit(folder: Path, *callbacks: Callback, model: Any = None, ckpt_path: Any = None, **kwargs: Any) -> Trainer:
    seed_everything(0, verbose=False)
    defaults = {
        "max_steps": 12,
        "limit_val_batches": 2,
        "val_check_interval": 4,
    }
    trainer = tiny_trainer(folder, callbacks=list(callbacks), **{**defaults, **kwargs})
    model = LanguageModel() if model is None else model
    trainer.fit(model, token_loader(48), token_loader(16, seed=1), ckpt_path=ckpt_path)
    return trainer


def spectra(**kwargs: Any) -> ActivationSpectrum:
    return ActivationSpectrum(**{"stage": "validate", "every_n_steps": 4, "num_tokens": 64, "num_groups": 1, **kwargs})


class Seen(Callback):
    """What a run says of itself by other ways."""

    def __init__(self) -> None:
        self.reports: dict[int, Any] = {}
        self.losses: list[float] = []
        self.val_losses: dict[int, float] = {}

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, outputs: Any, *_: Any) -> None:
        self.losses.append(float(trainer.callback_metrics["train_loss"]))

    def on_validation_end(self, trainer: Trainer, *_: Any) -> None:
        if not trainer.sanity_checking:
            self.val_losses[trainer.global_step] = float(trainer.callback_metrics["val_loss"])


def test_record_holds_history_reports_and_a_description(tmp_path: Path) -> None:
    spectrum, seen = spectra(num_tokens=128, num_groups=2), Seen()
    gradients = GradientSpectrum("*.mix.weight", every_n_steps=6, num_samples=24, num_groups=2, weights=True)
    trainer = fit(tmp_path, spectrum, gradients, RunRecord(tags={"note": "first"}), seen, limit_val_batches=4)
    run = Run(tmp_path)
    assert sorted(path.name for path in run.folder.iterdir()) == [
        *(f"activation-validate-{step:09d}.npz" for step in (4, 8, 12)),
        *(f"gradient-train-{step:09d}.npz" for step in (6, 12)),
        "history.csv",
        "run.json",
    ]
    history = run.history
    assert history.step.tolist() == [4, 6, 8, 12]
    assert history.tokens.tolist() == [step * 4 * LENGTH for step in (4, 6, 8, 12)]
    np.testing.assert_array_equal(history.val_loss[[0, 2, 3]], [seen.val_losses[step] for step in (4, 8, 12)])
    means = [np.mean(seen.losses[start:stop]) for start, stop in ((0, 4), (4, 6), (6, 8), (8, 12))]
    np.testing.assert_allclose(history.train_loss, means, rtol=1e-6)
    assert run.kinds == ["activation", "gradient", "weight"]
    assert run.names("activation") == [f"network.{probe}" for probe in PROBES]
    about = run.about
    assert about["tags"] == {"note": "first"}
    assert about["batch_tokens"] == 4 * LENGTH
    assert about["batch_samples"] == 4
    assert (about["world_size"], about["precision"], about["seed"]) == (1, "32-true", 0)
    assert set(about["versions"]) == {"lightning-spectral", "lightning", "torch", "python"}
    settings = run.settings("activation")
    assert settings["layers"] == [f"network.{probe}" for probe in PROBES]
    assert (settings["stage"], settings["tail"], settings["num_tokens"]) == ("validate", [0.125, 0.5], 128)
    assert run.settings("gradient")["method"] == "auto"
    matrix = f"{BLOCK}.mix.weight"
    weights = dict(trainer.lightning_module.named_parameters())[matrix].detach()
    np.testing.assert_allclose(run.spectrum("weight", matrix, 12), torch.linalg.svdvals(weights), rtol=1e-5)
    assert run.spectrum("gradient", matrix, 12).count == 24


def test_what_is_read_back_is_what_was_measured(tmp_path: Path) -> None:
    """Of activations with eigenvectors, gradients and weights: the same object with the same numbers."""
    drift = HeadDrift(every_n_steps=4, num_tokens=256, num_groups=4, rank=3)
    gradients = GradientSpectrum(
        ["*.mix.weight", "*.bias"], every_n_steps=6, num_samples=24, num_groups=2, weights=True
    )
    live: dict[int, dict[str, Any]] = {}
    for callback in (drift, gradients):

        def keep(report: Any, measured: Any = callback.measured) -> dict[str, float]:
            live.setdefault(report.step, {}).update(report.spectra)
            return measured(report)

        callback.measured = keep  # type: ignore[method-assign]
    fit(tmp_path, drift, gradients, limit_val_batches=8)
    run = Run(tmp_path)
    assert {step: list(kinds) for step, kinds in live.items()} == {
        4: ["activation"],
        6: ["gradient", "weight"],
        8: ["activation"],
        12: ["gradient", "weight", "activation"],
    }
    num_known = dict.fromkeys(Exponent._fields, 0)
    for step, kinds in live.items():
        for kind, of_names in kinds.items():
            assert run.names(kind) == list(of_names)
            for name, measured in of_names.items():
                found = run.spectrum(kind, name, step)
                assert type(found) is type(measured) is Spectrum
                assert found.tokens == step * 4 * LENGTH
                for field in dataclasses.fields(Spectrum):
                    if field.name not in ("tokens", "_fits"):
                        there, here = getattr(found, field.name), getattr(measured, field.name)
                        if "vectors" in field.name and here is not None:
                            np.testing.assert_allclose(there, here, rtol=0, atol=1e-7)
                        else:
                            np.testing.assert_array_equal(there, here)
                for band in ((0.125, 0.5), (1, 10), (2, 3), (1, 10**6)):
                    np.testing.assert_equal(found.exponent(band), measured.exponent(band))
                    for field, value in found.exponent(band)._asdict().items():
                        num_known[field] += (
                            value is not None and not isinstance(value, str) and bool(np.all(value == value))
                        )
                np.testing.assert_equal(found.rankme(), measured.rankme())
    # Nothing above compares only NaN with NaN.
    assert min(num_known[name] for name in ("value", "stderr", "corrected", "r2", "band")) > 10


def test_weight_has_no_count(tmp_path: Path) -> None:
    gradients = GradientSpectrum("*.mix.weight", every_n_steps=6, num_samples=24, num_groups=2, weights=True)
    fit(tmp_path, gradients)
    assert Run(tmp_path).spectrum("weight", f"{BLOCK}.mix.weight", 6).count == 0


class FakeClock:
    """Time passes where a test says so."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 100.0
        monkeypatch.setattr(stopwatch, "perf_counter", lambda: self.now)


def test_seconds_leave_out_validation_and_measuring(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = FakeClock(monkeypatch)

    class Slow(LanguageModel):
        def training_step(self, batch, batch_idx):
            clock.now += 1
            return super().training_step(batch, batch_idx)

        def validation_step(self, batch, batch_idx, dataloader_idx=0):
            clock.now += 1000
            return super().validation_step(batch, batch_idx)

    class SlowToMeasure(ActivationSpectrum):
        def measured(self, report):
            clock.now += 100_000
            return super().measured(report)

    quick = {"every_n_steps": 4, "num_tokens": 64, "num_groups": 1}
    fit(tmp_path, SlowToMeasure(**quick), SlowToMeasure(stage="validate", prefix="v/", **quick), model=Slow())
    run = Run(tmp_path)
    assert run.history.seconds.tolist() == [4.0, 8.0, 12.0]
    assert run.steps("activation-train") == run.steps("activation-validate") == [4, 8, 12]


@pytest.mark.parametrize(
    ("model", "kwargs", "tokens", "steps"),
    [
        pytest.param(
            LanguageModel, {"accumulate_grad_batches": 3, "max_steps": 4}, 3 * 4 * LENGTH, 4, id="accumulation"
        ),
        pytest.param(Alternating, {"max_steps": 8}, 4 * LENGTH, 4, id="manual optimisation"),
    ],
)
def test_tokens_of_a_step(tmp_path: Path, model: Any, kwargs: dict[str, Any], tokens: int, steps: int) -> None:
    module = model()
    fit(tmp_path, spectra(every_n_steps=2), model=module, **kwargs)
    run = Run(tmp_path)
    assert run.history.tokens[-1] == steps * tokens
    assert run.about["batch_tokens"] == tokens
    assert run.about["batch_samples"] == tokens / LENGTH
    assert np.isfinite(run.history.train_loss).any() == module.automatic_optimization


class EveryFourth(LanguageModel):
    """Steps by hand after each fourth batch."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        self.manual_backward(super().training_step(batch, batch_idx))
        if batch_idx % 4 == 3:
            self.optimizers().step()
            self.optimizers().zero_grad()


class Rising(GradientAccumulationScheduler):
    def __init__(self) -> None:
        super().__init__({0: 1, 1: 4})


@pytest.mark.parametrize(
    ("model", "callbacks", "kwargs", "batches"),
    [
        pytest.param(EveryFourth, [], {"max_steps": 3, "limit_train_batches": 12}, 4, id="by hand"),
        pytest.param(
            LanguageModel,
            [],
            {"accumulate_grad_batches": 8, "limit_train_batches": 10, "max_epochs": 3, "max_steps": -1},
            5,
            id="cut short",
        ),
        pytest.param(
            LanguageModel, [Rising], {"limit_train_batches": 8, "max_epochs": 3, "max_steps": -1}, 2, id="rising"
        ),
    ],
)
def test_batches_of_a_step_are_counted(
    tmp_path: Path, model: Any, callbacks: list[Any], kwargs: dict[str, Any], batches: float
) -> None:
    """Whatever a Trainer says of accumulation: on average over the run."""
    limits = {"val_check_interval": 1.0, "check_val_every_n_epoch": 1}
    fit(tmp_path, spectra(every_n_steps=2), *(one() for one in callbacks), model=model(), **(limits | kwargs))
    run = Run(tmp_path)
    assert run.about["batch_tokens"] == pytest.approx(batches * 4 * LENGTH)
    assert run.about["batch_samples"] == pytest.approx(batches * 4)
    assert run.history.tokens[-1] / run.history.step[-1] == pytest.approx(batches * 4 * LENGTH)


def test_accumulated_losses_are_not_divided(tmp_path: Path) -> None:
    seen = Seen()
    fit(tmp_path, spectra(every_n_steps=2), seen, accumulate_grad_batches=3, max_steps=4)
    history = Run(tmp_path).history
    assert history.step[-1] == 4
    np.testing.assert_allclose(np.nanmean(history.train_loss), np.mean(seen.losses), rtol=0.05)


@pytest.mark.parametrize(
    ("tokens_per_sample", "tokens"),
    [(None, 4 * LENGTH), (1000, 4000), ("real", 4 * (LENGTH - 3)), ("labels", 4 * LENGTH)],
)
def test_tokens_are_counted_as_asked(tmp_path: Path, tokens_per_sample: Any, tokens: int) -> None:
    def collate(samples: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
        batch = torch.utils.data.default_collate(samples)
        return batch | {"real": torch.arange(LENGTH).expand(len(samples), -1) >= 3}

    loader = DataLoader(token_loader().dataset, batch_size=4, collate_fn=collate)
    callbacks = [spectra(stage="train", every_n_steps=2), RunRecord(tokens_per_sample=tokens_per_sample)]
    trainer = tiny_trainer(tmp_path, callbacks=callbacks, max_steps=4, limit_val_batches=0)
    trainer.fit(LanguageModel(), loader, token_loader())
    assert Run(tmp_path).history.tokens.tolist() == [2 * tokens, 4 * tokens]


class Popping(LanguageModel):
    """A step that shortens its batch, as the loader gave it, to one token, or takes its tokens out."""

    def __init__(self, key: str | None) -> None:
        super().__init__()
        self.key = key

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = super().training_step(dict(batch), batch_idx)
        for name in list(batch):
            batch[name] = batch[name][:, :1]
        batch.pop(self.key, None)
        return loss


@pytest.mark.parametrize("key", [None, "input_ids"])
@pytest.mark.parametrize("tokens_per_sample", [None, "labels"])
def test_tokens_are_counted_before_a_step_changes_its_batch(tmp_path: Path, key: Any, tokens_per_sample: Any) -> None:
    fit(tmp_path, spectra(), RunRecord(tokens_per_sample=tokens_per_sample), model=Popping(key), max_steps=4)
    assert Run(tmp_path).history.tokens.tolist() == [4 * 4 * LENGTH]


def test_tokens_are_not_known_once_a_mask_means_something_else(tmp_path: Path) -> None:
    """Without a number rather than with one that may be wrong."""
    masks = iter([1, 1, 2, 1])

    def collate(samples: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
        batch = torch.utils.data.default_collate(samples)
        return batch | {"mask": torch.full((len(samples), LENGTH), next(masks))}

    loader = DataLoader(token_loader().dataset, batch_size=4, collate_fn=collate)
    callbacks = [spectra(stage="train", every_n_steps=2), RunRecord(tokens_per_sample="mask")]
    trainer = tiny_trainer(tmp_path, callbacks=callbacks, max_steps=4, limit_val_batches=0)
    trainer.fit(LanguageModel(), loader, token_loader())
    np.testing.assert_array_equal(Run(tmp_path).history.tokens, [8 * LENGTH, np.nan])


def test_a_key_that_the_batch_does_not_hold_is_one_line(tmp_path: Path) -> None:
    message = r"tokens_per_sample must name a tensor with axes in the batch, got 'msk': the batch holds \['input_ids',"
    with pytest.raises(ValueError, match=message):
        fit(tmp_path, spectra(), RunRecord(tokens_per_sample="msk"))


def test_batches_without_tokens_count_samples(tmp_path: Path) -> None:
    batches = [(torch.randn(6, 4), torch.randn(6, 1)) for _ in range(4)]
    callback = ActivationSpectrum("net.1", every_n_steps=2, num_groups=1, tail=(2, 6))
    tiny_trainer(tmp_path, callbacks=[callback], max_steps=4).fit(Perceptron(), DataLoader(batches, batch_size=None))
    run = Run(tmp_path)
    assert run.history.tokens.tolist() == [12, 24]
    assert run.history.loss_name == "train_loss"


def test_a_run_leaves_nothing_behind_that_is_not_json(tmp_path: Path) -> None:
    fit(tmp_path, spectra(), RunRecord(family="mine"))
    (path,) = tmp_path.rglob("run.json")
    about = json.loads(path.read_text())
    assert about["family"] == "mine"
    assert about["model"]["class"] == "tests.models.LanguageModel"
    assert about["model"]["num_parameters"] == sum(p.numel() for p in LanguageModel().parameters())


def test_a_run_is_described_once(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="RunRecord must be given once to a Trainer, got two: say all in one"):
        fit(tmp_path, spectra(), RunRecord(family="a"), SecondRecord(family="b"))


class SecondRecord(RunRecord):
    """Of another class, so that Lightning does not mind."""


@pytest.mark.parametrize(
    "bad",
    [
        {"family": ""},
        {"loss": 3},
        {"tags": {1: 2}},
        {"tags": ["a"]},
        {"tags": {"a": {1}}},
        {"tokens_per_sample": 0},
        {"vectors": "no"},
        {"upload": 1},
        {"enabled": None},
    ],
    ids=str,
)
def test_notes_are_checked(bad: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"^{next(iter(bad))} must "):
        RunRecord(**bad)


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")
@pytest.mark.parametrize("place", ["same", "other"])
def test_resumed_run_goes_on_with_its_record(tmp_path: Path, place: str) -> None:
    common = {"limit_train_batches": 1, "val_check_interval": None, "check_val_every_n_epoch": 4, "max_epochs": -1}
    fit(tmp_path / "whole", spectra(), max_steps=12, **common)
    whole = Run(tmp_path / "whole")
    saving = ModelCheckpoint(tmp_path / "checkpoints", "at", every_n_epochs=4, save_on_train_epoch_end=True)
    # It writes a report and a line after the last checkpoint, which the resumed run will write again.
    fit(tmp_path / "cut", spectra(), saving, max_steps=6, enable_checkpointing=True, **common)
    folder = tmp_path / {"same": "cut", "other": "elsewhere"}[place]
    fit(folder, spectra(), max_steps=12, ckpt_path=tmp_path / "checkpoints" / "at.ckpt", **common)
    found = Run(folder)
    assert found.about["id"] == Run(tmp_path / "cut").about["id"]
    assert found.about["resumed"] == [4]
    first = Run(tmp_path / "cut").about
    assert found.about["started"] == first["started"]
    assert datetime.fromisoformat(found.about["started"]) <= datetime.now(timezone.utc)
    assert found.about["machines"] == first["machines"] == [platform.node()]
    assert found.about["setting"] == first["setting"]
    assert found.about["setting"]["optimizers"][0]["lr"] > 0
    assert found.steps("activation") == whole.steps("activation") == [4, 8, 12]
    for column in ("step", "tokens", "val_loss"):
        np.testing.assert_array_equal(getattr(found.history, column), getattr(whole.history, column))
    assert (np.diff(found.history.seconds) > 0).all()
    for step in (4, 8, 12):
        np.testing.assert_array_equal(
            found.spectrum("activation", BLOCK, step), whole.spectrum("activation", BLOCK, step)
        )


def test_a_second_fit_of_one_trainer_goes_on(tmp_path: Path) -> None:
    trainer = fit(tmp_path, spectra(), max_steps=4)
    trainer.fit_loop.epoch_loop.max_steps = 8
    trainer.fit(trainer.lightning_module, token_loader(48), token_loader(16, seed=1))
    run = Run(tmp_path)
    assert run.history.step.tolist() == [4, 8]
    assert run.history.tokens.tolist() == [4 * 4 * LENGTH, 8 * 4 * LENGTH]


def test_a_new_run_in_an_old_place_sets_the_old_record_aside(tmp_path: Path) -> None:
    for _ in range(2):
        fit(tmp_path, spectra(), max_steps=4)
    assert Run(tmp_path).about["id"] != Run(tmp_path / "spectra-1").about["id"]


def test_loggers_without_a_log_dir_get_one_for_each_run(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="draws histograms"):
        fit(tmp_path, spectra(), logger=NoLogDir(tmp_path), max_steps=4)
    assert Run(tmp_path / "project" / "run7").steps("activation") == [4]


@pytest.mark.parametrize("kwargs", [{"fast_dev_run": 2}, {"max_steps": 0}], ids=str)
def test_runs_that_train_nothing_leave_nothing(tmp_path: Path, kwargs: dict[str, Any]) -> None:
    fit(tmp_path, spectra(), **kwargs)
    assert not list(tmp_path.rglob("spectra"))


def test_validation_alone_leaves_the_record_alone(tmp_path: Path) -> None:
    trainer = fit(tmp_path, spectra(), max_steps=4)
    before = {path: path.read_bytes() for path in (tmp_path / "spectra").iterdir()}
    trainer.validate(trainer.lightning_module, token_loader(16, seed=1), verbose=False)
    assert {path: path.read_bytes() for path in (tmp_path / "spectra").iterdir()} == before


def test_a_full_disk_does_not_stop_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr(recorder.Record, "append", full)
    monkeypatch.setattr(recorder.Record, "write_report", full)
    with pytest.warns(UserWarning, match="could not write the record of the run: No space left on device"):
        trainer = fit(tmp_path, spectra())
    assert trainer.global_step == 12
    assert trainer.callback_metrics["activation/failed"] == 0


def test_a_folder_of_somebody_else_does_not_stop_training(tmp_path: Path) -> None:
    (tmp_path / "spectra").mkdir()
    (tmp_path / "spectra" / "mine.txt").write_text("of use to me")
    with pytest.warns(UserWarning, match="holds files that are no record of a run: move them"):
        trainer = fit(tmp_path, spectra())
    assert trainer.global_step == 12
    assert [path.name for path in (tmp_path / "spectra").iterdir()] == ["mine.txt"]


@pytest.mark.parametrize("batch_size", [1, 4, 8])
def test_fingerprint_is_that_of_the_data(tmp_path: Path, batch_size: int) -> None:
    prints = []
    for name, size, seed in (("same", batch_size, 1), ("known", 2, 1), ("other", batch_size, 2)):
        trainer = tiny_trainer(
            tmp_path / name, callbacks=[spectra(num_tokens=10**6)], max_steps=4, val_check_interval=4
        )
        trainer.fit(LanguageModel(), token_loader(48), token_loader(24, size, seed=seed))
        prints.append(Run(tmp_path / name).about["validation_data"]["0"])
    same, known, other = prints
    assert same == known != other


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")
def test_which_data_are_validated_on_is_known_before_a_report_is_looked_at(tmp_path: Path) -> None:
    class Knowing(ActivationSpectrum):
        known: list[Any]

        def start_training(self, host: Any) -> None:
            super().start_training(host)
            self.known = [host.session.recorder.validation_data]

        def measured(self, report: Any) -> dict[str, float]:
            self.known.append(self.session.recorder.validation_data)
            return super().measured(report)

    options = {"num_tokens": 64, "every_n_steps": 4, "stage": "validate"}
    common = {"limit_train_batches": 1, "val_check_interval": None, "check_val_every_n_epoch": 4, "max_epochs": -1}
    saving = ModelCheckpoint(tmp_path / "checkpoints", "at", every_n_epochs=4, save_on_train_epoch_end=True)
    first, second = Knowing(**options), Knowing(**options)
    fit(tmp_path, first, saving, max_steps=4, enable_checkpointing=True, **common)
    fit(tmp_path, second, max_steps=8, ckpt_path=tmp_path / "checkpoints" / "at.ckpt", **common)
    recorded = ValidationData.of(Run(tmp_path).about)
    assert recorded.fingerprints.keys() == recorded.num_samples.keys() == {"0"}
    assert first.known == [None, recorded]
    assert second.known == [recorded, recorded]


def test_family_does_not_depend_on_what_a_sweep_sweeps(tmp_path: Path) -> None:
    class Model(LanguageModel):
        def __init__(self, width: int = 3, learning_rate: float = 0.1, batch_size: int = 4, extra: Any = None) -> None:
            super().__init__()
            self.save_hyperparameters()

    families = []
    for number, kwargs in enumerate(
        ({}, {"learning_rate": 0.2, "batch_size": 8}, {"extra": {"seed": 7, "max_lr": 3}}, {"width": 4})
    ):
        fit(tmp_path / str(number), spectra(), model=Model(**kwargs), max_steps=4)
        families.append(Run(tmp_path / str(number)).family)
    assert families[0] == families[1]
    assert families[0].startswith("Model-")
    assert len(set(families)) == 3  # an `extra` that was not there before is another configuration, its seed is not


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")
def test_resuming_with_other_callbacks_goes_on_counting(tmp_path: Path) -> None:
    common = {"limit_train_batches": 1, "val_check_interval": None, "check_val_every_n_epoch": 4, "max_epochs": -1}
    saving = ModelCheckpoint(tmp_path / "checkpoints", "at", every_n_epochs=8, save_on_train_epoch_end=True)
    first = [spectra(), spectra(num_tokens=32, prefix="b/")]
    fit(tmp_path, *first, saving, max_steps=8, enable_checkpointing=True, **common)
    before = Run(tmp_path).about["id"]
    # In another order, and with one more in front.
    later = [spectra(layers="all", stage="train", prefix="c/"), spectra(num_tokens=32, prefix="b/"), spectra()]
    fit(tmp_path, *later, max_steps=12, ckpt_path=tmp_path / "checkpoints" / "at.ckpt", **common)
    run = Run(tmp_path)
    assert run.about["id"] == before
    assert run.history.tokens.tolist() == [step * 4 * LENGTH for step in (4, 8, 12)]
    assert (np.diff(run.history.seconds) > 0).all()
    for series, rows in (("activation-validate", 64), ("activation-validate-2", 32)):
        assert [run.spectrum(series, BLOCK, step).count for step in (4, 8, 12)] == [rows] * 3
    assert run.steps("activation-train") == [12]


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")
def test_a_checkpoint_without_a_count_leaves_tokens_unknown(tmp_path: Path) -> None:
    common = {"limit_train_batches": 1, "val_check_interval": None, "check_val_every_n_epoch": 4, "max_epochs": -1}
    saving = ModelCheckpoint(tmp_path / "checkpoints", "at", every_n_epochs=8, save_on_train_epoch_end=True)
    fit(tmp_path, saving, max_steps=8, enable_checkpointing=True, **common)
    with pytest.warns(UserWarning, match="cannot tell how many tokens the first 8 steps took"):
        fit(tmp_path, spectra(), max_steps=12, ckpt_path=tmp_path / "checkpoints" / "at.ckpt", **common)
    assert np.isnan(Run(tmp_path).history.tokens).all()
    assert np.isfinite(Run(tmp_path).history.val_loss).all()


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")
def test_losses_before_a_checkpoint_count_after_it(tmp_path: Path) -> None:
    common = {"limit_train_batches": 1, "val_check_interval": None, "check_val_every_n_epoch": 4, "max_epochs": -1}
    fit(tmp_path / "whole", spectra(), max_steps=8, **common)
    saving = ModelCheckpoint(tmp_path / "checkpoints", "at", every_n_epochs=6, save_on_train_epoch_end=True)
    fit(tmp_path / "cut", spectra(), saving, max_steps=6, enable_checkpointing=True, **common)
    fit(tmp_path / "cut", spectra(), max_steps=8, ckpt_path=tmp_path / "checkpoints" / "at.ckpt", **common)
    whole, cut = (Run(tmp_path / name).history for name in ("whole", "cut"))
    assert cut.step[-1] == whole.step[-1] == 8
    # The interrupted run wrote a line of its own at the end, whose losses are not those of the next.
    np.testing.assert_allclose(cut.train_loss[-1], whole.train_loss[-1], rtol=0.05)


@pytest.mark.parametrize(
    ("keys", "loader", "expected"),
    [
        (["train_loss", "val_loss", "val/aux_loss"], 0, "val_loss"),
        (["value_loss", "valid_total_loss"], 0, None),
        (["val/total_loss", "val/kl_loss"], 0, None),
        (["eval_loss", "validation_loss"], 0, "validation_loss"),
        (["eval/loss", "eval/kl"], 0, "eval/loss"),
        (["loss/val", "loss/train"], 0, "loss/val"),
        (["val_loss_epoch", "val_loss_step"], 0, "val_loss_epoch"),
        (["validation/loss", "val_kl_loss"], 0, "validation/loss"),
        (["val_loss/dataloader_idx_0", "val_loss/dataloader_idx_1"], 1, "val_loss/dataloader_idx_1"),
        (["val_loss", "val_loss/dataloader_idx_1"], 1, "val_loss/dataloader_idx_1"),
        (["val_loss/dataloader_idx_1"], 0, None),
        (["interval_loss", "train_loss"], 0, None),
        (["val_accuracy"], 0, None),
    ],
)
def test_the_loss_of_validation_is_told_from_others(keys: list[str], loader: int, expected: str | None) -> None:
    assert validation_loss(dict.fromkeys(keys, torch.tensor(1.0)), loader) == expected


@pytest.mark.parametrize(
    ("keys", "monitored", "expected"),
    [
        (["val/elbo", "val/kl_loss"], ["val/elbo"], "val/elbo"),
        (["val/total_loss", "val/kl_loss", "val/wer"], ["val/wer", "val/total_loss"], "val/total_loss"),
        (["val_loss", "val/elbo"], ["val/elbo"], "val_loss"),
        (["val/kl_loss", "val/recon_loss"], ["val/kl_loss", "val/recon_loss"], None),
        (["train_loss", "val/kl_loss"], ["train_loss"], None),
        (["val/kl_loss"], ["val/elbo"], None),
    ],
)
def test_else_the_loss_is_the_one_that_others_monitor(keys: list[str], monitored: list[str], expected) -> None:
    assert validation_loss(dict.fromkeys(keys, torch.tensor(1.0)), 0, monitored) == expected


class SeveralLosses(LanguageModel):
    """Logs the parts of a validation loss, and the whole under a name of its own."""

    def validation_step(self, batch, batch_idx):
        self.loss(batch)
        self.log_dict({"val/kl_loss": 3.0, "val/elbo": 100.0}, batch_size=4)


def record_losses(folder: Path, *callbacks: Callback) -> Run:
    fit(folder, spectra(), *callbacks, model=SeveralLosses(), max_steps=4)
    return Run(folder)


def test_losses_of_validation_that_none_of_the_rules_tells_apart_are_listed(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match=r"which of val/kl_loss is .* RunRecord\(loss='val/kl_loss'\)$"):
        run = record_losses(tmp_path)
    assert run.about["val_loss"] is None
    assert np.isnan(run.history.val_loss).all()


def test_the_monitor_of_early_stopping_is_the_recorded_loss(tmp_path: Path) -> None:
    run = record_losses(tmp_path, EarlyStopping("val/elbo"))
    assert run.about["val_loss"] == "val/elbo"
    assert np.nanmax(run.history.val_loss) == 100


def test_our_own_keys_are_no_loss_though_they_are_monitored(tmp_path: Path) -> None:
    stopping = EarlyStopping("activation/network.blocks.0/rankme", check_finite=False)
    with pytest.warns(UserWarning, match="does not know which"):
        assert record_losses(tmp_path, stopping).about["val_loss"] is None


def test_a_logger_that_fails_does_not_stop_training(tmp_path: Path) -> None:
    class Down(NoLogDir):
        @property
        def version(self) -> str:
            raise ConnectionError("the service is down")

    with (
        pytest.warns(UserWarning, match="draws histograms"),
        pytest.warns(UserWarning, match="could not write the record of the run: the service is down"),
    ):
        trainer = fit(tmp_path, spectra(), logger=Down(tmp_path), max_steps=4)
    assert trainer.global_step == 4


def test_a_record_alone_holds_the_history(tmp_path: Path) -> None:
    seen = Seen()
    fit(tmp_path, RunRecord(family="mine"), seen)
    run = Run(tmp_path)
    assert (run.family, run.kinds) == ("mine", [])
    assert run.history.step.tolist() == [4, 8, 12]
    np.testing.assert_array_equal(run.history.val_loss, list(seen.val_losses.values()))
    assert run.tokens_to(float(run.history.val_loss[1])) == run.history.tokens[1]


def test_nothing_is_recorded_where_nothing_is_to_be(tmp_path: Path) -> None:
    trainer = fit(tmp_path, spectra(), RunRecord(enabled=False))
    assert not list(tmp_path.rglob("spectra"))
    assert trainer.callback_metrics[f"activation/{BLOCK}/rankme"] > 1


@pytest.mark.parametrize("vectors", [True, False])
def test_eigenvectors_are_kept_if_they_are_to_be(tmp_path: Path, vectors: bool) -> None:
    drift = HeadDrift(every_n_steps=4, num_tokens=64, num_groups=2, rank=3)
    fit(tmp_path, drift, RunRecord(vectors=vectors), limit_val_batches=4)
    spectrum = Run(tmp_path).spectrum("activation", BLOCK, 8)
    assert (spectrum.vectors is not None) == (spectrum.leave_one_out_vectors is not None) == vectors
    assert len(spectrum.leave_one_out) == 2


def test_eigenvectors_take_less_than_half_of_what_they_took(tmp_path: Path) -> None:
    drift = HeadDrift("*.blocks.0", every_n_steps=4, num_tokens=64, num_groups=2, rank=32)
    sizes = {}
    for vectors in (True, False):
        folder = tmp_path / str(vectors)
        fit(folder, drift, RunRecord(vectors=vectors), limit_val_batches=4)
        sizes[vectors] = next(folder.rglob("*-000000008.npz")).stat().st_size
    assert sizes[True] - sizes[False] < 3 * 32 * 32 * 8 / 2 + 500  # two headers


@pytest.mark.parametrize("loss", ["train_loss", "val_loss"])
def test_the_loss_that_is_named_is_recorded(tmp_path: Path, loss: str) -> None:
    seen = Seen()
    trainer = fit(tmp_path, spectra(), RunRecord(loss=loss), seen)
    run = Run(tmp_path)
    assert run.about["val_loss"] == loss
    assert run.history.val_loss[-1] == float(trainer.callback_metrics[loss])


def test_a_loss_that_is_not_logged_is_told_with_those_that_are(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match=r"RunRecord finds no loss='nll' among what is logged: there are .*val_loss"):
        fit(tmp_path, spectra(), RunRecord(loss="nll"))
    assert np.isnan(Run(tmp_path).history.val_loss).all()


class Shelf(NoLogDir):
    """A logger whose board takes artifacts."""


class ShelfBoard(Board):
    logger_class = "Shelf"
    held: ClassVar[list[tuple[str, list[str]]]] = []

    def artifact(self, folder: Path, name: str) -> None:
        self.held.append((name, sorted(path.name for path in folder.iterdir())))


@pytest.mark.parametrize("upload", [True, False])
def test_the_record_goes_up_at_the_end_if_it_is_to(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, upload: bool
) -> None:
    monkeypatch.setattr(boards, "BOARDS", (ShelfBoard,))
    monkeypatch.setattr(ShelfBoard, "held", [])
    fit(tmp_path, spectra(), RunRecord(upload=upload), logger=Shelf(tmp_path), max_steps=4)
    files = ["activation-validate-000000004.npz", "history.csv", "run.json"]
    assert ShelfBoard.held == ([("spectra", files)] if upload else [])


def test_an_upload_that_fails_does_not_fail_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def down(*_: Any) -> None:
        raise ConnectionError("the service is down")

    monkeypatch.setattr(boards, "BOARDS", (ShelfBoard,))
    monkeypatch.setattr(ShelfBoard, "artifact", down)
    with pytest.warns(UserWarning, match="RunRecord could not upload .*the service is down"):
        fit(tmp_path, spectra(), RunRecord(upload=True), logger=Shelf(tmp_path), max_steps=4)


def test_a_run_record_leaves_training_as_it_is(tmp_path: Path) -> None:
    weights = [
        fit(tmp_path / str(len(callbacks)), *callbacks).lightning_module.state_dict()
        for callbacks in ((), (RunRecord(tags={"a": 1}, loss="val_loss"),))
    ]
    for name, plain in weights[0].items():
        assert torch.equal(plain, weights[1][name]), name
