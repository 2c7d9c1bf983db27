"""What can be chosen on a page: the series that runs have in common, their layers, and where the slider stops."""

from collections.abc import Mapping, Sequence
from math import isfinite
from typing import Any

from lightning_spectral.reporting.series import MOST_SHOWN
from lightning_spectral.runs.spread import spread

AXES = ("step", "tokens", "seconds")


def choices(runs: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Each series that a run has, by its key, with what the page's controls need of it.

    Args:
        runs: What :func:`lightning_spectral.reporting.run_data.run_data` gave of each.

    Returns:
        For each ``key`` a ``label``, the ``names`` of layers, what is ``short`` for each, and the ``positions`` of the
        slider: where it stands, and which of each run's spectra are the latest there, -1 for none.
    """
    keys = dict.fromkeys(key for run in runs for key in run["series"])
    return [_choice(key, [run["series"].get(key) for run in runs]) for key in keys]


def _choice(key: str, series: Sequence[dict[str, Any] | None]) -> dict[str, Any]:
    first = next(one for one in series if one is not None)
    names = list(dict.fromkeys(held["name"] for one in series if one is not None for held in one["names"]))
    kind, _, stage = key.partition("-")
    return {
        "key": key,
        "kind": first["kind"],
        "label": f"{kind}s, {stage}" if stage else f"{kind}s",
        "noun": first["noun"],
        "value": first["value"],
        "names": names,
        "short": dict(zip(names, shortened(names), strict=True)),
        "positions": _positions(series),
    }


def shortened(names: Sequence[str]) -> list[str]:
    """Names without the parts, between dots, that all of them begin or end with."""
    parts = [name.split(".") for name in names]
    if len(parts) < 2:
        return list(names)
    while all(len(one) > 1 for one in parts) and len({one[-1] for one in parts}) == 1:
        parts = [one[:-1] for one in parts]
    # One part in common stays, so that blocks.3 is not a bare 3.
    while all(len(one) > 2 for one in parts) and len({tuple(one[:2]) for one in parts}) == 1:
        parts = [one[1:] for one in parts]
    while all(len(one) > 2 for one in parts) and len({one[0] for one in parts}) == 1:
        parts = [one[1:] for one in parts]
    return [".".join(one) for one in parts]


def _positions(series: Sequence[dict[str, Any] | None]) -> list[dict[str, Any]]:
    by = "tokens" if all(isfinite(at) for one in series if one is not None for at in one["tokens"]) else "step"
    stops: dict[float, dict[str, float]] = {}
    for one in filter(None, series):
        for index in one["shown"]:
            stops.setdefault(one[by][index], {axis: one[axis][index] for axis in AXES})
    kept = spread(sorted(stops), MOST_SHOWN)
    return [{**stops[at], "picks": [_latest(one, by, at) for one in series]} for at in kept]


def _latest(one: dict[str, Any] | None, by: str, at: float) -> int:
    """The last of a run's spectra up to a number of tokens, or steps; -1 before the first."""
    return -1 if one is None else sum(one[by][index] <= at for index in one["shown"]) - 1
