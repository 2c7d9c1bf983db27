"""Reading a run back from its record: its history, its spectra, and where it reached a loss."""

import glob
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import cached_property
from math import isnan, log, nan
from pathlib import Path
from typing import Any, NamedTuple

import torch

from lightning_spectral.functional.estimate import NO_GROUPS, Spectrum
from lightning_spectral.runs.arguments import check_path, check_paths
from lightning_spectral.runs.history import History
from lightning_spectral.runs.interpolation import between
from lightning_spectral.runs.kinds import KINDS, Series
from lightning_spectral.runs.noise import NoiseScale, names_of_gradients, read_noise
from lightning_spectral.runs.record import ABOUT, FOLDER, Report, read_about, reports
from lightning_spectral.runs.record_checks import tokens_of
from lightning_spectral.runs.safe_files import Arrays, open_arrays

_SAME = 1e-12
"""Token counts that differ by less, relatively, are one: a loss that was reached at a report."""


class Matched(NamedTuple):
    """A run where its loss first came down to a value; NaN where it never did."""

    run: "Run"
    loss: float
    step: float
    tokens: float
    seconds: float

    def spectrum(self, kind: str, name: str) -> Spectrum:
        """A spectrum there, see :meth:`Run.spectrum_at`.

        Args:
            kind: ``"activation"``, ``"gradient"``, ``"weight"``, or one series, such as ``"activation-train"``.
            name: Layer or parameter.

        Returns:
            Interpolated between the reports on both sides; NaN, with the reason, where there are none.

        Raises:
            ValueError: If the run has no spectrum of that kind and name.
        """
        return self.run.spectrum_at(kind, name, self.tokens)


