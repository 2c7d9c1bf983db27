"""What a case of the fuzz test is: something to run, and what its refusal has to name."""

from collections.abc import Callable
from typing import Any, NamedTuple


def accept(found: Any) -> None:
    """Have nothing to say of a result."""


class Case(NamedTuple):
    """One hostile case."""

    what: str
    """In words, for a report of a fault."""
    names: tuple[str, ...]
    """Of which a refusal has to name one: arguments, or paths."""
    run: Callable[[], Any]
    check: Callable[[Any], None] = accept
    """Fails for a result that cannot be."""
