"""The study of batch size and geometry as tables, a figure, JSON and a report."""

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes

from benchmarks.compact_json import write_compact
from benchmarks.findings.runs import BATCH_SIZES
from benchmarks.findings.tables import show_and_write

TITLES = {"alpha_head": "alpha of ranks 1-10", "alpha_tail": "alpha of an eighth to a half", "rankme": "RankMe"}
COLORS = {"root rule": "tab:blue", "one rate": "tab:orange"}

Runs = dict[str, list[dict[str, Any]]]
"""Measured runs by set."""
Found = dict[str, dict[str, Any]]
"""Tests by set."""


def write_report(
    every: list[dict[str, Any]], sets: Runs, found: dict[str, Any], environment: dict[str, Any], folder: Path
) -> None:
    """Print the tables; write ``geometry.json``, ``geometry.png`` and ``geometry.md``.

    Args:
        every: All measured runs, each once.
        sets: Those of each set.
        found: Tests by set, what was ``explored``, what ``compare`` says, and which runs ``never`` reached the target.
        environment: Machine and versions.
        folder: Where to.
    """
    folder.mkdir(parents=True, exist_ok=True)
    names = {name: [run["name"] for run in runs] for name, runs in sets.items()}
    facts = {"environment": environment, "runs": [_plain(run) for run in every], "sets": names, "found": found}
    write_compact(folder / "geometry.json", facts)
    draw(sets, found, folder / "geometry.png")
    tests = {name: found[name] for name in sets}
    sections: list[tuple[str, str | list[dict[str, str]]]] = [
        (f"Batch size and geometry at equal loss, {environment['date']}", verdict(tests, found["never"])),
        ("Divergence of spectra, mean over layers", _distances(tests)),
        ("By layer", _by_layer(tests)),
        ("Effects of batch size", _effects(found)),
        (
            "Explored after the tests above were seen: all runs of rope, with rates halved and doubled",
            _explored(found["explored"]),
        ),
        (
            "What `compare` says of the smallest batch size against the others (tokens a second: on shared cores)",
            _compared(found["compare"]),
        ),
        ("Tokens to the target", _tokens(sets)),
    ]
    picture = "![Divergence by ratio of batch sizes; exponents and RankMe by batch size; spectra](geometry.png)"
    show_and_write(sections, picture, folder / "geometry.md")


def _plain(run: dict[str, Any]) -> dict[str, Any]:
    spectra = {name: [float(f"{value:.6g}") for value in layer.values] for name, layer in run["layers"].items()}
    return {key: value for key, value in run.items() if key != "layers"} | {"eigenvalues": spectra}


def verdict(found: Found, never: list[str]) -> str:
    """What the tests of the plan come to, in a few sentences."""
    lines = []
    for name, one in found.items():
        primary = one["primary"]
        lines.append(
            f"{name}: mean JS between batch sizes {primary['between']:.2e}, between seeds {primary['within']:.2e} "
            f"({primary['between'] / primary['within']:.2f} times), permutation p = {primary['p_value']:.4f}: "
            f"{'holds' if primary['holds'] else 'not shown'} at 1%."
        )
    robust = [effect for effect in found["root rule"]["effects"] if effect.get("is_robust")]
    told = "; ".join(
        f"{effect['layer']} {effect['quantity']} {'rises' if effect['rho'] > 0 else 'falls'} with batch size "
        f"({effect['effect_size']:+.1f} spreads of seeds)"
        for effect in robust
    )
    lines.append(f"Robust under both rules: {told or 'none'}.")
    lines.append(f"Runs that never reached the target: {', '.join(never) or 'none'}.")
    return " ".join(lines)


def _distances(found: Found) -> list[dict[str, str]]:
    rows = []
    for name, one in found.items():
        for pair in one["pairs"]:
            js = np.array(pair["js"])
            rows.append(
                {
                    "set": name,
                    "batch sizes": "one, other seeds" if pair["ratio"] == 1 else f"{pair['ratio']} times apart",
                    "pairs": str(len(js)),
                    "mean JS": f"{js.mean():.2e}",
                    "least to most": f"{js.min():.1e} .. {js.max():.1e}",
                    "sampling floor": f"{one['sampling_floor']:.1e}",
                }
            )
    return rows


