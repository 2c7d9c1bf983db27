"""Weights of samples by least squares on a Gram matrix equal NumPy's on the rows; what is no mean is told apart."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_spectral.capture.self_check import check_span, checkable, sample_weights
from lightning_spectral.capture.shadow import BatchLoss

WIDTH, SAMPLES = 12, 8


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


def by_least_squares(rows: np.ndarray, gradient: np.ndarray) -> tuple[np.ndarray, float]:
    weights = np.linalg.lstsq(rows.T, gradient, rcond=None)[0]
    return weights, float(np.linalg.norm(rows.T @ weights - gradient) / np.linalg.norm(gradient))


@pytest.mark.parametrize("outside", [0.0, 1e-4, 0.5], ids=str)
@pytest.mark.parametrize("sizes", [1.0, 1e4], ids=["equal", "very unequal"])
def test_weights_and_residual_are_those_of_numpy(outside: float, sizes: float) -> None:
    generator = np.random.default_rng(0)
    rows = generator.normal(size=(6, 40)) * np.geomspace(1, sizes, 6)[:, None]
    gradient = np.arange(1, 7) / 21 @ rows
    gradient += outside * np.linalg.norm(gradient) * generator.normal(size=40) / np.sqrt(40)
    found = sample_weights(*map(torch.tensor, (rows @ rows.T, rows @ gradient, gradient @ gradient)))
    weights, residual = by_least_squares(rows, gradient)
    np.testing.assert_allclose(found.weights, weights, rtol=1e-6)
    assert found.residual == pytest.approx(residual, rel=1e-4, abs=1e-7)
    assert found.ratio == pytest.approx(weights.max() / weights.min() if weights.min() > 0 else np.nan, nan_ok=True)
    expected = np.sqrt((weights**2 * (rows**2).sum(1)).sum()) / np.linalg.norm(gradient)
    assert found.noise == pytest.approx(expected)


def test_samples_without_a_gradient_have_no_weight() -> None:
    rows = torch.eye(4, 9, dtype=torch.float64)
    rows[2] = 0
    gradient = torch.tensor([0.1, 0.2, 0.9, 0.4], dtype=torch.float64) @ rows
    found = sample_weights(rows @ rows.mT, rows @ gradient, gradient @ gradient)
    assert found.weights.tolist() == pytest.approx([0.1, 0.2, 0.4])
    assert found.ratio == pytest.approx(4)


def test_equal_samples_have_no_weights_of_their_own() -> None:
    rows = torch.ones(3, 9, dtype=torch.float64)
    found = sample_weights(rows @ rows.mT, rows @ rows[0], rows[0] @ rows[0])
    assert found.residual < 1e-7
    assert np.isnan(found.ratio)


def test_a_gradient_that_no_sample_has_lies_outside() -> None:
    nothing = torch.zeros(3, 3, dtype=torch.float64)
    assert sample_weights(nothing, nothing[0], torch.tensor(2.0)).residual == 1
    assert sample_weights(nothing, nothing[0], torch.tensor(0.0)).residual == 0


def test_fewer_samples_than_their_gradients_could_span() -> None:
    assert [checkable(*case) for case in ((32, 1000), (32, 40), (512, 10**6), (32, 3))] == [32, 20, 64, 1]


class Net(nn.Module):
    def __init__(self, norm: nn.Module | None = None, dropout: float = 0.0) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Linear(WIDTH, WIDTH), norm or nn.Identity(), nn.Tanh(), nn.Dropout(dropout), nn.Linear(WIDTH, 3)
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


def mean(module: Any, batch: Any) -> Tensor:
    return F.mse_loss(module(batch[0]), batch[1])


def total(module: Any, batch: Any) -> Tensor:
    return F.mse_loss(module(batch[0]), batch[1], reduction="sum")


def mean_over_tokens(module: Any, batch: Any) -> Tensor:
    losses = (module(batch[0]) - batch[1]).square().mean(-1)
    return (losses * batch[2]).sum() / batch[2].sum()


def with_decay(module: Any, batch: Any) -> Tensor:
    return mean(module, batch) + 0.1 * sum(p.square().sum() for p in module.parameters())


def noisy(module: Any, batch: Any) -> Tensor:
    x = batch[0]
    level = torch.rand(len(x), 1, device=x.device)
    return F.mse_loss(module(x + level * torch.randn_like(x)), batch[1])


def contrastive(module: Any, batch: Any) -> Tensor:
    return F.cross_entropy(module(batch[0]) @ batch[1].mT, torch.arange(len(batch[0])))


def spread(module: Any, batch: Any) -> Tensor:
    return mean(module, batch) - 0.1 * module(batch[0]).var(0, correction=0).sum()


def root(module: Any, batch: Any) -> Tensor:
    return mean(module, batch).sqrt()


def mixed_up(module: Any, batch: Any) -> Tensor:
    return mean(module, (0.7 * batch[0] + 0.3 * batch[0][torch.randperm(len(batch[0]))], batch[1]))


def along_time(module: Any, batch: Any) -> Tensor:
    return F.mse_loss(module(batch[0]).cumsum(0), batch[1])


def check(module: nn.Module, loss_fn: Any) -> Any:
    lengths = torch.arange(1.0, SAMPLES + 1)
    batch = torch.randn(SAMPLES, WIDTH), torch.randn(SAMPLES, 3), lengths
    loss = BatchLoss(module, loss_fn)
    names = [name for name, _ in module.named_parameters()]
    with loss.isolated(batch) as kept:
        return check_span(loss, kept, names, batch, None)


@pytest.mark.parametrize("dropout", [0.0, 0.5], ids=["", "dropout"])
@pytest.mark.parametrize(
    ("loss_fn", "ratio"), [(mean, 1), (total, 1), (mean_over_tokens, SAMPLES), (with_decay, 1), (noisy, 1)]
)
def test_means_of_samples_losses_pass(loss_fn: Any, ratio: float, dropout: float) -> None:
    found = check(Net(nn.LayerNorm(WIDTH), dropout), loss_fn)
    assert found.failure is None
    assert found.ratio == pytest.approx(ratio, rel=1e-3)


class Attending(nn.Module):
    """Draws within one call of PyTorch's: attention, or layers of a recurrent network."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.layer = {
            "attention": lambda: nn.MultiheadAttention(WIDTH, 2, dropout=0.5, batch_first=True),
            "encoder": lambda: nn.TransformerEncoderLayer(WIDTH, 2, 16, dropout=0.5, batch_first=True),
            "lstm": lambda: nn.LSTM(WIDTH, WIDTH, 2, dropout=0.5, batch_first=True),
            "gru": lambda: nn.GRU(WIDTH, WIDTH, 2, dropout=0.5, batch_first=True),
            "rnn": lambda: nn.RNN(WIDTH, WIDTH, 2, dropout=0.5, batch_first=True),
        }[kind]()
        self.out = nn.Linear(WIDTH, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.stack([x, x.flip(-1), 2 * x], 1)
        y = self.layer(x, x, x) if isinstance(self.layer, nn.MultiheadAttention) else self.layer(x)
        return self.out((y[0] if isinstance(y, tuple) else y).mean(1))


@pytest.mark.parametrize("kind", ["attention", "encoder", "lstm", "gru", "rnn"])
def test_dropout_inside_of_one_call_is_no_term_between_samples(kind: str) -> None:
    found = check(Attending(kind), mean)
    assert found.failure is None
    assert found.residual < 1e-5
    assert found.ratio == pytest.approx(1, rel=1e-3)


@pytest.mark.parametrize("dropout", [0.0, 0.5], ids=["", "dropout"])
@pytest.mark.parametrize("loss_fn", [contrastive, spread, mixed_up, along_time])
def test_losses_between_samples_are_refused(loss_fn: Any, dropout: float) -> None:
    found = check(Net(nn.LayerNorm(WIDTH), dropout), loss_fn)
    assert found.failure.startswith("the loss is no mean of samples' losses: ")
    assert found.residual > 1e-3
    assert "\n" not in found.failure
    assert np.isnan(found.ratio)


def test_statistics_of_the_batch_are_refused_in_training_alone() -> None:
    class Images(Net):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Sequential(
                nn.Unflatten(1, (1, WIDTH)),
                nn.Conv1d(1, 4, 3),
                nn.BatchNorm1d(4),
                nn.ReLU(),
                nn.Flatten(),
                nn.LazyLinear(3),
            )
            self(torch.randn(2, WIDTH))

    model = Images()
    words = "as net.2 uses statistics of the batch: use stage='validate', in evaluation mode, or loss_fn"
    assert check(model, mean).failure.endswith(words)
    assert check(model.eval(), mean).failure is None


def test_a_root_of_a_mean_is_a_weighted_sum_of_roots() -> None:
    """The gradients of roots point where those of the samples' losses do: the weights tell how much each counts."""
    found = check(Net(), root)
    assert found.failure is None
    assert found.ratio > 1.5
