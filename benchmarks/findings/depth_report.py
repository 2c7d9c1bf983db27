"""The report and the figure of study 6."""

from collections.abc import Sequence
from math import isfinite
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.findings.tables import show_and_write
from lightning_spectral.reporting.words import number

Found = dict[str, Any]

COLOURS = ("#3b0f70", "#de4968", "#e8a33d")


def write_report(results: Found, folder: Path) -> None:
    """To the terminal, and ``depth.md`` and ``.png`` into a folder."""
    figure(results).savefig(folder / "depth.png", dpi=110)
    depths, outcome = results["depths"], results["outcome"]
    complete = [one for one in depths if "separation" in one]
    sections: list[tuple[str, Any]] = [("Does it hold at 12, 36 and 48 layers?", _first(depths, outcome))]
    if complete:
        sections += [
            ("D1: are batch sizes farther apart than seeds, at equal loss?", [_apart(one) for one in complete]),
            ("D2: does a steeper tail go with more tokens?", [_tail(one) for one in complete]),
            ("D2: gate and outcome", _second(complete, outcome)),
            ("D3: is the deepest layer where batch sizes differ most?", [_layers(one) for one in complete]),
            ("All runs", [_run(run) for one in complete for run in one["runs"]]),
        ]
    late = [dict(zip(("run", "why"), entry.split(": ", 1), strict=True)) for one in complete for entry in one["late"]]
    if late:
        sections.append(("Runs that the stage gate finds too early", late))
    missing = [{"depth": str(one["depth"]), "run": name} for one in depths for name in one["missing"]]
    if missing:
        sections.append(("Missing", missing))
    picture = (
        "![By depth: divergence of spectra between and within batch sizes, by layer; tail exponent of the last layer "
        "against tokens to the loss](depth.png)"
    )
    show_and_write(sections, picture, folder / "depth.md")


def _first(depths: Sequence[Found], outcome: Found) -> str:
    words = [
        "Of width 64, byte-pair tokens, recipe rope, batches of 4, 8 and 16 sequences at tuned rates, three seeds "
        f"each: **{outcome['in words']}**."
    ]
    for one in depths:
        if "separation" not in one:
            words.append(f"{one['depth']} layers: not made, {one['why']}.")
            continue
        took = [run["tokens"] for run in one["runs"]]
        rates = sorted({run["rate"] for run in one["runs"]})
        words.append(
            f"{one['depth']} layers: {min(took):,.0f} to {max(took):,.0f} tokens to {one['loss']} nats, at "
            f"{' and '.join(f'{rate:g}' for rate in rates)} times the rate, of 0.5, 1 and 2."
        )
    return " ".join(words)


def _apart(one: Found) -> dict[str, str]:
    apart = one["separation"]
    return {
        "layers": str(one["depth"]),
        "JS between batch sizes": f"{apart['between']:.2e}",
        "between seeds": f"{apart['within']:.2e}",
        "ratio": f"{apart['between'] / apart['within']:.2f}" if apart["within"] > 0 else "-",
        "p (least: 1/280)": f"{apart['p_value']:.4f}",
        "Holm": f"{apart['p_holm']:.4f}",
        "holds": _yes(apart["holds"]),
        "sampling floor": f"{np.mean([layer['sampling_floor'] for layer in one['layers']]):.1e}",
    }


def _tail(one: Found) -> dict[str, str]:
    sizes = sorted({run["batch_size"] for run in one["runs"]})
    means = [np.mean([run["alpha_tail"] for run in one["runs"] if run["batch_size"] == size]) for size in sizes]
    return {
        "layers": str(one["depth"]),
        "measured at": f"{one['tokens']:,.0f} tokens",
        "Spearman of tail and tokens": f"{one['rho']:+.2f}",
        **{f"mean tail, B = {size}": f"{mean:.3f}" for size, mean in zip(sizes, means, strict=True)},
    }


