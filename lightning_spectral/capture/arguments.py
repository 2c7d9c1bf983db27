"""How an argument is shown where it is refused: in one line."""

from typing import Any


def shown(value: Any) -> str:
    """A value, short enough for one line, whatever a user's own class says of itself."""
    try:
        text = " ".join(repr(value).split())
    except Exception:
        text = f"a {type(value).__name__}"
    return text if len(text) <= 80 else f"{text[:76]} ..."
