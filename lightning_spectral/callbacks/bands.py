"""The head and the tail of spectra: two bands that a callback fits, and their names in its arguments."""

from typing import Any, NamedTuple, cast

from lightning_spectral.functional.powerlaw import Band, check_band, resolve_band

DEFAULT_HEAD: tuple[int, int] = (1, 10)
"""Ranks of the head, as in *Spectral Lens* (arXiv 2605.05683)."""


class Bands(NamedTuple):
    """Two bands of ranks or fractions."""

    head: Band
    tail: Band

    @classmethod
    def of(cls, head: Band, tail: Band) -> "Bands":
        """Two bands as they come from a user, or from YAML; raises ValueError for what is none."""
        check_band("head", head)
        check_band("tail", tail)
        return cls(cast(Band, tuple(head)), cast(Band, tuple(tail)))

    def check(self, num_values: int) -> None:
        """Refuse, by a ValueError, bands of ranks beyond the length of a spectrum."""
        resolve_band(self.tail, num_values, "tail")
        # A spectrum shorter than the default head has no head exponent; nobody asked for it by rank.
        if self.head != DEFAULT_HEAD:
            resolve_band(self.head, num_values, "head")

    def settings(self) -> dict[str, Any]:
        """For the record of a run, JSON-like."""
        return {name: list(band) for name, band in self._asdict().items()}
