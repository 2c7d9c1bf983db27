"""Divergences between single runs at several losses, and how many times as far apart as seeds two sides are."""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from lightning_spectral.functional.estimate import Spectrum
from lightning_spectral.functional.spectrum import js_divergence
from lightning_spectral.runs.course import GROUPS
from lightning_spectral.runs.measured import Measured
from lightning_spectral.runs.run import Run
from lightning_spectral.runs.statistics import Variance

SHARES = (0.75, 0.5)
"""Of the way, in tokens, from the highest to the lowest loss that all runs have in common."""


@dataclass(frozen=True)
class Divergences:
    """Between runs of base, of variant, and others of one setting that show what seeds do, in this order."""

    losses: tuple[float, ...]
    """L of them."""
    matrices: np.ndarray
    """``(L, n, n)`` Jensen-Shannon divergences in nats, meaned over layers or parameters; NaN where none is known."""
    sizes: tuple[int, int]
    """Runs of base and of variant."""
    is_paired: bool = False
    """Whether runs of base and variant, in their order, are pairs: what they share is no likeness of sides."""
    recorded: Variance | None = None
    """What an earlier comparison knows of seeds: divergences from their mean, half of those between two."""

    def without_pairs(self) -> "Divergences":
        """The same, taken as single runs."""
        return replace(self, is_paired=False)

    @property
    def base(self) -> np.ndarray:
        """``(1, n)``, one for the runs of base."""
        return (np.arange(self.matrices.shape[-1]) < self.sizes[0]).astype(float)[None]

    @property
    def variant(self) -> np.ndarray:
        """``(1, n)``, one for the runs of variant."""
        return (np.arange(self.matrices.shape[-1]) < sum(self.sizes)).astype(float)[None] - self.base

    def ratios(self, base: np.ndarray, variant: np.ndarray) -> np.ndarray:
        """Mean divergence between two sides over mean divergence between runs of one.

        Args:
            base: ``(S, n)`` weights of runs in base, zero of others: 0 or 1 of a relabelling, any of a bootstrap.
            variant: Likewise.

        Returns:
            ``(L, S)``; NaN where no side has two runs and nothing is on record.
        """
        counted = 1 - np.eye(self.matrices.shape[-1])
        if self.is_paired:
            first = np.arange(self.sizes[0])
            second = first + self.sizes[0]
            counted[first, second] = counted[second, first] = 0
        divergences = self.matrices * counted
        others = 1 - self.base - self.variant
        sides = base, variant, others
        with np.errstate(invalid="ignore", divide="ignore"):
            between = _sums(base, divergences, variant) / _sums(base, counted, variant)
            within = sum(_sums(one, divergences, one) for one in sides) / sum(_sums(one, counted, one) for one in sides)
            if self.recorded is not None:
                value, degrees = self.recorded
                own = sum(max(int((one[0] > 0).sum()) - 1, 0) for one in sides)
                within = (np.where(own, own * within, 0.0) + degrees * 2 * value) / (own + degrees)
            return np.asarray(between / within)

    def resampled(self, num_draws: int, generator: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """Weights of runs in base and in variant, ``(num_draws, n)`` each, of a bootstrap over seeds.

        They are Dirichlet rather than whole numbers (Rubin, *The Bayesian bootstrap*, 1981): a side of two or three
        seeds would otherwise often be one seed, of which there is no divergence. Of pairs both runs weigh alike.
        """
        num_base, num_variant = self.sizes
        first = num_base * generator.dirichlet(np.ones(num_base), num_draws)
        second = first if self.is_paired else num_variant * generator.dirichlet(np.ones(num_variant), num_draws)
        base, variant = np.zeros((2, num_draws, self.matrices.shape[-1]))
        base[:, :num_base], variant[:, num_base : num_base + num_variant] = first, second
        return base, variant


def _sums(one: np.ndarray, matrix: np.ndarray, other: np.ndarray) -> np.ndarray:
    """Weighted sums over pairs of runs, ``(L, S)`` or ``(S,)``."""
    return np.asarray((one @ matrix * other).sum(-1))


def losses_between(runs: Sequence[Run], highest: float, lowest: float) -> list[float]:
    """Three losses: the lowest, and those that runs had after three quarters and half of the tokens from highest to it.

    Args:
        runs: All that are compared, which count alike.
        highest: That all of them had.
        lowest: Likewise; the loss that they are matched at.

    Returns:
        The lowest first. It stands for all three where it is the highest as well.
    """
    start, end = (np.array([run.tokens_to(loss) for run in runs]) for loss in (highest, lowest))
    if not (start < end).all():
        return [lowest] * (1 + len(SHARES))

    def share(loss: float) -> float:
        return float(np.mean((np.array([run.tokens_to(loss) for run in runs]) - start) / (end - start)))

    return [lowest, *(_where(share, wanted, lowest, highest) for wanted in SHARES)]


def _where(share: Callable[[float], float], wanted: float, lowest: float, highest: float) -> float:
    """By bisection, of a share that falls as the loss rises."""
    for _ in range(40):
        middle = (lowest + highest) / 2
        if share(middle) > wanted:
            lowest = middle
        else:
            highest = middle
    return (lowest + highest) / 2


def find_divergences(
    every: Sequence[Measured],
    kind: str,
    names: Collection[str],
    losses: Sequence[float],
    sizes: tuple[int, int],
    is_paired: bool = False,
    recorded: Variance | None = None,
) -> Divergences:
    """Divergences between runs at some losses.

    Args:
        every: The runs at the matched loss: of base, of variant, and others.
        kind: Of spectra.
        names: Layers or parameters that all of them have there; at another loss those that a run lacks are left out.
        losses: The matched one first.
        sizes: Runs of base and of variant.
        is_paired: Whether those are pairs.
        recorded: What is on record of seeds.

    Returns:
        Of all of them.
    """
    matrices = []
    for loss in losses:
        if loss == losses[0]:
            spectra = [{key.name: one for key, one in run.spectra.items() if key.kind == kind} for run in every]
        else:
            spectra = [one.run.spectra_at(kind, one.run.tokens_to(loss), without=GROUPS) for one in every]
        values = [_known([run.get(name) for run in spectra]) for name in names]
        found = [_between(of_name) for of_name in values if of_name is not None]
        matrices.append(np.mean(found, axis=0) if found else np.full((len(every), len(every)), np.nan))
    return Divergences(tuple(losses), np.stack(matrices), sizes, is_paired, recorded)


def _known(spectra: Sequence[Spectrum | None]) -> torch.Tensor | None:
    """Values ``(n, width)``; None where a run has none, or other rows."""
    known = [one for one in spectra if one is not None and one.failure is None and not one.is_zero]
    if len(known) < len(spectra) or len({(one.count, len(one.values)) for one in known}) > 1:
        return None
    return torch.stack([one.values for one in known])


def _between(values: torch.Tensor) -> np.ndarray:
    found = np.zeros((len(values), len(values)))
    for index, one in enumerate(values[:-1]):
        others = values[index + 1 :]
        found[index, index + 1 :] = js_divergence(others, one.expand_as(others)).numpy()
    return found + found.T
