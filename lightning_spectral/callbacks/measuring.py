"""The wiring that every callback on the shared measurement has in common."""

import re
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_warn

from lightning_spectral import tensorboard
from lightning_spectral.capture.layers import resolve_layers
from lightning_spectral.measurement import Measurement, Report, Request, Session, session_of

SECONDS = "spectral/seconds"
"""Key of the time that measuring has cost so far; one for all callbacks of a Trainer with the same prefix."""


class MeasuringCallback(Callback):
    """Joins the measurement that its arguments ask for, forwards the Trainer's events, logs what it makes of a report.

    A subclass says which keys it writes and what they are worth (:meth:`quantities`, :meth:`measured`), and may draw
    (:meth:`draw`) and keep a summary (:meth:`summary`, :meth:`restore`).
    """

    kind: str
    """First part of the keys."""
    quantities: tuple[str, ...]
    """Last parts of the keys, for each layer."""
    num_vectors = 0
    """How many leading eigenvectors are needed."""

    def __init__(
        self,
        layers: str | Sequence[str] | None,
        every_n_steps: int,
        stage: Literal["train", "validate"],
        num_tokens: int,
        num_groups: int,
        normalize: bool,
        dtype: Literal["float32", "float64"],
        mask: str | None,
        dataloader_idx: int,
        prefix: str,
    ) -> None:
        for name, value in (("every_n_steps", every_n_steps), ("num_tokens", num_tokens), ("num_groups", num_groups)):
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} must be a positive int, got {value!r}")
        for name, choice, known in (("stage", stage, ("train", "validate")), ("dtype", dtype, ("float32", "float64"))):
            if choice not in known:
                raise ValueError(f"{name} must be {known[0]!r} or {known[1]!r}, got {choice!r}")
        if layers is not None and not (isinstance(layers, Sequence) and all(isinstance(name, str) for name in layers)):
            raise ValueError(f"layers must be None, 'all', a pattern or a list of patterns, got {layers!r}")
        if isinstance(dataloader_idx, bool) or not isinstance(dataloader_idx, int) or dataloader_idx < 0:
            raise ValueError(f"dataloader_idx must be an int from 0, got {dataloader_idx!r}")
        if not isinstance(prefix, str):
            raise ValueError(f"prefix must be a string, got {prefix!r}: '' puts nothing before the keys")
        if not (mask is None or isinstance(mask, str)):
            raise ValueError(f"mask must be a key of the batch, or None for all tokens, got {mask!r}")
        self.layers = layers
        self.prefix = prefix
        self.request = Request(stage, every_n_steps, num_tokens, num_groups, normalize, dtype, mask, dataloader_idx)
        self.num_failed = 0
        self._session: Session | None = None
        self._measurement: Measurement | None = None
        self._layer_names: list[str] = []
        self._seen: Report | None = None
        self._restored: dict[str, Any] | None = None
        self._has_checked_widths = False
        self._warned: set[str] = set()

    def measured(self, report: Report) -> dict[str, float]:
        """What a report comes to.

        Args:
            report: The shared report; it may hold more layers than were asked for here.

        Returns:
            Values by full key, without the prefix.
        """
        raise NotImplementedError

    def check_widths(self, widths: dict[str, int]) -> None:
        """Refuse settings that do not fit the layers, as soon as their widths are known.

        Args:
            widths: Width by layer.

        Raises:
            ValueError: In one line.
        """

    def draw(self, writer: Any, report: Report) -> None:
        """Show a report in TensorBoard; on rank zero only.

        Args:
            writer: A SummaryWriter.
            report: The report.
        """

    def summary(self) -> dict[str, Any]:
        """What a subclass wants to find again after a resume.

        Returns:
            Plain numbers, strings, lists and dictionaries.
        """
        return {}

    def restore(self, summary: dict[str, Any]) -> None:
        """Take up what :meth:`summary` gave.

        Args:
            summary: Its result, or an empty one to begin anew.
        """

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Find the layers and hook them: after ``configure_model``, before the first, perhaps compiled, call."""
        if self.request.stage == "validate" and not trainer.enable_validation:
            rank_zero_warn(
                f"{type(self).__name__}(stage='validate') will measure nothing: no validation will run. "
                "Give the Trainer validation data, or use stage='train'."
            )
        if trainer.loggers and trainer.is_global_zero and not tensorboard.writers(trainer.loggers):
            rank_zero_warn(
                f"{type(self).__name__} can write no histograms or figures: none of the loggers takes them. "
                "Add a TensorBoardLogger to see them; scalars go to every logger."
            )
        if self._restored is None:
            # This object may have been through another fit, of another model.
            self.num_failed = 0
            self._warned.clear()
            self.restore({})
        self._join(trainer, pl_module)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin, or resume, where the Trainer stands: only now is its step restored."""
        if self._measurement is not None and self._session is not None and self._restored is not None:
            # Whoever has a state gives it: the first member may be new to this run.
            self._measurement.load_state_dict(self._restored["measurement"])
            self._session.stopwatch.seconds = max(self._session.stopwatch.seconds, self._restored["seconds"])
        if measurement := self._led():
            measurement.start_training(trainer.global_step)
        # The sanity check clears what was there.
        self._set_callback_metrics(trainer, dict.fromkeys(self._keys(), torch.nan))

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Open the hooks if this step belongs to a report."""
        if measurement := self._led():
            measurement.start_train_batch(batch, trainer.global_step)

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: torch.Tensor) -> None:
        """Close the hooks."""
        if measurement := self._led():
            measurement.pause()

    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Open the hooks again, for manual optimisation with several forwards."""
        if measurement := self._led():
            measurement.resume()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Log a report if one is due."""
        if measurement := self._led():
            measurement.end_train_batch(trainer.global_step)
        self._take_report(trainer)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin a validation run; without ``fit`` it is always measured."""
        alone = trainer.state.fn == "validate"
        if alone and self._measurement is None:
            self._join(trainer, pl_module)
        if (measurement := self._led()) and not trainer.sanity_checking:
            measurement.start_validation(trainer.global_step, always=alone)

    def on_validation_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Open the hooks if this loader is measured."""
        if measurement := self._led():
            measurement.start_validation_batch(batch, dataloader_idx)

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Close the hooks."""
        if measurement := self._led():
            measurement.end_validation_batch()
        self._check_widths()

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log the report: before EarlyStopping and ModelCheckpoint look at what was measured."""
        if (measurement := self._led()) and not trainer.sanity_checking:
            measurement.end_validation(trainer.global_step)
        self._take_report(trainer)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Store the state where ``state_dict`` would have put it.

        With a ``state_dict`` Lightning refuses two equal callbacks when the Trainer is made, in words that do not name
        the keys both would write; our own check does, at the start of ``fit``.
        """
        if self._measurement is not None and self._session is not None:
            checkpoint.setdefault("callbacks", {})[self.state_key] = {
                "measurement": self._measurement.state_dict(),
                "seconds": self._session.stopwatch.seconds,
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

    @property
    def state_key(self) -> str:
        """Name of the state in a checkpoint; callbacks with equal ones would write equal keys."""
        return self._generate_state_key(layers=self.layers, stage=self.request.stage, prefix=self.prefix)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Take the hooks off."""
        self._leave()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Take the hooks off: Lightning calls no ``teardown`` then."""
        self._leave()

    def _led(self) -> Measurement | None:
        """The measurement, if this callback's events are the ones that act."""
        measurement = self._measurement
        return measurement if measurement is not None and measurement.is_led_by(self) else None

    def _join(self, trainer: Trainer, pl_module: LightningModule) -> None:
        layers = resolve_layers(pl_module, self.layers)
        self._layer_names = list(layers)
        self._session = session_of(trainer)
        keys = self._keys()
        self._session.claim((self.prefix + key for key in keys), self)
        self._writes_seconds = self._session.claim_shared(self.prefix + SECONDS, self)
        self._measurement = self._session.measurement(self.request, pl_module.device)
        self._measurement.join(self, layers, self.num_vectors)
        # EarlyStopping and ModelCheckpoint refuse a key that is not there; NaN is what is known so far.
        self._set_callback_metrics(trainer, dict.fromkeys(keys, torch.nan))

    def _leave(self) -> None:
        if self._measurement is not None:
            self._measurement.leave(self)
        if self._session is not None:
            self._session.release(self)
        self._measurement = self._session = self._seen = self._restored = None
        self._has_checked_widths = False

    def _keys(self) -> list[str]:
        keys = [f"{self.kind}/{name}/{quantity}" for name in self._layer_names for quantity in self.quantities]
        return [*keys, f"{self.kind}/failed"]

    def _check_widths(self) -> None:
        if not self._has_checked_widths and self._measurement is not None and self._measurement.widths:
            self._has_checked_widths = True
            widths = self._measurement.widths
            self.check_widths({name: widths[name] for name in self._layer_names if name in widths})

    def _take_report(self, trainer: Trainer) -> None:
        self._check_widths()
        if self._measurement is None or self._session is None or self._measurement.report is self._seen:
            return
        report = self._seen = self._measurement.report
        assert report is not None
        with self._session.stopwatch.running():
            values = self._values(report)
            self._show(trainer, report, self.draw)
        if self._writes_seconds:
            values[SECONDS] = self._session.stopwatch.seconds
        for logger in trainer.loggers:
            logger.log_metrics({self.prefix + key: value for key, value in values.items()}, step=report.step)
        self._set_callback_metrics(trainer, values)

    def _values(self, report: Report) -> dict[str, float]:
        """The values of all keys; NaN for what failed, whatever the cause."""
        failures = {name: report.layers[name].failure for name in self._layer_names}
        self.num_failed += sum(failure is not None for failure in failures.values())
        for name, failure in failures.items():
            if failure is not None:
                self._warn(report, name, failure)
        values = dict.fromkeys(self._keys(), torch.nan)
        try:
            values |= self.measured(report)
        except Exception as error:  # whatever it is, the training run is worth more than the measurement
            self.num_failed += 1
            self._warn(report, self.kind, repr(error))
        values[f"{self.kind}/failed"] = float(self.num_failed)
        return values

    def _show(self, trainer: Trainer, report: Report, draw: Callable[[Any, Report], None]) -> None:
        """Draw into every TensorBoard writer there is."""
        if not trainer.is_global_zero:
            return
        try:
            for writer in tensorboard.writers(trainer.loggers):
                draw(writer, report)
        except Exception as error:  # a full disk is not a reason to stop either
            self._warn(report, "TensorBoard", repr(error))

    def _set_callback_metrics(self, trainer: Trainer, values: dict[str, float]) -> None:
        # Not through self.log: the numbers are the same on all ranks already, and self.log would reduce each again.
        tensors = {self.prefix + key: torch.tensor(value, dtype=torch.float64) for key, value in values.items()}
        trainer.callback_metrics.update(tensors)

    def _warn(self, report: Report, where: str, reason: str) -> None:
        """Warn once per cause, whatever the numbers in it."""
        cause = re.sub(r"\d+", "#", reason)
        if cause not in self._warned:
            self._warned.add(cause)
            rank_zero_warn(f"{type(self).__name__} at step {report.step}, {where}: NaN, because {reason}")
