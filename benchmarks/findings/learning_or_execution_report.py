"""The report and the figure of study 5."""

from collections import Counter
from collections.abc import Sequence
from math import isfinite
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.findings.tables import show_and_write
from lightning_spectral.reporting.words import number

Fact = dict[str, Any]

WORDS = {
    "natural": "the natural steps",
    "changes": "the changes of known truth",
    "identical": "the arms that are their base to the bit",
    "chain": "the chain at B = 32",
}
"""Parts of a result."""

LOSSES = ("primary", "three quarters", "half", "three seeds")
NUM_NULLS = 60
TICKS = (-80, -40, -20, -10, 0, 10, 30, 100, 400)
NEAR = 1.2
"""Both ratios within this factor of one: too many to be named."""
GROUPS = {"natural": "#3b0f70", "execution": "#5a8f7b", "planted": "#de4968"}


def write_report(results: dict[str, Any], folder: Path) -> None:
    """To the terminal, and ``learning_or_execution.md`` and ``.png`` into a folder."""
    figure(results).savefig(folder / "learning_or_execution.png", dpi=110)
    sections: list[tuple[str, Any]] = [("Do head and gradient spectra tell learning from execution?", _first(results))]
    for title, rows in (
        ("Natural steps, neighbours compared, beside the notes of the paper's authors on their toy chain", "natural"),
        ("The natural steps again at B = 32", "chain"),
    ):
        found = results[rows]
        sections.append((title, [_natural(row) for row in found] if found else "Not made."))
    changes = results["changes"]
    sections += [
        ("P: changes of known truth", [_change(row) for row in changes] if changes else "Not made."),
        ("S: verdicts at three losses, and with three seeds", [_stable(r) for r in [*results["natural"], *changes]]),
        ("E: arms that are their base to the bit", [_same(row) for row in results["identical"]] or "Not made."),
        ("N: sides that differ by nothing", _nulls(results["nulls"])),
    ]
    told = [
        {"comparison": f"{row['base']} -> {row['variant']}", "verdict": row["at"]["primary"].get("text") or _why(row)}
        for row in [*results["natural"], *changes, *results["chain"]]
    ]
    sections.append(("Verdicts at the primary loss, in full", told or "Not made."))
    missing = [{"arm": arm, "missing": str(len(names)), "first": names[0]} for arm, names in results["missing"].items()]
    if missing:
        sections.append(("Arms of which runs are missing", missing))
    picture = (
        "![Gain in tokens and in tokens a second of each change with its interval; how many times as far apart as "
        "seeds activations and gradients are](learning_or_execution.png)"
    )
    show_and_write([one for one in sections if one[1]], picture, folder / "learning_or_execution.md")


def _why(row: Fact) -> str:
    return f"not made: {row['at']['primary']['why']}"


def _first(results: dict[str, Any]) -> str:
    outcome, changes = results["outcome"], results["changes"]
    words = [
        "4 layers of width 128, byte-pair tokens, batches of 8 sequences of 128, 262,144 tokens, four paired seeds a "
        f"side: **{outcome['in words']}**."
    ]
    if results["rate"] is not None:
        words.append(f"rope is trained at {results['rate']:g} times its recipe's rate.")
    if changes:
        wrong = [row["variant"] for row in changes if not row["is_right"]]
        words.append(
            f"{len(changes) - len(wrong)} of {len(changes)} changes got the verdict that was planned"
            + (f", not {', '.join(wrong)}." if wrong else ".")
        )
    if kept := results.get("kept"):
        told = ", ".join(f"{WORDS[name]} of {date}" for name, date in kept.items())
        words.append(f"As they were found when their runs were there: {told}.")
    if not results["nulls"]:
        words.append("The comparisons of nothing with nothing were not made.")
    if not results["chain"]:
        words.append("The chain at B = 32 was not made.")
    return " ".join(words)


def _gain(values: Sequence[float]) -> str:
    gain, low, high = (number(value) + 0.0 for value in values)  # no minus before a zero
    interval = f" ({low:+.1%} .. {high:+.1%})" if isfinite(low) else ""
    return f"{gain:+.1%}{interval}" if isfinite(gain) else "left out"


def _numbers(row: Fact) -> dict[str, str]:
    """Of a comparison at the primary loss; dashes where it was not made."""
    columns = ("loss", "tokens", "tokens/s", "JS of activations", "R, activations", "R, gradients", "verdict")
    fact = row["at"]["primary"]
    if "why" in fact:
        return dict.fromkeys(columns, "-")
    values = (
        f"{fact['loss']:.2f}",
        _gain(fact["gains"]["tokens"]),
        _gain(fact["gains"]["throughput"]),
        f"{fact['js'].get('activation', np.nan):.4f}",
        *(_ratio(fact, kind) for kind in ("activation", "gradient")),
        _label(fact),
    )
    return dict(zip(columns, values, strict=True))


def _ratio(fact: Fact, kind: str) -> str:
    if kind not in fact["ratios"]:
        return "-"
    return f"{fact['ratios'][kind]:.2f}{' moved' if fact['moved'][kind] else ''}"


def _label(fact: Fact) -> str:
    if "why" in fact:
        return "not made"
    return f"{fact['kind']}, {fact['led_by']}" if fact["led_by"] else str(fact["kind"])


