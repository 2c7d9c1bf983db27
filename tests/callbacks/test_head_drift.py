"""HeadDrift in real runs: rotations that are known, rows that do not drift, references, floors, resuming."""

import json
import math
import re
import warnings
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.linalg
import torch
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from lightning.pytorch.loggers import TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.custom_scalar.layout_pb2 import Layout
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from lightning_spectral import ActivationSpectrum, HeadDrift, Run
from lightning_spectral.functional import js_divergence
from lightning_spectral.measurement import Report
from tests.distributed import run_distributed
from tests.models import PROBES, LanguageModel, Network, tiny_trainer, token_loader

LAYERS = [f"network.{name}" for name in PROBES]
DISTANCES = ("overlap", "max_angle", "js")
QUANTITIES = [quantity + suffix for quantity in DISTANCES for suffix in ("", "_floor")]


class Kept(HeadDrift):
    """Keeps reports and what it logs, by step."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**{"rank": 4, "every_n_steps": 4, "num_tokens": 512, **kwargs})
        self.logged: dict[int, dict[str, float]] = {}
        self.reports: list[Report] = []

    def measured(self, report: Report) -> dict[str, float]:
        self.reports.append(report)
        self.logged[report.step] = values = super().measured(report)
        return values

    def values(self, quantity: str, layer: str = LAYERS[0]) -> list[float]:
        return [values[f"drift/{layer}/{quantity}"] for values in self.logged.values()]


def fit(folder: Path, *callbacks: Callback, ckpt_path: Any = None, model: LightningModule | None = None, **kwargs: Any):
    """Twelve steps with a validation after every fourth."""
    seed_everything(0, verbose=False)
    defaults = {"max_steps": 12, "val_check_interval": 4, "limit_val_batches": 16}
    trainer = tiny_trainer(folder, callbacks=list(callbacks), **(defaults | kwargs))
    model = LanguageModel() if model is None else model
    trainer.fit(model, token_loader(48), token_loader(64, seed=1), ckpt_path=ckpt_path)
    return trainer


def expected_distances(layer: Any, reference: Any, rank: int = 4) -> list[float]:
    angles = scipy.linalg.subspace_angles(layer.vectors.numpy(), reference.vectors.numpy())
    js = js_divergence(layer.values, reference.values)
    return [float(np.mean(np.cos(angles) ** 2)), float(angles[0]), float(js)]


def test_keys_charts_and_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    drift = Kept(prefix="a/")
    trainer = fit(tmp_path, drift, logger=TensorBoardLogger(tmp_path, "tb", ""))
    keys = {f"a/drift/{layer}/{quantity}" for layer in LAYERS for quantity in QUANTITIES} | {"a/drift/failed"}
    assert {key for key in trainer.callback_metrics if "drift" in key} == keys
    events = EventAccumulator(str(tmp_path / "tb")).Reload()
    assert {key for key in events.Tags()["scalars"] if "drift" in key} == keys
    for key in keys - {"a/drift/failed"}:
        logged = {event.step: event.value for event in events.Scalars(key)}
        expected = {step: values[key.removeprefix("a/")] for step, values in drift.logged.items()}
        assert logged == pytest.approx(expected)
    assert [event.value for event in events.Scalars("a/drift/failed")] == [0, 0, 0]
    content = events.Tensors("custom_scalars__config__")[-1].tensor_proto.string_val[0]
    (charts,) = (
        {chart.title: list(chart.multiline.tag) for chart in category.chart}
        for category in Layout.FromString(content).category
        if category.title == "head drift"
    )
    # Floors stand apart: beside drifts they would pass for them.
    assert set(charts) == {f"a/drift/{quantity}" for quantity in QUANTITIES}
    for quantity in QUANTITIES:
        found = [key for pattern in charts[f"a/drift/{quantity}"] for key in sorted(keys) if re.search(pattern, key)]
        assert found == [f"a/drift/{layer}/{quantity}" for layer in LAYERS]
    printed = capsys.readouterr().out
    assert "a/drift of 4 leading eigenvectors from the first report, validate" in printed
    assert f"{drift.values('overlap')[-1]:.4f}" in printed
    assert f"{drift.values('js_floor')[0]:.6f}" in printed


@pytest.mark.parametrize("reference", ["first", "previous"])
def test_each_report_is_compared_with_its_reference(tmp_path: Path, reference: str) -> None:
    drift = Kept(reference=reference)
    fit(tmp_path, drift)
    assert list(drift.logged) == [4, 8, 12]
    for name in LAYERS:
        layers = [report.spectra["activation"][name] for report in drift.reports]
        for index, (layer, values) in enumerate(zip(layers, drift.logged.values(), strict=True)):
            found = [values[f"drift/{name}/{distance}"] for distance in DISTANCES]
            if index:
                base = layers[0] if reference == "first" else layers[index - 1]
                assert found == pytest.approx(expected_distances(layer, base), rel=1e-9, abs=1e-14)
            else:
                assert found == pytest.approx([1, 0, 0] if reference == "first" else [math.nan] * 3, nan_ok=True)
            assert all(math.isfinite(values[f"drift/{name}/{distance}_floor"]) for distance in DISTANCES)


def test_one_set_of_hooks_and_one_solve_of_each_matrix(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[str, torch.Size]] = []
    for name in ("eigvalsh", "eigh"):
        solver = getattr(torch.linalg, name)
        monkeypatch.setattr(torch.linalg, name, lambda x, n=name, s=solver: (calls.append((n, x.shape)), s(x))[1])

    class CountHooks(Callback):
        def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
            self.num_hooks = sum(len(module._forward_hooks) for module in pl_module.modules())

    class Spectra(ActivationSpectrum):
        logged: dict[int, dict[str, float]]

        def measured(self, report: Report) -> dict[str, float]:
            return self.logged.setdefault(report.step, super().measured(report))

    alone, beside, count = (
        *(Spectra(every_n_steps=4, stage="validate", num_tokens=512) for _ in range(2)),
        CountHooks(),
    )
    alone.logged, beside.logged = {}, {}
    fit(tmp_path, alone)
    calls.clear()
    # The larger rank is measured, and each takes its own share.
    drift, other = Kept(), Kept(rank=6, prefix="six/")
    fit(tmp_path, beside, drift, other, count)
    assert count.num_hooks == 5
    assert calls == [("eigh", (1, 32, 32))] * 5 * 5 * 3
    assert drift.reports == other.reports
    for step, values in alone.logged.items():
        assert beside.logged[step] == pytest.approx(values, rel=1e-9)
    single = Kept()
    fit(tmp_path, single)
    for step, values in single.logged.items():
        assert drift.logged[step] == pytest.approx(values, rel=1e-6)


WIDTH, RANK = 8, 3


class Rows(Dataset):
    """Sequences of rows with a steep spectrum: others at every pass, or twice all signs in some order.

    All signs together have a covariance that is exactly diagonal, with RMSNorm or without.
    """

    def __init__(self, num_samples: int, is_fresh: bool) -> None:
        self.num_samples = num_samples
        self.is_fresh = is_fresh
        self.generator = torch.Generator().manual_seed(0)
        self.spread = 2.0 ** -torch.arange(WIDTH)
        signs = torch.cartesian_prod(*[torch.tensor([-1.0, 1.0])] * WIDTH).repeat(2, 1)
        self.signs = signs[torch.randperm(len(signs), generator=self.generator)].unflatten(0, (-1, 8))

    def __len__(self) -> int:
        return self.num_samples

    def __getitem__(self, index: int) -> Tensor:
        rows = torch.randn(8, WIDTH, generator=self.generator) if self.is_fresh else self.signs[index]
        return rows * self.spread


class Turn(nn.Module):
    """Turns the last of the leading directions out of their span."""

    def __init__(self) -> None:
        super().__init__()
        self.angle = 0.0

    def forward(self, x: Tensor) -> Tensor:
        turn = torch.eye(WIDTH)
        turn[RANK - 1, RANK - 1] = turn[6, 6] = math.cos(self.angle)
        turn[RANK - 1, 6] = math.sin(self.angle)
        turn[6, RANK - 1] = -turn[RANK - 1, 6]
        return x @ turn


class Turning(LightningModule):
    """A layer that turns by so much a step; what is learned does not matter."""

    def __init__(self, angle: float = 0.0) -> None:
        super().__init__()
        self.angle = angle
        self.layer = Turn()
        self.scale = nn.Parameter(torch.ones(()))

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return (self.scale * self.layer(batch)).square().mean()

    def on_validation_start(self) -> None:
        self.layer.angle = self.angle * self.global_step

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        self.layer(batch)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 1e-3)


def turn(folder: Path, drift: HeadDrift, angle: float, is_fresh: bool, num_samples: int, **kwargs: Any) -> None:
    trainer = tiny_trainer(folder, callbacks=[drift], val_check_interval=1, num_sanity_val_steps=0, **kwargs)
    rows = [Rows(num, is_fresh) for num in (kwargs["max_steps"], num_samples)]
    trainer.fit(Turning(angle), *(DataLoader(part, batch_size=size) for part, size in zip(rows, (1, 32), strict=True)))


@pytest.mark.parametrize("normalize", [False, True])
def test_rows_that_turn_by_an_angle_have_that_angle(tmp_path: Path, normalize: bool) -> None:
    drift = Kept(layers="layer", rank=RANK, every_n_steps=1, dtype="float64", normalize=normalize)
    turn(tmp_path, drift, 0.05, is_fresh=False, num_samples=64, max_steps=6)
    # The first report, at step 1, is the reference. Rotations leave norms, and so the normalised spectrum, as they are.
    angles = 0.05 * np.arange(6)
    np.testing.assert_allclose(drift.values("max_angle", "layer"), angles, atol=1e-6)
    np.testing.assert_allclose(drift.values("overlap", "layer"), (2 + np.cos(angles) ** 2) / 3, atol=1e-6)
    np.testing.assert_allclose(drift.values("js", "layer"), 0, atol=1e-9)
    # Of the same rows: other rows would show the very same turn, and nothing of it is within the floor.
    for report in range(1, 6):
        assert drift.values("max_angle_floor", "layer")[report] < 1e-6
        assert drift.values("overlap_floor", "layer")[report] == pytest.approx(1, abs=1e-9)


@pytest.mark.parametrize("num_groups", [2, 4])
def test_fresh_rows_of_one_process_stay_within_the_floors(tmp_path: Path, num_groups: int) -> None:
    drift = Kept(layers="layer", rank=RANK, reference="previous", every_n_steps=1, num_groups=num_groups)
    turn(tmp_path, drift, 0.0, is_fresh=True, num_samples=64, max_steps=61)
    overlaps, angles, divergences = (np.array(drift.values(name, "layer"))[1:] for name in DISTANCES)
    floors = {name: np.array(drift.values(f"{name}_floor", "layer"))[1:] for name in DISTANCES}
    assert len(overlaps) == 60
    assert np.mean(overlaps >= floors["overlap"]) >= 0.95
    assert np.mean(angles <= floors["max_angle"]) >= 0.95
    assert np.mean(divergences <= floors["js"]) >= 0.95
    # And the floors are worth something: the rows are few, and yet no angle is free.
    assert np.median(floors["max_angle"]) < 0.6
    assert np.median(floors["overlap"]) > 0.9


class SaveEveryValidation(Callback):
    """Saves after each epoch's validation, without a state of its own."""

    def on_train_epoch_end(self, trainer: Trainer, *_: Any) -> None:
        trainer.save_checkpoint(Path(trainer.default_root_dir) / f"step={trainer.global_step}.ckpt")


