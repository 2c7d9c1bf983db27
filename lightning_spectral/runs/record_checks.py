"""What a record may hold: the types and ranges of its description, of lines of its history and of its reports."""

from collections.abc import Callable, Mapping
from math import isfinite, isnan
from typing import Any, NamedTuple

from lightning_spectral.functional.arguments import describe, is_finite_number, is_one_line
from lightning_spectral.functional.powerlaw import check_band

MAX_STEP = 10**15
"""Beyond it steps are no longer exact in floating point."""


MAX_SECONDS = 10**10
"""Three hundred years."""


class _Fact(NamedTuple):
    """What a fact must be, in words, and whether it is."""

    words: str
    holds: Callable[[Any], bool]


def _is_count(value: Any) -> bool:
    return is_finite_number(value) and value == int(value) and 0 <= value <= MAX_STEP


def _is_positive(value: Any) -> bool:
    return is_finite_number(value) and value > 0


def _is_band(value: Any) -> bool:
    try:
        check_band("band", value)
    except ValueError:
        return False
    return True


def _is_sentence(value: Any) -> bool:
    return isinstance(value, dict) and all(is_one_line(value.get(part)) for part in ("text", "url"))


def _is_table_of(holds: Callable[[Any], bool], value: Any) -> bool:
    return isinstance(value, dict) and all(map(holds, value.values()))


_TEXT = _Fact("a text of one line", is_one_line)
_FLAG = _Fact("true or false", lambda value: isinstance(value, bool))
_COUNT = _Fact("a count", _is_count)
_BAND = _Fact("two ascending ranks or fractions", _is_band)
_TABLE = _Fact("a table", lambda value: isinstance(value, dict))
_TABLES = _Fact("a table of tables", lambda value: _is_table_of(_TABLE.holds, value))
_NAMES = _Fact("a list of names", lambda value: isinstance(value, list) and all(map(_TEXT.holds, value)))
_ADVICE = _Fact(
    "a list of tables with text and url, of one line each",
    lambda value: isinstance(value, list) and all(map(_is_sentence, value)),
)
_LIST = _Fact("a list", lambda value: isinstance(value, list))

_FACTS = {
    "id": _TEXT,
    "family": _TEXT,
    "tags": _TABLE,
    "series": _TABLES,
    "forecast": _TABLES,
    "batch_tokens": _Fact("a positive number", _is_positive),
    "batch_samples": _Fact("a positive number", _is_positive),
    "validation_data": _Fact("a table of digits", lambda value: _is_table_of(is_one_line, value)),
    "validation_samples": _Fact("a table of counts", lambda value: _is_table_of(_is_count, value)),
    "val_loss": _TEXT,
    "resumed": _LIST,
    "resumed_at": _LIST,
    "machines": _LIST,
    "setting": _TABLE,
    "advice": _ADVICE,
}
"""Of a run."""

_SETTINGS = {
    "kind": _TEXT,
    "stage": _TEXT,
    "head": _BAND,
    "tail": _BAND,
    "layers": _NAMES,
    "num_tokens": _COUNT,
    "num_samples": _COUNT,
    "rank": _COUNT,
    "normalize": _FLAG,
    "weights": _FLAG,
}
"""Of a series."""

_FORECAST = {"monitor": _TEXT, "target_loss": _Fact("a number", is_finite_number), "actual": _FACTS["batch_tokens"]}


def why_broken(about: Mapping[str, Any]) -> str | None:
    """What is wrong with the description of a run, a clause; None if nothing is. A fact may be null, or missing."""
    found = _first_wrong("", about, _FACTS)
    for name, settings in (about.get("series") or {}).items() if found is None else ():
        found = found or _first_wrong(f"{name}.", settings, _SETTINGS)
    for name, facts in (about.get("forecast") or {}).items() if found is None else ():
        found = found or _first_wrong(f"forecast.{name}.", facts, _FORECAST)
    return found


def _first_wrong(where: str, facts: Mapping[str, Any], known: Mapping[str, _Fact]) -> str | None:
    for name, fact in known.items():
        value = facts.get(name)
        if value is not None and not fact.holds(value):
            path = where + name
            shown = path if path.isprintable() else describe(path)
            return f"{shown} must be {fact.words}, got {describe(value)}"
    return None


def check_line(step: int, tokens: float, seconds: float) -> None:
    """Refuse, by a ValueError, what is no line of a history; NaN stands for what is not known."""
    if not 0 <= step <= MAX_STEP:
        raise ValueError(f"step must be from 0 to {MAX_STEP:,}")
    check_amount("tokens", tokens)
    check_amount("seconds", seconds)
    if seconds > MAX_SECONDS:
        raise ValueError(f"seconds must be at most {MAX_SECONDS:,}, got {seconds:.6g}")


def check_amount(name: str, value: float) -> None:
    """Refuse, by a ValueError, what is neither NaN nor finite and at least 0."""
    if not isnan(value) and not (isfinite(value) and value >= 0):
        raise ValueError(f"{name} must be finite and not negative, got {value:.6g}")


def check_step(number: Any, step: int) -> None:
    """Refuse, by a ValueError, a report whose file holds another step than its name says."""
    found = number.item() if getattr(number, "size", 0) == 1 else number
    if isinstance(found, bool) or not isinstance(found, (int, float)) or found != step:
        raise ValueError(f"it holds step {describe(found)}, and was renamed")


def tokens_of(number: Any) -> float:
    """Tokens of a report, from what its file holds; ValueError if that is no one number."""
    if getattr(number, "size", 0) != 1 or getattr(number.dtype, "kind", "") not in "fiu":
        raise ValueError(f"tokens must be one number, got {describe(number)}")
    value = float(number.reshape(()))
    check_amount("tokens", value)
    return value
