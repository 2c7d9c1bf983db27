"""Sums of a layer's rows about a pivot, of the symmetric products one half, and the moments that come of them."""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_spectral.functional.moments import PANEL as PANEL_OF_CPU
from lightning_spectral.functional.moments import Moments
from lightning_spectral.measurement.placement import Behind, room
from lightning_spectral.metrics.collectives import all_reduce, world_size
from lightning_spectral.metrics.reduction import reduce_means

PANEL = 1024
"""Columns of a panel where products are not a CPU's: more, smaller kernels would cost more than they save."""


TOGETHER = 2**23
"""Numbers that are reduced at a time, 64 MiB: a layer's, and those of others that fit beside them."""


class Panel(NamedTuple):
    """Some columns of a symmetric matrix, from the diagonal on: ``[start:stop, start:]``."""

    start: int
    stop: int
    first: int
    """Where its numbers begin among those of all panels."""
    last: int


class Panels:
    """A symmetric d x d matrix as numbers in a row: :math:`d (d + b) / 2` of them, b columns to a panel.

    Args:
        width: d.
        step: b.
    """

    def __init__(self, width: int, step: int) -> None:
        self.width = width
        self.numbers = 0
        self._panels: list[Panel] = []
        for start in range(0, width, step):
            stop = min(start + step, width)
            last = self.numbers + (stop - start) * (width - start)
            self._panels.append(Panel(start, stop, self.numbers, last))
            self.numbers = last

    def of(self, packed: Tensor) -> Iterator[tuple[Panel, Tensor]]:
        """Views ``(..., stop - start, d - start)`` of ``(..., numbers)``."""
        for panel in self._panels:
            shape = (panel.stop - panel.start, self.width - panel.start)
            yield panel, packed[..., panel.first : panel.last].unflatten(-1, shape)

    def add_products(self, packed: Tensor, rows: Tensor, behind: Behind | None = None) -> None:
        r"""Add :math:`X^\top X` of ``(n, d)`` rows, at once or ``behind``.

        Panel by panel, which saves up to half of the work.
        """
        for panel, total in self.of(packed):
            part = rows[:, panel.start : panel.stop].mT @ rows[:, panel.start :]
            if behind is None:
                total.add_(part.to(total.device))
            else:
                behind.add(total, part)

    def add_outer(self, packed: Tensor, left: Tensor, right: Tensor, factor: float = 1.0) -> None:
        r"""Add :math:`l r^\top` of vectors ``(..., d)`` for which that is symmetric."""
        for panel, total in self.of(packed):
            part = left[..., panel.start : panel.stop].unsqueeze(-1)
            total.addcmul_(part, right[..., panel.start :].unsqueeze(-2), value=factor)

    def unpack(self, packed: Tensor, out: Tensor) -> None:
        """Write the matrices, ``(..., d, d)``."""
        for panel, part in self.of(packed):
            size = panel.stop - panel.start
            # Of the block on the diagonal, too, what is above it counts.
            block = part[..., :size].triu()
            out[..., panel.start : panel.stop, panel.start : panel.stop] = block + block.triu(1).mT
            out[..., panel.start : panel.stop, panel.stop :] = part[..., size:]
            out[..., panel.stop :, panel.start : panel.stop] = part[..., size:].mT


class Slot(NamedTuple):
    """What is known of one group's rows."""

    num_rows: Tensor
    """0-dim."""
    total: Tensor
    """``(d,)`` sum of rows minus pivot."""
    outer: Tensor
    """``(numbers,)`` sum of their outer products, see :class:`Panels`."""


class Sums:
    """Of one layer: a slot for each of G groups, and a pivot for all.

    Args:
        num_groups: G.
        num_features: d.
        device: Where rows are.
        home: Where the sums of products, nearly all of the memory, are kept; None for the same.
    """

    def __init__(
        self, num_groups: int, num_features: int, device: torch.device, home: torch.device | None = None
    ) -> None:
        home = device if home is None else home
        self.panels = Panels(num_features, PANEL_OF_CPU if device.type == "cpu" else PANEL)
        # Validation runs in inference mode, but the sums outlive it.
        with torch.inference_mode(False):
            self.count = torch.zeros(num_groups, dtype=torch.float64, device=device)
            self.total = torch.zeros(num_groups, num_features, dtype=torch.float64, device=device)
            self.pivot = torch.zeros(num_features, dtype=torch.float64, device=device)
            self.outer = room(num_groups, self.panels.numbers, dtype=torch.float64, device=home, beside=device).zero_()

    @property
    def width(self) -> int:
        """Channels d of a row."""
        return self.panels.width

    @property
    def nbytes(self) -> int:
        """What is kept."""
        return sum(tensor.nbytes for tensor in (self.count, self.total, self.pivot, self.outer))

    def slot(self, index: int) -> Slot:
        """One group's."""
        return Slot(self.count[index], self.total[index], self.outer[index])


def sums_bytes(num_groups: int, num_features: int, device: torch.device | None = None) -> int:
    """Bytes that are kept for one layer from its first rows to the report, on a device: None for a CPU.

    About 4 (G + 1) d^2, for G groups and a spare one; 4 d^2 for one.
    """
    kind = "cpu" if device is None else device.type
    panels = Panels(num_features, PANEL_OF_CPU if kind == "cpu" else PANEL)
    slots = num_groups + (num_groups > 1)
    return 8 * (slots * (1 + num_features + panels.numbers) + num_features)


def pooled(parts: list[Sums], riders: Tensor, device: torch.device) -> tuple[Moments, Tensor]:
    r"""Moments of all ranks' rows of L layers of one width from sums of each rank's; a collective.

    One small all-reduce of counts and means for all layers, and one of packed scatters for as many as make up 64 MiB.

    Args:
        parts: Of each layer. Emptied, so that a layer's sums may go as its scatter comes.
        riders: 1-D float64 numbers that are summed over ranks in the small reduction.
        device: Where the process group can reduce.

    Returns:
        Moments ``(L, G)`` where the sums of the first layer were kept, and the sums of riders.
    """
    home, width = parts[0].outer.device, parts[0].width
    total, pivot = (torch.stack([getattr(one, field) for one in parts]) for field in ("total", "pivot"))
    count = torch.stack([one.count for one in parts])
    offset = total / count.clamp(min=1).unsqueeze(-1)
    own = torch.where(count.unsqueeze(-1) > 0, pivot.unsqueeze(-2) + offset, 0.0)
    count, mean, deviation, riders = reduce_means(count, own, riders)
    scatter = torch.empty(*count.shape, width, width, dtype=torch.float64, device=home)
    panels, stop = parts[0].panels, 0
    at_a_time = 1 if world_size() == 1 else max(1, TOGETHER // (count.shape[1] * panels.numbers))
    while parts:
        start, some = stop, [one.outer.to(device) for one in parts[:at_a_time]]
        stop = start + len(some)
        del parts[:at_a_time]
        # One by itself may be of any size: no copy.
        packed = some.pop().unsqueeze(0) if len(some) == 1 else torch.stack(some)
        some.clear()
        panels.add_outer(packed, total[start:stop], offset[start:stop], -1.0)
        if world_size() > 1:
            panels.add_outer(packed, deviation[start:stop], deviation[start:stop])
            all_reduce(packed)
        panels.unpack(packed.to(home), scatter[start:stop])
        del packed
    return Moments(count.to(home), mean.to(home), scatter), riders
