"""Products in the precision that a measurement promises, whatever was chosen for training."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import nn

SHORT = (torch.float16, torch.bfloat16)

REDUCED = ("tf32", "bf16")
"""Precisions in which a backend may multiply float32 matrices faster than in float32."""


def ieee_products() -> AbstractContextManager[None]:
    """Float32 products in float32: a user's choice of TF32 or bf16 for training must not reach the covariance."""
    return _each_backend() if hasattr(torch.backends.mkldnn, "matmul") else _all_backends()


def has_reduced_products(device: torch.device, layer: nn.Module | None = None) -> bool:
    """Whether products of float32 may be those of fewer bits in training: a layer's, or of matrices in general."""
    if layer is not None and device.type != "cpu" and not isinstance(layer, (nn.Linear, nn.Embedding)):
        return True  # convolutions on a GPU are, unless somebody said otherwise
    if not hasattr(torch.backends.mkldnn, "matmul"):
        return torch.get_float32_matmul_precision() != "highest"
    # By backend: the one answer for all is refused once somebody has set one of them.
    backend: Any = torch.backends.mkldnn if device.type == "cpu" else torch.backends.cuda
    return backend.matmul.fp32_precision in REDUCED


@contextmanager
def _all_backends() -> Iterator[None]:
    """With the one setting that torch<2.9 has."""
    chosen = torch.get_float32_matmul_precision()
    if chosen != "highest":
        torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        if chosen != "highest":
            torch.set_float32_matmul_precision(chosen)


@contextmanager
def _each_backend() -> Iterator[None]:
    backends = [
        (torch.backends.cuda.matmul, torch.backends),
        (torch.backends.mkldnn.matmul, torch.backends.mkldnn),  # type: ignore[attr-defined]
    ]
    chosen = []
    for matmul, parent in backends:
        precision = matmul.fp32_precision
        if precision in REDUCED:
            # What was inherited must go on following its parent.
            chosen.append((matmul, "none" if parent.fp32_precision == precision else precision))
            matmul.fp32_precision = "ieee"
    try:
        yield
    finally:
        for matmul, precision in chosen:
            matmul.fp32_precision = precision
