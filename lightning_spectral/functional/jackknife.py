"""The delete-a-group jackknife: an estimate with its bias correction and standard error."""

from typing import NamedTuple

import torch
from torch import Tensor

from lightning_spectral.functional.arguments import check_broadcast, check_real, describe


class Jackknife(NamedTuple):
    """What the jackknife adds to a plain estimate; float64 tensors with the shape of the estimate."""

    corrected: Tensor
    """The estimate less its first-order bias."""
    stderr: Tensor
    """Standard error of the *plain* estimate."""


def jackknife(estimate: Tensor, leave_one_out: Tensor) -> Jackknife:
    r"""Bias-corrected estimate and standard error from estimates without each group.

    With G groups of about equal size and :math:`\bar\theta` the mean of :math:`\theta_{(g)}`:
    corrected :math:`= G\theta - (G - 1)\bar\theta`,
    stderr :math:`= \sqrt{\frac{G - 1}{G} \sum_g (\theta_{(g)} - \bar\theta)^2}`.

    Args:
        estimate: ``(...)`` estimate from all groups.
        leave_one_out: ``(..., G)`` estimates without each group.

    Returns:
        Both NaN where there are fewer than two groups or an estimate is NaN.

    Raises:
        ValueError: If they are no real numbers, or of shapes that do not go together.

    References:
        Efron, Tibshirani, *An Introduction to the Bootstrap*, chapter 11 (1993); Shao, Wu, *A general theory for
        jackknife variance estimation* (1989) for deleting groups.

    Example:
        >>> import torch
        >>> x = torch.tensor([1.0, 2.0, 6.0])
        >>> corrected, stderr = jackknife(x.mean(), (x.sum() - x) / 2)
        >>> float(corrected), round(float(stderr), 4)  # of a mean: unbiased, and the usual standard error
        (3.0, 1.5275)
    """
    estimate, leave_one_out = _tensor("estimate", estimate), _tensor("leave_one_out", leave_one_out)
    if leave_one_out.ndim == 0:
        raise ValueError(
            "leave_one_out must have an axis of groups, got one number: give an estimate without each group"
        )
    check_broadcast(estimate=estimate.shape, leave_one_out=leave_one_out.shape[:-1])
    num_groups = leave_one_out.shape[-1]
    if num_groups < 2:
        missing = torch.full_like(estimate, torch.nan)
        return Jackknife(missing, missing)
    mean = leave_one_out.mean(-1)
    corrected = num_groups * estimate - (num_groups - 1) * mean
    variance = (num_groups - 1) / num_groups * (leave_one_out - mean.unsqueeze(-1)).square().sum(-1)
    # A NaN on either side must show on both: an error bar of a number that is not there says nothing.
    known = (corrected + variance).isfinite()
    return Jackknife(torch.where(known, corrected, torch.nan), torch.where(known, variance.sqrt(), torch.nan))


def _tensor(name: str, value: object) -> Tensor:
    """Real numbers in float64; ValueError for what holds none."""
    try:
        found = torch.as_tensor(value)
    except (TypeError, ValueError, RuntimeError):
        raise ValueError(f"{name} must hold real numbers, got {describe(value)}: give a tensor") from None
    check_real(**{name: found})
    return found.to(torch.float64)
