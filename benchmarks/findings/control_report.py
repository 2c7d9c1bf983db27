"""The study of the estimator as a table, a figure, JSON and a report, judged by the criteria of its plan."""

import json
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from rich.table import Table

from benchmarks.harness import console

CRITERIA = {
    "bias of the corrected tail exponent": lambda cell: abs(cell["tail"]["bias_corrected"]) <= 0.02,
    "spread of the tail exponent": lambda cell: cell["tail"]["spread"] <= 0.05,
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
    "stderr / spread": lambda cell: f"{cell['tail']['stderr_over_spread']:.2f}",
    "holds its mean": lambda cell: f"{cell['tail']['coverage_of_mean']:.0%}",
    "holds the truth": lambda cell: f"{cell['tail']['coverage_of_truth']:.0%}",
    "head bias": lambda cell: f"{cell['head']['bias_corrected']:+.3f}",
    "RankMe": lambda cell: f"{cell['rankme_bias']:+.1%}",
    "JS to truth": lambda cell: f"{cell['js_to_truth']:.1e}",
    "JS of draws": lambda cell: f"{cell['js_between_draws']:.1e}",
    "beyond floor": lambda cell: f"{cell['beyond_js_floor']:.0%}",
}


def recommend(cells: list[dict[str, Any]]) -> dict[str, Any]:
    """The least n/d at which every layer of the trained model meets every criterion.

    Args:
        cells: Results of all cells.

    Returns:
        ``ratio`` and ``num_tokens``, None where no size meets all, and what failed by size.
    """
    failed: dict[int, list[str]] = {}
    for cell in cells:
        if cell["spectrum"] == "trained":
            reasons = failed.setdefault(cell["ratio"], [])
            reasons += [f"{what} of {cell['source']}" for what, is_met in CRITERIA.items() if not is_met(cell)]
    ratio = min((ratio for ratio, reasons in failed.items() if not reasons), default=None)
    needed = None if ratio is None else max(DEFAULT_NUM_TOKENS, 2 ** (ratio * WIDE - 1).bit_length())
    return {"ratio": ratio, "num_tokens": needed, "failed": failed}


def write_report(cells: list[dict[str, Any]], environment: dict[str, Any], folder: Path) -> None:
    """Print the table; write ``control.json``, ``control.png`` and ``control.md``.

    Args:
        cells: Results of all cells.
        environment: Machine and versions.
        folder: Where to.
    """
    folder.mkdir(parents=True, exist_ok=True)
    found = recommend(cells)
    written = {"environment": environment, "recommendation": found, "cells": cells}
    (folder / "control.json").write_text(json.dumps(written, indent=1) + "\n")
    draw(cells, folder / "control.png")
    table = Table("", "n / d", *COLUMNS, title="tail exponent unless said otherwise; 'holds': 80% intervals")
    lines = ["", "| | n / d | " + " | ".join(COLUMNS) + " |", "|" + " --- |" * (2 + len(COLUMNS))]
    for cell in cells:
        name = f"{cell['source']}, {cell['spectrum']}" + (", d = 256" if cell["width"] == 256 else "")
        values = [name, str(cell["ratio"]), *(tell(cell) for tell in COLUMNS.values())]
        table.add_row(*values)
        lines.append("| " + " | ".join(values) + " |")
    console.print(table)
    verdict = _told(found)
    console.print(verdict)
    head = [f"# The estimator's control, {environment['date']}", "", f"{cells[0]['num_draws']} draws a cell. {verdict}"]
    picture = ["", "![Bias, spread, coverage and divergence against tokens a channel](control.png)"]
    (folder / "control.md").write_text("\n".join([*head, *picture, *lines]) + "\n")


def _told(found: dict[str, Any]) -> str:
    missed = "; ".join(f"n/d = {ratio}: {', '.join(why)}" for ratio, why in found["failed"].items() if why)
    missed = f" Not met at {missed}." if missed else ""
    if found["ratio"] is None:
        return f"No size meets every criterion for every layer of the trained model.{missed}"
    return (
        f"All criteria are met from n/d = {found['ratio']} on: "
        f"num_tokens = {found['num_tokens']:,} serves widths up to {found['num_tokens'] // found['ratio']:,}.{missed}"
    )


PANELS = (
    ("bias of the tail exponent, corrected", lambda cell: cell["tail"]["bias_corrected"], 0.0, "linear"),
    ("bias of the tail exponent, plain", lambda cell: cell["tail"]["bias"], 0.0, "linear"),
    ("spread of the tail exponent", lambda cell: cell["tail"]["spread"], None, "log"),
    ("80% interval holds its mean", lambda cell: cell["tail"]["coverage_of_mean"], 0.8, "linear"),
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