@pytest.mark.parametrize("reference", ["first", "previous"])
def test_resumed_run_reports_the_very_same_values(tmp_path: Path, reference: str) -> None:
    epochs: dict[str, Any] = {"max_steps": 16, "limit_train_batches": 4}
    whole, again = Kept(reference=reference), Kept(reference=reference)
    fit(tmp_path, whole, SaveEveryValidation(), **epochs)
    path = tmp_path / "step=8.ckpt"
    fit(tmp_path / "again", again, ckpt_path=path, **epochs)
    assert again.logged == {step: whole.logged[step] for step in (12, 16)}
    states = torch.load(path, weights_only=True)["callbacks"]
    (summary,) = (state["summary"] for key, state in states.items() if key.startswith("Kept"))
    basis = summary["bases"][LAYERS[0]]
    assert {name: basis[name].shape for name in ("values", "leave_one_out", "vectors", "leave_one_out_vectors")} == {
        "values": (32,),
        "leave_one_out": (4, 32),
        "vectors": (32, 4),
        "leave_one_out_vectors": (4, 32, 4),
    }
    assert basis["count"] == 512
    parts = [part for part in basis.values() if isinstance(part, Tensor)]
    assert {part.dtype for part in parts} == {torch.float64}
    # No more than these: parts of the report's tensors would bring all of the report along.
    assert [part.untyped_storage().nbytes() for part in parts] == [8 * part.numel() for part in parts]
    assert str(again.display.state()) == str(whole.display.state())  # NaN is not equal to itself


