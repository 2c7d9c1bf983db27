"""Per-sample gradients of a batch by passes of their own, so many samples at a time as memory allows."""

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from lightning_spectral.capture.batch import SampleCutter, Samples, hold, load_cutter, num_samples, take
from lightning_spectral.capture.engines import Engine, Method, engine_of, is_out_of_memory
from lightning_spectral.capture.free_memory import free_bytes
from lightning_spectral.capture.one_line import reason_of, shown
from lightning_spectral.capture.parameters import resolve_parameters
from lightning_spectral.capture.shadow import BatchLoss, LossFunction, load_loss
from lightning_spectral.capture.stand_ins import MetricTermError

LARGEST_CHUNK = {"cpu": 8}
"""More samples at a time are no faster: on two cores 8 are the best of 1 to 32 (``benchmarks/per_sample.py``)."""

LARGEST_CHUNK_ELSEWHERE = 64

MEMORY_SHARE = 0.25
"""Share of the free memory that a chunk may take: the next training step wants its own back."""


def fill_rows(
    engine: Engine,
    loss: BatchLoss,
    names: list[str],
    batch: Any,
    out: Mapping[str, Tensor],
    chunk_size: int | None = None,
) -> int:
    """Write the per-sample gradients of a batch, so many at a time; to be called inside :meth:`BatchLoss.isolated`.

    ``out`` is ``(B, P)`` by clean name. At the peak vmap takes, beside it (N x P numbers, P summed over parameters),
    about ``chunk_size (1.5 A + 4 P)`` bytes, A being what autograd saves for one sample (:func:`saved_bytes`) and 1.5
    what was measured for temporaries (``benchmarks/per_sample.py``). By hooks, which write rows in place and
    differentiate once, it is about half of A for each sample. A chunk that does not fit is halved and tried again.
    Without a ``chunk_size`` it is as many samples as fit into a quarter of the free memory, and no more than are of
    use.

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
        except MetricTermError:
            loss.compute_metrics()
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            if chunk == 1:
                raise MemoryError(f"the gradient of one sample does not fit into memory: {reason_of(error)}") from error
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
    batch_dim: int | None = None,
    samples: SampleCutter | str | None = None,
) -> dict[str, Tensor]:
    """The gradient of each sample's own loss with respect to some parameters of a module, which stays as it is.

    Args:
        module: A LightningModule, whose ``training_step`` gives the loss, or any module with a ``loss_fn``.
        batch: B samples: tensors, arrays and lists in mappings, sequences and dataclasses. vmap maps over tensors
            alone: a loss may then not read arrays and lists of samples.
        parameters: See :func:`lightning_spectral.capture.resolve_parameters`.
        method: ``"vmap"`` (torch.func), ``"loop"`` (one backward pass a sample), ``"hooks"`` (one backward pass for
            all, linear layers and embeddings only, see :class:`ByHooks`), ``"auto"`` (vmap, else loop).
        chunk_size: Samples at a time, None for as many as fit, see :func:`fill_rows`.
        loss_fn: ``loss_fn(module, batch) -> loss``, or its import path.
        loss_reduction: For ``"hooks"``: how the loss of a batch comes from those of its samples.
        batch_dim: Axis of samples in the tensors of the batch; None for 0, unless another fits better.
        samples: ``samples(batch) -> list of batches of one``, or its import path, for batches that have no such axis;
            with ``"auto"`` and ``"loop"``.

    Returns:
        ``(B, P)`` by clean name; float32, or float64 for such parameters.

    Raises:
        ValueError: For a choice that means nothing here, a module without a loss, or a batch of which it cannot be told
            where its samples are.
    """
    _check_arguments(module, parameters, method, chunk_size, loss_reduction, batch_dim)
    chosen = resolve_parameters(module, parameters)
    loss = BatchLoss(module, load_loss(loss_fn))
    batch = Samples(batch_dim, load_cutter(samples)).cut(hold(batch))
    size = batch.size
    with loss.isolated(batch):
        out = {
            name: torch.empty(size, p.numel(), dtype=torch.promote_types(p.dtype, torch.float32), device=p.device)
            for name, p in chosen.items()
        }
        fill_rows(engine_of(method, loss_reduction, batch_dim), loss, list(chosen), batch, out, chunk_size)
    return out


def _check_arguments(
    module: Any, parameters: Any, method: Any, chunk_size: Any, loss_reduction: Any, batch_dim: Any
) -> None:
    """Refuse, by a ValueError, arguments of other types than they have."""
    is_list = isinstance(parameters, (list, tuple)) and all(isinstance(name, str) for name in parameters)
    for name, value, holds, words in (
        ("module", module, isinstance(module, nn.Module), "a torch.nn.Module"),
        ("parameters", parameters, parameters is None or isinstance(parameters, str) or is_list, "patterns, or None"),
        (
            "method",
            method,
            isinstance(method, str) and method in ("auto", "vmap", "hooks", "loop"),
            "'auto', 'vmap', 'hooks' or 'loop'",
        ),
        ("chunk_size", chunk_size, chunk_size is None or _is_int(chunk_size, 1), "a positive int, or None"),
        (
            "loss_reduction",
            loss_reduction,
            isinstance(loss_reduction, str) and loss_reduction in ("mean", "sum"),
            "'mean' or 'sum'",
        ),
        ("batch_dim", batch_dim, batch_dim is None or _is_int(batch_dim, 0), "an int from 0, or None"),
    ):
        if not holds:
            raise ValueError(f"{name} must be {words}, got {shown(value)}")


def _is_int(value: Any, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and least <= value <= 10**15


def fitting_chunk(loss: BatchLoss, names: list[str], batch: Any) -> int:
    """How many samples' passes fit into a share of the free memory, at least 1, by the formula of :func:`fill_rows`."""
    parameters = [loss.parameter(name)[1] for name in names]
    per_sample = chunk_bytes(1, saved_bytes(loss, names, batch), sum(p.numel() for p in parameters))
    device = parameters[0].device
    fitting = int(MEMORY_SHARE * free_bytes(device) / max(per_sample, 1))
    return max(1, min(fitting, LARGEST_CHUNK.get(device.type, LARGEST_CHUNK_ELSEWHERE)))


def chunk_bytes(chunk_size: int, saved: int, num_numbers: int) -> int:
    """Bytes of a chunk under vmap, by the formula of :func:`fill_rows`: A is ``saved``, P is ``num_numbers``."""
    return chunk_size * (3 * saved // 2 + 4 * num_numbers)


def saved_bytes(loss: BatchLoss, names: list[str], batch: Any) -> int:
    """Bytes that autograd saves for the first sample, in its forward pass and, as under vmap, in its backward pass.

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
    finally:
        loss.reset()
    del value, gradients
    return sum(storages.values())
