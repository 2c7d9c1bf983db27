"""GradientSpectrum in real runs: what it logs, at which steps, of which samples, against a float64 twin."""

import copy
import csv
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, default_collate

from lightning_spectral import ActivationSpectrum, GradientSpectrum
from lightning_spectral.capture import engines
from lightning_spectral.capture.backward import BackwardReader
from lightning_spectral.capture.batch import num_samples
from lightning_spectral.functional import noise_sums
from lightning_spectral.measurement import gradients as measurement_of_gradients
from lightning_spectral.measurement import weight_spectra
from lightning_spectral.measurement.row_store import RowStore
from tests._reference import jackknife, power_law, rankme
from tests.models import Alternating, LanguageModel, Network, tiny_trainer, token_loader

NAMES = [f"network.blocks.{index}.mlp.2.weight" for index in (0, 1, 2, 4, 5)]
NOISE_QUANTITIES = ["noise_scale", "noise_scale_low", "noise_scale_high", "noise_scale_smoothed"]
QUANTITIES = [
    "alpha_tail",
    "alpha_tail_stderr",
    "r2_tail",
    "alpha_head",
    "alpha_head_stderr",
    "alpha_tail_centred",
    "rankme",
    *NOISE_QUANTITIES,
    "grad_norm",
    "num_samples",
]
WEIGHT_QUANTITIES = ["alpha_tail", "r2_tail", "alpha_head", "rankme"]
NUM_SAMPLES, SIZE, EVERY = 22, 8, 4
"""22 samples of batches of 8: a report takes the last three steps of four, and of the third 6 samples."""


def gradients(model: LightningModule, batch: dict[str, Tensor], names: list[str]) -> list[np.ndarray]:
    """Each sample's gradient by a backward pass of its own on a copy of the model."""
    twin = copy.deepcopy(model)
    twin.log = lambda *args, **kwargs: None
    rows = []
    for index in range(len(batch["input_ids"])):
        loss = twin.loss({key: value[index : index + 1].clone() for key, value in batch.items()})
        found = torch.autograd.grad(loss, [twin.get_parameter(name) for name in names])
        rows.append([gradient.double().numpy().ravel() for gradient in found])
    return rows


class Recorder(Callback):
    """Keeps batches, and gradients at the weights before each step and after each report."""

    def __init__(self, names: list[str]) -> None:
        self.names = names
        self.before: list[list[Any]] = []
        self.after: dict[int, list[Any]] = {}
        self.validation: dict[int, list[Any]] = {}
        self.weights: dict[int, list[np.ndarray]] = {}
        self.batches: list[dict[str, Tensor]] = []
        self.held_out: list[dict[str, Tensor]] = []

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self.batches.append(batch)
        self.before.append(gradients(pl_module, batch, self.names))

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        step = trainer.global_step
        if step % EVERY == 0:
            self.after[step] = [gradients(pl_module, batch, self.names) for batch in self.batches[-3:]]
            self.weights[step] = [pl_module.get_parameter(n).detach().double().numpy().copy() for n in self.names]

    def on_validation_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, *_: Any) -> None:
        self.held_out.append(batch)

    def on_validation_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.held_out.clear()

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        with torch.inference_mode(False), torch.enable_grad():
            self.validation[trainer.global_step] = [gradients(pl_module, b, self.names) for b in self.held_out]

    def rows(self, prefix: str, step: int) -> list[list[np.ndarray]]:
        if prefix.endswith("validate/"):
            # Whole batches spread over five: the third would come when 16 of 22 are there after three fifths.
            batches = [self.validation[step][index] for index in (0, 1, 3)]
        elif prefix == "hooks/":
            batches = self.before[step - 3 : step]
        else:
            batches = self.after[step]
        return [rows for batch in batches for rows in batch][:NUM_SAMPLES]


def svd(rows: np.ndarray) -> np.ndarray:
    return np.linalg.svd(rows, compute_uv=False)


