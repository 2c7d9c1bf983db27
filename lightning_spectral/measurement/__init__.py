"""What the callbacks share: rows collected, reduced over ranks and decomposed, once per report."""

from lightning_spectral.measurement.activation_request import ActivationRequest
from lightning_spectral.measurement.activations import ActivationMeasurement
from lightning_spectral.measurement.gradient_report import GradientReport, ParameterGradients
from lightning_spectral.measurement.gradient_request import GradientRequest
from lightning_spectral.measurement.gradients import GradientMeasurement
from lightning_spectral.measurement.measurement import Measurement, Report, Request, Scene
from lightning_spectral.measurement.session import Session

__all__ = [
    "ActivationMeasurement",
    "ActivationRequest",
    "GradientMeasurement",
    "GradientReport",
    "GradientRequest",
    "Measurement",
    "ParameterGradients",
    "Report",
    "Request",
    "Scene",
    "Session",
]
