"""Lightning callbacks: when to measure, from where, and under which key; wiring only."""

from lightning_spectral.callbacks.activation_spectrum import ActivationSpectrum
from lightning_spectral.callbacks.gradient_spectrum import GradientSpectrum
from lightning_spectral.callbacks.head_drift import HeadDrift

__all__ = ["ActivationSpectrum", "GradientSpectrum", "HeadDrift"]
