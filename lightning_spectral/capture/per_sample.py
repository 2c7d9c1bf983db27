"""Per-sample gradients of a batch by passes of their own: vectorised, in a loop, or from layers' inputs and outputs."""

import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, Literal, Protocol

import torch
from lightning.pytorch.utilities.seed import isolate_rng
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

from lightning_spectral.capture.backward import NO_GRADIENT, check_contracts
from lightning_spectral.capture.batch import has_samples, hold, num_samples, take
from lightning_spectral.capture.contraction import LayerRows, owners
from lightning_spectral.capture.parameters import resolve_parameters
from lightning_spectral.capture.shadow import BatchLoss, LossFunction, load_loss

Method = Literal["auto", "vmap", "hooks", "loop"]

LARGEST_CHUNK = {"cpu": 8}
"""More samples at a time are no faster: on two cores 8 are the best of 1 to 32 (``benchmarks/per_sample.py``)."""

LARGEST_CHUNK_ELSEWHERE = 64

MEMORY_SHARE = 0.25
"""Share of the free memory that a chunk may take: the next training step wants its own back."""


class Engine(Protocol):
    """Writes the per-sample gradients of a batch."""

    def __call__(self, loss: BatchLoss, names: list[str], batch: Any, out: dict[str, Tensor]) -> None:
        """Fill ``out``.

        Args:
            loss: The loss of a batch.
            names: Parameters, by clean name.
            batch: B samples.
            out: ``(B, P)`` by name.
        """


def by_vmap(loss: BatchLoss, names: list[str], batch: Any, out: dict[str, Tensor]) -> None:
    """All samples at once: ``vmap(grad(...))`` over the loss of a batch of one. See :class:`Engine`."""
    loss.freeze()
    keys = {name: loss.parameter(name)[0] for name in names}
    chosen = {keys[name]: loss.parameter(name)[1].detach() for name in names}
    size = num_samples(batch)
    tensors: list[Tensor] = []
    apply_to_collection(batch, Tensor, tensors.append)
    is_mapped = [has_samples(tensor, size) for tensor in tensors]
    if not any(is_mapped):
        raise ValueError(f"batch must hold tensors with an axis of samples, got a {type(batch).__name__}")

    # As an argument, a buffer may be written to in place.
    buffers = dict(loss.named_buffers())

    def loss_of_one(parameters: dict[str, Tensor], buffers: dict[str, Tensor], *parts: Tensor) -> Tensor:
        cut = iter(part.unsqueeze(0) if mapped else part for part, mapped in zip(parts, is_mapped, strict=True))
        sample = apply_to_collection(batch, Tensor, lambda _: next(cut))
        return functional_call(loss, parameters | buffers, (sample,))

    in_dims = (None, None, *(0 if mapped else None for mapped in is_mapped))
    # The fused attention kernels have no rule for vmap.
    with sdpa_kernel(SDPBackend.MATH):
        gradients = vmap(grad(loss_of_one), in_dims=in_dims, randomness="different")(chosen, buffers, *tensors)
    for name in names:
        out[name].copy_(gradients[keys[name]].flatten(1))


def by_loop(loss: BatchLoss, names: list[str], batch: Any, out: dict[str, Tensor]) -> None:
    """One backward pass for each sample, of all parameters together; works wherever autograd works."""
    loss.unfreeze()
    parameters = [loss.parameter(name)[1] for name in names]
    for index in range(num_samples(batch) or 0):
        sample = take(batch, index, index + 1)
        for name, gradient in zip(names, _gradients(loss, sample, parameters), strict=True):
            row = out[name][index]
            if gradient is None:
                row.zero_()
            else:
                row.copy_(gradient.flatten())


def _gradients(loss: BatchLoss, sample: Any, parameters: list[nn.Parameter]) -> Sequence[Tensor | None]:
    value = loss(sample)
    if not _is_reentrant(value):
        return torch.autograd.grad(value, parameters, allow_unused=True)
    # It delivers into .grad only. The shadow's parameters are its own.
    for parameter in loss.parameters():
        parameter.grad = None
    value.backward()
    gradients = [parameter.grad for parameter in parameters]
    for parameter in loss.parameters():
        parameter.grad = None
    return gradients


def _is_reentrant(value: Tensor) -> bool:
    """Whether reentrant checkpointing, whoever's, hides parameters in it from ``torch.autograd.grad``."""
    nodes: list[Any] = [value.grad_fn]
    seen: set[Any] = set()
    while nodes:
        node = nodes.pop()
        if node is None or node in seen:
            continue
        if type(node).__name__.startswith("CheckpointFunction"):
            return True
        seen.add(node)
        nodes.extend(following for following, _ in node.next_functions)
    return False


