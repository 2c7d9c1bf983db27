"""What the callbacks share: rows collected, reduced over ranks and decomposed, once per report."""

from lightning_spectral.measurement.report import LayerSpectrum, Report
from lightning_spectral.measurement.session import Session, session_of
from lightning_spectral.measurement.shared import Measurement, Request

__all__ = ["LayerSpectrum", "Measurement", "Report", "Request", "Session", "session_of"]
