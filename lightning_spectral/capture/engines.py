"""Engines for per-sample gradients: vectorised, in a loop, or from layers' inputs and outputs, behind one interface."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad_and_value, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

from lightning_spectral.capture.backward import NO_GRADIENT, check_contracts
from lightning_spectral.capture.batch import Cut, Place, cut, num_samples, take
from lightning_spectral.capture.branches import BranchError
from lightning_spectral.capture.contraction import LayerRows, owners
from lightning_spectral.capture.graph import graph_of
from lightning_spectral.capture.one_line import reason_of
from lightning_spectral.capture.sample_axis import SampleAxes, axes_of_samples
from lightning_spectral.capture.shadow import BatchLoss
from lightning_spectral.capture.stand_ins import MetricTermError
from lightning_spectral.capture.unread import Unread
from lightning_spectral.capture.vmap_rules import VmapRules, buffers_of_samples

Method = Literal["auto", "vmap", "hooks", "loop"]


class SomeRowsError(ValueError):
    """Rows of some parameters could not be had, for reasons of their own; those of the others are there.

    Args:
        failures: Reasons by name.
    """

    def __init__(self, failures: dict[str, str]) -> None:
        super().__init__("; ".join(f"{name}: {reason}" for name, reason in failures.items()))
        self.failures = failures


class Engine(Protocol):
    """Writes the per-sample gradients of a batch of B samples into ``out``, ``(B, P)`` by clean parameter name."""

    def __call__(self, loss: BatchLoss, names: list[str], batch: Any, out: dict[str, Tensor]) -> None:
        """Fill ``out``."""


def by_vmap(loss: BatchLoss, names: list[str], batch: Any, out: dict[str, Tensor]) -> None:
    """All samples at once: ``vmap(grad(...))`` over the loss of a batch of one. See :class:`Engine`.

    Of a step that branches on its samples, as those of transformers do on whether a mask has padding, those that take
    the same branches are vectorised together.
    """
    batch = cut(batch)
    try:
        _vectorise(loss, names, batch, out)
    except BranchError as error:
        for indices in error.parts():
            rows = {name: torch.empty_like(out[name][: len(indices)]) for name in names}
            by_vmap(loss, names, batch.pick(indices), rows)
            for name in names:
                out[name][indices] = rows[name]


def _vectorise(loss: BatchLoss, names: list[str], samples: Cut, out: dict[str, Tensor]) -> None:
    """:func:`by_vmap` of samples that take the same branches; BranchError if they do not."""
    loss.freeze()
    for name in names:
        # One that is reached otherwise than by its module, where another takes its place, is then seen in the values.
        loss.parameter(name)[1].requires_grad_(True)
    keys = {name: loss.parameter(name)[0] for name in names}
    chosen = {keys[name]: loss.parameter(name)[1].detach() for name in names}
    if samples.ones is not None:
        raise ValueError("samples cuts batches into batches of one: use method='loop'")
    tensors: list[Tensor] = []
    axes: list[int | None] = []

    def note(part: Any, place: Place) -> None:
        if isinstance(part, Tensor):
            tensors.append(part)
            axes.append(place.axis)

    samples.mapped(note)

    # As an argument, a buffer may be written to in place.
    shared, own = dict(loss.named_buffers()), {}
    for name in buffers_of_samples(loss) & shared.keys():
        buffer = shared.pop(name)
        own[name] = buffer.expand(samples.size, *buffer.shape).clone()

    def loss_of_one(
        parameters: dict[str, Tensor], shared: dict[str, Tensor], own: dict[str, Tensor], *parts: Tensor
    ) -> Tensor:
        ones = iter(part if axis is None else part.unsqueeze(axis) for part, axis in zip(parts, axes, strict=True))
        sample = samples.mapped(lambda part, at: next(ones) if isinstance(part, Tensor) else _of_one(samples, part, at))
        return functional_call(loss, parameters | shared | own, (sample,))

    in_dims = (None, None, 0, *axes)
    states = loss.random_states()
    # The fused attention kernels have no rule for vmap.
    with _parameters_kept(loss), sdpa_kernel(SDPBackend.MATH), VmapRules(lambda: loss.random_states() != states):
        of_one = vmap(grad_and_value(loss_of_one), in_dims=in_dims, randomness="different")
        try:
            gradients, values = of_one(chosen, shared, own, *tensors)
        except BaseException:
            loss.reset(anew=True)
            raise
        loss.reset()
    loss.check(values)
    leaves = {id(leaf) for leaf in graph_of(values).leaves}
    if held := [name for name in names if id(loss.parameter(name)[1]) in leaves]:
        raise ValueError(
            f"{held[0]} is used by another way than its module, held in a list or by functools.partial for example, "
            "where no other tensor can take its place: use method='loop'"
        )
    if not loss.is_dependent and not any(bool(gradient.any()) for gradient in gradients.values()):
        loss.unfreeze()
        loss.is_reentrant(loss(take(samples, 0, 1)))  # which refuses a loss that depends on nothing
        loss.reset()
    loss.is_dependent = True
    for name in names:
        out[name].copy_(gradients[keys[name]].flatten(1))


def _of_one(samples: Cut, part: Any, place: Place) -> Any:
    """An array or list with an entry for each sample, in a sample that stands for all of them."""
    if samples.size == 1 and not (samples.is_part and place.doubt):
        return part
    kind = type(part).__name__
    reason = f"the {kind} {place.path} of the batch is of its samples, and vmap maps over tensors: use method='loop'"
    return Unread(place.doubt or reason, type(part))


@contextmanager
def _parameters_kept(loss: BatchLoss) -> Iterator[None]:
    """Every tensor in its place afterwards: of a module with two names functional_call forgets it when it fails."""
    tables: list[dict[str, Any]] = [
        part.__dict__[name] for part in loss.modules() for name in ("_parameters", "_buffers")
    ]
    held = [(table, dict(table)) for table in tables]
    try:
        yield
    finally:
        for table, tensors in held:
            table.update(tensors)


def by_loop(loss: BatchLoss, names: list[str], batch: Any, out: dict[str, Tensor]) -> None:
    """One backward pass for each sample, of all parameters together; works wherever autograd works."""
    loss.unfreeze()
    parameters = [loss.parameter(name)[1] for name in names]
    for index in range(num_samples(batch) or 0):
        sample = take(batch, index, index + 1)
        _, gradients = gradients_of(loss, sample, parameters)
        loss.reset()
        for name, gradient in zip(names, gradients, strict=True):
            row = out[name][index]
            if gradient is None:
                row.zero_()
            else:
                row.copy_((gradient if gradient.layout is torch.strided else gradient.to_dense()).flatten())


def gradients_of(loss: BatchLoss, batch: Any, parameters: list[nn.Parameter]) -> tuple[Tensor, Sequence[Tensor | None]]:
    """The loss of a batch, and its gradients in one backward pass; None for a parameter that it does not depend on."""
    value = loss(batch)
    loss.check(value.detach())
    if not loss.is_reentrant(value):
        return value.detach(), torch.autograd.grad(value, parameters, allow_unused=True)
    # It delivers into .grad only. The shadow's parameters are its own.
    for parameter in loss.parameters():
        parameter.grad = None
    value.backward()
    gradients = [parameter.grad for parameter in parameters]
    for parameter in loss.parameters():
        parameter.grad = None
    return value.detach(), gradients


class ByHooks:
    r"""One forward and backward pass for the whole batch; each layer's input and output gradient give its rows.

    Their sum is compared with the gradient of the batch. At the first call forward passes of one sample and of two show
    which axis of layers' outputs is that of samples.

    Args:
        loss_reduction: How the loss of a batch comes from those of its samples. Under ``"mean"`` a row is B times its
            sample's part of the gradient of the batch. That is the gradient of the sample's own loss if samples weigh
            the same; under a mean over tokens, sample b with n_b of them, it is :math:`n_b B / \sum n` times it, over
            the B samples of one pass.
        batch_dim: Axis of samples of what a layer takes and gives, if it is as long as there are samples; else 0. None
            for 0, unless that may be of something else.
    """

    def __init__(self, loss_reduction: Literal["mean", "sum"] = "mean", batch_dim: int | None = None) -> None:
        self.loss_reduction = loss_reduction
        self.batch_dim = batch_dim
        self._axes = SampleAxes(batch_dim is not None)

    def __call__(self, loss: BatchLoss, names: list[str], batch: Any, out: dict[str, Tensor]) -> None:
        """See :class:`Engine`."""
        loss.unfreeze()
        parameters = {name: loss.parameter(name)[1] for name in names}
        check_contracts(loss.shadow, parameters)
        size = num_samples(batch) or 0
        rows = LayerRows(size, out, float(size) if self.loss_reduction == "mean" else 1.0, self.batch_dim or 0)
        device = next(iter(parameters.values())).device
        # What each tapped output leads back to: the one thing a gradient is asked of.
        anchor = torch.zeros((), device=device, requires_grad=True)
        handles = []
        for name, parameter in parameters.items():
            for module, attribute in owners(loss.shadow, parameter):
                hook = _tap(rows, name, attribute, anchor)
                handles.append(module.register_forward_hook(hook, with_kwargs=True))
        try:
            value = loss(batch)
            loss.check(value.detach())
            # Where all is frozen, reentrant checkpointing leaves no trace.
            if loss.is_reentrant(value):
                raise ValueError("method='hooks' cannot see through reentrant checkpointing: use method='loop'")
            wanted = [anchor, *parameters.values()]
            gradients = torch.autograd.grad(value, wanted, allow_unused=True) if value.requires_grad else ()
        finally:
            for handle in handles:
                handle.remove()
            loss.reset()
        for name, gradient in zip(names, gradients[1:], strict=False):
            if gradient is not None:
                rows.compare(name, gradient)
        rows.settle()
        failures = {name: NO_GRADIENT for name in names if name not in rows.seen} | rows.failures
        self._axes.note(rows)
        failures |= self._axes.judge(
            set(names) - failures.keys(),
            lambda unknown, axes: axes_of_samples(loss, {n: parameters[n] for n in unknown}, axes, cut(batch)),
        )
        if failures:
            raise SomeRowsError(failures)


def _tap(rows: LayerRows, name: str, attribute: str, anchor: Tensor) -> Callable[..., Tensor]:
    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> Tensor:
        x = (args or tuple(kwargs.values()))[0].detach()
        return _Tap.apply(output, anchor, lambda gradient: rows.add(name, module, attribute, x, gradient))

    return hook


class _Tap(torch.autograd.Function):
    """Hands on an output as it is, and its gradient to a reader on the way back."""

    @staticmethod
    def forward(ctx: Any, output: Tensor, anchor: Tensor, read: Callable[[Tensor], None]) -> Tensor:
        ctx.read = read
        # In place of itself: neither a copy nor a view, which an in-place activation after it would refuse.
        ctx.mark_dirty(output)
        return output

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None]:
        ctx.read(gradient)
        return gradient, gradient.new_zeros(()), None


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory is short, on whichever device, which a smaller chunk may cure."""
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or (
        isinstance(error, RuntimeError) and "not enough memory" in str(error)
    )


class ByVmapOrLoop:
    """Vectorised while that works; from the first failure that a loop survives on, a loop."""

    def __init__(self) -> None:
        self.cause: str | None = None
        """Why it loops; None while it does not."""

    def __call__(self, loss: BatchLoss, names: list[str], batch: Any, out: dict[str, Tensor]) -> None:
        """See :class:`Engine`."""
        cause = None
        if self.cause is None:
            try:
                by_vmap(loss, names, batch, out)
                return
            except Exception as error:
                if is_out_of_memory(error) or isinstance(error, MetricTermError):
                    raise
                cause = reason_of(error)
        by_loop(loss, names, batch, out)
        self.cause = self.cause or cause


def engine_of(method: Method, loss_reduction: Literal["mean", "sum"] = "mean", batch_dim: int | None = None) -> Engine:
    """A new engine of a method, for it may remember what it learns; all but ``method`` is of use to ``hooks`` alone."""
    if method == "hooks":
        return ByHooks(loss_reduction, batch_dim)
    engines: dict[str, Engine] = {"vmap": by_vmap, "loop": by_loop, "auto": ByVmapOrLoop()}
    return engines[method]
