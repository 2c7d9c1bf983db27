"""The commands: Lightning's, from YAML, with our names usable without dots, and those that read records of runs."""

import io
import os
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from lightning_spectral.reporting import commands as reporting
from lightning_spectral.runs import commands as on_runs
from lightning_spectral.terminal import one_line
from lightning_spectral.version import __version__

PACKAGE = Path(__file__).parent

COMMANDS = ("fit", "validate", "test", "predict")
"""Those of Lightning's own command line."""
RUN_COMMANDS = {
    **dict.fromkeys(on_runs.COMMANDS, on_runs.run_command),
    **dict.fromkeys(reporting.COMMANDS, reporting.run_command),
}
"""Those that read what runs left behind, or are writing."""
ALL_COMMANDS = ("probe", *COMMANDS, *RUN_COMMANDS)

USAGE = f"""usage: lightning-spectral COMMAND [--config FILE] [options]

commands: {", ".join(ALL_COMMANDS)}

  lightning-spectral probe --model my.Module --data my.Data
  lightning-spectral fit --config examples/nanogpt.yaml
  lightning-spectral fit --model my.Module --data my.Data --trainer.callbacks+=ActivationSpectrum
  lightning-spectral fit --trainer.callbacks.help=ActivationSpectrum
  lightning-spectral show lightning_logs/version_0 --plot evolution.png
  lightning-spectral compare 'logs/base/*' 'logs/variant/*' --plot comparison.png
  lightning-spectral forecast 'logs/*' --target 2.0
  lightning-spectral report 'logs/base/*' 'logs/variant/*' -o report.html
  lightning-spectral watch lightning_logs

`python -m lightning_spectral` and, for these commands, `lightning` are the same; COMMAND --help lists its options."""


def main(args: Sequence[str] | None = None) -> None:
    """Run a command; the entry point of the console script.

    Args:
        args: The words after the program's name; None takes them from the command line.

    Raises:
        SystemExit: With status 2 and one line for a wrong command or bad input to this package.
    """
    words = list(sys.argv[1:] if args is None else args)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # of letters that a terminal has not there is another way to write
            stream.reconfigure(errors="backslashreplace")
    if not words or words[0] in ("-h", "--help"):
        print(USAGE)
        return
    if words[0] == "--version":
        print(f"lightning-spectral {__version__}")
        return
    if words[0] not in ALL_COMMANDS:
        _stop(f"command must be one of {', '.join(ALL_COMMANDS)}, got {words[0]!r}: see lightning-spectral --help")
    # A console script does not search the folder it is called in, where a user's own modules are.
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        if words[0] in RUN_COMMANDS:
            _run_reader(words)
        elif words[0] == "probe":
            import lightning_spectral.nanogpt  # noqa: F401  (as for Lightning's commands)
            from lightning_spectral.probing.command import run_probe

            run_probe(words[1:])
        else:
            # Left to read the command line itself, Lightning can also start the other processes of a DDP run from it.
            _run_lightning(None if args is None else words)
    except ValueError as error:
        message = _our_message(error)
        if message is None:
            raise
        _stop(message)


def _run_reader(words: list[str]) -> None:
    """One of the commands that read records; it ends without a word where who reads it has enough, as ``head`` has."""
    try:
        RUN_COMMANDS[words[0]](words)
        sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for what Python still flushes at its end
        raise SystemExit(1) from None


def _run_lightning(args: list[str] | None) -> None:
    from lightning.pytorch import LightningModule
    from lightning.pytorch.cli import LightningCLI

    import lightning_spectral.nanogpt  # noqa: F401  (names without dots are looked up among imported classes)

    LightningCLI(
        LightningModule,
        subclass_mode_model=True,  # and data in the same way, or none for a model that brings its own loaders
        # A second run into the same folder would otherwise stop at the first one's config.yaml.
        save_config_kwargs={"overwrite": True},
        args=args,
    )


def _our_message(error: BaseException | None) -> str | None:
    """What this package said is wrong with its input, however wrapped; None for other errors: they keep a traceback."""
    while error is not None:
        frames = traceback.extract_tb(error.__traceback__)
        if isinstance(error, ValueError) and frames and Path(frames[-1].filename).is_relative_to(PACKAGE):
            return str(error)
        error = error.__cause__ or error.__context__
    return None


def _stop(message: str) -> NoReturn:
    print(f"lightning-spectral: error: {one_line(message)}", file=sys.stderr)
    raise SystemExit(2)
