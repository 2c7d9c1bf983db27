"""A run under way in a terminal: what comes first of it, and each layer's numbers beside those of earlier reports."""

import time
from collections.abc import Mapping, Sequence
from math import isfinite, isnan
from pathlib import Path

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from lightning_spectral.advice.facts import Number
from lightning_spectral.functional.estimate import Spectrum
from lightning_spectral.functional.powerlaw import Band
from lightning_spectral.reporting.cards import Card, cards
from lightning_spectral.reporting.choices import shortened
from lightning_spectral.reporting.drift import drift
from lightning_spectral.reporting.headline import Change, headline, mean_change, rankme_share, tail_of
from lightning_spectral.reporting.newest import written_at
from lightning_spectral.reporting.words import duration, share, short
from lightning_spectral.runs import Run
from lightning_spectral.runs.kinds import KINDS
from lightning_spectral.runs.measured import bands_of
from lightning_spectral.terminal import new_table, show_number, visible

STYLES = {"moved": "bold green", "bad": "bold red"}


class Failures:
    """Counts spectra that could not be had, reading each report once."""

    def __init__(self) -> None:
        self._seen: dict[tuple[Path, str, int], tuple[int, int, str]] = {}

    def count(self, run: Run) -> tuple[int, int, str]:
        """Of a run so far: failed, of how many, and why the latest."""
        found = []
        for kind in run.kinds:
            for step in run.steps(kind):
                key = run.folder, kind, step
                if key not in self._seen:
                    spectra = run.spectra(kind, step, without=_ALL_BUT_VALUES)
                    failed = [one for one in spectra.values() if one.failure is not None]
                    why = f"{failed[-1].name}: {failed[-1].failure}" if failed else ""
                    self._seen[key] = len(failed), len(spectra), why
                found.append((step, self._seen[key]))
        counts = [one for _, one in sorted(found, key=lambda pair: pair[0])]
        reasons = [why for _, _, why in counts if why]
        return sum(one[0] for one in counts), sum(one[1] for one in counts), reasons[-1] if reasons else ""


_ALL_BUT_VALUES = ("leave_one_out", "num_rows_without", "vectors", "leave_one_out_vectors")


def summary(run: Run, failures: Failures, now: float | None = None) -> RenderableType:
    """What there is to say of a run as it stands.

    Args:
        run: Opened anew, so that it has what was written last.
        failures: Those counted so far.
        now: Seconds since the epoch; None for this moment.
    """
    found = headline(run)
    loss = found.loss
    ago = max((time.time() if now is None else now) - written_at(run.folder), 0.0)
    where = f"step {short(loss.step)}, {short(loss.tokens)} tokens, {duration(loss.seconds)} of training"
    written = f"last written {duration(ago)} ago" if isfinite(ago) else ""
    head = Text(visible(str(run.path)), style="bold")
    head.append(f"  {visible(run.family)}", style="dim")
    parts: list[RenderableType] = [head, Text(f"{where}; {written}" if written else where)]
    parts.append(_cards(cards(found, failures.count(run))))
    if found.kind:
        parts.append(_layers(run, found.kind))
    return Group(*parts)


def _cards(found: Sequence[Card]) -> Table:
    table = Table.grid(padding=(0, 2))
    table.add_column(no_wrap=True)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for card in found:
        value = Text(f"{card.value} {card.unit}".strip(), style=STYLES.get(card.mark, "bold"))
        table.add_row(Text(visible(card.title), style="dim"), value, Text(visible(card.detail)))
    return table


def _layers(run: Run, kind: str) -> Table:
    steps = run.steps(kind)
    last = run.spectra(kind, steps[-1])
    first = last if len(steps) == 1 else run.spectra(kind, steps[0])
    before = run.spectra(kind, steps[-2], without=("vectors", "leave_one_out_vectors")) if len(steps) > 1 else {}
    band = bands_of(run, kind)["tail"]
    stage = run.settings(kind).get("stage", "")
    title = f"{kind} spectra, {stage}, step {steps[-1]:,} (* beyond its floor)"
    has_bases = any(one.vectors is not None for one in last.values())
    numbers = [
        "alpha_tail",
        "since first",
        "since last",
        "RankMe",
        "since first",
        *(["overlap (floor)"] if has_bases else []),
    ]
    table = new_table(title, [KINDS[kind].noun], numbers)
    for (name, spectrum), shown in zip(last.items(), shortened(list(last)), strict=True):
        cells = _cells(spectrum, first, before, (steps[0], steps[-1]), band)
        if has_bases:
            found = drift(spectrum, first[name]) if name in first else None
            beyond = found is not None and found.overlap < found.overlap_floor
            numbers_of = (found.overlap, found.overlap_floor) if found is not None else (float("nan"),) * 2
            cells.append(f"{'* ' if beyond else ''}{show_number(numbers_of[0], 3)} ({show_number(numbers_of[1], 3)})")
        table.add_row(Text(visible(shown)), *cells)
    return table


def _cells(
    spectrum: Spectrum,
    first: Mapping[str, Spectrum],
    before: Mapping[str, Spectrum],
    steps: tuple[int, int],
    band: Band,
) -> list[str]:
    this = {spectrum.name: spectrum}
    tail, rank = tail_of(spectrum, band), rankme_share(spectrum)
    error = "" if isnan(tail.stderr) else f" +/- {tail.stderr:.3f}"

    def tail_number(one: Spectrum) -> Number:
        return tail_of(one, band)

    return [
        f"{show_number(tail.value, 3)}{error}",
        _change(mean_change(first, this, steps, tail_number), 3),
        _change(mean_change(before, this, steps, tail_number), 3),
        share(rank.value),
        _change(mean_change(first, this, steps, rankme_share), 3, is_share=True),
    ]


def _change(change: Change | None, digits: int, is_share: bool = False) -> str:
    """A change with a star where it lies beyond its floor; a dash where there is none."""
    if change is None or change.steps[0] == change.steps[1]:
        return "-"
    shown = f"{change.by:+.1%}" if is_share else f"{change.by:+.{digits}f}"
    return f"* {shown}" if change.is_beyond else shown
