"""The measurement of activations: rows of layers collected as they pass, pooled over ranks and decomposed."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import override

from lightning_spectral.capture.activations import ActivationReader
from lightning_spectral.capture.batch import hold, tensors
from lightning_spectral.capture.channels import (
    ChannelFinder,
    check_channel_dim,
    describe_rows,
    unknown_axis,
)
from lightning_spectral.capture.fast_path import SKIPPED, is_skipped, refuse_compiled
from lightning_spectral.capture.masks import Meaning
from lightning_spectral.capture.nested import has_shape, parts_of, rows_of_parts
from lightning_spectral.capture.one_line import reason_of
from lightning_spectral.capture.time_first import time_first
from lightning_spectral.functional.estimate import Spectrum
from lightning_spectral.functional.powerlaw import Band
from lightning_spectral.measurement.activation_request import ActivationRequest
from lightning_spectral.measurement.decomposition import Decomposition, Pooled
from lightning_spectral.measurement.measurement import Measurement, Report, Scene
from lightning_spectral.measurement.pending import Pending
from lightning_spectral.measurement.same_rows import SameRows
from lightning_spectral.measurement.sample_order import SampleOrder
from lightning_spectral.measurement.stopwatch import settle
from lightning_spectral.measurement.whole_outputs import WholeOutputs
from lightning_spectral.metrics.collectives import world_size
from lightning_spectral.metrics.layout import Layout

JOINED = "it had not joined the model when the rows were read"

ABSENT = "the model has no such layer any more"

NEVER_RAN = "it never ran, or had run compiled before it was watched"


class ActivationMeasurement(Measurement):
    """Collects rows while the model runs and turns them into a report at each due step.

    Args:
        request: What to measure.
        scene: For what. Sums are kept on its device, or on the CPU where that has no float64.
    """

    def __init__(self, request: ActivationRequest, scene: Scene) -> None:
        device = torch.device("cpu") if scene.device.type == "mps" else scene.device
        super().__init__(request, request.num_tokens, scene.stopwatch, device)
        self.is_overlapped = device.type == "cuda" if request.overlap == "auto" else request.overlap
        self.request = request
        self.refusals: dict[str, str] = {}
        """Why layers cannot be read at all, by name, as an output has shown."""
        self._scene = scene
        self._layers: dict[str, nn.Module] = {}
        self._finders: dict[str, ChannelFinder] = {}
        self._axes: dict[tuple[str, int], int] = {}
        self._order = SampleOrder(request.batch_dim, request.mask, self._time_first, self._fail_all)
        self.widths: dict[str, int] = {}
        """Width of each layer that has run; known after the first batch, of training or of the sanity check."""
        self._num_vectors = 0
        self._bands: list[Band] = []
        self.widened: set[str] = set()
        """Layers of which the latest report has shown that they are to be measured in float64 from now on."""
        self.note: str | None = None
        """What is to be said of that, for a callback to take."""
        self._to_widen: set[str] = set()
        """Those of which rows were collected already when that was known."""
        self._reader = ActivationReader(self._read, self._fail, scene.is_in_step)
        self._choices: list[Callable[[], Mapping[str, nn.Module]]] = []
        self._absent: set[str] = set()
        self._rows: dict[str, float] = {}
        layout = Layout.of_world() if scene.layout is None else scene.layout
        self._same_rows = SameRows(self.samples, layout)
        self._whole = WholeOutputs(layout)
        self._lengths: set[int] = set()
        self._steps: dict[str, set[int]] = {}
        self._collector = request.collector(self._reader.names, device, layout)

    def watch(
        self,
        layers: Mapping[str, nn.Module],
        num_vectors: int = 0,
        again: Callable[[], Mapping[str, nn.Module]] | None = None,
        bands: Sequence[Band] = (),
    ) -> None:
        """Watch layers, by name, before the first batch; those already watched are not hooked again.

        Args:
            layers: Modules by name.
            num_vectors: How many leading eigenvectors are needed in each report, 0 for none.
            again: Makes the same choice again before each report, of a model that may have changed.
            bands: What is looked at, and by ``dtype="auto"`` measured in float64 where float32 does not resolve it.

        Raises:
            ValueError: For layers that cannot be read without taking them off a fast path of torch.
        """
        refuse_compiled(self._scene.module, layers)
        self._bands += [band for band in bands if band not in self._bands]
        self._num_vectors = max(self._num_vectors, num_vectors)
        self._choices.append((lambda: layers) if again is None else again)
        for name, layer in layers.items():
            if name not in self._reader.names:
                self._reader.add(name, layer, self._scene.module)
                self._layers[name] = layer

    @override
    def renew(self) -> None:
        found: dict[str, nn.Module] = {}
        for choose in self._choices:
            found = {**choose(), **found}
        self._absent = {name for name in self._reader.names if name not in found}
        for name in self._absent:
            self._reader.drop(name)
        changed = [name for name, layer in found.items() if not self._reader.watches(name, layer)]
        for name in changed:
            self._reader.add(name, found[name], self._scene.module)
            self.widths.pop(name, None)
        if changed:
            self._collector.forget()

    @override
    def remove(self) -> None:
        self._reader.remove()
        self._choices.clear()
        self._layers.clear()
        self._finders.clear()
        # The reader's way back to here is a cycle: the buffers should not wait for the garbage collector.
        self._collector.release()

    @property
    def layers(self) -> list[str]:
        """Names of all that is watched."""
        return list(self._reader.names)

    def offered(self) -> dict[str, int]:
        """Rows of each layer that went by for the next report on this rank, masked ones not counted."""
        return {name: self._collector.offered(name) for name in self._reader.names}

    def failures(self) -> dict[str, str]:
        """Why layers will be NaN in the next report, as far as it is known on this rank."""
        never = {name: NEVER_RAN for name, rows in self.offered().items() if rows == 0 and name not in self.widths}
        return never | dict.fromkeys(self._absent, ABSENT) | self._collector.failures

    def _never(self, name: str) -> str:
        """Why nothing was seen of a layer."""
        layer = self._layers.get(name)
        return NEVER_RAN if layer is None or not is_skipped(self._scene.module, layer) else SKIPPED

    def channel_axis(self, name: str, num_axes: int) -> int | None:
        """The axis, from 0, of a layer's channels in an output of so many axes, once it was found."""
        return self._axes.get((name, num_axes))

    @property
    def mask_meaning(self) -> Meaning | None:
        """What the mask's values mean, once a batch has told; None for booleans, which need no telling, too."""
        return self._order.meaning

    @override
    def open(self, batch: Any, step: int, has_right_stage: bool) -> None:
        # Until the widths are known a batch is looked at even if it is not collected: bad input should show early.
        if self.is_collecting or not self.widths:
            with self.stopwatch.running():
                if has_right_stage and not self.widths and self.request.samples is not None:
                    self.samples.cut(batch)  # what a user's function gets wrong should show early
                size = self.samples.count(batch)
                self._lengths = {one.shape[1] for one in tensors(batch) if one.ndim > 1 and has_shape(one)}
                self._order.begin_batch(batch, size, has_right_stage)
                try:
                    self._collector.begin_batch(size, self._order.mask, self.place)
                except Exception as error:  # whatever a batch may be made of
                    self._fail_all(error)
            is_train = self.is_collecting and self.stage == "train"
            if self.is_collecting and not is_train:
                self._same_rows.look(batch, self.place)
            self._collector.closed = self._closed(step) if is_train else ()
            if is_train:
                for name in self._reader.names:
                    if name not in self._collector.closed:
                        self._steps.setdefault(name, set()).add(step)
        self._reader.is_open = self.is_collecting or not self.widths

    @override
    def close(self) -> None:
        self._reader.is_open = False

    @override
    def before_backward(self, scale: Callable[[], float], loss: Tensor | None = None) -> None:
        # Activation checkpointing repeats forwards in a backward pass.
        self._reader.is_open = False

    @override
    def after_backward(self, is_last: bool) -> None:
        # After the last the next forward pass is somebody else's, of a sampling callback, say.
        self._reader.is_open = self.is_collecting and not is_last

    @override
    def agree_on_rows(self) -> float:
        self._rows = {name: rows for name, rows in self._collector.agree().items() if rows > 0}
        return min(self._rows.values(), default=0.0)

    @override
    def trim(self, step: int) -> None:
        super().trim(step)
        for name in (closed := self._closed(step)):
            self._steps.pop(name, None)
        self._collector.drop(closed)

    def _closed(self, step: int) -> list[str]:
        """Layers of many rows a step, of which only later steps are collected: each is read where its window ends."""
        return [name for name in self._reader.names if not self.schedule.collects(step, self._rows.get(name))]

    def _fail(self, name: str, reason: str) -> None:
        if self.is_collecting:
            self._collector.failures.setdefault(name, reason)

    def _fail_all(self, error: Exception) -> None:
        for name in self._reader.names:
            self._fail(name, reason_of(error))

    def _time_first(self, batch: Any) -> dict[str, bool]:
        if world_size() > 1:
            raise ValueError("it is not asked under several ranks")
        loss = self._scene.make_loss(None)
        return time_first(loss, self._scene.module, self._layers, self.samples.cut(hold(batch)))

    def _read(self, name: str, output: Tensor) -> None:
        if name in self._collector.closed:
            return
        with self.stopwatch.running():
            # Before anything that a rank may come to alone.
            layer = self._reader.layer(name)
            output = self._whole.of(name, layer, output, self._reader.inputs, self._lengths)
        parts: tuple[Tensor, ...] = ()
        if output.is_nested:
            parts = parts_of(output)
            output = max(parts, key=Tensor.numel, default=torch.empty(0, 0))
        axis = self._axes.get((name, output.ndim))
        if axis is None:
            axis = self._channel_axis(name, output)
        if axis is None:
            self._collector.failures[name] = self.refusals[name]
            return
        self.widths[name] = output.shape[axis]
        if self.is_collecting:
            with self.stopwatch.running():
                if parts:
                    self._collector.add(name, *rows_of_parts(parts, axis))
                else:
                    self._collector.add(name, self._order.rows(name, output, axis))

    def _channel_axis(self, name: str, output: Tensor) -> int | None:
        """The axis of a layer's channels, found once for each number of axes; None, and a refusal, if it is not."""
        shape = tuple(output.shape)
        if len(shape) < 2 or 0 in shape:
            return max(len(shape) - 1, 0)  # no rows: not an output to learn from
        try:
            if self.request.channel_dim is None:
                layer = self._layers[name]
                finder = self._finders.setdefault(name, ChannelFinder(layer, self._scene.module))
                axis = finder.find(shape, output.stride())
                if axis is None:
                    raise ValueError(unknown_axis(name, shape))
            else:
                axis = check_channel_dim(self.request.channel_dim, name, shape)
        except Exception as error:
            self.refusals[name] = str(error)
            return None
        self._axes[name, len(shape)] = axis
        self.rows.setdefault(name, describe_rows(output, axis))
        return axis

    @override
    def make_report(self, step: int) -> None:
        settle(self._collector.device)
        with self.stopwatch.running():
            names = self._reader.names
            reasons = dict.fromkeys(self._absent, ABSENT) | self._collector.failures
            spectra = {name: self._missing(name, step, reasons.get(name) or self._never(name)) for name in names}
            if not self._collector.is_agreed:
                self._collector.agree()
            same = self._same_rows.agree(self._collector.device) if self.stage == "validate" else ""
            pooled = []
            for width in self._collector.widths:
                found = self._pool_width(width, step)
                if isinstance(found, Pooled):
                    pooled.append(found)
                else:
                    spectra |= found
            if self.steps_collected and self._rows:
                self.schedule.rows_per_step = min(self._rows.values())
            decomposition = Decomposition(pooled, step, self._num_vectors)

            def end() -> Report:
                return self._reported(step, spectra | decomposition.spectra(self.together), same)

            if self.is_overlapped:
                tensors = [part for one in pooled for part in one.parts]
                self.pending = Pending(step, decomposition.steps(), end, self._collector.device, tensors)
                self.reset()
            else:
                decomposition.solve()
                self.report = end()

    def _reported(self, step: int, spectra: dict[str, Spectrum], same: str) -> Report:
        joined = {name: self._missing(name, step, JOINED) for name in self._reader.names if name not in spectra}
        spectra = {name: replace(spectrum, rows=same) for name, spectrum in (spectra | joined).items()}
        if not self.is_overlapped:
            self.reset()
        self._widen(spectra, step)
        return Report(step, {self.kind: spectra})

    def _widen(self, spectra: Mapping[str, Spectrum], step: int) -> None:
        """Measure in float64 from now on what float32 does not resolve; all ranks do, for all have these spectra."""
        cut: dict[str, list[Band]] = {}
        if self.request.dtype == "auto":
            cut = {name: [band for band in self._bands if one.is_cut_by_dtype(band)] for name, one in spectra.items()}
        self.widened = {name for name, bands in cut.items() if bands}
        new = self.widened - self._to_widen - self._collector.in_float64
        is_late = self.is_collecting or self.steps_collected > 0
        if is_late:
            self._to_widen |= new
        else:
            self._collector.in_float64 |= new
        if new:
            bands = [band for band in self._bands if any(band in cut[name] for name in new)]
            which = "the one after the next" if is_late else "the next"
            self.note = (
                f"at step {step}: float32 does not resolve all of band {' and '.join(map(str, bands))} in "
                f"{', '.join(name for name in cut if name in new)}: what needs it is NaN now, and is measured "
                f"in float64 from {which} report on"
            )

    def _pool_width(self, width: int, step: int) -> Pooled | dict[str, Spectrum]:
        """Moments of the layers of one width; all are missing, on all ranks, where one has no memory for them, say."""
        names = self._collector.names_of(width)

        def pooled() -> tuple[Pooled, list[float]]:
            parts, offered, dtypes = self._collector.pool_width(width)
            failures = dict(self._collector.failures)
            is_bad = zip(names, parts.num_rows.isnan().any(-1).tolist(), strict=True)
            elsewhere = {name: self.together.reasons(failures.get(name)) for name, bad in is_bad if bad}
            return Pooled(list(names), parts, failures, dtypes, elsewhere, self._collector.device), offered

        try:
            found, offered = self.together.attempt(pooled)
        except Exception as error:
            if self.together.ends(error):
                raise
            return {name: self._missing(name, step, reason_of(error)) for name in names}
        # Over the steps of its own: what a layer's window is does not depend on others.
        if self.steps_collected:
            rows = zip(names, offered, strict=True)
            self._rows |= {name: total / len(self._steps[name]) for name, total in rows if total > 0}
        return found

    @override
    def missing_report(self, step: int, reason: str) -> Report:
        return Report(step, {self.kind: {name: self._missing(name, step, reason) for name in self._reader.names}})

    @override
    def state_dict(self) -> dict[str, Any]:
        return {
            **super().state_dict(),
            "rows": dict(self._rows),
            "in_float64": sorted(self._collector.in_float64 | self._to_widen),
        }

    @override
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        super().load_state_dict(state)
        self._rows = dict(state.get("rows", {}))
        self._collector.in_float64 |= set(state.get("in_float64", ()))

    @staticmethod
    def _missing(name: str, step: int, failure: str) -> Spectrum:
        return Spectrum.missing(failure, name=name, step=step, count_without=0)

    @override
    def reset(self) -> None:
        super().reset()
        self._steps.clear()
        self._same_rows.reset()
        self._whole.forget()
        self._collector.reset()
        self._collector.in_float64 |= self._to_widen
        self._to_widen.clear()
