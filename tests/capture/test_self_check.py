"""Weights of samples by least squares on a Gram matrix equal NumPy's on the rows; what is no mean is told apart."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_spectral.capture.self_check import PartError, SpanCheck, check_span, checkable, sample_weights
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
    return check_batch(module, loss_fn, (torch.randn(SAMPLES, WIDTH), torch.randn(SAMPLES, 3), lengths))


def check_batch(module: nn.Module, loss_fn: Any, batch: Any, has_run: bool = False) -> SpanCheck | None:
    loss = BatchLoss(module, loss_fn)
    names = [name for name, _ in module.named_parameters()]
    with loss.isolated(batch) as kept:
        return check_span(loss, kept, names, batch, None, has_run)


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


def labelled(size: int = 16, width: int = WIDTH) -> list[Tensor]:
    return [3 + torch.randn(size, width), (torch.arange(size) % 3 > 0).long(), torch.arange(1.0, size + 1)]


def score(module: Any, batch: Any) -> Tensor:
    """One number for a sample: the logit of the second class."""
    logits = module(batch[0])
    return logits[:, 0] if logits.shape[1] == 1 else logits[:, 1] - logits[:, 0]


def binary(module: Any, batch: Any) -> Tensor:
    return F.binary_cross_entropy_with_logits(score(module, batch), batch[1].float())


def class_weights(module: Any, batch: Any) -> Tensor:
    pair = torch.stack([torch.zeros_like(batch[2]), score(module, batch)], 1)
    return F.cross_entropy(pair, batch[1], torch.tensor([0.2, 0.7]), label_smoothing=0.1)


def by_positives(module: Any, batch: Any) -> Tensor:
    losses = F.binary_cross_entropy_with_logits(score(module, batch), batch[1].float(), reduction="none")
    return losses.sum() / batch[1].sum().clamp(min=1)


def weighted(module: Any, batch: Any) -> Tensor:
    losses = F.binary_cross_entropy_with_logits(score(module, batch), batch[1].float(), reduction="none")
    return (losses * batch[2]).sum() / batch[2].sum()


def dice(module: Any, batch: Any) -> Tensor:
    p, t = score(module, batch).sigmoid(), batch[1].float()
    return 1 - (2 * (p * t).sum() + 1) / (p.sum() + t.sum() + 1)


def ranking(module: Any, batch: Any) -> Tensor:
    p, t = score(module, batch), batch[1]
    beside = F.relu(0.5 - (p[t == 1][:, None] - p[t == 0][None])).sum() / len(p)
    return binary(module, batch) + beside


def balanced(module: Any, batch: Any) -> Tensor:
    losses = F.binary_cross_entropy_with_logits(score(module, batch), batch[1].float(), reduction="none")
    return (losses / torch.bincount(batch[1], minlength=2)[batch[1]]).sum() / 2


def listwise(module: Any, batch: Any) -> Tensor:
    return binary(module, batch) - (score(module, batch).softmax(0) * batch[2]).mean()


def heads(width: int = WIDTH) -> dict[str, nn.Module]:
    return {
        "two logits": nn.Linear(width, 2),
        "one logit": nn.Linear(width, 1, bias=False),
        "deep": nn.Sequential(nn.Linear(width, 10), nn.Tanh(), nn.Linear(10, 1)),
    }


@pytest.mark.parametrize("head", heads())
@pytest.mark.parametrize("loss_fn", [binary, class_weights, by_positives, weighted])
def test_means_of_losses_of_one_number_a_sample_pass(loss_fn: Any, head: str) -> None:
    found = check_batch(heads()[head], loss_fn, labelled())
    assert found is not None
    assert (found.failure, found.parts) == (None, "samples")
    assert found.residual < 1e-4


@pytest.mark.parametrize("head", heads())
@pytest.mark.parametrize("loss_fn", [dice, ranking, balanced, listwise])
def test_losses_between_samples_of_one_number_each_are_refused_by_halves(loss_fn: Any, head: str) -> None:
    """Whatever the loss, its gradient is a weighted sum of those of the numbers, and so of samples' own."""
    module, batch = heads()[head], labelled()
    parameters = list(module.parameters())
    flat = [
        torch.cat([part.flatten() for part in torch.autograd.grad(loss_fn(module, part_of), parameters)]).double()
        for part_of in (batch, *([part[i : i + 1] for part in batch] for i in range(16)))
    ]
    together, own = flat[0].numpy(), torch.stack(flat[1:]).numpy()
    assert by_least_squares(own, together)[1] < 1e-3
    found = check_batch(module, loss_fn, batch)
    assert found is not None
    assert found.failure is not None
    assert "lies outside those of two halves, as with" in found.failure


