"""Checks of arguments that several requests have; each names the argument and its value in one line."""


def check_positive(**numbers: int) -> None:
    """Refuse arguments that are no positive ints, by a ValueError."""
    for name, value in numbers.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"{name} must be a positive int, got {value!r}")


def check_choice(**choices: tuple[str, tuple[str, ...]]) -> None:
    """Refuse arguments that are none of those there are, given as value and choices, by a ValueError."""
    for name, (choice, known) in choices.items():
        if choice not in known:
            listed = f"{', '.join(map(repr, known[:-1]))} or {known[-1]!r}"
            raise ValueError(f"{name} must be {listed}, got {choice!r}")


def check_patterns(**patterns: object) -> None:
    """Refuse arguments that are neither a pattern, nor several, nor None, by a ValueError."""
    for name, value in patterns.items():
        if not (value is None or isinstance(value, str) or _are_strings(value)):
            raise ValueError(f"{name} must be None, 'all', a pattern or a list of patterns, got {value!r}")


def _are_strings(value: object) -> bool:
    return isinstance(value, (list, tuple)) and all(isinstance(name, str) for name in value)
