"""The verdict of a comparison on a page, with the numbers behind it."""

from collections.abc import Mapping
from html import escape
from math import isnan
from typing import Any

from lightning_spectral.reporting.elements import Cell, bullets, details, table
from lightning_spectral.reporting.words import short
from lightning_spectral.terminal import show_number


def verdict(found: Mapping[str, Any]) -> str:
    """The verdict of a comparison, with its numbers, or why there is none.

    Args:
        found: What :func:`lightning_spectral.reporting.sides.compared` gave.
    """
    if "refused" in found:
        text = f'<div class="value">no comparison</div><p class="note">{escape(found["refused"])}</p>'
        return f'<div class="verdict" role="note">{text}</div>'
    where = f"at {escape(found['loss_name'])} {escape(found['loss_text'])}"
    gains = table(
        ["", "base", "variant", "gain", "interval", "run floor"],
        [(escape(gain["name"]), _gain(gain)) for gain in found["gains"]],
    )
    moved = table(
        ["", "base", "variant", "shift", "sampling floor", "run floor"],
        [(escape(_name(shift)), _shift(shift)) for shift in found["shifts"]],
    )
    spectra = details("spectra at the matched loss", moved) if found["shifts"] else ""
    how = details("how that was found", f"{bullets(found['notes'])}<p>{escape(found['rule'])}</p>")
    return (
        f'<div class="verdict" role="note"><div class="note">{where}</div>'
        f'<div class="value" id="verdict">{escape(found["verdict"])}</div>{gains}{spectra}{how}</div>'
    )


def _gain(gain: Mapping[str, Any]) -> list[Cell]:
    interval = "-" if isnan(gain["low"]) else f"{gain['low']:+.1%} to {gain['high']:+.1%}"
    return [
        Cell(short(gain["base"], 4)),
        Cell(short(gain["variant"], 4)),
        Cell(_percent(gain["gain"]), "moved" if gain["detected"] else ""),
        Cell(interval),
        Cell(_percent(gain["run_floor"])),
    ]


def _name(shift: Mapping[str, Any]) -> str:
    return f"{shift['kind']} {shift['name'] or 'mean of all'}, {shift['label']}"


def _shift(shift: Mapping[str, Any]) -> list[Cell]:
    digits = shift["digits"]
    sign = "" if shift["label"] == "JS" else "+"
    moved = "-" if isnan(shift["shift"]) else f"{shift['shift']:{sign}.{digits}f}"
    numbers = {key: show_number(shift[key], digits) for key in ("base", "variant", "sampling_floor", "run_floor")}
    return [
        Cell(numbers["base"]),
        Cell(numbers["variant"]),
        Cell(moved, "moved" if shift["detected"] else ""),
        Cell(numbers["sampling_floor"]),
        Cell(numbers["run_floor"]),
    ]


def _percent(value: float) -> str:
    return "-" if isnan(value) else f"{value:+.1%}"
