"""Singular values of the weights that layers use, by what the parameters of a measurement make."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from lightning_spectral.capture.one_line import reason_of
from lightning_spectral.capture.parameters import Weight
from lightning_spectral.functional.estimate import Spectrum
from lightning_spectral.functional.singular import gram, roots_of_gram
from lightning_spectral.metrics.layout import is_distributed


def matrices_of(weights: Mapping[str, Weight]) -> dict[str, Weight]:
    """Those of two axes and more, by clean name."""
    return {name: weight for name, weight in weights.items() if weight.ndim >= 2}


def weight_spectra(weights: Mapping[str, Weight], step: int) -> dict[str, Spectrum]:
    """Singular values of the matrices among weights; those of one shape are solved together.

    Args:
        weights: By clean name; of a convolution's, output channels by the rest.
        step: Optimizer steps so far.

    Returns:
        By name, in the same order; missing, with the reason, where there is none.
    """
    wanted = matrices_of(weights)
    matrices, spectra = {}, {}
    for name, weight in wanted.items():
        try:
            matrices[name] = _matrix(weight)
        except Exception as error:  # of whatever kind a weight, or what makes it, may be
            spectra[name] = Spectrum.missing(reason_of(error), corrects_bias=False, name=name, step=step)
    by_shape: dict[torch.Size, list[str]] = {}
    for name, matrix in matrices.items():
        by_shape.setdefault(matrix.shape, []).append(name)
    for (height, width), names in by_shape.items():
        failure = None
        try:
            small = [gram(matrices[name] if height <= width else matrices[name].mT) for name in names]
            values = roots_of_gram(torch.stack(small)).cpu()
        except RuntimeError as error:  # out of memory, most likely
            values = torch.full((len(names), min(height, width)), torch.nan, dtype=torch.float64)
            failure = reason_of(error)
        for name, row in zip(names, values, strict=True):
            facts: dict[str, Any] = {"failure": failure, "failed_here": failure is not None, "dtype": "float64"}
            spectra[name] = Spectrum(row, corrects_bias=False, name=name, step=step, **facts)
    return {name: spectra[name] for name in wanted}


def _matrix(weight: Weight) -> Tensor:
    tensor = weight.compute().detach()
    if is_distributed(tensor):
        raise ValueError("it is sharded over ranks, and weights=True needs it whole")
    if tensor.is_complex() or tensor.layout is not torch.strided:
        raise ValueError("it is no dense tensor of real numbers")
    return tensor.flatten(1)
