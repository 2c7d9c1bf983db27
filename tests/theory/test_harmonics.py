"""Harmonics of planted cycles, and of the same features with their states in another order."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lightning_spectral.theory import band_concentration, harmonic_energy


@given(st.integers(5, 40), st.data())
def test_planted_harmonics_hold_their_share(cycle: int, data: st.DataObject) -> None:
    one, other = data.draw(st.lists(st.integers(1, (cycle - 1) // 2), min_size=2, max_size=2, unique=True))
    angle = 2 * math.pi * torch.arange(cycle, dtype=torch.float64) / cycle
    table = torch.stack([3 * (one * angle).cos(), 3 * (one * angle).sin(), (other * angle).cos() + 7], 1)
    energy = harmonic_energy(table)
    assert float(energy.sum()) == pytest.approx(float((table - table.mean(0)).square().sum()))
    assert band_concentration(energy, [one]) == pytest.approx(18 / 19)
    assert band_concentration(energy, [one, cycle - one, other]) == pytest.approx(1)


def test_states_in_another_order_have_no_harmonics() -> None:
    torch.manual_seed(0)
    cycle, angle = 64, 2 * math.pi * torch.arange(64, dtype=torch.float64) / 64
    table = torch.stack([(3 * angle).cos(), (3 * angle).sin()], 1)
    found = [band_concentration(harmonic_energy(table[torch.randperm(cycle)]), [3]) for _ in range(200)]
    assert sum(found) / 200 == pytest.approx(2 / 63, abs=0.01)


def test_features_that_do_not_differ_have_none() -> None:
    assert math.isnan(band_concentration(harmonic_energy(torch.ones(5, 2)), [1]))


def test_what_is_refused() -> None:
    for table, message in (
        (torch.ones(5), r"state_means must be \(states, channels\)"),
        (torch.full((5, 2), torch.nan), "state_means must be finite"),
    ):
        with pytest.raises(ValueError, match=message):
            harmonic_energy(table)
    for harmonic in (0, 5, True, 1.5):
        with pytest.raises(ValueError, match="harmonics must be whole numbers from 1 to 4"):
            band_concentration(torch.ones(5), [harmonic])
