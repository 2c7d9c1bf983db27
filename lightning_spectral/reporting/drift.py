"""How far the spectra of a layer have moved from its first report, from a record alone."""

from lightning_spectral.functional.drift import Drift, drift_from
from lightning_spectral.functional.estimate import Spectrum


def drift(spectrum: Spectrum, first: Spectrum) -> Drift:
    """Drift of a report from the first one of its layer, as HeadDrift logs it with ``reference="first"``.

    Args:
        spectrum: Of the report.
        first: Of the first report; the same object where that is the report itself.

    Returns:
        Distances, each with its floor; NaN where either report failed, or the layer has another width by now. As many
        eigenvectors are compared as both reports have.
    """
    if spectrum.failure is not None or first.failure is not None or len(spectrum.values) != len(first.values):
        return Drift()
    ranks = [sample.vectors.shape[-1] for sample in (spectrum, first) if sample.vectors is not None]
    if len(ranks) < 2 or spectrum is first:
        return drift_from(spectrum, first)
    return drift_from(spectrum.leading(min(ranks)), first.leading(min(ranks)))
