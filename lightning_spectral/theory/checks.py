"""What the model may be asked: spectra, powers and rates that exist."""

import torch
from torch import Tensor

from lightning_spectral.functional.arguments import check_real, check_spectrum, describe, is_finite_number


def spectrum_of(spectrum: Tensor, name: str = "spectrum") -> Tensor:
    """A spectrum in float64; ValueError for one that is no vector of finite, non-negative, descending numbers."""
    values = _vector(name, spectrum)
    check_spectrum(is_ordered=True, **{name: values})
    if not bool(values[0] > 0):
        raise ValueError(f"{name} must have a positive eigenvalue, got none")
    return values


def power_of(power: Tensor, spectrum: Tensor) -> Tensor:
    """Task power in float64; ValueError for one that is negative or of another length than the spectrum."""
    values = _vector("power", power)
    if values.shape != spectrum.shape:
        raise ValueError(f"power must have {len(spectrum)} values, one an eigenvalue, got {len(values)}")
    check_spectrum(power=values)
    return values.to(spectrum.device)


def check_positive(**arguments: float) -> None:
    """Raise ValueError, naming the argument, for a number that is not positive and finite."""
    for name, value in arguments.items():
        if not is_finite_number(value) or not value > 0:
            raise ValueError(f"{name} must be a positive number, got {describe(value)}")


def check_not_negative(**arguments: float) -> None:
    """Raise ValueError, naming the argument, for a number that is negative or not finite."""
    for name, value in arguments.items():
        if not is_finite_number(value) or value < 0:
            raise ValueError(f"{name} must be a number from 0 on, got {describe(value)}")


def steps_of(steps: Tensor | int | float, like: Tensor) -> Tensor:
    """Steps in float64; ValueError for a negative one, and for what are no numbers."""
    if isinstance(steps, Tensor):
        check_real(steps=steps)
    try:
        values = torch.as_tensor(steps, dtype=torch.float64, device=like.device)
    except (TypeError, ValueError, OverflowError):
        raise ValueError(f"steps must be a number, or a tensor of them, got {describe(steps)}: give 100") from None
    if not bool((values >= 0).all()):
        raise ValueError(f"steps must not be negative, got {describe(steps)}")
    return values


def _vector(name: str, values: Tensor) -> Tensor:
    check_real(**{name: values})
    if values.ndim != 1 or values.numel() == 0:
        raise ValueError(f"{name} must be a vector of real numbers, got shape {tuple(values.shape)}")
    values = values.detach().to(torch.float64)
    if not bool(values.isfinite().all()):
        raise ValueError(f"{name} must be finite, got {float(values[~values.isfinite()][0])}")
    return values
