"""What the callbacks would do with a model, from one batch, without training."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from lightning_spectral.callbacks.bands import DEFAULT_HEAD, Bands
from lightning_spectral.capture.backward import why_unreadable
from lightning_spectral.capture.batch import load_cutter
from lightning_spectral.capture.kept import Kept
from lightning_spectral.capture.module_copy import duplicate
from lightning_spectral.capture.one_line import reason_of, shown
from lightning_spectral.capture.parameters import named_parameters
from lightning_spectral.capture.shadow import isolated, load_loss
from lightning_spectral.measurement import ActivationRequest, GradientRequest
from lightning_spectral.measurement.arguments import check_patterns
from lightning_spectral.metrics.reduction import world_size
from lightning_spectral.probing.cost import activation_cost, gradient_cost
from lightning_spectral.probing.found import CostFound, EngineFound, Probe
from lightning_spectral.probing.step import has_step, is_data_module, own_copy, take_step
from lightning_spectral.probing.study import Study, Wanted


def probe(
    module: nn.Module,
    batch: Any = None,
    layers: str | Sequence[str] | None = None,
    parameters: str | Sequence[str] | None = None,
    mask: str | None = None,
    channel_dim: int | None = None,
    batch_dim: int | None = None,
    samples: str | Callable[[Any], Sequence[Any]] | None = None,
    loss_fn: str | Callable[..., Any] | None = None,
    loss_reduction: Literal["mean", "sum"] = "mean",
    every_n_steps: int | None = None,
    num_tokens: int = 65536,
    num_samples: int = 512,
    num_groups: int = 4,
    head: tuple[int, int] | tuple[float, float] = DEFAULT_HEAD,
    tail: tuple[int, int] | tuple[float, float] = (0.125, 0.5),
    chunk_size: int | None = None,
    normalize: bool = True,
    dtype: Literal["auto", "float32", "float64"] = "auto",
    row_dtype: Literal["float32", "bfloat16", "float64"] = "float32",
    row_device: Literal["auto", "device", "cpu"] = "auto",
    sums_device: Literal["auto", "device", "cpu"] = "auto",
    accelerator: str | None = None,
    precision: str | int = "32-true",
) -> Probe:
    """Run one batch without training, and tell what the callbacks would read of it, refuse, and cost.

    A copy of the module makes one training step under a Trainer of its own (without loggers, checkpoints, validation
    and the module's own callbacks; uncompiled), watched by the same measurements that :class:`ActivationSpectrum` and
    :class:`GradientSpectrum` make. The module, its metrics, buffers, hooks and random streams stay as they are, and so
    does the batch; what a step reaches beside its module is put back. What cannot be read is told in its place, with
    the remedy, and does not keep the rest from being told.

    It takes about what a training step does, a few passes of single samples, and for an instant the memory of two
    copies of the module, with the rows of the batch's samples. Seconds are estimated from products, eigenvalues and
    samples' gradients that are timed here; memory is counted from shapes. Neither includes histograms, figures and the
    record.

    Args:
        module: A LightningModule, of ``lightning`` or ``pytorch_lightning``, attached to a Trainer or not; or any
            module with a ``loss_fn``.
        batch: What ``training_step`` takes. Or a LightningDataModule, whose first training batch is taken after
            ``prepare_data`` and ``setup``; it is set up, and does not stay as it is. None for the first batch of the
            module's own ``train_dataloader``.
        layers: As :class:`ActivationSpectrum` takes them.
        parameters: As :class:`GradientSpectrum` takes them.
        mask: Key of the batch, likewise.
        channel_dim: Axis of the channels, likewise.
        batch_dim: Axis of the samples, likewise.
        samples: A function that cuts batches, or its import path, likewise.
        loss_fn: ``loss_fn(module, batch) -> loss``, or its import path, likewise.
        loss_reduction: For the ``hooks`` engine, likewise.
        every_n_steps: Optimizer steps between reports; None for 100 of activations and 500 of gradients, as the
            callbacks have it.
        num_tokens: Rows of activations in a report.
        num_samples: Samples N of gradients in a report.
        num_groups: Groups for error bars.
        head: Band of the head exponent, likewise.
        tail: Band of the tail exponent, likewise.
        chunk_size: Samples at a time.
        normalize: Of rows of activations, likewise.
        dtype: Of products of rows.
        row_dtype: In which rows of gradients are kept.
        row_device: Where they are.
        sums_device: Where sums of activations are kept.
        accelerator: Lightning's name of where to run; None for where the module is.
        precision: Lightning's, that of the run to come.

    Returns:
        What was found; prints as a table, :meth:`Probe.to_json` is for programs.

    Raises:
        ValueError: For arguments out of range, what is no module, a plain module without a ``loss_fn``, and under
            several ranks.

    Example:
        >>> import torch
        >>> net = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Tanh())
        >>> found = probe(net, torch.randn(16, 8), layers="0", loss_fn=lambda net, x: net(x).square().mean())
        >>> found.layers[0].width, found.samples.count, found.loss.is_mean
        (8, 16, 'passed')
    """
    common: dict[str, Any] = {"batch_dim": batch_dim, "samples": load_cutter(samples), "num_groups": num_groups}
    common["stage"] = "train"
    check_patterns(layers=layers)
    activations = ActivationRequest(
        every_n_steps=100 if every_n_steps is None else every_n_steps,
        num_tokens=num_tokens,
        normalize=normalize,
        dtype=dtype,
        mask=mask,
        channel_dim=channel_dim,
        sums_device=sums_device,
        **common,
    )
    loss = load_loss(loss_fn)
    gradients = GradientRequest(
        every_n_steps=500 if every_n_steps is None else every_n_steps,
        num_samples=num_samples,
        method="auto",
        chunk_size=chunk_size,
        loss_reduction=loss_reduction,
        weights=False,
        row_dtype=row_dtype,
        row_device=row_device,
        parameters=tuple(parameters) if isinstance(parameters, list) else parameters,  # type: ignore[arg-type]
        loss_fn=loss,
        **common,
    )
    if world_size() > 1:
        raise ValueError("probe must run in one process, got several ranks: call it before the Trainer starts them")
    if not isinstance(module, nn.Module):
        remedy = f"make one, {module.__name__}(...)" if isinstance(module, type) else "give the model itself"
        raise ValueError(f"module must be a torch.nn.Module, got {shown(module)}: {remedy}")
    # A compiled module is what it wraps, under one more name.
    module = getattr(module, "_orig_mod", module)
    if loss is None and not has_step(module):
        raise ValueError(
            f"loss_fn must be given for {type(module).__name__}, which has no training_step: a function of module and "
            "batch, such as lambda module, batch: module(**batch).loss"
        )
    wanted = Wanted(layers, activations, gradients, Bands.of(head, tail))
    study, reason = _watched_step(module, batch, wanted, accelerator, precision)
    return Probe(
        module=type(module).__name__,
        device=study.device,
        step=reason,
        samples=study.samples,
        mask=study.activations.mask,
        layers=study.activations.found(),
        layers_problem=study.activations.problem,
        loss=study.gradients.loss,
        parameters=study.gradients.found(),
        parameters_problem=study.gradients.problem,
        engines=_as_compiled(module, study.gradients.engines, list(study.gradients.parameters)),
        costs=tuple(_costs(study, activations, gradients)),
    )


def _watched_step(
    module: nn.Module,
    batch: Any,
    wanted: Wanted,
    accelerator: str | None,
    precision: Any,
) -> tuple[Study, str | None]:
    """What was seen, and why the step failed if it did."""
    try:
        twin, originals = duplicate(module)
    except RuntimeError as error:
        study = Study(module, wanted)
        study.give_up(str(error))
        return study, str(error)
    study, loss = Study(twin, wanted), wanted.gradients.loss_fn
    mine = batch if is_data_module(batch) else own_copy(batch)
    try:
        with _put_back(module, twin, loss, originals):
            take_step(twin, mine, study, loss, accelerator, precision)
    except Exception as error:
        reason = f"{type(error).__name__}: {reason_of(error)}"
        study.give_up(reason)
        return study, reason
    return study, None


def _as_compiled(module: nn.Module, engines: Sequence[EngineFound], names: Sequence[str]) -> tuple[EngineFound, ...]:
    """Ways to have gradients of the module itself, of which parts may be compiled that in its copy are not."""
    held = named_parameters(module)
    reasons = (why_unreadable(module, name, held[name]) for name in names if name in held)
    reason = next((reason for reason in reasons if reason is not None), None)
    return tuple(
        EngineFound(one.method, False, problem=reason) if reason and one.works and one.method == "hooks" else one
        for one in engines
    )


@contextmanager
def _put_back(module: nn.Module, twin: nn.Module, loss: Any, originals: Any) -> Iterator[None]:
    """Whatever a step of the copy reaches beside it is afterwards as it was, gradients of the module's own included."""
    gradients = [(p, p.grad, None if p.grad is None else p.grad.detach().clone()) for p in module.parameters()]
    with isolated():
        kept = Kept((twin, loss), originals)
        try:
            yield
        finally:
            kept.put_back()
            for parameter, gradient, values in gradients:
                parameter.grad = gradient
                if gradient is not None and values is not None and not torch.equal(gradient.detach(), values):
                    gradient.detach().copy_(values)


def _costs(study: Study, activations: ActivationRequest, gradients: GradientRequest) -> Iterator[CostFound]:
    device = torch.device(study.device)
    layers = study.activations.found()
    with isolated(), torch.no_grad():
        if any(layer.width is not None and layer.problem is None for layer in layers):
            yield activation_cost(activations, layers, study.activations.outputs, study.samples.count, device)
        working = [engine for engine in study.gradients.engines if engine.works]
        taken = [engine for engine in working if engine.is_auto] or working
        parameters = [p for p in study.gradients.parameters.values() if not is_lazy(p)]
        if taken and parameters:
            sizes = [p.numel() for p in parameters]
            yield gradient_cost(gradients, taken[0], study.gradients.num_rows, sizes, device)
