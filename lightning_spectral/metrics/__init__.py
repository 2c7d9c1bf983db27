"""Spectra as torchmetrics: thin shells over the functions, and the reductions across ranks."""

from lightning_spectral.metrics.covariance import CovarianceSpectrum

__all__ = ["CovarianceSpectrum"]
