"""The study of the mechanism as tables, a figure, JSON and a report."""

import math
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes

from benchmarks.compact_json import write_compact
from benchmarks.findings.mechanism_linear import ALPHAS, LEVELS
from benchmarks.findings.tables import show_and_write

COLORS = {32: "tab:blue", 128: "tab:orange", 512: "tab:green"}
SHOWN = (0.8, 0.4, 0.2, 0.05)
NAMES = {
    "alpha_head": "alpha of ranks 1-10",
    "alpha_tail": "alpha of an eighth to a half",
    "rankme": "RankMe",
    "head_share": "share of variance in ranks 1-10",
    "task_head_share": "share of task power in ranks 1-10",
}

Found = dict[str, Any]


def write_report(found: Found, environment: dict[str, Any], folder: Path) -> None:
    """Print the tables; write ``mechanism.json``, ``mechanism.png`` and ``mechanism.md``.

    Args:
        found: The ``linear`` model by setting, ``runs`` and ``tests`` by set, and what is shown beside.
        environment: Machine and versions.
        folder: Where to.
    """
    folder.mkdir(parents=True, exist_ok=True)
    write_compact(folder / "mechanism.json", {"environment": environment} | found)
    draw(found, folder / "mechanism.png")
    sections: list[tuple[str, str | list[dict[str, str]]]] = [
        (f"The mechanistic model, {environment['date']}", verdict(found)),
        ("The linear model: steps to what is left of the risk, at alpha = .8 and 2", _linear(found["linear"])),
    ]
    for task, runs in found["runs"].items():
        if not runs:
            continue
        if found["tests"][task] is not None:
            sections.append(
                (
                    f"What goes with what within runs, {task} set: partial Spearman given log steps",
                    _with(found["tests"][task]),
                )
            )
            sections.append(
                (f"Explored after the {task} set was seen, no test", _explored(found["explored"][task], runs))
            )
        sections.append((f"Runs of the {task} set", _runs(runs)))
    picture = "![Steps of the linear model by exponent; loss, harmonics, spectra and task power over training]"
    show_and_write(sections, f"{picture}(mechanism.png)", folder / "mechanism.md")


def verdict(found: Found) -> str:
    """What the tests of the plan come to."""
    lines = [_verdict_of_linear(found["linear"])]
    for task, tests in found["tests"].items():
        num = len(found["runs"][task])
        if tests is None:
            lines.append(f"{task.capitalize()} set: {num} of 12 runs were made, so that nothing is tested.")
            continue
        when, head = tests["when"], tests["head_share"]
        lines.append(
            f"{task.capitalize()} set, test 1: H_S moves in {when['moves']} of {num} runs (rises in {when['rises']}, "
            f"falls in {when['falls']}), is ahead of the loss in {when['before']} and behind it in {when['after']}, "
            f"median lead {when['median_lead']:+.2f} octaves of steps: {_outcome(when['outcome'])}. "
            f"Test 2: with H_S goes {_held(tests['with_h_s'])}; with the loss, {_held(tests['with_loss'])}. "
            f"Test 3: the head's share of task power falls in {head['falls']} of {num} runs "
            f"(median {head['median_begun']:.2f}, change {head['median_change']:+.2f}): "
            f"{'as the theory says' if head['holds'] else 'not as the theory says'}."
        )
    return " ".join(lines)


def _outcome(outcome: str) -> str:
    return "not shown" if outcome == "not shown" else f"{outcome} the loss"


def _held(agreements: dict[str, dict[str, Any]]) -> str:
    held = [
        f"{NAMES[name]} ({one['median']:+.2f}, sign in {max(one['positive'], one['negative'])})"
        for name, one in agreements.items()
        if one["holds"]
    ]
    return ", ".join(held) or "none of the five numbers"


def _verdict_of_linear(linear: list[Found]) -> str:
    signs = sum(
        one["steps"][0][-1] < one["steps"][0][0] and one["steps"][-1][-1] > one["steps"][-1][0] for one in linear
    )
    held = [one for one in linear if one["holds"]]
    betas = sorted({one["beta"] for one in held})
    ranges = "; ".join(
        f"beta {beta:g}: {min(one['crossing'] for one in linear if one['beta'] == beta):.0%} to "
        f"{max(one['crossing'] for one in linear if one['beta'] == beta):.0%}"
        for beta in sorted({one["beta"] for one in linear})
    )
    return (
        f"Linear model: a steeper spectrum reaches 80% of the risk sooner and 5% later in {signs} of {len(linear)} "
        f"settings. Where the two cross depends on where the task's power lies ({ranges}): between 20% and 40% in "
        f"{len(held)} settings, all of beta {', '.join(f'{beta:g}' for beta in betas) or 'none'}."
    )


def _linear(linear: list[Found]) -> list[dict[str, str]]:
    rows = []
    for one in linear:
        row = {
            "d": str(one["width"]),
            "beta": f"{one['beta']:g}",
            "B": "all" if math.isinf(one["batch_size"]) else f"{one['batch_size']:g}",
        }
        for level in SHOWN:
            steps = one["steps"][LEVELS.index(level)]
            row[f"to {level:.0%}"] = f"{steps[0]:.3g}, {steps[-1]:.3g} (x {steps[-1] / steps[0]:.2g})"
        rows.append(row | {"cross at": f"{one['crossing']:.0%}", "20-40%": "yes" if one["holds"] else "no"})
    return rows


