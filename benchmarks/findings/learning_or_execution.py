"""Do head and gradient spectra tell learning from execution? Study 5, see ``plan_learning_or_execution.md``.

    python -m benchmarks.findings.learning_or_execution

Reads the runs that ``learning_or_execution_runs`` has made, and names those that are missing: what needs them is not
made, or stands as it was found when they were there, with its date. JSON, figure and report go to
``benchmarks/results/findings``. A minute on one core, two with the nulls.
"""

import argparse
import json
from collections.abc import Iterable, Sequence
from itertools import pairwise
from math import isnan
from operator import itemgetter
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.progress import track

from benchmarks.compact_json import write_compact
from benchmarks.findings.identical_runs import largest_difference
from benchmarks.findings.learning_or_execution_report import write_report
from benchmarks.findings.learning_or_execution_runs import (
    BATCH_SIZE,
    CHAIN_BATCH_SIZE,
    CHANGES,
    EXECUTION,
    NATURAL,
    RUNS,
    LearningOrExecution,
    Setting,
    base_of,
    nulls_of,
    seeds_of,
    tuning,
)
from benchmarks.findings.studies import add_reading_arguments, rounded_up
from benchmarks.harness import console, environment
from lightning_spectral import Comparison, Run, compare

NUM_NULLS, MIN_SILENT = 60, 57
FEW_SEEDS = 3
EXPECTED = {
    **dict.fromkeys(EXECUTION, "not learning"),
    "sleep": "execution",
    "twice": "learning",
    "quarter_rate": "learning",
    "noise": "gradient-led",
    "rotated": "nothing",
    "scaled_channel": "spectra alone",
}
"""What the plan says of each change, as :func:`is_as_expected` reads it."""
OF_ACTIVATIONS = (
    "activation",
    "drift",
    "a_overview/rankme_share",
    "a_overview/tail_exponent",
    "a_overview/turned_beyond_floor",
)
IDENTICAL = {"again": (), "workers": (), "sleep": (), "scaled_channel": OF_ACTIVATIONS}
"""Arms that are their base to the bit, and the kinds in which they are not."""
NOTES = {
    "rope": (0.578, 0.0063),
    "muon": (2.476, 0.0176),
    "untied": (1.898, 0.1617),
    "value_mix": (0.209, 0.0035),
    "unet": (-0.064, 0.0102),
    "fixed_window": (-0.207, 0.0065),
}
"""Token gain and JS of each natural step, as the paper's authors noted them of their toy chain."""

PARTS = ("natural", "changes", "identical", "chain")
"""Of a result, each of runs of its own, as each of the nulls is."""

Fact = dict[str, Any]


class Arms:
    """The runs of a study that are there, by arm, and the names of those that are not.

    Args:
        study: Where they are.
    """

    def __init__(self, study: LearningOrExecution) -> None:
        self.study = study
        self.missing: dict[str, list[str]] = {}
        self._open: dict[str, Run] = {}

    def run(self, setting: Setting) -> Run:
        """A run, opened once."""
        return self._open.setdefault(setting.name, Run(self.study.folder / setting.name))

    def tuned(self, arm: str, batch_size: int = BATCH_SIZE) -> Setting | None:
        """The run of the best rate; None as long as one is not tried."""
        tried = tuning(arm, batch_size)
        if self._are_there(arm, tried):
            best: Setting = self.study.best(tried, self.study.num_tokens)
            return best
        return None

    def side(self, setting: Setting | None, arm: str) -> list[Setting]:
        """All seeds of an arm at a rate; none where one is missing."""
        if setting is None:
            return []
        settings = seeds_of(setting, arm)
        return settings if self._are_there(arm, settings) else []

    def nulls(self, rope: Setting | None) -> list[tuple[list[Setting], list[Setting]]]:
        """Comparisons of which all runs are there."""
        if rope is None:
            return []
        return [pair for pair in nulls_of(rope) if not self.study.missing([*pair[0], *pair[1]], self.study.num_tokens)]

    def _are_there(self, arm: str, settings: Sequence[Setting]) -> bool:
        missing = self.study.missing(settings, self.study.num_tokens)
        if missing:
            self.missing[_label(arm, settings[0].batch_size)] = missing
        return not missing


