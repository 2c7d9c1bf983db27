"""Draws the pages' pictures from a run: `python docs/pictures/make.py story demo_logs/lightning_logs/version_0`."""

import sys
from collections.abc import Callable
from math import isfinite
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from lightning_spectral import Run

FOLDER = Path(__file__).parent
KIND = "activation"
COLORS = ["#b3c6e0", "#7f9dc6", "#4c6a92", "#1f3354"]
ACCENT = "#d1622b"


def story(run: Run) -> Figure:
    """The loss flattens out, while spectra of the last layer, their tail and their rank still move."""
    figure, (loss, spectra, tail) = _panels(3, 11)
    name, steps = run.names(KIND)[-1], run.steps(KIND)
    loss.plot(run.history.step, run.history.val_loss, color=COLORS[2])
    _label(loss, "validation loss", "step", "nats a byte")
    scale = ScalarMappable(LogNorm(steps[0], steps[-1]), "viridis")
    for step in steps:
        values = run.spectrum(KIND, name, step=step).values
        spectra.loglog(range(1, len(values) + 1), values, color=scale.to_rgba(step), lw=1)
    spectra.axvspan(16, 64, color="0.85", zorder=0)
    spectra.text(32, spectra.get_ylim()[0] * 2, "tail", ha="center", color="0.4")
    _label(spectra, f"eigenvalues of {name}", "rank", "")
    bar = figure.colorbar(scale, ax=spectra, pad=0.02)
    bar.set_ticks([steps[0], 100, steps[-1]], labels=[f"step {steps[0]}", "100", str(steps[-1])])
    bar.minorticks_off()
    _exponents(tail, run, name, COLORS[2])
    _label(tail, "its tail exponent (blue), RankMe (orange)", "step", "")
    tail.tick_params(axis="y", colors=COLORS[2])
    ranks = tail.twinx()
    ranks.plot(steps, [_rank_of(run, name, step) for step in steps], color=ACCENT)
    ranks.tick_params(axis="y", colors=ACCENT)
    ranks.spines["top"].set_visible(False)
    return figure


def falling_tail(run: Run) -> Figure:
    """Tail exponents of each layer with their standard errors."""
    figure, (axes,) = _panels(1, 6)
    for name, color in zip(run.names(KIND), COLORS, strict=True):
        _exponents(axes, run, name, color, name)
    _label(axes, "tail exponents", "step", "alpha_tail")
    axes.legend(frameon=False)
    return figure


def rising_rankme(run: Run) -> Figure:
    """Effective ranks of each layer."""
    figure, (axes,) = _panels(1, 6)
    _draw_ranks(axes, run)
    return figure


def collapse(run: Run, healthy: Run) -> Figure:
    """Effective ranks and losses at thirty times the learning rate, and as they should be."""
    figure, (ranks, loss) = _panels(2, 9)
    last = run.history.step[-1]
    for one, color, text in ((healthy, COLORS[2], "as tuned"), (run, ACCENT, "30 times the learning rate")):
        steps = [step for step in one.steps(KIND) if step <= last]
        ranks.plot(steps, [_rank_of(one, one.names(KIND)[-1], step) for step in steps], color=color, label=text)
        seen = [
            (step, value) for step, value in zip(one.history.step, one.history.val_loss, strict=True) if step <= last
        ]
        loss.plot(*zip(*seen, strict=True), color=color)
    _label(ranks, "RankMe of the last layer, of 128", "step", "")
    _label(loss, "validation loss", "step", "nats a byte")
    ranks.legend(frameon=False)
    return figure


def drifting_head(run: Run) -> Figure:
    """Divergence and overlap since the first report, beside what sampling shows."""
    figure, (js, overlap) = _panels(2, 9)
    scalars = _logged(run)
    for axes, key in ((js, "js"), (overlap, "overlap")):
        for name, color in zip(run.names(KIND)[::3], (COLORS[1], COLORS[3]), strict=True):
            axes.plot(*scalars(f"drift/{name}/{key}"), color=color, label=name)
            axes.plot(*scalars(f"drift/{name}/{key}_floor"), color=color, ls=":", label="its floor")
    _label(js, "JS from the first report", "step", "nats")
    _label(overlap, "overlap of the 10 leading directions", "step", "")
    overlap.set_ylim(0, 1.05)
    js.legend(frameon=False, loc="upper left", bbox_to_anchor=(0.4, 0.5))
    return figure


