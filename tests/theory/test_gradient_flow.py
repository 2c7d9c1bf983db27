"""Gradient flow against an integrated flow, its asymptote inside the window that its docstring names."""

import math

import pytest
import torch
from scipy.special import gammaln

from lightning_spectral.theory import gradient_flow_risk, power_law_risk, power_law_spectrum


def test_it_is_the_flow_of_the_loss() -> None:
    torch.manual_seed(0)
    features = torch.randn(200, 6, dtype=torch.float64) @ torch.randn(6, 6, dtype=torch.float64)
    covariance = features.T @ features / 200
    values, vectors = torch.linalg.eigh(covariance)
    values, vectors = values.flip(0), vectors.flip(1)
    error = torch.randn(6, dtype=torch.float64)
    power = values * (vectors.T @ error).square()
    for time in (0.0, 0.7, 3.0):
        moved = torch.linalg.matrix_exp(-0.3 * time * covariance) @ error
        assert float(gradient_flow_risk(values, power, 0.3, time)) == pytest.approx(float(moved @ covariance @ moved))


@pytest.mark.parametrize("alpha", [0.8, 1.0, 1.5, 2.0])
@pytest.mark.parametrize("beta", [1.5, 2.0, 2.5])
def test_the_asymptote_holds_within_its_window_and_not_beyond(alpha: float, beta: float) -> None:
    num = 4096
    spectrum = power_law_spectrum(num, alpha, normalize="top")
    power = torch.arange(1, num + 1, dtype=torch.float64) ** -beta
    order = (beta - 1) / alpha
    end = num**alpha * (0.05 * math.gamma(1 + order)) ** (1 / order)
    times = torch.logspace(math.log10(3), math.log10(end), 40, dtype=torch.float64)
    ratio = gradient_flow_risk(spectrum, power, 0.5, times) / power_law_risk(alpha, beta, 0.5, times)
    assert float((ratio - 1).abs().max()) < 0.0501
    late = gradient_flow_risk(spectrum, power, 0.5, 3 * end) / power_law_risk(alpha, beta, 0.5, 3 * end)
    assert 1 - float(late) > 0.0501


def test_flatter_tails_reach_far_targets_sooner_and_near_ones_later() -> None:
    num, steps = 512, torch.logspace(0, 8, 20_000, dtype=torch.float64)
    power = torch.arange(1, num + 1, dtype=torch.float64) ** -1.1
    first = {}
    for alpha in (0.8, 2.0):
        risk = gradient_flow_risk(power_law_spectrum(num, alpha), power / power.sum(), 1.0, steps)
        first[alpha] = [float(steps[int((risk < level).nonzero()[0])]) for level in (0.8, 0.05)]
    assert first[2.0][0] < first[0.8][0] / 3
    assert first[2.0][1] > first[0.8][1] * 10


@pytest.mark.parametrize(("alpha", "time"), [(0.005, 1000.0), (0.005, 300.0), (0.5, 1e200), (50.0, 3.0), (1e-3, 3e3)])
def test_the_asymptote_is_known_where_the_gamma_function_is_not(alpha: float, time: float) -> None:
    order = 1 / alpha
    # As SciPy has the integral of u^(order - 1) e^-u, in logarithms.
    expected = gammaln(order) - math.log(alpha) - order * math.log(time)
    found = float(power_law_risk(alpha, 2.0, 0.5, time))
    assert found == (math.inf if expected > 709 else pytest.approx(math.exp(expected), rel=1e-10))


def test_the_asymptote_of_a_flat_spectrum_is_its_sum() -> None:
    """Of modes that are many enough to be an integral, late enough: far beyond the order of its power."""
    alpha, order = 0.005, 200.0
    time = 800.0
    log_ranks = torch.linspace(0, 400, 400_001, dtype=torch.float64)  # of j, up to e^400
    integrand = torch.exp(-(order * alpha) * log_ranks - time * torch.exp(-alpha * log_ranks))
    expected = float(torch.trapezoid(integrand, log_ranks))
    assert float(power_law_risk(alpha, 2.0, 0.5, time)) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("steps", ["100", None, {}, 10**400, [1, "a"], torch.ones(2) * 1j])
def test_steps_that_are_none_are_refused(steps: object) -> None:
    for call in (
        lambda: power_law_risk(1.0, 2.0, 0.5, steps),
        lambda: gradient_flow_risk(torch.ones(2), torch.ones(2), 0.5, steps),
    ):
        with pytest.raises(ValueError, match=r"^steps must (be a number|hold real numbers)") as raised:
            call()
        assert "\n" not in str(raised.value)


def test_a_power_without_a_sum_is_refused() -> None:
    with pytest.raises(ValueError, match=r"beta must be above 1, got 1.0"):
        power_law_risk(1.0, 1.0, 0.5, 10.0)