class ByHooks:
    r"""One forward and backward pass for the whole batch; each layer's input and output gradient give its rows.

    Only gradients of activations are computed, down to the first layer that is asked for: no gradient of a parameter,
    unless the rows are still to be checked against it.

    Args:
        loss_reduction: How the loss of a batch comes from those of its samples. Under ``"mean"`` a row is B times its
            sample's part of the gradient of the batch. That is the gradient of the sample's own loss if samples weigh
            the same; under a mean over tokens, sample b with n_b of them, it is :math:`n_b B / \sum n` times it, over
            the B samples of one pass.
    """

    def __init__(self, loss_reduction: Literal["mean", "sum"] = "mean") -> None:
        self.loss_reduction = loss_reduction
        self.is_checked = False

    def __call__(self, loss: BatchLoss, names: list[str], batch: Any, out: dict[str, Tensor]) -> None:
        """See :class:`Engine`."""
        # The first graph is a whole one: where all is frozen, reentrant checkpointing leaves no trace.
        if self.is_checked:
            loss.freeze()
        else:
            loss.unfreeze()
        parameters = {name: loss.parameter(name)[1] for name in names}
        check_contracts(loss.shadow, parameters)
        size = num_samples(batch) or 0
        rows = LayerRows(size, out, float(size) if self.loss_reduction == "mean" else 1.0)
        device = next(iter(parameters.values())).device
        # What each tapped output leads back to: the one thing a gradient is asked of.
        anchor = torch.zeros((), device=device, requires_grad=True)
        handles = []
        for name, parameter in parameters.items():
            for module, attribute in owners(loss.shadow, parameter):
                hook = _tap(rows, name, attribute, anchor)
                handles.append(module.register_forward_hook(hook, with_kwargs=True))
        try:
            wanted = [anchor, *(() if self.is_checked else parameters.values())]
            value = loss(batch)
            if not self.is_checked and _is_reentrant(value):
                raise ValueError("method='hooks' cannot see through reentrant checkpointing: use method='loop'")
            gradients = torch.autograd.grad(value, wanted, allow_unused=True) if value.requires_grad else ()
        finally:
            for handle in handles:
                handle.remove()
        for name, gradient in zip(names, gradients[1:], strict=False):
            if gradient is not None:
                rows.check(name, gradient)
        failures = {name: NO_GRADIENT for name in names if name not in rows.seen} | rows.failures
        if failures:
            raise ValueError("; ".join(f"{name}: {reason}" for name, reason in failures.items()))
        self.is_checked = True


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
                if is_out_of_memory(error):
                    raise
                cause = str(error).strip().partition("\n")[0] or type(error).__name__
        by_loop(loss, names, batch, out)
        self.cause = self.cause or cause


def engine_of(method: Method, loss_reduction: Literal["mean", "sum"] = "mean") -> Engine:
    """The engine that a method means.

    Args:
        method: Its name.
        loss_reduction: For ``"hooks"``, see :class:`ByHooks`.

    Returns:
        A new one: it may remember what it learns.
    """
    if method == "hooks":
        return ByHooks(loss_reduction)
    engines: dict[str, Engine] = {"vmap": by_vmap, "loop": by_loop, "auto": ByVmapOrLoop()}
    return engines[method]


