"""How a callback shows its reports: charts and a table, and of spectra histograms and a figure."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import isnan
from typing import Any

from torch import Tensor

from lightning_spectral import tensorboard
from lightning_spectral.functional.powerlaw import Band, resolve_band
from lightning_spectral.terminal import Columns, print_table


@dataclass(frozen=True)
class Line:
    """One spectrum and the stretch of it that was fitted."""

    values: Tensor
    """``(n,)`` descending, on the CPU."""
    band: tuple[int, int]
    """First and last rank of the fit, 1-based."""
    exponent: float
    """NaN for none."""

    @classmethod
    def of(cls, values: Tensor, band: Band, exponent: float) -> "Line":
        """A spectrum with the band that was asked for.

        Args:
            values: ``(n,)`` descending.
            band: Two ranks or two fractions.
            exponent: Of that band; NaN for none.

        Returns:
            The line.
        """
        return cls(values, (1, 1) if isnan(exponent) else resolve_band(band, len(values)), exponent)


class ReportDisplay:
    """Shows a callback's reports, and remembers the first and the last for the table.

    Args:
        kind: First part of the keys.
        noun: What the numbers belong to, ``"layer"`` for example: heading of the table.
        category: Heading of the charts.
        charts: Quantities in each chart, by its name.
        columns: Of the table.
    """

    def __init__(
        self, kind: str, noun: str, category: str, charts: Mapping[str, Sequence[str]], columns: Columns
    ) -> None:
        self.kind = kind
        self.noun = noun
        self.category = category
        self.charts = charts
        self.columns = columns
        self._first: dict[str, Any] | None = None
        self._last: dict[str, Any] | None = None
        self._num_reports = 0

    def note(self, step: int, rows: dict[str, dict[str, float]]) -> None:
        """Remember a report for the table.

        Args:
            step: Its step.
            rows: Values of each quantity by name.
        """
        self._last = {"step": step, "rows": rows}
        self._first = self._first or self._last
        self._num_reports += 1

    @property
    def is_milestone(self) -> bool:
        """Whether the latest report is the 1st, 2nd, 4th, 8th, ...: a figure costs more than the report it shows."""
        return self._num_reports & (self._num_reports - 1) == 0

    def draw(self, writer: Any, prefix: str, step: int, lines: Mapping[str, Line]) -> None:
        """Write the charts of what was noted, once.

        Args:
            writer: A SummaryWriter.
            prefix: Put before every tag.
            step: The report's step.
            lines: Spectra by name, for a display that shows them.
        """
        names = [] if self._last is None else self._last["rows"]
        charts = {
            f"{prefix}{self.kind}/{title}": [
                f"{prefix}{self.kind}/{name}/{quantity}" for name in names for quantity in quantities
            ]
            for title, quantities in self.charts.items()
        }
        tensorboard.add_charts(writer, self.category, charts)

    def draw_figure(self, writer: Any, prefix: str, step: int, title: str, lines: Mapping[str, Line]) -> None:
        """Write a figure, for a display that has one.

        Args:
            writer: A SummaryWriter.
            prefix: Put before the tag.
            step: The report's step.
            title: Above the axes.
            lines: Spectra by name.
        """

    def print(self, title: str) -> None:
        """Print the first report and the last as a table, if there was one.

        Args:
            title: Above it.
        """
        if self._first is not None and self._last is not None:
            print_table(title, self.noun, self.columns, self._first, self._last)

    def state(self) -> dict[str, Any]:
        """What the table of a resumed run needs.

        Returns:
            Plain numbers and strings.
        """
        return {"first": self._first, "last": self._last, "num_reports": self._num_reports}

    def restore(self, state: dict[str, Any]) -> None:
        """Take up what :meth:`state` gave.

        Args:
            state: Its result, or an empty one to begin anew.
        """
        self._first, self._last = state.get("first"), state.get("last")
        self._num_reports = state.get("num_reports", 0)


class SpectrumDisplay(ReportDisplay):
    """Shows spectra themselves, too: a histogram of each, and all in one figure.

    Args:
        kind: First part of the keys.
        noun: What a spectrum belongs to, ``"layer"`` for example: heading of the table.
        values: What a spectrum consists of, ``"eigenvalue"`` for example.
        edges: Bin edges of the log10 histograms.
        charts: Quantities with a chart each.
        columns: Of the table.
    """

    def __init__(
        self, kind: str, noun: str, values: str, edges: Sequence[float], charts: Sequence[str], columns: Columns
    ) -> None:
        super().__init__(kind, noun, f"{kind} spectra", {quantity: [quantity] for quantity in charts}, columns)
        self.values = values
        self.edges = edges

    def draw(self, writer: Any, prefix: str, step: int, lines: Mapping[str, Line]) -> None:
        """Write histograms, and the charts once.

        Args:
            writer: A SummaryWriter.
            prefix: Put before every tag.
            step: The report's step.
            lines: Spectra by name.
        """
        values = f"log10_{self.values.replace(' ', '_')}s"
        for name, line in lines.items():
            tensorboard.add_log10_histogram(
                writer, f"{prefix}{self.kind}/{name}/{values}", line.values, step, self.edges
            )
        super().draw(writer, prefix, step, lines)

    def draw_figure(self, writer: Any, prefix: str, step: int, title: str, lines: Mapping[str, Line]) -> None:
        """Write the log-log figure.

        Args:
            writer: A SummaryWriter.
            prefix: Put before the tag.
            step: The report's step.
            title: Above the axes.
            lines: Spectra by name; nothing is drawn without one.
        """
        spectra = {
            name: line.values for name, line in lines.items() if len(line.values) and line.values.isfinite().all()
        }
        if not spectra:
            return
        fits = {name: (lines[name].band, lines[name].exponent) for name in spectra if not isnan(lines[name].exponent)}
        figure = tensorboard.spectrum_figure(title, spectra, fits, self.values)
        writer.add_figure(f"{prefix}{self.kind}/spectra", figure, global_step=step)
