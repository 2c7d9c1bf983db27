"""The report and the figure of study 4."""

from collections.abc import Sequence
from math import isnan
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from benchmarks.findings.tables import show_and_write


def write_report(results: dict[str, Any], folder: Path) -> None:
    """To the terminal, and ``early_tail.md`` and ``.png`` into a folder."""
    figure(results).savefig(folder / "early_tail.png", dpi=110)
    primary = results["at"][-1]
    tokens = [run["tokens"] for run in results["runs"]]
    what = (
        f"{len(tokens)} runs of {len({run['tier'] for run in results['runs']})} settings, 12 layers of width 192, "
        f"byte-pair tokens, recipe rope; {min(tokens):,.0f} to {max(tokens):,.0f} tokens to {results['target']} nats. "
        f"Of the tail of the last layer at {primary['tokens']:,.0f} tokens, half of what the fastest run took: "
        f"**{primary['outcome']['in words']}**. The second family, untied, was not trained."
    )
    sections: list[tuple[str, Any]] = [("Does the early tail forecast tokens, past the transient?", what)]
    for told in results["at"]:
        title = f"At {told['tokens']:,.0f} tokens"
        late = told["late"]
        steps = [entry for entry in late if entry.endswith("steps")]
        sections.append((f"{title}: three tests", [_row(row) for row in told["claims"]]))
        stack = told["stack"]
        words = [
            "The stage gate is met."
            if not late
            else f"The stage gate is not met: {len(steps)} runs have had too few steps, {len(late) - len(steps)} are "
            f"not past their tail's maximum ({'; '.join(late)}).",
            f"The stack of loss and batch, without spectra, errs by {stack['median_error']:.1%} (median), mean |ln| "
            f"{stack['mean_log_error']:.3f}; the tokens themselves scatter by {stack['spread_of_log_tokens']:.3f}.",
            f"P1 {told['outcome']['P1']}, P2 {told['outcome']['P2']}, P3 {told['outcome']['P3']}: "
            f"{told['outcome']['in words']}.",
        ]
        sections.append((f"{title}: gate and outcome", " ".join(words)))
    sections.append(("All runs", [_run(run, results["counts"]) for run in results["runs"]]))
    picture = (
        "![Tail exponent of the last layer against tokens to the target: the tuned tiers, and the settings at a batch "
        "of four; RankMe likewise](early_tail.png)"
    )
    show_and_write(sections, picture, folder / "early_tail.md")


def _row(row: dict[str, Any]) -> dict[str, str]:
    def pair(values: Sequence[float] | None) -> str:
        return "-" if values is None or isnan(values[0]) else f"{values[0]:+.2f} (p {values[1]:.2g})"

    gain = "-"
    if "gain" in row and not isnan(row["gain"]):
        gain = f"{row['gain']:+.0%} ({row['gain_low']:+.0%} .. {row['gain_high']:+.0%})"
    return {
        "number": row["number"],
        "P1: Spearman over five tiers": f"{row['tiers']:+.2f}" if "tiers" in row else "-",
        "within B = 4": pair(row.get("varied")),
        "P2: ... given the loss": pair(row.get("varied_given_loss")),
        "P3: takes off the error (80%)": gain,
    }


def _run(run: dict[str, Any], counts: Sequence[float]) -> dict[str, str]:
    early = run["early"]
    tails = [f"{one['alpha_tail']:.3f}" for one in early]
    columns = {
        "run": run["name"],
        "tokens to the target": f"{run['tokens']:,.0f}",
        "tail's maximum": f"{run['peak']:,.0f}",
    }
    columns |= {f"tail at {count:,.0f}": tail for count, tail in zip(counts, tails, strict=True)}
    last = early[-1]
    return columns | {
        "head": f"{last['alpha_head']:.3f}",
        "RankMe": f"{last['RankMe']:.1f}",
        "loss": f"{last['early loss']:.3f}",
    }


def figure(results: dict[str, Any]) -> Figure:
    """Tail, head and RankMe at the primary count against tokens to the target."""
    drawn = Figure(figsize=(11, 3.8), layout="constrained")
    axes = drawn.subplots(1, 3)
    sizes = sorted({run["batch_size"] for run in results["runs"]})
    colours = dict(zip(sizes, ["#3b0f70", "#8c2981", "#de4968", "#fe9f6d", "#e8c547"], strict=False))
    for axis, name in zip(axes, ("alpha_tail", "alpha_head", "RankMe"), strict=True):
        for size in sizes:
            for is_tuned, marker in ((True, "o"), (False, "x")):
                runs = [r for r in results["runs"] if r["batch_size"] == size and r["is_tuned"] == is_tuned]
                if runs:
                    label = f"B = {size}" + ("" if is_tuned else ", varied")
                    values = np.array([run["early"][-1][name] for run in runs])
                    tokens = np.array([run["tokens"] for run in runs]) / 1e3
                    axis.scatter(values, tokens, marker=marker, color=colours[size], label=label, s=28)
        axis.set_xlabel(f"{name} of the last layer")
        axis.set_yscale("log")
        axis.set_yticks([500, 600, 800, 1000, 1400], ["500", "600", "800", "1,000", "1,400"])
        axis.minorticks_off()
    axes[0].set_ylabel("tokens to the target, thousands")
    axes[0].legend(fontsize=7)
    drawn.suptitle(f"At {results['counts'][-1]:,.0f} tokens, half of what the fastest run took", fontsize=10)
    return drawn
