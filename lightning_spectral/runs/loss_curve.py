"""The losses of a run so far, of which few are kept, and where they lead by a law of their own."""

from collections.abc import Iterable
from math import log

import numpy as np
import torch

from lightning_spectral.functional.forecast import anchored_power_law
from lightning_spectral.runs.logarithms import log_of

NUM_LOSSES = 8
"""Of a run's losses that are kept, those that say most of how it falls."""


class LossCurve:
    """The last losses of a run and, of those before, the ones that lie farthest apart in ln tokens.

    Given the same losses one after the other it keeps the same, while training goes on or read back from a record.

    Args:
        points: Of an earlier curve, as :attr:`points`.
    """

    def __init__(self, points: Iterable[list[float]] = ()) -> None:
        self.points = [list(point) for point in points]
        """Steps, tokens and loss of each."""

    def add(self, step: float, tokens: float, loss: float) -> None:
        """Take in the next loss."""
        self.points.append([step, tokens, loss])
        while len(self.points) > NUM_LOSSES:
            # Neither the last two, between which a crossing is, nor the first go.
            at = [log(max(tokens, 1.0)) for _, tokens, _ in self.points]
            gaps = [at[index + 1] - at[index - 1] for index in range(1, len(self.points) - 2)]
            del self.points[1 + gaps.index(min(gaps))]

    def until(self, tokens: float, loss: float) -> "LossCurve":
        """The curve with an end at some tokens beyond its own."""
        ended = LossCurve(self.points)
        ended.add(float("nan"), tokens, loss)
        return ended

    def log_tokens_to(self, target: float) -> float:
        """Logarithm of the tokens to a target (:func:`anchored_power_law`); NaN where the curve does not say."""
        _, tokens, losses = np.asarray(self.points, dtype=np.float64).reshape(-1, 3).T
        known = tokens > 0
        return log_of(anchored_power_law(torch.from_numpy(tokens[known]), torch.from_numpy(losses[known]), target))
