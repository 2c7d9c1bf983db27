"""ActivationSpectrum(readout=...) in real runs, against a float64 twin made of labels and plain hooks."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from lightning.pytorch.loggers import TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from lightning_spectral import ActivationSpectrum, HeadDrift, Run
from lightning_spectral.theory import readout_loss
from tests.callbacks.test_do_no_harm import assert_identical, train
from tests.models import LENGTH, VOCABULARY, WIDTH, Alternating, LanguageModel, Network, tiny_trainer, token_loader

HEAD = "network.logits"
STEPS = [3, 6]


class Model(LanguageModel):
    """Ignores some labels, a different number in each batch; with a head that may have no bias, or be tied."""

    def __init__(self, bias: bool = True, is_tied: bool = False, **options: Any) -> None:
        super().__init__(Network())
        self.options = options
        self.network.logits = nn.Linear(WIDTH, VOCABULARY, bias=bias)
        if is_tied:
            self.network.logits.weight = self.network.embedding.weight

    def loss(self, batch: dict[str, Tensor]) -> Tensor:
        self.num_forwards += 1
        logits = self.network(batch["input_ids"]).flatten(0, 1)
        return F.cross_entropy(logits, labels_of(batch), ignore_index=-100, **self.options)


def labels_of(batch: dict[str, Tensor]) -> Tensor:
    return batch["labels"].masked_fill(batch["labels"] < 7, -100).flatten()


class Twin(Callback):
    """Keeps what the head takes and gives in training, and the labels, by step."""

    def __init__(self) -> None:
        self.seen: dict[int, list[tuple[Tensor, Tensor, Tensor]]] = {}
        self.inputs: Tensor | None = None
        self.outputs: Tensor | None = None

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        pl_module.network.logits.register_forward_hook(self._keep)

    def _keep(self, _: Any, inputs: Any, output: Tensor) -> None:
        self.inputs, self.outputs = inputs[0].detach().double().flatten(0, 1), output.detach().double().flatten(0, 1)

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, _: Any, batch: Any, index: int) -> None:
        step = index // trainer.accumulate_grad_batches
        self.seen.setdefault(step, []).append((self.inputs, self.outputs, labels_of(batch)))

    def readout(self, steps: list[int], is_centred: bool) -> tuple[np.ndarray, np.ndarray, float, int]:
        """Eigenvalues, task power, loss and rows of the steps that begin at these."""
        parts = [part for step in steps for part in self.seen[step]]
        hidden, logits, labels = (torch.cat([part[i] for part in parts]) for i in range(3))
        hidden, logits, labels = hidden[labels >= 0], logits[labels >= 0], labels[labels >= 0]
        errors = logits.softmax(-1) - F.one_hot(labels, VOCABULARY)
        if is_centred:
            errors, hidden = errors - errors.mean(0), hidden - hidden.mean(0)
        values, vectors = np.linalg.eigh((hidden.T @ hidden / len(hidden)).numpy())
        along = (errors.T @ hidden / len(hidden)).numpy() @ vectors
        loss = float(F.cross_entropy(logits, labels))
        return values[::-1], ((along**2).sum(0) / values)[::-1], loss, len(hidden)


def fit(trainer: Trainer, model: LightningModule, **options: Any) -> None:
    trainer.fit(model, token_loader(48), token_loader(4, seed=1), **options)


@pytest.mark.parametrize(
    ("kwargs", "options"),
    [
        ({}, {}),
        ({"bias": False}, {}),
        ({"bias": False, "is_tied": True}, {}),
        ({}, {"accumulate_grad_batches": 2}),
    ],
    ids=["bias", "no bias", "tied", "accumulated"],
)
def test_it_is_the_twin(tmp_path: Path, kwargs: dict[str, Any], options: dict[str, Any]) -> None:
    seed_everything(0, verbose=False)
    twin = Twin()
    spectrum = ActivationSpectrum(every_n_steps=3, num_tokens=80, dtype="float64", readout=HEAD, num_groups=1)
    logger = TensorBoardLogger(tmp_path, version=0)
    trainer = tiny_trainer(
        tmp_path, callbacks=[twin, spectrum], logger=logger, max_steps=6, log_every_n_steps=1, **options
    )
    fit(trainer, Model(**kwargs).double())
    run = Run(logger.log_dir)
    assert run.steps("readout") == STEPS
    for report in STEPS:
        found = run.readout(report)
        # A step has 32 rows, 64 when accumulated, of which about 26 or 53 count: 80 of them need three or two.
        num_steps = 2 if "accumulate_grad_batches" in options else 3
        collected = {3: [0, 1, 2], 6: [3, 4, 5]}[report][-num_steps:]
        values, power, loss, num = twin.readout(collected, kwargs.get("bias", True))
        assert found.num_rows == num
        np.testing.assert_allclose(found.eigenvalues, values, rtol=1e-8, atol=1e-12 * values[0])
        np.testing.assert_allclose(found.power, power, rtol=1e-6, atol=1e-9 * power.sum())
        if num_steps == 3 and "accumulate_grad_batches" not in options:
            assert found.loss == pytest.approx(loss, rel=1e-9)
        bound = readout_loss(found.loss, torch.from_numpy(values.copy()), torch.from_numpy(power.copy()), 0.1, 50.0)
        assert float(found.lower_bound(0.1, 50.0)) == pytest.approx(float(bound), rel=1e-6)
    metrics = trainer.callback_metrics
    assert float(metrics[f"activation/{HEAD}/task_power"]) == pytest.approx(power.sum(), rel=1e-6)
    assert float(metrics[f"activation/{HEAD}/task_head_share"]) == pytest.approx(power[:10].sum() / power.sum())
    assert float(metrics["activation/failed"]) == 0


def test_float32_products_are_close(tmp_path: Path) -> None:
    seed_everything(0, verbose=False)
    twin = Twin()
    spectrum = ActivationSpectrum(every_n_steps=3, num_tokens=10**6, readout=HEAD)
    trainer = tiny_trainer(tmp_path, callbacks=[twin, spectrum], max_steps=3, log_every_n_steps=1)
    fit(trainer, Model())
    _, power, _, _ = twin.readout([0, 1, 2], is_centred=True)
    assert float(trainer.callback_metrics[f"activation/{HEAD}/task_power"]) == pytest.approx(power.sum(), rel=1e-4)


def test_two_optimizers_in_a_step_are_two_passes(tmp_path: Path) -> None:
    seed_everything(0, verbose=False)
    spectrum = ActivationSpectrum(every_n_steps=4, num_tokens=10**6, readout=HEAD)
    logger = TensorBoardLogger(tmp_path, version=0)
    trainer = tiny_trainer(tmp_path, callbacks=[spectrum], logger=logger, max_steps=4, log_every_n_steps=1)
    fit(trainer, Alternating())
    assert Run(logger.log_dir).readout(4).num_rows == 4 * 4 * LENGTH


@pytest.mark.parametrize("kwargs", [{}, {"accumulate_grad_batches": 3, "max_steps": 20}, {"precision": "bf16-mixed"}])
def test_run_is_bit_identical_with_and_without(tmp_path: Path, kwargs: dict[str, Any]) -> None:
    expected = train(tmp_path, Model, [], **kwargs)
    # The second shares the measurement of layers with the first, and that of the head with none.
    callbacks = [
        ActivationSpectrum(every_n_steps=5, num_tokens=96, readout=HEAD),
        HeadDrift(rank=4, every_n_steps=5, num_tokens=96, stage="train"),
    ]
    found = train(tmp_path, Model, callbacks, **kwargs)
    assert_identical(found, expected)
    assert not any(callback.num_failed for callback in callbacks)


class Checkpointed(Model):
    """Runs its head again in the backward pass."""

    def __init__(self) -> None:
        super().__init__()
        self.network.logits.register_forward_pre_hook(lambda *_: self.runs.append(torch.is_grad_enabled()))
        self.runs: list[bool] = []

    def loss(self, batch: dict[str, Tensor]) -> Tensor:
        network = self.network
        x = network.blocks[0](network.embedding(batch["input_ids"]))
        logits = checkpoint(network.logits, x, use_reentrant=False)
        return F.cross_entropy(logits.flatten(0, 1), labels_of(batch), ignore_index=-100)


def test_a_head_that_checkpointing_repeats_is_read_once(tmp_path: Path) -> None:
    seed_everything(0, verbose=False)
    model = Checkpointed()
    spectrum = ActivationSpectrum("network.blocks.0", every_n_steps=2, num_tokens=10**6, readout=HEAD)
    logger = TensorBoardLogger(tmp_path, version=0)
    fit(tiny_trainer(tmp_path, callbacks=[spectrum], logger=logger, max_steps=2, log_every_n_steps=1), model)
    assert len(model.runs) >= 4
    num_rows = sum(int((labels_of(batch) >= 0).sum()) for batch, _ in zip(token_loader(48), range(2), strict=False))
    assert Run(logger.log_dir).readout(2).num_rows == num_rows


class Own(Model):
    """Calls backward itself."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.loss(batch).backward()
        optimizer.step()


