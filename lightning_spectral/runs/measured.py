"""What a comparison takes from each run at the loss that all are matched at."""

from collections.abc import Sequence
from math import isnan, log, nan
from typing import Any, NamedTuple

import numpy as np

from lightning_spectral.functional.powerlaw import Band
from lightning_spectral.runs.run import Run
from lightning_spectral.runs.spectrum import Spectrum

KINDS = ("activation", "gradient")
"""Kinds of spectra that are compared."""
BANDS: dict[str, Band] = {"head": (1, 10), "tail": (0.125, 0.5)}
"""Bands of runs that recorded none: those of the callbacks."""

_MUST_AGREE = {
    "activation": ("stage", "layers", "num_tokens", "normalize", "mask", "fingerprint"),
    "gradient": ("stage", "parameters", "num_samples", "method", "loss_reduction", "fingerprint"),
}
"""Settings without which two spectra of a kind do not compare."""


class Measured(NamedTuple):
    """One run at the matched loss."""

    run: Run
    logs: dict[str, float]
    """Natural logarithms of ``tokens`` and ``seconds`` to the loss, and of the ``throughput`` on the way."""
    exponents: dict[str, tuple[float, float]]
    """``{kind}/{name}/{alpha_head, alpha_tail, rankme}``, each with its standard error by sampling."""
    spectra: dict[str, Spectrum]
    """By ``{kind}/{name}``."""


def check_comparable(runs: Sequence[Run]) -> list[str]:
    """Refuse runs whose spectra were not measured alike.

    Args:
        runs: Two or more.

    Returns:
        The kinds that all recorded.

    Raises:
        ValueError: Naming the setting, and two runs that differ in it.
    """
    first = runs[0]
    for run in runs:
        if run.history.loss_name != first.history.loss_name:
            raise ValueError(
                f"runs must have one kind of loss, got {first.history.loss_name} in {first} and "
                f"{run.history.loss_name} in {run}: give all of them validation data"
            )
    kinds = [kind for kind in KINDS if all(run.steps(kind) for run in runs)]
    for kind in kinds:
        for run in runs:
            for name in _MUST_AGREE[kind]:
                one, other = first.settings(kind).get(name), run.settings(kind).get(name)
                if one != other:
                    what = "validation data" if name == "fingerprint" else name
                    raise ValueError(
                        f"runs must have been measured alike, got {kind} spectra of {what} {_short(one)} in {first} "
                        f"and {_short(other)} in {run}"
                    )
    return kinds


def bands_of(run: Run, kind: str) -> dict[str, Band]:
    """The bands that a run's callbacks had.

    Args:
        run: The run.
        kind: Of the spectra.

    Returns:
        ``head`` and ``tail``.
    """
    settings = run.settings(kind)
    recorded: dict[str, Any] = {name: settings.get(name) or default for name, default in BANDS.items()}
    return {name: tuple(band) for name, band in recorded.items()}


def lowest_common_loss(runs: Sequence[Run], kinds: Sequence[str]) -> float:
    """The lowest loss that all runs reached while their spectra were measured.

    Args:
        runs: One or more.
        kinds: Of spectra.

    Returns:
        The loss.

    Raises:
        ValueError: If a run has no loss there.
    """
    lowest = []
    for run in runs:
        entries, losses = run.history.with_loss()
        tokens = run.history.tokens[entries]
        inside = np.ones(len(entries), dtype=bool)
        for kind in kinds:
            steps = run.steps(kind)
            first, last = (run.tokens_at(kind, step) for step in (steps[0], steps[-1]))
            inside &= (tokens >= first) & (tokens <= last)
        if not inside.any():
            raise ValueError(f"runs must have losses between their first report and their last, got none in {run}")
        lowest.append(float(losses[inside].min()))
    return max(lowest)


def measure(run: Run, loss: float, kinds: Sequence[str], bands: dict[str, dict[str, Band]]) -> Measured:
    """What there is to compare in a run.

    Args:
        run: The run.
        loss: Where.
        kinds: Of spectra.
        bands: ``head`` and ``tail`` by kind.

    Returns:
        The numbers.

    Raises:
        ValueError: If the run never came down to that loss, or was below it from the first.
    """
    point = run.at_loss(loss)
    if isnan(point.tokens):
        losses = run.history.with_loss()[1]
        span = f"{losses.max():.4g} to {losses.min():.4g}" if len(losses) else "none"
        raise ValueError(f"at_loss must be a loss that all runs came down to, got {loss:.4g}: {run} has {span}")
    numbers = {
        "tokens": point.tokens,
        "throughput": run.history.throughput(point.tokens),
        "seconds": point.seconds,
    }
    exponents, spectra = {}, {}
    for kind in kinds:
        for name in run.names(kind):
            spectrum = spectra[f"{kind}/{name}"] = point.spectrum(kind, name)
            for part, band in bands[kind].items():
                exponents[f"{kind}/{name}/alpha_{part}"] = spectrum.exponent(band)
            exponents[f"{kind}/{name}/rankme"] = spectrum.rankme()
    return Measured(run, {key: log(value) if value > 0 else nan for key, value in numbers.items()}, exponents, spectra)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:56]} ..."
