"""The ``lightning`` command: our sub-commands, and every other one handed on to lightning-sdk, whose name it is too.

It lies outside the package because importing that imports torch, for seconds no other program's command should wait.
"""

import os
import re
import sys
from importlib.metadata import EntryPoint, entry_points
from typing import NoReturn

COMMANDS = ("probe", "fit", "validate", "test", "predict", "show", "compare", "forecast", "report", "watch")
"""Ours, which win over another package's of the same name; a test holds them to those of the command line."""

NOT_HANDED_ON = ("lightning-spectral", "lightning")
"""Ourselves, and Lightning: 2.5.0 still has a `lightning`, which says nothing of a mistyped command and ends well."""


def lightning() -> None:
    """Run our sub-commands, hand others on; the entry point of the console script.

    Raises:
        SystemExit: With the status of the program that was handed the command, or as ``lightning_spectral.cli.main``.
    """
    words = sys.argv[1:]
    asks_for_help = not words or words[0] in ("-h", "--help")
    # click's completion scripts call without words and read back what is printed, at every press of the key.
    completes = "_LIGHTNING_COMPLETE" in os.environ
    is_ours = not completes and (asks_for_help or words[0] in (*COMMANDS, "--version"))
    other = _other_program() if asks_for_help or not is_ours else None
    if other is not None and not is_ours:
        _hand_on(other, said=not completes)

    from lightning_spectral.cli import main

    main()
    if other is not None:
        print(f"\n{_owner(other)} is installed: `lightning` hands all other commands on to it{_own_help(other)}.")


def _hand_on(other: EntryPoint, said: bool) -> NoReturn:
    """Do what the other package's own script does: it finds the words, and the program's name, in sys.argv."""
    owner = _owner(other)
    words = " ".join(sys.argv[1:2])
    try:
        program = other.load()
    except Exception as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        print(
            f"lightning-spectral: error: command {words!r} is for {owner}, but its {other.value} cannot be imported, "
            f"got {reason}: reinstall {owner}",
            file=sys.stderr,
        )
        raise SystemExit(2) from None
    if said:
        known = ", ".join(COMMANDS)
        # Flushed before the other program writes: where both streams are one, this line comes first.
        print(f"lightning-spectral: {words!r} is not one of {known}: handed on to {owner}", file=sys.stderr, flush=True)
    raise SystemExit(program())


def _other_program() -> EntryPoint | None:
    """Another package's program of this name; lightning-sdk's if several have one."""
    programs = [p for p in entry_points(group="console_scripts", name="lightning") if _owner(p) not in NOT_HANDED_ON]
    return min(programs, key=lambda program: (_owner(program) != "lightning-sdk", _owner(program)), default=None)


def _own_help(program: EntryPoint) -> str:
    """Where the other package's help is still to be read, if its program has a second name."""
    assert program.dist is not None
    scripts = program.dist.entry_points.select(group="console_scripts", value=program.value)
    names = [script.name for script in scripts if script.name != program.name]
    return f", see {names[0]} --help" if names else ""


def _owner(program: EntryPoint) -> str:
    assert program.dist is not None  # set on all that entry_points() finds
    return re.sub(r"[-_.]+", "-", program.dist.name).lower()
