"""SGD's learning curve against its plain recursion, simulated runs, and both sides of where it settles."""

import math

import pytest
import torch
from torch import Tensor

from lightning_spectral.functional import gradient_noise_scale
from lightning_spectral.theory import (
    critical_batch_size,
    gradient_flow_risk,
    noise_scale,
    power_law_spectrum,
    sgd_risk,
    stability,
    steps_to_risk,
    tokens_to_risk,
)

SETTINGS = [
    *((alpha, batch, noise) for alpha in (0.8, 2.0) for batch in (1, 4, 64) for noise in (0.0, 0.1)),
    *((1.2, batch, noise) for batch in (2, 16) for noise in (0.0, 0.1)),
]


def recursion(spectrum: Tensor, power: Tensor, rate: float, batch: float, noise: float, steps: int) -> list[float]:
    moments = [float(c / value) for c, value in zip(power, spectrum, strict=True)]
    risks = []
    for _ in range(steps + 1):
        risk = sum(float(value) * m for value, m in zip(spectrum, moments, strict=True))
        risks.append(risk)
        moments = [
            (1 - 2 * rate * v + rate**2 * v**2 * (1 + 1 / batch)) * m + rate**2 / batch * v * (risk + noise)
            for v, m in zip(spectrum.tolist(), moments, strict=True)
        ]
    return risks


def simulated(spectrum: Tensor, power: Tensor, rate: float, batch: int, noise: float, steps: int, runs: int) -> Tensor:
    """``(steps + 1, runs)`` risks of real runs of SGD on Gaussian rows, from errors of the power's size."""
    generator = torch.Generator().manual_seed(batch)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    error = (power / spectrum).sqrt().expand(runs, -1)
    risks = [error.square() @ spectrum]
    for _ in range(steps):
        rows = normal(runs, batch, len(spectrum)) * spectrum.sqrt()
        residual = torch.einsum("rbd,rd->rb", rows, error) - noise**0.5 * normal(runs, batch)
        error = error - rate / batch * torch.einsum("rb,rbd->rd", residual, rows)
        risks.append(error.square() @ spectrum)
    return torch.stack(risks)


def problem(alpha: float, num: int = 24) -> tuple[Tensor, Tensor]:
    return power_law_spectrum(num, alpha), torch.arange(1, num + 1, dtype=torch.float64) ** -1.5


@pytest.mark.parametrize(("alpha", "batch", "noise"), SETTINGS)
def test_it_is_the_plain_recursion(alpha: float, batch: int, noise: float) -> None:
    spectrum, power = problem(alpha)
    expected = torch.tensor(recursion(spectrum, power, 0.4, batch, noise, 60), dtype=torch.float64)
    torch.testing.assert_close(
        sgd_risk(spectrum, power, 0.4, batch, noise, torch.arange(61)), expected, rtol=1e-10, atol=0
    )


@pytest.mark.parametrize(("alpha", "batch", "noise"), SETTINGS)
def test_it_is_the_mean_of_simulated_runs(alpha: float, batch: int, noise: float) -> None:
    spectrum, power = problem(alpha)
    steps = torch.tensor([1, 5, 20, 60])
    risks = simulated(spectrum, power, 0.3, batch, noise, 60, runs=200)[steps]
    error = risks.std(1) / 200**0.5
    expected = sgd_risk(spectrum, power, 0.3, batch, noise, steps)
    assert bool(((risks.mean(1) - expected).abs() < 4 * error).all()), (risks.mean(1), expected, error)


def test_small_rates_on_all_rows_are_gradient_flow() -> None:
    spectrum, power = problem(1.0)
    flow = gradient_flow_risk(spectrum, power, 1e-4, torch.tensor([1e4, 1e5]))
    torch.testing.assert_close(
        sgd_risk(spectrum, power, 1e-4, math.inf, 0.0, torch.tensor([10_000, 100_000])), flow, rtol=1e-4, atol=0
    )


@pytest.mark.parametrize("batch", [1, 8])
def test_both_sides_of_kappa_one(batch: int) -> None:
    spectrum, power = problem(0.5, num=64)
    low, high = 1e-3, 2.0 * batch
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if stability(spectrum, middle, batch).is_stable else (low, middle)
    late = torch.tensor([10_000, 20_000])
    settled = sgd_risk(spectrum, power, 0.98 * low, batch, 0.1, late)
    assert float(settled[1]) == pytest.approx(float(settled[0]), rel=1e-3)
    assert stability(spectrum, 0.98 * low, batch).kappa < 1
    runaway = sgd_risk(spectrum, power, 1.02 * low, batch, 0.1, late)
    assert float(runaway[1]) > 10 * float(runaway[0]) or bool(runaway[1].isnan())
    beyond = stability(spectrum, 1.02 * low, batch)
    # It is the batches' noise that keeps it from settling, not a step that overshoots.
    assert beyond.kappa > 1
    assert beyond.sharpness < 2
    assert not beyond.is_stable
    assert bool(sgd_risk(spectrum, power, 1.5 * low, batch, 0.1, 10**7).isnan())


