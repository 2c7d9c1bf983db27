"""Watch the spectra of activations and gradients while a model trains under PyTorch Lightning."""

from importlib.metadata import version

from lightning_spectral import functional, metrics
from lightning_spectral.callbacks import ActivationSpectrum, GradientSpectrum, HeadDrift, TailForecaster
from lightning_spectral.capture import per_sample_gradients
from lightning_spectral.functional import (
    PowerLaw,
    covariance_spectrum,
    gradient_noise_scale,
    power_law,
    rankme,
    singular_spectrum,
)
from lightning_spectral.metrics import CovarianceSpectrum, PerSampleGradientSpectrum
from lightning_spectral.runs import Run, compare, forecast

__version__ = version("lightning-spectral")

__all__ = [
    "ActivationSpectrum",
    "CovarianceSpectrum",
    "GradientSpectrum",
    "HeadDrift",
    "PerSampleGradientSpectrum",
    "PowerLaw",
    "Run",
    "TailForecaster",
    "__version__",
    "compare",
    "covariance_spectrum",
    "forecast",
    "functional",
    "gradient_noise_scale",
    "metrics",
    "per_sample_gradients",
    "power_law",
    "rankme",
    "singular_spectrum",
]
