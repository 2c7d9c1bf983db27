"""What every callback of this package does with its numbers: claim keys, log, draw, warn, keep state."""

import re
import warnings
from collections.abc import Callable
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_warn

from lightning_spectral import tensorboard
from lightning_spectral.measurement import Session, session_of

SECONDS = "spectral/seconds"
"""Key of the time that measuring has cost so far; one for all callbacks of a Trainer with the same prefix."""
RUN_STATE = "lightning_spectral.run"
"""Key in a checkpoint of what all callbacks know of the run together. It does not depend on their arguments, so that
counting goes on where a run is resumed with others."""


class SpectralCallback(Callback):
    """Logs values under keys that no other callback writes, and never lets a failure stop the training run.

    A subclass says what it writes (``kind``, :meth:`keys`), may draw (:meth:`draw`) and keep a summary over a resume
    (:meth:`summary`, :meth:`restore`). It calls :meth:`open` when its keys are known and :meth:`publish` when their
    values are.

    Args:
        prefix: Put before every key.

    Raises:
        ValueError: If the prefix is not a string.
    """

    kind: str
    """First part of the keys."""

    def __init__(self, prefix: str) -> None:
        if not isinstance(prefix, str):
            raise ValueError(f"prefix must be a string, got {prefix!r}: '' puts nothing before the keys")
        self.prefix = prefix
        self.num_failed = 0
        """Measurements that came to nothing so far; logged as ``{kind}/failed``."""
        self._session: Session | None = None
        self._writes_seconds = False
        self._restored: dict[str, Any] | None = None
        self._kept: dict[str, Any] | None = None
        self._warned: set[str] = set()
        self._kept_run: dict[str, Any] | None = None
        self._run_before: dict[str, Any] | None = None

    def keys(self) -> list[str]:
        """The keys this callback writes, without the prefix; known from :meth:`open` on."""
        raise NotImplementedError

    def draw(self, writer: Any, report: Any) -> None:
        """Show a report in TensorBoard; on rank zero only.

        Args:
            writer: A SummaryWriter.
            report: Whatever the subclass reports.
        """

    def summary(self) -> dict[str, Any]:
        """What a subclass wants to find again after a resume.

        Returns:
            Plain numbers, strings, lists, dictionaries and tensors.
        """
        return {}

    def restore(self, summary: dict[str, Any]) -> None:
        """Take up what :meth:`summary` gave.

        Args:
            summary: Its result, or an empty one to begin anew.
        """

    def measurement_state(self) -> dict[str, Any]:
        """What the measurement behind this callback needs to go on after a resume.

        Returns:
            Plain numbers.
        """
        return {}

    def run_state(self) -> dict[str, Any] | None:
        """What the record of the run needs to go on after a resume.

        Returns:
            Plain numbers and strings; None for no record.
        """
        return None

    def begin_anew(self) -> None:
        """Forget an earlier fit of this object, perhaps of another model, unless a checkpoint is being resumed."""
        if self._restored is None:
            self.num_failed = 0
            self._kept = None
            self._warned.clear()
            self.restore({})

    def open(self, trainer: Trainer) -> Session:
        """Claim the keys and say that their values are not known yet.

        Args:
            trainer: The Trainer.

        Returns:
            What all callbacks of this Trainer share.

        Raises:
            ValueError: If another callback writes one of the keys.
        """
        session = session_of(trainer)
        try:
            session.claim((self.prefix + key for key in self.keys()), self)
        except ValueError:
            session.release(self)
            raise
        self._writes_seconds = session.claim_shared(self.prefix + SECONDS, self)
        self._session = session
        self.set_unknown(trainer)
        return session

    def close(self) -> None:
        """Give the keys back; the state stays for checkpoints that are written after an exception, or after ``fit``."""
        if self._session is not None:
            self._kept, self._kept_run = self._state(self._session), self.run_state()
            self._session.release(self)
        self._session = self._restored = None

    def set_unknown(self, trainer: Trainer) -> None:
        """Set all keys to NaN: EarlyStopping and ModelCheckpoint refuse a key that is not there.

        Args:
            trainer: The Trainer.
        """
        keys = [*self.keys(), SECONDS] if self._writes_seconds else self.keys()
        self._set_callback_metrics(trainer, dict.fromkeys(keys, torch.nan))

    def publish(self, trainer: Trainer, values: dict[str, float], step: int) -> None:
        """Send values to every logger and to ``callback_metrics``.

        Args:
            trainer: The Trainer.
            values: Values by key, without the prefix.
            step: The global step they belong to.
        """
        if self._writes_seconds and self._session is not None:
            values = {**values, SECONDS: self._session.stopwatch.seconds}
        for logger in trainer.loggers:
            logger.log_metrics({self.prefix + key: value for key, value in values.items()}, step=step)
        self._set_callback_metrics(trainer, values)

    def _set_callback_metrics(self, trainer: Trainer, values: dict[str, float]) -> None:
        # Not through self.log: the numbers are the same on all ranks already, and self.log would reduce each again.
        tensors = {self.prefix + key: torch.tensor(value, dtype=torch.float64) for key, value in values.items()}
        trainer.callback_metrics.update(tensors)

    def show(self, trainer: Trainer, report: Any, draw: Callable[[Any, Any], None]) -> None:
        """Draw into every TensorBoard writer there is.

        Args:
            trainer: The Trainer.
            report: Whatever the subclass reports.
            draw: Takes a writer and the report.
        """
        if not trainer.is_global_zero:
            return
        try:
            for writer in tensorboard.writers(trainer.loggers):
                draw(writer, report)
        except Exception as error:  # a full disk is not a reason to stop training
            self.warn(f"could not draw into TensorBoard: {error!r}")

    def warn(self, message: str, on_this_rank: bool = False) -> None:
        """Warn once per cause, whatever the numbers in it.

        Args:
            message: What happened, with the cause.
            on_this_rank: Warn here, whichever rank this is, of something that rank zero does not know.
        """
        cause = re.sub(r"\d+", "#", message)
        if cause not in self._warned:
            self._warned.add(cause)
            (warnings.warn if on_this_rank else rank_zero_warn)(f"{type(self).__name__} {message}")

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Store the state where ``state_dict`` would have put it.

        With a ``state_dict`` Lightning refuses two equal callbacks when the Trainer is made, in words that do not name
        the keys both would write; our own check does, at the start of ``fit``.
        """
        state = self._kept if self._session is None else self._state(self._session)
        if state is not None:
            checkpoint.setdefault("callbacks", {})[self.state_key] = state
        if (run := self._kept_run if self._session is None else self.run_state()) is not None:
            checkpoint[RUN_STATE] = run

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Take up what is known of the run, whichever callbacks it had before."""
        self._run_before = checkpoint.get(RUN_STATE)

    def _state(self, session: Session) -> dict[str, Any]:
        return {
            "measurement": self.measurement_state(),
            "seconds": session.stopwatch.seconds,
            "num_failed": self.num_failed,
            "summary": self.summary(),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take up the state from a checkpoint.

        Args:
            state_dict: What :meth:`on_save_checkpoint` stored.
        """
        self._restored = state_dict
        self.num_failed = state_dict["num_failed"]
        self.restore(state_dict["summary"])
