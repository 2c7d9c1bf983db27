"""What a comparison takes from each run at the loss that all are matched at."""

from collections.abc import Collection, Mapping, Sequence
from math import inf, isnan, log, nan
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor

from lightning_spectral.functional.estimate import Estimate, Exponent, Spectrum
from lightning_spectral.functional.powerlaw import Band, power_law
from lightning_spectral.functional.spectrum import rankme
from lightning_spectral.runs.history import Point
from lightning_spectral.runs.kinds import KINDS, Key, setting_of
from lightning_spectral.runs.loss_names import loss_of_validation
from lightning_spectral.runs.run import Run

MOST_UNEQUAL = 0.1
"""Relative difference of two numbers of samples that limits in batches of unequal sizes may come to."""

BANDS: dict[str, Band] = {"head": (1, 10), "tail": (0.125, 0.5)}
"""Bands of runs that recorded none: those of the callbacks."""


class Measured(NamedTuple):
    """One run at the matched loss."""

    run: Run
    logs: dict[Key, float]
    """Natural logarithms of ``tokens`` and ``seconds`` to the loss, and of the ``throughput`` on the way."""
    estimates: dict[Key, Estimate]
    """``alpha_head``, ``alpha_tail`` and ``rankme`` of each spectrum, with standard errors by sampling."""
    spectra: dict[Key, Spectrum]
    """Each under the key of its ``js``."""
    unknown: Mapping[Key, str] = MappingProxyType({})
    """Why exponents are NaN, of spectra that are there."""
    without: Mapping[Key, Tensor] = MappingProxyType({})
    """Of each estimate those without each group, ``(G,)``; NaN where there is no error bar."""


def check_comparable(runs: Sequence[Run], only: Collection[str] = tuple(KINDS)) -> list[str]:
    """The kinds of spectra, of some kinds, that two or more runs all recorded.

    Refuses those whose spectra were not measured alike: a ValueError names the setting, and two that differ in it.
    """
    first = next((run for run in runs if not run.columns), runs[0])
    for run in runs:
        check_tokens_known(run)
        if run.history.loss_name != first.history.loss_name:
            raise ValueError(
                f"runs must have one kind of loss, got {first.history.loss_name} in {first} and "
                f"{run.history.loss_name} in {run}: give all of them validation data"
            )
        if run.columns:
            continue  # a log of another tool does not say
        _refuse_difference("validation data", first, run, *(one.about.get("validation_data") for one in (first, run)))
        _refuse_other_losses(first, run)
    kinds = [kind for kind in only if KINDS[kind].is_compared and all(run.steps(kind) for run in runs)]
    for kind in kinds:
        _choose_series(kind, runs)
        for run in runs:
            for name, one, other in _unlike(kind, first.settings(kind), run.settings(kind)):
                _refuse_difference(f"{kind} spectra of {name}", first, run, one, other)
    return kinds


def check_tokens_known(run: Run) -> None:
    """Refuse a log that does not say how many tokens its steps took, by a ValueError."""
    if run.columns and not np.isfinite(run.history.tokens).any():
        raise ValueError(
            f"batch_tokens must be given for {run.path}, a {run.columns['tool']} log without a column of tokens: "
            "--batch-tokens 65536, or 'batch_size*256' by hyperparameters"
        )


def other_lengths(runs: Sequence[Run]) -> list[str]:
    """Of runs that were validated on unequally many samples, as by one limit in batches, what that means; in words."""
    known = [(run, run.about.get("validation_samples") or {}) for run in runs]
    for loader in dict.fromkeys(loader for _, samples in known for loader in samples):
        counts = sorted(((samples[loader], str(run.path)) for run, samples in known if loader in samples))
        (fewest, one), (most, other) = counts[0], counts[-1]
        if most - fewest > MOST_UNEQUAL * most:
            return [
                f"validated on {fewest} samples in {one} and on {most} in {other}: losses and spectra are of different "
                "parts of the data, which no floor covers: limit_val_batches makes them equal"
            ]
    return []


