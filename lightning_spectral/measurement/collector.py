"""Rows of many layers into the moments of groups of whole samples, kept from the first rows to the report."""

from collections import defaultdict
from collections.abc import Collection, Iterator, Sequence

import torch
from torch import Tensor

from lightning_spectral.capture.one_line import reason_of
from lightning_spectral.capture.precision import ieee_products
from lightning_spectral.functional.moments import Moments
from lightning_spectral.measurement.passes import Place
from lightning_spectral.measurement.placement import CPU, Behind, Keep, placed
from lightning_spectral.measurement.stretches import Stretches
from lightning_spectral.measurement.sums import Slot, Sums, pooled, sums_bytes
from lightning_spectral.metrics.collectives import world_size
from lightning_spectral.metrics.layout import Layout
from lightning_spectral.metrics.reduction import gather_numbers

RMS_EPS = 1e-6
"""Epsilon of the parameter-free RMSNorm in the scripts released with *Spectral Lens* (arXiv 2605.05683)."""


def inverse_rms(samples: Tensor, dtype: torch.dtype) -> Tensor:
    r"""What a parameter-free RMSNorm multiplies rows by, :math:`(\frac1d \sum_j x_j^2 + \epsilon)^{-1/2}`.

    ``(..., 1)`` of samples ``(..., d)`` of any floating type, in ``dtype``, which is no narrower than theirs.
    """
    squares = torch.linalg.vector_norm(samples, dim=-1, keepdim=True, dtype=dtype).square_()
    return squares.div_(samples.shape[-1]).add_(RMS_EPS).rsqrt_()


class _Progress:
    """How far one layer has come in the current report, on this rank."""

    def __init__(self, num_groups: int) -> None:
        self.rows = 0
        """Rows accumulated."""
        self.rows_of_one_call = 0
        """Those that were chosen, as if the layer were called once in each batch."""
        self.offered = 0
        """Rows that went by, accumulated or not; of masked ones none."""
        self.batch = 0
        """The batch that was seen last."""
        self.parts: list[tuple[int, list[int]]] = []
        """Its samples that are taken, in each of the layer's calls, by slot."""
        self.is_whole = False
        """Whether it counts as one sample."""
        self.is_full = False
        self.stretches = Stretches(num_groups)


