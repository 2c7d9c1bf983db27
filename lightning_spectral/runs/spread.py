"""A few of many: what fits into a table or a figure."""

from collections.abc import Sequence
from typing import TypeVar

T = TypeVar("T")

MOST = 6
"""Reports of one layer in a table, or layers in a figure; more would be too many to read."""


def spread(items: Sequence[T]) -> list[T]:
    """All of up to six items, else six: the first, the last, and others evenly between."""
    if len(items) <= MOST:
        return list(items)
    return [items[round(i * (len(items) - 1) / (MOST - 1))] for i in range(MOST)]
