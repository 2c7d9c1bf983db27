"""Does it hold at 12, 36 and 48 layers? Study 6, see ``plan_depth.md``.

    python -m benchmarks.findings.depth

Reads the runs that ``depth_runs`` has made, and names those that are missing: nothing is tested of a depth of which one
is. JSON, figure and report go to ``benchmarks/results/findings``. Half a minute on one core.
"""

import argparse
from collections.abc import Sequence
from itertools import combinations
from math import inf, isnan
from typing import Any

import numpy as np
import torch

from benchmarks.compact_json import write_compact
from benchmarks.findings.depth_report import write_report
from benchmarks.findings.depth_runs import DEPTHS, NUM_TOKENS, RUNS, TUNING_TOKENS, Depth, Setting, seeds_of, tuning
from benchmarks.findings.permutation import Separation, exact_separation, holm, pooled_rank_correlation
from benchmarks.findings.studies import add_reading_arguments, rounded_up
from benchmarks.harness import environment
from lightning_spectral import Run
from lightning_spectral.functional import js_divergence, js_floor

KIND = "activation"
TAIL = (0.125, 0.5)
"""Of a width of 64 the ranks 8 to 32."""
LEVEL = 0.05
MIN_STEPS = 122
SHARE = 0.5
"""Of the tokens of a depth's fastest run, at which tails are measured."""
NUM_PERMUTATIONS = 99_999


