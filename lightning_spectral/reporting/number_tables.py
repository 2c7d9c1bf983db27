"""Tables of a page: the reports of each series that a terminal would show, and why numbers are not known."""

from collections.abc import Iterator, Mapping, Sequence
from html import escape
from math import isnan, nan
from typing import Any

from lightning_spectral.reporting.elements import Cell, bullets, details, table
from lightning_spectral.reporting.words import short
from lightning_spectral.runs.spread import spread
from lightning_spectral.terminal import show_number

COLUMNS = (
    ("tail exponent", "alpha_tail", 3),
    ("head exponent", "alpha_head", 3),
    ("RankMe", "rankme", 1),
    ("overlap", "overlap", 3),
    ("its floor", "overlap_floor", 3),
    ("JS", "js", 5),
    ("its floor", "js_floor", 5),
)

NOTE = (
    "The first report, the last and some between. The numbers of every report are in this page's source, as JSON, in "
    "the element <code>#data</code>."
)


def tables(runs: Sequence[Mapping[str, Any]]) -> str:
    """Numbers for readers and programs, of each series of each run; nothing without any."""
    parts = [
        details(key if len(runs) == 1 else f"{run['label']}: {key}", _table(series) + bullets(reasons(series)))
        for run in runs
        for key, series in run["series"].items()
    ]
    if not parts:
        return ""
    return (
        f'<section aria-labelledby="tables-title"><h2 id="tables-title">Numbers</h2><p class="note">{NOTE}</p>'
        f"{''.join(parts)}</section>"
    )


def _table(series: Mapping[str, Any]) -> str:
    known = [column for column in COLUMNS if any(column[1] in held for held in series["names"])]
    headings = [series["noun"], "step", "tokens", *(name for name, _, _ in known)]
    rows = [
        (escape(held["name"]), _cells(series, held, index, known))
        for held in series["names"]
        for index in spread(series["shown"])
    ]
    return table(headings, rows)


def _cells(
    series: Mapping[str, Any], held: Mapping[str, Any], index: int, known: Sequence[tuple[str, str, int]]
) -> list[Cell]:
    cells = [Cell(f"{series['step'][index]:,}"), Cell(short(series["tokens"][index]))]
    for _, quantity, digits in known:
        value, error = (held[key][index] if key in held else nan for key in (quantity, f"{quantity}_stderr"))
        cells.append(Cell(show_number(value, digits) + ("" if isnan(error) else f" ± {error:.{digits}f}")))
    return cells


def reasons(series: Mapping[str, Any]) -> Iterator[str]:
    """Why numbers are not known, a line for each cause of a layer or parameter."""
    for held in series["names"]:
        steps: dict[tuple[str, str], list[int]] = {}
        for index, why in held["why"].items():
            for quantity, reason in why.items():
                steps.setdefault((quantity, reason), []).append(series["step"][int(index)])
        for (quantity, reason), at in steps.items():
            what = "spectrum" if quantity == "all" else quantity
            shown = ", ".join(map(str, spread(at))) + (f" ({len(at)} reports)" if len(at) > len(spread(at)) else "")
            yield f"no {what} of {held['name']} at step {shown}: {reason}"
