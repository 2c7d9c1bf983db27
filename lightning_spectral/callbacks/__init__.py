"""Lightning callbacks: when to measure, from where, and under which key; wiring only."""

from lightning_spectral.callbacks.activation_spectrum import ActivationSpectrum
from lightning_spectral.callbacks.gradient_spectrum import GradientSpectrum
from lightning_spectral.callbacks.head_drift import HeadDrift
from lightning_spectral.callbacks.tail_forecaster import TailForecaster

__all__ = ["ActivationSpectrum", "GradientSpectrum", "HeadDrift", "TailForecaster"]
