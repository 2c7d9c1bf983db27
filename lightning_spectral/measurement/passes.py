"""A pass over a loader, and which of its samples are read: those spread evenly over all of it."""

from math import isinf
from typing import Any, NamedTuple

from torch.utils.data import BatchSampler, DataLoader, DistributedSampler


class Place(NamedTuple):
    """Where a batch lies in its pass, on this rank."""

    start: int
    """What went by before: samples, or batches where samples are not known."""
    span: int
    """What the batch is of it."""
    total: int
    """All of the pass."""

    def is_due(self, rows: int, share: int, index: int, size: int) -> bool:
        """Whether a sample is to be read: where no more of the share was read so far than of the pass went by.

        Of samples of r rows that is one in ``total r / share``, from the first on; all, where the pass has no more rows
        than the share. It does not depend on the batches that samples come in where their number is known.

        Args:
            rows: Rows read before it.
            share: Rows wanted of the whole pass.
            index: Of the sample in its batch.
            size: Samples of the batch.
        """
        return rows * self.total * size <= share * (min(self.start, self.total) * size + self.span * index)

    def needs(self, samples: int, share: int) -> bool:
        """Whether a whole batch is to be read: where less of the share was read than of the pass is over after it."""
        return samples * self.total < share * min(self.start + self.span, self.total)


class Pass(NamedTuple):
    """How long a pass is, on this rank."""

    num_batches: int
    num_samples: int | None = None
    """Where the loader says it."""
    batch_size: int = 1
    """Samples of each batch but the last, then."""
    of_all_ranks: int | None = None
    """Samples of the passes of all ranks together; padding that makes them equal is none."""

    @property
    def in_words(self) -> str:
        """How it is read."""
        if self.num_samples is None:
            return f"spread over {self.num_batches} batches"
        return f"spread over {self.num_samples if self.of_all_ranks is None else self.of_all_ranks} samples"

    def place(self, batch_idx: int) -> Place:
        """Where a batch lies."""
        if self.num_samples is None:
            return Place(batch_idx, 1, self.num_batches)
        start = batch_idx * self.batch_size
        return Place(start, max(0, min(self.batch_size, self.num_samples - start)), self.num_samples)


def pass_of(loader: Any, num_batches: float, world: int = 1) -> Pass | None:
    """The pass of so many batches over a loader; None if nobody knows where it ends.

    Args:
        loader: Whatever the Trainer was given.
        num_batches: As the Trainer has it, after its limits; infinity for a loader without a length.
        world: Number of ranks with data of their own.
    """
    if isinf(num_batches) or num_batches < 1:
        return None
    num_batches = int(num_batches)
    size, sampler = _batched(loader)
    if size is None:
        return Pass(num_batches)
    try:
        num_samples = len(sampler)
        deals = isinstance(sampler, DistributedSampler)
        of_all = len(sampler.dataset) if deals else num_samples * world
    except Exception:  # of whatever kind a sampler may be
        return Pass(num_batches)
    most = num_batches * size
    return Pass(num_batches, min(num_samples, most), size, min(of_all, most * world))


def _batched(loader: Any) -> tuple[int | None, Any]:
    """Samples of each batch, None where a loader has a rule of its own, and what samples them."""
    batches = loader.batch_sampler if isinstance(loader, DataLoader) else None
    if isinstance(batches, BatchSampler) and loader.batch_size is not None:
        return loader.batch_size, loader.sampler
    # Handed over by whoever made the loader anew, as accelerate does.
    return (batches.batch_size, batches.sampler) if type(batches) is BatchSampler else (None, None)
