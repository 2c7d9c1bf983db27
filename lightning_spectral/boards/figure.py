"""The picture of a report: spectra on log-log axes with the fitted stretch of each."""

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np
from torch import Tensor

if TYPE_CHECKING:  # matplotlib takes a while to import, and a run without figures never needs it
    from matplotlib.figure import Figure


def spectrum_figure(
    title: str,
    spectra: Mapping[str, Tensor],
    fits: Mapping[str, tuple[tuple[int, int], float]],
    ylabel: str = "eigenvalue",
    shares: Mapping[str, Tensor] | None = None,
) -> "Figure":
    """Spectra, `(n,)` descending, on log-log axes, with first and last rank, 1-based, and exponent of the line fitted.

    A spectrum may be without a fit. Cumulative shares by rank, `(n,)`, are drawn on an axis of their own. The figure
    belongs to no window and no pyplot state.
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
        label = shown = name.replace("$", r"\$")  # dollars in a name are no formula
        if name in fits:
            (lo, hi), exponent = fits[name]
            label = rf"{shown}  $\alpha$ = {exponent:.2f}"
            inside = positive & (ranks >= lo) & (ranks <= hi)
            offset = np.log(spectrum[inside]).mean() + exponent * np.log(ranks[inside]).mean()
            axes.plot(
                [lo, hi], np.exp(offset) * np.array([lo, hi], float) ** -exponent, "--", color="black", lw=1, zorder=3
            )
        axes.plot(ranks[positive], spectrum[positive], color=color, lw=1.6, label=label)
    axes.set(xscale="log", yscale="log", xlabel="rank", ylabel=ylabel, title=title.replace("$", r"\$"))
    axes.grid(alpha=0.25, which="both", lw=0.5)
    if shares:
        axes.set_position((0.12, 0.12, 0.77, 0.8))
        other = axes.twinx()
        # The legend above the curve.
        axes.set_zorder(other.get_zorder() + 1)
        axes.patch.set_visible(False)
        other.set(ylim=(0, 1.02), ylabel="share of task power up to a rank")
        for style, (name, values) in zip((":", "-.", "--"), shares.items(), strict=False):
            shown = name.replace("$", r"\$")
            other.plot(np.arange(1, len(values) + 1), values.numpy(), style, color="tab:red", lw=1.6)
            axes.plot([], [], style, color="tab:red", lw=1.6, label=f"task power of {shown}")
    axes.legend(loc="lower left", fontsize="small", title="dashed: fitted band", title_fontsize="small")
    return figure