def test_second_fit_has_a_reference_of_its_own(tmp_path: Path) -> None:
    drift = Kept()
    fit(tmp_path, drift)
    fit(tmp_path, drift, model=LanguageModel(Network(16)))
    assert drift.values("overlap")[0] == 1
    assert drift._bases[LAYERS[0]].vectors.shape == (16, 4)


def test_rank_beyond_the_width_is_refused_in_the_first_batch(tmp_path: Path) -> None:
    message = r"^rank must be at most 32, the width of network.blocks.0, got 33: lower it$"
    with pytest.raises(ValueError, match=message):
        fit(tmp_path, HeadDrift(rank=33))


def test_rank_beyond_the_positive_eigenvalues_has_no_angle(tmp_path: Path) -> None:
    drift = Kept(layers="*.blocks.0", rank=10, num_tokens=8)
    reason = "rank 10 needs as many positive eigenvalues, and there are 7: lower it"
    with (
        pytest.warns(UserWarning, match=f"overlap and angle are NaN, because {reason}") as first,
        # One sequence of 8 rows leaves the other groups empty.
        pytest.warns(UserWarning, match="no floors, because not every group of samples received rows") as second,
    ):
        fit(tmp_path, drift, limit_val_batches=1)
    messages = {str(warning.message) for warning in (*first, *second)}
    assert sum(message.startswith("Kept ") for message in messages) == 2  # at the first report alone
    for quantity in ("overlap", "overlap_floor", "max_angle", "max_angle_floor", "js_floor"):
        assert np.isnan(drift.values(quantity)).all()
    assert np.isfinite(drift.values("js")).all()


