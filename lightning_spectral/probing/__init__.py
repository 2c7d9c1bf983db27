"""What the callbacks would do with a model: one batch without training, and a table of what was found."""

from lightning_spectral.probing.found import Probe
from lightning_spectral.probing.probe import probe

__all__ = ["Probe", "probe"]
