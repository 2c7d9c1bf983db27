"""How far the spectra of a layer have moved from its first report, beside floors of sampling; from a record alone."""

from math import nan
from typing import NamedTuple

from lightning_spectral.functional.estimate import Spectrum
from lightning_spectral.functional.floor import js_floor, overlap_floor
from lightning_spectral.functional.spectrum import js_divergence
from lightning_spectral.functional.subspace import subspace_overlap


class Drifted(NamedTuple):
    """What :class:`lightning_spectral.HeadDrift` logs of a layer with ``reference="first"``; NaN where unknown."""

    overlap: float
    overlap_floor: float
    """Drift is an overlap below it."""
    js: float
    js_floor: float
    """Drift is a divergence above it."""
    reason: str | None
    """Why there is no overlap, of vectors that were recorded."""


NOWHERE = Drifted(nan, nan, nan, nan, None)


def drift(spectrum: Spectrum, first: Spectrum) -> Drifted:
    """Drift of a report from the first one of its layer.

    Args:
        spectrum: Of the report.
        first: Of the first report; the same object where that is the report itself.

    Returns:
        Overlap of the leading eigenvectors and divergence of the spectra, each with its floor.
    """
    if spectrum.failure is not None or first.failure is not None or len(spectrum.values) != len(first.values):
        return NOWHERE
    samples = [first] if spectrum is first else [spectrum, first]
    js = 0.0 if spectrum is first else float(js_divergence(spectrum.values, first.values))
    floor = float(js_floor(*samples))
    bases = [sample.vectors for sample in samples]
    if any(basis is None for basis in bases):
        return Drifted(nan, nan, js, floor, None)
    rank = min(basis.shape[-1] for basis in bases if basis is not None)
    num_positive = min(int((sample.values > 0).sum()) for sample in samples)
    if num_positive < rank:
        reason = f"rank {rank} needs as many positive eigenvalues, and there are {num_positive}"
        return Drifted(nan, nan, js, floor, reason)
    samples = [sample.leading(rank) for sample in samples]
    has_groups = all(sample.leave_one_out_vectors is not None for sample in samples)
    vectors = [sample.vectors for sample in samples]
    overlap = 1.0 if spectrum is first else float(subspace_overlap(*(basis for basis in vectors if basis is not None)))
    return Drifted(overlap, float(overlap_floor(*samples)) if has_groups else nan, js, floor, None)
