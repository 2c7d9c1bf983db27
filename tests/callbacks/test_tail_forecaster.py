"""TailForecaster by the tail in real runs: a known law, references that do not serve, targets that are reached."""

import json
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch import Callback, Trainer, seed_everything
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from lightning.pytorch.loggers import TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils.data import DataLoader, TensorDataset

from lightning_spectral import ActivationSpectrum, Run, RunRecord, TailForecaster
from lightning_spectral.callbacks.watched_loss import WatchedLoss
from lightning_spectral.functional import power_law
from lightning_spectral.measurement import Report
from lightning_spectral.recording.fingerprint import Fingerprint
from lightning_spectral.runs import predicting
from tests.models import LENGTH, LanguageModel, Perceptron, Tokens, tiny_trainer, token_loader
from tests.runs.made_up import made_up

LAYER = "network.blocks.5"
QUANTITIES = {
    *("tokens_to_target", "low", "high", "relative", "num_references", "num_settings"),
    *("extrapolated", "skill", "median_error", "alpha_tail", "steps"),
    *("spectral_gain", "spectral_gain_low", "spectral_gain_high", "actual", "failed"),
}
ALPHAS = [0.8, 1.0, 1.1, 1.3, 1.5, 1.6]


def fingerprint(seed: int) -> str:
    """Of validation data."""
    found = Fingerprint(0, 1)
    for batch in token_loader(64, seed=seed):
        found.add(batch, 0)
    return found.agree(1, torch.device("cpu"))["0"]


DATA = fingerprint(1)
"""Of those of the runs here."""


def law(alpha: float) -> float:
    """Tokens to the target of the made-up references."""
    return 100 * math.exp(0.9 * alpha)


class Falling(LanguageModel):
    """Whose validation loss is 3 - step/10."""

    def validation_step(self, batch: dict, batch_idx: int, dataloader_idx: int = 0) -> None:
        super().validation_step(batch, batch_idx)
        self.log("falling_loss", 3.0 - self.global_step / 10, batch_size=len(batch["input_ids"]))


class Kept(TailForecaster):
    """Keeps reports and what it logs, by step."""

    def __init__(self, references: Any = (), **kwargs: Any) -> None:
        defaults = {"target_loss": 1.0, "monitor": "falling_loss", "every_n_steps": 4, "num_tokens": 512}
        defaults |= {"predictor": "tail", "head": (1, 4)}
        super().__init__(references=references, **(defaults | {"num_groups": 2} | kwargs))
        self.logged: dict[int, dict[str, float]] = {}
        self.reports: list[Report] = []

    def measured(self, report: Report) -> dict[str, float]:
        self.reports.append(report)
        self.logged[report.step] = values = super().measured(report)
        return values

    def values(self, quantity: str) -> list[float]:
        return [values[f"forecast/{quantity}"] for values in self.logged.values()]


