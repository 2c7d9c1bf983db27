"""The jackknife against deletion in a loop and against estimators whose bias is known."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lightning_spectral.functional import jackknife
from tests import _reference


@pytest.fixture
def groups():
    return np.random.default_rng(0).standard_normal((5, 8)) ** 2


def without_each(statistic, groups):
    return torch.tensor([statistic(np.delete(groups, deleted, axis=0).ravel()) for deleted in range(len(groups))])


@pytest.mark.parametrize("statistic", [np.mean, np.var, np.median], ids=lambda statistic: statistic.__name__)
def test_jackknife_equals_deletion_in_a_loop(groups, statistic):
    corrected, stderr = jackknife(torch.tensor(statistic(groups)), without_each(statistic, groups))
    expected = _reference.jackknife(statistic, list(groups))
    assert (float(corrected), float(stderr)) == pytest.approx(expected, rel=1e-12)


def test_the_bias_of_the_plain_variance_is_removed_exactly():
    x = np.random.default_rng(1).standard_normal((9, 1))
    corrected, _ = jackknife(torch.tensor(x.var()), without_each(np.var, x))
    assert float(corrected) == pytest.approx(x.var(ddof=1), rel=1e-12)


def test_the_error_of_a_mean_of_group_means_is_the_textbook_one(groups):
    _, stderr = jackknife(torch.tensor(groups.mean()), without_each(np.mean, groups))
    assert float(stderr) == pytest.approx(groups.mean(1).std(ddof=1) / np.sqrt(5), rel=1e-12)


@given(
    values=st.lists(st.floats(-1e3, 1e3), min_size=3, max_size=8),
    scale=st.floats(-1e3, 1e3),
    shift=st.floats(-1e3, 1e3),
)
def test_an_affine_map_of_estimates_maps_both_results(values, scale, shift):
    values = torch.tensor(values, dtype=torch.float64)
    corrected, stderr = jackknife(values[0], values[1:])
    mapped = jackknife(values[0] * scale + shift, values[1:] * scale + shift)
    torch.testing.assert_close(mapped.corrected, corrected * scale + shift, rtol=1e-9, atol=1e-6)
    torch.testing.assert_close(mapped.stderr, stderr * abs(scale), rtol=1e-9, atol=1e-6)


def test_a_batch_equals_a_loop():
    estimates = torch.rand(2, 3, 5, generator=torch.Generator().manual_seed(0))
    batched = jackknife(estimates[..., 0], estimates[..., 1:])
    for i in range(2):
        for j in range(3):
            single = jackknife(estimates[i, j, 0], estimates[i, j, 1:])
            torch.testing.assert_close((batched.corrected[i, j], batched.stderr[i, j]), tuple(single), rtol=0, atol=0)
    assert batched.corrected.dtype == torch.float64


@pytest.mark.parametrize("num_groups", [0, 1])
def test_fewer_than_two_groups_have_no_error_bar(num_groups):
    corrected, stderr = jackknife(torch.ones(3), torch.ones(3, num_groups))
    assert corrected.shape == stderr.shape == (3,)
    assert corrected.isnan().all()
    assert stderr.isnan().all()


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("position", [0, 2], ids=["estimate", "leave_one_out"])
def test_one_missing_estimate_leaves_neither_result(bad, position):
    estimates = torch.rand(2, 5, generator=torch.Generator().manual_seed(0))
    estimates[1, position] = bad
    corrected, stderr = jackknife(estimates[:, 0], estimates[:, 1:])
    assert corrected.isnan().tolist() == stderr.isnan().tolist() == [False, True]
