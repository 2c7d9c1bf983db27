"""Whether the runs of a side are seeds of one setting, each there once, and none on both sides."""

import warnings
from collections.abc import Sequence
from typing import Any

from lightning_spectral.runs.run import Run
from lightning_spectral.runs.settings import settings_of

LEAST_ENTRIES = 3
"""Losses of which two runs must have all alike to be taken for one: fewer, if rounded, might be so by chance."""


def check_alike(name: str, runs: Sequence[Run]) -> None:
    """Refuse runs that are no seeds of one setting, and warn where their records say that they are none.

    Args:
        name: Of the argument that they were given as.
        runs: Of one side, or of a floor.

    Raises:
        ValueError: If they are of several families, or one of them is there twice.
    """
    seen: dict[str, Run] = {}
    courses: dict[tuple[Any, ...], Run] = {}
    for run in runs:
        if run.family != runs[0].family:
            raise ValueError(
                f"{name} must be runs of one family, got {runs[0].family} in {runs[0]} and {run.family} in {run}"
            )
        other = seen.setdefault(run.id, run)
        if other is not run:
            raise ValueError(
                f"{name} must be independent runs, got {other} and {run}, which go on from one start: leave one out"
            )
        entries, losses = run.history.with_loss()
        seed, numbers = run.about.get("seed"), (run.history.step[entries], run.history.tokens[entries], losses)
        can_be_told = (seed is not None or run.columns) and len(entries) >= LEAST_ENTRIES
        other = courses.setdefault((seed, *(one.tobytes() for one in numbers)), run) if can_be_told else run
        if other is not run:
            raise ValueError(
                f"{name} must be independent runs, got {other} and {run}, whose losses are the same to the last digit: "
                "leave one out, and train others with other seeds"
            )
    _warn_of_unlike_seeds(name, runs)


def _warn_of_unlike_seeds(name: str, runs: Sequence[Run]) -> None:
    """Say where the scatter of a side may be that of other things than seeds."""
    seeds = [run.about["seed"] for run in runs if run.about.get("seed") is not None]
    if twice := sorted({seed for seed in seeds if seeds.count(seed) > 1}):
        warnings.warn(
            f"{name} has several runs of seed {twice[0]}: if they began alike, they scatter less than seeds do",
            stacklevel=4,
        )
    if (number := max(settings_of(runs), default=0) + 1) > 1:
        warnings.warn(
            f"{name} has runs of {number} settings, by their records: they scatter more than seeds do",
            stacklevel=4,
        )


def check_apart(base: Sequence[Run], variant: Sequence[Run]) -> None:
    """Refuse a run that is compared with itself, by whatever path it is named.

    Args:
        base: The runs of one side.
        variant: Those of the other.

    Raises:
        ValueError: If a run is on both.
    """
    for run in variant:
        same = next((one for one in base if one.id == run.id or one.folder.samefile(run.folder)), None)
        if same is not None:
            where = f"{run.path}" if same.path == run.path else f"{same.path} and {run.path}, which are one run"
            raise ValueError(f"base and variant must be different runs, got {where} on both sides: leave it out of one")
