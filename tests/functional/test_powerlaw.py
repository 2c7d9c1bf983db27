"""Exponents against exact power laws, a slow twin and SciPy; bands against their definition."""

import math

import numpy as np
import pytest
import scipy.stats
import torch
from hypothesis import given
from hypothesis import strategies as st

from lightning_spectral.functional import power_law, resolve_band
from tests import _reference


@pytest.fixture
def noisy():
    """Seven spectra of 60 values about a power law."""
    rng = np.random.default_rng(0)
    values = np.arange(1, 61) ** -1.3 * np.exp(0.3 * rng.standard_normal((7, 60)))
    return torch.tensor(np.sort(values)[:, ::-1].copy())


@pytest.mark.parametrize("exponent", [0.01, 1.2, 6.0])
@pytest.mark.parametrize("band", [(1, 10), (30, 150), (0.125, 0.5), (0.0, 1.0)], ids=str)
def test_an_exact_power_law_is_recovered(exponent, band):
    fit = power_law(3e-7 * torch.arange(1, 201, dtype=torch.float64) ** -exponent, band)
    assert float(fit.exponent) == pytest.approx(exponent, abs=1e-11)
    assert float(fit.r2) == pytest.approx(1, abs=1e-9)


def test_the_fit_equals_its_twin_and_scipy(noisy):
    fit = power_law(noisy, (5, 40))
    for index, values in enumerate(noisy.numpy()):
        exponent, r2 = _reference.power_law(values, 5, 40)
        line = scipy.stats.linregress(np.log(np.arange(5, 41)), np.log(values[4:40]))
        assert float(fit.exponent[index]) == pytest.approx(exponent, rel=1e-11)
        assert float(fit.exponent[index]) == pytest.approx(-line.slope, rel=1e-11)
        assert float(fit.r2[index]) == pytest.approx(r2, rel=1e-11)
        assert float(fit.r2[index]) == pytest.approx(line.rvalue**2, rel=1e-11)
    assert fit.num_values.tolist() == [36] * 7


def test_a_batch_of_fits_equals_a_loop(noisy):
    fit = power_law(noisy[:6].view(2, 3, 60), (0.1, 0.9))
    for index in range(6):
        single = power_law(noisy[index], (0.1, 0.9))
        for batched, alone in zip(fit, single, strict=True):
            torch.testing.assert_close(batched.flatten()[index], alone, rtol=1e-13, atol=0)


@given(scale=st.floats(1e-100, 1e100))
def test_scale_changes_neither_exponent_nor_r2(scale):
    values = torch.arange(1, 41, dtype=torch.float64) ** -0.8 + 0.01
    fit, scaled = power_law(values, (2, 30)), power_law(values * scale, (2, 30))
    torch.testing.assert_close(scaled, fit, rtol=1e-9, atol=0)


def test_singular_values_have_half_the_exponent(noisy):
    torch.testing.assert_close(
        power_law(noisy.sqrt(), (5, 40)).exponent, power_law(noisy, (5, 40)).exponent / 2, rtol=1e-11, atol=0
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_logarithms_are_taken_in_float64(noisy, dtype):
    values = noisy.to(dtype)
    fit = power_law(values, (5, 40))
    assert fit.exponent.dtype == torch.float64
    torch.testing.assert_close(fit, power_law(values.double(), (5, 40)), rtol=0, atol=0)


def test_only_positive_values_are_fitted():
    values = torch.arange(1, 31, dtype=torch.float64) ** -2
    values[12:] = 0
    fit = power_law(values, (4, 20))
    assert float(fit.exponent) == pytest.approx(2)
    assert int(fit.num_values) == 9


@pytest.mark.parametrize("num_positive", [0, 1, 2])
def test_fewer_than_three_positive_values_give_no_exponent(num_positive):
    values = torch.zeros(30)
    values[: 9 + num_positive] = 1 / torch.arange(1, 10 + num_positive)
    fit = power_law(torch.stack([values, 1 / torch.arange(1, 31)]), (10, 20))
    assert fit.num_values.tolist() == [num_positive, 11]
    assert fit.exponent.isnan().tolist() == fit.r2.isnan().tolist() == [True, False]


@pytest.mark.parametrize(
    ("width", "band", "num_values"), [(1, (0.125, 0.5), 0), (4, (0.125, 0.5), 2), (5, (3, 4), 2)], ids=str
)
def test_a_band_of_fewer_than_three_ranks_gives_no_exponent(width, band, num_values):
    fit = power_law(torch.ones(2, width), band)
    assert fit.exponent.shape == (2,)
    assert fit.exponent.isnan().all()
    assert fit.num_values.tolist() == [num_values] * 2


def test_a_spectrum_of_nan_gives_no_exponent():
    fit = power_law(torch.full((30,), torch.nan), (1, 10))
    assert fit.exponent.isnan()
    assert fit.num_values == 0


@pytest.mark.parametrize("value", [0.1, 1.0, 1 / 3, 1e-20])
def test_equal_values_have_exponent_zero_and_no_r2(value):
    fit = power_law(torch.full((100,), value, dtype=torch.float64), (10, 50))
    assert fit.exponent == 0
    assert fit.r2.isnan()


@given(num_values=st.integers(1, 5000), fractions=st.tuples(st.floats(0, 1), st.floats(0, 1)))
def test_fractions_become_ranks_by_their_definition(num_values, fractions):
    lo, hi = sorted(fractions)
    if lo == hi:
        return
    assert resolve_band((lo, hi), num_values) == (max(1, math.floor(lo * num_values)), math.floor(hi * num_values))


def test_the_default_tail_of_256_values():
    assert resolve_band((0.125, 0.5), 256) == (32, 128)


def test_ranks_stay_ranks_also_as_a_list():
    assert resolve_band([30, 150], 150) == (30, 150)


@pytest.mark.parametrize(
    ("band", "message"),
    [
        ((10, 1), "two ascending ranks from 1"),
        ((4, 4), "two ascending ranks from 1"),
        ((0, 4), "two ascending ranks from 1"),
        ((0.5, 0.125), "two ascending fractions"),
        ((0.5, 1.5), "two ascending fractions"),
        ((-0.1, 0.5), "two ascending fractions"),
        ((math.nan, 0.5), "two ascending fractions"),
        ((1, 0.5), "do not mix"),
        ((1, 2, 3), "two ranks or two fractions"),
        ((True, 3), "two ranks or two fractions"),
        ("ab", "two ranks or two fractions"),
        (None, "two ranks or two fractions"),
        (3, "two ranks or two fractions"),
        ((1, 61), "end at or before rank 60"),
    ],
    ids=str,
)
def test_a_band_no_spectrum_has_is_refused_by_name(noisy, band, message):
    with pytest.raises(ValueError, match=rf"^band must .*{message}"):
        power_law(noisy, band)
    with pytest.raises(ValueError, match=rf"^tail must .*{message}"):
        resolve_band(band, 60, "tail")


def test_a_nan_in_the_band_is_not_left_out() -> None:
    values = torch.tensor([8.0, torch.nan, 4.0, 2.0, 1.0])
    assert power_law(values, (1, 5)).exponent.isnan()
    assert power_law(values, (3, 5)).exponent.isfinite()
