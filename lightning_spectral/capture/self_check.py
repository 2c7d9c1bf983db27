"""Whether a loss is a weighted mean of its samples' own losses, seen from their gradients alone."""

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from lightning_spectral.capture.batch import Cut, batch_of, cut
from lightning_spectral.capture.common_noise import CommonNoise
from lightning_spectral.capture.engines import gradients_of, is_out_of_memory
from lightning_spectral.capture.kept import Kept, random_states
from lightning_spectral.capture.one_line import reason_of
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

ENOUGH = 4
"""Dimensions that samples' gradients must span for those of two halves to leave as many again."""


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
    """Share of the gradient of samples together that lies outside the span of their own, or of two halves'."""
    total: float = float("nan")
    """Sum of the weights: one of a mean, the number of parts of a sum; NaN if they are not known."""
    parts: str = "samples"
    """Whose weights these are: those of ``"halves"`` where a sample alone has no loss."""
    num_parts: int = 0
    """How many weights there are."""


class PartError(RuntimeError):
    """The loss of some samples of a batch fails.

    Args:
        size: How many.
        reason: What it raised.
    """

    def __init__(self, size: int, reason: str) -> None:
        super().__init__(reason)
        self.size = size


def checkable(size: int, num_numbers: int) -> int:
    """How many samples of a batch to check by: so few that their gradients cannot span all there are numbers for."""
    return min(size, MOST_SAMPLES, num_numbers // 2)


def check_span(
    loss: BatchLoss, kept: Kept, names: list[str], batch: Any, rows: Mapping[str, Tensor] | None, has_run: bool = False
) -> SpanCheck | None:
    """Compare the gradient of samples together with their own and with two halves', inside the loss's isolation.

    Both must span it. Where a network gives one number for a sample, or two in a softmax, their own span whatever a
    loss makes of all these numbers, and only the halves tell; so they do where the loss fails for one sample. Where it
    fails for a half it is not seen to be a mean, which is a failure of the check. Samples whose gradient is not finite
    alone have no part in the sum: nothing but padding has none in a mean over tokens.

    Where the loss draws random numbers, all its evaluations are made anew with common ones.

    Args:
        loss: Of a batch.
        kept: What ``loss.isolated()`` gave.
        names: Parameters.
        batch: Samples.
        rows: ``(at least as many, P)`` each sample's own gradient by name, of which those that are not finite are left
            out; None where they are to be had here.
        has_run: Whether it is known to run, so that a failure of these samples together is one of the check.

    Returns:
        None where fewer than two samples can be told from what their gradients span, that is less than it takes, a
        gradient is not finite, or random numbers are drawn within reentrant checkpoints.

    Raises:
        PartError: If the loss of these samples together fails, unless it is known to run, or does so with common random
            numbers alone.
        ValueError: If they cannot be put together.
    """
    loss.unfreeze()
    if rows is not None:
        names = [name for name in names if bool(rows[name][:MOST_SAMPLES].isfinite().all())]
    parameters = [loss.parameter(name)[1] for name in names]
    whole = cut(batch)
    count = checkable(whole.size, sum(p.numel() for p in parameters))
    samples = whole.part(0, count if rows is not None else min(count, MOST_LOOPED))
    if samples.size < 2:
        return None
    gradients = _Gradients(loss, kept, parameters)
    own, failed = None, None
    states = random_states(kept)
    try:
        together = gradients.of(samples)
    except PartError as error:
        if not has_run:
            raise
        return _unknown(loss, error)
    if rows is not None and states == random_states(kept):
        own = torch.cat([rows[name][:MOST_SAMPLES].to(together) for name in names], 1)
    else:
        if gradients.are_reentrant(samples):
            return None  # its second forward pass, within the backward pass, is out of reach of common noise
        samples = samples.part(0, MOST_LOOPED)
        gradients.noise = CommonNoise()
        together = gradients.of(samples)  # which other checkpointing may refuse, for its recomputation
    if not bool(together.isfinite().all()):
        return None
    try:
        if own is None:
            own = gradients.of_each(samples.part(index, index + 1) for index in range(samples.size))
    except PartError as error:
        failed = error
    found = None
    if own is not None:
        found = _weights(own[: samples.size], together)
        if _is_outside(loss, found):
            return _outside(loss, found, samples, "their own")
        if _rank(own) < min(ENOUGH, whole.size):
            return None
    if samples.ones is None:
        try:
            halves = _weights(gradients.of_each(_halves(samples)), together)
        except PartError as error:
            return _unknown(loss, failed or error)
        if _is_outside(loss, halves, 0.0 if found is None else found.noise):
            return _outside(loss, halves, samples, "those of two halves")
    elif failed is not None:
        return _unknown(loss, failed)
    # Nobody knows the weight of a sample without a gradient; 16-bit rounding passes for weights.
    is_exact = rounding(loss) < TOLERANCE
    if found is None:
        total = float(halves.weights.sum()) if is_exact and halves.is_unique else float("nan")
        return SpanCheck(None, float("nan"), halves.residual, total, "halves", 2)
    is_known = found.is_unique and len(found.weights) == samples.size and is_exact
    total = float(found.weights.sum()) if is_known else float("nan")
    return SpanCheck(None, found.ratio, found.residual, total, num_parts=samples.size)


class _Gradients:
    """Gradients of the loss of parts of a batch, flat, in float64.

    Args:
        loss: Of a batch.
        kept: What ``loss.isolated()`` gave.
        parameters: The shadow's.
    """

    def __init__(self, loss: BatchLoss, kept: Kept, parameters: list[nn.Parameter]) -> None:
        self._loss, self._kept, self._parameters = loss, kept, parameters
        self.noise: CommonNoise | None = None
        """What all draw in common, each anew; None for what comes."""

    def of(self, part: Cut) -> Tensor:
        """``(P,)``; PartError if the loss fails, ValueError if samples cannot be put together."""
        batch_of(part)
        try:
            if self.noise is None:
                return self._flat(part)
            self._kept.rewind()
            self.noise.rewind()
            with isolated(), self.noise:
                return self._flat(part)
        except Exception as error:
            self._loss.reset(anew=True)
            if is_out_of_memory(error):
                raise
            raise PartError(part.size, reason_of(error)) from error

    def of_each(self, parts: Iterable[Cut]) -> Tensor:
        """``(number of parts, P)``, zero for a part for which some number is not finite."""
        found = torch.stack([self.of(part) for part in parts])
        return torch.where(found.isfinite().all(1, keepdim=True), found, 0.0)

    def are_reentrant(self, part: Cut) -> bool:
        """Whether reentrant checkpointing is met."""
        self._kept.rewind()
        with isolated():
            is_reentrant = self._loss.is_reentrant(self._loss(part))
        self._loss.reset()
        return is_reentrant

    def _flat(self, part: Cut) -> Tensor:
        loss, parameters = self._loss, self._parameters
        try:
            _, gradients = gradients_of(loss, part, parameters)
        except MetricTermError:
            loss.compute_metrics()
            _, gradients = gradients_of(loss, part, parameters)
        loss.reset()
        pairs = zip(parameters, gradients, strict=True)
        parts = [torch.zeros_like(p) if gradient is None else gradient for p, gradient in pairs]
        parts = [part.to_dense() if part.layout != torch.strided else part for part in parts]
        return torch.cat([part.flatten().to(torch.float64) for part in parts]) / loss.scale


def _halves(samples: Cut) -> list[Cut]:
    """Two halves, in the order 0110 1001 1001 0110 of Thue and Morse, by which neighbours and blocks come apart."""
    which = torch.tensor([index.bit_count() % 2 for index in range(samples.size)])
    return [samples.pick((which == half).nonzero()[:, 0]) for half in (0, 1)]


def _weights(parts: Tensor, together: Tensor) -> SampleWeights:
    return sample_weights(parts @ parts.mT, parts @ together, together @ together)


def _rank(rows: Tensor) -> int:
    """Dimensions that rows span, of whatever size each is."""
    rows = rows[rows.any(1)]
    rows = rows / rows.norm(dim=1, keepdim=True)
    values = torch.linalg.eigvalsh(rows @ rows.mT)
    return int((values > UNIQUE * values.max()).sum()) if len(rows) else 0


def _is_outside(loss: BatchLoss, found: SampleWeights, noise: float = 0.0) -> bool:
    """Whether a gradient lies outside a span by more than rounding, whose share ``noise`` adds to, does."""
    return found.residual**2 > TOLERANCE**2 + rounding(loss) ** 2 * (found.noise**2 + noise**2)


def _outside(loss: BatchLoss, found: SampleWeights, samples: Cut, span: str) -> SpanCheck:
    share = f"{found.residual:.1%} of the gradient of {samples.size} samples together lies outside {span}"
    cause, remedy = _why_outside(loss)
    reason = f"the loss is no mean of samples' losses: {share}, as {cause}: {remedy}"
    return SpanCheck(reason, float("nan"), found.residual)


def _unknown(loss: BatchLoss, error: PartError) -> SpanCheck:
    """What to say where the loss of fewer samples than training has fails."""
    some = "one sample" if error.size == 1 else f"{error.size} samples"
    cause, remedy = _norms(loss) or ("", "have it take any number of samples, or give check='warn' if it is one")
    reason = f"the loss cannot be seen to be a mean of samples' losses: for {some} alone it fails ({error})"
    return SpanCheck(f"{reason}{cause and f', as {cause}'}: {remedy}", float("nan"))


def _why_outside(loss: BatchLoss) -> tuple[str, str]:
    """What may be the cause that a loss is no mean, and the remedy."""
    others = "with batch statistics, terms between samples or another axis of samples"
    return _norms(loss) or (others, "give loss_fn")


def _norms(loss: BatchLoss) -> tuple[str, str] | None:
    """The same of layers that are one, if there are any."""
    norms = [
        name
        for name, part in loss.shadow.named_modules()
        if isinstance(part, _BatchNorm) and part.training and part.running_mean is not None
    ]
    if not norms:
        return None
    more = f" and {len(norms) - 1} more" if len(norms) > 1 else ""
    verb = "use" if len(norms) > 1 else "uses"
    cause = f"{norms[0]}{more} {verb} statistics of the batch"
    return cause, "use stage='validate', in evaluation mode, or loss_fn"


def rounding(loss: BatchLoss) -> float:
    """Relative error that a sample's gradient may differ by when it is taken alone or with others."""
    parameter = next(loss.parameters())
    with loss.context():
        is_short = loss.is_short or torch.is_autocast_enabled(parameter.device.type)
    if is_short or any(p.dtype in SHORT for p in loss.parameters()):
        return 0.05
    return 5e-3 if has_reduced_products(parameter.device) else 1e-5
