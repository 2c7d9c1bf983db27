"""One set of sections to the terminal and to a report in Markdown."""

from collections.abc import Sequence
from pathlib import Path

from rich.box import SIMPLE_HEAD
from rich.table import Table

from benchmarks.harness import console

Rows = Sequence[dict[str, str]]
"""Lines of a table, all with the same keys, the columns."""


def show_and_write(sections: Sequence[tuple[str, str | Rows]], picture: str, path: Path) -> None:
    """Print sections, and write them as Markdown, the figure below the first.

    Args:
        sections: Headings, each with a paragraph or a table.
        picture: Markdown of the figure.
        path: Where to.
    """
    lines: list[str] = []
    for number, (title, content) in enumerate(sections):
        lines += [f"{'#' if number == 0 else '##'} {title}", ""]
        if isinstance(content, str):
            console.print(content, highlight=False)
            lines += [content, ""]
        elif content:
            columns = list(content[0])
            table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
            for column in columns:
                table.add_column(column, no_wrap=column == columns[0])
            lines += ["| " + " | ".join(columns) + " |", "|" + " --- |" * len(columns)]
            for row in content:
                table.add_row(*row.values())
                lines.append("| " + " | ".join(row.values()) + " |")
            console.print(table)
            lines.append("")
        if number == 0:
            lines += [picture, ""]
    path.write_text("\n".join(lines).rstrip() + "\n")
