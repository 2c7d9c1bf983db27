"""What a page holds of one series of a run: numbers of every report, and the spectra that its slider goes through."""

from collections.abc import Sequence
from math import isnan, log10, nan
from typing import Any

import numpy as np

from lightning_spectral.advice.facts import student
from lightning_spectral.functional.drift import Drift
from lightning_spectral.functional.estimate import Exponent, Spectrum, fit_all
from lightning_spectral.functional.powerlaw import Band
from lightning_spectral.reporting.drift import drift
from lightning_spectral.reporting.thinning import kept_ranks
from lightning_spectral.runs import NoiseScale, Run
from lightning_spectral.runs.kinds import KINDS, Series
from lightning_spectral.runs.measured import bands_of
from lightning_spectral.runs.spread import spread

MOST_NUMBERS = 2_000
"""Reports whose numbers a page holds; of more they are spread over training."""

MOST_SHOWN = 240
"""Reports of one run whose spectra and drift a page holds: as many as a slider has places to stop."""

MOST_VALUES = 600_000
"""Values of spectra of a series, which bring a page to some megabytes: of many wide layers fewer reports are held."""

LEAST_SHOWN = 24
"""Likewise, of each of many runs."""

REACH = 0.9
"""Quantile of Student's t to which shaded intervals reach on either side, so that they hold 80 of 100 cases."""

_AT_ONCE = 64
"""Reports whose spectra are in memory together."""

NUMBERS = ("alpha_tail", "alpha_tail_stderr", "alpha_head", "alpha_head_stderr", "rankme", "rankme_stderr")
DRIFTS = ("overlap", "overlap_floor", "js", "js_floor")


def series_of(run: Run, kind: str) -> list[str]:
    """All series of a kind in a run, the one that the kind means first."""
    first = run.series(kind)
    same_stage = run.series_beside(kind)
    others = run.all_series(kind) if KINDS[kind].series == kind else []
    return list(dict.fromkeys([first, *same_stage, *others]))


def key_of(kind: str, series: str) -> str:
    """What runs have in common: the kind, the stage and the number of a series."""
    parsed = Series.parse(series)
    return kind if parsed is None else parsed._replace(kind=kind).text


def gather(run: Run, kind: str, most_shown: int = MOST_SHOWN) -> dict[str, Any]:
    """The numbers of a kind's reports, and the spectra of some of them.

    Args:
        run: The run; its kind means the series that is wanted.
        kind: A kind.
        most_shown: Of how many reports spectra and drift are held.

    Returns:
        By report ``step``, ``tokens`` and ``seconds``, ``shown`` with the indices of those that have spectra, and for
        each of ``names`` its numbers by report and its spectra by entry of ``shown``. NaN where nothing is known, with
        ``why`` by index of the report.
    """
    every = run.steps(kind)
    steps = spread(every, MOST_NUMBERS)
    bands, settings = bands_of(run, kind), run.settings(kind)
    found = {name: _Held(name, len(steps)) for name in run.names(kind)}
    most_values = MOST_VALUES // max(_num_values(run, kind, steps[-1]), 1)
    shown = spread(range(len(steps)), max(min(most_shown, most_values), min(most_shown, LEAST_SHOWN)))
    has_drift = kind == "activation"
    first: dict[str, Spectrum] = {}
    for start in range(0, len(steps), _AT_ONCE):
        batch = range(start, min(start + _AT_ONCE, len(steps)))
        read = {i: _read(run, kind, steps[i], has_drift and i in shown) for i in batch}
        spectra = [one for of_step in read.values() for one in of_step.values()]
        for band in bands.values():
            fit_all(spectra, band)  # together, and remembered by each
        for index, of_step in read.items():
            for name, spectrum in of_step.items():
                found[name].add(index, spectrum, bands)
                if index in shown:
                    if has_drift and spectrum.failure is None:
                        first.setdefault(name, spectrum)
                        found[name].add_drift(index, drift(spectrum, first[name]))
                    found[name].add_spectrum(index, spectrum, bands)
    return {
        "kind": kind,
        "series": run.series(kind),
        "stage": settings.get("stage"),
        "noun": KINDS[kind].noun,
        "value": KINDS[kind].value,
        "settings": settings,
        "bands": {part: list(band) for part, band in bands.items()},
        "num_reports": len(every),
        "step": steps,
        "tokens": [run.tokens_at(kind, step) for step in steps],
        "seconds": _seconds(run, steps),
        "shown": list(shown),
        "names": [held.as_dict(shown) for held in found.values()],
        "noise": _noise(run, kind, steps) if kind == "gradient" else None,
    }


def _num_values(run: Run, kind: str, step: int) -> int:
    """How many values of one report a page holds."""
    spectra = run.spectra(kind, step, without=("leave_one_out", "vectors", "leave_one_out_vectors"))
    return sum(len(kept_ranks(len(spectrum.values))) for spectrum in spectra.values() if len(spectrum.values))


def _read(run: Run, kind: str, step: int, with_vectors: bool) -> dict[str, Spectrum]:
    return run.spectra(kind, step, without=() if with_vectors else ("vectors", "leave_one_out_vectors"))


