"""The first screen of a page: what runs are, the verdict, cards or a table of runs, and what moved."""

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from lightning_spectral.reporting.elements import Cell, swatch, table
from lightning_spectral.reporting.verdict import verdict

SIDES = ("base", "variant")


def subtitle(runs: Sequence[Mapping[str, Any]], groups: Sequence[str]) -> str:
    """What a run is, or which are the sides, or how many there are.

    Args:
        runs: What a page holds of each.
        groups: The arguments that named them.
    """
    if runs[0]["side"] is not None:
        counts = [sum(run["side"] == side for run in runs) for side in range(len(SIDES))]
        sides = "".join(
            f"<div>{swatch(side)}<dt>{name}</dt><dd>{escape(groups[side])} "
            f"({counts[side]} {'run' if counts[side] == 1 else 'runs'})</dd></div>"
            for side, name in enumerate(SIDES)
        )
        return f'<dl class="facts">{sides}</dl>'
    if len(runs) > 1:
        return f'<p class="note">{len(runs)} runs, each with one colour on the whole page.</p>'
    facts = "".join(f"<div><dt>{escape(key)}</dt><dd>{escape(value)}</dd></div>" for key, value in runs[0]["facts"])
    return f'<dl class="facts">{facts}</dl>'


def top(runs: Sequence[Mapping[str, Any]], comparison: Mapping[str, Any] | None) -> str:
    """The verdict if there are two sides, cards of one run or a line for each of several, and what moved."""
    parts = [] if comparison is None else [verdict(comparison)]
    parts.append(cards(runs[0]["cards"]) if len(runs) == 1 else overview(runs))
    parts.append(advice(runs))
    return "\n".join(parts)


def cards(found: Sequence[Mapping[str, str]]) -> str:
    """The cards of one run."""
    items = "".join(
        f'<li class="{escape(card["mark"])}"><div class="name">{escape(card["title"])}</div>'
        f'<div class="value">{escape(card["value"])} <span class="unit">{escape(card["unit"])}</span></div>'
        f'<div class="detail">{escape(card["detail"])}</div></li>'
        for card in found
    )
    return f'<ul class="cards" aria-label="The run at a glance">{items}</ul>'


def overview(runs: Sequence[Mapping[str, Any]]) -> str:
    """A line for each run, with what its cards would say."""
    titles = list(dict.fromkeys(card["title"] for run in runs for card in run["cards"]))
    rows = [_overview_row(index, run, titles) for index, run in enumerate(runs)]
    note = "The runs at a glance. What moved beyond its floor since the first report is bold and green."
    return f'<p class="note">{note}</p>{table(["", "tokens", *titles], rows, "overview")}'


def _overview_row(index: int, run: Mapping[str, Any], titles: Sequence[str]) -> tuple[str, list[Cell]]:
    side = run["side"]
    name = f"{swatch(index if side is None else side)}{escape(run['label'])}"
    found = {card["title"]: card for card in run["cards"]}
    cells = [Cell(dict(run["facts"]).get("tokens", "-"))]
    for title in titles:
        card = found.get(title)
        known = Cell("-") if card is None else Cell(f"{card['value']} {card['unit']}", card["mark"], card["detail"])
        cells.append(known)
    return f"{name} ({SIDES[side]})" if side is not None else name, cells


def advice(runs: Sequence[Mapping[str, Any]]) -> str:
    """What moved and what that usually means, as the runs themselves left it."""
    items = []
    for run in runs:
        start = "" if len(runs) == 1 else f"{escape(run['label'])}: "
        for one in run["advice"]:
            link = f' <a href="{escape(one["url"])}">what it means</a>' if one["url"] else ""
            items.append(f"<li>{start}{escape(one['text'])}.{link}</li>")
    if not items:
        return ""
    return f'<div class="advice"><h2>What moved beyond its floor</h2><ul>{"".join(items)}</ul></div>'
