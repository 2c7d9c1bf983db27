"""The callback for the Trainer of Hugging Face's transformers, over the same core as those for Lightning's."""

import inspect
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from typing_extensions import override

from lightning_spectral.callbacks import ActivationSpectrum, GradientSpectrum, HeadDrift, RunRecord, TailForecaster
from lightning_spectral.callbacks.instruments import instruments_of, loggers_of
from lightning_spectral.callbacks.loop import Loop
from lightning_spectral.callbacks.loop_host import LoopHost
from lightning_spectral.capture.activations import no_hook
from lightning_spectral.capture.one_line import reason_of
from lightning_spectral.capture.shadow import LossFunction, load_loss
from lightning_spectral.integrations.divided_loss import own_mean_factor
from lightning_spectral.integrations.trained_loss import OwnLoss, Watched, is_multiple, times_of
from lightning_spectral.warner import Warner

STATE = "lightning_spectral.pt"
"""What a checkpoint's folder holds of ours."""

NUM_ITEMS = "num_items_in_batch"
"""What the Trainer tells a model of all batches of a step; the loss is divided by it."""

UNTOLD = (
    "the Trainer must train by its compute_loss for method='hooks', whose rows are of the size of what that returns, "
    "and has not called it: use method='loop' with loss_fn"
)


def model_loss(model: nn.Module, batch: Mapping[str, Any]) -> Tensor:
    """The loss of a model of transformers, as its forward pass gives it: the mean over the batch it gets."""
    output = model(**batch)
    return output["loss"] if isinstance(output, Mapping) else output[0]