class _Held:
    """What is held of one layer or parameter."""

    def __init__(self, name: str, num_reports: int) -> None:
        self.name = name
        self.width = 0
        self.count = 0
        self.num_groups = 0
        self.num_reports = 0
        self.num_failed = 0
        self.columns: dict[str, list[float]] = {key: [nan] * num_reports for key in (*NUMBERS, *DRIFTS)}
        self.why: dict[int, dict[str, str]] = {}
        self.ranks: list[int] = []
        self.log_values: dict[int, list[float]] = {}
        self.lines: dict[int, list[list[float]]] = {}

    def add(self, index: int, spectrum: Spectrum, bands: dict[str, Band]) -> None:
        """Take the numbers of a report."""
        self.num_reports += 1
        for part, band in bands.items():
            exponent = spectrum.exponent(band)
            self._set(index, f"alpha_{part}", exponent.value, exponent.stderr)
            if exponent.reason is not None and isnan(exponent.value):
                self.why.setdefault(index, {})[f"alpha_{part}"] = exponent.reason
        self._set(index, "rankme", *spectrum.rankme())
        if spectrum.failure is not None:
            self.num_failed += 1
            self.why[index] = {"all": spectrum.failure}
        self.width = len(spectrum.values) or self.width
        self.count = spectrum.count
        self.num_groups = max(self.num_groups, len(spectrum.leave_one_out))

    def _set(self, index: int, quantity: str, value: float, stderr: float) -> None:
        self.columns[quantity][index], self.columns[f"{quantity}_stderr"][index] = value, stderr

    def add_drift(self, index: int, found: Drift) -> None:
        """Take the drift of a report."""
        for quantity in DRIFTS:
            self.columns[quantity][index] = getattr(found, quantity)
        if found.reason is not None:
            self.why.setdefault(index, {})["overlap"] = found.reason

    def add_spectrum(self, index: int, spectrum: Spectrum, bands: dict[str, Band]) -> None:
        """Take the values of a report, and the ends of the lines that exponents are slopes of."""
        if spectrum.failure is not None or not len(spectrum.values):
            return
        fits = [spectrum.exponent(band) for band in bands.values()]
        if len(self.ranks) == 0 or self.ranks[-1] != len(spectrum.values):
            ends = [rank for fit in fits if fit.band is not None for rank in fit.band]
            self.ranks = kept_ranks(len(spectrum.values), ends)
        values = spectrum.values.numpy()[np.array(self.ranks) - 1]
        self.log_values[index] = [log10(value) if value > 0 else nan for value in values]
        self.lines[index] = [_line(spectrum, fit) for fit in fits]

    def as_dict(self, shown: Sequence[int]) -> dict[str, Any]:
        """As a page has it; columns of which nothing is known are left out."""
        for index, values in self.log_values.items():
            if len(values) != len(self.ranks):
                reason = f"it is of another width than the latest, {self.width}"
                self.why.setdefault(index, {})["curve"] = reason
        known = {key: column for key, column in self.columns.items() if not all(map(isnan, column))}
        return {
            "name": self.name,
            "width": self.width,
            "count": self.count,
            "num_groups": self.num_groups,
            "reach": student(self.num_groups, REACH),
            "num_reports": self.num_reports,
            "num_failed": self.num_failed,
            "why": {str(index): reasons for index, reasons in self.why.items()},
            "ranks": self.ranks,
            # Where the width has changed only spectra of the last one go with the ranks.
            "log_values": [
                values if len(values := self.log_values.get(index, [])) == len(self.ranks) else [] for index in shown
            ],
            "lines": [self.lines.get(index, []) for index in shown],
            **known,
        }


def _line(spectrum: Spectrum, fit: Exponent) -> list[float]:
    """First rank, last rank, and log10 of the fitted line at both; empty where there is no fit.

    The least-squares line goes through the means of log rank and log value, with the exponent as its slope.
    """
    if fit.band is None or isnan(fit.value):
        return []
    low, high = fit.band
    ranks = np.arange(low, high + 1)
    middle = float(np.log10(spectrum.values.numpy()[low - 1 : high]).mean()), float(np.log10(ranks).mean())
    return [low, high, *(middle[0] - fit.value * (log10(end) - middle[1]) for end in (low, high))]


def _seconds(run: Run, steps: Sequence[int]) -> list[float]:
    """Training time at reports, each of which has a line in the history."""
    history = run.history
    known = np.isfinite(history.seconds)
    if not known.any():
        return [nan] * len(steps)
    return np.interp(steps, history.step[known], history.seconds[known]).tolist()


def _noise(run: Run, kind: str, steps: Sequence[int]) -> dict[str, list[float]]:
    """Noise scale of all measured parameters together, in samples, with its 80% interval, both from the same pairs."""
    found: list[NoiseScale] = [run.noise_scale(step, None, kind) for step in steps]
    fields = {"value": "between", "low": "low", "high": "high"}
    return {name: [getattr(one, field) for one in found] for name, field in fields.items()}
