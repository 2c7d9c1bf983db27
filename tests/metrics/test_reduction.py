"""Two real processes with unlike shares of the rows against one that holds them all."""

import re
from collections import Counter
from contextlib import contextmanager
from types import FunctionType
from unittest.mock import patch

import numpy as np
import pytest
import torch
import torch.distributed as dist

from lightning_spectral.functional import Moments, moments, pool
from lightning_spectral.metrics import CovarianceSpectrum
from lightning_spectral.metrics.reduction import gather_numbers, reduce_means, world_size
from tests import _reference
from tests.distributed import run_distributed

WIDTH = 5
WORLD = 2
SHARES = {
    # rows of each rank in two batches, and the mean of each rank
    "uneven": (((30, 5), (8, 3)), (0.0, 0.0)),
    "one_rank_empty": (((20, 4), (0, 0)), (1e3, 0.0)),
    "first_rank_empty": (((0, 0), (20, 4)), (0.0, 1e3)),
    "one_row_each": (((1, 0), (0, 1)), (0.0, 3.0)),
    "means_far_apart": (((25, 6), (40, 9)), (1e3, -1e3)),
}
COLLECTIVES = [
    name
    for name in dir(dist)
    if re.match(r"(all_|barrier|broadcast|gather|i?recv|i?send|monitored|reduce|scatter)", name)
    and type(getattr(dist, name)) is FunctionType
]
"""Whatever torch.distributed has that makes ranks wait for each other."""


def batches_of(share, rank):
    """Rows that every process can draw for every rank."""
    (sizes, means), generator = SHARES[share], torch.Generator().manual_seed(rank)
    return [torch.randn(n, WIDTH, dtype=torch.float64, generator=generator) + means[rank] for n in sizes[rank]]


def all_rows(share):
    return torch.cat([batch for rank in range(WORLD) for batch in batches_of(share, rank)])


def grouped_moments(rank):
    """Moments of two layers' three groups; the second rank has no row in the last."""
    generator = torch.Generator().manual_seed(10 + rank)
    sizes = (4 + rank, 9, 0 if rank == 1 else 6)
    groups = [moments(torch.randn(2, n, WIDTH, dtype=torch.float64, generator=generator) + 1e3 * rank) for n in sizes]
    return Moments(*(torch.stack(fields, 1) for fields in zip(*groups, strict=True)))


@contextmanager
def counted():
    """Count the collectives called by whatever runs inside, by name."""
    calls = Counter()

    def counting(name):
        function = getattr(dist, name)

        def call(*args, **kwargs):
            calls[name] += 1
            return function(*args, **kwargs)

        return call

    patches = [patch.object(dist, name, counting(name)) for name in COLLECTIVES]
    for each in patches:
        each.start()
    try:
        yield calls
    finally:
        for each in patches:
            each.stop()


def measure(rank):
    """What one process sees: results and the collectives they took."""
    seen = {"world_size": world_size()}
    for share in SHARES:
        metric = CovarianceSpectrum(WIDTH)
        for batch in batches_of(share, rank):
            metric.update(batch)
        before = metric.packed.clone()
        with counted() as calls:
            values = metric.compute()
        after = metric.packed.clone()
        metric.sync()
        synced = metric.packed.clone()
        metric.unsync()
        seen[share] = {
            "values": values,
            "calls": dict(calls),
            "before": before,
            "after": after,
            "synced": synced,
            "unsynced": metric.packed,
        }
    with counted() as calls:
        parts = grouped_moments(rank)
        count, mean, deviation, riders = reduce_means(*parts[:2], torch.tensor([1.0 + rank, 10.0]).double())
        scatter = parts.scatter + deviation.unsqueeze(-1) * deviation.unsqueeze(-2)
        dist.all_reduce(scatter)
        seen["reduced"] = Moments(count, mean, scatter), riders
    seen["reduce_calls"] = dict(calls)
    with counted() as calls:
        seen["gathered"] = gather_numbers([rank, 2**53 - 1 - rank], torch.device("cpu"))
    seen["gather_calls"] = dict(calls)
    on_step = CovarianceSpectrum(WIDTH, dist_sync_on_step=True)
    seen["on_step"] = on_step(batches_of("uneven", rank)[0])
    alone = [dist.new_group([member]) for member in range(WORLD)][rank]
    of_subgroup = CovarianceSpectrum(WIDTH, process_group=alone)
    of_subgroup.update(batches_of("uneven", rank)[0])
    seen["subgroup"] = of_subgroup.compute()
    return seen


