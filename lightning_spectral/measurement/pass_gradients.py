"""Rows of per-sample gradients by passes at the report, over a shadow of the module, at one and the same weights."""

from collections.abc import Callable
from typing import Any

from typing_extensions import override

from lightning_spectral.capture.backward import check_contracts
from lightning_spectral.capture.batch import hold, num_samples, take
from lightning_spectral.capture.engines import ByVmapOrLoop, engine_of
from lightning_spectral.capture.per_sample import fill_rows, fitting_chunk, isolated
from lightning_spectral.capture.shadow import BatchLoss, check_loss
from lightning_spectral.measurement.gradients import GradientMeasurement, GradientRequest
from lightning_spectral.measurement.measurement import Scene

NO_SAMPLES = "the batch holds no tensor with an axis of samples"


class PassGradients(GradientMeasurement):
    """Batches wait for the report; their rows are made then.

    Args:
        request: What to measure.
        scene: For what.

    Raises:
        ValueError: For a module without a loss for one sample, and for ``method="hooks"`` with parameters of other
            layers than it reads.
    """

    def __init__(self, request: GradientRequest, scene: Scene) -> None:
        check_loss(scene.module, request.loss_fn)
        super().__init__(request, scene)
        if request.method == "hooks":
            check_contracts(scene.module, self.parameters)
        self.chunk_size = request.chunk_size
        self._make_loss: Callable[[], BatchLoss] = lambda: scene.make_loss(request.loss_fn)
        self._engine = engine_of(request.method, request.loss_reduction)
        self._batches: list[tuple[Any, int]] = []
        self._waiting = 0

    @property
    @override
    def method(self) -> str:  # type: ignore[override]
        if isinstance(self._engine, ByVmapOrLoop):
            return "vmap" if self._engine.cause is None else "loop"
        return self.request.method

    @property
    @override
    def cause(self) -> str | None:  # type: ignore[override]
        return self._engine.cause if isinstance(self._engine, ByVmapOrLoop) else None

    @override
    def collect(self, batch: Any, step: int) -> None:
        size = num_samples(batch)
        if size is None:
            raise ValueError(NO_SAMPLES)
        self._offered += size
        wanted = min(size, self._store.room - self._waiting)
        if wanted > 0:
            self._batches.append((take(hold(batch), 0, wanted), wanted))
            self._waiting += wanted

    @override
    def finish(self, step: int) -> None:
        names = list(self.parameters)
        try:
            loss = self._make_loss()
            # Once for all batches, so that each sample meets a mask of its own.
            with isolated():
                for batch, size in self._batches:
                    rows = self._store.open(size)
                    self.chunk_size = self.chunk_size or fitting_chunk(loss, names, batch)
                    used = fill_rows(self._engine, loss, names, batch, rows, self.chunk_size)
                    if used < min(self.chunk_size, size):
                        self.chunk_size, self.halved = used, True
                    self._store.commit()
        except Exception as error:  # whatever the model's loss does to be unfit for this
            self.fail(error)
        self._batches = []
        self._span = [step]

    @override
    def forget(self) -> None:
        super().forget()
        self._batches, self._waiting = [], 0
