"""Elements of a page that its parts have in common; texts are escaped here, whatever runs are called."""

from collections.abc import Iterable, Sequence
from html import escape
from typing import NamedTuple


class Cell(NamedTuple):
    """One cell of a table."""

    text: str
    mark: str = ""
    """``moved`` or ``bad``; see the style sheet."""
    title: str = ""
    """What a pointer that rests on it is told."""


def table(headings: Sequence[str], rows: Iterable[tuple[str, Sequence[Cell]]], key: str = "") -> str:
    """A table that scrolls by itself where the screen is narrow.

    Args:
        headings: The first is that of the names of rows.
        rows: Name, as HTML, and cells of each.
        key: Id of the element; empty for none.
    """
    head = "".join(f'<th scope="col">{escape(heading)}</th>' for heading in headings)
    lines = "".join(f'<tr><th scope="row">{name}</th>{"".join(map(_cell, cells))}</tr>' for name, cells in rows)
    start = f'<table id="{escape(key)}">' if key else "<table>"
    return f'<div class="scroll">{start}<thead><tr>{head}</tr></thead><tbody>{lines}</tbody></table></div>'


def _cell(cell: Cell) -> str:
    mark = f' class="{escape(cell.mark)}"' if cell.mark else ""
    title = f' title="{escape(cell.title)}"' if cell.title else ""
    return f"<td{mark}{title}>{escape(cell.text)}</td>"


def bullets(lines: Iterable[str], mark: str = "note") -> str:
    """A list of lines; nothing of none."""
    items = "".join(f"<li>{escape(line)}</li>" for line in lines)
    return f'<ul class="{mark}">{items}</ul>' if items else ""


def details(title: str, content: str) -> str:
    """What is shown when it is asked for."""
    return f"<details><summary>{escape(title)}</summary>{content}</details>"


DASHES = ("none", "7 3", "2 3")
"""Of lines whose colour another run has already."""

NUM_COLOURS = 6


def swatch(number: int) -> str:
    """The colour of a run, or of a side, by its number; as the script draws its lines."""
    colour, dashes = number % NUM_COLOURS, DASHES[min(number // NUM_COLOURS, len(DASHES) - 1)]
    return (
        '<svg class="swatch" viewBox="0 0 22 10" aria-hidden="true"><line x2="22" y1="5" y2="5" stroke-width="4" '
        f'stroke="var(--c{colour})" stroke-dasharray="{dashes}"/></svg>'
    )
