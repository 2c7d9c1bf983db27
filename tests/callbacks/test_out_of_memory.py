"""Out of memory anywhere in a report, alone or on one of two ranks: NaN on all with the cause; training goes on."""

import importlib
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_spectral import ActivationSpectrum, GradientSpectrum, Run, RunRecord
from tests.distributed import run_distributed
from tests.models import tiny_trainer

WIDTH = 6
REASON = "CUDA out of memory. Tried to allocate 20.00 MiB"
ACTIVATIONS = [
    ("measurement.collector", "Sums"),
    ("measurement.collector", "inverse_rms"),
    ("measurement.collector", "pooled"),
    ("measurement.sums", "reduce_means"),
    ("measurement.decomposition", "pool"),
    ("measurement.decomposition", "spectrum"),
    ("measurement.activations", "settle"),
]
GRADIENTS = [
    ("measurement.gradients", "gram_share"),
    ("metrics.exchange", "gram"),
    ("measurement.gradients", "sum_over_ranks"),
    ("measurement.gradients", "decompose_grams"),
    ("measurement.weight_spectra", "roots_of_gram"),
    ("measurement.gradients", "settle"),
]
OTHERS = [
    ("measurement.collector", "gather_numbers"),
    ("measurement.gradients", "gather_numbers"),
    ("recording.counter", "sum_over_ranks"),
    ("recording.fingerprint", "sum_over_ranks"),
]


class Model(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh(), nn.Linear(WIDTH, 3))

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return self.layers(batch).square().mean()

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        self.log("val_loss", self.layers(batch).square().mean(), sync_dist=True)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.1)


@contextmanager
def no_memory(where: tuple[str, str] | None) -> Iterator[None]:
    """Out of memory in the first call of a function."""
    if where is None:
        yield
        return
    module = importlib.import_module(f"lightning_spectral.{where[0]}")
    function = getattr(module, where[1])

    def fails(*args: Any, **kwargs: Any) -> Any:
        setattr(module, where[1], function)
        raise torch.OutOfMemoryError(REASON)

    setattr(module, where[1], fails)
    try:
        yield
    finally:
        assert getattr(module, where[1]) is function, f"{where} was never called"


class Logged:
    """Keeps the numbers of each report."""

    def measured(self, report: Any) -> dict[str, float]:
        values = super().measured(report)  # type: ignore[misc]
        self.__dict__.setdefault("seen", {})[report.step] = values
        return values


class Activations(Logged, ActivationSpectrum): ...


class Gradients(Logged, GradientSpectrum): ...


def run(folder: Path, where: tuple[str, str] | None, rank: int = 0, world: int = 1) -> dict[str, Any]:
    """Four steps with two reports of each kind, the first without memory at some place."""
    shared: dict[str, Any] = {"every_n_steps": 2, "head": (1, 3), "tail": (2, 5), "num_groups": 2}
    callbacks = [
        Activations("layers.0", num_tokens=1000, **shared),
        Activations(
            "layers.2", num_tokens=1000, stage="validate", prefix="v/", **(shared | {"head": (1, 2), "tail": (1, 3)})
        ),
        Gradients("layers.*.weight", num_samples=16, method="loop", check="off", weights=True, **shared),
        RunRecord(family="F"),
    ]
    generator = torch.Generator().manual_seed(rank)
    batches = DataLoader(list(torch.randn(6, 8, WIDTH, generator=generator)), batch_size=None)
    trainer = tiny_trainer(
        folder,
        max_steps=4,
        val_check_interval=2,
        check_val_every_n_epoch=None,
        num_sanity_val_steps=0,
        callbacks=callbacks,
        **({"strategy": "ddp", "devices": world, "use_distributed_sampler": False} if world > 1 else {}),
    )
    model = Model()
    with warnings.catch_warnings(record=True) as caught, no_memory(where):
        warnings.simplefilter("always")
        trainer.fit(model, batches, batches)
    return {
        "weights": [p.detach().clone() for p in model.parameters()],
        "seen": [one.seen for one in callbacks[:3]],
        "failed": {k: float(v) for k, v in trainer.callback_metrics.items() if k.endswith("failed")},
        "said": [str(one.message) for one in caught],
        "step": trainer.global_step,
    }


