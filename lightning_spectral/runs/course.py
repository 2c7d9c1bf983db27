"""Numbers of a run's spectra at any number of tokens: each report is read once, as far as training is asked about."""

from bisect import bisect_left
from collections.abc import Callable, Hashable
from math import isnan, log, nan
from typing import TYPE_CHECKING

from lightning_spectral.functional.arguments import check_number
from lightning_spectral.functional.estimate import Spectrum
from lightning_spectral.functional.powerlaw import Band

if TYPE_CHECKING:
    from lightning_spectral.runs.run import Run

BASES = ("vectors", "leave_one_out_vectors")
"""Fields of eigenvectors, by far the largest part of a report."""
GROUPS = ("leave_one_out", "num_rows_without", *BASES)
"""Those and the fields that error bars are made of."""

SAME = 1e-12
"""Token counts that differ by less, relatively, are one: a loss that was reached at a report."""


class Course:
    """The reports of a series in the order of training, of which values are kept, and neither groups nor vectors.

    Args:
        run: The run.
        kind: A kind, or a series.
        keep: How many reports' spectra stay in memory, besides the numbers that were asked for; None for all.
    """

    def __init__(self, run: "Run", kind: str, keep: int | None = None) -> None:
        self._run, self._kind, self._keep = run, kind, keep
        self._steps = run.steps(kind)
        self._tokens: list[float] = []
        self._spectra: dict[int, dict[str, Spectrum]] = {}
        self._numbers: dict[Hashable, float] = {}

    def tokens_until(self, tokens: float) -> list[float]:
        """Tokens at the reports up to a number of them."""
        self._read_to(tokens)
        return [there for there in self._tokens if there <= tokens]

    def exponent(self, name: str, band: Band, tokens: float) -> float:
        """Exponent of a spectrum over a band, linear in log tokens between two reports; NaN outside them."""
        return self._between(name, tokens, band, lambda spectrum: spectrum.exponent(band).value)

    def why_unknown(self, name: str, band: Band, tokens: float) -> str | None:
        """Why a report next to a number of tokens gives no exponent; None if all do, or none is near."""
        self._read_to(tokens)
        after = bisect_left(self._tokens, tokens * (1 - SAME))
        for index in range(max(after - 1, 0), min(after + 1, len(self._tokens))):
            if index not in self._spectra:
                self._read(index)
            spectrum = self._spectra[index].get(name)
            exponent = None if spectrum is None else spectrum.exponent(band)
            if exponent is not None and isnan(exponent.value):
                return f"step {self._steps[index]:,}: {exponent.reason}"
        return None

    def rankme(self, name: str, tokens: float) -> float:
        """RankMe of a spectrum, likewise."""
        return self._between(name, tokens, "rankme", lambda spectrum: spectrum.rankme().value)

    def _between(self, name: str, tokens: float, what: Hashable, number: Callable[[Spectrum], float]) -> float:
        self._read_to(tokens)
        at = self._tokens
        after = bisect_left(at, tokens * (1 - SAME))
        if after == len(at) or (after == 0 and not at[0] <= tokens * (1 + SAME)):
            return nan
        second = self._number(after, name, what, number)
        if at[after] <= tokens * (1 + SAME):
            return second
        first = self._number(after - 1, name, what, number)
        if self._number(after - 1, name, "rows", _rows) != self._number(after, name, "rows", _rows):
            return nan
        before, here = at[after - 1], at[after]
        # Before the first token there is no logarithm.
        weight = log(tokens / before) / log(here / before) if before > 0 else tokens / here
        return first + weight * (second - first)

    def _number(self, index: int, name: str, what: Hashable, number: Callable[[Spectrum], float]) -> float:
        key = index, name, what
        if key not in self._numbers:
            if index not in self._spectra:
                self._read(index)
            spectrum = self._spectra[index].get(name)
            self._numbers[key] = nan if spectrum is None else number(spectrum)
        return self._numbers[key]

    def _read_to(self, tokens: float) -> None:
        check_number(tokens=tokens)
        while len(self._tokens) < len(self._steps) and not (self._tokens and self._tokens[-1] >= tokens):
            index = len(self._tokens)
            self._read(index)
            self._tokens.append(self._run.tokens_at(self._kind, self._steps[index]))

    def _read(self, index: int) -> None:
        self._spectra[index] = self._run.spectra(self._kind, self._steps[index], without=GROUPS)
        if self._keep is not None and len(self._spectra) > self._keep:
            del self._spectra[next(iter(self._spectra))]


def _rows(spectrum: Spectrum) -> float:
    """Tells spectra apart that have nothing between them: of other numbers of rows, or other widths."""
    return spectrum.count + len(spectrum.values) / 2**32