def expected_values(rows: np.ndarray) -> dict[str, float]:
    """What is logged of one parameter with the default bands; groups are contiguous."""
    count = len(rows)
    tail, head = (count // 8, count // 2), (1, 10)
    groups = [rows[[4 * index // count == group for index in range(count)]] for group in range(4)]
    values = svd(rows)

    def exponent_of(band: tuple[int, int]):
        return lambda some: power_law(svd(some), *band)[0]

    mean = rows.mean(0)
    trace = ((rows - mean) ** 2).sum() / (count - 1)
    squared_norm = mean @ mean - trace / count
    alpha, r2 = power_law(values, *tail)
    return {
        "alpha_tail": alpha,
        "alpha_tail_stderr": jackknife(exponent_of(tail), groups)[1],
        "r2_tail": r2,
        "alpha_head": power_law(values, *head)[0],
        "alpha_head_stderr": jackknife(exponent_of(head), groups)[1],
        "alpha_tail_centred": power_law(svd(rows - mean), *tail)[0],
        "rankme": rankme(values),
        "noise_scale": trace / squared_norm if squared_norm > 0 else math.inf,
        "grad_norm": math.sqrt(mean @ mean),
        "num_samples": float(count),
    }


PREFIXES = ["vmap/", "loop/", "hooks/", "vmap validate/", "loop validate/", "hooks validate/"]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """12 steps watched by every method in both stages, and everything they should have seen."""
    folder = tmp_path_factory.mktemp("run")
    seed_everything(0, verbose=False)
    recorder = Recorder(NAMES)
    spectra = []
    for prefix in PREFIXES:
        method, _, stage = prefix.removesuffix("/").partition(" ")
        common = {"every_n_steps": EVERY, "num_samples": NUM_SAMPLES, "method": method, "prefix": prefix}
        spectra.append(GradientSpectrum(stage=stage or "train", weights=prefix == "vmap/", **common))
    trainer = tiny_trainer(
        folder,
        max_steps=12,
        gradient_clip_val=0.1,
        val_check_interval=4,
        check_val_every_n_epoch=None,
        logger=[TensorBoardLogger(folder, "tb", ""), CSVLogger(folder, "csv", "")],
        callbacks=[recorder, *spectra, ActivationSpectrum(every_n_steps=4, num_tokens=64)],
    )
    trainer.fit(LanguageModel(), token_loader(96, batch_size=SIZE), token_loader(40, batch_size=SIZE, seed=1))
    events = EventAccumulator(str(folder / "tb"), size_guidance={"scalars": 0, "histograms": 0, "images": 0})
    events.Reload()
    with (folder / "csv" / "metrics.csv").open() as file:
        table = list(csv.DictReader(file))
    metrics = {key: float(value) for key, value in trainer.callback_metrics.items()}
    return SimpleNamespace(events=events, csv=table, metrics=metrics, recorder=recorder, spectra=spectra)


def keys_of(prefix: str) -> set[str]:
    keys = {f"{prefix}gradient/{name}/{quantity}" for name in NAMES for quantity in QUANTITIES}
    if prefix == "vmap/":
        keys |= {f"{prefix}weight/{name}/{quantity}" for name in NAMES for quantity in WEIGHT_QUANTITIES}
    return (
        keys | {f"{prefix}gradient/{key}" for key in ("failed", "sample_weights_ratio")} | {f"{prefix}spectral/seconds"}
    )


def test_keys_are_those_of_the_contract(run: SimpleNamespace) -> None:
    expected = set().union(*map(keys_of, PREFIXES))
    expected |= {f"{prefix}a_overview/tokens_in_{what}" for prefix in PREFIXES for what in ("batch", "noise_scale")}
    expected |= {f"{prefix}a_problems/failures" for prefix in PREFIXES}
    for held in (run.events.Tags()["scalars"], run.metrics, run.csv[0]):
        assert {key for key in held if key.startswith(tuple(PREFIXES))} == expected


def scalar(run: SimpleNamespace, key: str, step: int) -> float:
    return {event.step: event.value for event in run.events.Scalars(key)}[step]


def steps_of(prefix: str) -> list[int]:
    return [4, 8, 12]


@pytest.mark.parametrize("prefix", PREFIXES)
def test_values_are_those_of_autograd_sample_by_sample(run: SimpleNamespace, prefix: str) -> None:
    for step in steps_of(prefix):
        rows = run.recorder.rows(prefix, step)
        assert len(rows) == NUM_SAMPLES
        for index, name in enumerate(NAMES):
            expected = expected_values(np.stack([row[index] for row in rows]))
            found = {quantity: scalar(run, f"{prefix}gradient/{name}/{quantity}", step) for quantity in expected}
            assert found == pytest.approx(expected, rel=2e-3, abs=1e-4, nan_ok=True), (step, name)


@pytest.mark.parametrize("prefix", PREFIXES)
def test_interval_and_smoothed_noise_scale_are_those_of_the_rows(run: SimpleNamespace, prefix: str) -> None:
    means = np.zeros((len(NAMES), 2))
    for step in steps_of(prefix):
        rows = run.recorder.rows(prefix, step)
        for index, name in enumerate(NAMES):
            part = torch.tensor(np.stack([row[index] for row in rows]))
            sums = noise_sums(part @ part.T, torch.arange(NUM_SAMPLES) * 4 // NUM_SAMPLES)
            means[index] = 0.9 * means[index] + 0.1 * np.array(sums.moments_between)
            squared_norm, trace = means[index]
            smoothed = trace / squared_norm if squared_norm > 0 else math.inf
            expected = [float(sums.noise_scale), *map(float, sums.interval), smoothed]
            found = [scalar(run, f"{prefix}gradient/{name}/{quantity}", step) for quantity in NOISE_QUANTITIES]
            assert found == pytest.approx(expected, rel=2e-2), (step, name)
            assert math.isfinite(found[1])
            assert found[1] < found[2]


def test_weight_spectra_are_those_of_the_weights(run: SimpleNamespace) -> None:
    for step, weights in run.recorder.weights.items():
        for name, weight in zip(NAMES, weights, strict=True):
            values = svd(weight)
            alpha, r2 = power_law(values, 4, 16)
            expected = [alpha, r2, power_law(values, 1, 10)[0], rankme(values)]
            found = [scalar(run, f"vmap/weight/{name}/{quantity}", step) for quantity in WEIGHT_QUANTITIES]
            assert found == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("prefix", PREFIXES)
def test_no_report_is_lost(run: SimpleNamespace, prefix: str) -> None:
    for key in keys_of(prefix):
        assert [event.step for event in run.events.Scalars(key)] == steps_of(prefix), key
        assert [int(row["step"]) for row in run.csv if row[key]] == steps_of(prefix), key
    for name in NAMES:
        histograms = run.events.Histograms(f"{prefix}gradient/{name}/log10_singular_values")
        assert [event.step for event in histograms] == steps_of(prefix)
        assert {sum(event.histogram_value.bucket) for event in histograms} == {NUM_SAMPLES}
    # The 1st, the 2nd, and the last.
    assert [event.step for event in run.events.Images(f"{prefix}gradient/spectra")] == [4, 8, 12]
    assert run.metrics[f"{prefix}gradient/failed"] == 0


def test_rows_by_hooks_tell_the_steps_they_come_from(run: SimpleNamespace) -> None:
    reports = [(spectrum.prefix, spectrum._kept["summary"]["last"]["step"]) for spectrum in run.spectra]
    assert {step for _, step in reports} == {12}


class Kept(GradientSpectrum):
    """Keeps its reports."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **{"every_n_steps": 4, "num_samples": 16, **kwargs})
        self.reports: list[Any] = []
        self.logged: dict[int, dict[str, float]] = {}

    def measured(self, report: Any) -> dict[str, float]:
        self.reports.append(report)
        self.logged[report.step] = super().measured(report)
        return self.logged[report.step]


def fit(
    folder: Path, *callbacks: Callback, model: Any = None, ckpt_path: Any = None, size: int = 96, **kwargs: Any
) -> Trainer:
    seed_everything(0, verbose=False)
    trainer = tiny_trainer(folder, callbacks=list(callbacks), **{"max_steps": 4, "limit_val_batches": 0, **kwargs})
    loaders = token_loader(size, batch_size=8), token_loader(16, batch_size=8, seed=1)
    trainer.fit(LanguageModel() if model is None else model, *loaders, ckpt_path=ckpt_path)
    return trainer


def test_span_and_method_are_recorded(tmp_path: Path) -> None:
    hooks, auto = Kept(method="hooks", prefix="h/"), Kept()
    fit(tmp_path, hooks, auto)
    assert (hooks.reports[0].method, hooks.reports[0].span) == ("hooks", (2, 3))
    assert hooks.title(hooks.reports[0]) == "per-sample gradients, train, hooks, step 4 (rows of steps 2 to 3)"
    assert (auto.reports[0].method, auto.reports[0].span) == ("vmap", (4, 4))


@pytest.mark.parametrize("row_dtype", ["float32", "bfloat16"])
def test_rows_let_go_of_layer_by_layer_give_the_same_report(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, row_dtype: Any
) -> None:
    early, take, begin = [], RowStore.take_early, BackwardReader.begin

    def take_early(store: RowStore, name: str) -> Tensor:
        early.append(name)
        return take(store, name)

    monkeypatch.setattr(RowStore, "take_early", take_early)
    found, expected = (Kept(method="hooks", row_dtype=row_dtype) for _ in range(2))
    trained = fit(tmp_path, found)
    names = list(found.reports[0].spectra["gradient"])
    assert sorted(early) == sorted(names)
    monkeypatch.setattr(BackwardReader, "begin", lambda reader, rows, on_complete=None: begin(reader, rows))
    twin = fit(tmp_path, expected)
    assert len(early) == len(names)
    for name, spectrum in found.reports[0].spectra["gradient"].items():
        assert torch.equal(spectrum.values, expected.reports[0].spectra["gradient"][name].values)
        assert spectrum.values.any()
    pairs = zip(trained.lightning_module.parameters(), twin.lightning_module.parameters(), strict=True)
    assert all(torch.equal(one, other) for one, other in pairs)


@pytest.mark.parametrize("changes", [{"accumulate_grad_batches": 2}, {"gradient_clip_val": 1e-3}], ids=str)
def test_accumulation_and_clipping_leave_rows_by_hooks_alone(tmp_path: Path, changes: dict[str, Any]) -> None:
    # At a learning rate of zero all steps meet the same weights.
    class Still(LanguageModel):
        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), 0.0)

    hooks, loop = Kept(method="hooks", prefix="h/"), Kept(method="loop")
    fit(tmp_path, hooks, loop, model=Still(), **changes)
    for name, spectrum in loop.reports[0].spectra["gradient"].items():
        found = hooks.reports[0].spectra["gradient"][name]
        assert found.count == spectrum.count == 16
        torch.testing.assert_close(found.values, spectrum.values, rtol=1e-4, atol=1e-7)
        norms = [run.reports[0].parameters[name].grad_norm for run in (hooks, loop)]
        assert norms[0] == pytest.approx(norms[1], rel=1e-4)


def test_steps_without_a_loss_give_no_rows(tmp_path: Path) -> None:
    class Skipping(LanguageModel):
        def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor | None:
            loss = super().training_step(batch, batch_idx)
            return None if batch_idx % 2 else loss

    spectrum = Kept(method="hooks", num_samples=100)
    with pytest.warns(UserWarning, match="`training_step` returned `None`"):
        fit(tmp_path, spectrum, model=Skipping())
    parameters = spectrum.reports[0].spectra["gradient"].values()
    assert {(parameter.count, parameter.failure) for parameter in parameters} == {(16, None)}


def test_noise_scale_of_the_whole_model_is_that_of_all_its_parameters(tmp_path: Path) -> None:
    model = LanguageModel()
    names = [name for name, _ in model.named_parameters()]
    recorder, spectrum = Recorder(names), Kept("all", num_samples=24)
    trainer = fit(tmp_path, recorder, spectrum, model=model)
    rows = np.stack([np.concatenate(row) for batch in recorder.after[4] for row in batch])
    trace = ((rows - rows.mean(0)) ** 2).sum() / (len(rows) - 1)
    squared_norm = rows.mean(0) @ rows.mean(0) - trace / len(rows)
    moments = [parameter.noise.moments for parameter in spectrum.reports[0].parameters.values()]
    assert float(sum(part.trace for part in moments)) == pytest.approx(trace, rel=1e-4)
    assert float(sum(part.squared_norm for part in moments)) == pytest.approx(squared_norm, rel=1e-3, abs=1e-5)
    found = [float(trainer.callback_metrics[f"gradient/{quantity}"]) for quantity in NOISE_QUANTITIES]
    assert found[0] == pytest.approx(trace / squared_norm if squared_norm > 0 else math.inf, rel=1e-2)
    products = torch.tensor(rows @ rows.T)
    sums = noise_sums(products, torch.arange(len(rows)) * 4 // len(rows))
    assert found[1:3] == pytest.approx(list(map(float, sums.interval)), rel=1e-2)
    assert found[3] == pytest.approx(float(sums.moments_between.noise_scale), rel=1e-2)


@pytest.mark.parametrize(
    ("changes", "tolerance"),
    [
        ({"row_dtype": "bfloat16"}, 1e-2),
        ({"row_device": "cpu"}, 0),
        ({"row_device": "device"}, 0),
        ({"row_dtype": "float64"}, 1e-5),
    ],
)
@pytest.mark.parametrize("method", ["vmap", "hooks"])
def test_rows_may_be_kept_elsewhere_and_shorter(
    tmp_path: Path, method: str, changes: dict[str, Any], tolerance: float
) -> None:
    plain, other = Kept(method=method), Kept(method=method, prefix="other/", **changes)
    fit(tmp_path, plain, other)
    for name, spectrum in plain.reports[0].spectra["gradient"].items():
        found = other.reports[0].spectra["gradient"][name].values
        torch.testing.assert_close(found, spectrum.values, rtol=tolerance, atol=0)


def test_gradients_of_zero_are_nan_with_the_reason(tmp_path: Path) -> None:
    class Blocked(LanguageModel):
        def __init__(self) -> None:
            super().__init__()
            for block in self.network.blocks:
                nn.init.zeros_(block.mlp[2].weight)
                block.mlp[2].requires_grad_(False)

    spectrum = Kept("*.mlp.0.weight")
    zero = "mlp.0.weight: NaN, because all its values are exactly zero"
    with pytest.warns(UserWarning, match=zero) as caught:
        trainer = fit(tmp_path, spectrum, model=Blocked(), max_steps=8)
    # Once, not for each parameter, band and report.
    assert sum(zero in str(warning.message) for warning in caught) == 1
    key = "gradient/network.blocks.0.mlp.0.weight"
    assert math.isnan(trainer.callback_metrics[f"{key}/alpha_tail"])
    assert trainer.callback_metrics[f"{key}/grad_norm"] == 0
    assert trainer.callback_metrics[f"{key}/num_samples"] == 16
    assert trainer.callback_metrics["gradient/failed"] == 0


class Poisoned(LanguageModel):
    """Its loss is NaN, times zero in training, where a batch holds one sample."""

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        return loss * torch.nan if len(batch["input_ids"]) == 1 else loss


class Raising(LanguageModel):
    """Cannot take a batch of one."""

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        if len(batch["input_ids"]) == 1:
            raise RuntimeError("two samples are needed")
        return super().training_step(batch, batch_idx)


# A loss of NaN beside a metric may come from the metric, so that it is asked, which vmap cannot.
@pytest.mark.filterwarnings("ignore:Kept method='auto' loops over samples")
@pytest.mark.parametrize(
    ("make", "reason"), [(Poisoned, "the gradients hold NaN or infinity"), (Raising, "two samples are needed")]
)
def test_what_cannot_be_measured_is_nan_and_training_goes_on(tmp_path: Path, make: Any, reason: str) -> None:
    spectrum = Kept()
    with pytest.warns(UserWarning, match=reason) as caught:
        trainer = fit(tmp_path, spectrum, model=make(), max_steps=8)
    assert trainer.global_step == 8
    assert trainer.callback_metrics["gradient/failed"] == 10
    assert math.isnan(trainer.callback_metrics[f"gradient/{NAMES[0]}/alpha_tail"])
    # Once, not for each parameter and report.
    assert sum(reason in str(warning.message) for warning in caught) == 1


def test_auto_warns_once_of_the_cause_and_loops(tmp_path: Path) -> None:
    class Branching(LanguageModel):
        def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
            loss = super().training_step(batch, batch_idx)
            return loss if loss.item() > 0 else -loss

    spectrum = Kept()
    told = r"loops over samples, because vmap cannot: \w+\.py:\d+ asks for a value of each sample"
    with pytest.warns(UserWarning, match=told) as caught:
        fit(tmp_path, spectrum, model=Branching(), max_steps=8)
    assert sum("loops over samples" in str(warning.message) for warning in caught) == 1
    assert [report.method for report in spectrum.reports] == ["loop", "loop"]
    assert all(
        parameter.failure is None for report in spectrum.reports for parameter in report.spectra["gradient"].values()
    )


def test_a_chunk_too_large_is_halved_and_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes, vmap = [], engines.by_vmap

    def small(loss: Any, names: Any, batch: Any, out: Any) -> None:
        sizes.append(num_samples(batch))
        if sizes[-1] > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        vmap(loss, names, batch, out)

    monkeypatch.setattr(engines, "by_vmap", small)
    spectrum = Kept(method="vmap", chunk_size=8)
    with pytest.warns(UserWarning, match="ran out of memory at chunk_size=8: now at 2"):
        fit(tmp_path, spectrum)
    # What was learned from the first batch holds for the second.
    assert sizes == [8, 4, 2, 2, 2, 2, 2, 2, 2, 2]
    assert all(parameter.failure is None for parameter in spectrum.reports[0].spectra["gradient"].values())


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")
@pytest.mark.parametrize(
    "arguments", [{"method": "hooks"}, {"method": "vmap"}, {"method": "vmap", "stage": "validate"}], ids=str
)
def test_resumed_run_reports_the_same(tmp_path: Path, arguments: dict[str, Any]) -> None:
    arguments = arguments | {"num_samples": 8, "num_groups": 1, "head": (1, 3)}
    common: dict[str, Any] = {"size": 8, "limit_val_batches": 2, "check_val_every_n_epoch": 4}
    whole = Kept(**arguments)
    fit(tmp_path, whole, max_steps=8, **common)  # one batch: what order a loader resumes in does not matter
    first = Kept(**arguments)
    saving = ModelCheckpoint(tmp_path / "checkpoints", "at", every_n_epochs=4, save_on_train_epoch_end=True)
    fit(tmp_path, first, saving, max_steps=4, enable_checkpointing=True, **common)
    second = Kept(**arguments)
    fit(tmp_path, second, max_steps=8, ckpt_path=tmp_path / "checkpoints" / "at.ckpt", **common)
    assert list(first.logged) == [4]
    assert list(second.logged) == [8]
    assert second.logged[8] == pytest.approx(whole.logged[8], rel=1e-6, nan_ok=True)
    assert second.display.state()["first"]["step"] == 4


def test_values_can_be_monitored(tmp_path: Path) -> None:
    key = f"gradient/{NAMES[0]}/grad_norm"
    stop = EarlyStopping(key, patience=0, mode="max", check_finite=False, stopping_threshold=0.0)
    trainer = fit(tmp_path, Kept(stage="validate"), stop, max_steps=12, val_check_interval=4, limit_val_batches=2)
    assert trainer.global_step == 4


@pytest.mark.parametrize("method", ["vmap", "loop", "hooks"])
def test_validation_alone_is_measured_in_inference_mode(tmp_path: Path, method: str) -> None:
    seed_everything(0, verbose=False)
    model, spectrum = LanguageModel(), Kept(stage="validate", method=method)
    loader = token_loader(16, batch_size=8)
    trainer = tiny_trainer(tmp_path, callbacks=[spectrum])
    trainer.validate(model, loader, verbose=False)
    rows = [row for batch in loader for row in gradients(model, batch, NAMES)]
    for index, name in enumerate(NAMES):
        expected = expected_values(np.stack([row[index] for row in rows]))
        # Of the 16 samples a group of four leaves 12: enough for both bands.
        found = {q: float(trainer.callback_metrics[f"gradient/{name}/{q}"]) for q in expected}
        assert found == pytest.approx(expected, rel=2e-3, abs=1e-4, nan_ok=True), name
    assert trainer.callback_metrics["gradient/failed"] == 0


class Regression(LightningModule):
    """Takes batches that are tuples, or tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 1))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch if isinstance(batch, list) else (batch, batch.sum(1, keepdim=True))
        return F.mse_loss(self.net(x), y)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 1e-2)


@pytest.mark.parametrize("method", ["vmap", "loop", "hooks"])
@pytest.mark.parametrize("kind", ["tuple", "tensor"])
def test_batches_may_be_tuples_and_tensors(tmp_path: Path, kind: str, method: str) -> None:
    seed_everything(0, verbose=False)
    x = torch.randn(32, 6)
    data = torch.utils.data.TensorDataset(x, x[:, :1]) if kind == "tuple" else x
    spectrum = Kept("all", method=method, prefix="all/")
    trainer = tiny_trainer(tmp_path, max_steps=4, callbacks=[spectrum])
    trainer.fit(Regression(), torch.utils.data.DataLoader(data, batch_size=8))
    assert trainer.callback_metrics["all/gradient/net.0.weight/num_samples"] == 16
    assert trainer.callback_metrics["all/gradient/failed"] == 0
    assert trainer.callback_metrics["all/gradient/noise_scale"] > 0


def doubled(module: Any, batch: Any) -> Tensor:
    return 2 * module.loss(batch)


def test_loss_fn_is_what_is_differentiated(tmp_path: Path) -> None:
    plain, double = Kept(), Kept(loss_fn="tests.callbacks.test_gradient_spectrum.doubled", prefix="2/")
    fit(tmp_path, plain, double)
    for name, spectrum in plain.reports[0].spectra["gradient"].items():
        found = double.reports[0].spectra["gradient"][name].values
        torch.testing.assert_close(found, 2 * spectrum.values, rtol=1e-5, atol=0)


def test_manual_optimisation_is_measured_by_hooks_and_by_a_loss_fn(tmp_path: Path) -> None:
    # Batches are as long as their sequences, and a step that moves optimizers cannot be asked which is which.
    hooks, vmap = Kept(method="hooks", batch_dim=0, prefix="h/"), Kept(loss_fn=doubled)
    trainer = fit(tmp_path, hooks, vmap, model=Alternating(), max_steps=8)
    assert trainer.callback_metrics["h/gradient/failed"] == 0
    assert trainer.callback_metrics["gradient/failed"] == 0
    assert hooks.reports[0].spectra["gradient"][NAMES[0]].count == 16


def test_table_shows_the_first_report_and_the_last(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fit(tmp_path, Kept(NAMES[0], prefix="mine/"), max_steps=8)
    title, _, header, _, first, last, *_ = capsys.readouterr().out.splitlines()
    assert title.strip() == "mine/gradient spectra, train"
    assert header.split()[:3] == ["parameter", "step", "alpha_tail"]
    assert first.split()[:2] == ["network.blocks.0.mlp.2", "4"]
    assert last.split()[0] == "8"
    assert last.split()[-1] == "16"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"every_n_steps": 0}, "every_n_steps must be a positive int, got 0"),
        ({"num_samples": 1}, "num_samples must be at least 2, got 1: 512 are usual"),
        ({"stage": "test"}, "stage must be 'train' or 'validate', got 'test'"),
        ({"method": "backpack"}, "method must be 'auto', 'vmap', 'hooks' or 'loop', got 'backpack'"),
        ({"num_groups": 0}, "num_groups must be a positive int, got 0"),
        ({"num_samples": 0}, "num_samples must be a positive int, got 0"),
        ({"prefix": None}, "prefix must be a string, got None"),
        ({"head": (3, 1)}, r"head must be two ascending ranks"),
        ({"chunk_size": 0}, "chunk_size must be a positive int, got 0"),
        ({"loss_reduction": "none"}, "loss_reduction must be 'mean' or 'sum', got 'none'"),
        ({"row_dtype": "int8"}, "row_dtype must be 'float32', 'bfloat16' or 'float64', got 'int8'"),
        ({"row_device": "attic"}, "row_device must be 'auto', 'device' or 'cpu', got 'attic'"),
        ({"parameters": 3}, "parameters must be None, 'all', a pattern or a list of patterns, got 3"),
        ({"tail": (0.5, 0.1)}, r"tail must be two ascending fractions in \[0, 1\]"),
        ({"loss_fn": "nowhere.loss"}, "loss_fn must be a callable or its import path, got 'nowhere.loss'"),
        ({"check": "maybe"}, "check must be 'refuse', 'warn' or 'off', got 'maybe'"),
        ({"dataloader_idx": -1}, "dataloader_idx must be an int from 0, got -1"),
    ],
    ids=str,
)
def test_bad_arguments_get_one_line(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        GradientSpectrum(**arguments)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("arguments", "model", "message"),
    [
        ({"parameters": "*.nothing"}, LanguageModel, r"parameters='\*.nothing' matches no parameter: did you mean"),
        ({"tail": (30, 150)}, LanguageModel, r"tail must end at or before rank 16, .*got \(30, 150\): lower its end"),
        ({}, Alternating, "loss_fn must be given for Alternating with automatic_optimization=False"),
        (
            {"parameters": "*.norm.weight", "method": "hooks"},
            LanguageModel,
            "method='hooks' reads linear layers and emb",
        ),
    ],
    ids=["pattern", "band", "manual", "hooks"],
)
def test_what_does_not_fit_the_model_gets_one_line_and_leaves_no_trace(
    tmp_path: Path, arguments: dict[str, Any], model: Any, message: str
) -> None:
    seed_everything(0, verbose=False)
    loaders = token_loader(96, batch_size=8), token_loader(16, batch_size=8, seed=1)
    network, spectrum, beside = model(), Kept(**arguments), Kept(method="hooks", batch_dim=0, prefix="beside/")
    trainer = tiny_trainer(tmp_path, callbacks=[beside, spectrum], max_steps=4, limit_val_batches=0)
    with pytest.raises(ValueError, match=message) as caught:
        trainer.fit(network, *loaders)
    assert "\n" not in str(caught.value)
    assert num_hooks(network) == 0
    # The same Trainer takes another callback that writes the same keys.
    trainer.callbacks.remove(spectrum)
    trainer.callbacks.append(other := Kept(loss_fn=doubled))
    trainer.fit(network, *loaders)
    assert list(other.logged)[-1:] == list(beside.logged)[-1:] == [4]
    assert num_hooks(network) == 0