def test_one_group_has_no_floors_and_no_warning(tmp_path: Path) -> None:
    drift = Kept(num_groups=1)
    fit(tmp_path, drift)
    assert all(np.isnan(drift.values(f"{distance}_floor")).all() for distance in DISTANCES)
    assert all(np.isfinite(drift.values(distance)).all() for distance in DISTANCES)


class Spoilt(LanguageModel):
    """The third block puts out NaN in the validation at one step."""

    def __init__(self, step: int) -> None:
        super().__init__()
        self.step = step

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int, dataloader_idx: int = 0) -> None:
        super().validation_step(batch, batch_idx)
        if self.global_step == self.step:
            self.network.blocks[2](torch.full((1, 8, 32), torch.nan))


@pytest.mark.parametrize("reference", ["first", "previous"])
@pytest.mark.parametrize("step", [4, 8])
def test_failed_measurement_is_no_reference(tmp_path: Path, reference: str, step: int) -> None:
    drift = Kept(reference=reference, num_tokens=10**6)
    with pytest.warns(UserWarning, match=f"at step {step}, network.blocks.2: NaN, because the rows hold NaN"):
        trainer = fit(tmp_path, drift, model=Spoilt(step))
    spoilt = [math.isnan(x) for x in drift.values("js_floor", "network.blocks.2")]
    assert spoilt == [step == 4, step == 8, False]
    known = [math.isfinite(x) for x in drift.values("overlap", "network.blocks.2")]
    begins = {"first": [1, 0, 1], "previous": [0, 0, 1]}[reference] if step == 8 else [0, reference == "first", 1]
    assert known == [bool(x) for x in begins]
    assert all(math.isfinite(x) for x in drift.values("overlap")[1:])
    assert float(trainer.callback_metrics["drift/failed"]) == 1
    if step == 8:
        layers = [report.spectra["activation"]["network.blocks.2"] for report in drift.reports]
        found = [drift.values(distance, "network.blocks.2")[2] for distance in DISTANCES]
        assert found == pytest.approx(expected_distances(layers[2], layers[0]), rel=1e-9)


