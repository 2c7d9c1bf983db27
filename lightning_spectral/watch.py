"""Watches the spectra of a model in a loop of one's own: the callbacks' instruments without a Trainer."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from types import TracebackType
from typing import Any

from lightning.fabric.utilities import move_data_to_device
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_spectral.callbacks import ActivationSpectrum, GradientSpectrum, HeadDrift, RunRecord, TailForecaster
from lightning_spectral.callbacks.instruments import instruments_of, listed, loggers_of
from lightning_spectral.callbacks.loop import Loop
from lightning_spectral.callbacks.loop_host import LoopHost
from lightning_spectral.capture.one_line import shown
from lightning_spectral.capture.shadow import LossFunction, load_loss
from lightning_spectral.functional.arguments import describe


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
    in it what the loop does, autocast included. Given here, and not to the GradientSpectrum, it is checked against what
    ``watch.loss`` is told.

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
        record: A :class:`RunRecord` that says more of the run; None for a record without its notes. The seed on record
            is that of Lightning's, or Fabric's, ``seed_everything``, if torch has been given no other since.
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
        >>> import torch
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
        optimizers = [_plain_optimizer(one) for one in listed(optimizer)]
        participants = instruments_of(activations, gradients, drift, forecast, record)
        host = LoopHost(model, loggers_of(logger), log_dir, load_loss(loss_fn), optimizers)
        self._counts = not optimizers
        self._loop = Loop(host, participants, optimizers)

    @property
    def metrics(self) -> dict[str, float]:
        """Latest values, by key; NaN for what is not known yet."""
        return {key: float(value) for key, value in self._loop.host.metrics.items()}

    @property
    def num_steps(self) -> int:
        """Optimizer steps so far, over a resume too."""
        return self._loop.host.step

    @property
    def should_stop(self) -> bool:
        """Whether a TailForecaster would end training."""
        return self._loop.host.should_stop

    @contextmanager
    def step(self, batch: Any, *, accumulates: bool = False) -> Iterator[None]:
        """Watch a batch: its forward and backward pass within.

        Args:
            batch: As the model or ``loss_fn`` takes it, on the model's device.
            accumulates: That the optimizer does not step after it; only where there is no ``optimizer`` to tell.

        Raises:
            ValueError: For an argument of an instrument that does not fit the batch, before there is a report.
        """
        if accumulates and not self._counts:
            raise ValueError("accumulates must be False where optimizer is given, whose steps tell, got True")
        self._loop.start_batch(batch)
        try:
            yield
        except BaseException:
            self._loop.drop_batch()
            raise
        self._loop.end_batch(self.num_steps + (not accumulates) if self._counts else None)

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
        self._loop.check_idle()
        if num_batches is not None and (isinstance(num_batches, bool) or num_batches < 1):
            raise ValueError(f"num_batches must be a positive int, or None for all, got {describe(num_batches)}")
        of = self._loop.host.validation_pass(loader, num_batches)
        self._loop.start_validation(of)
        batches = self._batches(loader, num_batches, None if of is None else of.num_batches)
        try:
            yield batches
        except BaseException:
            batches.close()
            self._loop.drop_validation()
            raise
        batches.close()
        self._loop.end_validation()

    def loss(self, loss: Tensor, factor: float = 1.0) -> Tensor:
        """Tell the loss of the batch, before it is divided or scaled; of several the last is recorded.

        Args:
            loss: A tensor with one number, of which ``backward`` is called, or of a multiple of it.
            factor: What makes it the batch's own, where it was divided before: batches a step, say.

        Returns:
            The same tensor.

        Raises:
            ValueError: If there is no batch under way, or it is not one number.
        """
        return self._loop.tell_loss(loss, factor)

    def log(self, metrics: Mapping[str, Any] | None = None, **named: Any) -> None:
        """Log numbers of one's own at this step: to the loggers, to :attr:`metrics`, and losses to the record.

        Args:
            metrics: Numbers, or tensors with one number, by key; over ranks each logs the same.
            named: Likewise.

        Raises:
            ValueError: For what is no number.
        """
        self._loop.log({**(metrics or {}), **named})

    def state_dict(self) -> dict[str, Any]:
        """What :meth:`load_state_dict` takes; it may be called on one rank alone.

        Returns:
            Plain numbers, strings, lists, dictionaries and tensors. Of several ranks a report that is being made beside
            training is not waited for.
        """
        return self._loop.state_dict()

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Go on from what :meth:`state_dict` gave, before the first batch.

        Raises:
            ValueError: After the first batch.
        """
        self._loop.load_state_dict(state_dict)

    def close(self) -> None:
        """End: print the tables of first and last reports, end the record, and take all hooks off. Once is enough."""
        self._loop.close()

    def __enter__(self) -> "SpectralWatch":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if error is None:
            self.close()
        else:
            self._loop.drop()

    def _batches(self, loader: Any, num_batches: int | None, length: int | None) -> Any:
        for index, batch in enumerate(islice(loader, num_batches)):  # and not one more
            batch = move_data_to_device(batch, self._loop.host.device)
            self._loop.start_validation_batch(batch, index)
            is_last = False
            try:
                yield batch
                is_last = length is not None and index + 1 >= length
            finally:
                self._loop.end_validation_batch(is_last)


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
