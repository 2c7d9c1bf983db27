"""The record that a run leaves, written while it trains."""

from lightning_spectral.recording.about import Notes
from lightning_spectral.recording.recorder import RunRecorder, Start, StepSize

__all__ = ["Notes", "RunRecorder", "Start", "StepSize"]
