"""The first screen of a page: a card for each of the questions that are asked of a run first."""

from collections.abc import Iterator
from math import isfinite, isnan
from typing import Any, NamedTuple

from lightning_spectral.reporting.headline import Change, Forecast, Headline, Noise
from lightning_spectral.reporting.words import interval, share, short


class Card(NamedTuple):
    """One question and its answer, in words."""

    title: str
    value: str
    detail: str
    """What it was, and what it is beside."""
    unit: str = ""
    mark: str = ""
    """``moved`` beyond its floor, ``still`` within it, ``bad`` for failures; empty without a floor."""


def cards(found: Headline, failed: tuple[int, int, str]) -> list[Card]:
    """Cards of a run, in the order of questions.

    Args:
        found: What comes first of it.
        failed: Spectra that could not be had, of how many, and why the last of them.
    """
    return list(_cards(found, failed))


def _cards(found: Headline, failed: tuple[int, int, str]) -> Iterator[Card]:
    loss = found.loss
    if isnan(loss.last):
        yield Card(loss.name, "-", "no loss was recorded yet")
    else:
        last = f"{loss.last:.4g}" if isfinite(loss.last) else "no number"
        yield Card(loss.name, last, f"from {loss.first:.4g}; lowest {loss.lowest:.4g}")
    of = "" if found.kind == "activation" else f", {found.kind}s"
    if found.tail is not None:
        yield _change(f"tail exponent{of}", found.tail, lambda value: f"{value:.3g}")
    if found.rankme is not None:
        yield _change(f"RankMe of width{of}", found.rankme, share)
    if found.turned is not None:
        one = found.turned
        detail = f"overlap {one.overlap:.3g} in {one.most}, floor {one.floor:.3g}"
        mark = "moved" if one.num_beyond else "still"
        yield Card("heads turned", f"{one.num_beyond} of {one.num_layers}", detail, mark=mark)
    if found.noise is not None:
        yield _noise(found.noise)
    if found.forecast is not None:
        yield _forecast(found.forecast, loss.tokens)
    if found.kind:
        num_failed, num_all, why = failed
        detail = why if num_failed else "every spectrum was measured"
        yield Card("failed", f"{num_failed:,} of {num_all:,}", detail, mark="bad" if num_failed else "")


def _change(title: str, change: Change, show: Any) -> Card:
    layers = "one layer" if change.num_layers == 1 else f"mean of {change.num_layers}"
    value = show(change.last.value)
    if change.steps[0] == change.steps[1]:
        return Card(title, value, f"{layers}; one report so far")
    word = "rose" if change.by > 0 else "fell"
    moved = f"{word} from {show(change.first.value)} ({layers})"
    if isnan(change.floor):
        return Card(title, value, f"{moved}; no floor: there are no error bars")
    where = "beyond" if change.is_beyond else "within"
    mark = "moved" if change.is_beyond else "still"
    return Card(title, value, f"{moved}, {where} its floor of {show(change.floor)}", mark=mark)


def _noise(noise: Noise) -> Card:
    value = "not seen" if not isfinite(noise.value) else short(noise.value)
    unit = noise.unit if isfinite(noise.value) else ""
    batch = "" if isnan(noise.batch) else f"; the batch is {short(noise.batch)}"
    return Card("noise scale", value, f"80%: {interval(noise.low, noise.high)}{batch}", unit)


def _forecast(found: Forecast, tokens: float) -> Card:
    title = "forecast" if isnan(found.target) else f"to {found.monitor} {found.target:g}"
    if not isnan(found.actual):
        return Card(title, short(found.actual), "reached", "tokens")
    if isnan(found.tokens):
        return Card(title, "-", f"no forecast at step {short(found.step)}")
    return Card(title, short(found.tokens), f"80%: {interval(found.low, found.high)}; now {short(tokens)}", "tokens")
