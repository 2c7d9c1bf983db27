"""The runs that a forecast rests on: those of one family that reached the target, and why others do not serve."""

import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import fields
from math import isnan, log, nan
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from lightning_spectral.functional.arguments import describe
from lightning_spectral.functional.powerlaw import Band
from lightning_spectral.runs.arguments import check_path
from lightning_spectral.runs.bundled import bundled, is_bundled
from lightning_spectral.runs.finding import folders_of_runs
from lightning_spectral.runs.logs import Columns
from lightning_spectral.runs.noise_course import noise_series
from lightning_spectral.runs.run import Run
from lightning_spectral.runs.source import has_record
from lightning_spectral.runs.validation_data import ValidationData

KIND = "activation"


class Asked(NamedTuple):
    """Where references are said to be, and what is said of logs of other tools there."""

    pattern: str
    told: Columns


def asked_of(references: Any) -> list[Asked]:
    """What a user gives as references, a path, a pattern, a mapping of a ``path`` and of columns, or a list of these.

    Args:
        references: As given.

    Returns:
        Each by itself.

    Raises:
        ValueError: For anything else, and names that the package carries no runs of.
    """
    if isinstance(references, (str, os.PathLike, Mapping)):
        references = (references,)
    if not isinstance(references, (list, tuple)):
        raise ValueError(f"references must be a path, a pattern or a list of them, got {describe(references)}")
    names = [field.name for field in fields(Columns)]
    found = []
    for one in references:
        told = dict(one) if isinstance(one, Mapping) else {"path": one}
        unknown = [name for name in told if name not in ("path", *names)]
        if unknown or "path" not in told:
            wrong = f"got {describe(unknown[0])}" if unknown else f"got {describe(one)} without a path"
            raise ValueError(f"references must say path, and of logs {', '.join(names)}, {wrong}")
        path = told.pop("path")
        check_path("references", path)
        bundled(os.fspath(path))
        found.append(Asked(os.fspath(path), Columns(**told)))
    return found


class Reference(NamedTuple):
    """A run that reached the target."""

    run: Run
    tokens_to_target: float
    series: str
    """The measurement that fits; empty for a run that serves by its loss and batch alone."""
    gradients: str = ""
    """The measurement of gradients whose noise scale is of use; empty for none."""

    @property
    def data(self) -> ValidationData:
        """What the run was validated on."""
        return ValidationData.of(self.run.about)

    def is_near(self, data: ValidationData) -> bool:
        """Whether other data are nearly its own: sources of another Python, for a run that the package carries."""
        return is_bundled(self.run.path) and self.data.is_other(data)

    def is_unfit(self, data: ValidationData) -> bool:
        """Whether a run that was validated on some data does not compare with it."""
        return self.data.is_other(data) and not self.is_near(data)


class References(NamedTuple):
    """What was found where references were said to be."""

    usable: list[Reference]
    skipped: dict[str, str]
    """Why others do not serve, by path."""
    aside: tuple[Reference, ...] = ()
    """Those of others that would serve a run which was validated on their data."""

    @property
    def best(self) -> float:
        """Fewest tokens to the target; NaN without a reference."""
        return min((reference.tokens_to_target for reference in self.usable), default=nan)

    def for_data(self, data: ValidationData) -> "References":
        """Those for a run that was validated on some data, which says, and not most of them, what serves.

        Args:
            data: Of the run.

        Returns:
            With those aside that are of other data, and without those aside that are of this.
        """
        back = [one for one in self.aside if one.data.fingerprints == data.fingerprints]
        out = [one for one in self.usable if one.is_unfit(data)]
        usable = [one for one in self.usable if not one.is_unfit(data)] + back
        aside = [one for one in self.aside if one.data.fingerprints != data.fingerprints] + out
        theirs = {str(one.run.path): "of other validation data than this run" for one in aside if one.is_unfit(data)}
        returned = {str(one.run.path) for one in back}
        skipped = {path: reason for path, reason in self.skipped.items() if path not in returned}
        return References(usable, skipped | theirs, tuple(aside))

    def reasons(self) -> str:
        """The reasons, each with how often it holds.

        Returns:
            A clause; empty where all serve.
        """
        counts: dict[str, int] = {}
        for reason in self.skipped.values():
            counts[reason] = counts.get(reason, 0) + 1
        return "; ".join(f"{count} {reason}" for reason, count in counts.items())


class Wanted(NamedTuple):
    """What a run must have reached and measured to serve as a reference for another."""

    family: str
    target: float
    monitor: str
    """Key of the loss that the target is of."""

    layer: str
    settings: dict[str, Any]
    """Of the measurement: stage, normalisation, rows and whatever else must be the same."""
    needs_spectra: bool = True
    """Whether a run without such a measurement is of no use."""
    gradients: Mapping[str, Any] | None = None
    """Settings of the measurement of gradients that is to be like theirs; None where there is none."""

    def series_of(self, run: Run) -> tuple[str, str | None]:
        """The measurement of a run that serves.

        Args:
            run: The run.

        Returns:
            Its series, and None; or why there is none.
        """
        reason = f"that did not measure activations with stage={self.settings['stage']!r}"
        for series in run.all_series(KIND):
            there = run.settings(series)
            if there.get("stage") != self.settings["stage"]:
                continue
            unlike = [name for name, value in self.settings.items() if there.get(name) != value]
            if unlike:
                name = unlike[0]
                reason = f"measured with {name}={there.get(name)} and not {self.settings[name]}"
            elif not run.holds(series, self.layer):
                reason = f"that did not measure {self.layer}"
            else:
                return series, None
        return "", reason


