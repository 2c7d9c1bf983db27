"""Gradient flow against an integrated flow, its asymptote inside the window that its docstring names."""

import math

import pytest
import torch

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


def test_a_power_without_a_sum_is_refused() -> None:
    with pytest.raises(ValueError, match=r"beta must be above 1, got 1.0"):
        power_law_risk(1.0, 1.0, 0.5, 10.0)