def _explored(explored: Found, runs: list[Found]) -> str:
    later, num = explored["later"], len(runs)
    told = "; ".join(
        f"{label} {later[name]['median']:+.2f}, negative in {later[name]['negative']}"
        for name, label in {"h_s": "H_S", **NAMES}.items()
        if name in later
    )
    return (
        "Undefined above is what goes one way at every look, as log steps do: nothing is left to correlate. "
        f"H_S is half way before the loss in {explored['leads_before']} of {num} runs, moved or not (median "
        f"{explored['median_lead']:+.2f} octaves). RankMe is least, {explored['least_rankme']:.1f}, at a loss of "
        f"{explored['loss_there']:.2f}, medians; from there on rank correlations with the loss, median: {told}. The "
        f"head's share of task power falls from the second step to the last look in {explored['head_share_falls']} of "
        f"{num} runs (medians {explored['head_share_second']:.2f}, {explored['head_share_begun']:.2f} with a tenth of "
        f"the loss's way gone, {explored['head_share_last']:.2f} at last). All task power, of which the readout alone "
        f"could take away half or more, is at most {explored['most_of_loss']:.0%} of the loss that is still to be "
        "lost, the last three looks aside."
    )


def _with(tests: Found) -> list[dict[str, str]]:
    rows = []
    for name, label in NAMES.items():
        row = {"number": label}
        for what, key in (("H_S", "with_h_s"), ("loss", "with_loss")):
            one = tests[key][name]
            row[f"median with {what}"] = f"{one['median']:+.2f}" if one["known"] else "undefined"
            row[f"signs +, - ({what})"] = f"{one['positive']}, {one['negative']}"
            row[f"goes with {what}"] = "yes" if one["holds"] else "no"
        rows.append(row)
    return rows


def _runs(runs: list[Found]) -> list[dict[str, str]]:
    return [
        {
            "run": run["name"],
            "loss": f"{run['loss'][0]:.2f} to {run['loss'][-1]:.2f}",
            "accuracy": f"{run['accuracy'][-1]:.0%}",
            "H_S": f"{run['h_s'][0]:.3f} to {run['h_s'][-1]:.3f}",
            "moves": "yes" if run["h_s_moves"] else "no",
            "half of loss, of H_S": f"{run['half_loss']:.1f}, {run['half_h_s']:.1f} steps",
            "lead": f"{run['lead']:+.2f}",
            "strongest three": f"{run['strongest'][-1]:.2f} (shuffled {run['strongest_shuffled'][-1]:.2f})",
            "task power": f"{run['task_power'][0]:.2f} to {run['task_power'][-1]:.2f}",
            "of it in ranks 1-10": f"{run['head_share_begun']:.2f} to {run['task_head_share'][-1]:.2f}",
        }
        for run in runs
    ]


def draw(found: Found, path: Path) -> None:
    """Steps of the linear model by exponent; beside and below, for the longest whole set of runs, courses by steps."""
    task = next((task for task in reversed(list(found["runs"])) if found["tests"][task] is not None), None)
    figure, axes = plt.subplots(2, 4, figsize=(17, 7.6), layout="constrained")
    for axis, beta in zip(axes[0, :2], (1.5, 1.1), strict=True):
        _draw_linear(axis, found["linear"], beta)
    if task is not None:
        runs = found["runs"][task]
        _draw_course(axes[0, 2], runs, "loss", "held-out loss, nats")
        _draw_course(axes[0, 3], runs, "h_s", "H_S, share of energy in the task's harmonics", found["chance"])
        for axis, name in zip(axes[1], ("alpha_tail", "alpha_head", "rankme", "task_head_share"), strict=True):
            _draw_course(axis, runs, name, NAMES[name])
        axes[0, 2].legend(frameon=False, title=f"batch size, {task} set")
    for axis in axes.flat:
        axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _draw_linear(axis: Axes, linear: list[Found], beta: float) -> None:
    one = next(one for one in linear if (one["width"], one["beta"], one["batch_size"]) == (512, beta, math.inf))
    colors = plt.get_cmap("viridis")(np.linspace(0, 0.9, len(LEVELS)))
    for color, level, steps in zip(colors, LEVELS, one["steps"], strict=True):
        axis.plot(ALPHAS, steps, marker=".", color=color)
        axis.annotate(f"{level:.0%}", (ALPHAS[-1], steps[-1]), (4, -3), textcoords="offset points", fontsize=8)
    axis.set(yscale="log", xlabel="alpha of the spectrum, trace held", ylabel="steps until so much risk is left")
    axis.set_title(f"linear model, task power ~ j^-{beta:g}")


def _draw_course(axis: Axes, runs: list[Found], quantity: str, title: str, level: float | None = None) -> None:
    if level is not None:
        axis.axhline(level, color="0.6", lw=1, ls="--")
    for number, run in enumerate(runs):
        is_first = run["batch_size"] not in [other["batch_size"] for other in runs[:number]]
        label = f"{run['batch_size']}" if is_first else None
        axis.plot(
            [step + 1 for step in run["steps"]],
            [math.nan if value is None else value for value in run[quantity]],
            color=COLORS.get(run["batch_size"], "0.4"),
            lw=1.1,
            label=label,
        )
    axis.set(xscale="log", xlabel="1 + steps", title=title)
