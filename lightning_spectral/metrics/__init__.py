"""Spectra as torchmetrics: thin shells over the functions, and the reductions across ranks."""

from lightning_spectral.metrics.covariance import CovarianceSpectrum
from lightning_spectral.metrics.gradient import PerSampleGradientSpectrum

__all__ = ["CovarianceSpectrum", "PerSampleGradientSpectrum"]