@pytest.mark.parametrize("width", [2, 3, 4])
def test_gradients_that_span_too_little_are_not_checked(width: int) -> None:
    """Rows of a head of two logits span as many dimensions as it has inputs: two halves would leave none."""
    found = check_batch(nn.Linear(width, 2, bias=False), dice, labelled(width=width))
    assert (found is None) == (width < 4)


def squeezed(module: Any, batch: Any) -> Tensor:
    return F.binary_cross_entropy_with_logits(module(batch[0]).squeeze(), batch[1].float())


def squeezed_sum(module: Any, batch: Any) -> Tensor:
    return squeezed(module, batch) * len(batch[0])


@pytest.mark.parametrize(("loss_fn", "total"), [(squeezed, 1), (squeezed_sum, 2)])
def test_a_mean_that_takes_no_sample_alone_is_one_of_halves(loss_fn: Any, total: float) -> None:
    found = check_batch(nn.Linear(WIDTH, 1), loss_fn, labelled())
    assert found is not None
    assert (found.failure, found.parts) == (None, "halves")
    assert found.total == pytest.approx(total, rel=1e-3)
    assert np.isnan(found.ratio)


def pairs(module: Any, batch: Any) -> Tensor:
    first, second = module(batch[0]).view(-1, 2, 3).unbind(1)
    return (first - second).square().mean()


def views(module: Any, batch: Any) -> Tensor:
    assert len(batch[0]) > 1
    first, second = module(batch[0]).chunk(2)
    return (first - second).square().mean()


def groups(module: Any, batch: Any) -> Tensor:
    y = module(batch[0]).view(-1, 4, 3)
    return (y - y.mean(1, keepdim=True)).square().mean() + y.mean()


def neighbours(module: Any, batch: Any) -> Tensor:
    assert len(batch[0]) > 1
    y = module(batch[0])
    return F.mse_loss(y[1:], y[:-1].detach())


@pytest.mark.parametrize("size", [8, 12, 16])
@pytest.mark.parametrize("loss_fn", [pairs, views, groups, neighbours])
def test_what_takes_no_sample_alone_for_it_lies_between_is_refused(loss_fn: Any, size: int) -> None:
    found = check_batch(nn.Linear(WIDTH, 3), loss_fn, torch.randn(size, WIDTH)[None].unbind())
    assert found is not None
    assert found.failure is not None
    assert "\n" not in found.failure
    assert "mean of samples' losses: " in found.failure


def test_batch_norm_that_takes_no_sample_alone_is_refused_by_name() -> None:
    model = Net(nn.BatchNorm1d(WIDTH))
    words = "two halves, as net.1 uses statistics of the batch: use stage='validate', in evaluation mode, or loss_fn"
    assert check(model, mean).failure.endswith(words)
    small = check_batch(model, mean, (torch.randn(3, WIDTH), torch.randn(3, 3)))
    assert small is not None
    assert small.failure is not None
    assert "alone it fails (Expected more than 1 value" in small.failure
    assert small.failure.endswith(words.partition(", ")[2])


def deviation(module: Any, batch: Any) -> Tensor:
    return mean(module, batch) + F.relu(1 - module(batch[0]).std(0)).mean()


@pytest.mark.filterwarnings("ignore:std.*degrees of freedom")
def test_a_loss_that_is_nan_for_each_sample_alone_is_refused() -> None:
    assert "100.0% of the gradient of 8 samples together" in check(Net(), deviation).failure


def test_a_sample_of_padding_alone_has_no_part_in_a_mean() -> None:
    batch = torch.randn(SAMPLES, WIDTH), torch.tensor([0, 2, -100, 1, 2, 0, -100, 1])
    found = check_batch(Net(), lambda module, batch: F.cross_entropy(module(batch[0]), batch[1]), batch)
    assert found is not None
    assert found.failure is None
    assert np.isnan(found.total)


def test_a_loss_for_whole_batches_alone_is_not_seen_to_be_a_mean() -> None:
    weights = torch.rand(32)

    def whole(module: Any, batch: Any) -> Tensor:
        return (module(batch[0]).square().mean(1) * weights).mean()

    batch = (torch.randn(32, WIDTH),)
    with pytest.raises(PartError, match="must match the size of tensor"):
        check_batch(Net(), whole, batch)
    found = check_batch(Net(), whole, batch, has_run=True)
    assert found is not None
    assert found.failure is not None
    assert found.failure.startswith("the loss cannot be seen to be a mean of samples' losses: for 16 samples alone it")
    assert found.failure.endswith("have it take any number of samples, or give check='warn' if it is one")
