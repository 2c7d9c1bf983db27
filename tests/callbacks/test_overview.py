"""The overview in real event files: what stands first, over all layers, and which charts there are of it."""

import math
import warnings
from math import nan
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch import Callback, Trainer, seed_everything
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.custom_scalar.layout_pb2 import Category, Layout

from lightning_spectral import ActivationSpectrum, GradientSpectrum, HeadDrift, RunRecord, TailForecaster
from lightning_spectral.callbacks.overview import FAILED, GROUP, mean_of_all
from tests.models import LENGTH, PROBES, WIDTH, LanguageModel, tiny_trainer, token_loader
from tests.runs.made_up import made_up

LAYERS = [f"network.{name}" for name in PROBES]
NAMES = ("rankme_share", "tail_exponent", "tokens_in_batch", "tokens_in_noise_scale", "tokens_to_target")
ALL = (*NAMES, "turned_beyond_floor")
BATCH = 4


def watching(folder: Path, **kwargs: Any) -> list[Callback]:
    """One of each, on validation rows, with references that the forecaster finds."""
    for number in range(6):
        tokens, exponent, batch = 1000 * 1.3**number, 0.2 + 0.2 * number, 2.0**number
        path = folder / "references" / str(number)
        made_up(path, tokens, 1, exponent, layer=LAYERS[-1], num_tokens=512, batch_tokens=batch, data=None)
    common = {"stage": "validate", "every_n_steps": 4, "num_tokens": 512, **kwargs}
    forecaster = TailForecaster(
        1.0, references=[f"{folder}/references/*"], predictor="head", layer=LAYERS[-1], **common
    )
    return [
        GradientSpectrum("*.logits.*", every_n_steps=2, num_samples=48, **kwargs),
        HeadDrift(rank=4, **common),
        forecaster,
        ActivationSpectrum(**common),
        RunRecord(family="F"),
    ]


def fit(folder: Path, *callbacks: Callback, **kwargs: Any) -> Trainer:
    seed_everything(0, verbose=False)
    defaults = {"max_steps": 12, "val_check_interval": 4, "check_val_every_n_epoch": None}
    trainer = tiny_trainer(folder, callbacks=list(callbacks), **(defaults | kwargs))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # references that are made up for the purpose
        trainer.fit(LanguageModel(), token_loader(48, BATCH), token_loader(64, seed=1))
    return trainer


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    folder = tmp_path_factory.mktemp("overview")
    loggers = [TensorBoardLogger(folder, "tb", ""), CSVLogger(folder, "csv", "")]
    trainer = fit(folder, *watching(folder), logger=loggers, accumulate_grad_batches=2, val_check_interval=8)
    events = EventAccumulator(str(folder / "tb"), size_guidance={"scalars": 0, "tensors": 0}).Reload()
    metrics = {key: float(value) for key, value in trainer.callback_metrics.items()}
    header = (folder / "csv" / "metrics.csv").read_text().partition("\n")[0].split(",")
    return SimpleNamespace(events=events, metrics=metrics, header=header, reports=folder / "tb" / "spectra")


def scalars(run: SimpleNamespace, key: str) -> dict[int, float]:
    return {event.step: event.value for event in run.events.Scalars(key)}


def test_at_most_eight_cards_come_first(run: SimpleNamespace) -> None:
    tags = [tag for kind in ("scalars", "images", "histograms") for tag in run.events.Tags()[kind]]
    groups = sorted({tag.partition("/")[0] for tag in tags})
    # TensorBoard opens two groups, and leaves those of each layer closed.
    assert groups[:2] == [GROUP, FAILED.partition("/")[0]]
    assert {"activation", "drift", "forecast", "gradient"} <= set(groups[2:])
    first = {tag for tag in tags if tag.partition("/")[0] in groups[:2]}
    assert first == {FAILED, *(f"{GROUP}/{name}" for name in ALL)}
    assert len(first) <= 8
    assert first <= run.metrics.keys()
    assert first <= set(run.header)


@pytest.mark.parametrize("step", [4, 8, 12])
def test_each_is_what_the_layers_come_to(run: SimpleNamespace, step: int) -> None:
    def layers(kind: str, quantity: str) -> np.ndarray:
        return np.array([scalars(run, f"{kind}/{name}/{quantity}")[step] for name in LAYERS])

    # Forecasts that are not known are not logged.
    found = {name: scalars(run, f"{GROUP}/{name}").get(step, nan) for name in ALL if not name.startswith("tokens_in")}
    assert found == pytest.approx(
        {
            "tail_exponent": layers("activation", "alpha_tail").mean(),
            "rankme_share": layers("activation", "rankme").mean() / WIDTH,
            "turned_beyond_floor": (layers("drift", "overlap_floor") - layers("drift", "overlap")).clip(0).mean(),
            "tokens_to_target": scalars(run, "forecast/tokens_to_target").get(step, nan),
        },
        rel=1e-5,
        nan_ok=True,
    )


def test_something_turned_and_something_was_forecast(run: SimpleNamespace) -> None:
    """Else the test above would hold for zeros and NaN."""
    assert scalars(run, f"{GROUP}/turned_beyond_floor")[12] > 0
    assert scalars(run, f"{GROUP}/tokens_to_target")[12] > 0


