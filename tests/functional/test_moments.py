"""Moments against two passes in NumPy, and merging against the rows taken together."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lightning_spectral.functional import Moments, covariance, moments, pool
from lightning_spectral.functional.moments import PANEL, add_products, from_shifted_sums, mirror_
from tests import _reference


@pytest.fixture
def rng():
    return torch.Generator().manual_seed(0)


def far_rows(rng, *shape, mean=1e3):
    return torch.randn(*shape, dtype=torch.float64, generator=rng) + mean


def stack(parts):
    return Moments(*(torch.stack(field) for field in zip(*parts, strict=True)))


def assert_same(actual, expected, rtol=1e-9):
    """Equal to a share of the largest entry, which is the most that a sum of squares can promise."""
    for name, mine, theirs in zip(Moments._fields, actual, expected, strict=True):
        scale = max(float(theirs.abs().max()), 1e-300) if theirs.numel() else 1.0
        torch.testing.assert_close(
            mine, theirs, rtol=0, atol=rtol * scale, msg=lambda text, name=name: f"{name}: {text}"
        )


@pytest.mark.parametrize("mean", [0.0, 1e3, -1e6], ids=["centred", "mean_1e3", "mean_-1e6"])
@pytest.mark.parametrize(("num_rows", "width"), [(2, 1), (7, 3), (5, 11), (200, 6)])
def test_moments_equal_two_passes(rng, num_rows, width, mean):
    rows = far_rows(rng, num_rows, width, mean=mean)
    expected_mean, expected_scatter = _reference.mean_and_scatter(rows)
    count, actual_mean, scatter = moments(rows)
    assert count == num_rows
    np.testing.assert_allclose(actual_mean, expected_mean, rtol=1e-14, atol=1e-14)
    np.testing.assert_allclose(scatter, expected_scatter, rtol=0, atol=1e-13 * expected_scatter.max())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_any_dtype_is_summed_in_float64(rng, dtype):
    rows = far_rows(rng, 300, 4, mean=30.0).to(dtype)
    expected_mean, expected_scatter = _reference.mean_and_scatter(rows.double())
    sample = moments(rows)
    assert {field.dtype for field in sample} == {torch.float64}
    np.testing.assert_allclose(sample.mean, expected_mean, rtol=1e-14)
    np.testing.assert_allclose(sample.scatter, expected_scatter, rtol=0, atol=1e-13 * expected_scatter.max())


def test_batched_moments_equal_a_loop(rng):
    rows = far_rows(rng, 2, 3, 9, 4)
    batched = moments(rows)
    for i in range(2):
        for j in range(3):
            assert_same(Moments(*(field[i, j] for field in batched)), moments(rows[i, j]), rtol=1e-14)


def test_no_rows_have_zero_moments():
    sample = moments(torch.empty(2, 0, 3))
    assert [tuple(field.shape) for field in sample] == [(2,), (2, 3), (2, 3, 3)]
    assert not any(field.any() for field in sample)


def test_sums_about_a_pivot_give_the_same_moments(rng):
    rows = far_rows(rng, 40, 5)
    pivot = rows[0]
    shifted = rows - pivot
    assert_same(
        from_shifted_sums(torch.tensor(40.0).double(), shifted.sum(0), shifted.T @ shifted, pivot),
        moments(rows),
        rtol=1e-13,
    )


def test_a_pivot_without_rows_leaves_no_mean():
    zero = torch.zeros(3, dtype=torch.float64)
    sample = from_shifted_sums(zero[0], zero, torch.zeros(3, 3, dtype=torch.float64), zero + 7)
    assert not sample.mean.any()


@given(
    cuts=st.lists(st.integers(0, 30), max_size=5),
    seed=st.integers(0, 2**32 - 1),
    mean=st.sampled_from([0.0, 1e3]),
    drift=st.sampled_from([0.0, 1e3]),
)
def test_pooling_any_split_gives_the_whole(cuts, seed, mean, drift):
    rows = far_rows(torch.Generator().manual_seed(seed), 30, 4, mean=mean)
    rows = rows + drift * torch.linspace(0, 1, 30).unsqueeze(-1)
    bounds = [0, *sorted(cuts), 30]
    parts = [moments(rows[lo:hi]) for lo, hi in itertools.pairwise(bounds)]
    assert_same(pool(stack(parts)), moments(rows), rtol=1e-12)


@given(seed=st.integers(0, 2**32 - 1))
def test_order_of_rows_and_of_parts_does_not_matter(seed):
    generator = torch.Generator().manual_seed(seed)
    rows = far_rows(generator, 24, 3)
    shuffled = rows[torch.randperm(24, generator=generator)]
    assert_same(pool(moments(shuffled.view(4, 6, 3))), moments(rows), rtol=1e-12)


def test_subsets_equal_the_rows_of_their_members(rng):
    rows = far_rows(rng, 2, 4, 6, 3) * torch.arange(1, 5).view(4, 1, 1)
    without_each = 1 - torch.eye(4)
    pooled = pool(moments(rows), without_each)
    for layer in range(2):
        for deleted in range(4):
            kept = rows[layer, [group for group in range(4) if group != deleted]].reshape(-1, 3)
            assert_same(Moments(*(field[layer, deleted] for field in pooled)), moments(kept), rtol=1e-12)


def test_a_union_of_nothing_is_empty(rng):
    pooled = pool(moments(far_rows(rng, 2, 5, 3)), torch.zeros(1, 2))
    assert not any(field.any() for field in pooled)


def test_covariance_equals_the_scatter_over_n_minus_one(rng):
    rows = far_rows(rng, 9, 3)
    np.testing.assert_allclose(covariance(moments(rows)), _reference.mean_and_scatter(rows)[1] / 8, rtol=1e-10)


@pytest.mark.parametrize("num_rows", [0, 1])
def test_fewer_than_two_rows_have_no_covariance(num_rows):
    assert covariance(moments(torch.ones(num_rows, 3))).isnan().all()


def test_gradients_flow_through_moments():
    rows = torch.randn(6, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: covariance(moments(x)), rows)


@pytest.mark.parametrize("width", [1, 7, PANEL - 1, PANEL, PANEL + 1, 2 * PANEL + 44])
def test_products_by_panels_are_the_whole_product(rng, width):
    blocks = [far_rows(rng, num_rows, width, mean=3) for num_rows in (1, 50, 9)]
    total = torch.zeros(2, width, width, dtype=torch.float64)
    for index, block in enumerate(blocks):
        add_products(total[index % 2], block)
    mirror_(total)
    expected = [np.concatenate(blocks[index::2]) for index in range(2)]
    np.testing.assert_allclose(total, [rows.T @ rows for rows in expected], rtol=1e-13)


def test_a_bad_row_shows_after_mirroring(rng):
    rows = far_rows(rng, 5, PANEL + 3)
    rows[2, PANEL + 1] = torch.nan
    total = torch.zeros(PANEL + 3, PANEL + 3, dtype=torch.float64)
    add_products(total, rows)
    mirror_(total)
    assert total[PANEL + 1].isnan().all()
    assert total[:, PANEL + 1].isnan().all()
    assert int(total.isnan().sum()) == 2 * (PANEL + 3) - 1


def test_nothing_is_symmetric_already():
    for shape in ((0, 0), (3, 0, 0), (0, 4, 4)):
        mirror_(torch.zeros(shape))
