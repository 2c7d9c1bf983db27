"""Warnings that are given once per cause, however often it comes back."""

import re
import warnings

from lightning.pytorch.utilities.rank_zero import rank_zero_warn


class Warner:
    """Remembers what was warned of.

    Args:
        who: What each message begins with.
    """

    def __init__(self, who: str) -> None:
        self._who = who
        self._warned: set[str] = set()

    def warn(self, message: str, on_this_rank: bool = False) -> None:
        """Warn once per cause, whatever the numbers in it.

        Args:
            message: What happened, with the cause.
            on_this_rank: Warn here, whichever rank this is, of something that rank zero does not know.
        """
        cause = re.sub(r"\d+", "#", message)
        if cause not in self._warned:
            self._warned.add(cause)
            (warnings.warn if on_this_rank else rank_zero_warn)(f"{self._who} {_one_line(message)}")

    def clear(self) -> None:
        """Forget what was warned of: another run begins."""
        self._warned.clear()


def _one_line(message: str) -> str:
    """A message whose parts, names and other people's errors, may have had line breaks."""
    return " ".join(line.strip() for line in message.splitlines() if line.strip())
