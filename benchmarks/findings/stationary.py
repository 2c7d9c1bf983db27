"""Processes that do not change, and pairs of samples of them, which floors must hold."""

import math
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import torch

from lightning_spectral.functional import Spectrum

NUM_DRAWS = 100


class Process(NamedTuple):
    """A stationary source of sequences of rows."""

    eigenvalues: np.ndarray
    num_rows: int
    rank: int
    num_groups: int = 4
    length: int = 8
    correlation: float = 0.0
    """Between neighbouring rows of a sequence."""
    degrees: float = math.inf
    """Of Student's t: how heavy the tails are."""
    mean: float = 0.0

    def draw(self, rng: np.random.Generator) -> np.ndarray:
        """Groups of whole sequences, `(G, rows, d)`."""
        size = (self.num_groups, self.num_rows // self.num_groups // self.length, self.length)
        rows = rng.standard_normal((*size, len(self.eigenvalues)))
        for position in range(1, self.length if self.correlation else 0):
            rows[:, :, position] *= math.sqrt(1 - self.correlation**2)
            rows[:, :, position] += self.correlation * rows[:, :, position - 1]
        if self.degrees < math.inf:
            rows /= np.sqrt(rng.chisquare(self.degrees, (*size, 1)) / self.degrees)
        return (rows * np.sqrt(self.eigenvalues) + self.mean).reshape(self.num_groups, -1, len(self.eigenvalues))


def sample_of(groups: np.ndarray, rank: int) -> Spectrum:
    """What a report knows, from `(..., G, rows, d)`."""
    groups = torch.tensor(groups)
    counts, sums, outers = groups.shape[-2], groups.sum(-2), groups.mT @ groups
    members = torch.cat([torch.ones(1, groups.shape[-3]), 1 - torch.eye(groups.shape[-3])]).double()
    num_rows = members.sum(-1, keepdim=True) * counts
    mean = members @ sums / num_rows
    outer = torch.einsum("kg,...gde->...kde", members, outers) / num_rows[..., None]
    values, vectors = torch.linalg.eigh(outer - mean[..., :, None] * mean[..., None, :])
    values, vectors = values.flip(-1).clamp(min=0), vectors.flip(-1)[..., :rank]
    return Spectrum(values[..., 0, :], values[..., 1:, :], vectors[..., 0, :, :], vectors[..., 1:, :, :])


def drawn(process: Process, num_draws: int = NUM_DRAWS, seed: int = 0) -> tuple[Spectrum, Spectrum]:
    """Pairs of samples of one process, batched."""
    rng = np.random.default_rng(seed)
    first, second = (sample_of(np.stack([process.draw(rng) for _ in range(num_draws)]), process.rank) for _ in range(2))
    return first, second


def of_same_rows(
    process: Process, common: float, num_directions: int | None = None, num_draws: int = NUM_DRAWS, seed: int = 0
) -> tuple[Spectrum, Spectrum]:
    """Pairs of samples that two models of one population spectrum give of the same rows.

    ``common`` is the correlation of the two in the leading directions, all or so many; in others they are the same.
    """
    rng = np.random.default_rng(seed)
    scales = np.sqrt(process.eigenvalues)
    white = process._replace(eigenvalues=np.ones_like(scales), mean=0.0)
    first, fresh = (np.stack([white.draw(rng) for _ in range(num_draws)]) for _ in range(2))
    kept = np.where(np.arange(len(scales)) < (num_directions or len(scales)), common, 1.0)
    second = kept * first + np.sqrt(1 - kept**2) * fresh
    one, other = (replace(sample_of(rows * scales, process.rank), rows="the same") for rows in (first, second))
    return one, other


def power(width: int, exponent: float = 1.2, **equal: float) -> np.ndarray:
    """Eigenvalues j^-exponent; those at the ranks given, from 1, divided by the number given with them."""
    values = np.arange(1, width + 1) ** -exponent
    for rank, factor in equal.items():
        values[int(rank[1:]) - 1] = values[int(rank[1:]) - 2] / factor
    return values


def dominated(width: int) -> np.ndarray:
    values = power(width)
    values[0] = 1.5 * values[1:].sum()
    return values


def cluster(width: int, first: int, last: int) -> np.ndarray:
    values = power(width)
    values[first - 1 : last] = values[first - 1]
    return values


PROCESSES = {
    "steep": Process(2.0 ** -np.arange(32), 512, 3),
    "Gaussian": Process(power(48), 768, 6),
    "few rows": Process(power(32), 128, 5),
    "many rows": Process(power(32), 4096, 5),
    "2 groups": Process(power(32), 512, 5, num_groups=2),
    "3 groups": Process(power(32), 768, 5, num_groups=3, length=4),
    "8 groups": Process(power(32), 512, 5, num_groups=8),
    "heavy tails": Process(power(32), 1024, 5, degrees=5),
    "correlated rows": Process(power(32), 1024, 3, length=16, correlation=0.9),
    "correlated rows, 2 groups": Process(power(32), 1024, 3, num_groups=2, length=16, correlation=0.9),
    "dominated": Process(dominated(32), 512, 4),
    "dominated, rank 1": Process(dominated(32), 512, 1),
    "dominated, heavy tails": Process(dominated(32), 512, 3, degrees=5),
    "large mean": Process(power(32), 512, 5, mean=100.0),
    "equal at the cut": Process(power(32, r6=1), 1024, 5),
    "equal at the cut, 2 groups": Process(power(32, r6=1), 1024, 5, num_groups=2),
    "equal at the cut, rank 1": Process(power(32, 2.0, r2=1), 2048, 1),
    "equal at the cut, correlated": Process(power(32, r6=1), 1024, 5, length=16, correlation=0.9),
    "nearly equal at the cut": Process(power(32, 2.0, r4=1.05), 2048, 3),
    "cluster at the cut": Process(cluster(32, 4, 11), 1024, 6),
    "cluster beyond the cut": Process(cluster(32, 5, 16), 1024, 5),
    "no gap at all": Process(np.ones(32), 512, 5),
}