class Run:
    """The record that one training run left behind.

    Args:
        path: The run's log directory, or the ``spectra`` folder in it.

    Raises:
        ValueError: If there is no record, or it is broken.

    Example::

        run = Run("lightning_logs/version_0")
        run.tokens_to(2.0)
        run.spectrum("activation", "gpt.blocks.3", step=600).exponent((0.125, 0.5))
    """

    def __init__(self, path: str | Path) -> None:
        check_path("path", path)
        folder = Path(path)
        # Unlike pathlib's, these answer no where a path is too long, or may not be looked at.
        self.folder = folder / FOLDER if os.path.isdir(folder / FOLDER) else folder
        """The record's own folder."""
        self.path = self.folder.parent if self.folder.name == FOLDER else self.folder
        """The log directory."""
        self.about = read_about(self.folder)
        """The description of the run: family, tags, series, batch, world size, versions."""
        self._tokens: dict[Path, float] = {}

    def __repr__(self) -> str:
        return f"Run({str(self.path)!r})"

    @property
    def id(self) -> str:
        """What tells it from other runs; a run that was resumed into another directory has one in both."""
        return str(self.about.get("id", self.folder.resolve()))

    @property
    def family(self) -> str:
        """Name that runs of one model and configuration share."""
        return str(self.about.get("family", ""))

    @property
    def tags(self) -> dict[str, Any]:
        """What the user said of the run."""
        return dict(self.about.get("tags", {}))

    @cached_property
    def history(self) -> History:
        """Steps, tokens, seconds and losses; one entry per step, ascending."""
        return History.read(self.folder)

    @cached_property
    def _reports(self) -> dict[str, dict[int, Report]]:
        found: dict[str, dict[int, Report]] = {}
        for report in reports(self.folder):
            found.setdefault(report.series, {})[report.step] = report
        return found

    @property
    def kinds(self) -> list[str]:
        """Kinds of spectra that were recorded."""
        return [kind for kind, row in KINDS.items() if row.values and self._find_series(kind) is not None]

    def series(self, kind: str) -> str:
        """The series that a kind means: of several the one on validation rows, which compare between steps and runs.

        Args:
            kind: A kind, or a series.

        Returns:
            The name of the series.

        Raises:
            ValueError: If the run has none.
        """
        series = self._find_series(kind)
        if series is None:
            known = ", ".join([*self.kinds, *self._reports]) or "nothing"
            raise ValueError(f"kind must be one that {self} has a report of, {known}, got {kind!r}")
        return series

    def all_series(self, kind: str) -> list[str]:
        """All series of a kind.

        Args:
            kind: The kind.

        Returns:
            Their names, sorted.
        """
        return sorted(name for name in self._reports if kind_of(name) == kind)

    def _find_series(self, kind: str) -> str | None:
        if kind in self._reports and kind_of(kind) in KINDS:
            return kind
        recorded_by = KINDS[kind].series if kind in KINDS else None
        found = [name for name in self.all_series(recorded_by) if self._holds(name, kind)] if recorded_by else []
        return min(found, key=lambda name: (self.settings(name).get("stage") != "validate", name), default=None)

    def _holds(self, series: str, kind: str) -> bool:
        """Whether a measurement records its own kind, or was asked for another beside it: ``weights``, for example."""
        return kind_of(series) == kind or bool(self.settings(series).get(f"{kind}s"))

    def settings(self, kind: str) -> dict[str, Any]:
        """How a kind was measured.

        Args:
            kind: A kind, or a series.

        Returns:
            Stage, layers or parameters, rows, bands and whatever else can be set.
        """
        series = kind if kind in self._reports else self._find_series(kind)
        return dict(self.about["series"].get(series, {}))

    def steps(self, kind: str) -> list[int]:
        """Steps at which a kind was reported.

        Args:
            kind: ``"activation"``, ``"gradient"``, ``"weight"``, or one series, such as ``"activation-train"``.

        Returns:
            Ascending; empty if there are none.
        """
        series = self._find_series(kind)
        return [] if series is None else sorted(self._reports[series])

    def names(self, kind: str) -> list[str]:
        """Layers or parameters of a kind.

        Args:
            kind: As for :meth:`steps`.

        Returns:
            In the model's order.

        Raises:
            ValueError: If there are no reports of that kind, or the latest holds none of its spectra.
        """
        path = self._path(kind, max(self._reports[self.series(kind)]))
        start = f"{kind_of(kind)}/"
        with _arrays(path) as arrays:
            keys = [key.removeprefix(start) for key in arrays if key.startswith(start)]
            found = list(dict.fromkeys(key.rpartition("/")[0] for key in keys))
            if not found:
                raise ValueError(f"it holds no spectrum of kind {kind_of(kind)}")
            return found

    def spectrum(self, kind: str, name: str, step: int) -> Spectrum:
        """One spectrum of one report.

        Args:
            kind: As for :meth:`steps`.
            name: Layer or parameter.
            step: One of :meth:`steps`.

        Returns:
            The spectrum; one without values where this report has none of a layer that joined the model later.

        Raises:
            ValueError: If it is not there, or the report's file is broken.
        """
        part, path = kind_of(kind), self._path(kind, step)
        start, row = f"{part}/{name}/", KINDS[part]
        with _arrays(path) as arrays:
            found = {key.removeprefix(start): arrays[key] for key in arrays if key.startswith(start)}
            where: dict[str, Any] = {"name": name, "step": step, "tokens": tokens_of(arrays["tokens"])}
            if row.values in found:
                return Spectrum.from_arrays(found, row.values, row.count, corrects_bias=row.corrects_bias, **where)
        if name in (names := self.names(kind)):
            return Spectrum.missing(f"the report at step {step} has no {name}", **where)
        raise ValueError(f"name must be one of {', '.join(names)} for {kind!r} in {self}, got {name!r}")

    def noise_scale(self, step: int, name: str | None = None, kind: str = "gradient") -> NoiseScale:
        """Noise scale of per-sample gradients in one report, with its 80% interval.

        Args:
            step: One of :meth:`steps`.
            name: Parameter; None for all that were measured, together.
            kind: ``"gradient"``, or one series, such as ``"gradient-train"``.

        Returns:
            Noise scale, interval and parts, in samples; NaN where they could not be measured.

        Raises:
            ValueError: If they are not there, or the report's file is broken.
        """
        if kind_of(kind) != "gradient":
            raise ValueError(f"kind must be 'gradient' or a series of it, got {kind!r}: others have no noise scale")
        with _arrays(self._path(kind, step)) as arrays:
            names = names_of_gradients(arrays)
            if name in names or (name is None and names):
                return read_noise(arrays, names if name is None else [name])
        raise ValueError(f"name must be one of {', '.join(names)} for {kind!r} in {self}, got {name!r}")

    def tokens_at(self, kind: str, step: int) -> float:
        """Training tokens at a report.

        Args:
            kind: As for :meth:`steps`.
            step: One of them.

        Returns:
            The count over all ranks.

        Raises:
            ValueError: If there is no such report, or its file is broken.
        """
        path = self._path(kind, step)
        if path not in self._tokens:
            with _arrays(path) as arrays:
                self._tokens[path] = tokens_of(arrays["tokens"])
        return self._tokens[path]

    def _path(self, kind: str, step: int) -> Path:
        found = self._reports[self.series(kind)]
        if step not in found:
            steps = sorted(found)
            shown = ", ".join(map(str, steps if len(steps) <= 8 else [*steps[:3], "...", *steps[-3:]]))
            raise ValueError(f"step must be one of {shown} for {kind!r} in {self}, got {step}")
        return found[step].path

    def spectrum_at(self, kind: str, name: str, tokens: float) -> Spectrum:
        """A spectrum at a number of training tokens.

        Args:
            kind: As for :meth:`steps`.
            name: Layer or parameter.
            tokens: How many.

        Returns:
            Values interpolated in their logarithms, by log tokens, between the reports on both sides; NaN, with the
            reason, where there are none. Eigenvectors are those of the nearer report.

        Raises:
            ValueError: If the run has no spectrum of that kind and name.
        """
        steps = sorted(self._reports[self.series(kind)])
        at = [self.tokens_at(kind, step) for step in steps]
        after = next((i for i, there in enumerate(at) if there >= tokens * (1 - _SAME)), None)
        if after is None or (after == 0 and at[0] > tokens * (1 + _SAME)):
            reason = "the loss was never reached" if isnan(tokens) else f"{tokens:,.0f} tokens lie outside its reports"
            last = self.spectrum(kind, name, steps[-1])
            missing = torch.full_like(last.values, nan)
            return replace(last, values=missing, leave_one_out=NO_GROUPS, step=nan, tokens=tokens, failure=reason)
        second = self.spectrum(kind, name, steps[after])
        if at[after] <= tokens * (1 + _SAME):
            return second
        first = self.spectrum(kind, name, steps[after - 1])
        start, end = at[after - 1], at[after]
        # Before the first token there is no logarithm.
        weight = log(tokens / start) / log(end / start) if start > 0 else tokens / end
        return between(first, second, weight, tokens)

    def tokens_to(self, loss: float) -> float:
        """Training tokens until the loss first came down to a value.

        Args:
            loss: The value, of the validation loss, or of the training loss in a run without validation.

        Returns:
            Interpolated between two entries of the history, log tokens against loss; NaN if it never came down to it,
            or was below it from the first entry on.
        """
        return self.at_loss(loss).tokens

    def at_loss(self, loss: float) -> Matched:
        """The run where its loss first came down to a value.

        Args:
            loss: The value, as for :meth:`tokens_to`.

        Returns:
            Step, tokens and seconds, interpolated, and spectra on demand; NaN where :meth:`tokens_to` is.
        """
        return Matched(self, loss, *self.history.first_at(loss))