def test_fewer_rows_than_the_reference_are_warned_of(tmp_path: Path) -> None:
    class Fewer(LanguageModel):
        def validation_step(self, batch: dict[str, Tensor], batch_idx: int, dataloader_idx: int = 0) -> None:
            if self.global_step < 8 or batch_idx % 2:
                super().validation_step(batch, batch_idx)

    with pytest.warns(UserWarning, match="at step 8, network.blocks.0: compares 256 rows with 512, and fewer rows"):
        fit(tmp_path, Kept(), model=Fewer())


def test_a_recorded_run_is_compared_at_the_nearest_tokens(tmp_path: Path) -> None:
    other = LanguageModel()
    recorded = Kept(every_n_steps=3, rank=6)
    fit(tmp_path / "one", recorded, model=other, val_check_interval=3)
    drift = Kept(reference=str(tmp_path / "one"))
    fit(tmp_path / "two", drift)
    # Its reports are at steps 3, 6, 9 and 12, of equally many tokens each; those of steps 4, 8 and 12 are nearest to:
    for step, report, nearest in zip((4, 8, 12), drift.reports, (0, 2, 3), strict=True):
        for layer in LAYERS:
            found, reference = (one.spectra["activation"][layer] for one in (report, recorded.reports[nearest]))
            expected = expected_distances(found, replace(reference, vectors=reference.vectors[:, :4]), rank=4)
            logged = [drift.logged[step][f"drift/{layer}/{distance}"] for distance in DISTANCES]
            np.testing.assert_allclose(logged, expected, rtol=1e-6, atol=1e-12)
    assert drift.title().startswith("drift of 4 leading eigenvectors from /")
    assert Run(tmp_path / "two").settings("activation")["rank"] == 4


def test_a_run_of_the_same_initialisation_and_order_has_not_drifted(tmp_path: Path) -> None:
    fit(tmp_path / "one", Kept())
    drift = Kept(reference=str(tmp_path / "one"))
    fit(tmp_path / "two", drift)
    assert drift.values("js") == [0.0] * 3
    np.testing.assert_allclose(drift.values("overlap"), 1.0)


def standing(folder: Path, drift: Kept, *loaders: DataLoader, **kwargs: Any) -> list[float]:
    """Overlaps of a run whose weights stand still, validated on some data."""

    class Standing(LanguageModel):
        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), 0.0)

    seed_everything(0, verbose=False)
    trainer = tiny_trainer(folder, callbacks=[drift], **({"max_steps": 8, "val_check_interval": 4} | kwargs))
    trainer.fit(Standing(), token_loader(48), list(loaders))
    return drift.values("overlap")


