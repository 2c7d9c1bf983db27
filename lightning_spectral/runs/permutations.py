"""Ways to exchange the labels of two sides: where these do not differ, the true one is one like any other."""

from itertools import combinations, product
from math import comb
from typing import NamedTuple

import numpy as np

MOST = 20_000
"""More ways than that are drawn from rather than gone through."""

NUM_DRAWN = 5_000
"""So many then, the true one among them: a p of 0.025 is known to 0.002."""


class Exchanges(NamedTuple):
    """Ways to exchange labels, the true one first."""

    base: np.ndarray
    """``(S, n)``: 1 for runs that are in base."""
    variant: np.ndarray
    """Likewise."""
    num_distinct: int
    """How many ways there are that differ by more than the names of the sides: p is 1 over that at the least."""


def splits(num_base: int, num_variant: int) -> Exchanges:
    """All splits of runs into sides of their sizes.

    Sides of one size may be exchanged as a whole, by which nothing changes: of those the first run stays in base.

    Args:
        num_base: Runs of base.
        num_variant: Runs of variant.
    """
    num_runs = num_base + num_variant
    stays = int(num_base == num_variant)
    num_distinct = comb(num_runs - stays, num_base - stays)
    if num_distinct <= MOST:
        chosen = np.array(list(combinations(range(stays, num_runs), num_base - stays)), dtype=int)
    else:
        generator = np.random.default_rng(0)
        order = generator.random((NUM_DRAWN - 1, num_runs - stays)).argsort(1)[:, : num_base - stays] + stays
        chosen = np.concatenate([np.arange(stays, num_base)[None], order])
    base = np.zeros((len(chosen), num_runs))
    base[:, :stays] = 1
    np.put_along_axis(base, chosen.reshape(len(chosen), -1), 1, axis=1)
    return Exchanges(base, 1 - base, num_distinct)


def flips(num_pairs: int) -> Exchanges:
    """All ways to exchange base and variant within pairs, whose runs stand in one order in both; the first pair stays.

    Args:
        num_pairs: Of them.
    """
    num_distinct = 2 ** (num_pairs - 1)
    if num_distinct <= MOST:
        flipped = np.array(list(product((0, 1), repeat=num_pairs - 1)), dtype=float).reshape(num_distinct, -1)
    else:
        drawn = np.random.default_rng(0).integers(0, 2, (NUM_DRAWN - 1, num_pairs - 1)).astype(float)
        flipped = np.concatenate([np.zeros((1, num_pairs - 1)), drawn])
    flipped = np.concatenate([np.zeros((len(flipped), 1)), flipped], axis=1)
    return Exchanges(
        np.concatenate([1 - flipped, flipped], axis=1), np.concatenate([flipped, 1 - flipped], axis=1), num_distinct
    )


def p_value(statistics: np.ndarray) -> np.ndarray:
    """The share of ways, along the last axis, that give as much as the first, itself among them.

    Args:
        statistics: ``(..., S)``; what differs by rounding is equal.

    Returns:
        ``(...)``; NaN where the first is.
    """
    first = statistics[..., :1]
    share = (statistics >= first - 1e-9 * np.abs(first)).mean(-1)
    return np.where(np.isnan(first[..., 0]), np.nan, share)