class Collector:
    """Accumulates the centred outer products of layers' outputs on this rank, and pools them over ranks.

    Groups are contiguous stretches of this rank's samples (:class:`Stretches`), for neighbours may have much in common
    that others have not. Where the first axis of an output is the batch its entries are the samples, the same in each
    of a layer's calls; otherwise whole batches are. Only whole samples are taken: of a pass whose length is known those
    spread over it (:class:`Place`), of others the first, until the next would exceed this rank's share of the rows.

    Blocks are centred about a pivot, the mean of the first block, and multiplied in ``dtype``; sums are kept in
    float64, one half of the symmetric products, from a layer's first rows to the report alone. One product per group
    costs no more than one for all.

    Args:
        names: The layers; may grow until the first output arrives.
        num_tokens: Rows per layer and report over all ranks, at the most (but one sample a rank at the least).
        num_groups: Groups G of samples whose moments are kept apart for error bars; G > 1 take the memory of G + 1.
        normalize: Apply a parameter-free RMSNorm over the last axis first.
        dtype: Type of the products, float32 or float64; ``in_float64`` names layers that have the wider anyway.
        device: Where rows are, if it can hold float64, else the CPU.
        layout: Which ranks hold which data, None for each its own; of those that hold the same, one collects.
        keep: Where sums of products are kept: on the device, the CPU, or the device while all layers' take no more
            than a share of what is free there (:func:`placed`). Settled once for a run, by each rank for itself.
    """

    def __init__(
        self,
        names: list[str],
        num_tokens: int,
        num_groups: int,
        normalize: bool,
        dtype: torch.dtype,
        device: torch.device,
        layout: Layout | None = None,
        keep: Keep = "auto",
    ) -> None:
        self.names = names
        self.num_groups = num_groups
        self.normalize = normalize
        self.dtype = dtype
        self.device = device
        self.failures: dict[str, str] = {}
        """Why layers could not be collected for this report, by name; what one rank fails, all ranks report as NaN."""
        layout = Layout.of_world() if layout is None else layout
        self._counts = layout.counts
        self._num_ranks = world_size()
        self._world, self._rank = layout.world, layout.rank
        self._share = num_tokens // self._world
        self.in_float64: set[str] = set()
        """Layers whose products are taken in float64; to be changed between reports only."""
        self.closed: Collection[str] = ()
        """Layers whose rows go by uncounted, for they lie before their part of a window."""
        self._batch = 0
        self._num_samples: int | None = None
        self._place: Place | None = None
        self._mask: Tensor | None = None
        self._real_tokens: list[int] = []
        self._keep = keep
        self._home: torch.device | None = None
        """Where sums of products are kept; None until it is settled."""
        self._behind: Behind | None = None
        """Through which a GPU's products come to sums on the CPU; None where there are none."""
        self._of_width: dict[int, list[str]] = {}
        """Names of the layers of each width, in an order that all ranks share."""
        self._sums: dict[str, Sums] = {}
        self._spare: dict[str, Sums] = {}
        """The slot beyond those of the groups, of layers that have come to use it."""
        self._progress: dict[str, _Progress] = defaultdict(lambda: _Progress(num_groups))

    def begin_batch(self, num_samples: int | None, mask: Tensor | None, place: Place | None = None) -> None:
        """Say what the outputs that follow belong to: a batch of so many samples, None if unknown.

        The boolean mask is True where a token counts, None for all. ``place`` is where the batch lies in its pass; None
        where that is not known, or rows are not to be spread.
        """
        self._batch += 1
        self._place = place
        self._num_samples, self._mask, self._real_tokens = num_samples, None, []
        # The one number a GPU must tell the host, once for all layers.
        self._real_tokens = [] if mask is None else mask.reshape(len(mask), mask.shape[1:].numel()).sum(1).tolist()
        self._mask = mask

    def add(self, name: str, output: Tensor, lengths: list[int] | None = None) -> None:
        """Take in a layer's output, ``(..., d)``, any floating dtype; a failure goes to ``failures``, never raised.

        Of samples of unequal ``lengths`` it is ``(sum(lengths), d)``, and a mask must leave just these rows.
        """
        if name in self.closed or not self._counts:
            return
        progress = self._progress[name]
        progress.offered += output.shape[:-1].numel() if self._mask is None or lengths else sum(self._real_tokens)
        if progress.is_full or name in self.failures:
            return
        try:
            with torch.autocast(output.device.type, enabled=False), ieee_products():
                self._add(name, progress, output, lengths)
        except Exception as error:
            self.failures[name] = reason_of(error)

    def _sums_of(self, name: str, output: Tensor, lengths: list[int] | None) -> Sums:
        if output.ndim < 2 or output.shape[-1] == 0:
            raise ValueError("its output holds no floating-point tensor of two or more axes")
        if lengths is not None:
            if self._mask is not None and lengths != self._real_tokens:
                raise ValueError(
                    "its output is a nested tensor of other lengths than mask leaves of each sample: give no mask"
                )
        elif self._mask is not None and self._mask.shape != output.shape[:-1]:
            raise ValueError(f"mask has shape {tuple(self._mask.shape)}, the output's rows {tuple(output.shape[:-1])}")
        sums = self._sums.get(name)
        if sums is None:
            sums = self._sums[name] = self._empty(self.num_groups, output.shape[-1])
        elif sums.width != output.shape[-1]:
            raise ValueError(f"its width changed from {sums.width} to {output.shape[-1]}")
        return sums

    def _empty(self, num_groups: int, width: int) -> Sums:
        if self._home is None:
            # Before the widths of all are known, they are taken for alike.
            known = self._of_width or {width: self.names}
            needed = sum(len(names) * sums_bytes(self.num_groups, width, self.device) for width, names in known.items())
            self._home = placed(self._keep, needed, self.device).device
        try:
            sums = Sums(num_groups, width, self.device, self._home)
        except torch.OutOfMemoryError:
            if self._keep != "auto" or self._home == CPU:
                raise
            self._home = CPU
            sums = Sums(num_groups, width, self.device, self._home)
        if self._home != self.device and self._behind is None:
            self._behind = Behind()
        return sums

    def _settle(self) -> None:
        if self._behind is not None:
            self._behind.settle()

    def _dtype_of(self, name: str) -> torch.dtype:
        return torch.float64 if name in self.in_float64 else self.dtype

    def _add(self, name: str, progress: _Progress, output: Tensor, lengths: list[int] | None) -> None:
        sums, mask, dtype = self._sums_of(name, output, lengths), self._mask, self._dtype_of(name)
        if dtype == torch.float64 and output.device.type == "mps":  # which has none
            output, mask = output.cpu(), None if mask is None else mask.cpu()
        samples: Tensor | tuple[Tensor, ...]
        is_whole = False
        if lengths is not None and self._num_samples in (None, len(lengths)):
            samples, mask, rows_per_sample = output.split(lengths), None, lengths
        elif lengths is None and output.shape[0] == self._num_samples:
            samples = output
            rows_per_sample = self._real_tokens if mask is not None else [output.shape[1:-1].numel()] * len(output)
        else:
            samples, is_whole = output.unsqueeze(0), True
            mask = None if mask is None or lengths is not None else mask.unsqueeze(0)
            rows_per_sample = [output.shape[:-1].numel() if mask is None else sum(self._real_tokens)]
        if progress.batch != self._batch:
            progress.batch, progress.is_whole = self._batch, is_whole
            self._choose(name, progress, rows_per_sample)
        parts = progress.parts
        if is_whole != progress.is_whole:  # of a layer that is called in two ways
            parts = [(slot, list(range(len(rows_per_sample)))) for slot, _ in parts[:1]]
        for slot, chosen in parts:
            fitting = self._fitting(progress, rows_per_sample, chosen)
            if num_rows := sum(rows_per_sample[index] for index in fitting):
                part, kept = _picked(samples, fitting), None if mask is None else _picked(mask, fitting)
                self._accumulate(sums, self._slot(name, slot), part, kept, num_rows, progress.rows == 0, dtype)
                progress.rows += num_rows

    def _choose(self, name: str, progress: _Progress, rows_per_sample: list[int]) -> None:
        """Choose samples of a new batch, and their slots."""
        chosen, rows, size = [], progress.rows, len(rows_per_sample)
        # How often the layer is called in a batch, as far as batches before have shown.
        calls = max(progress.rows // max(progress.rows_of_one_call, 1), 1)
        for index, num_rows in enumerate(rows_per_sample):
            if num_rows == 0 or not (self._place is None or self._place.is_due(rows, self._share, index, size)):
                continue
            # At least one with a real token is taken where there is none yet.
            if rows and rows + num_rows > self._share:
                progress.is_full = True
                break
            chosen.append(index)
            progress.rows_of_one_call += num_rows
            rows += num_rows * calls
        joins, runs = progress.stretches.place(len(chosen))
        self._join(name, joins)
        progress.parts = [(run.slot, chosen[run.start : run.stop]) for run in runs]

    def _fitting(self, progress: _Progress, rows_per_sample: list[int], chosen: list[int]) -> list[int]:
        """Those of the samples chosen that still fit into this rank's share, in a further call too."""
        rows = progress.rows
        for number, index in enumerate(chosen):
            if rows and rows + rows_per_sample[index] > self._share:
                progress.is_full = True
                return chosen[:number]
            rows += rows_per_sample[index]
        return chosen

    def _slot(self, name: str, slot: int) -> Slot:
        """One of the groups', or the spare."""
        if slot < self.num_groups:
            return self._sums[name].slot(slot)
        if name not in self._spare:
            self._spare[name] = self._empty(1, self._sums[name].width)
        return self._spare[name].slot(0)

    def _join(self, name: str, joins: Sequence[int]) -> None:
        """Carry out joins of slots, see :class:`Stretches`; all sums of a layer are about one pivot."""
        if joins:
            self._settle()
        for first in joins:
            for mine, theirs in zip(self._slot(name, first), self._slot(name, first + 1), strict=True):
                mine.add_(theirs)
            for slot in range(first + 1, self.num_groups):
                for mine, theirs in zip(self._slot(name, slot), self._slot(name, slot + 1), strict=True):
                    mine.copy_(theirs)
            for emptied in self._slot(name, self.num_groups):
                emptied.zero_()

    def _finish(self, name: str) -> None:
        """Bring what slots hold into the groups' own."""
        stretches = self._progress[name].stretches
        self._settle()
        self._join(name, stretches.finish())
        # From the last on, for none moves to an earlier one.
        for slot, group in reversed(list(enumerate(stretches.groups(self._rank, self._world)))):
            if slot != group:
                for mine, theirs in zip(self._slot(name, slot), self._slot(name, group), strict=True):
                    theirs.copy_(mine)
                    mine.zero_()

    def _accumulate(
        self,
        sums: Sums,
        slot: Slot,
        samples: Tensor,
        mask: Tensor | None,
        num_rows: int,
        is_first: bool,
        dtype: torch.dtype,
    ) -> None:
        if samples.dtype.itemsize > dtype.itemsize:
            samples = samples.to(dtype)
        scale = inverse_rms(samples, dtype) if self.normalize else None
        keep = None if mask is None else mask.unsqueeze(-1)
        if is_first:
            origin = samples.new_zeros(samples.shape[-1], dtype=dtype)
            pivot = self._centred(samples, scale, origin, keep).sum(0)
            sums.pivot.copy_(pivot / max(num_rows, 1))
        centred = self._centred(samples, scale, sums.pivot.to(samples.device, dtype), keep)
        slot.num_rows.add_(num_rows)
        slot.total.add_(centred.sum(0).to(slot.total))
        sums.panels.add_products(slot.outer, centred, self._behind if slot.outer.device.type == "cpu" else None)

    @staticmethod
    def _centred(samples: Tensor, scale: Tensor | None, pivot: Tensor, keep: Tensor | None) -> Tensor:
        """Rows ``(n, d)``, normalised, about a pivot, zero where they do not count: in one pass, two with a mask."""
        centred = samples - pivot if scale is None else torch.addcmul(-pivot, samples, scale)
        if keep is not None:
            centred = torch.where(keep, centred, 0.0)
        return centred.reshape(-1, samples.shape[-1])

    def offered(self, name: str) -> int:
        """Rows of a layer that went by in this report on this rank."""
        return self._progress[name].offered if name in self._progress else 0

    def drop(self, names: Collection[str]) -> None:
        """Forget the rows of some layers."""
        self._settle()
        for name in names:
            self._sums.pop(name, None)
            self._spare.pop(name, None)
            self._progress.pop(name, None)

    def agree(self) -> dict[str, float]:
        """Let all ranks know every layer's width, so that what they send matches; a collective.

        Returns:
            Rows of each layer offered to all ranks together, as if they had all run it.
        """
        num_names = len(self.names)
        numbers = [measure(name) for measure in (self.offered, self._width) for name in self.names]
        of_ranks = gather_numbers(numbers, self.device)
        by_width: dict[int, list[str]] = defaultdict(list)
        for index, name in enumerate(self.names, start=num_names):
            width = int(of_ranks[:, index].max())
            if bool(((of_ranks[:, index] != width) & (of_ranks[:, index] != 0)).any()):
                self.failures[name] = "its width differs between ranks"
            by_width[width].append(name)
        by_width.pop(0, None)
        self._of_width = dict(sorted(by_width.items()))
        offered = of_ranks[:, :num_names]
        rows = self._as_if_all(offered.sum(0), (offered > 0).sum(0))
        return dict(zip(self.names, rows, strict=True))

    def _as_if_all(self, offered: Tensor, num_ranks: Tensor) -> list[float]:
        """Rows that some ranks saw, for all: a rank has its share of the rows however many others run the layer."""
        return (offered * (self._world / num_ranks.clamp(min=1))).tolist()

    def _width(self, name: str) -> int:
        return self._sums[name].width if name in self._sums else 0

    @property
    def is_agreed(self) -> bool:
        """Whether the width of every layer is known to all ranks."""
        return sum(map(len, self._of_width.values())) == len(self.names)

    def pool(self) -> Iterator[tuple[list[str], Moments, list[float], list[str]]]:
        """Moments of all ranks' rows, width by width; a collective. Consumes the sums: :meth:`reset` must follow.

        Yields:
            The layers of one width, their moments ``(layers, groups)``, the rows of each offered to all ranks together,
            as if they had all run it, and the narrowest type of its products on any rank.
        """
        if not self.is_agreed:
            self.agree()
        for width in self.widths:
            yield self.names_of(width), *self.pool_width(width)

    @property
    def widths(self) -> list[int]:
        """Widths of the layers, ascending, as agreed."""
        return list(self._of_width)

    def names_of(self, width: int) -> list[str]:
        """The layers of a width."""
        return self._of_width[width]

    def pool_width(self, width: int) -> tuple[Moments, list[float], list[str]]:
        """What :meth:`pool` gives for the layers of one width; a collective."""
        names, parts = self._of_width[width], []
        for name in names:
            if name in self._progress and self._width(name) == width and name not in self.failures:
                self._finish(name)
            self._spare.pop(name, None)
            kept = self._sums.pop(name, None)
            # A rank that has none must send as much as the others.
            parts.append(kept if kept is not None and kept.width == width else self._empty(self.num_groups, width))
            if name in self.failures:
                # All ranks must come to the same result, and only NaN survives a sum.
                parts[-1].count.fill_(torch.nan)
        is_double = [self._dtype_of(name) == torch.float64 for name in names]
        numbers = [[self.offered(name) for name in names], [self.offered(name) > 0 for name in names], is_double]
        riders = torch.tensor(numbers, dtype=torch.float64, device=self.device)
        self._settle()
        moments, totals = pooled(parts, riders.flatten(), self.device)
        offered, num_ranks, num_double = totals.chunk(3)
        dtypes = ["float64" if number == self._num_ranks else "float32" for number in num_double.tolist()]
        return moments, self._as_if_all(offered, num_ranks), dtypes

    def reset(self) -> None:
        """Forget all rows, and give their memory back; nothing slides from one report into the next."""
        self.release()
        self._progress.clear()
        self.failures.clear()

    def forget(self) -> None:
        """Forget the layers' widths, too: under their names there are others now. All ranks do, or none."""
        self.reset()
        self._of_width.clear()
        self._home = None

    def release(self) -> None:
        """Give all memory back."""
        self._settle()
        self._sums.clear()
        self._spare.clear()


def _picked(samples: Tensor | tuple[Tensor, ...], indices: list[int]) -> Tensor:
    """Some of the samples: a view where they are of one length and lie evenly."""
    if isinstance(samples, tuple):
        return torch.cat([samples[index] for index in indices])
    step = indices[1] - indices[0] if len(indices) > 1 else 1
    evenly = range(indices[0], indices[0] + step * len(indices), step)
    if list(evenly) == indices:
        return samples[evenly.start : evenly.stop : step]
    return samples.index_select(0, torch.tensor(indices, device=samples.device))
