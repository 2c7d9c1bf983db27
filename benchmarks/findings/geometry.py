"""Whether batch size shapes the spectra of activations at equal loss: study 2 of ``plan.md``.

    python -m benchmarks.findings.geometry

Trains the runs that are missing, then measures all of them where they first came to the target. JSON, figure and report
go to ``benchmarks/results/findings``. Three quarters of an hour on two cores, seconds where the runs are there.
"""

import argparse
from collections.abc import Sequence
from math import isnan
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.findings.geometry_report import write_report
from benchmarks.findings.permutation import holm, rank_correlation, separation
from benchmarks.findings.runs import (
    Family,
    Setting,
    first_set,
    parse,
    rates,
    results_of,
    second_set,
)
from benchmarks.harness import environment
from lightning_spectral import compare
from lightning_spectral.functional import Spectrum, js_divergence
from lightning_spectral.functional.floor import js_floor

HEAD, TAIL = (1, 10), (0.125, 0.5)
QUANTITIES = ("alpha_head", "alpha_tail", "rankme")
PRIMARY_LEVEL, SECONDARY_LEVEL = 0.01, 0.05


def measured(family: Family, setting: Setting) -> dict[str, Any]:
    """One run where it first came to the target.

    Args:
        family: Where runs are.
        setting: Which run.

    Returns:
        Settings, tokens, and for each layer its spectrum and numbers with their standard errors by sampling.
    """
    run = family.open(setting)
    there = run.at_loss(family.target)
    layers = {name: there.spectrum("activation", name) for name in run.names("activation")}
    return {
        "name": setting.name,
        "batch_size": setting.batch_size,
        "seed": setting.seed,
        "multiplier": setting.multiplier,
        "tokens": there.tokens,
        "layers": layers,
        "numbers": {name: numbers(spectrum) for name, spectrum in layers.items()},
    }


def numbers(spectrum: Spectrum) -> dict[str, tuple[float, float]]:
    """Value and standard error of what a spectrum comes to."""
    found = (spectrum.exponent(HEAD), spectrum.exponent(TAIL), spectrum.rankme())
    return {quantity: (one.value, one.stderr) for quantity, one in zip(QUANTITIES, found, strict=True)}


def divergences(runs: Sequence[dict[str, Any]]) -> tuple[np.ndarray, np.ndarray]:
    """Jensen-Shannon divergence of all pairs of runs, and its floor by sampling, by layer.

    Args:
        runs: Results of :func:`measured`.

    Returns:
        Two arrays ``(L, n, n)``, in nats; the floor is an upper 95% limit of what other rows of the same runs show.
    """
    found, floors = [], []
    for layer in runs[0]["layers"]:
        spectra = [run["layers"][layer] for run in runs]
        values = torch.stack([spectrum.values for spectrum in spectra])
        found.append(js_divergence(values[:, None], values[None]).numpy())
        floors.append([[0.0 if one is other else float(js_floor(one, other)) for other in spectra] for one in spectra])
    return np.stack(found), np.array(floors)