def find_references(references: Any, wanted: Wanted, own_id: str | None = None) -> References:
    """The runs among those at some paths that a forecast can rest on.

    Args:
        references: Log directories, logs of other tools, glob patterns of them, ``"bundled:NAME"``, or mappings, see
            :func:`asked_of`. A pattern that matches nothing is no error: the first run of a family has no references.
        wanted: What they must have reached and measured.
        own_id: Of the run that is forecast, which is no reference for itself.

    Returns:
        Those, and why others are not.
    """
    usable: dict[str, Reference] = {}
    skipped: dict[str, str] = {}
    for pattern, told in asked_of(references):
        try:
            folders = bundled(pattern) or folders_of_runs(pattern)
        except OSError as error:
            folders, skipped[pattern] = [], f"that cannot be read ({error})"
        else:
            if not folders:
                skipped[pattern] = f"pattern that matches no run ({pattern})"
        for folder in folders:
            try:
                found = _judge(_open(folder, told, wanted), wanted, own_id, told.loss is not None)
            except Exception as error:  # whatever is wrong with somebody else's record
                found = f"that cannot be read ({str(error).partition(chr(10))[0]})"
            if isinstance(found, str):
                skipped[str(folder)] = found
            elif found is not None:
                before = usable.setdefault(found.run.id, found)
                usable[found.run.id] = max(before, found, key=lambda one: _last_step(one.run))
    data = [data for reference in usable.values() if (data := reference.run.about.get("validation_data"))]
    aside = []
    for run_id, reference in list(usable.items()):
        # Logs of other tools do not say.
        if reference.run.about.get("validation_data") not in (None, {}, max(data, key=data.count, default=None)):
            aside.append(usable.pop(run_id))
            skipped[str(reference.run.path)] = "of other validation data than most"
    return References(list(usable.values()), skipped, tuple(aside))


def _open(folder: Path, told: Columns, wanted: Wanted) -> Run:
    """A run; of a log, whose loss is the one that is monitored if it has that, and whose family is this one."""
    if has_record(folder):
        return Run(folder)
    # Who gives a log as a reference says that it is one.
    said = {"family": wanted.family} | told.given()
    if told.loss is None:
        with suppress(ValueError):
            return Run(folder, **said, loss=wanted.monitor)
    return Run(folder, **said)


def _judge(run: Run, wanted: Wanted, own_id: str | None, is_told: bool) -> Reference | str | None:
    """A reference, or why a run is none; None for the run that is forecast itself. Of a log, the loss may be told."""
    if run.id == own_id:
        return None
    if run.family != wanted.family:
        return f"of another family ({run.family}, not {wanted.family})"
    noted = _noted(run, wanted)
    recorded = run.about.get("val_loss") or run.history.loss_name
    if run.columns:
        if not np.isfinite(run.history.tokens).any():
            return "whose log does not say how many tokens its steps took: say batch_tokens"
        recorded = wanted.monitor if is_told else run.columns["loss"]
    if noted is None and recorded != wanted.monitor:
        return f"that recorded {recorded} and not {wanted.monitor}{': name its loss' if run.columns else ''}"
    # A forecaster that watched the very same loss knows; but of a run that began below it, neither does.
    tokens = run.tokens_to(wanted.target) if noted is None else noted
    if recorded == wanted.monitor and isnan(tokens):
        tokens = run.tokens_to(wanted.target)
    if isnan(tokens):
        return f"that never came down to {wanted.target:g}"
    series, reason = wanted.series_of(run)
    if reason and wanted.needs_spectra:
        return reason
    return Reference(run, tokens, series, noise_series(run, wanted.gradients))


def _noted(run: Run, wanted: Wanted) -> float | None:
    """Tokens to the target as a forecaster of that run saw them, NaN if it did not; None if there was none."""
    for facts in run.about.get("forecast", {}).values():
        if facts.get("monitor") == wanted.monitor and facts.get("target_loss") == wanted.target:
            return nan if facts.get("actual") is None else float(facts["actual"])
    return None


def longest_by_id(runs: Sequence[Run]) -> list[Run]:
    """Each run once: one that was resumed into another directory is there and here, and counts as it ended.

    Args:
        runs: Any runs.

    Returns:
        Of those with one id the one that came farthest.
    """
    found: dict[str, Run] = {}
    for run in runs:
        found[run.id] = max(found.get(run.id, run), run, key=_last_step)
    return list(found.values())


def _last_step(run: Run) -> float:
    return float(run.history.step[-1]) if len(run.history.step) else 0.0


def alpha_at(run: Run, series: str, layer: str, band: Band, tokens: float) -> float:
    """The exponent of a layer's tail at a number of training tokens.

    Args:
        run: The run.
        series: Of activations.
        layer: The layer.
        band: Of ranks.
        tokens: How many.

    Returns:
        Interpolated between the reports on both sides, by log tokens; NaN where there are none.
    """
    return run.course(series).exponent(layer, band, tokens)


def loss_at(run: Run, tokens: float) -> float:
    """The loss at a number of training tokens.

    Args:
        run: The run.
        tokens: How many.

    Returns:
        Interpolated between the entries on both sides, by log tokens; NaN where there are none.
    """
    entries, losses = run.history.with_loss()
    at = run.history.tokens[entries]
    at, losses = at[at > 0], losses[at > 0]  # before the first token there is no logarithm
    inside = len(at) and at[0] * (1 - 1e-12) <= tokens <= at[-1] * (1 + 1e-12)
    return float(np.interp(log(tokens), np.log(at), losses)) if inside else nan
