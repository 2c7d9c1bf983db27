"""The report and the figure of study 4."""

from collections import Counter
from collections.abc import Sequence
from math import isfinite, isnan
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.findings.tables import show_and_write

Found = dict[str, Any]


def write_report(results: Found, folder: Path) -> None:
    """To the terminal, and ``early_tail.md`` and ``.png`` into a folder."""
    figure(results).savefig(folder / "early_tail.png", dpi=110)
    families, outcomes = results["families"], results["outcomes"]
    sections: list[tuple[str, Any]] = [
        ("Does the early tail forecast tokens, past the transient?", _first(families, outcomes[-1]))
    ]
    for number, family in enumerate(families):
        for told, outcome in zip(family["at"], outcomes, strict=True):
            title = f"{family['recipe']}, at {told['tokens']:,.0f} tokens"
            rows = told["claims"]
            if number == 0:
                sections.append((f"{title}: three tests", [_row(row) for row in rows]))
            else:
                sections.append((f"{title}: the sign", [_first_claim(row) for row in rows if "tiers" in row]))
            words = [_gate(told["late"])]
            if number == 0:
                stack = told["stack"]
                words += [
                    f"The stack of loss and batch, without spectra, errs by {stack['median_error']:.1%} (median), mean "
                    f"|ln| {stack['mean_log_error']:.3f}; the tokens themselves scatter by "
                    f"{stack['spread_of_log_tokens']:.3f}.",
                    f"P1 {outcome['P1']}, P2 {outcome['P2']}, P3 {outcome['P3']}: {outcome['in words']}.",
                ]
            sections.append((f"{title}: gate{' and outcome' if number == 0 else ''}", " ".join(words)))
    for family in families:
        sections.append((f"All runs of {family['recipe']}", [_run(run, family["counts"]) for run in family["runs"]]))
        if family["left_out"]:
            rows = [{"run": name, "had come to": f"{tokens:,.0f}"} for name, tokens in family["left_out"].items()]
            sections.append((f"Runs of {family['recipe']} that are missing, or were cut off too early", rows))
    picture = (
        "![By family, tail exponent, head exponent and RankMe of the last layer against tokens to the target: the "
        "tuned tiers, and the settings at a batch of four](early_tail.png)"
    )
    show_and_write(sections, picture, folder / "early_tail.md")


def _first(families: Sequence[Found], outcome: Found) -> str:
    words = [
        "12 layers of width 192, byte-pair tokens. Of the tail of the last layer, at half of what each family's "
        f"fastest run took: **{outcome['in words']}**."
    ]
    for family in families:
        runs = family["runs"]
        reached = [run["tokens"] for run in runs if isfinite(run["tokens"])]
        seeds = Counter(run["tier"] for run in runs if run["is_tuned"])
        tail = family["at"][-1]["claims"][0]["tiers"]
        words.append(
            f"{family['recipe']}: {len(runs)} runs of {len({run['tier'] for run in runs})} settings, "
            f"{_seeds(list(seeds.values()))} a batch size, {min(reached):,.0f} to {max(reached):,.0f} tokens to "
            f"{family['target']} nats; Spearman of tail and tokens over {len(seeds)} batch sizes {tail:+.2f}."
        )
        words += [
            f"{run['name']} was cut off at {run['cut_off']:,.0f} tokens, short of the target but past what all others "
            "took: it ranks last."
            for run in runs
            if not isnan(run["cut_off"])
        ]
    words += [
        f"The runs of {family['recipe']} are gone: they stand as found on {family['kept']}{_added(family)}."
        for family in families
        if "kept" in family
    ]
    if len(families) == 1:
        words.append(f"One family, {families[0]['recipe']}: the sign in a second was not asked.")
    return " ".join(words)


def _added(family: Found) -> str:
    names = family["added"]
    return f", but for {len(names)} that were made later and looked at after as many tokens" if names else ""


def _seeds(counts: Sequence[int]) -> str:
    low, high = min(counts), max(counts)
    return f"{low} seed{'' if high == 1 else 's'}" if low == high else f"{low} to {high} seeds"


