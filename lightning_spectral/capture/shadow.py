"""The loss of any batch, computed on a shadow of the module, so that asking for it leaves the module as it is."""

import functools
import importlib
import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor, nn
from typing_extensions import override

from lightning_spectral.capture.batch import batch_of, copied, tensors
from lightning_spectral.capture.eager import eager
from lightning_spectral.capture.graph import graph_of
from lightning_spectral.capture.kept import Kept, random_states
from lightning_spectral.capture.large import LOCKED
from lightning_spectral.capture.module_copy import copy_of
from lightning_spectral.capture.one_line import shown
from lightning_spectral.capture.original import Original
from lightning_spectral.capture.parameters import named_parameters
from lightning_spectral.capture.stand_ins import MetricTermError, SilentMetric, Undrawable, Watched, is_metric

LossFunction = Callable[[nn.Module, Any], Tensor]
"""``loss_fn(module, batch) -> loss``, 0-dim."""

NO_OPTIMIZERS = "automatic_optimization=False: its training_step moves the optimizers, so give loss_fn(module, batch)"

EXHAUSTED = (
    "training_step draws from an iterator that is exhausted: give loss_fn, which takes all it needs from the batch"
)


class BatchLoss(nn.Module):
    """The loss of a batch as a function of a shadow's parameters.

    The shadow is a deep copy, parameters included: a backward pass of it fills nobody's ``.grad``, and whatever
    ``training_step`` writes (counters, buffers, metric states, a teacher's weights) are copies; one that draws from an
    iterator of the module is refused. What it can reach beside them (globals, closures, generators, what it asks the
    Trainer for) is put back by :meth:`isolated`, and a loss that runs on the module itself all the same is refused in
    there. The user's own hooks stay, ours are gone. Logging does nothing. torchmetrics are neither updated nor
    computed, NaN stands for their values, until one is seen to be a term of the loss.

    Args:
        module: A LightningModule, or any module if there is a ``loss_fn``.
        loss_fn: Takes the shadow and the batch; None calls ``training_step``.
        context: Makes the context of the forward pass, autocast for example.
        trainer: What the shadow sees as its ``trainer``; its loggers swallow what they are given.
        scale: Factor on the loss, so that gradients in float16 do not vanish; whoever asks for them divides by it.

    Raises:
        ValueError: If there is no loss to call: manual optimisation, or no ``training_step``.
        RuntimeError: If the module cannot be copied.
    """

    def __init__(
        self,
        module: nn.Module,
        loss_fn: LossFunction | None = None,
        context: Callable[[], AbstractContextManager[Any]] = nullcontext,
        trainer: Any = None,
        scale: float = 1.0,
    ) -> None:
        super().__init__()
        check_loss(module, loss_fn)
        self.shadow, self._originals, self._bystander = copy_of(module, trainer)
        self.context = context
        self.scale = scale
        self.loss_fn = loss_fn
        self.batch_idx = 0
        """What ``training_step`` is told of the batch whose samples are asked for."""
        self.dataloader_idx = 0
        self.requires_grad = {name: p.requires_grad for name, p in self.shadow.named_parameters()}
        self._metrics = [SilentMetric(part) for part in self.shadow.modules() if is_metric(part)]
        self._kept: Kept | None = None
        self.is_short = False
        """Whether its graph has been seen to compute in 16 bits, by an autocast of the user's own for example."""
        self.is_dependent = False
        """Whether it has been seen to depend on the shadow's parameters."""
        self._module = [module]
        """In a list, which no module takes for a part."""
        self._original: Original | None = None

    def move_to(self, batch_idx: int, step: int | None) -> None:
        """Let the batch whose samples are asked for be another.

        Args:
            batch_idx: Its index in the loader.
            step: The Trainer's ``global_step`` as it began; None for that of now.
        """
        self.batch_idx = batch_idx
        if step is not None and self._bystander is not None:
            self._bystander.stand_at(step)

    @override
    def forward(self, batch: Any) -> Tensor:
        """The loss, 0-dim, times ``scale``; ValueError if what comes back is no scalar."""
        # Of its own: a step may write into its batch.
        batch = copied(batch_of(batch))
        try:
            with self.context():
                loss = self._training_loss(batch) if self.loss_fn is None else self.loss_fn(self.shadow, batch)
        except StopIteration as error:
            raise ValueError(EXHAUSTED) from error
        except ValueError as error:
            if self._kept is not None and self._kept.large.has_arrays and "read-only" in str(error):
                raise ValueError(LOCKED) from error
            raise
        if not isinstance(loss, Tensor) or loss.numel() != 1:
            what = f"shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else repr(loss)
            raise ValueError(f"loss must be a tensor with one number, got {what}")
        if self._original is not None:
            self._original.check()
        return loss.reshape(()) * self.scale if self.scale != 1 else loss.reshape(())

    def _training_loss(self, batch: Any) -> Tensor:
        step: Any = self.shadow.training_step
        names = list(inspect.signature(step).parameters)
        # As Lightning does it.
        known = {"batch_idx": self.batch_idx, "dataloader_idx": self.dataloader_idx}
        given = {name: known[name] for name in names[1:] if name in known}
        output = step(batch, self.batch_idx) if len(names) > 1 and not given else step(batch, **given)
        return output["loss"] if isinstance(output, Mapping) else output

    def of_training(self, batch: Any) -> float:
        """What ``training_step`` will return for a batch that is about to begin."""
        module: Any = self.shadow
        own = getattr(type(module), "on_train_batch_start", None)
        if own is not None and own is not LightningModule.on_train_batch_start:
            # What it does to the batch the samples that are kept do not see: the two losses then differ, as they must.
            module.on_train_batch_start(copied(batch), self.batch_idx)
        value = self(batch)
        try:
            self.check(value)
        except MetricTermError:
            self.compute_metrics()
            value = self(batch)
        return float(value.detach()) / self.scale

    @contextmanager
    def isolated(self, *beside: Any) -> Iterator[Kept]:
        """Ask for losses in here: whatever they write or draw from, :func:`isolated` included, is as it was afterwards.

        ``beside`` is what else a loss may reach: the batches. ValueError for what cannot be put back.
        """
        roots = (self.shadow, self.loss_fn, *beside)
        # A loss is given copies of a batch's tensors.
        known = self._originals | {id(tensor): tensor for tensor in tensors(beside)}
        with isolated():
            self._original = Original(self._module[0], self.shadow, self._originals)
            self._kept = kept = Kept((), known, (SilentMetric, Undrawable, Watched), left_out=self._module)
            if self._bystander is not None:
                self._bystander.tell_of(kept.follow_training)
            try:
                kept.follow(roots)
                with kept.large.watched():
                    yield kept
            finally:
                kept.put_back()
                if self._bystander is not None:
                    self._bystander.tell_of(None)
                self._original.put_back()
                self._kept = self._original = None

    def reset(self, anew: bool = False) -> None:
        """Let the next loss begin where this one did, see :meth:`Kept.reset`; generators go on."""
        if self._kept is not None:
            self._kept.reset(anew)

    def random_states(self) -> list[Any]:
        """The states of all generators that a loss may draw from, to see whether one has."""
        return random_states(self._kept)

    def is_reentrant(self, value: Tensor) -> bool:
        """Whether reentrant checkpointing hides parameters from ``torch.autograd.grad``.

        Raises:
            OriginalUsedError: If the graph of the loss is none of the shadow's.
        """
        leaves, is_reentrant, is_short = graph_of(value)
        self.is_short = self.is_short or is_short
        if self._original is not None and value.requires_grad:
            if is_reentrant:
                self._original.check_leaves(leaves)
            else:
                self._original.check_gradient(leaves)
        return is_reentrant

    def check(self, values: Tensor) -> None:
        """Look at losses that do not know of the shadow's parameters.

        Raises:
            MetricTermError: If they are NaN while NaN stands for metrics that were asked for.
            OriginalUsedError: If they depend on parameters of the module itself.
        """
        if self._original is not None and values.requires_grad:
            self._original.check_leaves(graph_of(values).leaves)
        if any(metric.was_asked for metric in self._metrics) and bool(values.isnan().any()):
            raise MetricTermError("a metric is a term of the loss")

    def compute_metrics(self) -> None:
        """From now on let metrics compute, each on its copy of the state and on this rank alone."""
        self.reset(anew=True)
        for metric in self._metrics:
            metric.let_compute()

    def parameter(self, name: str) -> tuple[str, nn.Parameter]:
        """A parameter of the shadow by its clean name in the module, any of them if it is tied.

        With its name here, as ``torch.func.functional_call`` wants it.
        """
        return self._by_name[name]

    @functools.cached_property
    def _by_name(self) -> dict[str, tuple[str, nn.Parameter]]:
        first = {id(p): name for name, p in self.named_parameters()}
        return {name: (first[id(p)], p) for name, p in named_parameters(self.shadow).items()}

    def freeze(self) -> None:
        """Let no parameter of the shadow ask for a gradient: what is wanted is differentiated by other means."""
        self.shadow.requires_grad_(False)

    def unfreeze(self) -> None:
        """Undo :meth:`freeze`."""
        for name, parameter in self.shadow.named_parameters():
            parameter.requires_grad_(self.requires_grad[name])


