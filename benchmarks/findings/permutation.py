"""Tests by permutation, and Holm's correction of several of them."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
from scipy.stats import rankdata

NUM_PERMUTATIONS = 9_999
MIN_PAIRS = 4


class Separation(NamedTuple):
    """How much farther apart runs of different groups are than runs of one."""

    between: float
    """Mean distance of pairs of runs of different groups."""
    within: float
    """Of pairs of one group."""
    p_value: float
    """One-sided: how often relabelled runs are as far apart, the true labels among them."""


def separation(distances: np.ndarray, groups: Sequence[object], seed: int = 0) -> Separation:
    """Whether distances follow groups, against permutations of the labels.

    Args:
        distances: ``(n, n)``, symmetric.
        groups: n labels.
        seed: Of the permutations.

    Returns:
        Means over pairs and the p-value, not below 1 / 10,000; NaN where there is no pair of one kind.

    References:
        Anderson, *A new method for non-parametric multivariate analysis of variance*, Austral Ecology 26 (2001).
    """
    labels = np.unique(np.asarray(groups), return_inverse=True)[1]
    if _has_no_pairs(distances, labels):
        return Separation(np.nan, np.nan, np.nan)
    between, within = _means(distances, labels)
    generator = np.random.default_rng(seed)
    permuted = [_means(distances, labels[generator.permutation(len(labels))]) for _ in range(NUM_PERMUTATIONS)]
    return Separation(between, within, _share([b - w for b, w in permuted], between - within))


def exact_separation(distances: np.ndarray, groups: Sequence[object]) -> Separation:
    """The same against every way to deal the labels, for few runs.

    Args:
        distances: ``(n, n)``, symmetric.
        groups: n labels; of nine in three groups of three there are 280 ways that differ.

    Returns:
        Means over pairs and the p-value, not below one over the number of ways; NaN as of :func:`separation`.
    """
    labels = np.unique(np.asarray(groups), return_inverse=True)[1]
    if _has_no_pairs(distances, labels):
        return Separation(np.nan, np.nan, np.nan)
    between, within = _means(distances, labels)
    every = [_means(distances, np.array(order)) for order in arrangements(np.bincount(labels).tolist())]
    return Separation(between, within, _at_least([b - w for b, w in every], between - within) / len(every))


def arrangements(counts: Sequence[int]) -> Iterator[tuple[int, ...]]:
    """All sequences in which each label, a number from zero, comes as often as its count."""
    if not any(counts):
        yield ()
    for label, count in enumerate(counts):
        if count:
            rest = [*counts[:label], count - 1, *counts[label + 1 :]]
            yield from ((label, *others) for others in arrangements(rest))


def _means(distances: np.ndarray, labels: np.ndarray) -> tuple[float, float]:
    """Of pairs of different labels, and of pairs of one."""
    first, second = np.triu_indices(len(labels), 1)
    pairs, differ = distances[first, second], labels[first] != labels[second]
    return float(pairs[differ].mean()), float(pairs[~differ].mean())


def _has_no_pairs(distances: np.ndarray, labels: np.ndarray) -> bool:
    """Whether pairs of one kind are missing, or a distance is."""
    first, second = np.triu_indices(len(labels), 1)
    num_within = int((labels[first] == labels[second]).sum())
    return num_within in (0, len(first)) or bool(np.isnan(distances[first, second]).any())


def rank_correlation(
    x: np.ndarray, y: np.ndarray, given: Sequence[np.ndarray] = (), seed: int = 0, num: int = NUM_PERMUTATIONS
) -> np.ndarray:
    """Spearman's rho, given others, with a two-sided p-value.

    The residuals of the ranks of y given the others are permuted, and regressed on them anew.

    Args:
        x: ``(n,)``.
        y: ``(n,)``.
        given: Vectors ``(n,)``, by whose ranks those of both are explained first.
        seed: Of the permutations.
        num: How many.

    Returns:
        ``(2,)``: correlation and p-value, not below 1 / (num + 1); NaN for fewer than four left beside the others, and
        where nothing is left to correlate.

    References:
        Freedman, Lane, *A nonstochastic interpretation of reported significance levels*, Journal of Business &
        Economic Statistics 1 (1983).
    """
    if len(x) - len(given) < MIN_PAIRS:
        return np.full(2, np.nan)
    basis = np.linalg.qr(np.stack([np.ones(len(x)), *map(rankdata, given)], axis=1))[0]

    def residuals(rows: np.ndarray) -> np.ndarray:
        left = rows - (rows @ basis) @ basis.T
        return left / np.linalg.norm(left, axis=-1, keepdims=True)

    explained = 1e-9 * len(x) ** 1.5  # of ranks, rounding leaves less
    ranks = np.stack([rankdata(x), rankdata(y)])
    if (np.linalg.norm(ranks - (ranks @ basis) @ basis.T, axis=1) < explained).any():
        return np.full(2, np.nan)
    first, second = residuals(ranks)
    observed = float(first @ second)
    generator = np.random.default_rng(seed)
    shuffled = generator.permuted(np.tile(second, (num, 1)), axis=1)
    return np.array([observed, _share(np.abs(residuals(shuffled) @ first), abs(observed))])


def pooled_rank_correlation(
    x: Sequence[np.ndarray], y: Sequence[np.ndarray], seed: int = 0, num: int = NUM_PERMUTATIONS
) -> np.ndarray:
    """Correlation of ranks within strata, with a two-sided p-value by permutation within strata.

    Args:
        x: Of each stratum ``(n,)``.
        y: Likewise.
        seed: Of the permutations.
        num: How many.

    Returns:
        ``(2,)``: correlation of the ranks less their stratum's mean, and p-value, not below 1 / (num + 1); NaN where
        nothing is left to correlate.
    """

    def centred(parts: Sequence[np.ndarray]) -> list[np.ndarray]:
        return [ranks - ranks.mean() for ranks in map(rankdata, parts)]

    first, second = centred(x), centred(y)
    scale = float(np.linalg.norm(np.concatenate(first)) * np.linalg.norm(np.concatenate(second)))
    if scale == 0 or np.isnan(scale):
        return np.full(2, np.nan)
    observed = sum(float(one @ other) for one, other in zip(first, second, strict=True))
    generator = np.random.default_rng(seed)
    permuted = np.zeros(num)
    for one, other in zip(first, second, strict=True):
        permuted += generator.permuted(np.tile(other, (num, 1)), axis=1) @ one
    return np.array([observed / scale, _share(np.abs(permuted), abs(observed))])


def holm(p_values: Sequence[float]) -> list[float]:
    """Adjust p-values, so that the chance of any false one among them is kept.

    Args:
        p_values: Of all tests.

    Returns:
        As many, in their order.

    References:
        Holm, *A simple sequentially rejective multiple test procedure*, Scandinavian Journal of Statistics 6 (1979).
    """
    order = np.argsort(p_values)
    factors = np.arange(len(p_values), 0, -1)
    adjusted = np.empty(len(p_values))
    adjusted[order] = np.minimum(np.maximum.accumulate(np.asarray(p_values)[order] * factors), 1.0)
    return adjusted.tolist()


def _share(permuted: Sequence[float] | np.ndarray, observed: float) -> float:
    """Of those at least as large, the observed one among them; what differs by rounding is equal."""
    return (1 + _at_least(permuted, observed)) / (1 + len(permuted))


def _at_least(permuted: Sequence[float] | np.ndarray, observed: float) -> int:
    """How many are as large."""
    return int((np.asarray(permuted) >= observed - 1e-12 * abs(observed)).sum())