def is_as_expected(expected: str, fact: Fact) -> bool:
    """Whether a verdict is what the plan says of a change."""
    kind, led_by, moved = fact["kind"], fact["led_by"], fact["moved"]
    if expected == "not learning":
        return kind in ("none", "execution-side")
    if expected == "execution":
        return bool(kind == "execution-side")
    if expected == "learning":
        return bool(kind == "learning-side")
    if expected == "gradient-led":
        return bool(kind == "learning-side" and led_by == expected)
    if expected == "nothing":
        return bool(kind == "none" and not any(moved.values()))
    if expected == "spectra alone":
        return kind in ("none", "execution-side") and bool(moved["activation"])
    raise ValueError(f"expected must be one of {', '.join(dict.fromkeys(EXPECTED.values()))}, got {expected!r}")


def fact_of(comparison: Comparison) -> Fact:
    """What is kept of a comparison."""
    means = {shift.kind: shift for shift in comparison.shifts if not shift.name}
    return {
        "loss": comparison.loss,
        "kind": comparison.verdict.kind,
        "led_by": comparison.verdict.led_by,
        "text": comparison.verdict.text,
        "gains": {
            name: [gain.gain, gain.low, gain.high] for name, gain in comparison.gains.items() if name != "seconds"
        },
        "js": {kind: shift.shift for kind, shift in means.items()},
        "ratios": {kind: one.ratio for kind, one in comparison.movements.items()},
        "moved": {kind: one.has_moved for kind, one in comparison.movements.items()},
        "lead": [comparison.lead.difference, comparison.lead.low, comparison.lead.high],
        "pairs": comparison.pairs.seeds,
        "in_time_by": comparison.timing.compared_by or comparison.timing.reason,
    }


def compared(base: Sequence[Run], variant: Sequence[Run], loss: float) -> Fact:
    """A comparison at a loss, or why there is none."""
    never = [run.path.name for run in (*base, *variant) if isnan(run.tokens_to(loss))]
    if never:
        return {"loss": loss, "why": f"{', '.join(never)} did not pass {loss:.3f} after the first validation"}
    return fact_of(compare(list(base), list(variant), at_loss=loss))


def at_losses(arms: Arms, base: Sequence[Setting], variant: Sequence[Setting]) -> dict[str, Fact]:
    """A comparison at the three losses of the plan, and at the first with three seeds."""
    study = arms.study
    sides = [[arms.run(one) for one in side] for side in (base, variant)]
    final = rounded_up(max(study.loss_at(one, study.num_tokens) for one in (*base, *variant)))

    def mean_at(share: float) -> float:
        return float(np.mean([study.loss_at(one, round(share * study.num_tokens)) for one in base]))

    return {
        "primary": compared(*sides, final),
        "three quarters": compared(*sides, mean_at(0.75)),
        "half": compared(*sides, mean_at(0.5)),
        "three seeds": compared(sides[0][:FEW_SEEDS], sides[1][:FEW_SEEDS], final),
    }


def label(fact: Fact) -> str | None:
    """A verdict in a word or two; None where there is none."""
    if "why" in fact:
        return None
    return f"{fact['kind']}, {fact['led_by']}" if fact["led_by"] else str(fact["kind"])


def is_stable(found: dict[str, Fact]) -> bool | None:
    """Whether a verdict is the same at the three losses and with three seeds; None where one is not made."""
    labels = {label(fact) for fact in found.values()}
    return None if None in labels and len(labels - {None}) < 2 else len(labels) == 1


def chain(arms: Arms, batch_size: int, names: Sequence[str] = NATURAL) -> list[Fact]:
    """The natural steps, neighbours compared."""
    sides = {name: arms.side(arms.tuned(name, batch_size), name) for name in names}
    rows = []
    for base, variant in pairwise(names):
        if sides[base] and sides[variant]:
            at = at_losses(arms, sides[base], sides[variant])
            row = {"base": base, "variant": variant, "rate": sides[variant][0].factor, "at": at}
            rows.append(row | {"is_stable": is_stable(at), "notes": NOTES[variant]})
    return rows


def changes(arms: Arms, rope: Setting | None, names: Iterable[str] = EXPECTED) -> list[Fact]:
    """Execution and planted changes against rope."""
    rows = []
    for name in names:
        base, variant = (arms.side(rope, arm) for arm in (base_of(name), name))
        if base and variant:
            at = at_losses(arms, base, variant)
            row = {"base": base_of(name), "variant": name, "expected": EXPECTED[name], "at": at}
            row |= {"is_planted": name in CHANGES, "is_stable": is_stable(at)}
            rows.append(
                row | {"is_right": "why" not in at["primary"] and is_as_expected(EXPECTED[name], at["primary"])}
            )
    return rows


