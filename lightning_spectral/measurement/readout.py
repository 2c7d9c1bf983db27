"""The measurement of a readout: what a model's last linear layer could still take off the loss, mode by mode."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn
from typing_extensions import override

from lightning_spectral.capture.head import HeadPass, HeadReader, find_head
from lightning_spectral.functional.arguments import describe
from lightning_spectral.measurement.arguments import check_positive
from lightning_spectral.measurement.measurement import Measurement, Report, Request, Scene
from lightning_spectral.measurement.readout_sums import ReadoutSums
from lightning_spectral.measurement.stopwatch import settle
from lightning_spectral.metrics.collectives import all_reduce, world_size
from lightning_spectral.metrics.layout import are_sharded
from lightning_spectral.theory import Readout

OWN_PASSES = "training_step calls backward itself, and the scale of its loss is not known: manual_backward tells it"


@dataclass(frozen=True, kw_only=True)
class ReadoutRequest(Request):
    """One head, on the rows of the last training steps before a report."""

    kind: ClassVar[str] = "readout"

    readout: str
    num_tokens: int
    is_wide: bool
    """Whether products are in float64."""

    @override
    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive(num_tokens=self.num_tokens)
        if not (isinstance(self.readout, str) and self.readout):
            raise ValueError(f"readout must be the name of a linear layer, or None, got {describe(self.readout)}")
        if self.stage != "train":
            raise ValueError(
                f"readout={self.readout!r} needs backward passes, which validation has not, got "
                f"stage={self.stage!r}: use stage='train'"
            )

    @override
    def measure(self, scene: Scene) -> "ReadoutMeasurement":
        return ReadoutMeasurement(self, scene)


@dataclass(frozen=True)
class ReadoutReport(Report):
    """What one head could still take off the loss, at one step."""

    name: str
    readout: Readout
    span: tuple[int, int]
    """First and last ``global_step`` at whose weights the rows were read."""

    @override
    def arrays_beside(self) -> dict[str, np.ndarray]:
        found = self.readout
        arrays = {
            "eigenvalues": found.eigenvalues.numpy(),
            "task_power": found.power.numpy(),
            "loss": np.asarray(found.loss),
            "num_tokens": np.asarray(found.num_rows),
            "failure": np.asarray(found.failure or ""),
            "span": np.asarray(self.span),
        }
        return {f"readout/{self.name}/{field}": array for field, array in arrays.items()}


class ReadoutMeasurement(Measurement):
    """Sums up rows of a head's input and of its errors in training's own passes.

    Args:
        request: What to measure.
        scene: For what.

    Raises:
        ValueError: If the module has no such head, or is sharded.
    """

    def __init__(self, request: ReadoutRequest, scene: Scene) -> None:
        self._device = torch.device("cpu") if scene.device.type == "mps" else scene.device
        super().__init__(request, request.num_tokens, scene.stopwatch, self._device)
        self.request = request
        self._module = scene.module
        if are_sharded(scene.module) or (scene.layout is not None and scene.layout.has_replicas):
            raise ValueError(
                f"readout={request.readout!r} reads heads that are whole on each rank, got a model of DTensors or "
                "replicas: use 'ddp', or readout=None"
            )
        self._reader = HeadReader(self._add, self._fail, scene.stopwatch.running, scene.is_in_step)
        self._sums: ReadoutSums | None = None
        self._span: list[int] = []
        self._step = 0
        self._scale: float | None = None
        self._loss: Tensor | None = None
        self._reason: str | None = None
        head = find_head(scene.module, request.readout)
        self._reader.watch(head)
        self.is_centred = getattr(head, "bias", None) is not None
        """Whether the head has a bias, and its input is taken about the mean."""

    @property
    def name(self) -> str:
        """Of the head."""
        return self.request.readout

    @override
    def renew(self) -> None:
        try:
            head = find_head(self._module, self.name)
        except ValueError as error:
            self._reader.watch(None)
            self._fail(str(error))
            return
        self._reader.watch(head)
        self.is_centred = getattr(head, "bias", None) is not None

    @override
    def open(self, batch: Any, step: int, has_right_stage: bool) -> None:
        if self.is_collecting and has_right_stage:
            self._step, self._scale, self._loss = step, None, None
            self._reader.begin()

    @override
    def close(self) -> None:
        self._reader.is_open = False

    @override
    def before_backward(self, scale: Callable[[], float], loss: Tensor | None = None) -> None:
        self._reader.takes_runs = False
        if self._reader.is_open:
            with self.stopwatch.running():
                self._scale, self._loss = scale(), loss

    @override
    def after_backward(self, is_last: bool) -> None:
        self._scale, self._loss = None, None
        self._reader.takes_runs = not is_last
        if is_last:
            self._reader.is_open = False

    def _add(self, found: HeadPass) -> None:
        if self._reason is not None:
            return
        if self._scale is None:
            raise ValueError(OWN_PASSES)
        if self._sums is None:
            self._sums = self._make_sums(found.gradient.shape[1], found.inputs.shape[1])
        self._sums.add(found, self._scale, self._loss)
        self._span = [*self._span[:1], self._step]

    def _make_sums(self, num_classes: int, num_features: int) -> ReadoutSums:
        dtype = torch.float64 if self.request.is_wide else torch.float32
        return ReadoutSums(num_classes, num_features, self.is_centred, dtype, self._device)

    def _fail(self, reason: str) -> None:
        if self.is_collecting and self._reason is None:
            self._reason = reason

    @override
    def agree_on_rows(self) -> float:
        num = torch.zeros(1, dtype=torch.float64, device=self._device)
        if self._sums is not None:
            num += self._sums.num_rows
        if world_size() > 1:
            all_reduce(num)
        return float(num)

    @override
    def make_report(self, step: int) -> None:
        settle(self._device)
        with self.stopwatch.running():
            if self._reason is not None:
                raise RuntimeError(self._reason)
            sums = self._sums
            if world_size() > 1:
                sums = self._reduced()
            if sums is None:
                raise ValueError("no gradient reached its head, or it ran compiled")
            span = (self._span[0], self._span[-1]) if self._span else (step, step)
            self.report = ReadoutReport(step, {}, self.name, sums.solve(), span)
            self.reset()

    def _reduced(self) -> ReadoutSums:
        """Those of all ranks; one that had no rows of its own takes part all the same."""
        sums = self._sums
        if sums is None:
            head: Any = find_head(self._module, self.name)
            # Of transformers' Conv1D the weight is the other way round.
            shape = head.weight.shape if isinstance(head, nn.Linear) else head.weight.T.shape
            sums = self._make_sums(shape[0], shape[1])
        sums.reduce()
        return sums

    @override
    def missing_report(self, step: int, reason: str) -> Report:
        return ReadoutReport(step, {}, self.name, Readout.missing(reason), (step, step))

    @override
    def remove(self) -> None:
        self._reader.is_open = False
        self._reader.watch(None)
        self._sums = None

    @override
    def reset(self) -> None:
        super().reset()
        self._sums, self._reason, self._span = None, None, []
