"""Follows a run in the terminal, reading its record again and again as it grows."""

import time
import warnings
from pathlib import Path

from rich.console import Group, RenderableType
from rich.live import Live
from rich.text import Text

from lightning_spectral.reporting.newest import newest_run
from lightning_spectral.reporting.summary import Failures, summary
from lightning_spectral.runs import Run
from lightning_spectral.terminal import console, one_line


class Follower:
    """Looks at a folder: each time at the run in it that was written to last, which may be another one by then.

    Args:
        folder: Where runs are logged.

    Raises:
        ValueError: If there is no such folder.
    """

    def __init__(self, folder: str | Path) -> None:
        self._folder = folder
        self._failures = Failures()
        self._shown: RenderableType | None = None

    def look(self) -> RenderableType:
        """What there is to say now; of a record that is being moved, as by a resumed run, what there was before.

        Raises:
            ValueError: If there is no run.
        """
        path = newest_run(self._folder)
        if path is None:
            raise ValueError(
                f"logdir must hold a run with a record, got {str(self._folder)!r}: callbacks write one "
                "at the start of fit"
            )
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            self._shown = summary(Run(path), self._failures)
        notes = [Text(one_line(str(one.message)), style="yellow") for one in caught]
        return Group(self._shown, *notes)

    def look_again(self) -> RenderableType:
        """The same for a screen that stays: what goes wrong stands below what was shown before."""
        try:
            return self.look()
        except ValueError as error:
            note = Text(one_line(str(error)), style="yellow")
            return note if self._shown is None else Group(self._shown, note)


def watch(folder: str | Path, once: bool = False, every: float = 2.0) -> None:
    """Show a run under way until Ctrl-C.

    Args:
        folder: Where runs are logged, or the log directory of one.
        once: Print what there is, and end.
        every: Seconds between two looks.

    Raises:
        ValueError: If there is no such folder; with ``once`` also if there is no run in it.
    """
    follower = Follower(folder)
    if once:
        console().print(follower.look())
        return
    newest_run(folder)  # says that there is no such folder
    try:
        with Live(follower.look_again(), console=console(), auto_refresh=False, vertical_overflow="crop") as live:
            while True:
                time.sleep(every)
                live.update(follower.look_again(), refresh=True)
    except KeyboardInterrupt:
        pass
