"""What lies between two spectra: a straight line through logarithms, as NumPy draws it."""

from dataclasses import replace
from math import isnan

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lightning_spectral.functional.estimate import NO_GROUPS, Spectrum
from lightning_spectral.runs.interpolation import between

VALUES = st.lists(st.floats(1e-6, 1e6), min_size=5, max_size=5).map(sorted).map(lambda values: values[::-1])
WEIGHTS = st.floats(0, 1)


def spectrum(values, step: float = 10.0, **facts) -> Spectrum:
    return Spectrum(torch.tensor(values, dtype=torch.float64), count=64, step=step, tokens=100 * step, **facts)


def power(alpha: float, step: float = 10.0, num_groups: int = 4) -> Spectrum:
    ranks = torch.arange(1, 33, dtype=torch.float64)
    # Exponents without each group scatter about that of all.
    without = torch.stack([ranks ** -(alpha + 0.01 * (group - 1.5)) for group in range(num_groups)])
    return Spectrum(ranks**-alpha, without, count=64, step=step, tokens=100 * step)


@given(VALUES, VALUES, WEIGHTS)
def test_logarithms_are_linear_in_the_weight(first, second, weight: float) -> None:
    found = between(spectrum(first), spectrum(second, 20.0), weight, 1234.0)
    expected = np.exp((1 - weight) * np.log(first) + weight * np.log(second))
    np.testing.assert_allclose(found, expected, rtol=1e-10)
    assert found.step == pytest.approx(10 + 10 * weight)
    assert (found.tokens, found.failure) == (1234.0, None)


@given(VALUES, VALUES, WEIGHTS)
def test_the_way_back_is_the_same_way(first, second, weight: float) -> None:
    there = between(spectrum(first), spectrum(second), weight, 0.0)
    back = between(spectrum(second), spectrum(first), 1 - weight, 0.0)
    np.testing.assert_allclose(there, back, rtol=1e-10)


@pytest.mark.parametrize("weight", [0.0, 0.25, 0.5, 1.0])
def test_exponents_and_their_errors_are_linear_in_the_weight(weight: float) -> None:
    first, second = power(1.0), power(2.0, 20.0)
    found = between(first, second, weight, 1500.0).exponent((1, 32))
    assert found.value == pytest.approx(1 + weight)
    assert found.stderr == pytest.approx(first.exponent((1, 32)).stderr)  # of groups that scatter alike


def test_where_one_value_is_zero_nothing_is_known() -> None:
    found = between(spectrum([4.0, 2.0, 0.0, 0.0]), spectrum([1.0, 0.0, 0.0, 0.0]), 0.25, 0.0)
    np.testing.assert_allclose(found, [4**0.75, 0.0, 0.0, 0.0])


def test_a_band_that_one_report_does_not_resolve_is_not_known_in_between() -> None:
    coarse, fine = power(1.0), replace(power(2.0, 20.0), dtype="float64")
    coarse = replace(coarse, values=coarse.values.masked_fill(coarse.values < 1 / 20, 0.0), dtype="float32")
    for sides in ((coarse, fine), (fine, coarse)):
        found = between(*sides, 0.7, 0.0).exponent((4, 24))
        assert isnan(found.value)
        assert found.reason.startswith(
            "band (4, 24), ranks 4 to 24, holds 17 positive values of 21: float32 resolves no"
        )


@pytest.mark.parametrize(("weight", "nearer"), [(0.0, 0), (0.49, 0), (0.5, 1), (1.0, 1)])
def test_eigenvectors_are_those_of_the_nearer(weight: float, nearer: int) -> None:
    bases = torch.eye(4, dtype=torch.float64)[:, :2], torch.eye(4, dtype=torch.float64)[:, 2:]
    sides = [spectrum([4.0, 3.0, 2.0, 1.0], vectors=basis) for basis in bases]
    assert between(*sides, weight, 0.0).vectors is bases[nearer]


def test_unlike_groups_leave_no_error_bars() -> None:
    found = between(power(1.0, num_groups=4), power(2.0, num_groups=3), 0.5, 0.0)
    assert found.leave_one_out is NO_GROUPS
    exponent = found.exponent((1, 32))
    assert exponent.value == pytest.approx(1.5)
    assert isnan(exponent.stderr)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"count": 48}, "the reports on both sides are of 64 and 48 rows"),
        ({"values": torch.ones(3, dtype=torch.float64)}, "the reports on both sides are of 64 and 64 rows"),
        ({"failure": "no convergence"}, "no convergence"),
    ],
    ids=["rows", "width", "failure"],
)
@pytest.mark.parametrize("weight", [0.2, 0.8])
def test_of_unlike_reports_there_is_nothing_between(changes: dict, reason: str, weight: float) -> None:
    first, second = power(1.0), replace(power(2.0, 20.0), **changes)
    found = between(first, second, weight, 77.0)
    assert found.failure == reason
    assert np.isnan(found).all()
    assert len(found.values) == len((second if weight > 0.5 else first).values)
    assert (found.tokens, found.step) == (77.0, pytest.approx(10 + 10 * weight))
    assert found.exponent((1, 3)).reason == reason


def test_the_earlier_failure_is_the_one_that_is_told() -> None:
    first, second = (Spectrum.missing(reason, step=step) for reason, step in (("this", 1.0), ("that", 2.0)))
    assert between(first, second, 0.9, 0.0).failure == "this"
