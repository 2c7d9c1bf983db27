"""Pictures of runs, outside any window and pyplot state: how spectra evolve, two sides of a comparison at a glance."""

import os
from collections.abc import Callable, Mapping, Sequence
from math import isnan
from pathlib import Path
from textwrap import fill
from typing import TYPE_CHECKING, Any

import numpy as np

from lightning_spectral.functional.estimate import Spectrum
from lightning_spectral.functional.spectrum import js_divergence, normalize
from lightning_spectral.runs.comparison import Comparison
from lightning_spectral.runs.course import GROUPS
from lightning_spectral.runs.kinds import KINDS
from lightning_spectral.runs.measured import bands_of
from lightning_spectral.runs.run import Run
from lightning_spectral.runs.run_spectra import kind_of
from lightning_spectral.runs.spread import spread

if TYPE_CHECKING:  # matplotlib takes a while to import, and tables do without
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MOST_DRAWN = 64
"""Reports in one figure of a run: more lines would cover each other."""

COLORS = {"base": "#4c6a92", "variant": "#d1622b"}


def evolution_figure(run: Run, kind: str) -> "Figure":
    """A run's spectra over training: a panel for each layer or parameter, steps as colour."""
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import LogNorm
    from matplotlib.figure import Figure

    names, every = spread(run.names(kind)), run.steps(kind)
    steps = spread(every, MOST_DRAWN)
    columns = 2 if len(names) in (2, 4) else min(3, len(names))
    rows = -(-len(names) // columns)
    figure = Figure(figsize=(4.2 * columns + 0.6, 3.4 * rows + 0.5), layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=True).flatten()
    scale: Any = ScalarMappable(LogNorm(min(steps), max(max(steps), min(steps) + 1)), "viridis")
    for step in steps:
        spectra = run.spectra(kind, step, without=GROUPS)
        for axes, name in zip(panels, names, strict=False):
            if name in spectra:
                _draw_spectrum(axes, spectra[name], color=scale.to_rgba(step), lw=1.2)
    for axes, name in zip(panels, names, strict=False):
        axes.set_title(plain(name), fontsize="small")
        _log_log(axes)
    for axes in panels[len(names) :]:
        axes.set_visible(False)
    figure.supxlabel("rank", fontsize="small")
    figure.supylabel(KINDS[kind_of(kind)].value, fontsize="small")
    bar = figure.colorbar(scale, ax=list(panels), label="step", shrink=0.8)
    bar.set_ticks(spread(steps), labels=[f"{step:,}" for step in spread(steps)])
    bar.minorticks_off()
    title = f"{kind} spectra of {run.path}"
    if kind in KINDS and len(run.series_beside(kind)) > 1:
        title += f": {run.series(kind)}, {run.span(kind)}"
    if len(steps) < len(every):
        title += f" ({len(steps)} of {len(every):,} reports)"
    figure.suptitle(plain(title), fontsize="medium")
    return figure


def comparison_figure(comparison: Comparison) -> "Figure":
    """Two sides: loss against tokens and seconds, spectra at the matched loss, drift over time."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 8), layout="constrained")
    (by_tokens, by_seconds), (spectra, drift) = figure.subplots(2, 2)
    sides = {"base": comparison.base, "variant": comparison.variant}
    _draw_losses(by_tokens, sides, comparison, "tokens")
    _draw_losses(by_seconds, sides, comparison, "seconds")
    # Of the first kind the last that was compared: one that was left out has no shift.
    kind = next((shift.kind for shift in comparison.shifts), None)
    if kind is None:
        spectra.set_visible(False)
        drift.set_visible(False)
    else:
        name = [shift.name for shift in comparison.shifts if shift.kind == kind][-1]
        _draw_matched_spectra(spectra, sides, comparison, kind, name)
        _draw_drift(drift, sides, kind, name)
    figure.suptitle(
        fill(plain(comparison.verdict.text), 130, break_long_words=False, break_on_hyphens=False), fontsize="medium"
    )
    return figure


def plain(text: str) -> str:
    """Text in which dollars, of a user's names, are no formula."""
    return text.replace("$", r"\$")


def save(figure: "Figure", path: str | Path) -> None:
    """Write a figure to a file whose ending names the format; ValueError if it cannot be written there."""
    if os.path.exists(path) and not os.path.isfile(path):
        # Who writes into a pipe waits for a reader.
        raise ValueError(f"plot must be a file, such as a.png, got {str(path)!r}: a folder, a pipe or a device")
    try:
        figure.savefig(path, dpi=120)
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(
            f"plot must be a file that can be written, such as a.png, got {str(path)!r}: {reason}"
        ) from error


def _draw_spectrum(axes: "Axes", spectrum: Spectrum, share: bool = False, **style: Any) -> None:
    """A spectrum against rank; as shares of its sum where sides are compared."""
    if spectrum.failure is not None:
        return
    values = (normalize(spectrum.values) if share else spectrum.values).numpy()
    positive = values > 0
    axes.plot(np.arange(1, len(values) + 1)[positive], values[positive], **style)


def _log_log(axes: "Axes") -> None:
    axes.set(xscale="log", yscale="log")
    axes.grid(alpha=0.25, which="both", lw=0.5)


def _for_each(sides: Mapping[str, Sequence[Run]], draw: Callable[[Run, dict[str, Any]], None]) -> None:
    """Draw all runs of both sides; the first of a side stands for it in the legend."""
    for side, runs in sides.items():
        for number, run in enumerate(runs):
            label = f"{side} ({len(runs)} {'run' if len(runs) == 1 else 'runs'})" if number == 0 else None
            draw(run, {"color": COLORS[side], "label": label, "lw": 1.3, "alpha": 0.85})


def _draw_losses(axes: "Axes", sides: Mapping[str, Sequence[Run]], comparison: Comparison, against: str) -> None:
    def draw(run: Run, style: dict[str, Any]) -> None:
        entries, losses = run.history.with_loss()
        axes.plot(getattr(run.history, against)[entries], losses, **style)

    _for_each(sides, draw)
    axes.axhline(comparison.loss, color="black", lw=0.8, ls="--", label=f"matched at {comparison.loss:.3f}")
    gain = comparison.gains[against]
    axes.set(xscale="log", xlabel=against, ylabel=comparison.loss_name)
    found = f"{_percent(gain.gain)} (run floor {_percent(gain.run_floor)})"
    timing = comparison.timing
    if against == "seconds" and timing.reason:
        found = (
            f"{found}, by days"
            if timing.compared_by
            else f"left out,\n{fill(plain(timing.reason), 70, break_long_words=False, break_on_hyphens=False)}"
        )
    axes.set_title(f"{against} to the matched loss: {found}", fontsize="small")
    axes.grid(alpha=0.25, which="both", lw=0.5)
    axes.legend(fontsize="small")


def _percent(share: float) -> str:
    return "unknown" if isnan(share) else f"{share:+.1%}"


def _draw_matched_spectra(
    axes: "Axes", sides: Mapping[str, Sequence[Run]], comparison: Comparison, kind: str, name: str
) -> None:
    spectrum = comparison.base[0].at_loss(comparison.loss).spectrum(kind, name)
    ranks = spectrum.exponent(bands_of(comparison.base[0], kind)["head"]).band
    if ranks is not None:  # the default head may lie beyond a narrow spectrum
        first, last = ranks
        axes.axvspan(first, last, color="black", alpha=0.07, lw=0, label=f"head, ranks {first} to {last}")
    _for_each(
        sides,
        lambda run, style: _draw_spectrum(axes, run.at_loss(comparison.loss).spectrum(kind, name), share=True, **style),
    )
    _log_log(axes)
    axes.set(xlabel="rank", ylabel=f"share of the sum of {KINDS[kind].value}s")
    found = comparison.movements[kind].ratios[0]
    ratio = "" if isnan(found) else f", R of all layers {found:.1f}"
    (shift,) = (one for one in comparison.shifts if (one.kind, one.name, one.quantity) == (kind, name, "js"))
    axes.set_title(plain(f"{name} at the matched loss: JS {shift.shift:.2g} nats{ratio}"), fontsize="small")
    axes.legend(fontsize="small", loc="lower left")


def _draw_drift(axes: "Axes", sides: Mapping[str, Sequence[Run]], kind: str, name: str) -> None:
    def draw(run: Run, style: dict[str, Any]) -> None:
        spectra = [run.spectra(kind, step, without=GROUPS)[name] for step in run.steps(kind, name)]
        known = [spectrum for spectrum in spectra if spectrum.failure is None and not spectrum.is_zero]
        moved = [float(js_divergence(spectrum.values, known[0].values)) for spectrum in known[1:]]
        axes.plot([spectrum.tokens for spectrum in known[1:]], moved, marker=".", **style)

    _for_each(sides, draw)
    axes.set(xscale="log", xlabel="tokens", ylabel="JS from the first report, nats")
    axes.set_title(plain(f"drift of {name}"), fontsize="small")
    axes.grid(alpha=0.25, which="both", lw=0.5)
    axes.legend(fontsize="small")
