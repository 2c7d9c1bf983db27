"""The measures as pure functions: tensors in, tensors out, nothing imported but torch."""

from lightning_spectral.functional.jackknife import Jackknife, jackknife
from lightning_spectral.functional.moments import Moments, covariance, moments, pool
from lightning_spectral.functional.powerlaw import Band, PowerLaw, power_law, resolve_band
from lightning_spectral.functional.spectrum import (
    covariance_spectrum,
    eigenvalues,
    head_share,
    js_divergence,
    normalize,
    rankme,
)

__all__ = [
    "Band",
    "Jackknife",
    "Moments",
    "PowerLaw",
    "covariance",
    "covariance_spectrum",
    "eigenvalues",
    "head_share",
    "jackknife",
    "js_divergence",
    "moments",
    "normalize",
    "pool",
    "power_law",
    "rankme",
    "resolve_band",
]
