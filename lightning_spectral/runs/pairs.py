"""Which runs of two sides are pairs: of one seed, in one order of the data."""

from collections.abc import Sequence
from typing import Any, NamedTuple

from lightning_spectral.runs.kinds import Key
from lightning_spectral.runs.measured import Measured
from lightning_spectral.runs.run import Run
from lightning_spectral.runs.statistics import number

MIN_PAIRS = 3
"""Two pairs leave one degree of freedom, whose interval is three times as wide as that of two seeds a side."""

SAME_ORDER = ("batch_tokens", "accumulate_grad_batches", "world_size")
"""What must agree, where both recorded it, for runs of one seed to have read their data in one order."""


class Pairs(NamedTuple):
    """Whether two sides are pairs."""

    seeds: list[int]
    """Of the pairs, ascending; empty where there are none."""
    reason: str
    """Why runs of equal seeds are no pairs, or are not used as such; empty where they are, and where none are equal."""


def find_pairs(base: Sequence[Run], variant: Sequence[Run]) -> Pairs:
    """Pair runs by their recorded seeds.

    Runs are pairs if each side's seeds, as ``seed_everything`` set them, are different ones, those of base and variant
    are the same, and both runs of each seed recorded equal batches, accumulation and world size: with those, data are
    in one order wherever it is drawn by the seed. Where it is drawn otherwise, or models draw other numbers, pairs have
    less in common than they might, and the comparison is valid all the same.

    Args:
        base: Two runs or more.
        variant: As many.

    Returns:
        Their seeds, or why there are no pairs.
    """
    first, second = (
        {run.about["seed"]: run for run in side if run.about.get("seed") is not None} for side in (base, variant)
    )
    if not first.keys() & second.keys():
        return Pairs([], "")
    if first.keys() != second.keys() or not len(first) == len(base) == len(variant):
        return Pairs([], "not all runs have a partner of their seed")
    for seed, run in first.items():
        other = second[seed]
        for name in SAME_ORDER:
            one, two = run.about.get(name), other.about.get(name)
            if one is not None and two is not None and one != two:
                return Pairs([], f"{name} is {_plain(one)} in {run} and {_plain(two)} in {other}")
    return Pairs(sorted(map(int, first)), "")


def in_order(side: Sequence[Run], pairs: Pairs) -> list[Run]:
    """The runs of a side in the order of its pairs' seeds."""
    return sorted(side, key=lambda run: int(run.about["seed"])) if pairs.seeds else list(side)


def use_pairs(
    pairs: Pairs, base: Sequence[Measured], variant: Sequence[Measured], has_floor: bool, paired: bool | None
) -> Pairs:
    """Leave out pairs that would say less than single runs do.

    They are used from three on, and where no run floor from elsewhere says how single runs scatter; fewer only where
    both runs of each pair took the very same tokens: what was changed then did not touch what the model learns.

    Args:
        pairs: Those that there are.
        base: Runs in their order.
        variant: Likewise.
        has_floor: Whether there is a run floor from elsewhere.
        paired: True for all that there are, two or more; False for none; None for the rule.

    Returns:
        Those that are used.

    Raises:
        ValueError: If there are to be pairs, and are none.
    """
    if paired and len(pairs.seeds) < 2:
        why = pairs.reason or ("there is one" if pairs.seeds else "base and variant have no seed in common")
        raise ValueError(f"paired must be true only for pairs of runs, got {why}: train the seeds of base as variant")
    if paired or not pairs.seeds:
        return pairs
    if paired is not None:
        return Pairs([], "paired is false")
    if has_floor:
        return Pairs([], "the floor is of single runs")
    tokens = [[number(run, Key("tokens")) for run in side] for side in (base, variant)]
    if len(pairs.seeds) < MIN_PAIRS and (len(pairs.seeds) < 2 or tokens[0] != tokens[1]):
        return Pairs([], f"that takes {MIN_PAIRS} of them")
    return pairs


def check_paired(paired: bool | None) -> None:
    """Refuse what is neither."""
    if not (paired is None or isinstance(paired, bool)):
        raise ValueError(f"paired must be true, false or None for the rule, got {paired!r}")


def _plain(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)
