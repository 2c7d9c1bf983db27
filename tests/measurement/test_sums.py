"""Packed sums against plain products, alone and on two ranks."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from lightning_spectral.functional.moments import moments, pool
from lightning_spectral.measurement.sums import Panels, Sums, pooled, sums_bytes
from tests.distributed import run_distributed

CPU = torch.device("cpu")
WIDTH, GROUPS, LAYERS = 300, 3, 2


def unpacked(panels: Panels, packed: Tensor) -> Tensor:
    out = torch.full((*packed.shape[:-1], panels.width, panels.width), torch.nan, dtype=packed.dtype)
    panels.unpack(packed, out)
    return out


@given(st.integers(1, 40), st.integers(1, 50), st.integers(0, 9), st.integers(0, 2**31))
def test_panels_hold_a_symmetric_matrix(width: int, step: int, num_rows: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(num_rows, width, dtype=torch.float64, generator=generator)
    left = torch.randn(2, width, dtype=torch.float64, generator=generator)
    panels = Panels(width, step)
    assert panels.numbers <= width * (width + step) / 2 or step > width
    packed = torch.zeros(2, panels.numbers, dtype=torch.float64)
    panels.add_products(packed[0], rows)
    panels.add_outer(packed, left, left, -0.5)
    found = unpacked(panels, packed)
    assert torch.equal(found, found.mT)
    expected = -0.5 * left.unsqueeze(-1) * left.unsqueeze(-2)
    expected[0] += rows.mT @ rows
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("width", [1, 64, 129, 1000])
def test_what_is_kept_is_about_half_of_the_matrices(width: int) -> None:
    sums = Sums(4, width, CPU)
    spare = Sums(1, width, CPU)
    assert sums_bytes(4, width) == sums.nbytes + spare.nbytes - spare.pivot.nbytes
    assert sums_bytes(1, width) == spare.nbytes
    assert sums_bytes(4, width) <= 4 * 5 * width * (width + 128) + 8 * 6 * (width + 1)


def rows_of(rank: int, layer: int, group: int) -> Tensor:
    generator = torch.Generator().manual_seed(100 * rank + 10 * layer + group)
    num_rows = 0 if (rank, group) == (1, 2) else 5 + 3 * group + rank
    return torch.randn(num_rows, WIDTH, dtype=torch.float64, generator=generator) + 1e3 * rank + layer


def sums_of(rank: int, layer: int) -> Sums:
    sums = Sums(GROUPS, WIDTH, CPU)
    sums.pivot.copy_(rows_of(rank, layer, 0).mean(0))
    for group in range(GROUPS):
        slot, rows = sums.slot(group), rows_of(rank, layer, group) - sums.pivot
        slot.num_rows.add_(len(rows))
        slot.total.add_(rows.sum(0))
        sums.panels.add_products(slot.outer, rows)
    return sums


def measure(rank: int) -> dict:
    parts = [sums_of(rank, layer) for layer in range(LAYERS)]
    found, riders = pooled(parts, torch.tensor([1.0 + rank, 10.0], dtype=torch.float64), CPU)
    return {"moments": found, "riders": riders.tolist(), "left": len(parts)}


@pytest.fixture(scope="module", params=[1, 2])
def ranks(request: pytest.FixtureRequest) -> list[dict]:
    return run_distributed(measure, request.param)


def test_pooled_moments_are_those_of_all_rows(ranks: list[dict]) -> None:
    for layer in range(LAYERS):
        for group in range(GROUPS):
            expected = moments(torch.cat([rows_of(rank, layer, group) for rank in range(len(ranks))]))
            for seen in ranks:
                num_rows, mean, scatter = (part[layer, group] for part in seen["moments"])
                assert num_rows == expected.num_rows
                np.testing.assert_allclose(mean, expected.mean, rtol=1e-12)
                largest = float(expected.scatter.abs().max())
                np.testing.assert_allclose(scatter, expected.scatter, rtol=0, atol=1e-11 * largest)
                assert torch.equal(scatter, scatter.mT)


def test_riders_are_summed_and_parts_let_go_of(ranks: list[dict]) -> None:
    for seen in ranks:
        assert seen["riders"] == ([1, 10] if len(ranks) == 1 else [3, 20])
        assert seen["left"] == 0


def test_all_ranks_agree_to_the_bit(ranks: list[dict]) -> None:
    for mine, theirs in zip(ranks[0]["moments"], ranks[-1]["moments"], strict=True):
        assert torch.equal(mine, theirs)


def test_groups_pool_to_the_whole(ranks: list[dict]) -> None:
    whole = pool(ranks[0]["moments"])
    rows = torch.cat([rows_of(rank, 1, group) for rank in range(len(ranks)) for group in range(GROUPS)])
    expected = moments(rows)
    largest = float(expected.scatter.abs().max())
    np.testing.assert_allclose(whole.scatter[1], expected.scatter, rtol=0, atol=1e-11 * largest)
