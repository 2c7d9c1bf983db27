"""What would be read of layers: the measurement of the callbacks, fed with one batch."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from lightning_spectral.callbacks.bands import Bands
from lightning_spectral.capture.activations import ActivationReader
from lightning_spectral.capture.batch import Samples, named_tensors
from lightning_spectral.capture.layers import check_one_mask, resolve_layers
from lightning_spectral.capture.masks import Mask
from lightning_spectral.capture.names import clean_name
from lightning_spectral.capture.one_line import reason_of
from lightning_spectral.measurement import ActivationMeasurement, ActivationRequest, Scene
from lightning_spectral.measurement.arguments import MAX_COUNT
from lightning_spectral.probing.found import LayerFound, MaskFound

MOST_EXAMPLES = 8
"""Layers that are shown for a choice where none was found."""


class ActivationProbe:
    """Watches the layers of a choice while one batch passes, as the callbacks do.

    Args:
        request: What would be measured; of any number of rows, for a probe takes what the batch has.
        choice: Patterns, as the callbacks take them.
        bands: That would be fitted.
    """

    def __init__(self, request: ActivationRequest, choice: Any, bands: Bands) -> None:
        self.request = replace(request, num_tokens=MAX_COUNT, every_n_steps=1, stage="train")
        self.choice = choice
        self.bands = bands
        self.layers: dict[str, nn.Module] = {}
        self.problem: str | None = None
        """Why the choice means nothing."""
        self.mask = MaskFound(key=request.mask)
        self.outputs: dict[str, Tensor] = {}
        """Like the last output of each layer, without memory."""
        self._shapes = ActivationReader(self._note)
        self._measurement: ActivationMeasurement | None = None
        self._found: list[LayerFound] = []

    def look_up(self, root: nn.Module) -> None:
        """Find the layers, or examples of what could be named."""
        try:
            self.layers, self.problem = resolve_layers(root, self.choice), None
        except ValueError as error:
            self.problem = str(error)
            self.layers = examples(root) if self.choice is None or self.choice == "all" else {}

    def start(self, scene: Scene, batch: Any) -> None:
        """The batch is about to pass."""
        self.look_up(scene.module)
        for name, layer in self.layers.items():
            self._shapes.add(name, layer, scene.module)
        request = self.request
        try:
            if self.problem is None:
                check_one_mask(scene.module, self.choice, request.mask)
        except ValueError as error:
            self.mask, request = replace(self.mask, problem=str(error)), replace(request, mask=None)
        try:
            self._measure(scene, batch, request)
        except ValueError as error:
            self.mask = replace(self.mask, problem=str(error))
            assert self._measurement is not None
            self._measurement.remove()
            self._measure(scene, batch, replace(self.request, mask=None, samples=None))
        assert self._measurement is not None
        self._shapes.is_open = True
        self._look_at_mask(batch, self._measurement.samples)

    def _measure(self, scene: Scene, batch: Any, request: ActivationRequest) -> None:
        self._measurement = request.measure(scene)
        self._measurement.watch(self.layers)
        self._measurement.start_training(0)
        self._measurement.start_train_batch(batch, 0)

    def before_backward(self) -> None:
        """Layers that run from now on are run again, for checkpoints' sake."""
        self._shapes.is_open = False
        if self._measurement is not None:
            self._measurement.before_backward(lambda: 1.0)

    def after_backward(self, is_last: bool) -> None:
        """Other forward passes may follow."""
        self._shapes.is_open = not is_last
        if self._measurement is not None:
            self._measurement.after_backward(is_last)

    def end(self) -> None:
        """The batch has passed."""
        self._shapes.remove()
        if self._measurement is not None:
            self._measurement.close()
            rows, problems = self._measurement.offered(), self._measurement.failures()
            self._found = [self._layer(self._measurement, name, rows, problems) for name in self.layers]
            self._measurement.remove()
            self._measurement = None

    def found(self) -> tuple[LayerFound, ...]:
        """The layers, as far as they were seen."""
        names = [LayerFound(name, type(layer).__name__) for name, layer in self.layers.items()]
        return tuple(self._found or names)

    def _note(self, name: str, output: Tensor) -> None:
        self.outputs[name] = torch.empty_like(output, device="meta")

    def _layer(
        self,
        measurement: ActivationMeasurement,
        name: str,
        rows: Mapping[str, int],
        problems: Mapping[str, str],
    ) -> LayerFound:
        output, width = self.outputs.get(name), measurement.widths.get(name)
        problem = measurement.refusals.get(name, problems.get(name))
        if problem is None and width is not None:
            try:
                self.bands.check(width)
            except ValueError as error:
                problem = str(error)
        return LayerFound(
            name=name,
            kind=type(self.layers[name]).__name__,
            shape=None if output is None else tuple(output.shape),
            channel_dim=None if output is None else measurement.channel_axis(name, output.ndim),
            width=width,
            row=measurement.rows.get(name),
            rows=rows[name],
            problem=problem,
        )

    def _look_at_mask(self, batch: Any, samples: Samples) -> None:
        key = self.mask.key
        if self.mask.problem is not None:
            return
        if key is None:
            self.mask = replace(self.mask, others=masks_in(batch, samples.count(batch)))
            return
        assert self._measurement is not None
        try:
            real = Mask(key)(batch)
            meaning = self._measurement.mask_meaning or "booleans, True is real"
            self.mask = replace(self.mask, meaning=meaning, num_real=int(real.sum()), num_all=real.numel())
        except Exception as error:
            self.mask = replace(self.mask, problem=reason_of(error))


def masks_in(batch: Any, num_samples: int | None) -> dict[str, str]:
    """Tensors of a batch that could be named as its mask and would leave something out, with what they would leave."""
    found = {}
    for path, tensor in named_tensors(batch):
        if tensor.ndim < 2 or len(tensor) != num_samples:
            continue
        try:
            real = Mask(path)(batch)
        except Exception:  # most tensors are none
            continue
        if not bool(real.all()) and bool(real.any()):
            found[path] = f"{int(real.sum()):,} of {real.numel():,}"
    return found


def examples(root: nn.Module) -> dict[str, nn.Module]:
    """Some modules with weights of their own, spread over the depth, for somebody who has to choose."""
    names = [
        clean_name(root, name)
        for name, module in root.named_modules()
        if name and next(module.children(), None) is None and next(module.parameters(), None) is not None
    ]
    count = min(len(names), MOST_EXAMPLES)
    chosen = [names[round(index * (len(names) - 1) / max(count - 1, 1))] for index in range(count)]
    return resolve_layers(root, chosen) if chosen else {}