class Twice(Model):
    """Sums the losses of two passes."""

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        return (self.loss(batch) + self.loss(batch)) / 2


class Detached(Model):
    """Trains on something else than the head's output."""

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        self.loss(batch)
        return self.network.embedding(batch["input_ids"]).square().mean()


class Squared(Model):
    """Has another loss."""

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        return self.network(batch["input_ids"]).square().mean()


NOT_MEAN = "is not that of a cross-entropy with one label a row"


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: Model(reduction="sum"), NOT_MEAN),
        (lambda: Model(label_smoothing=0.1), NOT_MEAN),
        (lambda: Model(weight=torch.linspace(0.5, 2, VOCABULARY)), NOT_MEAN),
        (Squared, NOT_MEAN),
        (Own, "training_step calls backward itself"),
        (Twice, "its head ran more than once before a backward pass"),
        (Detached, "no gradient reached its head"),
    ],
)
def test_what_cannot_be_read_is_nan_with_its_reason(tmp_path: Path, make: Any, reason: str) -> None:
    seed_everything(0, verbose=False)
    spectrum = ActivationSpectrum(every_n_steps=4, num_tokens=64, readout=HEAD)
    logger = TensorBoardLogger(tmp_path, version=0)
    trainer = tiny_trainer(tmp_path, callbacks=[spectrum], logger=logger, max_steps=4, log_every_n_steps=1)
    with pytest.warns(UserWarning, match=f"readout='{HEAD}': NaN, because .*{reason}"):
        fit(trainer, make())
    metrics = trainer.callback_metrics
    assert np.isnan(float(metrics[f"activation/{HEAD}/task_head_share"]))
    assert float(metrics["activation/failed"]) == 1
    # The spectra of layers are none the worse.
    assert np.isfinite(float(metrics["activation/network.blocks.0/rankme"]))
    found = Run(logger.log_dir).readout(4)
    assert reason in (found.failure or "")
    assert np.isnan(found.head_share(10))
    assert bool(found.lower_bound(0.1, torch.arange(3)).isnan().all())


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"readout": "network.logit"}, "readout='network.logit' matches no readout: did you mean 'network.logits'"),
        ({"readout": "network.log*"}, r"readout must be the name of one module, got the pattern 'network.log\*'"),
        ({"readout": "network.embedding"}, "readout must name a linear layer, .*got 'network.embedding', a Embedding"),
        ({"readout": HEAD, "stage": "validate"}, r"needs backward passes, .*got stage='validate': use stage='train'"),
        ({"readout": ""}, "readout must be the name of a linear layer, or None, got ''"),
        ({"readout": 3}, "readout must be the name of a linear layer, or None, got 3"),
    ],
)
def test_what_is_refused_at_the_start(tmp_path: Path, kwargs: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message) as refusal:
        fit(tiny_trainer(tmp_path, callbacks=[ActivationSpectrum(**kwargs)], max_steps=1), Model())
    assert "\n" not in str(refusal.value)


