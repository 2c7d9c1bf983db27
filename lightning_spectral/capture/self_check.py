"""Whether a loss is a weighted mean of its samples' own losses, seen from their gradients alone."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

from lightning_spectral.capture.batch import num_samples, take
from lightning_spectral.capture.common_noise import CommonNoise
from lightning_spectral.capture.engines import gradients_of
from lightning_spectral.capture.kept import Kept, random_states
from lightning_spectral.capture.precision import SHORT, has_reduced_products
from lightning_spectral.capture.shadow import BatchLoss, isolated
from lightning_spectral.capture.stand_ins import MetricTermError

TOLERANCE = 1e-3
"""Share of a batch's gradient that may lie outside the span of its samples' gradients."""

MOST_SAMPLES = 64
"""Of one batch, where their rows are there anyway: one more pass of these is little beside a report's passes."""

MOST_LOOPED = 16
"""Likewise where the gradient of each has to be taken for the check alone."""

UNIQUE = 1e-9
"""Condition, in squares, below which the weights are not known: other weights would do as well."""


class SampleWeights(NamedTuple):
    """How a batch's gradient comes from those of its samples."""

    weights: Tensor
    """``(N,)`` float64, by least squares; those of least norm where several do."""
    residual: float
    """Share of the batch's gradient outside the span of the samples' gradients."""
    noise: float
    """What a relative error of the samples' gradients, independent between samples, is multiplied with in it."""
    is_unique: bool
    """Whether no other weights do as well."""

    @property
    def ratio(self) -> float:
        """Largest over smallest weight; NaN where they are not known, or not all positive."""
        if not self.is_unique or not bool((self.weights > 0).all()):
            return float("nan")
        return float(self.weights.max() / self.weights.min())


def sample_weights(gram: Tensor, products: Tensor, squared_norm: Tensor) -> SampleWeights:
    r"""Least squares for the weights w in :math:`g = \sum_b w_b g_b`, from inner products alone.

    Args:
        gram: ``(N, N)`` float64, of the samples' gradients :math:`g_b`.
        products: ``(N,)`` float64, of each with the batch's gradient g.
        squared_norm: Of g, 0-dim float64.

    Returns:
        The weights, of samples whose gradient is not zero.
    """
    has_gradient = gram.diagonal() > 0
    gram, products = gram[has_gradient][:, has_gradient], products[has_gradient]
    if gram.numel() == 0:
        return SampleWeights(products, float(squared_norm > 0), 0.0, False)
    # Samples of very different size are as good as others.
    size = gram.diagonal().sqrt()
    values, vectors = torch.linalg.eigh(gram / size / size.unsqueeze(-1))
    is_kept = values > 1e-12 * values[-1]
    weights = vectors @ torch.where(is_kept, (vectors.mT @ (products / size)) / values, 0.0) / size
    outside = squared_norm - 2 * weights @ products + weights @ gram @ weights
    noise = (weights.square() @ gram.diagonal()).sqrt() / squared_norm.sqrt()
    residual = (outside.clamp(min=0.0) / squared_norm).sqrt() if squared_norm > 0 else squared_norm
    return SampleWeights(weights, float(residual), float(noise), bool(values[0] > UNIQUE * values[-1]))


class SpanCheck(NamedTuple):
    """What came of the check of one batch."""

    failure: str | None
    """Why the numbers of a report would mean nothing; None if they do."""
    ratio: float
    """Largest over smallest weight of a sample; NaN if they are not known."""
    residual: float = float("nan")
    """Share of the gradient of samples together that lies outside the span of their own."""
    total: float = float("nan")
    """Sum of the weights: one of a mean, the number of samples of a sum; NaN if they are not known."""


