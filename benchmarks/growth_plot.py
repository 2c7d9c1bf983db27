"""The fits of :mod:`benchmarks.growth` as small multiples, a plot per part and size."""

from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter, NullLocator

COLUMNS = 7


def draw(sweeps: list[dict[str, Any]], path: Path) -> None:
    """Draw all sweeps on logarithmic axes.

    Args:
        sweeps: What was found.
        path: Where to write; the name's ending is the format.
    """
    num_rows = -(-len(sweeps) // COLUMNS)
    figure = Figure(figsize=(2.7 * COLUMNS, 2.5 * num_rows + 0.5), layout="constrained")
    axes = figure.subplots(num_rows, COLUMNS, squeeze=False)
    for each, axis in zip(sweeps, axes.flat, strict=False):
        _draw(each, axis)
    for axis in axes.flat[len(sweeps) :]:
        axis.set_visible(False)
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=len(handles), frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


def _draw(sweep: dict[str, Any], axis: Axes) -> None:
    numbers, found = np.asarray(sweep["numbers"], float), np.asarray(sweep["found"])
    # The line of least squares goes through the mean of the logarithms; so does the theory's, to show the angle alone.
    centre, height = np.exp(np.log(numbers).mean()), np.exp(np.log(found).mean())
    axis.plot(numbers, found, "o", color="C0", label="measured")
    axis.plot(numbers, height * (numbers / centre) ** sweep["exponent"], "-", color="C0", label="fit")
    axis.plot(numbers, height * (numbers / centre) ** sweep["theory"], "--", color="C1", label="slope of the theory")
    if sweep["bare"]:
        axis.plot(numbers, sweep["bare"], "x", color="0.5", label="bare kernel")
    axis.set(xscale="log", yscale="log")
    axis.set_title(f"{sweep['part']}\n{sweep['exponent']:.2f}, theory {sweep['theory']:.2f}", fontsize=9)
    axis.set_xlabel(sweep["size"], fontsize=9)
    axis.set_ylabel("bytes" if "bytes" in sweep["part"] else "CPU s per rank" if sweep["wall_seconds"] else "CPU s")
    axis.set_xticks(numbers, [f"{number:g}" if number < 1e4 else f"{number / 1024:g}k" for number in numbers])
    axis.xaxis.set_minor_locator(NullLocator())
    axis.yaxis.set_minor_formatter(NullFormatter())
    axis.tick_params(labelsize=8)
    low, high = axis.get_ylim()
    if high / low < 10:  # a flat cost must look flat, and have a labelled tick
        axis.set_ylim(low / 4, high * 4)
