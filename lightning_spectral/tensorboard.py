"""What TensorBoard shows of a report: histograms on fixed edges, a log-log figure, a layout of scalar charts."""

import re
import weakref
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

if TYPE_CHECKING:  # matplotlib takes a while to import, and a run without figures never needs it
    from matplotlib.figure import Figure

BIN_WIDTH = 0.2


def _edges(lowest: float, highest: float) -> list[float]:
    return np.round(np.arange(lowest, highest + BIN_WIDTH / 2, BIN_WIDTH), 1).tolist()


EIGENVALUE_EDGES = _edges(-7.0, 4.0)
"""Bin edges of log10 histograms. Fixed, so that steps and runs compare bin by bin; the first bin takes all that lies
below, exact zeros included, and the last all above. Float32 products resolve 1e-7 beside an eigenvalue of 1, and the
eigenvalues of RMS-normalised rows sum to no more than the width. TensorBoard draws 30 bins over the range."""

SINGULAR_VALUE_EDGES = _edges(-6.0, 2.0)
"""The same for singular values of per-sample gradients, whose norms are about 1 in small models and 1e-3 in large ones.
The few hundred of one matrix span two or three decades."""

_layouts: "weakref.WeakKeyDictionary[Any, dict[str, dict[str, Any]]]" = weakref.WeakKeyDictionary()


def writers(loggers: Sequence[Any]) -> list[Any]:
    """The TensorBoard writers among a Trainer's loggers.

    Args:
        loggers: ``trainer.loggers``.

    Returns:
        Those experiments that can take histograms.
    """
    experiments = [getattr(logger, "experiment", None) for logger in loggers]
    return [experiment for experiment in experiments if hasattr(experiment, "add_histogram_raw")]


def add_log10_histogram(writer: Any, tag: str, values: Tensor, step: int, edges: Sequence[float]) -> None:
    """Write a spectrum's histogram of log10 values; the counts sum to the number of values.

    TensorBoard draws 30 linear bins, which would put all but a few raw eigenvalues into the first.

    Args:
        writer: A SummaryWriter.
        tag: The histogram's name.
        values: ``(n,)``, non-negative; nothing is written where one is not finite.
        step: The global step.
        edges: Equidistant bin edges; the first bin takes all that lies below, the last all above.
    """
    spectrum = values.numpy()
    if spectrum.size == 0 or not np.isfinite(spectrum).all():
        return
    lowest, highest = edges[0] - BIN_WIDTH, edges[-1]
    logs = np.log10(np.clip(spectrum, 10.0**lowest, 10.0**highest)).clip(lowest, highest)
    # Right edges, as many as counts: the first bin is everything up to the first edge.
    counts = np.bincount(np.searchsorted(edges, logs), minlength=len(edges))
    writer.add_histogram_raw(
        tag,
        # TensorBoard closes the outer bins with these: with those of the values the bins would overlap.
        min=float(lowest),
        max=float(highest),
        num=int(counts.sum()),
        sum=float(logs.sum()),
        sum_squares=float((logs**2).sum()),
        bucket_limits=list(edges),
        bucket_counts=counts.tolist(),
        global_step=step,
    )


def add_charts(writer: Any, category: str, charts: Mapping[str, Sequence[str]]) -> None:
    """Add charts of several scalars to the writer's layout, if it does not hold them yet.

    The last layout in a run replaces those before it, so the union of all that was asked is written again.

    Args:
        writer: A SummaryWriter.
        category: Heading of the charts.
        charts: Exact scalar tags by chart title.
    """
    layout = _layouts.setdefault(writer, {})
    wanted = {title: ["Multiline", [f"^{re.escape(tag)}$" for tag in tags]] for title, tags in charts.items()}
    if layout.get(category, {}).items() >= wanted.items():
        return
    layout.setdefault(category, {}).update(wanted)
    writer.add_custom_scalars(layout)


def spectrum_figure(
    title: str,
    spectra: Mapping[str, Tensor],
    fits: Mapping[str, tuple[tuple[int, int], float]],
    ylabel: str = "eigenvalue",
) -> "Figure":
    """Spectra on log-log axes with the fitted stretch of each.

    Args:
        title: Above the axes.
        spectra: ``(n,)`` descending values by layer.
        fits: First and last rank, 1-based, and exponent of the fitted line by layer; a layer may be missing.
        ylabel: What the values are.

    Returns:
        A figure that belongs to no window and no pyplot state.
    """
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 4.4))
    # Fixed margins and legend: matplotlib's own search for them takes longer than drawing.
    axes = figure.add_axes((0.12, 0.12, 0.85, 0.8))
    colors = colormaps["viridis"](np.linspace(0, 0.88, len(spectra)))
    for color, (name, values) in zip(colors, spectra.items(), strict=True):
        spectrum = values.numpy()
        ranks = np.arange(1, spectrum.size + 1)
        positive = spectrum > 0
        label = name
        if name in fits:
            (lo, hi), exponent = fits[name]
            label = rf"{name}  $\alpha$ = {exponent:.2f}"
            inside = positive & (ranks >= lo) & (ranks <= hi)
            offset = np.log(spectrum[inside]).mean() + exponent * np.log(ranks[inside]).mean()
            axes.plot(
                [lo, hi], np.exp(offset) * np.array([lo, hi], float) ** -exponent, "--", color="black", lw=1, zorder=3
            )
        axes.plot(ranks[positive], spectrum[positive], color=color, lw=1.6, label=label)
    axes.set(xscale="log", yscale="log", xlabel="rank", ylabel=ylabel, title=title)
    axes.grid(alpha=0.25, which="both", lw=0.5)
    axes.legend(loc="lower left", fontsize="small", title="dashed: fitted band", title_fontsize="small")
    return figure