def checkable(size: int, num_numbers: int) -> int:
    """How many samples of a batch to check by: so few that their gradients cannot span all there are numbers for."""
    return min(size, MOST_SAMPLES, num_numbers // 2)


def check_span(
    loss: BatchLoss, kept: Kept, names: list[str], batch: Any, rows: Mapping[str, Tensor] | None
) -> SpanCheck | None:
    """Compare the gradient of samples together with their own gradients; to be called inside the loss's isolation.

    Where the loss draws random numbers, all its evaluations are made anew with common ones.

    Args:
        loss: Of a batch.
        kept: What ``loss.isolated()`` gave.
        names: Parameters.
        batch: Samples.
        rows: ``(at least as many, P)`` each sample's own gradient by name; None where they are to be had here.

    Returns:
        None where fewer than two samples can be told from what their gradients span, a gradient is not finite, or
        random numbers are drawn within reentrant checkpoints.
    """
    loss.unfreeze()
    parameters = [loss.parameter(name)[1] for name in names]
    count = checkable(num_samples(batch) or 0, sum(p.numel() for p in parameters))
    if rows is None:
        count = min(count, MOST_LOOPED)
    if count < 2:
        return None
    states = random_states(kept)
    together = _flat(loss, take(batch, 0, count), parameters)
    if rows is not None and states == random_states(kept):
        own = torch.cat([rows[name][:count].to(together) for name in names], 1)
    else:
        kept.rewind()
        with isolated():
            if loss.is_reentrant(loss(take(batch, 0, 1))):
                return None  # its second forward pass, within the backward pass, is out of reach of common noise
        loss.reset()
        count = min(count, MOST_LOOPED)
        noise = CommonNoise()
        evaluations = []
        for part in [take(batch, 0, count), *(take(batch, index, index + 1) for index in range(count))]:
            kept.rewind()
            with isolated(), noise:
                evaluations.append(_flat(loss, part, parameters))
            noise.rewind()
        together, own = evaluations[0], torch.stack(evaluations[1:])
    if not bool(together.isfinite().all() and own.isfinite().all()):
        return None
    found = sample_weights(own @ own.mT, own @ together, together @ together)
    limit = TOLERANCE**2 + (rounding(loss) * found.noise) ** 2
    if found.residual**2 <= limit:
        # Nobody knows the weight of a sample without a gradient; 16-bit rounding passes for weights.
        is_known = found.is_unique and len(found.weights) == count and rounding(loss) < TOLERANCE
        return SpanCheck(None, found.ratio, found.residual, float(found.weights.sum()) if is_known else float("nan"))
    found_outside = f"{found.residual:.1%} of the gradient of {count} samples together lies outside their own"
    return SpanCheck(
        f"the loss is no mean of samples' losses: {found_outside}, {_why_outside(loss)}", float("nan"), found.residual
    )


def _why_outside(loss: BatchLoss) -> str:
    """What may be the cause that a loss is no mean, and the remedy."""
    norms = [
        name
        for name, part in loss.shadow.named_modules()
        if isinstance(part, _BatchNorm) and part.training and part.running_mean is not None
    ]
    if not norms:
        return "as with batch statistics, terms between samples or another axis of samples: give loss_fn"
    more = f" and {len(norms) - 1} more" if len(norms) > 1 else ""
    verb = "use" if len(norms) > 1 else "uses"
    return f"as {norms[0]}{more} {verb} statistics of the batch: use stage='validate', in evaluation mode, or loss_fn"


def _flat(loss: BatchLoss, batch: Any, parameters: list[Any]) -> Tensor:
    """The gradient of the loss of a batch, flat, in float64."""
    try:
        _, gradients = gradients_of(loss, batch, parameters)
    except MetricTermError:
        loss.compute_metrics()
        _, gradients = gradients_of(loss, batch, parameters)
    loss.reset()
    pairs = zip(parameters, gradients, strict=True)
    parts = [torch.zeros_like(p) if gradient is None else gradient for p, gradient in pairs]
    return torch.cat([part.flatten().to(torch.float64) for part in parts]) / loss.scale


def rounding(loss: BatchLoss) -> float:
    """Relative error that a sample's gradient may differ by when it is taken alone or with others."""
    parameter = next(loss.parameters())
    with loss.context():
        is_short = loss.is_short or torch.is_autocast_enabled(parameter.device.type)
    if is_short or any(p.dtype in SHORT for p in loss.parameters()):
        return 0.05
    return 5e-3 if has_reduced_products(parameter.device) else 1e-5
