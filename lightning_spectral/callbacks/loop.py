"""Drives instruments by the events of any loop, none of which measuring can end."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from itertools import count
from typing import Any

import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch import Tensor
from torch.optim import Optimizer

from lightning_spectral.callbacks.instrument import Instrument
from lightning_spectral.callbacks.loop_host import LoopHost, device_of
from lightning_spectral.callbacks.participant import Participant
from lightning_spectral.capture.graph import reduction_of
from lightning_spectral.capture.one_line import reason_of, shown
from lightning_spectral.functional.arguments import describe
from lightning_spectral.measurement import GradientMeasurement
from lightning_spectral.measurement.backward_gradients import BackwardGradients
from lightning_spectral.measurement.passes import Pass
from lightning_spectral.warner import Warner

UNTOLD = (
    "loss must be told by watch.loss(loss) within watch.step(batch), for method='hooks' reads its backward pass: call "
    "it there, or use method='vmap'"
)


class Loop:
    """Hands the events of a loop to the session of its instruments, and has each of them take its reports.

    Until there is a report, what does not fit the model or its batches is a ValueError; after that whatever goes wrong
    is a warning.

    Args:
        host: Of the loop.
        participants: Who takes part.
        hooked: Optimizers that are hooked, so that their steps need not be told.
        who: What warnings begin with.
        untold: What is said where rows off backward passes are asked for, and no loss was told.

    Raises:
        ValueError: For instruments that do not go with the model or with each other.
    """

    def __init__(
        self,
        host: LoopHost,
        participants: Sequence[Participant],
        hooked: Sequence[Optimizer] = (),
        who: str = "SpectralWatch",
        untold: str = UNTOLD,
    ) -> None:
        self.host = host
        self.is_closed = False
        """Whether it is over."""
        self._participants = participants
        self._session = host.session
        self._warner, self._untold = Warner(who), untold
        self._loss: Tensor | None = None
        self._reduction: str | None = None
        self._is_recorded = True
        self._is_differentiated = True
        self._is_open = self._is_waiting = self._has_started = False
        self._hooked = hooked
        self._stepped: set[int] = set()
        self._validated: dict[str, Tensor] | None = None
        self._handles: list[Any] = []
        try:
            for participant in participants:
                if isinstance(participant, Instrument):
                    participant.begin()
                participant.join(host)
        except ValueError:
            self._leave()
            raise
        for one in hooked:
            self._handles.append(one.register_step_pre_hook(self._before_optimizer_step))
            self._handles.append(one.register_step_post_hook(self._after_optimizer_step))

    def check_idle(self) -> None:
        """Refuse, by a ValueError, to begin a block within another."""
        if self.is_closed:
            raise ValueError("watch is closed, and watches nothing any more: make a new SpectralWatch")
        if self._is_open:
            raise ValueError("watch.step must have ended before another block begins: end the one of the batch before")
        if self._validated is not None:
            raise ValueError("watch.validation must have ended before another block begins: end it before")

    def start_batch(self, batch: Any) -> None:
        """The forward pass of a batch begins."""
        self.check_idle()
        self._start()
        self._settle()
        self._loss, self._is_open, self._is_differentiated = None, True, True
        self._stepped = set()
        self.host.num_batches += 1
        self._measure(lambda: self._session.start_train_batch(batch, self.host.step, self.host.num_batches - 1))

    def end_batch(self, step: int | None = None) -> None:
        """Forward and backward pass of the batch are over.

        Args:
            step: How many optimizer steps there are by now; None if the optimizer tells.
        """
        self._is_open, self._is_waiting = False, True
        self._measure(lambda: self._session.after_backward(is_last=True))
        self._measure(self._check_loss)
        if step is not None and step > self.host.step:
            self.host.step = step
        if self._stepped or step is not None:
            self._finish()

    def drop_batch(self) -> None:
        """The batch under way has come to nothing: it is not counted."""
        self._is_open = self._is_waiting = False
        self._loss = None
        for measurement in self._session.measurements:
            with suppress(Exception):
                measurement.close()

    def tell_loss(self, loss: Tensor, factor: float | Tensor = 1.0, is_recorded: bool = True) -> Tensor:
        """Tell the loss of the batch, as :meth:`SpectralWatch.loss` does; the record need not hear of it."""
        if not self._is_open:
            raise ValueError("loss must be told within watch.step(batch), got it outside: call watch.loss(loss) there")
        if not isinstance(loss, Tensor) or loss.numel() != 1:
            raise ValueError(f"loss must be a tensor with one number, got {describe(loss)}")
        value = loss.detach().clone().reshape(()) * factor  # what it is before a loop divides it in place
        self._loss, self._is_recorded = value, is_recorded
        self._reduction = reduction_of(loss.grad_fn)
        if loss.requires_grad:
            self._is_differentiated = False
            passes = count()
            loss.register_hook(lambda gradient: self._before_backward(value, gradient / factor, next(passes)))
        return loss

    def doubt_gradients(self, stage: str, reason: str, has_size: bool = False) -> None:
        """Have no gradients of single samples in the batch under way, whose loss is not the one that is trained.

        Args:
            stage: Of those meant.
            reason: Why.
            has_size: Whether rows off the backward pass, which are of what is trained, are of a known size: they are
                measured all the same, but nothing checks them.
        """
        for measurement in self._session.measurements:
            if not (isinstance(measurement, GradientMeasurement) and measurement.is_collecting):
                continue
            if measurement.stage != stage or measurement.request.loss_fn is not None:
                continue
            if has_size and isinstance(measurement, BackwardGradients):
                measurement.go_unchecked(reason)
            else:
                measurement.fail(ValueError(reason))

    def before_optimizer_step(self, optimizer: Optimizer) -> None:
        """An optimizer is about to step."""
        if self._is_open or self._is_waiting:
            self._measure(lambda: self._session.before_optimizer_step(optimizer))

    def start_validation(self, of: Pass | None = None) -> None:
        """A validation run begins, of a pass whose length is known or not."""
        self._start()
        self._settle()
        for one in self._instruments:
            if one.stage == "validate":
                one.check_loader(1)
        self._publish_pending()
        self._validated = {}
        self._measure(lambda: self._session.start_validation(self.host.step, False, [of]))

    def start_validation_batch(self, batch: Any, index: int) -> None:
        """A batch of a validation run begins."""
        self._measure(lambda: self._session.start_validation_batch(batch, 0, self.host.step, False, index))

    def end_validation_batch(self, is_last: bool) -> None:
        """Its forward pass is over."""
        self._measure(lambda: self._session.end_validation_batch(0, self.host.step, is_last))
        self._measure(self._check_early)

    def drop_validation(self) -> None:
        """The validation run has come to nothing."""
        self._validated = None

    def end_validation(self) -> None:
        """It has ended: reports are made, and what was logged within are its losses."""
        logged, self._validated = self._validated or {}, None
        self._measure(lambda: self._session.end_validation_rows(self.host.step))
        self._of_each(lambda one: one.end_validation_rows(self.host))
        self._measure(lambda: self._session.end_validation(self.host.step, logged))
        self._of_each(lambda one: one.end_validation(self.host))

    def log(self, given: Mapping[str, Any]) -> None:
        """Log numbers of the loop's own at this step; ValueError for what is no number."""
        try:
            numbers = {key: float(value) for key, value in given.items()}
        except (TypeError, ValueError, RuntimeError) as error:
            raise ValueError(f"metrics must be numbers by key, got {shown(given)}: {reason_of(error)}") from error
        tensors = {key: torch.tensor(value, dtype=torch.float64) for key, value in numbers.items()}
        self.host.metrics.update(tensors)
        if self._validated is not None:
            self._validated.update(tensors)
        for one in self.host.loggers:
            one.log_metrics(numbers, step=self.host.step)

    def state_dict(self) -> dict[str, Any]:
        """What :meth:`load_state_dict` takes: plain numbers, strings, lists, dictionaries and tensors.

        It may be called on one rank alone; a report that is being made beside training there is not waited for.
        """
        if self.host.num_ranks == 1:
            self._settle()
            self._publish_pending()
        states = {one.state_key: one.state() for one in self._instruments}
        return {"step": self.host.step, "run": self._session.recorder.state_dict(), "instruments": states}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Go on from what :meth:`state_dict` gave, before the first batch.

        Raises:
            ValueError: After the first batch.
        """
        if self._has_started:
            raise ValueError("state_dict must be loaded before the first batch, got it after: make a new SpectralWatch")
        self.host.step = state_dict["step"]
        self._session.recorder.load_state_dict(state_dict["run"])
        for one in self._instruments:
            state = state_dict["instruments"].get(one.state_key)
            if state is not None:
                one.load_state_dict(state)

    def close(self) -> None:
        """End: print the tables of first and last reports, end the record, and take all hooks off. Once is enough."""
        if self.is_closed:
            return
        self._settle()
        if self._has_started:
            self._publish_pending()
            self._measure(lambda: self._session.end_training(self.host.step))
            self._of_each(lambda one: one.end_fit(self.host))
            for logger in self.host.loggers:
                if callable(save := getattr(logger, "save", None)):
                    self._measure(save)
        self._leave()

    def drop(self) -> None:
        """End after the loop has failed: without tables, and as under a Trainer what has stopped it is what is seen."""
        if self.is_closed:
            return
        with suppress(Exception):
            if self.host.num_ranks == 1:
                self._publish_pending()
            elif steps := self._session.abandon():
                rank_zero_info(f"SpectralWatch drops the report of step {steps[0]}, which was not ready")
        self._leave()

    def start_at(self, step: int) -> None:
        """Count optimizer steps from here, before the first batch."""
        self.host.step = step

    @property
    def _instruments(self) -> list[Any]:
        return [one for one in self._participants if isinstance(one, Instrument)]

    def _start(self) -> None:
        if self._has_started:
            return
        self._has_started = True
        if (device := device_of(self.host.module)) != self.host.device:
            raise ValueError(
                f"model must be on its device when SpectralWatch is made, got {self.host.device} then and {device} "
                "now: move it before"
            )
        self._session.start_training(self.host.step)
        self._session.recorder.start(self.host.start())
        self._of_each(lambda one: one.start_training(self.host))

    def _settle(self) -> None:
        """End the batch that waits for a step of the optimizer: none came."""
        if self._is_waiting:
            self._finish()

    def _finish(self) -> None:
        loss = self._loss if self._is_recorded else None
        self._is_waiting, self._loss = False, None
        if not self._is_differentiated:
            # Of a loss that nobody differentiates the gradients are not those of training.
            self.doubt_gradients("train", "no backward pass went through the loss that was told: give loss_fn")
        self._measure(lambda: self._session.end_train_batch(loss, self.host.step))
        self._of_each(lambda one: one.take_report(self.host))

    def _before_backward(self, loss: Tensor, gradient: Tensor, num_before: int) -> None:
        self._is_differentiated = True
        if num_before:
            reason = "the loss that was told is differentiated several times in one step, and its passes add up"
            self._fail_rows(ValueError(f"{reason}: tell each loss that is, or use method='vmap'"))
        factor = gradient.detach()
        self._measure(lambda: self._session.before_backward(lambda: float(factor), loss * factor))

    def _before_optimizer_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        self.before_optimizer_step(optimizer)

    def _after_optimizer_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        self.host.step += 1
        self._stepped.add(id(optimizer))
        if self._is_waiting and len(self._stepped) == len(self._hooked):
            self._finish()

    def _check_loss(self) -> None:
        """Rows off a backward pass are of the size of its loss, which nobody else can tell."""
        for measurement in self._readers:
            wanted = measurement.request.loss_reduction
            if self._loss is None:
                error = ValueError(self._untold)
            elif self._reduction not in (None, wanted):
                error = ValueError(
                    f"loss_reduction must be that of the loss that is told, which is a {self._reduction}, got "
                    f"{wanted!r}: pass loss_reduction={self._reduction!r}"
                )
            else:
                continue
            if self._is_early:
                raise error
            measurement.fail(error)

    @property
    def _readers(self) -> list[BackwardGradients]:
        """Who reads backward passes, and is at it."""
        found = self._session.measurements
        return [one for one in found if isinstance(one, BackwardGradients) and one.is_collecting]

    def _fail_rows(self, error: ValueError) -> None:
        for measurement in self._readers:
            measurement.fail(error)

    def _check_early(self) -> None:
        for one in self._instruments:
            one.check_early()

    @property
    def _is_early(self) -> bool:
        return all(measurement.report is None for measurement in self._session.measurements)

    def _measure(self, work: Callable[[], Any]) -> None:
        """Do what may fail without ending the loop, but for arguments that do not fit, which show early."""
        is_early = self._is_early
        try:
            work()
        except Exception as error:
            if is_early and isinstance(error, ValueError):
                self._leave()
                raise
            self._warner.warn(f"goes on without what failed: {reason_of(error)}", on_this_rank=True)

    def _of_each(self, work: Callable[[Participant], Any]) -> None:
        for participant in self._participants:
            self._measure(lambda one=participant: work(one))  # type: ignore[misc]

    def _publish_pending(self) -> None:
        self._of_each(lambda one: one.publish_pending(self.host))

    def _leave(self) -> None:
        self.is_closed, self._is_open, self._is_waiting = True, False, False
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        for participant in self._participants:
            participant.leave()
