"""Watches the spectra of a model in a loop of one's own: the callbacks' instruments without a Trainer."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from lightning.fabric.utilities import move_data_to_device
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_spectral.callbacks import ActivationSpectrum, GradientSpectrum, HeadDrift, RunRecord, TailForecaster
from lightning_spectral.callbacks.instrument import Instrument
from lightning_spectral.callbacks.loop_host import LoopHost, device_of
from lightning_spectral.callbacks.participant import Participant
from lightning_spectral.capture.one_line import reason_of, shown
from lightning_spectral.capture.shadow import LossFunction, load_loss
from lightning_spectral.functional.arguments import describe
from lightning_spectral.measurement.backward_gradients import BackwardGradients
from lightning_spectral.warner import Warner


class SpectralWatch:
    r"""Measures, logs and records in any loop what the Lightning callbacks do under a Trainer, by the same objects.

    ``with watch.step(batch):`` goes around the forward and backward pass of each batch; the optimizer's step may be in
    it or follow it. ``with watch.validation(loader) as batches:`` goes around a validation run. Keys, records, tables
    and state are those of the callbacks, so that ``lightning-spectral show``, ``compare`` and ``forecast`` read them,
    and so are the numbers, to the bit. Training is as it is without.

    **Steps** are those of ``optimizer``, which is hooked: a batch without one is a micro-batch of the step that comes
    (gradient accumulation), a step that a gradient scaler skips is none. Under Fabric and accelerate the optimizer may
    be the one that ``setup`` or ``prepare`` gave. Without ``optimizer`` each ``watch.step`` is an optimizer step, but
    those called with ``accumulates=True``; reports then come at the end of the block.

    **Losses.** ``watch.loss(loss)``, in the block, is told the loss of the batch before anything divides or scales it;
    the factor is read off the backward pass, so that accumulation and gradient scalers are seen for what they are. It
    gives the training loss of the record, and ``GradientSpectrum(method="hooks")`` needs it. The other methods compute
    losses of single samples after the optimizer's step, by ``loss_fn(module, batch)`` on a copy of the module: compute
    in it what the loop does, autocast included. It is checked against what ``watch.loss`` is told.

    **Validation losses** are what :meth:`log` is given within :meth:`validation`: by the usual names (``val_loss``,
    ``val/loss``, ...), or the one that ``RunRecord(loss=...)`` names.

    **Errors.** What does not fit the model is a ValueError here or in the first batches, until there is a report; after
    that nothing that measuring does ends the loop: it warns, and what was not measured is NaN.

    **Ranks** are those of ``torch.distributed``'s default group: each has its own batches, as under
    DistributedDataParallel, and all call the same methods in the same order. Rank zero writes. Names begin at the
    module inside DistributedDataParallel and Fabric's wrapper. Modules that are sharded are refused.

    Args:
        model: As the loop calls it, on its device, wrapped or not. Compile it before its first call with this.
        activations: True for an :class:`ActivationSpectrum` with its defaults, or one of one's own; None for none.
        gradients: True or a :class:`GradientSpectrum`, likewise.
        drift: True or a :class:`HeadDrift`, likewise.
        forecast: A :class:`TailForecaster`, whose ``monitor`` is a loss that :meth:`log` is given in validation.
        record: A :class:`RunRecord` that says more of the run; None for a record without its notes.
        optimizer: The optimizer, or several, whose steps are counted.
        loss_fn: ``loss_fn(module, batch) -> loss``, or its import path: the loop's loss, for a GradientSpectrum that
            has none of its own. A LightningModule, as under Fabric, has its ``training_step``.
        logger: A logger of ``lightning.pytorch.loggers`` or ``lightning.fabric.loggers``, or several; what has their
            ``log_metrics(metrics, step)`` will do.
        log_dir: Where the record is written, in ``spectra/``; None for the log directory of the first logger, and
            without any there is no record.

    Raises:
        ValueError: For arguments out of range, patterns that match nothing, keys that two instruments would write, a
            model that is not whole on each rank, and a GradientSpectrum for which no loss is known.

    Example:
        >>> model = nn.Sequential(*(nn.Sequential(nn.Linear(16, 16), nn.GELU()) for _ in range(4)))
        >>> optimizer = torch.optim.AdamW(model.parameters())
        >>> watch = SpectralWatch(model, ActivationSpectrum(every_n_steps=2, num_groups=1), optimizer=optimizer)
        >>> for batch in torch.randn(4, 32, 16):
        ...     with watch.step(batch):
        ...         watch.loss(model(batch).square().mean()).backward()
        ...     optimizer.step()
        ...     optimizer.zero_grad()
        >>> watch.metrics["activation/3/num_tokens"]
        64.0
    """

    def __init__(
        self,
        model: nn.Module,
        activations: bool | ActivationSpectrum | None = None,
        gradients: bool | GradientSpectrum | None = None,
        drift: bool | HeadDrift | None = None,
        forecast: TailForecaster | None = None,
        record: RunRecord | None = None,
        *,
        optimizer: Any = None,
        loss_fn: str | LossFunction | None = None,
        logger: Any = None,
        log_dir: str | Path | None = None,
    ) -> None:
        self._optimizers = [_plain_optimizer(one) for one in _listed(optimizer)]
        loggers = _listed(logger)
        for one in loggers:
            if not callable(getattr(one, "log_metrics", None)):
                raise ValueError(
                    f"logger must be a Lightning logger, with log_metrics, got {shown(one)}: give a TensorBoardLogger"
                )
        self._participants: list[Participant] = [
            one
            for one in (
                _chosen("record", record, RunRecord, needs="RunRecord()"),
                _chosen("activations", activations, ActivationSpectrum),
                _chosen("gradients", gradients, GradientSpectrum),
                _chosen("drift", drift, HeadDrift),
                _chosen("forecast", forecast, TailForecaster, needs="TailForecaster(target_loss)"),
            )
            if one is not None
        ]
        self._loggers = loggers
        self._host = LoopHost(model, loggers, log_dir, load_loss(loss_fn), self._optimizers)
        self._session = self._host.session
        self._warner = Warner(type(self).__name__)
        self._batch: Any = None
        self._loss: Tensor | None = None
        self._is_open = self._is_waiting = False
        self._stepped: set[int] = set()
        self._validated: dict[str, Tensor] | None = None
        self._has_started = self._is_closed = False
        self._handles: list[Any] = []
        try:
            for participant in self._participants:
                if isinstance(participant, Instrument):
                    participant.begin()
                participant.join(self._host)
        except ValueError:
            self._leave()
            raise
        for one in self._optimizers:
            self._handles.append(one.register_step_pre_hook(self._before_optimizer_step))
            self._handles.append(one.register_step_post_hook(self._after_optimizer_step))

    @property
    def metrics(self) -> dict[str, float]:
        """Latest values, by key; NaN for what is not known yet."""
        return {key: float(value) for key, value in self._host.metrics.items()}

    @property
    def num_steps(self) -> int:
        """Optimizer steps so far, over a resume too."""
        return self._host.step

    @property
    def should_stop(self) -> bool:
        """Whether a TailForecaster would end training."""
        return self._host.should_stop

    @contextmanager
    def step(self, batch: Any, *, accumulates: bool = False) -> Iterator[None]:
        """Watch a batch: its forward and backward pass within.

        Args:
            batch: As the model or ``loss_fn`` takes it, on the model's device.
            accumulates: That the optimizer does not step after it; only where there is no ``optimizer`` to tell.

        Raises:
            ValueError: For an argument of an instrument that does not fit the batch, before there is a report.
        """
        if accumulates and self._optimizers:
            raise ValueError("accumulates must be False where optimizer is given, whose steps tell, got True")
        self.start_batch(batch)
        try:
            yield
        except BaseException:
            self.drop_batch()
            raise
        self.end_batch()
        if not self._optimizers:
            if not accumulates:
                self._host.count_step()
            self._finish()

    def start_batch(self, batch: Any) -> None:
        """What :meth:`step` does first, for loops that cannot hold a block: the forward pass of a batch begins.

        Raises:
            ValueError: As :meth:`step`.
        """
        self._check_idle()
        self._start()
        self._settle()
        self._batch, self._loss, self._is_open = batch, None, True
        self._stepped = set()
        self._host.num_batches += 1
        self._measure(lambda: self._session.start_train_batch(batch, self._host.step, self._host.num_batches - 1))

    def end_batch(self) -> None:
        """What :meth:`step` does when its block ends: forward and backward pass of the batch are over.

        Raises:
            ValueError: As :meth:`step`.
        """
        self._is_open, self._is_waiting = False, True
        self._measure(lambda: self._session.after_backward(is_last=True))
        self._measure(self._check_loss)
        if self._stepped:
            self._finish()

    def drop_batch(self) -> None:
        """The batch under way has come to nothing: it is not counted."""
        self._is_open = self._is_waiting = False
        self._batch = self._loss = None
        for measurement in self._session.measurements:
            with suppress(Exception):
                measurement.close()

    def loss(self, loss: Tensor) -> Tensor:
        """Tell the loss of the batch, before it is divided or scaled; of several the last is recorded.

        Args:
            loss: A tensor with one number, of which ``backward`` is called, or of a multiple of it.

        Returns:
            The same tensor.

        Raises:
            ValueError: If there is no batch under way, or it is not one number.
        """
        if not self._is_open:
            raise ValueError("loss must be told within watch.step(batch), got it outside: call watch.loss(loss) there")
        if not isinstance(loss, Tensor) or loss.numel() != 1:
            raise ValueError(f"loss must be a tensor with one number, got {describe(loss)}")
        value = loss.detach().clone().reshape(())  # what it is before a loop divides it in place
        self._loss = value
        if loss.requires_grad:
            loss.register_hook(lambda gradient: self._before_backward(value, gradient))
        return loss

    @contextmanager
    def validation(self, loader: Any, num_batches: int | None = None) -> Iterator[Iterator[Any]]:
        """Watch a validation run: iterate over what it gives, and :meth:`log` the loss within.

        Args:
            loader: Gives the batches; with a length, rows are read spread over all of it, else the first.
            num_batches: How many of them are used; None for all.

        Yields:
            The batches, on the model's device.

        Raises:
            ValueError: As :meth:`step`.
        """
        self._check_idle()
        if num_batches is not None and (isinstance(num_batches, bool) or num_batches < 1):
            raise ValueError(f"num_batches must be a positive int, or None for all, got {describe(num_batches)}")
        of = self._host.validation_pass(loader, num_batches)
        self.start_validation(of)
        batches = self._batches(loader, num_batches, None if of is None else of.num_batches)
        try:
            yield batches
        except BaseException:
            batches.close()
            self._validated = None
            raise
        batches.close()
        self.end_validation()

    def start_validation(self, of: Any = None) -> None:
        """What :meth:`validation` does first, of a pass that is known or not, for loops that cannot hold a block."""
        self._start()
        self._settle()
        for one in self._instruments:
            if one.stage == "validate":
                one.check_loader(1)
        self._publish_pending()
        self._validated = {}
        self._measure(lambda: self._session.start_validation(self._host.step, False, [of]))

    def start_validation_batch(self, batch: Any, index: int) -> None:
        """A batch of a validation run begins."""
        self._measure(lambda: self._session.start_validation_batch(batch, 0, self._host.step, False, index))

    def end_validation_batch(self, is_last: bool) -> None:
        """Its forward pass is over."""
        self._measure(lambda: self._session.end_validation_batch(0, self._host.step, is_last))
        self._measure(self._check_early)

    def end_validation(self) -> None:
        """What :meth:`validation` does last: reports are made, and what was logged within are its losses."""
        logged, self._validated = self._validated or {}, None
        self._measure(lambda: self._session.end_validation_rows(self._host.step))
        self._of_each(lambda one: one.end_validation_rows(self._host))
        self._measure(lambda: self._session.end_validation(self._host.step, logged, 1))
        self._of_each(lambda one: one.end_validation(self._host))

    def log(self, metrics: Mapping[str, Any] | None = None, **named: Any) -> None:
        """Log numbers of one's own at this step: to the loggers, to :attr:`metrics`, and losses to the record.

        Args:
            metrics: Numbers, or tensors with one number, by key; over ranks each logs the same.
            named: Likewise.

        Raises:
            ValueError: For what is no number.
        """
        given = {**(metrics or {}), **named}
        try:
            numbers = {key: float(value) for key, value in given.items()}
        except (TypeError, ValueError, RuntimeError) as error:
            raise ValueError(f"metrics must be numbers by key, got {shown(given)}: {reason_of(error)}") from error
        tensors = {key: torch.tensor(value, dtype=torch.float64) for key, value in numbers.items()}
        self._host.metrics.update(tensors)
        if self._validated is not None:
            self._validated.update(tensors)
        for one in self._host.loggers:
            one.log_metrics(numbers, step=self._host.step)

    def state_dict(self) -> dict[str, Any]:
        """What :meth:`load_state_dict` takes: plain numbers, strings, lists, dictionaries and tensors.

        It may be called on one rank alone; a report that is being made beside training there is not waited for.
        """
        if self._host.num_ranks == 1:
            self._settle()
            self._publish_pending()
        states = {one.state_key: one.state() for one in self._instruments}
        return {"step": self._host.step, "run": self._session.recorder.state_dict(), "instruments": states}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Go on from what :meth:`state_dict` gave, before the first batch.

        Raises:
            ValueError: After the first batch.
        """
        if self._has_started:
            raise ValueError("state_dict must be loaded before the first batch, got it after: make a new SpectralWatch")
        self._host.step = state_dict["step"]
        self._session.recorder.load_state_dict(state_dict["run"])
        for one in self._instruments:
            state = state_dict["instruments"].get(one.state_key)
            if state is not None:
                one.load_state_dict(state)

    def close(self) -> None:
        """End: print the tables of first and last reports, end the record, and take all hooks off. Once is enough."""
        if self._is_closed:
            return
        self._settle()
        if self._has_started:
            self._publish_pending()
            self._measure(lambda: self._session.end_training(self._host.step))
            self._of_each(lambda one: one.end_fit(self._host))
            for logger in self._host.loggers:
                if callable(save := getattr(logger, "save", None)):
                    self._measure(save)
        self._leave()

    def __enter__(self) -> "SpectralWatch":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if error is None:
            self.close()
        elif not self._is_closed:
            # As under a Trainer: what has stopped the loop is what should be seen.
            with suppress(Exception):
                if self._host.num_ranks == 1:
                    self._publish_pending()
                elif steps := self._session.abandon():
                    rank_zero_info(f"SpectralWatch drops the report of step {steps[0]}, which was not ready")
            self._leave()

    @property
    def _instruments(self) -> list[Any]:
        return [one for one in self._participants if isinstance(one, Instrument)]

    def _batches(self, loader: Any, num_batches: int | None, length: int | None) -> Any:
        for index, batch in enumerate(loader):
            if index == num_batches:
                return
            batch = move_data_to_device(batch, self._host.device)
            self.start_validation_batch(batch, index)
            is_last = False
            try:
                yield batch
                is_last = length is not None and index + 1 >= length
            finally:
                self.end_validation_batch(is_last)

    def _start(self) -> None:
        if self._has_started:
            return
        self._has_started = True
        if (device := device_of(self._host.module)) != self._host.device:
            raise ValueError(
                f"model must be on its device when SpectralWatch is made, got {self._host.device} then and {device} "
                "now: move it before"
            )
        self._session.start_training(self._host.step)
        self._session.recorder.start(self._host.start())
        self._of_each(lambda one: one.start_training(self._host))

    def _settle(self) -> None:
        """End the batch that waits for a step of the optimizer: none came."""
        if self._is_waiting:
            self._finish()

    def _finish(self) -> None:
        batch, loss = self._batch, self._loss
        self._is_waiting, self._batch, self._loss = False, None, None
        self._measure(lambda: self._session.end_train_batch(batch, loss, self._host.step))
        self._of_each(lambda one: one.take_report(self._host))

    def _before_backward(self, loss: Tensor, gradient: Tensor) -> None:
        factor = gradient.detach()
        self._measure(lambda: self._session.before_backward(lambda: float(factor), loss * factor))

    def _before_optimizer_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        if self._is_open or self._is_waiting:
            self._measure(lambda: self._session.before_optimizer_step(optimizer))

    def _after_optimizer_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        self._host.count_step()
        self._stepped.add(id(optimizer))
        if self._is_waiting and len(self._stepped) == len(self._optimizers):
            self._finish()

    def _check_loss(self) -> None:
        """Rows off a backward pass are of the size of its loss, which nobody else can tell."""
        if self._loss is not None:
            return
        for measurement in self._session.measurements:
            if isinstance(measurement, BackwardGradients) and measurement.is_collecting:
                error = ValueError(
                    "loss must be told by watch.loss(loss) within watch.step(batch), for method='hooks' reads its "
                    "backward pass: call it there, or use method='vmap'"
                )
                if self._is_early:
                    raise error
                measurement.fail(error)

    def _check_early(self) -> None:
        for one in self._instruments:
            one.check_early()

    def _check_idle(self) -> None:
        if self._is_closed:
            raise ValueError("watch is closed, and watches nothing any more: make a new SpectralWatch")
        if self._is_open:
            raise ValueError("watch.step must have ended before another block begins: end the one of the batch before")
        if self._validated is not None:
            raise ValueError("watch.validation must have ended before another block begins: end it before")

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
        self._of_each(lambda one: one.publish_pending(self._host))

    def _leave(self) -> None:
        self._is_closed, self._is_open, self._is_waiting = True, False, False
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        for participant in self._participants:
            participant.leave()


def _listed(given: Any) -> list[Any]:
    if given is None or given is False:
        return []
    return list(given) if isinstance(given, Sequence) else [given]


def _plain_optimizer(optimizer: Any) -> Any:
    """The optimizer that Fabric's, accelerate's or Lightning's steps."""
    while isinstance(inner := getattr(optimizer, "optimizer", None), Optimizer):
        optimizer = inner
    if not isinstance(optimizer, Optimizer):
        raise ValueError(
            f"optimizer must be a torch.optim.Optimizer, whose steps can be counted, got {shown(optimizer)}: "
            "without optimizer each watch.step is a step"
        )
    return optimizer


def _chosen(name: str, given: Any, kind: type, needs: str | None = None) -> Any:
    if given is None or given is False:
        return None
    if given is True and needs is None:
        return kind()
    if not isinstance(given, kind):
        remedy = f"give True or {kind.__name__}(...)" if needs is None else f"give {needs}"
        raise ValueError(f"{name} must be a {kind.__name__}, got {shown(given)}: {remedy}")
    return given