def fill_rows(
    engine: Engine,
    loss: BatchLoss,
    names: list[str],
    batch: Any,
    out: dict[str, Tensor],
    chunk_size: int | None = None,
) -> int:
    r"""Write the per-sample gradients of a batch, so many samples at a time; to be called inside :func:`isolated`.

    At the peak vmap takes, beside ``out`` (N x P numbers, P summed over parameters), about
    ``chunk_size (1.5 A + 4 P)`` bytes, A being what autograd saves for one sample (:func:`saved_bytes`) and 1.5 what
    was measured for temporaries (``benchmarks/per_sample.py``). By hooks, which write rows in place and differentiate
    once, it is about half of A for each sample. A chunk that does not fit is halved and tried again.

    Args:
        engine: Of :func:`engine_of`.
        loss: The loss of a batch.
        names: Parameters, by clean name.
        batch: B samples.
        out: ``(B, P)`` by name.
        chunk_size: Samples at a time; None takes as many as fit into a quarter of the free memory, and no more than are
            of use.

    Returns:
        The size of the chunks in the end.

    Raises:
        MemoryError: If one sample alone does not fit.
    """
    size = num_samples(batch) or 0
    chunk = min(chunk_size or fitting_chunk(loss, names, batch), max(size, 1))
    start = 0
    while start < size:
        stop = min(start + chunk, size)
        part = {name: out[name][start:stop] for name in names}
        try:
            engine(loss, names, take(batch, start, stop), part)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            if chunk == 1:
                reason = str(error).partition("\n")[0]
                raise MemoryError(f"the gradient of one sample does not fit into memory: {reason}") from error
            chunk = -(-chunk // 2)
            torch.cuda.empty_cache()
        else:
            start = stop
            if loss.scale != 1:
                for rows in part.values():
                    rows.div_(loss.scale)
    return chunk


def per_sample_gradients(
    module: nn.Module,
    batch: Any,
    parameters: str | Sequence[str] | None = None,
    method: Method = "auto",
    chunk_size: int | None = None,
    loss_fn: LossFunction | str | None = None,
    loss_reduction: Literal["mean", "sum"] = "mean",
) -> dict[str, Tensor]:
    """The gradient of each sample's own loss with respect to some parameters of a module, which stays as it is.

    Args:
        module: A LightningModule, whose ``training_step`` gives the loss, or any module with a ``loss_fn``.
        batch: B samples: tensors in mappings, sequences and dataclasses.
        parameters: See :func:`lightning_spectral.capture.resolve_parameters`.
        method: ``"vmap"`` (torch.func), ``"loop"`` (one backward pass a sample), ``"hooks"`` (one backward pass for
            all, linear layers and embeddings only, see :class:`ByHooks`), ``"auto"`` (vmap, else loop).
        chunk_size: Samples at a time, None for as many as fit, see :func:`fill_rows`.
        loss_fn: ``loss_fn(module, batch) -> loss``, or its import path.
        loss_reduction: For ``"hooks"``: how the loss of a batch comes from those of its samples.

    Returns:
        ``(B, P)`` by clean name; float32, or float64 for such parameters.

    Raises:
        ValueError: For a choice that means nothing here, or a module without a loss.
    """
    chosen = resolve_parameters(module, parameters)
    loss = BatchLoss(module, load_loss(loss_fn))
    batch = hold(batch)
    size = num_samples(batch) or 0
    with isolated():
        out = {
            name: torch.empty(size, p.numel(), dtype=torch.promote_types(p.dtype, torch.float32), device=p.device)
            for name, p in chosen.items()
        }
        fill_rows(engine_of(method, loss_reduction), loss, list(chosen), batch, out, chunk_size)
    return out


def fitting_chunk(loss: BatchLoss, names: list[str], batch: Any) -> int:
    """How many samples' passes fit into a share of the free memory, by the formula of :func:`fill_rows`.

    Args:
        loss: The loss of a batch.
        names: Parameters, by clean name.
        batch: One of the batches.

    Returns:
        At least 1.
    """
    parameters = [loss.parameter(name)[1] for name in names]
    per_sample = chunk_bytes(1, saved_bytes(loss, names, batch), sum(p.numel() for p in parameters))
    device = parameters[0].device
    fitting = int(MEMORY_SHARE * _free_bytes(device) / max(per_sample, 1))
    return max(1, min(fitting, LARGEST_CHUNK.get(device.type, LARGEST_CHUNK_ELSEWHERE)))


def chunk_bytes(chunk_size: int, saved: int, num_numbers: int) -> int:
    """What a chunk takes under vmap beside the rows it gives, by the formula of :func:`fill_rows`.

    Args:
        chunk_size: Samples at a time.
        saved: A, of :func:`saved_bytes`.
        num_numbers: P, summed over parameters.

    Returns:
        Bytes.
    """
    return chunk_size * (3 * saved // 2 + 4 * num_numbers)


def saved_bytes(loss: BatchLoss, names: list[str], batch: Any) -> int:
    """Bytes that autograd saves for one sample, in its forward pass and, as under vmap, in its backward pass.

    Args:
        loss: The loss of a batch.
        names: Parameters, by clean name, that ask for a gradient.
        batch: Its first sample is taken.

    Returns:
        The bytes, without those of parameters; 0 if the pass fails, which is for the engine to say.
    """
    storages: dict[int, int] = {}
    own = {p.untyped_storage().data_ptr() for p in loss.parameters()}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    loss.freeze()
    parameters = [loss.parameter(name)[1].requires_grad_(True) for name in names]
    try:
        with (
            sdpa_kernel(SDPBackend.MATH),
            torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor),
        ):
            value = loss(take(batch, 0, 1))
            # functorch keeps the graph of the backward pass, in case somebody differentiates it again.
            gradients = torch.autograd.grad(value, parameters, create_graph=True, allow_unused=True)
    except Exception:
        return 0
    del value, gradients
    return sum(storages.values())


def _free_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    if hasattr(os, "sysconf") and "SC_AVPHYS_PAGES" in os.sysconf_names:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return 2**32


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory is short, on whichever device.

    Args:
        error: Any.

    Returns:
        True for those that a smaller chunk may cure.
    """
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or (
        isinstance(error, RuntimeError) and "not enough memory" in str(error)
    )


@contextmanager
def isolated() -> Iterator[None]:
    """Random streams as they were afterwards, gradients on even where a validation pass turned them off, no compiler.

    Yields:
        Nothing.
    """
    # Without dynamo in the process nothing is compiled, and importing it takes seconds.
    eager = torch.compiler.set_stance("force_eager") if "torch._dynamo" in sys.modules else nullcontext()
    with (
        isolate_rng(include_cuda=torch.cuda.is_available()),
        torch.inference_mode(False),
        torch.enable_grad(),
        eager,
    ):
        yield
