"""What ActivationSpectrum says of the head that its argument ``readout`` names: a member of the session of its own."""

from collections.abc import Mapping
from math import nan
from typing import Any

from torch import Tensor

from lightning_spectral.callbacks.host import Host
from lightning_spectral.measurement import Measurement, Session
from lightning_spectral.measurement.readout import ReadoutReport, ReadoutRequest
from lightning_spectral.recording import RunRecorder

QUANTITIES = ("task_head_share", "task_power")

SHARDING = ("FSDP", "DeepSpeed")
"""Parts of the names of strategies under which no rank has a whole head."""


class ReadoutMember:
    """Takes part for a callback, and keeps the latest report.

    Args:
        request: What is measured, and when.
    """

    def __init__(self, request: ReadoutRequest) -> None:
        self.request = request
        self.measurement: Measurement | None = None
        self._session: Session[RunRecorder] | None = None
        self._restored: Mapping[str, Any] = {}

    @property
    def keys(self) -> list[str]:
        """What is logged."""
        return [f"activation/{self.request.readout}/{quantity}" for quantity in QUANTITIES]

    def settings(self) -> dict[str, Any]:
        """For the record."""
        return self.request.settings()

    def join(self, session: Session[RunRecorder], host: Host) -> None:
        """Take part; raises ValueError for a module without such a head."""
        strategy = host.strategy
        if any(word in strategy for word in SHARDING):
            raise ValueError(
                f"readout={self.request.readout!r} reads heads that are whole on each rank, got strategy {strategy}: "
                "use 'ddp', or readout=None"
            )
        self._session = session
        session.join(self)
        self.measurement = session.share(self, self.request, host.scene())
        if self._restored:
            self.measurement.load_state_dict(self._restored)

    def leave(self) -> None:
        """Take part no longer."""
        if self._session is not None:
            self._restored = self.state()
            self._session.leave(self)
        self._session = self.measurement = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_session": None, "measurement": None}

    def state(self) -> Mapping[str, Any]:
        """What a resumed run needs."""
        return self._restored if self.measurement is None else self.measurement.state_dict()

    def restore(self, state: Mapping[str, Any]) -> None:
        """Take up what :meth:`state` gave, or begin anew with an empty one."""
        self._restored = state

    def report(self, step: int) -> ReadoutReport | None:
        """The report of a step, if there is one."""
        report = None if self.measurement is None else self.measurement.report
        return report if isinstance(report, ReadoutReport) and report.step == step else None

    def failure(self, step: int) -> str | None:
        """Why nothing is known at a step; None if it is."""
        report = self.report(step)
        return "there was no report of its head" if report is None else report.readout.failure

    def measured(self, step: int, most: int | float) -> dict[str, float]:
        """Values by key.

        Args:
            step: Of the report.
            most: Modes of the head, or a fraction of all.
        """
        if self.failure(step) is not None:
            return dict.fromkeys(self.keys, nan)
        report = self.report(step)
        assert report is not None
        width = len(report.readout.power)
        k = min(most, width) if isinstance(most, int) else max(1, int(most * width))
        return dict(zip(self.keys, (report.readout.head_share(k), float(report.readout.power.sum())), strict=True))

    def curve(self, step: int) -> dict[str, Tensor]:
        """Share of task power in the modes up to each, by name; empty where it is not known."""
        report = self.report(step)
        if report is None or report.readout.failure is not None or not bool(report.readout.power.any()):
            return {}
        return {self.request.readout: report.readout.cumulative}
