"""What the model may be asked: spectra, powers and rates that exist."""

import math

import torch
from torch import Tensor


def spectrum_of(spectrum: Tensor) -> Tensor:
    """A spectrum in float64; ValueError for one that is no vector of finite, non-negative, descending numbers."""
    values = _vector("spectrum", spectrum)
    if bool((values < 0).any()):
        raise ValueError(f"spectrum must not be negative, got {float(values.min()):.6g}: give eigenvalues")
    if bool((values.diff() > 0).any()):
        raise ValueError("spectrum must descend, got eigenvalues that rise: sort them, largest first")
    if not bool(values[0] > 0):
        raise ValueError("spectrum must have a positive eigenvalue, got none")
    return values


def power_of(power: Tensor, spectrum: Tensor) -> Tensor:
    """Task power in float64; ValueError for one that is negative or of another length than the spectrum."""
    values = _vector("power", power)
    if values.shape != spectrum.shape:
        raise ValueError(f"power must have {len(spectrum)} values, one an eigenvalue, got {len(values)}")
    if bool((values < 0).any()):
        raise ValueError(f"power must not be negative, got {float(values.min()):.6g}: it is a sum of squares")
    return values.to(spectrum.device)


def check_positive(**arguments: float) -> None:
    """Raise ValueError, naming the argument, for a number that is not positive and finite."""
    for name, value in arguments.items():
        if not _is_number(value) or not 0 < value < math.inf:
            raise ValueError(f"{name} must be a positive number, got {value!r}")


def check_not_negative(**arguments: float) -> None:
    """Raise ValueError, naming the argument, for a number that is negative or not finite."""
    for name, value in arguments.items():
        if not _is_number(value) or not 0 <= value < math.inf:
            raise ValueError(f"{name} must be a number from 0 on, got {value!r}")


def steps_of(steps: Tensor | int | float, like: Tensor) -> Tensor:
    """Steps in float64; ValueError for a negative one."""
    values = torch.as_tensor(steps, dtype=torch.float64, device=like.device)
    if not bool((values >= 0).all()):
        raise ValueError(f"steps must not be negative, got {steps}")
    return values


def _vector(name: str, values: Tensor) -> Tensor:
    if not isinstance(values, Tensor) or values.ndim != 1 or values.numel() == 0 or values.is_complex():
        found = tuple(values.shape) if isinstance(values, Tensor) else type(values).__name__
        raise ValueError(f"{name} must be a vector of real numbers, got {found}: give a tensor of shape (d,)")
    values = values.detach().to(torch.float64)
    if not bool(values.isfinite().all()):
        raise ValueError(f"{name} must be finite, got {float(values[~values.isfinite()][0])}")
    return values


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
