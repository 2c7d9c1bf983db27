"""The noise scale that a measurement of gradients in the same session has found, for whoever goes by it."""

from math import inf, nan
from typing import Any

from lightning_spectral.measurement import Measurement, Session
from lightning_spectral.measurement.gradient_report import GradientReport
from lightning_spectral.recording import RunRecorder
from lightning_spectral.runs.logarithms import log_of
from lightning_spectral.runs.noise_course import GRADIENT
from lightning_spectral.runs.predicting import Seen
from lightning_spectral.runs.reference_numbers import NOISE_SCALE


def gradients_of(session: Session[RunRecorder]) -> tuple[Measurement | None, dict[str, Any] | None]:
    """The measurement of gradients that a record of the run would mean, and its settings; None where there is none.

    Of several the first on validation rows, or else the first.
    """
    held = [
        (member.measurement, member.settings())
        for member in session.members
        if member.measurement is not None and member.measurement.kind == GRADIENT
    ]
    return min(held, key=lambda one: one[0].stage != "validate", default=(None, None))


def noise_seen(session: Session[RunRecorder]) -> dict[str, Seen]:
    """The noise scale of its latest report in training, by its logarithm; empty before any."""
    measurement, _ = gradients_of(session)
    if measurement is None or not isinstance(measurement.report, GradientReport):
        return {}
    scale = float(measurement.report.noise.noise_scale)
    tokens = session.recorder.tokens_at_report(measurement)
    return {NOISE_SCALE: Seen(tokens, log_of(scale) if scale < inf else nan)}
