"""ActivationSpectrum in real runs: what it logs, at which steps, of which rows, against a float64 twin."""

import csv
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch import Callback, Trainer, seed_everything
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.custom_scalar.layout_pb2 import Layout
from torch.utils.data import DataLoader, IterableDataset

from lightning_spectral import ActivationSpectrum
from tests._reference import spread_samples
from tests.callbacks._reference import Recorder, layer_values
from tests.models import LENGTH, PROBES, WIDTH, Alternating, LanguageModel, Perceptron, tiny_trainer, token_loader

LAYERS = [f"network.{name}" for name in PROBES]
QUANTITIES = [
    "alpha_tail",
    "alpha_tail_stderr",
    "alpha_tail_corrected",
    "r2_tail",
    "alpha_head",
    "alpha_head_stderr",
    "rankme",
    "head_share",
    "num_tokens",
]
TRAIN_STEPS = [7, 14, 21, 28, 35]
"""Reports every 7 steps, beside Lightning's own logging every 10."""
VALIDATION_STEPS = [5, 15, 25, 35]
"""A validation every 5 steps, measured at least 7 steps apart."""


class Probe(Callback):
    """Notes every change of the spectral entries of ``callback_metrics``, as another callback would see them."""

    def __init__(self, *keys: str) -> None:
        self.keys = keys
        self.at_start: dict[str, float] = {}
        self.seen: list[tuple[int, dict[str, float]]] = []

    def look(self, trainer: Trainer) -> None:
        values = {key: float(trainer.callback_metrics[key]) for key in self.keys}
        if not self.seen or not np.array_equal(list(values.values()), list(self.seen[-1][1].values()), equal_nan=True):
            self.seen.append((trainer.global_step, values))

    def on_train_start(self, trainer: Trainer, *_: Any) -> None:
        self.look(trainer)

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        self.look(trainer)

    def on_validation_end(self, trainer: Trainer, *_: Any) -> None:
        if not trainer.sanity_checking:
            self.look(trainer)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """35 steps with a callback for each stage: its events, its CSV file, its printed table and all outputs recorded."""
    folder = tmp_path_factory.mktemp("run")
    seed_everything(0, verbose=False)
    recorder = Recorder()
    probes = {
        "": Probe("activation/network.blocks.0/alpha_tail"),
        "val/": Probe("val/activation/network.blocks.0/alpha_tail"),
    }
    spectra = [
        ActivationSpectrum(every_n_steps=7, num_tokens=192),
        ActivationSpectrum(every_n_steps=7, num_tokens=200, stage="validate", prefix="val/"),
    ]
    trainer = tiny_trainer(
        folder,
        max_steps=35,
        val_check_interval=5,
        check_val_every_n_epoch=None,
        log_every_n_steps=10,
        logger=[TensorBoardLogger(folder, "tb", ""), CSVLogger(folder, "csv", "")],
        callbacks=[recorder, *spectra, *probes.values()],
    )
    trainer.fit(LanguageModel(), token_loader(batch_size=8), token_loader(40, batch_size=8, seed=1))
    events = EventAccumulator(
        str(folder / "tb"), size_guidance={"scalars": 0, "histograms": 0, "images": 0, "tensors": 0}
    )
    events.Reload()
    metrics = {key: float(value) for key, value in trainer.callback_metrics.items()}
    with (folder / "csv" / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    return SimpleNamespace(events=events, csv=rows, metrics=metrics, recorder=recorder, probes=probes)


def keys_of(prefix: str) -> set[str]:
    keys = {f"{prefix}activation/{layer}/{quantity}" for layer in LAYERS for quantity in QUANTITIES}
    return keys | {f"{prefix}activation/failed", f"{prefix}spectral/seconds"}


def test_keys_are_those_of_the_contract(run: SimpleNamespace) -> None:
    expected = keys_of("") | keys_of("val/")
    for held in (run.events.Tags()["scalars"], run.metrics, run.csv[0]):
        assert {key for key in held if "activation" in key or "spectral" in key} == expected


# Step s of the 8 samples a batch: the batch that begins at global step s - 1. 192 rows are three steps of 64.
@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("step", TRAIN_STEPS)
def test_training_values_are_those_of_the_last_steps(run: SimpleNamespace, step: int, layer: str) -> None:
    samples = run.recorder.samples(layer, "train", [step - 3, step - 2, step - 1])
    assert_values(run, "", step, layer, layer_values(samples))


# Of the 40 samples, in five batches, 25 have 200 rows.
@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("step", VALIDATION_STEPS)
def test_validation_values_are_those_of_rows_spread_over_the_pass(run: SimpleNamespace, step: int, layer: str) -> None:
    samples = run.recorder.samples(layer, "validate", [step])
    assert len(samples) == 40
    assert_values(run, "val/", step, layer, layer_values(spread_samples(samples, 200)))


def assert_values(run: SimpleNamespace, prefix: str, step: int, layer: str, expected: dict[str, float]) -> None:
    found = {
        quantity: {event.step: event.value for event in run.events.Scalars(f"{prefix}activation/{layer}/{quantity}")}[
            step
        ]
        for quantity in QUANTITIES
    }
    assert found["num_tokens"] == expected["num_tokens"]
    assert found == pytest.approx(expected, rel=1e-4, abs=1e-5)


@pytest.mark.parametrize(
    ("prefix", "steps"), [("", TRAIN_STEPS), ("val/", VALIDATION_STEPS)], ids=["train", "validate"]
)
def test_no_report_is_lost_or_lands_on_another_step(run: SimpleNamespace, prefix: str, steps: list[int]) -> None:
    for key in keys_of(prefix):
        assert [event.step for event in run.events.Scalars(key)] == steps, key
        assert [int(row["step"]) for row in run.csv if row[key]] == steps, key
    for layer in LAYERS:
        histograms = run.events.Histograms(f"{prefix}activation/{layer}/log10_eigenvalues")
        assert [event.step for event in histograms] == steps
        assert {sum(event.histogram_value.bucket) for event in histograms} == {WIDTH}
    assert [step for step, _ in run.probes[prefix].seen] == [0, *steps]


@pytest.mark.parametrize("prefix", ["", "val/"], ids=["train", "validate"])
def test_other_callbacks_see_nan_and_then_what_is_logged(run: SimpleNamespace, prefix: str) -> None:
    key = f"{prefix}activation/network.blocks.0/alpha_tail"
    (_, first), *later = run.probes[prefix].seen
    assert np.isnan(first[key])
    logged = [event.value for event in run.events.Scalars(key)]
    np.testing.assert_allclose([values[key] for _, values in later], logged, rtol=1e-6)


def test_histogram_counts_eigenvalues_between_its_edges(run: SimpleNamespace) -> None:
    samples = run.recorder.samples("network.blocks.0", "train", [32, 33, 34])
    rows = np.concatenate(samples)
    rows = rows / np.sqrt((rows**2).mean(-1, keepdims=True) + 1e-6)
    logs = np.log10(np.linalg.eigvalsh(np.cov(rows, rowvar=False)))
    (*_, last) = run.events.Histograms("activation/network.blocks.0/log10_eigenvalues")
    edges = np.array(last.histogram_value.bucket_limit)
    counts = [np.sum((logs <= right) & (logs > left)) for left, right in zip([-np.inf, *edges], edges, strict=False)]
    assert counts == list(last.histogram_value.bucket)


def test_figures_are_drawn_at_reports_1_2_4_and_the_last(run: SimpleNamespace) -> None:
    assert [event.step for event in run.events.Images("activation/spectra")] == [7, 14, 28, 35]
    assert [event.step for event in run.events.Images("val/activation/spectra")] == [5, 15, 35]


def test_one_layout_holds_the_charts_of_both_callbacks(run: SimpleNamespace) -> None:
    # The last layout written is the one that TensorBoard shows.
    content = run.events.Tensors("custom_scalars__config__")[-1].tensor_proto.string_val[0]
    overview, *others = Layout.FromString(content).category
    assert overview.title == "overview"
    charts = {chart.title: list(chart.multiline.tag) for category in others for chart in category.chart}
    shown = ("alpha_tail", "alpha_tail_corrected", "alpha_head", "rankme", "head_share")
    assert set(charts) == {f"{prefix}activation/{quantity}" for prefix in ("", "val/") for quantity in shown}
    for prefix in ("", "val/"):
        patterns = charts[f"{prefix}activation/alpha_tail"]
        logged = [f"{prefix}activation/{layer}/alpha_tail" for layer in LAYERS]
        assert [[key for key in run.events.Tags()["scalars"] if re.search(p, key)] for p in patterns] == [
            [key] for key in logged
        ]


def fit(
    folder: Path, *callbacks: Callback, model: LanguageModel | None = None, validate: bool = False, **kwargs: Any
) -> Trainer:
    seed_everything(0, verbose=False)
    defaults = {"max_steps": 12, "limit_val_batches": 2 if validate else 0}
    trainer = tiny_trainer(folder, callbacks=list(callbacks), **(defaults | kwargs))
    trainer.fit(LanguageModel() if model is None else model, token_loader(), token_loader(16, seed=1))
    return trainer


class Reports(ActivationSpectrum):
    """Keeps the reports it is given."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.reports: dict[int, Any] = {}

    def measured(self, report):
        values = super().measured(report)
        assert report.step not in self.reports
        self.reports[report.step] = values
        self.said = self.rows_in_words()
        return values

    def row_counts(self) -> dict[int, float]:
        (name, *_) = self.names or ["network.blocks.0"]
        return {step: values[f"activation/{name}/num_tokens"] for step, values in self.reports.items()}


def test_accumulated_micro_batches_belong_to_one_step(tmp_path: Path) -> None:
    spectrum, recorder = Reports(every_n_steps=4, num_tokens=192, layers="*.blocks.3"), Recorder()
    fit(tmp_path, recorder, spectrum, max_steps=10, accumulate_grad_batches=3)
    # Three micro-batches of 4 x 8 rows make a step; 64 samples are 16 micro-batches, the last step of an epoch has one.
    assert list(spectrum.reports) == [4, 8]
    for step in (4, 8):
        samples = recorder.samples("network.blocks.3", "train", [step - 2, step - 1])
        expected = {f"activation/network.blocks.3/{q}": value for q, value in layer_values(samples).items()}
        assert spectrum.reports[step] == pytest.approx(expected, rel=1e-4)


def test_two_optimizers_move_the_step_by_two(tmp_path: Path) -> None:
    spectrum, recorder = Reports(every_n_steps=3, num_tokens=64, layers="*.blocks.3"), Recorder()
    fit(tmp_path, recorder, spectrum, model=Alternating(), max_steps=14)
    assert list(spectrum.reports) == [4, 6, 10, 12]
    for step in (4, 6, 10, 12):
        # One batch is two forwards, of 4 x 8 rows each; the second begins one step later. Its samples are the same.
        forwards = (recorder.samples("network.blocks.3", "train", [before]) for before in (step - 2, step - 1))
        samples = [np.concatenate(pair) for pair in zip(*forwards, strict=True)]
        expected = {f"activation/network.blocks.3/{q}": value for q, value in layer_values(samples).items()}
        assert spectrum.reports[step] == pytest.approx(expected, rel=1e-4)


def test_window_follows_the_mask(tmp_path: Path) -> None:
    class Padded(LanguageModel):
        """Half of each sequence is padding."""

        def on_before_batch_transfer(self, batch, dataloader_idx):
            return batch | {"mask": torch.arange(LENGTH).expand_as(batch["input_ids"]) < LENGTH // 2}

    spectrum = Reports(every_n_steps=6, num_tokens=64, mask="mask")
    fit(tmp_path, spectrum, model=Padded(), max_steps=6)
    # 16 real rows a step: four steps, not the two that hold 64 rows of any kind.
    assert spectrum.row_counts() == {6: 64}


@pytest.mark.parametrize("every_n_steps", [1, 3])
def test_trainer_validate_is_always_measured(tmp_path: Path, every_n_steps: int) -> None:
    spectrum, recorder = Reports(stage="validate", every_n_steps=every_n_steps, num_tokens=10**6), Recorder()
    trainer = tiny_trainer(tmp_path, callbacks=[recorder, spectrum])
    model = LanguageModel()
    for _ in range(2):
        trainer.validate(model, token_loader(24, seed=1), verbose=False)
        values = {key: float(value) for key, value in trainer.callback_metrics.items() if key in spectrum.reports[0]}
        assert values == pytest.approx(spectrum.reports.pop(0))
    expected = layer_values(recorder.samples(LAYERS[0], "validate", [0])[:24])
    assert {q: values[f"activation/{LAYERS[0]}/{q}"] for q in expected} == pytest.approx(expected, rel=1e-4)
    assert all(len(module._forward_hooks) == 0 for module in model.modules())


class Stream(IterableDataset):
    """Samples of a loader without a length."""

    def __init__(self, samples) -> None:
        self.samples = samples

    def __iter__(self):
        return (self.samples[index] for index in range(len(self.samples)))


@pytest.mark.parametrize("limit", [1.0, 5], ids=["without a length", "limited"])
def test_a_stream_is_read_spread_where_its_length_is_known(tmp_path: Path, limit: float) -> None:
    """Else the first rows are, and groups are of equal length all the same; the heading of the table says which."""
    spectrum, recorder = Reports(stage="validate", num_tokens=80, tail=(1, 4), layers="*.blocks.0"), Recorder()
    trainer = tiny_trainer(tmp_path, callbacks=[recorder, spectrum], limit_val_batches=limit)
    stream = DataLoader(Stream(token_loader(40, seed=1).dataset), batch_size=8)
    trainer.validate(LanguageModel(), stream, verbose=False)
    seen = recorder.samples("network.blocks.0", "validate", [0])
    assert len(seen) == 40
    read = spread_samples(seen, 80) if limit == 5 else seen[:10]
    assert spectrum.reports[0]["activation/network.blocks.0/rankme"] == pytest.approx(
        layer_values(read)["rankme"], rel=1e-5
    )
    words = "spread over 5 batches" if limit == 5 else "the first of a pass whose length is not known"
    assert spectrum.said.endswith(f"channels, {words}")


def test_fit_and_validate_with_one_trainer(tmp_path: Path) -> None:
    spectrum = Reports(stage="validate", every_n_steps=100)
    trainer = fit(tmp_path, spectrum, validate=True, val_check_interval=4)
    assert list(spectrum.reports) == [4]
    trainer.validate(trainer.lightning_module, token_loader(16), verbose=False)
    assert list(spectrum.reports) == [4, 12]


def test_sanity_check_is_not_measured(tmp_path: Path) -> None:
    spectrum = Reports(stage="validate", every_n_steps=1, num_tokens=10**6)
    fit(tmp_path, spectrum, validate=True, val_check_interval=6, num_sanity_val_steps=2)
    assert spectrum.row_counts() == {6: 64, 12: 64}


def test_one_of_several_validation_loaders_is_read(tmp_path: Path) -> None:
    first, second = (
        Reports(stage="validate", every_n_steps=1, num_tokens=10**6, dataloader_idx=i, prefix=f"{i}/") for i in (0, 1)
    )
    loaders = [token_loader(8, seed=1), token_loader(24, batch_size=2, seed=2)]
    trainer = tiny_trainer(tmp_path, callbacks=[first, second], max_steps=4, val_check_interval=4)
    trainer.fit(LanguageModel(), token_loader(), loaders)
    assert first.row_counts() == {4: 8 * LENGTH}
    assert second.row_counts() == {4: 24 * LENGTH}


def test_validation_that_will_not_run_is_warned_of(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="no validation will run.*use stage='train'"):
        fit(tmp_path, ActivationSpectrum(stage="validate"), max_steps=1)


def test_validation_that_never_came_is_warned_of(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="made no report.*every_n_steps=100: validate more often"):
        fit(tmp_path, ActivationSpectrum(stage="validate"), validate=True, max_steps=3, val_check_interval=4)


def test_logger_without_histograms_is_warned_of_once(tmp_path: Path) -> None:
    spectra = [ActivationSpectrum(every_n_steps=2, prefix=prefix) for prefix in ("a/", "b/")]
    with pytest.warns(
        UserWarning, match="histograms and figures into TensorBoard, W&B, .* only.*TensorBoardLogger"
    ) as caught:
        fit(tmp_path, *spectra, logger=CSVLogger(tmp_path), max_steps=4)
    assert len([warning for warning in caught if "histograms" in str(warning.message)]) == 1


def test_fast_dev_run_and_no_logger(tmp_path: Path) -> None:
    for kwargs in ({"fast_dev_run": 2}, {"logger": False, "max_steps": 2}):
        spectrum = Reports(every_n_steps=1, num_groups=1)
        fit(tmp_path, spectrum, validate=True, **kwargs)
        assert list(spectrum.reports) == [1, 2]


def test_table_shows_the_first_report_and_the_last(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    spectrum = Reports(every_n_steps=5, num_tokens=64, layers="*.blocks.[03]", prefix="mine/")
    fit(tmp_path, spectrum)
    lines = capsys.readouterr().out.splitlines()
    assert "mine/activation spectra, train" in lines[0]
    cells = [line.split() for line in lines if " +/- " in line]
    assert [row[0] for row in cells if len(row) == 10] == ["network.blocks.0", "network.blocks.3"]
    assert [int(row[-9]) for row in cells] == [5, 10, 5, 10]
    alphas = [spectrum.reports[step][f"activation/network.blocks.{i}/alpha_tail"] for i in (0, 3) for step in (5, 10)]
    assert [float(row[-8]) for row in cells] == pytest.approx(alphas, abs=6e-4)


def test_one_group_has_no_error_bar_and_no_complaint(tmp_path: Path) -> None:
    spectrum = Reports(every_n_steps=2, num_groups=1, layers="*.blocks.0")
    fit(tmp_path, spectrum, max_steps=2)
    values = spectrum.reports[2]
    missing = {key.rpartition("/")[2] for key, value in values.items() if np.isnan(value)}
    assert missing == {"alpha_tail_stderr", "alpha_tail_corrected", "alpha_head_stderr"}


def test_too_few_groups_have_no_error_bar_and_a_reason(tmp_path: Path) -> None:
    spectrum = Reports(every_n_steps=2, num_groups=8, num_tokens=32, layers="*.blocks.0")
    with pytest.warns(UserWarning, match="NaN, because no error bar: a group of samples received no rows"):
        fit(tmp_path, spectrum, max_steps=2)
    assert np.isnan(spectrum.reports[2]["activation/network.blocks.0/alpha_tail_stderr"])
    assert np.isfinite(spectrum.reports[2]["activation/network.blocks.0/alpha_tail"])


def test_layers_that_never_ran_are_nan_with_the_reason(tmp_path: Path) -> None:
    class Lazy(LanguageModel):
        def __init__(self) -> None:
            super().__init__()
            self.unused = torch.nn.Linear(2, 2)

    spectrum = Reports(layers=["unused", "*.blocks.0"], every_n_steps=2)
    with pytest.warns(UserWarning, match="at step 2, unused: NaN, because it never ran"):
        fit(tmp_path, spectrum, model=Lazy(), max_steps=5)
    assert [values["activation/unused/num_tokens"] for values in spectrum.reports.values()] == [0, 0]
    assert all(np.isfinite(values["activation/network.blocks.0/alpha_tail"]) for values in spectrum.reports.values())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"every_n_steps": 0}, "every_n_steps must be a positive int, got 0"),
        ({"every_n_steps": True}, "every_n_steps must be a positive int, got True"),
        ({"num_tokens": 1e4}, "num_tokens must be a positive int, got 10000.0"),
        ({"num_groups": -1}, "num_groups must be a positive int, got -1"),
        ({"stage": "test"}, "stage must be 'train' or 'validate', got 'test'"),
        ({"dtype": "bfloat16"}, "dtype must be 'auto', 'float32' or 'float64', got 'bfloat16'"),
        ({"layers": 3}, "layers must be None, 'all', a pattern or a list of patterns, got 3"),
        ({"layers": [0, 1]}, r"layers must be None, .*, got \[0, 1\]"),
        ({"dataloader_idx": -1}, "dataloader_idx must be an int from 0, got -1"),
        ({"tail": (0.5, 0.125)}, r"tail must be two ascending fractions in \[0, 1\], got \(0.5, 0.125\)"),
        ({"tail": (0.1, 2)}, r"tail must be two ints .* or two floats .*, got \(0.1, 2\)"),
        ({"tail": (1, 2, 3)}, r"tail must be two ranks or two fractions, got \(1, 2, 3\)"),
        ({"head": (0, 10)}, r"head must be two ascending ranks from 1, got \(0, 10\)"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_wrong_argument_is_refused_in_one_line(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}") as raised:
        ActivationSpectrum(**arguments)
    assert "\n" not in str(raised.value)


class NumBatches(Callback):
    """Counts the batches that have begun."""

    def __init__(self) -> None:
        self.train = self.validate = 0

    def on_train_batch_start(self, *_: Any) -> None:
        self.train += 1

    def on_validation_batch_start(self, *_: Any) -> None:
        self.validate += 1


@pytest.mark.parametrize("stage", ["train", "validate"])
@pytest.mark.parametrize("band", ["head", "tail"])
@pytest.mark.parametrize("sanity_steps", [0, 2])
def test_band_beyond_the_width_stops_the_first_batch(tmp_path: Path, stage: str, band: str, sanity_steps: int) -> None:
    spectrum = ActivationSpectrum(stage=stage, **{band: (30, 150)})
    count = NumBatches()
    with pytest.raises(ValueError, match=rf"^{band} must end at or before rank 32, .*, got \(30, 150\)") as raised:
        fit(tmp_path, spectrum, count, validate=True, num_sanity_val_steps=sanity_steps)
    assert "\n" not in str(raised.value)
    assert (count.train, count.validate) == ((0, 1) if sanity_steps else (1, 0))


def test_model_without_blocks_is_refused(tmp_path: Path) -> None:
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(torch.randn(8, 4), torch.randn(8, 1)), 4)
    with pytest.raises(ValueError, match=r"no stack of equal blocks in Perceptron"):
        tiny_trainer(tmp_path, max_steps=1, callbacks=[ActivationSpectrum()]).fit(Perceptron(), loader)


def test_rows_may_be_whole_samples(tmp_path: Path) -> None:
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(torch.randn(64, 4), torch.randn(64, 1)), 16)
    spectrum = Reports(layers="net.2", every_n_steps=2, num_tokens=20, num_groups=1)
    tiny_trainer(tmp_path, max_steps=4, callbacks=[spectrum]).fit(Perceptron(), loader)
    assert [values["activation/net.2/num_tokens"] for values in spectrum.reports.values()] == [20, 20]


def test_narrow_layer_has_no_default_head(tmp_path: Path) -> None:
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(torch.randn(64, 4), torch.randn(64, 1)), 16)
    narrow = Perceptron()
    narrow.net[2] = torch.nn.Linear(24, 8)
    narrow.net[4] = torch.nn.Linear(8, 1)
    spectrum = Reports(layers="net.2", every_n_steps=4)
    with pytest.warns(UserWarning, match="head|rank 8"):
        tiny_trainer(tmp_path, max_steps=4, callbacks=[spectrum]).fit(narrow, loader)
    (values,) = spectrum.reports.values()
    assert np.isnan(values["activation/net.2/alpha_head"])
    assert values["activation/net.2/head_share"] == pytest.approx(1)
    assert np.isfinite(values["activation/net.2/alpha_tail"])