def test_a_resumed_run_goes_on(tmp_path: Path) -> None:
    def spectrum() -> ActivationSpectrum:
        return ActivationSpectrum(every_n_steps=8, num_tokens=64, readout=HEAD)

    seed_everything(0, verbose=False)
    whole = tiny_trainer(tmp_path, callbacks=[spectrum()], max_steps=16, log_every_n_steps=1)
    fit(whole, Model())
    seed_everything(0, verbose=False)
    first = tiny_trainer(tmp_path, callbacks=[spectrum()], max_steps=12, log_every_n_steps=1)
    fit(first, Model())
    first.save_checkpoint(tmp_path / "epoch.ckpt")
    second = tiny_trainer(tmp_path, callbacks=[spectrum()], max_steps=16, log_every_n_steps=1)
    fit(second, Model(), ckpt_path=tmp_path / "epoch.ckpt")
    key = f"activation/{HEAD}/task_power"
    assert float(second.callback_metrics[key]) == float(whole.callback_metrics[key])


def test_the_figure_has_the_curve(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from lightning_spectral.callbacks import display

    drawn = []
    plain = display.spectrum_figure
    monkeypatch.setattr(display, "spectrum_figure", lambda *args: drawn.append(plain(*args)) or drawn[-1])
    seed_everything(0, verbose=False)
    logger = TensorBoardLogger(tmp_path, version=0)
    spectrum = ActivationSpectrum(every_n_steps=4, num_tokens=64, readout=HEAD)
    trainer = tiny_trainer(tmp_path, callbacks=[spectrum], logger=logger, max_steps=4, log_every_n_steps=1)
    fit(trainer, Model())
    shares = drawn[0].axes[1]
    (line,) = shares.lines
    assert shares.get_ylabel() == "share of task power up to a rank"
    assert line.get_ydata()[-1] == pytest.approx(1)
    np.testing.assert_allclose(line.get_ydata(), Run(logger.log_dir).readout(4).cumulative)
    events = EventAccumulator(logger.log_dir, size_guidance={"images": 0})
    events.Reload()
    assert "activation/spectra" in events.Tags()["images"]
    assert f"activation/{HEAD}/task_head_share" in events.Tags()["scalars"]