class HFSpectralCallback(TrainerCallback):
    """Measures, logs and records under the Trainer of transformers what :class:`SpectralWatch` does in any loop.

    The batch is what the model is called with, which forward hooks on it see: the first call in each training step, and
    in each step of an evaluation that the Trainer has announced (``control.should_evaluate``); of several sets the
    first is read. So masks are named as the model calls them, ``mask="attention_mask"``. Steps are the Trainer's
    ``global_step``, the seed on record is its ``args.seed``, validation losses are what it evaluates (``eval_loss``),
    the training loss what its ``compute_loss`` returns, which is watched while it trains, and the loss of single
    samples what the model returns. Where the Trainer has it divided by the tokens of all batches of a step
    (``num_items_in_batch``), it is made the mean over the batch's own again, and samples are measured by their own
    means: the graph of the loss shows what it was divided by. Where that is not a plain cross-entropy, the training
    loss of a step of several batches is recorded as NaN.

    Where something else is trained than the model returns (a ``compute_loss`` or ``training_step`` of one's own,
    ``compute_loss_func``), gradients are NaN with that reason, unless there is a ``loss_fn``. By ``method="hooks"`` in
    training they are those of what ``compute_loss`` returns all the same, but without self-check; NaN where it is not
    known by what it was divided.

    Checkpoints hold a file ``lightning_spectral.pt``, from which a resumed run goes on.

    Args:
        activations: As :class:`SpectralWatch` takes it.
        gradients: Likewise.
        drift: Likewise.
        forecast: Likewise; it ends training by ``control.should_training_stop``.
        record: Likewise.
        loss_fn: ``loss_fn(model, batch) -> loss``, or its import path; None for the loss that the model returns.
        logger: As :class:`SpectralWatch` takes it. The Trainer's own reports know nothing of the values.
        log_dir: Where the record is written; None for the log directory of the first logger, else ``output_dir``.
        trainer: The Trainer, which knows how long an evaluation is: rows are then read spread over all of it, as under
            Lightning's, else the first. ``trainer.add_callback(HFSpectralCallback(..., trainer=trainer))``.

    Raises:
        ValueError: For arguments out of range; when training begins for what does not fit the model, models that are
            not whole on each rank, ``torch_compile``, gradients under ``label_smoothing_factor`` by other methods than
            ``"hooks"`` in training, and gradients where no Trainer calls.

    Example:
        >>> callback = HFSpectralCallback(activations=ActivationSpectrum(mask="attention_mask"))
    """

    def __init__(
        self,
        *,
        activations: bool | ActivationSpectrum | None = None,
        gradients: bool | GradientSpectrum | None = None,
        drift: bool | HeadDrift | None = None,
        forecast: TailForecaster | None = None,
        record: RunRecord | None = None,
        loss_fn: str | LossFunction | None = None,
        logger: Any = None,
        log_dir: str | Path | None = None,
        trainer: Any = None,
    ) -> None:
        self._instruments = instruments_of(activations, gradients, drift, forecast, record)
        self._gradients = [one for one in self._instruments if isinstance(one, GradientSpectrum)]
        self._loss_fn, self._has_loss_fn = load_loss(loss_fn) or model_loss, loss_fn is not None
        self._loggers, self._log_dir, self._trainer = loggers_of(logger), log_dir, trainer
        self._warner = Warner(type(self).__name__)
        self._loop: Loop | None = None
        self._handles: list[Any] = []
        self._is_stepping = self._is_in_batch = self._has_many_batches = False
        self._may_evaluate = self._is_evaluating = self._is_in_evaluated = False
        self._index = 0
        self._own: OwnLoss | None = None
        self._told: Any = None
        self._has_own = self._is_of_own_size = False
        self._num_passes = 0
        self._doubt: str | None = None

    @property
    def metrics(self) -> dict[str, float]:
        """Latest values, by key."""
        return {} if self._loop is None else {key: float(one) for key, one in self._loop.host.metrics.items()}

    @override
    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._leave()
        _check(args, self._gradients)
        trainer = _calling_trainer() if self._trainer is None else self._trainer
        if trainer is None and self._gradients:
            raise ValueError(
                "trainer must be given for gradients where no Trainer of transformers calls HFSpectralCallback: only "
                "it knows the loss that is trained"
            )
        model, output = kwargs["model"], Path(args.output_dir or ".")
        folder = output if self._log_dir is None and not self._loggers else self._log_dir
        optimizers = [one for one in [kwargs.get("optimizer")] if one is not None]
        host = LoopHost(model, self._loggers, folder, self._loss_fn, optimizers, args.seed)
        self._loop = Loop(host, self._instruments, who=type(self).__name__, untold=UNTOLD)
        self._resume(self._loop, output, state.global_step)
        self._handles = [
            model.register_forward_pre_hook(_Hook(self._before_forward), with_kwargs=True),
            model.register_forward_hook(_Hook(self._after_forward), with_kwargs=True),
        ]
        if trainer is not None:
            name = type(trainer).__name__, type(model).__name__
            self._handles += [
                Watched(trainer, "compute_loss", lambda *of: self._safely(lambda: self._after_loss(*name, *of))),
                Watched(
                    trainer.accelerator,
                    "backward",
                    lambda root: self._safely(lambda: self._before_backward(*name, root)),
                    before=True,
                ),
            ]
        self._num_processes, self._doubt = args.world_size, None
        self._is_stepping = self._is_in_batch = self._is_evaluating = self._is_in_evaluated = False
        self._may_evaluate = bool(args.eval_on_start)
        self._has_many_batches = args.gradient_accumulation_steps * args.world_size > 1

    @override
    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._end_evaluation({})
        self._may_evaluate, self._is_stepping = False, True

    @override
    def on_substep_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._end_batch(state.global_step)

    @override
    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self._loop is not None and (optimizer := kwargs.get("optimizer")) is not None:
            self._loop.before_optimizer_step(optimizer)

    @override
    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self._end_batch(state.global_step)
        self._is_stepping = False
        self._look_at(control)

    @override
    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._look_at(control)

    @override
    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        # Callbacks after this one may have asked for an evaluation, which comes after the log.
        self._look_at(control)

    @override
    def on_prediction_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self._loop is None or not self._is_in_evaluated:
            return
        self._is_in_evaluated = False
        try:
            is_last = self._index >= len(kwargs["eval_dataloader"])
        except (KeyError, TypeError):
            is_last = False
        if self._doubt is not None and not self._has_loss_fn:
            self._loop.doubt_gradients("validate", self._doubt)
        self._loop.end_validation_batch(is_last)

    @override
    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        metrics = kwargs.get("metrics") or {}
        self._end_evaluation({key: value for key, value in metrics.items() if isinstance(value, (int, float))})
        self._look_at(control)
        # What follows is of another set, or somebody's who tries the model.
        self._may_evaluate = False

    @override
    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self._loop is None or not state.is_world_process_zero:
            return
        try:
            torch.save(self._loop.state_dict(), _state_of(Path(args.output_dir or "."), state.global_step))
        except Exception as error:  # a checkpoint without it is one
            self._warner.warn(f"could not save its state in the checkpoint: {reason_of(error)}")

    @override
    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._end_evaluation({})
        self._unhook()
        if self._loop is not None:
            self._loop.close()

    def _resume(self, loop: Loop, output: Path, step: int) -> None:
        file = _state_of(output, step)
        if step > 0 and file.exists():
            loop.load_state_dict(torch.load(file, weights_only=True))
        elif step > 0:
            self._warner.warn(f"begins anew at step {step}: there is no {file}, which would know of steps before")
        loop.start_at(step)

    def _before_forward(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        loop = self._loop
        if loop is None or loop.is_closed:
            return
        if model.training:
            if self._is_stepping and not self._is_in_batch:
                self._is_in_batch, self._has_own, self._num_passes = True, False, 0
                self._own = self._told = None
                self._is_of_own_size = False
                self._doubt = "the Trainer's compute_loss was not called in a training step: give loss_fn"
                loop.start_batch(_batch_of(model, args, kwargs))
        elif self._may_evaluate and not self._is_in_evaluated:
            if not self._is_evaluating:
                self._is_evaluating, self._index = True, 0
                loader = None if self._trainer is None else self._trainer.callback_handler.eval_dataloader
                loop.start_validation(None if loader is None else loop.host.validation_pass(loader, None))
            self._is_in_evaluated = True
            loop.start_validation_batch(_batch_of(model, args, kwargs), self._index)
            self._index += 1

    def _after_forward(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        if not (self._is_watching and model.training) or self._has_own:
            return
        self._has_own = True  # of the batch, which is that of the first call
        loss = output.get("loss") if isinstance(output, Mapping) else output[0] if isinstance(output, tuple) else None
        if isinstance(loss, Tensor) and loss.numel() == 1:
            total = kwargs.get(NUM_ITEMS)
            factor = 1.0 if total is None else own_mean_factor(loss, total)
            self._own = OwnLoss(loss.detach().clone().reshape(()), loss.grad_fn, factor)

    def _after_loss(self, trainer: str, model: str, returned: Any, kwargs: Mapping[str, Any]) -> None:
        """``compute_loss`` has returned: what it did is the loss of the batch."""
        loss = returned[0] if isinstance(returned, tuple) else returned
        loop = self._loop
        if loop is None or not self._is_watching or not isinstance(loss, Tensor) or loss.numel() != 1:
            return
        factor: float | Tensor | None
        times = None if self._own is None else times_of(loss, self._own, self._num_processes)
        if self._own is not None and times is not None:
            factor = None if self._own.factor is None else self._own.factor / times
            self._doubt = None
        else:
            total = kwargs.get(NUM_ITEMS)
            factor = 1.0 if total is None else own_mean_factor(loss, total, self._num_processes)
            self._doubt = f"{trainer} trains by another loss than {model} returns: give loss_fn, or use method='hooks'"
            if self._own is None:
                self._doubt = (
                    f"{model} returns no loss to {trainer}, which makes one beside it: use method='hooks', or loss_fn "
                    "where the model is called with all that it needs"
                )
        if is_unknown := factor is None and self._has_many_batches:
            self._warner.warn(
                f"training losses are not recorded: {model} is told of the labels of all batches of a "
                f"step ({NUM_ITEMS}), and its loss does not show whether it divides by them; with accepts_loss_kwargs "
                "= False on the model it is not told"
            )
        self._told, self._is_of_own_size = loss.grad_fn, not is_unknown
        loop.tell_loss(loss, 1.0 if factor is None else factor, is_recorded=not is_unknown)

    def _before_backward(self, trainer: str, model: str, root: Any) -> None:
        """A backward pass begins: what it begins at is what is trained."""
        if self._loop is None or not self._is_watching or not isinstance(root, Tensor):
            return
        self._num_passes += 1
        if self._num_passes > 1:
            self._doubt = f"{trainer} makes {self._num_passes} backward passes in a training step: give loss_fn"
        elif self._told is not None and not is_multiple(root, self._told):
            self._is_of_own_size = False  # what was told is a part of it, times whatever
            self._doubt = f"{trainer}.training_step trains by another loss than its compute_loss returns: give loss_fn"
        if self._doubt is not None and not self._has_loss_fn:
            self._loop.doubt_gradients("train", self._doubt, self._told is not None and self._is_of_own_size)

    @property
    def _is_watching(self) -> bool:
        """Whether a batch of training is under way."""
        return self._is_in_batch and self._loop is not None and not self._loop.is_closed

    def _safely(self, work: Callable[[], None]) -> None:
        """Do what may fail without ending training; what is then not known is doubted."""
        try:
            work()
        except Exception as error:
            self._doubt = f"the loss that is trained could not be seen: {reason_of(error)}"
            self._warner.warn(self._doubt)

    def _end_batch(self, step: int) -> None:
        if self._loop is not None and self._is_in_batch:
            if self._num_passes == 0 and self._doubt is None:
                self._doubt = "the Trainer's accelerator made no backward pass in a training step: give loss_fn"
            if self._doubt is not None and not self._has_loss_fn:
                self._loop.doubt_gradients("train", self._doubt, self._told is not None and self._is_of_own_size)
            self._is_in_batch = False
            self._loop.end_batch(step)

    def _end_evaluation(self, metrics: dict[str, float]) -> None:
        if self._loop is not None and self._is_evaluating:
            self._is_evaluating = self._is_in_evaluated = False
            self._loop.log(metrics)
            self._loop.end_validation()

    def _look_at(self, control: TrainerControl) -> None:
        self._may_evaluate |= control.should_evaluate
        if self._loop is not None and self._loop.host.should_stop:
            control.should_training_stop = True

    def _unhook(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def _leave(self) -> None:
        """A run that was given up has left its hooks."""
        self._unhook()
        if self._loop is not None and not self._loop.is_closed:
            self._loop.drop()


def _calling_trainer() -> Trainer | None:
    """The Trainer that calls: callbacks are told of everything but it, so it is looked for among their callers."""
    frame = inspect.currentframe()
    while frame is not None:
        if isinstance(caller := frame.f_locals.get("self"), Trainer):
            return caller
        frame = frame.f_back
    return None


class _Hook:
    """Holds the callback; a model that is copied or saved leaves the hook behind."""

    def __init__(self, tell: Callable[..., None]) -> None:
        self.tell = tell

    def __call__(self, *args: Any) -> None:
        self.tell(*args)

    def __reduce__(self) -> Any:
        return no_hook, ()


def _state_of(output: Path, step: int) -> Path:
    """Ours in the Trainer's checkpoint of a step."""
    return output / f"checkpoint-{step}" / STATE


def _check(args: TrainingArguments, gradients: Sequence[GradientSpectrum]) -> None:
    if args.torch_compile:
        raise ValueError(
            "torch_compile must be False under HFSpectralCallback, got True: what a compiled model is called with "
            "cannot be seen"
        )
    if getattr(args, "deepspeed", None):
        raise ValueError("deepspeed must be None under HFSpectralCallback: it leaves no rank whole parameters")
    if args.n_gpu > 1:
        raise ValueError(f"n_gpu must be at most 1 under HFSpectralCallback, got {args.n_gpu}: launch by torchrun")
    if args.label_smoothing_factor and not all(
        (one.request.method, one.request.stage) == ("hooks", "train") for one in gradients
    ):
        raise ValueError(
            f"label_smoothing_factor must be 0 for gradients, got {args.label_smoothing_factor}: the Trainer keeps the "
            "labels that the loss of a sample needs; method='hooks' does without them"
        )


def _batch_of(model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """What a model is called with, by name."""
    named = dict(zip(inspect.signature(model.forward).parameters, args, strict=False)) | dict(kwargs)
    return {name: value for name, value in named.items() if name != NUM_ITEMS and value is not None}
