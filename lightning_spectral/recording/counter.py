"""Tokens, samples and losses of training batches, counted on each rank and added up over all when somebody asks."""

from collections.abc import Sequence
from math import inf, isnan, nan
from typing import Any

import torch
from torch import Tensor

from lightning_spectral.capture.batch import Samples, num_tokens
from lightning_spectral.capture.masks import Mask
from lightning_spectral.metrics.exchange import sum_over_ranks
from lightning_spectral.metrics.layout import Layout


class BatchCounter:
    """Counts without waiting for a GPU; only :meth:`agree` does, and is a collective of four numbers.

    ``per_sample`` says how tokens are counted, see :func:`lightning_spectral.capture.batch.num_tokens`; on ``device``
    the process group can reduce float64. From the run before come its ``tokens``, and sum and number of the ``losses``
    that were not taken. ``samples`` says where the samples of batches are, ``layout`` which ranks hold which data.
    """

    def __init__(
        self,
        per_sample: int | str | None,
        device: torch.device,
        tokens: float = 0.0,
        losses: Sequence[float] | None = None,
        samples: Samples | None = None,
        layout: Layout | None = None,
    ) -> None:
        self._layout = Layout.of_world() if layout is None else layout
        self.per_sample = per_sample
        # What the values under a key mean is decided once.
        self._counted = (
            Mask(per_sample, "tokens_per_sample", counts_ids=True) if isinstance(per_sample, str) else per_sample
        )
        self._samples = samples or Samples()
        self.tokens = tokens
        """Tokens over all ranks when they last agreed."""
        self._num_samples = 0.0
        self.num_batches = 0
        """Batches on this rank."""
        self._device = device
        self._at_start = tokens
        self._agreed_batches = 0
        self._seen: tuple[float, float | Tensor] = nan, nan
        """Samples and tokens of the batch under way."""
        self._loss_sum, self._num_losses = (0.0, 0.0) if losses is None else losses
        self._forget()

    def _forget(self) -> None:
        self._new_tokens: float | Tensor = 0
        self._new_samples = 0.0
        self._new_losses: float | Tensor = 0.0
        self._num_new_losses = 0

    def look(self, batch: Any) -> None:
        """Count what is in a batch of this rank before a step may change it; it counts once :meth:`add` is told.

        ValueError if its tokens cannot be counted; it counts as a batch without any, or, if it is the first, leaves the
        number unknown, as others will be like it.
        """
        self._seen = self.samples_of(batch), nan if self.num_batches == 0 else 0
        self._seen = self._seen[0], num_tokens(batch, self._counted, self._samples)

    def add(self, loss: Tensor | None) -> None:
        """Count the batch that was looked at last, which has ended, and its loss, 0-dim; None for none."""
        self.num_batches += 1
        samples, tokens = self._seen
        self._new_samples += samples
        self._new_tokens = self._new_tokens + tokens
        if loss is not None:
            exact = torch.float32 if loss.device.type == "mps" else torch.float64
            self._new_losses = self._new_losses + loss.detach().to(exact)
            self._num_new_losses += 1

    def samples_of(self, batch: Any) -> float:
        """How many samples a batch has; NaN where it does not tell."""
        # A user's own cutter takes its time, and is asked at reports only.
        found = None if self._samples.cutter is not None else self._samples.count(batch)
        return nan if found is None else found

    def agree(self) -> None:
        """Bring ``tokens`` up to date; a collective if a batch was counted since the last time."""
        if not self.is_behind:
            return
        tokens, samples, losses, num_losses = self._sum(
            float(self._new_tokens), self._new_samples, float(self._new_losses), float(self._num_new_losses)
        )
        self.tokens += tokens
        self._num_samples += samples
        self._loss_sum += losses
        self._num_losses += num_losses
        self._agreed_batches = self.num_batches
        self._forget()

    @property
    def is_behind(self) -> bool:
        """Whether a batch was counted since ranks agreed; the same on all."""
        return self.num_batches != self._agreed_batches

    def _sum(self, *numbers: float) -> list[float]:
        if not self._layout.counts:
            numbers = (0.0,) * len(numbers)
        return sum_over_ranks(torch.tensor(numbers, dtype=torch.float64, device=self._device)).tolist()

    @property
    def has_losses(self) -> bool:
        """Whether there is a loss that was agreed on and not taken."""
        return self._num_losses > 0

    def take_loss(self) -> float:
        """Mean loss of the batches agreed on since it was taken last; NaN if there was none, infinite if it is none."""
        mean = self._loss_sum / self._num_losses if self._num_losses else nan
        mean = inf if isnan(mean) and self._num_losses else mean
        self._loss_sum, self._num_losses = 0.0, 0.0
        return mean

    @property
    def losses(self) -> list[float]:
        """Sum and number of losses not taken, without a collective: those on which ranks have not agreed are here's."""
        return [self._loss_sum + float(self._new_losses), self._num_losses + self._num_new_losses]

    @property
    def tokens_per_batch(self) -> float:
        """Mean tokens of a batch, over all ranks, among those agreed on; NaN before the first."""
        return (self.tokens - self._at_start) / self._agreed_batches if self._agreed_batches else nan

    @property
    def samples_per_batch(self) -> float:
        """Likewise samples; NaN also where a batch does not tell how many it has."""
        return self._num_samples / self._agreed_batches if self._agreed_batches else nan

    @property
    def estimate(self) -> float:
        """Tokens so far without a collective: as if all ranks had seen since what this one has."""
        return self.tokens + float(self._new_tokens) * self._layout.world
