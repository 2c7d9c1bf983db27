"""The interface through which a callback shows a report, whatever the logger is."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

from lightning_spectral.boards.histogram import Histogram

if TYPE_CHECKING:  # matplotlib takes a while to import, and a run without figures never needs it
    from matplotlib.figure import Figure

METHODS = ("histogram", "figure", "table", "charts", "artifact")


class Margin(NamedTuple):
    """The tags of a chart of one scalar within its interval."""

    value: str
    low: str
    high: str


class Board:
    """Where one logger shows things; it passes over what its subclass does not override."""

    logger_class: ClassVar[str] = ""
    """Name of the Lightning logger: known by its name, its library need not be imported or installed."""

    takes: ClassVar[frozenset[str]] = frozenset()
    """Names of the methods that do something, so that nobody draws a figure which no board takes."""

    def __init_subclass__(cls) -> None:
        cls.takes = frozenset(name for name in METHODS if getattr(cls, name) is not getattr(Board, name))

    def __init__(self, logger: Any) -> None:
        self.logger = logger

    @classmethod
    def serves(cls, logger: Any) -> bool:
        """Whether this is the board of such a logger: the one it is named after, or a subclass of it."""
        return any(kind.__name__ == cls.logger_class for kind in type(logger).__mro__)

    def histogram(self, tag: str, histogram: Histogram, step: int) -> None:
        """Show a histogram, on the same edges at every global step. Slashes part a tag."""

    def figure(self, tag: str, figure: "Figure", step: int) -> None:
        """Show a figure that belongs to no pyplot state."""

    def table(self, tag: str, columns: Mapping[str, Sequence[float | str]], step: int) -> None:
        """Keep a table: by heading, equally many Python numbers or strings."""

    def charts(self, category: str, charts: Mapping[str, Sequence[str]]) -> None:
        """Lay out charts of scalars, given by exact tags: lines, or a margin; what is there is not written again."""

    def artifact(self, folder: Path, name: str) -> None:
        """Keep a copy of all files below a folder; its name is of letters, digits, dots, dashes and underscores."""
