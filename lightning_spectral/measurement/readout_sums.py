"""Sums over rows of a head's input and of its errors, of which the task power of its modes is made."""

import torch
from torch import Tensor

from lightning_spectral.capture.head import HeadPass
from lightning_spectral.capture.precision import ieee_products
from lightning_spectral.functional.spectrum import eigenvectors
from lightning_spectral.metrics.collectives import all_reduce
from lightning_spectral.theory import Readout, task_power

AT_ONCE = 2**24
"""Numbers of a gradient in the type of the products at a time."""

TOLERANCE = 0.02
"""By how much p - y, of bfloat16, may miss what it is."""

NOT_MEAN = (
    "the gradient of its output is not that of a cross-entropy with one label a row, meant over the rows that count: "
    "other losses, sums, soft labels, weights of rows and functions after the head are not read"
)


class ReadoutSums:
    r"""Sums over rows h and their errors e = p - y, in float64.

    They are :math:`\sum h`, :math:`\sum h h^\top`, :math:`\sum e` and :math:`\sum e h^\top`. The gradient of a mean
    over n rows is e / n. A row whose gradient is exactly zero does not count in the loss, as one with an ignored label.
    Products are taken about the first rows' mean where there is a bias.

    Args:
        num_classes: Of the head's output.
        num_features: d of its input.
        is_centred: Whether the head has a bias, which takes care of the mean.
        dtype: Of the products.
        device: Where sums are.
    """

    def __init__(
        self, num_classes: int, num_features: int, is_centred: bool, dtype: torch.dtype, device: torch.device
    ) -> None:
        self._dtype, self._device = dtype, device
        self._is_centred = is_centred
        self._pivot: Tensor | None = None
        self.shape = num_classes, num_features
        # One memory, so that one reduction takes all: number of rows, loss, sum e, sum h, sum h h^T, sum e h^T.
        sizes = [1, 1, num_classes, num_features, num_features**2, num_classes * num_features]
        self._all = torch.zeros(sum(sizes), dtype=torch.float64, device=device)
        parts = self._all.split(sizes)
        self._num, self._loss, self._errors, self._rows = parts[:4]
        self._squares = parts[4].view(num_features, num_features)
        self._products = parts[5].view(num_classes, num_features)

    @property
    def num_rows(self) -> Tensor:
        """``(1,)``."""
        return self._num.clone()

    def add(self, found: HeadPass, scale: float, loss: Tensor | None) -> None:
        """Take in one pass.

        Args:
            found: What was read.
            scale: Factor between its gradient and that of the batch's own loss.
            loss: What was differentiated, the batch's own loss times that factor.

        Raises:
            ValueError: If the loss is not a mean cross-entropy of the head's output.
        """
        if (found.gradient.shape[1], found.inputs.shape[1]) != self.shape:
            raise ValueError(
                f"its head has {self.shape[1]} inputs and {self.shape[0]} outputs, and took {found.inputs.shape[1]} "
                f"and gave {found.gradient.shape[1]}"
            )
        counted = (found.gradient != 0).any(-1)
        num = int(counted.sum())
        if num == 0:
            return
        factor = num / scale
        check_errors(found, counted, factor)
        step = max(1, AT_ONCE // self.shape[0])
        for rows, gradient, is_in in zip(
            found.inputs.split(step), found.gradient.split(step), counted.split(step), strict=True
        ):
            self._add(rows[is_in].to(self._dtype), gradient[is_in].to(self._dtype) * factor)
        self._num += num
        self._loss += torch.nan if loss is None else loss.to(self._loss) * (num / scale)

    def _add(self, rows: Tensor, errors: Tensor) -> None:
        if not len(rows):
            return
        if self._pivot is None:
            self._pivot = rows.double().mean(0) if self._is_centred else self._rows.new_zeros(self.shape[1])
        pivot, num = self._pivot, len(rows)
        shifted = rows - pivot.to(rows)
        with ieee_products():
            squares, products = (shifted.mT @ shifted).double(), (errors.mT @ shifted).double()
        moved, missed = shifted.double().sum(0), errors.double().sum(0)
        cross = torch.outer(moved, pivot)
        self._squares += squares + cross + cross.mT + num * torch.outer(pivot, pivot)
        self._products += products + torch.outer(missed, pivot)
        self._rows += moved + num * pivot
        self._errors += missed

    def reduce(self) -> None:
        """Sum over all ranks; a collective."""
        all_reduce(self._all)

    def solve(self) -> Readout:
        """Eigenvalues and task power.

        Raises:
            ValueError: If there are no rows, or they are not finite.
        """
        num = float(self._num)
        if num < 1:
            raise ValueError("no gradient reached its head, or it ran compiled")
        if not bool(self._all[2:].isfinite().all()):
            raise ValueError("its rows, or their gradients, hold NaN or infinity")
        covariance, gradient = self._squares / num, self._products / num
        if self._is_centred:
            mean = self._rows / num
            covariance = covariance - torch.outer(mean, mean)
            gradient = gradient - torch.outer(self._errors / num, mean)
        # Of products in float32 what lies below their rounding is no variance.
        rtol = torch.finfo(self._dtype).eps * (1 if self._dtype == torch.float32 else len(covariance))
        values, vectors = eigenvectors(covariance, len(covariance), rtol)
        if not bool(values.isfinite().all()):
            raise ValueError("the eigensolver did not converge")
        if not bool(values[0] > 0):
            raise ValueError("all rows of its input are the same")
        return Readout(values.cpu(), task_power(values, vectors, gradient).cpu(), float(self._loss / num), int(num))


def check_errors(found: HeadPass, counted: Tensor, factor: float) -> None:
    """Refuse a gradient that is not that of a mean cross-entropy of softmax(output) with a label a row.

    softmax(z) less n times the gradient must be the label: one class with 1, the others with 0.

    Args:
        found: What was read.
        counted: ``(N,)`` rows that count.
        factor: Number n of these, over the loss scale.

    Raises:
        ValueError: If it is not, or none of the rows that count is among those whose output was kept.
    """
    is_in = counted[found.checked]
    if not bool(is_in.any()):
        raise ValueError("so few of its rows count in the loss that none could be checked")
    errors = found.gradient[found.checked[is_in]].double() * factor
    logits = found.logits[is_in].double()
    if not bool(errors.isfinite().all() and logits.isfinite().all()):
        return  # said of all rows later
    label = logits.softmax(-1) - errors
    largest = label.argmax(-1, keepdim=True)
    if bool((label.scatter_add(-1, largest, -torch.ones_like(label[:, :1])).abs() > TOLERANCE).any()):
        raise ValueError(NOT_MEAN)
