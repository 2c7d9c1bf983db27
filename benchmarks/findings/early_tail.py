"""Does the early tail forecast tokens, once runs are past their transient? Study 4, see ``plan_early_tail.md``.

    python -m benchmarks.findings.early_tail

Reads the runs that ``early_tail_runs`` has made, all of them, and names those that are missing; JSON, figure and report
go to ``benchmarks/results/findings``. Half a minute on one core. ``--kept FILE`` takes an earlier result, whose
runs are gone, and adds the runs that it lacked and that are there now.
"""

import argparse
import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.compact_json import write_compact
from benchmarks.findings.early_tail_report import write_report
from benchmarks.findings.early_tail_runs import (
    BLOCK_SIZE,
    MAX_TOKENS,
    RUNS,
    SEEDS,
    VARIED_AT,
    EarlyTail,
    Setting,
    all_of,
    lacking,
    tuned_in,
)
from benchmarks.findings.permutation import rank_correlation
from benchmarks.findings.studies import add_reading_arguments
from benchmarks.harness import environment
from lightning_spectral import Run
from lightning_spectral.functional import stack
from lightning_spectral.runs.early_numbers import EARLY_LOSS, LOG_BATCH, spectral_measures
from lightning_spectral.runs.reference_numbers import SPECTRAL, Look, ReferenceNumbers
from lightning_spectral.runs.references import KIND, Reference

LAYER = "gpt.blocks.11"
TAIL = (0.125, 0.5)
HEAD = (1, 10)
NAMES = ("alpha_tail", "alpha_head", "RankMe")
SHARES = (0.25, 0.5)
"""Of the tokens of the fastest run at which is measured; the last is primary."""
MIN_STEPS = 122
MIN_RHO = 0.9
LEVEL = 0.01
MIN_GAIN = 0.1
NUM_PERMUTATIONS = 99_999


@dataclass(frozen=True)
class Seen:
    """One run: what it took, and what it showed at each count."""

    name: str
    tier: str
    """What it is a seed of."""
    batch_size: int
    """Sequences."""
    is_tuned: bool
    """Whether it is a seed of a tuned tier, not a variation."""
    tokens: float
    """To the target; infinite where it was not reached."""
    cut_off: float
    """Tokens at which it was cut off short of the target; NaN of a run that came to its end."""
    peak: float
    """Tokens at the maximum of its tail's exponent."""
    early: tuple[dict[str, float], ...]
    """By name of the number, at each count."""


def counts_of(runs: Sequence[Run], target: float) -> list[float]:
    """Tokens at which is measured."""
    fastest = np.nanmin([run.tokens_to(target) for run in runs])
    return [share * float(fastest) for share in SHARES]


def see(setting: Setting, run: Run, is_tuned: bool, target: float, counts: Sequence[float], cut_off: float) -> Seen:
    """What a run took and showed."""
    measures = [*spectral_measures(LAYER, TAIL), EARLY_LOSS, LOG_BATCH]
    reported = run.course("activation").tokens_until(math.inf)
    tails = [measures[0].value(run, tokens) for tokens in reported]
    tokens = run.tokens_to(target)
    return Seen(
        setting.name,
        setting.name.replace(f"-seed_{setting.seed}", ""),
        setting.batch_size,
        is_tuned,
        math.inf if math.isnan(tokens) else tokens,
        cut_off,
        float(reported[int(np.nanargmax(tails))]),
        tuple({one.name: one.value(run, count) for one in measures} for count in counts),
    )


def means(runs: Sequence[Seen], at: int, name: str) -> np.ndarray:
    """Of a number at a count, or of ``"log tokens"``, over the seeds of each tier."""

    def value(run: Seen) -> float:
        return math.log(run.tokens) if name == "log tokens" else run.early[at][name]

    tiers = dict.fromkeys(run.tier for run in runs)
    return np.array([np.mean([value(run) for run in runs if run.tier == tier]) for tier in tiers])


def gate(runs: Sequence[Seen], counts: Sequence[float], batch_tokens: int, at: int) -> list[str]:
    """Runs that a count finds too early, each with the reason."""
    late = []
    for run in runs:
        steps = counts[at] / (run.batch_size * batch_tokens)
        if steps < MIN_STEPS:
            late.append(f"{run.name}: {steps:.0f} steps")
        if run.peak >= counts[at]:
            late.append(f"{run.name}: tail at its maximum at {run.peak:,.0f} tokens")
    return late


def numbers_of(runs: Sequence[Run], target: float) -> ReferenceNumbers:
    """What runs that reached the target showed."""
    references = [Reference(run, run.tokens_to(target), KIND) for run in runs]
    return ReferenceNumbers(references, Look(LAYER, TAIL, HEAD), target)