@pytest.mark.parametrize(("alpha", "batch"), [(0.4, 1), (0.6, 4), (0.8, 32)])
def test_the_floor_to_five_digits(alpha: float, batch: int) -> None:
    spectrum, power = problem(alpha)
    found = stability(spectrum, 0.4, batch, noise=0.1)
    assert float(sgd_risk(spectrum, power, 0.4, batch, 0.1, 10**7)) == pytest.approx(found.floor, rel=1e-6)
    assert recursion(spectrum, power, 0.4, batch, 0.1, 4000)[-1] == pytest.approx(found.floor, rel=1e-5)


def test_sharpness_alone_overshoots() -> None:
    found = stability(torch.tensor([1.0]), 2.0, 10**6, noise=0.1)
    assert not found.is_stable
    assert found.floor == math.inf


@pytest.mark.parametrize(("batch", "noise", "target"), [(1, 0.0, 0.3), (4, 0.1, 0.4), (64, 0.0, 0.02), (8, 0.0, 1e-4)])
def test_steps_to_a_target_are_where_the_recursion_first_passes_it(batch: int, noise: float, target: float) -> None:
    spectrum, power = problem(1.2)
    found = steps_to_risk(spectrum, power, 0.4, batch, noise, target)
    last = math.ceil(found)
    before, after = sgd_risk(spectrum, power, 0.4, batch, noise, torch.tensor([last - 1, last]))
    assert before > target >= after * (1 - 1e-9)
    assert tokens_to_risk(spectrum, power, 0.4, batch, noise, target, 128) == pytest.approx(found * batch * 128)


def test_targets_that_are_never_reached_or_from_the_start() -> None:
    spectrum, power = problem(1.2)
    floor = stability(spectrum, 0.4, 1, noise=0.1).floor
    assert steps_to_risk(spectrum, power, 0.4, 1, 0.1, 0.9 * floor) == math.inf
    assert steps_to_risk(spectrum, power, 0.4, 1, 0.1, 1.1 * floor) < math.inf
    assert steps_to_risk(spectrum, power, 0.4, 1, 0.1, 2 * float(power.sum())) == 0.0
    assert steps_to_risk(spectrum, power, 9.0, 1, 0.1, 0.1) == math.inf


def test_modes_without_variance_are_never_learnt() -> None:
    spectrum, power = torch.tensor([1.0, 0.0]), torch.tensor([1.0, 0.25])
    assert float(sgd_risk(spectrum, power, 0.5, 4, 0.0, 10**6)) == pytest.approx(0.25)


def test_the_critical_batch_size_takes_twice_the_steps() -> None:
    spectrum, power = problem(1.2)
    critical = critical_batch_size(spectrum, power, 0.4, 0.1, 0.1)
    fewest = steps_to_risk(spectrum, power, 0.4, math.inf, 0.1, 0.1)
    assert steps_to_risk(spectrum, power, 0.4, critical, 0.1, 0.1) == pytest.approx(2 * fewest, rel=1e-6)
    assert math.isnan(critical_batch_size(spectrum, power, 0.4, 0.1, 10.0))
    # Nearer targets lie where the gradient is still large beside its noise.
    assert critical < critical_batch_size(spectrum, power, 0.4, 0.1, 0.05)


@pytest.mark.parametrize("noise", [0.0, 1.0])
def test_the_noise_scale_is_what_rows_of_gradients_show(noise: float) -> None:
    spectrum, power = problem(1.2)
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(40_000, 24, generator=generator, dtype=torch.float64) * spectrum.sqrt()
    labels = noise**0.5 * torch.randn(40_000, generator=generator, dtype=torch.float64)
    rows = features * (features @ (power / spectrum).sqrt() - labels).unsqueeze(-1)
    measured = torch.stack([gradient_noise_scale(part @ part.T) for part in rows.chunk(20)])
    expected = noise_scale(spectrum, power, noise)
    assert float(measured.mean()) == pytest.approx(expected, abs=4 * float(measured.std()) / 20**0.5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"spectrum": torch.tensor([1.0, 2.0])}, "spectrum must descend"),
        ({"spectrum": torch.tensor([1.0, -1.0])}, "spectrum must not be negative"),
        ({"spectrum": torch.tensor([0.0, 0.0])}, "spectrum must have a positive eigenvalue"),
        ({"spectrum": torch.tensor([torch.nan, 0.0])}, "spectrum must be finite"),
        ({"spectrum": torch.ones(2, 2)}, "spectrum must be a vector"),
        ({"power": torch.ones(3)}, "power must have 2 values"),
        ({"power": torch.tensor([1.0, -1.0])}, "power must not be negative"),
        ({"rate": 0.0}, "rate must be a positive number, got 0.0"),
        ({"batch_size": True}, "batch_size must be a positive number, got True"),
        ({"noise": -1.0}, "noise must be a number from 0 on, got -1.0"),
        ({"steps": -1}, "steps must not be negative, got -1"),
    ],
)
def test_what_is_refused(change: dict[str, object], message: str) -> None:
    given = {"spectrum": torch.tensor([1.0, 0.5]), "power": torch.ones(2), "rate": 0.1, "batch_size": 4, "noise": 0.0}
    with pytest.raises(ValueError, match=message) as refusal:
        sgd_risk(**(given | {"steps": 3} | change))
    assert "\n" not in str(refusal.value)
