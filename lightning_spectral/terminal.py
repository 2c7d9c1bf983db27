"""Tables on the terminal: the one that closes a run, and what all have in common."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text
from typing_extensions import override

Columns = Mapping[str, Callable[[dict[str, float]], str]]
"""What stands under each heading, from the values of one name in one report."""

WEIGHT = ".weight"
"""What most names of parameters end in; on every line of a table it would fold them."""


def print_table(title: str, kind: str, columns: Columns, first: dict[str, Any], last: dict[str, Any]) -> None:
    """Print two reports, which may be the same one, a line each per name; ``kind`` is the heading of the names.

    A report is ``{"step": step, "rows": {name: {quantity: value}}}``.
    """
    table = new_table(title, [kind], ["step", *columns])
    shown = shortened(list(last["rows"]), table)
    reports = [first] if first["step"] == last["step"] else [first, last]
    for name in last["rows"]:
        for report in reports:
            # A name may have joined since the first report.
            cells = [cell(report["rows"].get(name, {})) for cell in columns.values()]
            table.add_row(shown[name] if report is reports[0] else "", str(report["step"]), *cells)
    console().print(table)


def shortened(names: Sequence[str], table: Table) -> dict[str, str]:
    """Each name as it stands in a table, whole unless all are weights: below the table stands what is left out."""
    if not names or any(not name.endswith(WEIGHT) or name == WEIGHT for name in names):
        return {name: name for name in names}
    table.caption = f"each name ends in {WEIGHT}, which is left out here"
    table.caption_justify = "left"
    return {name: name.removesuffix(WEIGHT) for name in names}


def print_advice(sentences: Iterable[tuple[str, str]]) -> None:
    """Print sentences on what moved, each above the address where that is explained; nothing if there are none.

    Args:
        sentences: Text and address of each.
    """
    said = list(sentences)
    if not said:
        return
    out = console()
    out.print("what moved beyond its floors, and what that usually means", style="italic")
    for text, url in said:
        grid = Table.grid(padding=(0, 1))
        grid.add_row("-", text)
        out.print(grid)
        out.print(f"  {url}", soft_wrap=True)  # broken, it could not be followed


def new_table(title: str, names: Sequence[str], numbers: Sequence[str]) -> Table:
    """A table without rows.

    The entries of ``names``, columns on the left, may be folded; those of ``numbers``, on the right, are shown whole.
    """
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, pad_edge=False, padding=(0, 1))
    for heading in names:
        table.add_column(heading, overflow="fold")
    for heading in numbers:
        table.add_column(heading, justify="right", no_wrap=True)
    return table


def console() -> Console:
    """Where tables go: a console as wide as the terminal.

    It has 120 columns for a log file, which has no width of its own, and where a number cut off says nothing. Names and
    paths are shown as they are: brackets in them are no markup, ``:x:`` is no picture; what would command the terminal
    is shown as an escape.
    """
    found = Console()
    return _Console(width=found.width if found.is_terminal else 120, highlight=False, markup=False, emoji=False)


class _Console(Console):
    @override
    def render_str(self, text: str, **kwargs: Any) -> Text:
        return super().render_str(visible(text), **kwargs)


def visible(text: str) -> str:
    """Text in which all but line breaks and what can be printed is written as Python would escape it."""
    if text.isprintable():
        return text
    return "".join(sign if sign.isprintable() or sign == "\n" else ascii(sign)[1:-1] for sign in text)


def one_line(message: str) -> str:
    """A message for one line of a terminal, whatever names and other people's errors it holds."""
    return visible(" ".join(line.strip() for line in message.splitlines() if line.strip()))


@dataclass(frozen=True)
class Column:
    """What stands in a column: no function, for callbacks that hold one go to other processes."""

    quantity: str
    digits: int
    has_error: bool = False

    def __call__(self, values: Mapping[str, float]) -> str:
        """The cell of one name in one report; a dash where the report has no such name."""
        parts = [self.quantity, f"{self.quantity}_stderr"] if self.has_error else [self.quantity]
        return " +/- ".join(show_number(values.get(part, math.nan), self.digits) for part in parts)


@dataclass(frozen=True)
class IntervalColumn:
    """A number with its 80% interval, ``{quantity}_low`` and ``{quantity}_high``."""

    quantity: str

    def __call__(self, values: Mapping[str, float]) -> str:
        """The cell of one name in one report; a dash where the report has no such name."""
        value, low, high = (values.get(f"{self.quantity}{end}", math.nan) for end in ("", "_low", "_high"))
        return show_interval(value, low, high)


def number(quantity: str, digits: int) -> Column:
    """A column of one quantity, with so many digits after the point."""
    return Column(quantity, digits)


def with_error(quantity: str, digits: int) -> Column:
    """A column of one quantity and its standard error, ``{quantity}_stderr``, with so many digits after the point."""
    return Column(quantity, digits, has_error=True)


def with_interval(quantity: str) -> IntervalColumn:
    """A column of one quantity and its interval."""
    return IntervalColumn(quantity)


def show_interval(value: float, low: float, high: float) -> str:
    """A number and its interval as they stand in a table: ``20 (9.1..44)``, whole from ten on.

    One without an upper end is ``20 (> 9.1)``, and one that holds all numbers says that they are ``not resolved``.
    """
    shown, start, end = (show_number(one, int(abs(one) < 9.95)) for one in (value, low, high))
    if math.isnan(low) or math.isnan(high):
        return shown
    if math.isinf(high):
        if low <= 0:
            return "not resolved"
        return f"> {start}" if math.isinf(value) else f"{shown} (> {start})"
    return f"{shown} ({start}..{end})"


def show_number(value: float, digits: int) -> str:
    """A number as it stands in a table: with commas, and so many digits after the point; a dash for NaN."""
    return "-" if math.isnan(value) else f"{value:,.{digits}f}"