def num_hooks(model: nn.Module) -> int:
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return sum(len(getattr(module, kind)) for module in model.modules() for kind in kinds)


def test_equal_keys_are_refused_and_free_again(tmp_path: Path) -> None:
    seed_everything(0, verbose=False)
    loaders = token_loader(96, batch_size=8), token_loader(16, batch_size=8, seed=1)
    first, second, model = Kept(method="hooks"), Kept(method="hooks"), LanguageModel()
    trainer = tiny_trainer(tmp_path, callbacks=[first, second], max_steps=4, limit_val_batches=0)
    with pytest.raises(ValueError, match=r"would both write 'gradient/.*': give one of them a prefix"):
        trainer.fit(model, *loaders)
    assert num_hooks(model) == 0
    trainer.callbacks.remove(first)
    trainer.fit(model, *loaders)
    assert list(second.logged) == [4]
    assert num_hooks(model) == 0


@pytest.mark.parametrize("method", ["vmap", "hooks"])
@pytest.mark.parametrize("where", ["_solve", "gram_share", "gram", "measured"])
def test_whatever_else_goes_wrong_is_nan_and_training_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str, method: str
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise torch.OutOfMemoryError("no memory left\nand a trace")

    solve = "decompose_grams" if where == "_solve" else where
    owners = {"measured": GradientSpectrum, "gram": weight_spectra}
    monkeypatch.setattr(owners.get(where, measurement_of_gradients), solve, fail)
    model = LanguageModel()
    with pytest.warns(UserWarning, match="no memory left") as caught:
        trainer = fit(
            tmp_path, GradientSpectrum(every_n_steps=4, num_samples=16, method=method, weights=True), model=model
        )
    assert trainer.global_step == 4
    assert num_hooks(model) == 0
    assert sum("no memory left" in str(warning.message) for warning in caught) == 1
    assert trainer.callback_metrics[f"weight/{NAMES[0]}/rankme"].isnan() == (where in ("gram", "measured"))
    assert trainer.callback_metrics[f"gradient/{NAMES[0]}/rankme"].isnan() == (where != "gram")
    assert trainer.callback_metrics["gradient/failed"] > 0


