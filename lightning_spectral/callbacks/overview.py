"""The few numbers that stand first on a board: one for each thing that is watched, over all layers."""

import math
from collections.abc import Iterable, Mapping, Sequence

from lightning_spectral.boards import Margin

GROUP = "a_overview"
"""First part of the keys. Boards sort groups by name; W&B asks for names that begin with a letter."""
FAILED = "a_problems/failures"
"""What could not be measured so far, of all who write under a prefix; each logs it when it has something to add.

A group of its own, because TensorBoard opens the first two and leaves the others, of each layer, closed.
"""
_FORECAST = Margin("forecast/tokens_to_target", "forecast/low", "forecast/high")
CHARTS: Mapping[str, Sequence[str]] = {
    "tail exponent, mean of layers": [f"{GROUP}/tail_exponent"],
    "RankMe as a share of the width, mean of layers": [f"{GROUP}/rankme_share"],
    "drift beyond its floor, mean of layers": [f"{GROUP}/turned_beyond_floor"],
    "tokens: batch and noise scale": [f"{GROUP}/tokens_in_batch", f"{GROUP}/tokens_in_noise_scale"],
    "tokens to the target, with 80% interval": _FORECAST,
    "failed measurements": [FAILED],
}
"""Keys in each chart, by its name."""


def mean_of_all(values: Iterable[float]) -> float:
    """The mean, NaN if one is: it would jump where a layer is missing, as if training did."""
    known = list(values)
    return math.fsum(known) / len(known) if known and all(map(math.isfinite, known)) else math.nan


def overview_charts(prefix: str, keys: Iterable[str]) -> dict[str, Sequence[str]]:
    """Tags in each chart, by its name, of what is written under a prefix, by key without it."""
    known = set(keys)
    charts: dict[str, Sequence[str]] = {}
    for title, names in CHARTS.items():
        if known.issuperset(names):
            tags = [f"{prefix}{name}" for name in names]
            charts[f"{prefix}{title}"] = Margin(*tags) if isinstance(names, Margin) else tags
    return charts
