"""The study of early tails and token efficiency as tables, a figure, JSON and a report."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes

from benchmarks.compact_json import write_compact
from benchmarks.findings.tables import show_and_write

NAMES = {"early loss": "early loss", "log batch size": "log batch size", "loss curve": "L(t) = a t^-b + c"}


def write_report(
    rope: Sequence[Any],
    by_recipe: dict[str, Sequence[Any]],
    found: dict[str, Any],
    told: Any,
    environment: dict[str, Any],
    folder: Path,
) -> None:
    """Print the tables; write ``efficiency.json``, ``efficiency.png`` and ``efficiency.md``.

    Args:
        rope: Runs of the first recipe, as observed.
        by_recipe: Those of the recipes held out.
        found: What the study found.
        told: What ``backtest`` says of the first recipe's runs, or None.
        environment: Machine and versions.
        folder: Where to.
    """
    folder.mkdir(parents=True, exist_ok=True)
    runs = [
        {"name": run.setting.name, "tokens": run.tokens, "early": run.early}
        for run in (*rope, *(run for runs in by_recipe.values() for run in runs))
    ]
    write_compact(folder / "efficiency.json", {"environment": environment, "runs": runs} | found)
    draw(rope, found, folder / "efficiency.png")
    sections: list[Any] = [(f"Early tail and token efficiency, {environment['date']}", verdict(found))]
    for point, relations in found["points"].items():
        mean = found["mean"][point]
        title = (
            f"At {point:,} tokens, {relations[0]['num_runs']} runs of rope; without a predictor "
            f"{mean['alone']:.0%}, {mean['setting']:.0%}"
        )
        sections.append((title, [_line(one) for one in relations]))
    for point, relations in found["middle"].items():
        sizes = f"Batch sizes 16 and 32 alone, at {point:,} tokens, {relations[0]['num_runs']} runs"
        sections.append((sizes, [_line(one) for one in relations]))
    if told is not None:
        sections.append((f"What `backtest` says of the {len(told.runs)} runs of rope", _told(told)))
    sections.append(("Recipes held out, forecast from rope's line", _held_out(found)))
    sections.append(("Tokens to the target", [_tokens(run) for run in runs]))
    legend = (
        "Correlations with tokens to the target, permutation p in brackets; of settings: of their means over seeds. "
        "Errors are medians of |forecast / truth - 1|, each run forecast from all others, or from runs of other "
        "settings only."
    )
    sections.insert(1, ("How to read the tables", legend))
    picture = (
        "![Early exponents against tokens to the target; partial correlations; errors of forecasts](efficiency.png)"
    )
    show_and_write(sections, picture, folder / "efficiency.md")


def verdict(found: dict[str, Any]) -> str:
    """What the primary test and the rule for the band come to."""
    primary = found["primary"]
    rho, p_value = primary["of_settings"]
    bands = " and ".join(f"{low:g}-{high:g}" for low, high in found["band"])
    never = ", ".join(found["never"])
    return (
        f"Primary ({primary['predictor']} at {primary['tokens']:,} tokens, given log batch size and early loss): "
        f"partial Spearman {primary['rho']:+.2f}, permutation p = {primary['p_value']:.4f}: {primary['outcome']}. "
        f"Of the means of settings {rho:+.2f}, p = {p_value:.4f}. "
        f"Bands that forecast better than the default at every count and of every recipe: {bands or 'none'}. "
        f"Runs that never reached the target: {never or 'none'}."
    )


def _line(one: dict[str, Any]) -> dict[str, str]:
    low, high = one["interval"]
    return {
        "predictor": NAMES.get(one["predictor"], one["predictor"]),
        "Spearman": _signed(one["rho"]),
        "95% interval": f"{_signed(low)} .. {_signed(high)}",
        "given batch size": _with_p(one["given_batch_size"]),
        "given early loss": _with_p(one["given_early_loss"]),
        "given both": _with_p(one["given_both"]),
        "both, of settings": _with_p(one["of_settings"]),
        "error": _percent(one["errors"]["alone"]),
        "error, setting out": _percent(one["errors"]["setting"]),
    }


def _told(told: Any) -> list[dict[str, str]]:
    return [
        {
            "tokens": f"{point.tokens:,.0f}",
            "predictor": one.name,
            "Spearman": _signed(one.rho),
            "given batch size": _signed(one.partial_rho),
            "leave-one-out rank": _signed(one.skill),
            "median error": _percent(one.median_error),
        }
        for point in told.points
        for one in point.predictors
    ]


def _held_out(found: dict[str, Any]) -> list[dict[str, str]]:
    return [
        {
            "tokens": f"{point:,}",
            "recipe": recipe,
            "runs": str(one["num_runs"]),
            "predictor": NAMES.get(one["predictor"], one["predictor"]),
            "Spearman of forecast": _signed(one["rho"]),
            "median error": _percent(one["median_error"]),
            "median forecast / truth": "-" if np.isnan(one["median_ratio"]) else f"{one['median_ratio']:.2f}",
        }
        for point, recipes in found["held_out"].items()
        for recipe, predictors in recipes.items()
        for one in predictors
    ]


def _tokens(run: dict[str, Any]) -> dict[str, str]:
    return {"run": run["name"], "tokens": "never" if np.isinf(run["tokens"]) else f"{run['tokens']:,.0f}"}


def _signed(value: float) -> str:
    return "-" if np.isnan(value) else f"{value:+.2f}"


def _with_p(pair: tuple[float, float]) -> str:
    rho, p_value = pair
    return "-" if np.isnan(rho) else f"{rho:+.2f} ({p_value:.4f})"


def _percent(value: float) -> str:
    return "-" if np.isnan(value) else "never" if np.isinf(value) else f"{value:.0%}"


def draw(rope: Sequence[Any], found: dict[str, Any], path: Path) -> None:
    """Exponents of the last layer against tokens by band and count, partial correlations, and errors of forecasts."""
    points = list(found["points"])
    layer = found["primary"]["predictor"].split()[-1]
    last = [name for name in rope[0].early[points[0]] if name.startswith("alpha") and name.endswith(layer)]
    figure, axes = plt.subplots(2, 3, figsize=(14, 8), layout="constrained")
    for axis, name in zip(axes[0], last, strict=True):
        _draw_runs(axis, rope, points[1], name)
    _draw_partial(axes[1, 0], found, last)
    _draw_errors(axes[1, 1], found, last)
    _draw_held_out(axes[1, 2], found, points[1], found["primary"]["predictor"])
    for axis in axes.flat:
        axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _draw_runs(axis: Axes, rope: Sequence[Any], point: int, name: str) -> None:
    sizes = sorted({run.setting.batch_size for run in rope})
    colors = plt.get_cmap("plasma")(np.linspace(0, 0.9, len(sizes)))
    for size, color in zip(sizes, colors, strict=True):
        runs = [run for run in rope if run.setting.batch_size == size]
        root = np.sqrt(size / 16)
        for low, high, marker in ((0, 0.9, "v"), (0.9, 1.1, "o"), (1.1, 99, "^")):
            chosen = [run for run in runs if low <= run.setting.multiplier / root < high]
            axis.plot(
                [run.early[point][name] for run in chosen],
                [run.tokens for run in chosen],
                marker,
                color=color,
                label=f"B = {size}" if marker == "o" else None,
            )
    axis.set(yscale="log", xlabel=f"{name} at {point:,} tokens", ylabel="tokens to the target")
    axis.set_title("one point a run; triangles: other learning rates", fontsize=10)
    axis.legend(frameon=False, fontsize=8)


def _draw_partial(axis: Axes, found: dict[str, Any], last: Sequence[str]) -> None:
    for color, name in zip(("tab:green", "tab:blue", "tab:red"), last, strict=True):
        for given, style in (("given_batch_size", "--"), ("given_both", "-")):
            values = [
                next(one[given][0] for one in relations if one["predictor"] == name)
                for relations in found["points"].values()
            ]
            label = f"{name}, {given.replace('_', ' ')}"
            axis.plot(list(found["points"]), values, style, color=color, marker="o", label=label)
    axis.axhline(0, color="0.6", linewidth=1)
    axis.set(xscale="log", ylim=(-1, 1), xlabel="tokens", title="partial Spearman with tokens to the target")
    axis.set_xticks(list(found["points"]), [f"{point:,}" for point in found["points"]])
    axis.minorticks_off()
    axis.legend(frameon=False, fontsize=7)


def _draw_errors(axis: Axes, found: dict[str, Any], last: Sequence[str]) -> None:
    predictors = [*last, *NAMES]
    width = 0.8 / len(found["points"])
    for number, (point, relations) in enumerate(found["points"].items()):
        by_name = {one["predictor"]: one["errors"]["setting"] for one in relations}
        values = [*(by_name[name] for name in predictors), found["mean"][point]["setting"]]
        heights = [min(value, 1.5) if np.isfinite(value) else 0.0 for value in values]
        axis.barh(np.arange(len(values)) + number * width, heights, width, label=f"{point:,} tokens")
    axis.set_yticks(np.arange(len(predictors) + 1) + width, [*predictors, "mean"], fontsize=8)
    axis.invert_yaxis()
    axis.set(title="median relative error, setting left out", xlabel="|forecast / truth - 1|")
    axis.legend(frameon=False, fontsize=8)


def _draw_held_out(axis: Axes, found: dict[str, Any], point: int, name: str) -> None:
    for recipe, marker in zip(found["held_out"][point], "os", strict=False):
        for predictor, color in ((name, "tab:blue"), ("early loss", "tab:gray")):
            one = next(one for one in found["held_out"][point][recipe] if one["predictor"] == predictor)
            axis.plot(one["truth"], one["forecasts"], marker, color=color, label=f"{recipe} by {predictor}")
    low, high = axis.get_xlim()
    axis.plot([low, high], [low, high], color="0.6", linewidth=1)
    axis.set(xscale="log", yscale="log", xlabel="tokens needed", ylabel="forecast from rope's line")
    axis.set_title(f"recipes held out, at {point:,} tokens", fontsize=10)
    axis.legend(frameon=False, fontsize=7)
