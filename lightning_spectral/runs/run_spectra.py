"""The spectra in a run's record: which series there are, which one a kind means, and spectra by step or by tokens."""

from bisect import bisect_left
from collections.abc import Collection
from dataclasses import replace
from functools import cached_property
from math import isnan, log, nan
from numbers import Real
from typing import Any

import torch

from lightning_spectral.functional.arguments import check_number, describe
from lightning_spectral.functional.estimate import NO_GROUPS, Spectrum
from lightning_spectral.runs.arguments import check_choice, check_fields, check_text
from lightning_spectral.runs.course import SAME, Course
from lightning_spectral.runs.interpolation import between
from lightning_spectral.runs.kinds import KINDS, Series
from lightning_spectral.runs.noise import NoiseScale
from lightning_spectral.runs.record import Report
from lightning_spectral.runs.report_files import ReportFiles
from lightning_spectral.runs.source import Source
from lightning_spectral.theory import Readout


class RunSpectra:
    """What :class:`lightning_spectral.Run` knows of spectra; none for a run that is read from a log."""

    about: dict[str, Any]

    def __init__(self, source: Source) -> None:
        self._source = source
        self._files = ReportFiles()
        self._courses: dict[str, Course] = {}
        self._meant: dict[str, str] = {}

    @cached_property
    def _reports(self) -> dict[str, dict[int, Report]]:
        found: dict[str, dict[int, Report]] = {}
        for report in self._source.reports():
            found.setdefault(report.series, {})[report.step] = report
        return found

    @property
    def kinds(self) -> list[str]:
        """Kinds of spectra that were recorded."""
        return [kind for kind, row in KINDS.items() if row.values and self._find_series(kind) is not None]

    def series(self, kind: str) -> str:
        """The series that a kind means.

        Of several the one on validation rows, which compare between steps and runs; of several of those, as a run that
        was resumed with other settings leaves them, the one with most reports, and of these the first. See :meth:`use`.

        Args:
            kind: A kind, or a series.

        Returns:
            The name of the series.

        Raises:
            ValueError: If the run has none.
        """
        series = self._find_series(kind)
        if series is None:
            raise self._unknown(kind)
        return series

    def _unknown(self, kind: str) -> ValueError:
        known = ", ".join([*self.kinds, *self._reports]) or "nothing"
        return ValueError(f"kind must be one that {self} has a report of, {known}, got {kind!r}")

    def all_series(self, kind: str) -> list[str]:
        """All series of a kind.

        Args:
            kind: The kind.

        Returns:
            Their names, sorted.
        """
        return sorted((name for name in self._reports if kind_of(name) == kind), key=_order)

    def series_beside(self, kind: str) -> list[str]:
        """The series of the same stage as the one that a kind means, that one first.

        Args:
            kind: The kind.

        Returns:
            Their names: several for a run with several measurements, or one that was resumed with other settings.
        """
        meant = self.series(kind)
        stage = self.settings(meant).get("stage")
        others = [name for name in self._candidates(kind) if self.settings(name).get("stage") == stage]
        return [meant, *(name for name in others if name != meant)]

    def use(self, kind: str, series: str) -> None:
        """From now on let a kind mean one of its series.

        Args:
            kind: The kind.
            series: One of :meth:`all_series`; for weights of those of gradients that hold them.

        Raises:
            ValueError: If the run has no such series of the kind.
        """
        check_text(kind=kind)
        if not (candidates := self._candidates(kind)):
            raise self._unknown(kind)
        check_choice("series", series, candidates)
        self._meant[kind] = series

    def span(self, series: str) -> str:
        """From which step to which there are reports of a series, in words."""
        steps = sorted(self._reports[self.series(series)])
        return f"step {steps[0]:,}" if len(steps) == 1 else f"steps {steps[0]:,} to {steps[-1]:,}"

    def _candidates(self, kind: str) -> list[str]:
        recorded_by = KINDS[kind].series if kind in KINDS else None
        return [name for name in self.all_series(recorded_by) if self._holds(name, kind)] if recorded_by else []

    def _find_series(self, kind: str) -> str | None:
        check_text(kind=kind)
        if kind in self._reports and kind_of(kind) in KINDS:
            return kind
        if kind in self._meant:
            return self._meant[kind]

        def preference(name: str) -> tuple[bool, int]:
            return self.settings(name).get("stage") != "validate", -len(self._reports[name])

        found = min(self._candidates(kind), key=preference, default=None)
        if found is not None:
            self._meant[kind] = found
        return found

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
        found = self._find_series(kind)
        series = kind if kind in self._reports else found
        return dict(self.about["series"].get(series, {}))

    def steps(self, kind: str, name: str | None = None) -> list[int]:
        """Steps at which a kind was reported.

        Args:
            kind: ``"activation"``, ``"gradient"``, ``"weight"``, or one series, such as ``"activation-train"``.
            name: Layer or parameter; None for any.

        Returns:
            Ascending; empty if there are none.
        """
        if name is not None:
            check_text(name=name)
        series = self._find_series(kind)
        steps = [] if series is None else sorted(self._reports[series])
        if series is None or name is None:
            return steps
        part, found = kind_of(kind), self._reports[series]
        return [step for step in steps if name in self._files.names(found[step], part)]

    def holds(self, kind: str, name: str) -> bool:
        """Whether a layer or parameter was reported.

        Args:
            kind: As for :meth:`steps`.
            name: Layer or parameter.

        Returns:
            False if no report holds it; the latest are looked at first, and mostly they do.
        """
        check_text(name=name)
        return any(name in self._names_at(kind, step) for step in reversed(self.steps(kind)))

    def names(self, kind: str) -> list[str]:
        """Layers or parameters of a kind.

        Args:
            kind: As for :meth:`steps`.

        Returns:
            In the model's order; those that only earlier reports hold follow.

        Raises:
            ValueError: If there are no reports of that kind, or the latest holds none of its spectra.
        """
        part, found = kind_of(kind), self._reports[self.series(kind)]
        each = (self._files.names(found[step], part) for step in sorted(found, reverse=True))
        names = list(dict.fromkeys(name for names in each for name in names))
        if not names:
            raise ValueError(f"{self} holds no spectrum of kind {part}")
        return names

    def _names_at(self, kind: str, step: int) -> Collection[str]:
        return self._files.names(self._report(kind, step), kind_of(kind))

    def spectrum(self, kind: str, name: str, step: int) -> Spectrum:
        """One spectrum of one report.

        Args:
            kind: As for :meth:`steps`.
            name: Layer or parameter.
            step: One of :meth:`steps`.

        Returns:
            The spectrum.

        Raises:
            ValueError: If it is not there, or the report's file is broken.
        """
        check_text(name=name)
        found = self._read(kind, step, (name,), ())
        if name not in found:
            known = ", ".join(self._names_at(kind, step))
            steps = self.steps(kind, name)
            where = f": it was reported from step {steps[0]} to {steps[-1]}" if steps else ""
            at = f" at step {step}" if steps else ""
            raise ValueError(f"name must be one of {known} for {kind!r} in {self}{at}, got {name!r}{where}")
        return found[name]

    def spectra(self, kind: str, step: int, without: Collection[str] = ()) -> dict[str, Spectrum]:
        """All spectra of one report, whose file is read once.

        Args:
            kind: As for :meth:`steps`.
            step: One of :meth:`steps`.
            without: Names of fields to leave unread, such as ``leave_one_out`` and ``vectors``.

        Returns:
            By layer or parameter, in the model's order.

        Raises:
            ValueError: If there is no such report, or its file is broken.
        """
        check_fields("without", without)
        return self._read(kind, step, None, without)

    def _read(
        self, kind: str, step: int, names: Collection[str] | None, without: Collection[str]
    ) -> dict[str, Spectrum]:
        return self._files.spectra(self._report(kind, step), kind_of(kind), names, without)

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
        if name is not None:
            check_text(name=name)
        found = self.noise_scales(step, kind)
        if name is None and found:
            return self._files.noise_of_all(self._report(kind, step))
        if name in found:
            return found[name]
        raise ValueError(f"name must be one of {', '.join(found)} for {kind!r} in {self}, got {name!r}")

    def noise_scales(self, step: int, kind: str = "gradient") -> dict[str, NoiseScale]:
        """Noise scale of each parameter of one report, whose file is read once; see :meth:`noise_scale`.

        Args:
            step: One of :meth:`steps`.
            kind: As for :meth:`noise_scale`.

        Returns:
            By parameter.

        Raises:
            ValueError: If there is no such report of gradients, or its file is broken.
        """
        if kind_of(kind) != "gradient":
            raise ValueError(f"kind must be 'gradient' or a series of it, got {kind!r}: others have no noise scale")
        return self._files.noise(self._report(kind, step))

    def readout(self, step: int, kind: str = "readout") -> Readout:
        """What the model's last layer could still take off the loss, by mode of its input, in one report.

        Args:
            step: One of ``steps("readout")``.
            kind: ``"readout"``, or one series, such as ``"readout-train"``.

        Returns:
            Eigenvalues, task power and loss, with :meth:`~lightning_spectral.theory.Readout.lower_bound`: the loss that
            training this layer alone is to reach, a diagnostic and no forecast.

        Raises:
            ValueError: If ``ActivationSpectrum(readout=...)`` made no such report, or its file is broken.
        """
        if kind_of(kind) != "readout":
            raise ValueError(f"kind must be 'readout' or a series of it, got {kind!r}: others have no readout")
        return self._files.readout(self._report(kind, step))

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
        return self._files.tokens(self._report(kind, step))

    def _report(self, kind: str, step: int) -> Report:
        found = self._reports[self.series(kind)]
        if not isinstance(step, Real) or step not in found:
            steps = sorted(found)
            shown = ", ".join(map(str, steps if len(steps) <= 8 else [*steps[:3], "...", *steps[-3:]]))
            raise ValueError(f"step must be one of {shown} for {kind!r} in {self}, got {describe(step)}")
        return found[step]

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
        check_text(name=name)
        found = self._spectra_at(kind, tokens, (name,), ())
        if name not in found:
            raise ValueError(f"name must be one of {', '.join(self.names(kind))} for {kind!r} in {self}, got {name!r}")
        return found[name]

    def spectra_at(self, kind: str, tokens: float, without: Collection[str] = ()) -> dict[str, Spectrum]:
        """All spectra at a number of training tokens, whose files are read once.

        Args:
            kind: As for :meth:`steps`.
            tokens: How many.
            without: As for :meth:`spectra`.

        Returns:
            By layer or parameter, each as :meth:`spectrum_at` has it; of those that are in the reports on either side,
            or, where there are none, in the last.

        Raises:
            ValueError: If the run has no spectra of that kind.
        """
        check_fields("without", without)
        return self._spectra_at(kind, tokens, None, without)

    def _spectra_at(
        self, kind: str, tokens: float, names: Collection[str] | None, without: Collection[str]
    ) -> dict[str, Spectrum]:
        check_number(tokens=tokens)
        tokens = float(tokens)
        steps = sorted(self._reports[self.series(kind)])
        after = bisect_left(steps, tokens * (1 - SAME), key=lambda step: self.tokens_at(kind, step))  # which grow
        here = self.tokens_at(kind, steps[after]) if after < len(steps) else nan
        found = {}
        if here <= tokens * (1 + SAME):
            found = self._read(kind, steps[after], names, without)
        elif 0 < after < len(steps):
            before = self.tokens_at(kind, steps[after - 1])
            first, second = (self._read(kind, step, names, without) for step in steps[after - 1 : after + 1])
            # Before the first token there is no logarithm.
            weight = log(tokens / before) / log(here / before) if before > 0 else tokens / here
            found = {name: between(first[name], second[name], weight, tokens) for name in second if name in first}
        reason = "the loss was never reached" if isnan(tokens) else f"{tokens:,.0f} tokens lie outside its reports"
        for name in self._expected(kind, steps[-1]) if names is None else names:
            if name not in found and (reported := self.steps(kind, name)):
                found |= {name: _nowhere(self._read(kind, reported[-1], (name,), without)[name], tokens, reason)}
        return found

    def _expected(self, kind: str, step: int) -> list[str]:
        """Names that a kind's reports hold, or some of them: those of one report, and those that were asked for."""
        settings = self.settings(kind)
        asked = [*settings.get("layers", ()), *settings.get("parameters", ())]
        return list(dict.fromkeys([*self._names_at(kind, step), *asked]))


def _nowhere(last: Spectrum, tokens: float, reason: str) -> Spectrum:
    """What stands for a spectrum where there is none: NaN, as many as in its last report."""
    missing = torch.full_like(last.values, nan)
    return replace(last, values=missing, leave_one_out=NO_GROUPS, step=nan, tokens=tokens, failure=reason)


def _order(series: str) -> tuple[str, str, int]:
    parsed = Series.parse(series)
    return (series, "", 0) if parsed is None else (parsed.kind, parsed.stage, parsed.number)


def kind_of(name: str) -> str:
    """The kind that a kind, or a series, is of."""
    check_text(kind=name)
    series = Series.parse(name)
    return name if series is None else series.kind
