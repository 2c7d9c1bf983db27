"""The measures as pure functions: tensors in, tensors out, nothing imported but torch."""

from lightning_spectral.functional.jackknife import Jackknife, jackknife
from lightning_spectral.functional.moments import Moments, covariance, moments, pool
from lightning_spectral.functional.noise import GradientMoments, gradient_moments, gradient_noise_scale
from lightning_spectral.functional.powerlaw import Band, PowerLaw, power_law, resolve_band
from lightning_spectral.functional.singular import gram, singular_spectrum, singular_values
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
    "GradientMoments",
    "Jackknife",
    "Moments",
    "PowerLaw",
    "covariance",
    "covariance_spectrum",
    "eigenvalues",
    "gradient_moments",
    "gradient_noise_scale",
    "gram",
    "head_share",
    "jackknife",
    "js_divergence",
    "moments",
    "normalize",
    "pool",
    "power_law",
    "rankme",
    "resolve_band",
    "singular_spectrum",
    "singular_values",
]
