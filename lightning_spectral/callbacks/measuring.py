"""What every callback on the shared activation measurement has in common."""

from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import Any, Literal

from lightning.pytorch import LightningModule, Trainer
from torch import nn

from lightning_spectral.callbacks.arguments import check_choice, check_positive
from lightning_spectral.callbacks.run_about import RunNotes
from lightning_spectral.callbacks.staged_callback import StagedCallback
from lightning_spectral.capture.layers import resolve_layers
from lightning_spectral.measurement import Measurement, Report, Request


class MeasuringCallback(StagedCallback):
    """Joins the measurement that its arguments ask for, forwards the Trainer's events, logs what it makes of a report.

    A subclass says what it writes (``quantities``, or :meth:`keys`) and what that is worth in a report
    (:meth:`measured`); it may choose among the layers (:meth:`choose_layers`).
    """

    measures = "activation"
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
        notes: RunNotes,
    ) -> None:
        super().__init__(every_n_steps, stage, num_groups, dataloader_idx, prefix, notes)
        check_positive(num_tokens=num_tokens)
        check_choice("dtype", dtype, ("float32", "float64"))
        if layers is not None and not (isinstance(layers, Sequence) and all(isinstance(name, str) for name in layers)):
            raise ValueError(f"layers must be None, 'all', a pattern or a list of patterns, got {layers!r}")
        if not (mask is None or isinstance(mask, str)):
            raise ValueError(f"mask must be a key of the batch, or None for all tokens, got {mask!r}")
        self.layers = layers
        self.request = Request(stage, every_n_steps, num_tokens, num_groups, normalize, dtype, mask, dataloader_idx)
        self._measurement: Measurement | None = None
        self._layer_names: list[str] = []
        self._seen: Report | None = None
        self._has_checked_widths = False

    def keys(self) -> list[str]:
        """The keys this callback writes: each quantity of each layer, and how often one could not be had."""
        keys = [f"{self.kind}/{name}/{quantity}" for name in self._layer_names for quantity in self.quantities]
        return [*keys, f"{self.kind}/failed"]

    def settings(self) -> dict[str, Any]:
        """How the measurement is made, for the record of the run.

        Returns:
            JSON-like values by name.
        """
        layers = [] if self._measurement is None else self._measurement.layers
        return asdict(self.request) | {"layers": layers}

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

    @property
    def state_key(self) -> str:
        """Name of the state in a checkpoint; callbacks with equal ones would write equal keys."""
        return self._generate_state_key(layers=self.layers, stage=self.request.stage, prefix=self.prefix)

    def join(self, trainer: Trainer, pl_module: LightningModule) -> Measurement:
        """Find the layers and join the measurement that the arguments ask for.

        Args:
            trainer: The Trainer.
            pl_module: The module that is trained.

        Returns:
            The shared measurement.
        """
        layers = self.choose_layers(pl_module)
        self._layer_names = list(layers)
        session = self.open(trainer)
        measurement = session.measurement(self.request, pl_module.device)
        measurement.join(self, layers, self.num_vectors)
        return measurement

    def leave(self, measurement: Any) -> None:
        """Leave the shared measurement.

        Args:
            measurement: The shared measurement.
        """
        measurement.leave(self)
        self._has_checked_widths = False

    def leads(self, measurement: Any) -> bool:
        """Whether this callback joined first.

        Args:
            measurement: The shared measurement.

        Returns:
            True if so.
        """
        return measurement.is_led_by(self)

    def failures(self, report: Report) -> Iterator[tuple[str, str, bool]]:
        """The layers that could not be measured.

        Args:
            report: The shared report.

        Yields:
            Name, reason, and whether other ranks may not know it.
        """
        for name in self._layer_names:
            layer = report.layers[name]
            if layer.failure is not None:
                yield name, layer.failure, layer.failed_here

    def check_early(self) -> None:
        """Check the widths once they are known."""
        widths = {} if self._measurement is None else self._measurement.widths
        if widths and not self._has_checked_widths:
            self._has_checked_widths = True
            self.check_widths({name: widths[name] for name in self._layer_names if name in widths})
