"""The study of the estimator as a table, a figure, JSON and a report, judged by the criteria of its plan."""

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from benchmarks.compact_json import write_compact
from benchmarks.findings.tables import show_and_write

CRITERIA = {
    "bias of the corrected tail exponent": lambda cell: abs(cell["tail"]["bias_corrected"]) <= 0.02,
    "spread of the corrected tail exponent": lambda cell: cell["tail"]["spread_corrected"] <= 0.05,
    "coverage of the 80% interval": lambda cell: 0.7 <= cell["tail"]["coverage_of_mean"] <= 0.9,
    "JS between draws": lambda cell: cell["js_between_draws"] <= 5e-5,
}
"""Those of the plan, for every layer of the trained model."""

DEFAULT_NUM_TOKENS = 65536
WIDE = 1024
"""Width up to which a default of ``num_tokens`` should serve."""

COLUMNS = {
    "bias": lambda cell: f"{cell['tail']['bias']:+.3f}",
    "corrected": lambda cell: f"{cell['tail']['bias_corrected']:+.3f}",
    "spread": lambda cell: f"{cell['tail']['spread']:.3f}",
    "spread, corrected": lambda cell: f"{cell['tail']['spread_corrected']:.3f}",
    "stderr / spread": lambda cell: f"{cell['tail']['stderr_over_spread']:.2f}",
    "plain holds its mean": lambda cell: f"{cell['tail']['coverage_of_mean']:.0%}",
    "corrected holds the truth": lambda cell: f"{cell['tail']['coverage_of_truth']:.0%}",
    "head bias": lambda cell: f"{cell['head']['bias_corrected']:+.3f}",
    "RankMe": lambda cell: f"{cell['rankme_bias']:+.1%}",
    "JS to truth": lambda cell: f"{cell['js_to_truth']:.1e}",
    "JS of draws": lambda cell: f"{cell['js_between_draws']:.1e}",
    "beyond floor": lambda cell: f"{cell['beyond_js_floor']:.0%}",
}


def recommend(cells: list[dict[str, Any]]) -> dict[str, Any]:
    """The least n/d at which every layer of the trained model meets every criterion.

    A criterion that no size meets is set aside, and nothing is recommended on its behalf.

    Args:
        cells: Results of all cells.

    Returns:
        ``ratio`` and ``num_tokens``, None where no criterion is left; the criteria ``set_aside``; ``failed``, by
        criterion and size, the layers that do not meet it.
    """
    trained = [cell for cell in cells if cell["spectrum"] == "trained"]
    ratios = sorted({cell["ratio"] for cell in trained})
    failed = {
        what: {n: [c["source"] for c in trained if c["ratio"] == n and not is_met(c)] for n in ratios}
        for what, is_met in CRITERIA.items()
    }
    set_aside = [what for what, by_ratio in failed.items() if all(by_ratio.values())]
    kept = [by_ratio for what, by_ratio in failed.items() if what not in set_aside]
    ratio = min((n for n in ratios if kept and not any(by_ratio[n] for by_ratio in kept)), default=None)
    needed = None if ratio is None else max(DEFAULT_NUM_TOKENS, 2 ** (ratio * WIDE - 1).bit_length())
    return {"ratio": ratio, "num_tokens": needed, "set_aside": set_aside, "failed": failed}


def worse_corrected(cells: list[dict[str, Any]], least: int = 16) -> list[dict[str, Any]]:
    """Cells of some size in which the corrected exponent is no better than the plain one: they speak against it."""
    large = [cell for cell in cells if cell["ratio"] >= least]
    return [cell for cell in large if abs(cell["tail"]["bias_corrected"]) >= abs(cell["tail"]["bias"])]


def write_report(cells: list[dict[str, Any]], environment: dict[str, Any], folder: Path) -> None:
    """Print the table; write ``control.json``, ``control.png`` and ``control.md``.

    Args:
        cells: Results of all cells.
        environment: Machine and versions.
        folder: Where to.
    """
    folder.mkdir(parents=True, exist_ok=True)
    found = recommend(cells)
    written: dict[str, Any] = {"environment": environment, "recommendation": found, "cells": cells}
    written["worse_corrected"] = [_named(cell) for cell in worse_corrected(cells)]
    write_compact(folder / "control.json", written)
    draw(cells, folder / "control.png")
    verdict = f"{_told(found)} {_against(cells)}"
    rows = [
        {"rows of": _source(cell), "n/d": str(cell["ratio"])} | {name: tell(cell) for name, tell in COLUMNS.items()}
        for cell in cells
    ]
    sections: list[tuple[str, str | list[dict[str, str]]]] = [
        (f"The estimator's control, {environment['date']}", f"{cells[0]['num_draws']} draws a cell. {verdict}"),
        ("Tail exponent unless said otherwise; 'holds': 80% intervals", rows),
    ]
    picture = "![Bias, spread, coverage and divergence against tokens a channel](control.png)"
    show_and_write(sections, picture, folder / "control.md")