def test_sharded_parameters_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from lightning.pytorch.strategies import SingleDeviceStrategy

    class FSDPStrategy(SingleDeviceStrategy):
        pass

    with pytest.raises(ValueError, match=r"strategy must leave each rank whole parameters, got FSDPStrategy: use"):
        fit(tmp_path, Kept(), strategy=FSDPStrategy(device=torch.device("cpu")), accelerator="auto", devices="auto")


def test_dropout_model_is_measured(tmp_path: Path) -> None:
    for method in ("vmap", "loop", "hooks"):
        trainer = fit(tmp_path, Kept(method=method), model=LanguageModel(Network(dropout=0.3)))
        assert trainer.callback_metrics["gradient/failed"] == 0


class Captioned(LightningModule):
    """Its loss is of captions, which collation leaves a list of strings, and of weights that a collation made one."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(6, 5)

    def loss_of(self, x: Tensor, captions: Any, weights: Any) -> Tensor:
        targets = torch.tensor([[float(len(caption))] for caption in captions])
        return ((self.fc(x) - targets).square().mean(-1) * torch.as_tensor(weights).float()).mean()

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        return self.loss_of(batch["x"], batch["caption"], batch["weight"])

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), 0.0)


def captioned(size: int) -> list[dict[str, Any]]:
    torch.manual_seed(1)
    x = torch.randn(size, 6) + 2  # so that their gradients agree
    return [{"x": x[index], "caption": "a" * (index % 5), "weight": 0.1 + index} for index in range(size)]


@pytest.mark.parametrize("method", ["auto", "loop", "hooks"])
@pytest.mark.parametrize("make", [list, np.array], ids=["list", "array"])
@pytest.mark.filterwarnings("ignore:.*method='auto' loops over samples, because vmap cannot. the list caption")
def test_lists_and_arrays_of_a_batch_go_with_its_samples(tmp_path: Path, make: Any, method: Any) -> None:
    items = captioned(16)
    collate = lambda items: default_collate(items) | {"weight": make([item["weight"] for item in items])}  # noqa: E731
    model = Captioned()
    spectrum = GradientSpectrum("fc.weight", 1, num_samples=16, method=method, num_groups=2, tail=(2, 6), head=(1, 4))
    trainer = tiny_trainer(tmp_path, max_steps=1, callbacks=[spectrum])
    trainer.fit(model, DataLoader(items, 16, collate_fn=collate))
    losses = [model.loss_of(item["x"][None], [item["caption"]], [item["weight"]]) for item in items]
    rows = torch.stack([torch.autograd.grad(loss, model.fc.weight)[0].flatten() for loss in losses]).double()
    trace, mean = rows.var(0).sum(), rows.mean(0).square().sum()
    found = {key.rpartition("/")[2]: float(value) for key, value in trainer.callback_metrics.items()}
    assert found["failed"] == 0
    assert found["grad_norm"] == pytest.approx(float(mean.sqrt()), rel=1e-4)
    assert found["noise_scale"] == pytest.approx(float(trace / (mean - trace / 16)), rel=1e-3)
    # By hooks its own gradients of samples are those of parts of the batch.
    assert found["sample_weights_ratio"] == pytest.approx(1.0, rel=1e-3)


def test_vmap_names_the_list_that_it_cannot_map_over(tmp_path: Path) -> None:
    spectrum = GradientSpectrum("fc.weight", 1, num_samples=16, method="vmap", num_groups=2, tail=(2, 6), head=(1, 4))
    trainer = tiny_trainer(tmp_path, max_steps=1, callbacks=[spectrum])
    with pytest.warns(UserWarning, match=r"the list caption of the batch is of its samples.*: use method='loop'$"):
        trainer.fit(Captioned(), DataLoader(captioned(16), 16))
    assert math.isnan(trainer.callback_metrics["gradient/fc.weight/grad_norm"])


def test_a_list_that_may_be_as_long_as_the_batch_by_chance_is_nan_with_the_remedy(tmp_path: Path) -> None:
    class Scaled(Captioned):
        def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
            return super().training_step(batch, batch_idx) * batch["betas"][0]

    collate = lambda items: default_collate(items) | {"betas": [0.9, 0.95, 0.99, 1.0]}  # noqa: E731
    spectrum = GradientSpectrum("fc.weight", 1, num_samples=4, method="loop", num_groups=1, tail=(1, 3), head=(1, 3))
    trainer = tiny_trainer(tmp_path, max_steps=1, callbacks=[spectrum])
    with pytest.warns(UserWarning, match=r"samples must say whether the list betas of 4 entries, .*: give samples"):
        trainer.fit(Scaled(), DataLoader(captioned(4), 4, collate_fn=collate))
    assert math.isnan(trainer.callback_metrics["gradient/fc.weight/grad_norm"])
