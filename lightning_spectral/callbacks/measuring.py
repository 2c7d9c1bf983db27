"""The wiring that every callback on the shared activation measurement has in common."""

from collections.abc import Sequence
from typing import Any, Literal

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import nn

from lightning_spectral import tensorboard
from lightning_spectral.callbacks.spectral_callback import SpectralCallback
from lightning_spectral.capture.layers import resolve_layers
from lightning_spectral.measurement import Measurement, Report, Request


class MeasuringCallback(SpectralCallback):
    """Joins the measurement that its arguments ask for, forwards the Trainer's events, logs what it makes of a report.

    A subclass says what it writes (``quantities``, or :meth:`keys`) and what that is worth in a report
    (:meth:`measured`); it may choose among the layers (:meth:`choose_layers`).
    """

    quantities: tuple[str, ...] = ()
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
        super().__init__(prefix)
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
        if not (mask is None or isinstance(mask, str)):
            raise ValueError(f"mask must be a key of the batch, or None for all tokens, got {mask!r}")
        self.layers = layers
        self.request = Request(stage, every_n_steps, num_tokens, num_groups, normalize, dtype, mask, dataloader_idx)
        self._measurement: Measurement | None = None
        self._layer_names: list[str] = []
        self._seen: Report | None = None
        self._has_checked_widths = False

    def measured(self, report: Report) -> dict[str, float]:
        """What a report comes to.

        Args:
            report: The shared report; it may hold more layers than were asked for here.

        Returns:
            Values by key, without the prefix.
        """
        raise NotImplementedError

    def keys(self) -> list[str]:
        """The keys this callback writes: each quantity of each layer, and how often one could not be had."""
        keys = [f"{self.kind}/{name}/{quantity}" for name in self._layer_names for quantity in self.quantities]
        return [*keys, f"{self.kind}/failed"]

    def choose_layers(self, pl_module: LightningModule) -> dict[str, nn.Module]:
        """The layers to measure.

        Args:
            pl_module: The module that is trained.

        Returns:
            Modules by name.

        Raises:
            ValueError: If a pattern matches nothing, or no stack of blocks is found.
        """
        return resolve_layers(pl_module, self.layers)

    def check_widths(self, widths: dict[str, int]) -> None:
        """Refuse settings that do not fit the layers, as soon as their widths are known.

        Args:
            widths: Width by layer.

        Raises:
            ValueError: In one line.
        """

    def measurement_state(self) -> dict[str, Any]:
        """What the shared measurement needs to report at the same steps after a resume.

        Returns:
            Plain numbers.
        """
        return {} if self._measurement is None else self._measurement.state_dict()

    @property
    def state_key(self) -> str:
        """Name of the state in a checkpoint; callbacks with equal ones would write equal keys."""
        return self._generate_state_key(layers=self.layers, stage=self.request.stage, prefix=self.prefix)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Find the layers and hook them: after ``configure_model``, before the first, perhaps compiled, call."""
        if self.request.stage == "validate" and not trainer.enable_validation:
            rank_zero_warn(
                f"{type(self).__name__}(stage='validate') will measure nothing: no validation will run. "
                "Give the Trainer validation data, or use stage='train'."
            )
        self.begin_anew()
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
        self.set_unknown(trainer)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Open the hooks if this step belongs to a report."""
        if measurement := self._led():
            measurement.start_train_batch(batch, trainer.global_step)

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: torch.Tensor) -> None:
        """Close the hooks."""
        if measurement := self._led():
            measurement.pause()

    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Open the hooks again under manual optimisation, where another forward of the step may follow.

        Under automatic optimisation what follows the backward pass is somebody else's forward: a sampling callback,
        say.
        """
        if (measurement := self._led()) and not pl_module.automatic_optimization:
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
        if self.request.stage != "validate" and self._measurement is None:
            return
        alone = trainer.state.fn == "validate"
        if alone and self._measurement is None:
            self._join(trainer, pl_module)
        num_loaders = len(trainer.num_val_batches)
        if self.request.stage == "validate" and self.request.dataloader_idx >= num_loaders:
            raise ValueError(
                f"dataloader_idx must be below {num_loaders}, the number of validation loaders, "
                f"got {self.request.dataloader_idx}"
            )
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
        layers = self.choose_layers(pl_module)
        self._layer_names = list(layers)
        session = self.open(trainer)
        self._measurement = session.measurement(self.request, pl_module.device)
        self._measurement.join(self, layers, self.num_vectors)
        shows = not trainer.is_global_zero or tensorboard.writers(trainer.loggers) or not trainer.loggers
        if not shows and session.is_first("a warning of missing histograms"):
            rank_zero_warn(
                "lightning-spectral draws histograms and figures into TensorBoard only, and no logger is one: "
                "add a TensorBoardLogger to see them. Scalars go to every logger."
            )

    def _leave(self) -> None:
        self.close()
        if self._measurement is not None:
            self._measurement.leave(self)
        self._measurement = self._seen = None
        self._has_checked_widths = False

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
            self.show(trainer, report, self.draw)
        self.publish(trainer, values, report.step)

    def _values(self, report: Report) -> dict[str, float]:
        """The values of all keys; NaN for what failed, whatever the cause."""
        for name in self._layer_names:
            layer = report.layers[name]
            if layer.failure is not None:
                self.num_failed += 1
                self.warn(f"at step {report.step}, {name}: NaN, because {layer.failure}", layer.failed_here)
        values = dict.fromkeys(self.keys(), torch.nan)
        try:
            values |= self.measured(report)
        except Exception as error:  # whatever it is, the training run is worth more than the measurement
            self.num_failed += 1
            self.warn(f"at step {report.step}: NaN, because {error!r}")
        values[f"{self.kind}/failed"] = float(self.num_failed)
        return values