def _gate(late: Sequence[str]) -> str:
    steps = [entry for entry in late if entry.endswith("steps")]
    if not late:
        return "The stage gate is met."
    return (
        f"The stage gate is not met: {len(steps)} runs have had too few steps, {len(late) - len(steps)} are not past "
        f"their tail's maximum ({'; '.join(late)})."
    )


def _first_claim(row: dict[str, Any]) -> dict[str, str]:
    return {"number": row["number"], "P1: Spearman over the tiers": f"{row['tiers']:+.2f}"}


def _row(row: dict[str, Any]) -> dict[str, str]:
    def pair(values: Sequence[float] | None) -> str:
        return "-" if values is None or isnan(values[0]) else f"{values[0]:+.2f} (p {values[1]:.2g})"

    gain = "-"
    if "gain" in row and not isnan(row["gain"]):
        gain = f"{row['gain']:+.0%} ({row['gain_low']:+.0%} .. {row['gain_high']:+.0%})"
    return {
        "number": row["number"],
        "P1: Spearman over the tiers": f"{row['tiers']:+.2f}" if "tiers" in row else "-",
        "within B = 4": pair(row.get("varied")),
        "P2: ... given the loss": pair(row.get("varied_given_loss")),
        "P3: takes off the error (80%)": gain,
    }


def _run(run: dict[str, Any], counts: Sequence[float]) -> dict[str, str]:
    early = run["early"]
    tails = [f"{one['alpha_tail']:.3f}" for one in early]
    columns = {
        "run": run["name"],
        "tokens to the target": f"{run['tokens']:,.0f}" if isnan(run["cut_off"]) else f"over {run['cut_off']:,.0f}",
        "tail's maximum": f"{run['peak']:,.0f}",
    }
    columns |= {f"tail at {count:,.0f}": tail for count, tail in zip(counts, tails, strict=True)}
    last = early[-1]
    return columns | {
        "head": f"{last['alpha_head']:.3f}",
        "RankMe": f"{last['RankMe']:.1f}",
        "loss": f"{last['early loss']:.3f}",
    }


def figure(results: Found) -> Figure:
    """Of each family tail, head and RankMe at the primary count against tokens to the target."""
    families = results["families"]
    drawn = Figure(figsize=(11, 3.7 * len(families)), layout="constrained")
    sizes = sorted({run["batch_size"] for family in families for run in family["runs"]})
    colours = dict(zip(sizes, ["#3b0f70", "#8c2981", "#de4968", "#fe9f6d", "#e8c547"], strict=False))
    for axes, family in zip(drawn.subplots(len(families), 3, squeeze=False), families, strict=True):
        for axis, name in zip(axes, ("alpha_tail", "alpha_head", "RankMe"), strict=True):
            for size in sizes:
                for is_tuned, marker in ((True, "o"), (False, "x")):
                    runs = [r for r in family["runs"] if r["batch_size"] == size and r["is_tuned"] == is_tuned]
                    if runs:
                        label = f"B = {size}" + ("" if is_tuned else ", varied")
                        ends = [r["tokens"] if isnan(r["cut_off"]) else r["cut_off"] for r in runs]
                        values = np.array([run["early"][-1][name] for run in runs])
                        axis.scatter(
                            values, np.array(ends) / 1e3, marker=marker, color=colours[size], label=label, s=28
                        )
            _mark_cut_off(axis, family, name)
            axis.set_xlabel(f"{name} of the last layer")
            axis.set_yscale("log")
            axis.set_yticks([500, 600, 800, 1000, 1400], ["500", "600", "800", "1,000", "1,400"])
            axis.minorticks_off()
        axes[0].set_ylabel("tokens to the target, thousands")
        axes[0].legend(fontsize=7)
        title = f"{family['recipe']}, at {family['counts'][-1]:,.0f} tokens, half of what the fastest run took"
        axes[1].set_title(title, fontsize=10)
    return drawn


def _mark_cut_off(axis: Axes, family: Found, name: str) -> None:
    for run in family["runs"]:
        if not isnan(run["cut_off"]):
            at = (run["early"][-1][name], run["cut_off"] / 1e3)
            axis.annotate("cut off", at, xytext=(0, -12), textcoords="offset points", ha="center", fontsize=7)
            axis.annotate("", at, xytext=(0, 16), textcoords="offset points", arrowprops={"arrowstyle": "<-"})
