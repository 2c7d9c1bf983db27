"""Which runs are seeds of one setting: alike in all that their records say, but for the seed."""

import json
from collections.abc import Sequence
from typing import Any

from lightning_spectral.runs.run import Run

SAME_BATCH = 1.05
"""Batches that differ by less are of one size: where samples are of different lengths, tokens of a batch scatter."""


def settings_of(runs: Sequence[Run]) -> list[int]:
    """Number the settings of some runs.

    Two runs are of one setting if their records agree in family, world size, the hyperparameters and optimizers of a
    sweep (learning rate, decay, schedule; not the seed), and, to five percent, in the tokens of a batch. What not all
    the runs have recorded does not tell them apart: rather too few settings than too many. A tag ``setting``, as of
    ``RunRecord(tags={"setting": "a"})``, says instead which one a run is of.

    Args:
        runs: Any runs.

    Returns:
        A number for each run, from 0 on in the order in which settings come up.
    """
    facts = [_facts(run) for run in runs]
    untagged = [set(found) for run, found in zip(runs, facts, strict=True) if "setting" not in run.tags]
    in_all = set.intersection(*untagged) if untagged else set()
    names = [
        _text({"tag": run.tags["setting"]} if "setting" in run.tags else {name: found[name] for name in in_all})
        for run, found in zip(runs, facts, strict=True)
    ]
    sizes = _sizes(runs)
    known = list(dict.fromkeys(zip(names, sizes, strict=True)))
    return [known.index(one) for one in zip(names, sizes, strict=True)]


def _facts(run: Run) -> dict[str, Any]:
    """By name; those that a record has not are missing."""
    setting = run.about.get("setting")
    found = {"family": run.family, "world_size": run.about.get("world_size")}
    found |= dict(setting) if isinstance(setting, dict) else {}
    return {name: value for name, value in found.items() if value is not None}


def _sizes(runs: Sequence[Run]) -> list[int]:
    """Number the batch sizes of runs, in chains of nearly equal ones; 0 of tagged runs, and if one is not known."""
    known = [0.0 if "setting" in run.tags else run.about.get("batch_tokens") for run in runs]
    batches = [float(size) for size in known if isinstance(size, (int, float))]
    if len(batches) < len(runs):
        return [0] * len(runs)
    number: dict[float, int] = {}
    before = 0.0
    for size in sorted(set(batches)):
        number[size] = number.get(before, 0) + (before > 0 and size > SAME_BATCH * before)
        before = size
    return [number[size] for size in batches]


def _text(facts: dict[str, Any]) -> str:
    return json.dumps(facts, sort_keys=True, default=str)
