"""Checks of arguments that several requests have; each names the argument and its value in one line."""

from lightning_spectral.functional.arguments import describe

MAX_COUNT = 10**15
"""Beyond it counts are no longer exact in floating point."""
MAX_GROUPS = 64
"""Each takes 8 d^2 bytes for a layer of width d; error bars of four groups are as good as the groups are alike."""
MAX_SAMPLES = 2**16
"""Samples whose Gram matrix, 32 GiB, is decomposed as a whole."""


def check_positive(**numbers: int) -> None:
    """Refuse arguments that are no positive ints, by a ValueError."""
    for name, value in numbers.items():
        if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= MAX_COUNT:
            raise ValueError(f"{name} must be a positive int, got {describe(value)}")


def check_at_most(**numbers: tuple[int, int, str]) -> None:
    """Refuse positive ints, given with the largest that is allowed and what takes it, that are larger."""
    for name, (value, most, reason) in numbers.items():
        if value > most:
            raise ValueError(f"{name} must be at most {most}, got {describe(value)}: {reason}")


def check_choice(**choices: tuple[str, tuple[str, ...]]) -> None:
    """Refuse arguments that are none of those there are, given as value and choices, by a ValueError."""
    for name, (choice, known) in choices.items():
        if not isinstance(choice, str) or choice not in known:
            listed = f"{', '.join(map(repr, known[:-1]))} or {known[-1]!r}"
            raise ValueError(f"{name} must be {listed}, got {describe(choice)}")


def check_patterns(**patterns: object) -> None:
    """Refuse arguments that are neither a pattern, nor several, nor None, by a ValueError."""
    for name, value in patterns.items():
        if not (value is None or isinstance(value, str) or _are_strings(value)):
            raise ValueError(f"{name} must be None, 'all', a pattern or a list of patterns, got {describe(value)}")


def check_key(**keys: object) -> None:
    """Refuse arguments that are no name of something, by a ValueError."""
    for name, value in keys.items():
        if not (isinstance(value, str) and value):
            raise ValueError(f"{name} must be a name, got {describe(value)}")


def check_axis(**axes: object) -> None:
    """Refuse arguments that are neither an axis, counted from either end, nor None, by a ValueError."""
    for name, value in axes.items():
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or not -64 <= value < 64):
            raise ValueError(f"{name} must be an axis, or None, got {describe(value)}")


def _are_strings(value: object) -> bool:
    return isinstance(value, (list, tuple)) and all(isinstance(name, str) for name in value)
