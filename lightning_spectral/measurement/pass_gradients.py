"""Rows of per-sample gradients by passes at the report, over a shadow of the module, at one and the same weights."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor
from typing_extensions import override

from lightning_spectral.capture.backward import check_contracts, why_unreadable
from lightning_spectral.capture.batch import Cut, copied, hold, take
from lightning_spectral.capture.engines import ByVmapOrLoop, SomeRowsError, engine_of, is_out_of_memory
from lightning_spectral.capture.one_line import reason_of
from lightning_spectral.capture.per_sample import fill_rows, fitting_chunk
from lightning_spectral.capture.shadow import BatchLoss, check_loss
from lightning_spectral.measurement.gradient_request import GradientRequest
from lightning_spectral.measurement.gradients import GradientMeasurement
from lightning_spectral.measurement.measurement import Scene

LOOP = "use method='loop'"

ONE_SAMPLE = "one sample alone must have a loss: give loss_fn, or samples, which cuts a batch, or use method='hooks'"


def remedied(error: BaseException, method: str) -> str:
    """What an error of a step, made for a method, says, and what to do about it; of memory that is short nothing."""
    reason = reason_of(error)
    if is_out_of_memory(error) or any(
        remedy in reason for remedy in (": give", ": use", ": make", ": have", "so give")
    ):
        return reason
    return f"{reason} ({ONE_SAMPLE if method in ('auto', 'loop') else LOOP})"


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
        check_loss(scene.module, request.loss_fn or scene.loss_fn)
        super().__init__(request, scene)
        if request.method == "hooks":
            check_contracts(scene.module, self.parameters)
        self.chunk_size = request.chunk_size
        self._engine = engine_of(request.method, request.loss_reduction, request.batch_dim)
        self._batches: list[tuple[Cut, int, tuple[int, int | None]]] = []
        """Each with its number of samples, and its index in the loader and the step that it began at."""
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
        cut = self.samples.cut(hold(batch))
        self._offered += cut.size
        wanted = min(cut.size, self._store.room - self._waiting)
        # Whole batches spread over a validation pass: apart, samples would take a pass of the model each.
        is_due = self.place is None or self.place.needs(self._waiting, self._store.capacity)
        if wanted > 0 and is_due:
            self._batches.append((copied(take(cut, 0, wanted)), wanted, (self.batch_idx, self.batch_step)))
            self._waiting += wanted

    @override
    def finish(self, step: int) -> None:
        # Since the first batch of the report, and by it, parameters may have come and gone.
        self.renew()
        try:
            loss = self._make_loss(self.request.loss_fn)
            loss.dataloader_idx = self.loader
            # Once for all batches, so that each sample meets a mask of its own.
            with loss.isolated([batch for batch, _, _ in self._batches]) as kept:
                for index, (batch, size, at) in enumerate(self._batches):
                    loss.move_to(*at)
                    rows = self._store.open(size)
                    self._fill(loss, batch, rows)
                    if index == 0 and self.check.is_due:
                        # By hooks rows are parts of the batch's gradient, whatever the loss.
                        own = None if self.method == "hooks" else rows
                        self.look_at_span(loss, kept, batch, own, has_run=True)
                    self._store.commit()
        except Exception as error:  # whatever the model's loss does to be unfit for this
            self.fail(ValueError(remedied(error, self.request.method)))
        self._batches = []
        self._span = [step]

    def _fill(self, loss: BatchLoss, batch: Cut, rows: Mapping[str, Tensor]) -> None:
        names = [name for name in self.parameters if name not in self._failures]
        while names:
            try:
                self._fill_some(loss, names, batch, rows)
                return
            except Exception as error:
                bad = self._bad_ones(error, loss, names, batch, rows)
                if not bad:
                    raise
                self._failures |= bad
                names = [name for name in names if name not in bad]

    def _bad_ones(
        self, error: Exception, loss: BatchLoss, names: list[str], batch: Cut, rows: Mapping[str, Tensor]
    ) -> dict[str, str]:
        """Why some parameters fail for reasons of their own; nothing if what fails is the loss, or all fail alike."""
        if isinstance(error, SomeRowsError):
            return error.failures
        if isinstance(error, MemoryError) or len(names) == 1:
            return {}
        bad: dict[str, str] = {}
        for name in names:
            try:
                self._fill_some(loss, [name], batch, rows)
            except Exception as own:
                bad[name] = remedied(own, self.request.method)
                if len(bad) == 2 and list(bad.values()) == [remedied(error, self.request.method)] * 2:
                    return {}
        return bad if len(bad) < len(names) else {}

    def _fill_some(self, loss: BatchLoss, names: list[str], batch: Cut, rows: Mapping[str, Tensor]) -> None:
        self.chunk_size = self.chunk_size or fitting_chunk(loss, names, batch)
        used = fill_rows(self._engine, loss, names, batch, rows, self.chunk_size)
        if used < min(self.chunk_size, batch.size):
            self.chunk_size, self.halved = used, True

    @override
    def renew(self) -> None:
        super().renew()
        if self.request.method != "hooks":
            return
        for name, parameter in list(self.parameters.items()):
            if (reason := why_unreadable(self._module, name, parameter)) is not None:
                self._absent[name] = reason
                del self.parameters[name]

    @override
    def end_validation_batch(self, step: int, is_last: bool) -> None:
        # A loader without a length has no last batch, but enough samples are enough.
        is_full = self._waiting > 0 and self._waiting == self._store.room
        super().end_validation_batch(step, is_last or is_full)

    @override
    def forget(self) -> None:
        super().forget()
        self._batches, self._waiting = [], 0
