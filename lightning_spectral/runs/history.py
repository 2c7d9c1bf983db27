"""A run's history of steps, tokens, seconds and losses, and where its loss came down to a value."""

from math import exp, isnan, log, nan
from pathlib import Path
from typing import NamedTuple

import numpy as np

from lightning_spectral.functional.arguments import check_number
from lightning_spectral.runs.record import Row, read_history


class Point(NamedTuple):
    """Somewhere between two entries of a history; NaN for nowhere."""

    step: float
    tokens: float
    seconds: float


class History(NamedTuple):
    """One entry per step at which something was written, ascending; float64 arrays of one length."""

    step: np.ndarray
    tokens: np.ndarray
    """Training tokens so far, over all ranks."""
    seconds: np.ndarray
    """Training time so far, without validation and without measuring."""
    train_loss: np.ndarray
    """Mean since the entry before; NaN where there is none, infinite where it was no number."""
    val_loss: np.ndarray
    """NaN where there was no validation, infinite where it was no number."""

    @classmethod
    def read(cls, folder: Path) -> "History":
        """The history in a record.

        Args:
            folder: The record's own folder.

        Returns:
            One entry per step: a report and a validation run at one step are two lines, and what one does not know the
            other does.

        Raises:
            ValueError: If it is missing or broken.
        """
        rows: dict[int, Row] = {}
        for row in read_history(folder):
            before = rows.get(row.step, row)
            known = {key: value for key, value in row._asdict().items() if not isnan(value)}
            if not isnan(before.train_loss):
                known.pop("train_loss", None)  # of the many batches before, and not of the few since
            rows[row.step] = before._replace(**known)
        columns = list(zip(*(rows[step] for step in sorted(rows)), strict=True)) or [()] * len(Row._fields)
        return cls(*(np.asarray(column, dtype=np.float64) for column in columns))

    @property
    def loss_name(self) -> str:
        """Which loss is meant by "the loss": that of validation, or of training in a run without validation."""
        if np.isfinite(self.val_loss).any():
            return "val_loss"
        # One that was never finite is still the run's where there is no other.
        return "val_loss" if np.isnan(self.train_loss).all() and np.isinf(self.val_loss).any() else "train_loss"

    def with_loss(self) -> tuple[np.ndarray, np.ndarray]:
        """Where the loss is known.

        Returns:
            Indices of the entries, and the loss there.
        """
        loss = self._loss
        known = np.flatnonzero(np.isfinite(loss))
        return known, loss[known]

    @property
    def diverged_at(self) -> float:
        """Step from which on the loss was no finite number until the end; NaN of a run whose last loss is one."""
        entries = np.flatnonzero(~np.isnan(self._loss))
        finite = np.flatnonzero(np.isfinite(self._loss[entries]))
        after = int(finite[-1]) + 1 if len(finite) else 0
        return float(self.step[entries[after]]) if after < len(entries) else nan

    @property
    def _loss(self) -> np.ndarray:
        return self.val_loss if self.loss_name == "val_loss" else self.train_loss

    def first_at(self, loss: float) -> Point:
        """Where the loss first came down to a value.

        Args:
            loss: The value.

        Returns:
            Interpolated between two entries, log tokens against loss; NaN if the loss never came down to it, or was
            below it from the first entry on.

        Raises:
            ValueError: For what is no number.
        """
        check_number(loss=loss)
        loss = float(loss)
        entries, losses = self.with_loss()
        below = np.flatnonzero(losses <= loss)
        if not len(below) or (below[0] == 0 and losses[0] < loss):
            return Point(nan, nan, nan)
        i = int(below[0])
        after = int(entries[i])
        if losses[i] == loss:
            return Point(float(self.step[after]), float(self.tokens[after]), float(self.seconds[after]))
        before = int(entries[i - 1])
        weight = (losses[i - 1] - loss) / (losses[i - 1] - losses[i])
        start, end = float(self.tokens[before]), float(self.tokens[after])
        tokens = nan  # as where they are not known
        if start >= 0:
            tokens = exp(log(start) + weight * log(end / start)) if start > 0 else weight * end
        # Between two entries steps and seconds run evenly with tokens.
        share = (tokens - start) / (end - start) if end > start else weight
        step, seconds = (
            float(column[before] + share * (column[after] - column[before])) for column in (self.step, self.seconds)
        )
        return Point(step, tokens, seconds)

    def throughput(self, point: Point) -> float:
        """Tokens a second on the way to a point.

        Args:
            point: How far.

        Returns:
            From the first entry after training has begun on, before which models compile and caches fill; from the
            start if the point is that entry. NaN for nowhere.
        """
        tokens, seconds = point.tokens, point.seconds
        begun = np.flatnonzero(self.tokens > 0)
        if len(begun) and tokens > self.tokens[begun[0]]:
            tokens, seconds = tokens - self.tokens[begun[0]], seconds - self.seconds[begun[0]]
        return float(tokens / seconds) if seconds > 0 else nan
