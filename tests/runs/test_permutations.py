"""Ways to exchange labels are all there are, once each, and p-values are those of SciPy's exact test."""

from itertools import combinations
from math import comb

import numpy as np
import pytest
from scipy import stats

from lightning_spectral.runs import permutations
from lightning_spectral.runs.permutations import flips, p_value, splits

SIZES = [(1, 1), (2, 2), (3, 3), (4, 4), (2, 3), (4, 2), (1, 5)]


@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_splits_are_all_there_are(sizes: tuple[int, int]) -> None:
    found = splits(*sizes)
    num_runs = sum(sizes)
    np.testing.assert_array_equal(found.base + found.variant, 1)
    np.testing.assert_array_equal(found.base.sum(1), sizes[0])
    np.testing.assert_array_equal(found.base[0], [1] * sizes[0] + [0] * sizes[1])
    sides = {frozenset(np.flatnonzero(row).tolist()) for row in found.base}
    every = {frozenset(chosen) for chosen in combinations(range(num_runs), sizes[0])}
    if sizes[0] == sizes[1]:
        every = {chosen for chosen in every if 0 in chosen}
        assert len(every) == comb(num_runs, sizes[0]) // 2
    assert sides == every
    assert len(found.base) == found.num_distinct == len(every)


@pytest.mark.parametrize("num_pairs", [1, 2, 3, 7])
def test_flips_are_all_there_are(num_pairs: int) -> None:
    found = flips(num_pairs)
    np.testing.assert_array_equal(found.base + found.variant, 1)
    np.testing.assert_array_equal(found.base[:, :num_pairs] + found.base[:, num_pairs:], 1)
    np.testing.assert_array_equal(found.base[0], [1] * num_pairs + [0] * num_pairs)
    assert (found.base[:, 0] == 1).all()
    assert len(np.unique(found.base, axis=0)) == found.num_distinct == 2 ** (num_pairs - 1)


def test_of_very_many_ways_some_are_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(permutations, "MOST", 200)
    monkeypatch.setattr(permutations, "NUM_DRAWN", 200)
    for found, num_distinct in ((splits(6, 6), 462), (splits(5, 6), 462), (flips(10), 512)):
        assert (len(found.base), found.num_distinct) == (200, num_distinct)
        num_base = int(found.base[0].sum())
        np.testing.assert_array_equal(found.base.sum(1), num_base)
        np.testing.assert_array_equal(found.base[0, :num_base], 1)
        np.testing.assert_array_equal(found.base + found.variant, 1)
        assert len(np.unique(found.base, axis=0)) > 150


@pytest.mark.parametrize("sizes", [(3, 3), (4, 4), (2, 4), (5, 3)], ids=str)
def test_p_values_are_those_of_scipy(sizes: tuple[int, int]) -> None:
    numbers = np.random.default_rng(sum(sizes)).standard_normal(sum(sizes))
    found = splits(*sizes)
    differences = np.abs(found.base @ numbers / sizes[0] - found.variant @ numbers / sizes[1])
    expected = stats.permutation_test(
        (numbers[: sizes[0]], numbers[sizes[0] :]),
        lambda base, variant, axis: np.abs(base.mean(axis) - variant.mean(axis)),
        n_resamples=np.inf,
        alternative="greater",
        vectorized=True,
    )
    assert p_value(differences) == pytest.approx(expected.pvalue)


def test_flips_give_the_p_value_of_scipy() -> None:
    differences = np.random.default_rng(1).standard_normal(7)
    found = flips(7)
    means = np.abs(found.base @ np.concatenate([differences, -differences]) / 7)
    expected = stats.permutation_test(
        (differences,),
        lambda found, axis: np.abs(found.mean(axis)),
        permutation_type="samples",
        n_resamples=np.inf,
        alternative="greater",
        vectorized=True,
    )
    assert p_value(means) == pytest.approx(expected.pvalue)


def test_a_statistic_that_is_not_known_has_no_p_value() -> None:
    np.testing.assert_array_equal(p_value(np.array([[np.nan, 1.0], [1.0, np.nan]])), [np.nan, 0.5])
