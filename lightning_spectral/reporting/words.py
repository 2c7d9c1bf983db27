"""Numbers as they stand in a text: on a page, and in a terminal."""

from math import isfinite, isinf, isnan, nan
from typing import Any


def number(value: Any) -> float:
    """What a record says where a number is expected; NaN for anything else, and for what no float holds."""
    try:
        return float(value) if isinstance(value, (int, float)) else nan
    except OverflowError:
        return nan


def short(value: Any, digits: int = 3) -> str:
    """A number in so many significant digits, large ones with a unit: ``1.23 M``; a dash for what is not known."""
    value = number(value)
    if isnan(value):
        return "-"
    if isinf(value):
        return "unbounded" if value > 0 else "-unbounded"
    for unit, name in ((1e12, " T"), (1e9, " G"), (1e6, " M"), (1e4, " k")):
        if abs(value) >= unit * (1 - 10.0**-digits / 2):
            return f"{_rounded(value / (1e3 if unit == 1e4 else unit), digits)}{name}"
    return _rounded(value, digits)


def _rounded(value: float, digits: int) -> str:
    # Where `g` would write an exponent; beyond, numbers are too large to be read otherwise.
    is_whole = 10.0 ** min(digits, 3) * (1 - 10.0**-digits / 2) <= abs(value) < 1e5
    return f"{value:,.0f}" if is_whole else f"{value:.{digits}g}"


def signed(value: float, digits: int = 2) -> str:
    """A change, with its sign."""
    return short(value, digits) if isnan(value) else f"{'+' if value >= 0 else '-'}{short(abs(value), digits)}"


def interval(low: float, high: float) -> str:
    """An interval in words, open above where its end is infinite."""
    if isnan(low) or isnan(high):
        return "no interval"
    return f"{short(low)} to {short(high)}" if isfinite(high) else f"{short(low)} or more"


def duration(seconds: float) -> str:
    """A time in the units that people use; a dash for what is not known."""
    if not isfinite(seconds):
        return "-"
    if seconds < 120:
        return f"{seconds:.0f} s"
    minutes = seconds / 60
    if minutes < 120:
        return f"{minutes:.0f} min"
    hours = minutes / 60
    return f"{hours:.1f} h" if hours < 48 else f"{hours / 24:.1f} days"


def share(value: float) -> str:
    """A share as a percentage."""
    return "-" if not isfinite(value) else f"{value:.1%}" if value < 0.1 else f"{value:.0%}"
