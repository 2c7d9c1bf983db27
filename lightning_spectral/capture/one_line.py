"""Values and errors in one line, as messages show them."""

from typing import Any


def shown(value: Any) -> str:
    """A value, short enough for one line, whatever a user's own class says of itself."""
    try:
        text = " ".join(repr(value).split())
    except Exception:
        text = f"a {type(value).__name__}"
    return text if len(text) <= 80 else f"{text[:76]} ..."


def reason_of(error: BaseException) -> str:
    """The first line of what an error says, or what it is where it says nothing."""
    return str(error).strip().partition("\n")[0] or type(error).__name__