def test_a_run_that_was_validated_on_other_data_is_no_reference(tmp_path: Path) -> None:
    """Weights stand still: whatever drift there would be is that of the data."""
    this, other = token_loader(64, seed=1), token_loader(64, seed=2)
    standing(tmp_path / "one", Kept(), this)
    one = str(tmp_path / "one")
    assert standing(tmp_path / "same", Kept(reference=one), this) == pytest.approx([1.0, 1.0])
    drift = Kept(reference=one)
    reason = (
        r"^Kept at step 4: NaN, because reference must have been validated on the data of this run, got Run\(.*one'\): "
        r"validate both on the same samples in the same order, or give reference='first'$"
    )
    with pytest.warns(UserWarning, match=reason) as caught:
        standing(tmp_path / "other", drift, other)
    assert sum(str(one.message).startswith("Kept ") for one in caught) == 1
    for distance in DISTANCES:
        assert np.isnan(drift.values(distance)).all()
        assert np.isfinite(drift.values(f"{distance}_floor")).all()  # that of its own rows
    assert math.isnan(drift.headline()["turned_beyond_floor"])
    assert Run(tmp_path / "other").advice == []
    assert drift.num_failed == 0


def test_what_does_not_tell_of_other_data_is_a_reference(tmp_path: Path) -> None:
    this, other = token_loader(64, seed=1), token_loader(64, seed=2)
    one = str(tmp_path / "one")
    standing(tmp_path / "one", Kept(), this)
    # A limit leaves eight samples, of which the fingerprint is another.
    few = Kept(reference=one, num_tokens=64)
    with pytest.warns(UserWarning, match="compares 64 rows with 512, and fewer rows"):
        standing(tmp_path / "few", few, this, limit_val_batches=2)
    assert np.isfinite(few.values("overlap")).all()
    # Other loaders than the one that is read are nobody's business here.
    second = Kept(reference=one, dataloader_idx=1)
    assert standing(tmp_path / "second", second, other, this) == pytest.approx([1.0, 1.0])
    # Training rows are not those of validation.
    standing(tmp_path / "train", Kept(stage="train"), this)
    trained = Kept(stage="train", reference=str(tmp_path / "train"))
    assert standing(tmp_path / "trained", trained, other) == pytest.approx([1.0, 1.0])
    # Nor does an old record say anything.
    about = tmp_path / "one" / "spectra" / "run.json"
    facts = json.loads(about.read_text())
    about.write_text(json.dumps({name: fact for name, fact in facts.items() if not name.startswith("validation_")}))
    assert np.isfinite(standing(tmp_path / "unknown", Kept(reference=one), other)).all()


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")
@pytest.mark.parametrize("seed", [1, 2])
def test_a_resumed_run_goes_by_the_data_that_it_is_validated_on(tmp_path: Path, seed: int) -> None:
    fit(tmp_path / "one", Kept())
    epochs: dict[str, Any] = {"max_steps": 16, "limit_train_batches": 4}
    reference = str(tmp_path / "one")
    fit(tmp_path, Kept(reference=reference), SaveEveryValidation(), **epochs)
    again = Kept(reference=reference)
    trainer = tiny_trainer(tmp_path / "again", callbacks=[again], val_check_interval=4, limit_val_batches=16, **epochs)
    says = pytest.warns(UserWarning, match="reference must have been") if seed == 2 else nullcontext()
    with says:
        path = tmp_path / "step=8.ckpt"
        trainer.fit(LanguageModel(), token_loader(48), token_loader(64, seed=seed), ckpt_path=path)
    assert np.isfinite(again.values("overlap")).tolist() == [seed == 1] * 2


