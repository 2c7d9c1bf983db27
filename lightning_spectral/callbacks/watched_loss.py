"""The loss that a forecaster watches: how it came down, and where it reached the target."""

import math
from typing import Any

import numpy as np

from lightning_spectral.callbacks.host import Host
from lightning_spectral.runs.history import History
from lightning_spectral.runs.logarithms import log_of
from lightning_spectral.runs.loss_curve import LossCurve


class WatchedLoss:
    """The losses of a run so far.

    Args:
        monitor: Key of the loss among a loop's metrics.
        target: To be reached from above.
        state: Of an earlier one, as :meth:`state`.
    """

    def __init__(self, monitor: str, target: float, state: dict[str, Any] | None = None) -> None:
        state = state or {}
        self.monitor, self.target = monitor, target
        self.curve = LossCurve(state.get("losses", ()))
        self.actual: float = state.get("actual", math.nan)
        """Tokens that the target took; NaN until it is reached."""
        self.is_there: bool = state.get("is_there", not math.isnan(self.actual))
        """Whether a loss so far was no more than the target: one above it again, as a noisy one is, changes nothing."""

    def state(self) -> dict[str, Any]:
        """Plain numbers and lists, as many whatever there was before."""
        return {"losses": self.curve.points, "actual": self.actual, "is_there": self.is_there}

    @property
    def tokens(self) -> float:
        """Training tokens at the last loss; NaN before one."""
        return self.curve.points[-1][1] if self.curve.points else math.nan

    @property
    def tokens_per_step(self) -> float:
        """Since the step of the loss before, for a batch may be changed on the way; NaN before the first step."""
        if not self.curve.points:
            return math.nan
        step, tokens, _ = self.curve.points[-1]
        earlier = (point for point in reversed(self.curve.points) if point[0] < step)
        before, start, _ = next(earlier, (0.0, 0.0, math.nan))
        return (tokens - start) / (step - before) if step > before else math.nan

    @property
    def log_gap(self) -> float:
        """Logarithm of what the last loss lies above the target; NaN where it does not."""
        return log_of(self.curve.points[-1][2] - self.target) if self.curve.points else math.nan

    def read(self, host: Host) -> float:
        """The loss that is among a loop's metrics, as this rank has logged it.

        Raises:
            ValueError: If it is not logged.
        """
        if self.monitor not in host.metrics:
            known = ", ".join(key for key in host.metrics if "loss" in key) or "no losses"
            raise ValueError(f"monitor must be a metric that is logged, got {self.monitor!r}: there are {known}")
        return float(host.metrics[self.monitor])

    def add(self, step: float, tokens: float, loss: float) -> bool:
        """Take in the next loss; True where the target is reached only now."""
        self.curve.add(step, tokens, loss)
        if self.is_there or not loss <= self.target:
            return False
        self.is_there = True
        steps, at, losses = np.asarray(self.curve.points[-2:], dtype=np.float64).T
        # Since the loss before; NaN if this is the first.
        self.actual = History(steps, at, np.zeros_like(steps), losses, losses).first_at(self.target).tokens
        return True