def _second(depths: Sequence[Found], outcome: Found) -> str:
    late = [entry for one in depths for entry in one["late"]]
    steps = [entry for entry in late if entry.endswith("steps")]
    rho, p_value = outcome["pooled"]
    words = [
        f"Pooled over {len(depths)} of 3 depths, ranks within each: {rho:+.2f}, two-sided p = {p_value:.2g} by "
        "permutation within depths.",
        "The stage gate is met."
        if not late
        else f"The stage gate is not met: {len(steps)} runs have had fewer than 122 steps, {len(late) - len(steps)} "
        "are not past their tail's maximum (named below).",
        ", ".join(f"{name} {_yes(outcome[name])}" for name in ("D1", "D2", "D3")) + ".",
    ]
    return " ".join(words)


def _yes(holds: bool | None) -> str:
    return "not made" if holds is None else "yes" if holds else "no"


def _layers(one: Found) -> dict[str, str]:
    """Depths have other layers, but all five: named by their place."""
    places = ("first", "second", "third", "fourth", "last")
    ratios = {
        f"{place}: ratio (p)": f"{layer['ratio']:.2f} ({layer['p_value']:.3f})"
        for place, layer in zip(places, one["layers"], strict=True)
    }
    return {
        "layers": str(one["depth"]),
        **ratios,
        "largest in": one["strongest"] or "-",
        "deepest": _yes(one["is_deepest"]),
    }


def _run(run: Found) -> dict[str, str]:
    return {
        "run": run["name"],
        "last loss": f"{run['loss']:.3f}",
        "tokens to the loss": f"{run['tokens']:,.0f}",
        "tail's maximum": f"{run['peak']:,.0f}",
        "tail": f"{run['alpha_tail']:.3f}",
    }


def figure(results: Found) -> Figure:
    """By depth, divergences by layer above and tails against tokens below."""
    depths = results["depths"]
    drawn = Figure(figsize=(3.8 * len(depths), 6.4), layout="constrained")
    axes = drawn.subplots(2, len(depths), squeeze=False)
    for above, below, one in zip(*axes, depths, strict=True):
        above.set_title(f"{one['depth']} layers", fontsize=10)
        if "separation" not in one:
            for axis in (above, below):
                axis.set_axis_off()
                axis.text(0.5, 0.5, f"not made:\n{one['why']}"[:80], ha="center", transform=axis.transAxes, fontsize=9)
            continue
        _draw_divergences(above, one)
        _draw_tails(below, one)
    axes[0, 0].set_ylabel("JS at equal loss, nats")
    axes[1, 0].set_ylabel("tokens to the loss, thousands")
    for axis in axes.flat:
        axis.spines[["top", "right"]].set_visible(False)
    return drawn


def _draw_divergences(axis: Axes, one: Found) -> None:
    layers = [layer["layer"].rsplit(".", 1)[-1] for layer in one["layers"]]
    for name, colour, label in (("between", "#de4968", "between batch sizes"), ("within", "#3b0f70", "between seeds")):
        axis.plot(layers, [layer[name] for layer in one["layers"]], "o-", color=colour, label=label)
    floors = [layer["sampling_floor"] for layer in one["layers"]]
    axis.plot(layers, floors, "--", color="0.5", label="sampling floor (95%)")
    axis.set_yscale("log")
    axis.set_xlabel(f"layer (mean: p = {one['separation']['p_value']:.3f}, Holm {one['separation']['p_holm']:.3f})")
    axis.legend(frameon=False, fontsize=7)


def _draw_tails(axis: Axes, one: Found) -> None:
    sizes = sorted({run["batch_size"] for run in one["runs"]})
    for size, colour in zip(sizes, COLOURS, strict=True):
        runs = [run for run in one["runs"] if run["batch_size"] == size and isfinite(number(run["tokens"]))]
        tails, tokens = ([run[name] for run in runs] for name in ("alpha_tail", "tokens"))
        axis.plot(tails, [count / 1e3 for count in tokens], "o", color=colour, label=f"B = {size}")
    axis.set_xlabel(f"last layer's tail at {one['tokens']:,.0f} tokens (rho {one['rho']:+.2f})", fontsize=9)
    axis.legend(frameon=False, fontsize=7)