def test_noise_scale_and_batch_are_in_tokens(run: SimpleNamespace) -> None:
    assert scalars(run, f"{GROUP}/tokens_in_batch") == dict.fromkeys(range(2, 13, 2), 2 * BATCH * LENGTH)
    # Of all measured parameters together, from pairs of samples of different groups.
    expected, squared_norm, trace = {}, 0.0, 0.0
    for path in sorted(run.reports.glob("gradient-train-*.npz")):
        report = np.load(path)
        names = sorted(key for key in report.files if key.endswith("/noise_products"))
        assert len(names) == 2
        products = sum(report[name] for name in names)
        squares = sum(report[name.replace("products", "squares")] for name in names)
        counts = report[names[0].replace("products", "counts")]
        num_pairs = counts.sum() ** 2 - (counts**2).sum()
        now = (products.sum() - products.trace()) / num_pairs
        squared_norm, trace = 0.9 * squared_norm + now, 0.9 * trace + squares.sum() / counts.sum() - now
        expected[int(report["step"])] = LENGTH * trace / squared_norm if squared_norm > 0 else math.inf
    noise = scalars(run, f"{GROUP}/tokens_in_noise_scale")
    assert noise == pytest.approx(expected, rel=1e-4)
    assert any(map(math.isfinite, noise.values()))


def layout(events: EventAccumulator) -> list[Category]:
    content = events.Tensors("custom_scalars__config__")[-1].tensor_proto.string_val[0]
    return list(Layout.FromString(content).category)


def test_charts_of_the_overview_come_first(run: SimpleNamespace) -> None:
    first, *others = layout(run.events)
    assert first.title == "overview"
    assert {category.title for category in others} == {
        "activation spectra",
        "head drift",
        "forecast",
        "gradient spectra",
    }
    charts = {chart.title: chart for chart in first.chart}
    assert list(charts) == [
        "tail exponent, mean of layers",
        "RankMe as a share of the width, mean of layers",
        "drift beyond its floor, mean of layers",
        "tokens: batch and noise scale",
        "tokens to the target, with 80% interval",
        "failed measurements",
    ]
    assert list(charts["tokens: batch and noise scale"].multiline.tag) == [
        f"^{GROUP}/tokens_in_batch$",
        f"^{GROUP}/tokens_in_noise_scale$",
    ]
    (margin,) = charts["tokens to the target, with 80% interval"].margin.series
    assert (margin.value, margin.lower, margin.upper) == (
        "forecast/tokens_to_target",
        "forecast/low",
        "forecast/high",
    )


def test_each_prefix_has_its_own(tmp_path: Path) -> None:
    spectra = [ActivationSpectrum(every_n_steps=4, num_tokens=64, prefix=prefix) for prefix in ("a/", "b/")]
    trainer = fit(tmp_path, *spectra, logger=TensorBoardLogger(tmp_path, "tb", ""), limit_val_batches=0)
    names = {f"{GROUP}/tail_exponent", f"{GROUP}/rankme_share", FAILED}
    expected = {f"{prefix}{name}" for prefix in ("a/", "b/") for name in names}
    events = EventAccumulator(str(tmp_path / "tb"), size_guidance={"tensors": 0}).Reload()
    for held in (events.Tags()["scalars"], trainer.callback_metrics):
        assert {key for key in held if GROUP in key or FAILED in key} == expected
    (overview, _) = layout(events)
    assert [chart.title for chart in overview.chart] == [
        f"{prefix}{title}"
        for prefix in ("a/", "b/")
        for title in (
            "tail exponent, mean of layers",
            "RankMe as a share of the width, mean of layers",
            "failed measurements",
        )
    ]


def test_what_failed_is_counted_over_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*args: Any) -> torch.Tensor:
        raise RuntimeError("no convergence")

    for solver in ("eigh", "eigvalsh"):
        monkeypatch.setattr(torch.linalg, solver, fails)
    callbacks = [
        ActivationSpectrum(every_n_steps=4, stage="validate"),
        HeadDrift(rank=4, every_n_steps=4),
        GradientSpectrum("*.mix.weight", every_n_steps=6, num_samples=16, loss_fn=fails),
    ]
    trainer = fit(tmp_path, *callbacks, logger=TensorBoardLogger(tmp_path, "tb", ""))
    metrics = {key: float(value) for key, value in trainer.callback_metrics.items()}
    counts = [metrics[f"{kind}/failed"] for kind in ("activation", "drift", "gradient")]
    assert counts == [15, 15, 12]
    assert metrics[FAILED] == 42
    assert all(math.isnan(metrics[f"{GROUP}/{name}"]) for name in ("tail_exponent", "rankme_share"))
    assert math.isnan(metrics[f"{GROUP}/turned_beyond_floor"])
    assert math.isnan(metrics[f"{GROUP}/tokens_in_noise_scale"])
    events = EventAccumulator(str(tmp_path / "tb")).Reload()
    counted = [event.value for event in events.Scalars(FAILED)]
    assert counted == sorted(counted)
    assert counted[-1] == 42


class Seen(Callback):
    """Looks at the overview after the first batch."""

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        if not hasattr(self, "first"):
            self.first = {key: float(value) for key, value in trainer.callback_metrics.items() if key.startswith("a_")}


def test_what_is_not_known_yet_is_there_as_nan(tmp_path: Path) -> None:
    seen = Seen()
    fit(tmp_path, seen, *watching(tmp_path))
    assert seen.first.keys() == {FAILED, *(f"{GROUP}/{name}" for name in ALL)}
    assert all(map(math.isnan, seen.first.values()))


def test_a_mean_is_of_all_or_not_known() -> None:
    assert mean_of_all([1.0, 2.0]) == 1.5
    assert math.isnan(mean_of_all([1.0, math.nan]))
    assert math.isnan(mean_of_all([]))