@pytest.fixture(scope="module")
def ranks():
    return run_distributed(measure, WORLD)


def test_every_rank_knows_the_world(ranks):
    assert [seen["world_size"] for seen in ranks] == [WORLD] * WORLD


@pytest.mark.parametrize("share", SHARES)
def test_a_synchronised_metric_sees_the_pooled_rows(ranks, share):
    expected = _reference.covariance_spectrum(all_rows(share))
    for seen in ranks:
        np.testing.assert_allclose(seen[share]["values"], expected, rtol=1e-9, atol=1e-14 * expected[0])


@pytest.mark.parametrize("share", SHARES)
def test_all_ranks_agree_to_the_bit(ranks, share):
    assert torch.equal(ranks[0][share]["values"], ranks[1][share]["values"])


@pytest.mark.parametrize("share", SHARES)
def test_a_metric_synchronises_in_one_collective(ranks, share):
    assert [seen[share]["calls"] for seen in ranks] == [{"all_reduce": 1}] * WORLD


@pytest.mark.parametrize("share", SHARES)
def test_a_rank_keeps_its_own_rows_after_synchronising(ranks, share):
    for seen in ranks:
        assert torch.equal(seen[share]["after"], seen[share]["before"])
        assert torch.equal(seen[share]["unsynced"], seen[share]["before"])


@pytest.mark.parametrize("share", SHARES)
def test_synchronising_by_hand_pools_the_same_state(ranks, share):
    pooled = moments(all_rows(share))
    expected = torch.cat([pooled.num_rows.view(1), pooled.mean, pooled.scatter.flatten()])
    for seen in ranks:
        torch.testing.assert_close(seen[share]["synced"], expected, rtol=1e-9, atol=1e-9)


def test_forward_that_synchronises_sees_the_step_of_all_ranks(ranks):
    expected = _reference.covariance_spectrum(torch.cat([batches_of("uneven", rank)[0] for rank in range(WORLD)]))
    for seen in ranks:
        np.testing.assert_allclose(seen["on_step"], expected, rtol=1e-9)


def test_a_process_group_keeps_to_itself(ranks):
    for rank, seen in enumerate(ranks):
        expected = _reference.covariance_spectrum(batches_of("uneven", rank)[0])
        np.testing.assert_allclose(seen["subgroup"], expected, rtol=1e-9)


def test_reduced_moments_equal_pooled_moments(ranks):
    parts = Moments(*(torch.stack(fields, 2) for fields in zip(*map(grouped_moments, range(WORLD)), strict=True)))
    expected = pool(parts)
    for seen in ranks:
        reduced, _ = seen["reduced"]
        assert torch.equal(reduced.num_rows, expected.num_rows)
        torch.testing.assert_close(reduced.mean, expected.mean, rtol=1e-13, atol=1e-13)
        largest = expected.scatter.abs().amax((-1, -2), keepdim=True)
        torch.testing.assert_close(reduced.scatter / largest, expected.scatter / largest, rtol=0, atol=1e-12)


def test_riders_are_summed_and_the_reduction_takes_two_collectives(ranks):
    for seen in ranks:
        assert seen["reduced"][1].tolist() == [3, 20]
        assert seen["reduce_calls"] == {"all_reduce": 2}


def test_gathered_numbers_are_exact_and_in_order(ranks):
    for seen in ranks:
        assert seen["gathered"].tolist() == [[0, 2**53 - 1], [1, 2**53 - 2]]
        assert seen["gather_calls"] == {"all_reduce": 1}


def test_one_process_needs_no_group():
    parts, riders = grouped_moments(0), torch.ones(1)
    with counted() as calls:
        count, mean, deviation, summed = reduce_means(*parts[:2], riders)
        assert (count is parts.num_rows, mean is parts.mean, summed is riders) == (True, True, True)
        assert not deviation.any()
        assert gather_numbers([3, 5], torch.device("cpu")).tolist() == [[3, 5]]
    assert (world_size(), dict(calls)) == (1, {})
