"""What tells one set of validation data from another: a checksum of its first samples."""

from math import isnan, nan
from typing import Any

import torch

from lightning_spectral.capture.batch import Samples, checksum
from lightning_spectral.metrics.exchange import sum_over_ranks
from lightning_spectral.runs.validation_data import NUM_SAMPLES


class Fingerprint:
    """Adds up checksums of the first samples of each loader, as ranks see them: one in turn each.

    It depends neither on how samples are batched nor, where they are dealt out to ranks one by one as by Lightning's
    own sampler, on the number of ranks, nor on the precision that floating-point samples are converted to.
    ``samples`` says where the samples of batches are; of ranks with the same data, one ``counts``.
    """

    def __init__(self, rank: int, world: int, samples: Samples | None = None, counts: bool = True) -> None:
        self._counts = counts
        self._samples = samples or Samples()
        self._room = len(range(rank, NUM_SAMPLES, world))
        self._sums: dict[int, float] = {}
        self._seen: dict[int, int] = {}

    def add(self, batch: Any, loader: int) -> None:
        """Look at a batch of the loader of that index."""
        seen = self._seen.get(loader, 0)
        if seen >= self._room:
            return
        try:
            cut = self._samples.cut(batch)
            found: float = checksum(cut, self._room - seen)
            size = cut.size
        except Exception:  # of whatever a batch may be made of; then it is not known which data these are
            found, size = nan, self._room
        self._seen[loader] = seen + size
        self._sums[loader] = self._sums.get(loader, 0.0) + found

    def agree(self, num_loaders: int, device: torch.device) -> dict[str, str]:
        """Of all ranks together, hexadecimal digits by index of the loader; a collective.

        Those whose batches cannot be cut into samples are missing. The process group can reduce float64 on ``device``.
        """
        sums = torch.tensor(
            [self._sums.get(loader, 0.0) * self._counts for loader in range(num_loaders)], dtype=torch.float64
        )
        total = sum_over_ranks(sums.to(device)).tolist()
        return {str(loader): f"{int(found):x}" for loader, found in enumerate(total) if not isnan(found)}
