"""Task power against what training the last layer of a frozen model really takes off its loss."""

import math

import pytest
import torch
from torch import Tensor, nn

from lightning_spectral.functional import covariance_spectrum
from lightning_spectral.theory import Readout, gradient_flow_risk, readout_loss, task_power


def features_and_targets() -> tuple[Tensor, Tensor]:
    """A frozen tiny network's last hidden states, centred, and one of five classes each."""
    torch.manual_seed(0)
    inputs = torch.randn(600, 8, dtype=torch.float64)
    net = nn.Sequential(nn.Linear(8, 12), nn.Tanh(), nn.Linear(12, 10), nn.Tanh()).double()
    with torch.no_grad():
        hidden = net(inputs)
    targets = (inputs[:, :5] + 0.3 * torch.randn(600, 5, dtype=torch.float64)).argmax(-1)
    return hidden - hidden.mean(0), targets


def modes(hidden: Tensor) -> tuple[Tensor, Tensor]:
    values, vectors = torch.linalg.eigh(hidden.T @ hidden / len(hidden))
    return values.flip(0), vectors.flip(1)


def test_squared_error_sums_to_all_that_least_squares_takes_off() -> None:
    hidden, targets = features_and_targets()
    labels = nn.functional.one_hot(targets, 5).double()
    weight = 0.1 * torch.randn(5, 10, dtype=torch.float64)
    values, vectors = modes(hidden)
    torch.testing.assert_close(values, covariance_spectrum(hidden) * (len(hidden) - 1) / len(hidden))
    residual = hidden @ weight.T - labels
    power = task_power(values, vectors, residual.T @ hidden / len(hidden))
    best = torch.linalg.lstsq(hidden, labels).solution.T
    gain = (residual.square().sum() - (hidden @ best.T - labels).square().sum()) / len(hidden)
    assert float(power.sum()) == pytest.approx(float(gain))
    # And on the way there, by gradient steps of its half.
    moved, rate = weight.clone(), 0.05
    for _ in range(200):
        moved -= rate * (hidden @ moved.T - labels).T @ hidden / len(hidden)
    left = ((hidden @ moved.T - labels).square().sum() - (hidden @ best.T - labels).square().sum()) / len(hidden)
    assert float(left) == pytest.approx(float(gradient_flow_risk(values, power, rate, 200)), rel=0.02)


def test_cross_entropy_starts_at_its_slope_and_a_newton_step_takes_off_half_the_sum() -> None:
    hidden, targets = features_and_targets()
    weight = torch.zeros(5, 10, dtype=torch.float64)

    def loss(weight: Tensor) -> float:
        return float(nn.functional.cross_entropy(hidden @ weight.T, targets))

    labels = nn.functional.one_hot(targets, 5).double()
    gradient = ((hidden @ weight.T).softmax(-1) - labels).T @ hidden / len(hidden)
    values, vectors = modes(hidden)
    power = task_power(values, vectors, gradient)
    small = 1e-4
    step = loss(weight) - loss(weight - small * gradient)
    assert loss(weight) - float(readout_loss(loss(weight), values, power, small, 1)) == pytest.approx(step, rel=1e-3)
    newton = weight - gradient @ torch.linalg.inv(hidden.T @ hidden / len(hidden))
    assert loss(weight) - loss(newton) >= float(power.sum()) / 2
    rate, moved = 0.2, weight.clone()
    for _ in range(300):
        moved -= rate * ((hidden @ moved.T).softmax(-1) - labels).T @ hidden / len(hidden)
    promised = float(power.sum()) / 2
    assert loss(weight) - loss(moved) >= promised * (1 - math.exp(-2 * rate * 300 * float(values[0])))


def test_modes_without_variance_hold_nothing() -> None:
    power = task_power(torch.tensor([1.0, 0.0]), torch.eye(2), torch.tensor([[0.5, 1e-20]]))
    assert power.tolist() == [0.25, 0.0]


@pytest.mark.parametrize(
    ("basis", "gradient", "message"),
    [
        (torch.eye(3), torch.ones(1, 3), r"basis must be \(d, 2\), a column an eigenvalue, got \(3, 3\)"),
        (torch.eye(2), torch.ones(1, 3), r"readout_gradient must be \(classes, 2\), got \(1, 3\)"),
    ],
)
def test_shapes_that_do_not_fit_are_refused(basis: Tensor, gradient: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        task_power(torch.tensor([1.0, 0.5]), basis, gradient)


def test_a_readout_says_what_lies_in_its_head_and_what_would_be_left() -> None:
    found = Readout(torch.tensor([4.0, 1.0]), torch.tensor([1.0, 3.0]), loss=5.0, num_rows=10)
    assert (found.head_share(1), found.head_share(2)) == (0.25, 1.0)
    assert found.cumulative.tolist() == [0.25, 1.0]
    assert float(found.lower_bound(0.5, 0)) == 5.0
    assert float(found.lower_bound(0.5, 2.0)) == pytest.approx(5 - (1 - math.exp(-8) + 3 * (1 - math.exp(-2))) / 2)
    with pytest.raises(ValueError, match="k must be an int"):
        found.head_share(3)


def test_a_readout_that_is_missing_is_nan() -> None:
    found = Readout.missing("why")
    assert found.failure == "why"
    assert math.isnan(found.head_share(1))
    assert found.lower_bound(0.5, torch.arange(3)).isnan().all()
