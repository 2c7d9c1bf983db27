"""Whether the mechanistic model says something of real training: a linear model, and modular arithmetic.

    python -m benchmarks.findings.mechanism

As planned in ``mechanism_plan.md``. Runs that are done are kept in the work folder, so that the study can be
interrupted; figure, JSON and report go to ``benchmarks/results/findings``. The runs take about 25 minutes of one core.
"""

import argparse
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.findings.mechanism_linear import BATCHES, BETAS, WIDTHS, linear
from benchmarks.findings.mechanism_report import write_report
from benchmarks.findings.mechanism_runs import CYCLES, HEAD, TASKS, Setting, done, settings, task_harmonics, train_all
from benchmarks.findings.permutation import rank_correlation
from benchmarks.findings.runs import RESULTS
from benchmarks.harness import console, environment

SPECTRAL = ("alpha_head", "alpha_tail", "rankme", "head_share", "task_head_share")
MOVED, NOISES, LAST = 0.02, 3.0, 3
LEAD = 0.25
MOST_AGREE, AGREE = 10, 11
"""Of twelve runs: two-sided chances of a fair coin .039 and .006."""
STRONG = 0.5


def half_way(steps: Sequence[float], values: Sequence[float], last: int = 1) -> float:
    """Steps at which a number has first gone half of its way, linear in log2(1 + steps); NaN where it never has."""
    logs, way = np.log2(1 + np.asarray(steps, float)), np.asarray(values, float)
    share = (way - way[0]) / (way[-last:].mean() - way[0])
    beyond = np.flatnonzero(share >= 0.5)
    if not len(beyond):
        return math.nan
    index = int(beyond[0])
    weight = (0.5 - share[index - 1]) / (share[index] - share[index - 1])
    return float(2 ** (logs[index - 1] + weight * (logs[index] - logs[index - 1])) - 1)


def moves(steps: Sequence[float], values: Sequence[float]) -> bool:
    """Whether a number goes by more than the plan's threshold, and more than its last five looks scatter."""
    logs, way = np.log2(1 + np.asarray(steps, float)), np.asarray(values, float)
    x, y = logs[-5:], way[-5:]
    residual = y - np.polyval(np.polyfit(x, y, 1), x)
    spread = math.sqrt(float((residual**2).sum()) / (len(x) - 2))
    gone = abs(way[-LAST:].mean() - way[0])
    return bool(gone > MOVED and gone > NOISES * spread)


def concentration(look: dict[str, Any], which: str = "task") -> float:
    """Mean over the cycles."""
    return float(np.mean([look["harmonics"][str(cycle)][which] for cycle in CYCLES]))


def measured(setting: Setting, looks: list[dict[str, Any]]) -> dict[str, Any]:
    """What a run comes to: its course, when loss and H_S have gone half of their way, and what goes with what."""
    steps = [look["step"] for look in looks]
    last = list(looks[0]["layers"])[-1]
    course = {
        "loss": [look["loss"] for look in looks],
        "accuracy": [look["accuracy"] for look in looks],
        "h_s": [concentration(look) for look in looks],
        "strongest": [concentration(look, "strongest") for look in looks],
        "strongest_shuffled": [concentration(look, "strongest_shuffled") for look in looks],
        "task_power": [look["task_power"] for look in looks],
        "task_head_share": [look["task_head_share"] for look in looks],
        **{name: [look["layers"][last][name] for look in looks] for name in SPECTRAL[:-1]},
    }
    of_loss, of_h = half_way(steps, course["loss"]), half_way(steps, course["h_s"], LAST)
    after = slice(next(index for index, step in enumerate(steps) if step > 1), None)
    logs = np.log(np.asarray(steps[after], float))
    gone = (course["loss"][0] - np.asarray(course["loss"])) / (course["loss"][0] - course["loss"][-1])
    begun = int(np.flatnonzero(gone >= 0.1)[0])
    return {
        "name": setting.name,
        "batch_size": setting.batch_size,
        "seed": setting.seed,
        "steps": steps,
        **course,
        "half_loss": of_loss,
        "half_h_s": of_h,
        "lead": math.log2((1 + of_loss) / (1 + of_h)),
        "h_s_moves": moves(steps, course["h_s"]),
        "h_s_change": float(np.mean(course["h_s"][-LAST:]) - course["h_s"][0]),
        "with_h_s": {name: partial(course[name][after], course["h_s"][after], logs) for name in SPECTRAL},
        "with_loss": {name: partial(course[name][after], course["loss"][after], logs) for name in SPECTRAL},
        "head_share_begun": course["task_head_share"][begun],
        "head_share_change": course["task_head_share"][-1] - course["task_head_share"][begun],
    }


def partial(x: Sequence[float], y: Sequence[float], given: np.ndarray) -> float:
    """Spearman's correlation given a third."""
    return float(rank_correlation(np.asarray(x), np.asarray(y), [given])[0])


