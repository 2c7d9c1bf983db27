"""Rows of nested tensors, jagged or strided: their values as they lie there, sample by sample, without padding."""

from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_spectral.capture.channels import rows_last


def parts_of(output: Tensor) -> tuple[Tensor, ...]:
    """The samples of a nested tensor, ``(1, ..., )`` each."""
    return tuple(part.unsqueeze(0) for part in output.unbind())


def rows_of_parts(parts: Sequence[Tensor], axis: int) -> tuple[Tensor, list[int]]:
    """Rows ``(n, C)`` of all samples, one after the other, and how many there are of each.

    ``axis`` is that of the channels in each part. ValueError if they are of unequal lengths.
    """
    rows = [rows_last(part, axis).flatten(0, -2) for part in parts]
    widths = {part.shape[-1] for part in rows}
    if len(widths) != 1:
        raise ValueError(f"its output is a nested tensor whose channels are of unequal lengths, {sorted(widths)}")
    return torch.cat(rows), [len(part) for part in rows]


def has_shape(tensor: Tensor) -> bool:
    """Whether a tensor has lengths along its axes: a nested one of the older, strided layout has none."""
    return not (tensor.is_nested and tensor.layout == torch.strided)
