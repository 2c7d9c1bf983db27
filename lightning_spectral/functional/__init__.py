"""The measures as pure functions: tensors in, tensors out, nothing imported but torch and SciPy."""

from lightning_spectral.functional.early import PREDICTORS, Early
from lightning_spectral.functional.estimate import Estimate, Exponent, Spectrum
from lightning_spectral.functional.floor import angle_floor, js_floor, overlap_floor
from lightning_spectral.functional.forecast import (
    MIN_REFERENCES,
    MIN_SETTINGS,
    Forecast,
    Skill,
    anchored_power_law,
    backtest,
    extrapolate_loss,
    forecast_tokens,
)
from lightning_spectral.functional.jackknife import Jackknife, jackknife
from lightning_spectral.functional.moments import Moments, covariance, moments, pool
from lightning_spectral.functional.noise import (
    GradientMoments,
    NoiseSums,
    gradient_moments,
    gradient_noise_scale,
    noise_sums,
)
from lightning_spectral.functional.noise_interval import NoiseInterval
from lightning_spectral.functional.powerlaw import Band, PowerLaw, power_law, resolve_band
from lightning_spectral.functional.rank_correlation import Interval, partial_spearman, spearman, spearman_interval
from lightning_spectral.functional.singular import gram, singular_spectrum, singular_values
from lightning_spectral.functional.spectrum import (
    covariance_spectrum,
    eigenvalues,
    head_share,
    js_divergence,
    normalize,
    rankme,
)
from lightning_spectral.functional.stacking import StackedForecast, stack
from lightning_spectral.functional.subspace import principal_angles, subspace_overlap

__all__ = [
    "MIN_REFERENCES",
    "MIN_SETTINGS",
    "PREDICTORS",
    "Band",
    "Early",
    "Estimate",
    "Exponent",
    "Forecast",
    "GradientMoments",
    "Interval",
    "Jackknife",
    "Moments",
    "NoiseInterval",
    "NoiseSums",
    "PowerLaw",
    "Skill",
    "Spectrum",
    "StackedForecast",
    "anchored_power_law",
    "angle_floor",
    "backtest",
    "covariance",
    "covariance_spectrum",
    "eigenvalues",
    "extrapolate_loss",
    "forecast_tokens",
    "gradient_moments",
    "gradient_noise_scale",
    "gram",
    "head_share",
    "jackknife",
    "js_divergence",
    "js_floor",
    "moments",
    "noise_sums",
    "normalize",
    "overlap_floor",
    "partial_spearman",
    "pool",
    "power_law",
    "principal_angles",
    "rankme",
    "resolve_band",
    "singular_spectrum",
    "singular_values",
    "spearman",
    "spearman_interval",
    "stack",
    "subspace_overlap",
]