@pytest.fixture(autouse=True)
def tails_from_the_first_step_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs are short here."""
    monkeypatch.setattr(predicting, "MIN_STEPS", 0)


def fit(folder: Path, *callbacks: Callback, ckpt_path: Any = None, family: str | None = "F", **kwargs: Any) -> Trainer:
    seed_everything(0, verbose=False)
    defaults = {"max_steps": 12, "val_check_interval": 4, "limit_val_batches": 16}
    trainer = tiny_trainer(folder, callbacks=[*callbacks, RunRecord(family=family)], **(defaults | kwargs))
    trainer.fit(Falling(), token_loader(400), token_loader(64, seed=1), ckpt_path=ckpt_path)
    return trainer


def references(folder: Path, alphas: list[float] = ALPHAS, **kwargs: Any) -> str:
    for number, alpha in enumerate(alphas):
        made_up(
            folder / f"{number}",
            law(alpha),
            1.0,
            alpha,
            layer=LAYER,
            loss="falling_loss",
            **{"num_tokens": 512, "batch_tokens": 2.0**number, "data": DATA, **kwargs},
        )
    return f"{folder}/*"


def test_forecast_follows_the_references_law(tmp_path: Path) -> None:
    forecaster = Kept(references(tmp_path / "refs"), prefix="a/")
    trainer = fit(tmp_path / "run", forecaster, logger=TensorBoardLogger(tmp_path, "tb", ""), max_steps=8)
    keys = {f"a/forecast/{quantity}" for quantity in QUANTITIES}
    assert {key for key in trainer.callback_metrics if "forecast/" in key} == keys
    assert list(forecaster.logged) == [4, 8]
    # At 256 tokens all six have reports on both sides; at 128 the slow ones have none yet, whose first is at law/4.
    assert forecaster.values("num_references")[-1] == 6
    for report, alpha, forecast, low, high, relative in zip(
        forecaster.reports,
        *(forecaster.values(quantity) for quantity in ("alpha_tail", "tokens_to_target", "low", "high", "relative")),
        strict=True,
    ):
        values = report.spectra["activation"][LAYER].values
        assert alpha == pytest.approx(float(power_law(values, (0.125, 0.5)).exponent))
        assert forecast == pytest.approx(law(alpha), rel=1e-6)
        assert (low, high) == (pytest.approx(forecast, rel=1e-4), pytest.approx(forecast, rel=1e-4))
        assert relative == pytest.approx(forecast / law(min(ALPHAS)), rel=1e-6)
    assert forecaster.values("skill")[-1] == pytest.approx(1)
    assert forecaster.values("median_error")[-1] == pytest.approx(0, abs=1e-6)
    events = EventAccumulator(str(tmp_path / "tb")).Reload()
    logged = [event.value for event in events.Scalars("a/forecast/tokens_to_target")]
    assert logged == pytest.approx(forecaster.values("tokens_to_target"))


@pytest.mark.filterwarnings("ignore:Kept makes no forecast", "ignore:Kept forecasts beyond")
def test_references_are_taken_at_the_tokens_of_the_report(tmp_path: Path) -> None:
    """Exponents that grow with log tokens alike in all references: taken anywhere else, forecasts would be off."""
    for number, alpha in enumerate(ALPHAS):
        common = {"layer": LAYER, "loss": "falling_loss", "num_tokens": 512, "batch_tokens": 2.0**number, "data": DATA}
        made_up(tmp_path / "refs" / f"{number}", law(alpha), 1.0, 1.0, **common)
        record = Run(tmp_path / "refs" / f"{number}")
        for step in record.steps("activation"):
            path = record.folder / f"activation-validate-{step:09d}.npz"
            arrays = dict(np.load(path))
            exponent = alpha + math.log(float(arrays["tokens"]) / 256) / 4
            arrays[f"activation/{LAYER}/eigenvalues"] = np.arange(1, 33.0) ** -exponent
            np.savez(path, **arrays)
    forecaster = Kept(f"{tmp_path}/refs/*")
    fit(tmp_path / "run", forecaster, max_steps=8)
    tokens = 8 * 4 * LENGTH
    expected = law(forecaster.values("alpha_tail")[-1] - math.log(tokens / 256) / 4)
    assert forecaster.values("tokens_to_target")[-1] == pytest.approx(expected, rel=1e-6)


def test_too_few_references_are_told_once_with_the_reasons(tmp_path: Path) -> None:
    folder = tmp_path / "refs"
    references(folder / "good", ALPHAS[:3])
    made_up(folder / "family" / "0", 300, 1.0, layer=LAYER, loss="falling_loss", num_tokens=512, family="G")
    made_up(folder / "layer" / "0", 300, 1.0, layer="network.blocks.0", loss="falling_loss", num_tokens=512)
    made_up(folder / "rows" / "0", 300, 1.0, layer=LAYER, loss="falling_loss", num_tokens=64)
    made_up(folder / "broken" / "0", 300, 1.0, layer=LAYER, loss="falling_loss", num_tokens=512)
    (folder / "broken" / "0" / "spectra" / "history.csv").write_text("a,b\n1,2\n")
    forecaster = Kept([f"{folder}/*/*", f"{folder}/none*"])
    with pytest.warns(UserWarning, match="makes no forecast") as caught:
        trainer = fit(tmp_path / "run", forecaster)
    (message,) = [str(one.message) for one in caught if "makes no forecast" in str(one.message)]
    assert "it needs 4 reference runs and has 3, besides " in message
    for reason in (
        "1 of another family (G, not F)",
        f"1 that did not measure {LAYER}",
        "1 measured with num_tokens=64 and not 512",
        "1 that cannot be read (run has a broken record: line 1 of ",
        "1 pattern that matches no run",
        "Train runs of this family to a loss of 1, with this callback or an ActivationSpectrum",
    ):
        assert reason in message
    assert "\n" not in message
    assert np.isnan(forecaster.values("tokens_to_target")).all()
    assert trainer.callback_metrics["forecast/failed"] == 0


@pytest.mark.filterwarnings("ignore:Kept makes no forecast")
def test_a_target_that_no_reference_reached_is_told(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="has 0, besides 6 that never came down to 0.4"):
        fit(tmp_path / "run", Kept(references(tmp_path / "refs"), target_loss=0.4))


@pytest.mark.filterwarnings("ignore:Kept makes no forecast")
def test_a_family_without_relation_has_no_skill_and_says_so(tmp_path: Path) -> None:
    for number, (alpha, tokens) in enumerate(zip(ALPHAS, (300, 420, 280, 310, 430, 290), strict=True)):
        common = {"layer": LAYER, "loss": "falling_loss", "num_tokens": 512, "batch_tokens": 2.0**number, "data": DATA}
        made_up(tmp_path / "refs" / f"{number}", tokens, 1.0, alpha, **common)
    forecaster = Kept(f"{tmp_path}/refs/*")
    with pytest.warns(UserWarning, match=r"has no skill at \d+ tokens: its references forecast each other"):
        fit(tmp_path / "run", forecaster)
    assert math.isfinite(forecaster.values("tokens_to_target")[-1])


@pytest.mark.filterwarnings("ignore:Kept makes no forecast")
def test_truth_is_logged_and_recorded_once_the_target_is_reached(tmp_path: Path) -> None:
    forecaster = Kept(target_loss=2.1)
    trainer = fit(tmp_path, forecaster)
    # The loss is 2.2 at step 8 and 1.8 at step 12.
    tokens = 4 * LENGTH
    expected = 8 * tokens * (12 / 8) ** 0.25
    assert forecaster.actual == pytest.approx(expected)
    assert float(trainer.callback_metrics["forecast/actual"]) == pytest.approx(expected)
    facts = Run(tmp_path).about["forecast"][""]
    assert (facts["target_loss"], facts["monitor"], facts["layer"]) == (2.1, "falling_loss", LAYER)
    assert facts["actual"] == pytest.approx(expected)
    forecasts = Run(tmp_path).forecasts
    assert [(forecast["step"], forecast["prefix"]) for forecast in forecasts] == [(4, ""), (8, ""), (12, "")]
    assert forecasts[0]["tokens_to_target"] is None
    assert forecasts[2]["alpha_tail"] == pytest.approx(forecaster.values("alpha_tail")[2])
    assert json.loads((tmp_path / "spectra" / "run.json").read_text())["forecast"] == {"": facts}


@pytest.mark.filterwarnings("ignore:Kept makes no forecast", "ignore:Kept cannot tell its skill")
def test_finished_runs_are_references_for_the_next(tmp_path: Path) -> None:
    for number in range(4):
        fit(tmp_path / "runs" / str(number), Kept(target_loss=2.1), family=None)
    later = Kept(f"{tmp_path}/runs/*", target_loss=2.1)
    fit(tmp_path / "runs" / "4", later, family=None)
    assert later.values("num_references") == [4.0] * 3
    # All are the same run: there is no line through one point, and the best of the family is known.
    assert np.isnan(later.values("tokens_to_target")).all()
    assert {reference.tokens_to_target for reference in later._forecaster.references.usable} == {later.actual}


@pytest.mark.filterwarnings("ignore:Kept makes no forecast at .* it has taken more tokens than")
def test_a_hopeless_run_is_ended(tmp_path: Path) -> None:
    refs = references(tmp_path / "refs")
    patient, impatient = Kept(refs, stop_if_relative_above=1000), Kept(refs, stop_if_relative_above=1.0)
    assert fit(tmp_path / "a", patient).global_step == 12
    relative = next(value for value in patient.values("relative") if math.isfinite(value))
    assert relative > 1, "the made-up references must be faster for this test to test anything"
    ended = fit(tmp_path / "b", impatient)
    assert ended.global_step < 12
    assert ended.should_stop


@pytest.mark.filterwarnings("ignore:Kept makes no forecast")
def test_it_shares_the_measurement_of_an_activation_spectrum(tmp_path: Path) -> None:
    spectrum = ActivationSpectrum(stage="validate", every_n_steps=4, num_tokens=512, num_groups=2)
    forecaster = Kept()
    fit(tmp_path, spectrum, forecaster)
    assert Run(tmp_path).steps("activation") == [4, 8, 12]
    assert len(list((tmp_path / "spectra").glob("*.npz"))) == 3
    assert len(forecaster.reports[0].spectra["activation"]) == 5


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`", "ignore:Kept makes no forecast")
def test_resumed_run_forecasts_the_same(tmp_path: Path) -> None:
    refs = references(tmp_path / "refs")
    common = {"limit_train_batches": 1, "val_check_interval": None, "check_val_every_n_epoch": 4, "max_epochs": -1}
    whole, first, second = (Kept(refs, target_loss=1.9) for _ in range(3))
    fit(tmp_path / "whole", whole, max_steps=12, **common)
    saving = ModelCheckpoint(tmp_path / "checkpoints", "at", every_n_epochs=8, save_on_train_epoch_end=True)
    fit(tmp_path / "cut", first, saving, max_steps=8, enable_checkpointing=True, **common)
    fit(tmp_path / "cut", second, max_steps=12, ckpt_path=tmp_path / "checkpoints" / "at.ckpt", **common)
    assert second.logged == {12: pytest.approx(whole.logged[12], nan_ok=True)}
    assert second.actual == whole.actual
    assert [forecast["step"] for forecast in Run(tmp_path / "cut").forecasts] == [4, 8, 12]


@pytest.mark.filterwarnings("ignore:Kept makes no forecast at .* it has taken more tokens than")
def test_forecasts_can_be_monitored(tmp_path: Path) -> None:
    forecaster = Kept(references(tmp_path / "refs"))
    stop = EarlyStopping("forecast/relative", check_finite=False, patience=100)
    best = ModelCheckpoint(tmp_path / "best", monitor="forecast/tokens_to_target")
    fit(tmp_path / "run", forecaster, stop, best, enable_checkpointing=True)
    assert float(stop.best_score) == pytest.approx(np.nanmin(forecaster.values("relative")))


def test_steps_to_come_are_of_the_batch_as_it_is_now(tmp_path: Path) -> None:
    seed_everything(0, verbose=False)
    forecaster = Kept(references(tmp_path / "refs"))
    batches = [list(range(4 * step, 4 * step + (4 if step < 4 else 3))) for step in range(8)]
    trainer = tiny_trainer(
        tmp_path / "run", callbacks=[forecaster, RunRecord(family="F")], max_steps=8, val_check_interval=4
    )
    trainer.fit(Falling(), DataLoader(Tokens(400), batch_sampler=batches), token_loader(64, seed=1))
    tokens = 4 * 4 * LENGTH + 4 * 3 * LENGTH
    assert Run(tmp_path / "run").history.tokens[-1] == tokens
    forecast, steps = (forecaster.values(quantity)[-1] for quantity in ("tokens_to_target", "steps"))
    assert steps == pytest.approx(8 + (forecast - tokens) / (3 * LENGTH))
    assert steps != pytest.approx(8 * forecast / tokens, rel=1e-2), "at the mean since the start"


def test_tokens_a_step_are_those_since_the_loss_before() -> None:
    loss = WatchedLoss("val_loss", 0.1)
    assert math.isnan(loss.tokens_per_step)
    for step, tokens, expected in ((0, 0, math.nan), (10, 320, 32), (10, 320, 32), (14, 640, 80)):
        loss.add(step, tokens, 1.0)
        assert loss.tokens_per_step == pytest.approx(expected, nan_ok=True)
    assert WatchedLoss("val_loss", 0.1, loss.state()).tokens_per_step == 80
    resumed = WatchedLoss("val_loss", 0.1)
    resumed.add(5, 40.0, 1.0)
    assert resumed.tokens_per_step == 8


@pytest.mark.parametrize(
    ("arguments", "changes", "message"),
    [
        ({"target_loss": math.nan}, {}, "target_loss must be a finite number, got nan"),
        ({"stop_if_relative_above": 0.5}, {}, "stop_if_relative_above must be at least 1, the best of the family, got"),
        ({"tail": (5, 2)}, {}, "tail must be two ascending ranks from 1"),
        ({"layer": "*.blocks.*"}, {}, r"layer must name one layer, got '\*.blocks.\*': it matches network.blocks.0, "),
        ({"layer": "nothing"}, {}, "layer='nothing' matches no layer"),
        ({"tail": (3, 99)}, {}, "tail must end at or before rank 32, the last there is"),
        ({"monitor": "loss"}, {}, "monitor must be a metric that is logged, got 'loss': there are .*val_loss"),
        ({}, {"limit_val_batches": 0}, "monitor must be logged during fit, got 'falling_loss', but no validation will"),
    ],
)
def test_bad_input_is_one_line(tmp_path: Path, arguments: dict, changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message) as raised:  # noqa: PT012
        forecaster = Kept(**arguments)
        fit(tmp_path, forecaster, **changes)
    assert "\n" not in str(raised.value)


def test_a_model_without_a_stack_is_told_a_layer_to_name(tmp_path: Path) -> None:
    loader = DataLoader(TensorDataset(torch.randn(8, 4), torch.randn(8, 1)), 4)
    message = r"^layer must be a name, got None or 'all', .* in Perceptron: take for example layer='net\.0'$"
    with pytest.raises(ValueError, match=message):
        tiny_trainer(tmp_path, max_steps=1, callbacks=[Kept(monitor="loss", stage="train")]).fit(Perceptron(), loader)


@pytest.mark.filterwarnings("ignore:Kept makes no forecast", "ignore:Kept cannot tell its skill")
def test_another_series_of_a_reference_serves(tmp_path: Path) -> None:
    spectrum = {"stage": "validate", "every_n_steps": 4, "num_tokens": 256, "num_groups": 2}
    for number in range(4):
        fit(tmp_path / "runs" / str(number), ActivationSpectrum(**spectrum), Kept(target_loss=2.1), family=None)
    later = Kept(f"{tmp_path}/runs/*", target_loss=2.1)
    fit(tmp_path / "later", later, family=None)
    assert later.values("num_references") == [4.0] * 3
    assert {reference.series for reference in later._forecaster.references.usable} == {"activation-validate-2"}


@pytest.mark.filterwarnings("ignore:Kept makes no forecast")
def test_what_is_no_reference_is_told(tmp_path: Path) -> None:
    folder = tmp_path / "refs"
    references(folder, ALPHAS[:2])
    shutil.copytree(folder / "1", folder / "copy")  # as a run that was resumed elsewhere leaves behind
    references(folder / "loss", ALPHAS[:1])
    common = {"layer": LAYER, "num_tokens": 512}
    made_up(folder / "other loss", 300, 1.0, **common)
    made_up(folder / "other data", 300, 1.0, loss="falling_loss", data="ff", **common)
    made_up(folder / "mask", 300, 1.0, loss="falling_loss", **common, mask="real")
    with pytest.warns(UserWarning, match="it needs 4 reference runs and has 2") as caught:
        fit(tmp_path / "run", Kept(f"{folder}/*"))
    (message,) = [str(one.message) for one in caught if "makes no forecast" in str(one.message)]
    for reason in (
        "1 of other validation data than most",
        "1 that recorded val_loss and not falling_loss",
        "mask=real",
    ):
        assert reason in message


def test_a_damaged_report_costs_one_reference(tmp_path: Path) -> None:
    refs = references(tmp_path / "refs")
    (tmp_path / "refs" / "2" / "spectra" / "activation-validate-000000300.npz").write_bytes(b"junk")
    forecaster = Kept(refs)
    with pytest.warns(UserWarning, match="goes without .*2: run has a broken record"):
        fit(tmp_path / "run", forecaster, max_steps=8)
    assert forecaster.values("num_references")[-1] == 5
    assert math.isfinite(forecaster.values("tokens_to_target")[-1])


@pytest.mark.filterwarnings("ignore:Kept makes no forecast")
def test_a_run_that_began_below_the_target_has_no_truth(tmp_path: Path) -> None:
    forecaster = Kept(target_loss=2.9)
    fit(tmp_path, forecaster)
    assert math.isnan(forecaster.actual)
    assert Run(tmp_path).about["forecast"][""]["actual"] is None


@pytest.mark.filterwarnings("ignore:Kept makes no forecast")
def test_two_forecasters_leave_two_tables(tmp_path: Path) -> None:
    fit(tmp_path, Kept(target_loss=2.1), Kept(target_loss=1.9, prefix="b/"))
    assert {key: facts["target_loss"] for key, facts in Run(tmp_path).about["forecast"].items()} == {"": 2.1, "b/": 1.9}


def test_seeds_of_one_setting_count_once_and_their_skill_cannot_be_told(tmp_path: Path) -> None:
    """Twelve references of three batch sizes: a number with the interval of three, and a warning."""
    for number in range(12):
        alpha = (0.2, 2.0, 4.0)[number % 3] + 0.01 * number
        common = {"layer": LAYER, "loss": "falling_loss", "num_tokens": 512, "data": DATA}
        common |= {"batch_tokens": 2.0 ** (number % 3)}
        made_up(tmp_path / "refs" / f"{number}", (300, 420, 350)[number % 3] + number, 1.0, alpha, **common)
    forecaster = Kept(f"{tmp_path}/refs/*")
    with pytest.warns(UserWarning, match="cannot tell its skill at .*references are of 3 settings"):
        fit(tmp_path / "run", forecaster, max_steps=8)
    assert forecaster.values("num_references")[-1] == 12
    assert forecaster.values("num_settings")[-1] == 3
    assert forecaster.values("extrapolated")[-1] == 0
    assert math.isnan(forecaster.values("skill")[-1])
    high, low = forecaster.values("high")[-1], forecaster.values("low")[-1]
    assert high / low > 2  # by runs, with ten degrees of freedom, 1.5


@pytest.mark.parametrize(
    ("shift", "said", "extrapolated"),
    [(0.2, "forecasts beyond its references", 1.0), (2.0, "lies beyond its references by", math.nan)],
    ids=["near", "far"],
)
def test_an_exponent_beyond_the_references_is_told(
    tmp_path: Path, shift: float, said: str, extrapolated: float
) -> None:
    """References all steeper than the run, whose own exponent is found first."""
    own = Kept()
    with pytest.warns(UserWarning, match="makes no forecast"):
        fit(tmp_path / "a", own, max_steps=8)
    least = own.values("alpha_tail")[-1] + shift
    for number in range(6):
        common = {"layer": LAYER, "loss": "falling_loss", "num_tokens": 512, "batch_tokens": 2.0**number, "data": DATA}
        made_up(tmp_path / "refs" / f"{number}", 400.0 - 20 * number, 1.0, least + 0.2 * number, **common)
    later = Kept(f"{tmp_path}/refs/*")
    with pytest.warns(UserWarning, match=said):
        fit(tmp_path / "b", later, max_steps=8)
    assert later.values("extrapolated")[-1] == pytest.approx(extrapolated, nan_ok=True)
    assert math.isfinite(later.values("high")[-1]) == math.isfinite(extrapolated)


@pytest.mark.filterwarnings("ignore:Kept makes no forecast")
def test_what_a_report_adds_does_not_grow_with_those_before(tmp_path: Path) -> None:
    """Neither the description nor what a checkpoint keeps does: forecasts are appended."""
    sizes, kept = [], []
    for steps in (40, 80):
        forecaster = Kept(target_loss=-9.0)
        fit(tmp_path / str(steps), forecaster, max_steps=steps, max_epochs=-1)
        assert len(Run(tmp_path / str(steps)).forecasts) == steps // 4
        about = json.loads((tmp_path / str(steps) / "spectra" / "run.json").read_text())
        sizes.append(len(json.dumps(about["forecast"])))
        kept.append(len(json.dumps(forecaster._kept["summary"])))
    assert sizes[0] == sizes[1]
    assert kept[1] < kept[0] + 30


def test_a_loss_above_the_target_again_changes_nothing() -> None:
    loss = WatchedLoss("val_loss", 2.0)
    for step, value in enumerate((3.0, math.nan, 2.5), start=1):
        assert not loss.add(step, 10.0 * step, value)
    assert not loss.is_there
    assert loss.add(4, 40.0, 1.9)
    assert not loss.add(5, 50.0, 2.1)
    assert loss.is_there
    assert loss.actual == pytest.approx(38.0, rel=0.02)
    resumed = WatchedLoss("val_loss", 2.0, loss.state())
    assert resumed.is_there
    below = WatchedLoss("val_loss", 2.0)
    below.add(1, 10.0, 1.5)
    below.add(2, 20.0, 2.5)
    assert below.is_there
    assert math.isnan(below.actual), "nobody knows when"


def test_references_of_other_validation_data_make_no_forecast(tmp_path: Path) -> None:
    forecaster = Kept(references(tmp_path / "refs", data="a1"), target_loss=1.9)
    with pytest.warns(
        UserWarning, match="makes no forecast with 0 references, and without 6 that were valid"
    ) as caught:
        trainer = fit(tmp_path / "run", forecaster)
    (message,) = {str(one.message) for one in caught if "makes no forecast" in str(one.message)}
    assert f"({tmp_path}/refs/0, {tmp_path}/refs/1, {tmp_path}/refs/2, ...): give references= that" in message
    assert "\n" not in message
    assert np.isnan(forecaster.values("tokens_to_target")).all()
    assert forecaster.values("num_references") == [0.0] * 3
    assert math.isfinite(forecaster.actual)
    assert trainer.callback_metrics["forecast/failed"] == 0
    assert [one["tokens_to_target"] for one in Run(tmp_path / "run").forecasts] == [None] * 3


@pytest.mark.filterwarnings("ignore:Kept makes no forecast at", "ignore:Kept cannot tell its skill")
def test_runs_that_the_package_carries_serve_on_the_text_of_another_python(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lightning_spectral.runs.bundled.FOLDER", tmp_path)
    forecaster = Kept(references(tmp_path / "refs", data="a1"), target_loss=1.9)
    with pytest.warns(UserWarning, match="goes by runs that the package carries, validated on the sources of another"):
        fit(tmp_path / "run", forecaster, max_steps=8)
    assert forecaster.values("num_references")[-1] == 6


def test_some_references_of_other_validation_data_are_left_out(tmp_path: Path) -> None:
    """What is of the run's data serves, though most are of others."""
    only = Kept(references(tmp_path / "refs"))
    fit(tmp_path / "only", only, max_steps=8)
    for number, alpha in enumerate([*ALPHAS, 1.2]):
        common = {"layer": LAYER, "loss": "falling_loss", "num_tokens": 512, "batch_tokens": 2.0**number}
        made_up(tmp_path / "refs" / f"other {number}", 9 * law(alpha), 1.0, alpha, data="a1", **common)
    beside = Kept(f"{tmp_path}/refs/*")
    with pytest.warns(UserWarning, match="goes by 6 references, and without 7 that were validated on other data than"):
        fit(tmp_path / "beside", beside, max_steps=8)
    assert beside.logged == {step: pytest.approx(values, nan_ok=True) for step, values in only.logged.items()}
    assert math.isfinite(beside.values("tokens_to_target")[-1])