def open_runs(paths: str | Path | Sequence[str | Path], name: str = "runs") -> list[Run]:
    """The runs that paths and glob patterns name.

    Args:
        paths: Log directories, ``spectra`` folders, or patterns of them.
        name: The argument's name, for the message.

    Returns:
        At least one, each once. Of a pattern, folders without a record are passed over.

    Raises:
        ValueError: If one names no run, or a record is broken.
    """
    check_paths(name, paths)
    patterns = list(paths) if isinstance(paths, (list, tuple)) else [paths]
    found: dict[Path, Run] = {}
    for pattern in map(str, patterns):
        runs = [Run(folder) for folder in folders_of_runs(pattern)]
        if not runs:
            raise ValueError(f"{name} must name runs with a record, got {pattern!r}: no folder with one matches")
        found |= {run.folder.resolve(): run for run in runs}
    if not found:
        raise ValueError(f"{name} must name at least one run, got {paths!r}: give a log directory")
    return list(found.values())


def folders_of_runs(pattern: str) -> list[Path]:
    """The folders that a path or a glob pattern names.

    Args:
        pattern: A log directory, a ``spectra`` folder, or a pattern of them. Each part is tried as it stands first,
            then with brackets taken for what they are, as Hydra writes them into folders, then as a pattern.

    Returns:
        A path as it is; of a pattern, those that hold a record.
    """
    if os.path.exists(pattern) or not any(sign in pattern for sign in "*?["):
        return [Path(pattern)]
    folders = [Path(Path(pattern).anchor)]
    for part in Path(pattern).relative_to(folders[0]).parts:
        folders = _inside(folders, part)
    return [folder for folder in folders if any(os.path.exists(folder / part / ABOUT) for part in (".", FOLDER))]


def _inside(folders: list[Path], part: str) -> list[Path]:
    """What a part of a path, or of a pattern, names in some folders."""
    literal = [folder / part for folder in folders if os.path.exists(folder / part)]
    if literal or not any(sign in part for sign in "*?["):
        return literal
    for way in (part.replace("[", "[[]"), part):
        found = sorted(str(folder / name) for folder in folders for name in glob.glob(way, root_dir=folder))
        if found:
            return [Path(name) for name in found]
    return []


def kind_of(name: str) -> str:
    """The kind that a kind, or a series, is of."""
    series = Series.parse(name)
    return name if series is None else series.kind


@contextmanager
def _arrays(path: Path) -> Iterator[Arrays]:
    """The arrays of a report; whatever is wrong with its file is told in one line."""
    try:
        with open_arrays(path) as arrays:
            yield arrays
    except Exception as error:
        reason = str(error).partition("\n")[0]
        raise ValueError(
            f"run has a broken record: {str(path)!r} cannot be read ({reason}): restore it or remove it"
        ) from error
