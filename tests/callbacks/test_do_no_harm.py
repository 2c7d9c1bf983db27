"""Training with the callbacks is training without them: weights, random streams and attributes, bit by bit."""

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch import seed_everything
from torch import Tensor, nn
from torch._dynamo.eval_frame import OptimizedModule

from lightning_spectral import ActivationSpectrum, HeadDrift, TailForecaster
from tests.models import LanguageModel, Network, tiny_trainer, token_loader


class Reports(ActivationSpectrum):
    """Keeps the number of rows of each report."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.rows: dict[int, float] = {}

    def measured(self, report):
        self.rows[report.step] = report.spectra["activation"][self.names[0]].count
        return super().measured(report)


def spectra() -> tuple[Reports, Reports, HeadDrift, HeadDrift, TailForecaster]:
    return (
        Reports(layers="all", every_n_steps=7, num_tokens=96, overlap=True, prefix="train/"),
        Reports(every_n_steps=10, num_tokens=96, stage="validate", dtype="float64", prefix="val/"),
        # One shares the measurement of the second, the other has one of its own.
        HeadDrift(rank=4, every_n_steps=10, num_tokens=96, dtype="float64"),
        HeadDrift(rank=4, reference="previous", every_n_steps=5, num_tokens=96, stage="train", prefix="previous/"),
        # Without references it warns that it makes no forecast.
        TailForecaster(0.0, every_n_steps=10, num_tokens=96, dtype="float64"),
    )


class Dropping(LanguageModel):
    """Draws from every random stream at each step, so that one draw too many shows in the weights."""

    def __init__(self, use_reentrant: bool | None = None) -> None:
        super().__init__(Network(dropout=0.1))
        self.network.use_reentrant = use_reentrant

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        return super().training_step(batch, batch_idx) * (1 + random.random() + np.random.rand())  # noqa: NPY002


def attributes(model: nn.Module) -> list[dict[str, Any]]:
    """All attributes of all modules; of those that are no plain values, and of a compiler's wrapper, the names."""
    plain = (int, float, str, bool, type(None))
    return [
        {
            key: value if isinstance(value, plain) and not isinstance(module, OptimizedModule) else None
            for key, value in vars(module).items()
        }
        for module in model.modules()
    ]


def train(folder: Path, make: Callable[[], LanguageModel], callbacks: list[Any], **kwargs: Any) -> dict[str, Any]:
    """All that a training run leaves behind."""
    seed_everything(0, verbose=False)
    model = make()
    steps = {"max_steps": 50, "val_check_interval": 10, "limit_val_batches": 3}
    trainer = tiny_trainer(folder, callbacks=callbacks, **(steps | kwargs))
    trainer.fit(model, token_loader(48), token_loader(16, seed=1))
    return {
        "state": {key: value.clone() for key, value in model.state_dict().items()},
        "gradients": [None if p.grad is None else p.grad.clone() for p in model.parameters()],
        "optimizer": trainer.optimizers[0].state_dict(),
        "metric": model.mean_loss.metric_state,
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        "numpy": np.random.get_state()[1],  # noqa: NPY002
        "python": random.getstate(),
        "attributes": attributes(model),
        "hooks": [(len(m._forward_hooks), len(m._forward_pre_hooks), len(m._backward_hooks)) for m in model.modules()],
        "step": trainer.global_step,
        "losses": {key: value for key, value in trainer.callback_metrics.items() if key.endswith("_loss")},
    }


def assert_identical(found: Any, expected: Any) -> None:
    if isinstance(expected, Tensor):
        assert torch.equal(found, expected)
        assert found.dtype == expected.dtype
    elif isinstance(expected, np.ndarray):
        assert np.array_equal(found, expected)
    elif isinstance(expected, dict):
        assert list(found) == list(expected)
        for key in expected:
            assert_identical(found[key], expected[key])
    elif isinstance(expected, (list, tuple)):
        assert len(found) == len(expected)
        for mine, theirs in zip(found, expected, strict=True):
            assert_identical(mine, theirs)
    else:
        assert found == expected


