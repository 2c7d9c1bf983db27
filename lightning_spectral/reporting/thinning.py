"""Which of many points a page need not hold, because nobody would see them; and numbers as a page holds them."""

from collections.abc import Iterable, Sequence
from math import isfinite, isnan, log
from typing import Any

import numpy as np

MOST_COLUMNS = 600
"""Of a chart: about as many as it has pixels on a wide screen."""

RANK_COLUMNS = 400
"""Of a chart of eigenvalues, whose neighbours lie on a smooth line."""

DIGITS = 5
"""Significant ones of a number on a page."""


def kept_ranks(width: int, ends: Iterable[int] = ()) -> list[int]:
    """Ranks from 1 to a width of which no two lie closer together than a column of a chart with logarithmic ranks.

    Args:
        width: The last rank.
        ends: Ranks that are kept in any case, as ends of bands are.

    Returns:
        Ascending; the first and the last are among them.
    """
    always = {1, width, *ends}
    least = log(max(width, 2)) / RANK_COLUMNS
    kept, before = [], -1.0
    for rank in range(1, width + 1):
        if rank in always or log(rank) - before >= least:
            kept.append(rank)
            before = log(rank)
    return kept


def kept_points(at: np.ndarray, columns: Sequence[np.ndarray]) -> np.ndarray:
    """Points of some curves that a chart needs: in each of its columns the lowest and the highest of each curve.

    Args:
        at: ``(n,)`` where the points are, ascending; the chart's axis may be linear or logarithmic.
        columns: ``(n,)`` values of each curve; NaN is kept where it is, as a gap.

    Returns:
        Indices, ascending; all where they are few.
    """
    if len(at) <= 2 * MOST_COLUMNS:
        return np.arange(len(at))
    kept = {0, len(at) - 1}
    low = max(float(at[at > 0].min(initial=np.inf)), float(at[-1]) * 1e-6)
    for axis in (at, np.log(np.maximum(at, low))):
        span = float(axis[-1] - axis[0]) or 1.0
        column = np.minimum(((axis - axis[0]) / span * MOST_COLUMNS).astype(int), MOST_COLUMNS - 1)
        edges = np.flatnonzero(np.diff(column)) + 1
        for first, last in zip([0, *edges], [*edges, len(at)], strict=True):
            for values in columns:
                known = first + np.flatnonzero(np.isfinite(values[first:last]))
                if len(known):
                    kept |= {int(known[values[known].argmin()]), int(known[values[known].argmax()])}
                if len(known) < last - first:
                    kept.add(int(first + np.flatnonzero(~np.isfinite(values[first:last]))[0]))
    return np.array(sorted(kept))


def plain(value: Any) -> Any:
    """A number, or numbers in lists and tables, with few digits: null for NaN, and ``"inf"`` for what JSON has not."""
    if isinstance(value, dict):
        return {key: plain(part) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(part) for part in value]
    if isinstance(value, (bool, int, str)) or value is None:
        return value
    if not isinstance(value, (float, np.number)):
        return str(value)
    number = float(value)
    if isnan(number):
        return None
    if not isfinite(number):
        return "inf" if number > 0 else "-inf"
    short = float(f"{number:.{DIGITS}g}")
    # Counts stay whole, however many digits they have.
    return int(number) if number == int(number) and abs(number) < 1e15 else short
