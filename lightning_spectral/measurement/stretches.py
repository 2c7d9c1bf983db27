"""Which samples are left out together: contiguous stretches of them, of about equal length however many there come."""

from typing import NamedTuple


def groups_of(count: int, num_groups: int, rank: int = 0, world: int = 1) -> list[int]:
    """The group of each of ``count`` samples of a rank, in their order, where their number is known.

    Sample i goes to group ``floor(G (i W + r) / (count W))``: each rank's samples are cut into G stretches, and those
    of all ranks at one place are one group. Ranks that each have fewer samples than groups fill them together.
    """
    return [num_groups * (index * world + rank) // (count * world) for index in range(count)]


class Run(NamedTuple):
    """Samples of a batch that belong together."""

    slot: int
    start: int
    """Among the samples placed."""
    stop: int


class Stretches:
    """Cuts samples into contiguous stretches while they come, when nobody knows how many there will be.

    There are one more slots than groups. Each is filled up to a number of samples, ``unit``; when all are full, the two
    neighbours that have fewest together become one, and once all have grown so, the unit is doubled. Of as many samples
    as groups or more no stretch is empty, and none is longer than twice the shortest; the variance that a jackknife of
    four such groups gives of a mean is at most 6% too large. Where stretches begin depends on the order of samples
    alone, not on the batches that they come in.

    Args:
        num_groups: G.
    """

    def __init__(self, num_groups: int) -> None:
        self.num_groups = num_groups
        self.sizes: list[int] = []
        """Samples in each slot that is in use, in order."""
        self._unit = 1

    def place(self, num_samples: int) -> tuple[list[int], list[Run]]:
        """Find a place for the samples of a batch, after all before.

        Returns:
            Joins to be carried out first, one after the other: each ``i`` adds slot i + 1 to slot i, and moves those
            beyond down by one; then where the samples go.
        """
        joins: list[int] = []
        runs: list[Run] = []
        placed = 0
        while placed < num_samples:
            if self.num_groups == 1:
                self.sizes = self.sizes or [0]
            elif not self.sizes or self.sizes[-1] >= self._unit:
                if len(self.sizes) > self.num_groups:
                    joins.append(join := self._join())
                    runs = _joined(runs, join)
                    self._unit *= 1 + (min(self.sizes) >= 2 * self._unit)
                    continue
                self.sizes.append(0)
            slot = len(self.sizes) - 1
            room = num_samples if self.num_groups == 1 else self._unit - self.sizes[slot]
            taken = min(room, num_samples - placed)
            self.sizes[slot] += taken
            runs.append(Run(slot, placed, placed + taken))
            placed += taken
        return joins, _merged(runs)

    def finish(self) -> list[int]:
        """Joins that leave no more slots in use than groups, as in :meth:`place`."""
        return [self._join()] if len(self.sizes) > self.num_groups else []

    def groups(self, rank: int, world: int) -> list[int]:
        """The group of each slot, once finished; they differ only where samples are fewer than groups."""
        return groups_of(len(self.sizes), self.num_groups, rank, world)

    def _join(self) -> int:
        """Join the neighbours that have fewest samples together, of several the first."""
        sizes = self.sizes
        index = min(range(len(sizes) - 1), key=lambda i: sizes[i] + sizes[i + 1])
        sizes[index : index + 2] = [sizes[index] + sizes[index + 1]]
        return index


def _joined(runs: list[Run], join: int) -> list[Run]:
    return [run._replace(slot=run.slot - (run.slot > join)) for run in runs]


def _merged(runs: list[Run]) -> list[Run]:
    """One run for each slot; those of one slot follow each other."""
    merged: list[Run] = []
    for run in runs:
        if merged and merged[-1].slot == run.slot:
            merged[-1] = merged[-1]._replace(stop=run.stop)
        else:
            merged.append(run)
    return merged
