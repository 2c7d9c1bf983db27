"""How a callback shows its reports: charts and a table, and of spectra histograms and a figure."""

from collections.abc import Mapping, Sequence
from math import isnan
from typing import Any

from torch import Tensor

from lightning_spectral.boards import Board, log10_histogram, spectrum_figure
from lightning_spectral.functional.estimate import Exponent, Spectrum
from lightning_spectral.runs.kinds import KINDS
from lightning_spectral.terminal import Columns, print_table

Fits = Mapping[str, tuple[Spectrum, Exponent]]
"""Spectra with the fit that is drawn, by name."""


class Display:
    """Shows a callback's reports, and remembers the first and the last for the table.

    Args:
        kind: First part of the keys.
        charts: Quantities in each chart, by its name.
        columns: Of the table.
        category: Heading of the charts.
    """

    def __init__(self, kind: str, charts: Mapping[str, Sequence[str]], columns: Columns, category: str) -> None:
        self.kind = kind
        self.charts = charts
        self.columns = columns
        self.category = category
        self._first: dict[str, Any] | None = None
        self._last: dict[str, Any] | None = None
        self._num_reports = 0

    def note(self, step: int, rows: dict[str, dict[str, float]]) -> None:
        """Remember the quantities of a report, by name, for the table."""
        self._last = {"step": step, "rows": rows}
        self._first = self._first or self._last
        self._num_reports += 1

    @property
    def reports(self) -> tuple[dict[str, Any], dict[str, Any]] | None:
        """What was noted first and last, ``{"step": step, "rows": {name: {quantity: value}}}``; None before any."""
        return None if self._first is None or self._last is None else (self._first, self._last)

    @property
    def is_milestone(self) -> bool:
        """Whether the latest report is the 1st, 2nd, 4th, 8th, ...: a figure costs more than the report it shows."""
        return self._num_reports & (self._num_reports - 1) == 0

    def draw(self, boards: Sequence[Board], prefix: str, step: int, fits: Fits) -> None:
        """Write a histogram of each spectrum, and the charts of what was noted, once."""
        start = f"{prefix}{self.kind}"
        kind = KINDS[self.kind]
        for name, (spectrum, _) in fits.items():
            histogram = log10_histogram(spectrum.values, *kind.edges)
            if histogram is not None:
                for board in boards:
                    board.histogram(f"{start}/{name}/log10_{kind.values}", histogram, step)
        names = [] if self._last is None else self._last["rows"]
        charts = {
            f"{start}/{title}": [f"{start}/{name}/{quantity}" for name in names for quantity in quantities]
            for title, quantities in self.charts.items()
        }
        for board in boards:
            board.charts(self.category, charts)

    def draw_figure(
        self,
        boards: Sequence[Board],
        prefix: str,
        step: int,
        title: str,
        fits: Fits,
        shares: Mapping[str, Tensor] | None = None,
    ) -> None:
        """Write the log-log figure, with cumulative shares beside, and values by rank; nothing without a spectrum."""
        known = {name: fit for name, fit in fits.items() if len(fit[0].values) and fit[0].values.isfinite().all()}
        if not known:
            return
        start = f"{prefix}{self.kind}"
        if any("figure" in board.takes for board in boards):
            spectra = {name: spectrum.values for name, (spectrum, _) in known.items()}
            drawn = {
                name: (fit.band, fit.value) for name, (_, fit) in known.items() if fit.band and not isnan(fit.value)
            }
            figure = spectrum_figure(title, spectra, drawn, KINDS[self.kind].value, shares)
            for board in boards:
                board.figure(f"{start}/spectra", figure, step)
        if any("table" in board.takes for board in boards):
            cells = [
                (name, rank, value)
                for name, (spectrum, _) in known.items()
                for rank, value in enumerate(spectrum.values.tolist(), start=1)
            ]
            names, ranks, values = zip(*cells, strict=True)
            for board in boards:
                board.table(f"{start}/values", {"name": names, "rank": ranks, "value": values}, step)

    def print(self, title: str) -> None:
        """Print the first report and the last as a table, if there was one."""
        if self._first is not None and self._last is not None:
            print_table(title, KINDS[self.kind].noun, self.columns, self._first, self._last)

    def state(self) -> dict[str, Any]:
        """What the table of a resumed run needs: plain numbers and strings."""
        return {"first": self._first, "last": self._last, "num_reports": self._num_reports}

    def restore(self, state: dict[str, Any]) -> None:
        """Take up what :meth:`state` gave, or begin anew with an empty one."""
        self._first, self._last = state.get("first"), state.get("last")
        self._num_reports = state.get("num_reports", 0)
