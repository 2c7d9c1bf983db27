"""The only place that touches nn.Module: which layers and parameters to watch, and what flows through them."""

from lightning_spectral.capture.activations import ActivationReader
from lightning_spectral.capture.batch import num_samples, token_mask
from lightning_spectral.capture.layers import resolve_layers
from lightning_spectral.capture.names import clean_name
from lightning_spectral.capture.parameters import resolve_parameters
from lightning_spectral.capture.per_sample import per_sample_gradients

__all__ = [
    "ActivationReader",
    "clean_name",
    "num_samples",
    "per_sample_gradients",
    "resolve_layers",
    "resolve_parameters",
    "token_mask",
]
