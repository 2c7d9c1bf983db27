"""What is looked at while a copy of the module makes its one training step."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

from lightning.pytorch import Trainer
from torch import Tensor, nn

from lightning_spectral.callbacks.bands import Bands
from lightning_spectral.callbacks.scene import scene_of
from lightning_spectral.capture.batch import Cut, Samples, hold, named_tensors
from lightning_spectral.capture.one_line import reason_of
from lightning_spectral.measurement import ActivationRequest, GradientRequest
from lightning_spectral.measurement.stopwatch import Stopwatch
from lightning_spectral.probing.activations import ActivationProbe
from lightning_spectral.probing.found import LossFound, SamplesFound
from lightning_spectral.probing.gradients import GradientProbe


class Wanted(NamedTuple):
    """What would be measured."""

    layers: Any
    """Patterns, as the callbacks take them."""
    activations: ActivationRequest
    gradients: GradientRequest
    bands: Bands


class Study:
    """Watches a step for both kinds of rows; what one part raises becomes its problem, and no other's.

    Args:
        root: The copy.
        wanted: What would be measured of it.
    """

    def __init__(self, root: nn.Module, wanted: Wanted) -> None:
        self.root = root
        self.device = "cpu"
        self.samples = SamplesFound()
        self.activations = ActivationProbe(wanted.activations, wanted.layers, wanted.bands)
        self.gradients = GradientProbe(wanted.gradients, wanted.bands)
        self.has_ended = False

    def start(self, trainer: Trainer, batch: Any) -> None:
        """See :class:`Spectator`."""
        scene = scene_of(trainer, self.root, Stopwatch())
        self.device = str(scene.device)
        cut = self._cut(batch)
        self._guard(lambda: self.activations.start(scene, batch), self._activations_failed)
        self._guard(lambda: self.gradients.start(scene, batch, cut), self._gradients_failed)

    def _cut(self, batch: Any) -> Cut | str:
        request = self.gradients.request
        samples = Samples(request.batch_dim, request.samples)
        try:
            cut = samples.cut(hold(batch))
            axes, tensors = samples.axes(batch), dict(named_tensors(batch))
            shapes = {path: (tuple(tensors[path].shape), axis) for path, axis in axes.items()}
            self.samples = SamplesFound(cut.size, samples.rule(batch), shapes, samples.others(batch))
        except Exception as error:
            self.samples = SamplesFound(problem=reason_of(error))
            return reason_of(error)
        return cut

    def _activations_failed(self, reason: str) -> None:
        self.activations.problem = self.activations.problem or reason

    def _gradients_failed(self, reason: str) -> None:
        self.gradients.loss = replace(self.gradients.loss, problem=reason)

    @staticmethod
    def _guard(look: Callable[[], None], fail: Callable[[str], None]) -> None:
        try:
            look()
        except Exception as error:
            fail(reason_of(error))

    def before_backward(self, scale: Callable[[], float], loss: Tensor) -> None:
        """See :class:`Spectator`."""
        self._guard(self.activations.before_backward, self._activations_failed)
        self._guard(lambda: self.gradients.before_backward(scale, loss), self._gradients_failed)

    def after_backward(self, is_last: bool) -> None:
        """See :class:`Spectator`."""
        self._guard(lambda: self.activations.after_backward(is_last), self._activations_failed)
        self._guard(lambda: self.gradients.after_backward(is_last), self._gradients_failed)

    def before_optimizer_step(self, optimizer: Any) -> None:
        """See :class:`Spectator`."""
        self._guard(lambda: self.gradients.before_optimizer_step(optimizer), self._gradients_failed)

    def end(self, loss: float | None) -> None:
        """See :class:`Spectator`."""
        self.has_ended = True
        self._guard(self.activations.end, self._activations_failed)
        self._guard(lambda: self.gradients.end(loss), self._gradients_failed)

    def give_up(self, reason: str) -> None:
        """The step failed: say what can be said without it."""
        if self.has_ended:
            return
        if not self.activations.layers:
            self._guard(lambda: self.activations.look_up(self.root), self._activations_failed)
        if not self.gradients.parameters:
            self._guard(lambda: self.gradients.look_up(self.root), self._gradients_failed)
        self.gradients.loss = LossFound(problem=reason)