def _by_layer(found: Found) -> list[dict[str, str]]:
    return [
        {
            "set": name,
            "layer": layer,
            "between batch sizes": f"{one['between']:.2e}",
            "between seeds": f"{one['within']:.2e}",
            "p": f"{one['p_value']:.4f}",
        }
        for name, result in found.items()
        for layer, one in result["by_layer"].items()
    ]


def _effects(found: Found) -> list[dict[str, str]]:
    rows = []
    for one, other in zip(found["root rule"]["effects"], found["one rate"]["effects"], strict=True):
        rows.append(
            {
                "layer": one["layer"],
                "quantity": one["quantity"],
                "at smallest B": f"{one['means'][min(one['means'])]:.3f}",
                "at largest B": f"{one['means'][max(one['means'])]:.3f}",
                "spread of seeds": f"{one['spread_of_seeds']:.3f}",
                "sampling error": f"{one['sampling_error']:.4f}",
                "effect size": f"{one['effect_size']:+.1f}",
                "rho with log B": f"{one['rho']:+.2f}",
                "Holm p": f"{one['p_holm']:.4f}",
                "rho, one rate": f"{other['rho']:+.2f}",
                "Holm p, one rate": f"{other['p_holm']:.4f}",
                "robust": "yes" if one["is_robust"] else "no",
            }
        )
    return rows


def _explored(explored: list[dict[str, Any]]) -> list[dict[str, str]]:
    def told(pair: list[float]) -> str:
        return f"{pair[0]:+.2f} (p {pair[1]:.4f})"

    return [
        {
            "layer": one["layer"],
            "quantity": one["quantity"],
            "with batch size, given learning rate": told(one["with_batch_size"]),
            "with learning rate, given batch size": told(one["with_learning_rate"]),
        }
        for one in explored
    ]


def _compared(compared: list[dict[str, Any]]) -> list[dict[str, str]]:
    return [
        {
            "batch size": str(one["batch_size"]),
            "tokens": f"{one['gain_of_tokens']:+.1%}",
            "JS": f"{one['js']:.2e}",
            "sampling floor": f"{one['sampling_floor']:.1e}",
            "run floor": f"{one['run_floor']:.2e}",
            "beyond both": "yes" if one["is_detected"] else "no",
            "verdict": one["verdict"],
        }
        for one in compared
    ]


def _tokens(sets: Runs) -> list[dict[str, str]]:
    rows: dict[tuple[str, int], list[float]] = {}
    for name, runs in sets.items():
        for run in runs:
            rows.setdefault((name, run["batch_size"]), []).append(run["tokens"])
    return [
        {"set": name, "batch size": str(size), "tokens of each seed": ", ".join(f"{t:,.0f}" for t in tokens)}
        for (name, size), tokens in rows.items()
    ]


def draw(sets: Runs, found: Found, path: Path) -> None:
    """Divergences by ratio of batch sizes, the three numbers by batch size, effects, and spectra of the last layer."""
    figure, axes = plt.subplots(2, 3, figsize=(14, 8), layout="constrained")
    _draw_divergences(axes[0, 0], {name: found[name] for name in sets})
    for axis, quantity in zip((axes[0, 1], axes[0, 2], axes[1, 0]), TITLES, strict=True):
        _draw_quantity(axis, sets, quantity)
    _draw_effects(axes[1, 1], found["root rule"]["effects"])
    _draw_spectra(axes[1, 2], sets["root rule"])
    for axis in axes.flat:
        axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _draw_divergences(axis: Axes, found: Found) -> None:
    generator = np.random.default_rng(0)
    for name, one in found.items():
        means = []
        for pair in one["pairs"]:
            js = np.array(pair["js"])
            at = pair["ratio"] * np.exp(generator.uniform(-0.08, 0.08, len(js)))
            axis.plot(at, js, ".", color=COLORS[name], alpha=0.35, markersize=4)
            means.append((pair["ratio"], js.mean()))
        axis.plot(*zip(*means, strict=True), "o-", color=COLORS[name], label=f"{name}: mean")
    axis.axhline(found["root rule"]["sampling_floor"], color="0.5", linestyle="--", label="sampling floor")
    axis.set(
        xscale="log", yscale="log", title="JS at equal loss, mean over layers, nats", xlabel="ratio of batch sizes"
    )
    axis.set_xticks([1, 2, 4, 8, 16, 32], ["1\n(seeds)", "2", "4", "8", "16", "32"])
    axis.minorticks_off()
    axis.legend(frameon=False, fontsize=8, loc="lower right", bbox_to_anchor=(1, 0.06))