def _source(cell: dict[str, Any]) -> str:
    return f"{cell['source']}, {cell['spectrum']}" + (", d = 256" if cell["width"] == 256 else "")


def _told(found: dict[str, Any]) -> str:
    aside = "".join(
        f"{what[0].upper() + what[1:]} is not met at any size, so that nothing is recommended on its behalf. "
        for what in found["set_aside"]
    )
    missed = "; ".join(
        f"{what} not at n/d = {', '.join(str(ratio) for ratio, layers in by_ratio.items() if layers)}"
        for what, by_ratio in found["failed"].items()
        if what not in found["set_aside"] and any(by_ratio.values())
    )
    if found["ratio"] is None:
        return f"{aside}No size meets the other criteria for every layer of the trained model: {missed}."
    return (
        f"{aside}All {'other ' if aside else ''}criteria are met, for every layer of the trained model, from "
        f"n/d = {found['ratio']} on ({missed or 'none is missed'}): num_tokens = {found['num_tokens']:,} serves widths "
        f"up to {found['num_tokens'] // found['ratio']:,}."
    )


def _named(cell: dict[str, Any]) -> str:
    return f"{_source(cell)} at n/d = {cell['ratio']}"


def _against(cells: list[dict[str, Any]]) -> str:
    worse = worse_corrected(cells)
    of = sum(cell["ratio"] >= 16 for cell in cells)
    told = "; ".join(
        f"{_named(cell)}: {cell['tail']['bias_corrected']:+.4f} for {cell['tail']['bias']:+.4f}" for cell in worse
    )
    return (
        f"The correction is no better than the plain exponent in {len(worse)} of {of} cells of n/d from 16 on"
        f"{f' ({told})' if told else ''}."
    )


PANELS = (
    ("bias of the tail exponent, corrected", lambda cell: cell["tail"]["bias_corrected"], 0.0, "linear"),
    ("bias of the tail exponent, plain", lambda cell: cell["tail"]["bias"], 0.0, "linear"),
    ("spread of the tail exponent, corrected", lambda cell: cell["tail"]["spread_corrected"], None, "log"),
    ("80% interval of the plain exponent holds its mean", lambda cell: cell["tail"]["coverage_of_mean"], 0.8, "linear"),
    ("JS between two draws, nats", lambda cell: cell["js_between_draws"], None, "log"),
    ("pairs beyond their floor of JS", lambda cell: cell["beyond_js_floor"], 0.05, "linear"),
)


def draw(cells: list[dict[str, Any]], path: Path) -> None:
    """Six panels against tokens a channel: known processes thin, layers of the trained model thick."""
    figure, axes = plt.subplots(2, 3, figsize=(14, 7.5), layout="constrained", sharex=True)
    lines: dict[str, list[dict[str, Any]]] = {}
    for cell in cells:
        if cell["width"] != 256:
            lines.setdefault(f"{cell['source']}, {cell['spectrum']}", []).append(cell)
    colors = plt.get_cmap("tab20").colors  # type: ignore[attr-defined]
    for axis, (title, value, wanted, scale) in zip(axes.flat, PANELS, strict=True):
        if wanted is not None:
            axis.axhline(wanted, color="0.6", linewidth=1, linestyle="--")
        for color, (name, points) in zip(colors, lines.items(), strict=False):
            trained = name.endswith("trained")
            axis.plot(
                [point["ratio"] for point in points],
                [value(point) for point in points],
                color=color,
                linewidth=2.2 if trained else 1,
                marker="o" if trained else ".",
                label=name.removesuffix(", trained"),
            )
        axis.set(title=title, xscale="log", yscale=scale)
        axis.set_xticks(
            sorted({cell["ratio"] for cell in cells}), [f"{n}" for n in sorted({c["ratio"] for c in cells})]
        )
        axis.minorticks_off()
        axis.spines[["top", "right"]].set_visible(False)
    for axis in axes[1]:
        axis.set_xlabel("tokens a channel, n/d")
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside right upper", fontsize=9, frameon=False)
    figure.savefig(path, dpi=110)
    plt.close(figure)