def judged(runs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The three tests of the plan, of one set of twelve runs."""
    leads = [run["lead"] for run in runs if run["h_s_moves"]]
    median = float(np.median(leads)) if leads else math.nan
    early, late = sum(lead > 0 for lead in leads), sum(lead < 0 for lead in leads)
    when = "not shown"
    if len(leads) >= MOST_AGREE:
        when = "with"
    if early >= MOST_AGREE and median > LEAD:
        when = "before"
    if late >= MOST_AGREE and median < -LEAD:
        when = "after"
    rises = sum(run["h_s_change"] > 0 for run in runs if run["h_s_moves"])
    falls = sum(run["head_share_change"] < 0 for run in runs)
    return {
        "when": {
            "moves": len(leads),
            "rises": rises,
            "falls": len(leads) - rises,
            "before": early,
            "after": late,
            "median_lead": median,
            "outcome": when,
        },
        "with_h_s": {name: agreement([run["with_h_s"][name] for run in runs]) for name in SPECTRAL},
        "with_loss": {name: agreement([run["with_loss"][name] for run in runs]) for name in SPECTRAL},
        "head_share": {
            "falls": falls,
            "median_begun": float(np.median([run["head_share_begun"] for run in runs])),
            "median_change": float(np.median([run["head_share_change"] for run in runs])),
            "holds": falls >= MOST_AGREE,
        },
    }


def explored(runs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """What was looked at after the tests were seen; no test of the plan's.

    Args:
        runs: Of :func:`measured`.

    Returns:
        Runs whose lead is positive, among all; median correlation with the loss, from RankMe's least look on, and in
        how many runs it is negative; runs in which the head's share of task power falls from the second step on; the
        largest part that task power ever was of the loss that was still to be lost, the last three looks aside.
    """
    later: dict[str, list[float]] = {}
    for run in runs:
        start = int(np.argmin(run["rankme"]))
        for name in ("h_s", "rankme", "alpha_head", "alpha_tail"):
            rho = rank_correlation(np.asarray(run[name][start:]), np.asarray(run["loss"][start:]))[0]
            later.setdefault(name, []).append(float(rho))
    second = [next(index for index, step in enumerate(run["steps"]) if step > 1) for run in runs]
    shares = [
        max(power / (loss - run["loss"][-1]) for power, loss in zip(run["task_power"][:-3], run["loss"], strict=False))
        for run in runs
    ]
    return {
        "leads_before": sum(run["lead"] > 0 for run in runs),
        "median_lead": float(np.median([run["lead"] for run in runs])),
        "later": {
            name: {"median": float(np.median(rhos)), "negative": sum(rho < 0 for rho in rhos)}
            for name, rhos in later.items()
        },
        "head_share_falls": sum(
            run["task_head_share"][-1] < run["task_head_share"][index] for run, index in zip(runs, second, strict=True)
        ),
        "head_share_second": float(
            np.median([run["task_head_share"][index] for run, index in zip(runs, second, strict=True)])
        ),
        "least_rankme": float(np.median([min(run["rankme"]) for run in runs])),
        "loss_there": float(np.median([run["loss"][int(np.argmin(run["rankme"]))] for run in runs])),
        "head_share_begun": float(np.median([run["head_share_begun"] for run in runs])),
        "head_share_last": float(np.median([run["task_head_share"][-1] for run in runs])),
        "most_of_loss": max(shares),
    }


def agreement(values: Sequence[float]) -> dict[str, Any]:
    """Whether correlations within runs agree in sign and are strong."""
    positive, negative = sum(value > 0 for value in values), sum(value < 0 for value in values)
    known = [value for value in values if not math.isnan(value)]
    median = float(np.median(known)) if known else math.nan
    holds = max(positive, negative) >= AGREE and abs(median) >= STRONG
    return {"positive": positive, "negative": negative, "median": median, "known": len(known), "holds": holds}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, default=Path("findings_runs/mechanism"), help="where runs are kept")
    parser.add_argument("--folder", type=Path, default=RESULTS, help="where results go")
    parser.add_argument("--no-training", action="store_true", help="show the runs that are there")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    found: dict[str, Any] = {
        "linear": [linear(width, beta, size) for size in BATCHES for beta in BETAS for width in WIDTHS],
        "harmonics": {str(cycle): task_harmonics(cycle) for cycle in CYCLES},
        "chance": float(np.mean([2 * len(task_harmonics(cycle)) / (cycle - 1) for cycle in CYCLES])),
        "head": HEAD[1],
        "runs": {},
        "tests": {},
        "explored": {},
    }
    for task in TASKS:
        if not arguments.no_training:
            train_all(settings(task), arguments.work, console.print)
        kept = {setting: done(setting, arguments.work) for setting in settings(task)}
        found["runs"][task] = [measured(setting, looks) for setting, looks in kept.items() if looks is not None]
        is_whole = all(looks is not None for looks in kept.values())
        found["tests"][task] = judged(found["runs"][task]) if is_whole else None
        found["explored"][task] = explored(found["runs"][task]) if is_whole else None
    write_report(found, environment(), arguments.folder)


if __name__ == "__main__":
    main()