def over_tiers(runs: Sequence[Seen], at: int, name: str) -> float:
    """Spearman's rho of a number and tokens to the target, over the means of tuned tiers."""
    return float(rank_correlation(means(runs, at, name), means(runs, at, "log tokens"))[0])


def claims(runs: Sequence[Seen], opened: Sequence[Run], target: float, counts: Sequence[float], at: int) -> list[Any]:
    """The three tests of each number at a count."""
    tuned = [run for run in runs if run.is_tuned]
    varied = [run for run in runs if run.batch_size == VARIED_AT]
    reached = [number for number, run in enumerate(runs) if math.isfinite(run.tokens)]
    references = [opened[number] for number in reached]
    tiers = list(dict.fromkeys(run.tier for run in runs))
    settings = torch.tensor([tiers.index(runs[number].tier) for number in reached])
    tokens = torch.tensor([runs[number].tokens for number in reached], dtype=torch.float64)
    numbers = numbers_of(references, target)
    found = []
    for name in (*NAMES, "early loss", "all spectra"):
        row: dict[str, Any] = {"number": name}
        if name != "all spectra":
            row["tiers"] = over_tiers(tuned, at, name)
            given = () if name == "early loss" else (means(varied, at, "early loss"),)
            truth = means(varied, at, "log tokens")
            alone = rank_correlation(means(varied, at, name), truth, num=NUM_PERMUTATIONS)
            partial = rank_correlation(means(varied, at, name), truth, given, num=NUM_PERMUTATIONS)
            row |= {"varied": alone.tolist(), "varied_given_loss": partial.tolist() if given else [math.nan] * 2}
        if name != "early loss":
            chosen = [one for one in SPECTRAL if name in ("all spectra", "RankMe" if one == "rankme" else one)]
            early = numbers.early(counts[at], dict.fromkeys(chosen, counts[at]))
            told = stack(early, tokens, None, settings)
            row |= {
                "gain": told.spectral_gain,
                "gain_low": told.spectral_gain_low,
                "gain_high": told.spectral_gain_high,
            }
        found.append(row)
    return found


def forecasts(runs: Sequence[Seen], opened: Sequence[Run], target: float, count: float) -> dict[str, float]:
    """Errors of the stack without spectra, each setting from the others."""
    tiers = list(dict.fromkeys(run.tier for run in runs))
    known = [number for number, run in enumerate(runs) if math.isfinite(run.tokens)]
    tokens = torch.tensor([runs[number].tokens for number in known], dtype=torch.float64)
    settings = torch.tensor([tiers.index(runs[number].tier) for number in known])
    told = stack(numbers_of([opened[number] for number in known], target).early(count, {}), tokens, None, settings)
    mean = math.nan if tokens.numel() == 0 else float((tokens.log() - tokens.log().mean()).abs().mean())
    return {"median_error": told.median_error, "mean_log_error": told.mean_log_error, "spread_of_log_tokens": mean}


def outcome(rows: Sequence[dict[str, Any]], is_met: bool, second: float | None = None) -> dict[str, Any]:
    """What the three tests of the tail come to, by the plan's words.

    Args:
        rows: Of :func:`claims`, of the first family.
        is_met: Whether the stage gate is, in all families.
        second: Spearman's rho over the tiers of the second family; None where it was not trained.
    """
    tail = rows[0]
    first = bool(tail["tiers"] >= MIN_RHO and (second is None or second > 0))
    second_claim = bool(tail["varied_given_loss"][1] < LEVEL)
    third = bool(tail["gain"] >= MIN_GAIN and tail["gain_low"] > 0)
    if first and second_claim and third:
        words = "held in one family" if second is None else "held"
    elif first and not second_claim and not third:
        words = "batch size under another name"
    elif not first:
        words = "refuted" if is_met else "not shown; the stage gate is not met"
    else:
        words = "in part"
    return {"P1": first, "P2": second_claim, "P3": third, "gate": is_met, "in words": words}


