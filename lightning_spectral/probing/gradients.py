"""What would be read of gradients: the measurements of the callback, fed with one batch, and each engine tried."""

from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from math import isnan
from time import perf_counter
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from lightning_spectral.callbacks.bands import Bands
from lightning_spectral.capture.batch import Cut, hold, take
from lightning_spectral.capture.contraction import owners
from lightning_spectral.capture.engines import Method, engine_of
from lightning_spectral.capture.one_line import reason_of
from lightning_spectral.capture.parameters import resolve_parameters, trainable_parameters
from lightning_spectral.capture.per_sample import chunk_bytes, fill_rows, fitting_chunk, saved_bytes
from lightning_spectral.capture.self_check import MOST_SAMPLES
from lightning_spectral.capture.shadow import BatchLoss
from lightning_spectral.measurement import GradientMeasurement, GradientReport, GradientRequest, Scene
from lightning_spectral.measurement.gradient_check import GradientCheck
from lightning_spectral.measurement.gradient_request import ROW_DTYPES
from lightning_spectral.measurement.stopwatch import Stopwatch, settle
from lightning_spectral.probing.found import EngineFound, LossFound, ParameterFound

MOST_TIMED = 8
"""Samples that an engine is timed by."""

MOST_TIMED_BY_LOOP = 2


