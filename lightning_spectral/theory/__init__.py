"""The mechanistic model: fixed features, a linear readout, and what their spectrum makes of the rate of learning."""

from lightning_spectral.theory.gradient_flow import gradient_flow_risk, power_law_risk
from lightning_spectral.theory.harmonics import band_concentration, harmonic_energy
from lightning_spectral.theory.power_law import crossover_rank, power_law_spectrum
from lightning_spectral.theory.readout import Readout, readout_loss, task_power
from lightning_spectral.theory.sgd import (
    Stability,
    critical_batch_size,
    noise_scale,
    sgd_risk,
    stability,
    steps_to_risk,
    tokens_to_risk,
)

__all__ = [
    "Readout",
    "Stability",
    "band_concentration",
    "critical_batch_size",
    "crossover_rank",
    "gradient_flow_risk",
    "harmonic_energy",
    "noise_scale",
    "power_law_risk",
    "power_law_spectrum",
    "readout_loss",
    "sgd_risk",
    "stability",
    "steps_to_risk",
    "task_power",
    "tokens_to_risk",
]
