"""What tells the rows of one validation pass from those of another: whether two reports may be paired."""

from math import isnan, nan
from typing import Any

import torch

from lightning_spectral.capture.batch import Samples, checksum
from lightning_spectral.measurement.passes import Place
from lightning_spectral.metrics.exchange import sum_over_ranks
from lightning_spectral.metrics.layout import Layout

NUM_SAMPLES = 16
"""Samples of a pass, on each rank, that are looked at."""


class SameRows:
    """Adds up checksums of samples spread over a pass, each times its number, so that their order matters.

    Of a pass of unknown length it looks at the first. Which rows are read, and which groups they are in, follows from
    the data, the pass's length and the number of ranks: equal codes mean equal rows.

    Args:
        samples: Where the samples of batches are.
        layout: Which ranks hold which data; None for each its own.
    """

    def __init__(self, samples: Samples, layout: Layout | None = None) -> None:
        self._samples = samples
        self._layout = Layout.of_world() if layout is None else layout
        self.reset()

    def reset(self) -> None:
        """Begin a pass."""
        self._sum: float = 0.0
        self._number = 0
        self._total = 0

    def look(self, batch: Any, place: Place | None) -> None:
        """Look at a batch; where one cannot be cut into samples nothing is known of the pass."""
        if isnan(self._sum):
            return
        try:
            if place is None:
                self._add(batch, range(NUM_SAMPLES - self._number))
                return
            self._total = place.total
            first, last = (-(-at * NUM_SAMPLES // place.total) for at in (place.start, place.start + place.span))
            offsets = [number * place.total // NUM_SAMPLES - place.start for number in range(first, last)]
            self._add(batch, offsets, place.span)
        except Exception:  # of whatever a batch may be made of
            self._sum = nan

    def _add(self, batch: Any, offsets: "range | list[int]", span: int = 0) -> None:
        if not len(offsets):
            return
        cut = self._samples.cut(batch)
        for offset in offsets:
            index = offset * cut.size // span if span else offset
            if index < cut.size:
                self._number += 1
                self._sum += self._number * checksum(cut.part(index, index + 1), 1)

    def agree(self, device: torch.device) -> str:
        """Of all ranks together; empty where it is not known. A collective."""
        numbers = [self._sum, self._number] if self._layout.counts else [0.0, 0]
        mine = torch.tensor(numbers, dtype=torch.float64, device=device)
        total, number = sum_over_ranks(mine).tolist()
        return "" if isnan(total) or not number else f"{int(total):x}-{self._total}x{self._layout.world}"
