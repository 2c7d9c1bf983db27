"""Sums over groups and the interval of the noise scale: against loops over pairs, closed forms, scale and order."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats

from lightning_spectral.functional import NoiseSums, gradient_moments, noise_sums
from tests import _reference

GROUPS = torch.arange(26) * 4 // 26
"""Four stretches of 7, 6, 7 and 6 samples."""


def drawn(num_rows: int, width: int, truth: float, seed: int = 0) -> torch.Tensor:
    noise = torch.randn(num_rows, width, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return noise + truth**-0.5


def interval_of(rows: torch.Tensor, groups: torch.Tensor | None = None) -> tuple[float, float]:
    low, high = noise_sums(rows @ rows.T, groups).interval
    assert low.dtype == high.dtype == torch.float64
    return float(low), float(high)


def twin(rows: np.ndarray, groups: np.ndarray) -> tuple[float, float]:
    """The set of ratios that the test does not reject, found on a grid, group by group."""
    parts = [rows[groups == group] for group in range(groups.max() + 1)]
    counts, means = np.array([len(part) for part in parts]), np.array([part.mean(0) for part in parts])
    count, freedom = counts.sum(), len(parts) - 1
    pairs = [(a, b) for i, one in enumerate(parts) for j, two in enumerate(parts) if i != j for a in one for b in two]
    signal = math.fsum(float(a @ b) for a, b in pairs) / len(pairs)
    size = float((rows**2).sum(1).mean())
    mean = rows.mean(0)
    along = (means - mean) @ mean
    apart = np.array([(part**2).sum(1).mean() for part in parts]) - size
    # Contrasts between groups: rows that are uncorrelated whatever the mean.
    weights = np.linalg.svd(np.sqrt(counts)[None])[2][1:]
    contrasts = weights @ (means * np.sqrt(counts)[:, None])
    gram = contrasts @ contrasts.T
    spread = (gram**2).sum() - np.trace(gram) ** 2 / freedom
    noise = 2 * spread / ((freedom - 1) * (freedom + 2)) / len(pairs)
    v = (counts * along**2).sum() / freedom / (mean @ mean)
    w = (counts * apart**2).sum() / freedom / count
    c = 2 * (counts * along * apart).sum() / freedom / count * min(max(signal / (mean @ mean), 0), 1)
    by_groups = 4 * v / count * max(signal, 0) + (signal / size) ** 2 * w
    degrees = (by_groups + noise) ** 2 / (by_groups**2 / freedom + noise**2 / ((freedom - 1) * (freedom + 2) / 2))
    rho = np.linspace(0, 1, 2_000_001)
    limit = stats.t.ppf(0.9, degrees) ** 2 * (noise + rho * (4 * size * v / count - 2 * c) + rho**2 * w)
    kept = rho[(signal - rho * size) ** 2 <= limit]
    low = 1 / max(kept.max(initial=0), noise**0.5 / size / 10) - 1
    high = math.inf if not len(kept) or kept.min() == 0 else 1 / kept.min() - 1
    every = [float(a @ b) for i, a in enumerate(rows) for j, b in enumerate(rows) if i != j]
    signal = math.fsum(every) / len(every)
    estimate = (size - signal) / signal if signal > 0 else math.inf
    return min(low, estimate), max(high, estimate)


@pytest.mark.parametrize("truth", [1.0, 8.0, 200.0])
@pytest.mark.parametrize("seed", range(4))
def test_interval_is_what_the_test_does_not_reject(truth: float, seed: int) -> None:
    rows = drawn(26, 30, truth, seed)
    assert interval_of(rows, GROUPS) == pytest.approx(twin(rows.numpy(), GROUPS.numpy()), rel=1e-3)


def test_the_draws_above_are_of_all_kinds() -> None:
    found = [interval_of(drawn(26, 30, truth, seed), GROUPS) for truth in (1.0, 8.0, 200.0) for seed in range(4)]
    assert {math.isinf(high) for _, high in found} == {True, False}
    assert all(0 <= low < high for low, high in found)


def test_moments_of_all_pairs_are_those_of_the_matrix() -> None:
    rows = drawn(26, 30, 8.0)
    whole, grouped = gradient_moments(rows @ rows.T), noise_sums(rows @ rows.T, GROUPS)
    for one, other, expected in zip(whole, grouped.moments, _reference.gradient_moments(rows.numpy()), strict=True):
        assert float(one) == pytest.approx(float(other), rel=1e-12)
        assert float(one) == pytest.approx(expected)


def test_moments_between_groups_pass_over_pairs_within() -> None:
    rows = drawn(26, 30, 8.0).numpy()
    products = rows @ rows.T
    apart = GROUPS.numpy()[:, None] != GROUPS.numpy()
    squared_norm, trace = noise_sums(torch.tensor(products), GROUPS).moments_between
    assert float(squared_norm) == pytest.approx(products[apart].mean())
    assert float(trace) == pytest.approx((rows**2).sum(1).mean() - products[apart].mean())


def test_one_group_has_all_pairs() -> None:
    rows = drawn(9, 5, 1.0)
    sums = noise_sums(rows @ rows.T, torch.zeros(9, dtype=torch.int64))
    assert sums.moments_between == sums.moments


def test_likeness_within_groups_is_no_signal() -> None:
    # Eight documents of 16 windows, two a group, each with noise of its own as large as its windows'; no signal else.
    generator = torch.Generator().manual_seed(0)
    documents = torch.randn(200, 8, 1, 40, dtype=torch.float64, generator=generator)
    rows = (documents + torch.randn(200, 8, 16, 40, dtype=torch.float64, generator=generator)).flatten(1, 2) + 0.25
    sums = noise_sums(rows @ rows.mT, torch.arange(128) // 32)
    truth = 2 / 0.25**2
    assert float(sums.moments.squared_norm.mean()) > 2 * 40 * 0.25**2  # 15 of 127 pairs share a document
    assert float(sums.moments_between.squared_norm.mean()) == pytest.approx(40 * 0.25**2, rel=0.1)
    low, high = sums.interval
    assert 0.7 < float(((low <= truth) & (truth <= high)).double().mean()) < 0.95


def test_interval_holds_its_estimate_where_samples_of_a_group_are_alike() -> None:
    generator = torch.Generator().manual_seed(0)
    documents = torch.randn(50, 8, 1, 40, dtype=torch.float64, generator=generator)
    rows = (documents + 0.3 * torch.randn(50, 8, 16, 40, dtype=torch.float64, generator=generator)).flatten(1, 2) + 0.25
    sums = noise_sums(rows @ rows.mT, torch.arange(128) // 32)
    low, high = sums.interval
    assert bool(((low <= sums.noise_scale) & (sums.noise_scale <= high)).all())
    assert bool((low == sums.noise_scale).any())


def test_interval_does_not_know_the_scale_of_gradients_nor_the_order_of_groups() -> None:
    rows = drawn(26, 30, 8.0)
    for other in (interval_of(1e-9 * rows, GROUPS), interval_of(1e6 * rows, 3 - GROUPS)):
        assert other == pytest.approx(interval_of(rows, GROUPS), rel=1e-9)


def test_batched_intervals_equal_one_at_a_time() -> None:
    rows = torch.stack([drawn(26, 30, 8.0, seed) for seed in range(6)]).reshape(2, 3, 26, 30)
    low, high = noise_sums(rows @ rows.mT, GROUPS).interval
    assert low.shape == high.shape == (2, 3)
    each = [interval_of(part, GROUPS) for part in rows.flatten(0, 1)]
    np.testing.assert_allclose(torch.stack([low, high], -1).flatten(0, 1), each, rtol=1e-10)


def test_groups_without_samples_do_not_count() -> None:
    rows = drawn(26, 30, 8.0)
    sums = noise_sums(rows @ rows.T, GROUPS * 2, num_groups=9)
    assert tuple(map(float, sums.interval)) == pytest.approx(interval_of(rows, GROUPS))


@pytest.mark.parametrize("num_groups", [1, 2])
def test_fewer_than_three_groups_have_no_interval(num_groups: int) -> None:
    rows = drawn(26, 30, 8.0)
    assert all(map(math.isnan, interval_of(rows, torch.arange(26) % num_groups)))


@pytest.mark.parametrize("num_rows", [0, 1, 2])
def test_fewer_than_three_samples_have_no_interval(num_rows: int) -> None:
    assert all(map(math.isnan, interval_of(drawn(num_rows, 5, 1.0))))


def test_gradients_of_zero_have_no_interval() -> None:
    assert all(map(math.isnan, interval_of(torch.zeros(8, 5))))


def test_equal_gradients_are_known_to_have_no_noise() -> None:
    assert interval_of(torch.ones(8, 5, dtype=torch.float64)) == pytest.approx((0, 0), abs=1e-7)


def test_gradients_that_agree_less_than_noise_does_have_a_finite_low_end() -> None:
    # Means of groups that add up to zero: no gradient is too small for them.
    means = torch.tensor([[1.0, 0.0], [-1.0, 0.0], [0.0, 0.5], [0.0, -0.5]], dtype=torch.float64)
    low, high = interval_of(means, torch.arange(4))
    assert math.isfinite(low)
    assert low > 1
    assert high == math.inf


def test_sums_add_up_over_parameters() -> None:
    rows = drawn(26, 30, 8.0)
    parts = [noise_sums(part @ part.T, GROUPS) for part in (rows[:, :11], rows[:, 11:])]
    total = NoiseSums.total([*parts, NoiseSums.nothing()])
    assert tuple(map(float, total.interval)) == pytest.approx(interval_of(rows, GROUPS))
    assert float(total.noise_scale) == pytest.approx(float(noise_sums(rows @ rows.T).noise_scale))


def test_what_is_missing_of_one_parameter_is_missing_of_all() -> None:
    rows = drawn(26, 30, 8.0)
    known = noise_sums(rows @ rows.T, GROUPS)
    for parts in ([known, NoiseSums.missing()], [NoiseSums.missing()], [NoiseSums.nothing()], []):
        total = NoiseSums.total(parts)
        assert all(number.isnan() for number in (total.noise_scale, *total.moments_between, *total.interval))


@pytest.mark.parametrize(
    ("groups", "num_groups", "message"),
    [
        (torch.arange(3), None, r"groups must be one for each of 4 samples, got shape \(3,\)"),
        ([0, 0, 1, 1], None, r"groups must be a tensor, got \[0, 0, 1, 1\]: use torch.as_tensor"),
        (
            torch.tensor([0.0, 0.0, 1.0, 1.0]),
            None,
            "groups must hold whole numbers, got float32 of shape .*: use .long",
        ),
        (torch.tensor([0, -1, 1, 1]), None, "groups must be from 0 to 4095, got -1: number them in order"),
        (torch.tensor([0, 1, 1, 10**12]), None, "groups must be from 0 to 4095, got 1000000000000"),
        *(
            (torch.arange(4) % 2, num, "num_groups must be an int from 2 to 4096, got ")
            for num in ("2", 0, -1, 1, True)
        ),
        *((torch.arange(4) % 2, num, "num_groups must be an int from 2 to 4096, got ") for num in (2.0, 10**30, [2])),
        (None, 3, "num_groups must be an int from 4 to 4096, got 3"),
    ],
)
def test_what_are_no_groups_of_the_samples_is_refused(groups: Any, num_groups: Any, message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}") as caught:
        noise_sums(torch.eye(4), groups, num_groups)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int32, torch.int64], ids=str)
def test_groups_may_be_whole_numbers_of_any_type(dtype: torch.dtype) -> None:
    rows = drawn(26, 30, 8.0)
    sums = noise_sums(rows @ rows.T, GROUPS.to(dtype), np.int64(int(GROUPS.max()) + 1))
    assert tuple(map(float, sums.interval)) == pytest.approx(interval_of(rows, GROUPS))