def _choose_series(kind: str, runs: Sequence[Run]) -> None:
    """Let a kind mean series that were measured alike, where runs that were resumed have several."""
    candidates = [run.series_beside(kind) for run in runs]
    for series in candidates[0] if any(len(names) > 1 for names in candidates) else ():
        settings = runs[0].settings(series)
        chosen = [
            next((name for name in names if not _unlike(kind, settings, run.settings(name))), None)
            for run, names in zip(runs, candidates, strict=True)
        ]
        if None not in chosen:
            for run, name in zip(runs, chosen, strict=True):
                run.use(kind, str(name))
            return


def _unlike(kind: str, one: dict[str, Any], other: dict[str, Any]) -> list[tuple[str, Any, Any]]:
    """Settings without which spectra do not compare, where two measurements differ in them."""
    found = [
        (name, setting_of(one, name), setting_of(other, name))
        for name in KINDS[kind].must_agree
        # A run that was resumed with other layers has had several sets of them, and is compared by what both have.
        if not any(names in _sets(name, other) for names in _sets(name, one))
    ]
    # Rows of all other methods are the same.
    first, second = (settings.get("method") == "hooks" for settings in (one, other))
    return found if first == second else [*found, ("method='hooks'", first, second)]


def _sets(name: str, settings: dict[str, Any]) -> list[Any]:
    return [setting_of(settings, name), *settings.get(f"{name}_before", ())]


def series_used(runs: Sequence[Run], kind: str) -> list[str]:
    """Of each run with several series of a kind, which one it means, and which others there are; in words."""
    lines = []
    for run in runs:
        if kind in run.kinds:
            first, *others = (f"{series} ({run.span(series)})" for series in run.series_beside(kind))
            if others:
                lines.append(f"{kind} spectra of {run.path} are those of {first}, not of {', '.join(others)}")
    return lines


def _refuse_other_losses(first: Run, second: Run) -> None:
    """Usual names of the validation loss are names of one thing, but of another loader; any other is of its own."""
    parted = [str(run.about.get("val_loss") or "").partition("/dataloader_idx_") for run in (first, second)]
    has_loaders = all(number for _, _, number in parted)
    one, other = (
        ("val_loss" if loss_of_validation([name]) else name) + (between + number if has_loaders else "")
        for name, between, number in parted
    )
    if one and other:
        _refuse_difference("the validation loss", first, second, one, other)


def _refuse_difference(what: str, first: Run, second: Run, one: Any, other: Any) -> None:
    if one != other:
        raise ValueError(
            f"runs must have been measured alike, got {what} {_short(one)} in {first} and {_short(other)} in {second}"
        )


def keep_known(every: Sequence[Measured]) -> tuple[list[Measured], dict[Key, str]]:
    """Leave out spectra that some run has not: runs with those that all have, and why others are left out.

    ValueError if spectra are of different numbers of rows or of different widths.
    """
    left_out: dict[Key, str] = {}
    first = every[0]
    for key in dict.fromkeys(key for measured in every for key in measured.spectra):
        known = []
        for measured in every:
            spectrum = measured.spectra.get(key)
            reason = None if spectrum is None else spectrum.failure
            if spectrum is None:
                reason = "it was not measured"
            elif reason is None and bool((unknown := spectrum.values.isnan()).any()):
                reason = f"{'all' if bool(unknown.all()) else 'some'} of its values are NaN"
            elif reason is None and not float(spectrum.values.sum()) > 0:
                reason = "all its values are zero"
            if reason is not None:
                left_out.setdefault(key, f"{measured.run}: {reason}")
            elif spectrum is not None:
                known.append((measured.run, spectrum))
        for run, spectrum in known[1:]:
            what = f"{key.kind}/{key.name}"
            _refuse_difference(f"{what} on rows", known[0][0], run, known[0][1].count, spectrum.count)
            _refuse_difference(f"{what} of width", known[0][0], run, len(known[0][1].values), len(spectrum.values))
    keys = [key for key in first.spectra if key not in left_out]
    return [
        measured._replace(
            estimates={key: value for key, value in measured.estimates.items() if key._replace(quantity="js") in keys},
            spectra={key: measured.spectra[key] for key in keys},
        )
        for measured in every
    ], left_out