@pytest.fixture(autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


# What the reentrant kind says of a validation pass, ours or not.
NO_GRADIENTS = pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")

EAGER = [
    pytest.param(Dropping, {}, id="plain"),
    pytest.param(Dropping, {"accumulate_grad_batches": 3, "max_steps": 20}, id="accumulation"),
    pytest.param(Dropping, {"precision": "bf16-mixed"}, id="bf16-mixed"),
    pytest.param(lambda: Dropping(use_reentrant=False), {}, id="checkpointing"),
    pytest.param(lambda: Dropping(use_reentrant=True), {}, id="reentrant checkpointing", marks=NO_GRADIENTS),
]


@pytest.mark.filterwarnings("ignore:TailForecaster makes no forecast")
@pytest.mark.parametrize(("make", "kwargs"), EAGER)
def test_run_is_bit_identical_with_and_without(tmp_path: Path, make, kwargs: dict[str, Any]) -> None:
    expected = train(tmp_path, make, [], **kwargs)
    callbacks = spectra()
    found = train(tmp_path, make, list(callbacks), **kwargs)
    assert_identical(found, expected)
    # It was measured; and a forward that checkpointing repeats in the backward pass is not counted again.
    steps = range(7, found["step"] + 1, 7)
    assert callbacks[0].rows == dict.fromkeys(steps, 96)
    assert set(callbacks[1].rows.values()) == {96}
    for drift in callbacks[2:4]:
        assert drift.summary()["num_reports"] >= 2
    assert len(callbacks[4].summary()["losses"]) >= 2
    assert not any(callback.num_failed for callback in callbacks[2:])


@NO_GRADIENTS
@pytest.mark.parametrize("use_reentrant", [None, False, True])
def test_checkpointing_does_not_change_the_rows(tmp_path: Path, use_reentrant: bool | None) -> None:
    # More rows asked for than two steps have: one forward counted twice would show.
    spectrum = Reports(layers="*.mlp", every_n_steps=2, num_tokens=10**6)
    train(tmp_path, lambda: Dropping(use_reentrant), [spectrum], max_steps=4)
    assert spectrum.rows == {2: 64, 4: 64}


class SmallBlock(nn.Module):
    """As little as inductor has to compile."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.tanh(self.linear(x))


def small_model(compile_blocks: bool, compile_network: bool) -> LanguageModel:
    network = Network(width=16, num_blocks=2)
    network.blocks = nn.ModuleList(SmallBlock() for _ in range(2))
    if compile_blocks:
        for block in network.blocks:
            block.compile()
    return LanguageModel(torch.compile(network) if compile_network else network)


class NumGraphs(Reports):
    """Counts graphs after each step: with the first all must be there."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.num_graphs: dict[int, int] = {}

    def on_train_batch_end(self, trainer: Any, *args: Any) -> None:
        super().on_train_batch_end(trainer, *args)
        self.num_graphs[trainer.global_step] = torch._dynamo.utils.counters["stats"]["unique_graphs"]


@pytest.mark.parametrize("compiled", [(True, False), (False, True)], ids=["blocks", "model"])
@pytest.mark.filterwarnings("ignore:.*script_method.*:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:.*attribute of a Tensor that is not a leaf.*")
def test_compiled_run_is_bit_identical(tmp_path: Path, compiled: tuple[bool, bool]) -> None:
    runs, graphs = [], []
    spectrum = NumGraphs(layers="all", every_n_steps=3, num_tokens=32)
    for callbacks in ([], [spectrum]):
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        runs.append(train(tmp_path, lambda: small_model(*compiled), callbacks, max_steps=8, limit_val_batches=0))
        graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    torch._dynamo.reset()
    without, found = runs
    assert_identical(found, without)
    assert spectrum.rows == {3: 32, 6: 32}
    assert graphs[0] == graphs[1]
    # Steps without a report, with the reader closed, and steps of a report run the same graphs.
    assert set(spectrum.num_graphs.values()) == {graphs[0]}
