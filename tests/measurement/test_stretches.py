"""Groups of neighbours: the same however samples are batched, none empty, and good for a standard error."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_spectral.functional import jackknife
from lightning_spectral.measurement.stretches import Stretches, groups_of
from tests import _reference


def carried_out(sizes: list[int], num_groups: int) -> list[list[int]]:
    """The samples in each slot when joins and runs are followed, as sums follow them."""
    stretches, slots, first = Stretches(num_groups), [[] for _ in range(num_groups + 1)], 0

    def join(joins: list[int]) -> None:
        for index in joins:
            slots[index] += slots.pop(index + 1)
            slots.append([])

    for size in sizes:
        joins, runs = stretches.place(size)
        join(joins)
        for slot, start, stop in runs:
            slots[slot] += range(first + start, first + stop)
        first += size
    join(stretches.finish())
    assert [len(slot) for slot in slots if slot] == stretches.sizes
    return [slot for slot in slots if slot]


@given(st.lists(st.integers(0, 40), max_size=12), st.integers(1, 8))
@settings(max_examples=200, deadline=None)
def test_groups_are_those_of_one_sample_at_a_time(sizes: list[int], num_groups: int) -> None:
    assert carried_out(sizes, num_groups) == _reference.contiguous_groups(range(sum(sizes)), num_groups)


@pytest.mark.parametrize("num_groups", [2, 3, 4, 8])
def test_no_group_is_empty_or_longer_than_twice_another(num_groups: int) -> None:
    for count in range(num_groups, 400):
        sizes = [len(slot) for slot in carried_out([count], num_groups)]
        assert len(sizes) == num_groups
        assert max(sizes) <= 2 * min(sizes), (count, sizes)


def test_the_variance_of_a_mean_is_right_within_six_percent() -> None:
    """Of independent samples, whose leave-one-out means the jackknife sees; exactly, from their covariance."""
    for count in range(4, 300):
        shares = torch.tensor([len(slot) for slot in carried_out([count], 4)], dtype=torch.float64) / count
        # Means of groups have covariance diag(1 / shares), in units of the variance of the mean of all.
        weights = (shares.expand(4, 4) * (1 - torch.eye(4))) / (1 - shares).unsqueeze(-1)
        centred = weights - weights.mean(0)
        variance = 3 / 4 * float((centred.square() / shares).sum())
        assert 1 - 1e-9 <= variance <= 1.0625, count


def test_a_mean_of_powers_of_two_has_the_plain_standard_error() -> None:
    rows = torch.randn(64, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    means = torch.stack([rows[slot].mean() for slot in carried_out([10] * 6 + [4], 4)])
    without = (means.sum() - means) / 3
    assert float(jackknife(rows.mean(), without).stderr) == pytest.approx(float(means.std()) / 2)


@given(st.integers(0, 30), st.integers(1, 6), st.integers(1, 5))
@settings(deadline=None)
def test_known_numbers_are_cut_evenly_over_all_ranks(count: int, num_groups: int, world: int) -> None:
    of_ranks = [groups_of(count, num_groups, rank, world) for rank in range(world)]
    # Ranks that are dealt samples one by one: all in their order.
    groups = [of_ranks[rank][index] for index in range(count) for rank in range(world)]
    assert groups == sorted(groups)
    sizes = [groups.count(group) for group in range(num_groups)]
    assert max(sizes) - min(sizes) <= 1
    for of_rank in of_ranks:
        found = [of_rank.count(group) for group in range(num_groups)]
        assert max(found) <= math.ceil(count / num_groups)
