"""Spectra that are power laws, and the rank about which a change of exponent turns."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lightning_spectral.functional import power_law
from lightning_spectral.theory import crossover_rank, power_law_spectrum


@given(st.integers(8, 600), st.floats(0.0, 3.0))
def test_the_exponent_and_the_trace_are_those_asked_for(num: int, alpha: float) -> None:
    spectrum = power_law_spectrum(num, alpha)
    assert float(spectrum.sum()) == pytest.approx(1)
    assert float(power_law(spectrum, (1, num)).exponent) == pytest.approx(alpha, abs=1e-9)
    assert float(power_law_spectrum(num, alpha, normalize="top")[0]) == 1


@given(st.integers(8, 600), st.floats(0.1, 3.0))
def test_shares_turn_about_the_crossover(num: int, alpha: float) -> None:
    crossover = crossover_rank(power_law_spectrum(num, alpha))
    step = 1e-5
    slope = (power_law_spectrum(num, alpha + step).log() - power_law_spectrum(num, alpha - step).log()) / (2 * step)
    ranks = torch.arange(1, num + 1, dtype=torch.float64)
    torch.testing.assert_close(slope, math.log(crossover) - ranks.log(), rtol=0, atol=1e-6)


def test_a_scale_does_not_matter() -> None:
    spectrum = torch.tensor([5.0, 3.0, 0.5, 0.0])
    assert crossover_rank(spectrum) == pytest.approx(crossover_rank(7 * spectrum))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0, 1.0), "num must be an int from 1 to 100000000, got 0"),
        ((2.5, 1.0), "num must be an int from 1 to 100000000, got 2.5"),
        ((3, -1.0), "alpha must be a number from 0 on, got -1.0"),
        ((3, math.nan), "alpha must be a number from 0 on, got nan"),
        ((3, 1.0, "sum"), "normalize must be 'trace' or 'top', got 'sum'"),
    ],
)
def test_what_is_refused(arguments: tuple[object, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        power_law_spectrum(*arguments)
