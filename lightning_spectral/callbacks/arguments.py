"""Checks of arguments that several callbacks have."""


def check_positive(**numbers: int) -> None:
    """Refuse arguments that are no positive ints.

    Args:
        numbers: Values by argument.

    Raises:
        ValueError: Naming the argument.
    """
    for name, value in numbers.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"{name} must be a positive int, got {value!r}")


def check_choice(name: str, choice: str, known: tuple[str, ...]) -> None:
    """Refuse an argument that is none of those there are.

    Args:
        name: The argument.
        choice: Its value.
        known: What it may be.

    Raises:
        ValueError: Naming the argument and its choices.
    """
    if choice not in known:
        choices = f"{', '.join(map(repr, known[:-1]))} or {known[-1]!r}"
        raise ValueError(f"{name} must be {choices}, got {choice!r}")