@pytest.mark.parametrize("data", [DATA, None], ids=["this", "unknown"])
@pytest.mark.filterwarnings("ignore:Kept forecasts beyond", "ignore:Kept cannot tell its skill")
def test_a_few_samples_tell_of_no_other_data(tmp_path: Path, data: str | None) -> None:
    """Of a limit that leaves eight samples fingerprints are of eight."""
    about = {"validation_samples": {"0": 64}}
    forecaster = Kept(references(tmp_path / "refs", data=data, about=about, num_tokens=64), num_tokens=64)
    fit(tmp_path / "run", forecaster, max_steps=8, limit_val_batches=2)
    assert Run(tmp_path / "run").about["validation_data"] != {"0": DATA}
    assert forecaster.values("num_references")[-1] == 6


@pytest.mark.parametrize("data", [DATA, "a1", None], ids=["this", "other", "unknown"])
@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`", "ignore:Kept has no skill")
@pytest.mark.filterwarnings("ignore:Kept makes no forecast", "ignore:Kept forecasts beyond")
def test_before_a_validation_run_it_is_not_known_what_serves(tmp_path: Path, data: str | None) -> None:
    """Training rows are reported at 4, and again at 12 after a resume, before the validation runs at 8 and 16."""
    refs = references(tmp_path / "refs", data=data, stage="train")
    common = {"limit_train_batches": 4, "val_check_interval": None, "check_val_every_n_epoch": 2, "max_epochs": -1}
    saving = ModelCheckpoint(tmp_path / "checkpoints", "at", every_n_epochs=2, save_on_train_epoch_end=True)
    options = {"stage": "train", "predictor": "batch", "num_tokens": 512}
    first, second, whole = (Kept(refs, **options) for _ in range(3))
    fit(tmp_path / "whole", whole, max_steps=16, **common)
    fit(tmp_path / "cut", first, saving, max_steps=8, enable_checkpointing=True, **common)
    fit(tmp_path / "cut", second, max_steps=16, ckpt_path=tmp_path / "checkpoints" / "at.ckpt", **common)
    assert {**first.logged, **second.logged} == {
        step: pytest.approx(values, nan_ok=True) for step, values in whole.logged.items()
    }
    num = {DATA: 6, "a1": 0, None: 6}[data]
    assert whole.values("num_references") == [6, 6, num, num]
    has_forecast = np.isfinite(whole.values("low"))
    assert has_forecast.tolist() == {DATA: [0, 0, 1, 1], "a1": [0] * 4, None: [1] * 4}[data]
