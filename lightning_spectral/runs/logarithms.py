"""Numbers of which some are not known, in logarithms and as tensors."""

from collections.abc import Sequence
from math import log, nan

import numpy as np
import torch
from torch import Tensor


def log_of(value: float) -> float:
    """The logarithm; NaN of what has none."""
    return log(value) if value > 0 else nan


def vector(values: Sequence[float]) -> Tensor:
    """Numbers as a tensor, float64."""
    return torch.as_tensor(np.asarray(values, dtype=np.float64))
