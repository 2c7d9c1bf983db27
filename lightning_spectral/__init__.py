"""Watch the spectra of activations and gradients while a model trains under PyTorch Lightning."""

from importlib.metadata import version

from lightning_spectral import functional, metrics
from lightning_spectral.callbacks import ActivationSpectrum
from lightning_spectral.functional import PowerLaw, covariance_spectrum, power_law, rankme
from lightning_spectral.metrics import CovarianceSpectrum

__version__ = version("lightning-spectral")

__all__ = [
    "ActivationSpectrum",
    "CovarianceSpectrum",
    "PowerLaw",
    "__version__",
    "covariance_spectrum",
    "functional",
    "metrics",
    "power_law",
    "rankme",
]