def study(runs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """All tests of one set of runs.

    Args:
        runs: Results of :func:`measured`, several seeds of each batch size.

    Returns:
        The primary test, of the mean over layers and of each; divergences by how far batch sizes are apart, with their
        floors; effects by layer and quantity.
    """
    sizes = np.array([run["batch_size"] for run in runs])
    by_layer, floors = divergences(runs)
    mean = by_layer.mean(0)
    layers = list(runs[0]["layers"])
    effects = [effect(runs, layer, quantity) for layer in layers for quantity in QUANTITIES]
    for one, adjusted in zip(effects, holm([one["p_value"] for one in effects]), strict=True):
        one |= {"p_holm": adjusted, "is_detected": adjusted <= SECONDARY_LEVEL}
    first, second = np.triu_indices(len(runs), 1)
    ratios = np.maximum(sizes[first], sizes[second]) // np.minimum(sizes[first], sizes[second])
    pairs = [{"ratio": int(ratio), "js": mean[first, second][ratios == ratio].tolist()} for ratio in np.unique(ratios)]
    primary = separation(mean, sizes.tolist())
    return {
        "primary": primary._asdict() | {"holds": primary.p_value <= PRIMARY_LEVEL and primary.between > primary.within},
        "by_layer": {
            layer: separation(matrix, sizes.tolist())._asdict() for layer, matrix in zip(layers, by_layer, strict=True)
        },
        "sampling_floor": float(floors.mean(0)[first, second].mean()),
        "pairs": pairs,
        "effects": effects,
    }


def effect(runs: Sequence[dict[str, Any]], layer: str, quantity: str) -> dict[str, Any]:
    """How one number of one layer goes with batch size."""
    sizes = np.array([run["batch_size"] for run in runs])
    values = np.array([run["numbers"][layer][quantity][0] for run in runs])
    errors = np.array([run["numbers"][layer][quantity][1] for run in runs])
    groups = {int(size): values[sizes == size] for size in np.unique(sizes)}
    squares = sum(((group - group.mean()) ** 2).sum() for group in groups.values())
    spread = float(np.sqrt(squares / (len(runs) - len(groups))))
    smallest, largest = groups[min(groups)].mean(), groups[max(groups)].mean()
    rho, p_value = rank_correlation(values, np.log(sizes))
    return {
        "layer": layer,
        "quantity": quantity,
        "means": {size: float(group.mean()) for size, group in groups.items()},
        "rho": float(rho),
        "p_value": float(p_value),
        "shift": float(largest - smallest),
        "spread_of_seeds": spread,
        "sampling_error": float(np.sqrt((errors**2).mean())),
        "effect_size": float((largest - smallest) / spread),
    }


def explored(runs: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Batch size and learning rate told apart, over runs in which both vary: no test of the plan's.

    Args:
        runs: Results of :func:`measured`, each once.

    Returns:
        By layer and quantity Spearman's rho with batch size given the learning rate, and the other way round, each with
        a permutation p-value.
    """
    sizes = np.array([run["batch_size"] for run in runs])
    multipliers = np.array([run["multiplier"] for run in runs])
    found = []
    for layer in runs[0]["layers"]:
        for quantity in QUANTITIES:
            values = np.array([run["numbers"][layer][quantity][0] for run in runs])
            found.append(
                {
                    "layer": layer,
                    "quantity": quantity,
                    "with_batch_size": rank_correlation(values, sizes, [multipliers]).tolist(),
                    "with_learning_rate": rank_correlation(values, multipliers, [sizes]).tolist(),
                }
            )
    return found


def comparisons(folder: Path, runs: Sequence[dict[str, Any]], target: float) -> list[dict[str, Any]]:
    """What ``compare`` says of the smallest batch size against each of the others, all seeds a side."""

    def paths(size: int) -> list[Path]:
        return [folder / run["name"] for run in runs if run["batch_size"] == size]

    found = []
    smallest, *others = sorted({run["batch_size"] for run in runs})
    for size in others:
        comparison = compare(paths(smallest), paths(size), at_loss=target)
        mean = next(shift for shift in comparison.shifts if shift.quantity == "js" and not shift.name)
        found.append(
            {
                "batch_size": size,
                "gain_of_tokens": comparison.gains["tokens"].gain,
                "js": mean.shift,
                "sampling_floor": mean.sampling_floor,
                "run_floor": mean.run_floor,
                "is_detected": mean.is_detected,
                "verdict": comparison.verdict.text,
            }
        )
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    arguments, family = parse(parser)
    settings = list(dict.fromkeys([*first_set(), *second_set(), *rates()]))
    family.train_all(settings, arguments.processes)
    every = {setting: measured(family, setting) for setting in settings}
    never = [run["name"] for run in every.values() if isnan(run["tokens"])]
    every = {setting: run for setting, run in every.items() if not isnan(run["tokens"])}
    sets = {
        name: [every[setting] for setting in of_set if setting in every]
        for name, of_set in (("root rule", first_set()), ("one rate", second_set()))
    }
    found: dict[str, Any] = {name: study(runs) for name, runs in sets.items()}
    for one, other in zip(found["root rule"]["effects"], found["one rate"]["effects"], strict=True):
        one["is_robust"] = one["is_detected"] and other["is_detected"] and one["rho"] * other["rho"] > 0
    runs = list(every.values())
    found |= {"explored": explored(runs), "never": never}
    found["compare"] = comparisons(family.folder, sets["root rule"], family.target)
    write_report(runs, sets, found, environment(), results_of(arguments))


if __name__ == "__main__":
    main()
