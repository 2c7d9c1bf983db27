"""The table that closes a run: each layer's first report and its last."""

import math
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

COLUMNS = ("layer", "step", "alpha_tail", "corrected", "r2", "alpha_head", "RankMe", "tokens")


def print_table(title: str, first: dict[str, Any], last: dict[str, Any]) -> None:
    """Print two reports, a line each per layer.

    Args:
        title: Above the table.
        first: ``{"step": step, "layers": {layer: {quantity: value}}}``.
        last: Likewise; may be the same report.
    """
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, pad_edge=False, padding=(0, 1))
    table.add_column("layer", overflow="fold")
    for column in COLUMNS[1:]:
        table.add_column(column, justify="right", no_wrap=True)
    reports = [first] if first["step"] == last["step"] else [first, last]
    for name in last["layers"]:
        for report in reports:
            table.add_row(*_cells(name if report is reports[0] else "", report["step"], report["layers"][name]))
    console = Console()
    # A log file has no width of its own, and a number cut off says nothing.
    Console(width=console.width if console.is_terminal else 120).print(table)


def _cells(name: str, step: int, values: dict[str, float]) -> list[str]:
    return [
        name,
        str(step),
        f"{_number(values['alpha_tail'], 3)} +/- {_number(values['alpha_tail_stderr'], 3)}",
        _number(values["alpha_tail_corrected"], 3),
        _number(values["r2_tail"], 3),
        _number(values["alpha_head"], 3),
        _number(values["rankme"], 1),
        f"{values['num_tokens']:,.0f}",
    ]


def _number(value: float, digits: int) -> str:
    return "-" if math.isnan(value) else f"{value:.{digits}f}"
