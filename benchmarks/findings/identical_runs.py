"""How far two runs are from being one and the same in all that was measured but seconds."""

import csv
from collections.abc import Collection, Iterator
from math import inf

import numpy as np

from lightning_spectral import Run

OF_TIME = ("spectral/seconds", "tokens_per_second")
"""Columns that no two runs share."""


def largest_difference(one: Run, other: Run, but: Collection[str] = ()) -> float:
    """The largest absolute difference of what two runs recorded and logged.

    Args:
        one: A run.
        other: Another.
        but: Kinds of quantities that are left out, such as ``"activation"``, and names of columns that were logged.

    Returns:
        Zero if they are the same to the bit; infinite where one has what the other has not.
    """
    first, second = (dict(_arrays(run, but)) for run in (one, other))
    if first.keys() != second.keys():
        return inf
    return max((_difference(first[name], second[name]) for name in first), default=0.0)


def _arrays(run: Run, but: Collection[str]) -> Iterator[tuple[str, np.ndarray]]:
    for name in ("step", "tokens", "train_loss", "val_loss"):
        yield f"history {name}", getattr(run.history, name)
    for kind in run.kinds:
        if kind not in but:
            for step in run.steps(kind):
                for name, spectrum in run.spectra(kind, step).items():
                    yield f"{kind} {name} {step}", spectrum.values.numpy()
                    yield f"{kind} {name} {step} without groups", spectrum.leave_one_out.numpy()
    path = run.path / "metrics.csv"
    if path.exists():
        with path.open(newline="") as file:
            rows = list(csv.DictReader(file))
        for column in rows[0] if rows else ():
            if column not in OF_TIME and not {column, column.split("/")[0]} & set(but):
                yield f"logged {column}", np.array([float(row[column] or "nan") for row in rows])


def _difference(one: np.ndarray, other: np.ndarray) -> float:
    if np.array_equal(one, other, equal_nan=True):
        return 0.0
    if one.shape != other.shape or (np.isnan(one) != np.isnan(other)).any():
        return inf
    return float(np.nanmax(np.abs(one - other), initial=0.0))
