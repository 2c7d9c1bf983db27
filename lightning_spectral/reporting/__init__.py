"""What runs left behind, to look at: a page for a browser, and a summary of a run under way for a terminal."""

from lightning_spectral.reporting.page import report

__all__ = ["report"]
