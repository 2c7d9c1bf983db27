"""How far the spectrum of a layer has moved from a reference, each distance beside the floor that sampling has."""

from math import nan
from typing import NamedTuple

from lightning_spectral.functional.estimate import Spectrum
from lightning_spectral.functional.floor import angle_floor, js_floor, overlap_floor
from lightning_spectral.functional.spectrum import js_divergence
from lightning_spectral.functional.subspace import principal_angles, subspace_overlap


class Drift(NamedTuple):
    """Distances and their floors; NaN for what is not known."""

    overlap: float = nan
    """Mean squared cosine of the principal angles between leading eigenvectors."""
    max_angle: float = nan
    """The largest of the angles, in radians."""
    js: float = nan
    """Divergence of the normalised spectra, in nats."""
    overlap_floor: float = nan
    """Drift is an overlap below it."""
    max_angle_floor: float = nan
    """Drift is an angle above it."""
    js_floor: float = nan
    """Drift is a divergence above it."""
    reason: str | None = None
    """Why there is neither overlap nor angle, of samples that do have eigenvectors."""


def drift_from(spectrum: Spectrum, reference: Spectrum | None) -> Drift:
    """Set a spectrum beside a reference of the same width.

    Args:
        spectrum: With as many leading eigenvectors as are to be compared; without any, only spectra are.
        reference: Likewise, or the same object where the spectrum is its own reference: it is one sample then, however
            often it is named. None where there is none yet, which leaves the floors.

    Returns:
        Distances and floors. Overlap and angle are NaN where a sample has no eigenvectors, or fewer positive
        eigenvalues than vectors; the floors of both also where one has none without each group.
    """
    is_own = reference is spectrum
    samples = [spectrum] if reference is None or is_own else [spectrum, reference]
    found = Drift(js_floor=float(js_floor(*samples)))
    if reference is not None:
        found = found._replace(js=0.0 if is_own else float(js_divergence(spectrum.values, reference.values)))
    bases = [sample.vectors for sample in samples if sample.vectors is not None]
    if len(bases) < len(samples):
        return found
    rank, num_positive = bases[0].shape[-1], min(int((sample.values > 0).sum()) for sample in samples)
    if num_positive < rank:
        reason = f"rank {rank} needs as many positive eigenvalues, and there are {num_positive}"
        return found._replace(reason=reason)
    if all(sample.leave_one_out_vectors is not None for sample in samples):
        floors = float(overlap_floor(*samples)), float(angle_floor(*samples))
        found = found._replace(overlap_floor=floors[0], max_angle_floor=floors[1])
    if reference is None:
        return found
    if is_own:
        return found._replace(overlap=1.0, max_angle=0.0)
    return found._replace(overlap=float(subspace_overlap(*bases)), max_angle=float(principal_angles(*bases)[0]))
