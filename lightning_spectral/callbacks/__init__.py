"""Lightning callbacks: when to measure, from where, and under which key; wiring only."""

from lightning_spectral.callbacks.activation_spectrum import ActivationSpectrum

__all__ = ["ActivationSpectrum"]