def on_two_ranks(rank: int, folder: str) -> list[list[float]]:
    """Overlaps of a run against one on the same data, and of one on other data, as a rank has them."""
    warnings.filterwarnings("ignore", "Kept at step 4: NaN, because reference must have been validated")
    two = {"strategy": "ddp", "devices": 2}
    standing(Path(folder) / "one", Kept(), token_loader(64, seed=1), **two)
    found = []
    for seed in (1, 2):
        drift = Kept(reference=f"{folder}/one")
        found.append(standing(Path(folder) / str(seed), drift, token_loader(64, seed=seed), **two))
    return found


def test_all_ranks_know_of_other_data(tmp_path: Path) -> None:
    for same, other in run_distributed(on_two_ranks, 2, str(tmp_path)):
        assert same == pytest.approx([1.0])
        assert np.isnan(other).all()


@pytest.mark.parametrize(
    ("recorded", "drift", "message"),
    [
        (None, {}, "run must be a folder with a record, got '.*one': it has no run.json"),
        (
            Kept(rank=2),
            {},
            r"reference must hold 4 eigenvectors a layer, got Run\(.*\) with 2: record it with HeadDrift",
        ),
        (ActivationSpectrum(stage="validate", every_n_steps=4), {}, "reference must hold 4 eigenvectors .* with 0"),
        (Kept(layers="*.blocks.0"), {}, "reference must have measured network.blocks.1, got .* with network.blocks.0"),
        (Kept(), {"stage": "train"}, "reference must have measured activations with stage='train' and normalize=True"),
        (Kept(), {"normalize": False}, "reference must have measured .* stage='validate' and normalize=False, got Run"),
    ],
)
def test_runs_that_are_no_reference_are_refused(tmp_path: Path, recorded: Any, drift: Any, message: str) -> None:
    if recorded is not None:
        fit(tmp_path / "one", recorded, max_steps=4)
    with pytest.raises(ValueError, match=message) as raised:
        fit(tmp_path / "two", Kept(reference=str(tmp_path / "one"), **drift))
    assert "\n" not in str(raised.value)


def test_a_run_of_another_width_is_refused(tmp_path: Path) -> None:
    fit(tmp_path / "one", Kept(), model=LanguageModel(Network(width=16)), max_steps=4)
    with pytest.raises(ValueError, match=r"reference must have network.blocks.0 of width 32, got Run\(.*\) with 16$"):
        fit(tmp_path / "two", Kept(reference=str(tmp_path / "one")))


def test_of_several_series_the_one_with_eigenvectors_is_the_reference(tmp_path: Path) -> None:
    spectrum = ActivationSpectrum(stage="validate", every_n_steps=4, num_tokens=256)
    recorded = Kept(prefix="b/")
    fit(tmp_path / "one", spectrum, recorded)
    drift = Kept(reference=str(tmp_path / "one"))
    fit(tmp_path / "two", drift)
    assert drift.values("js") == [0.0] * 3


def test_validation_alone_is_measured(tmp_path: Path) -> None:
    drift = Kept()
    trainer = tiny_trainer(tmp_path, callbacks=[drift], limit_val_batches=16)
    model = LanguageModel()
    for _ in range(2):
        trainer.validate(model, token_loader(64, seed=1), verbose=False)
    assert drift.values("overlap") == [pytest.approx(1)]  # both at step 0, of the same rows
    assert float(trainer.callback_metrics[f"drift/{LAYERS[0]}/max_angle"]) < 1e-6


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"rank": 0}, r"^rank must be a positive int, got 0$"),
        ({"rank": 2.5}, r"^rank must be a positive int, got 2.5$"),
        ({"reference": 3}, r"^reference must be 'first', 'previous' or the path of a run, got 3$"),
        ({"reference": ""}, r"^reference must be 'first', 'previous' or the path of a run, got ''$"),
    ],
)
def test_wrong_arguments_are_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        HeadDrift(**arguments)
