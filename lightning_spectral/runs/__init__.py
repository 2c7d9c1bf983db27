"""What a run leaves on disk, reading it back, and comparing two."""

from lightning_spectral.runs.history import History
from lightning_spectral.runs.record import Record, Row
from lightning_spectral.runs.run import Matched, Run, open_runs
from lightning_spectral.runs.spectrum import Spectrum

__all__ = ["History", "Matched", "Record", "Row", "Run", "Spectrum", "open_runs"]
