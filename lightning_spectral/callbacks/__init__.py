"""Lightning callbacks: when to measure, from where, and under which key; wiring only."""

from lightning_spectral.callbacks.activation_spectrum import ActivationSpectrum as ActivationSpectrum
from lightning_spectral.callbacks.gradient_spectrum import GradientSpectrum as GradientSpectrum
from lightning_spectral.callbacks.head_drift import HeadDrift as HeadDrift
from lightning_spectral.callbacks.run_record import RunRecord as RunRecord
from lightning_spectral.callbacks.tail_forecaster import TailForecaster as TailForecaster
