"""What the callbacks share: rows collected, reduced over ranks and decomposed, once per report."""

from lightning_spectral.measurement.gradient_report import GradientReport, ParameterSpectrum, WeightSpectrum
from lightning_spectral.measurement.gradients import GradientMeasurement, GradientRequest
from lightning_spectral.measurement.report import LayerSpectrum, Report
from lightning_spectral.measurement.session import Session, session_of
from lightning_spectral.measurement.shared import Measurement, Request
from lightning_spectral.measurement.staged import StagedMeasurement

__all__ = [
    "GradientMeasurement",
    "GradientReport",
    "GradientRequest",
    "LayerSpectrum",
    "Measurement",
    "ParameterSpectrum",
    "Report",
    "Request",
    "Session",
    "StagedMeasurement",
    "WeightSpectrum",
    "session_of",
]
