"""What lies between two spectra of one run."""

from dataclasses import replace
from math import nan

import torch
from torch import Tensor

from lightning_spectral.functional.estimate import NO_GROUPS, WIDER, Spectrum


def between(first: Spectrum, second: Spectrum, weight: float, tokens: float) -> Spectrum:
    """A spectrum between an earlier and a later one of a run, at a weight of 0 to 1 and at its training tokens.

    Values are interpolated in their logarithms, so that exponents are linear in the weight; NaN, with the reason, where
    the two are not of equally many rows. Eigenvectors are those of the nearer.
    """
    nearer = second if weight >= 0.5 else first
    step = first.step + weight * (second.step - first.step)
    failure = first.failure or second.failure
    if failure is None and (first.count != second.count or len(first.values) != len(second.values)):
        failure = f"the reports on both sides are of {first.count} and {second.count} rows"
    if failure is not None:
        missing = torch.full_like(nearer.values, nan)
        return replace(nearer, step=step, tokens=tokens, values=missing, failure=failure)
    same = first.leave_one_out.shape == second.leave_one_out.shape
    without = _log_mix(first.leave_one_out, second.leave_one_out, weight) if same else NO_GROUPS
    values = _log_mix(first.values, second.values, weight)
    # A value is known between two reports as far as the coarser of them tells.
    dtype = first.dtype if first.dtype in WIDER else second.dtype
    rows = first.rows if first.rows == second.rows else ""
    return replace(nearer, step=step, tokens=tokens, values=values, leave_one_out=without, dtype=dtype, rows=rows)


def _log_mix(first: Tensor, second: Tensor, weight: float) -> Tensor:
    """Between two tensors in their logarithms; zero where one is, for what lies below rounding is not known."""
    positive = (first > 0) & (second > 0)
    logs = torch.lerp(torch.where(positive, first, 1.0).log(), torch.where(positive, second, 1.0).log(), weight)
    return torch.where(positive, logs.exp(), 0.0)
