"""The table that closes a run: the first report of each layer or parameter and the last."""

import math
from collections.abc import Callable, Mapping
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

Columns = Mapping[str, Callable[[dict[str, float]], str]]
"""What stands under each heading, from the values of one name in one report."""


def print_table(title: str, kind: str, columns: Columns, first: dict[str, Any], last: dict[str, Any]) -> None:
    """Print two reports, a line each per name.

    Args:
        title: Above the table.
        kind: Heading of the names.
        columns: The other columns.
        first: ``{"step": step, "rows": {name: {quantity: value}}}``.
        last: Likewise; may be the same report.
    """
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, pad_edge=False, padding=(0, 1))
    table.add_column(kind, overflow="fold")
    for heading in ("step", *columns):
        table.add_column(heading, justify="right", no_wrap=True)
    reports = [first] if first["step"] == last["step"] else [first, last]
    for name in last["rows"]:
        for report in reports:
            cells = [cell(report["rows"][name]) for cell in columns.values()]
            # A weight is what most parameters are; the word would fold the line.
            shown = name.removesuffix(".weight") if report is reports[0] else ""
            table.add_row(shown, str(report["step"]), *cells)
    console = Console()
    # A log file has no width of its own, and a number cut off says nothing.
    Console(width=console.width if console.is_terminal else 120).print(table)


def number(quantity: str, digits: int) -> Callable[[dict[str, float]], str]:
    """A column of one quantity.

    Args:
        quantity: Its name.
        digits: After the point.

    Returns:
        What makes a cell.
    """
    return lambda values: _format(values[quantity], digits)


def with_error(quantity: str, digits: int) -> Callable[[dict[str, float]], str]:
    """A column of one quantity and its standard error.

    Args:
        quantity: Its name; the error's is ``{quantity}_stderr``.
        digits: After the point.

    Returns:
        What makes a cell.
    """
    return lambda values: f"{_format(values[quantity], digits)} +/- {_format(values[f'{quantity}_stderr'], digits)}"


def _format(value: float, digits: int) -> str:
    return "-" if math.isnan(value) else f"{value:,.{digits}f}"