def _draw_quantity(axis: Axes, sets: Runs, quantity: str) -> None:
    layers = list(sets["root rule"][0]["numbers"])
    colors = plt.get_cmap("viridis")(np.linspace(0, 0.85, len(layers)))
    for layer, color in zip(layers, colors, strict=True):
        for name, runs in sets.items():
            sizes = sorted({run["batch_size"] for run in runs})
            values = {s: [r["numbers"][layer][quantity][0] for r in runs if r["batch_size"] == s] for s in sizes}
            is_first = name == "root rule"
            means = [float(np.mean(values[size])) for size in sizes]
            axis.plot(
                sizes, means, "-" if is_first else "--", color=color, label=layer if is_first else None, linewidth=1.5
            )
            for size in sizes:
                axis.plot([size] * len(values[size]), values[size], "o" if is_first else "x", color=color, markersize=4)
    axis.set(xscale="log", title=f"{TITLES[quantity]} (dashed: one rate)", xlabel="batch size, sequences")
    axis.set_xticks(BATCH_SIZES, [str(size) for size in BATCH_SIZES])
    axis.minorticks_off()
    axis.legend(frameon=False, fontsize=8)


def _draw_effects(axis: Axes, effects: list[dict[str, Any]]) -> None:
    layers, quantities = ([*dict.fromkeys(effect[key] for effect in effects)] for key in ("layer", "quantity"))
    sizes = np.array([effect["effect_size"] for effect in effects]).reshape(len(layers), len(quantities))
    limit = float(np.abs(sizes).max())
    axis.imshow(sizes, cmap="RdBu_r", vmin=-limit, vmax=limit, aspect="auto")
    for row, column in np.ndindex(*sizes.shape):
        effect = effects[row * len(quantities) + column]
        mark = " **" if effect.get("is_robust") else " *" if effect["is_detected"] else ""
        dark = abs(sizes[row, column]) > 0.6 * limit
        axis.text(column, row, f"{sizes[row, column]:+.1f}{mark}", ha="center", va="center", color="w" if dark else "k")
    axis.set_xticks(range(len(quantities)), quantities)
    axis.set_yticks(range(len(layers)), layers)
    axis.set_title("largest B less smallest, in spreads of seeds\n* Holm 5%, ** under both rules", fontsize=10)


def _draw_spectra(axis: Axes, runs: list[dict[str, Any]]) -> None:
    sizes = sorted({run["batch_size"] for run in runs})
    layer = list(runs[0]["layers"])[-1]

    def mean_log(size: int) -> np.ndarray:
        spectra = [run["layers"][layer].values.numpy() for run in runs if run["batch_size"] == size]
        return np.mean([np.log10(values / values.sum()) for values in spectra], axis=0)

    middle = sizes[(len(sizes) - 1) // 2]
    base = mean_log(middle)
    colors = plt.get_cmap("plasma")(np.linspace(0, 0.9, len(sizes)))
    for size, color in zip(sizes, colors, strict=True):
        shift = mean_log(size) - base
        axis.plot(range(1, len(shift) + 1), shift, color=color, label=f"B = {size}")
    axis.set(xscale="log", xlabel="rank", title=f"{layer}: log10 of normalised\neigenvalues less those at B = {middle}")
    axis.legend(frameon=False, fontsize=8)