def _natural(row: Fact) -> dict[str, str]:
    gain, js = row["notes"]
    notes = {"notes: tokens": f"{gain:+.1%}", "notes: JS": f"{js:.4f}"}
    return {"step": f"{row['base']} -> {row['variant']}", "rate": f"x{row['rate']:g}", **_numbers(row), **notes}


def _change(row: Fact) -> dict[str, str]:
    start = {"change": row["variant"], "against": row["base"], "planned": row["expected"]}
    return start | _numbers(row) | {"as planned": "yes" if row["is_right"] else "no"}


def _stable(row: Fact) -> dict[str, str]:
    labels = {name: _label(row["at"][name]) for name in LOSSES}
    same = {True: "yes", False: "no", None: "not known"}[row["is_stable"]]
    return {"change": f"{row['base']} -> {row['variant']}", **labels, "the same": same}


def _same(row: Fact) -> dict[str, str]:
    but = " but what is of activations" if row["but"] else ""
    differences = ", ".join(f"{value:.2g}" for value in row["differences"])
    return {"arm": row["variant"], "against": row["base"], "largest difference, by seed": differences + but}


def _nulls(rows: Sequence[Fact]) -> str:
    if not rows:
        return f"Not made: none of {NUM_NULLS}."
    counts = Counter(_label({"kind": row["kind"], "led_by": row["led_by"]}) for row in rows if row["kind"])
    told = ", ".join(f"{name}: {number}" for name, number in counts.most_common())
    unmade = sum(row["kind"] is None for row in rows)
    kept = Counter(row["kept"] for row in rows if "kept" in row)
    dates = ", ".join(f"{count} of {date}" for date, count in kept.items())
    return (
        f"{len(rows)} of {NUM_NULLS} comparisons of two seeds against two. {told}."
        + (f" {unmade} could not be made." if unmade else "")
        + (f" As they were found when their runs were there: {dates}." if kept else "")
    )


def figure(results: dict[str, Any]) -> Figure:
    """Gains of each comparison with intervals, and how far spectra moved."""
    rows = [("natural", row) for row in results["natural"]]
    rows += [("planted" if row["is_planted"] else "execution", row) for row in results["changes"]]
    rows = [(group, row) for group, row in rows if "why" not in row["at"]["primary"]]
    drawn = Figure(figsize=(13, max(2.5, 1.2 + 0.27 * len(rows))), layout="constrained")
    axes = drawn.subplots(1, 3)
    if not rows:
        for axis in axes:
            axis.set_axis_off()
        axes[1].text(0.5, 0.5, "not made: runs are missing", ha="center")
        return drawn
    names = [f"{row['base']} -> {row['variant']}" if group == "natural" else row["variant"] for group, row in rows]
    for axis, quantity, title in ((axes[0], "tokens", "tokens"), (axes[1], "throughput", "tokens a second")):
        _draw_gains(axis, rows, quantity)
        axis.set_title(f"gain in {title}", fontsize=10)
        axis.set_yticks(range(len(rows)), names if axis is axes[0] else [""] * len(rows), fontsize=8)
        axis.set_ylim(len(rows) - 0.5, -0.5)
    _draw_ratios(axes[2], rows, names)
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
    return drawn


def _draw_gains(axis: Axes, rows: Sequence[tuple[str, Fact]], quantity: str) -> None:
    for at, (group, row) in enumerate(rows):
        gain, low, high = map(number, row["at"]["primary"]["gains"][quantity])
        if isfinite(low):
            axis.plot([100 * low, 100 * high], [at, at], color=GROUPS[group], linewidth=1.2)
        axis.plot(100 * gain, at, "o", color=GROUPS[group], markersize=4)
        if quantity == "tokens" and group == "natural":
            axis.plot(100 * row["notes"][0], at, "x", color="0.4", markersize=5)
    axis.axvline(0, color="0.8", linewidth=1, zorder=0)
    axis.set_xscale("symlog", linthresh=10)
    limits = axis.get_xlim()
    axis.set_xticks(TICKS, [f"{tick:+d}" if tick else "0" for tick in TICKS], fontsize=8)
    axis.minorticks_off()
    axis.set_xlim(limits)
    axis.set_xlabel("percent" + (" (crosses: the authors' notes)" if quantity == "tokens" else ""))


def _draw_ratios(axis: Axes, rows: Sequence[tuple[str, Fact]], names: Sequence[str]) -> None:
    for (group, row), name in zip(rows, names, strict=True):
        ratios = row["at"]["primary"]["ratios"]
        if {"activation", "gradient"} <= ratios.keys() and min(ratios.values()) > 0:
            axis.plot(ratios["activation"], ratios["gradient"], "o", color=GROUPS[group], markersize=4)
            place = ratios["activation"], ratios["gradient"]
            if any(not 1 / NEAR <= ratio <= NEAR for ratio in place):
                axis.annotate(name, place, xytext=(3, 2), textcoords="offset points", fontsize=6)
    axis.axvline(1, color="0.8", linewidth=1, zorder=0)
    axis.axhline(1, color="0.8", linewidth=1, zorder=0)
    axis.set(xscale="log", yscale="log", xlabel="R of activations", ylabel="R of gradients")
    axis.set_title("times as far apart as seeds", fontsize=10)
    for group, colour in GROUPS.items():
        axis.plot([], [], "o", color=colour, markersize=4, label=group)
    axis.legend(frameon=False, fontsize=7)