class GradientProbe:
    """Takes per-sample gradients of one batch: by passes of their own, and off the backward pass of its training step.

    Args:
        request: What would be measured.
        bands: That would be fitted.
    """

    def __init__(self, request: GradientRequest, bands: Bands) -> None:
        self.request = request
        self.bands = bands
        self.problem: str | None = None
        """Why the choice of parameters means nothing."""
        self.parameters: dict[str, nn.Parameter] = {}
        self.loss = LossFound()
        self.engines: tuple[EngineFound, ...] = ()
        self._refused: str | None = None
        """Why there are no passes of single samples."""
        self._no_hooks: str | None = None
        self._passes: GradientMeasurement | None = None
        self._hooks: GradientMeasurement | None = None
        self._kinds: dict[str, str] = {}
        self._problems: dict[str, str] = {}
        self._scene: Scene | None = None
        self._cut: Cut | None = None

    def look_up(self, root: nn.Module) -> None:
        """Find the parameters, or one that could be named."""
        try:
            self.parameters, self.problem = resolve_parameters(root, self.request.parameters), None
        except ValueError as error:
            self.problem = str(error)
            trained = trainable_parameters(root)
            matrices = [name for name, p in trained.items() if is_lazy(p) or p.ndim >= 2]
            chosen = (matrices or list(trained))[:1]
            self.parameters = {name: trained[name] for name in chosen}
            self.request = replace(self.request, parameters=tuple(chosen))
        for name, parameter in self.parameters.items():
            classes = dict.fromkeys(type(module).__name__ for module, _ in owners(root, parameter))
            self._kinds[name] = ", ".join(classes)

    def start(self, scene: Scene, batch: Any, cut: Cut | str) -> None:
        """The batch is about to pass; ``cut`` into samples, or why it cannot be."""
        self.look_up(scene.module)
        self._scene = scene
        if not self.parameters:
            self._refused = self._no_hooks = self.problem
            return
        if isinstance(cut, str):
            self._refused = self._no_hooks = cut
            return
        self._cut = cut
        # As many as the self-check looks at.
        count = max(2, min(self.request.num_samples, cut.size, MOST_SAMPLES))
        common: dict[str, Any] = {"every_n_steps": 1, "num_groups": 1, "stage": "train", "weights": False}
        request = replace(self.request, num_samples=count, method="auto", **common)
        try:
            self._passes = self._measure(request, scene, batch)
        except ValueError as error:
            self._refused = str(error)
        count = max(2, min(self.request.num_samples, cut.size))
        try:
            check = "off" if self._passes is not None else request.check
            hooks = replace(request, num_samples=count, method="hooks", check=check)
            self._hooks = self._measure(hooks, scene, batch)
        except ValueError as error:
            self._no_hooks = str(error)

    def _measure(self, request: GradientRequest, scene: Scene, batch: Any) -> GradientMeasurement:
        measurement = request.measure(scene._replace(stopwatch=Stopwatch()))
        measurement.start_training(0)
        measurement.start_train_batch(batch, 0)
        return measurement

    @property
    def _measurements(self) -> list[GradientMeasurement]:
        return [one for one in (self._passes, self._hooks) if one is not None]

    def before_backward(self, scale: Callable[[], float], loss: Tensor) -> None:
        """A backward pass begins."""
        for measurement in self._measurements:
            measurement.before_backward(scale, loss)

    def after_backward(self, is_last: bool) -> None:
        """A backward pass has ended."""
        for measurement in self._measurements:
            measurement.after_backward(is_last)

    def before_optimizer_step(self, optimizer: Any) -> None:
        """An optimizer is about to move its parameters."""
        for measurement in self._measurements:
            measurement.before_optimizer_step(optimizer)

    def end(self, loss: float | None) -> None:
        """The batch has passed: make the reports, and try the engines."""
        hooks = self._end_hooks()
        if self._passes is None:
            checker = self._hooks
            passes = [EngineFound(method, False, problem=self._refused) for method in ("vmap", "loop")]
        else:
            checker = self._passes
            self._report(self._passes)
            passes = self._try_passes(self._passes)
        self.loss = self._loss(None if checker is None else checker.check, loss)
        self.engines = (passes[0], hooks, passes[1])
        for measurement in self._measurements:
            measurement.remove()
        self._passes = self._hooks = None

    def found(self) -> tuple[ParameterFound, ...]:
        """The parameters, as far as they were seen."""
        return tuple(
            ParameterFound(
                name,
                () if is_lazy(parameter) else tuple(parameter.shape),
                self._kinds[name],
                self._problems.get(name) or self._beyond(parameter),
            )
            for name, parameter in self.parameters.items()
        )

    def _beyond(self, parameter: nn.Parameter) -> str | None:
        """Why the bands would be refused; a vector of few numbers has none."""
        if not is_lazy(parameter) and parameter.ndim >= 2:
            try:
                self.bands.check(min(self.request.num_samples, parameter.numel()))
            except ValueError as error:
                return str(error)
        return None

    @property
    def num_rows(self) -> int:
        """N: samples of a report, as far as batches like this one bring them."""
        size = 0 if self._cut is None else self._cut.size
        return min(self.request.num_samples, size * self.request.every_n_steps)

    @property
    def num_numbers(self) -> int:
        """P: numbers of all parameters together."""
        return sum(p.numel() for p in self.parameters.values() if not is_lazy(p))

    def _report(self, measurement: GradientMeasurement) -> dict[str, str]:
        """Make a report, and say what failed."""
        measurement.close()
        measurement.make_report(1)
        assert isinstance(measurement.report, GradientReport)
        found = {name: part.spectrum.failure for name, part in measurement.report.parameters.items()}
        failures = {name: failure for name, failure in found.items() if failure is not None}
        if measurement is self._passes:
            self._problems = failures
        return failures

    def _end_hooks(self) -> EngineFound:
        if self._hooks is None:
            return EngineFound("hooks", False, problem=self._no_hooks)
        self._hooks.close()
        assert self._cut is not None
        count = min(self._cut.size, self._hooks.request.num_samples)
        seconds = self._hooks.stopwatch.seconds
        failures = self._report(self._hooks)
        doubts = set(self._hooks.check.doubts.values())
        reasons = [reason for reason in failures.values() if reason not in doubts]
        if reasons:
            some = f" ({len(reasons)} of {len(self.parameters)} parameters)" if len(reasons) > 1 else ""
            return EngineFound("hooks", False, problem=f"{reasons[0]}{some}")
        if self._passes is None:
            self._problems = failures
        whole = seconds * self.num_rows / max(count, 1)
        return EngineFound("hooks", True, seconds=whole, num_bytes=self._row_bytes)

    @property
    def _row_bytes(self) -> int:
        return self.request.num_samples * self.num_numbers * ROW_DTYPES[self.request.row_dtype].itemsize

    def _try_passes(self, measurement: GradientMeasurement) -> list[EngineFound]:
        """By vmap and by a loop, each once to see that it works, and once more to be timed."""
        assert self._scene is not None
        assert self._cut is not None
        found: list[EngineFound] = []
        try:
            loss = self._scene.make_loss(self.request.loss_fn)
            with loss.isolated(self._cut):
                doubts = "; ".join(measurement.check.doubts.values())
                names = [name for name in measurement.parameters if self._problems.get(name) in (None, doubts)]
                names = names or list(measurement.parameters)
                batch = take(self._cut, 0, MOST_TIMED)
                saved = saved_bytes(loss, names, batch)
                chunk = self.request.chunk_size or fitting_chunk(loss, names, batch)
                for method in ("vmap", "loop"):
                    auto = method == measurement.method
                    found.append(self._try(method, loss, names, batch, saved, chunk, auto))
                if isnan(measurement.check.losses[0]):
                    with suppress(Exception), torch.no_grad():
                        measurement.check.losses = float(loss(hold(self._cut.data))) / loss.scale, torch.nan
        except Exception as error:  # whatever the loss does to be unfit for this
            reason = reason_of(error)
            return [EngineFound(method, False, problem=reason) for method in ("vmap", "loop")]
        return found

    def _try(
        self, method: Method, loss: BatchLoss, names: list[str], batch: Cut, saved: int, chunk: int, is_auto: bool
    ) -> EngineFound:
        engine = engine_of(method)
        size = min(batch.size, MOST_TIMED_BY_LOOP) if method == "loop" else batch.size
        try:
            for count in (1 if method == "loop" else size, size):
                part, rows = take(batch, 0, count), self._room(loss, names, count)
                settle(loss_device(loss))
                start = perf_counter()
                fill_rows(engine, loss, names, part, rows, chunk)
                settle(loss_device(loss))
                seconds = perf_counter() - start
        except Exception as error:
            return EngineFound(method, False, problem=reason_of(error))
        at_a_time = chunk if method == "vmap" else 1
        num_bytes = self._row_bytes + copy_bytes(loss) + chunk_bytes(at_a_time, saved, self.num_numbers)
        whole = seconds * self.num_rows / size
        return EngineFound(method, True, is_auto, whole, num_bytes)

    @staticmethod
    def _room(loss: BatchLoss, names: list[str], count: int) -> dict[str, Tensor]:
        parameters = {name: loss.parameter(name)[1] for name in names}
        return {
            name: torch.empty(count, p.numel(), dtype=torch.promote_types(p.dtype, torch.float32), device=p.device)
            for name, p in parameters.items()
        }

    def _loss(self, checker: GradientCheck | None, of_training: float | None) -> LossFound:
        if checker is None:
            return LossFound(of_training=of_training, problem=self._refused)
        value, other = checker.losses
        doubts = "; ".join(checker.doubts.values())
        return LossFound(
            value=None if isnan(value) else value,
            of_training=other if of_training is None and not isnan(other) else of_training,
            is_same=checker.results.get("loss", "not looked at"),
            is_mean=checker.results.get("span", "not looked at"),
            residual=None if isnan(checker.residual) else checker.residual,
            weights_ratio=None if isnan(checker.weights_ratio) else checker.weights_ratio,
            problem=doubts or (self._refused if self._passes is None else None),
        )


def loss_device(loss: BatchLoss) -> torch.device:
    """Where a shadow computes."""
    return next(loss.parameters()).device


def copy_bytes(loss: BatchLoss) -> int:
    """Bytes of a shadow's tensors."""
    return sum(t.nbytes for t in (*loss.parameters(), *loss.buffers()))
