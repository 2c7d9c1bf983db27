"""Two real gloo processes: who holds which data, and what placements mean."""

import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh

try:
    from torch.distributed.tensor import DTensor, Partial, Replicate, Shard
except ImportError:  # torch 2.4
    from torch.distributed._tensor import DTensor, Partial, Replicate, Shard

from lightning_spectral.metrics.layout import Layout, are_sharded, is_distributed
from tests.distributed import run_distributed

CPU = torch.device("cpu")
WHOLE = torch.arange(2.0 * 5 * 3).view(2, 5, 3)


def refusal(function, *args) -> str:
    try:
        function(*args)
    except ValueError as error:
        return str(error)
    return ""


def of_rank(rank: int) -> dict:
    mesh = init_device_mesh("cpu", (1, 2), mesh_dim_names=("data", "shared"))
    shared = Layout.of_data(0, 1, mesh, CPU)
    spread = Layout.of_data(rank, 2, mesh, CPU)
    line = mesh["shared"]
    parts = {
        axis: DTensor.from_local(
            WHOLE.chunk(2, axis)[rank], line, [Shard(axis)], shape=WHOLE.shape, stride=WHOLE.stride()
        )
        for axis in range(3)
    }
    partial = {how: DTensor.from_local(WHOLE / 2 + rank, line, [Partial(how)]) for how in ("sum", "max")}
    noise = torch.randn(2, 400, generator=torch.Generator().manual_seed(rank))
    sparse = noise * (torch.rand(2, 400, generator=torch.Generator().manual_seed(9)) > 0.9)
    return {
        "shared": (shared.rank, shared.world, shared.counts, shared.holders, shared.replicas, shared.peers),
        "spread": (spread.rank, spread.world, spread.counts, spread.holders, spread.replicas, spread.peers),
        "gathered": {axis: shared.whole(part) for axis, part in parts.items()},
        "replicated": shared.whole(DTensor.from_local(WHOLE, line, [Replicate()])),
        "summed": shared.whole(partial["sum"]),
        "max": refusal(shared.whole, partial["max"]),
        "of the batch": spread.whole(parts[0]),
        "features over data": refusal(spread.whole, parts[2]),
        "shard": shared.shard_of(parts[1])[:4],
        "no shard": (shared.shard_of(WHOLE), spread.shard_of(parts[1])),
        "alike": [
            shared.alike(x)
            for x in (WHOLE, WHOLE * (1 + 1e-3 * rank), torch.zeros(2, 2), noise, sparse, WHOLE[: 1 + rank])
        ],
        "total": shared.total(2 + rank, CPU),
        "uneven": refusal(Layout.of_data, 0, 3, mesh, CPU),
        "no mesh": refusal(Layout.of_data, 0, 1, None, CPU),
    }


@pytest.fixture(scope="module")
def ranks() -> list[dict]:
    return run_distributed(of_rank, 2)


def test_of_ranks_that_hold_the_same_data_one_counts(ranks: list[dict]) -> None:
    assert [found["shared"] for found in ranks] == [
        (0, 1, True, (0,), (0, 1), (0,)),
        (0, 1, False, (0,), (0, 1), (1,)),
    ]
    assert [found["spread"] for found in ranks] == [
        (0, 2, True, (0, 1), (0,), (0, 1)),
        (1, 2, True, (0, 1), (1,), (0, 1)),
    ]


@pytest.mark.parametrize("axis", range(3))
def test_shards_are_gathered_along_each_axis(ranks: list[dict], axis: int) -> None:
    for found in ranks:
        torch.testing.assert_close(found["gathered"][axis], WHOLE, rtol=0, atol=0)


def test_replicas_stay_and_sums_are_added_up(ranks: list[dict]) -> None:
    for found in ranks:
        torch.testing.assert_close(found["replicated"], WHOLE, rtol=0, atol=0)
        torch.testing.assert_close(found["summed"], WHOLE + 1, rtol=0, atol=0)


def test_what_data_ranks_share_along_the_batch_stays_where_it_is(ranks: list[dict]) -> None:
    for rank, found in enumerate(ranks):
        torch.testing.assert_close(found["of the batch"], WHOLE[rank : rank + 1], rtol=0, atol=0)


def test_placements_without_a_rule_are_refused(ranks: list[dict]) -> None:
    for found in ranks:
        for what in ("max", "features over data"):
            assert found[what].startswith("its output is a DTensor of placements")


def test_a_shard_is_the_chunk_that_this_rank_has(ranks: list[dict]) -> None:
    assert [found["shard"] for found in ranks] == [(1, 5, 0, 3), (1, 5, 3, 2)]
    assert all(found["no shard"] == (None, None) for found in ranks)


def test_replicas_are_told_from_shards_up_to_rounding(ranks: list[dict]) -> None:
    # Of sparse shards most entries are zero on both.
    assert all(found["alike"] == [True, True, True, False, False, False] for found in ranks)


def test_numbers_are_added_up_over_replicas(ranks: list[dict]) -> None:
    assert [found["total"] for found in ranks] == [5, 5]


def test_a_strategy_that_does_not_say_who_shares_is_refused(ranks: list[dict]) -> None:
    for found in ranks:
        assert found["uneven"].startswith("strategy must give the data of 3 ranks to equally many of 2 each")
        assert found["no mesh"].startswith("strategy must have a device_mesh with a dimension of ranks")


def test_one_process_holds_all() -> None:
    alone = Layout.of_world()
    assert (alone.rank, alone.world, alone.counts, alone.has_replicas) == (0, 1, True, False)
    assert not is_distributed(WHOLE)
    assert not are_sharded(torch.nn.Linear(2, 2))
