"""A few of many: what fits into a table or a figure."""

from collections.abc import Sequence
from typing import TypeVar

T = TypeVar("T")

MOST = 6
"""Reports of one layer in a table, or layers in a figure; more would be too many to read."""


def spread(items: Sequence[T], most: int = MOST) -> list[T]:
    """All items if they are few enough, else ``most``: the first, the last, and others evenly between."""
    if len(items) <= most:
        return list(items)
    return [items[round(i * (len(items) - 1) / (most - 1))] for i in range(most)]