def identical(arms: Arms, rope: Setting | None) -> list[Fact]:
    """How far arms are from their base that should be it to the bit."""
    rows = []
    for name, but in IDENTICAL.items():
        base, variant = (arms.side(rope, arm) for arm in (base_of(name), name))
        if base and variant:
            pairs = zip(base, variant, strict=True)
            found = [largest_difference(arms.run(one), arms.run(other), but) for one, other in pairs]
            rows.append({"base": base_of(name), "variant": name, "but": but, "differences": found})
    return rows


def nulls(arms: Arms, rope: Setting | None) -> list[Fact]:
    """Comparisons of sides that differ by nothing."""
    rows = []
    for base, variant in track(arms.nulls(rope), "nulls", console=console, transient=True):
        final = rounded_up(max(arms.study.loss_at(one, arms.study.num_tokens) for one in (*base, *variant)))
        fact = compared([arms.run(one) for one in base], [arms.run(one) for one in variant], final)
        rows.append(
            {"seed": base[0].seed, "kind": fact.get("kind"), "led_by": fact.get("led_by"), "why": fact.get("why")}
        )
    return rows


def keep_landed(results: dict[str, Any], path: Path) -> None:
    """Take over the parts of an earlier result of which no runs are here, with its date, and each null of its own."""
    landed = json.loads(path.read_text()) if path.exists() else {}
    parts = [name for name in PARTS if not results[name] and landed.get(name)]
    before = landed.get("kept", {})
    results["kept"] = {name: before.get(name, landed["environment"]["date"]) for name in parts}
    results |= {name: landed[name] for name in parts}
    here = {row["seed"] for row in results["nulls"]}
    gone = [
        {"kept": landed["environment"]["date"], **row} for row in landed.get("nulls", []) if row["seed"] not in here
    ]
    results["nulls"] = sorted([*gone, *results["nulls"]], key=itemgetter("seed"))
    if "natural" in parts:
        results["rate"] = landed["rate"] if results["rate"] is None else results["rate"]
        for arm in NATURAL:
            results["missing"].pop(_label(arm, BATCH_SIZE), None)


def _label(arm: str, batch_size: int) -> str:
    return f"{arm}, B = {batch_size}"


def judge(results: dict[str, Any]) -> dict[str, Any]:
    """The four tests; None for what is not made."""
    found = {
        "N": _nulls_hold([row["kind"] for row in results["nulls"]]),
        "P": _all(results["changes"], "is_right", len(EXPECTED)),
        "E": _all([{"zero": not any(row["differences"])} for row in results["identical"]], "zero", len(IDENTICAL)),
        "S": _all(
            [*results["natural"], *(row for row in results["changes"] if row["is_planted"])],
            "is_stable",
            len(NATURAL) - 1 + len(CHANGES),
        ),
    }
    if all(holds is None for holds in found.values()):
        words = "not made"
    elif all(found.values()):
        words = "held"
    else:
        told = {None: "not made for all", True: "holds", False: "does not hold"}
        words = ", ".join(f"{name} {told[holds]}" for name, holds in found.items())
    return found | {"in words": words}


def _nulls_hold(kinds: Sequence[str | None]) -> bool | None:
    """At least 57 of 60 silent, and none of the others of the learning side; None as long as it may be either."""
    loud = [kind for kind in kinds if kind not in ("none", None)]
    if len(loud) > NUM_NULLS - MIN_SILENT or any(kind != "execution-side" for kind in loud):
        return False
    return True if sum(kind == "none" for kind in kinds) >= MIN_SILENT else None


def _all(rows: Sequence[Fact], name: str, wanted: int) -> bool | None:
    """False if one fails, None if one is missing or not known."""
    told = [row[name] for row in rows]
    if False in told:
        return False
    return None if None in told or len(told) < wanted else True


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_reading_arguments(parser, RUNS)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    arms = Arms(LearningOrExecution(arguments.runs, only_read=True))
    rope = arms.tuned("rope")
    results: dict[str, Any] = {
        "rate": None if rope is None else rope.factor,
        "natural": chain(arms, BATCH_SIZE),
        "changes": changes(arms, rope),
        "identical": identical(arms, rope),
        "nulls": nulls(arms, rope),
        "chain": chain(arms, CHAIN_BATCH_SIZE),
        "missing": arms.missing,
    }
    path = arguments.folder / "learning_or_execution.json"
    keep_landed(results, path)
    results["outcome"] = judge(results)
    write_compact(path, results | {"environment": environment()})
    write_report(results, arguments.folder)


if __name__ == "__main__":
    main()
