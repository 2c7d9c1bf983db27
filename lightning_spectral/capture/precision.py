"""Products in the precision that a measurement promises, whatever was chosen for training."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager

import torch

REDUCED = ("tf32", "bf16")
"""Precisions in which a backend may multiply float32 matrices faster than in float32."""


def ieee_products() -> AbstractContextManager[None]:
    """Float32 products in float32: a user's choice of TF32 or bf16 for training must not reach the covariance."""
    return _each_backend() if hasattr(torch.backends.mkldnn, "matmul") else _all_backends()


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