@contextmanager
def isolated() -> Iterator[None]:
    """Random streams restored afterwards, gradients on even where a validation pass turned them off, no compiler."""
    failure: BaseException | None = None
    with isolate_rng(include_cuda=torch.cuda.is_available()):
        try:
            with torch.inference_mode(False), torch.enable_grad(), eager():
                yield
        except BaseException as error:  # one that passes through isolate_rng keeps it from restoring anything
            failure = error
    if failure is not None:
        raise failure


def check_loss(module: nn.Module, loss_fn: LossFunction | None) -> None:
    """Refuse, in a ValueError of one line, a module whose loss could not be asked for without harm."""
    if loss_fn is not None:
        return
    if not getattr(module, "automatic_optimization", True):
        raise ValueError(f"loss_fn must be given for {type(module).__name__} with {NO_OPTIMIZERS}")
    step = getattr(module, "training_step", None)
    if step is None or getattr(step, "__func__", None) is LightningModule.training_step:
        raise ValueError(f"loss_fn must be given for {type(module).__name__}, which has no training_step")


def load_loss(loss_fn: LossFunction | str | None) -> LossFunction | None:
    """A loss function, or the one that an import path means; ValueError if that leads to nothing that can be called."""
    if loss_fn is None or callable(loss_fn):
        return loss_fn
    try:
        module, _, name = loss_fn.rpartition(".")
        loaded = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError, TypeError) as error:
        raise ValueError(
            f"loss_fn must be a callable or its import path, got {shown(loss_fn)}: {' '.join(str(error).split())}"
        ) from error
    if not callable(loaded):
        raise ValueError(
            f"loss_fn must be a callable or its import path, got {shown(loss_fn)}, a {type(loaded).__name__}"
        )
    return loaded