def plain(folder: Path, rank: int = 0, world: int = 1) -> list[Tensor]:
    trainer = tiny_trainer(
        folder,
        max_steps=4,
        **({"strategy": "ddp", "devices": world, "use_distributed_sampler": False} if world > 1 else {}),
    )
    model = Model()
    generator = torch.Generator().manual_seed(rank)
    batches = DataLoader(list(torch.randn(6, 8, WIDTH, generator=generator)), batch_size=None)
    trainer.fit(model, batches)
    return [p.detach().clone() for p in model.parameters()]


def all_of(rank: int, folder: str, world: int) -> dict[Any, Any]:
    """On each rank: a run without callbacks, one where memory is enough, and those where it is not on the last rank."""
    seen: dict[Any, Any] = {"plain": plain(Path(folder) / "plain", rank, world)}
    for where in (None, *ACTIVATIONS, *GRADIENTS, *OTHERS):
        path = Path(folder) / ("-".join(where) if where else "enough")
        seen[where] = run(path, where if rank == world - 1 else None, rank, world)
    return seen


@pytest.fixture(scope="module", params=[1, 2], ids=["alone", "one of two"])
def ranks(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[list[Any], Path]:
    folder = tmp_path_factory.mktemp(f"memory{request.param}")
    return run_distributed(all_of, request.param, str(folder), request.param), folder


def differing(found: dict[int, dict[str, float]], expected: dict[int, dict[str, float]]) -> set[int]:
    """Steps of reports that are not what they would have been."""
    assert list(found) == list(expected)

    def of_its_own(report: dict[str, float]) -> dict[str, float]:
        return {key: value for key, value in report.items() if not key.endswith("_smoothed")}  # by those before

    same = {step: pytest.approx(of_its_own(expected[step]), rel=1e-9, abs=1e-12, nan_ok=True) for step in expected}
    return {step for step in expected if of_its_own(found[step]) != same[step]}


@pytest.mark.parametrize("where", [*ACTIVATIONS, *GRADIENTS, *OTHERS], ids=".".join)
def test_training_goes_on_and_later_reports_are_right(ranks: tuple[list[Any], Path], where: tuple[str, str]) -> None:
    for seen in ranks[0]:
        found, enough = seen[where], seen[None]
        assert found["step"] == 4
        assert all(map(torch.equal, found["weights"], seen["plain"]))
        for mine, theirs in zip(found["seen"], enough["seen"], strict=True):
            assert differing(mine, theirs) <= {2}


@pytest.mark.parametrize("where", [*ACTIVATIONS, *GRADIENTS], ids=".".join)
def test_the_report_is_nan_on_all_ranks_with_the_cause(ranks: tuple[list[Any], Path], where: tuple[str, str]) -> None:
    every = [seen[where] for seen in ranks[0]]
    assert all(one["failed"] == every[0]["failed"] for one in every)
    assert sum(every[0]["failed"].values()) > sum(ranks[0][0][None]["failed"].values())
    is_hit = [
        bool(differing(mine, theirs)) for mine, theirs in zip(every[0]["seen"], ranks[0][0][None]["seen"], strict=True)
    ]
    assert sum(is_hit) == 1  # others of the Trainer's are none the worse
    for one in every:
        for mine, other in zip(one["seen"], every[0]["seen"], strict=True):
            assert differing(mine, other) == set()
    # Rank zero tells of it, wherever it was.
    prefix = f"rank {len(every) - 1}: " if len(every) > 1 else ""
    assert any("NaN, because" in said and prefix + REASON in said for said in every[0]["said"])


def test_records_are_whole(ranks: tuple[list[Any], Path]) -> None:
    for where in (None, *ACTIVATIONS, *GRADIENTS, *OTHERS):
        record = Run(ranks[1] / ("-".join(where) if where else "enough"))
        assert [record.steps(kind) for kind in ("activation-train", "activation-validate", "gradient-train")] == [
            [2, 4]
        ] * 3
        assert record.about["validation_data"]
        assert record.history.tokens[-1] == 32 * len(ranks[0])
