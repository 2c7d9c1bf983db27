"""Watch the spectra of activations and gradients while a model trains under PyTorch Lightning."""

from lightning_spectral import functional, metrics
from lightning_spectral.callbacks import ActivationSpectrum, GradientSpectrum, HeadDrift, RunRecord, TailForecaster
from lightning_spectral.capture import per_sample_gradients
from lightning_spectral.functional import Exponent, PowerLaw, Spectrum
from lightning_spectral.metrics import CovarianceSpectrum, PerSampleGradientSpectrum
from lightning_spectral.probing import Probe, probe
from lightning_spectral.reporting import report
from lightning_spectral.runs import Comparison, Run, Verdict, backtest, compare, forecast
from lightning_spectral.version import __version__
from lightning_spectral.watch import SpectralWatch

__all__ = [
    "ActivationSpectrum",
    "Comparison",
    "CovarianceSpectrum",
    "Exponent",
    "GradientSpectrum",
    "HeadDrift",
    "PerSampleGradientSpectrum",
    "PowerLaw",
    "Probe",
    "Run",
    "RunRecord",
    "SpectralWatch",
    "Spectrum",
    "TailForecaster",
    "Verdict",
    "__version__",
    "backtest",
    "compare",
    "forecast",
    "functional",
    "metrics",
    "per_sample_gradients",
    "probe",
    "report",
]