def read(study: EarlyTail, recipe: str) -> dict[str, Any]:
    """All that is measured of a family.

    A run that was cut off short of the target ranks last if it had come farther by then than any other needed;
    else it is left out, and both are named.

    Args:
        study: Where its runs are.
        recipe: Its name.

    Returns:
        Target, counts, runs, those that are missing, and of each count gate, tests and the stack's errors.
    """
    tuned = study.tuned(recipe)
    target = study.target(tuned)
    settings = all_of(tuned)
    cut_off = _cut_off(study, settings, target)
    finished = [Run(study.folder / one.name) for one in settings if one.name not in cut_off]
    counts = counts_of(finished, target)
    slowest = float(np.nanmax([run.tokens_to(target) for run in finished]))
    settings = [one for one in settings if cut_off.get(one.name, math.inf) > slowest]
    opened = [Run(study.folder / one.name) for one in settings]
    centres = {(one.batch_size, one.factor, one.variant) for one in tuned}
    seen = [
        see(
            one,
            run,
            (one.batch_size, one.factor, one.variant) in centres,
            target,
            counts,
            cut_off.get(one.name, math.nan),
        )
        for one, run in zip(settings, opened, strict=True)
    ]
    at = [
        {
            "tokens": count,
            "late": gate(seen, counts, BLOCK_SIZE, number),
            "claims": claims(seen, opened, target, counts, number),
            "stack": forecasts(seen, opened, target, count),
        }
        for number, count in enumerate(counts)
    ]
    runs = [asdict(one) for one in seen]
    left_out = {name: tokens for name, tokens in cut_off.items() if tokens <= slowest}
    return {"recipe": recipe, "target": target, "counts": counts, "runs": runs, "left_out": left_out, "at": at}


def completed(study: EarlyTail, family: dict[str, Any], date: str) -> dict[str, Any]:
    """A family of an earlier result, whose runs are gone, with those that it lacked and that are there now.

    They are seeds of tuned tiers, and are looked at after as many tokens as the others were. What needs the runs
    themselves (P2 and P3, which are the first family's) stands where nothing was added, and is not told where
    something was.

    Args:
        study: Where the added runs are.
        family: What :func:`read` had given.
        date: Of the earlier result.
    """
    counts, target = family["counts"], family["target"]
    before = [Seen(**(run | {"tokens": _tokens(run), "early": tuple(run["early"])})) for run in family["runs"]]
    settings = lacking(family)
    cut_off = _cut_off(study, settings, target)
    opened = {one: Run(study.folder / one.name) for one in settings if cut_off.get(one.name) != 0}
    ends = [run.tokens_to(target) for one, run in opened.items() if one.name not in cut_off]
    slowest = max([*ends, *(run.tokens for run in before if math.isfinite(run.tokens))])
    added = [
        see(one, run, True, target, counts, cut_off.get(one.name, math.nan))
        for one, run in opened.items()
        if cut_off.get(one.name, math.inf) > slowest
    ]
    if not added:
        return {"kept": date, "added": [], **family}
    order = [one.name for one in all_of(tuned_in(family))]
    seen = sorted([*before, *added], key=lambda run: order.index(run.name))
    at = []
    for number, told in enumerate(family["at"]):
        names = [row["number"] for row in told["claims"] if "tiers" in row]
        rows = [{"number": name, "tiers": over_tiers(seen, number, name)} for name in names]
        at.append({"tokens": told["tokens"], "late": gate(seen, counts, BLOCK_SIZE, number), "claims": rows})
    left_out = {name: tokens for name, tokens in cut_off.items() if tokens <= slowest}
    result = {"runs": [asdict(one) for one in seen], "left_out": left_out, "at": at}
    names = [*family.get("added", []), *(one.name for one in added)]
    return {"kept": date, **family, "added": names, **result}


def _cut_off(study: EarlyTail, settings: Sequence[Setting], target: float) -> dict[str, float]:
    """Names of runs that have not come to their end, with the tokens they had come to."""
    missing = study.missing(settings, MAX_TOKENS // study.scale, target)
    return {one.name: max(study.losses(one)[0], default=0.0) for one in settings if one.name in missing}


def _tokens(run: dict[str, Any]) -> float:
    """To the target, which JSON cannot say of a run that never came there."""
    return math.inf if math.isnan(run["tokens"]) else float(run["tokens"])


def judge(families: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The plan's outcome at each count: the first family's tests, and the sign of the tail in the second."""
    told = []
    for at in zip(*(family["at"] for family in families), strict=True):
        second = at[1]["claims"][0]["tiers"] if len(at) > 1 else None
        told.append(outcome(at[0]["claims"], not any(one["late"] for one in at), second))
    return told


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_reading_arguments(parser, RUNS)
    parser.add_argument("--families", nargs="+", choices=list(SEEDS), default=list(SEEDS), help="the first is tested")
    parser.add_argument("--kept", type=Path, help="an earlier result, whose runs are gone, to be completed")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    study = EarlyTail(arguments.runs, only_read=True)
    if arguments.kept:
        landed = json.loads(arguments.kept.read_text().replace("null", "NaN"))
        date = landed["environment"]["date"]
        families = [completed(study, family, date) for family in landed["families"]]
    else:
        families = [read(study, recipe) for recipe in arguments.families]
    results = {"families": families, "outcomes": judge(families)}
    write_compact(arguments.folder / "early_tail.json", results | {"environment": environment()})
    write_report(results, arguments.folder)


if __name__ == "__main__":
    main()
