"""Runs sorted by family, and in a family by what they can serve for: finished, unfinished, or neither."""

from math import isnan
from typing import NamedTuple, cast

from lightning_spectral.functional.forecast import MIN_REFERENCES
from lightning_spectral.functional.powerlaw import Band, resolve_band
from lightning_spectral.runs.finding import RunPaths, open_runs
from lightning_spectral.runs.measured import bands_of, check_comparable, check_tokens_known, other_lengths, series_used
from lightning_spectral.runs.noise_course import GRADIENT, noise_series
from lightning_spectral.runs.reference_numbers import Look
from lightning_spectral.runs.references import KIND, Reference, longest_by_id
from lightning_spectral.runs.run import Run
from lightning_spectral.runs.settings import settings_of


class Family(NamedTuple):
    """The runs of one family, before a target."""

    name: str
    target: float
    finished: list[Run]
    """Those that came down to it."""
    unfinished: list[Run]
    """Those that are above it yet."""
    skipped: dict[str, str]
    """Those that can be neither, by path, and why."""
    without_spectra: dict[str, str]
    """Those that serve by loss and batch alone, and why."""

    @property
    def too_few(self) -> str | None:
        """Why there is no forecast; None if there are references enough."""
        num = len(self.finished)
        if num >= MIN_REFERENCES:
            return None
        reasons = "; ".join(dict.fromkeys(self.skipped.values()))
        others = f", besides {reasons}" if reasons else ""
        return f"it needs {MIN_REFERENCES} runs that came down to {self.target:g}, and has {num}{others}"

    def has_spectra(self, run: Run) -> bool:
        """Whether a run serves by its spectra as well."""
        return str(run.path) not in self.without_spectra


class Basis(NamedTuple):
    """What the forecasts of a family rest on."""

    runs: list[Run]
    tokens: list[float]
    """To the target."""
    batches: list[float]
    """Tokens of a batch; NaN where they are not known."""
    settings: list[int]
    spectral: list[bool]
    """Which of the runs have spectra of the layer."""
    layer: str
    """Empty where fewer than four have."""
    band: Band | None
    """None likewise."""
    series: tuple[str, ...]
    """Of runs with several series of activations, which is meant, and of runs that were validated unlike each other."""
    look: Look | None
    """At what of spectra is looked; None where fewer than four runs have any."""

    def references(self, like: Run) -> list[Reference]:
        """The runs as those that reached the target, with noise scales that were measured as those of some run."""
        each = zip(self.runs, self.tokens, self.spectral, strict=True)
        return [reference_of(run, tokens, has_spectra, like) for run, tokens, has_spectra in each]


def reference_of(run: Run, tokens: float, has_spectra: bool, like: Run) -> Reference:
    """A run as a reference, with noise scales that were measured as those of some run."""
    gradients = like.settings(GRADIENT) if like.steps(GRADIENT) else None
    return Reference(run, tokens, KIND if has_spectra else "", noise_series(run, gradients))


def families_of(paths: RunPaths, target: float, layer: str | None) -> list[Family]:
    """Open runs, and sort them; ValueError for a log that does not say how many tokens its steps took."""
    by_name: dict[str, list[Run]] = {}
    for run in longest_by_id(open_runs(paths, "runs")):
        check_tokens_known(run)
        by_name.setdefault(run.family, []).append(run)
    return [_sort(name, target, runs, layer) for name, runs in by_name.items()]


def _sort(name: str, target: float, runs: list[Run], layer: str | None) -> Family:
    family = Family(name, target, [], [], {}, {})
    for run in runs:
        _, losses = run.history.with_loss()
        if not isnan(run.tokens_to(target)):
            family.finished.append(run)
        elif not len(losses):
            family.skipped[str(run.path)] = "has no losses"
        elif losses.min() <= target:
            family.skipped[str(run.path)] = f"was below {target:g} from the first loss on"
        else:
            family.unfinished.append(run)
        if (why := _why_no_spectra(run, layer)) is not None:
            family.without_spectra[str(run.path)] = why
    return family


def _why_no_spectra(run: Run, layer: str | None) -> str | None:
    if run.columns:
        return f"is read from {run.columns['tool']}"
    if not run.steps(KIND):
        return "has no activation spectra"
    if layer is not None and not run.holds(KIND, layer):
        return f"did not measure {layer}"
    return None


def basis_of(family: Family, layer: str | None, tail: Band | None) -> Basis:
    """What forecasts of a family rest on.

    ValueError if runs do not compare, none measured the layer, or the tail reaches beyond the width.
    """
    every = [*family.finished, *family.unfinished]
    check_comparable(every, (KIND,))
    spectral = [family.has_spectra(run) for run in family.finished]
    measured = [run for run in every if family.has_spectra(run)]
    if layer is not None and not measured:
        known = list(dict.fromkeys(name for run in every if run.steps(KIND) for name in run.names(KIND)))
        there = f"there are {', '.join(known)}" if known else "none has activation spectra"
        raise ValueError(f"layer must be one that a run of {family.name} measured, got {layer!r}: {there}")
    band: Band | None = None
    look: Look | None = None
    if sum(spectral) < MIN_REFERENCES:
        layer = ""
    else:
        check_comparable(measured, (KIND,))
        first = measured[0]
        layer = layer or first.names(KIND)[-1]
        if tail is not None:
            resolve_band(tail, len(first.spectrum(KIND, layer, first.steps(KIND)[0]).values), "tail")
        bands = bands_of(first, KIND)
        band = bands["tail"] if tail is None else cast(Band, tuple(tail))  # a list cannot be looked up by
        look = Look(layer, band, bands["head"])
    return Basis(
        family.finished,
        [run.tokens_to(family.target) for run in family.finished],
        [float(run.about.get("batch_tokens") or float("nan")) for run in family.finished],
        settings_of(family.finished),
        spectral,
        layer,
        band,
        (*other_lengths(every), *series_used(measured, KIND)),
        look,
    )
