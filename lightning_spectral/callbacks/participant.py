"""Who takes part in the session of a loop, whoever runs that."""

from collections.abc import Iterable
from typing import Any

import torch

from lightning_spectral.advice import Fact
from lightning_spectral.callbacks.conclusion import conclude
from lightning_spectral.callbacks.host import Host
from lightning_spectral.measurement import Measurement, Session
from lightning_spectral.recording import RunRecorder


class Participant:
    """Takes part in the session of a loop, from :meth:`join` to :meth:`leave`.

    Whoever runs the loop hands its events to the session, once for all participants, and then tells each of them.
    """

    def __init__(self) -> None:
        self.session: Session[RunRecorder] | None = None
        """Of the run under way."""
        self.measurement: Measurement | None = None
        """What this one takes reports from, during a run."""

    def join(self, host: Host) -> Session[RunRecorder]:
        """Take part; raises ValueError for what does not go with the module or with others who take part."""
        self.session = host.session
        self.session.join(self)
        return self.session

    def leave(self) -> None:
        """Take part no longer."""
        if self.session is not None:
            self.session.leave(self)
        self.session = self.measurement = None

    def __getstate__(self) -> dict[str, Any]:
        # A copy, or what goes to another process, takes no part in this run.
        return {**self.__dict__, "session": None, "measurement": None}

    def settings(self) -> dict[str, Any]:
        """How the measurement is made, JSON-like, for the record of the run."""
        return {}

    def start_training(self, host: Host) -> None:
        """Training begins, and the recorder knows of it."""

    def take_report(self, host: Host) -> None:
        """Log the report of the measurement if there is a new one."""

    def publish_pending(self, host: Host) -> None:
        """Log what is still being made beside training. All ranks come here together; the first of them waits."""
        if self.session is not None:
            self.session.end_pending()
            self.take_report(host)

    def end_validation_rows(self, host: Host) -> None:
        """The last batch of a validation run has ended; its loss may not be known yet."""
        self.take_report(host)

    def end_validation(self, host: Host) -> None:
        """A validation run, perhaps the sanity check, has ended, and its loss is among the metrics."""

    def end_fit(self, host: Host) -> None:
        """Nothing more will come. Who is told first has all close, and then says, once, what they know together."""
        if self.session is None or not self.session.is_led_by(self) or not host.is_global_zero:
            return
        for one in self.companions:
            one.close(host)
        conclude(self.companions, self.session.recorder)

    def close(self, host: Host) -> None:
        """Show what there is to show at the end, on the rank that writes."""

    def facts(self) -> Iterable[Fact]:
        """What is known at the end of a run, with errors and floors, to be said together with what others know."""
        return ()

    @property
    def companions(self) -> "list[Participant]":
        """All who take part, in the order in which they are told what happens."""
        members = [] if self.session is None else self.session.members
        return [member for member in members if isinstance(member, Participant)]

    @property
    def tokens(self) -> float:
        """Training tokens at the latest report, over all ranks; NaN outside training."""
        if self.session is None or self.measurement is None:
            return torch.nan
        return self.session.recorder.tokens_at_report(self.measurement)