def bands_of(run: Run, kind: str) -> dict[str, Band]:
    """The bands ``head`` and ``tail`` that a run's callbacks had for spectra of a kind."""
    settings = run.settings(kind)
    recorded: dict[str, Any] = {name: settings.get(name) or default for name, default in BANDS.items()}
    return {name: tuple(band) for name, band in recorded.items()}


def lowest_common_loss(runs: Sequence[Run], kinds: Sequence[str]) -> float:
    """The lowest loss that all runs reached while their spectra of some kinds were measured.

    ValueError if a run has no loss there, or one is below all of another's.
    """
    reached: dict[Run, tuple[float, float]] = {}
    for run in runs:
        losses = _losses_inside(run, kinds)
        if not len(losses):
            raise ValueError(f"runs must have losses between their first report and their last, got none in {run}")
        reached[run] = float(losses.max()), float(losses.min())
    lowest = max(low for _, low in reached.values())
    for run, (high, _) in reached.items():
        if high < lowest:
            slow = max(reached, key=lambda one: reached[one][1])
            raise ValueError(
                f"runs must have a loss in common, got {lowest:.4g} at the lowest in {slow} and {high:.4g} at the "
                f"highest in {run}: validate earlier, or train longer"
            )
    return lowest


def highest_common_loss(runs: Sequence[Run], kinds: Sequence[str]) -> float:
    """The highest loss that all runs had while spectra of some kinds were measured; minus infinity if one had none."""
    return min(float(_losses_inside(run, kinds).max(initial=-inf)) for run in runs)


def _losses_inside(run: Run, kinds: Sequence[str]) -> np.ndarray:
    """Losses between the first report and the last."""
    entries, losses = run.history.with_loss()
    tokens = run.history.tokens[entries]
    inside = np.ones(len(entries), dtype=bool)
    for kind in kinds:
        steps = run.steps(kind)
        first, last = (run.tokens_at(kind, step) for step in (steps[0], steps[-1]))
        inside &= (tokens >= first) & (tokens <= last)
    return np.asarray(losses[inside])


def measure(run: Run, loss: float, kinds: Sequence[str], bands: dict[str, dict[str, Band]]) -> Measured:
    """What there is to compare in a run at a loss, with bands ``head`` and ``tail`` by kind of spectra.

    ValueError if the run never came down to that loss, or was below it from the first.
    """
    point = run.at_loss(loss)
    if isnan(point.tokens):
        losses = run.history.with_loss()[1]
        span = f"{losses.max():.4g} to {losses.min():.4g}" if len(losses) else "none"
        raise ValueError(f"at_loss must be a loss that all runs came down to, got {loss:.4g}: {run} has {span}")
    numbers = {
        "tokens": point.tokens,
        "throughput": run.history.throughput(Point(point.step, point.tokens, point.seconds)),
        "seconds": point.seconds,
    }
    estimates, spectra, unknown, without = {}, {}, {}, {}
    for kind in kinds:
        for name, spectrum in point.spectra(kind).items():
            spectra[Key("js", kind, name)] = spectrum
            for part, band in bands[kind].items():
                exponent = spectrum.exponent(band)
                estimates[key := Key(f"alpha_{part}", kind, name)] = Estimate(exponent.value, exponent.stderr)
                without[key] = _exponents_without(spectrum, exponent)
                if spectrum.failure is None and isnan(exponent.value) and exponent.reason is not None:
                    unknown[key] = exponent.reason
            estimates[key := Key("rankme", kind, name)] = spectrum.rankme()
            without[key] = rankme(spectrum.leave_one_out)
    logs = {Key(name): log(value) if value > 0 else nan for name, value in numbers.items()}
    return Measured(run, logs, estimates, spectra, unknown, without)


def _exponents_without(spectrum: Spectrum, exponent: Exponent) -> Tensor:
    missing = spectrum.leave_one_out.new_full(spectrum.leave_one_out.shape[:1], nan)
    if exponent.band is None or isnan(exponent.stderr):
        return missing
    return power_law(spectrum.leave_one_out, exponent.band).exponent


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:56]} ..."
