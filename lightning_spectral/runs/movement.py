"""Whether spectra moved from base to variant: an exact permutation test at three losses, and which kind moved most."""

from collections.abc import Mapping
from math import exp, isnan, log, nan
from typing import NamedTuple

import numpy as np

from lightning_spectral.runs.divergences import Divergences
from lightning_spectral.runs.permutations import Exchanges, flips, p_value, splits

P_VALUE = 0.025
"""Of a kind of spectra: two are asked about, and together they are to raise a false alarm in 5 of 100 cases."""

LEAST_WAYS = 35
"""With so many splits, those of four seeds a side, the most extreme one counts, though its p is 1/35 = 0.029."""

RATIO = 1.5
"""How many times as far apart as seeds the sides must be, at the least."""

MIN_LOSSES = 2
"""At how many of the losses both must hold."""

LEAD = log(2.0)
"""A kind leads that moved twice as far as the other, each in the scatter of its own seeds."""

LEAD_LEVEL = 0.8
"""Confidence of the interval of a lead, which must not hold zero."""

NUM_DRAWS = 2_000
"""Of the bootstrap."""


class Movement(NamedTuple):
    """Whether the spectra of a kind moved, and by what that was found."""

    kind: str
    losses: list[float]
    """Those that the sides are compared at; the matched loss first."""
    ratios: list[float]
    """R at each: mean divergence between sides over mean divergence between seeds of a side, meaned over layers."""
    p_values: list[float]
    """Of the exact permutation test at each; NaN where there are too few seeds for it."""
    tested_by: str
    """``splits`` of all runs into two sides, ``flips`` of pairs, or ``floors`` where there are too few seeds."""
    num_ways: int
    """How many splits or flips there are that differ: no p is below 1 over that."""
    has_moved: bool

    @property
    def ratio(self) -> float:
        """Geometric mean of the ratios; NaN where none is known."""
        known = [log(ratio) for ratio in self.ratios if ratio > 0]
        return exp(float(np.mean(known))) if known else nan


class Lead(NamedTuple):
    """Which kind of spectra moved most."""

    led_by: str
    """``activation-led``, ``gradient-led``, ``mixed`` or ``unmoved``; empty where there are no spectra."""
    difference: float
    """ln R of activations less ln R of gradients, meaned over the losses; NaN where one kind is missing."""
    low: float
    """80% interval, by bootstrap over seeds; NaN likewise, and where no side has two seeds."""
    high: float


def move(kind: str, found: Divergences, lies_beyond_floors: bool) -> Movement:
    """Decide whether the spectra of a kind moved.

    They did if at two of the three losses p is 0.025 at the most and R is 1.5 at the least. Where there are too few
    seeds for such a p, the divergence at the matched loss must lie beyond its floors instead.

    Args:
        kind: Of spectra.
        found: Divergences between the runs.
        lies_beyond_floors: Whether that between the sides does, of run and of sampling, at the matched loss.

    Returns:
        The decision, and what it rests on.
    """
    ratios = found.ratios(found.base, found.variant)[:, 0]
    by_flips = found.is_paired and not isnan(largest_p(2 ** (found.sizes[0] - 1)))
    exchanges = flips(found.sizes[0]) if by_flips else splits(*found.sizes)
    largest = largest_p(exchanges.num_distinct)
    if isnan(largest):
        p_values, is_apart = np.full(len(ratios), nan), np.full(len(ratios), lies_beyond_floors)
    else:
        p_values = _p_values(found if by_flips else found.without_pairs(), exchanges)
        is_apart = p_values <= largest + 1e-12
    has_moved = (is_apart & (ratios >= RATIO)).sum() >= MIN_LOSSES
    tested_by = "floors" if isnan(largest) else "flips" if by_flips else "splits"
    numbers = list(found.losses), ratios.tolist(), p_values.tolist()
    return Movement(kind, *numbers, tested_by, exchanges.num_distinct, bool(has_moved))


def largest_p(num_ways: int) -> float:
    """The largest p that counts where labels can be exchanged in so many ways; NaN where they are too few for any."""
    if num_ways * P_VALUE >= 1:
        return P_VALUE
    return 1 / num_ways if num_ways >= LEAST_WAYS else nan


def _p_values(found: Divergences, exchanges: Exchanges) -> np.ndarray:
    num_others = found.matrices.shape[-1] - sum(found.sizes)
    base, variant = (np.pad(one, ((0, 0), (0, num_others))) for one in exchanges[:2])
    return p_value(found.ratios(base, variant))


def find_lead(movements: Mapping[str, Movement], found: Mapping[str, Divergences]) -> Lead:
    """Find which kind of spectra moved most.

    Activations lead if they moved, and D, ln R of activations less ln R of gradients, is above ln 2 with its 80%
    interval above 0; gradients in mirror image. Else it is mixed if both moved, and unmoved if not. A kind that was
    measured alone leads if it moved.

    Args:
        movements: By kind.
        found: Their divergences.

    Returns:
        What leads, D and its interval.
    """
    if len(movements) < 2:
        alone = next(iter(movements.values()), None)
        led_by = "" if alone is None else f"{alone.kind}-led" if alone.has_moved else "unmoved"
        return Lead(led_by, nan, nan, nan)
    activation, gradient = movements["activation"], movements["gradient"]
    difference = float(_difference(np.array(activation.ratios)[:, None], np.array(gradient.ratios)[:, None])[0])
    weights = found["activation"].resampled(NUM_DRAWS, np.random.default_rng(0))
    drawn = _difference(*(found[kind].ratios(*weights) for kind in ("activation", "gradient")))
    low, high = (float(np.quantile(drawn, (1 + sign * LEAD_LEVEL) / 2)) for sign in (-1, 1))
    led_by = "mixed" if activation.has_moved and gradient.has_moved else "unmoved"
    if activation.has_moved and difference > LEAD and low > 0:
        led_by = "activation-led"
    elif gradient.has_moved and difference < -LEAD and high < 0:
        led_by = "gradient-led"
    return Lead(led_by, difference, low, high)


def _difference(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """Of logarithms ``(L, S)``, meaned over the losses at which both are known; NaN where they are at none."""
    with np.errstate(divide="ignore", invalid="ignore"):
        differences = np.log(one) - np.log(other)
        known = np.isfinite(differences)
        return np.asarray(np.where(known, differences, 0.0).sum(0) / known.sum(0))