def noise_scale(run: Run, batch: int = 8) -> Figure:
    """Noise scales of the gradients of one matrix with their 80% intervals, beside the batch that was trained with."""
    figure, (axes,) = _panels(1, 6)
    scalars = _logged(run)
    for name, color in zip(run.names("gradient")[::3], (COLORS[1], COLORS[3]), strict=True):
        steps, low = scalars(f"gradient/{name}/noise_scale_low")
        _, high = scalars(f"gradient/{name}/noise_scale_high")
        axes.fill_between(steps, low, high, color=color, alpha=0.3, lw=0)
        axes.plot(
            *scalars(f"gradient/{name}/noise_scale"), color=color, marker="o", ms=4, label=name.removesuffix(".weight")
        )
    axes.axhline(batch, color=ACCENT, ls="--")
    axes.text(axes.get_xlim()[1], batch, "the batch", color=ACCENT, ha="right", va="bottom")
    axes.set_yscale("log")
    axes.set_yticks([2, 5, 10, 20, 50], labels=["2", "5", "10", "20", "50"])
    axes.minorticks_off()
    _label(axes, "gradient noise scale, in sequences", "step", "")
    axes.legend(frameon=False, loc="upper left")
    return figure


def forecast(run: Run) -> Figure:
    """What was forecast on the way, with its interval, and what came."""
    figure, (axes,) = _panels(1, 6)
    scalars = _logged(run)
    steps, value = scalars("forecast/tokens_to_target")
    (_, low), (_, high) = scalars("forecast/low"), scalars("forecast/high")
    axes.errorbar(steps, value, [value - low, high - value], color=COLORS[2], marker="o", ls="", capsize=4)
    axes.axhline(scalars("forecast/actual")[1][-1], color=ACCENT, ls="--")
    axes.text(steps[0], scalars("forecast/actual")[1][-1], "  needed", color=ACCENT, va="top")
    axes.set_ylim(0)
    axes.yaxis.set_major_formatter(lambda tokens, _: f"{tokens:,.0f}")
    _label(axes, "forecast of tokens to a loss of 2", "step at which it was made", "tokens")
    return figure


def _panels(num: int, width: float) -> tuple[Figure, list[Axes]]:
    figure = Figure(figsize=(width, 3.1), layout="constrained")
    axes = list(figure.subplots(1, num, squeeze=False)[0])
    for one in axes:
        one.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _label(axes: Axes, title: str, x: str, y: str) -> None:
    axes.set_title(title, fontsize="medium")
    axes.set_xlabel(x)
    axes.set_ylabel(y)


def _exponents(axes: Axes, run: Run, name: str, color: str, text: str | None = None) -> None:
    steps = run.steps(KIND)
    found = [run.spectrum(KIND, name, step=step).exponent((0.125, 0.5)) for step in steps]
    value, error = (np.array([float(getattr(one, key)) for one in found]) for key in ("value", "stderr"))
    axes.fill_between(steps, value - 1.64 * error, value + 1.64 * error, color=color, alpha=0.4, lw=0)
    axes.plot(steps, value, color=color, label=text)


def _draw_ranks(axes: Axes, run: Run) -> None:
    for name, color in zip(run.names(KIND), COLORS, strict=True):
        axes.plot(run.steps(KIND), [_rank_of(run, name, step) for step in run.steps(KIND)], color=color, label=name)
    _label(axes, "RankMe, of 128 channels", "step", "")
    axes.legend(frameon=False)


def _rank_of(run: Run, name: str, step: int) -> float:
    return float(run.spectrum(KIND, name, step=step).rankme().value)


def _logged(run: Run) -> Callable[[str], tuple[np.ndarray, np.ndarray]]:
    """Scalars of TensorBoard's log beside the record: a function of the key, without what is NaN."""
    events = EventAccumulator(str(run.path), size_guidance={"scalars": 0}).Reload()

    def scalars(key: str) -> tuple[np.ndarray, np.ndarray]:
        seen = [(event.step, event.value) for event in events.Scalars(key) if isfinite(event.value)]
        return np.array([step for step, _ in seen]), np.array([value for _, value in seen])

    return scalars


DRAWN = (story, falling_tail, rising_rankme, drifting_head, noise_scale, forecast, collapse)

if __name__ == "__main__":
    name, *paths = sys.argv[1:]
    draw = next(one for one in DRAWN if one.__name__ == name)
    draw(*(Run(path) for path in paths)).savefig(FOLDER / f"{name}.png", dpi=100)
