"""The only place that touches nn.Module: which layers to watch, and what flows through them."""

from lightning_spectral.capture.activations import ActivationReader
from lightning_spectral.capture.batch import num_samples, token_mask
from lightning_spectral.capture.layers import clean_name, resolve_layers

__all__ = ["ActivationReader", "clean_name", "num_samples", "resolve_layers", "token_mask"]
