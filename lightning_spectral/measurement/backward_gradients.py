"""Rows of per-sample gradients read off the backward passes of training itself, at weights that move with its steps."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor
from typing_extensions import override

from lightning_spectral.capture.backward import NO_GRADIENT, BackwardReader, check_contracts, why_unreadable
from lightning_spectral.capture.batch import Cut, copied, hold, take
from lightning_spectral.capture.contraction import LayerRows
from lightning_spectral.capture.one_line import reason_of
from lightning_spectral.capture.sample_axis import AxesFound, SampleAxes, axes_of_samples
from lightning_spectral.capture.self_check import MOST_LOOPED
from lightning_spectral.capture.shadow import BatchLoss, LossFunction
from lightning_spectral.measurement.gradient_request import GradientRequest
from lightning_spectral.measurement.gradients import GradientMeasurement, without_vmap
from lightning_spectral.measurement.measurement import Scene
from lightning_spectral.metrics.layout import are_sharded

OWN_PASSES = (
    "training_step calls backward several times itself, and its passes cannot be told apart: manual_backward can"
)


class BackwardGradients(GradientMeasurement):
    """Each backward pass before a report leaves its samples' rows, of the loss that it begins at.

    What a ``training_step`` under manual optimisation divides its loss by nobody can tell, so that rows are of what it
    calls ``backward`` on. A ``loss_fn`` is then compared with it, if that is once a batch, by ``manual_backward``.

    Args:
        request: What to measure.
        scene: For what.

    Raises:
        ValueError: For parameters of other layers than can be read.
    """

    method = "hooks"

    def __init__(self, request: GradientRequest, scene: Scene) -> None:
        super().__init__(request, scene)
        check_contracts(scene.module, self.parameters)
        self.chunk_size = request.chunk_size
        self._grams: dict[str, Tensor] = {}
        self._rows: LayerRows | None = None
        self._had_backward = False
        self._held: tuple[Cut, int, int | None] | None = None
        """Samples of the first batch for the self-check, with its index and the step that it began at."""
        self._axes = SampleAxes(request.batch_dim is not None or request.check == "off")
        self._began_at: list[Tensor] = []
        """The losses that the batch under way is differentiated by, where ``loss_fn`` is to be compared with them."""
        self._reader = BackwardReader(scene.stopwatch.running, self._sharded.local)
        refused = self._sharded.take_up(scene.module, self.parameters)
        if refused:
            raise ValueError(next(iter(refused.values())))
        self._watch()

    @override
    def renew(self) -> None:
        super().renew()
        self._watch()

    def _watch(self) -> None:
        refused = self._sharded.take_up(self._module, self.parameters)
        for name in self.names:
            parameter = self.parameters.get(name)
            reason = refused.get(name)
            reason = reason or None if parameter is None else why_unreadable(self._module, name, parameter)
            if reason is not None:
                self._absent[name] = without_vmap(reason) if are_sharded(self._module) else reason
                del self.parameters[name]
            if parameter is None or reason is not None:
                self._reader.drop(name)
            else:
                self._reader.add(name, parameter, self._module)

    @override
    def remove(self) -> None:
        self._reader.remove()
        super().remove()

    @override
    def collect(self, batch: Any, step: int) -> None:
        cut = self.samples.cut(batch)
        size = cut.size
        self._offered += size
        if self._store.room > 0 and len(self._failures) < len(self.parameters):
            wanted = min(size, self._store.room)
            mean_of = float(size) if self.request.loss_reduction == "mean" else 1.0
            # Under manual optimisation a later pass may be the one that counts.
            is_one_pass = bool(getattr(self._module, "automatic_optimization", True))
            is_last = wanted == self._store.room and len(self._layout.data_ranks) == 1 and is_one_pass
            out = self._store.open(wanted, is_last)
            self._rows = LayerRows(size, out, mean_of, self.request.batch_dim or 0)
            self._had_backward = False
            # Ranks that do not know the same make passes at the same reports.
            may_ask = self.request.check != "off" and self._world == 1 and self._axes.is_worth_asking(self.parameters)
            if self._held is None and (self.check.is_due or may_ask):
                self._hold(batch, size)
            on_complete = self._reduce if is_last else _keep
            self._reader.begin(self._rows, on_complete if is_one_pass else None)
            self._span = [*self._span[:1], step]

    @torch.no_grad()
    def _reduce(self, name: str) -> None:
        """Let go of rows that no other will join: layer by layer, they never are all there at a time."""
        rows = self._store.take_early(name)
        self._grams[name] = self._gram(rows, [len(rows)])

    @override
    def early_gram(self, name: str) -> Tensor | None:
        return self._grams.pop(name, None)

    @override
    def before_backward(self, scale: Callable[[], float], loss: Tensor | None = None) -> None:
        if self._loss_to_check is None:
            super().before_backward(scale, loss)
        elif self.check.awaits_loss and loss is not None:
            self._began_at.append(loss.detach() / scale())
        is_first, self._had_backward = not self._had_backward, True
        if self._rows is not None:
            # Of those that the forward pass of the batch has made the size is known only now.
            self._store.sizes.update({name: self._sharded.numel(name, p) for name, p in self.parameters.items()})
            self._reader.begin_pass(is_first)
            samples = self._rows.num_samples if self.request.loss_reduction == "mean" else 1
            self._rows.scale = samples / scale()

    @override
    def before_optimizer_step(self, optimizer: Any) -> None:
        if self._rows is not None:
            self._reader.end_passes(p for group in optimizer.param_groups for p in group["params"])

    @property
    @override
    def _loss_to_check(self) -> LossFunction | None:
        return None if getattr(self._module, "automatic_optimization", True) else self.request.loss_fn

    def _compare_by_hand(self) -> None:
        """Compare ``loss_fn`` with what the one backward pass of the batch began at."""
        began_at, self._began_at = self._began_at, []
        if len(began_at) != 1:
            self.check.expect_nothing()
            reason = f"training_step calls manual_backward {len(began_at)} times, where once can be compared"
            self.check.leave_out(reason, "loss")
            return
        self.check.compare(
            float(began_at[0]),
            "training_step called manual_backward on a loss of {found} for a batch, and loss_fn gives {value} on a "
            "copy of the module in the same state: have loss_fn do, and divide, as that does",
        )

    def _hold(self, batch: Any, size: int) -> None:
        try:
            held = self.samples.cut(hold(batch))
            self._held = copied(take(held, 0, min(size, MOST_LOOPED))), self.batch_idx, self.batch_step
        except Exception as error:  # a batch that cannot be cut can be read all the same
            self.check.leave_out(reason_of(error), "span")

    def go_unchecked(self, reason: str) -> None:
        """Measure the batch under way by what is there, though no shadow can have its loss."""
        self.check.expect_nothing()
        self._held = None
        if self.check.is_due:
            self.check.leave_out(reason)

    @override
    def finish(self, step: int) -> None:
        held, self._held = self._held, None
        names = self.parameters.keys() - self._failures.keys()
        if held is None or self._is_sharded():
            self._failures |= self._axes.judge(names, None)
            return
        batch, batch_idx, batch_step = held
        try:
            loss = self._make_loss(self._loss_to_check)
            loss.move_to(batch_idx, batch_step)
            with loss.isolated(batch) as kept:
                self._failures |= self._axes.judge(names, partial(self._ask_shadow, loss, batch), self.check.is_due)
                if self.check.is_due:
                    self.look_at_span(loss, kept, batch, None, has_run=False)
        except Exception as error:  # a module that cannot be copied can be read all the same
            self._failures |= self._axes.judge(names, None)
            if self.check.is_due:
                self.check.leave_out(reason_of(error), "span")

    def _ask_shadow(
        self, loss: BatchLoss, batch: Cut, names: set[str], axes: Mapping[str, set[tuple[int, int]]]
    ) -> AxesFound:
        return axes_of_samples(loss, {name: loss.parameter(name)[1] for name in names}, axes, batch)

    @override
    def close(self) -> None:
        if self._rows is None:
            return
        with self.stopwatch.running():
            if self._loss_to_check is not None and self.check.awaits_loss:
                self._compare_by_hand()
            rows, self._rows = self._reader.end(), None
            assert rows is not None
            if not (rows.seen or rows.failures or self._had_backward):
                return  # a training step that gave no loss
            if not self._had_backward:
                several = [name for name, passes in self._reader.passes.items() if len(passes) > 1]
                rows.failures |= dict.fromkeys(several, OWN_PASSES)
            unseen = {name: NO_GRADIENT for name in self.parameters if name not in rows.seen}
            failures = unseen | rows.failures
            if are_sharded(self._module):
                failures = {name: without_vmap(reason) for name, reason in failures.items()}
            self._failures |= failures
            self._axes.note(rows)
            self._store.commit()

    @override
    def forget(self) -> None:
        super().forget()
        self._grams, self._held, self._began_at = {}, None, []


def _keep(name: str) -> None:
    """What becomes of rows that are complete, as long as others may join them."""