def settings_of(study: Depth, depth: int) -> tuple[list[Setting], list[str]]:
    """The nine runs of a depth, and the names of those without a loss at their end.

    Before all rates are tried none is known, and those that are missing there are named.
    """
    missing = study.missing(tuning(depth), TUNING_TOKENS // study.scale)
    if missing:
        return [], missing
    settings = seeds_of(study.tuned(depth))
    return settings, study.missing(settings, NUM_TOKENS // study.scale)


def divergences(runs: Sequence[Run], loss: float) -> tuple[list[str], np.ndarray, list[float]]:
    """Jensen-Shannon divergences of all pairs of runs at a loss.

    Args:
        runs: Those of a depth.
        loss: The value.

    Returns:
        The layers, ``(L, n, n)`` in nats, and of each layer the mean over pairs of what the sampling of rows may show.
    """
    spectra = [run.at_loss(loss).spectra(KIND) for run in runs]
    layers = runs[0].names(KIND)
    found = np.zeros((len(layers), len(runs), len(runs)))
    floors = []
    for at, layer in enumerate(layers):
        limits = []
        for first, second in combinations(range(len(runs)), 2):
            one, other = spectra[first][layer], spectra[second][layer]
            found[at, first, second] = found[at, second, first] = float(js_divergence(one.values, other.values))
            limits.append(float(js_floor(one, other)))
        floors.append(float(np.mean(limits)))
    return layers, found, floors


def see(setting: Setting, run: Run, layer: str, loss: float) -> dict[str, Any]:
    """What a run took, and where its tail was steepest."""
    course = run.course(KIND)
    reported = course.tokens_until(inf)
    tails = [course.exponent(layer, TAIL, tokens) for tokens in reported]
    return {
        "name": setting.name,
        "batch_size": setting.batch_size,
        "batch_tokens": setting.batch_tokens,
        "seed": setting.seed,
        "rate": setting.factor,
        "tokens": run.tokens_to(loss),
        "peak": float(reported[int(np.nanargmax(tails))]) if not np.isnan(tails).all() else inf,
    }


def gate(runs: Sequence[dict[str, Any]], tokens: float) -> list[str]:
    """Runs that a number of tokens finds too early, each with the reason."""
    late = []
    for run in runs:
        steps = tokens / run["batch_tokens"]
        if steps < MIN_STEPS:
            late.append(f"{run['name']}: {steps:.0f} steps")
        if run["peak"] >= tokens:
            late.append(f"{run['name']}: tail at its maximum at {run['peak']:,.0f} tokens")
    return late


def study_depth(study: Depth, depth: int) -> dict[str, Any]:
    """All that is measured of a depth, or why it is not."""
    settings, missing = settings_of(study, depth)
    found: dict[str, Any] = {"depth": depth, "missing": missing, "num_runs": len(settings)}
    if missing:
        return found | {"why": f"{len(missing)} runs are missing"}
    final = {setting.name: study.loss_at(setting, NUM_TOKENS // study.scale) for setting in settings}
    loss = rounded_up(max(final.values()))
    runs = [Run(study.folder / setting.name) for setting in settings]
    layers, by_layer, floors = divergences(runs, loss)
    seen = [see(setting, run, layers[-1], loss) for setting, run in zip(settings, runs, strict=True)]
    tokens = SHARE * min(one["tokens"] for one in seen)
    for one, run in zip(seen, runs, strict=True):
        one |= {"loss": final[one["name"]], "alpha_tail": run.course(KIND).exponent(layers[-1], TAIL, tokens)}
    sizes = [one["batch_size"] for one in seen]
    apart = [exact_separation(matrix, sizes) for matrix in by_layer]
    ratios = [_ratio(one) for one in apart]
    return found | {
        "loss": loss,
        "tokens": tokens,
        "separation": exact_separation(by_layer.mean(0), sizes)._asdict(),
        "layers": [
            {"layer": layer, **one._asdict(), "ratio": ratio, "sampling_floor": floor}
            for layer, one, ratio, floor in zip(layers, apart, ratios, floors, strict=True)
        ],
        "strongest": None if any(map(isnan, ratios)) else layers[int(np.argmax(ratios))],
        "rho": pooled([{"runs": seen}])[0],
        "late": gate(seen, tokens),
        "runs": seen,
    }


def _ratio(one: Separation) -> float:
    return one.between / one.within if one.within > 0 else inf if one.between > 0 else float("nan")


def pooled(depths: Sequence[dict[str, Any]]) -> list[float]:
    """Rank correlation of tail and tokens within depths, and its p-value."""

    def of_runs(name: str) -> list[np.ndarray]:
        return [np.array([run[name] for run in one["runs"]]) for one in depths]

    found: list[float] = pooled_rank_correlation(
        of_runs("alpha_tail"), of_runs("tokens"), num=NUM_PERMUTATIONS
    ).tolist()
    return found


def judge(depths: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The three tests, over the depths of which all runs are there; None for what is not made.

    Args:
        depths: Of :func:`study_depth`, all that the plan names. Those that are complete get the p-value that Holm's
            correction over all of them gives; a depth that is not counts there as if its p were 1.

    Returns:
        D1, D2, D3, the gate, and what they come to in words.
    """
    complete = [one for one in depths if "separation" in one]
    p_values = [one["separation"]["p_value"] if "separation" in one else 1.0 for one in depths]
    for one, adjusted in zip(depths, holm([1.0 if isnan(p) else p for p in p_values]), strict=True):
        if "separation" in one:
            apart = one["separation"]
            apart["p_holm"] = adjusted
            apart["holds"] = adjusted <= LEVEL and apart["between"] > apart["within"]
            one["is_deepest"] = one["strongest"] == one["layers"][-1]["layer"]
    found: dict[str, Any] = {"depths": [one["depth"] for one in complete]}
    if not complete:
        nothing = dict.fromkeys(("pooled", "D1", "D2", "D3", "gate"))
        return found | nothing | {"in words": "not made: no depth is complete"}
    found |= {"pooled": pooled(complete), "gate": not any(one["late"] for one in complete)}
    is_one = len({np.sign(one["rho"]) for one in complete}) == 1 and complete[0]["rho"] > 0
    told: dict[str, Any] = {
        "D1": all(one["separation"]["holds"] for one in complete),
        "D2": bool(is_one and found["pooled"][1] < LEVEL),
        "D3": all(one["is_deepest"] for one in complete),
    }
    if len(complete) < len(depths):
        told = dict.fromkeys(told)
        return found | told | {"in words": f"not made for all: {len(complete)} of {len(depths)} depths are complete"}
    return found | told | {"in words": _words(complete, told, found["gate"])}


def _words(depths: Sequence[dict[str, Any]], told: dict[str, bool], is_met: bool) -> str:
    if told["D1"] and told["D2"] and is_met:
        return "held"
    apart = [one["depth"] for one in depths if one["separation"]["holds"]]
    signs = ", ".join(f"{one['rho']:+.2f}" for one in depths)
    first = (
        f"batch sizes are farther apart than seeds at {_and(apart)} layers" if apart else "D1 is not shown at any depth"
    )
    second = "D2 holds" if told["D2"] else "D2 is not shown"
    return f"{first}; {second} (rho {signs})" + ("" if is_met else "; the stage gate is not met")


def _and(numbers: Sequence[int]) -> str:
    words = list(map(str, numbers))
    return " and ".join([", ".join(words[:-1]), words[-1]]) if len(words) > 1 else words[0]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_reading_arguments(parser, RUNS)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    study = Depth(arguments.runs, only_read=True)
    depths = [study_depth(study, depth) for depth in DEPTHS]
    results = {"depths": depths, "outcome": judge(depths)}
    write_compact(arguments.folder / "depth.json", results | {"environment": environment()})
    write_report(results, arguments.folder)


if __name__ == "__main__":
    main()
